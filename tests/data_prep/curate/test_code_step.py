"""Step `code` of a pipeline: a user's function changes or drops documents."""

from pathlib import Path

import pytest

from data_prep.curate.code_step import CodeStep, StepCodeSettings
from data_prep.curate.pipeline.plan import hash_step_files
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import find_all_problems
from tests.data_prep.curate.pipeline.memory_view import MemoryView, doc, docs, run_step
from tests.typed_words import keys_of

STEP_CODE = """import dataclasses
from words import BAD
from megatron_sov.base.documents import LeftOut, Message

def judge(document):
    if BAD in document.text:
        return LeftOut("bad word")
    return dataclasses.replace(document, text=document.text + "!", where="nowhere")

def text(document):
    return document.text

def chat(document):
    return dataclasses.replace(document, text="", messages=(Message("user", "x"),))

def essay(document):
    return LeftOut("because " * 20)

def fail(document):
    return document.nothing

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "words.py").write_text("BAD = 'darn'")
    (tmp_path / "own.py").write_text(STEP_CODE)
    return tmp_path / "own.py"


def test_a_function_drops_and_changes(file: Path, tmp_path: Path) -> None:
    settings = StepCodeSettings(tmp_path / "own.py:judge")
    assert find_all_problems(settings) == []
    # its files include what it imports
    assert CodeStep(settings).list_files() == [tmp_path / "own.py", tmp_path / "words.py"]
    (tmp_path / "work").mkdir()
    outcomes = run_step(CodeStep, settings, MemoryView.of([docs("fine", "oh darn")], tmp_path / "work"))
    assert [(o.reason, o.text) for o in outcomes.values()] == [("", "fine!"), ("bad word", None)]


@pytest.mark.parametrize(("name", "message"), [
    ("own.py", "must have the form"), ("own.py:nothing", "has no 'nothing'"),
    ("own.py:number", "is 3; a data step"),
    ("gone.py:judge", "cannot be read"),
])
def test_a_missing_function_is_reported(file: Path, tmp_path: Path, name: str, message: str) -> None:
    (problem,) = find_all_problems(StepCodeSettings(tmp_path / name))
    assert problem.key == "function" and message in problem.rule


@pytest.mark.parametrize(("name", "message"), [
    ("text", r"a/page.html: data step .*own.py:text returned 'x'; it must return a Document of kind text"),
    ("chat", "returned Document"), ("essay", "with a reason of at most 80 characters"),
    ("fail", r"a/page.html: data step .*own.py:\d+: AttributeError: 'Document' object has no attribute"),
])
def test_a_failing_step_names_the_document(file: Path, tmp_path: Path, name: str, message: str) -> None:
    step = CodeStep(StepCodeSettings(tmp_path / f"own.py:{name}"))
    step.load_inputs(MemoryView({}, tmp_path))
    with pytest.raises(UserError, match=message):
        step.judge_document(doc("x", where="a/page.html"))


def test_named_files_are_part_of_the_step(file: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a")
    step = CodeStep(StepCodeSettings(tmp_path / "own.py:judge", (tmp_path / "list.txt",)))
    assert [Path(name).name for name in step.list_files()] == ["list.txt", "own.py", "words.py"]
    before = hash_step_files(step)
    (tmp_path / "list.txt").write_text("b")
    assert hash_step_files(step) != before
    assert keys_of(StepCodeSettings(tmp_path / "own.py:judge", (tmp_path / "gone",))) == ["files"]
