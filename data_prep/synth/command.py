"""`sov-data synth`: data that models write, checked, in a run that can be killed and continued."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
from typing import Any

from data_prep.synth.known import generator_class, generator_names
from data_prep.synth.options import SynthOptions
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import add_options, read_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Generators: --list. What stands in the output folder: docs/synth.md."
    add_options(parser, SynthOptions)


def run(typed: argparse.Namespace) -> int:
    """Run `sov-data synth`; returns the exit code."""
    options = read_options(SynthOptions, typed)
    if options.list:
        print(_settings_of_generator(options.generator) if options.generator else _generators())
        return 0
    # imported late: --help and --list need none of it
    from data_prep.synth.running import order_of, run_order

    return int(run_order(order_of(options)))


def _generators() -> str:
    lines = []
    for name in generator_names():
        try:
            said = generator_class(name).help
        except UserError as e:  # a library is missing, which the others do not need
            said = str(e)
        lines.append(f"{name:<20} {said}")
    return "\n".join(lines)


def _settings_of_generator(name: str) -> str:
    """Return a line for each setting of a generator: name, default, and its docstring."""
    cls = generator_class(name)
    told = {name: text for part in reversed(cls.Settings.__mro__) if dataclasses.is_dataclass(part)
            for name, text in _docstrings(part).items()} | dict(cls.help_of_settings)
    lines = [f"{name} (version {cls.version}): {cls.help}", f"templates: {', '.join(sorted(cls.templates))}"]
    lines += [f"  {one.name} = {_default(one)!r}: {told.get(one.name, '')}"
              for one in dataclasses.fields(cls.Settings)]
    return "\n".join(lines)


def _default(one: dataclasses.Field[object]) -> object:
    return one.default if one.default_factory is dataclasses.MISSING else one.default_factory()


def _docstrings(cls: type[Any]) -> dict[str, str]:
    """Return the text under each field of a class, as its source has it; none of a class without a source."""
    if cls.__module__ == "types":
        return {}
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef), f"{cls} is no class"
    found = {}
    for before, text in zip(body.body, body.body[1:], strict=False):
        if (isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)
                and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)):
            found[before.target.id] = " ".join(str(text.value.value).split())
    return found
