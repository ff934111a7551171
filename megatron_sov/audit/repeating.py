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
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.audit.commitment import (
    DATA, REFERENCE, SETTINGS, START, STATES_KIND, TEACHER, Commitment, data_folders, inputs_of,
    settings_sha256)
from megatron_sov.audit.drawing import Segment, segments_of
from megatron_sov.base.artifacts import (
    MANIFEST, atomic_write, damaged_files, manifest_sha256, read_manifest, to_json)
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.sealed import read_json, write_json
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.model.config.evaluate import EvaluateConfig
from megatron_sov.model.config.post_training import WITH_REFERENCE
from megatron_sov.model.config.train import ObsConfig
from megatron_sov.model.families.adapters import B
from megatron_sov.runs import checkpoints
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.folder import CONFIG, REFERENCE as LOGPROBS, RunFolder, fixed_settings, read_command
from megatron_sov.work.processes.children import start_command

if TYPE_CHECKING:
    import torch

    from megatron_sov.checkpoint.sharded_tensors import TensorReader

COMMANDS = {"lm": "pretrain", "sft": "sft", "preference": "prefer", "distill": "distill"}
"""Objective -> the command that trains by it alone from token shards."""
LAYOUT = ("parallel.", "gpu.", "train.micro_batch_size", "train.num_threads")
"""Settings of where and in which parts a step is computed."""
FREE = (*LAYOUT, "train.head_chunk_tokens", "train.deterministic")
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
ROW_FLOOR = 0.1
"""Share of what rows move, by which a row that moved less is measured."""
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
    """|repeated - published| / |published - before|, the largest of all rows of weights and moments
    (`_distance`); before is the checkpoint before, and in the first segment what the auditor has behind step
    1; -1: was not measured."""
    detail: str
    """Where they differ, or what was missing; empty where all is equal."""
    bound: float
    """Largest distance that passes."""
    settings: tuple[str, ...] = ()
    """Layout of the auditor's own."""
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
    states: tuple[Path, ...] = ()
    """Of a distillation: what its teacher said of the data."""
    reference: Path | None = None
    """Model of --reference, of a run that learned preferences by one of its own."""

    def problem(self, segment: Segment) -> str | None:
        """Return what is missing or is not what was published, of all that a segment needs; None: nothing."""
        if problem := self._models_problem():
            return problem
        for step in (segment.begin, segment.end):
            if step and (problem := self._checkpoint_problem(step) or self._base_problem(step)):
                return problem
        written = checkpoints.settings_of(RunFolder(self.run).checkpoint(segment.end))
        published = {leaf.sha256 for leaf in self.commitment.find(SETTINGS)}
        for name, config in ((CONFIG, self._config()), (f"step-{segment.end}", written)):
            if settings_sha256(config) not in published:
                return f"the settings of {name} are not what was published"
            if problem := cannot_be_repeated(config):
                return f"{name} has {problem}"
        told, now = fixed_settings(self._config()), fixed_settings(written)
        if other := sorted(name for name in told if told[name] != now.get(name)):
            return f"step-{segment.end} was written with other settings than {CONFIG} has: {', '.join(other)}"
        if set(written.data.paths) != set(self.data):
            return f"step-{segment.end} reads other data than {CONFIG} has"
        data = {(leaf.name, leaf.sha256) for leaf in self.commitment.find(DATA)}
        for given, place in self.data.items():
            if (given, manifest_sha256(place)) not in data:
                return f"data {given} is not what was published"
        said = [manifest_sha256(folder) for folder in self.states]
        if sorted(said) != sorted(leaf.sha256 for leaf in self.commitment.find(TEACHER)):
            return "what the teacher said is not what was published"
        return None

    def words(self) -> list[str]:
        """Return what the command is told besides data and start."""
        given = [("--states", folder) for folder in self.states]
        given += [("--reference", self.reference)] if self.reference is not None else []
        return [word for option, place in given for word in (option, str(place.absolute()))]

    def own_reference(self, segment: Segment, work: Path) -> Path | None:
        """Return where the auditor has what a reference says of the data: it is found before the first step
        of a run, and so with its first segment; None: this segment needs none."""
        config = self._config()
        if not segment.begin or config.objective.name != "preference" or (
                config.preference.method not in WITH_REFERENCE):
            return None
        return work / segments_of(self.commitment)[0].name / REPEATED / LOGPROBS

    def _config(self) -> RunConfig:
        config = RunFolder(self.run).config()
        assert config is not None, f"{self.run} was read before"
        return config

    def _checkpoint_problem(self, step: int) -> str | None:
        path = RunFolder(self.run).checkpoint(step)
        if not (path / MANIFEST).is_file():
            return f"{path.name} is not there"
        if manifest_sha256(path) != self.commitment.checkpoint(step):
            return f"{path.name} is not what was published"
        return folder_problem(path)

    def _models_problem(self) -> str | None:
        for kind, option, model, does in ((START, "--from", self.start, "begins from"),
                                          (REFERENCE, "--reference", self.reference, "compares with")):
            published = {leaf.sha256 for leaf in self.commitment.find(kind)}
            if bool(published) != (model is not None):
                return (f"the run {does} a model; name it by {option}" if published else
                        f"{option} is given, and the log says that the run {does} no other model")
            if model is None:
                continue
            if manifest_sha256(model) not in published:
                return f"{model} is not the model that was published as the {kind}"
            if problem := folder_problem(model):
                return problem
        if not self._config().lora.on:
            return None
        if self.start is None:
            return "it has adapters, and no model was published that they stand on"
        try:
            base = self.frozen()
        except UserError as e:
            return str(e)
        return None if base == self.start else folder_problem(base)

    def frozen(self) -> Path:
        """Return the checkpoint that a run's adapters stand on: its start, or the base of that.

        Raises:
            UserError: that base is not where the start says, or is another one by now.
        """
        assert self.start is not None, "adapters have a start"
        base = checkpoints.adapter_base(self.start)
        return self.start if base is None else checkpoints.found_base(self.start, base)

    def _base_problem(self, step: int) -> str | None:
        """Return in what a checkpoint stands on another base than all adapters of the run; the weights
        themselves are compared later."""
        base = checkpoints.adapter_base(RunFolder(self.run).checkpoint(step))
        own = manifest_sha256(self.frozen()) if self._config().lora.on else None
        return None if (base and base.sha256) == own else f"step-{step} stands on another model than the run"


def folder_problem(folder: Path) -> str | None:
    """Return in what a folder is not what its manifest says: a file that differs, or one that the manifest
    does not name, whose content could have been chosen after the publication; None: nothing."""
    # a run writes the last one into a checkpoint that adapters stand on
    named = {MANIFEST, *read_manifest(folder).files, checkpoints.KEPT}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            return f"{folder}: {name} is a link or no regular file"
        if path.is_file() and name not in named:
            return f"{folder}: {name} is not in its manifest"
    damaged = damaged_files(folder)
    return damaged[0] if damaged else None


def cannot_be_repeated(config: RunConfig) -> str:
    """Return what of a run nobody else can repeat; empty where all can be."""
    if config.code:
        return "code of the lab's own"
    if config.objective.name not in COMMANDS or config.rollout.rounds:
        return f"the objective {config.objective.name!r}"
    return ""


def gather_evidence(run: Path, commitment: Commitment, data: Sequence[Path], start: Path | None,
                    settings: Sequence[str], nproc: int | None, bound: float, *,
                    states: Sequence[Path] = (), reference: Path | None = None) -> Evidence:
    """Return what is to be repeated, with the data that lie elsewhere, and what a teacher said of them, found
    by their hashes.

    Raises:
        UserError: a setting that changes what is learned, a stage that cannot be repeated, or data that are
            damaged.
    """
    for setting in settings:
        if not setting.startswith(FREE):
            raise UserError(f"--set {setting}: changes what is learned, or nothing here; an auditor may "
                            f"set {', '.join(FREE)}")
    if what := cannot_be_repeated(_config(run)):
        raise UserError(f"{run}: has {what}; {', '.join(COMMANDS.values())} without code of one's own are "
                        "what can be repeated")
    places = find_data(run, commitment, data) if data else data_folders(run)
    said = find_states(run, commitment, states)
    for place in {*places.values(), *said}:
        if problem := folder_problem(place):
            raise UserError(f"{problem}; take the data again from the lab")
    models = [given and checkpoints.find_checkpoint(given) for given in (start, reference)]
    return Evidence(run, commitment, places, models[0], tuple(settings),
                    nproc or read_command(run).processes, bound, said, models[1])


def find_states(run: Path, commitment: Commitment, given: Sequence[Path]) -> tuple[Path, ...]:
    """Return the folders of what was published that a run's teacher said.

    Args:
        run: of the lab.
        commitment: its log.
        given: folders to look at; empty: where the run read them.

    Raises:
        UserError: one is not among them, or nothing was published of a distillation's teacher.
    """
    published = [leaf.sha256 for leaf in commitment.find(TEACHER)]
    if not published and _config(run).objective.name == "distill":
        raise UserError(f"{commitment.file}: nothing was published of what the teacher said, and the run is "
                        "a distillation; a run of this version has it in its log")
    command = read_command(run).folder if published else run
    places = list(given) or [command / place for place in inputs_of(run, STATES_KIND).values()]
    for place in places:
        refuse_missing(place, "--states ")
        read_manifest(place, STATES_KIND)
    by_hash = {manifest_sha256(place): place for place in places}
    if missing := [sha256 for sha256 in published if sha256 not in by_hash]:
        raise UserError(f"--states: none of the folders has the manifest {missing[0][:12]} that was "
                        "published of what the teacher said; ask the lab for it")
    return tuple(by_hash[sha256] for sha256 in published)


def _config(run: Path) -> RunConfig:
    config = RunFolder(run).config()
    if config is None:
        raise UserError(f"{run}: holds no {CONFIG}; ask the lab for it")
    return config


def find_data(run: Path, commitment: Commitment, data: Sequence[Path]) -> dict[str, Path]:
    """Return the run's data, as its settings name them -> the folder that has what was published of them.

    Raises:
        UserError: the run has no settings, or none of the folders is one of its data.
    """
    config = _config(run)
    by_hash = {}
    for place in data:
        refuse_missing(place, "--data ")
        read_manifest(place, "tokens")
        by_hash[manifest_sha256(place)] = place
    published = {leaf.name: leaf.sha256 for leaf in commitment.find(DATA)}
    for given in config.data.paths:
        if given not in published:
            raise UserError(f"{commitment.file}: nothing was published of data {given}, which {CONFIG} has; "
                            "take both again from the lab")
        if published[given] not in by_hash:
            raise UserError(f"--data: none of the folders has the manifest {published[given][:12]} that was "
                            f"published of {given}; ask the lab for it")
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
        return Repeated(segment, RepeatOutcome.UNPROVED, -1.0, problem, evidence.bound)
    target, said = RunFolder(folder / REPEATED), evidence.own_reference(segment, work)
    if said is not None and not said.is_dir():
        return Repeated(segment, RepeatOutcome.UNPROVED, -1.0, f"{said} is not there: what the reference "
                        "says of the data is found when the first segment is repeated", evidence.bound)
    if not (target.checkpoint(segment.end) / MANIFEST).is_file():
        _prepare(evidence, segment, target, said)
        # behind the first step, too: how far the weights move is then known of the first segment
        for step in sorted({segment.begin or 1, segment.end} - {segment.begin}):
            train_until(target, step, evidence.start, evidence.nproc, folder / LOG, evidence.words())
        if not (target.checkpoint(segment.end) / MANIFEST).is_file():
            raise UserError(f"{folder / LOG}: the repetition ended before step {segment.end}; look at its "
                            "end")
    before = RunFolder(evidence.run).checkpoint(segment.begin) if segment.begin else target.checkpoint(1)
    return compare(segment, RunFolder(evidence.run).checkpoint(segment.end), target.checkpoint(segment.end),
                   before if segment.end > 1 else None, evidence.bound)


def _prepare(evidence: Evidence, segment: Segment, target: RunFolder, said: Path | None) -> None:
    """Make a run's folder that stands at the beginning of a segment, with what a reference said."""
    shutil.rmtree(target.path.parent, ignore_errors=True)
    target.path.parent.mkdir(parents=True)
    # those of the checkpoint: a run that went on at another layout has others in its config.json now
    config = checkpoints.settings_of(RunFolder(evidence.run).checkpoint(segment.end))
    config = apply_settings(own_settings(config, evidence.data), [*QUIET, *evidence.settings])
    atomic_write(target.path.parent / CONFIG, to_json(config.to_dict()))
    if segment.begin:
        # a copy: the auditor's run must be able to do to it what runs do to their checkpoints
        shutil.copytree(RunFolder(evidence.run).checkpoint(segment.begin), target.checkpoint(segment.begin))
        shutil.copy(target.path.parent / CONFIG, target.path)
        if config.lora.on:
            _stand_on(target.checkpoint(segment.begin), evidence.frozen())
        if said is not None:
            shutil.copytree(said, target.path / said.name)


def _stand_on(adapter: Path, base: Path) -> None:
    """Have a copy of an adapter's checkpoint name its base where the auditor has it."""
    raw = json.loads((adapter / MANIFEST).read_text(encoding="utf-8"))
    raw["content"][checkpoints.BASE]["path"] = str(base.absolute())
    atomic_write(adapter / MANIFEST, to_json(raw | {"sha256": ""}))


def own_settings(config: RunConfig, data: Mapping[str, Path]) -> RunConfig:
    """Return a run's settings for a folder of one's own: its data where they lie here, and nothing that is
    done beside training.

    Args:
        config: of the run.
        data: [NAME=]folder of the settings -> where that lies.
    """
    paths = {_named(given, place): config.data.paths[given] for given, place in data.items()}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, paths=paths), obs=ObsConfig(),
                               evaluate=EvaluateConfig())


def _named(given: str, place: Path) -> str:
    name, equals, _ = given.partition("=")
    return f"{name}={place.absolute()}" if equals and not Path(given).exists() else str(place.absolute())


def train_until(target: RunFolder, until: int, start: Path | None, nproc: int, log: Path,
                more: Sequence[str] = ()) -> None:
    """Train on by the ordinary command, from what a folder holds, to a step.

    Args:
        target: the folder; its settings stand in `CONFIG` beside it.
        until: the step.
        start: model of --from; None: the run begins from its seed.
        nproc: processes.
        log: file for what the command says.
        more: words of the command besides.

    Raises:
        UserError: the command fails.
    """
    config = target.path.parent / CONFIG
    objective = json.loads(config.read_text(encoding="utf-8"))["objective"]["name"]
    words = [COMMANDS[objective], "--config", str(config), "--run", str(target.path), "--until", str(until),
             "--resume", *(("--from", str(start)) if start is not None else ()),
             *(("--nproc", str(nproc)) if nproc > 1 else ()), *more]
    code, said = run_logged(["megatron_sov", *words], log)
    if code not in (ExitCode.STOPPED, ExitCode.OK):
        raise UserError(f"{log}: the steps up to {until} cannot be repeated (exit code {code}): {said}")


def run_logged(words: Sequence[str], log: Path) -> tuple[int, str]:
    """Run one of this program's commands; returns its exit code and the end of what it said.

    Args:
        words: module of the program, command and arguments.
        log: file for what it says.
    """
    with open(log, "ab") as out:
        code = start_command([sys.executable, "-W", "ignore", "-m", *words], stdout=out, stderr=out,
                             ends_with_this=True).wait()
    return code, " ".join(log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-3:])


def compare(segment: Segment, published: Path, repeated: Path, before: Path | None, bound: float) -> Repeated:
    """Compare a checkpoint with its repetition.

    Args:
        segment: which.
        published: checkpoint of the lab.
        repeated: that of the auditor.
        before: checkpoint from which both went on, or one between; None: there is none.
        bound: largest distance that passes.
    """
    from megatron_sov.checkpoint.sharded_tensors import TensorReader

    lab, own = (_state(path) for path in (published, repeated))
    if other := [name for name in EXACT if lab.get(name) != own.get(name)]:
        return Repeated(segment, RepeatOutcome.DIFFERENT, -1.0, f"other {', '.join(other)} in its state",
                        bound)
    loose = [{name: value for name, value in state.items() if name not in {*EXACT, *CLOCKS}}
             for state in (lab, own)]
    parts = read_parts(published)
    if parts != read_parts(repeated):
        return Repeated(segment, RepeatOutcome.DIFFERENT, -1.0, "other parts", bound)
    worst, first = 0.0, ""
    for part in parts:
        readers = [TensorReader(path, part) for path in (published, repeated, before or published)]
        keys = [[(key, reader.shape(key), reader.dtype(key)) for key in sorted(reader.keys())]
                for reader in readers[:2]]
        if keys[0] != keys[1]:
            return Repeated(segment, RepeatOutcome.DIFFERENT, -1.0, f"other tensors in {part}", bound)
        readers[0].check_complete()
        distance, place = _distance(readers, [key for key, _, _ in keys[0]], has_before=before is not None)
        first = first or (f"{part} {place}" if place else "")
        # NaN is larger than all
        worst = distance if not distance <= worst else worst
    if not first and loose[0] == loose[1]:
        return Repeated(segment, RepeatOutcome.EQUAL, 0.0, "", bound)
    near = worst <= bound and alike(loose[0], loose[1], bound)
    detail = f"first in {first}" if first else "in what its guards remember"
    return Repeated(segment, RepeatOutcome.NEAR if near else RepeatOutcome.DIFFERENT, worst, detail, bound)


def _distance(readers: Sequence[TensorReader], keys: Sequence[str], *, has_before: bool) -> tuple[float, str]:
    """Return how far the second reader's tensors are from the first's, at most, and the first that differs.

    Each row, for itself, is measured by how far it moved from the third's, or, where it moved less, by a
    tenth of what rows of its kind move: weights, or a moment of the optimizer.  Without a third one every
    difference is infinite.
    """
    import torch

    # bits before distances: where all are equal, as they mostly are, nothing more is read
    first = next((key for key in keys for pair in read_blocks(key, readers[:2])
                  if not torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in pair))), "")
    if not first:
        return 0.0, ""
    rows = defaultdict(list)
    for key in keys:
        kind = key.partition("/")[0] if "/" in key else ""
        for lab, own, old in read_blocks(key, readers):
            off, moved = ((a.double() - b.double()).square().mean(1) for a, b in ((own, lab), (lab, old)))
            rows[kind].append(torch.stack([off, moved]))
    worst = 0.0
    for kind in rows:
        off, moved = torch.cat(rows[kind], 1)
        floor = moved.mean() * ROW_FLOOR**2
        found = float((off / torch.maximum(moved, floor)).nan_to_num(nan=0.0 if not off.any() else math.inf)
                      .max().sqrt())
        worst = max(worst, found if has_before else math.inf)
    return worst, first


def read_blocks(key: str, readers: Sequence[TensorReader]) -> Iterator[list[torch.Tensor]]:
    """Yield a tensor of several checkpoints in blocks of rows, [rows, columns] of each."""
    for offset, shape in _blocks(readers[0].shape(key)):
        yield [reader.read(key, offset, shape).reshape(shape[0] if shape else 1, -1) for reader in readers]


def weights_apart(one: Path, other: Path) -> float:
    """Return |one - other| / |other| over all weights of two checkpoints, or of their adapters."""
    readers = _weights_of(one, other)
    off = size = 0.0
    for key in sorted(readers[1].keys()):
        for a, b in read_blocks(key, readers):
            off += float((a.double() - b.double()).square().sum())
            size += float(b.double().square().sum())
    apart = math.sqrt(off / size) if size else math.inf if off else 0.0
    return math.inf if math.isnan(apart) else apart


def learned_share(adapter: Path) -> float:
    """Return |B| / |A, B| over an adapter's factors: B begins at zero, so they have moved so far at least."""
    [reader], sums = _weights_of(adapter), defaultdict[bool, float](float)
    for key in sorted(reader.keys()):
        for [block] in read_blocks(key, [reader]):
            sums[key.endswith(f".{B}")] += float(block.double().square().sum())
    size = sum(sums.values())
    return math.sqrt(sums[True] / size) if size else 0.0


def _weights_of(*paths: Path) -> list[TensorReader]:
    from megatron_sov.checkpoint.sharded_tensors import TensorReader

    part = checkpoints.MODEL if checkpoints.adapter_base(paths[-1]) is None else checkpoints.ADAPTER
    return [TensorReader(path, part) for path in paths]


def alike(one: Any, other: Any, bound: float) -> bool:
    """Return whether two states are the same but for numbers that are as near as the bound."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key], bound) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(partial(alike, bound=bound), one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=bound, abs_tol=bound)
    return type(one) is type(other) and bool(one == other)


def _state(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / checkpoints.STATE
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({str(e)[:200]}); ask the lab for it again") from None


def read_parts(checkpoint: Path) -> list[str]:
    return sorted(file.name.removesuffix(".index.json") for file in checkpoint.glob("*.index.json"))


def _blocks(shape: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return offset and extent of blocks along the first axis, of which each fits into memory."""
    if not shape:
        return [((), ())]
    rows = max(1, CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))
    return [((first, *(0 for _ in shape[1:])), (min(rows, shape[0] - first), *shape[1:]))
            for first in range(0, shape[0], rows)]


def keep(work: Path, root: str, repeated: Repeated) -> None:
    """Write what came of a segment of a log with that root into the audit's folder."""
    folder = work / repeated.segment.name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULT, asdict(repeated), root)


def kept(work: Path, root: str, segment: Segment) -> Repeated | None:
    """Return what came of a segment; None: it was not repeated yet.

    Raises:
        UserError: the file was changed since, or is of another log.
    """
    file = work / segment.name / RESULT
    if not file.is_file():
        return None
    raw: dict[str, Any] = read_json(file, "name another --work", root)
    return Repeated(Segment(**raw["segment"]), RepeatOutcome(raw["outcome"]), raw["distance"], raw["detail"],
                    raw["bound"], tuple(raw["settings"]), raw["seconds"])
