"""Fixtures to read source files: write files into a folder, and return the documents of a reader."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from data_prep.curate.sources.formats import create_reader
from data_prep.curate.sources.source import BrokenRecord, RawDocument, SourceSettings

Read = Callable[..., list[RawDocument | BrokenRecord]]


@pytest.fixture(autouse=True, scope="session")
def one_reading_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Start one reading process with access to the folders of all tests, instead of one per test."""
    folder = tmp_path_factory.getbasetemp()
    (folder / "first.txt").write_text("text")
    reader = create_reader(SourceSettings("first", ("first.txt",), folder))
    assert [record for piece in reader.list_pieces() for record in reader.read_piece(piece)] == [
        RawDocument("text", "first.txt")]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Return `read(files, ...)`, which writes files into an empty folder and returns the documents and broken
    records of a source over them."""

    def read_all(files: Mapping[str, str | bytes], format_: str = "auto", *, path: str = ".",
                 text_field: str = "text", **options: Any) -> list[RawDocument | BrokenRecord]:
        for name, content in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        reader = create_reader(SourceSettings("test", (path,), tmp_path, format_, text_field=text_field,
                                              options=options))
        return [record for piece in reader.list_pieces() for record in reader.read_piece(piece)]

    return read_all
