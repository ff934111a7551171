"""CPU time and memory of output head and loss for one micro-batch, forward and backward.

Usage: python benchmarks/output_head.py > benchmarks/results/output_head.txt

  one pass    `Head.cross_entropy`: computes gradients in the forward pass, from one chunk of logits at a time
  two passes  `Head.logprobs`: applies the head again in the backward pass, one chunk at a time
  library     megatron-core's `vocab_parallel_cross_entropy` on all logits at once

Each method runs in its own process. Memory is the increase of the process's peak resident memory over the
passes. Loss and gradient norms show that all methods compute the same values.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

from measurement import describe_machine, read_peak_bytes

from megatron_sov.engine.parallel import launcher, world

HIDDEN, VOCAB_SIZE, TURNS = 256, 8192, 7
CASES = ((2048, 2048, "float32"), (4096, 512, "float32"), (2048, 512, "bfloat16"))
"""Tokens, tokens of a chunk, dtype of the model."""
METHODS = ("one pass", "two passes", "library")


def measure_method(method: str, tokens: int, chunk_tokens: int, dtype: str) -> None:
    """Measure a method in this process, and print a line."""
    import torch

    from megatron_sov.engine.model.logprobs import Head
    from megatron_sov.model.config import ParallelConfig

    world.join_world(ParallelConfig())
    random = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(VOCAB_SIZE, HIDDEN, generator=random)).to(getattr(torch, dtype))
    hidden = torch.randn(tokens, 1, HIDDEN, generator=random).to(weight.dtype)
    labels = torch.randint(VOCAB_SIZE, (tokens,), generator=random)
    config = SimpleNamespace(sequence_parallel=False, logits_multiplier=1.0)
    head = Head(weight.requires_grad_(), config, chunk_tokens, VOCAB_SIZE)
    begin_bytes = read_peak_bytes()
    cpu_ms, figures = [], tuple[float, ...]()
    for _ in range(TURNS):
        inputs = (hidden.requires_grad_(), weight)
        begin_s = time.process_time()
        loss = sum_losses(method, head, hidden, labels) / tokens
        gradients = torch.autograd.grad(loss, inputs)
        cpu_ms.append(1e3 * (time.process_time() - begin_s))
        figures = (loss.item(), *(g.double().norm().item() for g in gradients))
    grown_mib = (read_peak_bytes() - begin_bytes) / 2**20
    print(f"{method:<12}{dtype:<10}{tokens:>7}{chunk_tokens if method != 'library' else tokens:>7}"
          f"{min(cpu_ms):>9.0f}{statistics.median(cpu_ms):>9.0f}{grown_mib:>10.0f}   "
          + " ".join(f"{value:.6g}" for value in figures), flush=True)
    world.leave_world()


def sum_losses(method: str, head: Any, hidden: Any, labels: Any) -> Any:
    """Return the sum of the cross-entropies of all tokens: hidden [tokens, 1, HIDDEN], labels [tokens]."""
    import torch
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if method == "one pass":
        return head.cross_entropy(hidden, labels, {"sum": torch.ones(len(labels))})[0]["sum"]
    if method == "two passes":
        return -head.logprobs(hidden, labels).sum()
    return vocab_parallel_cross_entropy(torch.nn.functional.linear(hidden, head.weight),
                                        labels[:, None]).sum()


def main() -> None:
    """Measure every case with each method."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    print(f"{describe_machine()}; hidden size {HIDDEN}, vocabulary {VOCAB_SIZE}\n")
    print(f"{'method':<12}{'dtype':<10}{'tokens':>7}{'chunk':>7}{'CPU ms':>9}{'median':>9}{'MiB':>10}   "
          "loss, gradient norms (hidden, weight)", flush=True)
    for case in CASES:
        for method in METHODS:
            if launcher.launch_ranks(partial(measure_method, method, *case), 1, num_threads=1):
                sys.exit(1)


if __name__ == "__main__":
    main()
