"""Libraries that some work needs and that not every installation has."""

from __future__ import annotations

from importlib.util import find_spec

from megatron_sov.base.errors import format_install_command


def find_library_problems(what: str, *libraries: str, extra: str = "data") -> list[str]:
    """Return what is wrong where one of these modules is missing, as one of the problems of `what`."""
    missing = [library for library in libraries if not _is_there(library)]
    if not missing:
        return []
    are = "is" if len(missing) == 1 else "are"
    return [f"{what} needs {' and '.join(missing)}, which {are} not installed; "
            f"{format_install_command(extra)}"]


def _is_there(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ValueError:  # something else goes by its name
        return False
