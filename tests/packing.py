"""Token shards for most training tests, built with the project's own commands."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import optparse
import subprocess
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

VOCAB_SIZE = 1024
DOCUMENTS = tuple(
    f"Chapter {i}.\n\n" + " ".join(f"{word} {i * k} of {k + i} parts" for k, word in enumerate(
        ["water", "stone", "light", "river", "한국어", "mountain", "winter", "letter"][:3 + i % 6]))
    + f".\nEnd of chapter {i}." for i in range(160))
"""Small real documents, 60 to 250 bytes each."""
CHATS = tuple(
    {"messages": [{"role": "user", "content": f"What is {i} plus {i % 7}?"}, {
        "role": "assistant", "content": f"{i} plus {i % 7} is {i + i % 7}." + " I am sure." * (i % 3)}]}
    for i in range(80))
Run = Callable[..., "subprocess.CompletedProcess[str]"]
"""Runs `*argv, program=...` to its end."""


@dataclass(frozen=True)
class Packed:
    """Token artifacts of one tokenizer with 368 ids."""

    tokenizer: Path
    text: Path
    """Two sources, "even" and "odd"."""
    chats: Path
    """One source, "chat"."""

    @classmethod
    def of(cls, folder: Path) -> Packed:
        return cls(folder / "tokenizer", folder / "text", folder / "chats")


def make_token_shards(folder: Path, run: Run) -> None:
    """Make the folder of the fixture `token_shards`."""
    for name, modules in {"first": (argparse, inspect), "second": (difflib, optparse)}.items():
        paragraphs = [p for module in modules for p in inspect.getsource(module).split("\n\n") if p.strip()]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs))
    inputs = ["--input", str(folder / "first.jsonl"), "--input", str(folder / "second.jsonl")]
    for program, *argv in (
            ("sov-tokenizer", "train", "--preset", "solar-open", "--vocab-size", str(VOCAB_SIZE), *inputs,
             "--output", str(folder / "tokenizer")),
            ("sov-data", "pack", "--tokenizer", str(folder / "tokenizer"), *inputs, "--output",
             str(folder / "shards"), "--heldout", "0.2", "--workers", "1")):
        run(*argv, program=program).check_returncode()


def make_packed_data(folder: Path, run: Run) -> None:
    """Make the folder of the fixture `packed_data`."""
    for name, documents in (("even", DOCUMENTS[::2]), ("odd", DOCUMENTS[1::2])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents))
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(c) for c in CHATS))
    packed = Packed.of(folder)
    inputs = ["--input", str(folder / "even.jsonl"), "--input", str(folder / "odd.jsonl")]
    common = ["--tokenizer", str(packed.tokenizer), "--heldout", "0.1", "--workers", "1"]
    for program, *argv in (
            ("sov-tokenizer", "train", "--preset", "solar-open", "--vocab-size", "368", *inputs,
             "--output", str(packed.tokenizer)),
            ("sov-data", "pack", *common, *inputs, "--output", str(packed.text)),
            ("sov-data", "pack", *common, "--format", "chat", "--input", str(folder / "chat.jsonl"),
             "--output", str(packed.chats))):
        run(*argv, program=program).check_returncode()


def make_tokenizers(folder: Path, run: Run) -> None:
    """Make the folder of the fixture `tokenizers`."""
    (folder / "text.txt").write_text(inspect.getsource(textwrap)
                                     + "한국어 문장입니다. 다른 한국어 문장입니다.\n" * 20)
    for preset in ("solar-open", "k-exaone"):
        run("train", "--preset", preset, "--vocab-size", "384", "--input", str(folder / "text.txt"),
            "--output", str(folder / preset), program="sov-tokenizer").check_returncode()


MAKERS: dict[str, Callable[[Path, Run], None]] = {
    "token_shards": make_token_shards, "packed_data": make_packed_data, "tokenizers": make_tokenizers}
"""Fixture name -> function that fills its folder."""
