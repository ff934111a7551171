"""What Transformer Engine and megatron-core promise to those who call them, read from their sources.

`make contract` writes it to contract.json; nothing is imported for that, so neither needs a GPU.  A signature
is text such as "(inp, is_first_microbatch=None)": names, kinds and defaults, without annotations.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import inspect
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONTRACT, REVIEWED = HERE / "contract.json", HERE / "reviewed_fields.json"
TE, MEGATRON = "transformer_engine", "megatron.core"
TE_VERSION = "2.20.2"
COMPUTED = "..."
"""Stands for a default that is the result of a call or a condition."""
CONFIGS = {"TransformerConfig": "megatron.core.transformer.TransformerConfig",
           "DistributedDataParallelConfig": "megatron.core.distributed.DistributedDataParallelConfig",
           "OptimizerConfig": "megatron.core.optimizer.OptimizerConfig"}
ELSEWHERE = ("distributed/fsdp", "export", "inference", "models/T5", "models/bert", "models/mamba",
             "models/multimodal", "models/retro", "models/vision", "post_training", "ssm",
             "transformer/custom_layers/batch_invariant_kernels.py", "transformer/heterogeneous")
"""What of megatron-core no model of ours is made of."""

Fields = dict[str, dict[str, str]]
"""Configuration -> field -> its default, or why it is left alone."""
_OPTIMIZER, _MOE = "megatron.core.optimizer", "megatron.core.transformer.moe"
REACHED = (
    f"{_OPTIMIZER}.optimizer.ChainedOptimizer", f"{_OPTIMIZER}.optimizer.FP32Optimizer",
    f"{_OPTIMIZER}.optimizer.Float16OptimizerWithFloat16Params",
    f"{_OPTIMIZER}.distrib_optimizer.DistributedOptimizer",
    f"{_MOE}.experts.TEGroupedMLP", f"{_MOE}.experts.SequentialMLP", f"{_MOE}.moe_layer.MoELayer",
    f"{_MOE}.token_dispatcher.MoEAlltoAllTokenDispatcher",
    "megatron.core.models.common.embeddings.YarnRotaryEmbedding",
    "megatron.core.transformer.attention.SelfAttention",
    "megatron.core.transformer.transformer_block.TransformerBlock",
    "megatron.core.transformer.transformer_layer.TransformerLayer",
)
"""Classes whose objects this project calls without importing them."""


class Sources:
    """Packages below one folder, as their sources say."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.module = functools.cache(self._module)

    def _module(self, name: str) -> ast.Module | None:
        place = self._folder / name.replace(".", "/")
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                return ast.parse(file.read_text())
        return None

    def find(self, path: str) -> tuple[str, ast.AST] | None:
        """Return the module that defines a dotted name, and the definition (of a module: itself); None:
        there is no such name."""
        home, _, name = path.rpartition(".")
        module = self.module(home) if home else None
        own = self.module(path)
        if own is not None and not (module and _takes_from_namesake(module, name)):
            return path, own
        if module is None:
            outer = self.find(home) if home else None
            return (home, outer[1]) if outer and isinstance(outer[1], ast.ClassDef) else None
        for node in _statements(module):
            if getattr(node, "name", None) == name or name in _targets(node):
                return home, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    found = (self._imported(home, node, name if alias.name == "*" else alias.name)
                             if (alias.asname or alias.name) in (name, "*") else None)
                    if found:
                        return found
        return None

    def _imported(self, home: str, node: ast.ImportFrom, name: str) -> tuple[str, ast.AST] | None:
        """Follow an import; a name of a package that is not here is its import itself."""
        if not node.level:
            origin = node.module or ""
        else:
            package = self._folder / home.replace(".", "/") / "__init__.py"
            parts = home.split(".")
            parts = parts[:len(parts) - node.level + package.is_file()]
            origin = ".".join([*parts, *([node.module] if node.module else [])])
        found = self.find(f"{origin}.{name}")
        return (home, node) if found is None and self.module(origin) is None else found

    def methods(self, home: str, cls: ast.ClassDef) -> Iterator[tuple[str, ast.FunctionDef]]:
        """Yield the methods of a class, then those of its bases, as far as they are here."""
        for node in cls.body:
            if isinstance(node, ast.FunctionDef):
                yield node.name, node
        for base in cls.bases:
            found = self.find(f"{home}.{ast.unparse(base)}")
            if found and isinstance(found[1], ast.ClassDef) and found[1] is not cls:
                yield from self.methods(found[0], found[1])

    def fields(self, path: str) -> dict[str, str]:
        """Return a data class's fields with their defaults, those of its bases first."""
        found = self.find(path)
        assert found and isinstance(found[1], ast.ClassDef), path
        home, cls = found
        fields = {}
        for base in cls.bases:
            outer = self.find(f"{home}.{ast.unparse(base)}")
            if outer and isinstance(outer[1], ast.ClassDef):
                fields |= self.fields(f"{outer[0]}.{outer[1].name}")
        for node in cls.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                fields[node.target.id] = _default(node.value) if node.value else "required"
        return fields


def _takes_from_namesake(module: ast.Module, name: str) -> bool:
    """Return whether a package has, under a submodule's name, what it imports from there."""
    return any(isinstance(node, ast.ImportFrom) and (node.module or "").rpartition(".")[2] == name
               and any((alias.asname or alias.name) == name for alias in node.names) for node in module.body)


def _statements(module: ast.Module) -> Iterator[ast.stmt]:
    """Yield what a module says, also inside of `if` and `try`."""
    waiting: list[ast.stmt] = list(module.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            waiting[:0] = [*node.body, *(s for h in getattr(node, "handlers", []) for s in h.body),
                           *node.orelse]


def _from_pydantic(module: ast.Module | None) -> bool:
    """Return whether a module's data classes are pydantic's, which drop arguments they have no field for."""
    return any(isinstance(node, ast.ImportFrom) and node.module == "pydantic.dataclasses"
               for node in (module.body if module else []))


def _members(cls: ast.ClassDef) -> set[str]:
    return {name for node in cls.body for name in _targets(node)}


def _targets(node: ast.stmt) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(
        node, ast.AnnAssign) else []
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def _default(node: ast.expr) -> str:
    simple = (ast.Constant, ast.Name, ast.Attribute, ast.UnaryOp, ast.Tuple, ast.USub, ast.Load)
    return ast.unparse(node) if all(isinstance(n, simple) for n in ast.walk(node)) else COMPUTED


def signature(function: ast.FunctionDef, *, bound: bool) -> str:
    """Return a function's signature; `bound`: without what a method is called on."""
    arguments = function.args
    static = any(ast.unparse(d) == "staticmethod" for d in function.decorator_list)
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    parts = [p.arg if d is None else f"{p.arg}={_default(d)}"
             for p, d in zip(positional, defaults, strict=True)][bound and not static:]
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [p.arg if d is None else f"{p.arg}={_default(d)}"
              for p, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    parts += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return f"({', '.join(parts)})"


def is_same(ours: str, theirs: str) -> bool:
    """Return whether two signatures agree; a computed default agrees with any."""
    split = [text.strip("()").split(", ") for text in (ours, theirs)]
    return len(split[0]) == len(split[1]) and all(
        a == b or (a.split("=")[0] == b.split("=")[0] and "..." in (a.partition("=")[2], b.partition("=")[2]))
        for a, b in zip(*split, strict=True))


def parsed(text: str) -> inspect.Signature:
    """Return a signature to bind calls to, its defaults as text."""
    arguments = ast.parse(f"def f{text.replace('...', 'None')}: pass").body[0].args  # type: ignore[attr-defined]
    kinds = inspect.Parameter
    given = len(arguments.args) - len(arguments.defaults)
    parameters = [kinds(p.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if i < given else COMPUTED)
                  for i, p in enumerate(arguments.args)]
    if arguments.vararg:
        parameters.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    parameters += [kinds(p.arg, kinds.KEYWORD_ONLY, default=kinds.empty if d is None else COMPUTED)
                   for p, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        parameters.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


def described(sources: Sources, path: str, *, private: bool = False) -> Any:
    """Return what a dotted name is.

    Args:
        sources: where it is looked for.
        path: the name.
        private: whether methods with an underscore matter, too: those that this project overrides.

    Returns:
        None (nothing), "module", "value", "extension" (of a compiled library), a function's signature, or a
        class's methods with theirs.
    """
    found = sources.find(path)
    if found is None:
        return None
    home, node = found
    if isinstance(node, ast.FunctionDef):
        return signature(node, bound=False)
    if not isinstance(node, ast.ClassDef):
        return {ast.Module: "module", ast.ImportFrom: "extension"}.get(type(node), "value")
    name = path.rpartition(".")[2]
    if sources.find(path.rpartition(".")[0]) == found:  # a member of a class, which has its own entry
        return "value" if name in {*dict(sources.methods(home, node)), *_members(node)} else None
    methods: dict[str, str] = {}
    if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
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


def used(folder: Path, package: str, without: tuple[str, ...] = ()) -> set[str]:
    """Return the dotted names of `package` that the files below a folder import or reach by attributes."""
    names: set[str] = set()
    for file in sorted(folder.rglob("*.py")):
        if file.relative_to(folder).as_posix().startswith(without or ("\0",)):
            continue
        text = file.read_text()
        nodes = list(ast.walk(ast.parse(text))) if package in text else []
        aliases: dict[str, str] = {}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and _inside(node.module or "", package):
                for alias in node.names:
                    names.add(f"{node.module}.{alias.name}")
                    aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if _inside(alias.name, package):
                        aliases[alias.asname or alias.name.split(".")[0]] = (
                            alias.name if alias.asname else alias.name.split(".")[0])
        names |= {chain for node in nodes if isinstance(node, ast.Attribute)
                  for chain in _chain(node, aliases)
                  if _inside(chain, package) and not chain.endswith(("__name__", "__new__"))}
    return names


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _chain(node: ast.Attribute, aliases: dict[str, str]) -> list[str]:
    parts: list[str] = []
    inner: ast.expr = node
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value
    known = isinstance(inner, ast.Name) and inner.id in aliases
    return [".".join([aliases[inner.id], *reversed(parts)])] if known else []  # type: ignore[attr-defined]


def megatron_folder() -> Path:
    """Return the folder that holds the installed `megatron`."""
    spec = importlib.util.find_spec("megatron")
    assert spec and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))).parent


def te_names() -> set[str]:
    """Return Transformer Engine's names that megatron-core, where it serves us, and this project use; without
    its fusible operations, of which only an MLP is made that we have not."""
    names = used(megatron_folder() / "megatron" / "core", TE, ELSEWHERE) | used(ROOT / "megatron_sov", TE)
    return {name for name in names if not name.startswith(f"{TE}.pytorch.ops.")}


def megatron_part() -> dict[str, Any]:
    """Return the contract of the installed megatron-core: what this project uses of it."""
    sources = Sources(megatron_folder())
    names = used(ROOT / "megatron_sov", MEGATRON) | set(REACHED)
    return {"version": importlib.metadata.version("megatron-core"),
            "symbols": {name: described(sources, name, private=True) for name in sorted(names)},
            "fields": {name: sources.fields(path) for name, path in CONFIGS.items()}}


def te_part(wheel_folder: Path) -> dict[str, Any]:
    """Return the contract of Transformer Engine, as unpacked from its wheel."""
    sources = Sources(wheel_folder)
    return {"version": TE_VERSION,
            "symbols": {name: described(sources, name) for name in sorted(te_names())}}


@functools.cache
def fields_set() -> frozenset[str]:
    """Return the names that this project's sources have as strings (keys, tables), give to a call that makes
    a configuration, or assign to one: among them the fields of the library's configurations that it sets."""
    found: set[str] = set()
    ours = ROOT / "megatron_sov"
    for file in [*(ours / "engine/mcore").rglob("*.py"), *(ours / "model/config").glob("gpu*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("Config", "replace")):
                found |= {keyword.arg for keyword in node.keywords if keyword.arg}
            elif (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                  and ast.unparse(node.value).endswith("config")):
                found.add(node.attr)
    return frozenset(found)


def shrunk(reviewed: Fields, fields: Fields) -> Fields:
    """Return the reviewed fields without those that are set by now or are gone."""
    by_us = fields_set()
    return {config: {name: reason for name, reason in sorted(known.items())
                     if name in fields[config] and name not in by_us} for config, known in reviewed.items()}


def main() -> int:
    """Write the contract; with --installed only what needs no wheel: megatron-core's part, and the list of
    reviewed fields without those that are set by now."""
    contract = json.loads(CONTRACT.read_text()) if CONTRACT.exists() else {}
    if "--installed" not in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                            "--only-binary=:all:", "--dest", folder, f"transformer-engine=={TE_VERSION}"],
                           check=True)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                wheel.extractall(folder, [n for n in wheel.namelist() if n.endswith(".py")])
            contract[TE] = te_part(Path(folder))
    contract[MEGATRON] = megatron_part()
    CONTRACT.write_text(json.dumps(contract, indent=1) + "\n")
    reviewed = json.loads(REVIEWED.read_text())
    REVIEWED.write_text(json.dumps(shrunk(reviewed, contract[MEGATRON]["fields"]), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
