"""The proof that our model is transformers' model: equal logits for equal tokens,
documents packed here and alone there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sov.convert import ParityCheck
from megatron_sov.errors import UserError
from megatron_sov.eval.filling import rows_of
from megatron_sov.generate.hf import load_hf
from megatron_sov.generate.load import Loaded, run_forward_model
from megatron_sov.generate.target import Target
from megatron_sov.mcore.decode.forward_only import ForwardModel, Inputs
from megatron_sov.mcore.parallel.device import local_device

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
        hf = load_hf(hf_dir, torch.float32) if loaded.world.is_main else None
        return [asdict(c) for c in _checks(loaded.policy, hf, prompts)]

    found = run_forward_model(Target(checkpoint, False), ["train.precision=fp32", *settings], nproc, work)
    return [ParityCheck(**c) for c in found or []]


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Return documents of random tokens: they visit rows of the embedding and experts that
    text seldom meets."""
    generator = np.random.Generator(np.random.Philox(seed))
    return [generator.integers(0, vocab_size, n).tolist() for n in lengths]


def compare_hf_logits(a: Path, b: Path, prompts: Sequence[Sequence[int]]) -> list[ParityCheck]:
    """Compare the logits of two Hugging Face folders in fp32, both run by transformers, one after the other.

    Raises:
        UserError: a folder cannot be loaded.
    """
    difference = _Difference()
    first = load_hf(a, torch.float32)
    logits = [_hf_logits(first, prompt) for prompt in prompts]
    del first  # memory holds one model at a time
    second = load_hf(b, torch.float32)
    for i, (prompt, found) in enumerate(zip(prompts, logits, strict=True)):
        difference.add(i, found, _hf_logits(second, prompt))
    return difference.checks()


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
        difference = float((ours - reference).abs().nan_to_num(nan=math.inf).max())
        self._scale = max(self._scale, float(reference.abs().max()))
        if difference > self._largest:
            self._largest, self._worst = difference, f"document {document} of {len(reference)} tokens"
        self._other += _clearly_different(ours, reference)
        self._compared += len(reference)

    def checks(self) -> list[ParityCheck]:
        """Return the largest difference and the number of other most probable tokens, with their limits."""
        limit = MAX_DIFFERENCE * self._scale
        return [ParityCheck("largest difference of a logit", self._largest, limit, self._largest <= limit,
                            self._worst), ParityCheck("greedy tokens that differ", self._other, 0,
                                                      self._other == 0, f"of {self._compared}")]


def _checks(policy: ForwardModel, hf: Any, prompts: Sequence[Sequence[int]]) -> list[ParityCheck]:
    """Return the checks on the process that has transformers' model, nothing of meaning elsewhere."""
    difference = _Difference()
    limit_tokens = max(LOGITS_BYTES // (4 * policy.model.vocab_size), max(map(len, prompts)))
    for row in rows_of([len(p) for p in prompts], limit_tokens):
        batch = Inputs([prompts[i] for i in row], local_device())
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
    clear = best[:, 0] - best[:, 1] > 2 * MAX_DIFFERENCE * max(1.0, float(reference.abs().max()))
    return int(((ours.argmax(-1) != reference.argmax(-1)) & clear).sum())
