"""What a kept sample costs, generator by generator: requests, tokens, seconds and money.

    python benchmarks/synthesis/sheet.py [--generators NAME ...]

Each generator with an actor makes the samples of the actor's small input through `sov-data synth`, against
its scripted model behind an HTTP endpoint on this machine.  Requests and tokens follow from the generator's
questions and checks; four characters count as a token, a million tokens cost 0.5 to read and 1.5 to write.
The seconds are those of requests to a script, one after the other: with a model they are the model's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from synthesis.endpoint import MODEL, ScriptedEndpoint, serving

from data_prep.cli import main as sov_data
from data_prep.synth.known import GENERATORS

ACTORS = Path(__file__).parent / "actors"


def summary_of(name: str, actor: Any, folder: Path) -> dict[str, Any]:
    """Run a generator on its actor's input; returns the run's figures."""
    folder.mkdir()
    words = actor.arguments(folder)
    with serving(ScriptedEndpoint(actor.reply)) as server, contextlib.redirect_stdout(io.StringIO()):
        code = sov_data(["synth", name, *words, "--engine", server.url, "--model", MODEL,
                         "--output", str(folder / "out"), "--workers", "1",
                         "--input-price", "0.5", "--output-price", "1.5"])
    if code:
        raise SystemExit(f"{name}: ended with {code}")
    found: dict[str, Any] = json.loads((folder / "out/summary.json").read_text())
    return found


def row_of(name: str, summary: dict[str, Any]) -> str:
    """Return the line of one generator."""
    per = summary["per_kept"]
    figures = (f"{per['requests']:>8.1f} {per['input_tokens']:>8,.0f} {per['output_tokens']:>8,.0f} "
               f"{per['seconds']:>8.3f} {per['cost'] * 1000:>8.3f}" if per else f"{'-':>8} " * 5)
    worst = ", ".join(f"{num} {reason}" for reason, num in list(summary["rejected"].items())[:3])
    return (f"{name:<18} {summary['num_items']:>5} {summary['num_kept']:>5} {summary['num_rejected']:>8} "
            f"{figures}  {worst}").rstrip()


def main() -> None:
    """Print a line for each generator."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generators", nargs="+", default=[], metavar="NAME")
    args = parser.parse_args()
    os.environ["OPENAI_API_KEY"] = "sk-scripted"
    print(f"{'':<32} {'':>8} {'for each kept sample:':>30}")
    print(f"{'generator':<18} {'items':>5} {'kept':>5} {'rejected':>8} {'requests':>8} {'read':>8} "
          f"{'written':>8} {'seconds':>8} {'cost/1000':>8}  mostly rejected for")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.generators or sorted(GENERATORS):
            stem = name.replace("-", "_")
            if (ACTORS / f"{stem}.py").is_file():
                actor = importlib.import_module(f"synthesis.actors.{stem}")
                print(row_of(name, summary_of(name, actor, Path(folder) / stem)), flush=True)


if __name__ == "__main__":
    main()
