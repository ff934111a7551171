"""The door: `sov-tokenizer COMMAND ...`."""

from __future__ import annotations

import argparse
import sys

from megatron_sov.errors import ExitCode, UserError
from tokenizer import train
from tokenizer.compare import command as compare
from tokenizer.formats import export_command, import_command
from tokenizer.graft import command
from tokenizer.report import command as report

COMMANDS = {"train": train, "import": import_command, "export": export_command, "graft": command, "report": report,
            "compare": compare}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="sov-tokenizer", description="Train tokenizers and look after them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `sov-tokenizer`; a `UserError` becomes one message and exit code 2."""
    args = build_parser().parse_args(argv)
    try:
        return COMMANDS[args.command].run(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return ExitCode.USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
