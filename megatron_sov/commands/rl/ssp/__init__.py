"""`megatron-sov ssp probe | fuse`, and `megatron-sov rl knowledge`."""
