"""Planted samples against the checks of synthesis: what is caught, and what is rejected although it is good.

    python benchmarks/synthesis/checks.py [--generators NAME ...] [--work FOLDER]

Each generator with an actor (benchmarks/synthesis/actors) makes samples of 50 bad and 50 good cases: items
with a scripted model that answers well, or badly in a way that is named.  A case counts as kept where at
least one of its samples passes everything: first the generator's own checks, then those for all, at their
defaults, over the bad and over the good ones as a run each.  The last line has samples that only the checks
for all can know: leaked items of a benchmark, copies, loops, another language, records that nobody can read.
With --work a case that has been made is not made again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2]))
from synthesis.cases import Case
from synthesis.for_all import row_for_all
from synthesis.written_runs import fates, write_run

from data_prep.synth.checks.settings import CheckSettings
from data_prep.synth.generator import GeneratedSample, Generator, NoReply, NoUsableReply, SampleVerdict
from data_prep.synth.known import GENERATORS, generator_class
from megatron_sov.base.artifacts import atomic_write
from tests.data_prep.synth.scripted import ScriptedAsk

ACTORS = Path(__file__).parent / "actors"
MAX_GOES = 5
"""For a case of which the machine was too busy to judge something: commands that go on make it again."""


@dataclass
class Outcome:
    """What became of the cases of one generator, good or bad ones."""

    num_cases: int = 0
    num_rejected: int = 0
    """Cases of which no sample passes its generator's checks."""
    num_rejected_by_all: int = 0
    """Cases of which no sample passes everything."""
    num_by_judge: int = 0
    """Of the cases, those that only a judge can see through, who is scripted to."""
    wrong: Counter[str] = field(default_factory=Counter)
    """What ought to have become something else, by what it is."""


def made(generator: Generator, case: Case) -> list[GeneratedSample]:
    """Return the samples of a case; none where the model's answers are of no use, or nothing could be known
    of them in several goes."""
    for _ in range(MAX_GOES):
        try:
            return list(generator.make(case.item, ScriptedAsk(case.replies, case.item.id, type(generator))))
        except NoUsableReply:
            break
        except NoReply:
            continue
    return []


def kept_or_made(generator: Generator, case: Case, work: Path | None) -> list[GeneratedSample]:
    """Return the samples of a case, from a file where it has been made before."""
    if work is None:
        return made(generator, case)
    file = work / generator.name / f"{case.item.id}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps([asdict(one) for one in made(generator, case)], ensure_ascii=False))
    return [GeneratedSample(**{**one, "verdicts": tuple(SampleVerdict(**verdict)
                                                        for verdict in one["verdicts"])})
            for one in json.loads(file.read_text(encoding="utf-8"))]


def judged(generator: Generator, cases: Sequence[Case], folder: Path, settings: CheckSettings,
           work: Path | None) -> Outcome:
    """Return what becomes of cases that are all good or all bad."""
    samples = [kept_or_made(generator, case, work) for case in cases]
    write_run(folder, generator.name, generator.kind, [[asdict(one) for one in some] for some in samples])
    fate = fates(folder, settings)
    found = Outcome(len(cases))
    for number, (case, some) in enumerate(zip(cases, samples, strict=True)):
        found.num_rejected += not any(not one.reason for one in some)
        is_kept = fate.get(number) == ""
        found.num_rejected_by_all += not is_kept
        found.num_by_judge += case.by == "judge"
        if case.good != is_kept:
            found.wrong[f"{case.what} ({fate.get(number, 'no sample')})" if case.good else case.what] += 1
    return found


def row_of(name: str, module: Any, folder: Path, work: Path | None) -> tuple[str, bool]:
    """Return the line of one generator, and whether all bad cases were caught."""
    cls = generator_class(name)
    generator = cls(cls.Settings(**module.SETTINGS))
    cases = module.cases()
    began_s = time.monotonic()
    good, bad = (judged(generator, [case for case in cases if case.good is is_good], folder / f"{is_good}",
                        CheckSettings(), work) for is_good in (True, False))
    line = (f"{name:<18} {f'{bad.num_rejected}/{bad.num_cases}':>9} {bad.num_by_judge:>8} "
            f"{f'{bad.num_rejected_by_all}/{bad.num_cases}':>8} {f'{good.num_rejected}/{good.num_cases}':>9} "
            f"{f'{good.num_rejected_by_all}/{good.num_cases}':>8} {time.monotonic() - began_s:>8.1f}")
    told = [f"    {'kept' if found is bad else 'rejected'} {num}: {what}"
            for found in (bad, good) for what, num in found.wrong.most_common()]
    return "\n".join([line, *told]), bad.num_rejected_by_all == bad.num_cases


def actors(names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield each generator that has an actor, with it."""
    for name in names or sorted(GENERATORS):
        stem = name.replace("-", "_")
        if (ACTORS / f"{stem}.py").is_file():
            yield name, importlib.import_module(f"synthesis.actors.{stem}")


def main() -> None:
    """Print a line for each generator."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generators", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--work", type=Path, metavar="FOLDER",
                        help="keeps what is made; seconds are those of the last go")
    args = parser.parse_args()
    print(f"{'':<18} {'bad: caught':>27} {'good: rejected':>18}")
    print(f"{'generator':<18} {'by itself':>9} {'by judge':>8} {'in all':>8} {'by itself':>9} {'in all':>8} "
          f"{'seconds':>8}")
    is_sound = True
    with tempfile.TemporaryDirectory() as folder:
        for name, module in actors(args.generators):
            line, is_caught = row_of(name, module, Path(folder) / name, args.work)
            is_sound &= is_caught
            print(line, flush=True)
        if not args.generators:
            print(row_for_all(Path(folder)))
    raise SystemExit(not is_sound)


if __name__ == "__main__":
    main()
