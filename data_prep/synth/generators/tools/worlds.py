"""Worlds: a domain becomes tables, rules and typed tools that `virtual` plays, all of them data.

What tools do is a list of steps, so that a world can be tried out before anybody trusts it: it has to be
sound, every tool must come through, change what it says it changes, and keep what its schema promises.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data_prep.synth.bounds import Grade, Temperature
from data_prep.synth.generator import Ask, Generator, Item
from data_prep.synth.generators.tools.replies import items_of, object_in, written
from data_prep.synth.generators.tools.trial import tried
from data_prep.synth.sample import Kind, Sample, Verdict
from megatron_sov.settings import AtLeastOne, NotBlank, NotNegativeInt
from megatron_sov.tools.virtual.expressions import FUNCTIONS
from megatron_sov.tools.virtual.spec import Spec, problems_of, spec_of

MIN_ROWS = 6
"""Of all tables together, at the start."""
MIN_CHANGING_TOOLS = 2
"""Tools that change a table."""
MIN_TOOLS = 4
"""Fewer are too few to choose from."""
MAX_TOLD = 12
"""Problems that a model is shown to mend."""
RUBRIC = ("The material describes tools of a virtual world: what each says of itself, and the steps that it "
          "takes. Does every tool do what its name and its description say, no less and nothing else? Do the "
          "rules, the tables and the tools make sense together for the domain?")


@dataclass(frozen=True)
class WorldSettings:
    """How worlds are made."""

    language: NotBlank = "English"
    """Of names that people read, rows and rules, unless a domain has its own `language`."""
    worlds_per_domain: AtLeastOne = 1
    """Each is an item of its own."""
    num_repairs: NotNegativeInt = 1
    """How often a model is told what is wrong and asked to mend it."""
    calls_per_tool: AtLeastOne = 40
    """Drawn calls by which a world is tried out."""
    min_judged: Grade = 0.0
    """Least score of the judge, 0 to 10; 0: it is not asked."""
    temperature: Temperature = 0.8
    """Of the writer."""
    max_tokens: AtLeastOne = 8192
    """Of an answer; a world takes some thousands."""


class Worlds(Generator):
    """Makes worlds of domains."""

    name: ClassVar[str] = "worlds"
    kind: Kind = "task"
    help: ClassVar[str] = "virtual tool environments: tables, rules and typed tools, from domains"
    templates: ClassVar[Mapping[str, Sequence[str]]] = {
        "worlds/tables": ("domain", "description", "language", "number", "min_rows"),
        "worlds/tools": ("domain", "language", "state", "min_tools", "min_changing_tools", "functions"),
        "worlds/repair": ("world", "problems", "functions")}
    Settings: ClassVar[type[Any]] = WorldSettings

    def items(self, inputs: Sequence[Path]) -> Iterator[Item]:
        """Yield the domains of files in JSON lines: `domain`, and if they like `description`, `language`."""
        for item in items_of(inputs, ["domain"], '{"domain": "a library"}'):
            for number in range(1, self.settings.worlds_per_domain + 1):
                yield Item(f"{item.id}-{number}", {**item.fields, "number": number}, item.source,
                           item.licence)

    def make(self, item: Item, ask: Ask) -> Iterator[Sample]:
        """Yield the item's world."""
        s, domain = self.settings, str(item.fields["domain"])
        asked = {"temperature": s.temperature, "max_tokens": s.max_tokens}
        language = str(item.fields.get("language") or s.language)
        state = object_in(ask("worlds/tables", domain=domain, language=language, min_rows=MIN_ROWS,
                              description=str(item.fields.get("description") or ""),
                              number=item.fields["number"], **asked)[0])
        if isinstance(state, str):
            yield _unread(domain, state)
            return
        tools = object_in(ask("worlds/tools", domain=domain, language=language, state=written(state),
                              min_tools=MIN_TOOLS, min_changing_tools=MIN_CHANGING_TOOLS,
                              functions=", ".join(FUNCTIONS), **asked)[0])
        world = tools if isinstance(tools, str) else {**state, "tools": tools.get("tools")}
        for repair in range(s.num_repairs + 1):
            if isinstance(world, str):
                yield _unread(domain, world)
                return
            verdicts = self._checked(world, item.id)
            wrong = [verdict for verdict in verdicts if not verdict.passed]
            if not wrong or repair == s.num_repairs:
                break
            told = [line for verdict in wrong for line in verdict.detail.splitlines()][:MAX_TOLD]
            world = object_in(ask("worlds/repair", world=written(world), problems=told,
                                  functions=", ".join(FUNCTIONS), **asked)[0])
        if not wrong and s.min_judged:
            score = ask.judge(RUBRIC, {"world": written(world)})
            verdicts.append(Verdict("judge", score >= s.min_judged, f"{score:g}"))
        yield Sample({"domain": domain, "world": world}, tuple(verdicts), notes={"repairs": repair})

    def _checked(self, world: Mapping[str, Any], name: str) -> list[Verdict]:
        """Return what is to say of a world; without a sound description nothing more is looked at."""
        if problems := problems_of(world):
            return [Verdict("sound", False, "\n".join(problems))]
        spec, s = spec_of(world), self.settings
        trial = tried(world, name, s.calls_per_tool)
        changing = [tool for tool in spec.tools.values() if tool.changes]
        counts = {"tools": (len(spec.tools), MIN_TOOLS),
                  "tools that change a table": (len(changing), MIN_CHANGING_TOOLS),
                  "rows": (sum(len(table.rows) for table in spec.tables.values()), MIN_ROWS)}
        return [Verdict("sound", True),
                _all("size", [f"world: has {count} {what}, fewer than {least}"
                              for what, (count, least) in counts.items() if count < least]),
                _all("distinct tools", _alike(spec, world["tools"])),
                _all("honest schema", trial.lies),
                _all("every tool comes through", [
                    f"tool {tool}: none of {s.calls_per_tool} drawn calls gave a result, also with arguments "
                    "that fit the tables" for tool in spec.tools if tool not in trial.successes]),
                _all("every change takes place", [
                    f"tool {tool.name}: has steps that change a table, and none of its calls did"
                    for tool in changing if tool.name in trial.successes and tool.name not in trial.changes])]


def _unread(domain: str, why: str) -> Sample:
    return Sample({"domain": domain}, (Verdict("form", False, why),))


def _all(check: str, problems: Sequence[str]) -> Verdict:
    return Verdict(check, not problems, "\n".join(problems))


def _alike(spec: Spec, tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return sentences on tools that do or say the same as an earlier one."""
    found, said, done = [], dict[str, str](), dict[str, str]()
    for tool in tools:
        says = " ".join(str(tool["description"]).casefold().split())
        does = json.dumps([tool["does"], tool.get("parameters"), tool.get("returns")], sort_keys=True)
        for known, value, what in ((said, says, "says"), (done, does, "does")):
            if value in known:
                found.append(f"tool {tool['name']}: {what} the same as {known[value]}")
            known.setdefault(value, tool["name"])
    return found
