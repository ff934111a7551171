"""Data steps: documents changed or left out by a function of one's own, counted, and on record."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from data_prep import steps
from data_prep.cli import main
from data_prep.curate.code_step import CodeStep, StepCodeSettings
from data_prep.curate.pipeline.plan import file_hashes
from data_prep.curate.pipeline.step import StepOutcome
from data_prep.steps import Steps, named_steps
from megatron_sov.base.documents import Document, LeftOut
from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import recording_reads
from megatron_sov.base.settings import problems_of
from tests.data_prep.curate.pipeline.memory_view import MemoryView, docs, outcomes
from tests.typed_words import keys_of

STEPS = '''
from dataclasses import replace
from megatron_sov import LeftOut
from megatron_sov.base.documents import Message

def long_enough(document):
    return document if len(document.text) >= 40 else LeftOut("short")

def shout(document):
    return replace(document, text=document.text.upper(), line=999, where="nowhere")

def no_shouting(document):
    return LeftOut("shouts") if document.text.isupper() else document

def text(document):
    return document.text

def chat(document):
    return replace(document, text="", messages=(Message("user", "x"),))

def essay(document):
    return LeftOut("because " * 20)

def fails(document):
    return document.nothing

def anew(document):
    return type(document)("elsewhere", document.text.upper())

def halved(document):
    return replace(document, columns={"score": document.columns["score"][0] / 2}, bucket="../b")

def elsewhere(document):
    return replace(document, bucket="../b")

def empty(document):
    return replace(document, text=" ")

def all_out(document):
    return LeftOut("all")

nothing = None
'''


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(steps.OWN, "_known", {})
    path = tmp_path / "steps.py"
    path.write_text(STEPS)
    return path


def test_steps_work_in_order_and_a_document_keeps_its_place(file: Path) -> None:
    document = Document("a.jsonl:7", "x" * 50, id="i", line=7)
    both = Steps(named_steps([f"{file}:long_enough", f"{file}:shout"]))
    assert both.apply(document) == dataclasses.replace(document, text="X" * 50)
    assert both.apply(dataclasses.replace(document, text="x")) == LeftOut("short")
    assert Steps(named_steps([f"{file}:shout", f"{file}:no_shouting"])).apply(document) == LeftOut("shouts")
    assert Steps(()).apply(document) is document


def test_what_a_record_says_of_itself_stays_with_the_document(file: Path) -> None:
    document = Document("a.jsonl:7", "x" * 50, columns={"score": (3.0,)}, bucket="easy", line=7)
    made = Steps(named_steps([f"{file}:anew"])).apply(document)
    assert made == dataclasses.replace(document, text="X" * 50)
    with pytest.raises(UserError, match=r"steps.py:halved returned 1.5 in column 'score'; it must be a"):
        Steps(named_steps([f"{file}:halved"])).apply(document)
    with pytest.raises(UserError, match=r"steps.py:elsewhere returned the bucket '../b'; it must be a name"):
        Steps(named_steps([f"{file}:elsewhere"])).apply(document)


@pytest.mark.parametrize(("name", "message"), [
    ("text", r"a.jsonl:7: data step .*steps.py:text returned 'abc'; it must return a Document of the same "
             r"kind, or LeftOut"), ("chat", "returned a Document of another kind, chat"),
    ("essay", "with a reason of at most 80 characters"),
    ("fails",
     r"a.jsonl:7: data step .*steps.py:\d+: AttributeError: 'Document' object has no attribute 'nothing'"),
])
def test_what_a_step_must_not_do_names_step_and_document(file: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Steps(named_steps([f"{file}:{name}"])).apply(Document("a.jsonl:7", "abc", line=7))


def test_what_is_no_step(file: Path) -> None:
    for reference, message in {f"{file}:nothing": "is None; a data step is a function of one Document",
                               "longer": "data step 'longer': does not exist"}.items():
        with pytest.raises(UserError, match=message):
            named_steps([reference])


def test_a_file_that_changes_while_it_is_at_work_is_refused(file: Path) -> None:
    codes = named_steps([f"{file}:shout"])
    file.write_text(STEPS + "\n# another\n")
    with pytest.raises(UserError, match=r"steps.py has changed while it was at work"):
        Steps(codes)


def packed(tokenizer: Path, folder: Path, name: str, *arguments: str) -> int:
    return main(["pack", "--tokenizer", str(tokenizer), "--input", str(folder / "text.jsonl"), "--output",
                 str(folder / name), "--heldout", "0.2", *arguments])


def test_packing_counts_what_is_left_out_and_records_the_code(
    file: Path, tmp_path: Path, packed_data, capsys: pytest.CaptureFixture[str],
) -> None:
    """Packing through a step is packing what the step makes, with any number of workers."""
    documents = [f"document {i} of many" + " with more to say" * (i % 4) for i in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    (tmp_path / "hand").mkdir()
    (tmp_path / "hand" / "text.jsonl").write_text("".join(
        json.dumps({"text": d.upper()}) + "\n" for d in documents if len(d) >= 40))
    tokenizer, both = packed_data.tokenizer, ("--step", f"{file}:long_enough", "--step", f"{file}:shout")
    assert packed(tokenizer, tmp_path, "shards", *both, "--workers", "1") == 0
    assert packed(tokenizer, tmp_path / "hand", "shards") == 0
    for kind in ("train-00000.bin", "heldout-00000.bin"):
        assert ((tmp_path / "shards/text" / kind).read_bytes()
                == (tmp_path / "hand/shards/text" / kind).read_bytes())
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    left_out = sum(len(d) < 40 for d in documents)
    assert manifest["content"]["sources"][0]["num_left_out"] == {"short": left_out} and left_out > 0
    assert [s["name"] for s in manifest["settings"]["steps"]] == ["long_enough", "shout"]
    assert all(list(s["files"]) == ["steps.py"] for s in manifest["settings"]["steps"])
    assert (f"text: 60 records read: {60 - left_out} written, {left_out} set aside ({left_out} short)\n"
            in capsys.readouterr().out)
    assert ("num_left_out"
            not in json.loads((tmp_path / "hand/shards/manifest.json").read_text())["content"]["sources"][0])


def test_other_steps_find_no_units_of_before(file: Path, tmp_path: Path, packed_data,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"number {i} and more"}) + "\n"
                                                 for i in range(20)))
    assert packed(packed_data.tokenizer, tmp_path, "out", "--step", f"{file}:all_out") == 2
    assert "text.jsonl: data steps leave out every document; see to their rules" in capsys.readouterr().err
    assert packed(packed_data.tokenizer, tmp_path, "out", "--step", f"{file}:empty") == 2
    assert "holds no text" in capsys.readouterr().err
    assert packed(packed_data.tokenizer, tmp_path, "out") == 0
    said = capsys.readouterr().out
    assert "were complete from before" not in said and "left out" not in said


# The step `code` of a pipeline.


OWN = """import dataclasses
from words import BAD
from megatron_sov.base.documents import LeftOut

def judge(document):
    if BAD in document.text:
        return LeftOut("bad word")
    return dataclasses.replace(document, text=document.text + "!")

number = 3
"""


def test_a_function_drops_and_changes(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "words.py").write_text("BAD = 'darn'")
    settings = StepCodeSettings(tmp_path / "own.py:judge")
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
    (problem,) = problems_of(StepCodeSettings(tmp_path / name))
    assert problem.key == "function" and sentence in problem.rule


def test_what_fails_is_told_by_its_document(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def judge(document):\n    return 3\n")
    step = CodeStep(StepCodeSettings(tmp_path / "own.py:judge"))
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
    step = CodeStep(StepCodeSettings(tmp_path / "own.py:judge"))
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
    step = CodeStep(StepCodeSettings(tmp_path / "own.py:judge"))
    step.start(MemoryView({}, tmp_path))
    with pytest.raises(UserError, match=r"opens .* when it is called"):
        step.outcomes(docs("x", where="a"))
    sys.modules.pop("latewords", None)
    names = (tmp_path / "list.txt", tmp_path / "latewords.py")
    named = CodeStep(StepCodeSettings(tmp_path / "own.py:judge", names))
    named.start(MemoryView({}, tmp_path))
    assert named.outcomes(docs("x", where="a")) == [StepOutcome(text="x")]


@pytest.mark.parametrize("starts", [
    "subprocess.run(['true'])", "os.system('true')", "os.waitpid(os.fork() or os._exit(0), 0)",
    "ThreadPoolExecutor(1).submit(subprocess.run, ['true']).result()"])
def test_a_process_whose_files_are_not_seen_has_to_have_them_named(tmp_path: Path, starts: str) -> None:
    (tmp_path / "own.py").write_text(
        "import os, subprocess\nfrom concurrent.futures import ThreadPoolExecutor\n"
        f"def judge(document):\n    {starts}\n    return document\n")
    step = CodeStep(StepCodeSettings(tmp_path / "own.py:judge"))
    step.start(MemoryView({}, tmp_path))
    with pytest.raises(UserError, match=r"starts a pro.* when it is called, and files that"):
        step.outcomes(docs("x", where="a"))
    named = CodeStep(StepCodeSettings(tmp_path / "own.py:judge", (tmp_path / "own.py",)))
    named.start(MemoryView({}, tmp_path))
    assert named.outcomes(docs("x", where="a")) == [StepOutcome(text="x")]


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
    step = CodeStep(StepCodeSettings(tmp_path / "own.py:judge"))
    step.start(MemoryView({}, tmp_path))
    assert step.outcomes(docs("x", where="a"))
    assert keys_of(StepCodeSettings(tmp_path / "own.py:judge", (tmp_path / "gone",))) == ["files"]


def test_a_file_in_shared_memory_is_no_installed_one() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        Path(file.name).write_text("3")
        with recording_reads() as reads:
            Path(file.name).read_text()
    assert reads == {Path(file.name)}
