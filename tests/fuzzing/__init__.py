"""For test_fuzz_readers.py: how valid files are changed, and who reads them."""
