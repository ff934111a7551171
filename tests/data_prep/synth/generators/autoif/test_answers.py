"""The generator `autoif`: prompts in all their forms, planted faults, and turns as the paper says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_prep.synth.generators.autoif.queries import queries_of, query_in, quoted, with_quotes_of
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import problems_of
from tests.typed_words import keys_of

sys.path.append(str(Path(__file__).parents[5] / "benchmarks"))
from data_prep.synth.generator import GeneratorItem
from data_prep.synth.known import generator_class
from megatron_sov.judge.rewards.constraint import Constraint
from megatron_sov.judge.rewards.reward import judged
from tests.data_prep.synth.models import autoif as actor
from tests.data_prep.synth.scripted import samples_of

CASES = {case.what: case for case in reversed(actor.cases())}
REASONS = {
    "a sound answer": "", "breaks its constraint": "constraint", "answers in English": "language",
    "answers in Thai": "language", "slips into Chinese": "foreign script", "is cut off": "ended",
    "is off the topic": "judge", "talks to the judge": "judge", "translation loses quotations": "translation",
    "translation stays English": "translation"}
NO_COMMA = "def evaluate(response):\n    return ',' not in response"
ITEM = GeneratorItem("x.0", {"query": "한글은 언제 만들어졌나요?", "constraint": 'Do not use the sign ",".',
                             "functions": [NO_COMMA]})


AUTOIF = generator_class("autoif")


def autoif(**settings: Any) -> Any:
    """Return the generator, whose constraints need not be there."""
    return AUTOIF(AUTOIF.Settings(**settings))


@pytest.mark.parametrize("what", CASES)
def test_each_fault_is_caught_by_its_check(what: str) -> None:
    samples = samples_of(autoif(), CASES[what].item, CASES[what].replies)
    assert {sample.reason for sample in samples} == {REASONS[what]}


def test_a_row_holds_the_functions_of_the_reward() -> None:
    generator = autoif(system_share=1)
    answer, _ = samples_of(generator, CASES["a sound answer"].item, CASES["a sound answer"].replies)
    turns = answer.record["messages"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant"]
    record = json.loads(json.dumps(answer.record))
    assert judged(Constraint(), {**record, "response": turns[-1]["content"]}).reward == 1
    assert judged(Constraint(), {**record, "response": "다른 말입니다."}).reward == 0


def test_half_of_the_constraints_stand_in_the_system_turn() -> None:
    fields = {**ITEM.fields, "constraint": "쉼표를 쓰지 마세요.", "functions": []}

    def reply(request: dict[str, object]) -> str:
        is_judge = "grade a response" in json.dumps(request["messages"])
        return '{"score": 8}' if is_judge else "한글은 글자입니다."
    generator = autoif(num_responses=1)
    places = [samples_of(generator, GeneratorItem(f"{number}.0", fields), reply)[0].notes["in_system"]
              for number in range(60)]
    assert 18 <= sum(places) <= 42


def written(folder: Path, **record: object) -> Path:
    file = folder / "constraints.jsonl"
    file.write_text(json.dumps({"prompt": "No commas.", "functions": [NO_COMMA], **record}) + "\n")
    return file


def test_items_are_queries_with_a_constraint_and_follow_from_their_text(tmp_path: Path) -> None:
    generator = autoif(constraints=str(written(tmp_path, back=["Leave out commas.", 3])))
    rows = [{"conversation": [{"role": "user", "content": f"물음 {i}"}], "toxic": i == 0} for i in range(20)]
    file = tmp_path / "queries.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[3], {"prompt": "짧"}]))
    items = list(generator.items([file]))
    assert [item.fields["query"] for item in items] == [f"물음 {i}" for i in range(1, 20)]
    assert {item.fields["constraint"] for item in items} == {"No commas.", "Leave out commas."}
    file.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    again = {item.id: item.fields for item in generator.items([file])}
    assert again == {item.id: item.fields for item in items}


@pytest.mark.parametrize(("record", "sentence"), [
    ({"functions": ["import os"]}, "constraints.jsonl:1: functions[0] has no function evaluate"),
    ({"functions": None}, "constraints.jsonl:1: functions = None"),
    ({"prompt": 3}, "prompt must be the constraint"), ({"prompt": "a\nb"}, "prompt must be the constraint")])
def test_constraints_that_are_none_are_refused(record: dict[str, object], sentence: str,
                                               tmp_path: Path) -> None:
    generator = autoif(constraints=str(written(tmp_path, **record)))
    with pytest.raises(UserError) as e:
        list(generator.items([]))
    assert sentence in str(e.value)


def test_all_problems_of_settings_are_told(tmp_path: Path) -> None:
    assert 'constraints = "" is not set' in str(problems_of(AUTOIF.Settings())[0])
    assert "has no kept.jsonl" in str(problems_of(AUTOIF.Settings(constraints=str(tmp_path)))[0])
    (tmp_path / "kept.jsonl").touch()
    assert problems_of(AUTOIF.Settings(constraints=str(tmp_path))) == []
    assert keys_of(AUTOIF.Settings(constraints="/nowhere", min_query_chars=9, max_query_chars=8)) == [
        "constraints", "min_query_chars"]
    assert keys_of(AUTOIF.Settings(language="xx", foreign_scripts=("CHINESE",), system_share=2,
                                  min_score=11)) == [
        "language", "foreign_scripts.0", "system_share", "min_score"]


@pytest.mark.parametrize(("text", "words"), [
    ('Use "a" and “b c”.', ["a", "b c"]), ("Use 「가」 and `x y`.", ["가", "x y"]),
    ("Don't use 'it' or it's.", ["it"]),
    ("A title between <<T>> marks", ["<<T>>"]), ("nothing", []), ('"', []), ('an "open\nquote"', [])])
def test_quotations(text: str, words: list[str]) -> None:
    assert quoted(text) == words


@pytest.mark.parametrize(("text", "translation", "expected"), [
    ('Use the word "reason".', '"reason"이라는 말을 쓰세요.', '"reason"이라는 말을 쓰세요.'),
    ('Use the word "reason".', "“reason”이라는 말을 쓰세요.", "“reason”이라는 말을 쓰세요."),
    ('Use the word "reason".', '"이유"라는 말을 쓰세요.', '"reason"라는 말을 쓰세요.'),
    ('Put "a" before "b".', '"b" 앞에 "a"를 두세요.', '"b" 앞에 "a"를 두세요.'),
    ('Put "a" before "b".', '"가"를 "나" 앞에 두세요.', '"a"를 "b" 앞에 두세요.'),
    ('Use the word "reason".', "이유라는 말을 쓰세요.", None),
    ('Use the word "reason".', '"이유"와 "까닭"을 쓰세요.', None),
    ('Use "a" and "a".', '"a"를 쓰세요.', None),
    ("Use no commas.", "쉼표를 쓰지 마세요.", "쉼표를 쓰지 마세요."),
])
def test_a_translation_has_the_quotations_of_its_text(text: str, translation: str,
                                                      expected: str | None) -> None:
    assert with_quotes_of(text, translation) == expected


TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "first"},
         {"role": "assistant", "content": "a"}, {"role": "user", "content": "second"}]


@pytest.mark.parametrize("record", [
    {"conversation": TURNS}, {"messages": TURNS}, {"prompt": TURNS}, {"prompt": "first"}, {"query": "first"},
    {"conversations": [{"from": "human", "value": "first"}]}, {"messages": [], "instruction": "first"}])
def test_the_first_turn_of_the_user(record: dict[str, Any]) -> None:
    assert query_in(record, "x:1") == "first"


@pytest.mark.parametrize("record", [
    {}, {"text": "first"}, {"messages": [{"role": "assistant", "content": "a"}]}, {"prompt": 3},
    {"messages": "first"}, {"conversation": [3, None]}])
def test_a_record_without_one_is_refused_with_its_place(record: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="x:1: has no prompt of a user"):
        query_in(record, "x:1")


def test_a_table_of_wildchat_reads_as_its_lines(tmp_path: Path) -> None:
    rows = [{"conversation": [{"role": "user", "content": f"물음 {i}"}], "toxic": i % 3 == 0,
             "license": "odc-by", "hashed_ip": "x"} for i in range(9)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = list(queries_of([tmp_path / "a.parquet"], 1, 100, False))
    lines = list(queries_of([tmp_path / "b.jsonl"], 1, 100, False))
    assert [(q.text, q.digest, q.licence) for q in table] == [(q.text, q.digest, q.licence) for q in lines]
    assert [q.text for q in lines] == [f"물음 {i}" for i in (1, 2, 4, 5, 7, 8)]
    assert len(list(queries_of([tmp_path], 1, 100, True))) == 9  # each once, though it stands in both
    assert list(queries_of([tmp_path], 5, 100, True)) == []
    (tmp_path / "a.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(UserError, match=r"a\.parquet"):
        list(queries_of([tmp_path], 1, 100, True))
