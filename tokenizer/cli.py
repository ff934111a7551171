"""The program `sov-tokenizer`."""

import sys

from megatron_sov.base.command_line import Command, Parser, build_program_parser, run_program

TRAIN, MOVE, LOOK = "train and change", "import and export", "check"
"""Headings of the help."""
COMMANDS = {
    "train": Command(
        "tokenizer.train:TRAIN", "learn a byte-level BPE or SuperBPE tokenizer from text", TRAIN,
        "tokenizer.md",
        ("train --preset solar-open --vocab-size 2048 --input corpus --output tokenizer",
         "train --preset solar-open --vocab-size 65536 --input own=texts --output own-tokenizer")),
    "media": Command(
        "tokenizer.media:COMMAND", "add tokens for pictures and sounds to a tokenizer", TRAIN, "omni.md",
        ("media tokenizer --image-tokens 65536 --output omni-tokenizer",
         "media tokenizer --audio-tokens 6561 --image-tokens 65536 --output omni-tokenizer")),
    "import": Command(
        "tokenizer.formats.commands:IMPORT",
        "convert a tokenizer from Hugging Face or tiktoken", MOVE, "tokenizer.md",
        ("import qwen3-8b-base --output tokenizer", "import my.tiktoken --output tokenizer")),
    "export": Command(
        "tokenizer.formats.commands:EXPORT", "write a tokenizer for tiktoken", MOVE, "tokenizer.md",
        ("export tokenizer --format tiktoken --output my.tiktoken",
         "export tokenizer --format tiktoken --output my.tiktoken --text corpus/korean.jsonl")),
    "report": Command(
        "tokenizer.report.command:REPORT", "check a tokenizer and write the results as a page", LOOK,
        "tokenizer.md",
        ("report tokenizer --text en=english.jsonl --output report.html",
         "report tokenizer --text en=english.jsonl ko=korean.jsonl --output report.html --json report.json")),
    "compare": Command(
        "tokenizer.compare.command:COMPARE", "compare tokenizers on the same text", LOOK, "tokenizer.md",
        ("compare tokenizer other/tokenizer.json --text en=english.jsonl",
         "compare tokenizer other --text en=english.jsonl ko=korean.jsonl --json compare.json"))}


def build_parser() -> Parser:
    return build_program_parser("sov-tokenizer", "Train tokenizers and look after them.", COMMANDS)


def main(argv: list[str] | None = None) -> int:
    """Run `sov-tokenizer`; a `UserError` becomes one message and exit code 2."""
    return run_program(build_parser(), COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
