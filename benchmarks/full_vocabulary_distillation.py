"""What distillation over the whole vocabulary takes of one micro-batch, forward and backward: CPU time and
memory.

Usage: python benchmarks/full_vocabulary_distillation.py --trl FOLDER

FOLDER is where trl 1.16.0 was installed (`pip install --target FOLDER trl==1.16.0`).

  ours          `Head.divergence` on hidden states and heads of both, gradients in the forward pass
  ours, top-k   likewise against 128 tokens and the rest, whose probabilities are made up
  TRL           `GKDTrainer.generalized_jsd_loss` on all logits of both heads
  TRL, tiles    `_chunked_divergence_loss` of TRL's DistillationTrainer, which computes logits twice

Each runs in a process of its own on the same tensors; memory is how far the process's peak rises above its
size before the first pass, less the gradients that every way must return.  Loss and gradient norms stand
beside, so that it can be seen that all but top-k compute the same.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import time
from types import SimpleNamespace
from typing import Any

from megatron_sov.engine.parallel import cpu_shims, launcher, world

HIDDEN, TEACHER_HIDDEN, VOCAB_SIZE, TOKENS, CHUNK_TOKENS, TOP_K = 256, 256, 196_608, 1024, 64, 128
WAYS = ("ours", "TRL", "TRL, tiles", "ours, top-k")
TURNS = 2


def measure(way: str, beta: float, trl: str) -> None:
    """Print one line; runs inside a rank."""
    import torch

    sys.path.append(trl)
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    from megatron_sov.engine.model.divergence import Divergence, TeacherStates, TeacherTopK
    from megatron_sov.engine.model.logprobs import Head
    from megatron_sov.model.config import ParallelConfig

    world.join(ParallelConfig())
    random = torch.Generator().manual_seed(0)
    weight, of_teacher = (0.1 * torch.randn(VOCAB_SIZE, size, generator=random)
                          for size in (HIDDEN, TEACHER_HIDDEN))
    states, teacher_states = (torch.randn(TOKENS, size, generator=random)
                              for size in (HIDDEN, TEACHER_HIDDEN))
    config = SimpleNamespace(sequence_parallel=False, logits_multiplier=1.0)
    head = Head(weight.requires_grad_(), config, CHUNK_TOKENS, VOCAB_SIZE)
    states.requires_grad_()
    teacher: Any = TeacherStates(teacher_states, of_teacher)
    if way == "ours, top-k":
        # made up: to find the real ones would raise the peak before it is measured
        ids = (torch.arange(TOKENS)[:, None] + 1536 * torch.arange(TOP_K)) % VOCAB_SIZE
        teacher = TeacherTopK(ids, torch.randn(ids.shape, generator=random).log_softmax(-1) - 0.2)

    def loss() -> Any:
        if way.startswith("ours"):
            return head.divergence(states[:, None], teacher, {"sum": torch.ones(TOKENS)},
                                   Divergence(beta))[0]["sum"] / TOKENS
        if way == "TRL":
            return GKDTrainer.generalized_jsd_loss((states @ weight.T)[None],
                                                   (teacher_states @ of_teacher.T)[None],
                                                   torch.zeros(1, TOKENS, dtype=torch.int64), beta)
        return _chunked_divergence_loss(states[None], teacher_states[None], weight, of_teacher,
                                        torch.ones(1, TOKENS), beta)[0]

    report(way, beta, loss, (states, weight))
    world.leave()


def report(way: str, beta: float, loss: Any, inputs: tuple[Any, ...]) -> None:
    """Take `TURNS` forward and backward passes and print what they took."""
    import torch

    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu_s, figures = [], ()
    for _ in range(TURNS):
        start = time.process_time()
        value = loss()
        gradients = torch.autograd.grad(value, inputs)
        cpu_s.append(time.process_time() - start)
        figures = (value.item(), *(g.double().norm().item() for g in gradients))
        del value, gradients
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    grown_mib = grown / 1024 - sum(t.nbytes for t in inputs) / 2**20
    print(f"{way:<13}{beta:>5}{min(cpu_s):>9.1f}{max(cpu_s):>9.1f}{grown_mib:>10.0f}   "
          + " ".join(f"{number:.6g}" for number in figures), flush=True)


def main() -> None:
    """Measure every way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trl", required=True)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.5])
    arguments = parser.parse_args()
    cpu_shims.prepare_megatron()
    print(f"{platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} at the start), one "
          f"thread, Python {platform.python_version()}, float32; hidden size {HIDDEN}, vocabulary "
          f"{VOCAB_SIZE:,}, {TOKENS:,} positions in chunks of {CHUNK_TOKENS}\n")
    print(f"{'way':<13}{'beta':>5}{'CPU s':>9}{'max':>9}{'MiB':>10}   "
          "loss, gradient norms (hidden, weight)", flush=True)
    for beta in arguments.betas:
        for way in WAYS:
            if launcher.launch(lambda w=way, b=beta: measure(w, b, arguments.trl), 1, num_threads=1):
                sys.exit(1)
    kept = {"hidden states of 4,096 in bf16": 2 * 4096, "logits in bf16": 2 * VOCAB_SIZE,
            f"top-{TOP_K} in int32 and float32": 8 * TOP_K}
    print("\nbytes kept of the teacher per token: "
          + ", ".join(f"{name} {size:,}" for name, size in kept.items())
          + f"\nload {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
