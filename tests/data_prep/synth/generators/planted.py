"""Planted cases of an actor, one of each sort, and what becomes of them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[4] / "benchmarks"))
from scripted import samples_of

from data_prep.synth.known import generator_class


def generator(name: str, **settings: Any) -> Any:
    """Return a generator with settings."""
    kind = generator_class(name)
    made = kind.Settings(**settings)
    assert made.problems() == []
    return kind(made)


def wrongly_judged(name: str, *left_out: str, **settings: Any) -> list[str]:
    """Return the sorts of an actor's cases, one case of each but those left out, whose samples are kept and
    should not be, or are not and should."""
    actor = importlib.import_module(f"synthesis.actors.{name}")
    found, seen = [], set(left_out)
    made = generator(name, **{**actor.SETTINGS, **settings})
    for case in actor.cases():
        if case.what in seen:
            continue
        seen.add(case.what)
        is_kept = any(not sample.reason for sample in samples_of(made, case.item, case.replies))
        if is_kept != case.good:
            found.append(case.what)
    assert len(seen) >= len(left_out) + 5
    return found
