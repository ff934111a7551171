"""Pictures and speech in the report: what a model was shown, what it made of it, what others recognised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_sov.obs.figures import number
from megatron_sov.pages.content import Exhibit, Section, Table
from megatron_sov.pages.embedded import is_picture, is_sound

SHOWN = 8
"""Samples of each pair."""


def media_section(events: list[dict[str, Any]], retrieval: Sequence[dict[str, Any]] = ()) -> Section:
    """Return the section; without events it has no content, and is left out.

    Args:
        events: `media` events; of one pair and step the newest counts.
        retrieval: `media_retrieval` events, likewise.
    """
    found, ranked = _newest(events, "num_rows"), _newest(retrieval, "num_questions")
    exhibits = [_exhibit(e, sample) for e in found.values() for sample in _list(e.get("samples"))[:SHOWN]
                if isinstance(sample, dict)]
    tables = [table(list(of.values())) for table, of in ((_table, found), (_ranks, ranked)) if of]
    return Section("From one modality to another", tables=tables, exhibits=exhibits,
                   text="What was recognised in what the model wrote, drew or said, and samples of it; and "
                        "how often a right candidate is among those that it holds for the most probable.")


def _newest(events: Sequence[dict[str, Any]], count: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(str(e.get("pair")), str(e.get("step"))): e for e in events if number(e.get(count)) > 0}


def _table(events: list[dict[str, Any]]) -> Table:
    rows = []
    for e in events:
        low, high = (*_list(e.get("accuracy_interval")), 0, 0)[:2]
        rows.append([str(e.get("pair")), _step(e),
                     f"{number(e.get('num_rows')):,.0f}",
                     f"{number(e.get('accuracy')):.1%} ({number(low):.1%} to {number(high):.1%})",
                     f"{number(e['chance']):.1%}" if "chance" in e else "–",
                     f"{number(e['wer']):.3f}" if "wer" in e else "–",
                     f"{number(e['cer']):.3f}" if "cer" in e else "–"])
    return Table(["pair", "step", "rows", "right (95 %)", "chance", "words wrong", "characters wrong"], rows)


def _ranks(events: list[dict[str, Any]]) -> Table:
    def recall(e: dict[str, Any], k: int) -> str:
        low, high = (*_list(e.get(f"recall_at_{k}_interval")), 0, 0)[:2]
        return (f"{number(e.get(f'recall_at_{k}')):.1%} ({number(low):.1%} to {number(high):.1%}; "
                f"{number(e.get(f'chance_at_{k}')):.1%})")

    return Table(["retrieval", "step", "questions", "candidates", "right first (95 %; chance)",
                  "among the first 5", "mean rank (chance)"],
                 [[str(e.get("pair")), _step(e), f"{number(e.get('num_questions')):,.0f}",
                   f"{number(e.get('num_candidates')):,.0f}", recall(e, 1), recall(e, 5),
                   f"{number(e.get('mean_rank')):.2f} ({number(e.get('chance_mean_rank')):.2f})"]
                  for e in events])


def _step(event: dict[str, Any]) -> str:
    return "–" if event.get("step") is None else f"{number(event['step']):,.0f}"


def _exhibit(event: dict[str, Any], sample: dict[str, Any]) -> Exhibit:
    parts = [part for part in _list(sample.get("content")) if isinstance(part, dict)]
    asked = [str(part["text"]) for part in parts if part.get("type") == "text" and "text" in part]
    shown, made = [part.get("address") for part in parts], _list(sample.get("addresses"))
    return Exhibit(
        f"{event.get('pair')}, asked for {sample.get('answer')}", " ".join(asked),
        [str(a) for a in shown if is_picture(a)], [str(a) for a in shown if is_sound(a)],
        str(sample.get("text") or ""), [str(a) for a in made if is_picture(a)],
        [str(a) for a in made if is_sound(a)], str(sample.get("recognised") or "nothing"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
