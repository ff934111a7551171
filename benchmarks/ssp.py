"""Does a probe pick the checkpoint that is best in a domain, and what memory does a merge take?

    python benchmarks/ssp.py > benchmarks/results/ssp.txt

Six checkpoints in four domains: the chance that one solves a problem is a logistic function of its ability
less the problem's difficulty (Rasch), and in each domain one checkpoint is planted as the best.  Estimates,
choice and intervals of `ssp probe` judge drawn answers.  Where no checkpoint is better than another, a choice
that is called clear is a false alarm.  Then a mixture of experts is merged by the code of `ssp fuse` in a
process of its own: its peak of resident memory above that of one that only imports the same, in units of the
largest tensor.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from megatron_sov.eval.pass_at_k import JudgedItem, PromptCounts
from megatron_sov.post.ssp import DomainChoice, MeasuredCheckpoint, choose

CHECKPOINTS, DOMAINS, REPEATS = 6, 4, 20
SAMPLES, K = 8, 4
MAKE = """
import dataclasses, json, shutil, sys
from pathlib import Path
import torch
from megatron_sov import convert, recipes
from megatron_sov.model.families import supported as models
from megatron_sov.convert.hf_import import plan_shards, write_files
from megatron_sov.checkpoint.writer import TensorSpec
from megatron_sov.model.families.family import TokenIds
folder = Path(sys.argv[1])
model = dataclasses.replace(recipes.get("solar-open-102b").model, hidden_size=512, num_heads=8,
                            num_kv_heads=2, head_dim=64, num_experts=16,
                            expert_ffn_dim=256, num_layers=2, vocab_size=131072)
family = models.get(model.family)
specs = [TensorSpec(name, shape, torch.float32 if link.fp32 else torch.bfloat16)
         for link in family.links(model) for name, shape in link.hf_shapes().items()]
for seed in range(2):
    noise = torch.randn(1 << 26, generator=torch.Generator().manual_seed(seed)).bfloat16()
    hf = folder / "hf"
    hf.mkdir()
    write_files(hf, {"model.safetensors": specs}, lambda spec: noise[:torch.Size(spec.shape).numel()].reshape(
        spec.shape).to(spec.dtype), 1, lambda name, record: None)
    (hf / "config.json").write_text(json.dumps(family.to_hf_config(model, "bfloat16", TokenIds())))
    convert.from_hf(hf, folder / str(seed))
    shutil.rmtree(hf)
print(max(spec.size_bytes for spec in specs), sum(spec.size_bytes for spec in specs))
"""
FUSE = """
import sys
from pathlib import Path
from megatron_sov import convert
convert.average
import torch, torch.distributed
folder, count = Path(sys.argv[1]), int(sys.argv[2])
if count:
    convert.average([(folder / str(i % 2), 1.0) for i in range(count)], folder / f"merged-{count}")
"""


def drawn(draw: np.random.Generator, ability: float, difficulty: np.ndarray) -> JudgedItem:
    """Return what a checkpoint of that ability makes of the problems."""
    right = draw.binomial(SAMPLES, 1 / (1 + np.exp(difficulty - ability)))
    return JudgedItem({str(i): PromptCounts(int(n), num_silent=SAMPLES - int(n)) for i,
                       n in enumerate(right)},
                      Counter(scored=SAMPLES * len(right)))


def chosen(draw: np.random.Generator, problems: int, lead: float, best: int) -> DomainChoice:
    """Return the choice in a domain in which one checkpoint is better by `lead`."""
    difficulty = draw.normal(1.5, 1.5, problems)
    return choose([MeasuredCheckpoint.of(str(i), "domain", drawn(draw, lead * (i == best), difficulty),
                                         [1, K])
                   for i in range(CHECKPOINTS)], K)


def pick() -> None:
    """Print how often the planted checkpoint is picked, and how often the choice is called clear."""
    print(f"{CHECKPOINTS} checkpoints, {SAMPLES} samples, pass@{K}, {REPEATS * DOMAINS} choices a row\n"
          f"{'problems':>8}  {'lead (logits)':>13}  {'picked':>7}  {'clear':>6}  {'clear and wrong':>15}")
    for problems in (30, 100, 300):
        for lead in (0.0, 0.5, 1.0):
            draw = np.random.default_rng(problems)
            counts: Counter[str] = Counter()
            for _ in range(REPEATS):
                for best in draw.permutation(CHECKPOINTS)[:DOMAINS]:
                    choice = chosen(draw, problems, lead, int(best))
                    is_right, is_clear = choice.checkpoint == str(best), not choice.as_good
                    counts["picked"] += is_right
                    counts["clear"] += is_clear
                    counts["wrong"] += is_clear and not (is_right and lead)
            picked, clear, wrong = (counts[name] / (REPEATS * DOMAINS)
                                    for name in ("picked", "clear", "wrong"))
            print(f"{problems:>8}  {lead:>13.1f}  {f'{picked:.0%}' if lead else 'any':>7}  {clear:>6.0%}  "
                  f"{wrong:>15.0%}", flush=True)


def peak_bytes(folder: str, count: int) -> int:
    """Return the peak of resident memory of a process that merges so many checkpoints."""
    process = subprocess.Popen([sys.executable, "-c", FUSE, folder, str(count)], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"merging {count} checkpoints: exit code {process.returncode}")
    return usage.ru_maxrss * 1024


def merge() -> None:
    """Print what memory and time a merge takes."""
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run([sys.executable, "-c", MAKE, folder], capture_output=True, text=True,
                              check=True)
        largest, total = map(int, made.stdout.split())
        print(f"\na mixture of experts of {total / 1e6:,.0f} MB in bfloat16, its largest tensor "
              f"{largest / 1e6:,.0f} MB\n{'merged':>8}  {'seconds':>7}  "
              f"{'peak above imports (largest tensors)':>36}")
        idle = peak_bytes(folder, 0)
        for count in (2, 4):
            begin_s = time.monotonic()
            peak = peak_bytes(folder, count)
            print(f"{count:>8}  {time.monotonic() - begin_s:>7.1f}  {(peak - idle) / largest:>36.2f}",
                  flush=True)
            assert peak - idle < 3 * largest
            assert sum(f.stat().st_size for f in Path(folder, f"merged-{count}").rglob("*")) > 0.9 * total


if __name__ == "__main__":
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
          f"{platform.python_version()}")
    pick()
    merge()
