"""What computes: the order of data, Megatron-Core behind one door, conversion of checkpoints."""
