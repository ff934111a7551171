"""Which rewards there are, by name, and how one is made from settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins import registry
from megatron_sov.base.plugins.loading import LoadedPlugin
from megatron_sov.base.plugins.registry import PluginOrder, Registry, check_methods
from megatron_sov.judge.rewards.composed import Composed
from megatron_sov.judge.rewards.reward import Refused, Row, text_of
from megatron_sov.judge.rewards.version import settings_of, version_of

BUILT_IN: dict[str, tuple[str, str]] = {
    "math": ("megatron_sov.judge.rewards.math_answers", "Math"),
    "stem": ("megatron_sov.judge.rewards.answers", "Stem"),
    "ifeval": ("megatron_sov.judge.rewards.ifeval", "IfEval"),
    "classifier": ("megatron_sov.judge.rewards.classifier", "Classifier"),
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
FIELDS: Mapping[str, tuple[str, ...]] = {
    "math": ("answer",), "stem": ("answer",), "code": ("tests",), "constraint": ("functions",),
    "ifeval": ("instructions", "instruction_id_list"), "language": ("language",)}
"""Name -> fields of which a row needs one, unless a setting of that name stands in its place."""


def _adapted(loaded: LoadedPlugin) -> LoadedPlugin:
    """Return a reward function of TRL's as a class with `score`."""
    if not inspect.isfunction(loaded.value):
        return loaded
    parameters = inspect.signature(loaded.value).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    has_form = takes_any or "completions" in parameters
    if not has_form or inspect.iscoroutinefunction(loaded.value):
        raise UserError(f"{loaded.reference}: is a function, and a reward is a class with score(self, row) "
                        "or a function f(completions, **kwargs), as TRL has them")
    function, names = loaded.value, None if takes_any else frozenset(parameters)

    class AdaptedFunction:
        """A function that takes lists, given lists of one row."""

        def score(self, row: Row) -> float:
            return _called(function, names, row)

    AdaptedFunction.__qualname__ = AdaptedFunction.__name__ = loaded.attribute
    return replace(loaded, value=AdaptedFunction)


def _called(function: Callable[..., Any], names: frozenset[str] | None, row: Row) -> float:
    """Return what a reward function of TRL's gives a row.

    Args:
        function: takes a list for each field of a row, and one of completions.
        names: its parameters; None: it takes any.
        row: a row; where its prompt is a list of messages the completion is one, too, as in TRL.
    """
    response = text_of(row, "response")
    prompt = row.get("prompt")
    completion = [{"role": "assistant", "content": response}] if isinstance(prompt, list) else response
    given = {**{name: [value] for name, value in row.items()}, "prompts": [prompt],
             "completions": [completion]}
    rewards = function(**{name: value for name, value in given.items() if names is None or name in names})
    if not isinstance(rewards, list | tuple) or len(rewards) != 1:
        raise TypeError(f"returned {repr(rewards)[:80]}, must be a list with a number for each "
                        "completion")
    if rewards[0] is None:
        raise Refused("the function returned None, which says that it does not judge this row")
    return float(rewards[0])


def _check(loaded: LoadedPlugin) -> None:
    check_methods(loaded.value, loaded.reference, "a reward", {"score": ("row",)})


OWN: Registry[type[Any]] = Registry("reward", "megatron_sov.rewards", BUILT_IN, _check, adapt=_adapted)
"""Rewards that are not built in."""


@dataclass(frozen=True)
class MadeReward:
    """A reward that is ready."""

    reward: Any
    """A `Reward`; or a `Composed` of the parts."""
    version: str
    """Hash of its code and settings."""
    parts: Mapping[str, tuple[PluginOrder, MadeReward]] = field(default_factory=dict)
    """Of a composition: name -> its parts."""


def order(name: str, settings: Mapping[str, Any]) -> PluginOrder:
    """Return the order for a reward that a person named, a built-in one or FILE.py:NAME.

    Raises:
        UserError: there is none of that name, or its file cannot be run.
    """
    return registry.ordered(name, settings, BUILT_IN, OWN)


def make(asked: PluginOrder) -> MadeReward:
    """Return the reward of an order.

    Raises:
        UserError: a setting does not exist, has the wrong type or breaks a rule; all of them are named. Or
            its file fails, or has changed since it was ordered.
    """
    built = registry.build(asked, BUILT_IN, OWN)
    reward = built.value
    # a composition is made of other rewards: it is versioned by their versions, not by its own code alone
    if not hasattr(reward, "orders"):
        return MadeReward(reward, version_of(reward, settings_of(reward, built.settings), built.files))
    # all orders before any part is made: a wrong name is told before models are loaded
    wanted = {name: order(*part) for name, part in reward.orders().items()}
    parts = {name: (part, make(part)) for name, part in wanted.items()}
    versions = {name: part.version for name, (_, part) in parts.items()}
    return MadeReward(reward, version_of(reward, reward.judging(versions), built.files), parts)


def build(asked: PluginOrder) -> Any:
    """Return the reward of an order without its version, for a process that judges; raises as `make` does."""
    return registry.build(asked, BUILT_IN, OWN).value


def lacking(asked: PluginOrder, made: MadeReward, row: Row) -> str:
    """Return the field that a reward needs and a row, whose response is not written yet, does not have; "":
    none is known."""
    if isinstance(made.reward, Composed):
        return next((field for name, part in made.reward.parts.items() if made.reward.judges(part, row)
                     if (field := lacking(*made.parts[name], row))), "")
    fields = FIELDS.get(asked.name, ())
    has_one = any(row.get(field) is not None or getattr(made.reward, field, None) for field in fields)
    return "" if has_one or not fields else fields[0]
