"""Readers in a separate process: a file that hangs, crashes, exhausts memory or sends malformed replies
affects only its own record."""

import os
import signal
import socket
from pathlib import Path

import pytest

from data_prep.curate.sources import formats, reader
from data_prep.curate.sources.source import BrokenRecord, RawDocument, SourceSettings
from megatron_sov.sandbox import reader_process

HOSTILE = '''
import ctypes, os, socket, sys, time
from data_prep.curate.sources.reader import SourceItem
from data_prep.curate.sources.reader import FileReader
from data_prep.curate.sources.source import RawDocument

def hang():
    while True:
        pass

def crash():
    os.kill(os.getpid(), 11)

def eat():
    return bytearray(8 << 30)

def nest(n=0):
    return nest(n + 1)

def leave():
    os._exit(3)

def write():
    open("/tmp/left-by-a-reader", "w").write("x" * 10)

def steal():
    return open("/etc/passwd").read()

def call():
    socket.create_connection(("127.0.0.1", 9), timeout=1)

class Reader(FileReader):
    format = "text"

    @classmethod
    def iter_items(cls, job):
        for number, word in enumerate(open(job.file).read().split()):
            def read(word=word, number=number):
                if word in globals():
                    globals()[word]()
                yield RawDocument(word, f"{job.name}:{number}")
            yield SourceItem(f"{job.name}:{number}", read)
'''


@pytest.fixture
def read_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that reads a file of words; some words harm the process that reads them."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "hostile_reader.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    # the reading process loads the reader of a format by name: here, of `text` in both processes
    monkeypatch.setitem(formats.FORMATS, "text", "hostile_reader:Reader")
    replaced = ("from data_prep.curate.sources import formats; "
                "formats.FORMATS['text'] = 'hostile_reader:Reader'; ")
    main = "from {module}"
    assert main in reader_process._CODE
    monkeypatch.setattr(reader_process, "_CODE", reader_process._CODE.replace(main, replaced + main))
    monkeypatch.setattr(reader, "_processes", {})

    def read(words: str, **options: object) -> list[RawDocument | BrokenRecord]:
        (tmp_path / "a.txt").write_text(words)
        source = SourceSettings("s", ("a.txt",), tmp_path, "text", options=options)
        file_reader = formats.create_reader(source)
        return [one for piece in file_reader.list_pieces() for one in file_reader.read_piece(piece)]

    return read


@pytest.mark.parametrize(("harm", "code"), [
    ("hang", "time"), ("crash", "crash"), ("eat", "memory"), ("nest", "nested"), ("leave", "crash")])
def test_a_harmful_record_is_reported_and_the_next_one_is_read(read_words, harm: str, code: str) -> None:
    first, broken, last = read_words(f"one {harm} two", time_s=0.3)
    assert (first, last) == (RawDocument("one", "a.txt:0"), RawDocument("two", "a.txt:2"))
    assert isinstance(broken, BrokenRecord) and (broken.code, broken.place) == (code, "a.txt:1")


@pytest.mark.parametrize("harm", ["write", "steal", "call"])
def test_the_reading_process_cannot_write_read_other_files_or_connect(read_words, harm: str) -> None:
    broken, last = read_words(f"{harm} two")
    assert isinstance(broken, BrokenRecord) and "Error" in broken.reason and last.text == "two"
    assert not os.path.exists("/tmp/left-by-a-reader")


def test_the_reading_process_is_reused_for_the_next_file(read_words) -> None:
    read_words("one")
    process = next(iter(reader._processes.values()))
    read_words("two")
    assert next(iter(reader._processes.values())) is process
    read_words("crash")
    assert process not in reader._processes.values()


def test_the_reading_process_is_replaced_if_the_module_path_changes(
        read_words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_words("one")
    process = next(iter(reader._processes.values()))
    monkeypatch.syspath_prepend(tmp_path)  # as with a package that declares formats
    assert [raw.text for raw in read_words("two")] == ["two"]
    assert next(iter(reader._processes.values())) is not process


def test_the_reading_process_ends_when_its_iterator_is_closed(read_words, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three")
    file_reader = formats.create_reader(SourceSettings("s", ("a.txt",), tmp_path, "text"))
    documents = iter(file_reader.read_piece(file_reader.list_pieces()[0]))
    next(documents)
    process = next(iter(reader._processes.values()))
    documents.close()
    assert not reader._processes and process._child.exit_code(0) == -signal.SIGKILL


def open_malformed_channel(data: bytes) -> socket.socket:
    """Return our end of a socket on which a compromised parser has sent `data`."""
    ours, theirs = socket.socketpair()
    theirs.sendall(data)
    theirs.close()
    return ours


@pytest.mark.parametrize("data", [
    b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"\x05" + bytes(7) + b'{"a":',
    b"\x0c" + bytes(7) + b'{"text": 12}'])
def test_a_malformed_reply_of_the_reading_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                             data: bytes) -> None:
    monkeypatch.setattr(reader_process, "END_LIMIT_S", 0.05)
    (tmp_path / "a.txt").write_text("x")
    file_reader = formats.create_reader(SourceSettings("s", ("a.txt",), tmp_path, "text"))
    list(file_reader.read_piece(file_reader.list_pieces()[0]))
    process = next(iter(reader._processes.values()))
    monkeypatch.setattr(process, "channel", open_malformed_channel(data))
    records = list(file_reader.read_piece(file_reader.list_pieces()[0]))
    assert [one.code for one in records if isinstance(one, BrokenRecord)] in (["parser"], ["crash"])

