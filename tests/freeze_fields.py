"""Write `megatron_sov/model/families/transformers_fields.json`: the config.json fields that transformers
declares or reads, for each of our families, from transformers' own source.

Run it after an upgrade of transformers, and read the difference: a new field needs an item in the family's
config map if it changes the computation (`megatron_sov/model/families/family.py`).
"""

import ast
import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_sov.model.families import supported

TABLE = Path(supported.__file__).with_name("transformers_fields.json")
SPEC = importlib.util.find_spec("transformers")
assert SPEC is not None and SPEC.origin is not None
ROOT = Path(SPEC.origin).parent
SHARED_CONFIGS = ("configuration_utils.py", "modeling_rope_utils.py",
                  "integrations/heterogeneity/configuration_utils.py")
"""Source of the base classes of all configs."""
SHARED_MODELS = ("modeling_utils.py", "modeling_layers.py", "modeling_flash_attention_utils.py",
                 "masking_utils.py", "cache_utils.py", "integrations/eager_paged.py",
                 "integrations/flash_attention.py", "integrations/flash_paged.py",
                 "integrations/flex_attention.py", "integrations/moe.py", "integrations/sdpa_attention.py",
                 "integrations/sdpa_paged.py", "loss/loss_utils.py")
"""Source that models of several families run."""
OF_EXAMPLES = ("glm4_moe", "kimi_linear", "mistral", "mixtral")
"""Families of examples/families/."""
FOLDERS = {"gemma3_text": "gemma3"}
"""Family -> the folder of its source where that has another name."""


def last_name(node: ast.AST) -> str:
    """Return `c` of `a.b.c`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def read_fields(file: Path, is_config: bool) -> set[str]:
    """Return the names that a source file reads of a config, and declares in a config class.

    Args:
        file: the source.
        is_config: whether its classes are configs, so that `self` and `kwargs` hold fields too.
    """
    holders = ("config", "cfg", *(("self",) if is_config else ()))
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and last_name(node.value).endswith(holders):
            found.add(node.attr)
        elif isinstance(node, ast.Call):
            found |= set(_iter_read_fields(node, holders, is_config))
        elif is_config and isinstance(node, ast.Compare) and last_name(node.comparators[0]) == "kwargs":
            found |= set(_texts([node.left]))
        elif is_config and isinstance(node, ast.ClassDef):
            found |= set(_iter_declared_fields(node))
    return found


def _iter_read_fields(call: ast.Call, holders: tuple[str, ...], is_config: bool) -> Iterator[str]:
    """Yield the name in `getattr(config, "x")`, and in `kwargs.pop("x")` of a config class."""
    called = last_name(call.func)
    if called in ("getattr", "hasattr") and last_name(call.args[0]).endswith(holders):
        yield from _texts(call.args[1:2])
    elif (is_config and called in ("pop", "get", "setdefault") and isinstance(call.func, ast.Attribute)
          and last_name(call.func.value) == "kwargs"):
        yield from _texts(call.args[:1])


def _iter_declared_fields(class_: ast.ClassDef) -> Iterator[str]:
    """Yield the attributes of a class, and the names on both sides of its `attribute_map`."""
    for node in class_.body:
        if isinstance(node, ast.AnnAssign):
            yield last_name(node.target)
        elif isinstance(node, ast.Assign):
            yield from map(last_name, node.targets)
            if last_name(node.targets[0]) == "attribute_map" and isinstance(node.value, ast.Dict):
                yield from _texts([*node.value.keys, *node.value.values])


def _texts(nodes: Iterable[ast.AST | None]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def find_fields() -> dict[str, list[str]]:
    """Return family -> sorted field names of its transformers config; "shared" has the fields of the base
    class, which the families omit."""
    shared = set[str]().union(*(read_fields(ROOT / name, True) for name in SHARED_CONFIGS),
                              *(read_fields(ROOT / name, False) for name in SHARED_MODELS))
    found = {"shared": sorted(shared)}
    for name in sorted([*supported.FAMILIES, *OF_EXAMPLES]):
        folder = ROOT / "models" / FOLDERS.get(name, name)
        if folder.is_dir():
            own = set[str]().union(
                *(read_fields(file, False) for file in folder.glob("modeling_*.py")),
                *(read_fields(file, True) for file in folder.glob("configuration_*.py")))
            found[name] = sorted(own - shared)
    return found


if __name__ == "__main__":
    TABLE.write_text(json.dumps(find_fields(), indent=0) + "\n", encoding="utf-8")
