"""Worlds that a task describes: tables, and tools whose behaviour is a list of steps (`tools.virtual`).

Nothing of a task is run as code: its steps are worked out one by one, within bounds.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.judge.tools.environment import Observation, Task, Tool, ToolFault
from megatron_sov.judge.tools.virtual.spec import Spec, ToolSpec, spec_of
from megatron_sov.judge.tools.virtual.steps import run
from megatron_sov.judge.tools.worlds.goals import Database

_EXAMPLES = Path(__file__).with_name("virtual_examples.json")


def _examples() -> tuple[Task, ...]:
    """Return the tasks of a library, which have one world."""
    given = json.loads(_EXAMPLES.read_text(encoding="utf-8"))
    return tuple({**task, "world": given["world"]} for task in given["tasks"])


@dataclass
class Virtual(Database):
    """A task has its `world` beside `goal`, which is as in the other worlds of tables.

    Rows that the goal adds are compared without their keys, so that their order does not count, and columns
    that the world declares `free` are not compared.
    """

    EXAMPLES = _examples()

    def reset(self, task: Task) -> Observation:
        """Begin an episode in the task's world."""
        self._world: Spec = spec_of(task.get("world"))
        # of the instance: each task has a world of its own
        self.TABLES = tuple(self._world.tables)
        self.by_name = {name: Tool(name, tool.description, tool.parameters, partial(self._run, tool))
                        for name, tool in self._world.tools.items()}
        return super().reset(task)

    def rules(self) -> str:
        return self._world.rules

    def first_state(self, task: Task) -> dict[str, Any]:
        """Return the world's tables; a task's own `tables` stand in the place of those that it names.

        Raises:
            UserError: a table is not the world's, or breaks its rules.
        """
        own = super().first_state(task)
        tables = {**self._world.first_tables(), **{name: own[name] for name in task.get("tables", {})}}
        if broken := self._world.broken_rule(tables):
            raise UserError(f"the task's tables: {broken}")
        self._first = {name: frozenset(rows) for name, rows in tables.items()}
        return tables

    def compared(self, table: str, rows: dict[str, Any]) -> Any:
        """Return rows without free columns; those that were not there at first without their keys."""
        free, first = self._world.tables[table].free, self._first[table]
        shown = {key: {name: value for name, value in row.items() if name not in free}
                 for key, row in rows.items()}
        return ({key: row for key, row in shown.items() if key in first},
                sorted(json.dumps(row, sort_keys=True) for key, row in shown.items() if key not in first))

    def _run(self, tool: ToolSpec, /, **arguments: Any) -> Any:
        """Return what a tool's steps give; without a result the tables are as they were.

        Raises:
            ToolFault: the call is refused, or the tool breaks what its world declares.
        """
        left_out = {name: parameter.default for name, parameter in tool.parameters.items()
                    if name not in arguments}
        before = self.state
        # steps work on a copy: if one fails, the tables before are still there
        self.state = copy.deepcopy(before)
        try:
            result = run(tool.steps, {**arguments, **left_out}, self.state,
                         lambda table, row: self.add(table, self._world.tables[table].prefix, row))
            if wrong := tool.returns.problem(result):
                raise ToolFault("result", f"returned what its schema does not allow ({wrong})")
            # rules are checked behind changes only: reading cannot break them
            if tool.changes and (broken := self._world.broken_rule(self.state)):
                raise ToolFault("state", f"left tables that its world does not allow ({broken})")
        except BaseException:
            self.state = before
            raise
        return result
