"""Version and packages of the distribution. setup.py executes this file alone, so it imports nothing."""

from __future__ import annotations

__version__ = "0.1.0"

OUR_PACKAGES = ("megatron_sov", "tokenizer", "data_prep", "slurm")
"""Top-level packages of the wheel and of the code snapshot of jobs; `slurm` contains only data files."""
