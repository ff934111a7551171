"""All checks in reading order, those that were asked for, and a progress bar that ends at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tokenizer.report import command
from tokenizer.report.check import TokenizerCheck
from tokenizer.report.command import CHECKS, NEED_TEXT, check_all
from tokenizer.report.measures import NamedText, Scalars, num_blocks

Toy = Callable[..., Any]
TEXTS = [NamedText(name, name, ["the cat"], True) for name in ("a", "b")]


class Bar:
    """Stands for the progress bar."""

    def __init__(self, total: int, **options: Any) -> None:
        self.total, self.done, self.said = total, 0, list[str]()
        bars.append(self)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, steps: int) -> None:
        self.done += steps

    def set_description_str(self, text: str) -> None:
        self.said.append(text)


bars: list[Bar] = []


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow checks are told of their progress, and do nothing else."""
    def worst(tokenizer: Any, progress: Callable[[int], object]) -> TokenizerCheck:
        for _ in command.worst_inputs():
            progress(1)
        return TokenizerCheck("worst", "", "good", "", {})

    def all_of_unicode(tokenizer: Any, progress: Callable[[int], object], end: int) -> Scalars:
        for _ in range(num_blocks() if end else 0):
            progress(1)
        return Scalars(np.zeros(tokenizer.vocab_size, np.bool_))

    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr(command, "check_worst", worst)
    monkeypatch.setattr(command, "try_scalars", all_of_unicode)
    monkeypatch.setattr(command, "check_scripts",
                        lambda tokenizer: TokenizerCheck("scripts", "", "good", "", {}))
    monkeypatch.setattr(command, "worst_inputs", lambda: {"one letter": "a", "spaces": " "})
    for name in ("streaming", "determinism"):
        monkeypatch.setattr(command, f"check_{name}",
                            lambda tokenizer, texts, name=name: TokenizerCheck(name, "", "good", "", {}))


@pytest.mark.parametrize(("texts", "skip", "left_out"), [
    (TEXTS, (), set()), ([], (), NEED_TEXT), (TEXTS, ("worst",), {"worst"}),
    (TEXTS, ("reach", "scalars", "used"), {"reach", "scalars", "used"}), ([], CHECKS, set(CHECKS))])
def test_checks_come_in_order_and_the_bar_ends_at_its_end(
        texts: list[NamedText], skip: tuple[str, ...], left_out: set[str], toy: Toy) -> None:
    opened = toy("the", special=("<|end|>",))
    found = check_all(opened, texts, skip)
    assert [check.name for check in found] == [name for name in CHECKS if name not in left_out]
    assert bars[-1].done == bars[-1].total
    assert bars[-1].said[2:] == [check.name for check in found]


def test_tokens_of_the_texts_count_as_seen(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, seen = toy("the", " c"), []
    monkeypatch.setattr(command, "check_reach",
                        lambda tokenizer, known: seen.append(known) or TokenizerCheck("reach", "", "good", "",
                                                                                      {}))
    check_all(opened, TEXTS[:1], [name for name in CHECKS if name != "reach"])
    assert np.flatnonzero(seen[0]).tolist() == sorted(set(opened.encode("the cat")))
