"""Conditions of settings on what a run learns by; an objective of the user's own may read any setting."""

from __future__ import annotations

from megatron_sov.base.settings import AllOf, AnyOf, When, is_one_of, is_unset

BUILT_IN = {"lm": "pretrain", "sft": "sft", "preference": "prefer", "distill": "distill",
            "policy": "rl train"}
"""Built-in objective -> the command that trains by it."""


def learns(*objectives: str) -> When:
    """Return the condition that a run learns by one of these objectives, or by the user's own."""
    commands = " or ".join(f"`megatron-sov {BUILT_IN[name]}`" for name in objectives)
    return When("objective.name", lambda name: name in objectives or name not in BUILT_IN,
                f"is {' or '.join(objectives)}", f"leave it out, or use {commands}")


def learns_without_rounds(way_out: str = "") -> When:
    """Return the condition that a run does not learn in rounds, which make phases and steps of their own."""
    return When("objective.name", lambda name: name != "policy", "is not policy", way_out)


def learns_by_policy(objective: str, method: str) -> AnyOf:
    """Return the condition that a run learns by an objective, or in rounds by the `policy.method` of it."""
    return AnyOf(learns(objective), AllOf(learns("policy"), is_one_of("policy.method", method)))


def is_command(name: str) -> When:
    """Return the condition that a training command of this name reads the settings."""
    return When("command", lambda command: command == name, f"is {name}",
                f"leave it out, or use `megatron-sov {name}`")


def stages_leave(field: str) -> AnyOf:
    """Return the condition that a stage of `extend` leaves a field open, which the run's setting fills in."""
    return AnyOf(NOT_EXTENDING, is_unset("extend.stages"), is_unset(f"extend.stages.*.{field}"))


NOT_EXTENDING = When("command", lambda command: command != "extend", "is not extend",
                     "leave it out, or set that of extend.stages")
