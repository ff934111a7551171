"""Loss curves of the 8- and 4-bit recipes beside bf16, on a CPU: Transformer Engine's double with operands of
all products quantised by the reference quantisers (benchmarks/gpu/quantizers).

Usage: python benchmarks/fp8_curves.py [--steps 200] [--seeds 0 1 2] [--out docs/pictures/fp8_curves.svg] \
           > benchmarks/results/fp8_curves.txt

Both tiny recipes at their own sizes (hidden 128, 8 experts) but for a vocabulary of 368, 256 tokens a step,
on the source of a module of Python's library.  Everything but `train.fp8` is the same, the order of the data
too; a seed has initial weights and an order of its own, and is compared with bf16 of the same seed.  The
picture shows the first seed.  A curve takes minutes: each is kept in a folder (`--keep`) and not computed
again, so that what was stopped goes on where it was; delete the folder when the code has changed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from kills import make_data
from seeds import over_seeds

from megatron_sov import recipes
from megatron_sov.base.artifacts import atomic_write

ROOT = Path(__file__).parents[1]
DOUBLE = ROOT / "tests" / "te_double"
MODELS = ("tiny-solar-open", "tiny-k-exaone")
CONTROL = "bf16, lr + 0.1 %"
"""A curve that differs from bf16's by chance alone: how far it is from that says what the others mean."""
RECIPES = {"none": "#444444", CONTROL: "#aaaaaa", "tensorwise": "#d55e00",
           "blockwise": "#0072b2", "mxfp8": "#009e73", "nvfp4": "#cc79a7"}
"""`train.fp8`, or the control -> colour of its curve."""
SETTINGS = ("model.hidden_size=128", "model.num_layers=4", "model.head_dim=32", "model.expert_ffn_dim=128",
            "optim.warmup_steps=20", "train.global_batch_size=1", "guards.sigma=0",
            'data.phases=[{"name": "main", "seq_len": 256}]')
FIRST_SEED = 1234
LAST = 20
"""Steps at the end whose losses are averaged: one step's loss moves by more than recipes differ."""


def train(model: str, recipe: str, data: Path, steps: int, seed: int) -> None:
    """Print the losses as JSON; runs in a process of its own, as the only rank."""
    sys.path.insert(0, str(DOUBLE))
    import transformer_engine.pytorch  # noqa: F401  (one that is not imported is hidden on a CPU)

    from megatron_sov.engine.parallel import cpu_shims

    cpu_shims.prepare_megatron()
    import quantized_run

    from megatron_sov.engine.model import specs

    specs.transformer_engine_serves = lambda dtype: True
    dense = ["model.dense_ffn_dim=384"] if model == "tiny-k-exaone" else []
    lr = 1.001 * recipes.get(model).optim.lr
    chosen = f"optim.lr={lr}" if recipe == CONTROL else f"train.fp8={recipe}"
    found = quantized_run.losses(model, [*SETTINGS, *dense, chosen, f"train.steps={steps}",
                                         f"train.seed={FIRST_SEED + seed}"], str(data), steps)
    print(json.dumps(found["losses"]))


def curve(model: str, recipe: str, data: Path, steps: int, seed: int, keep: Path) -> list[float]:
    """Return the losses: those that were kept, else of a training in a process of its own."""
    file = keep / f"{model}-{'control' if recipe == CONTROL else recipe}-{steps}-{seed}.json"
    if file.is_file():
        kept: list[float] = json.loads(file.read_text())
        return kept
    port = str(20000 + os.getpid() % 10000)
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--train", model, recipe, str(data),
                           "--steps", str(steps), "--seeds", str(seed)],
                          env={**os.environ, **rank}, stdout=subprocess.PIPE, text=True, check=True)
    losses: list[float] = json.loads(done.stdout.splitlines()[-1])
    atomic_write(file, json.dumps(losses) + "\n")
    return losses


def picture(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw the curves, and below them how far each is from bf16's, as an SVG file."""
    width, height, parts = 460, 250, []
    for column, (model, found) in enumerate(curves.items()):
        base, x0 = smooth(found["none"]), 60 + column * (width + 50)
        lines = {r: smooth(losses) for r, losses in found.items()}
        apart = {r: [100 * (a / b - 1) for a, b in zip(line, base, strict=True)] for r, line in lines.items()}
        top = max(max(line) for line in lines.values())
        span = max(1.0, max(abs(v) for line in apart.values() for v in line[len(line) // 4:]))
        parts.append(f'<text x="{x0}" y="24" font-weight="bold">{model}</text>')
        for y0, series, low, high, title in ((40, lines, 0.0, top, "loss"),
                                             (330, apart, -span, span, "% above bf16's")):
            parts.append(f'<rect x="{x0}" y="{y0}" width="{width}" height="{height}" fill="none" '
                         f'stroke="#ccc"/><text x="{x0 + 6}" y="{y0 + 16}">{title}</text>')
            for value in (low, (low + high) / 2, high):
                y = y0 + height * (high - value) / (high - low)
                parts.append(f'<text x="{x0 - 6}" y="{y + 4:.0f}" text-anchor="end">{value:.1f}</text>')
            for recipe, line in series.items():
                points = " ".join(f"{x0 + width * i / (len(line) - 1):.1f},"
                                  f"{y0 + height * (high - min(max(v, low), high)) / (high - low):.1f}"
                                  for i, v in enumerate(line))
                parts.append(f'<polyline points="{points}" fill="none" stroke="{RECIPES[recipe]}"/>')
        parts.append(f'<text x="{x0 + width}" y="600" text-anchor="end">{len(base)} steps</text>')
    for i, (recipe, colour) in enumerate(RECIPES.items()):
        name = "bf16" if recipe == "none" else recipe
        parts.append(f'<text x="{60 + i * 140}" y="630" fill="{colour}" font-weight="bold">{name}</text>')
    path.write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1050 645" font-family="sans-serif" '
                    'font-size="13"><rect width="100%" height="100%" fill="white"/>' + "\n".join(parts)
                    + "</svg>\n")


def smooth(losses: list[float], share: float = 0.1) -> list[float]:
    """Return the running mean of the curve: a new loss counts by `share`."""
    means = [losses[0]]
    for loss in losses[1:]:
        means.append(means[-1] + share * (loss - means[-1]))
    return means


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures" / "fp8_curves.svg")
    parser.add_argument("--train", nargs=3, metavar=("MODEL", "RECIPE", "DATA"), help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "fp8_curves",
                        help="folder of curves that are done")
    args = parser.parse_args()
    if args.train:
        train(args.train[0], args.train[1], Path(args.train[2]), args.steps, args.seeds[0])
        return
    print(f"{platform.machine()}, Python {platform.python_version()}; {args.steps} steps of 256 tokens; "
          f"last: mean of the last {LAST} steps; seeds {', '.join(map(str, args.seeds))}")
    args.keep.mkdir(parents=True, exist_ok=True)
    curves: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        for model in MODELS:
            print(f"\n{model}\n{'':20}{'first':>9}{'last':>9}   {'% above bf16 of the same seed':40}mean")
            base: list[float] = []
            for recipe in RECIPES:
                found = [curve(model, recipe, data, args.steps, seed, args.keep) for seed in args.seeds]
                curves.setdefault(model, {})[recipe] = found[0]
                last = [statistics.mean(losses[-LAST:]) for losses in found]
                base = base or last
                apart = [100 * (a / b - 1) for a, b in zip(last, base, strict=True)]
                name = "bf16" if recipe == "none" else recipe
                print(f"{name:20}{statistics.mean(c[0] for c in found):9.4f}{statistics.mean(last):9.4f}   "
                      f"{'  '.join(f'{a:+.2f}' for a in apart):40}{over_seeds(apart, '+.2f')}", flush=True)
    picture(curves, args.out)


if __name__ == "__main__":
    main()
