"""Muon against AdamW on the tiny recipes: held-out loss at equal tokens, time and memory.

Usage: python benchmarks/muon.py > benchmarks/results/muon.txt

The text is Python's own library, tokenized by the project's commands, a tenth of it held out.  Each optimizer
first gets the best of a few learning rates by its held-out loss with the first seed, then runs with the other
seeds (of weights and data order) at that rate.  Every run has a process of its own with one thread; times are
CPU seconds, since the machine may do other work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NAMES = ("adamw", "muon")
SAMPLES, SEQ_LEN = 8, 128
SETTINGS = (f"train.global_batch_size={SAMPLES}", f"train.micro_batch_size={SAMPLES}", "train.num_threads=1",
            "optim.warmup_steps=20", "data.heldout_tokens=20480", "guards.sigma=0",
            f'data.phases=[{{"name": "main", "seq_len": {SEQ_LEN}}}]', "train.eval_every_steps=0")
WARM_UP_STEPS = 5
"""Left out of times."""


def write_data(folder: Path, num_files: int) -> Path:
    """Pack the first files of Python's library, by name, into token shards; returns their folder."""
    from data_prep.cli import main as sov_data
    from tokenizer.cli import main as sov_tokenizer

    files = sorted(p for p in Path(os.__file__).parent.glob("*.py") if p.stat().st_size > 4096)[:num_files]
    text = folder / "python.jsonl"
    with text.open("w") as out:
        for file in files:
            for part in file.read_text(encoding="utf-8", errors="ignore").split("\n\n\n"):
                out.write(json.dumps({"text": part}) + "\n")
    common = ["--input", str(text)]
    sov_tokenizer(["train", "--preset", "solar-open", "--vocab-size", "2048", *common, "--output",
                   str(folder / "tokenizer")])
    sov_data(["pack", "--tokenizer", str(folder / "tokenizer"), *common, "--output", str(folder / "tokens"),
              "--heldout", "0.1", "--workers", "1"])
    return folder / "tokens"


def train(tokens: Path, recipe: str, settings: list[str]) -> dict[str, float]:
    """Train as the only rank; returns held-out loss, CPU seconds and the optimizer's bytes."""
    import torch

    from megatron_sov import recipes
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import apply_settings
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.data.token_shards import open_sources
    from megatron_sov.train.objectives.data_objective import LanguageModelling
    from megatron_sov.train.trainer import Trainer

    torch.set_num_threads(1)
    config = apply_settings(recipes.get(recipe),
                            [*SETTINGS, *settings, f'data.paths={json.dumps({str(tokens): 1})}'])
    place = world.join(config.parallel)
    trainer = Trainer(config, place, RunFolder(tokens / "not-written"),
                      open_sources(config.data.paths, config.model.vocab_size), LanguageModelling)
    update, of_optimizer, of_step, losses = trainer.optimizer.step, [], [], []

    def timed(*arguments: Any) -> float:
        began = time.process_time()
        norm = update(*arguments)
        of_optimizer.append(time.process_time() - began)
        return norm

    trainer.optimizer.step = timed  # type: ignore[method-assign, assignment]
    while not trainer.finished:
        began = time.process_time()
        result = trainer.update()
        assert result is not None
        losses.append(result.loss)
        of_step.append(time.process_time() - began)
    heldout = trainer.evaluate()
    state = sum(b.data.numel() * b.data.element_size() for b in trainer.optimizer.state_shards())
    world.leave()
    tokens_seen = sum(h.tokens for h in heldout.values())
    return {"heldout": sum(h.loss * h.tokens for h in heldout.values()) / tokens_seen,
            "training": statistics.mean(losses[-20:]), "step_s": statistics.median(of_step[WARM_UP_STEPS:]),
            "optimizer_s": statistics.median(of_optimizer[WARM_UP_STEPS:]), "state_bytes": state}


def in_process(tokens: Path, recipe: str, settings: list[str]) -> dict[str, float]:
    """Run `train` in a process of its own."""
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--one", str(tokens), recipe, *settings],
                          check=False, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{recipe} {' '.join(settings)}: the run failed")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(tokens: Path, recipe: str, steps: int, rates: list[float], seeds: int, jobs: int) -> None:
    """Print every run of a recipe, then both optimizers side by side."""
    print(f"\n{recipe}, {steps} steps of {SAMPLES} x {SEQ_LEN} tokens\n"
          f"{'optimizer':<10}{'rate':>8}{'seed':>6}{'held-out':>10}{'training':>10}{'step, CPU s':>13}"
          f"{'optimizer, CPU s':>18}{'state, MB':>11}", flush=True)

    def run(name: str, lr: float, seed: int) -> dict[str, float]:
        found = in_process(tokens, recipe, [f"train.steps={steps}", f"optim.name={name}", f"optim.lr={lr}",
                                            f"optim.min_lr={lr / 20}", f"train.seed={seed}"])
        print(f"{name:<10}{lr:>8g}{seed:>6}{found['heldout']:>10.4f}{found['training']:>10.4f}"
              f"{found['step_s']:>13.4f}{found['optimizer_s']:>18.4f}{found['state_bytes'] / 1e6:>11.2f}",
              flush=True)
        return found

    with ThreadPoolExecutor(jobs) as pool:
        tried = {(name, lr): pool.submit(run, name, lr, 1) for lr in rates for name in NAMES}
        best = {name: min(rates, key=lambda lr: tried[name, lr].result()["heldout"]) for name in NAMES}
        others = {(name, seed): pool.submit(run, name, best[name], seed) for seed in range(2, seeds + 1)
                  for name in NAMES}
        runs = {
            name: [tried[name, best[name]].result(), *(others[name, s].result() for s in range(2, seeds + 1))]
            for name in NAMES}
    adamw, muon = runs["adamw"], runs["muon"]
    gains = [a["heldout"] - m["heldout"] for a, m in zip(adamw, muon, strict=True)]
    ratio = {what: statistics.median(m[what] for m in muon) / statistics.median(a[what] for a in adamw)
             for what in ("step_s", "optimizer_s", "state_bytes")}
    print(f"Muon's held-out loss is lower by {statistics.mean(gains):.4f} nats on average (by seed: "
          f"{', '.join(f'{g:.4f}' for g in gains)}).\nIts steps take {ratio['step_s']:.2f} times AdamW's CPU "
          f"time, the optimizer alone {ratio['optimizer_s']:.2f} times; "
          f"its state has {ratio['state_bytes']:.2f} times the bytes.", flush=True)


def main() -> None:
    """Compare on both tiny recipes."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs="+", metavar="TOKENS RECIPE SETTING", help=argparse.SUPPRESS)
    parser.add_argument("--recipes", nargs="+", default=["tiny-k-exaone", "tiny-solar-open"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", nargs="+", type=float, default=[2.5e-3, 5e-3, 1e-2],
                        help="learning rates to try")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--files", type=int, default=40, help="files of Python's library")
    args = parser.parse_args()
    if args.one:
        from megatron_sov.engine.parallel import launcher

        tokens, recipe, *settings = args.one
        sys.exit(launcher.launch(lambda: print(json.dumps(train(Path(tokens), recipe, settings))), 1,
                              num_threads=1))
    print(f"{platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} at the start), "
          f"Python {platform.python_version()}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        with contextlib.redirect_stdout(sys.stderr):
            tokens = write_data(Path(name), args.files)
        for recipe in args.recipes:
            compare(tokens, recipe, args.steps, args.rates, args.seeds, args.jobs)


if __name__ == "__main__":
    main()
