"""Registry: find rewards by name and build them from settings."""

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
"""Name -> (module, class) for built-in rewards."""
REQUIRED_FIELDS: Mapping[str, tuple[str, ...]] = {
    "math": ("answer",), "stem": ("answer",), "code": ("tests",), "constraint": ("functions",),
    "ifeval": ("instructions", "instruction_id_list"), "language": ("language",)}
"""Name -> alternative row fields, which a setting with the same name can replace."""


NOT_JUDGED = "the function returned None, which says that it does not judge this row"


def _adapt_function(loaded: LoadedPlugin) -> LoadedPlugin:
    """Wrap a TRL reward function in a class with `score`."""
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
        """TRL reward function, called with lists that have an item per response to a prompt."""

        def score(self, row: Row) -> float:
            (reward,) = _call_function(function, parameter_names, has_var_keyword, [row])
            if reward is None:
                raise Refused(NOT_JUDGED)
            return reward

        def score_group(self, rows: Sequence[Row]) -> Score:
            """Return the rewards for all responses to a prompt in `components[REWARDS]`."""
            rewards = _call_function(function, parameter_names, has_var_keyword, rows)
            return Score(math.fsum(reward or 0.0 for reward in rewards), {REWARDS: rewards})

    AdaptedFunction.__qualname__ = AdaptedFunction.__name__ = loaded.attribute
    return replace(loaded, value=AdaptedFunction)


def _call_function(function: Callable[..., Any], parameter_names: frozenset[str], has_var_keyword: bool,
                   rows: Sequence[Row]
                   ) -> list[float | None]:
    """Call a TRL reward function like GRPOTrainer does; return a reward, or None, per row.

    Args:
        function: TRL reward function; may be a coroutine function. None and NaN mean no reward.
        parameter_names: the function's parameters.
        has_var_keyword: the function accepts **kwargs.
        rows: rows with the same prompt. For a list prompt, completions are messages too.

    Raises:
        Refused: the function needs token ids, which a row lacks.
        TypeError: the result is malformed.
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
    # Arrays and tensors convert themselves, without importing numpy or torch.
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
"""Registered rewards besides `BUILT_IN`."""


@dataclass(frozen=True)
class VersionedReward:
    """A reward with its version."""

    reward: Any
    """A `Reward`, or a `Composed` with `parts`."""
    version: str
    """Hash over code and settings."""
    parts: Mapping[str, tuple[PluginRequest, VersionedReward]] = field(default_factory=dict)
    """Part name -> (request, reward) in a composition."""


def request_reward(name: str, settings: Mapping[str, Any]) -> PluginRequest:
    """Return a request for a built-in reward or FILE.py:NAME.

    Raises:
        UserError: the name is unknown, or the file cannot be executed.
    """
    return registry.request_plugin(name, settings, BUILT_IN, REWARD_PLUGINS)


def build_versioned_reward(request: PluginRequest) -> VersionedReward:
    """Build a reward and compute its version.

    Raises:
        UserError: settings are unknown or invalid (all are named), or the file fails or has changed since the
            request.
    """
    built = registry.build_plugin(request, BUILT_IN, REWARD_PLUGINS)
    reward = built.value
    # A composition's version derives from its parts' versions.
    if not hasattr(reward, "get_part_requests"):
        return VersionedReward(reward,
                               compute_version(reward, collect_settings(reward, built.settings), built.files))
    # Resolve all names before building parts, because parts may load models.
    requests = {name: request_reward(*part) for name, part in reward.get_part_requests().items()}
    parts = {name: (part, build_versioned_reward(part)) for name, part in requests.items()}
    versions = {name: part.version for name, (_, part) in parts.items()}
    return VersionedReward(reward, compute_version(reward, reward.get_version_inputs(versions), built.files),
                           parts)


def build_reward(request: PluginRequest) -> Any:
    """Build a reward without computing its version; raises like `build_versioned_reward`."""
    return registry.build_plugin(request, BUILT_IN, REWARD_PLUGINS).value


def find_missing_field(request: PluginRequest, versioned: VersionedReward, row: Row) -> str:
    """Return a name from `REQUIRED_FIELDS` missing in a row before generation, or ""."""
    if isinstance(versioned.reward, Composed):
        return next((field for name, part in versioned.reward.parts.items()
                     if versioned.reward.applies_to(part, row)
                     if (field := find_missing_field(*versioned.parts[name], row))), "")
    fields = REQUIRED_FIELDS.get(request.name, ())
    has_field = any(row.get(field) is not None or getattr(versioned.reward, field, None) for field in fields)
    return "" if has_field or not fields else fields[0]
