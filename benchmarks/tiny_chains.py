"""The chains of both big models in tiny form, stage by stage on this machine, and what each stage left.

Usage: python benchmarks/tiny_chains.py tiny-solar-open tiny-k-exaone --work FOLDER
       python benchmarks/tiny_chains.py tiny-solar-open tiny-k-exaone --work FOLDER --print

Each stage is the command that its job would run (slurm/chains).  Behind every training stage the model is
asked questions that no round has asked, four answers each at temperature 1: the reward of the chains' own
rounds (`repetition`: -1 for a loop or an answer without an end, 0 for neither) and bits per byte of held-out
text.  Stages that ended are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path

from seed_runs import run

from megatron_sov.commands.operate.submit import ChainStage, read_chain
from megatron_sov.operate.slurm.stages import STAGES

ASKED, SAMPLES = "corpus/benchmarks/code-switching/test.jsonl", 4


def arguments_of(stage: ChainStage, work: Path) -> list[str]:
    """Return a stage's arguments in a folder."""
    return [word.replace("$WORK", str(work)) for word in shlex.split(stage.arguments)]


def folder_of(arguments: list[str]) -> Path:
    """Return the run that a training stage leaves."""
    return Path(arguments[arguments.index("--run") + 1])


def ask(model: Path, work: Path, log: Path) -> None:
    """Ask a model, and read held-out text with it."""
    answers, judged = model / "asked.jsonl", model / "asked.judged.jsonl"
    run(log, "megatron_sov", "generate", model, "--prompts", work / ASKED, "--chat", "--max-new-tokens", "64",
        "--samples", str(SAMPLES), "--temperature", "1", "--output", answers)
    run(log, "megatron_sov", "score", "--reward", "repetition", "--input", answers, "--output", judged,
        "--workers", "1")
    run(log, "megatron_sov", "eval", "ppl", model, "--data", work / "tokens", "--output", model / "ppl.json")


def go(chain: str, work: Path) -> None:
    """Run what is missing of a chain."""
    work.mkdir(parents=True, exist_ok=True)
    for stage in read_chain(chain).stages:
        done, log = work / f"{stage.label}.done", work / f"{stage.label}.log"
        if done.exists():
            continue
        kind, arguments = STAGES[stage.stage], arguments_of(stage, work)
        print(f"{chain}: {stage.label}", flush=True)
        run(log, *kind.program, *arguments, *(["--resume"] if kind.ranks else []))
        if kind.ranks:
            ask(folder_of(arguments), work, log)
        done.touch()


def rows(chain: str, work: Path) -> Iterator[str]:
    """Yield a line for each training stage: mean reward with its 95 % over questions, answers that ended, and
    bits per byte."""
    for stage in read_chain(chain).stages:
        if not STAGES[stage.stage].ranks or not (work / f"{stage.label}.done").exists():
            continue
        model = folder_of(arguments_of(stage, work))
        read = [json.loads(line) for line in (model / "asked.judged.jsonl").read_text().splitlines()]
        of_prompts: dict[str, list[float]] = {}
        for row in read:
            of_prompts.setdefault(row["prompt"], []).append(row["reward"])
        means = [statistics.mean(rewards) for rewards in of_prompts.values()]
        wide = 1.96 * statistics.stdev(means) / math.sqrt(len(means))
        ended = statistics.mean(row["finish_reason"] != "length" for row in read)
        bits = json.loads((model / "ppl.json").read_text())
        told = ", ".join(f"{source} {found['bits_per_byte']:.4f}" for source, found in bits.items())
        yield (f"  {stage.label:<14} reward {statistics.mean(means):+.3f} +- {wide:.3f} over {len(means)} "
               f"questions, {ended:.1%} of answers ended; bits per byte: {told}")


def main() -> None:
    """Go the chains, and print what came of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("chains", nargs="+", choices=["tiny-solar-open", "tiny-k-exaone"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--print", dest="only_print", action="store_true")
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, load "
          f"{os.getloadavg()[0]:.1f}")
    for chain in args.chains:
        work = args.work.absolute() / chain
        if not args.only_print:
            go(chain, work)
        print(chain)
        print("\n".join(rows(chain, work)))


if __name__ == "__main__":
    main()
