"""Inputs that make tokenizers slow: one megabyte of one thing."""

from __future__ import annotations

import math
import random
import string
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_sov.pages.content import Table
from tokenizer.formats.loaders import Opened
from tokenizer.report.charts import lines
from tokenizer.report.check import Check

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
    """Return name -> text that is repeated up to the size."""
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
        text = (unit * (wanted // len(unit.encode()) + 1))[:max(1, wanted * len(unit) // len(unit.encode()))]
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


def check_worst(tokenizer: Opened, progress: Callable[[int], object], size_bytes: int = SIZE_BYTES) -> Check:
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
    return Check("worst", "Worst-case inputs", "bad" if failed or steep or short else "good", summary,
                 numbers, [Table(["input", "bytes", "tokens", "CPU s", "power", "error"], rows)], [drawn])
