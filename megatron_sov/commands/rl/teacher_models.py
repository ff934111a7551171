"""Finds the teachers of on-policy distillation and checks that they fit the run."""

from dataclasses import asdict
from pathlib import Path

from megatron_sov.base.errors import UserError
from megatron_sov.chat.vocabulary import find_difference
from megatron_sov.commands.rl.options import CHECKPOINT_OPTION, ScoringTeacherOptions
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.model.config import RunConfig
from megatron_sov.model.families.family import TRAINING_FIELDS
from megatron_sov.post.rl.teachers import ScoringTeacher
from megatron_sov.runs.checkpoints import check_model_path, hash_checkpoint_files

SERVER_HINT = "serve it (`megatron-sov serve`), and pass --teacher-url"


def find_scoring_teachers(options: ScoringTeacherOptions, config: RunConfig, tokenizer: Path
                          ) -> tuple[ScoringTeacher, ...]:
    """Return the teachers that score responses, ordered by domain."""
    urls: dict[str, list[str]] = {}
    teachers = []
    for teacher in options.parse_teachers():
        if teacher.option == CHECKPOINT_OPTION:
            target = _find_checkpoint(teacher.location)
            check_teacher_model(teacher.location, target, config, tokenizer)
            teachers.append(ScoringTeacher(teacher.domain, target.path, hash_checkpoint_files(target.path)))
        else:
            urls.setdefault(teacher.domain, []).append(teacher.location)
    teachers += [ScoringTeacher(domain, urls=tuple(replicas)) for domain, replicas in urls.items()]
    return tuple(sorted(teachers, key=lambda teacher: teacher.domain))


def find_live_teacher(options: ScoringTeacherOptions, tokenizer: Path) -> Path:
    """Return the checkpoint whose distributions the run learns (policy.method=gkd)."""
    [teacher] = options.parse_teachers()
    target = _find_checkpoint(teacher.location)
    _check_tokenizer(teacher.location, target, tokenizer)
    return target.path


def check_teacher_model(location: str, target: Target, config: RunConfig, tokenizer: Path) -> None:
    """Check that a teacher has the run's architecture: its weights temporarily replace the model's."""
    if not target.is_hf:
        model, teacher = asdict(config.model), asdict(target.model)
        different = [name for name in model if model[name] != teacher[name] and name not in TRAINING_FIELDS]
        if different:
            name = different[0]
            raise UserError(f"--teacher {location}: has model.{name} = {teacher[name]}, the run "
                            f"{model[name]}, and its weights temporarily replace the model's; {SERVER_HINT}")
    _check_tokenizer(location, target, tokenizer)


def _find_checkpoint(location: str) -> Target:
    check_model_path(Path(location), "--teacher ")
    return find_target(Path(location))


def _check_tokenizer(location: str, target: Target, tokenizer: Path) -> None:
    if target.is_hf:
        raise UserError(f"--teacher {location}: is a Hugging Face folder; convert it with `megatron-sov "
                        f"convert from-hf`, or {SERVER_HINT}")
    if problem := find_difference(target.tokenizer_folder, tokenizer):
        raise UserError(f"--teacher {location}: has a different tokenizer than the model ({problem}); choose "
                        "a teacher with the model's tokenizer")
