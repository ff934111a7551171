"""Check that optional libraries are installed."""

from importlib.util import find_spec

from megatron_sov.base.errors import format_install_command


def find_library_problems(user: str, *libraries: str, extra: str = "data") -> list[str]:
    """Return a problem with the install command for `extra` if `user` needs missing `libraries`, else []."""
    missing = [library for library in libraries if not _is_installed(library)]
    if not missing:
        return []
    verb = "is" if len(missing) == 1 else "are"
    return [f"{user} needs {' and '.join(missing)}, which {verb} not installed; "
            f"{format_install_command(extra)}"]


def _is_installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ValueError:  # `sys.modules` has a module without `__spec__` under this name
        return False
