"""Decontamination: evaluation items are found in every disguise, by their normalized text."""

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from data_prep.curate.decontamination.step import (
    FIELDS, Decontaminate, DecontaminateSettings, find_hits, list_benchmark_files, locate_stretches,
    read_items)
from megatron_sov.base.documents.item_search import ItemSearch, SearchItem, to_plain_form
from megatron_sov.base.documents.overlap import find_units
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import find_all_problems
from tests.data_prep.curate.decontamination.disguises import DISGUISES, ITEMS, MARKUP_DISGUISES
from tests.data_prep.curate.pipeline.memory_view import MemoryView, docs, run_step
from tests.typed_words import keys_of

# Texts with words of the items, but no run that is long enough.
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
    outcomes = run_step(Decontaminate, DecontaminateSettings(benchmarks=(bench,)),
                        MemoryView.of([planted, clean], tmp_path / "work"))
    reasons = [outcomes[document.id].reason for document in planted]
    assert reasons == ["text of a benchmark"] * len(ITEMS)
    assert not any(outcomes[d.id].reason for d in clean)


def test_a_run_of_ten_words_is_enough_and_nine_are_not(tmp_path: Path, bench: Path) -> None:
    words = ITEMS["english"].split()
    # "Müller's", the word at index 4, counts as two words
    shared = [" ".join(words[start:start + count]) for start, count in ((2, 11), (3, 10), (3, 9), (4, 8))]
    documents = docs(*(f"Yes, {text} no." for text in shared))
    view = MemoryView.of([documents], tmp_path / "w")
    outcomes = run_step(Decontaminate, DecontaminateSettings(benchmarks=(bench,)), view)
    assert [bool(outcomes[d.id].reason) for d in documents] == [True, True, True, False]


def test_items_below_the_minimum_number_of_words_are_ignored(tmp_path: Path) -> None:
    bench = tmp_path / "short.jsonl"
    bench.write_text('{"text": "What is it?"}\n{"text": "What is it, my dear?"}\n')
    documents = docs("What is it? Tell me.", "So what is it my dear friend?")
    view = MemoryView.of([documents], tmp_path / "w")
    outcomes = run_step(Decontaminate, DecontaminateSettings(benchmarks=(bench,)), view)
    assert [bool(outcomes[d.id].reason) for d in documents] == [False, True]
    assert outcomes[documents[1].id].values == {"contamination": "short:line 2"}


def test_all_invalid_settings_are_reported(tmp_path: Path, bench: Path) -> None:
    assert keys_of(DecontaminateSettings(benchmarks=(bench,))) == []
    assert keys_of(DecontaminateSettings(benchmarks=(), fields=(), ngram=0, min_words=0)) == [
        "benchmarks", "fields", "ngram", "min_words"]
    assert keys_of(DecontaminateSettings(benchmarks=(tmp_path / "none",), ngram=3, min_words=4)) == [
        "benchmarks", "min_words"]
    (tmp_path / "empty.jsonl").write_text("")
    (problem,) = find_all_problems(DecontaminateSettings(benchmarks=(bench, tmp_path)))
    assert problem.rule.endswith("empty.jsonl: has no records; each line is a JSON object")


NAMES = ("english", "short")
SEARCH = ItemSearch([SearchItem("bench", name, "text", ITEMS[name]) for name in NAMES], 10, 5)


@pytest.mark.parametrize("disguise", MARKUP_DISGUISES)
def test_an_item_is_found_with_its_offsets(disguise: str) -> None:
    for name in NAMES:
        planted = MARKUP_DISGUISES[disguise](ITEMS[name])
        text = f"Some of it stands before.\n\n{planted}\n\nMore of it behind, &amp; <b>bold</b>."
        hits = [hit for hit in find_hits(text, SEARCH, 0) if hit.item == name]
        assert hits, planted
        start, stop = text.index(planted), text.index(planted) + len(planted)
        assert all(start <= hit.start < hit.stop <= stop for hit in hits)


@pytest.mark.parametrize("text", [
    "if a < b and c > d: return {x: y for x, y in pairs}  # a_b * c",
    r"Let $f\colon A \to B$ with \alpha < \beta and x^{2} + \frac{1}{2} \neq 0; see \cite{a} &c.",
    "AT&T; R&D 100% of it, 50%off; C:\\new\\table\\u12", "<<<>>> &&& {{{ }}} [](x) \\", "",
    "Zażółć gęślą jaźń",
    "Он купил яблоки на рынке и продал их за городом", "\ud800 <b>"])
def test_the_plain_form_of_ordinary_text_has_offsets(text: str) -> None:
    assert find_hits(text, SEARCH, 0) == []
    plain = to_plain_form(text)
    if plain is not None:
        assert len(plain.text) == len(plain.starts) == len(plain.ends)
        assert (plain.starts < plain.ends).all() and (plain.starts >= 0).all()
        assert (plain.ends <= len(text)).all()


@given(st.text(alphabet=st.sampled_from("aB1,. \n\u200bé\u0301한\u1112\u1161\u11abภำ字ﬁİßｶﾞ½"), max_size=30))
def test_a_unit_has_its_offsets_in_the_text(text: str) -> None:
    units = find_units(text)
    stretches = [(i, i + 1) for i in range(len(units.hashes))]
    for (i, _), (start, stop) in zip(stretches, locate_stretches(text, units, stretches), strict=True):
        assert 0 <= start < stop <= len(text)
        assert units.hashes[i] in find_units(text[start:stop]).hashes


def test_fields_may_hold_strings_lists_objects_and_messages(tmp_path: Path) -> None:
    records = [{"id": 3, "question": {"stem": "Why?", "choices": ["a", "b"]}},
               {"prompt": [{"role": "user", "content": "Say it."}], "text": "  "},
               {"task_id": "x/1", "query": "One", "text": "Two"}]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert read_items([tmp_path], FIELDS) == [
        SearchItem("quiz", "3", "question", "Why?\na\nb"), SearchItem("quiz", "line 2", "prompt", "Say it."),
        SearchItem("quiz", "x/1", "query", "One"), SearchItem("quiz", "x/1", "text", "Two")]
    (tmp_path / "quiz.jsonl").write_text(json.dumps(records[0]))
    (item,) = read_items([tmp_path / "quiz.jsonl"], ["question.stem"])
    assert item == SearchItem("quiz", "3", "question.stem", "Why?")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file, and no folder with files of records"):
        list_benchmark_files([tmp_path])
    (tmp_path / "quiz.jsonl").write_text('{"title": "x"}')
    with pytest.raises(UserError, match=r"quiz.jsonl:1: has text in none of the fields question, .*title"):
        read_items([tmp_path], FIELDS)
    (problem,) = DecontaminateSettings(benchmarks=(tmp_path,)).problems()
    # the check of settings, before a run, reports it too
    assert problem.rule.startswith(f"{tmp_path / 'quiz.jsonl'}:1: has text in none of")
