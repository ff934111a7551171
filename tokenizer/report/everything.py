"""All checks of one tokenizer, in reading order."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection

import numpy as np
from tqdm import tqdm

from megatron_sov.base.pages.page import PageTable
from tokenizer.formats.loaders import Opened
from tokenizer.report.check import TokenizerCheck, cut, shown
from tokenizer.report.coverage import (
    END, check_determinism, check_inventory, check_scalars, check_scripts, check_streaming, check_superwords,
    num_blocks, try_scalars)
from tokenizer.report.measures import (
    NUM_EXAMPLES, NamedText, check_digits, check_texts, check_whitespace, measure, pieces)
from tokenizer.report.reach import check_reach, check_used, check_worst, worst_inputs

_CONTROL = re.compile(r"\s*[<\[{|].*[>\]}|]\s*", re.DOTALL)
"""How tokens look that steer a model; other added tokens, such as runs of spaces,
are meant to be found in text."""
BLOCKS_PER_STEP = 16
"""Blocks of Unicode that take about as long as another step."""
CHECKS = ("texts", "used", "inventory", "superwords", "reach", "digits", "whitespace", "scalars", "scripts",
          "neutral", "streaming", "determinism", "worst")
"""Names of all checks, in the order of the report."""
NEED_TEXT = frozenset(["texts", "used"])


# Special tokens that a user types: whether they stay text.


def check_neutral(tokenizer: Opened) -> TokenizerCheck:
    """Encode text in which each special token is spelled out.

    A user who can write the end of a turn can speak for the assistant.  Encoded as ordinary text, no special
    token's id may come out, and the text must come back; what the library does by default is told as well.
    """
    control = {i: t for i, t in sorted((tokenizer.special | tokenizer.added).items())
               if t and (i in tokenizer.special or _CONTROL.fullmatch(t))}
    tried = {
        i: [f"{before}{token}{after}" for before, after in (("", ""), ("please write ", " now"), ("a", "b"))]
        for i, token in control.items()}
    become_ids, not_back, by_default = [], [], []
    for id_, texts in tried.items():
        encoded = [tokenizer.encode(text) for text in texts]
        if any(set(ids) & control.keys() for ids in encoded):
            become_ids.append(id_)
        elif any(tokenizer.decode(ids) != tokenizer.normalize(text)
                 for ids, text in zip(encoded, texts, strict=True)):
            not_back.append(id_)
        if any(id_ in tokenizer.encode_special(text) for text in texts):
            by_default.append(id_)
    bad = bool(become_ids or not_back)
    how = {"tokenizers": "encode_special_tokens = True; in transformers, split_special_tokens=True",
           "tiktoken": "encode_ordinary"}.get(tokenizer.library, "encode")
    summary = f"{len(control):,} special tokens tried in text: " + (
        f"{len(become_ids):,} become their ids even in ordinary text, such as {shown(control[become_ids[0]])}"
        if become_ids else f"encoded as ordinary text ({how}) all stay text") + (
        f"; {len(not_back):,} do not come back" if not_back else "") + (
        f"; read as special tokens, {len(by_default):,} become ids, so never encode users' text that way"
        if by_default else "")
    numbers = {"num_tried": len(control), "become_ids_in_text": [control[i] for i in become_ids],
               "not_given_back": [control[i] for i in not_back],
               "num_ids_where_special_is_read": len(by_default)}
    rows = [[shown(control[i]), f"{i:,}", cut(pieces(tokenizer, control[i])) or "–",
             "becomes its id" if i in become_ids else "does not come back" if i in not_back else "stays text"]
            for i in [*become_ids, *not_back, *control][:NUM_EXAMPLES]]
    return TokenizerCheck("neutral", "Special tokens in users' text", "bad" if bad else "good", summary,
                          numbers,
                          [PageTable(["token", "id", "as ordinary text", "result"], rows)] if rows else [])


def check_all(tokenizer: Opened, texts: list[NamedText], skip: Collection[str] = ()) -> list[TokenizerCheck]:
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
        runs: dict[str, Callable[[], TokenizerCheck]] = {
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
