"""`sov-data demo-corpus`: real text that is present on any fresh machine,
or one's own files, as JSONL sources."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data_prep.demo.korean import Unavailable, korean_pages
from data_prep.demo.python import (
    Docstring,
    docstrings,
    documentation,
    order_key,
    package_files,
    question_and_answer,
    read_source,
    readmes,
    stdlib_files,
    topics,
)
from megatron_sov.artifacts import new_artifact, refuse_existing
from megatron_sov.documents import cut_text, list_files, read_documents
from megatron_sov.errors import UserError
from megatron_sov.settings import Flag, add_options, read_options

KIND = "corpus"
ENGLISH_BYTES, CODE_BYTES, KOREAN_BYTES = 6_000_000, 8_000_000, 6_000_000
NUM_CHATS = 4000
MIN_CHARS = 100
"""Shorter texts say nothing; they are left out of the gathered sources (never of one's own)."""
USER_DOCUMENT_BYTES = 20_000
"""One's own files are cut at blank lines into documents of this size, so that some can be held out."""


@dataclass(frozen=True, kw_only=True)
class DemoCorpusOptions:
    """Gather a small corpus from this machine."""

    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the corpus."""
    user: Path | None = None
    """Your own text: a file, a .jsonl file or a folder; replaces the gathered text (chats are still made
    from docstrings)."""
    overwrite: bool = False
    """Replace a corpus that is already there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = ("Gather english.jsonl, code.jsonl, korean.jsonl and chat.jsonl from this machine's "
                          "Python, its packages and Debian documentation packages; "
                          "or, with --user, user.jsonl and chat.jsonl.")
    add_options(parser, DemoCorpusOptions)


def run(typed: argparse.Namespace) -> int:
    """Run `sov-data demo-corpus`; returns 0."""
    args = read_options(DemoCorpusOptions, typed)
    gather(args.output, user=args.user, overwrite=args.overwrite)
    return 0


def gather(output: Path, *, user: Path | None = None, overwrite: bool = False) -> None:
    """Write an artifact of kind "corpus" with a JSONL file per source.

    Raises:
        UserError: `user` cannot be read or holds no text, or the output may not be replaced.
    """
    refuse_existing(output, KIND, overwrite)
    library = stdlib_files()
    sources = {name: read_source(file) for name, file in [*library, *package_files()]}
    found = [d for name, source in sources.items() for d in docstrings(name, source)]
    if user is not None:
        texts = {"user": user_documents(user)}
    else:
        english = {**topics(), **documentation(found), **readmes()}
        texts = {"english": select(english, ENGLISH_BYTES),
                 "code": select({n: sources[n] for n, _ in library}, CODE_BYTES)}
        try:
            texts["korean"] = select(korean_pages(), KOREAN_BYTES)
        except Unavailable as e:
            print(f"korean: left out, because {e}")
    records: dict[str, list[dict[str, object]]] = {
        name: [{"id": id_, "text": text} for id_, text in documents.items()]
        for name, documents in texts.items()}
    records["chat"] = chats(found)
    with new_artifact(output, KIND, overwrite=overwrite) as artifact:
        for name, lines in records.items():
            size_bytes = _write_jsonl(artifact.path / f"{name}.jsonl", lines)
            artifact.content[name] = {"num_documents": len(lines), "num_bytes": size_bytes}
            print(f"{name}: {len(lines):,} documents, {size_bytes / 1e6:.2f} MB")
        artifact.settings = {"user": user}
    print(f"wrote {output}")


def user_documents(path: Path) -> dict[str, str]:
    """Return the text at `path` as documents by id (place and number), exact duplicates once.

    Raises:
        UserError: it cannot be read or holds no text.
    """
    texts = [(document.where, piece) for document in read_documents(list_files(path, print))
             for piece in cut_text("\n\n".join(document.texts()), USER_DOCUMENT_BYTES) if piece.strip()]
    if not texts:
        raise UserError(f"{path}: holds no text; pass files with text in them")
    ids: dict[str, str] = {}
    for number, (where, text) in enumerate(texts):
        ids.setdefault(text, f"{where}#{number}")
    return {id_: text for text, id_ in ids.items()}


def select(texts: dict[str, str], limit_bytes: int) -> dict[str, str]:
    """Return documents up to a total of bytes: near-empty ones and exact duplicates dropped, the rest a fixed
    random choice, in order of their ids."""
    chosen: dict[str, str] = {}
    seen: set[str] = set()
    total_bytes = 0
    for id_ in sorted(texts, key=order_key):
        size_bytes = len(texts[id_].encode())
        if len(texts[id_]) < MIN_CHARS or texts[id_] in seen or total_bytes + size_bytes > limit_bytes:
            continue
        seen.add(texts[id_])
        chosen[id_] = texts[id_]
        total_bytes += size_bytes
    return dict(sorted(chosen.items()))


def chats(found: list[Docstring]) -> list[dict[str, object]]:
    """Return question and answer pairs from docstrings, `NUM_CHATS` at most, each answer once,
    ordered by question."""
    pairs = {answer: question for question, answer in filter(None, map(question_and_answer, found))}
    chosen = sorted(pairs.items(), key=lambda pair: order_key(pair[1]))[:NUM_CHATS]
    return [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for answer, question in sorted(chosen, key=lambda pair: pair[1])]


def _write_jsonl(file: Path, records: Iterable[dict[str, object]]) -> int:
    """Write one JSON object a line; returns the file's bytes."""
    with open(file, "w", encoding="utf-8") as f:
        for record in records:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
    return file.stat().st_size
