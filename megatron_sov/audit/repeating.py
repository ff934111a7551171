"""A stretch of a run again: from the checkpoint before it, by the ordinary command, in a folder of the
auditor's; how far what comes of it is from the checkpoint that was published; and the page that tells it.

Nothing of the lab is believed or run: settings are read as data, files are held to the hashes of the log, and
what is started is this program's own command.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_sov.audit.commitment import CHECKPOINT, CODE, DATA, SETTINGS, START, Commitment, data_folders
from megatron_sov.audit.drawing import Draw, Segment
from megatron_sov.base.artifacts import (
    MANIFEST, atomic_write, damaged_files, manifest_sha256, sha256_file, to_json)
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.pages.page import Chapter, PageSection, PageTable, render
from megatron_sov.base.sealed import read_json, write_json
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.model.config.evaluate import EvaluateConfig
from megatron_sov.model.config.train import ObsConfig
from megatron_sov.runs import checkpoints
from megatron_sov.runs.checkpoints import refuse_other_kind
from megatron_sov.runs.folder import CONFIG, RunFolder, read_command
from megatron_sov.work.processes.children import start_command

COMMANDS = {"lm": "pretrain", "sft": "sft", "preference": "prefer"}
"""Objective -> the command that trains by it alone from token shards."""
FREE = ("parallel.", "gpu.", "train.micro_batch_size", "train.num_threads", "train.head_chunk_tokens",
        "train.deterministic")
"""Settings that an auditor may choose, since they change nothing that is learned."""
NEVER = 10**9
QUIET = ("train.eval_every_steps=0", f"train.checkpoint_every_steps={NEVER}", "train.keep_checkpoints=0",
         "train.keep_every_steps=0")
"""Of the auditor's run: it has one checkpoint, at its end."""
CLOCKS = ("wall_s",)
"""Of a checkpoint's state what no two runs share."""
EXACT = ("step", "tokens", "trained_tokens", "num_updates", "order", "data")
"""Of it what every layout shares."""
CHUNK_ELEMENTS = 1 << 24
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Of a run, for which the page says how probably a fraud in so much of it would have been found."""
RESULT, REPEATED, LOG = "repeated.json", "run", "log"


class RepeatOutcome(StrEnum):
    """What a repeated stretch comes to."""

    EQUAL = "equal"
    """Every bit of weights, moments and counters."""
    NEAR = "near"
    """Within the bound, as other machines or layouts come."""
    DIFFERENT = "different"
    """Further than the bound, or other samples were read."""
    UNPROVED = "unproved"
    """The lab did not give what it had published."""


PASSED = (RepeatOutcome.EQUAL, RepeatOutcome.NEAR)


@dataclass(frozen=True)
class Repeated:
    """A segment that was repeated, or could not be."""

    segment: Segment
    outcome: RepeatOutcome
    distance: float
    """|repeated - published| / |published - before| over all weights, or over |published| where nothing was
    before; -1: was not measured."""
    detail: str
    """Where they differ, or what was missing; empty where all is equal."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """What the lab hands over, and how the auditor repeats it."""

    run: Path
    commitment: Commitment
    data: Mapping[str, Path]
    """[NAME=]folder of the settings -> where the auditor has it."""
    start: Path | None
    """Model of --from; None: the run begins from its seed."""
    settings: tuple[str, ...]
    """Layout of the auditor's own, as --set has it."""
    nproc: int
    bound: float

    def problem(self, segment: Segment) -> str | None:
        """Return what is missing or is not what was published, of all that a segment needs; None: nothing."""
        if sha256_file(self.run / CONFIG) not in {leaf.sha256 for leaf in self.commitment.find(SETTINGS)}:
            return f"{CONFIG} is not what was published"
        published = {(leaf.name, leaf.sha256) for leaf in self.commitment.find(DATA)}
        for given, place in self.data.items():
            if (given, manifest_sha256(place)) not in published:
                return f"data {given} is not what was published"
        for step in (segment.begin, segment.end):
            if step and (problem := self._checkpoint_problem(step)):
                return problem
        starts = {leaf.sha256 for leaf in self.commitment.find(START)}
        if bool(starts) != (self.start is not None):
            return ("the run begins from a model; name it by --from" if starts else
                    "--from is given, and the log says that the run begins from its seed")
        if self.start is not None and manifest_sha256(self.start) not in starts:
            return f"{self.start} is not the model that was published as the start"
        return None

    def _checkpoint_problem(self, step: int) -> str | None:
        path = RunFolder(self.run).checkpoint(step)
        if not (path / MANIFEST).is_file():
            return f"{path.name} is not there"
        if manifest_sha256(path) != self.commitment.checkpoint(step):
            return f"{path.name} is not what was published"
        damaged = damaged_files(path)
        return damaged[0] if damaged else None


def gather_evidence(run: Path, commitment: Commitment, data: Sequence[Path], start: Path | None,
                    settings: Sequence[str], nproc: int | None, bound: float) -> Evidence:
    """Return what is to be repeated, with the data that lie elsewhere found by their hashes.

    Raises:
        UserError: a setting that changes what is learned, a stage that cannot be repeated, or data that are
            damaged.
    """
    for setting in settings:
        if not setting.startswith(FREE):
            raise UserError(f"--set {setting}: changes what is learned, or nothing here; an auditor may "
                            f"set {', '.join(FREE)}")
    config = RunFolder(run).config()
    assert config is not None, f"{run} was read before"
    if config.objective.name not in COMMANDS or config.code or config.rollout.rounds:
        what = "code of the lab's own" if config.code else f"the objective {config.objective.name!r}"
        raise UserError(f"{run}: has {what}; {', '.join(COMMANDS.values())} without code of one's own are "
                        "what can be repeated")
    places = data_folders(run) if not data else _found(commitment, config, data)
    for place in set(places.values()):
        if damaged := damaged_files(place):
            raise UserError(f"{damaged[0]}; take the data again from the lab")
    found = start and checkpoints.find_checkpoint(start)
    return Evidence(run, commitment, places, found, tuple(settings), nproc or read_command(run).processes,
                    bound)


def _found(commitment: Commitment, config: RunConfig, data: Sequence[Path]) -> dict[str, Path]:
    """Return the run's data by the hashes that were published of them."""
    by_hash = {}
    for place in data:
        refuse_other_kind(place, ("tokens",), "token shards")
        by_hash[manifest_sha256(place)] = place
    published = {leaf.name: leaf.sha256 for leaf in commitment.find(DATA)}
    for given in config.data.paths:
        if published.get(given) not in by_hash:
            raise UserError(f"--data: none of the folders has the manifest {published.get(given, '')[:12]} "
                            f"that was published of {given}; ask the lab for it")
    return {given: by_hash[published[given]] for given in config.data.paths}


def repeat(evidence: Evidence, segment: Segment, work: Path) -> Repeated:
    """Repeat a segment in a folder of its own, and compare.

    Args:
        evidence: of the lab.
        segment: the stretch.
        work: folder of the audit; what is done there is not done again.

    Raises:
        UserError: the command of a segment fails.
    """
    folder = work / segment.name
    if (problem := evidence.problem(segment)) is not None:
        return Repeated(segment, RepeatOutcome.UNPROVED, -1.0, problem)
    target = RunFolder(folder / REPEATED)
    if not (target.checkpoint(segment.end) / MANIFEST).is_file():
        _prepare(evidence, segment, target)
        _run(evidence, segment, target.path, folder / LOG)
    before = RunFolder(evidence.run).checkpoint(segment.begin) if segment.begin else None
    return compare(segment, RunFolder(evidence.run).checkpoint(segment.end), target.checkpoint(segment.end),
                   before, evidence.bound)


def _prepare(evidence: Evidence, segment: Segment, target: RunFolder) -> None:
    """Make a run's folder that stands at the beginning of a segment."""
    shutil.rmtree(target.path, ignore_errors=True)
    target.checkpoints.mkdir(parents=True)
    config = RunFolder(evidence.run).config()
    assert config is not None, f"{evidence.run} was read before"
    paths = {_named(given, place): config.data.paths[given] for given, place in evidence.data.items()}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, paths=paths), obs=ObsConfig(),
                                 evaluate=EvaluateConfig())
    config = apply_settings(config, [*QUIET, *evidence.settings])
    config_file = target.path / CONFIG if segment.begin else target.path.parent / CONFIG
    atomic_write(config_file, to_json(config.to_dict()))
    if segment.begin:
        source = RunFolder(evidence.run).checkpoint(segment.begin)
        # a copy: the auditor's run must be able to do to it what runs do to their checkpoints
        shutil.copytree(source, target.checkpoint(segment.begin))
    else:
        target.checkpoints.rmdir()
        target.path.rmdir()


def _named(given: str, place: Path) -> str:
    name, equals, _ = given.partition("=")
    return f"{name}={place.absolute()}" if equals and not Path(given).exists() else str(place.absolute())


def _run(evidence: Evidence, segment: Segment, run: Path, log: Path) -> None:
    """Train from the beginning of a segment to its end."""
    config = run / CONFIG if segment.begin else run.parent / CONFIG
    objective = json.loads(config.read_text(encoding="utf-8"))["objective"]["name"]
    words = [COMMANDS[objective], "--config", str(config), "--run", str(run), "--until", str(segment.end),
             *(("--resume",) if segment.begin else ()),
             *(("--from", str(evidence.start)) if evidence.start is not None else ()),
             *(("--nproc", str(evidence.nproc)) if evidence.nproc > 1 else ())]
    with open(log, "ab") as out:
        code = start_command([sys.executable, "-W", "ignore", "-m", "megatron_sov", *words], stdout=out,
                             stderr=out, ends_with_this=True).wait()
    if code not in (ExitCode.STOPPED, ExitCode.OK):
        said = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-3:]
        raise UserError(f"{log}: steps {segment.name} cannot be repeated (exit code {code}): "
                        f"{' '.join(said)}")


def compare(segment: Segment, published: Path, repeated: Path, before: Path | None, bound: float) -> Repeated:
    """Compare a checkpoint with its repetition.

    Args:
        segment: which.
        published: checkpoint of the lab.
        repeated: that of the auditor.
        before: checkpoint from which both went on; None: from the start of the run.
        bound: largest distance that passes.
    """
    import torch

    from megatron_sov.checkpoint import load
    from megatron_sov.checkpoint.sharded_tensors import TensorReader

    states = [load.read_state(path) for path in (published, repeated)]
    other = [name for name in EXACT if states[0].get(name) != states[1].get(name)]
    first, equal = "", True
    sums = {"off": 0.0, "moved": 0.0}
    parts = read_parts(published)
    if other or parts != read_parts(repeated):
        what = f"other {', '.join(other)} in its state" if other else "other parts"
        return Repeated(segment, RepeatOutcome.DIFFERENT, -1.0, what)
    for part in parts:
        lab, own = TensorReader(published, part), TensorReader(repeated, part)
        old = TensorReader(before, part) if before is not None else None
        keys = lab.keys()
        if [(key, lab.shape(key)) for key in sorted(keys)] != [(key, own.shape(key))
                                                               for key in sorted(own.keys())]:
            return Repeated(segment, RepeatOutcome.DIFFERENT, -1.0, f"other tensors in {part}")
        for key in keys:
            for offset, shape in _blocks(lab.shape(key)):
                theirs, ours = (reader.read(key, offset, shape).contiguous() for reader in (lab, own))
                if not torch.equal(theirs.view(torch.uint8), ours.view(torch.uint8)):
                    first, equal = first or f"{part} {key}", False
                if part != "optimizer":
                    base = old.read(key, offset, shape).double() if old is not None else 0.0
                    sums["off"] += float((ours.double() - theirs.double()).square().sum())
                    sums["moved"] += float((theirs.double() - base).square().sum())
    rest = [name for name in {*states[0], *states[1]} - {*EXACT, *CLOCKS}
            if states[0].get(name) != states[1].get(name)]
    distance = math.sqrt(sums["off"] / sums["moved"]) if sums["moved"] else math.inf if sums["off"] else 0.0
    if equal and not rest:
        return Repeated(segment, RepeatOutcome.EQUAL, 0.0, "")
    detail = f"first in {first}" if first else f"in its state's {', '.join(sorted(rest))}"
    # NaN is within no bound
    near = distance <= bound
    return Repeated(segment, RepeatOutcome.NEAR if near else RepeatOutcome.DIFFERENT, distance, detail)


def read_parts(checkpoint: Path) -> list[str]:
    return sorted(file.name.removesuffix(".index.json") for file in checkpoint.glob("*.index.json"))


def _blocks(shape: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return offset and extent of blocks along the first axis, of which each fits into memory."""
    if not shape:
        return [((), ())]
    rows = max(1, CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))
    return [((first, *(0 for _ in shape[1:])), (min(rows, shape[0] - first), *shape[1:]))
            for first in range(0, shape[0], rows)]


@dataclass(frozen=True)
class Verdict:
    """A draw with what came of its segments."""

    commitment: Commitment
    draw: Draw
    repeated: tuple[Repeated, ...]
    """In the order of the run; those that nobody has repeated yet are not among them."""

    @property
    def missing(self) -> list[Segment]:
        """Return the segments that are still to be repeated."""
        done = {r.segment for r in self.repeated}
        return [segment for segment in self.draw.segments if segment not in done]

    @property
    def passed(self) -> bool:
        """Whether every segment that was drawn is what the run's own settings, data and start give."""
        return not self.missing and all(r.outcome in PASSED for r in self.repeated)

    def sentence(self) -> str:
        """Return what was found, in one sentence."""
        if self.missing:
            return (f"{len(self.missing)} of {len(self.draw.drawn)} segments are still to be repeated: "
                    f"{', '.join(s.name for s in self.missing[:8])}")
        bad = [r for r in self.repeated if r.outcome not in PASSED]
        if bad:
            return (f"{len(bad)} of {len(self.repeated)} segments are not what was published: "
                    + "; ".join(f"steps {r.segment.name}: {r.outcome}, {r.detail}" for r in bad[:4]))
        equal = sum(r.outcome == RepeatOutcome.EQUAL for r in self.repeated)
        return (f"all {len(self.repeated)} segments are what was published, {equal} of them to the bit; had "
                f"a tenth of the run been false, {self.draw.chance_to_find(0.1):.0%} of audits like this one "
                "would have found it")


def keep(work: Path, repeated: Repeated) -> None:
    """Write what came of a segment into the audit's folder."""
    folder = work / repeated.segment.name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULT, asdict(repeated))


def kept(work: Path, segment: Segment) -> Repeated | None:
    """Return what came of a segment; None: it was not repeated yet.

    Raises:
        UserError: the file was changed since.
    """
    file = work / segment.name / RESULT
    if not file.is_file():
        return None
    raw: dict[str, Any] = read_json(file)
    return Repeated(Segment(**raw["segment"]), RepeatOutcome(raw["outcome"]), raw["distance"], raw["detail"],
                    raw["seconds"])


def judge(commitment: Commitment, drawn: Draw, work: Path) -> Verdict:
    """Return what an audit's folder holds of a draw.

    Raises:
        UserError: a result was changed, or nothing of the draw was repeated.
    """
    found = tuple(r for r in (kept(work, segment) for segment in drawn.segments) if r is not None)
    if not found:
        raise UserError(f"{work}: holds nothing that `megatron-sov audit repeat` left of this draw")
    return Verdict(commitment, drawn, found)


def write_verdict(verdict: Verdict, output: Path) -> None:
    """Write the page, and the same as values beside it."""
    atomic_write(output, page(verdict))
    atomic_write(output.with_suffix(".json"), to_json({
        "root": verdict.draw.root, "randomness": verdict.draw.randomness, "passed": verdict.passed,
        "said": verdict.sentence(), "segments": [asdict(r) for r in verdict.repeated],
        "missing": [s.name for s in verdict.missing], "num_segments": verdict.draw.num_segments,
        "chance_to_find": {str(share): verdict.draw.chance_to_find(share) for share in SHARES}}) + "\n")


def page(verdict: Verdict) -> str:
    """Return the page."""
    drawn, log = verdict.draw, verdict.commitment
    steps = [s.end - s.begin for s in drawn.drawn]
    last = max(int(leaf.name) for leaf in log.find(CHECKPOINT))
    seconds = sum(r.seconds for r in verdict.repeated)
    figures = [("verdict", "passed" if verdict.passed else "open" if verdict.missing else "not passed", ""),
               ("segments", f"{len(verdict.repeated)} of {len(drawn.drawn)}",
                f"the run has {drawn.num_segments + 1}"),
               ("steps", f"{sum(steps):,} of {last:,}", f"repeated in {seconds:,.0f} s")]
    published = PageTable(["what", "name", "hash"],
                          [[leaf.kind, leaf.name, leaf.sha256] for leaf in log.leaves], "hashes")
    chances = PageTable(["false share of the segments", "found by such a draw"],
                        [[f"{share:.0%}", f"{drawn.chance_to_find(share):.1%}"] for share in SHARES])
    sections = [
        PageSection("Segments", "A segment is the steps between two checkpoints. `equal`: every bit of "
                    "weights, moments and counters; `near`: within the bound, on another machine or layout; "
                    "`unproved`: the lab did not give what it had published.",
                    tables=[segments_table(verdict.repeated)]),
        PageSection("What a fraud would have risked", "A segment is false where anything else was done in it "
                    "than the published settings, data and start say. The first is repeated in every audit; "
                    "the others are drawn by lot behind the publication.", tables=[chances]),
        PageSection("What was not looked at", not_covered(log)),
        PageSection("The draw", f"Root {drawn.root}, randomness {drawn.randomness}."),
        PageSection("What was published", tables=[published])]
    run = log.entries[0].run
    return render("audit", f"Audit of {run}", verdict.sentence(), [Chapter(run, "", figures, sections)])


def not_covered(log: Commitment) -> str:
    """Return what a passed audit leaves open, in sentences."""
    said = ["That the data are what they are said to be: their hashes fix them, and who reads them sees what "
            "they are."]
    if log.find(START):
        said.append("The model that the run began from: it has a log of its own, or none.")
    if len(log.find(CODE)) > 1:
        said.append("The run changed its code on the way; the auditor's own was used throughout.")
    return " ".join([*said, "Tokenizer and packing of the data.",
                     "Changes below the bound, where a segment is near and not equal."])


def segments_table(repeated: Sequence[Repeated]) -> PageTable:
    """Return a row for each segment."""
    return PageTable(["steps", "outcome", "distance", "seconds", "detail"], [
        [r.segment.name, r.outcome.value, "" if r.distance < 0 else f"{r.distance:.1e}", f"{r.seconds:,.0f}",
         r.detail] for r in repeated])
