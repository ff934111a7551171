"""Which rewards there are, by name, and how one is made from settings."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins import registry
from megatron_sov.base.plugins.loading import LoadedPlugin
from megatron_sov.base.plugins.registry import PluginRequest, Registry, check_methods
from megatron_sov.judge.rewards.composed import Composed
from megatron_sov.judge.rewards.reward import REWARDS, Refused, Row, Score, get_text
from megatron_sov.judge.rewards.version import collect_settings, compute_version

BUILT_IN: dict[str, tuple[str, str]] = {
    "math": ("megatron_sov.judge.rewards.math_answers", "Math"),
    "stem": ("megatron_sov.judge.rewards.answers", "Stem"),
    "ifeval": ("megatron_sov.judge.rewards.ifeval", "IfEval"),
    "composed": ("megatron_sov.judge.rewards.composed", "Composed"),
    "judge": ("megatron_sov.judge.rewards.judge", "Judge"),
    "format": ("megatron_sov.judge.rewards.surface", "Format"),
    "language": ("megatron_sov.judge.rewards.surface", "LanguageReward"),
    "length": ("megatron_sov.judge.rewards.surface", "Length"),
    "repetition": ("megatron_sov.judge.rewards.surface", "Repetition"),
    "code": ("megatron_sov.judge.rewards.code", "CodeReward"),
    "constraint": ("megatron_sov.judge.rewards.constraint", "Constraint"),
}
"""Name -> module and class of what is built in."""
REQUIRED_FIELDS: Mapping[str, tuple[str, ...]] = {
    "math": ("answer",), "stem": ("answer",), "code": ("tests",), "constraint": ("functions",),
    "ifeval": ("instructions", "instruction_id_list"), "language": ("language",)}
"""Name -> fields of which a row needs one, unless a setting of that name stands in its place."""


NOT_JUDGED = "the function returned None, which says that it does not judge this row"


def _adapt_function(loaded: LoadedPlugin) -> LoadedPlugin:
    """Return a TRL reward function, or an object that can be called as one, as a class with `score`."""
    function = loaded.value
    if inspect.isclass(function) or not callable(function):
        return loaded
    parameters = inspect.signature(function).parameters
    has_var_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not has_var_keyword and not {"completions", "completion_ids"} & parameters.keys():
        raise UserError(f"{loaded.reference}: is a function, and a reward is a class with score(self, row) "
                        "or a function f(completions, **kwargs), as TRL has them")
    parameter_names = frozenset(parameters)

    class AdaptedFunction:
        """A TRL reward function: it takes lists with an item for each response to one prompt."""

        def score(self, row: Row) -> float:
            (reward,) = _call_function(function, parameter_names, has_var_keyword, [row])
            if reward is None:
                raise Refused(NOT_JUDGED)
            return reward

        def score_group(self, rows: Sequence[Row]) -> Score:
            """Return the rewards of all responses to a prompt as `components[REWARDS]`."""
            rewards = _call_function(function, parameter_names, has_var_keyword, rows)
            return Score(math.fsum(reward or 0.0 for reward in rewards), {REWARDS: rewards})

    AdaptedFunction.__qualname__ = AdaptedFunction.__name__ = loaded.attribute
    return replace(loaded, value=AdaptedFunction)


def _call_function(function: Callable[..., Any], parameter_names: frozenset[str], has_var_keyword: bool,
                   rows: Sequence[Row]
                   ) -> list[float | None]:
    """Call a TRL reward function as GRPOTrainer does and return its reward for each row; None: not judged.

    Args:
        function: takes a list for each field of the rows, with prompts and completions. Returns, or has a
            coroutine that returns, a list, array or tensor of numbers; None and NaN stand for no reward.
        parameter_names: its parameters.
        has_var_keyword: whether it takes other keywords too.
        rows: of one prompt. If that is a list of messages, the completions are messages too.

    Raises:
        Refused: it takes token ids, and a row has none.
        TypeError: it returned something else.
    """
    texts = [get_text(row, "response") for row in rows]
    if "completion_ids" in parameter_names and any(row.get("completion_ids") is None for row in rows):
        raise Refused("has no 'completion_ids', which the function takes: token ids are there in `rl`, or in "
                      "rows that have a field of that name")
    completions = [[{"role": "assistant", "content": text}] if isinstance(row.get("prompt"), list) else text
                   for row, text in zip(rows, texts, strict=True)]
    fields = {name: [row.get(name) for row in rows] for row in rows for name in row}
    arguments = {**fields, "prompts": [row.get("prompt") for row in rows], "completions": completions}
    rewards = function(**{name: value for name, value in arguments.items() if has_var_keyword
                          or name in parameter_names})
    if inspect.isawaitable(rewards):
        rewards = asyncio.run(_await_result(rewards))
    # arrays and tensors know how they become a list: numpy and torch are not imported for that
    rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards
    values = list(rewards) if isinstance(rewards, Iterable) and not isinstance(rewards, str | Mapping) else []
    if len(values) != len(rows):
        raise TypeError(f"returned {repr(rewards)[:80]}, must be a list with a number for each of the "
                        f"{len(rows)} completions")
    numbers = [None if value is None else float(value) for value in values]
    if any(number is not None and math.isinf(number) for number in numbers):
        raise ValueError(f"returned {repr(rewards)[:80]}, must be finite numbers")
    return [None if number is None or math.isnan(number) else number for number in numbers]


async def _await_result(rewards: Awaitable[Any]) -> Any:
    return await rewards


def _check_reward_class(loaded: LoadedPlugin) -> None:
    check_methods(loaded.value, loaded.reference, "a reward", {"score": ("row",)})


REWARD_PLUGINS: Registry[type[Any]] = Registry("reward", BUILT_IN, _check_reward_class, adapt=_adapt_function)
"""Rewards that are not built in."""


@dataclass(frozen=True)
class VersionedReward:
    """A reward that is ready."""

    reward: Any
    """A `Reward`; or a `Composed` of the parts."""
    version: str
    """Hash of its code and settings."""
    parts: Mapping[str, tuple[PluginRequest, VersionedReward]] = field(default_factory=dict)
    """Of a composition: name -> its parts."""


def request_reward(name: str, settings: Mapping[str, Any]) -> PluginRequest:
    """Return the order for a reward that a person named, a built-in one or FILE.py:NAME.

    Raises:
        UserError: there is none of that name, or its file cannot be run.
    """
    return registry.request_plugin(name, settings, BUILT_IN, REWARD_PLUGINS)


def build_versioned_reward(request: PluginRequest) -> VersionedReward:
    """Return the reward of an order.

    Raises:
        UserError: a setting does not exist, has the wrong type or breaks a rule; all of them are named. Or
            its file fails, or has changed since it was ordered.
    """
    built = registry.build_plugin(request, BUILT_IN, REWARD_PLUGINS)
    reward = built.value
    # a composition is made of other rewards: it is versioned by their versions, not by its own code alone
    if not hasattr(reward, "get_part_requests"):
        return VersionedReward(reward,
                               compute_version(reward, collect_settings(reward, built.settings), built.files))
    # all orders before any part is made: a wrong name is told before models are loaded
    requests = {name: request_reward(*part) for name, part in reward.get_part_requests().items()}
    parts = {name: (part, build_versioned_reward(part)) for name, part in requests.items()}
    versions = {name: part.version for name, (_, part) in parts.items()}
    return VersionedReward(reward, compute_version(reward, reward.get_version_inputs(versions), built.files),
                           parts)


def build_reward(request: PluginRequest) -> Any:
    """Return the reward of an order without its version, for a process that judges; raises as `make` does."""
    return registry.build_plugin(request, BUILT_IN, REWARD_PLUGINS).value


def find_missing_field(request: PluginRequest, versioned: VersionedReward, row: Row) -> str:
    """Return the field that a reward needs and a row, whose response is not written yet, does not have; "":
    none is known."""
    if isinstance(versioned.reward, Composed):
        return next((field for name, part in versioned.reward.parts.items()
                     if versioned.reward.applies_to(part, row)
                     if (field := find_missing_field(*versioned.parts[name], row))), "")
    fields = REQUIRED_FIELDS.get(request.name, ())
    has_field = any(row.get(field) is not None or getattr(versioned.reward, field, None) for field in fields)
    return "" if has_field or not fields else fields[0]
