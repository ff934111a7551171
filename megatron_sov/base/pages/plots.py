"""Charts as inline SVG in HTML: line plots and heat maps without scripts or external files.

SVG shapes stretch to the page's width; labels are HTML text, so that they have the same size on phones and
wide screens. Colours are CSS variables of the page, which follow its light or dark theme.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup

from megatron_sov.base.errors import escape_controls
from megatron_sov.base.figures import format_count, format_value

NUM_COLOURS = 8
NARROW_PX, NAME_PX = 290, 7
"""Chart width on a phone, and character width in a band's name."""
GRID = 1000
"""Units along each side of the plot area, to which coordinates are rounded."""
MAX_TICKS = 5
MAX_DOTS, MAX_NOTED_DOTS = 40, 12
"""Up to MAX_DOTS points are drawn as dots; up to MAX_NOTED_DOTS dots show their values under the pointer."""
CELL_PX = 26
SHADES = 12
"""Shades in a heat map; cells with the same shade share an SVG path."""


def series_colour(i: int) -> str:
    """Return the CSS colour for the i-th series."""
    return f"var(--c{i % NUM_COLOURS + 1})"


@dataclass(frozen=True)
class Axis:
    """Axis title and range."""

    title: str = ""
    low: float | None = None
    """Lower end; None: fits the values."""
    high: float | None = None
    """Upper end; None: fits the values."""
    is_log: bool = False
    is_share: bool = False
    """Whether values are fractions, written as percentages."""


class Scale:
    """Maps axis values to fractions of the axis length, and chooses round ticks.

    Args:
        axis: the declared axis.
        values: finite values that have to fit; on a logarithmic axis they are positive.
        padding: fraction of the range to add at ends that the axis does not fix.
    """

    def __init__(self, axis: Axis, values: Iterable[float], padding: float = 0.0) -> None:
        self._axis = axis
        bounds = list(values) or [0.0, 1.0]
        low = min(bounds) if axis.low is None else axis.low
        high = max(bounds) if axis.high is None else axis.high
        if axis.is_log:
            low, high = math.log10(low), math.log10(high)
        if not high > low:
            half = abs(low) * 0.1 or 0.5
            low, high = (low if axis.low is not None else low - half), high + half
        pad = padding * (high - low)
        self._low = low if axis.low is not None else low - pad
        self._high = high if axis.high is not None else high + pad

    def to_fraction(self, value: float) -> float:
        """Return a value's fraction of the axis; values outside are clamped to the ends."""
        position = math.log10(value) if self._axis.is_log else value
        return min(1.0, max(0.0, (position - self._low) / (self._high - self._low)))

    def ticks(self) -> list[tuple[float, str]]:
        """Return (fraction of the axis length, label) per tick."""
        if self._axis.is_log:
            values = _list_log_ticks(self._low, self._high)
            return [(self.to_fraction(value), _format_tick(value, value / 10)) for value in values]
        step = round_up_step((self._high - self._low) / MAX_TICKS)
        first, last = math.ceil(self._low / step - 1e-9), math.floor(self._high / step + 1e-9)
        # multiply instead of adding steps, which would accumulate rounding errors
        values = [i * step for i in range(first, last + 1)]
        factor, unit = (100, " %") if self._axis.is_share else (1, "")
        return [(self.to_fraction(value), _format_tick(value * factor, step * factor) + unit)
                for value in values]


def round_up_step(least: float) -> float:
    """Round up to 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def _list_log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten within a logarithmic range; only powers if the range is wide."""
    exponents = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low <= 2 else (1,)
    every = max(1, len(exponents) // (MAX_TICKS + 1)) if len(factors) == 1 else 1
    return [factor * 10.0 ** exponent for exponent in exponents[::every] for factor in factors
            if low - 1e-9 <= math.log10(factor) + exponent <= high + 1e-9]


def _format_tick(value: float, step: float) -> str:
    if abs(value) >= 10_000 and step * 200 >= abs(value):
        return format_count(value)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step * 10 ** decimals, 6) % 1:
        decimals += 1
    return f"{value:,.{decimals}f}" if decimals < 5 else format_value(value, 2)


@dataclass(frozen=True)
class Series:
    """Points in a single colour; values must be finite."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = series_colour(0)
    intervals: Sequence[tuple[float, float]] = ()
    """(lower, upper) end of the interval per point."""
    is_faint: bool = False


@dataclass(frozen=True)
class LinePlot:
    """Line plot with several series."""

    series: Sequence[Series]
    x: Axis = field(default_factory=Axis)
    y: Axis = field(default_factory=Axis)
    height_px: int = 240
    bands: Sequence[tuple[str, float, float]] = ()
    """(name, first x, last x); every second band is shaded."""
    rules: Sequence[tuple[str, float]] = ()
    """(text under the pointer, x) for vertical dotted lines."""

    def draw(self) -> Markup:
        """Return the chart as HTML."""
        ends = [end for series in self.series for interval in series.intervals for end in interval]
        band_ends = [end for _, *ends in self.bands for end in ends]
        across = Scale(self.x, [*(x for series in self.series for x in series.x), *band_ends])
        up = Scale(self.y, [*(y for series in self.series for y in series.y), *ends], 0.04)
        grid = "".join(f"M0 {GRID - round(GRID * fraction)}h{GRID}" for fraction, _ in up.ticks())
        parts = [Markup('<path class="lines" d="{}"/>').format(grid)]
        parts += [Markup('<rect class="band" x="{}" width="{}" height="{}"><title>{}</title></rect>').format(
            round(GRID * across.to_fraction(low)),
            round(GRID * (across.to_fraction(high) - across.to_fraction(low))), GRID, escape_controls(name))
            for name, low, high in self.bands[1::2]]
        parts += [Markup('<path class="rule" d="M{} 0v{}"><title>{}</title></path>').format(
            round(GRID * across.to_fraction(x)), GRID, escape_controls(text)) for text, x in self.rules]
        parts += [part for series in self.series for part in _draw_series(series, across, up)]
        # a name may not fit above the band on the narrowest screen: then show numbers and a legend
        numbered = any(
            (across.to_fraction(high) - across.to_fraction(low)) * NARROW_PX < NAME_PX * (len(name) + 1)
            for name, low, high in self.bands)
        labels = [escape_controls(name) for name, _, _ in self.bands]
        key = ", ".join(f"{number} {label}" for number, label in enumerate(labels, 1))
        if numbered:
            labels = [str(number) for number, _ in enumerate(labels, 1)]
        names = [Markup('<span class="phase" style="left:{:.1f}%;width:{:.1f}%">{}</span>').format(
            100 * across.to_fraction(low), 100 * (across.to_fraction(high) - across.to_fraction(low)), label)
            for (_, low, high), label in zip(self.bands, labels, strict=True)]
        key = Markup('<p class="axis below">{}</p>').format(key) if numbered else ""
        legend = [(series.name, series.colour, series.is_faint) for series in self.series]
        y_ticks = up.ticks()
        widest = max((len(text) for _, text in y_ticks), default=1)
        return Markup(
            '<p class="axis{}">{}</p><div class="area" style="height:{}px;margin-left:{:.1f}em">'
            '<svg viewBox="0 0 {grid} {grid}" preserveAspectRatio="none">{}</svg>{}{}{}</div>'
            '<p class="axis below">{}</p>{}{}').format(
            Markup(" named") if self.bands else "", escape_controls(self.y.title), self.height_px,
            0.64 * widest + 0.8, Markup("").join(parts), _draw_labels("up", "bottom", y_ticks),
            _draw_labels("across", "left", across.ticks()), Markup("").join(names),
            escape_controls(self.x.title), key, draw_legend(legend) if len(legend) > 1 else "", grid=GRID)


def _draw_series(series: Series, across: Scale, up: Scale) -> list[Markup]:
    """Return intervals, line and dots as SVG; few dots have a note each, and many have none."""
    points = [(round(GRID * across.to_fraction(x)), GRID - round(GRID * up.to_fraction(y)))
              for x, y in zip(series.x, series.y, strict=True)]
    style = Markup('class="{}" style="--c:{}"').format("stroke faint" if series.is_faint else "stroke",
                                                       series.colour)
    parts = [Markup('<path {} d="M{} {}V{}"/>').format(
        style, x, GRID - round(GRID * up.to_fraction(low)), GRID - round(GRID * up.to_fraction(high)))
        for (x, _), (low, high) in zip(points, series.intervals, strict=False)]
    if points:
        parts.append(Markup('<path {} d="{}"><title>{}</title></path>').format(
            style, _draw_path(points), _format_summary(series)))
    if len(points) <= MAX_NOTED_DOTS:
        dots = [Markup('<path d="M{} {}h0"><title>{}</title></path>').format(x, y, _format_note(series, i))
                for i, (x, y) in enumerate(points)]
        parts.append(Markup('<g class="dots" style="--c:{}">{}</g>').format(
            series.colour, Markup("").join(dots)))
    elif len(points) <= MAX_DOTS:
        parts.append(Markup('<path class="dots" style="--c:{}" d="{}"/>').format(
            series.colour, "".join(f"M{x} {y}h0" for x, y in points)))
    return parts


def _draw_path(points: Sequence[tuple[int, int]]) -> str:
    """Format points as an SVG path with relative steps, shorter than absolute coordinates."""
    words = [f"M{points[0][0]} {points[0][1]}"]
    for (x0, y0), (x1, y1) in pairwise(points):
        if (x1, y1) != (x0, y0):
            words.append(f"l{x1 - x0}{'' if y1 < y0 else ' '}{y1 - y0}")
    return "".join(words)


def _format_note(series: Series, i: int) -> str:
    interval = ""
    if i < len(series.intervals):
        low, high = series.intervals[i]
        interval = f" ({format_value(low)} to {format_value(high)})"
    return escape_controls(f"{series.name}: {format_value(series.y[i])}{interval} at "
                           f"{format_value(series.x[i], 8)}")


def _format_summary(series: Series) -> str:
    return escape_controls(f"{series.name}: {format_value(series.y[0])} to {format_value(series.y[-1])}, "
                           f"lowest {format_value(min(series.y))}, highest {format_value(max(series.y))}")


def _draw_labels(name: str, side: str, ticks: Sequence[tuple[float, str]]) -> Markup:
    spans = (Markup('<span style="{}:{:.1f}%">{}</span>').format(Markup(side), 100 * position, text)
             for position, text in ticks)
    return Markup('<div class="{}">{}</div>').format(Markup(name), Markup("").join(spans))


def draw_legend(entries: Sequence[tuple[str, str, bool]]) -> Markup:
    """Return a legend as HTML; each entry is (name, colour, is faint)."""
    items = (Markup('<li{}><i style="--c:{}"></i>{}</li>').format(
        Markup(' class="faint"') if is_faint else "", stroke, escape_controls(name))
        for name, stroke, is_faint in entries)
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


@dataclass(frozen=True)
class HeatMap:
    """Heat map over `values`; NaN cells stay empty."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    """A list per row."""
    low: float
    high: float
    row_title: str = ""
    column_title: str = ""
    shown: Sequence[Sequence[str]] = ()
    """Text in each cell."""
    notes: Sequence[Sequence[str]] = ()
    """Text per cell under the pointer."""

    def draw(self) -> Markup:
        """Return the chart as HTML."""
        width = GRID / max(1, len(self.columns))
        shades: dict[int, list[str]] = {}
        for i, row in enumerate(self.values):
            for j, value in enumerate(row):
                if math.isfinite(value):
                    left, right = round(j * width), round((j + 1) * width)
                    shades.setdefault(self._choose_shade(value),
                                      []).append(f"M{left} {i}h{right - left}v1H{left}z")
        fill = "color-mix(in srgb, var(--heat1) {:.0f}%, var(--heat0))"
        parts = [Markup('<path d="{}" fill="{}"/>').format("".join(cells), fill.format(100 * shade / SHADES))
                 for shade, cells in sorted(shades.items())]
        height_px = CELL_PX * len(self.rows)
        rows = [((i + 0.5) / len(self.rows), escape_controls(row)) for i, row in enumerate(self.rows)]
        widest = max(map(len, self.rows), default=1)
        return Markup(
            '<p class="axis">{}</p><div class="area heat" style="height:{}px;margin-left:{:.1f}em">'
            '<svg viewBox="0 0 {} {}" preserveAspectRatio="none">{}</svg>{}{}{}</div>'
            '<p class="axis below">{}</p>').format(
            escape_controls(self.row_title), height_px, 0.64 * widest + 0.8, GRID, len(self.rows),
            Markup("").join(parts), self._draw_texts(), _draw_labels("up", "top", rows),
            _draw_labels("across", "left", self._list_column_labels()), escape_controls(self.column_title))

    def _choose_shade(self, value: float) -> int:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 1.0
        return round(SHADES * min(1.0, max(0.0, share)))

    def _draw_texts(self) -> Markup:
        """Return cell texts and notes as HTML."""
        spans = []
        for i, row in enumerate(self.values if self.shown or self.notes else ()):
            for j, value in enumerate(row):
                text = self.shown[i][j] if self.shown else ""
                note = self.notes[i][j] if self.notes else ""
                shade = self._choose_shade(value if math.isfinite(value) else 0)
                tone = "strong" if shade > SHADES / 2 else "weak"
                spans.append(Markup('<span class="{}" title="{}" style="left:{:.2f}%;top:{:.2f}%;width:{:.2f}'
                                    '%">{}</span>').format(
                    Markup(tone), escape_controls(note), 100 * j / len(self.columns),
                    100 * i / len(self.rows), 100 / len(self.columns), escape_controls(text)))
        return Markup('<div class="cells">{}</div>').format(Markup("").join(spans))

    def _list_column_labels(self) -> list[tuple[float, str]]:
        every = -(-len(self.columns) // (2 * MAX_TICKS))
        return [((j + 0.5) / len(self.columns), escape_controls(name))
                for j, name in enumerate(self.columns) if j % every == 0]
