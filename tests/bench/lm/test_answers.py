"""The answer cache of `eval lm`: complete records count for every later run, and concurrent runs share
chunks."""

import threading
from pathlib import Path

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


def stop_never() -> bool:
    return False


def test_several_share_the_chunks_and_end_with_all_answers(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_sov.bench.lm.answers.WAIT_S", 0.001)
    chunks = [[score] for score in SCORES]
    asked: list[int] = []
    deals = []
    for index in range(3):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(index + 1))
        monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
        answers = AnswerCache(tmp_path)
        deals.append((answers, answers.iter_open_chunks(chunks, stop_never)))
        asked.append(next(deals[-1][1])[0])
    assert asked == [0, 2, 4]

    def work(number: int) -> None:
        answers, deal = deals[number]
        answers.save_answers({SCORES[asked[number]].key: ANSWER})
        for chunk, places in deal:
            asked.extend(chunk for _ in places)
            answers.save_answers({SCORES[chunk].key: ANSWER} if places else {})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(asked) == [0, 1, 2, 3, 4, 5]
    assert set(AnswerCache(tmp_path)) == {score.key for score in SCORES}
    assert not list((tmp_path / "asking").iterdir())


def test_a_chunk_that_another_one_holds_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_sov.bench.lm.answers.WAIT_S", 0.0)
    answers = AnswerCache(tmp_path)
    first = answers.iter_open_chunks([SCORES], stop_never)
    second = AnswerCache(tmp_path).iter_open_chunks([SCORES], stop_never)
    assert next(first) == (0, [0, 1, 2, 3, 4, 5])
    assert next(second) == next(second) == (0, [])
    answers.save_answers({SCORES[2].key: ANSWER})  # the rest was cut off
    first.close()
    assert next(second) == (0, [0, 1, 3, 4, 5])
    assert list(AnswerCache(tmp_path).iter_open_chunks([SCORES], lambda: True)) == []
