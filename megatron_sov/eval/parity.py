"""The proof that our model is transformers' model: equal logits for equal tokens, documents packed here and alone there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sov.convert import Check
from megatron_sov.generate.documents import rows_of
from megatron_sov.generate.hf import load_hf
from megatron_sov.generate.load import Loaded, run_policy
from megatron_sov.generate.target import Target
from megatron_sov.mcore import cpu
from megatron_sov.mcore.policy import Inputs, Policy

MAX_DIFFERENCE = 1e-4
"""Largest difference of a logit, relative to the largest logit (or to 1, if that is smaller)."""
LOGITS_BYTES = 1 << 30
"""Logits that are held at a time on either side."""


def compare_logits(checkpoint: Path, hf_dir: Path, prompts: Sequence[Sequence[int]], *, settings: Sequence[str] = (),
                   nproc: int | None = None) -> list[Check]:
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

    found = run_policy(Target(checkpoint, False), ["train.precision=fp32", *settings], nproc, work)
    return [Check(**c) for c in found or []]


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Return documents of random tokens: they visit rows of the embedding and experts that text seldom meets."""
    generator = np.random.Generator(np.random.Philox(seed))
    return [generator.integers(0, vocab_size, n).tolist() for n in lengths]


def _checks(policy: Policy, hf: Any, prompts: Sequence[Sequence[int]]) -> list[Check]:
    """Return the checks on the process that has transformers' model, nothing of meaning elsewhere."""
    largest, scale, other, compared, worst = 0.0, 1.0, 0, 0, ""
    limit_tokens = max(LOGITS_BYTES // (4 * policy.model.vocab_size), max(map(len, prompts)))
    for row in rows_of([len(p) for p in prompts], limit_tokens):
        batch = Inputs([prompts[i] for i in row], cpu.device())
        ours = policy.logits(batch, torch.arange(sum(len(prompts[i]) for i in row)))
        if hf is None:
            continue
        for i, mine in zip(row, ours.split([len(prompts[i]) for i in row]), strict=True):
            reference = _hf_logits(hf, prompts[i])
            difference = float((mine - reference).abs().nan_to_num(nan=math.inf).max())
            scale = max(scale, float(reference.abs().max()))
            if difference > largest:
                largest, worst = difference, f"document {i} of {len(prompts[i])} tokens"
            other += _clearly_different(mine, reference)
            compared += len(prompts[i])
    limit = MAX_DIFFERENCE * scale
    return [Check("largest difference of a logit", largest, limit, largest <= limit, worst),
            Check("greedy tokens that differ", other, 0, other == 0, f"of {compared}")]


@torch.no_grad()
def _hf_logits(model: Any, prompt: Sequence[int]) -> torch.Tensor:
    ids = torch.tensor([list(prompt)], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0].float().cpu()
    return logits


def _clearly_different(ours: torch.Tensor, reference: torch.Tensor) -> int:
    """Count positions with another most probable token, unless transformers' best two are as close as rounding."""
    best = reference.topk(2, dim=-1).values
    clear = best[:, 0] - best[:, 1] > 2 * MAX_DIFFERENCE * max(1.0, float(reference.abs().max()))
    return int(((ours.argmax(-1) != reference.argmax(-1)) & clear).sum())
