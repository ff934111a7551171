"""What `train.deterministic` costs: steps of one model with it and without, in turns,
on this machine's CPU or GPU.

Usage: python benchmarks/deterministic.py > benchmarks/results/deterministic.txt
Every measurement runs in a process of its own, on drawn tokens; the first steps of each warm
up and do not count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

VARIANTS = (("tiny-solar-open", "fp32"), ("tiny-k-exaone", "fp32"), ("tiny-k-exaone", "bf16"))
SMALL = ("train.num_threads=1", "train.global_batch_size=8", "train.micro_batch_size=4")
"""One thread: on a machine that is shared, threads that wait for each other are all that
two would measure."""
WARM_UP_STEPS, DOCUMENTS, DOCUMENT_TOKENS = 2, 400, 300


def write_shard(prefix: Path, vocab_size: int) -> None:
    """Write a token shard of documents drawn by a Zipf law, int32."""
    lengths = np.full(DOCUMENTS, DOCUMENT_TOKENS, np.int32)
    starts = (4 * DOCUMENT_TOKENS * np.arange(DOCUMENTS)).astype(np.int64)
    tokens = np.random.default_rng(0).zipf(1.3, DOCUMENTS * DOCUMENT_TOKENS) % vocab_size
    header = b"MMIDIDX\x00\x00" + np.array([1], np.uint64).tobytes() + bytes([4])
    prefix.with_suffix(".idx").write_bytes(
        header + np.array([DOCUMENTS, DOCUMENTS + 1], np.uint64).tobytes() + lengths.tobytes()
        + starts.tobytes() + np.arange(DOCUMENTS + 1, dtype=np.int64).tobytes())
    tokens.astype(np.int32).tofile(prefix.with_suffix(".bin"))


def measure(folder: Path, recipe: str, settings: list[str], steps: int) -> dict[str, object]:
    """Train `steps` steps in this process; returns median wall and CPU seconds of a step,
    and a hash of the weights."""
    from megatron_sov.engine.parallel import cpu_shims
    from megatron_sov.engine.parallel.device import on_gpu

    cpu_shims.prepare_megatron()
    import torch

    from megatron_sov import recipes
    from megatron_sov.engine.parallel import device as determinism, world
    from megatron_sov.model.config import apply_settings
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.data.token_shards import Source, TokenShard
    from megatron_sov.train.objectives.data_objective import LanguageModelling
    from megatron_sov.train.trainer import Trainer

    config = apply_settings(recipes.get(recipe),
                            [f"train.steps={steps + WARM_UP_STEPS}", "train.tokens=0", *settings])
    prefix = folder / f"tokens-{config.model.vocab_size}"
    write_shard(prefix, config.model.vocab_size)
    torch.set_num_threads(config.train.num_threads or os.cpu_count() or 1)
    if config.train.deterministic:
        determinism.switch_on()
    place = world.join(config.parallel)
    source = Source("drawn", None, "text", {}, {"train": DOCUMENTS * DOCUMENT_TOKENS}, 1.0,
                    made=TokenShard(prefix))
    trainer = Trainer(config, place, RunFolder(folder / "run"), [source], LanguageModelling)
    wall, cpu_s = [], []
    for _ in range(steps + WARM_UP_STEPS):
        began, used = time.perf_counter(), time.process_time()
        trainer.update()  # its gradient norm is read, so the device has finished
        wall.append(time.perf_counter() - began)
        cpu_s.append(time.process_time() - used)
    digest = hashlib.sha256()
    for parameter in trainer.model.parameters():
        digest.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    device = torch.cuda.get_device_name() if on_gpu() else f"CPU, {torch.get_num_threads()} threads"
    world.leave()
    return {"wall_s": statistics.median(wall[WARM_UP_STEPS:]),
            "cpu_s": statistics.median(cpu_s[WARM_UP_STEPS:]), "device": device,
            "weights": digest.hexdigest()}


def in_process(folder: Path, recipe: str, settings: list[str], steps: int,
               port: int) -> dict[str, float | str]:
    """Run `measure` as the one rank of a run of its own."""
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-W", "ignore", __file__, "--measure", str(folder), "--recipe", recipe,
               "--steps", str(steps)]
    command += [a for s in settings for a in ("--set", s)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def report(variants: list[tuple[str, list[str]]], steps: int, rounds: int, port: int) -> None:
    """Print a row per variant: time of a step without and with, their ratio, and whether bits repeated."""
    print(f"{platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} at the start), "
          f"Python {platform.python_version()}")
    print(f"median step of {steps}, the lowest of {rounds} rounds in turns; same bits: in all rounds\n")
    print(f"{'':<34}" + "".join(f"{kind + ' ms off':>12}{'on':>9}{'ratio':>8}" for kind in ("wall", "CPU"))
          + f"{'same bits off':>15}{'on':>5}")
    device = ""
    with tempfile.TemporaryDirectory() as folder:
        for recipe, settings in variants:
            found: dict[bool, list[dict[str, float | str]]] = {False: [], True: []}
            for number in range(rounds):
                for on in (number % 2 == 0, number % 2 == 1):
                    chosen = [*settings, f"train.deterministic={str(on).lower()}"]
                    found[on].append(in_process(Path(folder), recipe, chosen, steps, port))
            device = str(found[True][0]["device"])
            row = f"{recipe + ' ' + settings[-1].split('=')[-1] if settings else recipe:<34}"
            for name in ("wall_s", "cpu_s"):
                off, on_ = (min(1e3 * float(r[name]) for r in found[on]) for on in (False, True))
                row += f"{off:>12.0f}{on_:>9.0f}{on_ / off:>7.2f}x"
            repeat = ["yes" if len({r["weights"] for r in found[on]}) == 1 else "no" for on in (False, True)]
            print(f"{row}{repeat[0]:>15}{repeat[1]:>5}", flush=True)
    print(f"\nmeasured on: {device}")


def main() -> None:
    """Measure in this process, or report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="train here and print one JSON object")
    parser.add_argument("--recipe", help="a recipe to measure alone (default: tiny ones)")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="key=value")
    parser.add_argument("--steps", type=int, default=8, help="steps that count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=29511, help="a free port")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.recipe, args.settings, args.steps)))
        return
    variants = [(args.recipe, args.settings)] if args.recipe else [
        (recipe, [*SMALL, *args.settings, f"train.precision={precision}"]) for recipe, precision in VARIANTS]
    report(variants, args.steps, args.rounds, args.port)


if __name__ == "__main__":
    main()
