"""Teacher options for on-policy distillation, in `megatron-sov rl train` and `rl run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Flag
from megatron_sov.model.config.post_training import PolicyConfig
from megatron_sov.post.rl.reward import NO_REWARD
from megatron_sov.rollouts.rows import read_domain

if TYPE_CHECKING:
    from megatron_sov.rollouts.prompts import PromptList  # numpy: not for `--help`

CHECKPOINT_OPTION, URL_OPTION = "--teacher", "--teacher-url"


class TeacherOption(NamedTuple):
    """A value of --teacher or --teacher-url."""

    option: str
    domain: str
    """The teacher scores responses to prompts in this domain; "": in every domain."""
    location: str
    """Path to a checkpoint or run, or server URL."""


@dataclass(frozen=True, kw_only=True)
class ScoringTeacherOptions:
    """Teachers that score the model's responses in on-policy distillation (policy.method=opd or gkd, or
    policy.opd_coeff)."""

    teacher: Annotated[tuple[str, ...], Flag(value="[DOMAIN=]CHECKPOINT|RUN")] = ()
    """Teacher with the model's architecture (any architecture with policy.method=gkd). DOMAIN restricts the
    teacher to prompts with this `domain`. May be repeated."""
    teacher_url: Annotated[tuple[str, ...], Flag(value="[DOMAIN=]URL")] = ()
    """vLLM or `megatron-sov serve` address for a teacher with the model's tokenizer; any size. Repeat it for
    more teachers or for replicas."""

    def parse_teachers(self) -> list[TeacherOption]:
        return [TeacherOption(CHECKPOINT_OPTION, *_split_domain(text)) for text in self.teacher] + [
            TeacherOption(URL_OPTION, *_split_domain(text)) for text in self.teacher_url]


def _split_domain(text: str) -> tuple[str, str]:
    # Search only the text before "://": a URL's query may contain "=".
    domain, sign, _ = text.partition("://")[0].rpartition("=")
    return domain, text[len(domain + sign):]


def check_teachers(options: ScoringTeacherOptions, policy: PolicyConfig, reward: str, file: Path,
                   prompts: PromptList) -> None:
    """Check that the objective learns from the teachers, and that every prompt has a teacher."""
    parts, teachers = policy.parts, options.parse_teachers()
    if policy.learns_distributions:
        _check_single_teacher(teachers)
        return
    if teachers and not parts.opd_coeff:
        first = teachers[0]
        raise UserError(f"{first.option} {first.location}: policy.method = {policy.method} learns from no "
                        "teacher; set policy.method=opd or gkd, or policy.opd_coeff in addition to a reward")
    if parts.opd_coeff and not teachers:
        raise UserError(f"policy.opd_coeff = {parts.opd_coeff:g}: needs a teacher; add --teacher or "
                        "--teacher-url")
    if reward == NO_REWARD and parts.advantage != "none":
        raise UserError(f"--reward {NO_REWARD}: policy.method = {policy.method} learns from rewards; choose "
                        "a reward, or set policy.method=opd")
    domains = {teacher.domain for teacher in teachers}
    for domain in domains:
        _check_one_per_domain([teacher for teacher in teachers if teacher.domain == domain])
    if not teachers or "" in domains:
        return
    for prompt in prompts:
        domain = read_domain(prompt.record)
        if domain not in domains:
            raise UserError(f"--prompts {file}: {prompt.place} has domain {domain!r}, and the teachers have "
                            f"{', '.join(map(repr, sorted(domains)))}; add a teacher for this domain, or a "
                            "teacher without a domain, which scores all other prompts")


def _check_single_teacher(teachers: list[TeacherOption]) -> None:
    """Raise `UserError` unless there is exactly one teacher, a checkpoint for every domain."""
    is_single = len(teachers) == 1
    if is_single and teachers[0].option == CHECKPOINT_OPTION and not teachers[0].domain:
        return
    listed = ", ".join(f"{teacher.option} {teacher.location}" for teacher in teachers) or "there is none"
    raise UserError("policy.method = gkd: learns from exactly one teacher checkpoint, for all prompts "
                    f"({listed}); pass one --teacher CHECKPOINT, or set policy.method=opd")


def _check_one_per_domain(teachers: list[TeacherOption]) -> None:
    """Raise `UserError` if a domain has two teachers; several URLs are replicas of one teacher."""
    if len(teachers) > 1 and any(teacher.option == CHECKPOINT_OPTION for teacher in teachers):
        first, second = teachers[:2]
        raise UserError(f"--teacher {first.location}: {second.option} {second.location} scores the same "
                        "prompts; prefix each with its domain, as math=...")
