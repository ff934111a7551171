"""The door: `sov-tokenizer COMMAND ...`."""

from __future__ import annotations

import sys

from megatron_sov.base.command_line import Command, Parser, parser_of, run_program

COMMANDS = {
    "train": Command("tokenizer.train", "learn a byte-level BPE or SuperBPE tokenizer from text"),
    "import": Command("tokenizer.formats.commands:IMPORT",
                      "take over a tokenizer of Hugging Face, tiktoken or sentencepiece"),
    "export": Command("tokenizer.formats.commands:EXPORT",
                      "write a tokenizer for tiktoken or sentencepiece"),
    "graft": Command("tokenizer.graft.command", "add or replace tokens of a Hugging Face model"),
    "media": Command("tokenizer.graft.command:MEDIA_COMMAND",
                     "add tokens of pictures and sounds to a tokenizer or a model"),
    "report": Command("tokenizer.report.command", "check a tokenizer and write what was found as a page"),
    "compare": Command("tokenizer.compare.command", "compare tokenizers on the same text"),
}


def build_parser() -> Parser:
    return parser_of("sov-tokenizer", "Train tokenizers and look after them.", COMMANDS)


def main(argv: list[str] | None = None) -> int:
    """Run `sov-tokenizer`; a `UserError` becomes one message and exit code 2."""
    return run_program(build_parser(), COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
