"""Compare all functions of two revisions as syntax trees, to show that a move of modules changed no code.

    python benchmarks/moved_bodies.py BEFORE [AFTER] > benchmarks/results/moved_bodies.txt

AFTER defaults to the work tree. A function or method is compared with its decorators, arguments and nested
definitions. Class fields and other module statements are counted in a separate column. Docstrings, comments
and imports are ignored, and `module.name` equals `name`.

  to the letter     the same tree and the same names, in any file
  but for names     names differ, one for one within a function: of variables, functions, classes, attributes
                    and arguments, and in strings that are paths or dotted modules
  names, not 1:1    the same tree, but one name became two or two became one; read these
  not found again   changed or removed; the new form may be in the list of new bodies

Each renaming is printed with its number of bodies, so that a change of `min` to `max` is visible.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("megatron_sov", "tokenizer", "data_prep")
WORK_TREE = "worktree"
ROOT = Path(__file__).parents[1]
PATH = re.compile(r"\.?[A-Za-z_][\w-]*([./:]\w[\w-]*)+")
OWN_MODULE = re.compile(rf"\b(?:{'|'.join(PACKAGES)})(?:[./:]\w+)+")
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
LETTER, NAMES, NOT_ONE_FOR_ONE = "to the letter", "but for names", "names, not 1:1"


@dataclass(frozen=True)
class Body:
    """A function, the fields of a class, or one statement of a module."""

    file: str
    line: int
    owner: str
    """Name of the enclosing class followed by a dot, or ""."""
    name: str
    is_function: bool
    tree: str
    """The syntax tree with `@` for each name."""
    names: tuple[str, ...]
    """The names in tree order, each with a letter for its kind: n name, a attribute, k keyword, s string."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.owner}{self.name}"

    @property
    def numbered(self) -> tuple[int, ...]:
        """Each name as the index of its first occurrence: equal if names differ one for one."""
        first: dict[str, int] = {}
        return tuple(first.setdefault(name, i) for i, name in enumerate(self.names))


def read_files(revision: str, root: Path = ROOT) -> dict[str, bytes]:
    """Return path -> content of the packages' files in a git revision or the work tree."""
    def git(*words: str) -> bytes:
        return subprocess.run(["git", *words], cwd=root, stdout=subprocess.PIPE, check=True).stdout

    if revision == WORK_TREE:
        listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").decode().split("\0")
        files = {path: (root / path).read_bytes() for path in listed if (root / path).is_file()}
    else:
        with tarfile.open(fileobj=io.BytesIO(git("archive", revision))) as archive:
            files = {m.name: f.read() for m in archive if m.isfile() and (f := archive.extractfile(m))}
    return {path: content for path, content in files.items() if path.partition("/")[0] in PACKAGES}


def find_imported_modules(tree: ast.Module, modules: set[str]) -> set[str]:
    """Return the names, including dotted ones, by which a file refers to imported modules."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name for a in node.names if f"{node.module}.{a.name}" in modules}
        elif isinstance(node, ast.Import):
            for parts in ([a.asname] if a.asname else a.name.split(".") for a in node.names):
                names |= {".".join(parts[:n + 1]) for n in range(len(parts))}
    return names


class Normalizer(ast.NodeTransformer):
    """Removes differences that do not count: docstrings, annotations, and the module in front of a name."""

    def __init__(self, modules: set[str]) -> None:
        self.modules = modules

    def visit(self, node: ast.AST) -> ast.AST | None:
        """Return the node to compare instead of this one, or None."""
        match node:
            case ast.Import() | ast.ImportFrom() | ast.Expr(ast.Constant(str())):
                return None
            case ast.Attribute() if ast.unparse(node.value) in self.modules:
                return ast.Name(node.attr)
        node = self.generic_visit(node)
        # the remainder of `if TYPE_CHECKING:`
        return None if isinstance(node, ast.If) and not node.body + node.orelse else node


def flatten(value: object, parts: list[str], names: list[str], kind: str = "n") -> None:
    """Append the nodes of a tree to `parts`, with `@` for names, and the names to `names`."""
    match value:
        case ast.Constant(str() as text):
            pattern = PATH if PATH.fullmatch(text) else OWN_MODULE
            names += [f"s{match.group()}" for match in pattern.finditer(text)]
            parts.append(repr(pattern.sub("@", text)))
        case ast.Constant():
            parts.append(repr(value.value))
        case ast.AST():
            parts.append(type(value).__name__)
            kind = {"Attribute": "a", "keyword": "k"}.get(parts[-1], "n")
            for field, child in ast.iter_fields(value):
                if field != "ctx":
                    flatten(child, parts, names, kind)
        case list():
            parts.append(f"[{len(value)}")
            for child in value:
                flatten(child, parts, names, kind)
        case str():
            parts.append("@")
            names.append(kind + value)
        case _:
            parts.append(repr(value))


def iter_bodies(path: str, nodes: Sequence[ast.stmt], modules: set[str], owner: str = "") -> Iterator[Body]:
    """Yield the functions and methods of a file or class, normalized."""
    for node in nodes:
        name = str(getattr(node, "name", type(node).__name__))
        if isinstance(node, ast.Assign | ast.AnnAssign):
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        elif isinstance(node, ast.ClassDef):
            inner = [n for n in node.body if isinstance(n, FUNCTION | ast.ClassDef)]
            yield from iter_bodies(path, inner, modules, f"{owner}{name}.")
            node.body = [n for n in node.body if n not in inner]
        # a variable with a module's name is not a module
        bound = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        bound |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        plain = Normalizer({m for m in modules if m.partition(".")[0] not in bound}).visit(node)
        if plain is not None:
            parts: list[str] = []
            names: list[str] = []
            flatten(plain, parts, names)
            yield Body(path, node.lineno, owner, name, isinstance(node, FUNCTION),
                       " ".join((*parts, str(len(names)))), tuple(names))


def collect_bodies(files: dict[str, bytes]) -> list[Body]:
    """Return the normalized bodies of all Python files."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in files}
    trees = {path: ast.parse(content) for path, content in files.items() if path.endswith(".py")}
    return [body for path, tree in trees.items()
            for body in iter_bodies(path, tree.body, find_imported_modules(tree, modules))]


KEYS: tuple[Callable[[Body], Hashable], ...] = (
    lambda b: (b.file, b.owner, b.name, b.tree, b.names), lambda b: (b.owner, b.name, b.tree, b.names),
    lambda b: (b.name, b.tree, b.names), lambda b: (b.owner, b.name, b.tree, b.numbered),
    lambda b: (b.name, b.tree, b.numbered), lambda b: (b.tree, b.numbered), lambda b: (b.name, b.tree),
    lambda b: b.tree)
"""Properties by which two bodies are matched, from strict to loose."""


def match_bodies(before: list[Body], after: list[Body]
                 ) -> tuple[list[tuple[Body, Body]], list[Body], list[Body]]:
    """Return matched pairs, unmatched bodies of the old revision, and those of the new revision."""
    pairs: list[tuple[Body, Body]] = []
    for key in KEYS:
        waiting: defaultdict[Hashable, list[Body]] = defaultdict(list)
        for body in after:
            waiting[key(body)].append(body)
        unmatched = []
        for body in before:
            if partners := waiting.get(key(body)):
                pairs.append((body, partners.pop(0)))
            else:
                unmatched.append(body)
        before, after = unmatched, [body for partners in waiting.values() for body in partners]
    return pairs, before, after


def compare_names(old: Body, new: Body) -> str:
    """Return the kind of equality of a matched pair."""
    if (old.owner, old.names) == (new.owner, new.names):
        return LETTER
    return NAMES if old.numbered == new.numbered else NOT_ONE_FOR_ONE


def report(before: dict[str, bytes], after: dict[str, bytes]) -> Iterator[str]:
    """Yield the lines of a comparison of two sets of files (path -> content)."""
    old, new = collect_bodies(before), collect_bodies(after)
    pairs, gone, added = match_bodies(old, new)
    groups = {"before": old, "after": new, LETTER: [], NAMES: [], NOT_ONE_FOR_ONE: [],
              "not found again": gone, "new": added}
    for before_body, after_body in pairs:
        groups[compare_names(before_body, after_body)].append(before_body)
    yield f"{'':<16} {'functions':>10} {'fields and statements':>22}"
    for title, bodies in groups.items():
        num_functions = sum(body.is_function for body in bodies)
        yield f"{title:<16} {num_functions:>10,} {len(bodies) - num_functions:>22,}"
    data = [Counter(content for path, content in files.items() if not path.endswith(".py"))
            for files in (before, after)]
    yield (f"\nfiles that are not Python: {data[0].total()} before, {data[1].total()} after, "
           f"{(data[0] & data[1]).total()} with the same bytes")
    partner = {id(before_body): f"  now {after_body}" for before_body, after_body in pairs}
    for title in (NOT_ONE_FOR_ONE, "not found again", "new"):
        yield f"\n{title}:"
        yield from sorted(f"  {body}{partner.get(id(body), '')}" for body in groups[title])
    renamed: Counter[tuple[str, str]] = Counter()
    for old_body, new_body in pairs:
        names = {*zip(old_body.names, new_body.names, strict=True),
                 (f"o{old_body.owner}", f"o{new_body.owner}")}
        renamed.update((a[1:], b[1:]) for a, b in names if a != b)
    yield "\nnames that became others, and in how many bodies:"
    for (a, b), count in sorted(renamed.items(), key=lambda item: (-item[1], item[0])):
        yield f"  {count:>5}  {a} -> {b}"


def main() -> None:
    """Compare two revisions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("before", help="git revision")
    parser.add_argument("after", nargs="?", default=WORK_TREE, help=f"git revision, or {WORK_TREE} (default)")
    args = parser.parse_args()
    print(*report(read_files(args.before), read_files(args.after)), sep="\n")


if __name__ == "__main__":
    main()
