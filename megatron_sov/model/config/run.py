"""A stage of training: every group of settings gathered in `RunConfig`, the rules between them, and reading
them from JSON and from `--set key=value`."""

from __future__ import annotations

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

from megatron_sov.base.errors import UserError, download_dataset, fix_missing, nearest
from megatron_sov.base.hints.removed import SETTINGS as REMOVED_SETTINGS, without_removed
from megatron_sov.base.hints.table import instead_of, note_on, settings_called
from megatron_sov.base.plugins.loading import PluginCode
from megatron_sov.base.settings import (
    ActsWhen, NotNegative, ProblemCode as Kind, SettingsError, SettingsProblem, assign_all, check, fields_of,
    find_broken, hint_below, hints_of, is_none_of, is_set, parse_changes, read)
from megatron_sov.model.config.bounds import MAX_STEPS
from megatron_sov.model.config.data import (
    DataConfig, PhaseConfig, batch_size_at, named_shards, nearest_multiple, phase_steps, phase_tokens,
    ramp_changes)
from megatron_sov.model.config.encoders import MediaConfig
from megatron_sov.model.config.evaluate import EvaluateConfig, ExtendConfig, NeedleConfig
from megatron_sov.model.config.gpu import GpuConfig, quantization_problems, weight_problems
from megatron_sov.model.config.layout import ParallelConfig
from megatron_sov.model.config.learning import BUILT_IN, learns
from megatron_sov.model.config.lora import LoraConfig
from megatron_sov.model.config.model import ModelConfig
from megatron_sov.model.config.post_training import (
    WITH_REFERENCE, DistillationConfig, PolicyConfig, PolicyParts, PreferenceConfig, RolloutConfig)
from megatron_sov.model.config.train import GuardConfig, ObsConfig, OptimConfig, TrainConfig


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned, and the weights of its terms."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "text_coeff loss_per": learns("sft"),
        "audio_weight image_weight": learns("lm", "sft"),
        "audio_weight": is_set("model.audio_tokens"),
        "image_weight": is_set("model.image_tokens"),
        "options": is_none_of(".name", *BUILT_IN)}

    name: str = "lm"
    """lm: next-token cross-entropy (with multi-token prediction where the model has it); sft: cross-entropy
    on responses; preference: pairs or groups of responses, see `preference`; distill: a teacher's
    distribution, see `distillation`; policy: the model's own responses by their rewards, see `policy` and
    `rollout`; or an objective of your own, FILE.py:NAME (docs/own_code.md)."""
    text_coeff: NotNegative = 0.0
    """sft: weight of an auxiliary cross-entropy on plain text, normalised over its own tokens."""
    loss_per: Literal["token", "turn", "sample"] = "token"
    """sft: what counts the same in the loss of responses: every token; every turn of the assistant, by its
    mean; or every sample (conversation), by its mean."""
    audio_weight: NotNegative = 1.0
    """lm, sft: what the loss of a label in `model.audio_tokens` counts; that of text counts 1."""
    image_weight: NotNegative = 1.0
    """Likewise of `model.image_tokens`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of an objective of your own: the arguments that it takes by name."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of one stage of training; saved resolved as RUN/config.json.

    >>> import megatron_sov
    >>> config = megatron_sov.apply_settings(megatron_sov.recipes.get("tiny-qwen3"), ["train.steps=3"])
    >>> config.train.steps, config.model.num_layers
    (3, 4)
    >>> megatron_sov.from_dict(config.to_dict()) == config
    True
    """

    recipe: str
    """Name of the recipe that it came from."""
    model: ModelConfig
    """The architecture."""
    parallel: ParallelConfig = ParallelConfig()
    """The layout."""
    data: DataConfig = DataConfig()
    """Sources, curriculum, packing."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    train: TrainConfig = TrainConfig()
    """The loop."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is learned."""
    preference: PreferenceConfig = PreferenceConfig()
    """What objective `preference` makes of responses that were judged."""
    distillation: DistillationConfig = DistillationConfig()
    """What objective `distill` makes of what a teacher says of the data."""
    rollout: RolloutConfig = RolloutConfig()
    """Rounds of reinforcement learning."""
    policy: PolicyConfig = PolicyConfig()
    """What objective `policy` makes of the responses of these rounds."""
    needle: NeedleConfig = NeedleConfig()
    """The needle suite of `extend`."""
    extend: ExtendConfig = ExtendConfig()
    """Stages and gate of `extend`."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation beside training."""
    obs: ObsConfig = ObsConfig()
    """Trackers."""
    gpu: GpuConfig = GpuConfig()
    """How GPUs are used."""
    guards: GuardConfig = GuardConfig()
    """What watches the run."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adaptation of a frozen model."""
    media: MediaConfig = MediaConfig()
    """Which weights of encoders of pictures and sounds are trained."""
    code: tuple[PluginCode, ...] = ()
    """Code of your own that the settings above name; written by the command."""

    @property
    def documents_of_unit(self) -> int:
        """Documents of a round that share a row: the two of a pair."""
        return 2 if self.policy.learns_preferences and self.preference.method != "grouper" else 1

    @property
    def may_share_prompts(self) -> bool:
        """Whether settings let rows of a round hold a prompt once for all of its responses."""
        return not self.why_prompts_not_shared()

    def why_prompts_not_shared(self) -> list[str]:
        """Return the settings that give each response of a round its own copy of the prompt."""
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
        """Return every rule between settings that this config, whose values lie within their bounds, breaks
        on `num_ranks` processes; empty when it is sound."""
        p = self.model.problems() + self.parallel.problems(self.model, num_ranks)
        p += self.data.problems() + self._phase_problems() + self.train.problems()
        p += self._objective_problems() + self.optim.problems() + self.extend.problems()
        p += self.rollout.problems() + self.policy.problems(self.rollout)
        p += self.gpu.problems(self.model, self.parallel, self.train, self.optim)
        p += self._watching_problems()
        p += quantization_problems(self.train, self.model, self.parallel, self.data.phases)
        p += weight_problems(self.train, self.parallel, self.optim, self.gpu)
        p += self.lora.problems(self.model, self.parallel, self.train, self.optim, self.gpu)
        p += find_broken(
            self, "",
            (not (self.lora.on and self.media.train_encoders), "media.train_encoders",
             "cannot be with lora.rank, which freezes all weights but those of its own adapters",
             "set one of them off"))
        # Last and alone: sizes of batches mean nothing while layout or phases are broken.
        return p or self._batch_problems(num_ranks)

    def _objective_problems(self) -> list[SettingsProblem]:
        """Check what is learned against the model and the objective's name."""
        distillation, preference = self.distillation, self.preference
        name, method, vocab_size = self.objective.name, preference.method, self.model.vocab_size
        return find_broken(
            self, "",
            (not self.gpu.cuda_graphs or name not in ("policy", "preference"), "gpu.cuda_graphs",
             f"cannot be with objective {name}, whose rows share prompts, replay routes or change their "
             "length", "leave it out"),
            (distillation.top_k < vocab_size, "distillation.top_k",
             f"must be below model.vocab_size = {vocab_size}", "0 is the whole vocabulary"),
            (not distillation.other_tokenizer or distillation.top_k > 0, "distillation.other_tokenizer",
             "needs distillation.top_k > 0: of a teacher of another tokenizer its most probable tokens are "
             "kept"),
            *(self._rules_of_round_preferences() if name == "policy" and self.policy.learns_preferences
              else ()),
            (not preference.chosen_coeff or method != "orpo", "preference.chosen_coeff",
             "is not taken: orpo learns chosen responses with a weight of 1 in any case", "leave it out"),
            (not preference.chosen_coeff or method != "grouper", "preference.chosen_coeff",
             "is not taken: groups have no chosen response", "leave it out"))

    def _rules_of_round_preferences(self) -> list[tuple[bool, str, str, str]]:
        """Check what rounds of preferences learn."""
        method, rollout = self.preference.method, self.rollout
        compares = method in WITH_REFERENCE and self.policy.reference == "round"
        return [(method != "kto", "preference.method", "learns single responses, of which rounds have groups",
                 "choose one of pairs, or grouper"),
                (not compares or not rollout.rounds or rollout.steps_per_round > 1, "rollout.steps_per_round",
                 f"must be at least 2: preference.method = {method} would compare the model that begins a "
                 "round with itself", "set it, or policy.reference=run")]

    def _watching_problems(self) -> list[SettingsProblem]:
        """Check guards and evaluations against how the run is trained."""
        guards, jobs, lm = self.guards, self.evaluate.background, self.evaluate.lm
        is_asked, deterministic = "lm" in jobs.tasks, self.train.deterministic
        needs = ("needs train.deterministic = true: without it a sound process need not give the same bits "
                 "twice")
        return find_broken(
            self, "",
            (not guards.probe_every_steps or deterministic, "guards.probe_every_steps", needs),
            (not guards.attribute or deterministic, "guards.attribute", needs),
            (not guards.attribute or guards.skip, "guards.attribute",
             "needs guards.skip = true: it looks at steps that are refused"),
            (not jobs.tasks or self.train.export_every_checkpoints > 0, "evaluate.background.tasks",
             "measure exports, and train.export_every_checkpoints = 0 makes none"),
            (len(set(jobs.tasks)) == len(jobs.tasks), "evaluate.background.tasks", "names a task twice"),
            (jobs.where == "local" or bool(jobs.cluster), "evaluate.background.where",
             "needs evaluate.background.cluster"),
            (not is_asked or bool(lm.tasks), "evaluate.lm.tasks",
             "names none, and evaluate.background.tasks asks for lm"),
            (all(name.strip() and "," not in name for name in lm.tasks), "evaluate.lm.tasks",
             "must be names of tasks, each of its own, without commas"),
            (len(set(lm.tasks)) == len(lm.tasks), "evaluate.lm.tasks", "names a task twice"),
            (all("=" in setting for setting in lm.judge), "evaluate.lm.judge",
             "must have the form key=value"))

    def _phase_problems(self) -> list[SettingsProblem]:
        """Check every phase against what it is trained with: positions of the model,
        rows of the layout, a budget."""
        samples, multiple, tp, cp = (self.train.micro_batch_size, self.parallel.row_multiple,
                                     self.parallel.tp, self.parallel.cp)
        why = f"2 x parallel.cp {cp} x parallel.tp {tp} = {multiple}" if cp > 1 else f"parallel.tp = {tp}"
        p = find_broken(self, "", (
            bool(self.train.steps or self.train.tokens or self.train.epochs
                 or all(phase.tokens for phase in self.data.phases)),
            "train.steps", "needs a token budget",
            "set train.steps, train.epochs, train.tokens or every phase's tokens"))
        for i, phase in enumerate(self.data.phases):
            # a row, which is a micro-batch of whole samples, is cut over the processes that share it
            row = phase.seq_len * samples
            p += find_broken(
                phase, f"data.phases.{i}",
                (row % multiple == 0, "seq_len", f"x train.micro_batch_size {samples} = {row}, the tokens of "
                 f"a row, must be a multiple of {why}"))
        return p + self.position_problems()

    def position_problems(self) -> list[SettingsProblem]:
        """Return phases whose samples are longer than the model's positions."""
        most = self.model.max_position_tokens
        return [dataclasses.replace(problem, fix=f"{problem.key}={most}")
                for i, phase in enumerate(self.data.phases) for problem in find_broken(
            phase, f"data.phases.{i}",
            (phase.seq_len <= most, "seq_len", f"exceeds model.max_position_tokens = {most}",
             f"set it to at most {most}; `megatron-sov extend` trains a model on longer texts"))]

    def _batch_problems(self, num_ranks: int) -> list[SettingsProblem]:
        """Check every batch size that the run will use, and the steps that follow from token budgets."""
        t = self.train
        dp = num_ranks // self.parallel.ranks_per_replica
        unit = t.micro_batch_size * dp
        # Reversed, so that of phases with one size the first is named. All sizes of a ramp have to divide.
        sizes = {batch_size_at(t, phase, step): phase for phase in reversed(self.data.phases)
                 for step in [t.ramp_steps, 0, *ramp_changes(t, phase)]}
        interleaved = self.parallel.vpp > 1
        # Megatron's interleaved schedule takes micro-batches in groups of `pp`.
        unit *= self.parallel.pp if interleaved else 1
        pipeline = f" x parallel.pp {self.parallel.pp}, since parallel.vpp > 1" if interleaved else ""
        multiple = (f"a multiple of train.micro_batch_size {t.micro_batch_size} x data parallel size {dp}"
                    f"{pipeline} = {unit}")
        p = [self._uneven_batch(size, phase, unit, multiple)
             for size, phase in sorted(sizes.items(), key=lambda item: item[0]) if size % unit]
        if (steps := self.num_steps()) > MAX_STEPS:
            p.append(SettingsProblem(Kind.RULE, "train.tokens",
                                     f"the token budgets make {steps:,} steps, which must "
                                     f"be at most {MAX_STEPS:,}",
                                     way_out="ask for fewer tokens, or larger batches"))
        return p

    def _uneven_batch(self, size: int, phase: PhaseConfig, unit: int, multiple: str) -> SettingsProblem:
        """Return the problem of a step of `size` samples, not a multiple of `unit`, with numbers to set."""
        t = self.train
        if size not in (phase.global_batch_size, t.global_batch_size):
            first, increment = t.ramp_from_batch_size, t.ramp_increment
            return SettingsProblem(
                Kind.RULE, "train.ramp_from_batch_size",
                f"with train.ramp_increment = {increment} makes steps of {size} (phase {phase.name}), "
                f"which must be {multiple}", first,
                f"set train.ramp_from_batch_size={nearest_multiple(first, unit)} and "
                f"train.ramp_increment={nearest_multiple(increment, unit)}")
        key = "train.global_batch_size"
        if size == phase.global_batch_size:
            key = f"data.phases.{self.data.phases.index(phase)}.global_batch_size"
        shares = unit // t.micro_batch_size
        micro = next((m for m in range(t.micro_batch_size, 0, -1) if size % (m * shares) == 0), 0)
        smaller = f", or train.micro_batch_size={micro}" if micro else ""
        return SettingsProblem(Kind.RULE, key, f"(phase {phase.name}) must be {multiple}", size,
                               f"set {key}={nearest_multiple(size, unit)}{smaller}",
                               fix=f"{key}={nearest_multiple(size, unit)}")

    def check(self, num_ranks: int = 1) -> None:
        """Raise `SettingsError` listing every value out of its bounds, or else every rule that is broken."""
        problems = check(self) or self.problems(num_ranks)
        if problems:
            raise SettingsError(f"recipe {self.recipe}", problems)

    def num_steps(self) -> int:
        return sum(phase_steps(self.data, self.train))

    def phase_starts(self) -> list[int]:
        """Return the first step (0-based) of each phase."""
        steps = phase_steps(self.data, self.train)
        # Derived, not stored: phases may change on a resume, and nothing may disagree with them.
        return [sum(steps[:i]) for i in range(len(steps))]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` gives back an equal config."""
        # Through JSON: tuples become lists, so a config equals the one that is read back from disk.
        return json.loads(json.dumps(dataclasses.asdict(self)))


RENAMED = {"evaluate.beside": "evaluate.background",
           "evaluate.background.judges": "evaluate.background.tasks", "guards.on_corruption": "guards.on_sdc"}
"""Setting of an earlier version -> what it is called now."""
SWITCHES = (("policy.method", tuple(f"policy.{part.name}" for part in dataclasses.fields(PolicyParts))),
            ("preference.method", ("preference.beta", "preference.simpo_gamma")))
"""A setting that says which method is used, and the numbers that belong to the method: a recipe's are those
of the recipe's method alone."""


def from_dict(raw: dict[str, Any], where: str = "config") -> RunConfig:
    """Build a `RunConfig` from plain values; the rules between them are asked by `RunConfig.problems`.

    Args:
        raw: as JSON has them.
        where: the file that messages begin with.

    Raises:
        SettingsError: unknown settings (with the nearest known one), values of a wrong type or out of bounds.
    """
    return read(RunConfig, without_removed(raw) if isinstance(raw, dict) else raw, where, instead=_instead,
                rules=False)


def _instead(key: str) -> str:
    if key in RENAMED:
        return f"it is called {RENAMED[key]} now"
    if key in REMOVED_SETTINGS:
        return f"it was removed in this version; {REMOVED_SETTINGS[key][1]}"
    last = key.rpartition(".")[2]
    if "." in key and (note := note_on(key)):
        return note
    # A setting of the same group with a similar name is likelier than a setting of that name in another
    # group, but a name that other programs use is no misspelling.
    is_misspelled = "." in key and not settings_called(last) and not note_on(last)
    group: Any = hint_below(RunConfig, key.partition(".")[0]) if is_misspelled else None
    if dataclasses.is_dataclass(group) and nearest(last, fields_of(cast(Any, group))):
        return ""
    found = find_settings(last)
    return f"did you mean {' or '.join(map(repr, found[:4]))}?" if found else instead_of(last)


@cache
def setting_names() -> tuple[str, ...]:
    """Return the name of every setting that has a value of its own, in the order of the fields; those of
    items of lists are left out, since their number is open."""
    return tuple(name for name, _, _ in iter_settings(RunConfig) if ".0." not in name)


def iter_settings(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yield each setting of a class of settings: its name, the class of its field, and whether settings in it
    follow, as of a block that may be off, or of a list, whose first item's settings follow."""
    hints = hints_of(cls)
    for field_name in fields_of(cls):
        name, inner = f"{prefix}{field_name}", hint_below(cls, field_name)
        items = hint_below(inner, "0")
        if dataclasses.is_dataclass(inner):
            if type(None) in get_args(hints[field_name]):  # a block that may be off is a value as well
                yield name, cls, True
            yield from iter_settings(inner, f"{name}.")
        elif dataclasses.is_dataclass(items):
            yield name, cls, True
            yield from iter_settings(items, f"{name}.0.")
        else:
            yield name, cls, False


def find_settings(word: str, groups: Sequence[str] = ()) -> list[str]:
    """Return the settings that a word without a group may mean: those of that name, the nearest to the top
    first, else the one that other programs call so.

    Args:
        word: e.g. "lr".
        groups: of these the settings go first, e.g. "preference".
    """
    found = list(dict.fromkeys(meant.partition("=")[0] for meant in settings_called(word)))
    found = found or [name for name in setting_names() if name.rpartition(".")[2] == word]
    order = {group: place for place, group in enumerate(groups)}
    return sorted(found, key=lambda name: (order.get(name.partition(".")[0], len(order)), name.count(".")))


def correct_setting(word: str, groups: Sequence[str] = ()) -> str:
    """Return the setting that an option or the key of a --set may mean; "": it is a setting, or nothing is
    known.

    Args:
        word: e.g. "learning_rate" or "train.lr".
        groups: see `find_settings`.
    """
    # `optim` is a group here, and the optimizer's name elsewhere
    is_ours = is_setting(word) and not ("." not in word and settings_called(word))
    return "" if is_ours else next(iter(find_settings(word.rpartition(".")[2], groups)), "")


def is_setting(word: str) -> bool:
    """Return whether there is a setting or a group of that name."""
    names = setting_names()
    return bool(word in names or re.search(r"\.\d+(\.|$)", word)) or any(
        name.startswith(f"{word}.") or ("." in name and word.startswith(f"{name}.")) for name in names)


def apply_settings(config: RunConfig, settings: Sequence[str], option: str = "--set") -> RunConfig:
    """Return the config with `key=value` settings applied, e.g. ``train.steps=100`` or
    ``data.phases.0.seq_len=512``.

    `train.tokens` scales all phases.  If a setting changes the method, the numbers of the recipe's method do
    not stay: those that are not set too are the new method's own (`SWITCHES`).  A changed `optim.lr` takes
    `optim.min_lr` along, at the ratio that they had.

    Args:
        config: what is changed.
        settings: the changes.
        option: that they are given by, for sentences.

    Raises:
        SettingsError: see `megatron_sov.base.settings.change`.
    """
    given = parse_changes(settings, option)
    before = config.to_dict()
    raw = assign_all(config, given, option, _instead)
    for switch, numbers in SWITCHES:
        if switch in given and _value(raw, switch) != _value(before, switch):
            room = switch.partition(".")[0]
            own = dataclasses.asdict(type(getattr(config, room))())
            names = [number.partition(".")[2] for number in numbers if number not in given]
            raw[room].update({name: own[name] for name in names})
    _take_min_lr_along(raw, config.optim, given)
    _spread_tokens(raw, config, given)
    return from_dict(raw, option)


def _spread_tokens(raw: dict[str, Any], before: RunConfig, given: Mapping[str, Any]) -> None:
    """Scale the phases to a `train.tokens` that was set, in proportion to the tokens that they had."""
    total = given.get("train.tokens")
    if not isinstance(total, int) or total <= 0:  # 0 leaves the length to others; the rest is no budget
        return
    if "train.steps" not in given:
        raw["train"]["steps"] = 0
    has_own = any(key.startswith("data.phases") for key in given
                  if key == "data.phases" or key.endswith(".tokens"))
    phases = before.data.phases
    if has_own or not (phases[0].tokens or before.train.steps):
        return
    ends = list(accumulate(phase_tokens(before.data, before.train)))
    budgets = [round(total * end / ends[-1]) for end in ends]
    for phase, start, end in zip(raw["data"]["phases"], [0, *budgets], budgets, strict=False):
        phase["tokens"] = max(1, end - start)


def _take_min_lr_along(raw: dict[str, Any], before: OptimConfig, given: Mapping[str, Any]) -> None:
    """Set the rate that a schedule ends at, where only the peak or the schedule was set: a recipe's own ratio
    of the two, or that of `OptimConfig` where the recipe's rate was constant."""
    optim = raw["optim"]
    # what is no rate is told by whoever reads the settings
    lr: Any = optim.get("lr") if isinstance(optim, dict) else None
    if "optim.min_lr" in given or type(lr) not in (int, float) or not 0 < lr <= sys.float_info.max:
        return
    was_constant = before.schedule == "constant" != optim.get("schedule", before.schedule)
    # the same peak keeps the very number: by a ratio it may move in its last digit, and a resumed run differ
    if was_constant or ("optim.lr" in given and lr != before.lr):
        like = OptimConfig() if was_constant else before
        optim["min_lr"] = min(like.min_lr / like.lr * lr, lr)


def _value(raw: dict[str, Any], key: str) -> Any:
    room, _, name = key.partition(".")
    return raw[room].get(name) if isinstance(raw[room], dict) else None


def layout_settings(config: RunConfig) -> list[str]:
    """Return the `key=value` settings with which a model is run at a config's layout and precision."""
    layout = config.to_dict()["parallel"].items()
    return [*(f"parallel.{name}={json.dumps(value)}" for name, value in layout),
            f"train.precision={config.train.precision}"]


def weighted_path(argument: str, said: str) -> tuple[str, float]:
    """Return folder and weight of an argument FOLDER[:weight]; the weight defaults to 1.

    Args:
        argument: what a user wrote; a folder may have a colon in its name.
        said: what a message begins with.

    Raises:
        UserError: there is no such folder, and what follows the last colon is no weight: a number that is not
            negative.
    """
    if Path(argument).exists() or ":" not in argument:
        return argument, 1.0
    path, _, text = argument.rpartition(":")
    try:
        weight = float(text)
    except ValueError:
        raise UserError(f"{said}: does not exist, and {text!r} after the colon is not a weight") from None
    if not 0 <= weight < math.inf:
        raise UserError(f"{said}: the weight must be a number that is not negative")
    return path, weight


def _explain_missing(folder: str) -> str:
    """Return what to pass for an argument of --data that names nothing."""
    parts = folder.split(",")
    if len(parts) > 1 and all(Path(part).exists() for part in parts):
        return "does not exist; write " + " ".join(f"--data {shlex.quote(part)}" for part in parts)
    if Path(f"{folder}.bin").exists() or Path(f"{folder}.idx").exists():
        return ("is Megatron's prefix of an indexed dataset; pass the folder that `sov-data pack` made, or "
                "make one by `sov-data adopt`")
    if not Path(folder).parent.exists() and (hint := download_dataset(folder)):
        return f"does not exist{hint}"
    return "does not exist; check its path (folders of token shards are made by `sov-data pack`)"


def data_paths(data: Sequence[str]) -> dict[str, float]:
    """Return [NAME=]FOLDER -> weight of --data arguments; the weight after the last colon defaults to 1.

    Raises:
        UserError: a folder that does not exist or is given twice, or a weight that is not a number.
    """
    paths: dict[str, float] = {}
    for argument in data:
        path, weight = weighted_path(argument, f"--data {argument}")
        if not path:
            raise UserError(f"--data {argument!r}: names no folder; pass one made by `sov-data pack`")
        folder = named_shards(path)[1]
        if not Path(folder).exists():
            raise UserError(f"--data {path}: {_explain_missing(folder)}", fix_missing(folder, is_data=True))
        if not Path(folder).is_dir():
            raise UserError(f"--data {path}: is a file, and token shards are read; pass a folder made by "
                            f"`sov-data pack --tokenizer DIR --input {shlex.quote(folder)} --output FOLDER` "
                            "(of chats with --format chat, of pairs with --format preference)")
        if folder in (named_shards(other)[1] for other in paths):
            raise UserError(f"--data {path}: is given twice; name it once, with a weight if you like")
        paths[path] = weight
    return paths


# Rounds of reinforcement learning as phases of a curriculum.

def with_rounds(config: RunConfig) -> RunConfig:
    """Return the settings of a run whose phases are its rounds; of settings that have them already, the same.

    Steps follow from the rounds, the row length from the first phase.

    Raises:
        UserError: no rounds are asked for, or no row, or a row does not hold the longest response; or the
            phase has a learning rate of its own.
    """
    rollout, train = config.rollout, config.train
    if rollout.rounds < 1:
        raise UserError(f"rollout.rounds = {rollout.rounds}: there is nothing to train; set it to at least 1")
    phase = config.data.phases[0]
    if phase.lr or phase.rewarm_steps:
        raise UserError(f"data.phases.0 has lr = {phase.lr:g} and rewarm_steps = {phase.rewarm_steps}: "
                        "rounds follow optim.lr and optim.schedule; set these, and leave the phase alone")
    seq_len = phase.seq_len
    pair = config.documents_of_unit
    longest = pair * (rollout.max_prompt_tokens + rollout.max_new_tokens)
    if longest > seq_len:
        what, count = ("pairs of responses", f"{pair} x (") if pair > 1 else ("responses", "")
        most = config.model.max_position_tokens
        raise UserError(f"data.phases.0.seq_len = {seq_len}: a row holds whole {what}, the longest has "
                        f"{count}rollout.max_prompt_tokens {rollout.max_prompt_tokens} + "
                        f"rollout.max_new_tokens {rollout.max_new_tokens}{')' if count else ''} = {longest}; "
                        + (f"the model holds {most} (model.max_position_tokens): lower these two"
                           if longest > most else
                           "make rows longer, leave their length out, or lower these two"))
    phases = tuple(PhaseConfig(f"round-{number:04d}", seq_len=seq_len)
                   for number in range(1, rollout.rounds + 1))
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, phases=phases),
        train=dataclasses.replace(train, steps=rollout.rounds * rollout.steps_per_round, tokens=0))


def with_policies(config: RunConfig) -> RunConfig:
    """Return the settings of a run with rounds whose responses other jobs write by its checkpoints: so many
    stay that they find the policy of each round that they may still write."""
    rollout, train = config.rollout, config.train
    # those inside of a round, and the one at its end
    of_a_round = 1 + (rollout.steps_per_round - 1) // train.checkpoint_every_steps
    # The generator may need a policy `max_staleness` rounds old while the next one is being written.
    needed = (rollout.max_staleness + 2) * of_a_round
    return dataclasses.replace(config, train=dataclasses.replace(
        train, keep_checkpoints=max(train.keep_checkpoints, needed) if train.keep_checkpoints else 0))
