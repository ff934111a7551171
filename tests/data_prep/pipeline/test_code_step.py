"""Functions of one's own as a step."""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path

import pytest

from data_prep.pipeline.code_step import CodeSettings, CodeStep
from data_prep.pipeline.plan import file_hashes
from data_prep.pipeline.step import Outcome
from megatron_sov.errors import UserError
from megatron_sov.plugins.reads import recording_reads
from megatron_sov.settings import problems_of
from tests.data_prep.pipeline.memory_view import MemoryView, docs, outcomes
from tests.typed_words import keys_of

OWN = """import dataclasses
from words import BAD
from megatron_sov.documents import LeftOut

def judge(document):
    if BAD in document.text:
        return LeftOut("bad word")
    return dataclasses.replace(document, text=document.text + "!")

number = 3
"""


def test_a_function_drops_and_changes(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "words.py").write_text("BAD = 'darn'")
    settings = CodeSettings(tmp_path / "own.py:judge")
    assert problems_of(settings) == []
    assert CodeStep(settings).files() == [tmp_path / "own.py", tmp_path / "words.py"], "its imports too"
    (tmp_path / "work").mkdir()
    found = outcomes(CodeStep, settings, MemoryView.of([docs("fine", "oh darn")], tmp_path / "work"))
    assert [(o.reason, o.text) for o in found.values()] == [("", "fine!"), ("bad word", None)]


@pytest.mark.parametrize(("name", "sentence"), [
    ("own.py", "must have the form"), ("own.py:nothing", "has no 'nothing'"),
    ("own.py:number", "is 3; a data step"),
    ("gone.py:judge", "cannot be read"),
])
def test_what_is_no_function_is_told(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "words.py").write_text("BAD = 'darn'")
    (problem,) = problems_of(CodeSettings(tmp_path / name))
    assert problem.key == "function" and sentence in problem.rule


def test_what_fails_is_told_by_its_document(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def judge(document):\n    return 3\n")
    step = CodeStep(CodeSettings(tmp_path / "own.py:judge"))
    step.start(MemoryView({}, tmp_path))
    with pytest.raises(UserError, match=r"a/page.html: data step .* returned 3"):
        step.outcomes(docs("x", where="a/page.html"))


def _file_names(step: CodeStep) -> list[str]:
    return [Path(file).name for file in step.files()]


def test_what_is_read_or_imported_while_it_is_loaded_is_part_of_the_step(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/words.json").write_text('["darn"]')
    (tmp_path / "more.txt").write_text("x")
    (tmp_path / "readswords.py").write_text(
        "import json, pathlib\n"
        "BAD = json.loads((pathlib.Path(__file__).parent / 'lists/words.json').read_text())[0]\n")
    (tmp_path / "own.py").write_text(OWN.replace("from words", "from readswords")
                                     + "open(__file__.replace('own.py', 'more.txt')).read()\n")
    step = CodeStep(CodeSettings(tmp_path / "own.py:judge"))
    assert _file_names(step) == ["words.json", "more.txt", "own.py", "readswords.py"]
    before = file_hashes(step)
    (tmp_path / "lists/words.json").write_text('["dawn"]')
    assert file_hashes(step) != before


@pytest.mark.parametrize("reads", [
    "open(HERE / 'list.txt').read()", "(HERE / 'list.txt').read_bytes()", "import latewords",
    "os.read(os.open(HERE / 'list.txt', os.O_RDONLY), 9)",
    "os.read(os.open(HERE / 'list.txt', os.O_RDWR | os.O_CREAT), 9)",
    "open(HERE / 'list.txt', 'a').close()\n    (HERE / 'list.txt').read_text()",
    "np.loadtxt(HERE / 'list.txt')",
    "try:\n        open(HERE / 'list.txt')\n    except Exception: pass",
    "t = threading.Thread(target=(HERE / 'list.txt').read_text); t.start(); t.join()",
    "ThreadPoolExecutor(1).submit((HERE / 'list.txt').read_text).result()",
    "POOL.submit((HERE / 'list.txt').read_text).result()",
    "sqlite3.connect(HERE / 'list.txt').close()",
    "sqlite3.connect(f'file:{HERE}/list.txt?mode=ro', uri=True).close()"])
def test_a_file_that_is_opened_in_a_call_has_to_be_named(tmp_path: Path, reads: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "latewords", raising=False)
    for name in ("list.txt", "latewords.py"):
        (tmp_path / name).write_text("3\n")
    (tmp_path / "own.py").write_text(
        "import os, pathlib, sqlite3, threading\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "import numpy as np\nHERE = pathlib.Path(__file__).parent\nPOOL = ThreadPoolExecutor(1)\n"
        "POOL.submit(int).result()\n"
        f"def judge(document):\n    {reads}\n    return document\n")
    step = CodeStep(CodeSettings(tmp_path / "own.py:judge"))
    step.start(MemoryView({}, tmp_path))
    with pytest.raises(UserError, match=r"opens .* when it is called"):
        step.outcomes(docs("x", where="a"))
    sys.modules.pop("latewords", None)
    names = (tmp_path / "list.txt", tmp_path / "latewords.py")
    named = CodeStep(CodeSettings(tmp_path / "own.py:judge", names))
    named.start(MemoryView({}, tmp_path))
    assert named.outcomes(docs("x", where="a")) == [Outcome(text="x")]


@pytest.mark.parametrize("starts", [
    "subprocess.run(['true'])", "os.system('true')", "os.waitpid(os.fork() or os._exit(0), 0)",
    "ThreadPoolExecutor(1).submit(subprocess.run, ['true']).result()"])
def test_a_process_whose_files_are_not_seen_has_to_have_them_named(tmp_path: Path, starts: str) -> None:
    (tmp_path / "own.py").write_text(
        "import os, subprocess\nfrom concurrent.futures import ThreadPoolExecutor\n"
        f"def judge(document):\n    {starts}\n    return document\n")
    step = CodeStep(CodeSettings(tmp_path / "own.py:judge"))
    step.start(MemoryView({}, tmp_path))
    with pytest.raises(UserError, match=r"starts a pro.* when it is called, and files that"):
        step.outcomes(docs("x", where="a"))
    named = CodeStep(CodeSettings(tmp_path / "own.py:judge", (tmp_path / "own.py",)))
    named.start(MemoryView({}, tmp_path))
    assert named.outcomes(docs("x", where="a")) == [Outcome(text="x")]


def test_threads_of_others_are_not_listened_to(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    go_on, is_read = threading.Event(), threading.Event()

    def read() -> None:
        go_on.wait()
        (tmp_path / "a").read_text()
        is_read.set()

    thread = threading.Thread(target=read)
    thread.start()
    with recording_reads() as reads:
        go_on.set()
        is_read.wait()
    thread.join()
    assert reads == set() and not reads.unseen


def test_what_the_function_itself_writes_and_what_is_installed_is_free(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import pathlib\nHERE = pathlib.Path(__file__).parent\ndef judge(document):\n    import wave\n"
        "    (HERE / 'scratch').write_text('x')\n    (HERE / 'scratch').read_text()\n"
        "    (HERE / 'scratch').rename(HERE / 'kept')\n    (HERE / 'kept').read_text()\n"
        "    open(HERE / 'log', 'a').write('x')\n    return document\n")
    (tmp_path / "log").write_text("of before")
    step = CodeStep(CodeSettings(tmp_path / "own.py:judge"))
    step.start(MemoryView({}, tmp_path))
    assert step.outcomes(docs("x", where="a"))
    assert keys_of(CodeSettings(tmp_path / "own.py:judge", (tmp_path / "gone",))) == ["files"]


def test_a_file_in_shared_memory_is_no_installed_one() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        Path(file.name).write_text("3")
        with recording_reads() as reads:
            Path(file.name).read_text()
    assert reads == {Path(file.name)}
