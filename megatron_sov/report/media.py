"""Pictures and speech in the report: what a model was shown, what it made of it, what others recognised."""

from __future__ import annotations

from typing import Any

from megatron_sov.obs.figures import number
from megatron_sov.pages.content import Exhibit, Section, Table
from megatron_sov.pages.embedded import is_picture, is_sound

SHOWN = 8
"""Samples of each pair."""


def media_section(events: list[dict[str, Any]]) -> Section:
    """Return the section; without events it has no content, and is left out.

    Args:
        events: `media` events; of one pair and step the newest counts.
    """
    found = {(str(e.get("pair")), str(e.get("step"))): e for e in events if number(e.get("num_rows")) > 0}
    exhibits = [_exhibit(e, sample) for e in found.values() for sample in _list(e.get("samples"))[:SHOWN]
                if isinstance(sample, dict)]
    return Section("From one modality to another", tables=[_table(list(found.values()))] if found else [],
                   exhibits=exhibits,
                   text="What was recognised in what the model wrote, drew or said, and samples of it.")


def _table(events: list[dict[str, Any]]) -> Table:
    rows = []
    for e in events:
        low, high = (*_list(e.get("accuracy_interval")), 0, 0)[:2]
        rows.append([str(e.get("pair")), "–" if e.get("step") is None else f"{number(e['step']):,.0f}",
                     f"{number(e.get('num_rows')):,.0f}",
                     f"{number(e.get('accuracy')):.1%} ({number(low):.1%} to {number(high):.1%})",
                     f"{number(e['chance']):.1%}" if "chance" in e else "–",
                     f"{number(e['wer']):.3f}" if "wer" in e else "–",
                     f"{number(e['cer']):.3f}" if "cer" in e else "–"])
    return Table(["pair", "step", "rows", "right (95 %)", "chance", "words wrong", "characters wrong"], rows)


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
