"""Where a medium of a record may lie: inside of the folder of media, and nowhere else."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from megatron_sov.base.documents import BadRecord


def place_of(root: Path, path: str) -> Path:
    """Return where a medium lies.

    Args:
        root: the folder of media.
        path: as a record names it, relative to the root.

    Raises:
        BadRecord: it leads out of the root, by its parts or by a link, or nothing is there.
    """
    parts = PurePosixPath(path)
    if not path or "\0" in path or parts.is_absolute() or ".." in parts.parts or "\\" in path:
        raise BadRecord("outside", "is no path below --media-root; name it relative to that folder, "
                                   "without ..")
    file = root / parts
    try:
        real = file.resolve(strict=True)
    except (OSError, RuntimeError):
        raise BadRecord("missing", f"is not in {root}; add it, or mend the record") from None
    if not real.is_relative_to(root.resolve()):
        raise BadRecord("outside", "is a link that leads out of --media-root; copy the file there")
    return real
