"""Format counts, sizes, durations, money and shares with three digits and one unit."""

import math
import random
import re
from collections.abc import Callable

import pytest

from megatron_sov.base.figures import (
    format_count, format_days, format_duration, format_memory, format_money, format_seconds, format_share,
    format_size, format_value)


@pytest.mark.each(("format_figure", "texts"), [
    (format_count, [
        (0, "0"), (1, "1"), (0.5, "0.5"), (412, "412"), (999, "999"), (999.6, "1,000"), (999.96, "1 K"),
        (1000, "1 K"), (1234, "1.23 K"), (819_200, "819.2 K"), (999_499, "999.5 K"), (999_960, "1 M"),
        (999_800_000, "999.8 M"), (999_960_000, "1 B"),
        (8_190_735_360, "8.19 B"), (102_700_000_000, "102.7 B"), (999_960_000_000, "1 T"), (2e13, "20 T"),
        (1.5e15, "1,500 T"), (-8.19e9, "-8.19 B"), (math.nan, "–"), (math.inf, "inf")]),
    (format_money, [
        (0, "$0.00"), (4.214, "$4.21"), (9.996, "$10"), (244, "$244"), (12_300.4, "$12,300"),
        (999_999.6, "$1 M"), (4_210_000, "$4.21 M"), (1.2e9, "$1.2 B")]),
    (format_share, [
        (0, "0 %"), (0.43, "43 %"), (0.227, "22.7 %"), (0.004, "0.4 %"), (1, "100 %"), (0.9999, "100 %"),
        (1.358, "136 %"), (12.5, "1,250 %"), (-0.034, "-3.4 %"), (math.nan, "–")]),
])
def test_format_counts_money_and_shares(format_figure: Callable[[float], str],
                                        texts: list[tuple[float, str]]) -> None:
    assert [(value, format_figure(value)) for value, _ in texts] == texts


@pytest.mark.each(("num_bytes", "size", "memory"), [
    (0, "0 B", "0 GiB"), (999, "999 B", "0.976 KiB"), (1024, "1.02 kB", "1 KiB"),
                                                           (12_000, "12 kB", "11.7 KiB"),
    (1 << 20, "1.05 MB", "1 MiB"), (999_700, "1 MB", "976 KiB"), (512 << 20, "537 MB", "512 MiB"),
    (1023.9 * 2**20, "1.07 GB", "1 GiB"), (75 << 30, "80.5 GB", "75 GiB"),
    (137 << 30, "147 GB", "137 GiB"), (3000 << 30, "3.22 TB", "3,000 GiB")])
def test_format_size_and_memory(num_bytes: float, size: str, memory: str) -> None:
    assert (format_size(num_bytes), format_memory(num_bytes)) == (size, memory)


@pytest.mark.each(("seconds", "step", "span", "job"), [
    (0, "0 s", "0.0 s", "0 s"), (4e-6, "4 us", "0.0 s", "4 us"),
    (0.031, "31 ms", "0.0 s", "31 ms"), (0.9999, "1 s", "1.0 s", "1 s"),
    (59.96, "60 s", "1 min 0 s", "60 s"), (725, "725 s", "12 min 5 s", "12.1 minutes"),
    (3599.7, "3,600 s", "1 h 0 min", "1 hour"), (86_399.8, "86,400 s", "1 d 0 h", "24 hours"),
    (4680, "4,680 s", "1 h 18 min", "1.3 hours"), (86400 * 3.17, "273,888 s", "3 d 4 h", "3.17 days"),
    (86400 * 43, "3,715,200 s", "43 d 0 h", "43 days"),
    (1188.9 * 86400, "102,720,960 s", "1188 d 21 h", "1,189 days")])
def test_format_times(seconds: float, step: str, span: str, job: str) -> None:
    assert (format_seconds(seconds), format_duration(seconds), format_days(seconds)) == (step, span, job)


def test_formats_never_print_exponents_or_thousands() -> None:
    draw = random.Random(0)
    for _ in range(5000):
        value = 10 ** draw.uniform(0, 14.9)
        for text in (format_count(value), format_size(value), format_memory(value)):
            figure = re.fullmatch(r"([\d.,]+)(?: [A-Za-z]+)?", text)
            assert figure, text
            assert float(figure[1].replace(",", "")) < 1024 or text.endswith(("T", "TB", "GiB")), text
        assert float(format_value(value, 4).replace(",", "")) == pytest.approx(value, rel=6e-4)
