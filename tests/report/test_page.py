"""The report as a file: complete in itself, hostile text stays text, every section with data is there."""

from __future__ import annotations

import json
import math
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from megatron_sov.cli import main
from megatron_sov.obs.events import EventLog
from megatron_sov.report.model import read_run
from megatron_sov.report.page import render
from megatron_sov.report.sections import duration, key_figures, large, sections

EVERYTHING = ["Training loss", "Held-out loss", "Learning rate and gradient norm", "Expert load", "Speed", "Data consumed",
              "Needle in a haystack", "Samples", "Proof of the conversion", "Starts, stops and restarts", "Settings",
              "Provenance"]


class Document(HTMLParser):
    """The elements and visible text of a page."""

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
    return render([read_run(path) for path in runs])


@pytest.fixture(scope="module")
def document(page: str) -> Document:
    return Document(page)


def test_nothing_is_loaded_from_anywhere(page: str, document: Document) -> None:
    references = [value for _, attributes in document.elements for name, value in attributes.items()
                  if name in ("src", "href", "srcset", "data", "action", "poster", "background")]
    assert references and all(value.startswith("#") for value in references)
    css = "".join(document.text["style"])
    assert "url(" not in css and "@import" not in css
    policy = next(a["content"] for tag, a in document.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy and "script-src 'unsafe" not in policy


def test_hostile_model_output_stays_text(document: Document, hostile: str) -> None:
    assert hostile in document.text["pre"]
    assert not [tag for tag, _ in document.elements if tag in ("img", "iframe", "object", "b")]
    scripts = [a for tag, a in document.elements if tag == "script"]
    assert [a for a in scripts if a != {"type": "application/json"}] == [{}, {}]  # plotly and our own


def test_hostile_names_stay_text_everywhere(tmp_path: Path, hostile: str) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("run_start", recipe=hostile, num_ranks=1, layout={hostile: 1}, machine=hostile, resumed_from=0)
    log.write("phase", step=1, name=hostile + "0", seq_len=8, blend={hostile: 1})
    log.write("phase", step=2, name=hostile + "1", seq_len=8, blend={hostile: 1})
    for step in (1, 2, 3):
        parts = {hostile: 1.0, "b": 2.0}
        log.write("step", step=step, loss=1.0, tokens=8, phase=hostile + str(step // 2), losses_by_source=parts, losses=parts)
    log.write("eval", step=3, heldout={hostile: {"loss": 1.0, "bits_per_byte": 1.0, "tokens": 5}})
    log.write("data_consumed", step=3, tokens={hostile: 1}, plan={hostile: 1})
    log.write("needle", step=3, when=hostile, lengths=[8], depths=[0.5], accuracy=[[1.0]])
    log.write("conversion", target=hostile, checks=[{"name": hostile, "value": hostile, "limit": 1, "passed": False}])
    log.write("stop", step=3, reason=hostile)
    document = Document(render([read_run(tmp_path)]))
    assert not [tag for tag, _ in document.elements if tag in ("img", "b")]
    figures = [json.loads(text) for text in document.text["script"] if text.startswith("{")]
    assert len(figures) >= 6
    # Plotly reads HTML in labels: they must carry entities, not tags.
    assert not any("<img" in json.dumps(figure) for figure in figures)
    assert any("&lt;img" in json.dumps(figure) for figure in figures)


def test_all_sections_stand_in_order_and_in_the_contents(runs: list[Path], document: Document) -> None:
    shown = list(dict.fromkeys(s.title for path in runs for s in sections(read_run(path))))
    assert sorted(shown, key=EVERYTHING.index) == EVERYTHING
    anchors = {a["href"][1:] for tag, a in document.elements if tag == "a"}
    ids = {a["id"] for _, a in document.elements if "id" in a}
    assert anchors <= ids and len(anchors) == 2 + sum(len(sections(read_run(path))) for path in runs)


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("conversion", target="hf", checks=[{"name": "logits", "value": 2e-3, "limit": 1e-3, "passed": False}])
    run = read_run(tmp_path)
    assert [s.title for s in sections(run)] == ["Proof of the conversion"]
    assert key_figures(run) == []
    assert '<span class="bad">FAILED</span>' in render([run])


def test_key_figures(runs: list[Path]) -> None:
    found = {label: (value, detail) for label, value, detail in key_figures(read_run(runs[1]))}
    assert found["Parameters"] == ("2.891 M", "1.12 M active for each token")
    assert found["Tokens trained"] == ("1.638 M", "400 steps")
    assert found["Needle score"] == ("97.0%", "up to 2,048 tokens")
    # The three sources have the same tokens and bytes a token, so all together have the mean loss's bits per byte.
    best = (2.3 + 2.6 + 1.8) / 3 + 5 * math.exp(-400 / 70)
    assert found["Best held-out"] == (f"{best / math.log(2) / 3.4:.4f}", "bits per byte, step 400")


def test_a_diverged_run_is_reported_and_says_so(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(1, 101):
        log.write("step", step=step, loss=2.0 if step < 60 else float("nan"), grad_norm=float("inf"), tokens=step)
    page = render([read_run(tmp_path)])
    assert "41 values are not finite and not drawn (first at step 60)." in page
    assert "Global gradient norm" not in page  # nothing left to draw


def test_three_hundred_thousand_steps_give_a_small_file(tmp_path: Path) -> None:
    with open(tmp_path / "events.jsonl", "w", encoding="utf-8") as f:
        for step in range(1, 300_001):
            f.write(f'{{"event":"step","time_s":{step},"step":{step},"loss":{2 + (step * 7919 % 1000) / 1000},'
                    f'"tokens":{step * 4096},"lr":0.001,'
                    f'"grad_norm":1.5,"losses_by_source":{{"en":{2 + step % 7},"ko":{3 + step % 11}}}}}\n')
    start_s = time.process_time()
    page = render([read_run(tmp_path)])
    assert time.process_time() - start_s < 20  # about 3 s on one core
    assert len(page) - len(get_plotlyjs()) < 300_000  # bytes of everything but the plotting library
    assert "Of 300,000 points at most 2,000 are drawn; the lowest and highest value of every stretch are kept." in page


@pytest.mark.parametrize(("seconds", "text"), [
    (0.25, "0.2 s"), (59.9, "59.9 s"), (75, "1 min 15 s"), (3725, "1 h 2 min"), (90000 * 3, "3 d 3 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(102.65e9, "102.7 B"), (11e12, "11 T"), (1000, "1 K"), (12, "12")])
def test_large_numbers(value: float, text: str) -> None:
    assert large(value) == text


def test_the_command_writes_into_the_last_run(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *map(str, runs)]) == 0
    assert "All stages" in (runs[1] / "report.html").read_text(encoding="utf-8")
    assert str(runs[1] / "report.html") in capsys.readouterr().out
    out = tmp_path / "new" / "one.html"
    assert main(["report", str(runs[0]), "--out", str(out)]) == 0
    assert "All stages" not in out.read_text(encoding="utf-8")
    assert [p.name for p in out.parent.iterdir()] == ["one.html"]


def test_mistakes_end_with_one_sentence(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert main(["report", str(runs[0]), "--out", str(tmp_path)]) == 2
    assert "is a folder; name the file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
