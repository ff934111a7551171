"""`megatron-sov distill RECIPE --teacher TEACHER --data DIR[:weight] ... --run DIR [--from CHECKPOINT]`, and
`distill states`."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from megatron_sov.base.artifacts import MANIFEST, manifest_sha256, read_manifest
from megatron_sov.base.errors import ExitCode, Fix, UserError
from megatron_sov.base.settings import (
    AboveZero, Flag, NotNegativeInt, add_options, build_command, read_options)
from megatron_sov.commands.shared_options import OverwriteOptions, RedoOptions
from megatron_sov.commands.train.gate_options import (
    GateOptions, gate_of, is_complete, refuse_unknown_benchmarks)
from megatron_sov.commands.train.setup.stage_options import parse_stage
from megatron_sov.infer.request import RankOptions
from megatron_sov.model.config import DistillationConfig, RunConfig, parse_data_paths
from megatron_sov.model.config.data import split_source_name
from megatron_sov.model.objectives import get_factory
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.checkpoints import check_model_path, find_tokenizer_folder
from megatron_sov.runs.launch_environment import is_first_rank

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.post.distillation.state_files import StateFiles
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.data.token_shards import Source
    from megatron_sov.train.guards.gate import GateView

LENGTHS = ("rollout.rounds", "train.epochs")
"""Settings that say how long a run of rounds is."""
StatesDtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class DistillStatesOptions(PluginOptions, RankOptions, OverwriteOptions, RedoOptions):
    """Have a teacher read token shards, and keep what it says of them."""

    teacher: Annotated[Path, Flag("TEACHER")]
    """Checkpoint, run (its newest one) or Hugging Face folder."""
    data: Annotated[tuple[str, ...], Flag(value="DIR")]
    """Token shards of the teacher's own tokenizer."""
    output: Annotated[Path, Flag(value="DIR")]
    """The artifact; a killed command goes on where it was."""
    dtype: StatesDtype = "bfloat16"
    """Of the states."""
    top_k: Annotated[NotNegativeInt, Flag(value="K")] = 0
    """Keep the most probable tokens and their log-probabilities in the place of states."""
    temperature: Annotated[AboveZero, Flag(value="T")] = 1.0
    """--top-k: what the logits are divided by."""
    other_tokenizer: bool = False
    """The data are of another tokenizer than the teacher's: hear it where tokens of both end at the same
    byte (needs --top-k)."""

def run_states(typed: argparse.Namespace) -> int:
    """Read the documents and print what was kept.

    Raises:
        UserError: the data do not belong to the teacher, or cannot be read.
    """
    args = read_options(DistillStatesOptions, typed)
    load_plugins(args.plugins)
    check_model_path(args.teacher)
    from megatron_sov.base.artifacts import read_manifest
    from megatron_sov.infer.engines.target import find_target
    from megatron_sov.post.distillation.state_files import KIND, StateFormat
    from megatron_sov.post.distillation.teacher import TeacherReading, read_documents

    # states of every token, or its most probable tokens: top-k is smaller, states are exact
    kept = StateFormat(args.dtype, args.top_k, args.temperature, args.other_tokenizer)
    reading = TeacherReading(find_target(args.teacher), parse_data_paths(args.data), kept=kept)
    read_documents(reading, args.output, args.settings, args.nproc, overwrite=args.overwrite,
                   redo=args.redo)
    if is_first_rank():
        manifest = read_manifest(args.output, KIND)
        size_bytes = sum(record.size_bytes for record in manifest.files.values())
        what = (f"with the {args.top_k:,} most probable ones behind each" if args.top_k
                else f"of hidden size {manifest.content['hidden_size']:,} in {args.dtype}")
        print(f"{args.output}: {manifest.content['num_tokens']:,} tokens {what}, {size_bytes / 1e6:.1f} MB")
    return ExitCode.OK


STATES = build_command(DistillStatesOptions, run_states)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """Whose distributions are learned."""

    teacher: Annotated[tuple[str, ...], Flag(value="[NAME=]CHECKPOINT|RUN|HF_DIR")] = ()
    """Learn the distributions of this model, of the same tokenizer unless distillation.other_tokenizer is
    set; with NAME of the data that --data NAME=DIR calls so; may be repeated. Not needed where --states
    has what it said of all data."""
    states_dtype: StatesDtype = "bfloat16"
    """Of the teacher's states, where they are made here."""
    teacher_settings: Annotated[tuple[str, ...], Flag("--teacher-set", "key=value")] = ()
    """The teacher's layout and precision, e.g. --teacher-set parallel.tp=2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillOptions(GateOptions, TeacherOptions):
    """Learn a teacher's distributions."""

    groups: ClassVar[tuple[str, ...]] = ("distillation",)

    states: Annotated[tuple[Path, ...], Flag(value="DIR")] = ()
    """What the teacher says of the data, as `megatron-sov distill states` leaves it; one that is not there
    is made first, of the data that others do not have (default: RUN.states, of a teacher of NAME
    RUN.states.NAME)."""
    top_k: Annotated[int | None, Flag(value="K")] = None
    """Keep the teacher's most probable tokens in the place of its states (--set
    distillation.top_k=...)."""


add_arguments = partial(add_options, cls=DistillOptions)


def run(typed: argparse.Namespace) -> int:
    """Have the teacher read the data, and learn from it; returns 0 when the run is complete."""
    args = read_options(DistillOptions, typed)
    if args.top_k is not None:
        settings = (*args.settings, f"distillation.top_k={args.top_k}")
        args = dataclasses.replace(args, settings=settings)
    if is_complete(args, "distill"):
        return 0
    _refuse_no_teacher(args)
    parsed = parse_stage(args, "distill")
    refuse_unknown_benchmarks(parsed.config)
    if not args.dry_run:
        # a Hugging Face start is converted once, beside the run
        parsed = parsed.with_checkpoint(args.run)
    gate = gate_of(args, parsed.config, parsed.start)
    readers = _readers_of(args, parsed.config.data.paths)

    from megatron_sov.chat.vocabulary import check_same_tokens
    from megatron_sov.post.distillation.distill import (
        Distillation, StoredTeacher, TeacherFactory, measure_teacher)
    from megatron_sov.post.distillation.state_files import KIND, StateFiles
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.data.token_shards import describe_input, open_sources, tokenizer_folder
    from megatron_sov.train.objectives.objective import get_formats
    from megatron_sov.train.stages.stage import Stage, run_stage

    config, folder = parsed.config, RunFolder(args.run)
    made = get_factory(config, Distillation)
    sources = open_sources(config.data.paths, config.model.vocab_size, get_formats(made))
    _refuse_views(config, sources)
    if parsed.start is not None:
        check_same_tokens(tokenizer_folder(sources), find_tokenizer_folder(parsed.start))
    states: list[Path] = []
    # a complete run needs no states any more: they may have been deleted
    if folder.completion() is None:
        for reader in readers:
            if reader.teacher is not None:
                _make_states(args, reader, reader.teacher, config, folder, sources)
            states += reader.states
    read: list[StoredTeacher] = []
    if folder.completion() is None and not args.dry_run:
        # what does not belong together is told before processes start
        read.append(StoredTeacher([StateFiles(path, sources) for path in states], config.distillation,
                                  sources,
                                config.model.vocab_size))

    def after(view: GateView) -> dict[str, Any]:
        return measure_teacher(view, sources, read[0])

    objective = TeacherFactory(made, read)
    run_stage(Stage(config, folder, objective, parsed.start,
                    args.resume, tuple(sources), before=after, after=after, end_gate=gate,
                    faults=parsed.faults, until=args.until, dry_run=args.dry_run,
                    notes=parsed.notes, besides=tuple(
                        describe_input(KIND, path) for path in states if (path / MANIFEST).is_file())),
              args.nproc)
    return 0


def _refuse_no_teacher(args: DistillOptions) -> None:
    """Raise `UserError` where neither a teacher nor what it said is there."""
    if not args.teacher and not args.states:
        raise UserError("--teacher: is missing; name whose distributions are learned, or, where it has read "
                        "the data, what it said (--states)", Fix(options=("--teacher", "TEACHER")))
    for given in args.teacher:
        check_model_path(Path(split_source_name(given)[1]), "--teacher ")
    for path in () if args.teacher else args.states:
        check_model_path(path, "--states ")


@dataclass(frozen=True)
class _DataReader:
    """A teacher, and the data that it reads."""

    teacher: Path | None
    """None: what it said is there, and it is not."""
    data: dict[str, float]
    """[NAME=]folder -> weight."""
    states: tuple[Path, ...]
    """Folders of what it says, which may not be there."""


def _readers_of(args: DistillOptions, paths: dict[str, float]) -> list[_DataReader]:
    """Return who reads what.

    Raises:
        UserError: data have no teacher or two, or a teacher no data.
    """
    if not args.teacher:
        return [_DataReader(None, paths, args.states)]
    given = [split_source_name(text) for text in args.teacher]
    if len(given) == 1 and not given[0][0]:
        usual = args.run.with_name(f"{args.run.name}.states")
        return [_DataReader(Path(given[0][1]), paths, args.states or (usual,))]
    if gone := [path for path in args.states if not (path / MANIFEST).is_file()]:
        raise UserError(f"--states {gone[0]}: is not there; with teachers by NAME leave it out, and it is "
                        "made in RUN.states.NAME, or make it by `megatron-sov distill states`")
    names = [name for name, _ in given]
    found, left = [], dict(paths)
    for number, (name, teacher) in enumerate(given):
        told = f"--teacher {args.teacher[number]}"
        if name in names[:number]:
            raise UserError(f"{told}: another one reads {f'the data {name}' if name else 'what is left'}; "
                            "give each a NAME of --data NAME=DIR")
        own = {path: weight for path, weight in paths.items()
               if (called := split_source_name(path)[0]) == name or (not name and called not in names)}
        if not own:
            raise UserError(f"{told}: there are no data for it among --data {', '.join(paths)}; name them: "
                            f"--data {name or 'NAME'}=DIR")
        for path in own:
            del left[path]
        read = [path for path in args.states if len(_not_read(own, [path])) < len(own)]
        made = args.run.with_name(f"{args.run.name}.states.{name}" if name else f"{args.run.name}.states")
        found.append(_DataReader(Path(teacher), own, (*read, *([made] if _not_read(own, read) else []))))
    if left:
        raise UserError(f"--data {', '.join(left)}: no --teacher reads it; name one without a NAME for all "
                        "that is left")
    return found


def _make_states(args: DistillOptions, reader: _DataReader, teacher: Path, config: RunConfig,
                 folder: RunFolder, sources: list[Source]) -> None:
    """Have a teacher read the data that it has not read, and check that it was this one which has.

    Raises:
        UserError: it knows other tokens, another one has read them, or several folders are not there.
    """
    from megatron_sov.infer.engines.target import find_target
    from megatron_sov.post.distillation.state_files import KIND, StateFiles, StateFormat
    from megatron_sov.post.distillation.teacher import TeacherReading, read_documents

    target = find_target(teacher)
    if target.vocab_size != config.model.vocab_size and not config.distillation.other_tokenizer:
        raise UserError(f"--teacher {teacher}: has {target.vocab_size} token ids, the student "
                        f"model.vocab_size = {config.model.vocab_size}; choose a teacher with as many, "
                        "or, of another tokenizer, pass --set distillation.other_tokenizer=true --top-k 64")
    # only the manifest tells that a folder is complete
    missing = [path for path in reader.states if not (path / MANIFEST).is_file()]
    if len(missing) > 1:
        raise UserError(f"--states {', '.join(map(str, missing))}: are not there; make all but one of them "
                        "by `megatron-sov distill states`")
    made = [path for path in reader.states if path not in missing]
    if is_first_rank():  # to hash a teacher's files takes a while
        _refuse_other_teacher(teacher, target, made)
    data = _not_read(reader.data, made)
    if missing and data:
        # what is wrong is told before hours of reading
        folder.enter(config, args.resume)
        asked = config.distillation
        for path in made:
            _refuse_beside(args, asked, StateFiles(path, sources), config.model.vocab_size)
        kept = (StateFormat(top_k=asked.top_k, temperature=asked.temperature,
                     translated=asked.other_tokenizer) if asked.top_k
                else StateFormat(args.states_dtype))
        # that of the others is this one's: it was compared above
        digest = read_manifest(made[0], KIND).settings["teacher"] if made else ""
        if args.dry_run:
            print(f"{teacher} would read {', '.join(data)} first, into {missing[0]}")
            return
        read_documents(TeacherReading(target, data, kept=kept, digest=digest), missing[0],
                       args.teacher_settings, args.nproc, redo=True)


def _refuse_beside(args: DistillOptions, asked: DistillationConfig, made: StateFiles, vocab_size: int
                   ) -> None:
    """Raise `UserError` where a folder cannot be learned from together with one that is still to be made."""
    from megatron_sov.post.distillation.distill import check_outputs

    check_outputs(made, asked, vocab_size)
    if not asked.top_k and made.kept.dtype != args.states_dtype:
        raise UserError(f"--states-dtype {args.states_dtype}: {made.folder} is in {made.kept.dtype}, and all "
                        f"folders of a run are in one; pass --states-dtype {made.kept.dtype}")


def _refuse_other_teacher(named: Path, target: Target, made: list[Path]) -> None:
    from megatron_sov.post.distillation.state_files import KIND
    from megatron_sov.post.distillation.teacher import hash_weights

    digest = hash_weights(target) if made else ""
    for path in made:
        made_by = read_manifest(path, KIND).settings
        if made_by["teacher"] != digest:
            raise UserError(f"{path}: holds what {made_by['teacher_path']} says of the data, and --teacher "
                            f"{named} is another model; name another --states folder")


def _not_read(paths: dict[str, float], made: list[Path]) -> dict[str, float]:
    """Return the data that none of the folders was made from."""
    from megatron_sov.post.distillation.state_files import KIND

    # by hash: data that were packed again under the same name are other data
    read = {i["manifest_sha256"] for path in made for i in read_manifest(path, KIND).inputs}
    return {path: weight for path, weight in paths.items()
            if manifest_sha256(Path(split_source_name(path)[1])) not in read}


def _refuse_views(config: RunConfig, sources: list[Source]) -> None:
    names = {source.name for source in sources}
    for phase in config.data.phases:
        if other := [name for name in phase.blend if name not in names]:
            raise UserError(f"data.phases blend {other[0]!r}: a teacher reads the sources as they are packed "
                            f"({', '.join(sorted(names))}); blend those")
