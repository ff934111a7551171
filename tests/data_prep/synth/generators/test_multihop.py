"""Questions over several documents: what is kept, and why other questions are not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.settings import problems_of
from tests.typed_words import keys_of

sys.path.append(str(Path(__file__).parent))
from planted_cases import actor, first_reason, made, one_of_each
from scripted import ScriptedAsk, samples_of

from data_prep.synth.generators.multihop import MultihopSettings
from megatron_sov.base.documents import RecordReading
from megatron_sov.base.documents.records import parse_record
from megatron_sov.judge.rewards.answers import Stem

CASES = one_of_each("multihop")
REASONS = {
    "a sound question": "", "a step in the question": "steps not in question",
    "the answer in the question": "answer not in question", "another start": "names the start",
    "a question that stops a hop early": "judge: answered with all documents",
    "one document is enough": "no document is enough", "nobody can answer it": "answered with all documents",
    "solved, and wrongly": "judge: answered with all documents", "another language": "language",
    "no form": "form", "cut off": "complete", "an order that was followed": "names the start"}


@pytest.mark.parametrize("what", CASES)
def test_each_planted_fault_is_seen_for_what_it_is(what: str) -> None:
    assert first_reason(made("multihop"), CASES[what]) in {REASONS[what], *(
        ["answer not in question"] if what == "a step in the question" else [])}


@pytest.mark.parametrize("form", ["prompt", "chat"])
def test_questions_as_prompts_and_chats(form: Any) -> None:
    generator = made("multihop", form=form, with_documents=True)
    item = CASES["a sound question"].item
    sample, = samples_of(generator, item, actor("multihop").reply)
    document = parse_record(dict(sample.record), "x", 1, RecordReading(kind=form))
    assert document.kind == form == generator.kind
    asked = document.messages[0].content
    assert all(fact["document"] in asked for fact in item.fields["facts"])
    if form == "prompt":
        row = {**sample.record, "response": f"<answer>{sample.record['answer']}</answer>"}
        assert Stem().score(row).reward == 1
    else:
        assert "<answer>" not in document.messages[1].content


def test_each_document_is_shown_alone_and_all_of_them_once() -> None:
    ask = ScriptedAsk(actor("multihop").reply)
    item = CASES["a sound question"].item
    sample, = made("multihop").make(item, ask)
    shown = [sum(fact["sentence"] in json.dumps(request, ensure_ascii=False) for fact in item.fields["facts"])
             for request in ask.requests]
    count = len(item.fields["facts"])
    assert shown == [count, count, *[1] * count, 0]
    assert sample.notes == {"num_hops": count, "known_without": False}


def test_items_come_from_what_triples_kept(tmp_path: Path) -> None:
    actor("multihop").arguments(tmp_path)
    items = list(made("multihop").items([tmp_path]))
    assert items == list(made("multihop").items([tmp_path / "kept.jsonl"]))
    assert {item.licence for item in items} == {"CC0-1.0"}
    assert items[0].source in ("songs-0, songs-1", "songs-1, songs-2", "songs-0, songs-1, songs-2")
    assert len(list(made("multihop", max_questions=2).items([tmp_path]))) == 2


def test_problems_of_settings() -> None:
    assert problems_of(MultihopSettings()) == []
    assert keys_of(MultihopSettings(form="x", min_hops=1, max_per_start=0, min_agreement=12,  # type: ignore[arg-type]
                                    temperature=-1)) == [
        "form", "min_hops", "max_per_start", "min_agreement", "temperature"]
    assert keys_of(MultihopSettings(min_hops=5)) == ["min_hops"]
