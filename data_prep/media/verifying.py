"""Whether the banks of a shard are whole, and what its sidecar names is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.errors import UserError
from megatron_sov.media.banks import MEDIA, NONE, SIDECAR_DTYPE, open_bank, read_shapes


def media_problems(prefix: Path, source: dict[str, Any], tokens: NDArray[np.generic]) -> list[str]:
    """Return a sentence for each thing that is wrong with the media of a shard.

    Args:
        prefix: its files without their endings.
        source: the manifest's record of its source.
        tokens: its ids.
    """
    file = Path(f"{prefix}.{MEDIA}")
    try:
        shapes = read_shapes(source.get(MEDIA), f"source {source['name']!r}")
        rows = {kind: len(open_bank(Path(f"{prefix}.{kind}"), shape)) for kind, shape in shapes.items()}
    except UserError as e:
        return [str(e)]
    if not file.is_file():
        return []  # a missing file is reported with the hashes
    numbers = np.fromfile(file, np.dtype(SIDECAR_DTYPE).newbyteorder("<"))
    if len(numbers) != len(tokens):
        return [f"{file}: has {len(numbers)} numbers, and the shard {len(tokens)} tokens"]
    problems, stands = [], np.zeros(len(tokens), bool)
    for kind, shape in shapes.items():
        here = np.isin(tokens, shape.placeholder_ids)
        stands |= here
        if wrong := int(((numbers < 0) | (numbers >= rows[kind] * shape.slots))[here].sum()):
            problems.append(f"{file}: {wrong} placeholders of {kind} name none of its {rows[kind]} records")
    if wrong := int((numbers[~stands] != NONE).sum()):
        problems.append(f"{file}: {wrong} tokens that are no placeholders name a record")
    return problems
