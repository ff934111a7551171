"""Answers on disk: what is whole counts, whoever wrote it; chunks are shared by those who ask at once."""

from __future__ import annotations

import threading
from pathlib import Path

from megatron_sov.bench.lm.answers import Answers, AnswerScore, Write, folder_of, readings

SCORES = [AnswerScore((1, 2), (i,)) for i in range(6)]
ANSWER = {"logprob": -1.0, "greedy": False}


def test_answers_outlive_a_kill_and_a_torn_record(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"model": "a"})
    first, second = Answers(folder), Answers(folder)
    first.keep({"k": {"text": "하나\n", "finish_reason": "stop"}})
    assert "k" not in second
    second.reread()
    assert second["k"]["text"] == "하나\n"
    second.keep({"l": {"logprob": -0.1 - 0.2, "greedy": True}, "m": {"logprob": 1.0, "greedy": True}})
    first.close()
    second.close()
    [torn] = [f for f in folder.glob("records-*") if b'"l"' in f.read_bytes()]
    torn.write_bytes(torn.read_bytes()[:-3])
    assert Answers(folder) == {"k": first["k"], "l": second["l"]}
    assert not Answers(folder_of(tmp_path, {"model": "b"}))


def test_the_same_request_has_one_key() -> None:
    assert AnswerScore((1,), (2, 3)).key != AnswerScore((1, 2), (3,)).key
    write = Write((1,), ("x",), 5)
    assert write.key == Write((1,), ("x",), 5).key != Write((1,), ("x",), 6).key
    assert Write((1,), (), 5, 0.5, sample=1).stream != Write((1,), (), 5, 0.5, sample=2).stream
    assert [len(group) for group in readings([*SCORES, AnswerScore((9,) * 5, (1, 2))])] == [1, 6]


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
        answers = Answers(tmp_path)
        deals.append((answers, answers.deal(chunks, stop_never)))
        asked.append(next(deals[-1][1])[0])
    assert asked == [0, 2, 4]

    def work(number: int) -> None:
        answers, deal = deals[number]
        answers.keep({SCORES[asked[number]].key: ANSWER})
        for chunk, places in deal:
            asked.extend(chunk for _ in places)
            answers.keep({SCORES[chunk].key: ANSWER} if places else {})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(asked) == [0, 1, 2, 3, 4, 5]
    assert set(Answers(tmp_path)) == {score.key for score in SCORES}
    assert not list((tmp_path / "asking").iterdir())


def test_a_chunk_that_another_one_holds_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_sov.bench.lm.answers.WAIT_S", 0.0)
    answers = Answers(tmp_path)
    first, second = answers.deal([SCORES], stop_never), Answers(tmp_path).deal([SCORES], stop_never)
    assert next(first) == (0, [0, 1, 2, 3, 4, 5])
    assert next(second) == next(second) == (0, [])
    answers.keep({SCORES[2].key: ANSWER})  # the rest was cut off
    first.close()
    assert next(second) == (0, [0, 1, 3, 4, 5])
    assert list(Answers(tmp_path).deal([SCORES], lambda: True)) == []
