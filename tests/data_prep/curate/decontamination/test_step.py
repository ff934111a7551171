"""Items of benchmarks are found in every disguise, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.curate.decontamination.step import Decontaminate, DecontaminateSettings
from megatron_sov.base.settings import find_all_problems
from tests.data_prep.curate.decontamination.disguises import DISGUISES, ITEMS
from tests.data_prep.curate.pipeline.memory_view import MemoryView, docs, outcomes
from tests.typed_words import keys_of

CLEAN = ("The refinery was closed in 1998, and nobody in the office knew how many barrels it had filled.",
         "철수는 사과를 좋아하지 않았지만 영희에게는 그런 말을 하지 않았다. 서울은 대한민국의 수도이다.",
         "สมชายชอบกินส้มมากกว่าแอปเปิลแต่เขาไม่เคยปลูกต้นส้มเลย", "", "12500")


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    file = tmp_path / "quiz.jsonl"
    file.write_text("\n".join(json.dumps({"id": name, "question": text}) for name, text in ITEMS.items()))
    return file


@pytest.mark.parametrize("disguise", DISGUISES)
def test_every_item_is_found_in_each_disguise(tmp_path: Path, bench: Path, disguise: str) -> None:
    planted = docs(*(f"Some text.\n\n{DISGUISES[disguise](text)}\n\nMore of it." for text in ITEMS.values()))
    clean = docs(*CLEAN, shard=1)
    found = outcomes(Decontaminate, DecontaminateSettings(benchmarks=(bench,)),
                     MemoryView.of([planted, clean], tmp_path / "work", batch=9))
    assert {ITEM: found[d.id].reason for ITEM, d in zip(ITEMS, planted, strict=True)} == dict.fromkeys(
        ITEMS, "text of a benchmark")
    assert not any(found[d.id].reason for d in clean)


def test_a_run_of_ten_words_is_enough_and_nine_are_not(tmp_path: Path, bench: Path) -> None:
    words = ITEMS["english"].split()
    shared = [" ".join(words[start:start + count]) for start, count in ((2, 11), (3, 10), (3, 9), (4, 8))]
    documents = docs(*(f"Yes, {text} no." for text in shared))
    view = MemoryView.of([documents], tmp_path / "w")
    found = outcomes(Decontaminate, DecontaminateSettings(benchmarks=(bench,)), view)
    # "Müller's" is two words
    assert [bool(found[d.id].reason) for d in documents] == [True, True, True, False]


def test_items_that_say_too_little_are_not_looked_for(tmp_path: Path) -> None:
    bench = tmp_path / "short.jsonl"
    bench.write_text('{"text": "What is it?"}\n{"text": "What is it, my dear?"}\n')
    documents = docs("What is it? Tell me.", "So what is it my dear friend?")
    view = MemoryView.of([documents], tmp_path / "w")
    found = outcomes(Decontaminate, DecontaminateSettings(benchmarks=(bench,)), view)
    assert [bool(found[d.id].reason) for d in documents] == [False, True]
    assert found[documents[1].id].values == {"contamination": "short:line 2"}


def test_settings_that_cannot_be_are_all_told(tmp_path: Path, bench: Path) -> None:
    assert keys_of(DecontaminateSettings(benchmarks=(bench,))) == []
    assert keys_of(DecontaminateSettings(benchmarks=(), fields=(), ngram=0, min_words=0)) == [
        "benchmarks", "fields", "ngram", "min_words"]
    assert keys_of(DecontaminateSettings(benchmarks=(tmp_path / "none",), ngram=3, min_words=4)) == [
        "benchmarks", "min_words"]
    (tmp_path / "empty.jsonl").write_text("")
    (told,) = find_all_problems(DecontaminateSettings(benchmarks=(bench, tmp_path)))
    assert told.rule.endswith("empty.jsonl: has no records; each line is a JSON object")
