"""What computes: Megatron-Core behind one door."""
