"""Answers on disk: what is whole counts, whoever wrote it; chunks are shared by those who ask at once."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov.eval.lm.answers import Answers, folder_of
from megatron_sov.eval.lm.local import ASK, DONE, STOPPED, WAIT, Desk
from megatron_sov.eval.lm.requests import Score, Write, distinct, readings

GO_ON: Any = SimpleNamespace(reason=None)
SCORES = [Score((1, 2), (i,)) for i in range(6)]


def test_answers_outlive_a_kill_and_a_torn_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"model": "a"})
    with Answers(folder) as first, Answers(folder) as second:
        first.add({"k": {"text": "하나\n", "finish_reason": "stop"}})
        assert "k" not in second
        second.reread()
        assert second["k"]["text"] == "하나\n"
        second.add({"l": {"logprob": -0.1 - 0.2, "greedy": True}})
    (torn,) = [f for f in folder.glob("*.jsonl") if b'"l"' in f.read_bytes()]
    torn.write_bytes(torn.read_bytes() + b'no json\n{"key": "m", "logprob": 1')
    with Answers(folder) as third:
        assert third["l"]["logprob"] == -0.1 - 0.2
        assert ("k" in third, "m" in third) == (True, False)
    assert not len(Answers(folder_of(tmp_path, {"model": "b"})))


@pytest.mark.parametrize("line", ['["key"]', '{"key": "k"}', '{"key": "k", "logprob": null, "greedy": true}',
                                  '{"key": "k", "logprob": true, "greedy": true}', '{"key": "k", "text": 5}',
                                  '{"key": "k", "logprob": -1.0}', '{"key": ["k"], "text": "a"}',
                                  '{"key": "k", "failed": "for ever"}'])
def test_a_line_that_is_no_answer_is_asked_again(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{line}\n{{"key": "l", "text": "", "finish_reason": null}}\n')
    answers = Answers(tmp_path)
    assert ("k" in answers, "l" in answers) == (False, True)


def test_the_same_request_has_one_key() -> None:
    assert Score((1,), (2, 3)).key != Score((1, 2), (3,)).key
    write = Write((1,), ("x",), 5)
    assert write.key == Write((1,), ("x",), 5).key != Write((1,), ("x",), 6).key
    assert Write((1,), (), 5, 0.5, sample=1).stream != Write((1,), (), 5, 0.5, sample=2).stream
    assert distinct([*SCORES, *SCORES]) == SCORES
    assert [len(group) for group in readings([*SCORES, Score((9,) * 5, (1, 2))])] == [1, 6]


def test_several_share_the_chunks_and_end_with_all_answers(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_sov.eval.lm.local.WAIT_S", 0.001)
    chunks = [[score] for score in SCORES]
    asked: list[int] = []
    lock = threading.Lock()

    def work(desk: Desk) -> None:
        while (step := desk.next())[0] != DONE:
            action, number, places = step
            if action == ASK:
                with lock:
                    asked.extend(number for _ in places)
                desk.answered(number, {chunks[number][0].key: {"logprob": -1.0, "greedy": False}})

    desks = []
    for index in range(3):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(index + 1))
        monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
        desks.append(Desk(chunks, Answers(tmp_path), GO_ON))
    assert [desk.next()[:2] for desk in desks[:1]] == [(ASK, 0)]
    desks[0].answered(0, {SCORES[0].key: {"logprob": -1.0, "greedy": False}})
    asked.append(0)
    threads = [threading.Thread(target=work, args=(desk,)) for desk in desks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(asked) == [0, 1, 2, 3, 4, 5]
    assert all(score.key in Answers(tmp_path) for score in SCORES)
    assert not list(tmp_path.glob("*.held"))


def test_a_chunk_that_another_one_holds_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_sov.eval.lm.local.WAIT_S", 0.0)
    first, second = (Desk([SCORES], Answers(tmp_path), GO_ON) for _ in range(2))
    assert first.next() == (ASK, 0, [0, 1, 2, 3, 4, 5])
    assert second.next()[0] == WAIT
    first.answered(0, {SCORES[2].key: {"logprob": -1.0, "greedy": False}})  # the rest was cut off
    assert second.next() == (ASK, 0, [0, 1, 3, 4, 5])
    stopped: Any = SimpleNamespace(reason="SIGTERM")
    assert Desk([SCORES], Answers(tmp_path), stopped).next()[0] == STOPPED


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch) -> None:
    from megatron_sov.errors import UserError

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with Answers(tmp_path) as answers:
        monkeypatch.setattr("os.write", full)
        with pytest.raises(UserError, match="no space left on the device"):
            answers.add({"k": {"logprob": 0.0, "greedy": True}})
