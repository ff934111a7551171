"""`sov-data trajectories`: choosing solutions, formats and wrong input."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from data_prep.responses.trajectories import (
    Solution, TrajectorySettings, choose_diverse, format_document, read_queries)
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.documents.accounting import RecordTally
from tests.data_prep.responses.test_groups import write

SAME = "Let a be two m plus one and b be two n plus one"
QUERY = {"query": "Is odd plus odd even?",
         "solutions": [SAME, SAME + "!", {"thinking": "3 + 5 = 8", "answer": "Yes, it is."}]}


def test_query_with_solutions_becomes_a_document(tmp_path: Path, capsys) -> None:
    file = write(tmp_path / "in.jsonl", QUERY, {"query": "One?", "solutions": ["Only this one."]})
    assert main(["trajectories", "--input", str(file), "--output", str(tmp_path / "out")]) == 0
    (line,) = (tmp_path / "out/trajectories.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "id": 1, "text": f"Is odd plus odd even?\n\nSolution 1\n{SAME}\n\nSolution 2\n"
                         "<think>\n3 + 5 = 8\n</think>\n\nYes, it is."}
    content = read_manifest(tmp_path / "out", "corpus").content["trajectories"]
    assert content == {"num_documents": 1, "num_solutions": 2, "num_left_out": 1}
    assert "2 queries read: 1 written, 1 set aside (1 too few different solutions)" in capsys.readouterr().out


def test_choose_diverse_takes_farthest_solutions() -> None:
    """Similarity counts shared word triples: the second solution shares two of four distinct triples with the
    first, the third none, the fourth all."""
    texts = ["a b c d e", "a b c d x", "p q r s", "a b c d e"]
    solutions = [Solution(text) for text in texts]
    assert [s.answer for s in choose_diverse(solutions, 2, 0.8)] == ["a b c d e", "p q r s"]
    assert [s.answer for s in choose_diverse(solutions, 5, 0.8)] == ["a b c d e", "p q r s", "a b c d x"]
    assert [s.answer for s in choose_diverse(solutions, 5, 0.4)] == ["a b c d e", "p q r s"]
    assert choose_diverse([], 5, 0.8) == []


@pytest.mark.each(("think", "solution"), [
    ("tags", "<think>\nhm\n</think>\n\nyes"), ("plain", "hm\n\nyes"), ("drop", "yes")])
def test_thoughts_have_three_formats(think: Any, solution: str) -> None:
    settings = TrajectorySettings(think=think, heading="풀이 {}:")
    document = format_document(" why? ", [Solution("yes", "hm"), Solution("no")], settings)
    assert document == f"why?\n\n풀이 1:\n{solution}\n\n풀이 2:\nno"


@pytest.mark.each(("record", "arguments", "message"), [
    ({"query": "a", "solutions": "b"}, [], "in.jsonl:1: needs a string 'query' and a list 'solutions'"),
    ({"query": "a", "solutions": ["b", {"thinking": "c"}]}, [],
     "solutions[1] is {\"thinking\": \"c\"}, must be a string"),
    ("{", [], "in.jsonl:1: is not valid JSON"),
    ({"query": "a", "solutions": ["b", "b"]}, [], "none of 1 queries has 2 different solutions"),
    ({"messages": "x"}, [], "in.jsonl:1: 'messages' must be"),
    ({"messages": [{"role": "user", "content": "a"}]}, [],
     "in.jsonl:1: has turns of user; a chat that is a"),
    (QUERY, ["--least", "3", "--most", "2"], "--least 3: must be at most --most = 2"),
    (QUERY, ["--heading", "Solution"], "must hold {} once"),
    (QUERY, ["--max-similarity", "2"], "--max-similarity 2: must be at most 1"),
])
def test_invalid_queries_are_named_and_write_no_output(record: Any, arguments: list[str], message: str,
                                                       tmp_path: Path, capsys) -> None:
    file = write(tmp_path / "in.jsonl", record)
    assert main(["trajectories", "--input", str(file), "--output", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def build_chat(question: str, answer: str, **thought: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer, **thought}]}


def test_successive_chats_of_a_question_are_joined(tmp_path: Path) -> None:
    file = write(tmp_path / "kept.jsonl", build_chat("One and one?", "Two.", reasoning_content="Fingers."),
                 build_chat("One and one?", "It is two."), build_chat("Why?", "So."), QUERY,
                 build_chat("One and one?", "2"))
    queries = list(read_queries(file, RecordTally()))
    assert [query for query, _ in queries] == ["One and one?", "Why?", QUERY["query"], "One and one?"]
    assert queries[0][1] == [Solution("Two.", "Fingers."), Solution("It is two.")]
    assert [len(solutions) for _, solutions in queries] == [2, 1, 3, 1]
