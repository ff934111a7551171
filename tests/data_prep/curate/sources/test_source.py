"""Source settings, the files that a source lists, and folders of mixed formats."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.curate.sources.formats import FORMATS, LIBRARIES, create_reader, load_reader_class
from data_prep.curate.sources.reader import format_file_name
from data_prep.curate.sources.source import NO_FORMAT, BrokenRecord, RawDocument, SourcePiece, SourceSettings
from data_prep.libraries import find_library_problems
from megatron_sov.base.documents import list_files
from megatron_sov.base.errors import UserError, format_install_command
from tests.typed_words import keys_of


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    source = SourceSettings("a b", ("missing", "missing"), tmp_path, "jsonll", kind="fr")
    assert keys_of(source) == ["name", "path", "kind"]
    wrong = SourceSettings("a", ("missing", "gone"), tmp_path, "jsonll")
    assert keys_of(wrong) == ["path", "path", "format"]
    assert wrong.problems()[2].way_out == "did you mean 'jsonl'?"


@pytest.mark.parametrize(("options", "message"), [
    ({"time_s": "long"}, "time_s"), ({"time_s": 0}, "time_s"), ({"memory_bytes": 1}, "memory_bytes"),
    ({"unpacked_bytes": 5}, "unpacked_bytes"), ({"encodng": "x"}, "did you mean 'encoding'"),
    ({"encoding": "klingon"}, "klingon"), ({"cut_bytes": 1}, "cut_bytes")])
def test_options_are_checked(tmp_path: Path, options: dict[str, object], message: str) -> None:
    problems = SourceSettings("s", (".",), tmp_path, "text", options=options).problems()
    assert len(problems) == 1 and problems[0].key.startswith("options.") and message in problems[0].sentence


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_loads_with_valid_defaults(name: str) -> None:
    reader_class = load_reader_class(name)
    assert reader_class.format == name and keys_of(reader_class.Options()) == []
    assert all(f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
               for f in dataclasses.fields(reader_class.Options))


def test_pieces_are_json_values_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a.txt", "a/b/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    pieces = create_reader(SourceSettings("s", (".",), tmp_path)).list_pieces()
    assert [piece.file for piece in pieces] == ["a/b/c.txt", "a/z.txt", "a.txt", "b.txt"]
    read_back = json.loads(json.dumps([dataclasses.asdict(piece) for piece in pieces]))
    assert [SourcePiece(**{**values, "companion_files": tuple(values["companion_files"])})
            for values in read_back] == pieces


def test_file_names_are_relative_to_the_common_folder(tmp_path: Path) -> None:
    for name in ("x/one/a.txt", "x/two/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    source = SourceSettings("s", ("x/one", "x/two/a.txt"), tmp_path)
    assert [piece.file for piece in create_reader(source).list_pieces()] == ["one/a.txt", "two/a.txt"]
    assert source.get_file("two/a.txt").read_text() == "x/two/a.txt"


def test_links_are_followed_and_broken_links_are_reported(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    (root / "a.txt").write_text("a")
    (root / "sub" / "loop").symlink_to(root)
    (root / "sub" / "out.txt").symlink_to(tmp_path / "secret.txt")
    (root / "sub" / "in.txt").symlink_to(root / "a.txt")
    (root / "sub" / "gone.txt").symlink_to(root / "nothing")
    (root / ".hidden.txt").write_text("x")
    os.mkfifo(root / "pipe.txt")
    (tmp_path / "other/deep").mkdir(parents=True)
    (tmp_path / "other/deep/b.txt").write_text("b")
    (tmp_path / "other/deep/back").symlink_to(tmp_path / "other")
    (root / "linked").symlink_to(tmp_path / "other")
    (root / "again").symlink_to(tmp_path / "other/deep")
    (root / "all").symlink_to("/")
    source = SourceSettings("s", ("root",), tmp_path, format="text")
    pieces = create_reader(source).list_pieces()
    files = [piece.file for piece in pieces if piece.format != NO_FORMAT]
    assert files == ["a.txt", "again/b.txt", "sub/in.txt", "sub/out.txt"]
    broken = [record for piece in pieces if piece.format == NO_FORMAT
              for record in create_reader(source).read_piece(piece)]
    # "leads to a folder that is read under another name", or "is a link that leads to nothing"
    assert {one.place: one.reason.split()[0] for one in broken if isinstance(one, BrokenRecord)} == {
        "again/back": "leads", "all": "leads", "linked/deep": "leads", "pipe.txt": "is",
        "sub/gone.txt": "is", "sub/loop": "leads"}
    # `sov-data pack` reads the same files
    messages: list[str] = []
    listed = list_files(root, messages.append)
    assert [file.relative_to(root).as_posix() for file in listed] == files
    assert "6 left out; the first: " in "".join(messages)


def test_hidden_files_and_files_of_other_formats_are_reported(tmp_path: Path) -> None:
    for name in ("a.txt", "b.bin", ".c.txt", ".git/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    by_name = create_reader(SourceSettings("s", (".",), tmp_path, format="text"))
    mixed = create_reader(SourceSettings("s", (".",), tmp_path, format="auto"))
    assert [piece.file for piece in by_name.list_pieces()] == ["a.txt"]
    assert by_name.notes == [".: passed over 1 file (b.bin) and 2 hidden (.c.txt, .git)"]
    # in a folder of mixed formats, b.bin is a broken record, which the quarantine lists
    assert [piece.file for piece in mixed.list_pieces()] == ["a.txt", "b.bin"]
    assert mixed.notes == [".: passed over 2 hidden (.c.txt, .git)"]


def test_a_mixed_folder_is_read_by_file_endings(read) -> None:
    files = {"a.txt": "text", "b.jsonl": '{"text": "line"}', "c.html": "<p>page</p>", "d.png": b"\x89PNG",
             "e.py": "x = 1\n", "f.HTM": "<p>page</p>", "g\x1b": "no ending"}
    records = read(files)
    assert [(one.place, one.text) for one in records if isinstance(one, RawDocument)] == [
        ("a.txt", "text"), ("b.jsonl:1", "line"), ("c.html", "page"), ("e.py", "x = 1\n"), ("f.HTM", "page")]
    passed_over = [one for one in records if isinstance(one, BrokenRecord)]
    assert [(one.place, one.code, one.is_left_out) for one in passed_over] == [
        ("d.png", "ending", True), ("g\\x1b", "ending", True)]
    assert "(.png) of no format" in passed_over[0].reason and "(none)" in passed_over[1].reason


def test_a_source_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="holds no file"):
        create_reader(SourceSettings("s", (".",), tmp_path)).list_pieces()
    with pytest.raises(UserError, match="ending of no format"):
        create_reader(SourceSettings("s", ("a.png",), tmp_path)).list_pieces()
    with pytest.raises(UserError, match=r"source s: path = \"b.png\" does not exist"):
        create_reader(SourceSettings("s", ("b.png",), tmp_path))


def test_printed_file_names_are_distinct_and_printable() -> None:
    names = [b"a\xff.txt", b"a\\xff.txt", b"a\\\\xff.txt", b"a\x1b[2J.txt", b"a\\x1b[2J.txt", b"a\nb.txt",
             b"a\\nb.txt"]
    printed_names = {format_file_name(os.fsdecode(name)) for name in names}
    assert len(printed_names) == len(names) and all(name.isprintable() for name in printed_names)


PIPELINE = """name: small
sources:
  - {name: pages, path: pages, format: html}
"""


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A folder with a pipeline over one page."""
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/a.html").write_text("<article><p>A page with some words.</p></article>")
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return tmp_path


def test_a_run_without_its_library_does_not_start(pages: Path, monkeypatch: pytest.MonkeyPatch,
                                                  get_refusal: Any) -> None:
    monkeypatch.setitem(sys.modules, "resiliparse", None)
    stderr = get_refusal("run", str(pages / "pipeline.yaml"), "--output", str(pages / "out"))
    assert f"needs resiliparse, which is not installed; {format_install_command('data')}" in stderr
    assert not (pages / "out").exists()


def test_libraries_of_all_formats_are_installed() -> None:
    assert all(find_library_problems(name, *libraries) == [] for name, libraries in LIBRARIES.items())
    assert find_library_problems("it", "json", "no_such_one", "nor_this") == [
        f"it needs no_such_one and nor_this, which are not installed; {format_install_command('data')}"]
