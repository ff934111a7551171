"""What the generators' tests share: scripted models and planted cases, one of each kind."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_sov.base.settings import problems_of

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[4] / "benchmarks"))
from scripted import samples_of
from synthesis.cases import Case

from data_prep.synth.generator import GeneratedSample, Generator
from data_prep.synth.known import generator_class


def actor(name: str) -> Any:
    """Return the module of a scripted model."""
    return import_module(f"synthesis.actors.{name}")


def build(name: str, **settings: Any) -> Generator:
    """Return a generator with settings over those of its planted cases."""
    cls = generator_class(name)
    return cls(cls.Settings(**{**actor(name).SETTINGS, **settings}))


def one_of_each(name: str) -> dict[str, Case]:
    """Return the first planted case of each kind, and a good one."""
    found: dict[str, Case] = {}
    for case in actor(name).cases():
        found.setdefault(case.what, case)
    return found


def first_reason(generator: Generator, case: Case) -> str:
    """Return why nothing of a case is kept: the last sample's reason; empty where one is."""
    samples: list[GeneratedSample] = samples_of(generator, case.item, case.replies)
    reasons = [sample.reason for sample in samples]
    return "" if "" in reasons else reasons[-1]


def generator(name: str, **settings: Any) -> Generator:
    """Return a generator with settings that are sound."""
    cls = generator_class(name)
    asked = cls.Settings(**settings)
    assert problems_of(asked) == []
    return cls(asked)


def wrongly_judged(name: str, *left_out: str, **settings: Any) -> list[str]:
    """Return the kinds of an actor's cases, one case of each but those left out, whose samples are kept and
    should not be, or are not and should."""
    found, seen = [], set(left_out)
    asked = build(name, **settings)
    for case in actor(name).cases():
        if case.what in seen:
            continue
        seen.add(case.what)
        is_kept = any(not sample.reason for sample in samples_of(asked, case.item, case.replies))
        if is_kept != case.good:
            found.append(case.what)
    assert len(seen) >= len(left_out) + 5
    return found
