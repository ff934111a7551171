"""Events that say how a policy of reinforcement learning answers: a validation on held-out prompts as curves,
and samples of responses as a table; what trackers and reports show of them.  No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from megatron_sov.runs.obs.figures import number

VALIDATION, RESPONSES = "validation", "responses"
"""Events."""
OF_ROUND = "round"
"""Field `of` of samples that were trained; those of a validation have its event's name."""
COLUMNS = ("prompt", "response", "reward", "components", "tokens", "ended")
"""Of a table of samples."""


def curves_of(event: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a validation that are numbers, by the names of their curves."""
    found = {name: number(event.get(name)) for name in ("reward", "response_tokens", "truncated")}
    found |= {f"pass_at_{k}": value for k, value in pass_at(event).items()}
    found |= {f"component/{name}": number(value) for name, value in _mapping(event, "components").items()}
    for domain, figures in _mapping(event, "domains").items():
        found[f"domain/{domain}/reward"] = number(figures.get("reward"))
        found |= {f"domain/{domain}/pass_at_{k}": value for k, value in pass_at(figures).items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def pass_at(figures: Mapping[str, Any]) -> dict[int, float]:
    """Return k -> pass@k of a validation, or of a domain of it."""
    return {int(number(one.get("k"))): number(one.get("value")) for one in figures.get("pass_at_k") or []}


def told_validation(figures: Mapping[str, Any]) -> str:
    """Return a validation in a few words."""
    reward = figures.get("reward")
    shares = pass_at(figures)
    parts = ["no response has a reward" if reward is None else f"held-out reward {reward:.4g}",
             *(f"pass@{k} {value:.1%}" for k, value in shares.items() if k in (1, max(shares)))]
    count = figures["num_prompts"]
    return (f"{', '.join(parts)} ({figures['num_samples']:,} responses to {count:,} "
            f"prompt{'' if count == 1 else 's'})")


def table_of(event: Mapping[str, Any]) -> list[list[Any]]:
    """Return the rows of a table of samples, by `COLUMNS`."""
    return [[str(row.get("prompt") or ""), str(row.get("response") or ""), row.get("reward"),
             json.dumps(row.get("components") or {}, ensure_ascii=False), row.get("tokens"),
             str(row.get("ended") or "")] for row in event.get("rows") or []]


def _mapping(event: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = event.get(name)
    return dict(found) if isinstance(found, Mapping) else {}
