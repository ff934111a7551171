"""Every generator with a model of this machine that knows nothing: garbage comes back, and nothing is kept.

    python benchmarks/synthesis/local_model.py --model DIR [--generators NAME ...]

DIR is a checkpoint or Hugging Face folder, best a small one with weights by lot; it is served once by
`megatron-sov serve`, as `sov-data synth --engine DIR` does.  Each generator with an actor begins with the
first items of the actor's input, and may ask for 32 tokens at a time.  Only what measures a model keeps its
figures.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from data_prep.cli import main as sov_data
from data_prep.synth.known import GENERATORS, generator_class
from megatron_sov.work.endpoints.local_server import LocalServer, serving
from megatron_sov.work.processes.pool import StopSignal

ACTORS = Path(__file__).parent / "actors"
NUM_ITEMS, MAX_TOKENS = 2, 32
KEY_ENV = "LOCAL_MODEL_KEY"
MEASURES = {"answers", "comparisons"}
"""Generators that keep what a model can do, be it nothing."""


def row_of(name: str, served: LocalServer, folder: Path) -> tuple[str, bool]:
    """Return the line of one generator, and whether it came to its end and kept nothing."""
    folder.mkdir()
    words = importlib.import_module(f"synthesis.actors.{name.replace('-', '_')}").arguments(folder)
    limits = [part for field in dataclasses.fields(generator_class(name).Settings)
              if field.name == "max_tokens" for part in ("--set", f"max_tokens={MAX_TOKENS}")]
    began_s = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        code = sov_data(["synth", name, *words, *limits, "--engine", served.url, "--model", served.models[0],
                         "--api-key-env", KEY_ENV, "--limit", str(NUM_ITEMS), "--output", str(folder / "out"),
                         "--workers", "1", "--threads", "8"])
    file = folder / "out/summary.json"
    if not file.is_file():
        return f"{name:<18} ended with {code}", False
    found = json.loads(file.read_text())
    line = (f"{name:<18} {code:>4} {found['num_items']:>5} {found['num_unusable_items']:>8} "
            f"{found['costs']['num_answered']:>7} {found['num_rejected']:>8} {found['num_kept']:>5} "
            f"{time.monotonic() - began_s:>7.1f}")
    return line, code == 0 and (not found["num_kept"] or name in MEASURES)


def main() -> None:
    """Print a line for each generator."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--generators", nargs="+", default=[], metavar="NAME")
    args = parser.parse_args()
    print(f"{'generator':<18} {'code':>4} {'items':>5} {'unusable':>8} {'answers':>7} {'rejected':>8} "
          f"{'kept':>5} {'seconds':>7}")
    is_sound = True
    with (serving([args.model], f"{args.model}: ", sleep=StopSignal().sleep) as served,
          tempfile.TemporaryDirectory() as work):
        os.environ[KEY_ENV] = served.key
        for name in args.generators or sorted(GENERATORS):
            if (ACTORS / f"{name.replace('-', '_')}.py").is_file():
                line, is_right = row_of(name, served, Path(work) / name)
                is_sound &= is_right
                print(line, flush=True)
    raise SystemExit(not is_sound)


if __name__ == "__main__":
    main()
