"""Options and checks for `megatron-sov distill` and `megatron-sov distill states`."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from megatron_sov.base.artifacts import MANIFEST, manifest_sha256, read_manifest
from megatron_sov.base.errors import Fix, UserError
from megatron_sov.base.settings import AboveZero, DeclaredCommand, Flag, NotNegativeInt
from megatron_sov.commands.shared_options import OverwriteOptions, RedoOptions, check_token_shards
from megatron_sov.commands.train.kinds import CHECK_TRAINING, RUN_TRAINING
from megatron_sov.commands.train.setup.stage_options import StageOptions
from megatron_sov.infer.request import RankOptions
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.data import split_source_name
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.checkpoints import check_model, check_model_path

TEACHER_STATES = "teacher_states"
"""Artifact kind for teacher outputs (`post.distillation.state_files`)."""
StatesDtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class DistillStatesOptions(PluginOptions, RankOptions, OverwriteOptions, RedoOptions):
    """Run a teacher over token shards and save its hidden states, or its most probable tokens."""

    teacher: Annotated[Path, Flag("TEACHER")]
    """Checkpoint, run (newest checkpoint) or Hugging Face folder."""
    data: Annotated[tuple[str, ...], Flag(value="DIR")]
    """Token shards with the teacher's own tokenizer."""
    output: Annotated[Path, Flag(value="DIR")]
    """Artifact to write; a repeated command continues after a kill."""
    dtype: StatesDtype = "bfloat16"
    """Dtype for the states."""
    top_k: Annotated[NotNegativeInt, Flag(value="K")] = 0
    """Save the K most probable tokens and their log-probabilities instead of states."""
    temperature: Annotated[AboveZero, Flag(value="T")] = 1.0
    """--top-k: divisor for the logits."""


def check_states(options: DistillStatesOptions) -> DistillStatesOptions:
    load_plugins(options.plugins)
    check_model(options.teacher, options.settings, options.nproc)
    check_token_shards(options.data)
    return options


STATES = DeclaredCommand(DistillStatesOptions, check_states,
                         "megatron_sov.commands.train.distill_run:save_states")


@dataclass(frozen=True, kw_only=True)
class DistillOptions(StageOptions):
    """Learn a teacher's distributions."""

    stage: ClassVar[str] = "distill"
    groups: ClassVar[tuple[str, ...]] = ("distillation",)

    teacher: Annotated[tuple[str, ...], Flag(value="[NAME=]CHECKPOINT|RUN|HF_DIR")] = ()
    """Teacher model with the student's tokenizer. NAME restricts the teacher to the data from --data
    NAME=DIR; repeat the option for more teachers. Not needed if --states covers all data."""
    states_dtype: StatesDtype = "bfloat16"
    """Dtype for teacher states made by this command."""
    teacher_settings: Annotated[tuple[str, ...], Flag("--teacher-set", "key=value")] = ()
    """The teacher's layout and precision, e.g. --teacher-set parallel.tp=2."""
    states: Annotated[tuple[Path, ...], Flag(value="DIR")] = ()
    """Teacher outputs from `megatron-sov distill states`. If a folder is missing, the command first makes it
    for the uncovered data (default: RUN.states; for a teacher with NAME, RUN.states.NAME)."""
    top_k: Annotated[int | None, Flag(value="K")] = None
    """Learn from the teacher's K most probable tokens instead of its states (--set
    distillation.top_k=...)."""

    def with_implied_settings(self) -> "DistillOptions":
        if self.top_k is None:
            return self
        return dataclasses.replace(self, settings=(*self.settings, f"distillation.top_k={self.top_k}"))

    def check_paths(self) -> None:
        if self.start_from is None and self.recipe is None and not self.configs:
            raise UserError("--from: is missing; pass the student, which learns from --teacher, or a RECIPE "
                            "for a new one", Fix(options=("--from", "CHECKPOINT|RUN|HF_DIR")))
        if not self.teacher and not self.states:
            raise UserError("--teacher: is missing; pass the teacher model, or --states with its outputs for "
                            "the data", Fix(options=("--teacher", "TEACHER")))
        for teacher in self.teacher:
            check_model(Path(split_source_name(teacher)[1]), option="--teacher ")
        if not self.teacher:
            for path in self.states:
                check_model_path(path, "--states ")

    def check_settings(self, config: RunConfig) -> None:
        assign_data(self, config.data.paths)  # raises UserError if data and teachers do not fit


DISTILL = DeclaredCommand(DistillOptions, CHECK_TRAINING, RUN_TRAINING)


@dataclass(frozen=True)
class DataReader:
    """A teacher, the data that it reads, and its stored outputs."""

    teacher: Path | None
    """None: only stored outputs exist."""
    data: dict[str, float]
    """[NAME=]folder -> weight."""
    states: tuple[Path, ...]
    """Folders with outputs of the teacher; may not exist yet."""


def assign_data(options: DistillOptions, paths: Mapping[str, float]) -> list[DataReader]:
    """Assign data to teachers by NAME; a teacher without NAME reads the remaining data. `paths`:
    [NAME=]folder -> weight. Raises `UserError`: data have no teacher or two, or a teacher has no data."""
    if not options.teacher:
        return [DataReader(None, dict(paths), options.states)]
    teachers = [split_source_name(text) for text in options.teacher]
    default_states = options.run.with_name(f"{options.run.name}.states")
    # a single teacher without NAME reads all data
    if len(teachers) == 1 and not teachers[0][0]:
        return [DataReader(Path(teachers[0][1]), dict(paths), options.states or (default_states,))]
    if missing := [path for path in options.states if not (path / MANIFEST).is_file()]:
        raise UserError(f"--states {missing[0]}: does not exist; make it with `megatron-sov distill states`, "
                        "or leave it out: with NAME=TEACHER the command makes RUN.states.NAME")
    names = [name for name, _ in teachers]
    readers, unassigned = [], dict(paths)
    for number, (name, teacher) in enumerate(teachers):
        option = f"--teacher {options.teacher[number]}"
        if name in names[:number]:
            subject = f"the data {name}" if name else "the remaining data"
            raise UserError(f"{option}: another teacher reads {subject}; give every teacher a NAME from "
                            "--data NAME=DIR")
        assigned = {}
        for path, weight in paths.items():
            source = split_source_name(path)[0]
            if source == name or (not name and source not in names):
                assigned[path] = weight
        if not assigned:
            raise UserError(f"{option}: has no data in --data {', '.join(paths)}; pass --data "
                            f"{name or 'NAME'}=DIR")
        for path in assigned:
            del unassigned[path]
        # the folders with outputs for at least one of the teacher's data
        states = [path for path in options.states if len(find_unread(assigned, [path])) < len(assigned)]
        if find_unread(assigned, states):
            states.append(options.run.with_name(f"{default_states.name}.{name}") if name else default_states)
        readers.append(DataReader(Path(teacher), assigned, tuple(states)))
    if unassigned:
        raise UserError(f"--data {', '.join(unassigned)}: no --teacher reads it; add a teacher without NAME "
                        "for the remaining data")
    return readers


def find_unread(paths: Mapping[str, float], states: Sequence[Path]) -> dict[str, float]:
    """Return the entries of `paths` that no folder in `states` covers; the folders must exist."""
    # by hash: repacked data under the same name are different data
    read_hashes = {source["manifest_sha256"] for folder in states
                   for source in read_manifest(folder, TEACHER_STATES).inputs}
    return {path: weight for path, weight in paths.items()
            if manifest_sha256(Path(split_source_name(path)[1])) not in read_hashes}
