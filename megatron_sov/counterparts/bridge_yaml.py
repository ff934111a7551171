"""Reading a YAML file of Megatron-Bridge (`ConfigContainer`) as plain values: `_target_` is text here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_sov.documents.bounded_yaml import BoundedLoader
from megatron_sov.errors import UserError

MAX_BYTES = 8 << 20
"""A run's whole configuration has some 100 kB."""


def read_sections(file: Path) -> dict[str, dict[str, Any]]:
    """Return the sections (model, train, optimizer, ...) of a file.

    Raises:
        UserError: it is no YAML of plain values, or has no sections.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{file}: has {file.stat().st_size:,} bytes, and a file of settings has "
                            f"{MAX_BYTES:,} at most; pass a YAML file of Megatron-Bridge")
        found = yaml.load(file.read_text(encoding="utf-8-sig"), Loader=BoundedLoader)
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); see to its permissions") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{file}: is no YAML of plain values ({reason}); restore it from its "
                        "source") from None
    sections = {name: value for name, value in found.items() if isinstance(name, str)} \
        if isinstance(found, dict) else {}
    if not any(isinstance(value, dict) for value in sections.values()):
        raise UserError(f"{file}: has no sections such as model and train, so it is no configuration of "
                        "Megatron-Bridge")
    return {name: {str(key): item for key, item in value.items()} for name, value in sections.items()
            if isinstance(value, dict)}
