"""Runs `megatron-sov distill`, whose teachers read the data first, and `megatron-sov distill states`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import MANIFEST, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.chat.vocabulary import check_same_tokens
from megatron_sov.commands.train.distill import (
    TEACHER_STATES, DataReader, DistillOptions, DistillStatesOptions, assign_data, find_unread)
from megatron_sov.commands.train.setup.training import TrainingRequest
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.model.config import DistillationConfig, RunConfig, parse_data_paths
from megatron_sov.post.distillation import teacher as teacher_module
from megatron_sov.post.distillation.distill import (
    StoredTeacher, TeacherFactory, check_outputs, measure_teacher)
from megatron_sov.post.distillation.state_files import StateFiles, StateFormat
from megatron_sov.post.distillation.teacher import TeacherReading
from megatron_sov.runs.checkpoints import find_tokenizer_folder
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.launch_environment import is_first_rank
from megatron_sov.train.data.sources import Source, describe_input, open_sources, tokenizer_folder
from megatron_sov.train.guards.gate import GateView
from megatron_sov.train.objectives.objective import get_formats
from megatron_sov.train.stages.stage import Stage


def save_states(options: DistillStatesOptions) -> None:
    """Run the teacher over the documents and print the artifact's size."""
    # states are exact; the most probable tokens are smaller
    state_format = StateFormat(options.dtype, options.top_k, options.temperature)
    reading = TeacherReading(find_target(options.teacher), parse_data_paths(options.data),
                             state_format=state_format)
    teacher_module.write_outputs(reading, options.output, options.settings, options.nproc,
                                 overwrite=options.overwrite, redo=options.redo)
    if not is_first_rank():
        return
    manifest = read_manifest(options.output, TEACHER_STATES)
    size_bytes = sum(record.size_bytes for record in manifest.files.values())
    if options.top_k:
        form = f"with the {options.top_k:,} most probable next tokens"
    else:
        form = f"of hidden size {manifest.content['hidden_size']:,} in {options.dtype}"
    print(f"{options.output}: {manifest.content['num_tokens']:,} tokens {form}, {size_bytes / 1e6:.1f} MB")


def add_teacher(request: TrainingRequest, stage: Stage) -> Stage:
    """Run the teachers on data that no folder of states covers, and open all states."""
    config, options = request.config, request.options
    assert isinstance(options, DistillOptions)
    sources = open_sources(config.data.paths, config.model.vocab_size, get_formats(stage.objective))
    _refuse_views(config, sources)
    if request.start is not None:
        check_same_tokens(tokenizer_folder(sources), find_tokenizer_folder(request.start))
    states: list[Path] = []
    opened: list[StoredTeacher] = []
    # the states of a complete run may have been deleted
    if stage.folder.completion() is None:
        for reader in assign_data(options, config.data.paths):
            if reader.teacher is not None:
                _make_states(request, reader, sources)
            states += reader.states
        if not options.dry_run:
            # opened here to find a mismatch before processes start
            opened.append(StoredTeacher([StateFiles(path, sources) for path in states], config.distillation,
                                        sources, config.model.vocab_size))

    def measure(view: GateView) -> dict[str, Any]:
        return measure_teacher(view, sources, opened[0])

    inputs = tuple(describe_input(TEACHER_STATES, path) for path in states if (path / MANIFEST).is_file())
    return replace(stage, objective=TeacherFactory(stage.objective, opened), sources=tuple(sources),
                   before=measure, after=measure, extra_inputs=inputs)


def _make_states(request: TrainingRequest, reader: DataReader, sources: list[Source]) -> None:
    """Run a teacher on data that no folder of states covers, and check that existing folders come from this
    teacher. Raises `UserError`: the teacher has another vocabulary, a folder is another teacher's, or several
    are missing."""
    config, options, teacher = request.config, request.options, reader.teacher
    assert isinstance(options, DistillOptions) and teacher is not None
    distillation, target = config.distillation, find_target(teacher)
    if target.vocab_size != config.model.vocab_size:
        raise UserError(f"--teacher {teacher}: has {target.vocab_size} token ids, the student "
                        f"model.vocab_size = {config.model.vocab_size}; choose a teacher with the "
                        "student's tokenizer")
    # a folder without manifest is incomplete
    missing = [path for path in reader.states if not (path / MANIFEST).is_file()]
    if len(missing) > 1:
        raise UserError(f"--states {', '.join(map(str, missing))}: do not exist; make all but one with "
                        "`megatron-sov distill states`")
    existing = [path for path in reader.states if path not in missing]
    if is_first_rank():  # hashing a teacher's files takes a while
        _check_teacher_digest(teacher, target, existing)
    data = find_unread(reader.data, existing)
    if not missing or not data:
        return
    # mistakes show before hours of reading
    RunFolder(options.run).enter(config, options.resume)
    for path in existing:
        _check_same_form(options, distillation, StateFiles(path, sources), config.model.vocab_size)
    state_format = StateFormat(options.states_dtype)
    if distillation.top_k:
        state_format = StateFormat(top_k=distillation.top_k, temperature=distillation.temperature)
    # checked above: existing folders have the teacher's digest
    digest = read_manifest(existing[0], TEACHER_STATES).settings["teacher"] if existing else ""
    if options.dry_run:
        print(f"{teacher} would read {', '.join(data)} first, into {missing[0]}")
        return
    reading = TeacherReading(target, data, state_format=state_format, digest=digest)
    teacher_module.write_outputs(reading, missing[0], options.teacher_settings, options.nproc, redo=True)


def _check_same_form(options: DistillOptions, distillation: DistillationConfig, states: StateFiles,
                     vocab_size: int) -> None:
    """Raise `UserError` if existing states cannot be learned together with the states still to be made."""
    check_outputs(states, distillation, vocab_size)
    dtype = states.state_format.dtype
    if not distillation.top_k and dtype != options.states_dtype:
        raise UserError(f"--states-dtype {options.states_dtype}: {states.folder} is in {dtype}, and all "
                        f"folders of a run need one dtype; pass --states-dtype {dtype}")


def _check_teacher_digest(teacher: Path, target: Target, existing: list[Path]) -> None:
    digest = teacher_module.hash_weights(target) if existing else ""
    for path in existing:
        settings = read_manifest(path, TEACHER_STATES).settings
        if settings["teacher"] != digest:
            raise UserError(f"{path}: contains outputs of {settings['teacher_path']}, and --teacher "
                            f"{teacher} is a different model; choose a different --states folder")


def _refuse_views(config: RunConfig, sources: list[Source]) -> None:
    names = {source.name for source in sources}
    for phase in config.data.phases:
        if unknown := [name for name in phase.blend if name not in names]:
            raise UserError(f"data.phases blend {unknown[0]!r}: a teacher reads only packed sources "
                            f"({', '.join(sorted(names))}); blend those")
