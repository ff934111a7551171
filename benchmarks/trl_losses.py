"""Our distillation and preference losses against TRL's own functions, called in isolation, in float64.

Usage: python benchmarks/trl_losses.py --trl FOLDER > benchmarks/results/trl_losses.txt

FOLDER is where trl 1.16.0 was installed (`pip install --target FOLDER trl==1.16.0`).  Printed are the largest
differences of loss and gradients; more than 1e-12 ends with an error.  TRL's trainers are not made: their
methods are handed an object that holds the settings which they read.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

from megatron_sov.engine.parallel import cpu_shims, launcher, world

TOKENS, HIDDEN, VOCAB_SIZE, TOP_K, PAIRS, LARGEST = 24, 16, 500, 20, 5, 1e-12


def compare(trl: str) -> None:
    """Print a line for each loss; runs inside a rank."""
    import torch

    sys.path.append(trl)
    from megatron_sov.model.config import ParallelConfig

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    world.join(ParallelConfig())
    for temperature in (1.0, 2.0):
        for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
            for kind in ("states", "top-k with the rest", "top-k alone"):
                note(f"JSD, beta {beta}, temperature {temperature}, {kind}",
                     *divergences(kind, beta, temperature))
    for method, name in (("dpo", "sigmoid"), ("ipo", "ipo"), ("dpo-norm", "sigmoid_norm")):
        note(f"{method} (TRL: {name})", *preferences(method, name))
    for name, pair_loss in (("simpo", simpo), ("orpo", orpo), ("kto", kto)):
        note(f"{name} (TRL: {name})", *pair_loss())
    world.leave()


def note(what: str, ours: Any, theirs: Any, inputs: tuple[Any, ...]) -> None:
    """Print the differences of two losses and of their gradients."""
    import torch

    gradients = [torch.autograd.grad(loss, inputs) for loss in (ours, theirs)]
    of_loss = abs(ours - theirs).item()
    of_gradients = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
    print(f"{what:<55}{ours.item():>12.6f}{of_loss:>10.1e}{of_gradients:>10.1e}", flush=True)
    if max(of_loss, of_gradients) > LARGEST:
        sys.exit(f"{what}: differs by more than {LARGEST:.0e}")


def divergences(kind: str, beta: float, temperature: float) -> tuple[Any, Any, tuple[Any, ...]]:
    """Return our loss and TRL's, means over tokens, and what they are differentiated by."""
    import torch
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.experimental.server_distillation import server_distillation_trainer as sparse

    from megatron_sov.engine.model.divergence import Divergence, TeacherStates, TeacherTopK
    from megatron_sov.engine.model.logprobs import Head

    states, weight = torch.randn(TOKENS, HIDDEN), torch.randn(VOCAB_SIZE, HIDDEN)
    teacher_states, of_teacher = torch.randn(TOKENS, HIDDEN), torch.randn(VOCAB_SIZE, HIDDEN)
    inputs = (states.requires_grad_(), weight.requires_grad_())
    log_q = (teacher_states @ of_teacher.T / temperature).log_softmax(-1)
    top = log_q.topk(TOP_K)
    with_rest = kind == "top-k with the rest"
    teacher: Any = (TeacherStates(teacher_states, of_teacher) if kind == "states"
                    else TeacherTopK(top.indices, top.values, with_rest))
    head = Head(weight, SimpleNamespace(sequence_parallel=False, logits_multiplier=1.0), 7, VOCAB_SIZE)
    ours = head.divergence(states[:, None], teacher, {"sum": torch.ones(TOKENS)},
                           Divergence(beta, temperature))[0]["sum"] / TOKENS
    if kind == "states":
        return ours, GKDTrainer.generalized_jsd_loss(
            (states @ weight.T)[None], (teacher_states @ of_teacher.T)[None],
            torch.zeros(1, TOKENS, dtype=torch.int64), beta, temperature), inputs
    log_p = (states @ weight.T / temperature).log_softmax(-1).gather(1, top.indices)
    mask = torch.ones_like(log_p, dtype=torch.bool)
    if with_rest:
        (log_p, mask), (log_q, _) = (sparse._add_tail_bucket(log, mask) for log in (log_p, top.values))
    else:
        log_p, log_q = log_p.log_softmax(-1), top.values.log_softmax(-1)
    return ours, sparse._jsd_divergence(log_p, log_q, beta, mask).sum() / TOKENS, inputs


def preferences(method: str, name: str) -> tuple[Any, Any, tuple[Any, ...]]:
    """Return our loss and TRL's, means over pairs, and what they are differentiated by."""
    import torch
    from trl import DPOTrainer

    from megatron_sov.post import preference as losses
    from megatron_sov.post.sft import Responses

    beta = 0.3
    lengths = torch.randint(2, TOKENS, (2 * PAIRS,))
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    logprobs = (-3 * torch.rand(2 * PAIRS, TOKENS)).requires_grad_()
    reference = (-3 * torch.rand(2 * PAIRS, TOKENS) * mask).sum(1)

    response = torch.where(mask == 1, torch.arange(2 * PAIRS)[:, None], 2 * PAIRS).flatten()
    row = Responses(response, mask.sum(1).double())
    ratios = row.sums(logprobs.flatten()) - reference
    if method != "dpo":
        ratios = ratios / row.lengths
    chosen_ratios, rejected_ratios = ratios.chunk(2)
    ours = (losses.ipo if method == "ipo" else losses.dpo)(chosen_ratios - rejected_ratios, beta).mean()

    trainer = MagicMock(ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=beta,
                        loss_types=[name], loss_weights=[1.0], use_weighting=False, aux_loss_enabled=False,
                        label_smoothing=0.0, _total_train_tokens=0, _tp_size=1,
                        _metrics={"train": defaultdict(list), "eval": defaultdict(list)})
    trainer.accelerator.gather_for_metrics = trainer.accelerator.gather = lambda found: found
    trainer.accelerator.device = torch.device("cpu")
    held = logprobs * mask
    outputs = SimpleNamespace(log_probs=held, entropy=0 * held, mean_logits=0 * held, is_top1=held > 9)
    shifted = torch.nn.functional.pad(mask, (1, 0))  # the first place of a row is no label
    chosen, rejected = reference.chunk(2)
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs, {
        "input_ids": torch.zeros_like(shifted), "attention_mask": shifted, "completion_mask": shifted,
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}, False)
    return ours, theirs, (logprobs,)


def simpo() -> tuple[Any, Any, tuple[Any, ...]]:
    """Return our loss and TRL's, means over pairs, and what they are differentiated by."""
    import torch
    from trl.experimental.cpo import CPOTrainer

    from megatron_sov.post import preference as losses

    chosen, rejected = ((-3 * torch.rand(PAIRS)).requires_grad_() for _ in range(2))
    trainer = MagicMock(loss_type="simpo", beta=2.5, simpo_gamma=1.5, label_smoothing=0.1, alpha=0.0)
    trainer.accelerator.device = torch.device("cpu")
    return (losses.simpo(chosen, rejected, 2.5, 1.5, 0.1).mean(),
            CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].mean(), (chosen, rejected))


def orpo() -> tuple[Any, Any, tuple[Any, ...]]:
    """Return our loss and TRL's, which is its reward and rounds to float32: that is left out here."""
    import torch
    from trl.experimental.orpo import ORPOTrainer

    from megatron_sov.post import preference as losses

    chosen, rejected = ((-3 * torch.rand(PAIRS)).requires_grad_() for _ in range(2))
    trainer = MagicMock(beta=0.3)
    trainer.accelerator.device = torch.device("cpu")
    with patch.object(torch.Tensor, "float", lambda tensor: tensor):
        theirs = -ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0].mean()
    return 0.3 * losses.orpo(chosen, rejected).mean(), theirs, (chosen, rejected)


def kto() -> tuple[Any, Any, tuple[Any, ...]]:
    """Return our loss and TRL's, means over responses of which some are good, and what they are
    differentiated by."""
    import torch
    from trl.trainer.kto_trainer import KTOTrainer

    from megatron_sov.post import preference as losses

    beta, weights, count = 0.3, (1.2, 0.9), 2 * PAIRS
    lengths = torch.randint(2, TOKENS, (count,))
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    logprobs = (-3 * torch.rand(count, TOKENS)).requires_grad_()
    mismatched = -3 * torch.rand(count, TOKENS) * mask
    reference, of_mismatched = ((-3 * torch.rand(count, TOKENS) * mask).sum(1) for _ in range(2))
    good = torch.arange(count) % 3 > 0
    distance = float((mismatched.sum(1) - of_mismatched).mean().clamp(min=0))
    ours = losses.kto((logprobs * mask).sum(1) - reference, good, distance, beta, *weights).mean()

    trainer = MagicMock(precompute_ref_logps=True, beta=beta, loss_type="kto", calculate_KL=True,
                        desirable_weight=weights[0], undesirable_weight=weights[1], aux_loss_enabled=False,
                        _total_train_tokens=0, _metrics={"train": defaultdict(list),
                                                         "eval": defaultdict(list)})
    trainer.accelerator.gather_for_metrics = trainer.accelerator.gather = lambda found: found
    trainer.accelerator.device = torch.device("cpu")
    trainer._compute_kl_logps = lambda *_: mismatched.sum(1)
    held = logprobs * mask
    outputs = SimpleNamespace(log_probs=held, entropy=0 * held, mean_logits=0 * held, is_top1=held > 9)
    shifted = torch.nn.functional.pad(mask, (1, 0))  # the first place of a row is no label
    theirs = KTOTrainer._compute_loss(trainer, lambda **_: outputs, {
        "input_ids": torch.zeros_like(shifted), "attention_mask": shifted, "completion_mask": shifted,
        "label": good, "ref_logps": reference, "ref_KL_logps": of_mismatched}, False)
    return ours, theirs, (logprobs,)


def main() -> None:
    """Compare all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trl", required=True)
    folder = parser.parse_args().trl
    cpu_shims.prepare_megatron()
    print(f"{'loss':<55}{'value':>12}{'|dloss|':>10}{'|dgrad|':>10}", flush=True)
    sys.exit(launcher.launch(lambda: compare(folder), 1, num_threads=1))


if __name__ == "__main__":
    main()
