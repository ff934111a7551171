"""`RunConfig`, the settings of a training stage: rules between groups of settings, reading from JSON and
`--set`."""

import dataclasses
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_args

from megatron_sov.base.errors import UserError, fix_missing, suggest_download, suggest_name
from megatron_sov.base.hints.removed import RENAMED, SETTINGS as REMOVED_SETTINGS, update_settings
from megatron_sov.base.hints.table import explain_key, find_note, translate_to_settings
from megatron_sov.base.plugins.loading import PluginCode
from megatron_sov.base.settings import (
    ActsWhen, NotNegative, ProblemCode as Kind, SettingsError, SettingsProblem, assign_values,
    find_broken_rules, find_declaration_problems, get_field_hints, get_inner_hint, is_none_of, is_set,
    list_fields, parse_changes, parse_percent, parse_settings)
from megatron_sov.model.config.bounds import MAX_STEPS
from megatron_sov.model.config.data import (
    DataConfig, PhaseConfig, batch_size_at, find_ramp_changes, nearest_multiple, phase_steps, phase_tokens,
    split_source_name)
from megatron_sov.model.config.encoders import MediaConfig
from megatron_sov.model.config.evaluate import EvaluateConfig, ExtendConfig, NeedleConfig
from megatron_sov.model.config.gpu import GpuConfig, find_fp8_problems, find_fp8_weight_problems
from megatron_sov.model.config.layout import ParallelConfig
from megatron_sov.model.config.learning import BUILT_IN, has_objective
from megatron_sov.model.config.lora import LoraConfig
from megatron_sov.model.config.model import ModelConfig
from megatron_sov.model.config.post_training import (
    REFERENCE_METHODS, DistillationConfig, PolicyConfig, PolicyParts, PreferenceConfig, RolloutConfig)
from megatron_sov.model.config.train import GuardConfig, ObsConfig, OptimConfig, TrainConfig

MAX_BF16_SUMS = 8
"""Micro-batches whose gradients may add up in bf16: the last is 1/8 of the sum, which rounds to 1/256, so its
gradient keeps 5 of 8 bits."""
SWITCHES = (("policy.method", tuple(f"policy.{part.name}" for part in dataclasses.fields(PolicyParts))),
            ("preference.method", ("preference.beta", "preference.simpo_gamma")))
"""A setting that selects a method, and the numbers that belong to the method. If the method changes, the
recipe's numbers are reset to defaults."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Training objective and its loss weights."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "text_coeff loss_per": has_objective("sft"),
        "audio_weight image_weight": has_objective("lm", "sft"),
        "audio_weight": is_set("model.audio_tokens"),
        "image_weight": is_set("model.image_tokens"),
        "options": is_none_of(".name", *BUILT_IN)}

    name: str = "lm"
    """lm: next-token cross-entropy (plus multi-token prediction if the model has it); sft: cross-entropy on
    responses; preference: chosen and rejected responses, see `preference`; distill: a teacher's distribution,
    see `distillation`; policy: rewards for the model's own responses, see `policy` and `rollout`;
    FILE.py:NAME: your own objective (docs/own_code.md)."""
    text_coeff: NotNegative = 0.0
    """sft: weight for an auxiliary cross-entropy on plain text, averaged over the text's tokens."""
    loss_per: Literal["token", "turn", "sample"] = "token"
    """sft: unit with equal weight in the loss. token: every response token; turn: mean over every assistant
    turn; sample: mean over every conversation."""
    audio_weight: NotNegative = 1.0
    """lm, sft: loss weight for tokens in `model.audio_tokens`; text tokens have weight 1."""
    image_weight: NotNegative = 1.0
    """lm, sft: loss weight for tokens in `model.image_tokens`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for your own objective."""


@dataclass(frozen=True)
class RunConfig:
    """All settings for one training stage; saved resolved as RUN/config.json.

    >>> import megatron_sov
    >>> config = megatron_sov.apply_settings(megatron_sov.recipes.get("tiny-qwen3"), ["train.steps=3"])
    >>> config.train.steps, config.model.num_layers
    (3, 4)
    >>> megatron_sov.from_dict(config.to_dict()) == config
    True
    """

    recipe: str
    """Recipe name."""
    model: ModelConfig
    """Model architecture."""
    parallel: ParallelConfig = ParallelConfig()
    """Parallel layout."""
    data: DataConfig = DataConfig()
    """Sources, curriculum and packing."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate schedule."""
    train: TrainConfig = TrainConfig()
    """Training loop."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Training objective."""
    preference: PreferenceConfig = PreferenceConfig()
    """Preference loss for objective `preference`."""
    distillation: DistillationConfig = DistillationConfig()
    """Distillation loss for objective `distill`."""
    rollout: RolloutConfig = RolloutConfig()
    """Rollouts of reinforcement learning."""
    policy: PolicyConfig = PolicyConfig()
    """Policy loss for objective `policy`."""
    needle: NeedleConfig = NeedleConfig()
    """Needle test of `extend`."""
    extend: ExtendConfig = ExtendConfig()
    """Stages and gate of `extend`."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation during training."""
    obs: ObsConfig = ObsConfig()
    """Trackers."""
    gpu: GpuConfig = GpuConfig()
    """GPU kernels, memory and messages."""
    guards: GuardConfig = GuardConfig()
    """Checks during training."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adaptation for a frozen model."""
    media: MediaConfig = MediaConfig()
    """Image and audio encoder training."""
    code: tuple[PluginCode, ...] = ()
    """Your own code named by other settings; written by the command."""

    @property
    def documents_per_unit(self) -> int:
        """Documents of a round that must share a row: 2 for preference pairs, else 1."""
        return 2 if self.policy.learns_preferences and self.preference.method != "grouper" else 1

    @property
    def may_share_prompts(self) -> bool:
        """Whether the settings allow packed rows of a round to store a prompt once for all its responses."""
        return not self.why_prompts_not_shared()

    def why_prompts_not_shared(self) -> list[str]:
        """Return the settings that force every response of a round to have a separate copy of the prompt."""
        p, train = self.parallel, self.train
        has_other_lengths = p.ep * p.etp > 1 and p.expert_dispatcher != "alltoall"
        reasons = (
            (not self.policy.share_prompts, "policy.share_prompts = false"),
            (p.tp * p.pp * p.cp > 1, f"parallel tp = {p.tp}, pp = {p.pp}, cp = {p.cp}: ranks split each row"),
            (has_other_lengths, f"parallel.expert_dispatcher = {p.expert_dispatcher}: needs equal rows"),
            (self.model.num_mtp_layers > 0, "model.num_mtp_layers > 0: prompt tokens predict further ahead"),
            (train.hidden_dropout > 0, "train.hidden_dropout > 0: copies of a prompt differ"),
            (train.fp8 != "none", f"train.fp8 = {train.fp8}: tokens are quantized in blocks"),
            (self.policy.router_replay, "policy.router_replay = true: each response has its own routes"))
        return [reason for is_broken, reason in reasons if is_broken]

    def problems(self, num_ranks: int = 1) -> list[SettingsProblem]:
        """Return every violated rule between settings for `num_ranks` processes; single values must be within
        bounds."""
        problems = self.model.problems() + self.parallel.problems(self.model, num_ranks)
        problems += self.data.problems() + self._phase_problems() + self.train.problems()
        problems += self._objective_problems() + self.optim.problems() + self.extend.problems()
        problems += self.rollout.problems() + self.policy.problems(self.rollout)
        problems += self.gpu.problems(self.model, self.parallel, self.train, self.optim)
        problems += self._guard_problems()
        problems += find_fp8_problems(self.train, self.model, self.parallel, self.data.phases)
        problems += find_fp8_weight_problems(self.train, self.parallel, self.optim, self.gpu)
        problems += self.lora.problems(self.model, self.parallel, self.train, self.optim, self.gpu)
        problems += find_broken_rules(
            self, "",
            (not (self.lora.on and self.media.train_encoders), "media.train_encoders",
             "cannot be used with lora.rank, which freezes all weights except adapters",
             "set one of them off"))
        # Batch sizes can only be checked with a valid layout and valid phases.
        return problems or self._batch_problems(num_ranks)

    def _objective_problems(self) -> list[SettingsProblem]:
        distillation, preference = self.distillation, self.preference
        name, method, vocab_size = self.objective.name, preference.method, self.model.vocab_size
        return find_broken_rules(
            self, "",
            (not self.gpu.cuda_graphs or name not in ("policy", "preference"), "gpu.cuda_graphs",
             f"cannot be used with objective {name}, whose rows share prompts, replay routes or change "
             "their length", "leave it out"),
            (distillation.top_k < vocab_size, "distillation.top_k",
             f"must be below model.vocab_size = {vocab_size}", "use 0 for the whole vocabulary"),
            *(self._round_preference_rules() if name == "policy" and self.policy.learns_preferences else ()),
            (not preference.chosen_coeff or method != "orpo", "preference.chosen_coeff",
             "has no effect with orpo, which always learns chosen responses with weight 1", "leave it out"),
            (not preference.chosen_coeff or method != "grouper", "preference.chosen_coeff",
             "has no effect with grouper: groups have no chosen response", "leave it out"))

    def _round_preference_rules(self) -> list[tuple[bool, str, str, str]]:
        """Return the rules for `policy.method = preference`, which learns preferences from rounds."""
        method, rollout = self.preference.method, self.rollout
        compares = method in REFERENCE_METHODS and self.policy.reference == "round"
        return [(not compares or not rollout.rounds or rollout.steps_per_round > 1, "rollout.steps_per_round",
                 f"must be at least 2: in the first step of a round, preference.method = {method} compares "
                 "the model with itself", "set it, or policy.reference=run")]

    def _guard_problems(self) -> list[SettingsProblem]:
        """Check guards and background evaluation."""
        guards, jobs, lm = self.guards, self.evaluate.background, self.evaluate.lm
        evaluates_lm, deterministic = "lm" in jobs.tasks, self.train.deterministic
        needs = ("needs train.deterministic = true: otherwise a healthy process may compute different bits "
                 "the second time")
        return find_broken_rules(
            self, "", (not guards.probe_every_steps or deterministic, "guards.probe_every_steps", needs),
            (not jobs.tasks or self.train.export_every_checkpoints > 0, "evaluate.background.tasks",
             "evaluate exports, and train.export_every_checkpoints = 0 writes none"),
            (len(set(jobs.tasks)) == len(jobs.tasks), "evaluate.background.tasks", "names a task twice"),
            (jobs.where == "local" or bool(jobs.cluster), "evaluate.background.where",
             "needs evaluate.background.cluster"),
            (not evaluates_lm or bool(lm.tasks), "evaluate.lm.tasks",
             "is empty, and evaluate.background.tasks names lm"),
            (all(name.strip() and "," not in name for name in lm.tasks), "evaluate.lm.tasks",
             "must be a list with one task name per entry, without commas"),
            (len(set(lm.tasks)) == len(lm.tasks), "evaluate.lm.tasks", "names a task twice"))

    def _phase_problems(self) -> list[SettingsProblem]:
        """Check the token budget, and each phase's row length against layout and positions."""
        samples, multiple, tp, cp = (self.train.micro_batch_size, self.parallel.row_multiple,
                                     self.parallel.tp, self.parallel.cp)
        product = f"2 x parallel.cp {cp} x parallel.tp {tp} = {multiple}" if cp > 1 else f"parallel.tp = {tp}"
        problems = find_broken_rules(self, "", (
            bool(self.train.steps or self.train.tokens or self.train.epochs
                 or all(phase.tokens for phase in self.data.phases)),
            "train.steps", "needs a token budget",
            "set train.steps, train.epochs, train.tokens or every phase's tokens"))
        for i, phase in enumerate(self.data.phases):
            # A row (the samples of a micro-batch) is divided over context and tensor parallel processes.
            row_tokens = phase.seq_len * samples
            problems += find_broken_rules(
                phase, f"data.phases.{i}",
                (row_tokens % multiple == 0, "seq_len", f"x train.micro_batch_size {samples} = {row_tokens} "
                 f"tokens per row must be a multiple of {product}"))
        return problems + self.position_problems()

    def position_problems(self) -> list[SettingsProblem]:
        """Return the phases whose samples are longer than `model.max_position_tokens`."""
        limit = self.model.max_position_tokens
        return [dataclasses.replace(problem, fix=f"{problem.key}={limit}")
                for i, phase in enumerate(self.data.phases) for problem in find_broken_rules(
            phase, f"data.phases.{i}",
            (phase.seq_len <= limit, "seq_len", f"exceeds model.max_position_tokens = {limit}",
             f"set it to at most {limit}; `megatron-sov extend` trains a model on longer texts"))]

    def _batch_problems(self, num_ranks: int) -> list[SettingsProblem]:
        """Check batch sizes in all phases and in the ramp, and the number of steps."""
        t = self.train
        dp = num_ranks // self.parallel.ranks_per_replica
        unit = t.micro_batch_size * dp
        # Reversed, so that the first phase with a batch size is named. Every size of a ramp must divide.
        sizes = {batch_size_at(t, phase, step): phase for phase in reversed(self.data.phases)
                 for step in [t.ramp_steps, 0, *find_ramp_changes(t, phase)]}
        interleaved = self.parallel.vpp > 1
        # Megatron-Core's interleaved schedule processes micro-batches in groups of `pp`.
        unit *= self.parallel.pp if interleaved else 1
        pipeline = f" x parallel.pp {self.parallel.pp} (because parallel.vpp > 1)" if interleaved else ""
        multiple = (f"a multiple of train.micro_batch_size {t.micro_batch_size} x data parallel size {dp}"
                    f"{pipeline} = {unit}")
        problems = [self._uneven_batch(size, phase, unit, multiple)
                    for size, phase in sorted(sizes.items(), key=lambda item: item[0]) if size % unit]
        num_sums = max(sizes) // (t.micro_batch_size * dp)
        problems += find_broken_rules(self.gpu, "gpu", (
            self.gpu.grad_dtype == "fp32" or num_sums <= MAX_BF16_SUMS, "grad_dtype",
            f"adds {num_sums} micro-batches of a step with 8 significant bits, and more than {MAX_BF16_SUMS} "
            "round each other away", "leave it out, or raise train.micro_batch_size"))
        if (steps := self.num_steps()) > MAX_STEPS:
            problems.append(SettingsProblem(
                Kind.RULE, "train.tokens", f"the token budgets give {steps:,} steps; the limit is "
                f"{MAX_STEPS:,}", way_out="set fewer tokens, or larger batches"))
        return problems

    def _uneven_batch(self, size: int, phase: PhaseConfig, unit: int, multiple: str) -> SettingsProblem:
        """Return the problem that batch size `size` is not a multiple of `unit`, with values to set
        instead."""
        t = self.train
        if size not in (phase.global_batch_size, t.global_batch_size):
            first, increment = t.ramp_from_batch_size, t.ramp_increment
            return SettingsProblem(
                Kind.RULE, "train.ramp_from_batch_size",
                f"with train.ramp_increment = {increment} gives a batch size of {size} (phase {phase.name}), "
                f"which must be {multiple}", first,
                f"set train.ramp_from_batch_size={nearest_multiple(first, unit)} and "
                f"train.ramp_increment={nearest_multiple(increment, unit)}")
        key = "train.global_batch_size"
        if size == phase.global_batch_size:
            key = f"data.phases.{self.data.phases.index(phase)}.global_batch_size"
        micro_batches = unit // t.micro_batch_size
        micro = next((m for m in range(t.micro_batch_size, 0, -1) if size % (m * micro_batches) == 0), 0)
        smaller = f", or train.micro_batch_size={micro}" if micro else ""
        return SettingsProblem(Kind.RULE, key, f"(phase {phase.name}) must be {multiple}", size,
                               f"set {key}={nearest_multiple(size, unit)}{smaller}",
                               fix=f"{key}={nearest_multiple(size, unit)}")

    def check(self, num_ranks: int = 1) -> None:
        """Raise `SettingsError` for all values out of bounds, or else for all violated rules."""
        problems = find_declaration_problems(self) or self.problems(num_ranks)
        if problems:
            raise SettingsError(f"recipe {self.recipe}", problems)

    def num_steps(self) -> int:
        return sum(phase_steps(self.data, self.train))

    def phase_starts(self) -> list[int]:
        """Return the first step (from 0) of each phase."""
        steps = phase_steps(self.data, self.train)
        # Computed, not stored: phases may change when a run resumes.
        return [sum(steps[:i]) for i in range(len(steps))]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` restores an equal config."""
        # Convert through JSON, so that tuples become lists as in a config read from disk.
        return json.loads(json.dumps(dataclasses.asdict(self)))


def from_dict(raw: dict[str, Any], where: str = "config") -> RunConfig:
    """Build a `RunConfig` from JSON values; call `RunConfig.problems` to check rules between settings.

    Args:
        raw: nested dicts, lists and numbers.
        where: file or source named in error messages.

    Raises:
        SettingsError: unknown settings (with the nearest known name), wrong types or values out of bounds.
    """
    return parse_settings(RunConfig, update_settings(raw) if isinstance(raw, dict) else raw, where,
                          instead=_suggest_setting, rules=False)


def _suggest_setting(key: str) -> str:
    """Return a hint for the unknown setting `key`: its new name, or similar settings."""
    if key in RENAMED:
        return f"it is now called {RENAMED[key]}"
    if key in REMOVED_SETTINGS:
        return f"it was removed in this version; {REMOVED_SETTINGS[key][1]}"
    last = key.rpartition(".")[2]
    if "." in key and (note := find_note(key)):
        return note
    # A similar name in the same group is likelier than the same name in another group, unless other
    # programs use the name.
    is_misspelled = "." in key and not translate_to_settings(last) and not find_note(last)
    group: Any = get_inner_hint(RunConfig, key.partition(".")[0]) if is_misspelled else None
    if dataclasses.is_dataclass(group) and suggest_name(last, list_fields(cast(Any, group))):
        return ""
    candidates = find_settings(last)
    return f"did you mean {' or '.join(map(repr, candidates[:4]))}?" if candidates else explain_key(last)


@cache
def setting_names() -> tuple[str, ...]:
    """Return the dotted names of all settings in field order, without list items."""
    return tuple(name for name, _, _ in iter_settings(RunConfig) if ".0." not in name)


def iter_settings(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yield (dotted name, the field's class, whether nested settings follow), with settings in optional
    groups and in lists (item 0) after the group or list."""
    hints = get_field_hints(cls)
    for field_name in list_fields(cls):
        name, inner = f"{prefix}{field_name}", get_inner_hint(cls, field_name)
        items = get_inner_hint(inner, "0")
        if dataclasses.is_dataclass(inner):
            if type(None) in get_args(hints[field_name]):  # an optional group can itself be set to null
                yield name, cls, True
            yield from iter_settings(inner, f"{name}.")
        elif dataclasses.is_dataclass(items):
            yield name, cls, True
            yield from iter_settings(items, f"{name}.0.")
        else:
            yield name, cls, False


def find_settings(word: str, groups: Sequence[str] = ()) -> list[str]:
    """Return the settings that a word without a group may mean: names known from other programs, else
    settings with this last part, shallow names first.

    Args:
        word: a setting's last part, or another program's name, such as "lr".
        groups: groups to sort first, e.g. "preference".
    """
    names = list(dict.fromkeys(setting.partition("=")[0] for setting in translate_to_settings(word)))
    names = names or [name for name in setting_names() if name.rpartition(".")[2] == word]
    order = {group: index for index, group in enumerate(groups)}
    return sorted(names, key=lambda name: (order.get(name.partition(".")[0], len(order)), name.count(".")))


def correct_setting(word: str, groups: Sequence[str] = ()) -> str:
    """Return the likeliest setting for an unknown option or `--set` key; "" for a valid setting or without a
    match.

    Args:
        word: e.g. "learning_rate" or "train.lr".
        groups: see `find_settings`.
    """
    # `optim` is a group here, but other programs use it for the optimizer's name.
    means_other = "." not in word and translate_to_settings(word)
    if is_setting(word) and not means_other:
        return ""
    # checkpoint.every_steps may be train.checkpoint_every_steps
    return next(iter(find_settings(word.replace(".", "_"), groups)
                     or find_settings(word.rpartition(".")[2], groups)), "")


def is_setting(word: str) -> bool:
    """Return whether `word` is a setting's or group's dotted name."""
    names = setting_names()
    return bool(word in names or re.search(r"\.\d+(\.|$)", word)) or any(
        name.startswith(f"{word}.") or ("." in name and word.startswith(f"{name}.")) for name in names)


def apply_settings(config: RunConfig, settings: Sequence[str], option: str = "--set") -> RunConfig:
    """Return `config` with `key=value` settings applied, such as ``train.steps=100`` or
    ``data.phases.0.seq_len=512``; error messages name `option`.

    `train.tokens` scales all phases. A new method resets the numbers of the old method that are not set too
    (`SWITCHES`). A new `optim.lr` scales `optim.min_lr` by the same ratio. Raises `SettingsError`: see
    `megatron_sov.base.settings.assign_values`.
    """
    changes = parse_changes(settings, option)
    previous = config.to_dict()
    raw = assign_values(config, changes, option, _suggest_setting)
    _refuse_shares(raw, changes, option)
    for switch, numbers in SWITCHES:
        if switch in changes and _get_value(raw, switch) != _get_value(previous, switch):
            group = switch.partition(".")[0]
            defaults = dataclasses.asdict(type(getattr(config, group))())
            names = [number.partition(".")[2] for number in numbers if number not in changes]
            raw[group].update({name: defaults[name] for name in names})
    _scale_min_lr(raw, config.optim, changes)
    _scale_phase_tokens(raw, config, changes)
    return from_dict(raw, option)


def _refuse_shares(raw: dict[str, Any], changes: Mapping[str, Any], option: str) -> None:
    """Raise `SettingsError` for a share, 0.03 or "3%", of the steps or the learning rate; it writes the
    number."""
    problems = []
    for key, value in changes.items():
        whole = "train.steps" if key.endswith("_steps") else ""
        if key == "optim.min_lr":
            whole = "optim.lr"
        total = _get_value(raw, whole) if whole else 0
        share = parse_percent(value)
        is_share = isinstance(share, float) and share < 1 and (share != value or whole == "train.steps")
        if is_share and isinstance(total, (int, float)) and share * total > 0:
            number = f"{share * total:g}" if whole == "optim.lr" else str(max(1, round(share * total)))
            problems.append(SettingsProblem(
                Kind.TYPE, key, "is a share", value,
                f"{share:g} of {whole} = {total:g} is {number}", value_to_write=number))
    if problems:
        raise SettingsError(option, problems)


def _scale_phase_tokens(raw: dict[str, Any], previous: RunConfig, changes: Mapping[str, Any]) -> None:
    """Divide `train.tokens` over the phases in proportion to their previous tokens."""
    total = changes.get("train.tokens")
    if not isinstance(total, int) or total <= 0:  # 0: no budget; other types are rejected by `from_dict`
        return
    if "train.steps" not in changes:
        raw["train"]["steps"] = 0
    sets_phase_tokens = any(key.startswith("data.phases") for key in changes
                            if key == "data.phases" or key.endswith(".tokens"))
    if sets_phase_tokens or not (previous.data.phases[0].tokens or previous.train.steps):
        return
    ends = list(accumulate(phase_tokens(previous.data, previous.train)))
    budgets = [round(total * end / ends[-1]) for end in ends]
    for phase, start, end in zip(raw["data"]["phases"], [0, *budgets], budgets, strict=False):
        phase["tokens"] = max(1, end - start)


def _scale_min_lr(raw: dict[str, Any], previous: OptimConfig, changes: Mapping[str, Any]) -> None:
    """Scale `optim.min_lr` with a changed `optim.lr` or schedule, by the recipe's ratio (for a constant
    schedule, by that of `OptimConfig`)."""
    optim = raw["optim"]
    # `from_dict` rejects an invalid learning rate later.
    lr: Any = optim.get("lr") if isinstance(optim, dict) else None
    if "optim.min_lr" in changes or type(lr) not in (int, float) or not 0 < lr <= sys.float_info.max:
        return
    was_constant = previous.schedule == "constant" != optim.get("schedule", previous.schedule)
    # An unchanged peak keeps min_lr: scaling could change its last bit, and a resumed run would differ.
    if was_constant or ("optim.lr" in changes and lr != previous.lr):
        reference = OptimConfig() if was_constant else previous
        optim["min_lr"] = min(reference.min_lr / reference.lr * lr, lr)


def _get_value(raw: dict[str, Any], key: str) -> Any:
    group, _, name = key.partition(".")
    return raw[group].get(name) if isinstance(raw[group], dict) else None


def layout_settings(config: RunConfig) -> list[str]:
    """Return `key=value` settings that reproduce a config's layout and precision."""
    layout = config.to_dict()["parallel"].items()
    return [*(f"parallel.{name}={json.dumps(value)}" for name, value in layout),
            f"train.precision={config.train.precision}"]


def split_weight(argument: str, subject: str) -> tuple[str, float]:
    """Split FOLDER[:weight] into folder and weight, 1 by default. FOLDER may contain a colon.

    Args:
        argument: the user's text.
        subject: beginning of error messages.

    Raises:
        UserError: FOLDER does not exist and the text after the last colon is not a number of at least 0.
    """
    if Path(argument).exists() or ":" not in argument:
        return argument, 1.0
    path, _, text = argument.rpartition(":")
    try:
        weight = float(text)
    except ValueError:
        raise UserError(f"{subject}: does not exist, and {text!r} after the colon is not a weight") from None
    if not 0 <= weight < math.inf:
        raise UserError(f"{subject}: the weight must be a number that is not negative")
    return path, weight


def _explain_missing(folder: str) -> str:
    """Return an explanation and fix for a --data folder that does not exist."""
    parts = folder.split(",")
    if len(parts) > 1 and all(Path(part).exists() for part in parts):
        return "does not exist; write " + " ".join(f"--data {shlex.quote(part)}" for part in parts)
    if Path(f"{folder}.idx").exists():
        return "is the prefix of a Megatron indexed dataset; take it over by `sov-data adopt`"
    if not Path(folder).parent.exists() and (hint := suggest_download(folder, is_data=True)):
        return f"does not exist{hint}"
    return "does not exist; check its path (`sov-data pack` writes folders of token shards)"


def parse_data_paths(data: Sequence[str]) -> dict[str, float]:
    """Parse --data arguments into [NAME=]FOLDER -> weight; the weight defaults to 1. Raises `UserError`: a
    folder that does not exist or is given twice, or an invalid weight."""
    paths: dict[str, float] = {}
    for argument in data:
        path, weight = split_weight(argument, f"--data {argument}")
        if not path:
            raise UserError(f"--data {argument!r}: names no folder; pass one made by `sov-data pack`")
        folder = split_source_name(path)[1]
        if not Path(folder).exists():
            raise UserError(f"--data {path}: {_explain_missing(folder)}", fix_missing(folder, is_data=True))
        if not Path(folder).is_dir():
            raise UserError(f"--data {path}: is a file, not a folder of token shards; pass a folder made by "
                            f"`sov-data pack --tokenizer DIR --input {shlex.quote(folder)} --output FOLDER` "
                            "(for chats --format chat, for pairs --format preference)")
        if folder in (split_source_name(other)[1] for other in paths):
            raise UserError(f"--data {path}: is given twice; name it once, with a weight if you like")
        paths[path] = weight
    return paths


def add_rounds(config: RunConfig) -> RunConfig:
    """Return `config` with one phase per round; `train.steps` follows from `rollout`, the row length from the
    first phase. Raises `UserError`: no rounds, a row too short for the longest response, or a phase with its
    own learning rate."""
    rollout, train = config.rollout, config.train
    if rollout.rounds < 1:
        raise UserError(f"rollout.rounds = {rollout.rounds}: nothing to train; set it to at least 1")
    phase = config.data.phases[0]
    if phase.lr or phase.rewarm_steps:
        raise UserError(f"data.phases.0 has lr = {phase.lr:g} and rewarm_steps = {phase.rewarm_steps}: "
                        "rounds use optim.lr and optim.schedule; set these instead")
    seq_len, documents = phase.seq_len, config.documents_per_unit
    longest = documents * (rollout.max_prompt_tokens + rollout.max_new_tokens)
    if longest > seq_len:
        lengths = (f"rollout.max_prompt_tokens {rollout.max_prompt_tokens} + rollout.max_new_tokens "
                   f"{rollout.max_new_tokens}")
        unit = "response"
        if documents > 1:
            unit, lengths = "pair of responses", f"{documents} x ({lengths})"
        limit = config.model.max_position_tokens
        fix = "make rows longer, leave their length out, or lower these two"
        if longest > limit:
            fix = f"the model's limit is model.max_position_tokens = {limit}: lower these two"
        raise UserError(f"data.phases.0.seq_len = {seq_len}: a row must hold a whole {unit}, up to {lengths} "
                        f"= {longest} tokens; {fix}")
    phases = tuple(PhaseConfig(f"round-{number:04d}", seq_len=seq_len)
                   for number in range(1, rollout.rounds + 1))
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, phases=phases),
        train=dataclasses.replace(train, steps=rollout.rounds * rollout.steps_per_round, tokens=0))


def retain_policies(config: RunConfig) -> RunConfig:
    """Return `config` with enough checkpoints kept for generation jobs to find the policy of every round they
    write."""
    rollout, train = config.rollout, config.train
    # Checkpoints inside of a round, and the checkpoint at its end.
    per_round = 1 + (rollout.steps_per_round - 1) // train.checkpoint_every_steps
    # A generation job may need a policy `max_staleness` rounds old while the next checkpoint is written.
    needed = (rollout.max_staleness + 2) * per_round
    return dataclasses.replace(config, train=dataclasses.replace(
        train, keep_checkpoints=max(train.keep_checkpoints, needed) if train.keep_checkpoints else 0))
