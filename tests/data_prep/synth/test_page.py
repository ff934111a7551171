"""The page of a folder of samples: everything that models wrote is text on it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from made_runs import chat, made_run, sample

from data_prep.cli import main
from data_prep.synth.candidates import read_made, read_run
from data_prep.synth.finishing import MOST_KEPT, MOST_REJECTED, Shown, turns_of
from data_prep.synth.generator import Verdict
from data_prep.synth.page import render

HOSTILE = "<script>alert(1)</script> \x1b[2J & {{ 7 * 7 }}"


@pytest.fixture
def summary(tmp_path: Path) -> dict[str, object]:
    output = made_run(tmp_path / "out", [[sample(chat("Q", HOSTILE)), sample(chat("Q", "A"), HOSTILE)]],
                      kind="chat", model=HOSTILE)
    shown = Shown()
    for made in read_made(output, read_run(output)):
        for one in made.samples:
            shown.take(one, one.failed)
    per = {"requests": 2.0, "input_tokens": 100.0, "output_tokens": 50.0, "cost": 0.5, "seconds": 1.25}
    return {"format": 1, "generator": "facts", "version": 1, "kind": "chat", "model": HOSTILE, "judge": "",
            "templates": {"facts/write": 3}, "settings": {"count": HOSTILE}, "is_complete": False,
            "num_items": 1, "num_unusable_items": 0, "num_samples": 2, "num_kept": 1, "num_rejected": 1,
            "kept": {"kept.jsonl": 1}, "rejected": {HOSTILE: 1}, "licences": {"": 1}, "sources": {"notes": 1},
            "steps": [], "per_kept": per, "agreement": [], "min_kappa": None, "gate_passed": None,
            "costs": {"num_requests": 2, "num_answered": 1, "outcomes": {"200": 1, "429": 1},
                      "input_tokens": 100, "output_tokens": 50, "cost": 0.5, "seconds": 1.25},
            "shown": shown.to_list()}


def test_what_models_wrote_is_text_on_the_page(summary: dict[str, object]) -> None:
    html = render(summary, now_s=0)
    assert "<script>alert" not in html and "\x1b" not in html and "{{ 7 * 7 }}" in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4, "model, reason, sample, settings"
    for told in ("1 of 2 samples kept", "Items are left", "not stated (1)", "seconds of requests", "1.25"):
        assert told in html


def test_the_report_command_knows_the_folder(summary: dict[str, object], tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html")]) == 2
    assert "run `sov-data synth` to its end first" in capsys.readouterr().err
    (tmp_path / "out/summary.json").write_text(json.dumps(summary))
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html")]) == 0
    assert "facts" in (tmp_path / "page.html").read_text()
    (tmp_path / "out/summary.json").write_text('{"format": 2}')
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html")]) == 2


def test_a_few_of_each_reason_are_shown_whatever_the_order(tmp_path: Path) -> None:
    output = made_run(tmp_path / "out", [[sample({"text": f"text {i}"})] for i in range(26)])
    made = [one for item in read_made(output, read_run(output)) for one in item.samples]
    ways = []
    for order in (made, made[::-1]):
        shown = Shown()
        for number, one in sorted(enumerate(made), key=lambda pair: order.index(pair[1])):
            shown.take(one, Verdict("odd", False, "x") if number % 2 else None)
        ways.append(shown.to_list())
    assert ways[0] == ways[1] and [bool(one["reason"]) for one in ways[0]] == [False] * MOST_KEPT + [
        True] * MOST_REJECTED


def test_a_conversation_with_tools_is_told_turn_by_turn(tmp_path: Path) -> None:
    record = {"messages": [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "", "reasoning_content": "I ask.", "tool_calls": [
            {"function": {"name": "find", "arguments": {"id": 3}}}]},
        {"role": "tool", "name": "find", "content": "Busan"}, {"role": "assistant", "content": "In Busan."}]}
    output = made_run(tmp_path / "out", [[sample(record), sample({"question": "Mend."}, kind="task"),
                                          sample({"no": "chat"})]], kind="chat")
    made, = read_made(output, read_run(output))
    assert turns_of(made.samples[0]) == [
        ("user", "Where?"), ("model, thinking", "I ask."), ("model calls find", '{\n "id": 3\n}'),
        ("tool find", "Busan"), ("model", "In Busan.")]
    assert [turns_of(one)[0][0] for one in made.samples[1:]] == ["task", "record"]
