"""A GPU without a GPU: what torch's fake tensors on `cuda:0` can tell; see `tools/fake_gpu --help`."""
