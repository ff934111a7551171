"""Settings of Megatron-LM and Megatron-Bridge, as ours.  Nothing of theirs is imported or run."""
