"""All checks of one tokenizer, in reading order."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection

import numpy as np
from tqdm import tqdm

from tokenizer.formats.loaders import Opened
from tokenizer.report.check import Check
from tokenizer.report.cutting import check_digits, check_whitespace
from tokenizer.report.inventory import check_inventory, check_superwords
from tokenizer.report.measures import check_texts, measure
from tokenizer.report.neutral import check_neutral
from tokenizer.report.reach import check_reach, check_used
from tokenizer.report.scalars import END, check_scalars, num_blocks, try_scalars
from tokenizer.report.scripts import check_scripts
from tokenizer.report.streaming import check_determinism, check_streaming
from tokenizer.report.texts import NamedText
from tokenizer.report.worst import check_worst, worst_inputs

BLOCKS_PER_STEP = 16
"""Blocks of Unicode that take about as long as another step."""
CHECKS = ("texts", "used", "inventory", "superwords", "reach", "digits", "whitespace", "scalars", "scripts",
          "neutral", "streaming", "determinism", "worst")
"""Names of all checks, in the order of the report."""
NEED_TEXT = frozenset(["texts", "used"])


def check_all(tokenizer: Opened, texts: list[NamedText], skip: Collection[str] = ()) -> list[Check]:
    """Run all checks but those in `skip`; those that need text are left out where there is none.

    Progress is shown on standard error.
    """
    wanted = [name for name in CHECKS if name not in skip and (texts or name not in NEED_TEXT)]
    steps = len(wanted) + len(texts) + ("worst" in wanted) * len(worst_inputs())
    needs_unicode = bool({"scalars", "reach"} & set(wanted))
    total = needs_unicode * num_blocks() + BLOCKS_PER_STEP * steps
    with tqdm(total=total, bar_format="{desc:<12}{percentage:3.0f}% |{bar}| {elapsed}",
              mininterval=0.1 if sys.stderr.isatty() else 10) as bar:
        def step(num_steps: int = 1) -> None:
            bar.update(BLOCKS_PER_STEP * num_steps)

        bar.set_description_str("texts")
        measured = []
        for text in texts:
            measured.append(measure(tokenizer, text))
            step()
        bar.set_description_str("Unicode")
        scalars = try_scalars(tokenizer, bar.update, END if needs_unicode else 0)
        seen = scalars.seen | (np.sum([m.counts for m in measured], axis=0) > 0)
        runs: dict[str, Callable[[], Check]] = {
            "texts": lambda: check_texts(tokenizer, measured),
            "used": lambda: check_used(tokenizer, measured), "inventory": lambda: check_inventory(tokenizer),
            "superwords": lambda: check_superwords(tokenizer), "reach": lambda: check_reach(tokenizer, seen),
            "digits": lambda: check_digits(tokenizer), "whitespace": lambda: check_whitespace(tokenizer),
            "scalars": lambda: check_scalars(scalars), "scripts": lambda: check_scripts(tokenizer),
            "neutral": lambda: check_neutral(tokenizer),
            "streaming": lambda: check_streaming(tokenizer, texts),
            "determinism": lambda: check_determinism(tokenizer, texts),
            "worst": lambda: check_worst(tokenizer, step),
        }
        done = []
        for name in wanted:
            bar.set_description_str(name)
            done.append(runs[name]())
            step()
    return done
