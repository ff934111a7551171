"""The logits of both sides of a conversion, and the verification card that says what was compared, how,
and with what result."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_sov import convert
from megatron_sov.artifacts import MANIFEST, manifest_sha256, to_json, write_output
from megatron_sov.convert import ParityCheck
from megatron_sov.convert.proof import Proof
from megatron_sov.convert.sources import Weights
from megatron_sov.errors import ExitCode, UserError
from megatron_sov.eval.parity import MAX_DIFFERENCE, compare_hf_logits, compare_logits, random_prompts
from megatron_sov.generate.target import Target, as_checkpoint
from megatron_sov.mcore.parallel import launcher
from megatron_sov.models.count import num_params
from megatron_sov.obs.figures import size
from megatron_sov.version import __version__

SEED = 0


@dataclass(frozen=True)
class LogitsProof:
    """What running both sides found."""

    checks: list[ParityCheck]
    """Empty where the logits were not compared."""
    method: dict[str, Any] = field(default_factory=dict)
    """For the card: prompts, precision, who ran each side; or why nothing was run."""


def prove_logits(a: Path, b: Path, lengths: Sequence[int], settings: Sequence[str] = (),
                 nproc: int | None = None) -> LogitsProof:
    """Run both sides on the same random prompts, in float32, and compare their logits.

    A checkpoint is run by megatron-core, a Hugging Face folder by transformers.  Where one side is stored in
    a wider dtype, both run with the narrower one's weights (the weights themselves are compared by
    `convert.verify`): the wider one is converted for the while.

    Args:
        a: checkpoint or Hugging Face folder.
        b: the other.
        lengths: tokens of each prompt; those that the model cannot take are left out.
        settings: layout of the checkpoint's side, e.g. ``parallel.ep=2``.
        nproc: processes of the checkpoint's side.

    Returns:
        The checks and how they were made; no checks on other processes than the first of a
        torchrun or Slurm job.

    Raises:
        UserError: a side cannot be opened or is too large to be run here.
    """
    sides = [convert.open_weights(a), convert.open_weights(b)]
    checkpoints = [side for side in sides if not convert.is_hf_folder(side.path)]
    folders = [side for side in sides if convert.is_hf_folder(side.path)]
    if len(checkpoints) == 2:
        return LogitsProof([], {"not compared": "both sides are checkpoints, run by one program: "
                                                "equal weights, equal logits"})
    if len(folders) == 2 and _dtype(folders[0]) != _dtype(folders[1]):
        return LogitsProof([], {"not compared": "both sides are run by transformers and differ in dtype: "
                                                "see the weights"})
    _check_memory(sides)
    fitting = [n for n in lengths if n <= sides[0].model.max_position_tokens]
    prompts = random_prompts(fitting, min(side.model.vocab_size for side in sides), SEED)
    method = {"prompts": {"lengths": fitting, "tokens": "random", "seed": SEED}, "precision": "float32",
              "largest difference allowed": f"{MAX_DIFFERENCE} of the largest logit, or of 1",
              "run by": {str(side.path): "transformers" if side in folders else "megatron-core"
                         for side in sides}}
    if len(folders) == 2:
        return LogitsProof(compare_hf_logits(folders[0].path, folders[1].path, prompts), method)
    with _same_weights(checkpoints[0], folders[0]) as (checkpoint, folder):
        if (checkpoint, folder) != (checkpoints[0].path, folders[0].path):
            method["weights"] = ("of the narrower side, "
                                 f"{min(sides, key=lambda side: _dtype(side).itemsize).path}")
        return LogitsProof(compare_logits(checkpoint, folder, prompts, settings=settings, nproc=nproc),
                           method)


@contextmanager
def _same_weights(checkpoint: Weights, folder: Weights) -> Iterator[tuple[Path, Path]]:
    """Give both sides with weights of one precision, the narrower one's."""
    wider = _dtype(checkpoint).itemsize - _dtype(folder).itemsize
    if wider > 0:
        with as_checkpoint(Target(folder.path, True)) as narrow:
            yield narrow, folder.path
    elif wider < 0:
        with tempfile.TemporaryDirectory(prefix="sov-export-") as parent:
            if launcher.apart(lambda: convert.to_hf(checkpoint.path, Path(parent) / "hf")):
                raise SystemExit(ExitCode.CRASH)
            yield checkpoint.path, Path(parent) / "hf"
    else:
        yield checkpoint.path, folder.path


def _dtype(side: Weights) -> torch.dtype:
    return side.dtype(side.names()[0])


def _check_memory(sides: Sequence[Weights]) -> None:
    count = num_params(sides[0].model)
    needed_bytes = (count.total + count.mtp) * 4 * 2
    free_bytes = psutil.virtual_memory().available
    if needed_bytes > free_bytes:
        raise UserError(f"{sides[0].path}: running both sides in float32 takes {size(needed_bytes)}, "
                        f"but {size(free_bytes)} are free; pass --no-load to compare the files alone")


def card(a: Path, b: Path, weights: Proof, logits: LogitsProof) -> dict[str, Any]:
    """Return the verification card: what was compared, the tolerances, versions, every figure,
    every tensor's checksums."""
    checks = [*weights.checks, *logits.checks]
    return {
        "a": _identity(a), "b": _identity(b), "passed": all(check.passed for check in checks),
        "checks": [{**vars(check), "value": check.value if math.isfinite(check.value) else str(check.value)}
                   for check in checks], "logits": logits.method,
        "weights": "every tensor under its Hugging Face name, bit by bit; "
                   "of two dtypes, after rounding to the narrower one",
        "tensors": {name: vars(record) for name, record in weights.tensors.items()},
        "versions": {"megatron_sov": __version__,
                     **{name: version(name) for name in ("megatron-core", "torch", "transformers")}},
    }


def write_card(path: Path, content: dict[str, Any]) -> None:
    write_output(path, to_json(content))


def _identity(path: Path) -> dict[str, str]:
    path = convert.open_weights(path).path
    manifest = {"manifest_sha256": manifest_sha256(path)} if (path / MANIFEST).is_file() else {}
    return {"path": str(path), "kind": "hf_model" if convert.is_hf_folder(path) else "checkpoint", **manifest}
