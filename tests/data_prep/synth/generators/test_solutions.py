"""Generator `solutions`: accepts solutions that are correct, end with their answer, and differ from each
other."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.responses.trajectories import read_queries
from data_prep.synth.replies import NoUsableReply
from data_prep.synth.samples import GeneratorItem
from megatron_sov.base.documents.accounting import RecordTally
from tests.data_prep.synth.scripted import build_generator, build_queue_model, collect_samples

WAYS = ("Two and three are counted on the fingers of one hand.", "Three, then four, then five: two steps on.",
        "Since 2 + 3 = 3 + 2, it is enough to know what follows three and four.")


def build_item(answer: str = "5", **fields: Any) -> GeneratorItem:
    return GeneratorItem("sum", {"problem": "What is 2 + 3?", "answer": answer, "choices": [], "domain": "",
                                 **fields})


def list_reasons(replies: Any, **settings: Any) -> list[str]:
    """Return why each sample is rejected, or "" for an accepted one."""
    generator = build_generator("solutions", **{"num_draws": 3, "least": 1, "most": 3, **settings})
    return [sample.reason for sample in collect_samples(generator, build_item(), replies)]


def test_a_correct_solution_becomes_a_chat_that_trajectories_read(tmp_path: Path) -> None:
    replies = build_queue_model({"content": f"{WAYS[0]}\n\\boxed{{5}}", "reasoning_content": "Hm."},
                                f"{WAYS[1]}\n\\boxed{{5}}", f"{WAYS[2]}\n\\boxed{{6}}")
    samples = collect_samples(build_generator("solutions", num_draws=3, most=3), build_item(), replies)
    assert [sample.reason for sample in samples] == ["", "", "answer"]
    assert samples[0].record == {"answer": "5", "messages": [
        {"role": "user", "content": "What is 2 + 3?"},
        {"role": "assistant", "reasoning_content": "Hm.", "content": f"{WAYS[0]}\n\\boxed{{5}}"}]}
    assert samples[0].notes == {"answer": "5", "num_draws": 3, "num_right": 2, "pass_rate": 2 / 3}
    file = tmp_path / "kept.jsonl"
    file.write_text("".join(json.dumps(sample.record) + "\n" for sample in samples if not sample.reason))
    ((query, solutions),) = read_queries(file, RecordTally())
    assert query == "What is 2 + 3?" and [s.thinking for s in solutions] == ["Hm.", ""]


@pytest.mark.parametrize(("reply", "reason"), [
    ("So it is \\boxed{5} apples.", "answer"), ("It is 5.", "answer"), ("$$\\boxed{5}.$$", ""),
    ("\\boxed{4}", "answer"), ("First \\boxed{4}, no: \\boxed{5}", "answer"),
    ("First \\boxed{5}, so \\boxed{5}", ""),
    ({"content": "\\boxed{5}", "finish_reason": "length"}, "answer"),
])
def test_a_solution_ends_with_its_one_answer(reply: Any, reason: str) -> None:
    assert list_reasons(build_queue_model(reply), num_draws=1, most=1) == [reason]


def test_an_unusable_draw_counts_as_wrong() -> None:
    good = f"{WAYS[0]}\n\\boxed{{5}}"
    samples = collect_samples(build_generator("solutions", num_draws=8, least=1, most=1), build_item(),
                              lambda request: good if request["seed"] % 4 == 0 else "")
    assert 0 < len(samples) < 8 and {sample.notes["num_draws"] for sample in samples} == {8}
    assert samples[0].notes["pass_rate"] == len(samples) / 8
    with pytest.raises(NoUsableReply):
        collect_samples(build_generator("solutions"), build_item(), lambda request: "")


def test_solutions_that_are_the_same_count_once() -> None:
    first = f"{WAYS[0]}\n\\boxed{{5}}"
    similar = f"Look:\n{first}"
    other = f"{WAYS[1]}\n\\boxed{{5}}"
    assert list_reasons(build_queue_model(first, similar, other), least=2,
                        max_similarity=0.7) == ["", "different", ""]
    assert list_reasons(build_queue_model(first, similar, similar), least=2,
                        max_similarity=0.7) == ["enough", "different", "different"]


def test_multiple_choice_is_prompted_and_judged_by_letters() -> None:
    item = build_item("B", choices=["four", "five"])
    requests: list[Any] = []
    answers = build_queue_model("\\boxed{B}", "\\boxed{A}")

    def record_and_reply(request: Any) -> Any:
        requests.append(request)
        return answers(request)

    generator = build_generator("solutions", num_draws=2, least=1, most=2)
    samples = collect_samples(generator, item, record_and_reply)
    assert "What is 2 + 3?\n\nA. four\nB. five\n\nGive the letter" in requests[0]["messages"][-1]["content"]
    assert [sample.reason for sample in samples] == ["", "answer"]
    assert samples[0].record["messages"][0]["content"] == "What is 2 + 3?\n\nA. four\nB. five"


def test_a_problem_needs_its_answer(tmp_path: Path) -> None:
    from megatron_sov.base.errors import UserError

    file = tmp_path / "problems.jsonl"
    file.write_text('{"problem": "Why?"}\n')
    with pytest.raises(UserError, match=r"problems.jsonl:1: has no answer; add it"):
        list(build_generator("solutions").read_items([file]))
