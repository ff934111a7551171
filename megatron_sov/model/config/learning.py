"""Conditions on a run's objective and command, for the `ACTS_WHEN` tables of settings classes.

A user's own objective may read any setting, so every condition on `objective.name` holds for it.
"""

from megatron_sov.base.settings import AllOf, AnyOf, When, is_one_of, is_unset

BUILT_IN = {"lm": "pretrain", "sft": "sft", "preference": "prefer", "distill": "distill",
            "policy": "rl train"}
"""Built-in objective -> the command that trains with it."""
NOT_EXTENDING = When("command", lambda command: command != "extend", "is not extend",
                     "leave it out, or set the field of the same name in extend.stages")
"""The training command is not `extend`, whose stages have settings of their own."""


def has_objective(*objectives: str) -> When:
    """Return the condition that `objective.name` is in `objectives` or names a user's own objective."""
    commands = " or ".join(f"`megatron-sov {BUILT_IN[name]}`" for name in objectives)
    return When("objective.name", lambda name: name in objectives or name not in BUILT_IN,
                f"is {' or '.join(objectives)}", f"leave it out, or use {commands}")


def has_no_rounds(way_out: str = "") -> When:
    """Return the condition that a run has no rounds (objective policy), which define phases and steps."""
    return When("objective.name", lambda name: name != "policy", "is not policy", way_out)


def has_objective_or_method(objective: str, method: str) -> AnyOf:
    """Return the condition `objective.name` = `objective`, or policy with `policy.method` = `method`."""
    return AnyOf(has_objective(objective), AllOf(has_objective("policy"), is_one_of("policy.method", method)))


def is_command(name: str) -> When:
    """Return the condition that the training command is `name`."""
    return When("command", lambda command: command == name, f"is {name}",
                f"leave it out, or use `megatron-sov {name}`")


def is_open_in_stage(field: str) -> AnyOf:
    """Return the condition that the run's setting `field` applies: the command is not `extend`, `extend` has
    no stages, or a stage does not set `field` itself."""
    return AnyOf(NOT_EXTENDING, is_unset("extend.stages"), is_unset(f"extend.stages.*.{field}"))
