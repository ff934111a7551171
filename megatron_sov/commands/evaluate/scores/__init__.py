"""Commands on the result files of `megatron-sov eval lm`."""
