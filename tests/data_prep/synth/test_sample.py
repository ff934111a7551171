"""Samples that no line of JSON can hold are rejected ones, and no errors of the program."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
from scripted import ScriptedAsk

from data_prep.synth.candidates import record_of
from data_prep.synth.generator import Item, Sample, Verdict, writable


def nested(levels: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize("sample", [
    Sample({"text": "\ud800"}), Sample({"\udfff": 1}), Sample({"text": "a"}, (Verdict("a", True, "\ud83d"),)),
    Sample({"score": float("inf")}), Sample({"text": "a"}, notes={"score": float("nan")}),
    Sample({"deep": nested(5000)})], ids=["value", "name", "verdict", "infinite", "notes", "deep"])
def test_what_cannot_be_written_is_rejected(sample: Sample) -> None:
    found = writable(sample)
    assert (found.reason, found.record) == ("form", {})
    assert json.loads(record_of(Item("a"), (found,), ()))["samples"][0]["record"] == {}


def test_what_can_be_written_stays() -> None:
    sample = Sample({"text": "\U0001f600 \x00 \u202e"}, (Verdict("a", True),), notes={"score": 1.5})
    assert writable(sample) is sample


def test_what_a_model_wrote_as_half_a_character_is_asked_about_as_utf_8_can_hold_it() -> None:
    ask = ScriptedAsk(lambda request: "yes")
    ask.chat([{"role": "user", "content": "half \ud800"}])
    assert ask.requests[0]["messages"] == [{"role": "user", "content": "half ?"}]
