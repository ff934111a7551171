"""What came of an audit: the verdict over all that was repeated, and the page that tells it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_sov.audit.commitment import (
    CHECKPOINT, CODE, DATA, DOCUMENTS, REFERENCE, START, STATES_KIND, TEACHER, Commitment)
from megatron_sov.audit.drawing import Draw, Segment, segments_of
from megatron_sov.audit.preparing import TOKENIZER, TOKENS, RemadeArtifact, kept as kept_prepared
from megatron_sov.audit.repeating import PASSED, Repeated, RepeatOutcome, kept
from megatron_sov.base.artifacts import atomic_write, to_json
from megatron_sov.base.errors import UserError, visible
from megatron_sov.base.pages.page import Chapter, PageSection, PageTable, render
from megatron_sov.runs.folder import CONFIG

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Of a run, for which the page says how probably a fraud in so much of it would have been found."""


@dataclass(frozen=True)
class AuditVerdict:
    """A draw with what came of its segments."""

    commitment: Commitment
    draw: Draw
    repeated: tuple[Repeated, ...]
    """In the order of the run; those that nobody has repeated yet are not among them."""
    settings: tuple[str, ...]
    """With which segments were repeated, as text, each once."""
    prepared: tuple[RemadeArtifact, ...]
    """Tokenizers and token shards that were made again; none where nobody did."""

    @property
    def missing(self) -> list[Segment]:
        """Return the segments that are still to be repeated."""
        done = {r.segment for r in self.repeated}
        return [segment for segment in self.draw.segments if segment not in done]

    @property
    def passed(self) -> bool:
        """Whether every segment that was drawn is what the run's own settings, data and start give, and the
        data, where they were made again, what their texts give."""
        return not self.missing and all(r.outcome in PASSED for r in self.repeated) and not self.others

    @property
    def others(self) -> list[RemadeArtifact]:
        """Return what texts do not give."""
        return [p for p in self.prepared if not p.passed]

    def sentence(self) -> str:
        """Return what was found, in one sentence."""
        if self.missing:
            return (f"{len(self.missing)} of {len(self.draw.drawn)} segments are still to be repeated: "
                    f"{', '.join(s.name for s in self.missing[:8])}")
        bad = [r for r in self.repeated if r.outcome not in PASSED]
        if bad:
            told = "; ".join(f"steps {r.segment.name}: {r.outcome}, {r.detail}" for r in bad[:4])
            return visible(f"{len(bad)} of {len(self.repeated)} segments are not what was published: {told}")
        if self.others:
            return visible("; ".join(p.sentence() for p in self.others))
        equal = sum(r.outcome == RepeatOutcome.EQUAL for r in self.repeated)
        return (f"all {len(self.repeated)} segments are what was published, {equal} of them to the bit; had "
                f"a tenth of the segments been false, {self.draw.chance_to_find(0.1):.0%} of audits like "
                "this one would have found it")


def judge(commitment: Commitment, drawn: Draw, work: Path) -> AuditVerdict:
    """Return what an audit's folder holds of a draw.

    Raises:
        UserError: a result was changed, or nothing of the draw was repeated.
    """
    results = (kept(work, drawn.root, segment) for segment in drawn.segments)
    found = tuple(r for r in results if r is not None)
    if not found:
        raise UserError(f"{work}: holds nothing that `megatron-sov audit repeat` left of this draw")
    configs = [file for r in found if (file := work / r.segment.name / CONFIG).is_file()]
    texts = dict.fromkeys(file.read_text(encoding="utf-8") for file in configs)
    return AuditVerdict(commitment, drawn, found, tuple(texts), tuple(read_prepared(commitment, work)))


def read_prepared(commitment: Commitment, work: Path) -> Iterator[RemadeArtifact]:
    """Yield what an audit's folder holds of the run's data and of their tokenizers, each once.

    Raises:
        UserError: a result was changed.
    """
    tokenizers = dict[str, None]()
    for sha256 in dict.fromkeys(leaf.sha256 for leaf in commitment.find(DATA)):
        if (found := kept_prepared(work, TOKENS, sha256)) is not None:
            yield found
            tokenizers[found.tokenizer] = None
    for sha256 in tokenizers:
        if sha256 and (found := kept_prepared(work, TOKENIZER, sha256)) is not None:
            yield found
    for leaf in commitment.find(DOCUMENTS):
        if (found := kept_prepared(work, DOCUMENTS, leaf.line_sha256())) is not None:
            yield found
    for leaf in commitment.find(TEACHER):
        if (found := kept_prepared(work, STATES_KIND, leaf.sha256)) is not None:
            yield found


def write_verdict(verdict: AuditVerdict, output: Path) -> None:
    """Write the page, and the same as values beside it."""
    atomic_write(output, page(verdict))
    atomic_write(output.with_suffix(".json"), to_json({
        "root": verdict.draw.root, "randomness": verdict.draw.randomness, "passed": verdict.passed,
        "said": verdict.sentence(), "segments": [asdict(r) for r in verdict.repeated],
        "prepared": [asdict(p) for p in verdict.prepared],
        "missing": [s.name for s in verdict.missing], "num_segments": verdict.draw.num_segments,
        "chance_to_find": {str(share): verdict.draw.chance_to_find(share) for share in SHARES}}) + "\n")


def page(verdict: AuditVerdict) -> str:
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
    longest = max((s.end - s.begin for s in segments_of(log) if s not in drawn.drawn), default=0)
    sections = [
        PageSection("Segments", "A segment is the steps between two checkpoints. `equal`: every bit of "
                    "weights, moments and counters; `near`: within the bound, on another machine or layout; "
                    "`unproved`: the lab did not give what it had published.",
                    tables=[segments_table(verdict.repeated)]),
        PageSection("What a fraud would have risked", "A segment is false where anything else was done in it "
                    "than the published settings, data and start say. The first is repeated in every audit; "
                    "the others are drawn by lot behind the publication. It counts segments, not steps: the "
                    f"longest that was not drawn has {longest:,} steps.", tables=[chances]),
        *([PageSection("Data", "Made again from their texts by the ordinary commands. `equal`: every byte.",
                       tables=[prepared_table(verdict.prepared)])] if verdict.prepared else []),
        PageSection("What was not looked at", not_covered(verdict)),
        *(PageSection("Settings", "With which segments were repeated: what the lab published, and the "
                      "auditor's layout.", json=text) for text in verdict.settings),
        PageSection("The draw", f"Root {drawn.root}, randomness {drawn.randomness}."),
        PageSection("What was published", tables=[published])]
    run = log.entries[0].run
    return render("audit", f"Audit of {run}", verdict.sentence(), [Chapter(run, "", figures, sections)])


def not_covered(verdict: AuditVerdict) -> str:
    """Return what a passed audit leaves open, in sentences."""
    log = verdict.commitment
    made = {p.sha256 for p in verdict.prepared if p.passed}
    unmade = [leaf.name for leaf in log.find(DATA) if leaf.sha256 not in made]
    said = ["That texts are what they are said to be: hashes fix them, and who reads them sees what they "
            "are."]
    if log.find(START):
        said.append("The model that the run began from: it has a log of its own, or none.")
    if log.find(REFERENCE):
        said.append("The model that preferences were compared with: it has a log of its own, or none.")
    if any(leaf.sha256 not in made for leaf in log.find(TEACHER)):
        said.append("That the teacher says what is kept of it (`megatron-sov audit data --teacher`).")
    elif log.find(TEACHER):
        said.append("Where the teacher comes from: it has a log of its own, or none.")
    if len(log.find(CODE)) > 1:
        said.append("The run changed its code on the way; the auditor's own was used throughout.")
    if unmade:
        said.append(f"Tokenizer and packing of {', '.join(unmade)} (`megatron-sov audit data`).")
    if any(leaf.line_sha256() not in made for leaf in log.find(DOCUMENTS)):
        said.append("That the documents that were published one by one are those of the data (`megatron-sov "
                    "audit data`).")
    return " ".join([*said, "Changes below the bound, where a segment is near and not equal."])


def prepared_table(prepared: Sequence[RemadeArtifact]) -> PageTable:
    """Return a row for each artifact."""
    return PageTable(["what", "manifest", "outcome", "detail"],
                     [[p.kind, p.sha256[:12], p.outcome.value, p.detail] for p in prepared])


def segments_table(repeated: Sequence[Repeated]) -> PageTable:
    """Return a row for each segment."""
    return PageTable(["steps", "outcome", "distance", "bound", "seconds", "layout", "detail"], [
        [r.segment.name, r.outcome.value, "" if r.distance < 0 else f"{r.distance:.1e}", f"{r.bound:g}",
         f"{r.seconds:,.0f}", " ".join(r.settings), r.detail] for r in repeated])
