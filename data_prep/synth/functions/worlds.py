"""Checks for virtual worlds and tasks.

A world is tried out: drawn calls run its tools on many tables. Most arguments fit the tables, so that tools
return results; the rest is any value of the argument's type, which shows errors in the code. The final state
of a task's reference calls is the task's goal.
"""

import ast
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from data_prep.synth.functions.draws import create_random
from data_prep.synth.replies import NoReply
from data_prep.synth.samples import SampleVerdict
from megatron_sov.base.documents.messages import BadRecord, check_depth
from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.patterns import NO_JSON, parse_json
from megatron_sov.judge.rewards.reward import Refused
from megatron_sov.judge.tools.environment import InfrastructureFault, ToolFault
from megatron_sov.judge.tools.worlds.goals import contains_words, normalize_text
from megatron_sov.judge.tools.worlds.virtual import (
    CallOutcome, Tables, Virtual, VirtualWorld, call_tools, find_world_problems, is_call, read_world)

MIN_TOOLS, MIN_CHANGING_TOOLS, MIN_ROWS = 4, 2, 6
MAX_STATES = 24
"""Table states from which calls start."""
FITTING_SHARE, OMITTED_SHARE = 0.7, 0.4
"""Shares: arguments that fit the tables, and omitted optional arguments."""
SIMPLE_VALUES: Mapping[str, Sequence[Any]] = {
    "string": ("alpha", "Zz 9", ""), "integer": (0, 1, 2, 3, 7, -1, 100), "boolean": (True, False),
    "number": (0, 1, 2, 3, 7, -1, 100, 0.5), "null": (None,), "object": ({},)}
WORLD_FAULTS = ("failed", "state")
"""Fault codes that blame the world if the call keeps to the types."""
DRAFT_FIELDS = {"question", "calls", "answers"}
"""Fields in a task from a model."""
DrawnCall = tuple[Tables, str, dict[str, Any]]
"""Tables, tool name, arguments."""


def parse_json_object(reply: str) -> dict[str, Any] | str:
    """Parse the JSON object in a reply, with or without words around; return a sentence on failure."""
    if getattr(reply, "cut", False):
        return "the answer was cut off at its limit of tokens"
    begin, end = reply.find("{"), reply.rfind("}")
    try:
        value = parse_json(reply)
        if value is NO_JSON and 0 <= begin < end:
            value = parse_json(reply[begin:end + 1])
        if value is not NO_JSON:
            check_depth(value)
            # raises for numbers and characters that the journal cannot hold
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (BadRecord, Refused, ValueError, RecursionError) as e:
        return f"the answer holds no JSON that can be kept ({str(e)[:100]})"
    return value if isinstance(value, dict) else "the answer is no JSON object"


def format_json_text(value: Any) -> str:
    """Format a value as JSON without sorting keys."""
    return json.dumps(value, ensure_ascii=False)


def check_world(world: Mapping[str, Any], name: str, calls_per_tool: int) -> list[SampleVerdict]:
    """Check a world's description, then try out the world; an invalid description gives one verdict.

    Args:
        world: description.
        name: seed of the drawn arguments.
        calls_per_tool: drawn calls, in addition to the world's examples.

    Raises:
        NoReply: the sandbox failed; the item is tried again.
    """
    if problems := find_world_problems(world):
        return [_build_verdict("sound", problems)]
    spec = read_world(world)
    trial = Trial(spec, create_random("trial", name))
    try:
        trial.run_calls(calls_per_tool)
    except InfrastructureFault as e:
        raise NoReply(e.reason) from None
    counts = (("tools", len(spec.tools), MIN_TOOLS),
              ("tools that change a table", len(trial.changing), MIN_CHANGING_TOOLS),
              ("rows", sum(len(table.rows) for table in spec.tables.values()), MIN_ROWS))
    return [
        _build_verdict("sound", []),
        _build_verdict("honest types", [*trial.find_unused_arguments(), *trial.faults.values()]),
        _build_verdict("every tool comes through", [
            f"tool {tool}: none of its calls gave a result, also with arguments that fit the tables"
            for tool in spec.tools if tool not in trial.successful]),
        _build_verdict("size", [f"world: has {count} {noun}, fewer than {least}"
                                for noun, count, least in counts if count < least])]


def _build_verdict(check: str, problems: Sequence[str]) -> SampleVerdict:
    return SampleVerdict(check, not problems, "\n".join(problems))


@dataclass
class Trial:
    """Trial calls in a world, with outcomes."""

    spec: VirtualWorld
    random: Random
    successful: set[str] = field(default_factory=set)
    """Tools with a successful call."""
    changing: set[str] = field(default_factory=set)
    """Tools with a call that changed a table."""
    faults: dict[str, str] = field(default_factory=dict)
    """Tool -> a call that the types allow and the code refuses."""

    def run_calls(self, calls_per_tool: int) -> None:
        """Run the world's examples, and then `calls_per_tool` drawn calls for each tool."""
        states = [self.spec.copy_first_tables()]
        calls: list[DrawnCall] = [(states[0], call["name"], call["arguments"]) for call in self.spec.examples]
        for _ in range(calls_per_tool + 1):
            # a fitting value may have a wrong type
            calls = [call for call in calls if self._is_allowed(call)]
            for call, outcome in zip(calls, call_tools(self.spec, calls), strict=True):
                self._record_outcome(call, outcome)
                # some tools need a state created by other tools
                if outcome.fault is None and outcome.tables != call[0] and len(states) < MAX_STATES:
                    states.append(outcome.tables)
            calls = [self._draw_call(tool, self.random.choice(states)) for tool in self.spec.tools]

    def find_unused_arguments(self) -> list[str]:
        """Return a sentence for each argument that the tool's code ignores."""
        problems = []
        for tool, function in self.spec.functions.items():
            used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
            problems += [f"tool {tool}: nothing uses its argument {argument}"
                         for argument in sorted(set(self.spec.tools[tool].parameters) - used)]
        return problems

    def _record_outcome(self, call: DrawnCall, outcome: CallOutcome) -> None:
        tables, name, arguments = call
        if outcome.fault is None:
            self.successful.add(name)
            if outcome.tables != tables:
                self.changing.add(name)
        elif outcome.fault.code in WORLD_FAULTS:
            self.faults.setdefault(name, f"tool {name}: its types allow {format_json_text(arguments)[:160]}, "
                                         f"and the call {outcome.fault.reason}")

    def _is_allowed(self, call: DrawnCall) -> bool:
        try:
            self.spec.tools[call[1]].call(call[2])
        except ToolFault:
            return False
        return True

    def _draw_call(self, tool: str, tables: Tables) -> DrawnCall:
        """Draw arguments with the tool's types; many fit the tables."""
        schema = self.spec.tools[tool].describe_for_models()["function"]["parameters"]
        arguments = {}
        for name, part in schema["properties"].items():
            if name not in schema["required"] and self.random.random() < OMITTED_SHARE:
                continue
            values = list_fitting_values(self.spec, tool, name, tables)
            if values and self.random.random() < FITTING_SHARE:
                # copied, because a tool may change a list argument
                arguments[name] = copy.deepcopy(self.random.choice(values))
            else:
                arguments[name] = self._draw_value(part)
        return tables, tool, arguments

    def _draw_value(self, schema: Mapping[str, Any]) -> Any:
        if "anyOf" in schema:
            return self._draw_value(self.random.choice(schema["anyOf"]))
        if "enum" in schema or "const" in schema:
            return self.random.choice(schema.get("enum") or [schema["const"]])
        if schema.get("type") == "array":
            return [self._draw_value(schema.get("items", {})) for _ in range(self.random.randrange(3))]
        return copy.deepcopy(self.random.choice(SIMPLE_VALUES[schema.get("type", "string")]))


def list_fitting_values(spec: VirtualWorld, tool: str, argument: str, tables: Tables) -> list[Any]:
    """Return plausible values for an argument: values in `spec.examples`, and current values in each key or
    column whose first values include an example."""
    examples = [call["arguments"][argument] for call in spec.examples
                if call["name"] == tool and argument in call["arguments"]]
    values = list(examples)
    first = spec.copy_first_tables()
    for table, rows in tables.items():
        if any(isinstance(value, str) and value in first[table] for value in examples):
            values += rows
        for column in sorted({column for row in first[table].values() for column in row}):
            known = [row[column] for row in first[table].values()]
            if any(_contains_value(known, value) for value in examples):
                values += [row[column] for row in rows.values() if row[column] is not None]
    return [value for index, value in enumerate(values) if not _contains_value(values[:index], value)]


def _contains_value(values: Sequence[Any], value: Any) -> bool:
    # with the type, because 1 equals True in Python
    return any(value == candidate and type(value) is type(candidate) for candidate in values)


def find_task_problem(task: Mapping[str, Any]) -> str:
    """Return the problem that `Virtual.reset` finds in a task, or ""."""
    try:
        Virtual().reset(task)
    except UserError as e:
        return str(e)
    return ""


def find_draft_problem(draft: Any) -> str:
    """Return the problem in a task from a model, or ""."""
    if not isinstance(draft, Mapping):
        return str(draft)
    if unknown := sorted(set(draft) - DRAFT_FIELDS):
        return f"has {unknown[0][:40]!r} beside {', '.join(sorted(DRAFT_FIELDS))}"
    question, calls, answers = draft.get("question"), draft.get("calls"), draft.get("answers", [])
    if not isinstance(question, str) or not question.strip():
        return "question must be text"
    if not isinstance(answers, list) or not all(
            isinstance(answer, str) and answer.strip() for answer in answers):
        return "answers must be a list of texts"
    if not isinstance(calls, list) or not all(is_call(call) for call in calls):
        return "calls must be a list of objects with name and arguments"
    return ""


def check_task(task: Mapping[str, Any], min_calls: int, max_calls: int) -> list[SampleVerdict]:
    """Run a task's reference calls and check its goal; a refused call gives one verdict.

    Args:
        task: task of `virtual` with a valid world and draft.
        min_calls: minimum of reference calls.
        max_calls: maximum of reference calls.

    Raises:
        NoReply: the sandbox failed; the item is tried again.
    """
    calls, answers = task["goal"]["calls"], task["goal"]["answers"]
    virtual = Virtual()
    # without a goal: the state after the calls becomes the goal
    virtual.reset({**task, "goal": {}})
    first, changing = virtual.snapshot(), []
    for index, call in enumerate(calls):
        before = virtual.snapshot()
        try:
            virtual.call(call["name"], call["arguments"])
        except InfrastructureFault as e:
            raise NoReply(e.reason) from None
        except ToolFault as e:
            return [SampleVerdict("reachable goal", False, f"call {index + 1}: {e.reason}")]
        if virtual.snapshot() != before:
            changing.append(index)
    question = normalize_text(task["question"])
    revealed = [] if changing else [answer for answer in answers
                                    if contains_words(question, normalize_text(answer))]
    tools = [name for name in virtual.tools_by_name if "_" in name and name.casefold() in question]
    if changing or answers:
        problem = _find_unneeded_calls(virtual, first, calls, changing)
    else:
        problem = "the calls change nothing, and nothing has to be said"
    return [
        SampleVerdict("reachable goal", True), SampleVerdict("goal not reached yet", not problem, problem),
        SampleVerdict("number of calls", min_calls <= len(calls) <= max_calls, f"{len(calls)}"),
        SampleVerdict("answers from tools", not revealed, f"the question says {', '.join(revealed)[:60]!r}"),
        SampleVerdict("question names no tools", not tools, ", ".join(tools))]


def _find_unneeded_calls(virtual: Virtual, first: Any, calls: Sequence[Mapping[str, Any]],
                         changing: Sequence[int]) -> str:
    """Return a sentence if fewer calls lead to the same state, or "".

    Args:
        virtual: environment after all calls.
        first: snapshot before the calls.
        calls: reference calls.
        changing: indices of calls that change a table.
    """
    end = _project_tables(virtual)
    for omitted in changing:
        virtual.restore(first)
        for call in (*calls[:omitted], *calls[omitted + 1:]):
            try:
                virtual.call(call["name"], call["arguments"])
            except InfrastructureFault as e:
                raise NoReply(e.reason) from None
            except ToolFault:  # the call needs the change of the omitted call
                continue
        if _project_tables(virtual) == end:
            return f"the goal is reached without call {omitted + 1} ({calls[omitted]['name']})"
    virtual.restore(first)
    if changing and _project_tables(virtual) == end:
        return "the calls undo each other: the tables are as they were at first"
    return ""


def _project_tables(virtual: Virtual) -> dict[str, Any]:
    return {table: virtual.project_rows(table, rows) for table, rows in virtual.state.items()}
