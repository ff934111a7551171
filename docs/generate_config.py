"""Writes docs/config.md from the settings' own types, defaults and docstrings: `python
docs/generate_config.py`."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Gt, Lt

from megatron_sov.base.artifacts import write_atomically
from megatron_sov.base.settings import Bound
from megatron_sov.base.settings.options import get_field_docstrings
from megatron_sov.model.config import RunConfig

PAGE = Path(__file__).parent / "config.md"
BOUNDS = {"Ge": ">= {:,}", "Gt": "> {:,}", "Le": "<= {:,}", "Lt": "< {:,}", "MinLen": "({} or more)",
          "MultipleOf": "multiple of {}"}
HEAD = """# Settings

<!-- Written by docs/generate_config.py from megatron_sov/model/config; change it there. -->

A recipe (`megatron-sov recipes`) sets all of these, and you change one with `--set key=value`. Your run's
resolved settings are in `RUN/config.json`.

| you want to set | example |
|---|---|
| a number | `--set optim.lr=2e-4` |
| a field of a phase | `--set data.phases.0.seq_len=512` |
| an object | `--set 'data.phases.0.blend={"en": 2, "ko": 1}'` |
| nothing | `--set model.yarn=null` |

Values are JSON if they parse, else text; of a key given twice the last one counts. An unknown key is
refused with the nearest known one, and a value that nothing would read ("acts when" below) with the setting
that decides; in a file of `--config` if it differs from the recipe's.
"""


def nested_class(hint: Any) -> type | None:
    """Return the settings class that a field holds, directly, optionally or as the items of a tuple."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return next((c for c in (hint, *get_args(hint)) if dataclasses.is_dataclass(c) and isinstance(c, type)),
                None)


def spelled(hint: Any) -> str:
    """Return a type as Python spells it, with its bounds and without our names for it."""
    args = get_args(hint)
    if get_origin(hint) is Annotated:
        bounds = [BOUNDS[type(b).__name__].format(*dataclasses.astuple(b)) for b in hint.__metadata__
                  if not isinstance(b, Bound)  # the field's own text tells of it
                  and (not isinstance(b, (Lt, Gt)) or math.isfinite(*dataclasses.astuple(b)))]
        return " ".join([spelled(args[0]), ", ".join(bounds)]).strip()
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return " | ".join(map(spelled, args))
    if get_origin(hint) is Literal:
        return repr(hint).removeprefix("typing.")
    if args:
        return f"{get_origin(hint).__name__}[{', '.join('...' if a is ... else spelled(a) for a in args)}]"
    return "None" if hint is type(None) else hint.__name__


def default_of(field: dataclasses.Field[Any]) -> str:
    """Return a field's default as Python text; a field without one is set by the recipe."""
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    return "the recipe's"


def acting(cls: type, name: str, path: str) -> str:
    """Return a sentence with the conditions under which a field of a class acts, "": under which all do."""
    texts = [condition.text(path.rstrip(".")) for names, condition in getattr(cls, "ACTS_WHEN", {}).items()
             if (name in names.split() if name else not names)]
    return f" Acts when {'; and '.join(texts)}." if texts else ""


def sections(cls: type, path: str, title: str) -> Iterator[str]:
    """Yield one table of a class's settings, then the tables of the classes that it holds;
    `path` ends with a dot."""
    docs, hints = get_field_docstrings(cls), get_type_hints(cls, include_extras=True)
    rows, tables = [], []
    for field in dataclasses.fields(cls):
        key, annotation = path + field.name, spelled(hints[field.name])
        inner = nested_class(hints[field.name])
        if inner is not None:
            below = f"{key}.N" if annotation.startswith("tuple") else key
            tables += sections(inner, f"{below}.", f"`{below}`")
        if inner is None or annotation != inner.__name__:
            default = "the table below" if inner and field.default is not None else default_of(field)
            in_cell = annotation.replace("|", "\\|")
            meaning = docs[field.name] + acting(cls, field.name, path)
            rows.append(f"| `{key}` | `{in_cell}` | {default} | {meaning} |")
    about = " ".join(inspect.cleandoc((cls.__doc__ or "").partition("\n\n")[0]).split())
    if condition := acting(cls, "", path):
        rows.insert(0, f"| `{path}*` | | |{condition} |")
    yield (f"\n## {title}\n\n{about}\n\n| setting | type | default | meaning |\n|---|---|---|---|\n"
           + "\n".join(rows) + "\n")
    yield from tables


def page() -> str:
    """Return the whole page."""
    return HEAD + "".join(sections(RunConfig, "", "The run"))


if __name__ == "__main__":
    write_atomically(PAGE, page())
