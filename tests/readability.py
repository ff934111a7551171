"""Measure how readable names, docstrings, comments and pages are, and hold each hall to its limits.

Usage: python tests/readability.py             figures of each hall; * marks a figure that misses its goal
       python tests/readability.py --worst N   the N files that miss most goals
       python tests/readability.py --tighten   lower the limits in readability.json to today's figures

A vague word ("what", "one", "those") names no tensor, file, setting or process. Text that names its subject
has few vague words, so a share of them measures how much a reader must guess. The goals are the figures of
torchtitan, TRL, OLMo-core and datatrove in August 2026. A reader who stumbles outranks the figures.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMITS = Path(__file__).with_name("readability.json")
SOURCES = ("megatron_sov", "data_prep", "tokenizer", "docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
VAGUE_WORDS = frozenset(re.findall(r"\w+", """
    what whatever which whose that this these those it its they them their theirs one ones other others
    another such as so here there then than each any all none nobody nothing something someone"""))
VAGUE_NAMES = frozenset(re.findall(r"\w+", """
    what of as so that it its own here there one ones other others such all any each none told said asked held
    kept made given shown meant placed known seen wanted left found done behind beside apart anew again whole
    together away"""))
VERBS_OF_BEING = frozenset(re.findall(r"\w+", "is are was were be been being has have had do does did"))
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
DIALECT = re.compile(
    r"\b(?:(?:is|are|was) no (?!longer|more|such)[a-z]+|goes? on|went on|behind|beside|told|tells?|anew|"
    r"by lot|whatever|whoever|(?:lies|lie|stands|stand) (?:in|on|at|beside|behind|where)|mend(?:s|ed|ing)?|"
    r"of (?:it|them|which|that|those)|that of|those of|the (?:one|other|others) (?:that|of|which))\b", re.I)
"""Phrases that this repository had and the four codebases hardly use."""
CODE_TERM = re.compile(r"`[^`]+`|\w+_\w+|\w+\.\w+\(|[A-Z][a-z]+[A-Z]\w+")
COMMENT_OR_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"""|' r"'''(?:\\.|[^\\])*?'''|" r'"(?:\\.|[^"\\\n])*"|' r"'(?:\\.|[^'\\\n])*'|"
    r"(?P<comment>#[^\n]*)", re.DOTALL)
"""Strings are matched so that a `#` inside one is not taken for a comment."""
NOT_PROSE = ("#!", "# type:", "# noqa")
MIN_WORDS = 50
"""Shares of fewer words are noise and are left out."""
TOLERANCE = 0.02
"""A hall may exceed the figure that set its limit by this share, and by the rounding to 0.5."""


@dataclass(frozen=True)
class Goal:
    """Value that a measure should reach, and the heading of its column."""

    value: float
    column: str
    is_minimum: bool = False

    def is_met(self, value: float) -> bool:
        return value >= self.value if self.is_minimum else value <= self.value


GOALS = {
    "one-word function names, %": Goal(30, "1-word"),
    "vague words per 1,000 in function names": Goal(15, "fn.vag"),
    "vague words per 1,000 in variables": Goal(15, "var.vag"),
    "docstrings: vague words per 1,000": Goal(60, "doc.vag"),
    "docstrings: 'what' per 1,000": Goal(1, "what"),
    "docstrings: 'of' per 1,000": Goal(30, "of"),
    "docstrings: is/are/has/do per 1,000": Goal(30, "is"),
    "docstrings: code terms per 1,000": Goal(34, "code", is_minimum=True),
    "docstrings: dialect phrases per 1,000": Goal(1, "dialect"),
    "comments: vague words per 1,000": Goal(75, "com.vag"),
    "comments: 'what' per 1,000": Goal(2, "what"),
    "comments: dialect phrases per 1,000": Goal(1, "dialect"),
    "pages: vague words per 1,000": Goal(65, "page.vag"),
    "pages: 'what' per 1,000": Goal(2, "what"),
    "pages: 'of' per 1,000": Goal(16, "of"),
    "pages: dialect phrases per 1,000": Goal(1.5, "dialect"),
}


@dataclass
class Texts:
    """Names and prose of files."""

    functions: list[str] = field(default_factory=list)
    variables: list[str] = field(default_factory=list)
    docstrings: list[str] = field(default_factory=list)
    """First paragraph of each, including strings below fields and constants."""
    comments: list[str] = field(default_factory=list)
    """Comments on consecutive lines are one text."""
    pages: list[str] = field(default_factory=list)
    """Paragraphs of Markdown."""

    def extend(self, other: Texts) -> None:
        for name in vars(self):
            getattr(self, name).extend(getattr(other, name))


def read_python(source: str) -> Texts:
    """Collect the texts of one Python file."""
    texts = Texts(comments=list(iter_comment_blocks(source)))
    for node in iter_nodes(ast.parse(source)):
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store):
                texts.variables.append(node.id)
        elif isinstance(node, ast.Expr):
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                texts.docstrings.append(get_first_paragraph(node.value.value))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            if docstring := ast.get_docstring(node):
                texts.docstrings.append(get_first_paragraph(docstring))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("__"):
                texts.functions.append(node.name)
    return texts


def iter_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes of a syntax tree, in no particular order; faster than `ast.walk`."""
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node
        for value in vars(node).values():
            if isinstance(value, list):
                stack.extend(child for child in value if isinstance(child, ast.AST))
            elif isinstance(value, ast.AST):
                stack.append(value)


def get_first_paragraph(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def iter_comment_blocks(source: str) -> Iterator[str]:
    """Yield the text of each comment; comments on consecutive lines are joined."""
    block: list[str] = []
    line, offset, last_line = 0, 0, -2
    for match in COMMENT_OR_STRING.finditer(source):
        comment = match["comment"]
        if comment is None or comment.startswith(NOT_PROSE):
            continue
        line += source.count("\n", offset, match.start())
        offset = match.start()
        if block and line != last_line + 1:
            yield " ".join(block)
            block = []
        block.append(comment.rstrip("\r").lstrip("# "))
        last_line = line
    if block:
        yield " ".join(block)


def read_page(source: str) -> Texts:
    """Collect the paragraphs of a Markdown page, without code blocks, headings and images."""
    without_code = re.sub(r"```.*?```", "", source, flags=re.DOTALL)
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", without_code))
    return Texts(pages=[block for block in blocks if block and not block.startswith(("#", "!", "<"))])


def read_texts(files: Iterable[Path]) -> Texts:
    """Collect the texts of Python files and pages together."""
    texts = Texts()
    for file in files:
        source = file.read_text(encoding="utf-8")
        texts.extend(read_python(source) if file.suffix == ".py" else read_page(source))
    return texts


def list_halls(root: Path = ROOT) -> dict[str, list[Path]]:
    """Map each hall to its files: a folder in a top-level one, the files next to such folders, or a page."""
    halls: dict[str, list[Path]] = defaultdict(list)
    for name in SOURCES:
        top = root / name
        for file in [top] if top.is_file() else sorted(top.rglob("*")):
            if file.suffix in (".py", ".md"):
                parts = file.relative_to(root).parts
                halls["/".join(parts[:2 if len(parts) > 2 else 1])].append(file)
    return dict(sorted(halls.items()))


def compute_measures(texts: Texts) -> dict[str, float]:
    """Compute every measure of `GOALS` for which there is enough text."""
    measures = {}
    if texts.functions:
        num_single = sum("_" not in name.strip("_") for name in texts.functions)
        measures["one-word function names, %"] = 100 * num_single / len(texts.functions)
        measures["vague words per 1,000 in function names"] = compute_share_of_vague_names(texts.functions)
    if texts.variables:
        measures["vague words per 1,000 in variables"] = compute_share_of_vague_names(texts.variables)
    for kind, paragraphs in (("docstrings", texts.docstrings), ("comments", texts.comments),
                             ("pages", texts.pages)):
        measures |= {measure: value for measure, value in compute_prose_measures(kind, paragraphs).items()
                     if measure in GOALS}
    return measures


def compute_share_of_vague_names(names: list[str]) -> float:
    """Compute the vague parts among 1,000 parts of names."""
    parts = [part for name in names for part in name.strip("_").lower().split("_")]
    return 1000 * sum(part in VAGUE_NAMES for part in parts) / len(parts)


def compute_prose_measures(kind: str, paragraphs: list[str]) -> dict[str, float]:
    words = [word.lower() for text in paragraphs for word in WORD.findall(text)]
    if len(words) < MIN_WORDS:
        return {}
    numbers = Counter(words)
    counts = {
        "vague words": sum(numbers[word] for word in VAGUE_WORDS),
        "'what'": numbers["what"],
        "'of'": numbers["of"],
        "is/are/has/do": sum(numbers[word] for word in VERBS_OF_BEING),
        "code terms": sum(len(CODE_TERM.findall(text)) for text in paragraphs),
        "dialect phrases": sum(len(DIALECT.findall(text)) for text in paragraphs),
    }
    return {f"{kind}: {name} per 1,000": 1000 * count / len(words) for name, count in counts.items()}


def find_misses(measures: Mapping[str, float]) -> list[str]:
    """Return the measures that miss their goals."""
    return [measure for measure, value in measures.items() if not GOALS[measure].is_met(value)]


def find_excesses(measures: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    """Return a sentence for each measure beyond its limit, which is the goal unless `limits` has an entry."""
    problems = []
    for measure, value in measures.items():
        goal = GOALS[measure]
        limit = limits.get(measure, goal.value)
        if value < limit if goal.is_minimum else value > limit:
            problems.append(f"{measure}: {value:.1f}, limit {limit:g}, goal {goal.value:g}")
    return problems


def tighten(measures: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, float]:
    """Return the limits of a hall lowered to its measures; a limit whose goal is met goes."""
    tightened = {}
    for measure, limit in limits.items():
        goal = GOALS[measure]
        if measure not in measures or goal.is_met(measures[measure]):
            continue
        tolerated = compute_limit(measure, measures[measure])
        tightened[measure] = max(limit, tolerated) if goal.is_minimum else min(limit, tolerated)
    return tightened


def compute_limit(measure: str, value: float) -> float:
    """Round a value that misses its goal away from the goal, `TOLERANCE` included."""
    if GOALS[measure].is_minimum:
        return math.floor(2 * value * (1 - TOLERANCE)) / 2
    return math.ceil(2 * value * (1 + TOLERANCE)) / 2


def load_limits() -> dict[str, dict[str, float]]:
    """Load hall -> measure -> limit, for the measures that miss their goals."""
    limits: dict[str, dict[str, float]] = json.loads(LIMITS.read_text(encoding="utf-8"))
    return limits


def save_limits(limits: Mapping[str, Mapping[str, float]]) -> None:
    LIMITS.write_text(json.dumps({hall: rows for hall, rows in limits.items() if rows}, indent=1) + "\n",
                      encoding="utf-8")


def print_table(halls: Mapping[str, Mapping[str, float]]) -> None:
    """Print one row for each hall of Python files, then one for each hall of pages."""
    for is_of_pages in (False, True):
        columns = [measure for measure in GOALS if measure.startswith("pages") == is_of_pages]
        print(f"{'':24}" + "".join(f"{GOALS[measure].column:>10}" for measure in columns))
        goals = [f"{GOALS[measure].value:g}" for measure in columns]
        print(f"{'goal':24}" + "".join(f"{goal:>10}" for goal in goals))
        for hall, measures in halls.items():
            if not measures.keys() & set(columns):
                continue
            missed = find_misses(measures)
            cells = []
            for measure in columns:
                mark = "*" if measure in missed else " "
                cells.append(f"{measures[measure]:.1f}{mark}" if measure in measures else "- ")
            print(f"{hall:24}" + "".join(f"{cell:>10}" for cell in cells))


def print_worst_files(num_files: int) -> None:
    ranked = []
    for file in (file for files in list_halls().values() for file in files):
        num_missed = len(find_misses(compute_measures(read_texts([file]))))
        ranked.append((num_missed, file.relative_to(ROOT).as_posix()))
    for num_missed, name in sorted(ranked, reverse=True)[:num_files]:
        print(f"{num_missed:3} {name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worst", type=int, metavar="N", help="the N files that miss most goals")
    parser.add_argument("--tighten", action="store_true", help="lower the limits to today's figures")
    args = parser.parse_args()
    if args.worst:
        print_worst_files(args.worst)
        return 0
    halls = {hall: compute_measures(read_texts(files)) for hall, files in list_halls().items()}
    if args.tighten:
        limits = load_limits()
        save_limits({hall: tighten(measures, limits.get(hall, {})) for hall, measures in halls.items()})
    print_table(halls)
    print(f"{sum(len(find_misses(measures)) for measures in halls.values())} goals missed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
