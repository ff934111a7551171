"""Constraint: whether check functions, which a model wrote and which were tested, accept a response.

A check is a text with a function `evaluate(response)` that returns True or False (AutoIF, arXiv 2406.13542).
What its source may name is decided before it runs: modules that compute on texts and numbers, and nothing
that reads files, clocks or chance, so that a verdict follows from the text alone.  That is a rule of quality;
what keeps a hostile function from doing harm is the sandbox.
"""

from __future__ import annotations

import ast
import json
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from megatron_sov.base.errors import UserError, format_error
from megatron_sov.base.settings import Bound, ProblemCode, Share
from megatron_sov.chat.marks import unquote_marks
from megatron_sov.judge.rewards import check_program
from megatron_sov.judge.rewards.reward import (
    OPERATION, Refused, Row, Score, format_short, get_content, get_text, shorten_reason)
from megatron_sov.judge.rewards.version import hash_code
from megatron_sov.sandbox.program import Limits, Outcome, Program
from megatron_sov.sandbox.sandbox import Sandbox, shared_sandbox

INSTALLED = Bound(lambda segmenter: None if segmenter != "pythainlp" or find_spec("pythainlp") else (
    ProblemCode.RULE, "needs pythainlp, which is not installed",
    "pip install pythainlp, or set segmenter=rules"))
Segmenter = Annotated[Literal["none", "rules", "pythainlp"], INSTALLED]
"""none: the text as it stands alone; rules: line ends end sentences; pythainlp: Thai words and sentences by
the library of that name, where it is installed."""
MODULES = frozenset(("__future__", "bisect", "collections", "csv", "dataclasses", "datetime", "decimal",
                     "difflib", "fractions", "functools", "heapq", "html", "itertools", "json", "math",
                     "operator", "re", "statistics", "string", "textwrap", "typing", "unicodedata"))
"""That a check may import."""
MAX_SOURCE_CHARS = 20_000
MAX_TEXT_CHARS = 400_000
"""Of a text that is checked; patterns over a longer one would take long."""
TOTAL_TIME_FACTOR = 4
"""A function has so many times the time of a call for all its texts together, and twice that by the clock."""
_WARNINGS_LOCK = threading.Lock()
"""Which warnings are shown is a matter of the whole process: one thread at a time changes it."""
_BANNED_NAMES = frozenset(("open", "exec", "eval", "compile", "input", "globals", "locals", "vars",
                           "breakpoint", "exit", "quit", "getattr", "setattr", "delattr", "memoryview", "id",
                           "hash"))
_BANNED_ATTRIBUTES = frozenset(("now", "today", "utcnow"))
"""Of datetime."""
MAX_FUNCTIONS = 20


def segment_text(text: str, segmenter: Segmenter) -> list[str]:
    """Return a text, with its sentences set apart by full stops, and with its words by blanks as well; each
    different one once.

    As Typhoon-S has it (arXiv 2601.18129, the authors' `data_processing`): there a response keeps a
    constraint where a function accepts any of the three.
    """
    if segmenter == "none":
        return [text]
    if segmenter == "rules":
        views = [text.replace("\n", ". ").strip(), " ".join(text.split())]
    else:
        from pythainlp import sent_tokenize, word_tokenize
        sentences = sent_tokenize(text)
        views = [".".join(sentences), ".".join(" ".join(word_tokenize(part)) for part in sentences)]
        views = [view.strip().strip(".").strip() for view in views]
    return list(dict.fromkeys([text, *views]))


@dataclass(frozen=True)
class ConstraintVerdict:
    """What a check says of a text."""

    accepts: bool | None
    """None: it gave no verdict."""
    reason: str = ""
    """Why it gave none."""
    ended: bool = True
    """Whether the call ended in time; behind one that did not, the function is not asked again."""


def find_check_problem(source: str, modules: Sequence[str] = ()) -> str:
    """Return why a source is no check; empty: it is one.

    Args:
        source: Python.
        modules: what it may import beside `MODULES`, where those are installed.
    """
    if len(source) > MAX_SOURCE_CHARS:
        return f"has {len(source):,} characters, at most {MAX_SOURCE_CHARS:,} are taken"
    try:
        # `catch_warnings` changes a filter of the whole process, and rewards may judge in threads
        with _WARNINGS_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model's "\d" is its own affair
            tree = ast.parse(source)
            compile(source, "check", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        return f"is no Python ({format_error(e)})"
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "evaluate"]
    if not functions:
        return "has no function evaluate(response)"
    # the last definition is the one that Python calls
    arguments = functions[-1].args
    # it is called with one positional argument: what else it takes needs a default
    required = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
    if required > 1 or not (arguments.posonlyargs or arguments.args) or any(
            default is None for default in arguments.kw_defaults):
        return "evaluate must take one argument, the response"
    # a module is named by its top package: `import os.path` is `os`
    allowed = MODULES | {name.partition(".")[0] for name in modules}
    return next(filter(None, (_find_node_problem(node, allowed) for node in ast.walk(tree))), "")


def _find_node_problem(node: ast.AST, allowed: frozenset[str]) -> str:
    imported: list[str] = []
    if isinstance(node, ast.Import):
        imported = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        # a relative import has no package here, so it is never allowed
        imported = [node.module or "."] if not node.level else ["."]
    for name in imported:
        if name.partition(".")[0] not in allowed:
            return f"imports {name}, which is not among the modules that compute on texts alone"
    # dunder names lead from any object to the interpreter: ().__class__.__base__ ...
    if isinstance(node, ast.Name) and (node.id in _BANNED_NAMES or _is_hidden(node.id)):
        return f"names {node.id}, which a check does not need"
    if isinstance(node, ast.Attribute) and (node.attr in _BANNED_ATTRIBUTES or _is_hidden(node.attr)):
        return f"names .{node.attr}, which a check does not need"
    return ""


def _is_hidden(name: str) -> bool:
    return name.startswith("__") and name != "__name__"


def check_texts(sandbox: Sandbox, source: str, texts: Sequence[str], *, call_s: float = 5.0,
             memory_bytes: int = 512 << 20) -> list[ConstraintVerdict]:
    """Return what a check says of each text; it runs in the sandbox, each call in a process of its own.

    Args:
        sandbox: where.
        source: of the check; `problem_of` has nothing against it.
        texts: at most `MAX_TEXT_CHARS` each.
        call_s: seconds of a processor for a call; all texts together have `CALLS_OF_TIME` times as much.
        memory_bytes: for a call.

    Raises:
        RuntimeError: the sandbox failed, or the machine was too busy to say whether the function is too slow.
    """
    total_s = TOTAL_TIME_FACTOR * call_s
    # the clock is twice the processor's time: a machine shared with others must not decide
    limits = Limits(wall_s=2 * total_s + 1, cpu_s=total_s, memory_bytes=memory_bytes)
    request = json.dumps({"source": source, "texts": list(texts), "call_s": call_s})
    outcome = sandbox.run(Program(_read_program(), stdin=request), limits)
    # no verdict of the function: the row fails, and does not count against the response
    if outcome.status in ("infrastructure", "refused"):
        raise RuntimeError(f"check function: {outcome.reason}")
    return _read_verdicts(outcome, len(texts))


def _read_verdicts(outcome: Outcome, count: int) -> list[ConstraintVerdict]:
    """Return the verdicts that a program wrote, and for the other texts why there is none."""
    verdict_by_index: dict[int, ConstraintVerdict] = {}
    for line in outcome.stdout.split("\n"):
        try:
            place, accepts, reason, how = json.loads(line)
        except (ValueError, TypeError, RecursionError):  # cut off where the program was ended
            break
        # lines come one by one: what was written before the program was ended still counts
        verdict_by_index[place] = ConstraintVerdict(accepts, reason, how == "ended")
    default = ConstraintVerdict(None, "was not asked: an earlier call did not end", ended=False)
    if outcome.status != "ok":
        default = ConstraintVerdict(None, outcome.reason or outcome.status, ended=False)
    return [verdict_by_index.get(place, default) for place in range(count)]


def _read_program() -> str:
    try:
        return Path(check_program.__file__).read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"{check_program.__file__}: cannot be read ({e.strerror}); install the package with "
                        "its sources") from None


@dataclass(frozen=True)
class Constraint:
    """1 where enough of the row's check functions accept the response, else 0; or the share that does."""

    LIBRARIES = ("pythainlp",)

    min_share: Share = 0.5
    """Of the functions, that must accept: half, as for the chosen answers of AutoIF's pairs (arXiv
    2406.13542); one alone, as in its data for fine-tuning, a policy gets around sooner; 0: one."""
    give_share: bool = False
    """Give the share of the functions that accept, instead of 1 or 0."""
    segmenter: Segmenter = "none"
    """Whether functions see sentences and words set apart as well."""
    call_time_s: Annotated[float, Ge(1), Le(60)] = 5.0
    """Of a processor, for a function and a text."""
    modules: tuple[str, ...] = ()
    """That functions may import beside those that compute on texts, where the machine has them."""
    hide_thinking: bool = True
    """Check what stands behind the last </think> alone."""
    enclosure: Literal["auto", "namespaces", "landlock"] = field(default="auto", metadata=OPERATION)
    """What encloses the functions; auto: the best that this machine gives."""
    command: tuple[str, ...] = field(default=(), metadata=OPERATION)
    """A command that encloses them instead, as ["bwrap", ...]; `{folder}` stands for its folder."""

    def inputs(self) -> dict[str, Any]:
        """Return what judges beside this process: the code of the sandbox's server, and its Python."""
        return {"server": hash_code("megatron_sov.sandbox.server"),
                "python": list(sys.version_info[:2])}

    def prepare(self) -> None:
        """Start the sandbox.

        Raises:
            UserError: this machine has none.
        """
        shared_sandbox(self.enclosure, self.command)

    def score(self, row: Row) -> Score:
        """Return whether the row's `functions` accept its response; one that gives no verdict does not.

        Raises:
            Refused: there are no functions, or one is none.
            TimeoutError: the machine was too busy.
        """
        response = get_content(row) if self.hide_thinking else unquote_marks(get_text(row, "response"))
        if len(response) > MAX_TEXT_CHARS:
            raise Refused(f"response has {len(response):,} characters; at most {MAX_TEXT_CHARS:,} are "
                          "checked")
        functions = get_functions(row, self.modules)
        views = segment_text(response.strip(), self.segmenter)
        sandbox = shared_sandbox(self.enclosure, self.command)
        # every function sees every view: each call has a process of its own, so order does not matter
        told = [check_texts(sandbox, function, views, call_s=self.call_time_s) for function in functions]
        # one view that it accepts is enough, as in Typhoon-S
        accepting = sum(any(one.accepts for one in each) for each in told)
        share = accepting / len(functions)
        why = next((one.reason for each in told for one in each if one.reason), "")
        # an empty response keeps many constraints ("no commas"), and is still worth nothing
        kept = accepting > 0 and share >= self.min_share and bool(response.strip())
        reward = float(kept)
        if self.give_share:
            reward = share if response.strip() else 0.0
        return Score(reward,
                     {"accepting": accepting, "functions": len(functions), "why": shorten_reason(why)})


def get_functions(row: Row, modules: tuple[str, ...] = ()) -> list[str]:
    """Return the sources of a row's check functions.

    Raises:
        Refused: there are none, too many, or one is none.
    """
    functions = row.get("functions")
    if not isinstance(functions, list) or not 0 < len(functions) <= MAX_FUNCTIONS:
        raise Refused(f"functions = {format_short(functions)} must be a list of 1 to {MAX_FUNCTIONS} texts "
                      "of Python, each with a function evaluate(response)")
    for place, function in enumerate(functions):
        if not isinstance(function, str):
            raise Refused(f"functions[{place}] = {format_short(function)} must be a text of Python")
        if problem := find_check_problem(function, modules):
            raise Refused(f"functions[{place}] {problem}")
    return functions
