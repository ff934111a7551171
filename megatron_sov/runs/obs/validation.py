"""Convert RL events to curves (validation) and tables (sampled responses), without torch."""

import json
import math
from collections.abc import Mapping
from typing import Any

from megatron_sov.runs.obs.figures import parse_number

VALIDATION, RESPONSES = "validation", "responses"
"""Event names."""
ROUND_SAMPLES = "round"
"""Field `of` for training samples; validation samples have `validation`."""
RESPONSE_COLUMNS = ("prompt", "response", "reward", "components", "tokens", "ended")
"""Column names for sampled responses."""


def extract_curves(event: Mapping[str, Any]) -> dict[str, float]:
    """Return curve name -> finite value for a validation event."""
    curves = {name: parse_number(event.get(name)) for name in ("reward", "response_tokens", "truncated")}
    curves |= {f"pass_at_{k}": value for k, value in read_pass_at_k(event).items()}
    components = _read_mapping(event, "components")
    curves |= {f"component/{name}": parse_number(value) for name, value in components.items()}
    for domain, figures in _read_mapping(event, "domains").items():
        curves[f"domain/{domain}/reward"] = parse_number(figures.get("reward"))
        curves |= {f"domain/{domain}/pass_at_{k}": value for k, value in read_pass_at_k(figures).items()}
    return {name: value for name, value in curves.items() if math.isfinite(value)}


def read_pass_at_k(figures: Mapping[str, Any]) -> dict[int, float]:
    """Return k -> pass@k for a validation event or a domain."""
    estimates = figures.get("pass_at_k") or []
    return {int(parse_number(estimate.get("k"))): parse_number(estimate.get("value"))
            for estimate in estimates}


def format_validation(figures: Mapping[str, Any]) -> str:
    reward = figures.get("reward")
    shares = read_pass_at_k(figures)
    parts = ["no response has a reward" if reward is None else f"held-out reward {reward:.4g}",
             *(f"pass@{k} {value:.1%}" for k, value in shares.items() if k in (1, max(shares)))]
    count = figures["num_prompts"]
    return (f"{', '.join(parts)} ({figures['num_samples']:,} responses to {count:,} "
            f"prompt{'' if count == 1 else 's'})")


def response_rows(event: Mapping[str, Any]) -> list[list[Any]]:
    """Return table rows with columns `COLUMNS` from an event's sampled responses."""
    return [[str(row.get("prompt") or ""), str(row.get("response") or ""), row.get("reward"),
             json.dumps(row.get("components") or {}, ensure_ascii=False), row.get("tokens"),
             str(row.get("ended") or "")] for row in event.get("rows") or []]


def _read_mapping(event: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = event.get(name)
    return dict(value) if isinstance(value, Mapping) else {}
