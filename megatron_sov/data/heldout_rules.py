"""Whether artifacts that are read together hold out the same documents."""

from __future__ import annotations

from typing import Any

from megatron_sov.obs.warning import warn
from megatron_sov.runs.launch_environment import is_first


def warn_of_other_splits(contents: dict[str, dict[str, Any]]) -> None:
    """Warn of artifacts with documents of one kind that were not split into training and held-out
    documents by one rule: the same document may be on both sides."""
    for kind in sorted({s["format"] for content in contents.values() for s in content["sources"]}):
        rules = {path: content.get("heldout") for path, content in contents.items()
                 if any(s["format"] == kind for s in content["sources"])}
        if any(rule != next(iter(rules.values())) for rule in rules.values()) and is_first():
            warn(f"--data {', '.join(rules)}: documents were held out by different rules, so one may train "
                 "on what another is judged by; `sov-data mix` joins them, and looks")
