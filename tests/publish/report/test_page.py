"""The report file: self-contained, escaped text, and every section that has data."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_sov.base.pages.page import Chart, Panel
from megatron_sov.publish.report.outcomes import build_verdict_sentence
from megatron_sov.publish.report.page import build_opening, render_report
from megatron_sov.publish.report.run_data import read_run
from megatron_sov.publish.report.sections import build_sections
from megatron_sov.runs.obs.events import EventLog

# The opening panels: samples, held-out quality, verdicts.

def build_panels(*paths: Path) -> dict[str, Panel]:
    """Return the opening panels of a report of these run folders, by title."""
    return {panel.title: panel for panel in build_opening([read_run(path) for path in paths])}


def write_run(run: Path, *events: dict) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    log = EventLog(run / "events.jsonl")
    for event in events:
        log.write(**event)
    log.close()
    return run


def test_samples_show_the_same_prompt_before_and_after(tmp_path: Path) -> None:
    before = write_run(tmp_path / "pretrain",
                       {"event": "sample", "step": 5, "prompt": "only here", "text": "x"},
                       {"event": "sample", "step": 5, "prompt": "Why?", "text": "\n\nin the park\n"})
    after = write_run(tmp_path / "sft", {"event": "sample", "step": 9, "prompt": "Why?", "text": "y" * 700})
    shown, = build_panels(before, after)["What it writes"].comparisons
    assert shown.prompt == "Why?"
    assert shown.texts == [("Before: pretrain, step 5", "in the park"),
                           ("After: sft, step 9", "y" * 600 + "\n… (100 more characters)")]


def test_five_samples_are_open_with_repeated_prompts_first(tmp_path: Path) -> None:
    samples = [{"event": "sample", "step": 5, "prompt": f"p{i}", "text": f"x{i}",
                "target": "t" if i else None} for i in range(9)]
    first = write_run(tmp_path / "a", {**samples[7], "text": "before"}, {**samples[8], "prompt": "q"})
    panel = build_panels(first, write_run(tmp_path / "b", *samples))["What it writes"]
    assert [c.prompt for c in panel.comparisons] == ["p7", "p0", "p1", "p2", "p3"]
    assert [c.prompt for c in panel.more] == ["p4", "p5", "p6", "p8"]
    assert panel.comparisons[0].texts == [
        ("Before: a, step 5", "before"), ("After: b, step 5", "x7"), ("Expected", "t")]
    (alone,) = build_panels(write_run(tmp_path / "c", samples[0]))["What it writes"].comparisons
    assert alone.texts == [("c, step 5", "x0")]
    page = render_report([read_run(first), read_run(tmp_path / "b")])
    # b's samples are all in the opening, so only a has a section "Samples"
    assert "Show 4 more" in page and page.count("<h3>Samples</h3>") == 1


def test_settings_of_another_version_are_passed_over(tmp_path: Path) -> None:
    for config in ('{"model": 3, "data": {"paths": 3}}', '{"model": {"vocab_size": "many"}, "data": []}'):
        write_run(tmp_path)
        (tmp_path / "config.json").write_text(config)
        assert build_panels(tmp_path) == {}


# The opening chart of held-out quality: one line through all stages.

def read_series(chart: Chart) -> dict[str, tuple[list[float], list[float]]]:
    """Return name -> (x, y) of each series of a chart."""
    return {series.name: (list(series.x), list(series.y)) for series in chart.plot.series}


def write_stage(path: Path, num_steps: int, tokens: int, heldout_step: int) -> Path:
    """Write a run whose steps have `tokens` tokens each (0: not recorded), evaluated at `heldout_step`."""
    path.mkdir()
    log = EventLog(path / "events.jsonl")
    for step in range(1, num_steps + 1):
        counted = {"tokens": step * tokens} if tokens else {}
        log.write("step", step=step, loss=float(step), tokens_per_s=9.0, **counted)
    log.write("eval", step=heldout_step, heldout={"en": {"loss": 1.0, "bits_per_byte": 2.0, "tokens": 5}})
    log.close()
    return path


def test_stages_follow_one_another_by_tokens(tmp_path: Path) -> None:
    runs = [read_run(write_stage(tmp_path / "a", 3, 100, 3)), read_run(write_stage(tmp_path / "b", 2, 10, 0))]
    (heldout,) = {panel.title: panel for panel in build_opening(runs)}["Held-out quality"].charts
    # the second point was measured at step 0 of b, after the 300 tokens of a
    assert read_series(heldout) == {"en": ([300, 300], [2, 2])}
    assert heldout.plot.bands == [("a", 0.0, 300.0), ("b", 300.0, 320.0)]


def test_steps_replace_tokens_in_stages_without_tokens(tmp_path: Path) -> None:
    runs = [read_run(write_stage(tmp_path / "a", 3, 100, 3)), read_run(write_stage(tmp_path / "b", 2, 0, 1))]
    (heldout,) = {panel.title: panel for panel in build_opening(runs)}["Held-out quality"].charts
    assert read_series(heldout) == {"en": ([3, 4], [2, 2])}
    assert heldout.plot.x.title == "optimizer steps"


@pytest.mark.parametrize("event", [{"event": "run_start"},
                                   {"event": "step", "step": 1, "loss": float("nan")}])
def test_runs_without_figures_have_no_charts(event: dict, tmp_path: Path) -> None:
    EventLog(tmp_path / "events.jsonl").write(**event)
    assert "Held-out quality" not in build_panels(tmp_path)


SECTION_TITLES = ["Training loss", "Meters", "Held-out loss", "Learning rate and gradient norm", "Speed",
              "Scores", "Needle in a haystack", "Samples", "Warnings and faults"]


class Document(HTMLParser):
    """The elements of a page, with their attributes, and its text by the tag opened last before it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self._open, []).append(data)


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> str:
    """The HTML of a report of both `runs`."""
    return render_report([read_run(path) for path in runs])


@pytest.fixture(scope="module")
def document(page: str) -> Document:
    return Document(page)


def test_the_page_loads_no_external_resource(page: str, document: Document) -> None:
    references = [value for _, attributes in document.elements for name, value in attributes.items()
                  if name in ("src", "href", "srcset", "data", "action", "poster", "background")]
    assert references and all(value.startswith("#") for value in references)
    css = "".join(document.text["style"])
    assert "url(" not in css and "@import" not in css
    policy = next(a["content"]
                  for tag, a in document.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert "script-src 'unsafe" not in policy


def test_a_report_of_many_sections_is_small_enough_for_mail(page: str) -> None:
    assert len(page.encode()) < 200_000


def test_hostile_model_output_stays_text(document: Document, hostile: str) -> None:
    assert hostile in document.text["pre"]
    assert not [tag for tag, _ in document.elements if tag in ("img", "iframe", "object", "b")]
    assert [a for tag, a in document.elements if tag == "script"] == [{}]  # our own


def test_hostile_names_stay_text_everywhere(tmp_path: Path, hostile: str) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("run_start", recipe=hostile, num_ranks=1, layout={hostile: 1}, machine=hostile, resumed_from=0)
    log.write("phase", step=1, name=hostile + "0", seq_len=8, blend={hostile: 1})
    log.write("phase", step=2, name=hostile + "1", seq_len=8, blend={hostile: 1})
    for step in (1, 2, 3):
        parts = {hostile: 1.0, "b": 2.0}
        log.write("step", step=step, loss=1.0, tokens=8, phase=hostile + str(step // 2),
                  losses_by_source=parts, losses=parts, meters=parts)
    log.write("eval", step=3, heldout={hostile: {"loss": 1.0, "bits_per_byte": 1.0, "tokens": 5}})
    log.write("needle", step=3, when=hostile, by=hostile, score=1.0, cells=[{
        "kind": hostile, "language": hostile, "length_tokens": 8, "depth": 0.5, "distractors": 0,
        "correct": 1, "samples": 1, "interval": [0.2, 1.0]}])
    log.write("conversion", target=hostile,
              checks=[{"name": hostile, "value": hostile, "limit": 1, "passed": False}])
    log.write("stop", step=3, reason=hostile)
    document = Document(page := render_report([read_run(tmp_path)]))
    assert not [tag for tag, _ in document.elements if tag in ("img", "b", "iframe")]
    assert [a for tag, a in document.elements if tag == "script"] == [{}] and "<img" not in page
    # in a paragraph, the title of a chart's band (a phase), and a cell of a table
    assert all(hostile in "".join(document.text[tag]) for tag in ("p", "title", "td"))


def test_all_sections_are_ordered_and_in_the_contents(runs: list[Path], document: Document) -> None:
    titles = list(dict.fromkeys(s.title for path in runs for s in build_sections(read_run(path))))
    assert sorted(titles, key=SECTION_TITLES.index) == SECTION_TITLES
    anchors = {a["href"][1:] for tag, a in document.elements if tag == "a"}
    ids = {a["id"] for _, a in document.elements if "id" in a}
    assert anchors <= ids and len(anchors) == 2 + sum(len(build_sections(read_run(path))) for path in runs)


def test_a_run_of_another_model_gets_one_sentence(runs: list[Path], toy: Path) -> None:
    page = render_report([read_run(path) for path in (*runs, toy)], now_s=0)
    assert "<h1>tiny-solar-open: pretrain + extend</h1>" in page
    assert ("A model of 2.89 M parameters, 1.12 M of them active for each token, "
            "trained on 3.28 M tokens") in page
    assert ("Not in this report, because another model was trained: retrieval (tiny-k-exaone); report "
            "such runs alone.") in page
    # 5.157 is the other model's figure; only visible text counts, as a chart's path may contain it by chance
    assert not re.search(r">[^<]*\b5\.157\b", page) and page.count("retrieval") == 1


# The first sentence.

def report_first_sentence(folder: Path, *texts: str, bits: tuple[float, ...] = (), passed: bool | None = None,
                          needles: bool = False) -> str:
    """Write a run with these results and return the first sentence of its report.

    Args:
        folder: The new run folder.
        texts: Samples that the model wrote.
        bits: Held-out bits per byte of successive evaluations.
        passed: Result of the gate; None: the run has no gate.
        needles: Whether the run has a needle score.
    """
    evals = [{"event": "eval", "step": i, "heldout": {"en": {"loss": value * 2, "bits_per_byte": value,
                                                             "tokens": 9}}} for i, value in enumerate(bits)]
    gates = [] if passed is None else [{"event": "gate", "step": 1, "passed": passed, "judged": passed,
                                        "threshold": 0.8, "loss": 1.0, "loss_limit": 2.0, "rows": []}]
    cell = {"kind": "a", "language": "en", "length_tokens": 8, "depth": 0.5, "distractors": 0, "correct": 0,
            "samples": 1, "interval": [0.0, 1.0]}
    needle = [{"event": "needle", "step": 1, "score": 0.0, "cells": [cell]}] if needles else []
    samples = [{"event": "sample", "step": 1, "prompt": "p", "text": text} for text in texts]
    return build_verdict_sentence([read_run(write_run(folder, *evals, *gates, *needle, *samples))])


@pytest.mark.each(("texts", "facts", "message"), [
    (("It reads a file.", "Sy sppppp", "한국의 수도는 서울이다.", "Two words."), {},
     "2 of 4 answers are whole sentences."),
    ((), {"bits": (2.68, 2.45)}, "Held-out text 2.68 → 2.45 bits per byte."),
    ((), {"passed": True}, "1 of 1 checks passed."),
    ((), {"passed": False}, "0 of 1 checks passed (failed: Gate)."),
    ((), {"needles": True}, "No gate set for needles."),
    (("Returns `x` as \"y.\"",), {"bits": (3.0, 2.0), "needles": True},
     "1 of 1 answers are whole sentences; held-out text 3 → 2 bits per byte; no gate set for needles."),
    (("",), {}, "0 of 1 answers are whole sentences."),
    ((), {"bits": (float("nan"), 2.0)}, ""), ((), {}, "")])
def test_the_first_sentence_sums_up(tmp_path: Path, texts: tuple[str, ...], facts: dict,
                                    message: str) -> None:
    assert report_first_sentence(tmp_path, *texts, **facts) == message
