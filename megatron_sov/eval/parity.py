"""Prove that a checkpoint equals transformers' model: compare logits, and write a verification card."""

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
from megatron_sov.convert.hf_export import ConversionProof
from megatron_sov.convert.sources import Weights
from megatron_sov.engine.decode.forward_only import DocumentBatch, ForwardModel
from megatron_sov.engine.parallel import launcher
from megatron_sov.engine.parallel.device import get_local_device
from megatron_sov.eval.heldout_loss import group_into_rows
from megatron_sov.infer.engines.load import LoadedModel, run_forward_model
from megatron_sov.infer.engines.target import Target, open_as_checkpoint
from megatron_sov.infer.engines.transformers_engine import load_hf
from megatron_sov.model.families.count import count_params
from megatron_sov.version import __version__

MAX_DIFFERENCE = 1e-4
"""Maximum logit difference, relative to the larger value among 1 and the largest logit."""
LOGITS_BYTES = 1 << 30
"""Logit bytes in memory, per model."""


def compare_logits(checkpoint: Path, hf_dir: Path, prompts: Sequence[Sequence[int]], *,
                   settings: Sequence[str] = (), nproc: int | None = None) -> list[ParityCheck]:
    """Compare a checkpoint's logits with transformers' logits, in fp32.

    Args:
        checkpoint: checkpoint folder.
        hf_dir: Hugging Face folder; the whole model must fit into memory.
        prompts: token ids of each document; packed into rows on our side, one at a time in transformers.
        settings: layout of our side, e.g. ``parallel.ep=2``.
        nproc: processes of our side.

    Returns:
        All checks, passed or failed; none on processes other than the first of a torchrun or Slurm job.

    Raises:
        UserError: a model cannot be loaded.
    """
    def compare(loaded: LoadedModel) -> list[dict[str, Any]]:
        # a single process runs both models; further processes take part only in the checkpoint's forward pass
        hf = load_hf(hf_dir, torch.float32) if loaded.world.is_main else None
        return [asdict(c) for c in _compare_documents(loaded.policy, hf, prompts)]

    settings = ["train.precision=fp32", *settings]
    results = run_forward_model(Target(checkpoint, False), settings, nproc, compare)
    return [ParityCheck(**c) for c in results or []]


def draw_random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Return documents with random tokens, which reach rare tokens and experts."""
    generator = np.random.Generator(np.random.Philox(seed))
    return [generator.integers(0, vocab_size, n).tolist() for n in lengths]


class _Difference:
    """Maximum difference between two models' logits over documents."""

    def __init__(self) -> None:
        self._largest, self._scale, self._num_different, self._num_compared, self._worst = 0.0, 1.0, 0, 0, ""

    def add_document(self, document: int, ours: torch.Tensor, reference: torch.Tensor) -> None:
        """Compare a document's logits [tokens, vocab_size]. Raises `UserError`: the vocabularies differ."""
        if ours.shape != reference.shape:
            raise UserError(f"the models have {ours.shape[-1]} and {reference.shape[-1]} token ids, so their "
                            "logits cannot be compared; pass two forms of one model")
        # NaN counts as infinite, because `max` may ignore NaN
        difference = float((ours - reference).abs().nan_to_num(nan=math.inf).max())
        self._scale = max(self._scale, float(reference.abs().max()))
        if difference > self._largest:
            self._largest, self._worst = difference, f"document {document} of {len(reference)} tokens"
        self._num_different += _count_different_tokens(ours, reference)
        self._num_compared += len(reference)

    def build_checks(self) -> list[ParityCheck]:
        """Return a `ParityCheck` for the largest difference and for the greedy tokens."""
        # Rounding errors grow with the logits.
        limit = MAX_DIFFERENCE * self._scale
        return [ParityCheck("largest difference of a logit", self._largest, limit, self._largest <= limit,
                            self._worst),
                ParityCheck("greedy tokens that differ", self._num_different, 0, self._num_different == 0,
                            f"of {self._num_compared}")]


def _compare_documents(policy: ForwardModel, hf: Any, prompts: Sequence[Sequence[int]]) -> list[ParityCheck]:
    """Run both models on the documents; the result is valid only on the process with `hf`."""
    difference = _Difference()
    limit_tokens = max(LOGITS_BYTES // (4 * policy.model.vocab_size), max(map(len, prompts)))
    for row in group_into_rows([len(p) for p in prompts], limit_tokens):
        batch = DocumentBatch([prompts[i] for i in row], get_local_device())
        ours = policy.logits(batch, torch.arange(sum(len(prompts[i]) for i in row)))
        if hf is None:
            continue
        for i, our_logits in zip(row, ours.split([len(prompts[i]) for i in row]), strict=True):
            difference.add_document(i, our_logits, _compute_hf_logits(hf, prompts[i]))
    return difference.build_checks()


@torch.no_grad()
def _compute_hf_logits(model: Any, prompt: Sequence[int]) -> torch.Tensor:
    ids = torch.tensor([list(prompt)], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0].float().cpu()
    return logits


def _count_different_tokens(ours: torch.Tensor, reference: torch.Tensor) -> int:
    """Count positions with different greedy tokens, except near ties of transformers' best logits."""
    best = reference.topk(2, dim=-1).values
    # Each of the two logits may be off by the limit, hence the factor 2.
    is_clear = best[:, 0] - best[:, 1] > 2 * MAX_DIFFERENCE * max(1.0, float(reference.abs().max()))
    return int(((ours.argmax(-1) != reference.argmax(-1)) & is_clear).sum())


SEED = 0


@dataclass(frozen=True)
class LogitsProof:
    checks: list[ParityCheck]
    """Empty if the logits were not compared."""
    method: dict[str, Any] = field(default_factory=dict)
    """Method for the card: prompts, precision and programs, or the reason for no comparison."""


def prove_logits(a: Path, b: Path, lengths: Sequence[int], settings: Sequence[str] = (),
                 nproc: int | None = None) -> LogitsProof:
    """Compare two models' logits on random prompts, in float32.

    megatron-core runs the checkpoint, transformers the Hugging Face folder. If the dtypes of the weights
    differ, the wider side is temporarily converted to the narrower dtype; `convert.verify` compares the
    weights themselves.

    Args:
        a: checkpoint or Hugging Face folder.
        b: checkpoint or Hugging Face folder.
        lengths: tokens of each prompt; lengths beyond the model's context are skipped.
        settings: layout of the checkpoint's side, e.g. ``parallel.ep=2``.
        nproc: processes of the checkpoint's side.

    Returns:
        Checks and method; no checks on processes other than the first of a torchrun or Slurm job.

    Raises:
        UserError: a model cannot be opened, or is too large to run here.
    """
    sides = [convert.open_weights(a), convert.open_weights(b)]
    checkpoints = [side for side in sides if not convert.is_hf_folder(side.path)]
    folders = [side for side in sides if convert.is_hf_folder(side.path)]
    # the same program on both sides would prove nothing about the conversion
    if len(checkpoints) == 2:
        return LogitsProof([], {"not compared": "both sides are checkpoints, run by one program: "
                                                "equal weights, equal logits"})
    if len(folders) == 2:
        return LogitsProof([], {"not compared": "both sides are Hugging Face folders, run by one program: "
                                                "equal weights, equal logits"})
    _check_memory(sides)
    prompt_lengths = [n for n in lengths if n <= sides[0].model.max_position_tokens]
    prompts = draw_random_prompts(prompt_lengths, min(side.model.vocab_size for side in sides), SEED)
    method = {"prompts": {"lengths": prompt_lengths, "tokens": "random", "seed": SEED},
              "precision": "float32",
              "largest difference allowed": f"{MAX_DIFFERENCE} of the largest logit, or of 1",
              "run by": {str(side.path): "transformers" if side in folders else "megatron-core"
                         for side in sides}}
    with _match_precision(checkpoints[0], folders[0]) as (checkpoint, folder):
        checks = compare_logits(checkpoint, folder, prompts, settings=settings, nproc=nproc)
        if (checkpoint, folder) != (checkpoints[0].path, folders[0].path):
            narrower = min(sides, key=_get_bits)
            method["weights"] = f"of the narrower side, {narrower.path}"
            note = f"weights of both in {str(_get_dtype(narrower)).removeprefix('torch.')}"
            checks = [replace(check, detail=f"{check.detail}, {note}".removeprefix(", ")) for check in checks]
        return LogitsProof(checks, method)


@contextmanager
def _match_precision(checkpoint: Weights, folder: Weights) -> Iterator[tuple[Path, Path]]:
    """Yield both models with equal weight precision, chosen by the narrower model."""
    wider = _get_bits(checkpoint) - _get_bits(folder)
    if wider > 0:
        with open_as_checkpoint(Target(folder.path, True)) as narrow:
            yield narrow, folder.path
    elif wider < 0:
        with tempfile.TemporaryDirectory(prefix="sov-export-") as parent:
            if launcher.run_in_fork(lambda: convert.to_hf(checkpoint.path, Path(parent) / "hf")):
                raise SystemExit(ExitCode.CRASH)
            yield checkpoint.path, Path(parent) / "hf"
    else:
        yield checkpoint.path, folder.path


def _get_bits(side: Weights) -> int:
    return 8 * _get_dtype(side).itemsize


def _get_dtype(side: Weights) -> torch.dtype:
    return side.get_dtype(side.list_names()[0])


def _check_memory(sides: Sequence[Weights]) -> None:
    count = count_params(sides[0].model)
    needed_bytes = (count.total + count.mtp) * 4 * 2
    free_bytes = psutil.virtual_memory().available
    if needed_bytes > free_bytes:
        raise UserError(f"{sides[0].path}: running both sides in float32 takes {format_size(needed_bytes)}, "
                        f"but {format_size(free_bytes)} are free; pass --no-load to compare files only")


def build_card(a: Path, b: Path, weights: ConversionProof, logits: LogitsProof) -> dict[str, Any]:
    """Return the verification card: inputs, tolerances, versions, checks, and a checksum per tensor."""
    checks = [*weights.checks, *logits.checks]
    return {
        "a": _identify_model(a), "b": _identify_model(b), "passed": all(check.passed for check in checks),
        "checks": [{**vars(check), "value": check.value if math.isfinite(check.value) else str(check.value)}
                   for check in checks], "logits": logits.method,
        "weights": "every tensor under its Hugging Face name, bit by bit; "
                   "of two dtypes, after rounding to the narrower one",
        "tensors": {name: vars(record) for name, record in weights.tensors.items()},
        "versions": {"megatron_sov": __version__,
                     **{name: version(name) for name in ("megatron-core", "torch", "transformers")}}}


def _identify_model(path: Path) -> dict[str, str]:
    path = convert.open_weights(path).path
    manifest = {"manifest_sha256": manifest_sha256(path)} if (path / MANIFEST).is_file() else {}
    return {"path": str(path), "kind": "hf_model" if convert.is_hf_folder(path) else "checkpoint", **manifest}
