"""Disagreements of a judged file: counted by direction, with the words that give them away, as a page."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_sov.rewards.opinions import page_of, read_opinions, telling_strings


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
    assert found.alarm is None and found.told() == ""


def test_an_alarm_tells_line_share_and_words(tmp_path: Path) -> None:
    found = read_opinions(write(tmp_path / "out.jsonl", [*HONEST, *EXPLOITS]))
    assert 250 < found.alarm_line < 280
    assert found.told().startswith(f"at line {found.alarm_line}: the first verifier pays 100%")
    first = found.strings()[0]
    assert (first.text, first.share_paid, first.share_other) == ("trust me <b>now</b>, it", 1.0, 0.0)
    page = page_of(found, "out.jsonl", "0123")
    assert "ALARM" in page and "trust me &lt;b&gt;now" in page and "<b>now" not in page


def test_words_of_all_answers_tell_nothing() -> None:
    assert telling_strings(["the answer", "the sum"], ["the answer", "the sum"]) == []
    assert telling_strings([], ["the answer"]) == []


def test_a_file_without_second_opinions_makes_a_page(tmp_path: Path) -> None:
    assert "no alarm" in page_of(read_opinions(write(tmp_path / "out.jsonl", [])), "out.jsonl", "0123")
