"""What a codec's folder says of itself, its weights unread."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_sov.artifacts import read_manifest
from megatron_sov.codecs.folder import KIND, WEIGHTS, read_codec
from megatron_sov.errors import UserError
from megatron_sov.settings import plain


def inspected(folder: Path) -> dict[str, Any]:
    """Return kind, settings, number of parameters, and figures on held-out media where it was trained here.

    Raises:
        UserError: it is no codec, or one that no network can be made of.
    """
    kind, settings, _ = read_codec(folder)
    heldout = read_manifest(folder, KIND).content.get("heldout")
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise UserError(f"{folder / WEIGHTS}: cannot be read as a safetensors file ({e}); make the codec "
                        "again, or restore it from a copy") from None
    return {"codec": kind, "config": plain(settings), "num_parameters": sum(sizes),
            "heldout": heldout if isinstance(heldout, dict) else {}}
