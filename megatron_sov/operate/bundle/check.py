"""Checks a bundle on the machine that it is to be installed on; lies in the bundle and needs Python's
own library alone."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 20


def problems(bundle: Path) -> list[str]:
    """Return one sentence for each reason why a bundle cannot be installed here."""
    try:
        manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        wanted, machine = manifest["content"]["python"], manifest["content"]["machine"]
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        return [f"{bundle / 'manifest.json'}: cannot be read ({e!r}); copy the bundle again"]
    found = []
    here = ".".join(map(str, sys.version_info[:2]))
    if here != wanted:
        found.append(f"the bundle is for Python {wanted}, {sys.executable} is {here}; "
                     "name another with PYTHON=/path/to/python")
    if platform.machine() != machine:
        found.append(f"the bundle is for {machine}, this machine is {platform.machine()}; "
                     "make one with --platform")
    return found or [text for name, record in files.items()
                     if (text := _damage(bundle / name, record))]


def _damage(file: Path, record: dict[str, Any]) -> str:
    if not file.is_file():
        return f"{file}: is missing; copy the bundle again"
    digest = hashlib.sha256()  # in Python's own library, unlike the hash of other artifacts
    with open(file, "rb") as f:
        while block := f.read(BLOCK_BYTES):
            digest.update(block)
    return ("" if f"sha256:{digest.hexdigest()}" == record["digest"]
            else f"{file}: differs from its hash; copy the bundle again")


def main() -> int:
    """Print what is wrong; returns 2 where something is."""
    found = problems(Path(__file__).resolve().parent)
    for text in found:
        print(f"error: {text}", file=sys.stderr)
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
