"""The door: `sov-tokenizer COMMAND ...`."""

from __future__ import annotations

import sys

from megatron_sov.command_line import Parser, parser_of, run_program
from tokenizer import train
from tokenizer.compare import command as compare
from tokenizer.formats import export_command, import_command
from tokenizer.graft import command
from tokenizer.media import command as media
from tokenizer.report import command as report

COMMANDS = {"train": train, "import": import_command, "export": export_command, "graft": command,
            "media": media, "report": report, "compare": compare}


def build_parser() -> Parser:
    """Return the parser of all commands."""
    return parser_of("sov-tokenizer", "Train tokenizers and look after them.", COMMANDS)


def main(argv: list[str] | None = None) -> int:
    """Run `sov-tokenizer`; a `UserError` becomes one message and exit code 2."""
    return run_program(build_parser(), COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
