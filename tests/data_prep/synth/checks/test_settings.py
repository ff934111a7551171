"""Steps files for generated samples: steps for each source of a run, and the texts that they check."""

from pathlib import Path
from typing import Any

import pytest

from data_prep.synth.checks.settings import (
    DEFAULTS, SAMPLES, SOURCES, NoSample, choose_steps_file, extract_texts, find_check_problems, read_steps)

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
    return tmp_path / "steps.yaml"


def test_a_step_passes_over_sources_that_a_run_lacks(file: Path) -> None:
    steps = read_steps(file, {SAMPLES: None})
    assert [(step.kind, step.only.sources) for step in steps.steps] == [
        ("exact_dedup", ()), ("minhash_dedup", (SAMPLES,))]


@pytest.mark.parametrize("default", sorted(DEFAULTS.glob("*.yaml")), ids=lambda file: file.stem)
def test_packaged_steps_are_sound_for_all_runs(default: Path) -> None:
    for names in ((SAMPLES,), SOURCES):
        read_steps(default, dict.fromkeys(names))


def test_a_generator_may_have_steps_of_its_own() -> None:
    assert choose_steps_file(None, "answers", "prompt").stem == "answers"
    assert choose_steps_file(None, "probes", "prompt").stem == "prompt"
    assert choose_steps_file(Path("own.yaml"), "answers", "prompt") == Path("own.yaml")


@pytest.mark.parametrize(("change", "message"), [
    (("exact_dedup", "exact_dedupe"), "steps.yaml:4: exact_dedupe: is no step; did you mean 'exact_dedup'"),
    (("threshold: 0.9", "threshold: 9"), "steps.yaml:5: threshold = 9 must be at most 1"),
    (("[samples, input]", "[sample]"), "steps.yaml:6: sources = 'sample': there is no such source"),
    (("steps:", "step:"), "must be a mapping with the list `steps`, and nothing else"),
    (("steps:", "sources: []\nsteps:"), "and nothing else"), (("steps:", "steps: ["), "is not valid YAML")])
def test_mistakes_in_a_steps_file_are_reported_with_their_line(file: Path, change: tuple[str, str],
                                                               message: str) -> None:
    file.write_text(STEPS.replace(*change))
    problem, = find_check_problems(file)
    assert message in str(problem)


CHAT = {"messages": [
    {"role": "system", "content": "Be short."}, {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "find", "arguments": {"id": "secret"}}}]},
    {"role": "tool", "content": "Busan"},
    {"role": "assistant", "content": "In Busan.", "reasoning_content": "The tool told me."}]}


def test_each_kind_has_its_texts() -> None:
    assert extract_texts("text", {"text": "A tide."}) == {"samples": "A tide."}
    assert extract_texts("chat", CHAT) == {
        "samples": "Where is it?\n\nBusan\n\nThe tool told me.\n\nIn Busan.",
        "answers": "The tool told me.\n\nIn Busan."}
    assert extract_texts("prompt", {"prompt": "1 + 1?", "answer": "2"}) == {"samples": "1 + 1?"}
    assert extract_texts("prompt", {"prompt": CHAT["messages"][:2]}) == {"samples": "Where is it?"}
    assert extract_texts("task", {"question": "Mend it.", "files": {"a": "b"}}) == {"samples": "Mend it."}
    assert extract_texts("task", {"world": {"tables": {}}}) == {}


@pytest.mark.parametrize(("kind", "record", "message"), [
    ("text", {"text": " \n"}, "holds no text"), ("text", {}, "no string field"),
    ("text", {"text": 3}, "no string field"),
    ("chat", {"messages": []}, "non-empty list"), ("chat", {"text": "no chat"}, "is plain text"),
    ("prompt", {}, "prompt"),
    ("chat", {"messages": [{"role": "user", "content": "Alone?"}]}, "assistant")])
def test_records_that_later_commands_refuse_are_rejected(kind: Any, record: dict[str, Any],
                                                         message: str) -> None:
    with pytest.raises(NoSample, match=message):
        extract_texts(kind, record)
