"""Framework-independent parts."""

from . import recipe  # noqa: F401
