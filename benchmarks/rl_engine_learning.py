"""What `rl run --engine vllm` teaches: GSPO whose responses a real vLLM server writes, beside this project's
own engine and beside fine-tuning on the best of as many responses.

Usage: SOV_ENGINE_PYTHON=PYTHON python benchmarks/rl_engine_learning.py --work FOLDER [--seeds 0 1 2]
       [--arms vllm own best ...]
       python benchmarks/rl_engine_learning.py --work FOLDER --print

PYTHON is the interpreter of an environment with vLLM (docs/install.md).  Start, questions and rewards are
those of rl_learning.py (its start is planted: a third of its answers are right); the model is dense, with
heads of 32, which vLLM needs on a CPU.  All arms learn and write in bf16.

  vllm      a server of vLLM, which is given the weights through shared memory in each round
  own       `--engine megatron`
  shuffled  as vllm, with rewards drawn by lot
  best      the start answers the prompts of as many rounds, as often; it is fine-tuned on a right answer to
            each prompt that it has, over as many documents as the rounds learned.  The best rate of those
            that were run for each seed, chosen by the very questions that are asked, which favours this arm

A run that is complete is not run again.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path

from rl_learning import NUM_ASKED, PROMPTS, RATES, ROUNDS, SAMPLES, Seed, accuracy
from seed_runs import run_arms
from seeds import half_width

BF16 = "train.precision=bf16"
GSPO = ("policy.method=gspo", BF16)
VLLM = ("--engine", "vllm", "--engine-set", 'more=["--enforce-eager"]', "--engine-set", "requests=64",
        "--engine-set", "dtype=bfloat16")
QUIET = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
         "TORCH_COMPILE_DISABLE": "1"}
ARMS = ("vllm", "own", "shuffled", "best")
LIFT_POINTS = 25.0
"""Asked of vllm."""


class DenseSeed(Seed):
    """Data and runs of one seed."""

    recipe = "tiny-qwen3"
    sizes = ("vocab_size=512", "hidden_size=64", "num_layers=3", "num_heads=4", "num_kv_heads=2",
             "head_dim=32", "dense_ffn_dim=192")

    def arm(self, name: str) -> None:
        """Run an arm, unless it is complete, and ask what it has learned."""
        if name == "best":
            for rate in RATES:
                self.fine_tune(name, rate, 16, BF16)
        elif name == "own":
            self.reinforce(name, GSPO)
        else:
            by_lot = ["--reward-set", f"by_lot={self.seed + 1}"] if name == "shuffled" else []
            self.reinforce(name, GSPO, *VLLM, *by_lot)


def run_one(seed: int, work: Path, arm: str) -> None:
    """Run what is missing of an arm."""
    os.environ.update(QUIET)
    DenseSeed(seed, work).arm(arm)


def reached(folder: Path, arm: str) -> float | None:
    """Return the percentage of right answers of an arm, where it was measured."""
    if arm != "best":
        return accuracy(folder / arm)
    found = [right for rate in RATES if (right := accuracy(folder / f"best-{rate}")) is not None]
    return max(found) if found else None


def rounds_of(folder: Path) -> str:
    """Return what the rounds of a run of servers tell of weights and log-probabilities."""
    events = folder / "events.jsonl"
    rows = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
    rounds = [row for row in rows if row["event"] == "round" and "push_s" in row]
    kl = [row["meters"]["engine_kl"] for row in rows if row["event"] == "step"]
    clipped = [row["meters"]["clip_share"] for row in rows if row["event"] == "step"]
    if not kl:
        return ""
    told = f"engine_kl up to {max(kl):.1e} a token, clip_share up to {max(clipped):.2g}"
    if rounds:
        push_s, write_s = (statistics.median(r[name] for r in rounds) for name in ("push_s", "write_s"))
        gap = max(r["engine_gap_nats"] for r in rounds)
        told = (f"{len(rounds)} rounds, weights pushed in {push_s:.2f} s, a known text at most {gap:.1e} "
                f"nats a token apart, written in {write_s:.1f} s; {told}")
    return told


def report(work: Path) -> None:
    """Print what there is."""
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}; bf16; {ROUNDS} rounds of {PROMPTS} prompts x {SAMPLES} responses; "
          f"right answers to {NUM_ASKED} questions in wordings that no round has asked, greedy, %")
    seeds = [folder for folder in sorted(work.glob("seed-*")) if accuracy(folder / "start") is not None]
    for arm in ARMS:
        pairs = [(before, after) for f in seeds if (before := accuracy(f / "start")) is not None
                 and (after := reached(f, arm)) is not None]
        if not pairs:
            continue
        lifts = [after - before for before, after in pairs]
        judged = ""
        if arm == "vllm":
            judged = "   ok" if statistics.mean(lifts) >= LIFT_POINTS else "   NOT SO"
        print(f"  {arm:<9} {statistics.mean(lifts):+6.1f} points  (95 %: +- {half_width(lifts):.1f})"
              f"{judged}   " + ", ".join(f"{b:.1f} -> {a:.1f}" for b, a in pairs))
    for folder in seeds:
        for arm in ARMS:
            if told := rounds_of(folder / arm):
                print(f"{folder.name}, {arm}: {told}")


if __name__ == "__main__":
    run_arms(__doc__, ARMS, run_one, report)
