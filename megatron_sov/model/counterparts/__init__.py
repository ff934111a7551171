"""Convert Megatron-LM and Megatron-Bridge settings to ours, without importing their code."""
