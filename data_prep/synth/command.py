"""`sov-data synth`: data that models write, checked, in a run that can be killed and continued."""

from __future__ import annotations

import argparse
import dataclasses

from data_prep.synth import known
from data_prep.synth.options import SynthOptions
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import add_options, read_options
from megatron_sov.base.settings.options import get_field_help


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Generators: --list. What stands in the output folder: docs/synth.md."
    add_options(parser, SynthOptions)


def run(typed: argparse.Namespace) -> int:
    """Run `sov-data synth`; returns the exit code."""
    options = read_options(SynthOptions, typed)
    if options.list:
        print("\n".join(_settings(options.generator) if options.generator else map(_help, known.FILES)))
        return 0
    from data_prep.synth.running import run_synth  # imported late: --help and --list need none of it

    return int(run_synth(options))


def _help(name: str) -> str:
    try:
        return f"{name:<20} {known.generator_class(name).help}"
    except UserError as e:  # a library is missing, which the others do not need
        return f"{name:<20} {e}"


def _settings(name: str) -> list[str]:
    """Return a line for each setting of a generator: name, default and help."""
    cls = known.generator_class(name)
    helps = cls.help_of_settings or get_field_help(cls.Settings)
    lines = [f"{name} (version {cls.version}): {cls.help}", f"prompts: {', '.join(sorted(cls.prompts()))}"]
    for one in dataclasses.fields(cls.Settings):
        default = (one.default if one.default_factory is dataclasses.MISSING else one.default_factory())
        lines.append(f"  {one.name} = {default!r}: {helps.get(one.name, '').replace('%%', '%')}")
    return lines
