"""Interfaces of libraries, parsed from their Python sources, and differences between a contract (names with
signatures) and an installed library.

Nothing is imported. A signature is text such as "(inp, is_first_microbatch=None)": names, kinds and defaults,
without annotations.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONTRACT = Path(__file__).with_name("contract.json")
"""File with each library's version and the interfaces that this project or megatron-core uses."""
COMPUTED = "..."
"""Stands for a default computed by a call or condition."""

_MARK = re.compile(r"\bis deprecated|^deprecated\b|deprecated\(|deprecated and will be", re.IGNORECASE)
"""Matches decorators, docstrings and warnings of deprecated functions."""


class Sources:
    """Sources of the packages in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.module = functools.cache(self._module)

    def _module(self, name: str) -> ast.Module | None:
        file = self.file(name)
        # ast decodes bytes by the encoding that the file declares
        return None if file is None else ast.parse(file.read_bytes())

    def file(self, name: str) -> Path | None:
        """Return the source file of a module, or None."""
        place = self.folder / name.replace(".", "/")
        return next((f for f in (place / "__init__.py", place.with_suffix(".py")) if f.is_file()), None)

    def path_in_wheel(self, name: str) -> str:
        """Return the path of a module's source file relative to the packages' folder."""
        file = self.file(name)
        assert file is not None, name
        return file.relative_to(self.folder).as_posix()

    def find(self, path: str, seen: set[str] | None = None) -> tuple[str, ast.AST] | None:
        """Return (module that defines a dotted name, definition); a module is its own definition. None: not
        found. `seen` contains visited names, because modules may import from each other."""
        seen = set() if seen is None else seen
        if path in seen:
            return None
        seen.add(path)
        home, _, name = path.rpartition(".")
        module = self.module(home) if home else None
        own = self.module(path)
        if own is not None and not (module and _takes_from_namesake(module, name)):
            return path, own
        if module is None:
            outer = self.find(home, seen) if home else None
            return (home, outer[1]) if outer and isinstance(outer[1], ast.ClassDef) else None
        for node in _statements(module):
            if getattr(node, "name", None) == name or name in _targets(node):
                return home, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) not in (name, "*"):
                        continue
                    original = name if alias.name == "*" else alias.name
                    if found := self._imported(home, node, original, seen):
                        return found
        return None

    def _imported(self, home: str, node: ast.ImportFrom, name: str,
                  seen: set[str]) -> tuple[str, ast.AST] | None:
        """Return the definition of a name that module `home` imports with `node`. If the imported package is
        missing, the import statement counts as the definition."""
        if not node.level:
            origin = node.module or ""
        else:
            package = self.folder / home.replace(".", "/") / "__init__.py"
            parts = home.split(".")
            parts = parts[:len(parts) - node.level + package.is_file()]
            origin = ".".join([*parts, *([node.module] if node.module else [])])
        result = self.find(f"{origin}.{name}", seen)
        return (home, node) if result is None and self.module(origin) is None else result

    def methods(self, home: str, cls: ast.ClassDef,
                below: tuple[ast.AST, ...] = ()) -> Iterator[tuple[str, ast.FunctionDef]]:
        """Yield the methods of a class of module `home` and of its bases; `below`: visited subclasses."""
        below = (*below, cls)
        for node in cls.body:
            if isinstance(node, ast.FunctionDef) and "overload" not in map(ast.unparse, node.decorator_list):
                yield node.name, node
        for base in cls.bases:
            result = self.find(f"{home}.{ast.unparse(base)}")
            if result and isinstance(result[1], ast.ClassDef) and result[1] not in below:
                yield from self.methods(result[0], result[1], below)

    def fields(self, path: str, below: tuple[ast.AST, ...] = ()) -> dict[str, str]:
        """Return field -> default of a dataclass and its bases (first); `below`: visited subclasses."""
        result = self.find(path)
        assert result, path
        home, cls = result
        assert isinstance(cls, ast.ClassDef), path
        below = (*below, cls)
        fields: dict[str, str] = {}
        for base in cls.bases:
            outer = self.find(f"{home}.{ast.unparse(base)}")
            if outer and isinstance(outer[1], ast.ClassDef) and outer[1] not in below:
                fields |= self.fields(f"{outer[0]}.{outer[1].name}", below)
        for node in cls.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                fields[node.target.id] = _default(node.value) if node.value else "required"
        return fields


def _takes_from_namesake(module: ast.Module, name: str) -> bool:
    """Return whether a package imports a name from its submodule of the same name, which this name hides."""
    return any(isinstance(node, ast.ImportFrom) and (node.module or "").rpartition(".")[2] == name
               and any((alias.asname or alias.name) == name for alias in node.names) for node in module.body)


def _statements(module: ast.Module) -> Iterator[ast.stmt]:
    """Yield a module's statements, also inside `if` and `try`."""
    waiting: list[ast.stmt] = list(module.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            waiting[:0] = [*node.body, *(s for h in getattr(node, "handlers", []) for s in h.body),
                           *node.orelse]


def _from_pydantic(module: ast.Module | None) -> bool:
    """Return whether a module uses pydantic's dataclasses, which ignore unknown arguments."""
    return any(isinstance(node, ast.ImportFrom) and node.module == "pydantic.dataclasses"
               for node in (module.body if module else []))


def _members(cls: ast.ClassDef) -> set[str]:
    """Return the names that a class body assigns."""
    return {name for node in cls.body for name in _targets(node)}


def _targets(node: ast.stmt) -> set[str]:
    """Return the names that a statement assigns."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def _default(node: ast.expr) -> str:
    """Return the source of a default; `COMPUTED` if it contains a call, condition or operation."""
    simple = (ast.Constant, ast.Name, ast.Attribute, ast.UnaryOp, ast.Tuple, ast.USub, ast.Load)
    return ast.unparse(node) if all(isinstance(n, simple) for n in ast.walk(node)) else COMPUTED


def signature(function: ast.FunctionDef, *, bound: bool) -> str:
    """Return a function's signature; `bound`: without the first parameter of a method."""
    arguments = function.args
    static = any(ast.unparse(d) == "staticmethod" for d in function.decorator_list)
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    num_dropped = int(bound and not static)  # self or cls
    parts = [p.arg if d is None else f"{p.arg}={_default(d)}"
             for p, d in zip(positional, defaults, strict=True)][num_dropped:]
    if len(arguments.posonlyargs) > num_dropped:
        parts.insert(len(arguments.posonlyargs) - num_dropped, "/")
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [p.arg if d is None else f"{p.arg}={_default(d)}"
              for p, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    parts += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return f"({', '.join(parts)})"


def describe(sources: Sources, path: str, *, private: bool = False) -> Any:
    """Describe the object of a dotted name.

    Args:
        sources: sources to search.
        path: the dotted name.
        private: include methods with an underscore, which this project overrides.

    Returns:
        None (missing), "module", "value", "extension" (compiled), a function's signature, or a class's
        methods with signatures.
    """
    result = sources.find(path)
    if result is None:
        return None
    home, node = result
    if isinstance(node, ast.FunctionDef):
        return signature(node, bound=False)
    if not isinstance(node, ast.ClassDef):
        return {ast.Module: "module", ast.ImportFrom: "extension"}.get(type(node), "value")
    name = path.rpartition(".")[2]
    if sources.find(path.rpartition(".")[0]) == result:  # a member of a class, which has its own entry
        return "value" if name in {*dict(sources.methods(home, node)), *_members(node)} else None
    methods: dict[str, str] = {}
    if any("dataclass" in ast.unparse(d) for d in node.decorator_list) or any(
            ast.unparse(base) == "msgspec.Struct" for base in node.bases):
        fields = {n: d for n, d in sources.fields(f"{home}.{node.name}").items() if not n.startswith("_")}
        parts = [n if default == "required" else f"{n}={default}" for n, default in fields.items()]
        decorators = " ".join(map(ast.unparse, node.decorator_list))
        if "lenient" in decorators or _from_pydantic(sources.module(home)):
            parts.append("**ignored")
        methods["__init__"] = f"({', '.join(parts)})"
    for name, method in sources.methods(home, node):
        shown = not name.startswith("__" if private else "_")
        if shown or name in ("__init__", "__call__"):
            methods.setdefault(name, signature(method, bound=True))
    return methods


def is_same(ours: str, theirs: str) -> bool:
    """Return whether two signatures are equal; a computed default equals any default."""
    our_parts, their_parts = _parts(ours), _parts(theirs)
    if len(our_parts) != len(their_parts):
        return False
    for a, b in zip(our_parts, their_parts, strict=True):
        (name, _, default), (other_name, _, other_default) = a.partition("="), b.partition("=")
        if a != b and (name != other_name or COMPUTED not in (default, other_default)):
            return False
    return True


def _parts(text: str) -> list[str]:
    """Split a signature into parameters with defaults."""
    parts: list[str] = []
    for piece in text[1:-1].split(", "):
        last_default = parts[-1].partition("=")[2] if parts else ""
        try:
            ast.parse(last_default or "0", mode="eval")
            parts.append(piece)
        except SyntaxError:  # the comma is inside the last default, such as (1, 2)
            parts[-1] += f", {piece}"
    return parts


def differences(symbols: dict[str, Any], sources: Sources) -> Iterator[str]:
    """Yield a description of each name of a contract that a library lacks or has with another signature."""
    for name, shape in symbols.items():
        if shape is None:
            continue
        here = describe(sources, name, private=True)
        if here is None:
            yield f"{name} is gone"
        elif isinstance(shape, dict) and isinstance(here, dict):
            for method, text in shape.items():
                if method not in here:
                    yield f"{name}.{method} is gone"
                elif not is_same(here[method], text):
                    yield f"{name}.{method} takes {here[method]}, and the contract says {text}"
        elif type(here) is not type(shape) or (isinstance(shape, str) and not is_same(here, shape)):
            yield f"{name} is {here}, and the contract says {shape}"


def find_installed(package: str) -> Sources | None:
    """Return the sources of an installed package, or None."""
    spec = importlib.util.find_spec(package.partition(".")[0])
    if spec is None or not spec.submodule_search_locations:
        return None
    return Sources(Path(next(iter(spec.submodule_search_locations))).parent)


def find_deprecation(sources: Sources, path: str) -> str:
    """Return the text that marks a class or function as deprecated, or "".

    The mark may be a decorator, the docstring, or a warning in the unconditional statements of the function
    (of a class: of `__init__`).
    """
    result = sources.find(path)
    if result is None or not isinstance(result[1], (ast.ClassDef, ast.FunctionDef)):
        return ""
    node = result[1]
    functions = [node] if isinstance(node, ast.FunctionDef) else [
        method for name, method in sources.methods(result[0], node) if name == "__init__"]
    marks = [ast.unparse(decorator) for decorator in node.decorator_list]
    marks.append(ast.get_docstring(node) or "")
    for function in functions:
        marks += [constant.value for statement in function.body if isinstance(statement, ast.Expr)
                  for constant in ast.walk(statement)
                  if isinstance(constant, ast.Constant) and isinstance(constant.value, str)]
    return next((mark for mark in marks if _MARK.search(mark)), "")
