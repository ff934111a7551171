"""Compare a layout of a Megatron-Core model with one rank; all ranks are simulated in this process."""
