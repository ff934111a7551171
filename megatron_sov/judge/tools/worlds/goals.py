"""What worlds have in common by their goals: what a model says in the end, or what it made of tables.

Tables are in the style of tau-bench (arXiv 2406.12045): tools read and change them, and a goal is their
content in the end, with what the model has to say.  It is given by calls: made on the first tables, they lead
to the content that is wanted.  Reading more, or reading in another order, is no fault; a change that was not
asked for is.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.answers import Stem
from megatron_sov.judge.rewards.reward import Refused, Score
from megatron_sov.judge.tools.environment import Observation, Task, ToolFault, ToolRefused, World, text_in


class AnsweredWorld(World):
    """Gives 1 where the answer is the task's `answer` (a text, or a list of which one is enough), by the
    rules of the reward stem, else 0."""

    relative_tolerance: float = 0.01
    """Between numbers."""

    def reset(self, task: Task) -> Observation:
        """Begin an episode of a task that has an answer."""
        observation = super().reset(task)
        try:
            # a trial: a task whose answer cannot be judged is refused before a model has played it
            self.score("")
        except Refused as e:
            raise UserError(f"the task {e}") from None
        return observation

    def score(self, answer: str) -> Score:
        judge = Stem(relative_tolerance=self.relative_tolerance)
        return judge.score({"response": answer, "answer": self.task["answer"]} if "answer" in self.task
                           else {"response": answer})


class Database(World):
    """Tables by name, each of rows by key."""

    TABLES: tuple[str, ...] = ()
    """Names of those that a task may have in its `tables`."""

    def reset(self, task: Task) -> Observation:
        """Begin an episode, and work out what its end should be."""
        observation = super().reset(task)
        goal = task.get("goal")
        if not isinstance(goal, dict) or not isinstance(goal.get("calls", []), list) or set(goal) - {
                "calls", "answers"}:
            raise UserError("the task has no goal: an object with `calls`, which lead to the tables that are "
                            "wanted, and `answers`, which the model has to say")
        answers = goal.get("answers", [])
        if not isinstance(answers, list) or not all(isinstance(a, str) and a.strip() for a in answers):
            raise UserError("the task's goal.answers must be a list of texts")
        self._answers = answers
        # the goal is worked out by the tools themselves, so a change of a tool changes it as well
        self._wanted = self._led_to(goal.get("calls", []))
        return observation

    def first_state(self, task: Task) -> dict[str, Any]:
        """Return the task's tables; those that it leaves out are empty."""
        tables = task.get("tables", {})
        found = list(tables.values()) if isinstance(tables, dict) else []
        if not isinstance(tables, dict) or not all(isinstance(rows, dict) for rows in found) \
                or not all(isinstance(row, dict) for rows in found for row in rows.values()):
            raise UserError("the task's tables must be an object of tables, each an object of rows by key")
        if unknown := sorted(set(tables) - set(self.TABLES)):
            raise UserError(f"the task has a table {unknown[0]!r}; tables are {', '.join(self.TABLES)}")
        return {name: tables.get(name, {}) for name in self.TABLES}

    def _led_to(self, calls: list[Any]) -> dict[str, Any]:
        """Return what the goal's calls make of the tables, which then are as they were."""
        first = self.snapshot()
        for i, call in enumerate(calls):
            if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
                raise UserError(f"the task's goal.calls[{i}] must be an object with name and arguments")
            try:
                self.call(text_in(call, "name"), call["arguments"])
            except ToolFault as e:
                raise UserError(f"the task's goal.calls[{i}] gives no result: {e.reason}") from None
        # the episode begins from the first tables
        wanted, self.state = self.state, first
        return wanted

    def score(self, answer: str) -> Score:
        """Return 1 where the tables are as wanted and all is said, else 0."""
        said = plain(answer)
        missing = [wanted for wanted in self._answers if not says(said, plain(wanted))]
        # content counts, not the way: other calls with the same effect are right
        tables = {name: self.compared(name, self.state[name]) == self.compared(name, self._wanted[name])
                  for name in self.TABLES}
        return Score(float(not missing and all(tables.values())),
                     {"tables": tables, "unsaid": missing})

    def compared(self, table: str, rows: dict[str, Any]) -> Any:
        """Return what a goal compares of a table's rows."""
        return rows

    def row(self, table: str, key: str) -> dict[str, Any]:
        """Return a row of a table, for the tools.

        Raises:
            ToolRefused: there is none.
        """
        rows = self.state[table]
        if key not in rows:
            raise ToolRefused(f"there is no {key[:60]!r} in {table}")
        found: dict[str, Any] = rows[key]
        return found

    def found(self, table: str, **fields: Any) -> list[dict[str, Any]]:
        """Return copies of the rows with these values, with their keys as `id`, in order; None asks
        nothing."""
        asked = {name: value for name, value in fields.items() if value is not None}
        return [{"id": key, **copy.deepcopy(row)} for key, row in sorted(self.state[table].items())
                if all(row.get(name) == value for name, value in asked.items())]

    def add(self, table: str, prefix: str, row: dict[str, Any]) -> str:
        """Put a row into a table; returns its key, which follows from what is there already."""
        numbers = [int(key[len(prefix):]) for key in self.state[table]
                   if key.startswith(prefix) and key[len(prefix):].isdecimal()]
        # one above the highest: the same calls give the same keys in every episode
        key = f"{prefix}{max(numbers, default=0) + 1}"
        self.state[table][key] = row
        return key


def plain(text: str) -> str:
    """Return a text by which answers are compared: lower case, no commas in numbers, single spaces."""
    return " ".join(re.sub(r"(?<=\d),(?=\d)", "", text.casefold()).split())


def says(said: str, wanted: str) -> bool:
    """Return whether a text holds another one as words of their own: 5 does not stand in 150 or 5.5."""
    return re.search(rf"(?<![\w.])(?<!\d,){re.escape(wanted)}(?!\w|\.\d)", said) is not None
