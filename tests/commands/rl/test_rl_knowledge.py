"""`megatron-sov rl knowledge`: which rows it selects, why it drops others, and packing of its output."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main as sov_data
from data_prep.shards.token_artifact import open_split
from megatron_sov.base.artifacts import find_damaged_files, read_manifest
from megatron_sov.cli import main

ANSWER = "The lender must give notice in writing thirty days before the contract is ended, says section 4."
"""Answer of a test question; it contains the words of `NOTICE`."""
NOTICE = "The lender must give notice, in writing, THIRTY days before the contract is ended."


def context(document: str, section: object, text: str) -> dict:
    return {"context": text, "metadata": {"law": document, "section": section}}


ROWS = [
    {"split": "train", "contexts": [context("Credit Act", 1, "This act may be cited as the Credit Act."),
                                    context("Credit Act", 2, "A lender is whoever lends money.")]},
    {"split": "train", "contexts": [context("Credit Act", 1, "This act may be cited as the Credit Act."),
                                    context("Labour Act", 1, "This act may be cited as the Labour Act.")]},
    {"split": "train", "contexts": [context("Credit Act", 4, NOTICE), context("Credit Act", 5, "  "),
                                    context("", 6, "A text of no document.")]},
    {"split": "test", "contexts": [context("Credit Act", 7, "A section of a test's question.")]},
]
COMMAND = ["rl", "knowledge", "--input", "rows.jsonl", "--tests", "tests.jsonl", "--text-field", "context",
           "--document-field", "metadata.law", "--section-field", "metadata.section", "--records-in",
           "contexts", "--split", "split=train", "--output", "out"]


@pytest.fixture(autouse=True)
def folder(cwd: Path) -> None:
    write_rows("rows.jsonl", ROWS)
    write_rows("tests.jsonl", [{"answer": ANSWER}, {"answer": "Section 2."}])


def write_rows(name: str, rows: list[dict]) -> None:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def test_each_section_occurs_once_as_a_single_assistant_turn(read_output: Any) -> None:
    output = read_output(*COMMAND)
    chats = [json.loads(line) for line in Path("out/knowledge.jsonl").read_text().splitlines()]
    assert [chat["id"] for chat in chats] == ["Credit Act / 1", "Credit Act / 2", "Labour Act / 1"]
    assert chats[1]["messages"] == [{"role": "assistant", "content": "A lender is whoever lends money."}]
    content = read_manifest("out", "corpus").content
    assert content == {"knowledge": {"kept": 3, "repeated": 1, "in_test_answers": 1, "without_text": 1,
                                     "without_document_or_section": 1, "of_another_split": 1},
                       "tests": {"answers": 2, "too_short": 1}}
    assert find_damaged_files("out") == []
    assert "3 kept" in output and "1 in test answers" in output
    assert "1 of 2 answers have fewer than ten" in output


def test_the_assistant_turns_of_chats_are_selected_and_can_be_packed(packed_data) -> None:
    write_rows("rows.jsonl", [{"document": "Act", "section": "1", "messages": [
        {"role": "user", "content": "What does section 1 say?"},
        {"role": "assistant", "content": "This act may be cited."}]}])
    assert main([*COMMAND[:6], "--output", "out"]) == 0
    assert sov_data(["pack", "--tokenizer", str(packed_data.tokenizer), "--format", "chat", "--input",
                     "out/knowledge.jsonl", "--output", "packed", "--workers", "1"]) == 0
    from tokenizers import Tokenizer

    (index,) = Path("packed").rglob("*train*.idx")
    tokenizer = Tokenizer.from_file(str(packed_data.tokenizer / "tokenizer.json"))
    ids = open_split(index.with_suffix("")).tokens.tolist()
    assert "This act may be cited." in tokenizer.decode(ids) and "What does" not in tokenizer.decode(ids)


@pytest.mark.each(("arguments", "message"), [
    (["--split", "train"], '--split "train": must be FIELD=VALUE'),
    (["--records-in", "split"], "rows.jsonl: line 1: split is not a list of objects"),
    (["--text-field", "nothing"], "no section remains (7 without text, 1 of another split)"),
    (["--answer-field", "reply"], "--tests tests.jsonl: line 1 has no text in 'reply'"),
    (["--tests", "absent.jsonl"], "--tests absent.jsonl: cannot be read"),
])
def test_mistakes_give_one_sentence_and_no_output(arguments: list[str], message: str,
                                                  get_refusal: Any) -> None:
    assert message in get_refusal(*COMMAND, *arguments)
    assert not Path("out").exists()
