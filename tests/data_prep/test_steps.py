"""Data steps: documents changed or left out by a function of one's own, counted, and on record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from data_prep import steps
from data_prep.cli import main
from data_prep.steps import Steps, named_steps
from megatron_sov.documents import Document, LeftOut
from megatron_sov.errors import UserError

STEPS = '''
from dataclasses import replace
from megatron_sov import LeftOut
from megatron_sov.documents import Message

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
    assert f"text: {left_out} documents left out by data steps ({left_out} short)" in capsys.readouterr().out
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
