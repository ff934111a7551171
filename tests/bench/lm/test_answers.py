"""The answer cache of `eval lm`: complete records count for every later run, and the jobs of an array
share chunks."""

from pathlib import Path

import pytest

from megatron_sov.bench.lm.answers import (
    AnswerCache, GenerationRequest, LikelihoodRequest, get_answer_folder, group_by_input)

SCORES = [LikelihoodRequest((1, 2), (i,)) for i in range(6)]
ANSWER = {"logprob": -1.0, "greedy": False}


def test_answers_outlive_a_kill_and_a_torn_record(tmp_path: Path) -> None:
    folder = get_answer_folder(tmp_path, {"model": "a"})
    first, second = AnswerCache(folder), AnswerCache(folder)
    first.save_answers({"k": {"text": "하나\n", "finish_reason": "stop"}})
    assert "k" not in second
    second.load_new_answers()
    assert second["k"]["text"] == "하나\n"
    second.save_answers({"l": {"logprob": -0.1 - 0.2, "greedy": True}, "m": {"logprob": 1.0, "greedy": True}})
    first.close()
    second.close()
    [torn] = [f for f in folder.glob("records-*") if b'"l"' in f.read_bytes()]
    torn.write_bytes(torn.read_bytes()[:-3])
    assert AnswerCache(folder) == {"k": first["k"], "l": second["l"]}
    assert not AnswerCache(get_answer_folder(tmp_path, {"model": "b"}))


def test_the_same_request_has_one_key() -> None:
    assert LikelihoodRequest((1,), (2, 3)).key != LikelihoodRequest((1, 2), (3,)).key
    write = GenerationRequest((1,), ("x",), 5)
    assert write.key == GenerationRequest((1,), ("x",), 5).key != GenerationRequest((1,), ("x",), 6).key
    samples = [GenerationRequest((1,), (), 5, 0.5, sample=sample) for sample in (1, 2)]
    assert samples[0].stream != samples[1].stream
    assert [len(group) for group in group_by_input([*SCORES, LikelihoodRequest((9,) * 5, (1, 2))])] == [1, 6]


@pytest.mark.each(("job", "order"), [
    ("0", [0, 1, 5, 4, 3, 2]), ("1", [2, 3, 1, 0, 5, 4]), ("2", [4, 5, 3, 2, 1, 0])])
def test_array_jobs_begin_with_their_share_and_meet_from_its_end(
        job: str, order: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", job)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    chunks = AnswerCache(tmp_path / job).iter_open_chunks([[score] for score in SCORES])
    assert [chunk for chunk, _ in chunks] == order


def test_the_first_answer_of_two_jobs_counts(tmp_path: Path) -> None:
    first, second = AnswerCache(tmp_path), AnswerCache(tmp_path)
    chunks = first.iter_open_chunks([SCORES[:3], SCORES[3:]])
    assert next(chunks) == (0, [0, 1, 2])
    second.save_answers({SCORES[0].key: ANSWER, SCORES[4].key: ANSWER})
    first.save_answers({score.key: ANSWER | {"logprob": -1.1} for score in SCORES[:3]})
    assert next(chunks) == (1, [0, 2])
    cache = AnswerCache(tmp_path)
    assert [cache[score.key]["logprob"] for score in SCORES[:3]] == [-1.0, -1.1, -1.1]
    assert cache == first
