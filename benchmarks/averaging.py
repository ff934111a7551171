"""Means of a run's checkpoints beside its last one.

Usage: python benchmarks/averaging.py --work FOLDER [--seeds 0 1 2]

Text that any machine has (`sov-data demo-corpus`, English and code), 2,048 token ids, 4 layers of width 64,
everything through the ordinary commands on one process of one thread.

  dense     learns for 400 steps
  averages  the dense model goes on at a steady rate and keeps a checkpoint every 20 steps: the last one
            beside means of the newest five (`convert average`), and beside a run whose rate decays over those
            100 steps

Printed are held-out losses in nats per token, means over seeds with 95 % intervals (Student's t), and each
seed's difference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from seeds import over_seeds

MODEL = ("model.vocab_size=2048", "model.hidden_size=64", "model.num_layers=4", "model.num_heads=4",
         "model.num_kv_heads=2", "model.head_dim=16", 'data.phases=[{"name": "main", "seq_len": 128}]',
         "data.max_epochs=0", "train.global_batch_size=16", "train.micro_batch_size=16",
         "train.eval_every_steps=0", "train.num_threads=1", "train.keep_checkpoints=0", "guards.sigma=0",
         "optim.schedule=constant", "optim.warmup_steps=20", "model.rope_theta=10000.0")
DENSE = ("model.dense_ffn_dim=128", "model.llama3_rope=null")
RATE = "optim.lr=3e-3"
AVERAGES = {"mean of five": (), "linear": ("--weights", "linear"),
            "ema 0.5": ("--weights", "ema", "--decay", "0.5")}


class Work:
    """A folder with data, runs and checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def command(self, module: str, *arguments: str | Path) -> None:
        """Run a command, its output into a file."""
        with open(self.folder / "log", "a") as log:
            done = subprocess.run([sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)],
                                  stdout=log, stderr=subprocess.STDOUT, check=False,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, arguments))}\nended with exit code {done.returncode}; see "
                             f"{self.folder / 'log'}")

    def made(self, name: str, module: str, *arguments: str | Path, manifest: str = "manifest.json") -> Path:
        """Return a folder that a command writes (`OUT` among its arguments), if it is not there yet."""
        out = self.folder / name
        if not (out / manifest).exists():
            self.command(module, *(out if a == "OUT" else a for a in arguments))
        return out

    def data(self) -> Path:
        """Return the token shards."""
        corpus = self.made("corpus", "data_prep.cli", "demo-corpus", "--output", "OUT", "--overwrite",
                           manifest="english.jsonl")
        texts = [corpus / "english.jsonl", corpus / "code.jsonl"]
        tokenizer = self.made("tokenizer", "tokenizer.cli", "train", "--preset", "solar-open", "--vocab-size",
                              "2048", "--input", *texts, "--output", "OUT")
        return self.made("shards", "data_prep.cli", "pack", "--tokenizer", tokenizer, "--heldout", "0.05",
                         "--workers", "1", "--input", *texts, "--output", "OUT")

    def train(self, name: str, recipe: str, start: Path | None, *settings: str) -> Path:
        """Return a run, which is run where it is not complete."""
        words = [word for setting in (*MODEL, *settings) for word in ("--set", setting)]
        words += [] if start is None else ["--from", str(start)]
        return self.made(name, "megatron_sov", "pretrain", recipe, "--data", self.data(), "--run", "OUT",
                         "--resume", *words, manifest="complete.json")

    def loss(self, target: Path) -> float:
        """Return the held-out loss, nats per token, of all sources together."""
        out = self.folder / f"{target.relative_to(self.folder)}.ppl.json".replace("/", "-")
        if not out.exists():
            self.command("megatron_sov", "eval", "ppl", target, "--data", self.data(), "--output", out,
                         "--max-tokens", "30000", "--seq-len", "128")
        figures = json.loads(out.read_text()).values()
        return float(sum(f["loss"] * f["tokens"] for f in figures) / sum(f["tokens"] for f in figures))


def measure(work: Work, seed: int) -> dict[str, float]:
    """Return what is compared -> held-out loss, of one seed."""
    own = f"train.seed={seed}"
    dense = work.train(f"dense-{seed}", "tiny-llama", None, *DENSE, own, RATE, "train.steps=400",
                       "train.checkpoint_every_steps=400")
    found = {}
    steady = work.train(f"steady-{seed}", "tiny-llama", dense, *DENSE, own, RATE, "train.steps=100",
                        "train.checkpoint_every_steps=20")
    found["steady rate, last checkpoint"] = work.loss(steady)
    for name, arguments in AVERAGES.items():
        mean = work.made(f"{name.replace(' ', '-')}-{seed}", "megatron_sov", "convert", "average", steady,
                         "OUT", "--last", "5", *arguments)
        found[f"steady rate, {name}"] = work.loss(mean)
    decayed = work.train(f"decayed-{seed}", "tiny-llama", dense, *DENSE, own, RATE, "train.steps=100",
                         "train.checkpoint_every_steps=100", "optim.schedule=linear",
                         "optim.warmup_steps=0", "optim.min_lr=3e-5")
    found["decaying rate, last checkpoint"] = work.loss(decayed)
    return found


def report(found: dict[int, dict[str, float]]) -> None:
    """Print what there is."""
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work (load "
          f"{os.getloadavg()[0]:.1f}), Python {platform.python_version()}; held-out loss, nats per token; "
          f"seeds {', '.join(map(str, found))}\n")
    for name in next(iter(found.values())):
        values = [seed[name] for seed in found.values()]
        base = "steady rate, last checkpoint"
        changes = [seed[name] - seed[base] for seed in found.values()]
        each = ", ".join(f"{v:.5f}" for v in values)
        print(f"  {name:<38} {over_seeds(values, '.4f'):>17}   {over_seeds(changes, '+.5f'):>21} against "
              f"'{base}'   ({each})")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    report({seed: measure(Work(args.work), seed) for seed in args.seeds})


if __name__ == "__main__":
    main()
