"""The gated delta rule beside transformers' own torch path, forward and backward: CPU time and memory.

Usage: python benchmarks/linear_attention.py > benchmarks/results/linear_attention.txt

  ours           `engine.model.delta_rule.in_chunks`, documents of a row side by side
  transformers   `torch_chunk_gated_delta_rule` of its Qwen3-Next, which takes no packed rows: documents of
                 unequal length are padded to the longest, each a row of its batch

Both get the same numbers, and what they give is compared.  Each runs in a process of its own, in turn; memory
is how far the process's peak rises above its size before the first pass.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import time

KEY_HEADS, VALUE_HEADS, CHANNELS, TURNS = 4, 8, 64, 5
ROWS = {"one document of 1,024": [1024], "one document of 4,096": [4096], "one document of 16,384": [16384],
        "16 documents of 256": [256] * 16, "documents of 3,072 and 32 of 32": [3072] + [32] * 32}
WAYS = ("ours", "transformers")


def measure(way: str, row: str) -> None:
    """Print one line: least and median CPU time in ms, memory in MiB, sums of output and gradients."""
    import torch
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    from megatron_sov.engine.model.delta_rule import chunk_documents, in_chunks, normalised

    torch.set_num_threads(1)
    lengths, per_key = ROWS[row], VALUE_HEADS // KEY_HEADS
    tokens, random = sum(lengths), torch.Generator().manual_seed(0)
    q, k = (normalised(torch.randn(tokens, KEY_HEADS, CHANNELS, generator=random)) for _ in range(2))
    v = torch.randn(tokens, KEY_HEADS, per_key, CHANNELS, generator=random)
    decay = -0.3 * torch.rand(tokens, KEY_HEADS, per_key, 1, generator=random)
    rate = torch.rand(tokens, KEY_HEADS, per_key, generator=random)
    inputs = [t.requires_grad_() for t in (q * CHANNELS ** -0.5, k, v, decay, rate)]
    ends = torch.tensor(lengths).cumsum(0).tolist()

    def ours() -> torch.Tensor:
        bounds = [(start, start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
        return in_chunks(*inputs, chunks=chunk_documents(bounds, torch.device("cpu")))[0].flatten(1, 2)

    def transformers() -> torch.Tensor:
        def rows(values: torch.Tensor) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(values.split(lengths), batch_first=True)

        queries, keys, values, g, b = (rows(t) for t in inputs)
        # it repeats key heads as its layer does, and scales queries itself
        queries, keys = (t.repeat_interleave(per_key, 2) for t in (queries * CHANNELS ** 0.5, keys))
        out, _ = torch_chunk_gated_delta_rule(queries, keys, values.flatten(2, 3), g=g.flatten(2),
                                              beta=b.flatten(2))
        return torch.cat([found[:length] for found, length in zip(out, lengths, strict=True)])

    apply, weights = {"ours": ours, "transformers": transformers}[way], torch.linspace(-1, 1, CHANNELS)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu_ms, told = [], []
    for _ in range(TURNS):
        start = time.process_time()
        found = apply()
        gradients = torch.autograd.grad((found * weights).sum(), inputs)
        cpu_ms.append(1e3 * (time.process_time() - start))
        told = [t.double().norm().item() for t in (found, *gradients)]
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    print(f"{row:<34}{way:<14}{min(cpu_ms):>8.0f}{statistics.median(cpu_ms):>8.0f}{grown_mib:>8.0f}   "
          + " ".join(f"{value:.5g}" for value in told), flush=True)


def main() -> None:
    """Measure both ways of each row."""
    if len(sys.argv) == 3:
        measure(sys.argv[1], sys.argv[2])
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
          f"{platform.python_version()}; {KEY_HEADS} heads of keys, {VALUE_HEADS} of values, {CHANNELS} "
          f"channels, fp32, one thread\n{'row':<34}{'way':<14}{'least':>8}{'median':>8}{'MiB':>8}   "
          "norms of output and of gradients of q, k, v, decay, rate", flush=True)
    for row in ROWS:
        for way in WAYS:
            subprocess.run([sys.executable, __file__, way, row], check=True)


if __name__ == "__main__":
    main()
