"""Our losses of policies, and advantages, against TRL's own trainer, in float64.

Usage: python benchmarks/policy_exactness.py --trl FOLDER > benchmarks/results/policy_exactness.txt

FOLDER is where trl 1.16.0 was installed (`pip install --target FOLDER trl==1.16.0`).  Printed are the largest
differences of loss and derivatives by log-probabilities; more than 1e-12 ends with an error.  TRL's trainer
is not made: its method is handed an object that holds the settings which it reads.  Corrections are of the
numbers of a round's later step, where the policy, the trainer before the round and the engine are three.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np

from megatron_sov.engine.parallel import cpu_shims
from megatron_sov.model.config import PolicyConfig

RESPONSES, TOKENS, LONGEST, LARGEST = 8, 12, 16, 1e-12
LOW, HIGH = 0.85, 1.2
"""Bounds of corrections."""
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "GRPO": ({"method": "grpo", "kl_coeff": 0.04}, {"loss_type": "grpo", "beta": 0.04}),
    "Dr. GRPO": ({"method": "dr_grpo"}, {"loss_type": "dr_grpo"}),
    "DAPO": ({"method": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "GSPO": ({"method": "gspo"}, {"loss_type": "grpo", "importance_sampling_level": "sequence",
                                  "epsilon_low": 3e-4, "epsilon_high": 4e-4}),
    "GSPO, wide": ({"method": "gspo", "clip_low": 0.1, "clip_high": 0.1},
                   {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.1,
                    "epsilon_high": 0.1}),
    "CISPO": ({"method": "cispo", "clip_high": 0.25}, {"loss_type": "cispo", "epsilon_high": 1.25}),
    "GRPO, KL as it is": ({"method": "grpo", "kl_coeff": 0.04, "kl_weighted": False},
                          {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False}),
    "GSPO with KL": ({"method": "gspo", "clip_low": 0.1, "clip_high": 0.1, "kl": "k3", "kl_coeff": 0.1},
                     {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.1,
                      "epsilon_high": 0.1, "beta": 0.1}),
    "DAPO with KL": ({"method": "dapo", "kl": "k3", "kl_coeff": 0.1},
                     {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.1}),
}
METHODS |= {f"{name}, {correction}": (
    ours | {"correction": correction, "correction_low": LOW, "correction_high": HIGH},
    theirs | {"correct": correction})
    for name, (ours, theirs) in tuple(METHODS.items()) if name in ("GRPO", "DAPO", "GSPO, wide")
    for correction in CORRECTIONS}
"""Ours, and TRL's settings; both clip at 0.2 unless they say else.  TRL's bound of CISPO is the ratio's, ours
how far it lies above 1."""


def drawn(masked: str = "") -> dict[str, Any]:
    """Return [responses, tokens] numbers of responses of several lengths, padded.

    Args:
        masked: a response, or all of them, is so far from the engine that every mask takes it out.
    """
    import torch

    torch.manual_seed(0)
    lengths = torch.randint(2, TOKENS + 1, (RESPONSES,))
    behaviour = -3 * torch.rand(RESPONSES, TOKENS) - 0.5
    away = {"": 0.0, "a whole response": 2.0 * (torch.arange(RESPONSES) == 1)[:, None], "all": 2.0}[masked]
    return {"mask": (torch.arange(TOKENS) < lengths[:, None]).long(), "behaviour": behaviour,
            "old": behaviour + 0.2 * torch.randn(RESPONSES, TOKENS) + away,
            "logprobs": behaviour + away + 0.4 * torch.randn(RESPONSES, TOKENS),
            "reference": behaviour + 0.4 * torch.randn(RESPONSES, TOKENS),
            "advantages": torch.randn(RESPONSES)}


def ours(asked: dict[str, Any], at: dict[str, Any], logprobs: Any) -> Any:
    """Return the loss of one row that holds all responses."""
    import torch

    from megatron_sov.post.policy import ADVANTAGE, BEHAVIOUR, OLD, REFERENCE, PolicyLoss
    from megatron_sov.post.sft import Responses

    made, mask = PolicyLoss(PolicyConfig(**asked), LONGEST), at["mask"]
    index = torch.where(mask == 1, torch.arange(RESPONSES)[:, None], RESPONSES).flatten()
    columns = {ADVANTAGE: at["advantages"][:, None].expand_as(mask), BEHAVIOUR: at["behaviour"],
               OLD: at["old"] if "correction" in asked else at["behaviour"], REFERENCE: at["reference"]}
    columns = {name: column.flatten() for name, column in columns.items()}
    responses = Responses(index, mask.sum(1).double())
    terms, _ = made.terms(logprobs.flatten(), columns, responses)
    counts = made.denominators(responses)
    return sum(coefficient * terms[term] / counts[term] for term, coefficient in made.coefficients.items())


def theirs(asked: dict[str, Any], at: dict[str, Any], logprobs: Any) -> Any:
    """Return TRL's."""
    from trl import GRPOTrainer

    settings = {"importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0,
                **asked}
    correct, mask = settings.pop("correct", None), at["mask"]
    weighted = settings.pop("use_bias_correction_kl", True)
    trainer = MagicMock(off_policy_mask_threshold=None, top_entropy_quantile=1.0, aux_loss_enabled=False,
                        use_vllm=correct is not None, vllm_importance_sampling_correction=True,
                        max_completion_length=LONGEST, _entropy_bonus_enabled=False,
                        args=SimpleNamespace(delta=None, use_bias_correction_kl=weighted),
                        _metrics={"train": defaultdict(list), "eval": defaultdict(list)}, **settings)
    trainer.model.training = False
    trainer.accelerator.num_processes = 1
    trainer.accelerator.gather = trainer.accelerator.reduce = lambda found, reduction=None: found
    trainer._get_per_token_logps_and_entropies.return_value = (logprobs, -logprobs.detach(), None)
    inputs = {"prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask,
              "completion_mask": mask, "advantages": at["advantages"], "num_items_in_batch": mask.sum(),
              "old_per_token_logps": at["old"] if correct else at["behaviour"],
              "ref_per_token_logps": at["reference"]}
    if correct:
        apart = (at["old"] - at["behaviour"]) * mask
        level, _, kind = correct.partition("_")
        ratio = (apart.sum(1, keepdim=True) if level == "sequence" else apart).exp()
        # amid the method that writes and scores: `vllm_importance_sampling_mode`
        inputs["importance_sampling_ratio"] = (
            ratio.clamp(LOW, HIGH) if kind == "truncate"
            else ratio.masked_fill((ratio < LOW) | (ratio > HIGH), 0.0))
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def compare_advantages() -> float:
    """Return the largest difference of GRPO's advantages; TRL computes them amid a long method, of which the
    standard deviation is a function of its own."""
    import torch
    from trl.trainer.utils import nanstd

    from megatron_sov.post.rl.advantages import group_advantages

    rewards = torch.rand(6, 8)
    expected = (rewards - rewards.nanmean(1, keepdim=True)) / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)
    found = group_advantages(list(rewards.numpy()), [np.ones(8)] * 6, PolicyConfig("grpo"), LONGEST)
    return max(float(np.abs(group.advantages - e).max()) for group, e in zip(found, expected.numpy(),
                                                                            strict=True))


def main() -> None:
    """Compare all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trl", required=True)
    cpu_shims.prepare_megatron()
    import torch

    sys.path.append(parser.parse_args().trl)
    torch.set_default_dtype(torch.float64)
    print(f"{'loss':<44}{'value':>12}{'|dloss|':>10}{'|dgrad|':>10}", flush=True)
    cases = [(name, masked) for name, (ours_, _) in METHODS.items() for masked in (
        ("", "a whole response", "all") if ours_.get("correction", "").endswith("mask") else ("",))]
    for method, masked in cases:
        (of_ours, of_trl), at = METHODS[method], drawn(masked)
        name = f"{method}, {masked}" if masked else method
        logprobs = at["logprobs"].clone().requires_grad_()
        losses = ours(of_ours, at, logprobs), theirs(of_trl, at, logprobs)
        gradients = [torch.autograd.grad(loss, logprobs)[0] for loss in losses]
        apart = abs(losses[0] - losses[1]).item(), float((gradients[0] - gradients[1]).abs().max())
        print(f"{name:<44}{losses[0].item():>12.6f}{apart[0]:>10.1e}{apart[1]:>10.1e}", flush=True)
        if max(apart) > LARGEST:
            sys.exit(f"{name}: differs by more than {LARGEST:.0e}")
    apart_advantages = compare_advantages()
    print(f"{'GRPO, advantages':<56}{apart_advantages:>10.1e}")
    if apart_advantages > LARGEST:
        sys.exit(f"advantages: differ by more than {LARGEST:.0e}")


if __name__ == "__main__":
    main()
