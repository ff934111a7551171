"""Runs of `sov-data synth` that are killed again and again, against an endpoint that misbehaves, keep what an
undisturbed run keeps, and pay for no answer twice.

    python benchmarks/synthesis/kills.py [--kills 10] [--generators NAME ...]

For each generator with an actor (benchmarks/synthesis/actors): a run against its scripted model, of whose
answers some are empty, loops or cut off.  Then a run against the same model behind an endpoint that also
answers late or not at all, with garbage, half an answer, 429, 503, HTML, or JSON of another form, under
SIGKILL at points that are spread over its requests, started anew with the same command each time.

Each start is a new process, forked from one that has read the program's modules and done nothing else.

An answer that is on the disk at a kill and is asked for later has been paid twice.  One that the endpoint
has sent and that was not on the disk yet was under way: it is lost, and is told.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from synthesis.endpoint import MODEL, ScriptedEndpoint, serving, with_model_faults

from data_prep.cli import main as main_of_data
from data_prep.synth.known import GENERATORS
from megatron_sov.work.endpoints.cache import EndpointCache

WIRE_FAULTS, MODEL_FAULTS = 0.25, 0.02
TIMEOUT_S, LATE_S, SLOW_S = 4.0, 4.5, 0.02
THREADS = 8
POLL_S = 0.02
LIMIT_S = 240.0
"""For one command."""
FORKS = multiprocessing.get_context("forkserver")
MODULES = ["openai", "data_prep.cli", "data_prep.synth.running",
           "data_prep.synth.finishing", "data_prep.curate.pipeline.running"]


@dataclass(frozen=True)
class Doing:
    """A run, however often it was killed on the way."""

    kept: dict[str, list[str]]
    """File of what is kept -> its lines in order, without the figures of the way."""
    num_rejected: int
    """Samples."""
    num_kills: int
    """That found it at work."""
    num_attempts: int
    """Requests that came to the endpoint."""
    num_answers: int
    """Different ones."""
    num_twice: int
    """That were on the disk at a kill, and were asked for later."""
    num_under_way: int
    """That the endpoint sent, and that were not on the disk at a kill."""
    wall_s: float
    """From the first start to the end."""


def command(generator: str, words: Sequence[str], url: str, output: Path) -> list[str]:
    """Return what follows `sov-data` in the command of a run."""
    return ["synth", generator, *words, "--engine", url, "--model", MODEL, "--output", str(output),
            "--threads", str(THREADS), "--workers", "1", "--timeout", str(TIMEOUT_S), "--max-attempts", "8"]


def run_command(words: Sequence[str], log: Path) -> None:
    """Be the command, with all that it says in a file."""
    with open(log, "ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.exit(main_of_data(list(words)))


def answers_of(output: Path) -> set[str]:
    """Return the keys of the answers on the disk."""
    file = output / "answers.sqlite"
    if not file.exists():
        return set()
    cache = EndpointCache(file)
    try:
        return cache.keys()
    finally:
        cache.close()


def kept_of(output: Path) -> tuple[dict[str, list[str]], int]:
    """Return what a run has kept, and how many samples it has not."""
    kept = {file.name: sorted(file.read_text(encoding="utf-8").splitlines())
            for file in sorted(output.glob("kept*.jsonl"))}
    rejected = output / "rejected.jsonl"
    return kept, len(rejected.read_bytes().splitlines()) if rejected.exists() else 0


def done(generator: str, words: Sequence[str], server: ScriptedEndpoint, output: Path,
         points: Sequence[int]) -> Doing:
    """Do a run, killed where so many different answers have been given."""
    began_s, num_kills, num_twice, under_way = time.monotonic(), 0, 0, 0
    known: dict[str, int] = {}
    for point in [*points, None]:
        sent = server.answered.total()
        process = FORKS.Process(target=run_command, args=(command(generator, words, server.url, output),
                                                          output.with_suffix(".log")))
        process.start()
        while process.is_alive() and (point is None or len(server.answered) < point):
            time.sleep(POLL_S)
            if time.monotonic() - began_s > LIMIT_S * (len(points) + 1):
                process.kill()
        if process.is_alive():
            process.kill()
            num_kills += 1
        process.join()
        time.sleep(2 * SLOW_S)  # what the endpoint is still about to send
        num_twice += sum(server.asked[key] > times for key, times in known.items())
        on_disk = answers_of(output)
        under_way += server.answered.total() - sent - len(on_disk - known.keys())
        known = {key: server.asked[key] for key in on_disk}
        if point is None and process.exitcode != 0:
            words_at_end = output.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
            raise SystemExit(f"{generator}: ended with {process.exitcode}\n{words_at_end[-3000:]}")
    kept, num_rejected = kept_of(output)
    return Doing(kept, num_rejected, num_kills, server.asked.total(), len(server.answered), num_twice,
                 under_way, time.monotonic() - began_s)


def row_of(generator: str, actor: Any, folder: Path, num_kills: int) -> tuple[str, bool]:
    """Return a line about one generator, and whether all is as it should be."""
    words = actor.arguments(folder)
    reply = with_model_faults(actor.reply, MODEL_FAULTS)
    with serving(ScriptedEndpoint(reply)) as server:
        alone = done(generator, words, server, folder / "alone", ())
    points = [1 + alone.num_answers * i // num_kills for i in range(num_kills)]
    with serving(ScriptedEndpoint(reply, WIRE_FAULTS, LATE_S, SLOW_S)) as server:
        killed = done(generator, words, server, folder / "killed", points)
    is_same = alone.kept == killed.kept and alone.num_rejected == killed.num_rejected
    num_kept = sum(map(len, alone.kept.values()))
    line = (f"{generator:<18} {num_kept:>5} {alone.num_rejected:>8} {alone.num_answers:>8} "
            f"{killed.num_attempts:>8} {killed.num_kills:>6} {'yes' if is_same else 'NO':>5} "
            f"{killed.num_twice:>6} {killed.num_under_way:>9} {alone.wall_s:>6.0f} {killed.wall_s:>7.0f}")
    return line, is_same and not killed.num_twice and killed.num_kills == num_kills


def main() -> int:
    """Run all, and print the table; returns 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--generators", nargs="*", default=sorted(GENERATORS))
    args = parser.parse_args()
    os.environ |= {"OPENAI_API_KEY": "sk-scripted", "OMP_NUM_THREADS": "1"}
    FORKS.set_forkserver_preload(MODULES)
    machine = (f"{platform.machine()}, {os.cpu_count()} cores shared with other work (load "
               f"{os.getloadavg()[0]:.1f} at the start), Python {platform.python_version()}")
    print(f"{args.kills} kills, {WIRE_FAULTS:.0%} of attempts misbehave, {MODEL_FAULTS:.0%} of answers are "
          f"of no use; {THREADS} requests at a time; {machine}")
    print(f"{'generator':<18} {'kept':>5} {'rejected':>8} {'answers':>8} {'requests':>8} {'killed':>6} "
          f"{'same':>5} {'twice':>6} {'under way':>9} {'s':>6} {'s, hurt':>7}", flush=True)
    is_sound = True
    for generator in args.generators:
        try:
            actor = importlib.import_module(f"synthesis.actors.{generator.replace('-', '_')}")
        except ModuleNotFoundError:
            print(f"{generator:<18} has no actor", flush=True)
            continue
        with tempfile.TemporaryDirectory(prefix="synthesis-kills-") as folder:
            line, is_good = row_of(generator, actor, Path(folder), args.kills)
        print(line, flush=True)
        is_sound &= is_good
    print(json.dumps({"sound": is_sound}))
    return 0 if is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
