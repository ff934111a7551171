"""Generator `autoif`: input forms, planted faults, and the placement of constraints as in the paper."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.synth.declared.generator import Generator, load_generator
from data_prep.synth.readers.queries import get_first_user_turn
from data_prep.synth.samples import GeneratorItem
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import find_all_problems
from megatron_sov.judge.rewards.constraint import Constraint
from megatron_sov.judge.rewards.reward import run_reward
from tests.data_prep.synth.models import autoif as actor
from tests.data_prep.synth.scripted import collect_samples
from tests.typed_words import keys_of

NO_COMMA = "def evaluate(response):\n    return ',' not in response"
AUTOIF = load_generator("autoif")


def build_generator(**settings: Any) -> Any:
    """Return the generator; its setting `constraints` may name a missing file."""
    return Generator(AUTOIF, AUTOIF.Settings(**settings))


@pytest.mark.parametrize("fault", actor.FAULTS)
def test_each_fault_is_caught_by_its_check(fault: str) -> None:
    query, model, check = actor.FAULTS[fault]
    samples = collect_samples(build_generator(), actor.make_item(query), model)
    assert {sample.reason for sample in samples} == {check}


def test_a_row_holds_the_functions_of_the_reward() -> None:
    item = actor.make_item(actor.QUERY)
    answer, other_answer = collect_samples(build_generator(system_share=1), item, actor.build_model())
    assert (answer.reason, other_answer.reason) == ("", "")
    turns = answer.record["messages"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant"]
    record = json.loads(json.dumps(answer.record))
    assert run_reward(Constraint(), {**record, "response": turns[-1]["content"]}).reward == 1
    assert run_reward(Constraint(), {**record, "response": "다른 말입니다."}).reward == 0


def test_half_of_the_constraints_are_in_the_system_turn_and_half_are_plain() -> None:
    query, constraint = "한글이란\n{constraint} 무엇인가요?", "쉼표를 {query} 쓰지 마세요."

    def reply(request: dict[str, object]) -> str:
        is_judge = "grade a response" in json.dumps(request["messages"])
        return '{"score": 8}' if is_judge else "한글은 글자입니다."

    num_in_system, num_plain = 0, 0
    for number in range(80):
        item = GeneratorItem(f"{number}", {"query": query, "constraint": constraint, "functions": []})
        sample, = collect_samples(build_generator(num_responses=1), item, reply)
        first, *_ = [turn["content"] for turn in sample.record["messages"]]
        assert constraint in first  # placeholders inside the query or the constraint are not filled in
        num_in_system += sample.notes["in_system"]
        num_plain += first in (constraint, f"{query}\n\n{constraint}", f"{constraint} {query}")
    assert 24 <= num_in_system <= 56 and 24 <= num_plain <= 56  # half of 80, within 3.6 standard deviations


def write_constraint(folder: Path, **record: object) -> Path:
    file = folder / "constraints.jsonl"
    file.write_text(json.dumps({"prompt": "No commas.", "functions": [NO_COMMA], **record}) + "\n")
    return file


def test_items_are_queries_with_a_constraint_and_follow_from_their_text(tmp_path: Path) -> None:
    """Toxic and very short queries are left out, and the order of lines changes no item."""
    generator = build_generator(constraints=str(write_constraint(tmp_path, back=["Leave out commas.", 3])))
    rows = [{"conversation": [{"role": "user", "content": f"물음 {i}"}], "toxic": i == 0} for i in range(20)]
    file = tmp_path / "queries.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "짧"}]))
    items = list(generator.read_items([file]))
    assert [item.fields["query"] for item in items] == [f"물음 {i}" for i in range(1, 20)]
    assert {item.fields["constraint"] for item in items} == {"No commas.", "Leave out commas."}
    file.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    reordered = {item.id: item.fields for item in generator.read_items([file])}
    assert reordered == {item.id: item.fields for item in items}


@pytest.mark.parametrize(("record", "message"), [
    ({"functions": ["import os"]}, "constraints.jsonl:1: functions[0] has no function evaluate"),
    ({"functions": None}, "constraints.jsonl:1: functions = None"),
    ({"prompt": "a\nb"}, "prompt must be the constraint")])
def test_malformed_constraints_are_refused(record: dict[str, object], message: str, tmp_path: Path) -> None:
    generator = build_generator(constraints=str(write_constraint(tmp_path, **record)))
    with pytest.raises(UserError) as e:
        list(generator.read_items([]))
    assert message in str(e.value)


def test_all_problems_of_settings_are_reported(tmp_path: Path) -> None:
    assert 'constraints = "" is not set' in str(find_all_problems(AUTOIF.Settings())[0])
    assert "has no file" in str(find_all_problems(AUTOIF.Settings(constraints=str(tmp_path)))[0])
    (tmp_path / "kept.jsonl").touch()
    assert find_all_problems(AUTOIF.Settings(constraints=str(tmp_path))) == []
    assert keys_of(AUTOIF.Settings(constraints="/nowhere", min_query_chars=9, max_query_chars=8)) == [
        "constraints", "min_query_chars"]
    assert keys_of(AUTOIF.Settings(language="xx", system_share=2, min_score=11, segmenter="spaces")) == [
        "language", "system_share", "segmenter", "min_score"]


TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "first"},
         {"role": "assistant", "content": "a"}, {"role": "user", "content": "second"}]


@pytest.mark.parametrize("record", [
    {"conversation": TURNS}, {"prompt": TURNS}, {"prompt": "first"},
    {"conversations": [{"from": "human", "value": "first"}]}, {"messages": [], "instruction": "first"}])
def test_the_first_turn_of_the_user(record: dict[str, Any]) -> None:
    assert get_first_user_turn(record, "x:1") == "first"


@pytest.mark.parametrize("record", [
    {}, {"messages": [{"role": "assistant", "content": "a"}]}, {"prompt": 3}, {"conversation": [3, None]}])
def test_a_record_without_a_turn_of_the_user_is_refused_with_its_place(record: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="x:1: has no prompt of a user"):
        get_first_user_turn(record, "x:1")
