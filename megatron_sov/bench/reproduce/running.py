"""Runs of claims: each seed of each claim is an item of a job, made of ordinary commands, of which none that
is done is done again.

    OUTPUT/setup/NAME-ADDRESS/                what all seeds read
    OUTPUT/CLAIM/ADDRESS/claim.json           what was declared, written before the first run
    OUTPUT/CLAIM/ADDRESS/seed-N/base          what the arms of a seed share
    OUTPUT/CLAIM/ADDRESS/seed-N/arms/ARM      and each of them, with the log of its commands
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_sov.base.artifacts import disk_errors, new_file, to_json
from megatron_sov.base.digests import code_sha256, file_digest
from megatron_sov.base.errors import ExitCode, UserError, list_problems
from megatron_sov.base.sealed import read_json, write_json
from megatron_sov.bench.reproduce.claims import (
    ADDRESS_CHARS, PLACE, PROGRAMS, REDIRECT, Measure, Registered, sha256_of)
from megatron_sov.work.processes.children import start_command
from megatron_sov.work.progress.jobs import Job, in_workers
from megatron_sov.work.progress.journal import Journal, records_by_item
from megatron_sov.work.progress.locks import holding

RESULTS, DECLARED, MEASURED, LOG = "results.json", "claim.json", "measured.json", "log"
AGAIN = "delete the folder that it lies in, and the same command runs that seed again"
BACK = "take it back from a copy, or name another --output"
PACKAGES = tuple(module.partition(".")[0] for module in PROGRAMS.values())
"""What runs the commands of claims."""
SHOWN_LINES = 3


@dataclass(frozen=True)
class Order:
    """What a command was asked for; any process makes the same job of it."""

    claims: tuple[Registered, ...]
    seeds: Mapping[str, int]
    """Claim -> number of seeds, from 0."""
    output: Path
    beside: Path
    """Folder of the file of claims."""

    def items(self) -> list[tuple[str, int]]:
        """Return claim and seed of each item, a seed of every claim before the next seed."""
        most = max(self.seeds.values())
        return [(c.name, seed) for seed in range(most) for c in self.claims if seed < self.seeds[c.name]]

    def job(self, workers: int, publish: Callable[[dict[str, dict[int, Any]]], object],
            done: Callable[[tuple[str, int]], object] = lambda item: None) -> Job[tuple[str, int]]:
        """Return the job, done in so many processes of this machine.

        Args:
            workers: processes.
            publish: takes claim -> seed -> arm -> measure -> figure of all.
            done: is told each item.
        """
        def sink(journal: Journal) -> None:
            found: dict[str, dict[int, Any]] = {c.name: {} for c in self.claims}
            for (name, seed), (_, record) in zip(self.items(), journal.records(), strict=True):
                found[name][seed] = json.loads(record)
            publish(found)

        identity = {"claims": {c.name: c.sha256 for c in self.claims}, "seeds": dict(self.seeds)}
        return Job(made_by="megatron-sov reproduce", output=self.output / RESULTS, identity=identity,
                   items=self.items(), do=in_workers(_runner, (self,), workers), sink=sink, done=done)

    def begin(self) -> None:
        """Declare the claims, and make what all seeds read.

        Raises:
            UserError: a claim was changed after it had run, and does not say so; the folder holds something
                else; or a command fails.
        """
        refuse_foreign(self.output)
        for claim in self.claims:
            declare(self.output, claim)
        for claim in self.claims:
            self.refuse_changed_files(claim)
            places: dict[str, str] = {}
            for name, commands in claim.setup.items():
                folder = setup_folder(self.output, claim, name)
                with holding(folder, folder):
                    run_steps(folder, commands, places | {"claims": str(self.beside)}, folder.name)
                places[name] = str(folder)

    def refuse_changed_files(self, claim: Registered) -> None:
        """Refuse files that a claim's commands read, where they are not as they were declared.

        Raises:
            UserError: one differs.
        """
        for name, digest in claim.declared["read"].items():
            file = self.beside / name
            if not file.is_file() or file_digest(file) != digest:
                raise UserError(f"{file}: was changed while claim {claim.name} ran; take the change back, "
                                "and the same command goes on")


def refuse_foreign(output: Path) -> None:
    """Refuse a folder whose results are not those of claims.

    Raises:
        UserError: it has some.
    """
    file = output / RESULTS
    ran = [folder for name in (DECLARED, "seed-*") for folder in output.glob(f"*/*/{name}")]
    if file.exists() and not ran:
        raise UserError(f"{file}: is there, and no claim has run in this folder; name another --output")


def claim_folder(output: Path, claim: Registered) -> Path:
    return output / claim.name / claim.address


def setup_folder(output: Path, claim: Registered, name: str) -> Path:
    """Return the folder of a setup, named by all that it is made by, so that claims share it."""
    upto = dict(list(claim.setup.items())[:list(claim.setup).index(name) + 1])
    sha256 = hashlib.sha256(to_json([upto, dict(claim.setup_reads[name])]).encode()).hexdigest()
    return output / "setup" / f"{name}-{sha256[:ADDRESS_CHARS]}"


def earlier_forms(output: Path, claim: Registered) -> dict[str, Mapping[str, Any]]:
    """Return address -> what was declared, of the forms of a claim that have run before this one."""
    return {file.parent.name: read_json(file, BACK)
            for file in sorted((output / claim.name).glob(f"*/{DECLARED}"))
            if file.parent.name != claim.address}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each value in which two forms of a claim differ, with the whole of both."""
    old, new = (dict(_leaves(form)) for form in (before, now))
    found = [f"{key} was {old.get(key, 'not there')}, and is {new.get(key, 'not there')}"
             for key in {**old, **new} if old.get(key) != new.get(key)]
    return found or ["arms, measures or other keys stood in another order"]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list)):
        for name, inner in (value.items() if isinstance(value, dict) else enumerate(value)):
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def refuse_untold(output: Path, claim: Registered) -> None:
    """Refuse a claim of which something ran in a folder that it does not tell.

    Raises:
        UserError: another form of it, and its list of changes does not name that; or what was declared
            was changed, or is gone.
    """
    told = {change.sha256[:ADDRESS_CHARS] for change in claim.claim.changes}
    for address, declared in earlier_forms(output, claim).items():
        if address not in told:
            raise UserError(list_problems(
                f"{output / claim.name / address}: has run claim {claim.name} in another form",
                changed(declared, claim.declared),
                f"tell it in the claim's `changes` (sha256: {sha256_of(declared)}), take the change back, or "
                "name another --output"))
    for folder in (output / claim.name).glob("*/"):
        if not (folder / DECLARED).is_file() and any(folder.iterdir()):
            raise UserError(f"{folder / DECLARED}: is gone, and something ran beside it; {BACK}")
    file = claim_folder(output, claim) / DECLARED
    if file.is_file() and read_json(file, BACK) != claim.declared:
        raise UserError(f"{file}: was changed since it was declared; name another --output")


def refuse_dropped(output: Path, seed: str, claims: Iterable[Registered]) -> None:
    """Refuse a folder in which something ran that a page of these claims would not show.

    Args:
        output: the folder.
        seed: of the file of claims.
        claims: all of the file.

    Raises:
        UserError: a claim that the file lacks, one of another seed, or a form that a claim does not tell.
    """
    known = {claim.name for claim in claims}
    for file in sorted(output.glob(f"*/*/{DECLARED}")):
        name = file.parents[1].name
        if (other := read_json(file, BACK).get("seed")) != seed:
            raise UserError(f"{output}: has run claim {name} of seed {other}, whose page that of seed {seed} "
                            "would take the place of; name another --output")
        if name not in known:
            raise UserError(f"{file}: has run claim {name}, which the file of claims has no more, so that no "
                            "page would show it; put it back into the file, or name another --output")
    for claim in claims:
        refuse_untold(output, claim)


def declare(output: Path, claim: Registered) -> None:
    """Write what a claim says before anything of it runs.

    Raises:
        UserError: what ran of it is not told.
    """
    refuse_untold(output, claim)
    file = claim_folder(output, claim) / DECLARED
    if not file.is_file():
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, dict(claim.declared))


def _runner(order: Order) -> Callable[[tuple[str, int]], bytes]:
    claims = {claim.name: claim for claim in order.claims}
    return lambda item: to_json(run_seed(order, claims[item[0]], item[1])).encode()


def run_seed(order: Order, claim: Registered, seed: int) -> dict[str, dict[str, float]]:
    """Run what is missing of a seed; returns arm -> measure -> figure.

    Raises:
        UserError: a command fails, a file that commands read was changed meanwhile, or a figure is not what
            was measured when the seed was done.
    """
    folder = claim_folder(order.output, claim) / f"seed-{seed}"
    places = {name: str(setup_folder(order.output, claim, name)) for name in claim.setup} | {
        "seed": str(seed), "base": str(folder / "base"), "claims": str(order.beside)}
    order.refuse_changed_files(claim)
    mark = _mark(claim.declared, seed)
    run_steps(folder / "base", claim.declared["base"], places, mark)
    figures = {}
    for arm, commands in claim.declared["arms"].items():
        own = folder / "arms" / arm
        run_steps(own, commands, places, f"{mark} {arm}")
        figures[arm] = {name: read_figure(own, measure) for name, measure in claim.claim.measures.items()}
    order.refuse_changed_files(claim)
    file = folder / MEASURED
    if file.is_file() and read_json(file, AGAIN, mark) != figures:
        raise UserError(f"{file}: its arms' files have other figures now; {AGAIN}")
    write_json(file, figures, mark)
    return figures


def seeds_of(folder: Path, declared: Mapping[str, Any]) -> dict[int, Any]:
    """Return seed -> arm -> measure -> figure of the seeds that a form of a claim has run to their end.

    Args:
        folder: of the form.
        declared: the form.

    Raises:
        UserError: one was changed since, or is of another seed or claim.
    """
    files = {seed: folder / f"seed-{seed}" / MEASURED for seed in range(declared["seeds"])}
    return {seed: read_json(file, AGAIN, _mark(declared, seed))
            for seed, file in files.items() if file.is_file()}


def _mark(declared: Mapping[str, Any], seed: int) -> str:
    return f"{sha256_of(declared)} {seed}"


def run_steps(folder: Path, commands: Sequence[str], places: Mapping[str, str], of: str) -> None:
    """Run the commands of a folder that are not done.

    Args:
        folder: where they run.
        commands: with the shared words written out.
        places: name -> what stands for it in a command.
        of: what the folder belongs to, which stands in its journal.

    Raises:
        UserError: one ends with another code than 0, or the folder is a copy of another's.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder)
    try:
        # a copy of another seed's folder has its figures
        if any(told.get("of", of) != of for told in _told(folder)):
            raise UserError(f"{folder}: its commands ran for another seed, arm or claim, so it is a copy; "
                            "delete it, and the same command runs it again")
        for number, command in enumerate(commands):
            if number not in journal.done:
                # before the command: it is what that loads
                began_s, code = time.monotonic(), code_sha256(PACKAGES)
                run_step(folder, fill(command, {**places, "here": str(folder)}))
                told = {"seconds": time.monotonic() - began_s, "of": of, "code": code}
                journal.add([(number, to_json(told).encode())])
    finally:
        journal.close()


def _told(folder: Path) -> list[dict[str, Any]]:
    """Return what the journal of a folder tells of each command that is done."""
    return [json.loads(record) for _, record in records_by_item(folder)]


def codes_of(output: Path, claim: Registered) -> dict[str, list[str]]:
    """Return the code that commands of a claim ran with -> setups and seeds that did, as "setup corpus" and
    "seed 0"; "" where no journal tells."""
    folder, found = claim_folder(output, claim), dict[str, list[str]]()
    parts = {f"setup {name}": [setup_folder(output, claim, name)] for name in claim.setup}
    parts |= {f"seed {seed}": [inside / "base", *sorted(inside.glob("arms/*"))]
              for seed in range(claim.claim.seeds) if (inside := folder / f"seed-{seed}").is_dir()}
    for part, folders in parts.items():
        for code in sorted({told.get("code", "") for inside in folders for told in _told(inside)}):
            found.setdefault(code, []).append(part)
    return found


def fill(command: str, places: Mapping[str, str]) -> list[str]:
    """Return the words of a command; a path with blanks stays one."""
    return [PLACE.sub(lambda place: places[place[1]], word) for word in shlex.split(command)]


def run_step(folder: Path, words: Sequence[str]) -> None:
    """Run one command; what it says goes to the folder's log, or, behind >, to a file that appears whole."""
    words, target = (words[:-2], words[-1]) if REDIRECT in words[-2:-1] else (words, "")
    # -P: no folder of an arm stands for a module; and none of the user's own is found by a relative path
    command = [sys.executable, "-P", "-W", "ignore", "-m", PROGRAMS[words[0]], *words[1:]]
    # arms are compared at one thread each, side by side
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / LOG, "ab") as log:
        log.write(f"$ {shlex.join(words)}\n".encode())
        log.flush()
        if target:
            with new_file(Path(target)) as temporary, open(temporary, "wb") as out:
                code = start_command(command, stdout=out, stderr=log, environment=environment, folder=folder,
                                     ends_with_this=True).wait()
                _refuse_failure(folder, words, code)
        else:
            code = start_command(command, stdout=log, stderr=log, environment=environment, folder=folder,
                                 ends_with_this=True).wait()
            _refuse_failure(folder, words, code)


def _refuse_failure(folder: Path, words: Sequence[str], code: int) -> None:
    if code != ExitCode.OK:
        said = (folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")[-1 - SHOWN_LINES:]
        raise UserError(f"{folder / LOG}: `{shlex.join(words[:2])}` ends with exit code {code}: "
                        f"{' '.join(said).strip()}; mend that, and the same command goes on")


def read_figure(folder: Path, measure: Measure) -> float:
    """Return the figure of an arm.

    Raises:
        UserError: its file has none.
    """
    file = folder / measure.file
    try:
        text = file.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line] if file.suffix == ".jsonl" else [
            json.loads(text)]
        if measure.event:
            rows = [row for row in rows if row.get("event") == measure.event][-1:]
        values = [value for row in rows for value in _values(row, measure.value.split("/"))]
        if not all(isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
                   for value in values):
            raise ValueError(f"is {values[:4]}, must be finite numbers")
        return fmean(values)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as e:
        raise UserError(f"{file}: has no {measure.value!r} ({type(e).__name__}: {e}); look at the claim's "
                        "measures and at the log beside it; if it was damaged since, delete that seed's "
                        "folder, and the same command runs the seed again") from None


def _values(value: Any, keys: Sequence[str]) -> Iterator[Any]:
    if not keys:
        yield value
    elif keys[0] == "*":
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _values(inner, keys[1:])
    else:
        is_place = isinstance(value, list) and keys[0].isdecimal()
        yield from _values(value[int(keys[0]) if is_place else keys[0]], keys[1:])
