"""Format counts, sizes, durations, money and shares for terminals and pages."""

import math
from collections.abc import Container, Sequence

COUNT_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
SIZE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
MEMORY_UNITS = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))
SECOND_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
TIME_UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
"""(seconds, name) for a unit, then for the next smaller unit."""
NO_VALUE = "–"


def format_count(count: float) -> str:
    """Format a count (parameters, tokens, operations): 8.19 B, 102.7 B, 1 T, 412."""
    return _format_scaled(count, COUNT_UNITS, whole_below=1e3, hundreds_digits=4)


def format_size(num_bytes: float) -> str:
    """Format a file or message size in powers of 1000: 1.52 GB, 12 kB, 999 B."""
    text = _format_scaled(num_bytes, SIZE_UNITS, whole_below=1e3)
    return text if text[-1].isalpha() else f"{text} B"


def format_memory(num_bytes: float) -> str:
    """Format GPU or host memory in powers of 1024: 38.6 GiB, 512 MiB, 0 GiB."""
    return _format_scaled(num_bytes, MEMORY_UNITS) if num_bytes else "0 GiB"


def format_seconds(seconds: float) -> str:
    """Format a short duration (step, phase): 1.52 s, 31 ms, 4 us, 0 s."""
    return _format_scaled(seconds, SECOND_UNITS) if seconds else "0 s"


def format_duration(seconds: float) -> str:
    """Format a duration in the two largest units: 3 d 4 h, 12 min 5 s, 4.2 s."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    for unit_s, unit, smaller_s, smaller in TIME_UNITS:
        if rounded >= unit_s:
            return f"{rounded // unit_s} {unit} {rounded % unit_s // smaller_s} {smaller}"
    raise AssertionError(f"no unit for {seconds} s")


def format_days(seconds: float) -> str:
    """Format the duration of a job: minutes below an hour, hours below two days, then days: 43 days."""
    for unit_s, unit, least in ((86400, "days", 48 * 3600), (3600, "hours", 3600), (60, "minutes", 60)):
        if seconds >= least * 0.9995:
            amount = format_value(seconds / unit_s, 3)
            return f"{amount} {unit.removesuffix('s') if amount == '1' else unit}"
    return format_seconds(seconds)


def format_money(dollars: float) -> str:
    """Format US dollars: $4.21, $12,300, $4.21 M."""
    if dollars >= 999_999.5:
        return f"${_format_scaled(dollars, COUNT_UNITS)}"
    return f"${dollars:,.0f}" if dollars >= 9.995 else f"${dollars:.2f}"


def format_share(share: float) -> str:
    """Format a fraction as a percentage with three digits: 43 %, 22.7 %, 0.4 %; a dash for NaN."""
    return NO_VALUE if math.isnan(share) else f"{format_value(100 * share, 3)} %"


def format_value(value: float, digits: int = 4) -> str:
    """Format a measured value with `digits` significant digits; a dash for NaN.

    Integer digits never become an exponent: 1234567 with 3 digits is 1,234,567.
    """
    if math.isnan(value):
        return NO_VALUE
    if math.isinf(value) or not value:
        return f"{value:g}"
    return f"{value:.{digits}g}" if abs(value) < 10.0 ** (digits - 1) else f"{value:,.0f}"


def _format_scaled(value: float, units: Sequence[tuple[float, str]], whole_below: float = 0.0,
                   hundreds_digits: int = 3) -> str:
    """Divide `value` by the largest unit that leaves at least 1 after rounding, and append the unit's name.

    Args:
        units: size and name of each unit, the largest first.
        whole_below: a smaller value has no unit; other values below every unit are written in the smallest.
        hundreds_digits: significant digits from 100 of a unit on; smaller figures have three.
    """
    share = 1 - 0.5 * 10.0 ** -hundreds_digits
    if not math.isfinite(value):
        return NO_VALUE if math.isnan(value) else f"{value:g}"
    for unit, name in units:
        if abs(value) >= unit * share:
            digits = hundreds_digits if abs(value) >= 99.95 * unit else 3
            return f"{format_value(value / unit, digits)} {name}"
    if abs(value) < whole_below:
        return format_value(value, 3)
    unit, name = units[-1]
    return f"{format_value(value / unit, 3)} {name}"


def align_columns(rows: Sequence[Sequence[str]], left: Container[int]) -> str:
    """Pad cells to columns, aligning columns in `left` to the left and others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if column in left else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
