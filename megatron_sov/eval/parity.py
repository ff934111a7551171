"""The proof that our model is transformers' model: equal logits for equal tokens,
documents packed here and alone there; and the card that says what was compared, how, and with what result."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from megatron_sov import convert
from megatron_sov.base.artifacts import MANIFEST, manifest_sha256
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.figures import format_size
from megatron_sov.convert import ParityCheck
from megatron_sov.convert.hf_export import Proof
from megatron_sov.convert.sources import Weights
from megatron_sov.engine.decode.forward_only import DocumentBatch, ForwardModel
from megatron_sov.engine.parallel import launcher
from megatron_sov.engine.parallel.device import get_local_device
from megatron_sov.eval.heldout import rows_of
from megatron_sov.infer.engines.libraries import load_hf
from megatron_sov.infer.engines.load import Loaded, run_forward_model
from megatron_sov.infer.engines.target import Target, as_checkpoint
from megatron_sov.model.families.count import num_params
from megatron_sov.version import __version__

MAX_DIFFERENCE = 1e-4
"""Largest difference of a logit, relative to the largest logit (or to 1, if that is smaller)."""
LOGITS_BYTES = 1 << 30
"""Logits that are held at a time on either side."""


def compare_logits(checkpoint: Path, hf_dir: Path, prompts: Sequence[Sequence[int]], *,
                   settings: Sequence[str] = (), nproc: int | None = None) -> list[ParityCheck]:
    """Compare a checkpoint's logits with those of transformers on a Hugging Face folder, in fp32.

    Args:
        checkpoint: a checkpoint folder.
        hf_dir: a Hugging Face folder; the whole model must fit into memory.
        prompts: token ids of each document; ours packed into rows, transformers' one by one.
        settings: layout of our side, e.g. ``parallel.ep=2``.
        nproc: processes of our side.

    Returns:
        The checks, passed or not; none on other processes than the first of a torchrun or Slurm job.

    Raises:
        UserError: either side cannot be loaded.
    """
    def work(loaded: Loaded) -> list[dict[str, Any]]:
        # One process has both sides; the others take part in our forward pass alone.
        hf = load_hf(hf_dir, torch.float32) if loaded.world.is_main else None
        return [asdict(c) for c in _checks(loaded.policy, hf, prompts)]

    found = run_forward_model(Target(checkpoint, False), ["train.precision=fp32", *settings], nproc, work)
    return [ParityCheck(**c) for c in found or []]


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Return documents of random tokens: they visit rows of the embedding and experts that
    text seldom meets."""
    generator = np.random.Generator(np.random.Philox(seed))
    return [generator.integers(0, vocab_size, n).tolist() for n in lengths]


class _Difference:
    """The difference of two models' logits over documents."""

    def __init__(self) -> None:
        self._largest, self._scale, self._other, self._compared, self._worst = 0.0, 1.0, 0, 0, ""

    def add(self, document: int, ours: torch.Tensor, reference: torch.Tensor) -> None:
        """Take in logits [tokens, vocabulary] of one document.

        Raises:
            UserError: the two models have other vocabularies.
        """
        if ours.shape != reference.shape:
            raise UserError(f"the models have {ours.shape[-1]} and {reference.shape[-1]} token ids, so their "
                            "logits cannot be compared; pass two forms of one model")
        # NaN counts as infinite: max would pass over it.
        difference = float((ours - reference).abs().nan_to_num(nan=math.inf).max())
        self._scale = max(self._scale, float(reference.abs().max()))
        if difference > self._largest:
            self._largest, self._worst = difference, f"document {document} of {len(reference)} tokens"
        self._other += _clearly_different(ours, reference)
        self._compared += len(reference)

    def checks(self) -> list[ParityCheck]:
        """Return the largest difference of a logit, and the number of greedy tokens that differ."""
        # Rounding grows with the logits, so the limit does.
        limit = MAX_DIFFERENCE * self._scale
        return [ParityCheck("largest difference of a logit", self._largest, limit, self._largest <= limit,
                            self._worst), ParityCheck("greedy tokens that differ", self._other, 0,
                                                      self._other == 0, f"of {self._compared}")]


def _checks(policy: ForwardModel, hf: Any, prompts: Sequence[Sequence[int]]) -> list[ParityCheck]:
    """Return the checks on the process that has transformers' model, nothing of meaning elsewhere."""
    difference = _Difference()
    limit_tokens = max(LOGITS_BYTES // (4 * policy.model.vocab_size), max(map(len, prompts)))
    for row in rows_of([len(p) for p in prompts], limit_tokens):
        batch = DocumentBatch([prompts[i] for i in row], get_local_device())
        ours = policy.logits(batch, torch.arange(sum(len(prompts[i]) for i in row)))
        if hf is None:
            continue
        for i, mine in zip(row, ours.split([len(prompts[i]) for i in row]), strict=True):
            difference.add(i, mine, _hf_logits(hf, prompts[i]))
    return difference.checks()


@torch.no_grad()
def _hf_logits(model: Any, prompt: Sequence[int]) -> torch.Tensor:
    ids = torch.tensor([list(prompt)], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0].float().cpu()
    return logits


def _clearly_different(ours: torch.Tensor, reference: torch.Tensor) -> int:
    """Count positions with another most probable token, unless transformers' best two are as
    close as rounding."""
    best = reference.topk(2, dim=-1).values
    # Each of the two logits may be off by the limit, hence twice.
    clear = best[:, 0] - best[:, 1] > 2 * MAX_DIFFERENCE * max(1.0, float(reference.abs().max()))
    return int(((ours.argmax(-1) != reference.argmax(-1)) & clear).sum())


SEED = 0


@dataclass(frozen=True)
class LogitsProof:
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
    # One program on both sides proves nothing about the conversion.
    if len(checkpoints) == 2:
        return LogitsProof([], {"not compared": "both sides are checkpoints, run by one program: "
                                                "equal weights, equal logits"})
    if len(folders) == 2:
        return LogitsProof([], {"not compared": "both sides are Hugging Face folders, run by one program: "
                                                "equal weights, equal logits"})
    _check_memory(sides)
    fitting = [n for n in lengths if n <= sides[0].model.max_position_tokens]
    prompts = random_prompts(fitting, min(side.model.vocab_size for side in sides), SEED)
    method = {"prompts": {"lengths": fitting, "tokens": "random", "seed": SEED}, "precision": "float32",
              "largest difference allowed": f"{MAX_DIFFERENCE} of the largest logit, or of 1",
              "run by": {str(side.path): "transformers" if side in folders else "megatron-core"
                         for side in sides}}
    with _same_weights(checkpoints[0], folders[0]) as (checkpoint, folder):
        checks = compare_logits(checkpoint, folder, prompts, settings=settings, nproc=nproc)
        if (checkpoint, folder) != (checkpoints[0].path, folders[0].path):
            narrower = min(sides, key=_bits)
            method["weights"] = f"of the narrower side, {narrower.path}"
            told = f"weights of both in {str(_dtype(narrower)).removeprefix('torch.')}"
            checks = [replace(check, detail=f"{check.detail}, {told}".removeprefix(", ")) for check in checks]
        return LogitsProof(checks, method)


@contextmanager
def _same_weights(checkpoint: Weights, folder: Weights) -> Iterator[tuple[Path, Path]]:
    """Give both sides with weights of one precision, the narrower one's."""
    wider = _bits(checkpoint) - _bits(folder)
    if wider > 0:
        with as_checkpoint(Target(folder.path, True)) as narrow:
            yield narrow, folder.path
    elif wider < 0:
        with tempfile.TemporaryDirectory(prefix="sov-export-") as parent:
            if launcher.run_in_fork(lambda: convert.to_hf(checkpoint.path, Path(parent) / "hf")):
                raise SystemExit(ExitCode.CRASH)
            yield checkpoint.path, Path(parent) / "hf"
    else:
        yield checkpoint.path, folder.path


def _bits(side: Weights) -> int:
    """Return how wide a side's weights are."""
    return 8 * _dtype(side).itemsize


def _dtype(side: Weights) -> torch.dtype:
    return side.get_dtype(side.list_names()[0])


def _check_memory(sides: Sequence[Weights]) -> None:
    count = num_params(sides[0].model)
    needed_bytes = (count.total + count.mtp) * 4 * 2
    free_bytes = psutil.virtual_memory().available
    if needed_bytes > free_bytes:
        raise UserError(f"{sides[0].path}: running both sides in float32 takes {format_size(needed_bytes)}, "
                        f"but {format_size(free_bytes)} are free; pass --no-load to compare the files alone")


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


def _identity(path: Path) -> dict[str, str]:
    path = convert.open_weights(path).path
    manifest = {"manifest_sha256": manifest_sha256(path)} if (path / MANIFEST).is_file() else {}
    return {"path": str(path), "kind": "hf_model" if convert.is_hf_folder(path) else "checkpoint", **manifest}
