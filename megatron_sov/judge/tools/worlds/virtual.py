"""Environments described by tasks: tables, and tools as Python functions that run in the sandbox.

A world is a JSON object:

    name, rules   texts
    tables        name -> {"columns": {name: type}, "rows": {key: row}, "free": [column, ...]}
    code          Python; functions without a leading _ are tools
    examples      calls that succeed on the first tables, at least one per tool

A tool takes `tables` (name -> key -> row), which it may change, and typed arguments; it returns a JSON value,
or raises `Refused("sentence")`. Types are Python types (`TYPES`). Goals follow tau-bench (arXiv 2406.12045):
the goal's calls lead from the first tables to the wanted ones. Additional reads are allowed, additional
changes are not.
"""

import ast
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, get_origin

from megatron_sov.base.errors import UserError, first_error_line, format_problems
from megatron_sov.judge.rewards.constraint import MODULES
from megatron_sov.judge.rewards.reward import Score
from megatron_sov.judge.tools.environment import (
    InfrastructureFault, Observation, Parameter, Task, Tool, ToolFault, ToolRefused, World,
    build_strict_adapter, describe_tool, get_text_field)
from megatron_sov.judge.tools.worlds import virtual_program
from megatron_sov.judge.tools.worlds.goals import contains_words, normalize_text
from megatron_sov.sandbox.program import Limits, Program
from megatron_sov.sandbox.sandbox import shared_sandbox

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Tables = dict[str, dict[str, dict[str, Any]]]
TYPES: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict,
                         "Literal": Literal, "None": None}
"""Names allowed in column and argument types."""
MAX_WORLD_CHARS = 200_000
"""Largest world, as JSON."""
MAX_TABLES, MAX_ROWS, MAX_TOOLS = 12, 500, 32
MAX_PROBLEMS = 40
CALL_LIMITS = Limits(wall_s=30, cpu_s=5, memory_bytes=512 << 20, output_bytes=32 << 20)
"""Sandbox limits for a batch of calls."""
_CLOCKS = frozenset(("now", "today", "utcnow"))
_WORLD = {"name", "rules", "tables", "code", "examples"}
_TABLE = {"columns", "rows", "free"}
_TYPE_NODES = (ast.Expression, ast.Name, ast.Load, ast.Subscript, ast.Tuple, ast.BinOp, ast.BitOr,
               ast.Constant)


def parse_type(text: str) -> Any:
    """Parse a Python type.

    String constants are only allowed in `Literal[...]`: elsewhere typing would create forward references,
    which `pydantic` evaluates as Python in this process.

    Raises:
        ValueError: the text uses more than `TYPES`, `|` and `[...]`, or is not a type.
    """
    try:
        tree = ast.parse(text, mode="eval")
        in_literals = {id(part) for node in ast.walk(tree) if _is_literal(node) for part in ast.walk(node)}
        if all(_is_type_node(node, id(node) in in_literals) for node in ast.walk(tree)):
            parsed = eval(compile(tree, "type", "eval", dont_inherit=True), {"__builtins__": {}, **TYPES})
            if parsed is None or isinstance(parsed, (type, UnionType)) or get_origin(parsed):
                return parsed
    except Exception:  # parsing or subscripting a type may raise any exception
        pass
    raise ValueError(f"{text[:60]!r} is no type; a type is made of {', '.join(TYPES)}, | and [...]")


def _is_literal(node: ast.AST) -> bool:
    return isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal"


def _is_type_node(node: ast.AST, is_in_literal: bool) -> bool:
    if isinstance(node, ast.Name):
        return node.id in TYPES
    if isinstance(node, ast.Constant) and node.value is not None:
        return is_in_literal and isinstance(node.value, (str, int, bool))
    return isinstance(node, _TYPE_NODES)


@dataclass(frozen=True)
class VirtualTable:
    """A table in a world."""

    rows: Mapping[str, Mapping[str, Any]]
    """Key -> row at the start."""
    free: frozenset[str]
    """Free-text columns, which goals do not compare."""
    adapter: "TypeAdapter[Any]" = field(compare=False)
    """Row validator."""


@dataclass(frozen=True)
class VirtualWorld:
    """A validated world."""

    name: str
    rules: str
    """Rules for the model."""
    tables: Mapping[str, VirtualTable]
    code: str
    functions: Mapping[str, ast.FunctionDef] = field(compare=False)
    """Tool name -> source."""
    tools: Mapping[str, Tool] = field(compare=False)
    """Name -> tool that validates and returns its arguments."""
    examples: tuple[Mapping[str, Any], ...]
    """Calls with `name` and `arguments`."""

    def copy_first_tables(self) -> Tables:
        return {name: {key: dict(row) for key, row in table.rows.items()}
                for name, table in self.tables.items()}

    def find_table_problem(self, tables: Any) -> str:
        """Return the reason why a value does not fit the tables; "" if it fits."""
        if not isinstance(tables, dict) or tables.keys() != self.tables.keys():
            return f"the tables must be {', '.join(self.tables)}"
        for name, table in self.tables.items():
            if not isinstance(tables[name], dict):
                return f"{name} must be an object of rows by key"
            for key, row in tables[name].items():
                if wrong := _find_row_problem(table.adapter, row):
                    return f"row {key} of {name}: {wrong}"
        return ""


def _find_row_problem(adapter: "TypeAdapter[Any]", row: Any) -> str:
    from pydantic import ValidationError  # slow to import; `--help` must be fast

    try:
        adapter.validate_json(json.dumps(row, allow_nan=False))
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the row'}: {first['msg'][:120]}"
    except (TypeError, ValueError) as e:
        return f"is no JSON ({str(e)[:80]})"
    return ""


# Reading a description.


def find_world_problems(world: Any) -> list[str]:
    """Return all problems in a description, a sentence each."""
    return _parse_world(world)[1]


def read_world(world: Any) -> VirtualWorld:
    """Parse and cache a world.

    Raises:
        UserError: the description breaks rules; all are named.
    """
    try:
        text = json.dumps(world, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise UserError(f"the task's world is no JSON ({e})") from None
    return _read_world_text(text)


@lru_cache(maxsize=32)
def _read_world_text(text: str) -> VirtualWorld:
    parsed, problems = _parse_world(json.loads(text))
    if parsed is None:
        raise UserError(format_problems("the task's world", problems))
    return parsed


def _parse_world(world: Any) -> tuple[VirtualWorld | None, list[str]]:
    problems: list[str] = []
    try:
        is_too_long = len(json.dumps(world, allow_nan=False)) > MAX_WORLD_CHARS
    except (TypeError, ValueError, RecursionError):
        is_too_long = True
    if not isinstance(world, dict) or is_too_long:
        return None, [f"world: must be an object of JSON with {', '.join(sorted(_WORLD))}, of at most "
                      f"{MAX_WORLD_CHARS:,} characters"]
    problems += [f"world: has {name!r}; it may have {', '.join(sorted(_WORLD))}"
                 for name in sorted(world.keys() - _WORLD)]
    problems += [f"world: {name} is {str(world.get(name))[:60]!r}, must be text"
                 for name in ("name", "rules", "code")
                 if not isinstance(world.get(name), str) or not world[name].strip()]
    tables = _read_tables(world.get("tables"), problems)
    functions = _read_functions(str(world.get("code", "")), problems)
    tools = {}
    for name, function in functions.items():
        try:
            tools[name] = _read_tool(function)
        except Exception as e:  # typing, pydantic and literals may raise any exception on generated code
            problems.append(f"tool {name}: {first_error_line(e)}")
    examples = _read_examples(world.get("examples"), tools, problems)
    if problems:
        return None, problems[:MAX_PROBLEMS]
    parsed = VirtualWorld(world["name"], world["rules"], tables, world["code"], functions, tools, examples)
    wrong = parsed.find_table_problem(parsed.copy_first_tables())
    return (None, [f"tables: {wrong}"]) if wrong else (parsed, [])


def _read_tables(tables: Any, problems: list[str]) -> dict[str, VirtualTable]:
    if not isinstance(tables, dict) or not 0 < len(tables) <= MAX_TABLES:
        problems.append(f"tables: must be an object of 1 to {MAX_TABLES} tables")
        return {}
    parsed = {}
    for name, table in tables.items():
        where = f"tables.{name[:40]}"
        if not isinstance(table, dict) or not {"columns", "rows"} <= table.keys() <= _TABLE:
            problems.append(f"{where}: must be an object with columns and rows, and free if it likes")
            continue
        columns, rows, free = table["columns"], table["rows"], table.get("free", [])
        if not isinstance(columns, dict) or not columns or not all(
                column.isidentifier() and isinstance(kind, str) for column, kind in columns.items()):
            problems.append(f"{where}.columns: must be an object of names with types as texts")
            continue
        if not isinstance(free, list) or not all(
                isinstance(column, str) and column in columns for column in free):
            problems.append(f"{where}.free: must be a list of columns")
            continue
        if not isinstance(rows, dict) or len(rows) > MAX_ROWS or not all(
                isinstance(row, dict) for row in rows.values()):
            problems.append(f"{where}.rows: must be an object of at most {MAX_ROWS} rows by key, each an "
                            "object")
            continue
        try:
            adapter = build_strict_adapter(name,
                                           {column: parse_type(kind) for column, kind in columns.items()})
        except Exception as e:  # also pydantic's errors for types without a JSON form
            problems.append(f"{where}.columns: {first_error_line(e)}")
            continue
        parsed[name] = VirtualTable(rows, frozenset(free), adapter)
    return parsed


def _read_functions(code: str, problems: list[str]) -> dict[str, ast.FunctionDef]:
    """Return tool name -> function in a world's code."""
    try:
        tree = ast.parse(code)
        compile(code, "world.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        problems.append(f"code: is no Python ({first_error_line(e)})")
        return {}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        problems += [f"code: imports {name}; it may import {', '.join(sorted(MODULES))}"
                     for name in names if name.partition(".")[0] not in MODULES]
        # Goals must not depend on the date.
        if isinstance(node, ast.Attribute) and node.attr in _CLOCKS:
            problems.append(f"code: uses .{node.attr}, which differs from day to day")
    functions = {node.name: node for node in tree.body
                 if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}
    if not 0 < len(functions) <= MAX_TOOLS:
        problems.append(f"code: has {len(functions)} functions whose name does not begin with _, must have "
                        f"1 to {MAX_TOOLS}")
    return functions


def _read_tool(function: ast.FunctionDef) -> Tool:
    """Build a tool that validates and returns its arguments.

    Raises:
        UserError: the docstring is missing, or a type has no JSON form.
        ValueError: the signature or a type is invalid.
    """
    spec = function.args
    if [argument.arg
        for argument in spec.args[:1]] != ["tables"] or spec.posonlyargs or spec.vararg or spec.kwarg:
        raise ValueError("must take `tables` first, and then arguments by name")
    places = [*zip(reversed(spec.args), reversed(spec.defaults), strict=False),
              *zip(spec.kwonlyargs, spec.kw_defaults, strict=True)]
    defaults = {argument.arg: value for argument, value in places if value is not None}
    parameters = {}
    for argument in (*spec.args[1:], *spec.kwonlyargs):
        if argument.annotation is None:
            raise ValueError(f"its argument {argument.arg} must have a type, as in `{argument.arg}: str`")
        default = ast.literal_eval(defaults[argument.arg]) if argument.arg in defaults else Parameter.default
        parameters[argument.arg] = Parameter(parse_type(ast.unparse(argument.annotation)), "", default)
    return describe_tool(function.name, ast.get_docstring(function) or "", parameters, dict)


def _read_examples(calls: Any, tools: Mapping[str, Tool],
                   problems: list[str]) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(calls, list) or not all(is_call(call) for call in calls):
        problems.append("examples: must be a list of objects with name and arguments")
        return ()
    for place, call in enumerate(calls):
        if call["name"] not in tools:
            problems.append(f"examples[{place}]: there is no tool {call['name'][:60]!r}")
            continue
        try:
            tools[call["name"]].call(call["arguments"])
        except ToolFault as e:
            problems.append(f"examples[{place}]: {e.reason}")
    problems += [f"examples: have no call of {name}"
                 for name in tools if name not in {call["name"] for call in calls}]
    return tuple(calls)


def is_call(call: Any) -> bool:
    return (isinstance(call, dict) and call.keys() == {"name", "arguments"}
            and isinstance(call["name"], str) and isinstance(call["arguments"], dict))


# Calling tools.


@dataclass(frozen=True)
class CallOutcome:
    """Result of a call with the tables after it, or its fault."""

    result: Any = None
    tables: Tables = field(default_factory=dict)
    fault: ToolFault | None = None


def call_tools(world: VirtualWorld,
               calls: Sequence[tuple[Tables, str, Mapping[str, Any]]]) -> list[CallOutcome]:
    """Run calls in a single sandboxed program, each on its own tables.

    Args:
        world: world with the code.
        calls: tables, tool name and validated arguments.

    Raises:
        InfrastructureFault: the sandbox failed.
        UserError: the machine cannot sandbox programs.
    """
    request = json.dumps({"code": world.code, "calls": calls})
    program = Path(virtual_program.__file__).read_text(encoding="utf-8")
    outcome = shared_sandbox().run(Program(program, stdin=request), CALL_LIMITS)
    if outcome.status == "infrastructure":
        raise InfrastructureFault(f"the sandbox failed ({outcome.reason})")
    outcomes = []
    for line in outcome.stdout.splitlines()[:len(calls)]:
        try:
            outcomes.append(_parse_outcome(world, json.loads(line)))
        # Truncated by the output limit, or written by the world's code.
        except (ValueError, TypeError, KeyError, RecursionError):
            break
    failed = ToolFault("failed", f"failed ({outcome.reason or 'it ended its process'})")
    return outcomes + [CallOutcome(fault=failed)] * (len(calls) - len(outcomes))


def _parse_outcome(world: VirtualWorld, record: Mapping[str, Any]) -> CallOutcome:
    if "refused" in record:
        return CallOutcome(fault=ToolRefused(record["refused"] or "is not allowed"))
    if "failed" in record:
        return CallOutcome(fault=ToolFault("failed", f"failed ({record['failed']})"))
    if wrong := world.find_table_problem(record["tables"]):
        reason = f"left tables that its world does not allow ({wrong})"
        return CallOutcome(fault=ToolFault("state", reason))
    return CallOutcome(record["result"], record["tables"])


def _load_examples(name: str) -> tuple[Task, ...]:
    """Load the tasks in a file next to this module, which share a world."""
    content = json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    world = {**content["world"], "code": "\n".join(content["world"]["code"])}
    return tuple({**task, "world": world} for task in content["tasks"])


@dataclass
class Virtual(World):
    """Tasks have `world` and `goal`: `calls`, which lead to the wanted tables, and `answers` to state."""

    EXAMPLES = _load_examples("library.json")
    MAX_MEMORY_BYTES = 0
    """The sandbox limits memory."""

    def inputs(self) -> dict[str, Any]:
        """Return version inputs: the default world and the Python version."""
        return {"world": self.EXAMPLES[0]["world"], "python": list(sys.version_info[:2])}

    def reset(self, task: Task) -> Observation:
        """Begin an episode in the task's world and compute the wanted tables."""
        self.world = read_world(task.get("world"))
        # Set on the instance, because each task has its own world.
        self.tools_by_name = dict(self.world.tools)
        observation = super().reset(task)
        goal = task.get("goal")
        if not isinstance(goal, dict) or not isinstance(goal.get("calls", []), list) or goal.keys() - {
                "calls", "answers"}:
            raise UserError("the task has no goal: an object with `calls`, which lead to the tables that are "
                            "wanted, and `answers`, which the model has to say")
        answers = goal.get("answers", [])
        if not isinstance(answers, list) or not all(isinstance(a, str) and a.strip() for a in answers):
            raise UserError("the task's goal.answers must be a list of texts")
        self._answers = answers
        # By calling the tools, so that changed tools change the goal.
        self._wanted = self._run_goal_calls(goal.get("calls", []))
        return observation

    def rules(self) -> str:
        return self.world.rules

    def first_state(self, task: Task) -> dict[str, Any]:
        """Return the world's tables, with replacements from the task's `tables`.

        Raises:
            UserError: a table or a row does not fit the world.
        """
        task_tables = task.get("tables", {})
        if not isinstance(task_tables, dict) or not task_tables.keys() <= self.world.tables.keys():
            raise UserError(f"the task's tables must be an object of {', '.join(self.world.tables)}")
        tables = self.world.copy_first_tables() | task_tables
        if wrong := self.world.find_table_problem(tables):
            raise UserError(f"the task's tables: {wrong}")
        self._first = {name: frozenset(rows) for name, rows in tables.items()}
        return tables

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Call a tool; without a result the tables stay unchanged."""
        checked = super().call(name, arguments)
        [outcome] = call_tools(self.world, [(self.state, name, checked)])
        if outcome.fault is not None:
            raise outcome.fault
        self.state = outcome.tables
        return outcome.result

    def _run_goal_calls(self, calls: list[Any]) -> dict[str, Any]:
        """Return the tables after the goal's calls, without changing the episode's tables."""
        first = self.snapshot()
        for i, call in enumerate(calls):
            if not is_call(call):
                raise UserError(f"the task's goal.calls[{i}] must be an object with name and arguments")
            try:
                self.call(get_text_field(call, "name"), call["arguments"])
            except InfrastructureFault:
                raise
            except ToolFault as e:
                raise UserError(f"the task's goal.calls[{i}] gives no result: {e.reason}") from None
        goal_tables, self.state = self.state, first
        return goal_tables

    def score(self, answer: str) -> Score:
        """Return 1 if the tables are as wanted and all answers are stated, else 0."""
        normalized_answer = normalize_text(answer)
        missing = [answer_text for answer_text in self._answers
                   if not contains_words(normalized_answer, normalize_text(answer_text))]
        # Compare contents, so that other calls with the same effect count.
        tables = {name: self.project_rows(name, self.state[name]) == self.project_rows(name,
                                                                                       self._wanted[name])
                  for name in self.world.tables}
        return Score(float(not missing and all(tables.values())), {"tables": tables, "unsaid": missing})

    def project_rows(self, table: str, rows: Mapping[str, Any]) -> Any:
        """Return rows as goals compare them: without free columns, and new rows without keys."""
        free, first = self.world.tables[table].free, self._first[table]
        projected = {key: {name: value for name, value in row.items() if name not in free}
                     for key, row in rows.items()}
        return ({key: row for key, row in projected.items() if key in first},
                sorted(json.dumps(row, sort_keys=True) for key, row in projected.items() if key not in first))


@dataclass
class Booking(Virtual):
    """Hotel bookings; a task has `goal` and optionally `tables`."""

    EXAMPLES = _load_examples("booking.json")

    def reset(self, task: Task) -> Observation:
        """Begin an episode; a task may bring its own world."""
        return super().reset({"world": self.EXAMPLES[0]["world"], **task})
