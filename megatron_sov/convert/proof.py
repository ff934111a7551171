"""The proof of a conversion: two folders hold the same model, and transformers loads what we wrote.

Every check is a number with its limit.  Tensors are compared one at a time under their Hugging Face names; where dtypes
differ, both are rounded to the narrower one first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from megatron_sov import models
from megatron_sov.artifacts import MANIFEST, atomic_write, damaged_files, to_json
from megatron_sov.convert.sources import HfWeights, Weights, listed, open_weights
from megatron_sov.errors import UserError
from megatron_sov.models.family import TokenIds
from megatron_sov.version import __version__

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class Check:
    """One measured statement about a conversion."""

    name: str
    """What was measured."""
    value: float
    """The figure."""
    limit: float
    """Largest figure that passes."""
    passed: bool
    """Whether value <= limit."""
    detail: str = ""
    """What does not fit, if anything."""


def _count(name: str, found: list[str]) -> Check:
    return Check(name, len(found), 0, not found, listed(found))


def verify(a: str | Path, b: str | Path, *, load: bool = True) -> list[Check]:
    """Compare two models, each a checkpoint or a Hugging Face folder.

    Args:
        a: the one folder.
        b: the other.
        load: also load Hugging Face folders with transformers, which needs memory for the whole model.

    Returns:
        Every check that was made, passed or not.

    Raises:
        UserError: a folder cannot be opened, or is too large to be loaded here.
    """
    sides = [open_weights(a), open_weights(b)]
    checks = [_count(f"{side.path}: files that differ from the manifest", damaged_files(side.path))
              for side in sides if (side.path / MANIFEST).is_file()]
    checks.append(_count("config fields that differ", _differing_fields(*sides)))
    checks += _tensor_checks(*sides)
    if load:
        for side in sides:
            if isinstance(side, HfWeights):
                checks += _loading_checks(side)
    return checks


def write_card(path: Path, a: str | Path, b: str | Path, checks: list[Check]) -> None:
    """Write the verification card: what was compared, with which versions, and every figure."""
    import transformers

    atomic_write(path, to_json({
        "a": str(a), "b": str(b), "passed": all(check.passed for check in checks), "checks": checks,
        "versions": {"megatron_sov": __version__, "torch": torch.__version__, "transformers": transformers.__version__}}))


def _differing_fields(a: Weights, b: Weights) -> list[str]:
    """Compare what both would write into config.json, so that settings which only steer training do not count."""
    one, other = (models.get(side.model.family).to_hf_config(side.model, "any", TokenIds()) for side in (a, b))
    return [f"{name} ({one.get(name)} and {other.get(name)})" for name in {**one, **other} if one.get(name) != other.get(name)]


def _tensor_checks(a: Weights, b: Weights) -> list[Check]:
    names, others = a.names(), set(b.names())
    common = [name for name in names if name in others]
    differing, largest = [], 0.0
    for name in tqdm(common, desc="verify", unit="tensor", disable=None):
        one, other = _in_one_dtype(a.read(name), b.read(name))
        if not _same_bits(one, other):
            differing.append(name)
            if one.shape == other.shape:
                largest = max(largest, float((one.double() - other.double()).abs().max()))
    return [
        _count("tensors that only one side has", sorted(others.symmetric_difference(names))),
        _count("tensors whose values differ", differing),
        Check("largest difference of a weight", largest, 0.0, largest == 0.0),
    ]


def _in_one_dtype(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    narrower = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return one.to(narrower), other.to(narrower)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare bit patterns: NaN equals itself, and 0.0 is not -0.0."""
    bits = _BITS[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def _loading_checks(side: HfWeights) -> list[Check]:
    """Load with transformers as a user would, and count the keys that it reports."""
    _check_memory(side.path)
    from transformers import AutoModelForCausalLM

    title = f"{side.path}: transformers reports keys"
    try:
        _, info = AutoModelForCausalLM.from_pretrained(
            side.path, dtype="auto", output_loading_info=True, local_files_only=True, use_safetensors=True)
    except (RuntimeError, ValueError, OSError) as e:
        return [Check(f"{side.path}: transformers loads it", 1, 0, False, str(e).strip().splitlines()[0])]
    return [_count(f"{title} {kind}", sorted(map(str, info[f"{kind}_keys"]))) for kind in ("missing", "unexpected", "mismatched")]


def _check_memory(path: Path) -> None:
    needed_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    free_bytes = psutil.virtual_memory().available
    if needed_bytes > free_bytes:
        raise UserError(f"{path}: loading takes {needed_bytes / 1e9:.1f} GB, but {free_bytes / 1e9:.1f} GB are free; "
                        "pass --no-load to compare the files alone")
