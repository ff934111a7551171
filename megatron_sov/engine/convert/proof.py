"""The proof of a conversion: two folders hold the same model, and transformers loads what we wrote.

Every check is a number with its limit.  Tensors are compared one at a time under their Hugging Face names,
and every one leaves its checksums; where dtypes differ, both are rounded to the narrower one first.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from megatron_sov.base.artifacts import MANIFEST, damaged_files
from megatron_sov.base.errors import UserError
from megatron_sov.engine.convert import DEFAULT_WORKERS
from megatron_sov.engine.convert.copies import differing_copies
from megatron_sov.engine.convert.growing import open_weights
from megatron_sov.engine.convert.sources import HfWeights, Weights, tensors_left_out
from megatron_sov.model import families as models
from megatron_sov.model.families.family import TokenIds
from megatron_sov.model.pretrained import listed, load_and_compare
from megatron_sov.runs.obs.figures import size

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class ParityCheck:
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


def _count(name: str, found: list[str]) -> ParityCheck:
    return ParityCheck(name, len(found), 0, not found, listed(found))


@dataclass(frozen=True)
class TensorRecord:
    """One tensor on both sides."""

    shape: tuple[tuple[int, ...], ...]
    """Shape in A and in B."""
    dtype: tuple[str, ...]
    """Dtype in A and in B."""
    sha256: tuple[str, ...]
    """Hash of the bytes in A and in B, each in its own dtype."""
    equal: bool
    """Whether all values are the same, after rounding to the narrower dtype."""
    difference: float = 0.0
    """Largest difference of a value."""


@dataclass(frozen=True)
class Proof:
    """What a comparison found."""

    checks: list[ParityCheck]
    """Every statement, passed or not."""
    tensors: dict[str, TensorRecord]
    """Hugging Face name -> record, of all tensors that both sides have."""

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)


def verify(a: str | Path, b: str | Path, *, load: bool = True, workers: int = DEFAULT_WORKERS) -> Proof:
    """Compare the weights of two models, each a checkpoint or a Hugging Face folder.

    Args:
        a: the one folder.
        b: the other.
        load: also load Hugging Face folders with transformers, which needs memory for the whole model.
        workers: tensors, and files, that are read at a time.

    Raises:
        UserError: a folder cannot be opened, or is too large to be loaded here.
    """
    sides = [open_weights(a), open_weights(b)]
    checks = [
        _count(f"{side.path}: files that differ from the manifest", damaged_files(side.path, workers=workers))
        for side in sides if (side.path / MANIFEST).is_file()]
    checks.append(_count("config fields that differ", _differing_fields(*sides)))
    records = _compare(sides[0], sides[1], workers)
    checks += _tensor_checks(sides[0], sides[1], records)
    checks += [_count(f"{side.path}: copies that differ", differing_copies(side))
               for side in sides if isinstance(side, HfWeights) and side.copies]
    if load:
        for side in sides:
            if isinstance(side, HfWeights):
                checks += _loading_checks(side)
    return Proof(checks, records)


def _differing_fields(a: Weights, b: Weights) -> list[str]:
    """Compare what both would write into config.json, so that settings which only steer
    training do not count."""
    one, other = (models.get(side.model.family).to_hf_config(side.model, "any", TokenIds())
                  for side in (a, b))
    return [f"{name} ({one.get(name)} and {other.get(name)})"
            for name in {**one, **other} if one.get(name) != other.get(name)]


def _tensor_checks(a: Weights, b: Weights, records: dict[str, TensorRecord]) -> list[ParityCheck]:
    largest = max((record.difference for record in records.values()), default=0.0)
    return [
        _count("tensors that only one side has", sorted(set(a.names()).symmetric_difference(b.names()))),
        _count("tensors whose values differ", [name for name, record in records.items() if not record.equal]),
        ParityCheck("largest difference of a weight", largest, 0.0, largest == 0.0),
    ]


def _compare(a: Weights, b: Weights, workers: int) -> dict[str, TensorRecord]:
    """Return the record of every tensor that both sides have; `workers` tensors are in memory at a time."""
    others = set(b.names())
    common = [name for name in a.names() if name in others]
    with ThreadPoolExecutor(workers) as pool:
        found = tqdm(pool.map(lambda name: _record(a.read(name), b.read(name)), common), total=len(common),
                     desc="verify", unit="tensor", disable=None)
        return dict(zip(common, found, strict=True))


def _record(one: torch.Tensor, other: torch.Tensor) -> TensorRecord:
    shapes, dtypes = (tuple(one.shape), tuple(other.shape)), tuple(str(t.dtype).removeprefix("torch.")
                                                                   for t in (one, other))
    hashes = [_sha256(one)]
    if _same_bits(one, other):
        return TensorRecord(shapes, dtypes, (hashes[0], hashes[0]), True)
    hashes.append(_sha256(other))
    one, other = _in_one_dtype(one, other)
    equal = _same_bits(one, other)
    difference = (0.0 if equal or one.shape != other.shape
                  else float((one.double() - other.double()).abs().max()))
    return TensorRecord(shapes, dtypes, tuple(hashes), equal, difference)


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _in_one_dtype(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    narrower = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return one.to(narrower), other.to(narrower)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare bit patterns: NaN equals itself, and 0.0 is not -0.0."""
    bits = _BITS[one.dtype.itemsize]
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(bits),
                                                    other.contiguous().view(bits))


def _loading_checks(side: HfWeights) -> list[ParityCheck]:
    """Load with transformers as a user would, and count the keys that it reports."""
    _check_memory(side.path)
    from transformers import AutoModelForCausalLM

    try:
        _, found = load_and_compare(AutoModelForCausalLM, side.path, left_out=tensors_left_out(side.path),
                                    dtype="auto")
    except UserError as e:
        return [ParityCheck(f"{side.path}: transformers loads it", 1, 0, False, str(e))]
    return [_count(f"{side.path}: transformers reports keys {kind}", names) for kind, names in found.items()]


def _check_memory(path: Path) -> None:
    needed_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    free_bytes = psutil.virtual_memory().available
    if needed_bytes > free_bytes:
        raise UserError(f"{path}: loading takes {size(needed_bytes)} of memory, but {size(free_bytes)} "
                        "are free; pass --no-load to compare the files alone")
