"""Settings for evaluation during training and for context extension (`extend`) with its needle test."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from megatron_sov.base.settings import (
    AboveZero, ActsWhen, AnyOf, AtLeastOne, Fraction, NotNegative, NotNegativeInt, ProblemCode,
    SettingsProblem, Share, When, find_broken_rules, is_one_of, is_set, is_unset)
from megatron_sov.model.config.bounds import Samples, SeqLen, Steps, Tokens
from megatron_sov.model.config.learning import is_command

NeedleKind = Literal["single", "multi-key"]
Language = Literal["english", "korean", "thai", "code"]
EvalTask = Literal["ppl", "needle", "pairs", "lm"]
PARTS = {"extension": ("long", "rehearsal"), "midtraining": ("trajectories", "long", "replay")}
"""Kind of an `extend` stage -> names allowed in `extend.stages.N.parts`."""


@dataclass(frozen=True)
class NeedleConfig:
    """Needle-in-a-haystack test for context extension."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        # "": the whole class; then conditions for single fields
        "": AnyOf(is_command("extend"), When(
            "evaluate.background.tasks", lambda tasks: "needle" in tasks, "names needle")),
        "train_share train_needles train_questions answer_weight text_weight": is_command("extend"),
        "train_needles train_questions answer_weight text_weight": is_set(".train_share")}

    kinds: tuple[NeedleKind, ...] = ("multi-key",)
    """single: text with one needle; multi-key: also needles with other keys as distractors, after RULER
    (arXiv 2404.06654)."""
    languages: tuple[Language, ...] = ()
    """Haystack languages, in tests and in training. Empty: all languages with text."""
    lengths_tokens: tuple[int, ...] = (4096, 8192)
    """Tested context lengths, in tokens."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.95)
    """Needle positions, from 0 (start) to 1 (end)."""
    samples: int = 20
    """Samples per cell (kind x language x depth x length)."""
    distractor_share: float = 0.25
    """multi-key: context share filled with distractor needles, so that longer contexts have more."""
    train_share: Fraction = 0.1
    """Share of extension samples that are synthetic retrieval documents; keys and values differ from those in
    the test."""
    train_needles: NotNegativeInt = 0
    """Maximum needles per training document. 0: enough to fill `distractor_share` of the document, at least
    12."""
    train_questions: AtLeastOne = 12
    """Maximum questions per training document, each about different needles; needles without a question are
    distractors."""
    answer_weight: AboveZero = 30.0
    """Loss weight for answer words in training documents. If answers contribute only a few per cent to the
    loss, small models stop improving."""
    text_weight: NotNegative = 0.5
    """Loss weight for the other words in training documents. 0: learn answers only."""


@dataclass(frozen=True)
class PartConfig:
    """A part in a stage's samples, with its share."""

    name: Literal["long", "rehearsal", "trajectories", "replay"]
    """long: documents longer than the trained length; rehearsal (extension) and replay (midtraining):
    documents split into pieces with the trained length; trajectories (midtraining): queries with
    solutions."""
    share: AboveZero
    """Share among the stage's samples, without needle documents."""
    blend: dict[str, NotNegative] = field(default_factory=dict)
    """Source name -> weight, as in `data.phases`. NAME@N: documents with at least N tokens; NAME/N: documents
    split into pieces with at most N tokens. Empty: all text sources (long: documents longer than the trained
    length; rehearsal, replay: pieces with the trained length), or all chat sources for trajectories."""


@dataclass(frozen=True)
class ExtendStageConfig:
    """One `extend` stage, executed as a separate run."""

    ACTS_WHEN: ClassVar[ActsWhen] = {"tokens": is_unset(".steps")}

    name: str
    """Phase name in the report. All stages but the last have a folder RUN/stages/<number>-<name>."""
    seq_len: SeqLen
    """Tokens per sample."""
    kind: Literal["extension", "midtraining"] = "extension"
    """Stage kind, which decides its possible `parts`."""
    steps: Steps = 0
    """Optimizer steps before the gate may end the stage. 0: from `tokens`, else `train.steps`."""
    tokens: Tokens = 0
    """Token budget before the gate may end the stage; used if `steps` is 0."""
    max_steps: Steps = 0
    """Optimizer steps after which a stage fails if the gate has not passed. 0: `steps`."""
    blend: dict[str, NotNegative] = field(default_factory=dict)
    """Source name -> weight for samples outside `parts`. Empty: sources by their own share."""
    parts: tuple[PartConfig, ...] = ()
    """Sample parts with fixed shares."""
    global_batch_size: Samples = 0
    """Samples per optimizer step. 0: `train.global_batch_size`."""
    lr: NotNegative = 0.0
    """Peak learning rate. 0: `optim.lr`."""
    rope_theta: NotNegative = 0.0
    """New RoPE base, for models with global attention in all layers. 0: unchanged."""
    yarn_factor: NotNegative = 0.0
    """YaRN's scaling factor for the original context, for models with global attention in all layers. 1: no
    scaling. 0: new / original length, or no scaling if `rope_theta` is set."""
    yarn_original_tokens: NotNegativeInt = 0
    """Original context for YaRN in tokens, if a released config gives another length. 0: the longest context
    trained without YaRN."""


@dataclass(frozen=True)
class GateConfig:
    """Condition that ends an `extend` stage: needle retrieval at the new length, without a worse loss at the
    old length."""

    ACTS_WHEN: ClassVar[ActsWhen] = {"min_accuracy loss_tolerance_nats": is_set(".every_steps")}

    every_steps: NotNegativeInt = 0
    """Optimizer steps between checks. 0: no gate; the stage ends after its `steps`."""
    min_accuracy: Share = 0.9
    """Retrieval accuracy for every kind, language and length, over all depths. A single cell fails if its
    whole confidence interval is below. 0: needles are measured and do not decide."""
    loss_tolerance_nats: Annotated[float, Ge(0)] = 0.05
    """Allowed increase in the held-out loss at the previous length since the first stage began, in nats per
    token."""


@dataclass(frozen=True)
class ExtendConfig:
    """`extend` stages and their gate."""

    ACTS_WHEN: ClassVar[ActsWhen] = {"": is_command("extend")}

    stages: tuple[ExtendStageConfig, ...] = ()
    """Stages in order. Empty: one stage, from `data.phases` and `train`."""
    gate: GateConfig = GateConfig()
    """Condition that ends each stage."""

    def problems(self) -> list[SettingsProblem]:
        """Return every violated rule between the stages' settings."""
        problems = []
        for i, stage in enumerate(self.stages):
            names, allowed = [part.name for part in stage.parts], PARTS[stage.kind]
            shares = sum(part.share for part in stage.parts)
            problems += find_broken_rules(
                stage, f"extend.stages.{i}",
                (stage.name.isprintable() and bool(stage.name.strip()) and "/" not in stage.name
                 and not stage.name.startswith("."), "name", "must be usable as a folder name"),
                (not stage.max_steps or stage.max_steps >= stage.steps, "max_steps",
                 f"must be at least steps = {stage.steps}"),
                (stage.yarn_factor == 0 or stage.yarn_factor >= 1, "yarn_factor", "must be 0 or at least 1"),
                (stage.kind != "midtraining" or "trajectories" in names, "kind",
                 "needs a part named trajectories", "add the part, or use kind extension"))
            rules = [(shares <= 1, f"have shares that add up to {shares:g}; at most 1 is possible"),
                     (len(set(names)) == len(names), f"names a part twice: {', '.join(names)}"),
                     (set(names) <= set(allowed), f"has {', '.join(names)}; a stage of kind {stage.kind} can "
                                                  f"have {', '.join(allowed)}")]
            problems += [SettingsProblem(ProblemCode.RULE, f"extend.stages.{i}.parts", rule)
                         for is_met, rule in rules if not is_met]
        lengths = [stage.seq_len for stage in self.stages]
        if lengths != sorted(lengths):
            problems.append(SettingsProblem(
                ProblemCode.RULE, "extend.stages", f"have lengths {lengths}; a stage must not be shorter "
                "than the stage before"))
        return problems


@dataclass(frozen=True)
class LmEvalConfig:
    """Benchmarks for `lm` in `evaluate.background.tasks` (docs/eval_lm.md)."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "": When("evaluate.background.tasks", lambda tasks: "lm" in tasks, "names lm")}

    tasks: tuple[str, ...] = ()
    """Task and group names."""
    options: tuple[str, ...] = ()
    """Further options of `megatron-sov eval lm`, e.g. ["--task-dir=tasks", "--limit=500"]; the run sets
    --output and --cache."""


@dataclass(frozen=True)
class BackgroundEvalConfig:
    """Evaluation jobs for a run's exports (`train.export_every_checkpoints`), which run during training
    without delaying it."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "where cluster timeout_s max_waiting": is_set(".tasks"), "cluster": is_one_of(".where", "slurm")}

    tasks: tuple[EvalTask, ...] = ()
    """Evaluations for every export. ppl: loss and bits per byte per source on held-out documents; needle: the
    test set up by `needle`; pairs: share of held-out pairs with a likelier chosen response; lm: benchmarks
    set up by `evaluate.lm`. Empty: no evaluations."""
    where: Literal["local", "slurm"] = "local"
    """local: a low-priority CPU process on rank 0's machine; slurm: a separate Slurm job."""
    cluster: str = ""
    """slurm: cluster profile, as for `megatron-sov submit --cluster`."""
    timeout_s: AboveZero = 3600.0
    """Seconds until a task without a result is cancelled, including a job's time in the queue."""
    max_waiting: AtLeastOne = 2
    """Maximum waiting exports, and maximum concurrent jobs; beyond it, the oldest export is skipped."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation for a run."""

    background: BackgroundEvalConfig = BackgroundEvalConfig()
    """Evaluation jobs during training."""
    lm: LmEvalConfig = LmEvalConfig()
    """Benchmarks in these jobs."""
