"""`megatron-sov distill RECIPE --teacher TEACHER --data DIR[:weight] ... --run DIR [--from CHECKPOINT]`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_sov.base.artifacts import MANIFEST, manifest_sha256, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Flag, add_options, read_options
from megatron_sov.commands.evaluate.benchmarks_beside import refuse_unknown_benchmarks
from megatron_sov.commands.train.distill_states import StatesDtype
from megatron_sov.commands.train.forgetting_gate import GateOptions, gate_of
from megatron_sov.model.config import DistillationConfig, RunConfig
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.launch_environment import is_first
from megatron_sov.train.stages.stage_config import parse_stage, tokenizer_of

if TYPE_CHECKING:
    from megatron_sov.engine.data.token_shards import Source
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.post.distillation.state_files import StateFiles
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.stages.gate import GateView


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """Whose distributions are learned."""

    teacher: Annotated[Path, Flag(value="CHECKPOINT|RUN|HF_DIR")]
    """Learn the distributions of this model, of the same tokenizer unless distillation.other_tokenizer is
    set."""
    states_dtype: StatesDtype = "bfloat16"
    """Of the teacher's states, where they are made here."""
    teacher_settings: Annotated[tuple[str, ...], Flag("--teacher-set", "key=value")] = ()
    """The teacher's layout and precision, e.g. --teacher-set parallel.tp=2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillOptions(GateOptions, TeacherOptions):
    """Learn a teacher's distributions."""

    states: Annotated[tuple[Path, ...], Flag(value="DIR")] = ()
    """What the teacher says of the data, as `megatron-sov distill states` leaves it; one that is not there
    is made first, of the data that others do not have (default: RUN.states)."""
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
    refuse_missing(args.teacher, "--teacher ")
    parsed = parse_stage(args, "distill")
    refuse_unknown_benchmarks(parsed.config)
    if not args.dry_run:
        parsed = parsed.with_checkpoint(args.run)
    gate = gate_of(args, parsed.config, parsed.start)

    from megatron_sov.engine.data.token_shards import open_sources, tokenizer_folder
    from megatron_sov.engine.data.vocabulary import refuse_other_tokens
    from megatron_sov.engine.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.post.distillation.distill import Distillation, KeptTeacher, measure_heldout
    from megatron_sov.post.distillation.state_files import StateFiles
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.stages.stage import Stage, run_stage

    config, folder = parsed.config, RunFolder(args.run)
    sources = open_sources(config.data.paths, config.model.vocab_size)
    _refuse_views(config, sources)
    if parsed.start is not None:
        refuse_other_tokens(tokenizer_folder(sources), tokenizer_of(parsed.start))
    states = args.states or [args.run.with_name(f"{args.run.name}.states")]

    if folder.completion() is None:
        _make_states(args, config, folder, states, sources)
    read: list[KeptTeacher] = []
    if folder.completion() is None and not args.dry_run:
        # what does not belong together is told before processes start
        read.append(KeptTeacher([StateFiles(path, sources) for path in states], config.distillation, sources,
                                config.model.vocab_size))

    def before(view: GateView) -> None:
        measure_heldout(view, sources, read[0])

    def after(view: GateView) -> dict[str, Any]:
        return {"teacher": read[0].teacher,
                "heldout_divergence": measure_heldout(view, sources, read[0])}

    run_stage(Stage(config, folder, lambda context: Distillation(context, read[0]), parsed.start,
                    args.resume, tuple(sources), before=before, after=after, end_gate=gate,
                    faults=parsed.faults, dry_run=args.dry_run),
              args.nproc, typed.began_s)
    return 0


def _make_states(args: DistillOptions, config: RunConfig, folder: RunFolder, states: Sequence[Path],
                 sources: list[Source]) -> None:
    """Have the teacher read the data that it has not read, and check that it was this one which has.

    Raises:
        UserError: it knows other tokens, another one has read them, or several folders are not there.
    """
    from megatron_sov.infer.engines.target import find_target
    from megatron_sov.post.distillation.state_files import KIND, Kept, StateFiles
    from megatron_sov.post.distillation.teacher import TeacherReading, read_documents

    target = find_target(args.teacher)
    if target.vocab_size != config.model.vocab_size and not config.distillation.other_tokenizer:
        raise UserError(f"--teacher {args.teacher}: has {target.vocab_size} token ids, the student "
                        f"model.vocab_size = {config.model.vocab_size}; choose a teacher with as many, "
                        "or, of another tokenizer, pass --set distillation.other_tokenizer=true --top-k 64")
    missing = [path for path in states if not (path / MANIFEST).is_file()]
    if len(missing) > 1:
        raise UserError(f"--states {', '.join(map(str, missing))}: are not there; make all but one of them "
                        "by `megatron-sov distill states`")
    made = [path for path in states if path not in missing]
    if is_first():  # to hash a teacher's files takes a while
        _refuse_other_teacher(args.teacher, target, made)
    data = _not_read(config.data.paths, made)
    if missing and data:
        # what is wrong is told before hours of reading
        folder.enter(config, args.resume)
        asked = config.distillation
        for path in made:
            _refuse_beside(args, asked, StateFiles(path, sources), config.model.vocab_size)
        kept = (Kept(top_k=asked.top_k, temperature=asked.temperature,
                     translated=asked.other_tokenizer) if asked.top_k
                else Kept(args.states_dtype))
        # that of the others is this one's: it was compared above
        digest = read_manifest(made[0], KIND).settings["teacher"] if made else ""
        if args.dry_run:
            print(f"{args.teacher} would read {', '.join(data)} first, into {missing[0]}")
            return
        read_documents(TeacherReading(target, data, kept=kept, digest=digest), missing[0],
                       args.teacher_settings, args.nproc, redo=True)


def _refuse_beside(args: DistillOptions, asked: DistillationConfig, made: StateFiles, vocab_size: int
                   ) -> None:
    """Raise `UserError` where a folder cannot be learned from together with one that is still to be made."""
    from megatron_sov.post.distillation.distill import refuse_other_kept

    refuse_other_kept(made, asked, vocab_size)
    if not asked.top_k and made.kept.dtype != args.states_dtype:
        raise UserError(f"--states-dtype {args.states_dtype}: {made.folder} is in {made.kept.dtype}, and all "
                        f"folders of a run are in one; pass --states-dtype {made.kept.dtype}")


def _refuse_other_teacher(named: Path, target: Target, made: list[Path]) -> None:
    from megatron_sov.post.distillation.state_files import KIND
    from megatron_sov.post.distillation.teacher import weights_digest

    digest = weights_digest(target) if made else ""
    for path in made:
        made_by = read_manifest(path, KIND).settings
        if made_by["teacher"] != digest:
            raise UserError(f"{path}: holds what {made_by['teacher_path']} says of the data, and --teacher "
                            f"{named} is another model; name another --states folder")


def _not_read(paths: dict[str, float], made: list[Path]) -> dict[str, float]:
    """Return the data that none of the folders was made from."""
    from megatron_sov.post.distillation.state_files import KIND

    read = {i["manifest_sha256"] for path in made for i in read_manifest(path, KIND).inputs}
    return {path: weight for path, weight in paths.items() if manifest_sha256(Path(path)) not in read}


def _refuse_views(config: RunConfig, sources: list[Source]) -> None:
    names = {source.name for source in sources}
    for phase in config.data.phases:
        if other := [name for name in phase.blend if name not in names]:
            raise UserError(f"data.phases blend {other[0]!r}: a teacher reads the sources as they are packed "
                            f"({', '.join(sorted(names))}); blend those")
