"""Disagreements of a judged file: counted by direction, with the words that give them away, as a page; and
the alarm, which rings while an exploit spreads and is silent in honest runs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from megatron_sov.judge.rewards.opinions import DisagreementAlarm, read_opinions, telling_strings


def write(path: Path, judged: list[tuple[str, float, float | None]]) -> Path:
    rows = []
    for text, first, second in judged:
        disagrees = None if second is None else abs(first - second) > 0.5
        said = {"first": first, "reward": second, "status": "scored", "reason": "", "disagrees": disagrees}
        rows.append({"response": text, "components": {"second_opinion": said}})
    rows.append({"response": "nobody asked", "components": {}})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


HONEST = [(f"it is {i}", 1.0, 1.0) for i in range(250)]
EXPLOITS = [(f"trust me <b>now</b>, it is {i}", 1.0, 0.0) for i in range(40)]


def test_disagreements_are_counted_by_direction(tmp_path: Path) -> None:
    found = read_opinions(write(tmp_path / "out.jsonl", [
        ("a", 1.0, 1.0), ("b", 1.0, 0.0), ("c", 0.0, 1.0), ("d", 1.0, None)]))
    assert (found.num_opinions, found.disagreeing, found.paid_wrongly) == (3, [2, 3], [2])
    assert found.alarm is None and found.describe_alarm() == ""


def test_an_alarm_tells_line_share_and_words(tmp_path: Path) -> None:
    found = read_opinions(write(tmp_path / "out.jsonl", [*HONEST, *EXPLOITS]))
    assert 250 < found.alarm_line < 280
    assert found.describe_alarm().startswith(f"at line {found.alarm_line}: the first verifier pays 100%")
    first = found.strings()[0]
    assert (first.text, first.share_paid, first.share_other) == ("trust me <b>now</b>, it", 1.0, 0.0)


def test_words_of_all_answers_tell_nothing() -> None:
    assert telling_strings(["the answer", "the sum"], ["the answer", "the sum"]) == []
    assert telling_strings([], ["the answer"]) == []


USUAL = 0.03
"""Share of honest answers that the first verifier pays and the second one would not."""
NUM_OPINIONS = 1000


def use_of(place: float) -> float:
    """Return how many answers use the exploit at a place from 0 to 1 of the run: half of them at 0.55."""
    return 1 / (1 + math.exp(-12 * (place - 0.55)))


def rings_at(seed: int, use) -> float | None:
    """Return at which place of a run the alarm rings."""
    draw, alarm = random.Random(seed), DisagreementAlarm()
    for i in range(NUM_OPINIONS):
        alarm.add(draw.random() < USUAL + (1 - USUAL) * use(i / NUM_OPINIONS))
        if alarm.alarm is not None:
            return i / NUM_OPINIONS
    return None


@pytest.mark.parametrize("seed", range(3))
def test_it_rings_before_half_of_the_answers_use_an_exploit(seed: int) -> None:
    place = rings_at(seed, use_of)
    assert place is not None and 0.02 < use_of(place) < 0.5


@pytest.mark.parametrize("seed", range(3))
def test_it_is_silent_in_an_honest_run(seed: int) -> None:
    assert rings_at(seed, lambda place: 0.0) is None


def test_honest_runs_are_silent_for_as_long_as_it_says() -> None:
    rung = sum(rings_at(seed, lambda place: 0.0) is not None for seed in range(100, 200))
    assert rung <= 1  # 100 x 1,000 opinions


def test_an_exploit_that_is_there_from_the_beginning_rings_too() -> None:
    alarm = DisagreementAlarm()
    for i in range(200):
        alarm.add(i % 4 == 0)
    assert alarm.alarm is not None
    assert (alarm.alarm.since, alarm.alarm.share_since) == (1, 0.25)


def test_an_alarm_tells_from_when_on_and_how_much() -> None:
    alarm = DisagreementAlarm()
    for i in range(400):
        alarm.add(i >= 300 and i % 2 == 0)
    assert alarm.alarm is not None
    assert 295 <= alarm.alarm.since <= 305 and alarm.alarm.opinion < 350
    assert alarm.alarm.share_before == 0.0 and alarm.alarm.share_since == pytest.approx(0.5, abs=0.1)
