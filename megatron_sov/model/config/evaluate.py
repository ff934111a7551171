"""Evaluation while a run trains, in the background."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from megatron_sov.base.settings import (
    AboveZero, ActsWhen, AnyOf, AtLeastOne, Fraction, NotNegative, NotNegativeInt, ProblemCode,
    SettingsProblem, Share, When, find_broken, is_one_of, is_set, is_unset)
from megatron_sov.model.config.bounds import Samples, SeqLen, Steps, Tokens
from megatron_sov.model.config.learning import is_command

# The needle suite: what is asked, where, and how often.

NeedleKind = Literal["single", "multi-key"]
Language = Literal["english", "korean", "thai", "code"]


@dataclass(frozen=True)
class NeedleConfig:
    """The needle-in-a-haystack suite that judges a longer context."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "": AnyOf(is_command("extend"), When(
            "evaluate.background.tasks", lambda tasks: "needle" in tasks, "names needle")),
        "train_share train_needles train_questions answer_weight text_weight": is_command("extend"),
        "train_needles train_questions answer_weight text_weight": is_set(".train_share")}

    kinds: tuple[NeedleKind, ...] = ("multi-key",)
    """Whether needles with other keys are in the text, after RULER (arXiv 2404.06654)."""
    languages: tuple[Language, ...] = ()
    """Languages of the text that needles are hidden in, in tests and in training; empty:
    all that there is text of."""
    lengths_tokens: tuple[int, ...] = (4096, 8192)
    """Context lengths to test."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.95)
    """Where the needle stands, 0 = start."""
    samples: int = 20
    """Samples of one cell (kind x language x depth x length)."""
    distractor_share: float = 0.25
    """Part of each context that needles with other keys fill (`multi-key`), so
    that they grow with the length."""
    train_share: Fraction = 0.1
    """Part of the extension's samples that are synthetic retrieval documents,
    with other keys and values than the test's."""
    train_needles: NotNegativeInt = 0
    """Needles of a training document at most; 0: as many as fill `distractor_share` of it,
    and 12 where those are fewer."""
    train_questions: AtLeastOne = 12
    """Questions of a training document at most, each for needles of its own;
    needles that none asks for are distractors."""
    answer_weight: AboveZero = 30.0
    """Loss weight of the words of an answer in training documents.  With a few per cent of the loss on
    answers small models stay on a plateau."""
    text_weight: NotNegative = 0.5
    """Loss weight, in training documents, of the text around needles and of what all needles
    share; 0: answers alone."""


# Context extension and mid-training: stages one after the other, and the gate that ends each of them.

PARTS = {"extension": ("long", "rehearsal"), "midtraining": ("trajectories", "long", "replay")}
"""Kind of a stage -> the parts that its samples may have, beside the rest."""


@dataclass(frozen=True)
class PartConfig:
    """A part of a stage's samples with its share."""

    name: Literal["long", "rehearsal", "trajectories", "replay"]
    """long: documents longer than what was trained on; rehearsal (extension) and replay (midtraining):
    documents in pieces as short as those of the phases before; trajectories (midtraining):
    a query with its solutions."""
    share: AboveZero
    """Part of the stage's samples, needle documents not counted."""
    blend: dict[str, NotNegative] = field(default_factory=dict)
    """Source name -> weight, as in `data.phases`; NAME@N: documents of at least N tokens, NAME/N: documents
    in pieces of at most N.  Empty: long, every text source's documents longer than the trained length;
    rehearsal and replay, every text source in pieces of the trained length; trajectories,
    every source of chats."""


@dataclass(frozen=True)
class ExtendStageConfig:
    """One stage of `extend`, which is a run."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "tokens": is_unset(".steps")}

    name: str
    """Name of the stage: its phase in the report and, but for the last stage, its folder
    RUN/stages/<number>-<name>."""
    seq_len: SeqLen
    """Tokens of one sample."""
    kind: Literal["extension", "midtraining"] = "extension"
    """What the samples are made of: see `parts`."""
    steps: Steps = 0
    """Optimizer steps before the gate may end the stage; 0: from `tokens`, or `train.steps` without those."""
    tokens: Tokens = 0
    """The same as a budget in tokens; used when `steps` is 0."""
    max_steps: Steps = 0
    """Optimizer steps after which a stage whose gate has not passed is given up; 0: `steps`."""
    blend: dict[str, NotNegative] = field(default_factory=dict)
    """Source name -> weight of the samples that no part takes; empty: each source by its own share."""
    parts: tuple[PartConfig, ...] = ()
    """Parts with a share of their own."""
    global_batch_size: Samples = 0
    """Samples of one optimizer step; 0: `train.global_batch_size`."""
    lr: NotNegative = 0.0
    """Peak learning rate; 0: `optim.lr`."""
    rope_theta: NotNegative = 0.0
    """New base of the rotary frequencies, for models whose layers are all global; 0: as it was."""
    yarn_factor: NotNegative = 0.0
    """How far YaRN stretches the original context, for models whose layers are all global; 1: not at all; 0:
    new / original length, or not at all where `rope_theta` changes the base instead."""
    yarn_original_tokens: NotNegativeInt = 0
    """Context that YaRN stretches, where a released config names another one than the lengths give; 0: the
    longest context that was trained without YaRN."""


@dataclass(frozen=True)
class GateConfig:
    """What ends a stage of `extend`: needle retrieval, with the short context as good as it was."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "min_accuracy loss_tolerance_nats scan_tokens max_overlap": is_set(".every_steps")}

    every_steps: NotNegativeInt = 0
    """Optimizer steps between two checks; 0: no gate, a stage ends with its steps."""
    min_accuracy: Share = 0.9
    """Every row of cells (kind, language, length) must reach it, over all depths together, and no single cell
    may lie below it with its whole confidence interval; 0: needles are counted and do not judge."""
    loss_tolerance_nats: Annotated[float, Ge(0)] = 0.05
    """How much the held-out loss at the length before the first stage may rise above what it was there,
    in nats per token."""
    scan_tokens: AtLeastOne = 20_000_000
    """Training tokens of each source that are searched at most for what the gate asks and
    where it hides it."""
    max_overlap: Share = 0.05
    """Part of the held-out text that may be found in the training text before the gate is refused."""


@dataclass(frozen=True)
class ExtendConfig:
    """Stages of `extend` and their gate."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "": is_command("extend")}

    stages: tuple[ExtendStageConfig, ...] = ()
    """Stages in order; empty: one stage as `data.phases` and `train` say."""
    gate: GateConfig = GateConfig()
    """What ends each stage."""

    def problems(self) -> list[SettingsProblem]:
        """Return every broken rule."""
        p = []
        for i, stage in enumerate(self.stages):
            names, known = [part.name for part in stage.parts], PARTS[stage.kind]
            shares = sum(part.share for part in stage.parts)
            p += find_broken(
                stage, f"extend.stages.{i}",
                (stage.name.isprintable() and bool(stage.name.strip()) and "/" not in stage.name
                 and not stage.name.startswith("."), "name", "must be usable as a folder's name"),
                (not stage.max_steps or stage.max_steps >= stage.steps, "max_steps",
                 f"must be at least steps = {stage.steps}"),
                (stage.yarn_factor == 0 or stage.yarn_factor >= 1, "yarn_factor", "must be 0 or at least 1"),
                (stage.kind != "midtraining" or "trajectories" in names, "kind",
                 "needs a part named trajectories", "use kind extension without one"))
            rules = [(shares <= 1, f"has shares whose sum is {shares:g}, and must be at most 1"),
                     (len(set(names)) == len(names), f"names a part twice: {', '.join(names)}"),
                     (set(names) <= set(known), f"has {', '.join(names)}, and a stage of kind "
                                                f"{stage.kind} has parts {', '.join(known)}")]
            p += [SettingsProblem(ProblemCode.RULE, f"extend.stages.{i}.parts", rule) for holds,
                  rule in rules if not holds]
        lengths = [stage.seq_len for stage in self.stages]
        if lengths != sorted(lengths):
            p.append(SettingsProblem(ProblemCode.RULE, "extend.stages",
                                     f"have lengths {lengths}, and a later stage is not "
                                     "shorter than an earlier one"))
        return p


EvalTask = Literal["ppl", "needle", "pairs", "lm"]


@dataclass(frozen=True)
class LmEvalConfig:
    """What `lm` of `evaluate.background.tasks` measures; each setting is that of an option of
    `megatron-sov eval lm` (docs/eval_lm.md)."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "": When("evaluate.background.tasks", lambda tasks: "lm" in tasks, "names lm"),
        "mode": is_set(".apply_chat_template")}

    tasks: tuple[str, ...] = ()
    """Names of tasks and groups (`--tasks`)."""
    task_dirs: tuple[str, ...] = ()
    """Folders with tasks of your own, the first one first (`--task-dir`)."""
    data_dir: str = ""
    """What ${DATA} in a task's data files means (`--data-dir`); empty: nothing."""
    allow_task_code: bool = False
    """Let these folders run code (`--allow-task-code`)."""
    allow_download: bool = False
    """Fetch data of tasks that want it (`--allow-download`); lm-eval's own tasks do."""
    limit: AtLeastOne | None = None
    """Only the first items of each task, so many (`--limit`); null: all."""
    num_fewshot: NotNegativeInt | None = None
    """Examples in front of each item (`--num-fewshot`); null: as the task says."""
    apply_chat_template: bool = False
    """Frame each prompt by the chat template (`--apply-chat-template`)."""
    mode: Literal["thinking", "no-thinking"] | None = None
    """Of a reasoning model (`--mode`); null: the task's."""
    samples: AtLeastOne | None = None
    """Answers to each item of tasks that sample several (`--samples`); null: the task's."""
    judge: tuple[str, ...] = ()
    """`key=value` settings of the reward that judges answers (`--judge`)."""
    batch_size: AtLeastOne | None = None
    """Answers that are written at a time (`--batch-size`); null: as many as `eval lm` takes by itself."""
    max_length_tokens: Annotated[int, Ge(2)] | None = None
    """Longest sequence (`--max-length`); null: the model's."""
    max_gen_tokens: AtLeastOne | None = None
    """Longest answer, where it is to be shorter than the task's own (`--max-new-tokens`)."""
    seed: NotNegativeInt = 0
    """Of samples (`--seed`)."""
    workers: NotNegativeInt = 1
    """Processes that judge answers (`--workers`); 0: one for each core."""


@dataclass(frozen=True)
class BackgroundEvalConfig:
    """Jobs that measure a run's exports (`train.export_every_checkpoints`) during training, without
    delaying it."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "where cluster timeout_s max_waiting": is_set(".tasks"),
        "cluster": is_one_of(".where", "slurm")}

    tasks: tuple[EvalTask, ...] = ()
    """What is measured on every export: ppl (loss and bits per byte of each source on held-out documents),
    needle (the suite that the `needle` settings describe), pairs (the share of held-out pairs whose chosen
    response is likelier than the rejected one), lm (benchmarks, which the `evaluate.lm` settings name).
    Empty: nothing."""
    where: Literal["local", "slurm"] = "local"
    """local: a process on the machine of rank 0, at the lowest priority and without a GPU;
    slurm: a job of its own."""
    cluster: str = ""
    """slurm: profile of the jobs, as for `megatron-sov submit --cluster`."""
    timeout_s: AboveZero = 3600.0
    """Seconds after which a task without a result is given up; a job's time in the queue counts."""
    max_waiting: AtLeastOne = 2
    """Exports that wait for their tasks at most, and jobs at a time; of more the oldest is left out."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation of a run."""

    background: BackgroundEvalConfig = BackgroundEvalConfig()
    """Evaluation beside training."""
    lm: LmEvalConfig = LmEvalConfig()
    """Benchmarks of these evaluations."""
