"""How a task's answers are sampled and judged: what stands under `metadata.sov` of its YAML file.

A task without samples, reward or environment there is lm-eval's alone: its own prompts and metrics.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import regex

from megatron_sov.errors import UserError, list_problems, nearest
from megatron_sov.eval.suites.own_scorers import OWN_SCORERS
from megatron_sov.generate.request import Sampling
from megatron_sov.plugins.loading import is_reference
from megatron_sov.rewards import patterns
from megatron_sov.rewards.registry import BUILT_IN as REWARDS
from megatron_sov.tools.limits import LIMITS, EpisodeLimits
from megatron_sov.tools.registry import BUILT_IN as ENVIRONMENTS

KEY = "sov"
"""Of a task's metadata."""
Mode = Literal["default", "thinking", "no-thinking"]
METRICS = ("avg", "pass", "cons")
"""Mean reward of the samples; at least one right of k; the majority of k right."""
BOXED = "boxed"
"""A name in place of a pattern: braces in braces are no matter of patterns."""
MOST_SAMPLES = 4096
DESCRIBING = frozenset(("suite", "source", "licence", "release", "items", "prompt_source", "remarks",
                        "fields", "aliases", "group_field", "shots_file", "shots_per_group", "kind"))
"""Keys beside the protocol: what the catalogue and the reading of the data need."""


@dataclass(frozen=True)
class Protocol:
    """The settings of one task."""

    task: str
    """Name of the task, for messages."""
    samples: int = 1
    """Responses to each prompt."""
    temperature: float = 0.0
    """Of the samples; 0: the most probable token."""
    top_p: float = 1.0
    """As in `Sampling`."""
    top_k: int = 0
    """As in `Sampling`."""
    max_tokens: int = 4096
    """Longest response."""
    seed: int = 0
    """Of the samples."""
    k: tuple[int, ...] = ()
    """Sizes of the draws of pass@k and cons@k; empty: 1 and all samples."""
    metrics: tuple[str, ...] = ("avg",)
    """Of `METRICS`."""
    mode: Mode = "default"
    """Of a reasoning model: `enable_thinking` of its chat template, true or false; default: as the template
    has it."""
    reward: str = ""
    """What judges a response: a reward of room `rewards`, FILE.py:NAME, or one of `own_scorers`; empty with
    an environment: its own score counts."""
    reward_settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the reward."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name -> further settings of the reward, where a suite publishes several figures of the same responses;
    their metrics are called NAME:avg@k."""
    right_from: float = 1.0
    """Least reward of a right response, for pass@k, cons@k and `counts`."""
    counts: Literal["reward", "right"] = "reward"
    """What avg@k is the mean of: rewards, or whether they reach `right_from`."""
    extract: str = ""
    """Pattern whose last match's first group is the final answer, given to the reward in place of the
    response; a response without one is wrong.  `boxed`: the last \\boxed{...}.  Empty: the reward reads the
    response itself."""
    row: Mapping[str, str] = field(default_factory=dict)
    """Field that the reward needs -> field of the task's data."""
    row_maker: str = ""
    """Name in `rows.ROW_MAKERS` of what makes such fields where copying is not enough."""
    messages_field: str = ""
    """Field with a whole conversation as JSON, which is the prompt then, framed by the chat template."""
    turns_field: str = ""
    """Field with a list of questions that are asked in one conversation, each behind the answers to those
    before it; every turn is judged as an item, with the conversation up to it."""
    environment: str = ""
    """Tool environment of room `tools` that is played in place of one answer."""
    environment_settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the environment; `${DATA}` stands for the folder of the data."""
    limits: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the limits of an episode; the others are those of `tools.limits` for tests."""
    cluster_field: str = ""
    """Field that items which belong together share: a document that several questions are about, a question
    in several languages.  Standard errors are clustered by it."""
    published_as: str = ""
    """Name of the benchmark among the published figures."""

    def problems(self) -> list[str]:
        """Return one sentence for every rule that these settings break."""
        p = [f"{name} = {value} must be at least {least}" for name, value, least in (
            ("max_tokens", self.max_tokens, 1), ("top_k", self.top_k, 0), ("seed", self.seed, 0))
            if value < least]
        p += [] if 1 <= self.samples <= MOST_SAMPLES else [
            f"samples = {self.samples} must lie from 1 to {MOST_SAMPLES:,}"]
        p += [] if self.temperature >= 0 else [f"temperature = {self.temperature} must not be negative"]
        p += [] if 0 < self.top_p <= 1 else [f"top_p = {self.top_p} must lie in (0, 1]"]
        if self.samples > 1 and not self.temperature:
            p.append(f"samples = {self.samples} at temperature 0 are the same response again and again")
        p += [f"k = {k} must lie from 1 to samples = {self.samples}" for k in self.k
              if not 1 <= k <= self.samples]
        p += [f"metrics has {name!r}, which is none of {', '.join(METRICS)}" for name in self.metrics
              if name not in METRICS]
        p += [] if self.metrics else ["metrics is empty"]
        p += [f"{name} = {value!r} must be one of {', '.join(known)}" for name, value, known in (
            ("mode", self.mode, get_args(Mode)), ("counts", self.counts, ("reward", "right")))
            if value not in known]
        return p + self._problems_of_judging()

    def _problems_of_judging(self) -> list[str]:
        p = []
        known = {*REWARDS, *OWN_SCORERS}
        if self.reward and self.reward not in known and not is_reference(self.reward):
            p.append(f"reward = {self.reward!r} is not known{nearest(self.reward, known)}")
        if not self.reward and not self.environment:
            p.append("neither reward nor environment says how a response is judged")
        if self.environment and self.environment not in ENVIRONMENTS and not is_reference(self.environment):
            p.append(f"environment = {self.environment!r} is not "
                     f"known{nearest(self.environment, ENVIRONMENTS)}")
        if self.turns_field and (self.samples > 1 or self.messages_field or self.environment):
            p.append(f"turns_field = {self.turns_field!r}: a conversation has 1 sample, no messages_field "
                     "and no environment")
        pattern = "" if self.extract == BOXED else self.extract
        if pattern and (wrong := patterns.problem(pattern)):
            p.append(f"extract = {self.extract!r} is no regular expression ({wrong})")
        elif pattern and not regex.compile(self.extract).groups:
            p.append(f"extract = {self.extract!r} must have a group, the answer")
        if self.limits:
            names = {f.name for f in fields(EpisodeLimits)}
            p += [f"limits has {name!r}, which is no limit{nearest(name, names)}" for name in self.limits
                  if name not in names]
            p += self.episode_limits.problems() if set(self.limits) <= names else []
        return p

    @property
    def ks(self) -> tuple[int, ...]:
        """Return the sizes of the draws."""
        return self.k or tuple(sorted({1, self.samples}))

    @property
    def chat_template_kwargs(self) -> dict[str, bool]:
        """Return the variables of the chat template that the mode stands for."""
        return {} if self.mode == "default" else {"enable_thinking": self.mode == "thinking"}

    @property
    def episode_limits(self) -> EpisodeLimits:
        """Return the limits of an episode."""
        return replace(LIMITS["test"], **dict(self.limits))

    @property
    def sampling(self) -> Sampling:
        """Return how tokens are chosen."""
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
        value = doc.get(self.cluster_field) if self.cluster_field else None
        return None if value is None else str(value)

    def as_json(self) -> dict[str, Any]:
        """Return what is stored with each score: sampling, mode, judge, limits, all that the score depends on
        beside prompts and data."""
        sampling = {name: getattr(self, name) for name in (
            "temperature", "top_p", "top_k", "max_tokens", "seed", "samples")}
        return {"sampling": sampling, "mode": self.mode,
                "judge": self.reward or self.environment, "judge_settings": dict(self.reward_settings),
                "agent_limits": asdict(self.episode_limits) if self.environment else None}


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
    if not {"samples", "reward", "environment"} & set(settings):
        return None
    where = f"task {task}: metadata.{KEY}"
    protocol = _made(task, settings, where)
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
    if protocol.environment == "mcp":
        p.append("environment = 'mcp' starts a program")
    for settings in (protocol.reward_settings, *protocol.variants.values()):
        p += [f"reward_settings.{name} says how or where the reward runs; give it on the command line"
              for name in settings if name in _of_operation(protocol.reward)]
    for name, value in protocol.environment_settings.items():
        if isinstance(value, str) and ("/" in value or name == "corpus") and (
                not value.startswith("${DATA}/") or ".." in value.split("/")):
            p.append(f"environment_settings.{name} = {value!r} must lie in ${{DATA}}")
    return p


def _of_operation(reward: str) -> set[str]:
    """Return the settings of a reward that say how it runs, and the address of a judge."""
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
    return _made(protocol.task, settings, f"task {protocol.task}")


_WHOLE = {"samples", "top_k", "max_tokens", "seed"}
_NUMBERS = {"temperature", "top_p", "right_from"}
_LISTS = {"k": int, "metrics": str}
_OBJECTS = {"reward_settings", "variants", "row", "environment_settings", "limits"}


def _made(task: str, settings: Mapping[str, Any], where: str) -> Protocol:
    known = {f.name for f in fields(Protocol)} - {"task"}
    problems = [f"{name!r} is not known{nearest(name, known)}" for name in settings if name not in known]
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        if name in known:
            problem, plain[name] = _typed(name, value)
            problems += [f"{name} = {str(value)[:60]!r} {problem}"] if problem else []
    if problems:
        raise UserError(list_problems(where, problems))
    protocol = Protocol(task, **plain)
    if problems := protocol.problems():
        raise UserError(list_problems(where, problems))
    return protocol


def _typed(name: str, value: Any) -> tuple[str, Any]:
    """Return what is wrong with a setting's type, and the value."""
    if name in _WHOLE:
        return ("" if type(value) is int else "must be a whole number"), value
    if name in _NUMBERS:
        return ("" if type(value) in (int, float) else "must be a number"), value
    if name in _LISTS:
        right = isinstance(value, (list, tuple)) and all(type(part) is _LISTS[name] for part in value)
        return ("" if right else "must be a list"), tuple(value) if right else value
    if name in _OBJECTS:
        right = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        right = right and (name != "variants" or all(isinstance(part, Mapping) for part in value.values()))
        return ("" if right else "must be an object of settings"), value
    return ("" if isinstance(value, str) else "must be text"), value
