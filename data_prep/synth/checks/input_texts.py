"""What a generator was given, as texts that samples are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.json_lines import read_objects
from data_prep.synth.checks.texts import asked_in
from megatron_sov.documents import Document, Reading, list_files, read_span
from megatron_sov.documents.files import JSONL_SUFFIXES, spans_of


def input_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each document or record of an input.

    What holds no text is passed over: whether it is what a generator starts from is the generator's to say.

    Raises:
        UserError: it is gone, or cannot be read.
    """
    for file in list_files(path):
        if file.suffix.lower() in JSONL_SUFFIXES:
            found = ((where, asked_in(record)) for where, record in read_objects(file))
        else:
            found = ((f"{file}:{number}", "\n\n".join(document.texts()))
                     for number, document in enumerate(_documents(file), 1))
        yield from ((Path(where).name, text) for where, text in found if text.strip())


def _documents(file: Path) -> Iterator[Document]:
    for span in spans_of(file):
        yield from (item for item in read_span(span, Reading()) if isinstance(item, Document))
