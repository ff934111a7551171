"""What an audit comes to: its segments, what they cover, and the page that tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sov.audit.commitment import CHECKPOINT, CODE, START, Commitment
from megatron_sov.audit.drawing import Draw, Segment
from megatron_sov.audit.repeating import RESULT, Repeated, RepeatOutcome
from megatron_sov.base.artifacts import atomic_write, to_json
from megatron_sov.base.errors import UserError
from megatron_sov.base.pages.page import Chapter, PageSection, PageTable, render
from megatron_sov.base.sealed import read_json, write_json

PASSED = (RepeatOutcome.EQUAL, RepeatOutcome.NEAR)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


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
