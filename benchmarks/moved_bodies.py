"""Compare all functions of two revisions as syntax trees, to show that a move of modules changed no code.

    python benchmarks/moved_bodies.py BEFORE [AFTER] > benchmarks/results/moved_bodies.txt

AFTER is the work tree where it is not given.  A function or method is compared with its decorators, its
arguments and all that is nested in it.  The fields of a class and the other statements of a module have a
column of their own.  Docstrings, comments and imports do not count, and `module.name` is `name`.

  to the letter     the same tree and the same names, in any file
  but for names     names differ, one for one within a function: of variables, functions, classes, attributes
                    and arguments, and in strings that are paths or dotted modules
  names, not 1:1    the same tree, yet one name became two or two became one; read these
  not found again   changed or gone; its other half may be among the new ones

Each name that became another is printed with the number of bodies: `min -> max` would be there.
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
    """Class that it belongs to, with a dot, or nothing."""
    name: str
    is_function: bool
    tree: str
    """The syntax tree with `@` for each name."""
    names: tuple[str, ...]
    """The names, in the order of the tree; a letter in front says of what."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.owner}{self.name}"

    @property
    def numbered(self) -> tuple[int, ...]:
        """Each name as the place of its first occurrence: equal where names differ one for one."""
        first: dict[str, int] = {}
        return tuple(first.setdefault(name, i) for i, name in enumerate(self.names))


def files_of(revision: str, root: Path = ROOT) -> dict[str, bytes]:
    """Return the packages' files, by path, of a git revision or of the work tree."""
    def git(*words: str) -> bytes:
        return subprocess.run(["git", *words], cwd=root, stdout=subprocess.PIPE, check=True).stdout

    if revision == WORK_TREE:
        listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").decode().split("\0")
        found = {path: (root / path).read_bytes() for path in listed if (root / path).is_file()}
    else:
        with tarfile.open(fileobj=io.BytesIO(git("archive", revision))) as archive:
            found = {m.name: f.read() for m in archive if m.isfile() and (f := archive.extractfile(m))}
    return {path: content for path, content in found.items() if path.partition("/")[0] in PACKAGES}


def imported_modules(tree: ast.Module, known: set[str]) -> set[str]:
    """Return the names, including dotted ones, by which a file refers to imported modules."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name for a in node.names if f"{node.module}.{a.name}" in known}
        elif isinstance(node, ast.Import):
            for parts in ([a.asname] if a.asname else a.name.split(".") for a in node.names):
                found |= {".".join(parts[:n + 1]) for n in range(len(parts))}
    return found


class Plain(ast.NodeTransformer):
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


def flat(value: object, parts: list[str], names: list[str], kind: str = "n") -> None:
    """Append a tree's parts, with `@` for names, and its names."""
    match value:
        case ast.Constant(str() as text):
            pattern = PATH if PATH.fullmatch(text) else OWN_MODULE
            names += [f"s{found.group()}" for found in pattern.finditer(text)]
            parts.append(repr(pattern.sub("@", text)))
        case ast.Constant():
            parts.append(repr(value.value))
        case ast.AST():
            parts.append(type(value).__name__)
            kind = {"Attribute": "a", "keyword": "k"}.get(parts[-1], "n")
            for field, child in ast.iter_fields(value):
                if field != "ctx":
                    flat(child, parts, names, kind)
        case list():
            parts.append(f"[{len(value)}")
            for child in value:
                flat(child, parts, names, kind)
        case str():
            parts.append("@")
            names.append(kind + value)
        case _:
            parts.append(repr(value))


def bodies_of(path: str, nodes: Sequence[ast.stmt], modules: set[str], owner: str = "") -> Iterator[Body]:
    """Yield the functions and methods of a file or class, normalized."""
    for node in nodes:
        name = str(getattr(node, "name", type(node).__name__))
        if isinstance(node, ast.Assign | ast.AnnAssign):
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        elif isinstance(node, ast.ClassDef):
            inner = [n for n in node.body if isinstance(n, FUNCTION | ast.ClassDef)]
            yield from bodies_of(path, inner, modules, f"{owner}{name}.")
            node.body = [n for n in node.body if n not in inner]
        # a variable with a module's name is not a module
        bound = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        bound |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        plain = Plain({m for m in modules if m.partition(".")[0] not in bound}).visit(node)
        if plain is not None:
            parts: list[str] = []
            names: list[str] = []
            flat(plain, parts, names)
            yield Body(path, node.lineno, owner, name, isinstance(node, FUNCTION),
                       " ".join((*parts, str(len(names)))), tuple(names))


def all_bodies(files: dict[str, bytes]) -> list[Body]:
    """Return the normalized bodies of all Python files."""
    known = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in files}
    trees = {path: ast.parse(content) for path, content in files.items() if path.endswith(".py")}
    return [body for path, tree in trees.items()
            for body in bodies_of(path, tree.body, imported_modules(tree, known))]


KEYS: tuple[Callable[[Body], Hashable], ...] = (
    lambda b: (b.file, b.owner, b.name, b.tree, b.names), lambda b: (b.owner, b.name, b.tree, b.names),
    lambda b: (b.name, b.tree, b.names), lambda b: (b.owner, b.name, b.tree, b.numbered),
    lambda b: (b.name, b.tree, b.numbered), lambda b: (b.tree, b.numbered), lambda b: (b.name, b.tree),
    lambda b: b.tree)
"""What two bodies have in common to be a pair, the closest first."""


def paired(before: list[Body], after: list[Body]) -> tuple[list[tuple[Body, Body]], list[Body], list[Body]]:
    """Return matched pairs, unmatched bodies of the old revision, and those of the new revision."""
    pairs: list[tuple[Body, Body]] = []
    for key in KEYS:
        waiting: defaultdict[Hashable, list[Body]] = defaultdict(list)
        for body in after:
            waiting[key(body)].append(body)
        left = []
        for body in before:
            if partners := waiting.get(key(body)):
                pairs.append((body, partners.pop(0)))
            else:
                left.append(body)
        before, after = left, [body for partners in waiting.values() for body in partners]
    return pairs, before, after


def alike(old: Body, new: Body) -> str:
    """Return how far a pair is the same."""
    if (old.owner, old.names) == (new.owner, new.names):
        return LETTER
    return NAMES if old.numbered == new.numbered else NOT_ONE_FOR_ONE


def report(before: dict[str, bytes], after: dict[str, bytes]) -> Iterator[str]:
    """Yield the lines of the comparison of two sets of files, by path."""
    old, new = all_bodies(before), all_bodies(after)
    pairs, gone, added = paired(old, new)
    groups = {"before": old, "after": new} | {
        title: [one for one, other in pairs if alike(one, other) == title]
        for title in (LETTER, NAMES, NOT_ONE_FOR_ONE)} | {"not found again": gone, "new": added}
    yield f"{'':<16} {'functions':>10} {'fields and statements':>22}"
    for title, bodies in groups.items():
        num_functions = sum(body.is_function for body in bodies)
        yield f"{title:<16} {num_functions:>10,} {len(bodies) - num_functions:>22,}"
    others = [Counter(c for p, c in files.items() if not p.endswith(".py")) for files in (before, after)]
    yield (f"\nfiles that are not Python: {others[0].total()} before, {others[1].total()} after, "
           f"{(others[0] & others[1]).total()} with the same bytes")
    partner = {id(one): f"  now {other}" for one, other in pairs}
    for title in (NOT_ONE_FOR_ONE, "not found again", "new"):
        yield f"\n{title}:"
        yield from sorted(f"  {body}{partner.get(id(body), '')}" for body in groups[title])
    renamed = Counter((a[1:], b[1:]) for one, other in pairs for a, b in {
        *zip(one.names, other.names, strict=True), (f"o{one.owner}", f"o{other.owner}")} if a != b)
    yield "\nnames that became others, and in how many bodies:"
    yield from (f"  {n:>5}  {a} -> {b}" for (a, b), n in sorted(renamed.items(), key=lambda r: (-r[1], r[0])))


def main() -> None:
    """Compare two revisions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("before", help="git revision")
    parser.add_argument("after", nargs="?", default=WORK_TREE, help=f"git revision, or {WORK_TREE} (default)")
    args = parser.parse_args()
    print(*report(files_of(args.before), files_of(args.after)), sep="\n")


if __name__ == "__main__":
    main()
