"""How a task's answers are sampled and judged: what stands under `metadata.sov` of its YAML file; items of a
task with their answers; and scorers that belong to one benchmark and are no reward of training.

A task without samples, reward or environment there is lm-eval's alone: its own prompts and metrics.
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import SequenceMatcher
from typing import Annotated, Any, Literal

import regex
from annotated_types import Ge, Le, MinLen

from megatron_sov.base.errors import UserError, list_problems
from megatron_sov.base.plugins.loading import is_reference
from megatron_sov.base.settings import (
    AtLeastOne, Bound, Breach, Finite, NotNegativeInt, ProblemCode, SettingsError, SettingsProblem,
    find_broken, find_problems, one_of, parse_nested, read)
from megatron_sov.bench.lm.settings import JudgedSettings
from megatron_sov.chat.marks import as_written
from megatron_sov.infer.request import LENGTH, SampleSeed, Sampling, Temperature, TopP
from megatron_sov.judge.rewards import patterns
from megatron_sov.judge.rewards.registry import BUILT_IN as REWARDS
from megatron_sov.judge.rewards.reward import Row, Score, text_of
from megatron_sov.judge.tools.environment import LIMITS, EpisodeLimits
from megatron_sov.judge.tools.registry import BUILT_IN as ENVIRONMENTS

KEY = "sov"
"""Of a task's metadata."""
Mode = Literal["default", "thinking", "no-thinking"]
Metric = Literal["avg", "pass", "cons"]
"""Mean reward of the samples; at least one right of k; the majority of k right."""
BOXED = "boxed"
"""A name in place of a pattern: braces in braces are no matter of patterns."""
MOST_SAMPLES = 4096
DESCRIBING = frozenset(("suite", "source", "licence", "release", "items", "prompt_source", "remarks",
                        "fields", "aliases", "group_field", "shots_file", "shots_per_group", "kind"))
"""Keys beside the protocol: what the catalogue and the reading of the data need."""


def _bound_of_names(*tables: Mapping[str, Any]) -> Bound:
    among = one_of(lambda: {name for table in tables for name in table})
    return Bound(lambda name: None if not name or is_reference(name) else among.broken(name))


def _no_pattern(text: str) -> Breach | None:
    if text in ("", BOXED):
        return None
    if wrong := patterns.problem(text):
        return ProblemCode.BOUND, f"is no regular expression ({wrong})", ""
    return None if regex.compile(text).groups else (ProblemCode.BOUND, "must have a group, the answer", "")


@dataclass(frozen=True)
class Protocol:
    """The settings of one task."""

    task: str
    """Name of the task, for messages."""
    samples: Annotated[int, Ge(1), Le(MOST_SAMPLES)] = 1
    """Responses to each prompt."""
    temperature: Temperature = 0.0
    """Of the samples; 0: the most probable token."""
    top_p: TopP = 1.0
    """As in `Sampling`."""
    top_k: NotNegativeInt = 0
    """As in `Sampling`."""
    max_tokens: AtLeastOne = 4096
    """Longest response."""
    seed: SampleSeed = 0
    """Of the samples."""
    k: tuple[AtLeastOne, ...] = ()
    """Sizes of the draws of pass@k and cons@k; empty: 1 and all samples."""
    metrics: Annotated[tuple[Metric, ...], MinLen(1)] = ("avg",)
    """What is told of each prompt's samples."""
    mode: Mode = "default"
    """Of a reasoning model: `enable_thinking` of its chat template, true or false; default: as the template
    has it."""
    reward: Annotated[str, _bound_of_names(REWARDS, OWN_SCORERS)] = ""
    """What judges a response: a reward of room `rewards`, FILE.py:NAME, or one of `own_scorers`; empty with
    an environment: its own score counts."""
    reward_settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the reward."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name -> further settings of the reward, where a suite publishes several figures of the same responses;
    their metrics are called NAME:avg@k."""
    right_from: Finite = 1.0
    """Least reward of a right response, for pass@k, cons@k and `counts`."""
    counts: Literal["reward", "right"] = "reward"
    """What avg@k is the mean of: rewards, or whether they reach `right_from`."""
    extract: Annotated[str, Bound(_no_pattern)] = ""
    """Pattern whose last match's first group is the final answer, given to the reward in place of the
    response; a response without one is wrong.  `boxed`: the last \\boxed{...}.  Empty: the reward reads the
    response itself."""
    row: Mapping[str, str] = field(default_factory=dict)
    """Field that the reward needs -> field of the task's data."""
    row_maker: str = ""
    """Name in `folding.ROW_MAKERS` of what makes such fields where copying is not enough."""
    messages_field: str = ""
    """Field with a whole conversation as JSON, which is the prompt then, framed by the chat template."""
    turns_field: str = ""
    """Field with a list of questions that are asked in one conversation, each behind the answers to those
    before it; every turn is judged as an item, with the conversation up to it."""
    environment: Annotated[str, _bound_of_names(ENVIRONMENTS)] = ""
    """Tool environment of `judge.tools` that is played in place of one answer."""
    environment_settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the environment; `${DATA}` stands for the folder of the data."""
    limits: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the limits of an episode; the others are those of `tools.environment` for tests."""
    cluster_field: str = ""
    """Field that items which belong together share: a document that several questions are about, a question
    in several languages.  Standard errors are clustered by it."""
    published_as: str = ""
    """Name of the benchmark among the published figures."""

    def problems(self) -> list[SettingsProblem]:
        """Return every rule between settings that these break."""
        p = [SettingsProblem(ProblemCode.RULE, f"k.{i}", f"must be at most samples = {self.samples}", k)
             for i, k in enumerate(self.k) if k > self.samples]
        p += [problem.below("limits") for problem in find_problems(EpisodeLimits, dict(self.limits))[1]]
        return p + find_broken(
            self, "",
            (self.samples == 1 or self.temperature > 0, "samples",
             "at temperature 0 are the same response again and again"),
            (bool(self.reward or self.environment), "reward",
             "and environment are empty: nothing says how a response is judged"),
            (not self.turns_field or not (self.samples > 1 or self.messages_field or self.environment),
             "turns_field", "asks for a conversation, which has 1 sample, no messages_field and no "
             "environment"))

    @property
    def ks(self) -> tuple[int, ...]:
        return self.k or tuple(sorted({1, self.samples}))

    @property
    def chat_template_kwargs(self) -> dict[str, bool]:
        """Return the variables of the chat template that the mode stands for."""
        return {} if self.mode == "default" else {"enable_thinking": self.mode == "thinking"}

    @property
    def episode_limits(self) -> EpisodeLimits:
        return replace(LIMITS["test"], **dict(self.limits))

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed)

    @property
    def metric_names(self) -> list[str]:
        """Return the names of all metrics, as `avg@64`, `pass@8`, or with variants `loose:avg@1`."""
        names = [f"{metric}@{k}" for metric in self.metrics
                 for k in ((self.samples,) if metric == "avg" else self.ks)]
        by_variant = [f"{variant}:{name}" for variant in self.variants for name in names]
        return by_variant or names

    def cluster(self, doc: Mapping[str, Any]) -> str | None:
        """Return what an item's cluster is called; None: the items are independent."""
        return cluster_of(doc, self.cluster_field)

    def as_json(self) -> dict[str, Any]:
        """Return what is stored with each score: sampling, mode, judge, limits, all that the score depends on
        beside prompts and data."""
        sampling = {name: getattr(self, name) for name in (
            "temperature", "top_p", "top_k", "max_tokens", "seed", "samples")}
        return {"sampling": sampling, "mode": self.mode,
                "judge": self.reward or self.environment, "judge_settings": dict(self.reward_settings),
                "agent_limits": asdict(self.episode_limits) if self.environment else None}


def cluster_of(doc: Any, cluster_field: str | None) -> str | None:
    value = doc.get(cluster_field) if cluster_field else None
    return None if value is None else str(value)


def protocol_of(metadata: Any, task: str, allow_code: bool = False) -> Protocol | None:
    """Return the protocol of a task; None: it is lm-eval's alone.

    Args:
        metadata: of the task's configuration.
        task: its name, for messages.
        allow_code: whether the file may name code to run and addresses to send to, as a user's own may; one
            that came from a stranger may not.

    Raises:
        UserError: a key is not known, has the wrong type or breaks a rule; all of them are named.
    """
    given = metadata.get(KEY) if isinstance(metadata, Mapping) else None
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise UserError(f"task {task}: metadata.{KEY} must be an object of settings")
    settings = {str(name): value for name, value in given.items() if name not in DESCRIBING}
    # metadata that only describe a task leave its protocol to lm-eval
    if not {"samples", "reward", "environment"} & set(settings):
        return None
    where = f"task {task}: metadata.{KEY}"
    protocol = _make(task, settings, where)
    if not allow_code and (problems := _untrusted(protocol)):
        raise UserError(list_problems(where, problems, "pass --allow-task-code if you trust the file"))
    return protocol


def _untrusted(protocol: Protocol) -> list[str]:
    """Return one sentence for all by which a task file would run code, send data or a key away, or read what
    is no data of a benchmark."""
    p = [f"{name} = {value!r} names code to run" for name, value in (
        ("reward", protocol.reward), ("environment", protocol.environment)) if is_reference(value)]
    if protocol.reward in ("composed", "classifier"):
        p.append(f"reward = {protocol.reward!r} loads what its settings name")
    if protocol.environment == "verifiers":
        p.append(f"environment = {protocol.environment!r} starts a program")
    for settings in (protocol.reward_settings, *protocol.variants.values()):
        p += [f"reward_settings.{name} says how or where the reward runs; give it on the command line"
              for name in settings if name in _of_operation(protocol.reward)]
    for name, value in protocol.environment_settings.items():
        # a path elsewhere would have the environment read the user's files for a stranger's task
        if isinstance(value, str) and ("/" in value or name == "corpus") and (
                not value.startswith("${DATA}/") or ".." in value.split("/")):
            p.append(f"environment_settings.{name} = {value!r} must lie in ${{DATA}}")
    return p


def _of_operation(reward: str) -> set[str]:
    if reward not in REWARDS:
        return set()
    module, name = REWARDS[reward]
    made = getattr(importlib.import_module(module), name)
    return {f.name for f in fields(made) if f.metadata.get("operation")} | {"endpoint"}


def changed(protocol: Protocol, changes: Mapping[str, Any]) -> Protocol:
    """Return a protocol with other settings, as a command gives them: fewer samples, another mode, a judge's
    address.  Changes of the reward's settings are added to those that it has; raises as `protocol_of` does.
    """
    settings = {f.name: getattr(protocol, f.name) for f in fields(Protocol) if f.name != "task"}
    for name, value in changes.items():
        before = settings.get(name)
        settings[name] = ({**before, **value} if isinstance(before, Mapping) and isinstance(value, Mapping)
                          else value)
    if "samples" in changes and "k" not in changes:  # draws are no larger than what there is
        settings["k"] = tuple(k for k in protocol.k if k <= changes["samples"])
    return _make(protocol.task, settings, f"task {protocol.task}")


def changed_as_asked(protocol: Protocol, asked: JudgedSettings) -> Protocol:
    changes: dict[str, Any] = {} if asked.mode is None else {"mode": asked.mode}
    if asked.samples is not None:
        changes["samples"] = asked.samples
    if asked.judge:
        changes["reward_settings"] = parse_nested(asked.judge, "--judge")
    return changed(protocol, changes) if changes else protocol


def _make(task: str, settings: Mapping[str, Any], where: str) -> Protocol:
    if "task" in settings:
        raise SettingsError(where, [SettingsProblem(ProblemCode.UNKNOWN, "task", "is told by the task itself",
                                                    way_out="drop it")])
    return read(Protocol, {**settings, "task": task}, where)


Prompt = str | list[dict[str, str]]
"""A text, or messages."""


@dataclass(frozen=True)
class SuiteResponse:
    text: str
    finish_reason: str = ""
    """`stop`, `length`, or how an episode ended."""


@dataclass(frozen=True)
class TaskItem:
    """One question with its answers."""

    doc: Mapping[str, Any]
    prompt: Prompt
    responses: Sequence[SuiteResponse]


@dataclass(frozen=True)
class ItemScores:
    scores: Mapping[str, float]
    """Metric -> value; a metric without enough scored samples is not there."""
    sample_scores: Sequence[float | None]
    """Reward of each sample; None: there is none.  With variants that of the first."""
    failed: str | None
    """Why a sample has no reward; None: all have."""
    num_at_limit: int
    """Samples that the limit of tokens or of turns ended."""


@dataclass(frozen=True)
class Folded:
    items: Sequence[ItemScores]
    metric_names: Sequence[str]
    """All metrics of the protocol, those that no item has among them."""
    judge: Mapping[str, Any] = field(default_factory=dict)
    """Which reward judged: name, version, settings."""


AT_LIMIT = frozenset((LENGTH, "tokens", "turns", "unended"))
"""Finish reasons that are limits and no end of the model's own."""


class Copied:
    """OpenAI-MRCR: how much of the answer is said again, word for word, behind a mark that was asked for.

    The ratio of Python's difflib, as the data's publisher computes it (openai/mrcr, `grade` of its page).
    """

    def score(self, row: Row) -> Score:
        """Return 0 where the response does not begin with the row's `prefix`, else the ratio of what stands
        behind it and behind the prefix of the `answer`.

        Raises:
            Refused: the row has no prefix or answer.
        """
        response = as_written(text_of(row, "response"))
        answer, prefix = text_of(row, "answer"), text_of(row, "prefix")
        if not response.startswith(prefix):
            return Score(0.0, {"prefix": False})
        ratio = SequenceMatcher(None, response.removeprefix(prefix), answer.removeprefix(prefix)).ratio()
        return Score(ratio, {"prefix": True})


@dataclass(frozen=True)
class ShortAnswer:
    """HotpotQA: how many words an answer shares with the known one.

    As in the data's own script (hotpotqa/hotpot, hotpot_evaluate_v1.py): case, punctuation and articles do
    not count, and `yes`, `no` and `noanswer` are right or wrong as a whole.
    """

    exact: bool = False
    """Whether all words have to be the same; else their F1 counts."""

    def score(self, row: Row) -> Score:
        """Return F1 or equality.

        Raises:
            Refused: the row has no answer.
        """
        said, known = (_plain(text_of(row, name)) for name in ("response", "answer"))
        if self.exact or (said != known and {said, known} & {"yes", "no", "noanswer"}):
            return Score(float(said == known), {"extracted": said})
        words, known_words = Counter(said.split()), Counter(known.split())
        shared = (words & known_words).total()
        total = words.total() + known_words.total()
        return Score(2 * shared / total if shared else 0.0, {"extracted": said})


def _plain(answer: str) -> str:
    text = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


OWN_SCORERS: dict[str, type[Any]] = {"mrcr": Copied, "short-answer": ShortAnswer}
"""Name -> scorer."""
