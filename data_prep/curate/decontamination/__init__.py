"""Text of benchmarks found in what a model is to be trained on, and taken out."""
