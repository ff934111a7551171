"""Ready pipelines, one for each curriculum: data alone, to be copied and changed."""

from pathlib import Path

READY = Path(__file__).parent
"""Where they lie, wherever the package is installed."""
