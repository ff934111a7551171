"""A run as it would be had it never read some documents: repeated from the newest checkpoint before their
first use, with everything else in its order and their places empty; how far both ends are apart; and the same
repetition with nothing left out, whose distance shows the noise, which is none."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sov.audit.commitment import data_folders, inputs_of, settings_sha256
from megatron_sov.audit.drawing import Segment
from megatron_sov.audit.own_folder import make_once
from megatron_sov.audit.repeating import (
    LOG, NEVER, REPEATED, RepeatOutcome, cannot_be_repeated, compare, own_settings, train_until,
    weights_apart)
from megatron_sov.base.artifacts import MANIFEST, atomic_write, manifest_sha256, to_json
from megatron_sov.base.digests import code_sha256
from megatron_sov.base.errors import UserError
from megatron_sov.base.pages.page import Chapter, PageSection, PageTable, render
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.model.config.data import documents_named
from megatron_sov.model.objectives import FORMATS
from megatron_sov.runs import checkpoints
from megatron_sov.runs.folder import CONFIG, REFERENCE, RunFolder, read_command
from megatron_sov.runs.lock import living_holder
from megatron_sov.runs.obs.events import EVENTS, final_steps, read_events
from megatron_sov.train.data.ledger import LedgerEntry, plan
from megatron_sov.train.data.left_out import left_out
from megatron_sov.train.data.order import SampleOrder
from megatron_sov.train.data.token_shards import Source, open_sources
from megatron_sov.train.data.views import with_views
from megatron_sov.work.progress.progress_bar import work_bar

REMOVED, CONTROL = "removed", "control"
"""Folders of both repetitions."""


@dataclass(frozen=True)
class FirstUse:
    """Where documents enter a run."""

    step: int
    """First optimizer step that reads any of them, from 1; 0: none of the steps so far does."""
    steps: int
    """That read any."""
    emptied: tuple[int, ...]
    """Steps of which nothing is left without them: these are passed over."""


@dataclass(frozen=True)
class Removal:
    """What a run would be without documents."""

    run: str
    without: tuple[str, ...]
    """As `data.without` has it."""
    documents: int
    tokens: int
    first_use: FirstUse
    begin: int
    """Step of the checkpoint that was gone on from; 0: the beginning."""
    end: int
    """Last step."""
    checkpoint: str
    """The one that never read them; where no step did, the run's own."""
    checkpoint_sha256: str
    """Of its manifest, which has the hash of every file."""
    settings_sha256: str
    """Of the repetition."""
    code_sha256: str
    data_sha256: dict[str, str]
    """[NAME=]folder -> manifest."""
    start_sha256: str
    """Of the model that the run began from; empty: it began from its seed."""
    distance: float
    """|weights - weights of the run| / |weights of the run|."""
    control: str
    """What the repetition with nothing left out came to (`RepeatOutcome`); "": was not asked for."""
    losses: dict[str, tuple[float, float]]
    """Source -> bits per byte of its held-out documents at the end: of the run, and without them."""


@dataclass(frozen=True)
class RunRepetition:
    """A run that is to be repeated without documents."""

    run: Path
    without: tuple[str, ...]
    output: Path
    start: Path | None
    """Model of --from; None: the run begins from its seed."""
    start_sha256: str
    """Of its manifest; empty: there is none."""
    reference: Path | None
    """Model of --reference; None: a run that compares with a model compares with its start."""
    nproc: int
    config: RunConfig
    """Settings of its newest checkpoint, with data where they lie."""
    newest: Path
    """Checkpoint."""

    def sources(self) -> list[Source]:
        found = open_sources(self.config.data.paths, self.config.model.vocab_size, FORMATS, warns=False)
        return with_views(self.config, found)


def plan_repetition(run: Path, without: Sequence[str], output: Path, start: Path | None,
                    nproc: int | None, *, reference: Path | None = None) -> RunRepetition:
    """Return what is to be repeated.

    Raises:
        UserError: it is no run, cannot be repeated, or holds no checkpoint; or its data are not there.
    """
    folder = RunFolder(run)
    if (now := folder.config()) is None:
        checkpoints.refuse_missing(run)
        checkpoints.refuse_no_run(run)
        raise UserError(f"{run}: holds no {CONFIG}; name the --run of a training command")
    if (holder := living_holder(run)) is not None:
        raise UserError(f"{run}: is at work (process {holder['pid']} on {holder['host']}); wait for its end, "
                        "or stop it")
    newest = checkpoints.find_checkpoint(run)
    config = checkpoints.settings_of(newest)
    if what := cannot_be_repeated(config) or _learned_besides(config):
        raise UserError(f"{run}: has {what}; pretrain, sft and prefer of all weights without code of one's "
                        "own are what can be repeated")
    if config.objective.name == "preference" and config.preference.method == "kto" and (
            some := next((named for named in without if documents_named(named)[2] is not None), "")):
        raise UserError(f"--without {some}: by preference.method = kto each response also stands in another "
                        "document, beside another prompt; name the whole source")
    if config.data.paths.keys() != now.data.paths.keys():
        raise UserError(f"{run / CONFIG}: names other data than {newest.name} was written with; resume the "
                        "run until it has written a checkpoint with these")
    begun, asked = _model(run, "--from", start, checkpoints.KIND, "began from its seed")
    compared, _ = _model(run, "--reference", reference, REFERENCE, "compares with no model besides its start")
    return RunRepetition(run, tuple(without), output, begun, asked, compared,
                         nproc or read_command(run).processes,
                         own_settings(config, data_folders(run)), newest)


def _model(run: Path, option: str, given: Path | None, kind: str, none: str) -> tuple[Path | None, str]:
    """Return the checkpoint that an option names, and the hash of its manifest, which the run's records must
    have as an input of that kind; empty: the run has no such model."""
    asked = next(iter(inputs_of(run, kind)), "")
    found = given and checkpoints.find_checkpoint(given)
    if asked != (manifest_sha256(found) if found else ""):
        raise UserError(f"{run}: " + (f"has learned from a model with the manifest {asked[:12]}; name it by "
                                      f"{option}" if asked else f"{none}; leave {option} out"))
    return found, asked


def _learned_besides(config: RunConfig) -> str:
    """Return what a run learns beside its weights and documents; empty: nothing."""
    if config.lora.on:
        return "adapters"
    return "a teacher" if config.objective.name == "distill" else ""


def find_first_use(config: RunConfig, sources: Sequence[Source], newest: Path, without: Sequence[str]
                   ) -> FirstUse:
    """Return where a run read documents, by its order of samples.

    Args:
        config: its settings.
        sources: what it reads.
        newest: its newest checkpoint, which has the ledger of all steps so far.
        without: the documents, as `data.without` has them.

    Raises:
        UserError: there are no such documents, or the checkpoint is damaged.
    """
    removed = left_out(without, sources)
    planned = plan(config, list(sources))
    steps = checkpoints.step_of(newest)
    _refuse_other_order(planned, sources, newest)
    order = SampleOrder(config, list(sources), planned=planned)
    touched, emptied = [], []
    with work_bar("read the order", steps, "step") as bar:
        for step in range(1, steps + 1):
            entry, samples = order.next_batch()
            bar.update(1)
            # what a guard refused was read: only what the settings pass over was not
            if entry.skip:
                continue
            kept = [removed[name].kept(sample.segments) if (name := sources[sample.source].name) in removed
                    else sample.segments for sample in samples]
            if any(len(left) < len(sample.segments) for left, sample in zip(kept, samples, strict=True)):
                touched.append(step)
                if not any(kept):
                    emptied.append(step)
    return FirstUse(touched[0] if touched else 0, len(touched), tuple(emptied))


def _refuse_other_order(planned: Sequence[LedgerEntry], sources: Sequence[Source], newest: Path) -> None:
    """Refuse a run whose steps did not follow its settings, since these are what is repeated.

    Raises:
        UserError: it was resumed with others, its data were packed anew, or the checkpoint is damaged.
    """
    file, steps = newest / checkpoints.STATE, checkpoints.step_of(newest)
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        history = [LedgerEntry(**entry) for entry in state["order"]["history"]]
        data = dict(state["data"])
        changes = sorted({0, *(e.first_step for e in (*planned, *history) if e.first_step < steps)})
        told, done = ([(e.phase, e.seq_len, e.global_batch_size, dict(e.weights))
                       for e in (next(e for e in reversed(entries) if e.first_step <= step)
                                 for step in changes)] for entries in (planned, history))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration, RuntimeError,
            RecursionError) as e:
        raise UserError(f"{file}: is damaged ({type(e).__name__} {str(e)[:200]}); set the checkpoint aside, "
                        "and the one before it is taken") from None
    if told != done:
        i = next(i for i, pair in enumerate(zip(told, done, strict=True)) if pair[0] != pair[1])
        raise UserError(f"{file}: step {changes[i] + 1} read {done[i]}, and by {newest.name}'s settings it "
                        f"would read {told[i]}: the run was resumed with other data, phases or batches, and "
                        "what is repeated are these settings")
    for source in sources:
        if source.artifact is None or source.name not in data:
            continue
        if data[source.name] != manifest_sha256(source.artifact):
            raise UserError(f"{source.artifact}: was packed anew since {newest} was written; put back what "
                            "the run has read")


def remove(repetition: RunRepetition, *, with_control: bool) -> Removal:
    """Repeat a run without documents, and compare; what is done in its folder is not done again.

    Raises:
        UserError: there are no such documents, the folder holds another repetition, or training fails.
    """
    sources = repetition.sources()
    first = find_first_use(repetition.config, sources, repetition.newest, repetition.without)
    end, run = checkpoints.step_of(repetition.newest), RunFolder(repetition.run)
    begin, settings, found = end, repetition.config, repetition.newest
    control = ""
    if first.step:
        before = checkpoints.latest_not_after(run.checkpoints, first.step - 1)
        begin = 0 if before is None else checkpoints.step_of(before)
        settings = _without(repetition.config, repetition.without, first.emptied)
        found = _repeat(repetition, settings, before, end, repetition.output / REMOVED)
        if with_control:
            same = _repeat(repetition, repetition.config, before, end, repetition.output / CONTROL)
            control = compare(Segment(begin, end), repetition.newest, same, before, 1e-300).outcome.value
    counts = [each.counts(source) for name, each in left_out(repetition.without, sources).items()
              for source in sources if source.name == name]
    return Removal(
        str(repetition.run), repetition.without, sum(n for n, _ in counts), sum(n for _, n in counts), first,
        begin, end, str(found), manifest_sha256(found), settings_sha256(settings), code_sha256(),
        {given: manifest_sha256(place) for given, place in data_folders(repetition.run).items()},
        repetition.start_sha256, weights_apart(found, repetition.newest) if first.step else 0.0, control,
        _losses(run.path, found.parent.parent))


def _without(config: RunConfig, without: Sequence[str], emptied: Sequence[int]) -> RunConfig:
    skips = list(config.data.skip_steps)
    for step in emptied:
        if skips and skips[-1][1] == step - 1:
            skips[-1] = skips[-1][0], step
        else:
            skips.append((step, step))
    return dataclasses.replace(config, data=dataclasses.replace(
        config.data, without=(*config.data.without, *without), skip_steps=tuple(skips)))


def _repeat(repetition: RunRepetition, settings: RunConfig, before: Path | None, end: int, folder: Path
            ) -> Path:
    """Train a run's steps again in a folder; returns the last checkpoint."""
    target = RunFolder(folder / REPEATED)
    # one checkpoint, at the end, and the run's own evaluations
    settings = apply_settings(settings, [f"train.checkpoint_every_steps={NEVER}", "train.keep_every_steps=0"])
    text = to_json(settings.to_dict())

    def make() -> None:
        if before is not None:
            if problem := checkpoints.damage(before):
                raise UserError(problem)
            # a copy: this run must be able to do to it what runs do to their checkpoints
            shutil.copytree(before, target.checkpoint(checkpoints.step_of(before)))
            atomic_write(target.path / CONFIG, text)
            # what the model said that preferences are compared with was found before the first step
            if (said := repetition.run / REFERENCE).is_dir():
                shutil.copytree(said, target.path / REFERENCE)
        atomic_write(folder / CONFIG, text)

    make_once(folder, {"settings": settings.to_dict(), "end": manifest_sha256(repetition.newest),
                       "begin": manifest_sha256(before) if before else "", "from": repetition.start_sha256,
                       "nproc": repetition.nproc}, (REPEATED,), make, what="repetition",
              other="the repetition of another run, or without other documents")
    if not (target.checkpoint(end) / MANIFEST).is_file():
        compared = ("--reference", str(repetition.reference)) if repetition.reference is not None else ()
        train_until(target, end, repetition.start, repetition.nproc, folder / LOG, compared)
    if not (target.checkpoint(end) / MANIFEST).is_file():
        raise UserError(f"{folder / LOG}: the repetition ended before step {end}; look at its end")
    return target.checkpoint(end)


def _losses(run: Path, other: Path) -> dict[str, tuple[float, float]]:
    """Return each source's held-out bits per byte behind the last step that both have evaluated."""
    found = [{event["step"]: event["heldout"]
              for event in final_steps(list(read_events(folder / EVENTS)), "eval")}
             for folder in (run, other)]
    common = sorted(found[0].keys() & found[1].keys())
    if not common:
        return {}
    ours, theirs = (evaluations[common[-1]] for evaluations in found)
    return {name: (of_source["bits_per_byte"], theirs[name]["bits_per_byte"])
            for name, of_source in ours.items() if name in theirs}


def write_removal(removal: Removal, output: Path) -> Path:
    """Write the certificate, removal.json, and its page beside it; returns the page's path."""
    atomic_write(output / "removal.json", to_json(asdict(removal)) + "\n")
    file = output / "removal.html"
    atomic_write(file, page(removal))
    return file


def sentence(removal: Removal) -> str:
    """Return what was found, in one sentence."""
    first = removal.first_use
    if not first.step:
        return (f"no step up to {removal.end} has read {', '.join(removal.without)}: the weights are those "
                "of a run that never read them")
    told = {RepeatOutcome.EQUAL.value: "; with nothing left out every bit is the run's", "": ""}.get(
        removal.control, f"; with nothing left out the repetition is {removal.control}, so that the "
                         "difference is not theirs alone")
    return (f"{removal.checkpoint}: weights of a run that never read the {removal.documents:,} documents; "
            f"steps {removal.begin + 1} to {removal.end} were repeated, {first.steps:,} of which had read "
            f"them; the weights are {removal.distance:.2%} apart{told}")


def page(removal: Removal) -> str:
    """Return the page."""
    figures = [("documents", f"{removal.documents:,}", f"{removal.tokens:,} tokens"),
               ("first read in", f"step {removal.first_use.step:,}" if removal.first_use.step else "no step",
                f"{removal.first_use.steps:,} steps read them"),
               ("weights apart", f"{removal.distance:.2%}", "of their own size"),
               ("control", removal.control or "not asked for", "repeated with nothing left out")]
    losses = PageTable(["source", "the run", "without them", "difference"], [
        [name, f"{ours:.4f}", f"{theirs:.4f}", f"{theirs - ours:+.4f}"]
        for name, (ours, theirs) in removal.losses.items()])
    hashes: Mapping[str, Any] = {"checkpoint": removal.checkpoint_sha256, "settings": removal.settings_sha256,
                                 "code": removal.code_sha256, "start": removal.start_sha256 or "(its seed)",
                                 **removal.data_sha256}
    return render("counterfactual", f"Without {', '.join(removal.without)}", sentence(removal), [
        Chapter(removal.run, "", figures, [
            PageSection("Held-out bits per byte", "At the end of both, by source. A positive difference is "
                        "what the documents were worth.", tables=[losses] if removal.losses else []),
            PageSection("What was done", f"Begun from step {removal.begin:,} and trained to step "
                        f"{removal.end:,} by the ordinary command. All other documents were read in the same "
                        "steps, rows and order; the places of those that were left out are padding, so that "
                        "their number and lengths alone are left of them."
                        + (f" Steps of which nothing was left were passed over: "
                           f"{', '.join(map(str, removal.first_use.emptied))}."
                           if removal.first_use.emptied else "")),
            PageSection("Hashes", "Whoever has the data can train the whole run with data.without and "
                        "data.skip_steps as they stand in the repetition's settings, and must come to this "
                        "checkpoint.",
                        tables=[PageTable(["what", "SHA-256"], [[*each] for each in hashes.items()])])])])
