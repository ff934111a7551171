"""Teachers of what a model writes itself, as options of `megatron-sov rl train` and `rl run`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Flag
from megatron_sov.chat.vocabulary import find_difference
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import PolicyConfig
from megatron_sov.post.rl.reward import NO_REWARD
from megatron_sov.rollouts.prompts import PromptList
from megatron_sov.rollouts.rows import read_domain
from megatron_sov.runs.checkpoints import check_model_path, hash_checkpoint_files
from megatron_sov.runs.launch_environment import num_ranks

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.post.distillation.distill import LiveTeacher
    from megatron_sov.post.rl.teachers import ScoringTeacher

ELSEWHERE = "serve it (`megatron-sov serve`), and pass --teacher-url"
OF_TRAINING = ("init_std", "mtp_loss_coeff", "router_bias_update_rate", "seq_aux_loss_coeff")
"""Fields of an architecture that no forward pass reads."""


@dataclass(frozen=True, kw_only=True)
class ScoringTeacherOptions:
    """Who reads what the model writes, in on-policy distillation (policy.method=opd or gkd, or
    policy.opd_coeff)."""

    teacher: Annotated[tuple[str, ...], Flag(value="[DOMAIN=]CHECKPOINT|RUN")] = ()
    """A teacher of the model's own architecture (of any, with policy.method=gkd); with DOMAIN of prompts of
    that `domain` alone; may be repeated."""
    teacher_url: Annotated[tuple[str, ...], Flag(value="[DOMAIN=]URL")] = ()
    """A server of vLLM or `megatron-sov serve` with a teacher of any size and the model's tokenizer;
    may be repeated, also for one teacher."""

    def given(self) -> list[tuple[str, str, str]]:
        """Return the option, domain and place of each teacher."""
        return [("--teacher", *_with_domain(text)) for text in self.teacher] + [
            ("--teacher-url", *_with_domain(text)) for text in self.teacher_url]


def _with_domain(text: str) -> tuple[str, str]:
    # behind its scheme an address may have the sign too
    domain, sign, _ = text.partition("://")[0].rpartition("=")
    return domain, text[len(domain + sign):]


def refuse_teachers(args: ScoringTeacherOptions, policy: PolicyConfig, reward: str, file: Path,
                    prompts: PromptList) -> None:
    """Refuse teachers that nothing learns from, and prompts that nobody reads.

    Args:
        args: of the command.
        policy: the settings.
        reward: of --reward.
        file: of --prompts.
        prompts: what it has.

    Raises:
        UserError: there are some, or the run would learn nothing.
    """
    parts, given = policy.parts, args.given()
    if policy.learns_distributions:
        if len(given) != 1 or given[0][:2] != ("--teacher", ""):
            told = ", ".join(f"{option} {place}" for option, _, place in given) or "there is none"
            raise UserError("policy.method = gkd: learns the distributions of one teacher, of a checkpoint "
                            f"that reads all prompts ({told}); pass one --teacher CHECKPOINT, or "
                            "set policy.method=opd")
        return
    if given and not parts.opd_coeff:
        option, _, place = given[0]
        raise UserError(f"{option} {place}: policy.method = {policy.method} learns from no teacher; set "
                        "policy.method=opd or gkd, or policy.opd_coeff beside a reward")
    if parts.opd_coeff and not given:
        raise UserError(f"policy.opd_coeff = {parts.opd_coeff:g}: needs a teacher; add --teacher or "
                        "--teacher-url")
    if reward == NO_REWARD and parts.advantage != "none":
        raise UserError(f"--reward {NO_REWARD}: policy.method = {policy.method} learns from rewards; choose "
                        "one, or set policy.method=opd")
    domains = {domain for _, domain, _ in given}
    for domain in domains:
        own = [(option, place) for option, other, place in given if other == domain]
        if len(own) > 1 and any(option == "--teacher" for option, _ in own):
            raise UserError(f"--teacher {own[0][1]}: {own[1][0]} {own[1][1]} is of the same prompts; give "
                            "each its domain, as math=...")
    for prompt in prompts if given and "" not in domains else ():
        if (domain := read_domain(prompt.record)) not in domains:
            raise UserError(f"--prompts {file}: {prompt.place} is of domain {domain!r}, and the "
                            f"teachers are of {', '.join(map(repr, sorted(domains)))}; add a teacher of it, "
                            "or one without a domain, which reads all others")


def teachers_of(args: ScoringTeacherOptions, config: RunConfig, tokenizer: Path
                ) -> tuple[ScoringTeacher, ...]:
    """Return the teachers, each with what is known of it.

    Raises:
        UserError: one is no checkpoint, of another architecture or of another tokenizer.
    """
    from megatron_sov.post.rl.teachers import ScoringTeacher

    given = args.given()
    urls: dict[str, list[str]] = {}
    for option, domain, place in given:
        if option == "--teacher-url":
            urls.setdefault(domain, []).append(place)
    found = [ScoringTeacher(domain, urls=tuple(places)) for domain, places in urls.items()]
    for option, domain, place in given:
        if option == "--teacher":
            target = _target_of(place)
            _refuse_other_model(place, target, config, tokenizer)
            found.append(ScoringTeacher(domain, target.path, hash_checkpoint_files(target.path)))
    return tuple(sorted(found, key=lambda teacher: teacher.domain))


def live_teacher_of(args: ScoringTeacherOptions, config: RunConfig, tokenizer: Path, nproc: int | None
                    ) -> LiveTeacher | None:
    """Return the teacher whose distributions are learned; None: it is no such run.

    Raises:
        UserError: it is no checkpoint, of another tokenizer, or does not fit beside the student.
    """
    from megatron_sov.post.distillation.distill import LiveTeacher

    if not config.policy.learns_distributions:
        return None
    [(_, _, place)] = args.given()
    target = _target_of(place)
    _refuse_other_tokens(place, target, tokenizer)
    return LiveTeacher(target.path, config, num_ranks(nproc))


def _target_of(place: str) -> Target:
    from megatron_sov.infer.engines.target import find_target

    check_model_path(Path(place), "--teacher ")
    return find_target(Path(place))


def _refuse_other_model(given: str, target: Target, config: RunConfig, tokenizer: Path) -> None:
    if not target.is_hf:
        own, theirs = asdict(config.model), asdict(target.model)
        others = [name for name in own if own[name] != theirs[name] and name not in OF_TRAINING]
        if others:
            raise UserError(f"--teacher {given}: has model.{others[0]} = {theirs[others[0]]}, the run "
                            f"{own[others[0]]}, and its weights take the model's place for a while; "
                            f"{ELSEWHERE}")
    _refuse_other_tokens(given, target, tokenizer)


def _refuse_other_tokens(given: str, target: Target, tokenizer: Path) -> None:
    if target.is_hf:
        raise UserError(f"--teacher {given}: is a Hugging Face folder; make a checkpoint of it with "
                        f"`megatron-sov convert from-hf`, or {ELSEWHERE}")
    if problem := find_difference(target.tokenizer_folder, tokenizer):
        raise UserError(f"--teacher {given}: has another tokenizer than the model, whose tokens it reads "
                        f"({problem}); choose a teacher with the model's tokenizer")
