"""Version and packages. setup.py executes this file alone, without the package: no imports."""

__version__ = "0.1.0"

OUR_PACKAGES = ("megatron_sov", "tokenizer", "data_prep", "layout_proof", "slurm")
"""Top-level packages in the wheel and in job snapshots; `slurm` contains only data files."""
