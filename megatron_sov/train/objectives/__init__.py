"""What is learned: the contract of an objective, its micro-batches, and next-token prediction."""
