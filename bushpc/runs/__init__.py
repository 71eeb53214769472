"""What lies in a run folder: paths, records, checkpoints, leases and the account of where the time went."""
