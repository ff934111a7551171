"""Measure how readable names, docstrings, comments and pages are, and hold each hall to its limits.

Usage: python tests/readability.py             the figures of each hall that miss their goals
       python tests/readability.py FILE ...    the same for each file
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
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMITS = Path(__file__).with_name("readability.json")
SOURCES = ("megatron_sov", "data_prep", "tokenizer", "layout_proof", "docs", "README.md", "CONTRIBUTING.md",
           "CHANGELOG.md")
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


GOALS = {
    "one-word function names, %": 30.0,
    "vague words per 1,000 in function names": 15.0,
    "vague words per 1,000 in variables": 15.0,
    "docstrings: vague words per 1,000": 60.0,
    "docstrings: 'what' per 1,000": 1.0,
    "docstrings: 'of' per 1,000": 30.0,
    "docstrings: is/are/has/do per 1,000": 30.0,
    "docstrings: code terms per 1,000": 34.0,
    "docstrings: dialect phrases per 1,000": 1.0,
    "comments: vague words per 1,000": 75.0,
    "comments: 'what' per 1,000": 2.0,
    "comments: dialect phrases per 1,000": 1.0,
    "pages: vague words per 1,000": 65.0,
    "pages: 'what' per 1,000": 2.0,
    "pages: 'of' per 1,000": 16.0,
    "pages: dialect phrases per 1,000": 1.5,
}
MINIMA = {"docstrings: code terms per 1,000"}
"""Measures whose goal is the least value; the goals of the others are the largest."""


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


def is_beyond(measure: str, value: float, limit: float) -> bool:
    return value < limit if measure in MINIMA else value > limit


def find_excesses(measures: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    """Return a sentence for each measure beyond its limit, which is the goal unless `limits` has an entry."""
    problems = []
    for measure, value in measures.items():
        limit = limits.get(measure, GOALS[measure])
        if is_beyond(measure, value, limit):
            problems.append(f"{measure}: {value:.1f}, limit {limit:g}, goal {GOALS[measure]:g}")
    return problems


def tighten(measures: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, float]:
    """Return the limits of a hall lowered to its measures; a limit whose goal is met goes."""
    tightened = {}
    for measure, limit in limits.items():
        if measure in measures and is_beyond(measure, measures[measure], GOALS[measure]):
            limits_now = limit, compute_limit(measure, measures[measure])
            tightened[measure] = max(limits_now) if measure in MINIMA else min(limits_now)
    return tightened


def compute_limit(measure: str, value: float) -> float:
    """Round a value that misses its goal away from the goal, `TOLERANCE` included."""
    if measure in MINIMA:
        return math.floor(2 * value * (1 - TOLERANCE)) / 2
    return math.ceil(2 * value * (1 + TOLERANCE)) / 2


def load_limits() -> dict[str, dict[str, float]]:
    """Load hall -> measure -> limit, for the measures that miss their goals."""
    limits: dict[str, dict[str, float]] = json.loads(LIMITS.read_text(encoding="utf-8"))
    return limits


def save_limits(limits: Mapping[str, Mapping[str, float]]) -> None:
    LIMITS.write_text(json.dumps({hall: rows for hall, rows in limits.items() if rows}, indent=1) + "\n",
                      encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tighten", action="store_true", help="lower the limits to today's figures")
    parser.add_argument("paths", nargs="*", type=Path, help="files to measure one by one")
    args = parser.parse_args()
    groups = {str(path): [path] for path in args.paths} or list_halls()
    measures = {group: compute_measures(read_texts(files)) for group, files in groups.items()}
    for group, values in measures.items():
        print(group)
        for problem in find_excesses(values, GOALS):
            print(f"    {problem.replace('limit', 'goal').rpartition(',')[0]}")
    if args.tighten and not args.paths:
        limits = load_limits()
        save_limits({hall: tighten(values, limits.get(hall, {})) for hall, values in measures.items()})


if __name__ == "__main__":
    main()
