"""Write docs/config.md from the types, defaults and docstrings in `megatron_sov/model/config`."""

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


def build_page() -> str:
    return HEAD + "".join(iter_tables(RunConfig, "", "The run"))


def iter_tables(settings_class: type, prefix: str, title: str) -> Iterator[str]:
    """Yield a table for a settings class, then the tables for nested classes.

    Args:
        settings_class: dataclass.
        prefix: key prefix, "" or ending with a dot.
        title: heading.
    """
    docs, hints = get_field_docstrings(settings_class), get_type_hints(settings_class, include_extras=True)
    rows, tables = [], []
    for field in dataclasses.fields(settings_class):
        key, annotation = prefix + field.name, format_type(hints[field.name])
        nested = find_nested_class(hints[field.name])
        if nested is not None:
            nested_key = f"{key}.N" if annotation.startswith("tuple") else key
            tables += iter_tables(nested, f"{nested_key}.", f"`{nested_key}`")
        if nested is None or annotation != nested.__name__:
            default = "the table below" if nested and field.default is not None else format_default(field)
            cell = annotation.replace("|", "\\|")
            meaning = docs[field.name] + format_conditions(settings_class, field.name, prefix)
            rows.append(f"| `{key}` | `{cell}` | {default} | {meaning} |")
    summary = " ".join(inspect.cleandoc((settings_class.__doc__ or "").partition("\n\n")[0]).split())
    if conditions := format_conditions(settings_class, "", prefix):
        rows.insert(0, f"| `{prefix}*` | | |{conditions} |")
    yield (f"\n## {title}\n\n{summary}\n\n| setting | type | default | meaning |\n|---|---|---|---|\n"
           + "\n".join(rows) + "\n")
    yield from tables


def find_nested_class(hint: Any) -> type | None:
    """Return the settings class in a field's type: the type itself, in an Optional, or in a tuple."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return next((part for part in (hint, *get_args(hint))
                 if dataclasses.is_dataclass(part) and isinstance(part, type)), None)


def format_type(hint: Any) -> str:
    """Format a type like Python source, with bounds and without aliases."""
    args = get_args(hint)
    if get_origin(hint) is Annotated:
        # without ".0": Ge(0) equals Ge(0.0), and typing returns the one that a process used first
        bounds = [BOUNDS[type(bound).__name__].format(*dataclasses.astuple(bound)).removesuffix(".0")
                  for bound in hint.__metadata__
                  if not isinstance(bound, Bound)  # described in the field's docstring
                  and (not isinstance(bound, (Lt, Gt)) or math.isfinite(*dataclasses.astuple(bound)))]
        return " ".join([format_type(args[0]), ", ".join(bounds)]).strip()
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return " | ".join(map(format_type, args))
    if get_origin(hint) is Literal:
        return repr(hint).removeprefix("typing.")
    if args:
        parts = ", ".join("..." if arg is ... else format_type(arg) for arg in args)
        return f"{get_origin(hint).__name__}[{parts}]"
    return "None" if hint is type(None) else hint.__name__


def format_default(field: dataclasses.Field[Any]) -> str:
    """Format a field's default as Python source; recipes set fields without a default."""
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    return "the recipe's"


def format_conditions(settings_class: type, name: str, prefix: str) -> str:
    """Format a field's `ACTS_WHEN` conditions as a sentence; name "": conditions for all fields."""
    texts = [condition.text(prefix.rstrip("."))
             for names, condition in getattr(settings_class, "ACTS_WHEN", {}).items()
             if (name in names.split() if name else not names)]
    return f" Acts when {'; and '.join(texts)}." if texts else ""


if __name__ == "__main__":
    write_atomically(PAGE, build_page())
