"""Reward `constraint`: check functions, written by a model and tested beforehand, accept the response.

A check is Python source with `evaluate(response)`, which returns True or False (AutoIF, arXiv 2406.13542).
Only modules for text and numbers may be imported, not files, clocks or random numbers, so that the verdict
depends on the text alone. This rule ensures quality; the sandbox ensures safety.
"""

import ast
import json
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from megatron_sov.base.errors import format_error
from megatron_sov.base.settings import Bound, ProblemCode, Share
from megatron_sov.chat.marks import unquote_marks
from megatron_sov.judge.rewards import check_program
from megatron_sov.judge.rewards.reward import (
    OPERATION, Refused, Row, Score, format_short, get_content, get_text, shorten_reason)
from megatron_sov.judge.rewards.version import hash_code, read_source
from megatron_sov.sandbox.program import Limits, Outcome, Program
from megatron_sov.sandbox.sandbox import Sandbox, shared_sandbox

INSTALLED = Bound(lambda segmenter: None if segmenter != "pythainlp" or find_spec("pythainlp") else (
    ProblemCode.RULE, "needs pythainlp, which is not installed",
    "pip install pythainlp, or set segmenter=rules"))
Segmenter = Annotated[Literal["none", "rules", "pythainlp"], INSTALLED]
"""`none`: the text only; `rules`: line ends end sentences; `pythainlp`: Thai words and sentences, if the
package is installed."""
MODULES = frozenset(("__future__", "bisect", "collections", "csv", "dataclasses", "datetime", "decimal",
                     "difflib", "fractions", "functools", "heapq", "html", "itertools", "json", "math",
                     "operator", "re", "statistics", "string", "textwrap", "typing", "unicodedata"))
"""Modules that a check may import."""
MAX_SOURCE_CHARS = 20_000
MAX_TEXT_CHARS = 400_000
"""Longest text to check, because patterns are slow on longer texts."""
TOTAL_TIME_FACTOR = 4
"""Total time for a function, in multiples of `call_s`; the clock limit is twice as long."""
_WARNINGS_LOCK = threading.Lock()
"""Guards the warning filters, which are global to the process."""
_BANNED_NAMES = frozenset(("open", "exec", "eval", "compile", "input", "globals", "locals", "vars",
                           "breakpoint", "exit", "quit", "getattr", "setattr", "delattr", "memoryview", "id",
                           "hash"))
_BANNED_ATTRIBUTES = frozenset(("now", "today", "utcnow"))
"""Attributes in `datetime`."""
MAX_FUNCTIONS = 20


def segment_text(text: str, segmenter: Segmenter) -> list[str]:
    """Return the text, the text with sentences separated by full stops, and with words separated by spaces;
    without duplicates.

    As in Typhoon-S (arXiv 2601.18129, the authors' `data_processing`), where a response passes if a function
    accepts any variant.
    """
    if segmenter == "none":
        return [text]
    if segmenter == "rules":
        views = [text.replace("\n", ". ").strip(), " ".join(text.split())]
    else:
        from pythainlp import sent_tokenize, word_tokenize  # optional package

        sentences = sent_tokenize(text)
        views = [".".join(sentences), ".".join(" ".join(word_tokenize(part)) for part in sentences)]
        views = [view.strip().strip(".").strip() for view in views]
    return list(dict.fromkeys([text, *views]))


@dataclass(frozen=True)
class ConstraintVerdict:
    """Verdict by `evaluate` on a text."""

    accepts: bool | None
    """None without a verdict."""
    reason: str = ""
    """Reason for a missing verdict."""
    ended: bool = True
    """The call ended in time; otherwise the function is not called again."""


def find_check_problem(source: str, modules: Sequence[str] = ()) -> str:
    """Return the reason why source is not a valid check; "" for a valid check.

    Args:
        source: Python source.
        modules: importable modules in addition to `MODULES`.
    """
    if len(source) > MAX_SOURCE_CHARS:
        return f"has {len(source):,} characters, at most {MAX_SOURCE_CHARS:,} are taken"
    try:
        # `catch_warnings` changes a global filter, and rewards may run in threads.
        with _WARNINGS_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in generated code are harmless
            tree = ast.parse(source)
            compile(source, "check", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        return f"is no Python ({format_error(e)})"
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "evaluate"]
    if not functions:
        return "has no function evaluate(response)"
    # Python calls the last definition.
    arguments = functions[-1].args
    # The call passes a single positional argument, so further parameters need defaults.
    required = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
    if required > 1 or not (arguments.posonlyargs or arguments.args) or any(
            default is None for default in arguments.kw_defaults):
        return "evaluate must take one argument, the response"
    # Modules are allowed by top-level package: `import os.path` is `os`.
    allowed = MODULES | {name.partition(".")[0] for name in modules}
    return next(filter(None, (_find_node_problem(node, allowed) for node in ast.walk(tree))), "")


def _find_node_problem(node: ast.AST, allowed: frozenset[str]) -> str:
    imported: list[str] = []
    if isinstance(node, ast.Import):
        imported = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        # A relative import has no package in the sandbox.
        imported = [node.module or "."] if not node.level else ["."]
    for name in imported:
        if name.partition(".")[0] not in allowed:
            return f"imports {name}, which is not among the modules that compute on texts alone"
    # Dunder names lead from any object to the interpreter: ().__class__.__base__ ...
    if isinstance(node, ast.Name) and (node.id in _BANNED_NAMES or _is_hidden(node.id)):
        return f"names {node.id}, which a check does not need"
    if isinstance(node, ast.Attribute) and (node.attr in _BANNED_ATTRIBUTES or _is_hidden(node.attr)):
        return f"names .{node.attr}, which a check does not need"
    return ""


def _is_hidden(name: str) -> bool:
    return name.startswith("__") and name != "__name__"


def check_texts(sandbox: Sandbox, source: str, texts: Sequence[str], *, call_s: float = 5.0,
                memory_bytes: int = 512 << 20) -> list[ConstraintVerdict]:
    """Run a check on texts in the sandbox, each call in its own process.

    Args:
        sandbox: sandbox to use.
        source: valid check, see `find_check_problem`.
        texts: texts of at most `MAX_TEXT_CHARS`.
        call_s: processor time per call; `TOTAL_TIME_FACTOR` times as much for all texts.
        memory_bytes: memory per call.

    Raises:
        RuntimeError: the sandbox failed, or the machine was too busy.
    """
    total_s = TOTAL_TIME_FACTOR * call_s
    # The clock limit is twice the processor time, because the machine may be shared.
    limits = Limits(wall_s=2 * total_s + 1, cpu_s=total_s, memory_bytes=memory_bytes)
    request = json.dumps({"source": source, "texts": list(texts), "call_s": call_s})
    outcome = sandbox.run(Program(read_source(check_program.__name__), stdin=request), limits)
    # The row fails; the response is not penalized.
    if outcome.status in ("infrastructure", "refused"):
        raise RuntimeError(f"check function: {outcome.reason}")
    return _read_verdicts(outcome, len(texts))


def _read_verdicts(outcome: Outcome, count: int) -> list[ConstraintVerdict]:
    """Parse the verdicts in the program's output; texts without a line get the program's reason."""
    verdict_by_index: dict[int, ConstraintVerdict] = {}
    for line in outcome.stdout.split("\n"):
        try:
            place, accepts, reason, how = json.loads(line)
        except (ValueError, TypeError, RecursionError):  # truncated when the program was ended
            break
        # Lines written before the program was ended still count.
        verdict_by_index[place] = ConstraintVerdict(accepts, reason, how == "ended")
    default = ConstraintVerdict(None, "was not asked: an earlier call did not end", ended=False)
    if outcome.status != "ok":
        default = ConstraintVerdict(None, outcome.reason or outcome.status, ended=False)
    return [verdict_by_index.get(place, default) for place in range(count)]


@dataclass(frozen=True)
class Constraint:
    """Reward `constraint`: 1 if enough check functions accept the response, else 0; or their share."""

    LIBRARIES = ("pythainlp",)

    min_share: Share = 0.5
    """Share that must accept: half, as for chosen answers in AutoIF (arXiv 2406.13542). 0: a single function,
    which a policy learns to exploit sooner."""
    give_share: bool = False
    """Return the accepting share instead of 1 or 0."""
    segmenter: Segmenter = "none"
    """Also check variants with sentences and words separated."""
    call_time_s: Annotated[float, Ge(1), Le(60)] = 5.0
    """Processor time per function and text."""
    modules: tuple[str, ...] = ()
    """Importable modules in addition to the defaults, if installed."""
    hide_thinking: bool = True
    """Check only the text after the last </think>."""
    enclosure: Literal["auto", "namespaces", "landlock"] = field(default="auto", metadata=OPERATION)
    """Sandbox type; auto: the strongest on this machine."""
    command: tuple[str, ...] = field(default=(), metadata=OPERATION)
    """Enclosing command instead, e.g. ["bwrap", ...]; `{folder}` is replaced by the program's folder."""

    def inputs(self) -> dict[str, Any]:
        """Return version inputs beyond this process: sandbox server code and Python version."""
        return {"server": hash_code("megatron_sov.sandbox.server"), "python": list(sys.version_info[:2])}

    def prepare(self) -> None:
        """Start the sandbox.

        Raises:
            UserError: the machine cannot sandbox programs.
        """
        shared_sandbox(self.enclosure, self.command)

    def score(self, row: Row) -> Score:
        """Run the row's `functions` on its response; a missing verdict counts as rejection.

        Raises:
            Refused: functions are missing or invalid.
            TimeoutError: the machine was too busy.
        """
        response = get_content(row) if self.hide_thinking else unquote_marks(get_text(row, "response"))
        if len(response) > MAX_TEXT_CHARS:
            raise Refused(f"response has {len(response):,} characters; at most {MAX_TEXT_CHARS:,} are "
                          "checked")
        functions = get_functions(row, self.modules)
        views = segment_text(response.strip(), self.segmenter)
        sandbox = shared_sandbox(self.enclosure, self.command)
        # Order does not matter, because each call has its own process.
        verdicts = [check_texts(sandbox, function, views, call_s=self.call_time_s) for function in functions]
        # One accepted variant suffices, as in Typhoon-S.
        accepting = sum(any(verdict.accepts for verdict in function_verdicts)
                        for function_verdicts in verdicts)
        share = accepting / len(functions)
        reasons = [verdict.reason for function_verdicts in verdicts for verdict in function_verdicts]
        why = next(filter(None, reasons), "")
        # An empty response satisfies many constraints ("no commas") but scores 0.
        passes = accepting > 0 and share >= self.min_share and bool(response.strip())
        reward = float(passes)
        if self.give_share:
            reward = share if response.strip() else 0.0
        return Score(reward,
                     {"accepting": accepting, "functions": len(functions), "why": shorten_reason(why)})


def get_functions(row: Row, modules: tuple[str, ...] = ()) -> list[str]:
    """Return a row's check functions.

    Raises:
        Refused: functions are missing, too many or invalid.
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
