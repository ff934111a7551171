"""Media in the report: addresses that hold their content, and text that stays text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_sov.base.pages.page import Chapter, PageSection, render
from megatron_sov.publish.report.judgements import SHOWN
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.sections import SECTIONS

PICTURE, SOUND = "data:image/png;base64,AAAA", "data:audio/wav;base64,BBBB"


def media_section(media: Sequence[dict[str, Any]], retrieval: Sequence[dict[str, Any]] = ()) -> PageSection:
    return SECTIONS["From one modality to another"].of(
        Run("run", {}, events={"media": list(media), "media_retrieval": list(retrieval)}))


def event(**changed: Any) -> dict[str, Any]:
    sample = {"content": [{"type": "audio", "address": SOUND}, {"type": "text", "text": "<b>Draw</b> it."}],
              "answer": "seven", "recognised": "seven", "text": "", "addresses": [PICTURE]}
    return {"event": "media", "pair": "audio-image", "step": 40, "num_rows": 3, "accuracy": 0.5,
            "accuracy_interval": [0.2, 0.8], "chance": 0.1, "wer": 0.5, "cer": 0.25, "samples": [sample],
            **changed}


def page(*events: dict[str, Any]) -> str:
    return render("k", "t", "", [Chapter("run", "", [], [media_section(events)])])


def test_a_sample_is_seen_and_heard_in_the_page() -> None:
    text = page(event())
    assert f'<img src="{PICTURE}"' in text and f'<audio controls preload="none" src="{SOUND}">' in text
    assert "50 % (20 % to 80 %)" in text and "media-src data:" in text
    assert "&lt;b&gt;Draw&lt;/b&gt; it." in text and "<b>Draw" not in text


def test_hostile_addresses_and_fields_are_not_shown() -> None:
    bad = {"content": [{"address": "http://example.com/x.png"}, 3],
           "addresses": ["javascript:alert(1)", None], "answer": "<script>evil()", "text": None}
    page(event(step="nan", num_rows=float("inf")), event(step=[1]))
    text = page(event(samples=[bad, "no sample"], accuracy_interval=None, accuracy="high"))
    assert "example.com" not in text and "javascript:alert" not in text and "<script>evil" not in text


def test_the_newest_of_a_pair_and_step_counts_and_samples_are_bounded() -> None:
    many = event(samples=event()["samples"] * 50)
    section = media_section([event(accuracy=0.1), many, event(step=80), {"event": "media"}])
    assert [row[:2] for row in section.tables[0].rows] == [["audio-image", "40"], ["audio-image", "80"]]
    assert len(section.exhibits) == SHOWN + 1
    assert media_section([]).tables == [] == media_section([]).exhibits


def test_ranks_stand_in_a_table_of_their_own() -> None:
    told = {"event": "media_retrieval", "pair": "text-image", "step": 40, "num_questions": 12,
            "num_candidates": 9.5, "recall_at_1": 0.25, "recall_at_1_interval": [0.1, 0.5],
            "chance_at_1": 0.1, "recall_at_5": 1.0, "mean_rank": 2.5, "mean_rank_interval": [1, "x"],
            "chance_mean_rank": 5.0}
    section = media_section([], [{**told, "mean_rank": 9.0}, told, {"pair": "<b>", "num_questions": "many"}])
    ((pair, step, questions, _, first, fifth, rank),) = section.tables[0].rows
    assert (pair, step, questions, rank) == ("text-image", "40", "12", "2.50 (5.00)")
    assert first == "25 % (10 % to 50 %; 10 %)" and fifth.startswith("100 %")
