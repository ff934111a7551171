"""`megatron-sov audit commit | draw | repeat | data | verdict | prove | check`: what a run publishes, and how
others check it."""

from __future__ import annotations

import argparse
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.audit.commitment import (
    CODE, DOCUMENTS, HASH, Commitment, InclusionProof, artifact_around, check_signature, data_folders,
    prove_inclusion, prove_published_document, publish, read_commitment, read_proof, sign, write_proof)
from megatron_sov.audit.drawing import draw, needed, read_draw, segments_of, write_draw
from megatron_sov.base.artifacts import MANIFEST, manifest_sha256
from megatron_sov.base.digests import code_sha256
from megatron_sov.base.errors import ExitCode, UserError, visible, warn
from megatron_sov.base.outputs import check_output, refuse_input, refuse_nowhere
from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, Flag, Fraction, NotBlank, NotNegativeInt, command_of, read_options)
from megatron_sov.runs.folder import RunFolder

POLL_S = 20.0


@dataclass(frozen=True, kw_only=True)
class AuditCommitOptions:
    """Publish hashes of a run's settings, code, data and checkpoints, in a log that only grows."""

    run: Annotated[Path, Flag("RUN")]
    """Folder of the run."""
    log: Annotated[Path, Flag(value="FILE")]
    """The log; what is new is added. Put it where others can see it, early and often."""
    key: Annotated[Path | None, Flag(value="FILE")] = None
    """Sign the log: a secret key of minisign without a password."""
    documents: bool = False
    """Also the documents of the data, so that `audit prove --document` can prove each by itself; reads every
    token once."""
    follow: bool = False
    """Stay until the run is complete, and publish each checkpoint as it appears."""


def run_commit(typed: argparse.Namespace) -> int:
    """Publish what is new.

    Raises:
        UserError: it is no run, or the log is another's, or was changed.
    """
    args = read_options(AuditCommitOptions, typed)
    check_output("--log", args.log)
    while True:
        # looked at before: what the last steps left is published too
        is_complete = RunFolder(args.run).completion() is not None
        new = publish(args.run, args.log, args.key, documents=args.documents)
        root = read_commitment(args.log).root
        print(f"{args.log}: {len(new)} new, root {root}", flush=True)
        if not args.follow or is_complete:
            return ExitCode.OK
        time.sleep(POLL_S)


COMMIT = command_of(AuditCommitOptions, run_commit)


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """What was published."""

    log: Annotated[Path, Flag(value="FILE")]
    """The log, as it was published."""
    public_key: Annotated[Path | None, Flag(value="FILE")] = None
    """Check its signature: a public key of minisign."""


def _published(args: LogOptions) -> Commitment:
    """Return the log, with its signature checked where that is asked for."""
    if args.public_key is not None:
        check_signature(args.log, args.public_key)
    return read_commitment(args.log)


@dataclass(frozen=True, kw_only=True)
class AuditDrawOptions(LogOptions):
    """Draw segments of a run by lot, in a way that anybody can do again."""

    randomness: Annotated[NotBlank, Flag(value="TEXT")]
    """What nobody could know before the log was published: a later round of a public beacon, dice of both
    sides."""
    segments: NotNegativeInt | None = None
    """How many, beside the first."""
    share: Fraction = 0.1
    """Without --segments as many as find a fraud in this share of the segments ..."""
    confidence: Fraction = 0.9
    """... with this probability."""
    output: Annotated[Path, Flag(value="FILE")]
    """The draw."""


def run_draw(typed: argparse.Namespace) -> int:
    """Draw.

    Raises:
        UserError: the log was changed or has too little.
    """
    args = read_options(AuditDrawOptions, typed)
    check_output("--output", args.output)
    refuse_input("--output", args.output, args.log)
    commitment = _published(args)
    others = len(segments_of(commitment)) - 1
    count = needed(args.share, args.confidence, others) if args.segments is None else args.segments
    drawn = draw(commitment, args.randomness, count)
    write_draw(args.output, drawn)
    print(f"{args.output}: steps {', '.join(s.name for s in drawn.segments)}, of {others + 1} segments; a "
          f"fraud in {args.share:.0%} of them is found with {drawn.chance_to_find(args.share):.1%}")
    return ExitCode.OK


DRAW = command_of(AuditDrawOptions, run_draw)


@dataclass(frozen=True, kw_only=True)
class AuditRepeatOptions(LogOptions):
    """Repeat the segments of a draw, and compare what comes of them with what was published."""

    draw: Annotated[Path, Flag("DRAW")]
    """File of `audit draw`."""
    run: Annotated[Path, Flag(value="DIR")]
    """What the lab hands over: the run's settings and the checkpoints around each segment."""
    data: Annotated[tuple[Path, ...], Flag(value="DIR")] = ()
    """Token shards, where they do not lie where the run read them; each is found by its hash."""
    start_from: Annotated[Path | None, Flag("--from", "CHECKPOINT|RUN")] = None
    """Model that the run began from, where it did not begin from its seed."""
    states: Annotated[tuple[Path, ...], Flag(value="DIR")] = ()
    """Of a distillation, where it does not lie where the run read it: what the teacher said of the data."""
    reference: Annotated[Path | None, Flag(value="CHECKPOINT|RUN")] = None
    """Model of --reference, of a run of `prefer` that was given one."""
    work: Annotated[Path, Flag(value="DIR")]
    """Folder of the audit; a killed command goes on where it was."""
    nproc: AtLeastOne | None = None
    """Processes (default: as many as the run had)."""
    settings: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """Another layout, e.g. --set parallel.tp=2."""
    bound: AboveZero = 0.01
    """Largest distance that passes where bits differ: |repeated - published| / |published - before|."""


def run_repeat(typed: argparse.Namespace) -> int:
    """Repeat what is not repeated yet; returns that of a gate where a segment is not what was published.

    Raises:
        UserError: log, draw or evidence cannot be used, or a segment's command fails.
    """
    args = read_options(AuditRepeatOptions, typed)
    refuse_nowhere(args.work)
    commitment = _published(args)
    drawn = read_draw(args.draw, commitment)

    if code_sha256() not in {leaf.sha256 for leaf in commitment.find(CODE)}:
        warn("the run was made by another version of this program than the one that repeats it; where bits "
             "differ, repeat with that one")

    from megatron_sov.audit.repeating import RepeatOutcome, gather_evidence, keep, kept, repeat
    from megatron_sov.audit.verdict import judge

    evidence = gather_evidence(args.run, commitment, args.data, args.start_from, args.settings, args.nproc,
                               args.bound, states=args.states, reference=args.reference)
    for number, segment in enumerate(drawn.segments, 1):
        found = kept(args.work, drawn.root, segment)
        if found is not None and (found.bound, found.settings) != (args.bound, args.settings):
            raise UserError(f"{args.work}: steps {segment.name} were repeated with --bound {found.bound:g} "
                            f"{' '.join(f'--set {s}' for s in found.settings)}; name another --work")
        # what the lab had not given may be there now
        if found is None or found.outcome == RepeatOutcome.UNPROVED:
            began_s = time.monotonic()
            found = repeat(evidence, segment, args.work)
            found = dataclasses.replace(found, settings=args.settings, seconds=time.monotonic() - began_s)
            keep(args.work, drawn.root, found)
        distance = f", distance {found.distance:.1e}" if found.distance > 0 else ""
        print(visible(f"{number}/{len(drawn.segments)} steps {segment.name}: {found.outcome}{distance}"
                      f"{f', {found.detail}' if found.detail else ''} ({found.seconds:.0f} s)"), flush=True)
    verdict = judge(commitment, drawn, args.work)
    print(verdict.sentence())
    return ExitCode.OK if verdict.passed else ExitCode.GATE_FAILED


REPEAT = command_of(AuditRepeatOptions, run_repeat)


@dataclass(frozen=True, kw_only=True)
class AuditDataOptions(LogOptions):
    """Make the tokenizer and the token shards of a run again from their texts, ask its teacher again, and
    compare every byte; hash the documents again where they were published."""

    run: Annotated[Path, Flag(value="DIR")]
    """What the lab hands over: the run's settings."""
    data: Annotated[tuple[Path, ...], Flag(value="DIR")] = ()
    """Token shards, where they do not lie where the run read them; each is found by its hash."""
    moved: Annotated[tuple[str, ...], Flag(value="OLD=NEW")] = ()
    """Texts and tokenizers, where they do not lie where manifests say: a path there, or a folder above it,
    and where that lies here; may be repeated."""
    teacher: Annotated[tuple[Path, ...], Flag(value="CHECKPOINT|RUN|HF_DIR")] = ()
    """Of a distillation: have this teacher say again what it said of the data."""
    states: Annotated[tuple[Path, ...], Flag(value="DIR")] = ()
    """--teacher: what it said, where that does not lie where the run read it."""
    work: Annotated[Path, Flag(value="DIR")]
    """Folder of the audit; what is done is not done again."""


def run_data(typed: argparse.Namespace) -> int:
    """Make again what was not made yet; returns that of a gate where texts give something else.

    Raises:
        UserError: log, run or data cannot be used.
    """
    args = read_options(AuditDataOptions, typed)
    refuse_nowhere(args.work)

    from megatron_sov.audit.preparing import ask_again, hash_again, parse_moved, prepare_again
    from megatron_sov.audit.repeating import find_data, find_states

    moved, commitment = parse_moved(args.moved), _published(args)
    places = find_data(args.run, commitment, args.data or [*data_folders(args.run).values()])
    shards = [*dict.fromkeys(places.values())]
    found = []
    for place in shards:
        for prepared in prepare_again(place, moved, args.work):
            print(visible(prepared.sentence()), flush=True)
            found.append(prepared)
    for place in shards:
        for leaf in commitment.find(DOCUMENTS):
            if leaf.name == manifest_sha256(place):
                found.append(hash_again(place, leaf, args.work))
                print(visible(found[-1].sentence()), flush=True)
    for states in find_states(args.run, commitment, args.states) if args.teacher else ():
        found.append(ask_again(states, args.teacher, shards, args.work))
        print(visible(found[-1].sentence()), flush=True)
    return ExitCode.OK if all(p.passed for p in found) else ExitCode.GATE_FAILED


DATA = command_of(AuditDataOptions, run_data)


@dataclass(frozen=True, kw_only=True)
class AuditVerdictOptions(LogOptions):
    """Say on a page what was repeated, and what that proves."""

    draw: Annotated[Path, Flag("DRAW")]
    """File of `audit draw`."""
    work: Annotated[Path, Flag(value="DIR")]
    """Folder of `audit repeat`."""
    output: Annotated[Path, Flag(value="FILE")]
    """The page; the same as values stands beside it."""
    key: Annotated[Path | None, Flag(value="FILE")] = None
    """Sign the page: the auditor's secret key of minisign, without a password."""


def run_verdict(typed: argparse.Namespace) -> int:
    """Write the page; returns 0 where all segments passed, else that of a gate.

    Raises:
        UserError: nothing was repeated, or what was written was changed.
    """
    args = read_options(AuditVerdictOptions, typed)
    if args.output.suffix != ".html":
        raise UserError(f"--output {args.output}: is a page; give it the end .html")
    check_output("--output", args.output)
    refuse_input("--output", args.output.with_suffix(".json"), args.log, args.draw)

    from megatron_sov.audit.verdict import judge, write_verdict

    commitment = _published(args)
    verdict = judge(commitment, read_draw(args.draw, commitment), args.work)
    write_verdict(verdict, args.output)
    if args.key is not None:
        sign(args.output, args.key)
    print(verdict.sentence())
    print(f"{args.output}: opens in any browser without a network")
    return ExitCode.OK if verdict.passed else ExitCode.GATE_FAILED


VERDICT = command_of(AuditVerdictOptions, run_verdict)


@dataclass(frozen=True, kw_only=True)
class AuditProveOptions(LogOptions):
    """Take one line out of a log, with what shows that it stood in it."""

    what: Annotated[NotBlank, Flag("WHAT")]
    """A folder that was published (token shards, a checkpoint), a file of it, or the hash of a line."""
    document: Annotated[str, Flag(value="SOURCE:NUMBER")] = ""
    """Of token shards: this training document alone, numbered from 0 (`audit commit --documents`)."""
    output: Annotated[Path, Flag(value="FILE")]
    """The proof; it has no other line of the log."""


def run_prove(typed: argparse.Namespace) -> int:
    """Write the proof.

    Raises:
        UserError: it was not published.
    """
    args = read_options(AuditProveOptions, typed)
    check_output("--output", args.output)
    refuse_input("--output", args.output, args.log)
    if (folder := artifact_around(Path(args.what))) and folder.resolve() in args.output.resolve().parents:
        raise UserError(f"--output {args.output}: lies in {folder}, which is then no longer what was "
                        "published; choose another place")
    commitment = _published(args)
    proof = (prove_published_document(commitment, Path(args.what), args.document) if args.document
             else prove_inclusion(commitment, args.what))
    write_proof(args.output, proof)
    print(visible(f"{args.output}: {_named(proof)} is line {proof.index + 1} of {proof.size}, root "
                  f"{commitment.root}"))
    return ExitCode.OK


def _named(proof: InclusionProof) -> str:
    document = f"document {proof.document.name} of " if proof.document is not None else ""
    return f"{document}{proof.leaf.kind} {proof.leaf.name} {proof.leaf.sha256}"


PROVE = command_of(AuditProveOptions, run_prove)


@dataclass(frozen=True, kw_only=True)
class AuditCheckOptions:
    """Check a line of a log by its proof, without the log."""

    proof: Annotated[Path, Flag("PROOF")]
    """File of `audit prove`."""
    root: Annotated[NotBlank, Flag(value="HASH")]
    """Root of the log, from where it was published or stamped: not from whoever gave the proof."""
    of: Annotated[Path | None, Flag(value="PATH")] = None
    """Whether this is what was published: a folder, or a file of one; of a document its token ids as a JSON
    list, or its text with --tokenizer."""
    tokenizer: Annotated[Path | None, Flag(value="DIR")] = None
    """By which the document was packed: `tokenizer` in the token shards, or the folder that it came from."""


def run_check(typed: argparse.Namespace) -> int:
    """Say whether it was published; returns that of a gate where it was not.

    Raises:
        UserError: it is no proof.
    """
    args = read_options(AuditCheckOptions, typed)
    if not HASH.fullmatch(args.root.lower()):
        raise UserError(f"--root {args.root}: must be the 64 digits 0-9 and a-f that the lab has published")
    proof = read_proof(args.proof)
    if proof.root() != args.root.lower():
        print(f"{args.proof}: leads to root {proof.root()}, and that of the log is {args.root}")
        return ExitCode.GATE_FAILED
    if args.tokenizer is not None and (proof.document is None or args.of is None):
        raise UserError(f"--tokenizer {args.tokenizer}: is for the text of a document; give a proof of one "
                        "(`audit prove --document`), and its text by --of")
    if args.of is not None and (problem := _other_than(proof, args.of, args.tokenizer)):
        print(visible(problem))
        return ExitCode.GATE_FAILED
    # of its line only the log itself says the number: another one, in a tree of another size, may have the
    # same path
    print(visible(f"{_named(proof)}{f' and {args.of}' if args.of else ''}: published"))
    return ExitCode.OK


def _other_than(proof: InclusionProof, place: Path, tokenizer: Path | None) -> str | None:
    """Return in what a folder, a file or a document is not what was published; None: in nothing."""
    from megatron_sov.audit.documents import document_in_hand
    from megatron_sov.audit.repeating import folder_problem

    if not place.exists():
        raise UserError(f"--of {place}: does not exist; name the folder or the file that you were given")
    if proof.document is not None:
        document = proof.document
        is_that = document_in_hand(place, tokenizer, proof.manifest, document.source) == document.sha256
        return None if is_that else f"{place}: is not document {document.name}; every character counts"
    if place.is_dir() and (problem := folder_problem(place)):
        return problem
    if proof.proves(place / MANIFEST if place.is_dir() else place):
        return None
    return f"{place}: is not what was published as {proof.leaf.kind} {proof.leaf.sha256[:12]}"


CHECK = command_of(AuditCheckOptions, run_check)
