"""`sov-tokenizer report`: everything about one tokenizer, as a page and as JSON."""

from __future__ import annotations

import argparse
import itertools
import math
import random
import re
import string
import time
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.artifacts import sha256_file, to_json, write_output
from megatron_sov.base.errors import UserError, nearest
from megatron_sov.base.outputs import check_output, check_page
from megatron_sov.base.pages.page import PageTable
from megatron_sov.base.settings import Flag, add_options, read_options
from tokenizer.formats.reader import Opened, open_tokenizer
from tokenizer.report.check import TokenizerCheck, cut, is_text, lines, shown, verdict_of
from tokenizer.report.measures import (
    END, NUM_EXAMPLES, HeldoutTextOptions, NamedText, TokenizerMeasures, TokenizerPath, check_determinism,
    check_inventory, check_scalars, check_scripts, check_streaming, check_superwords, check_texts, measure,
    num_blocks, pieces, read_texts, try_scalars)

# Inputs that make tokenizers slow: one megabyte of one thing.

SIZE_BYTES = 1_000_000
NUM_SIZES, FACTOR = 4, 4
LIMIT_S = 20.0
"""A size is not tried where quadratic growth would take longer."""
SLOW_EXPONENT = 1.6
"""Time as bytes to this power, or steeper, is called more than linear."""
MEASURABLE_S = 0.1
"""Shorter times say nothing about growth."""
UNITS = {"one letter": "a", "spaces": " ", "digits": "7", "line breaks": "\n", "tabs": "\t",
         "punctuation": "!", "one syllable": "가", "emoji": "😀", "letters and spaces": "a ", "words": "the ",
         "Thai": "กำลัง", "combining marks": "\u0301"}


@dataclass(frozen=True)
class Timed:
    """One kind of input at growing sizes."""

    sizes_bytes: list[int]
    times_s: list[float]
    """CPU time of each."""
    num_tokens: int
    """At the largest size."""
    error: str
    """What the library said where it gave up; empty where it did not."""

    def fastest(self, again: Timed) -> Timed:
        """Return the smaller of both times of each size."""
        return replace(again, times_s=[min(pair) for pair in zip(self.times_s, again.times_s, strict=False)],
                       sizes_bytes=again.sizes_bytes[:len(self.times_s)])

    @property
    def mb_per_s(self) -> float:
        """MB per CPU second at the largest size."""
        return self.sizes_bytes[-1] / 1e6 / max(1e-9, self.times_s[-1])

    @property
    def exponent(self) -> float | None:
        """Power of the size with which time grows at the end; None where it is too short to tell."""
        if len(self.times_s) < 2 or self.times_s[-1] < MEASURABLE_S:
            return None
        return math.log(self.times_s[-1] / max(self.times_s[-2], 1e-6)) / math.log(
            self.sizes_bytes[-1] / self.sizes_bytes[-2])


def worst_inputs() -> dict[str, str]:
    noise = "".join(random.Random(0).choices(string.ascii_letters + string.digits + "+/", k=SIZE_BYTES))
    return UNITS | {"base64": noise, "letters without spaces": "".join(c for c in noise if c.islower())}


def time_input(tokenizer: Opened, unit: str, size_bytes: int = SIZE_BYTES) -> Timed:
    """Encode a repeated text at growing sizes, up to `size_bytes`, as long as the next size would
    not take too long."""
    sizes: list[int] = []
    times: list[float] = []
    num_tokens = 0
    for k in reversed(range(NUM_SIZES)):
        wanted = size_bytes // FACTOR ** k
        if times and times[-1] * FACTOR ** 2 > LIMIT_S:
            break
        # cut by characters, so the last one is whole
        text = (unit * (wanted // len(unit.encode()) + 1))[:max(1, wanted * len(unit) // len(unit.encode()))]
        # processor time: a busy machine must not make a tokenizer look slow
        started_s = time.process_time()
        try:
            num_tokens = len(tokenizer.encode(text))
        except BaseException as e:  # the bindings panic, which is no Exception
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            return Timed(sizes, times, num_tokens,
                         f"{type(e).__name__} at {wanted:,} bytes: {' '.join(str(e).split())[:120]}")
        sizes.append(len(text.encode()))
        times.append(time.process_time() - started_s)
    return Timed(sizes, times, num_tokens, "")


def check_worst(tokenizer: Opened, progress: Callable[[int], object],
                size_bytes: int = SIZE_BYTES) -> TokenizerCheck:
    """Time every kind of input; `progress` is told of each."""
    found = {}
    for name, unit in worst_inputs().items():
        timed = time_input(tokenizer, unit, size_bytes)
        # a busy machine may have held up one size: look again
        if not timed.error and (timed.exponent or 0) >= SLOW_EXPONENT:
            timed = timed.fastest(time_input(tokenizer, unit, size_bytes))
        found[name] = timed
        progress(1)
    failed = [name for name, t in found.items() if t.error]
    steep = [name for name, t in found.items() if (t.exponent or 0) >= SLOW_EXPONENT]
    # stopped because a larger size would have taken too long
    short = [name for name, t in found.items() if not t.error and t.sizes_bytes[-1] < 0.9 * size_bytes]
    slowest = min((name for name in found if found[name].times_s), key=lambda name: found[name].mb_per_s)
    summary = (f"slowest: {slowest}, {found[slowest].mb_per_s:.2f} MB per CPU second" + (
        f"; time grows faster than the text for {', '.join(steep)}" if steep
        else "; time grows with the text") + (
        f"; stopped early: {', '.join(short)}" if short else "")
               + (f"; fails on {', '.join(failed)}" if failed else ""))
    numbers = {"size_bytes": size_bytes, "inputs": {name: {
        "sizes_bytes": t.sizes_bytes, "cpu_s": t.times_s, "num_tokens": t.num_tokens, "exponent": t.exponent,
        "error": t.error}
        for name, t in found.items()}}
    rows = []
    for name, t in found.items():
        power = "–" if t.exponent is None else f"{t.exponent:.2f}"
        size, cpu_s = (f"{t.sizes_bytes[-1]:,}", f"{t.times_s[-1]:.3f}") if t.times_s else ("–", "–")
        rows.append([name, size, f"{t.num_tokens:,}", cpu_s, power, t.error or "–"])
    drawn = lines([size_bytes // FACTOR ** k for k in reversed(range(NUM_SIZES))],
                  {name: t.times_s for name, t in found.items()}, ("bytes", "CPU seconds"),
                  "Time of one input by its size.", log=True)
    return TokenizerCheck("worst", "Worst-case inputs", "bad" if failed or steep or short else "good",
                          summary,
                          numbers, [PageTable(["input", "bytes", "tokens", "CPU s", "power", "error"], rows)],
                          [drawn])


BEFORE = ("", "a", " ", "1", ".", "\n", "가", "x ", " a", "(")
AFTER = ("", "a", " ", "1", ".", "\n", "가", " x", "a ", ")")
MAX_COMPLETIONS = 1000
"""Surroundings in which a part of a character is tried."""
MAX_CHARACTERS = 64
"""Characters that complete a part, of those in `COMPLETING`."""
COMPLETING = (range(0x80, 0xD800), range(0xF900, 0x10000), range(0x1F000, 0x1FB00), range(0x20000, 0x20400))
"""Blocks of living writing, and emoji."""
TOLERATED_SHARE = 0.001
"""Of the vocabulary: beyond it, unreachable tokens are a defect and not a remark."""
NEVER_IN_UTF8 = frozenset(bytes([b]) for b in (0xC0, 0xC1, *range(0xF5, 0x100)))


def check_used(tokenizer: Opened, measured: list[TokenizerMeasures]) -> TokenizerCheck:
    """Count the tokens that the texts do not use."""
    counts = np.sum([m.counts for m in measured], axis=0)
    ordinary = np.array(sorted(tokenizer.tokens))
    unused = ordinary[counts[ordinary] == 0]
    thresholds = [10 ** k for k in range(7) if 10 ** k <= counts.max()]
    at_least = {n: int((counts[ordinary] >= n).sum()) for n in thresholds}
    by_text = {m.text.name: int((m.counts[ordinary] > 0).sum()) for m in measured}
    num_bytes = sum(m.text.num_bytes for m in measured)
    spread = unused[::max(1, len(unused) // NUM_EXAMPLES)][:NUM_EXAMPLES]
    share = len(unused) / len(ordinary)
    numbers = {"num_never_used": len(unused), "share_never_used": share, "num_bytes": num_bytes,
               "used_at_least": at_least, "used_by_text": by_text,
               "examples": [{"id": int(i), "token": shown(tokenizer.tokens[int(i)])} for i in spread]}
    summary = (f"{len(unused):,} of {len(ordinary):,} tokens ({share:.1%}) do not occur in "
               f"{num_bytes / 1e6:.2f} MB of text"
               + ("; more text would use more of them" if share > 0.1 else ""))
    ranked = np.sort(counts[ordinary])[::-1]
    # even on a logarithmic axis, at most 60 points
    ranks = np.unique(np.geomspace(1, len(ranked), 60).astype(int))
    drawn = lines(
        [int(r) for r in ranks], {"count": [int(ranked[r - 1]) for r in ranks if ranked[r - 1] > 0]},
        ("rank of the token", "times it occurs"), "How often tokens occur, most frequent first.", log=True)
    rows = [[shown(tokenizer.tokens[int(i)]), f"{i:,}"] for i in spread]
    return TokenizerCheck("used", "Never used", "note" if share > 0.5 else "good", summary, numbers,
                          [PageTable(["never used: some of all ids", "id"], rows)] if rows else [], [drawn])


@dataclass(frozen=True)
class Unreachable:
    """A token that was not found."""

    id: int
    token: bytes
    becomes: list[int]
    """Ids that its own bytes, or its text, become."""
    reason: str


def check_reach(tokenizer: Opened, seen: NDArray[np.bool_]) -> TokenizerCheck:
    """Look for every token in the encoding of its own text, alone and in context.

    A part of a character is completed in many ways.  What is still not found and does not come out of merging
    its own bytes is proven unreachable; the rest was only not found in the surroundings tried.

    Args:
        tokenizer: the tokenizer.
        seen: ids that are known to occur, [vocab].
    """
    tokens = tokenizer.tokens
    left = [i for i in sorted(tokens) if not seen[i] and len(tokens[i]) > 1]
    bytes_alone = [i for i in sorted(tokens)
                   if not seen[i] and len(tokens[i]) == 1 and tokens[i] not in NEVER_IN_UTF8]
    whole = _not_found(tokenizer, {i: _in_context(tokens[i].decode()) for i in left if is_text(tokens[i])})
    parts = _not_found(tokenizer, _completions({i: tokens[i] for i in left if not is_text(tokens[i])}))
    found = [_explained(tokenizer, i) for i in sorted([*whole, *parts])]
    proven = sum(u.reason == "its bytes merge to other tokens" for u in found)
    share = len(found) / tokenizer.vocab_size
    summary = (f"{len(found):,} tokens ({share:.2%}) were given by no text, {proven:,} of them never can be"
               if found else "every token is given by some text")
    if bytes_alone:
        summary += f"; {len(bytes_alone)} single bytes never came up on their own"
    numbers: dict[str, Any] = {
        "num_unreachable": len(found), "share": share, "num_proven": proven,
        "num_bytes_never_alone": len(bytes_alone), "unreachable": [
            {"id": u.id, "token": shown(u.token), "becomes": [_name(tokenizer, i) for i in u.becomes],
             "reason": u.reason} for u in found]}
    rows = [[shown(u.token), f"{u.id:,}", cut([tokens.get(i, b"") for i in u.becomes]), u.reason]
            for u in found[:3 * NUM_EXAMPLES]]
    verdict = verdict_of(found and share > TOLERATED_SHARE, found)
    return TokenizerCheck("reach", "Unreachable tokens", verdict, summary, numbers,
                          [PageTable(["unreachable", "id", "becomes", "why"], rows)] if rows else [])


def _in_context(text: str) -> list[str]:
    return [before + text + after for before in BEFORE for after in AFTER]


def _not_found(tokenizer: Opened, tries: dict[int, list[str]]) -> list[int]:
    """Return the ids that occur in the encoding of none of their texts; one round for each text,
    over all that are left."""
    left, turn = dict(tries), 0
    given_up = [i for i, texts in left.items() if not texts]
    left = {i: texts for i, texts in left.items() if texts}
    while left:
        encoded = tokenizer.encode_many([texts[turn] for texts in left.values()])
        left = {i: texts for (i, texts), ids in zip(left.items(), encoded, strict=True) if i not in ids}
        turn += 1
        given_up += [i for i, texts in left.items() if len(texts) == turn]
        left = {i: texts for i, texts in left.items() if len(texts) > turn}
    return given_up


def _completions(parts: dict[int, bytes]) -> dict[int, list[str]]:
    """Return texts that hold the bytes of each token, which begin or end inside a character."""
    heads, tails = _characters_by_part() if parts else ({}, {})
    texts: dict[int, list[str]] = {}
    for id_, token in parts.items():
        start = next((k for k in range(len(token)) if token[k] & 0xC0 != 0x80), len(token))
        stop = next((k for k in range(len(token) - 1, max(-1, len(token) - 5), -1)
                     if token[k] & 0xC0 != 0x80), len(token))
        if stop < len(token) and is_text(token[stop:]):
            stop = len(token)
        if start == len(token):  # the inside of one character, which trying all of Unicode has covered
            texts[id_] = []
            continue
        before = heads[token[:start]] if start else list(BEFORE)
        after = tails[token[stop:]] if stop < len(token) else list(AFTER)
        middle = token[start:stop].decode("utf-8", errors="replace")
        texts[id_] = [f"{b}{middle}{a}" for b, a in _mixed(before, after)]
    return texts


def _mixed(before: list[str], after: list[str]) -> list[tuple[str, str]]:
    """Return pairs, those of the front of both lists first, at most `MAX_COMPLETIONS`."""
    side = max(len(before), len(after))
    order = ((i, total - i) for total in range(2 * side) for i in range(total + 1))
    pairs = [(before[i], after[j]) for i, j in order if i < len(before) and j < len(after)]
    return pairs[:MAX_COMPLETIONS]


def _characters_by_part() -> tuple[dict[bytes, list[str]], dict[bytes, list[str]]]:
    """Return characters by the bytes that they end with, and by those that they begin with; some of each."""
    ends: dict[bytes, list[str]] = defaultdict(list)
    begins: dict[bytes, list[str]] = defaultdict(list)
    for code in itertools.chain(*COMPLETING):
        character = chr(code)
        raw = character.encode()
        for k in range(1, len(raw)):
            ends[raw[k:]].append(character)
            begins[raw[:k]].append(character)
    return _thinned(ends), _thinned(begins)


def _thinned(found: dict[bytes, list[str]]) -> dict[bytes, list[str]]:
    """Keep `MAX_CHARACTERS` of each list, from all over it."""
    return defaultdict(list,
                       {part: known[::-(-len(known) // MAX_CHARACTERS)] for part, known in found.items()})


def _explained(tokenizer: Opened, id_: int) -> Unreachable:
    token = tokenizer.tokens[id_]
    merged = tokenizer.merged_alone(id_)
    if merged is not None and merged != [id_]:
        return Unreachable(id_, token, merged, "its bytes merge to other tokens")
    becomes = tokenizer.encode(token.decode()) if is_text(token) else []
    return Unreachable(id_, token, becomes,
                       "text is split inside it, or it was only not found in the surroundings tried")


def _name(tokenizer: Opened, id_: int) -> str:
    return shown(tokenizer.tokens[id_]) if id_ in tokenizer.tokens else f"<{id_}>"


# How numbers and white space are cut.

MAX_DIGITS = 12
NUMBERS_PER_LENGTH = 60
_DIGITS = re.compile(rb"[0-9]+")
MAX_SPACES, MAX_TABS = 64, 16
USUAL_INDENTS = (4, 8, 12, 16)
MIXED = ("\r\n", "\r\n\r\n", "\t \t ", " \n", "\n \n", "\u3000", "\u00a0\u00a0", " \t\n\r\n  x")
EXAMPLES = ("\n    x", "\n        x", "\n\tx", "\n\n\nx", "a  b", "a\r\nb", "\n \n x")


def digit_shape(tokenizer: Opened, number: str) -> tuple[int, ...]:
    """Return how many digits of a number each of its tokens holds, from the left."""
    digits = (sum(len(run) for run in _DIGITS.findall(piece)) for piece in pieces(tokenizer, f"n={number}"))
    return tuple(n for n in digits if n)


def check_digits(tokenizer: Opened) -> TokenizerCheck:
    """How numbers of 1 to 12 digits are cut: one by one, in regular groups,
    or depending on which digits they are."""
    several = [i for i, token in sorted(tokenizer.tokens.items()) if _several_digits(token)]
    draw = random.Random(0)
    learned = [run.decode() for i in several for run in _DIGITS.findall(tokenizer.tokens[i])]
    by_length = {n: [f"{draw.randrange(10 ** (n - 1), 10 ** n)}" for _ in range(NUMBERS_PER_LENGTH)]
                 for n in range(1, MAX_DIGITS + 1)}
    for number in learned[:2000]:
        if len(number) <= MAX_DIGITS:
            by_length[len(number)].append(number)
    shapes = {n: _shapes(tokenizer, numbers) for n, numbers in by_length.items()}
    single = all(shape == (1,) * n for n, found in shapes.items() for shape in found)
    regular = all(len(found) == 1 for found in shapes.values())
    verdict = verdict_of(not regular, several or not single)
    how = "how a number is cut depends on which digits it has"
    if single:
        how = "every digit is a token of its own"
    elif regular:
        how = "numbers are cut in groups that depend on their length alone"
    example = f", such as {shown(tokenizer.tokens[several[0]])}" if several else ""
    summary = f"{how}; {len(several):,} tokens hold several digits{example}"
    numbers = {"single_digits": single, "regular": regular, "num_multi_digit_tokens": len(several),
               "multi_digit_tokens": [shown(tokenizer.tokens[i]) for i in several[:200]],
               "shapes": {str(n): {_sum(s): number for s, number in found.items()}
                          for n, found in shapes.items()}}
    rows = [
        [str(n), f"{len(found)}", "; ".join(f"{_sum(s)} ({number})" for s, number in list(found.items())[:4])]
        for n, found in shapes.items()]
    return TokenizerCheck("digits", "Digits", verdict, summary, numbers,
                          [PageTable(["digits", "ways", "groups, with an example"], rows)])


def _sum(shape: tuple[int, ...]) -> str:
    return "+".join(map(str, shape))


def _several_digits(token: bytes) -> bool:
    """Return whether a token holds two digits, or numerals, side by side."""
    text = token.decode("utf-8", errors="replace")
    return any(a[0] == b[0] == "N" for a, b in itertools.pairwise(map(unicodedata.category, text)))


def _shapes(tokenizer: Opened, numbers: list[str]) -> dict[tuple[int, ...], str]:
    found: dict[tuple[int, ...], str] = {}
    for number in numbers:
        found.setdefault(digit_shape(tokenizer, number), number)
    return found


def check_whitespace(tokenizer: Opened) -> TokenizerCheck:
    """Indentation by 1 to 64 spaces and 1 to 16 tabs, line breaks and mixed white space: tokens,
    and whether it comes back."""
    indents = {" ": MAX_SPACES, "\t": MAX_TABS}
    base = len(tokenizer.encode("if x:\nreturn y"))
    cost = {unit: [len(tokenizer.encode(f"if x:\n{unit * n}return y")) - base for n in range(1, most + 1)]
            for unit, most in indents.items()}
    runs = [unit * n for unit, most in indents.items() for n in range(1, most + 1)]
    runs += [*("\n" * n for n in range(1, 9)), *MIXED]
    texts = [f"{before}{run}{after}" for run in runs for before, after in (("", ""), ("x", "y"), ("\n", "y"))]
    lost = [text for text, ids in zip(texts, tokenizer.encode_many(texts), strict=True)
            if tokenizer.decode(ids) != text]
    white = {id_: token for id_, token in tokenizer.tokens.items() if token and not token.strip(b" \t\r\n")}
    spaces, tabs, breaks = (max((len(t) for t in white.values() if not t.strip(unit)), default=0)
                            for unit in (b" ", b"\t", b"\n"))
    dear = [n for n in USUAL_INDENTS if cost[" "][n - 1] > 1]
    verdict = verdict_of(lost, dear)
    comes_back = (f"{len(lost)} of {len(texts)} do not come back, such as {shown(lost[0])}" if lost
                  else "every run comes back")
    summary = (f"{len(white)} tokens are white space (longest: spaces {spaces}, tabs {tabs}, "
               f"line breaks {breaks}); {comes_back}"
               + (f"; indentation by {', '.join(map(str, dear))} spaces takes more than one token more"
                  if dear else ""))
    numbers = {"num_whitespace_tokens": len(white), "longest_spaces": spaces, "longest_tabs": tabs,
               "longest_line_breaks": breaks, "num_tried": len(texts),
               "not_given_back": [shown(t) for t in lost],
               "tokens_more_for_spaces": cost[" "], "tokens_more_for_tabs": cost["\t"]}
    drawn = lines(list(range(1, MAX_SPACES + 1)), {"spaces": cost[" "], "tabs": cost["\t"]},
                  ("indentation", "tokens more than without"), "What indentation of a line of code costs.")
    rows = [[shown(text), cut(pieces(tokenizer, text))] for text in EXAMPLES]
    return TokenizerCheck("whitespace", "Indentation and white space", verdict, summary, numbers,
                          [PageTable(["text", "tokens"], rows)], [drawn])


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
    from tqdm import tqdm

    wanted = [name for name in CHECKS if name not in skip and (texts or name not in NEED_TEXT)]
    steps = len(wanted) + len(texts) + ("worst" in wanted) * len(worst_inputs())
    needs_unicode = bool({"scalars", "reach"} & set(wanted))
    total = needs_unicode * num_blocks() + BLOCKS_PER_STEP * steps
    with tqdm(total=total, bar_format="{desc:<12}{percentage:3.0f}% |{bar}| {elapsed}",
              disable=None) as bar:
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


@dataclass(frozen=True, kw_only=True)
class TokenizerReportOptions(HeldoutTextOptions):
    """Check a tokenizer and write what was found as one HTML file that opens without a network.

    Each check has a verdict (good, note, bad), numbers and examples. Give held-out text, one --text for each
    language or domain, to see bytes per token, the cost in context, and tokens that are never used."""

    tokenizer: TokenizerPath
    output: Annotated[Path, Flag(value="REPORT.html")]
    """The page to write."""
    json: Annotated[Path | None, Flag(value="FILE", writes=True)] = None
    """Write all numbers here too."""
    skip: Annotated[tuple[str, ...], Flag(value="CHECK")] = ()
    """Leave a check out; repeat it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, TokenizerReportOptions)


def run(typed: argparse.Namespace) -> int:
    """Run `sov-tokenizer report`; returns 0.

    Raises:
        UserError: the tokenizer or a text cannot be read, a check is unknown,
            or the output cannot be written.
    """
    from tokenizer.report.check import render

    args = read_options(TokenizerReportOptions, typed)
    for name in args.skip:
        if name not in CHECKS:
            raise UserError(f"--skip {name}: is no check{nearest(name, CHECKS)} (checks: "
                            f"{', '.join(CHECKS)})")
    check_page("--output", args.output)
    check_output("--json", args.json)
    opened = open_tokenizer(args.tokenizer)
    checks = check_all(opened, read_texts(args.text, args.max_text_mb), args.skip)
    for check in checks:
        print(f"{check.verdict:>4}  {check.title}: {check.summary}")
    write_output(args.output, render(opened, checks))
    if args.json is not None:
        found = {c.name: {"title": c.title, "verdict": c.verdict, "summary": c.summary, "numbers": c.numbers}
                 for c in checks}
        facts = {"tokenizer": str(args.tokenizer), "library": opened.library,
                 "vocab_size": opened.vocab_size, "sha256": sha256_file(opened.file)}
        write_output(args.json, to_json(facts | {"checks": found}))
    print(f"{args.output}: opens in any browser without a network")
    return 0
