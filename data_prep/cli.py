"""The program `sov-data COMMAND ...`."""

import sys
from pathlib import Path

from megatron_sov.base.command_line import Parser, build_program_parser, read_commands, run_program

COMMANDS = read_commands(Path(__file__).with_name("commands.json"))


def build_parser() -> Parser:
    return build_program_parser("sov-data", "Prepare text for training.", COMMANDS)


def main(argv: list[str] | None = None) -> int:
    """Run `sov-data`; a `UserError` becomes one message and exit code 2."""
    return run_program(build_parser(), COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
