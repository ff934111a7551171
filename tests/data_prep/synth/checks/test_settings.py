"""Steps of a file become a pipeline over the sources that a run has; what of a record is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_prep.synth.checks.settings import (
    ANSWERS, DEFAULTS, SAMPLES, SOURCES, CheckSettings, NoSample, texts_of)
from data_prep.synth.options import CheckOptions
from tests.typed_words import keys_of, typed

STEPS = """steps:
  - language: {min_score: 0.2}
    only: {sources: [answers]}
  - exact_dedup
  - minhash_dedup: {threshold: 0.9}
    only: {sources: [samples, input]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "steps.yaml").write_text(STEPS)
    (tmp_path / "bench.jsonl").write_text('{"question": "Who?"}\n')
    return tmp_path / "steps.yaml"


def test_a_step_passes_over_sources_that_a_run_lacks(file: Path) -> None:
    found = CheckSettings(file).pipeline(file, {SAMPLES: None})
    assert [(step.kind, step.only.sources) for step in found.steps] == [
        ("exact_dedup", ()), ("minhash_dedup", (SAMPLES,))]


def test_the_command_line_adds_languages_and_benchmarks(file: Path) -> None:
    asked = CheckSettings(file, (file.parent / "bench.jsonl",), ("ko", "en"))
    found = asked.pipeline(file, {SAMPLES: None, ANSWERS: None})
    assert [step.kind for step in found.steps][2:] == ["minhash_dedup", "decontaminate"]
    assert found.steps[0].written == {"min_score": 0.2, "keep": ["ko", "en"]}
    assert found.steps[3].only.sources == (SAMPLES,)
    bare = CheckSettings(languages=("th",)).pipeline(DEFAULTS / "task.yaml", {SAMPLES: None})
    assert bare.steps[-1].kind == "language" and bare.steps[-1].written["keep"] == ["th"]


@pytest.mark.parametrize("default", sorted(DEFAULTS.glob("*.yaml")), ids=lambda file: file.stem)
def test_packaged_steps_are_sound_for_all_runs(default: Path) -> None:
    for names in ((SAMPLES,), SOURCES):
        CheckSettings().pipeline(default, dict.fromkeys(names))


def test_a_generator_may_have_steps_of_its_own() -> None:
    assert CheckSettings().file("triples", "text").stem == "triples"
    assert CheckSettings().file("multihop", "prompt").stem == "prompt"
    assert CheckSettings(Path("own.yaml")).file("triples", "text") == Path("own.yaml")
    assert CheckSettings(Path("own.yaml")).file("", "prompt").stem == "prompt", "records of another kind"


@pytest.mark.parametrize(("change", "said"), [
    (("exact_dedup", "exact_dedupe"), "steps.yaml:4: exact_dedupe: is no step; did you mean 'exact_dedup'"),
    (("threshold: 0.9", "threshold: 9"), "steps.yaml:5: threshold = 9 must be at most 1"),
    (("[samples, input]", "[sample]"), "steps.yaml:6: sources = 'sample': there is no such source"),
    (("steps:", "step:"), "must be a mapping with the list `steps`, and nothing else"),
    (("steps:", "sources: []\nsteps:"), "and nothing else"), (("steps:", "steps: ["), "is no YAML")])
def test_mistakes_in_a_file_are_told_by_line(file: Path, change: tuple[str, str], said: str) -> None:
    file.write_text(STEPS.replace(*change))
    problem, = CheckSettings(file).problems()
    assert said in str(problem)


def test_mistakes_on_the_command_line_are_told_together(file: Path) -> None:
    assert keys_of(CheckSettings()) == keys_of(CheckSettings(file)) == []
    assert keys_of(CheckSettings(languages=("ko", "kr"))) == ["languages.1"]
    nowhere = file.parent / "none"
    assert keys_of(CheckSettings(nowhere, (nowhere,))) == ["--benchmarks", "--checks"]
    file.write_text(STEPS.replace("min_score: 0.2", "keep: [ko]"))
    problem, = CheckSettings(file, languages=("en",)).problems()
    assert "steps.yaml:2 says `keep` itself" in str(problem)


def test_options_are_settings() -> None:
    assert CheckSettings.of(typed(CheckOptions, [])) == CheckSettings()
    told = typed(CheckOptions, ["--checks", "a.yaml", "--benchmarks", "b", "c", "--languages", "ko",
                                "--languages", "th"])
    assert CheckSettings.of(told) == CheckSettings(Path("a.yaml"), (Path("b"), Path("c")), ("ko", "th"))


TOLD = {"messages": [
    {"role": "system", "content": "Be short."}, {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "find", "arguments": {"id": "secret"}}}]},
    {"role": "tool", "content": "Busan"},
    {"role": "assistant", "content": "In Busan.", "reasoning_content": "The tool told me."}]}


def test_each_kind_has_its_texts() -> None:
    assert texts_of("text", {"text": "A tide."}) == {"samples": "A tide."}
    assert texts_of("chat", TOLD) == {
        "samples": "Where is it?\n\nBusan\n\nThe tool told me.\n\nIn Busan.", "context": "Be short.",
        "answers": "The tool told me.\n\nIn Busan."}
    assert texts_of("prompt", {"prompt": "1 + 1?", "answer": "2"}) == {"samples": "1 + 1?"}
    assert texts_of("prompt", {"prompt": TOLD["messages"][:2]}) == {
        "samples": "Where is it?", "context": "Be short."}
    assert texts_of("prompt", {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}) == {
        "samples": "1 + 1?\n\n2"}
    assert texts_of("task", {"question": "Mend it.", "files": {"a": "b"}}) == {"samples": "Mend it."}
    assert texts_of("task", {"world": {"tables": {}}}) == {}


@pytest.mark.parametrize(("kind", "record", "said"), [
    ("text", {"text": " \n"}, "holds no text"), ("text", {}, "no string field"),
    ("text", {"text": 3}, "no string field"),
    ("chat", {"messages": []}, "non-empty list"), ("chat", {"text": "no chat"}, "is plain text"),
    ("prompt", {}, "prompt"),
    ("chat", {"messages": [{"role": "user", "content": "Alone?"}]}, "assistant"),
    ("text", {"text": "\udc80"}, "surrogate"), ("task", {"question": "\udc80"}, "surrogate")])
def test_what_no_later_command_takes_is_no_sample(kind: Any, record: dict[str, Any], said: str) -> None:
    with pytest.raises(NoSample, match=said):
        texts_of(kind, record)


def test_text_longer_than_the_limit_is_no_sample() -> None:
    with pytest.raises(NoSample, match="at most"):
        texts_of("text", {"text": "x" * (33 << 20)})
