"""What is distributed: the version, for the wheel and for provenance, and the packages.

setup.py runs this file alone, so it imports nothing.
"""

from __future__ import annotations

__version__ = "0.1.0"

OUR_PACKAGES = ("megatron_sov", "tokenizer", "data_prep", "slurm")
"""Packages at the top of the tree, in the wheel and in the copy of the code that jobs run;
`slurm` holds data alone."""
