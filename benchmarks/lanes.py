"""Whether both versions of megatron-core that this project runs on train tiny models to the same losses.

Usage: python benchmarks/lanes.py > benchmarks/results/lanes.txt

The model of every tiny recipe of language modelling, but those that see or hear, learns some steps of the
same rows in float32 and in float64, on one process: once on the version that is installed and once on the
other, whose sources `make newest` fetches.  Behind that stands how many tests `make newest` runs.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from tests import newest  # noqa: E402
from tests.packing import Packed, make_packed_data  # noqa: E402

STEPS, SEQ_LEN = 6, 64
SETTINGS = ("model.vocab_size=368", "train.global_batch_size=8", "train.micro_batch_size=4",
            f"train.steps={STEPS}", "optim.warmup_steps=2", "data.heldout_tokens=128", "train.num_threads=1",
            f'data.phases=[{{"name": "main", "seq_len": {SEQ_LEN}}}]')
FOLDERS = ("te_double", "engine", "checkpoint", "layouts", "convert", "train", "e2e")
Curves = dict[str, dict[str, list[list[float]]]]
"""Recipe -> precision -> [loss, gradient norm] of each step."""


def recipes_of_text() -> list[str]:
    """Return the tiny recipes, one for each model, without those that see or hear."""
    from megatron_sov import recipes

    models: dict[str, str] = {}
    for name in recipes.RECIPES:
        config = recipes.get(name)
        if (name.startswith("tiny-") and config.objective.name == "lm" and config.model.vision is None
                and config.model.audio is None):
            models.setdefault(repr(config.model), name)
    return list(models.values())


def curves(shards: str) -> Curves:
    """Train in this process, the only rank of its world."""
    from megatron_sov import recipes
    from megatron_sov.model.config import apply_settings
    from tests.layouts.layout_run import _trainer

    found: Curves = {}
    for name in recipes_of_text():
        for precision in ("fp32", "fp64"):
            config = apply_settings(recipes.get(name), [
                *SETTINGS, f"train.precision={precision}", f'data.paths={{"{shards}": 1}}'])
            trainer = _trainer(config)
            steps = [trainer.update() for _ in range(STEPS)]
            found.setdefault(name, {})[precision] = [[step.loss, step.grad_norm] for step in steps]
            trainer.close()
            from megatron_sov.engine.parallel import world

            world.leave()
    return found


def child(shards: str, out: str) -> int:
    """Train as one rank, and write versions and losses."""
    from megatron_sov.engine.parallel import launcher
    from megatron_sov.engine.parallel.cpu_shims import prepare_megatron

    prepare_megatron()

    def rank() -> int:
        from megatron_sov.engine import lanes

        Path(out).write_text(json.dumps({"version": lanes.VERSION, "curves": curves(shards)}))
        return 0

    return launcher.launch(rank, 1, num_threads=1)


def apart(one: list[list[float]], other: list[list[float]], column: int) -> float:
    """Return how far a column of two curves is apart at most, relative to its value."""
    return max(abs(a[column] - b[column]) / max(abs(b[column]), 1e-30)
               for a, b in zip(one, other, strict=True))


def make_shards(folder: Path) -> Path:
    """Pack the documents of the tests, and return their folder."""
    programs = {"sov-tokenizer": "tokenizer.cli", "sov-data": "data_prep.cli"}

    def run(*argv: str, program: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", programs[program], *argv], cwd=ROOT, check=True,
                              capture_output=True, text=True)

    make_packed_data(folder, run)
    return Packed.of(folder).text


def number_of_tests(environment: dict[str, str]) -> list[tuple[str, int]]:
    """Return how many tests pytest finds below each folder that `make newest` runs."""
    found = []
    for folder in FOLDERS:
        done = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", f"tests/{folder}"],
                              cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        found.append((folder, int(done.stdout.strip().splitlines()[-1].split()[0])))
    return found


def main() -> int:
    """Train on both versions, and print the table."""
    if sys.argv[1:]:
        return child(*sys.argv[1:])
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}; "
          f"{STEPS} steps of 8 rows of {SEQ_LEN} tokens, one process")
    with tempfile.TemporaryDirectory() as name:
        work, both = Path(name), []
        shards = make_shards(work)
        for lane, environment in (("installed", dict(os.environ)), ("newest", newest.environment())):
            subprocess.run([sys.executable, "-W", "ignore", __file__, str(shards), str(work / lane)],
                           env=environment | {"OMP_NUM_THREADS": "1"}, check=True)
            both.append(json.loads((work / lane).read_text()))
    older, newer = both
    print(f"\n{'':<26}{'last loss in fp32, megatron-core':^34}{'largest relative difference':^44}")
    print(f"{'recipe':<26}{older['version']:>16}{newer['version']:>16}  "
          + "".join(f"{column:>11}" for column in ("loss fp32", "norm fp32", "loss fp64", "norm fp64")))
    worst: dict[str, float] = {}
    for recipe, ours in older["curves"].items():
        theirs = newer["curves"][recipe]
        far = {f"{what} {p}": apart(theirs[p], ours[p], i)
               for p in ("fp32", "fp64") for i, what in enumerate(("loss", "norm"))}
        worst = {what: max(value, worst.get(what, 0.0)) for what, value in far.items()}
        print(f"{recipe:<26}{ours['fp32'][-1][0]:>16.9f}{theirs['fp32'][-1][0]:>16.9f}  "
              + "".join(f"{value:>11.1e}" for value in far.values()))
    print(f"\nlargest of all {len(older['curves'])} recipes: "
          + ", ".join(f"{what} {value:.1e}" for what, value in worst.items()))
    print("\ntests found below each folder of `make newest`, on either version:")
    for folder, count in number_of_tests(dict(os.environ)):
        print(f"  tests/{folder:<16}{count:>6}")
    told: Any = worst
    return int(max(told["loss fp32"], 0) > 1e-6 or told["loss fp64"] > 1e-12)


if __name__ == "__main__":
    sys.exit(main())
