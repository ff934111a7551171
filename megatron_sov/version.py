"""The version of the framework, for the wheel and for provenance."""

from __future__ import annotations

__version__ = "0.1.0"
