"""Problem records and their reference answers: parsing, and comparison of answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.synth.functions.answers import check_answers, choose_comparison_method, ends_in_box, find_boxes
from data_prep.synth.readers.problems import get_problem_text, read_problems
from megatron_sov.base.errors import UserError


def read(folder: Path, *records: Any, **more: Any) -> Any:
    """Write the records to a file, and return the items that the reader of problems makes of it."""
    file = folder / "in.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(read_problems([file], **more))


def test_fields_are_read_and_equal_lines_count_once(tmp_path: Path) -> None:
    items = read(tmp_path, {"question": " 1 + 1? ", "answer": 2, "domain": "sums", "licence": "MIT"},
                 {"question": "1 + 1?", "answer": 2, "domain": "sums"}, {"id": 7, "prompt": "Why?"})
    assert [item.fields for item in items] == [
        {"problem": "1 + 1?", "answer": "2", "choices": [], "domain": "sums"},
        {"problem": "Why?", "answer": "", "choices": [], "domain": ""}]
    assert items[1].id == "7" and items[0].licence == "MIT" and items[0].source == "in"


def test_only_accepted_samples_of_a_synthesis_folder_are_read(tmp_path: Path) -> None:
    assert len(read(tmp_path, {"prompt": "Why?"})) == 1
    (tmp_path / "kept.jsonl").write_text('{"prompt": "How?"}\n')
    assert [item.fields["problem"] for item in read_problems([tmp_path])] == ["Why?", "How?"]
    (tmp_path / "rejected.jsonl").write_text('{"prompt": "What?"}\n')
    assert [item.fields["problem"] for item in read_problems([tmp_path])] == ["How?"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("none")
    with pytest.raises(UserError, match="holds no file of JSON lines"):
        list(read_problems([tmp_path / "notes"]))


@pytest.mark.parametrize(("record", "text"), [
    ({"problem": "a", "text": "b"}, "a"), ({"text": "b"}, "b"), ({"problem": "  ", "text": "b"}, "b"),
    ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
                   {"role": "assistant", "content": "x"}]}, "u"),
    ({"prompt": [{"role": "user", "content": "u"}]}, "u"), ({"messages": "x"}, "x"),
])
def test_the_problem_is_the_text_of_the_user(record: Any, text: str) -> None:
    assert get_problem_text(record, "a.jsonl:1") == text


@pytest.mark.each(("record", "message"), [
    ({"a": 1}, "has a problem in none of the fields"), ({"problem": "x" * 20_001}, "has 20,001 characters"),
    ({"problem": "a", "answer": ["4"]}, "must be text or a number"),
    ({"problem": "a", "answer": True}, "must be text or a number"),
    ({"problem": "a", "choices": "ab"}, "must be a list of up to 10"),
    ({"problem": "a", "id": "a b"}, "id = 'a b' must be"),
    ({"problem": "a", "id": "../x" * 40}, "must be 1 to"),
])
def test_a_malformed_problem_is_refused_by_line(record: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"in.jsonl:1: .*{message}"):
        read(tmp_path, record)


def test_an_answer_may_be_needed_and_one_id_is_one_problem(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"in.jsonl:2: has no answer; because"):
        read(tmp_path, {"problem": "a", "answer": 0}, {"problem": "b"}, needs_answer="because")
    with pytest.raises(UserError, match=r"in.jsonl:2: has the id 1 of .*in.jsonl:1 and says something else"):
        read(tmp_path, {"id": 1, "problem": "a"}, {"id": 1, "problem": "b"})


@pytest.mark.parametrize(("text", "boxes"), [
    ("a \\boxed{1} b \\boxed{\\frac{1}{2}}.", ["\\frac{1}{2}", "1"]), ("none", []), ("\\boxed{1", []),
    ("\\boxed{1} \\boxed{1}", ["1", "1"]), ("\\boxed{}", [""])])
def test_boxes_are_found_in_reverse_order(text: str, boxes: list[str]) -> None:
    assert find_boxes(text) == boxes


@pytest.mark.parametrize(("text", "ends"), [
    ("\\boxed{1}", True), ("$$\n\\boxed{1}.\n$$", True), ("**\\boxed{1}**", True), ("\\boxed{1} cm", False),
    ("\\boxed{1}\n\n2", False), ("\\boxed{ }", False), ("1", False)])
def test_text_after_the_last_box_is_detected(text: str, ends: bool) -> None:
    assert ends_in_box(text) is ends


@pytest.mark.parametrize(("answer", "method"), [
    ("12", "math"), ("\\frac{\\pi}{4}", "math"), ("x^2 + 1", "math"), ("\\sin x", "math"), ("sin(x)", "math"),
    ("B", "stem"), ("12 cm", "stem"), ("3 m/s", "stem"), ("Paris", "stem"), ("서울특별시", "stem"),
    ("12 \\text{ apples}", "stem")])
def test_mathematical_answers_are_compared_as_mathematics(answer: str, method: str) -> None:
    assert choose_comparison_method(answer) == method


def test_answers_are_compared_by_value_in_a_process_that_may_be_ended() -> None:
    """Computing 10**10**10 does not end, and counts as another answer."""
    answers = ["0.5", "\\frac{2}{4}", "1/2", "2", "10**10**10", "\\begin{", "0.5"]
    assert check_answers(answers, "1/2") == [True, True, True, False, False, False, True]
