"""`megatron-sov ssp probe | fuse`, and `megatron-sov rl knowledge`, which prepares text for the same stage."""
