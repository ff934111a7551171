"""The report as a file: complete in itself, hostile text stays text, every section with data is there."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from megatron_sov.obs.events import EventLog
from megatron_sov.report.page import render
from megatron_sov.report.run_data import read_run
from megatron_sov.report.sections import sections

EVERYTHING = ["Training loss", "Meters", "Held-out loss", "Scores", "Forgetting gate",
              "Learning rate and gradient norm",
              "Plan: learning rate, batch size, blends", "Expert load", "Speed", "Data consumed",
              "Warnings, guards and faults", "Needle in a haystack", "Samples", "Proof of the conversion",
              "Where the time went", "Starts, stops and restarts", "Settings", "Provenance"]


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
    policy = next(a["content"]
                  for tag, a in document.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert (policy.startswith("default-src 'none'") and "http" not in policy
            and "script-src 'unsafe" not in policy)


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
        log.write("step", step=step, loss=1.0, tokens=8, phase=hostile + str(step // 2),
                  losses_by_source=parts, losses=parts, meters=parts)
    log.write("eval", step=3, heldout={hostile: {"loss": 1.0, "bits_per_byte": 1.0, "tokens": 5}})
    log.write("data_consumed", step=3, tokens={hostile: 1}, plan={hostile: 1})
    log.write("needle", step=3, when=hostile, by=hostile, score=1.0, cells=[{
        "kind": hostile, "language": hostile, "length_tokens": 8, "depth": 0.5, "distractors": 0,
        "correct": 1, "samples": 1, "interval": [0.2, 1.0]}])
    log.write("conversion", target=hostile,
              checks=[{"name": hostile, "value": hostile, "limit": 1, "passed": False}])
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
    assert anchors <= ids and len(anchors) == 3 + sum(len(sections(read_run(path))) for path in runs)


def test_the_report_tells_of_one_model_and_sets_another_apart(runs: list[Path], toy: Path) -> None:
    page = render([read_run(path) for path in (*runs, toy)], now_s=0)
    head, _, rest = page.partition('id="run-3"')
    assert "<h1>tiny-solar-open: pretrain + extend</h1>" in head
    assert ("A model of 2.891 M parameters, 1.12 M of them active for each token, "
            "trained on 3.277 M tokens") in head
    # in what is read: a line of a chart may come to that place by chance
    assert not re.search(r">[^<]*\b5\.157\b", head) and "439.9 K" not in head
    assert rest.index("Other models") < rest.index("439.9 K") < rest.index("5.157")
    assert "<h2>retrieval <small>tiny-k-exaone</small></h2>" in rest


def test_a_hundred_thousand_steps_give_a_small_file(tmp_path: Path) -> None:
    with open(tmp_path / "events.jsonl", "w", encoding="utf-8") as f:
        for step in range(1, 100_001):
            f.write(
                f'{{"event":"step","time_s":{step},"step":{step},"loss":{2 + (step * 7919 % 1000) / 1000},'
                f'"tokens":{step * 4096},"lr":0.001,'
                f'"grad_norm":1.5,"losses_by_source":{{"en":{2 + step % 7},"ko":{3 + step % 11}}}}}\n')
    start_s = time.process_time()
    page = render([read_run(tmp_path)])
    assert time.process_time() - start_s < 10  # about 1 s on one core
    assert len(page) - len(get_plotlyjs()) < 300_000  # bytes of everything but the plotting library
    assert ("Of 100,000 points at most 2,000 are drawn; the lowest and highest value of every "
            "stretch are kept." in page)
