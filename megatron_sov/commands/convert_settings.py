"""`megatron-sov convert settings`: a run's settings of Megatron-LM or Megatron-Bridge, as ours."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from megatron_sov.artifacts import atomic_write, to_json
from megatron_sov.commands.convert_options import TranslateOptions
from megatron_sov.config import from_dict
from megatron_sov.counterparts.architecture import of_arguments
from megatron_sov.counterparts.arguments import MAX_CHARS, read_arguments
from megatron_sov.counterparts.bridge_yaml import read_sections
from megatron_sov.counterparts.settings import Translated, nested, of_sections, translate
from megatron_sov.errors import ExitCode, UserError
from megatron_sov.outputs import check_output

YAML = (".yaml", ".yml")
RECIPE = "from-megatron"


def run_settings(args: TranslateOptions) -> int:
    """Print them; returns the exit code."""
    check_output("--output", args.output)
    made, unresolved = _read(args.source, args.family)
    if not made.ours:
        raise UserError(f"{args.source[:80]}: holds no setting of Megatron that is known here; pass a "
                        "YAML file of Megatron-Bridge, or a script with arguments such as --num-layers 48")
    for name, value in made.ours.items():
        print(f"--set {shlex.quote(f'{name}={value if isinstance(value, str) else json.dumps(value)}')}")
    for title, found in (("not taken over:", made.lost), ("not known from the text:", unresolved),
                         ("without a counterpart, and nothing is lost:", made.no_need)):
        if found:
            print(f"\n{title}")
            for name, why in found.items():
                print(f"  {name}: {why}")
    if made.unknown:
        print(f"\nnot known here, so look at them yourself:\n  {', '.join(sorted(made.unknown))}")
    if args.output is not None:
        if not made.is_whole:
            raise UserError(f"--output {args.output}: the settings do not say a whole architecture, which "
                            "a config has; use the --set lines above with a recipe")
        atomic_write(args.output, to_json(from_dict({"recipe": RECIPE, **nested(made.ours)}).to_dict()))
        print(f"\nwrote {args.output}")
    return ExitCode.OK


def _read(source: str, family: str) -> tuple[Translated, dict[str, str]]:
    """Return what a source says, and what it leaves to variables."""
    if source.endswith(YAML):
        return translate(of_sections(read_sections(Path(source))), family), {}
    text = source
    if "--" not in source or Path(source[:4096]).is_file():
        try:
            with open(source, encoding="utf-8") as file:
                text = file.read(MAX_CHARS)
        except (OSError, ValueError) as e:
            raise UserError(f"{source[:200]}: is neither a file that can be read ({e}) nor arguments; pass "
                            "one of them") from None
    found = read_arguments(text)
    unresolved = {name: f"{value} is not set there" for name, value in found.unresolved.items()}
    return translate(of_arguments(found.values), family), unresolved
