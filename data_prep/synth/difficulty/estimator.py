"""A fitted estimator on disk, what it sees of a problem, the pass rate that it expects, and how good that is.

It sees words and characters, as scorers do, and figures of the form: lengths, numbers, signs, scripts.

An artifact of kind "difficulty": `difficulty.json` (how texts are read, what the figures of the form are
brought to one scale by, and four numbers) and `weights.safetensors` (float32: one weight for each bucket of
n-grams and for each figure).  The figures on problems that were held out stand in the manifest.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.curate.scoring.ngram_settings import NgramSettings
from data_prep.curate.scoring.ngrams import Ngrams
from data_prep.synth.difficulty.labels import LabelledProblem
from megatron_sov.base.artifacts import MANIFEST, damaged_files, read_manifest, to_json
from megatron_sov.base.documents.scripts import letters_by_script
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import read

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_OPERATOR = re.compile(r"[-+*/^=<>×÷·≤≥≠∫∑√±%]|\\(?:frac|sqrt|int|sum|prod|lim|cdot|times|le|ge|ne)\b")
_SENTENCE = re.compile(r"[.?!。？！]+(?:\s|$)|\n+")
_POWER = re.compile(r"[\^²³⁴⁵⁶⁷⁸⁹]")
MAX_DIGITS = 30
"""Of a number: more are as many."""
SCRIPTS = ("LATIN", "HANGUL", "CJK", "HIRAGANA", "KATAKANA", "THAI", "CYRILLIC", "ARABIC", "DEVANAGARI")
NAMES = ("chars", "units", "different_units", "sentences", "numbers", "different_numbers", "digits",
         "longest_number", "largest_number", "second_number", "decimals", "operators", "different_operators",
         "powers", "commands", "brackets", "lines", "questions", "numbers_by_digits",
         *(script.lower() for script in SCRIPTS))
"""Figures of the form, in order."""


def form(text: str, ngrams: Ngrams) -> np.ndarray:
    """Return the figures of a problem's form, float64, in the order of `NAMES`; counts as ln(1 + count)."""
    # cut as n-grams are, so that both see the same text
    text = text[: ngrams.settings.max_chars]
    units = ngrams.units(text)
    numbers = [number.replace(",", "") for number in _NUMBER.findall(text)]
    sizes = sorted((_size(number) for number in numbers), reverse=True)
    lengths = [min(sum(map(str.isdigit, number)), MAX_DIGITS) for number in numbers]
    operators = _OPERATOR.findall(text)
    letters = letters_by_script(text)
    num_letters = max(1, sum(letters.values()))
    counts = [len(text), len(units), len(set(units)), len(_SENTENCE.findall(text)), len(numbers),
              len(set(numbers)), sum(lengths), max(lengths, default=0)]
    more = [sum("." in number for number in numbers), len(operators), len(set(operators)),
            len(_POWER.findall(text)), len(_COMMAND.findall(text)), sum(map(text.count, "([{")),
            text.count("\n"), sum(map(text.count, "?？"))]
    # the order is that of NAMES: weights on disk belong to places
    return np.array([*map(math.log1p, counts), *[*sizes, 0.0, 0.0][:2], *map(math.log1p, more),
                     math.log1p(len(numbers) * max(lengths, default=0)),
                     *(letters[script] / num_letters for script in SCRIPTS)], np.float64)


def _size(number: str) -> float:
    """Return the decimal logarithm of 1 + a number."""
    whole, _, part = number.partition(".")
    whole = whole.lstrip("0")
    if len(whole) > MAX_DIGITS:
        return float(MAX_DIGITS)
    return math.log10(1 + float(f"{whole or 0}.{part.replace('.', '')[:MAX_DIGITS] or 0}"))


KIND = "difficulty"
SETTINGS_FILE, WEIGHTS_FILE = "difficulty.json", "weights.safetensors"
CONTENT_VERSION = 1
LARGEST = 5.0
"""Standard deviations beyond which a figure counts as this far: no problem is like those that were seen."""


@dataclass(frozen=True)
class EstimatorSettings:
    """What `difficulty.json` holds."""

    ngrams: NgramSettings
    """How words and characters are read."""
    ngram_scale: float
    """What a row of n-grams, of length 1, is multiplied by beside the figures of the form."""
    means: tuple[float, ...]
    """Of the figures of the form, over the problems that were fitted."""
    spreads: tuple[float, ...]
    """Their standard deviations; 1 where a figure did not differ."""
    bias: float
    """Added to the product of row and weights: z."""
    slope: float
    """The expected pass rate is the logistic function of slope * z + offset."""
    offset: float


class Estimator:
    """Tells the pass rate that is expected of a problem; the same text has the same one, whatever stands
    beside it."""

    def __init__(self, settings: EstimatorSettings, ngram_weights: np.ndarray, form_weights: np.ndarray
                 ) -> None:
        self.settings = settings
        self._ngrams = Ngrams(settings.ngrams)
        self._ngram_weights, self._form_weights = ngram_weights, form_weights

    def pass_rate(self, text: str) -> float:
        """Return the share of answers that are expected to be right, in [0, 1], as single precision holds
        it."""
        s = self.settings
        z = s.ngram_scale * self._ngrams.dot(text, self._ngram_weights) + s.bias
        z += float(scaled(form(text, self._ngrams), s.means, s.spreads) @ self._form_weights)
        # the last bits of sums in double precision may differ from machine to machine
        return float(np.float32(logistic(s.slope * z + s.offset)))


def scaled(figures: np.ndarray, means: tuple[float, ...], spreads: tuple[float, ...]) -> np.ndarray:
    """Return figures of the form, brought to one scale."""
    found: np.ndarray = np.clip((figures - np.array(means)) / np.array(spreads), -LARGEST, LARGEST)
    return found


def logistic(z: float) -> float:
    """Return 1 / (1 + exp(-z)), for any z."""
    # the exponent is never positive, so it cannot overflow
    small = math.exp(-min(abs(z), 700.0))
    return 1.0 / (1.0 + small) if z > 0 else small / (1.0 + small)


def write_estimator(folder: Path, settings: EstimatorSettings, ngram_weights: np.ndarray,
                    form_weights: np.ndarray) -> None:
    from safetensors.numpy import save_file

    (folder / SETTINGS_FILE).write_text(to_json({"content_version": CONTENT_VERSION, "form": NAMES,
                                                 **asdict(settings)}))
    save_file({"ngrams": ngram_weights, "form": form_weights}, folder / WEIGHTS_FILE)


def load_estimator(folder: Path) -> Estimator:
    """Return the estimator of an artifact, all of whose files are what its manifest says.

    Raises:
        UserError: it is none, or damaged.
    """
    manifest = read_manifest(folder, KIND)
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    if different := sorted(found ^ set(manifest.files) or {SETTINGS_FILE, WEIGHTS_FILE} - found):
        raise UserError(f"{folder}: {different[0]} is not both in the folder and in its manifest; fit the "
                        "estimator again")
    if problems := damaged_files(folder):
        raise UserError(f"{folder}: {problems[0]}; fit the estimator again or restore it from a copy")
    settings = _settings(folder / SETTINGS_FILE)
    ngrams, figures = _weights(folder / WEIGHTS_FILE, settings.ngrams.num_buckets)
    return Estimator(settings, ngrams, figures)


def _settings(file: Path) -> EstimatorSettings:
    try:
        raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if raw.pop("content_version") != CONTENT_VERSION or raw.pop("form") != list(NAMES):
            raise ValueError(f"this version reads content_version {CONTENT_VERSION} with its own figures")
        ngrams = read(NgramSettings, raw.pop("ngrams"), "ngrams")
        means, spreads = (tuple(map(float, raw.pop(name))) for name in ("means", "spreads"))
        settings = EstimatorSettings(ngrams, means=means, spreads=spreads,
                                     **{name: float(value) for name, value in raw.items()})
        # one value that is not finite would make every expected rate NaN
        numbers = [*means, *spreads, settings.ngram_scale, settings.bias, settings.slope, settings.offset]
        if not (len(means) == len(spreads) == len(NAMES) and all(map(math.isfinite, numbers))
                and all(spread > 0 for spread in spreads)):
            raise ValueError(f"there must be {len(NAMES)} finite means and positive spreads")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({e!r:.200}); fit the estimator again") from None
    return settings


def _weights(file: Path, num_buckets: int) -> tuple[np.ndarray, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = load_file(file)
        for name, width in (("ngrams", num_buckets), ("form", len(NAMES))):
            weights = found[name]
            if weights.dtype != np.float32 or weights.shape != (width,) or not np.isfinite(weights).all():
                raise ValueError(f"{name} must be {width} finite float32")
    except (SafetensorError, ValueError, KeyError) as e:
        raise UserError(f"{file}: is damaged ({e!r:.200}); fit the estimator again") from None
    return found["ngrams"], found["form"]


# How good expected pass rates are: their order, and whether of problems with an expected 0.7 seven in ten
# answers are right.

NUM_BINS = 10
"""Of the reliability table and the expected calibration error."""


def figures(problems: Sequence[LabelledProblem], estimator: Estimator) -> dict[str, Any]:
    """Return the figures of all problems, and under "scripts" those of each script that most letters of some
    problems are of."""
    expected = np.array([estimator.pass_rate(problem.text) for problem in problems])
    measured = np.array([problem.pass_rate for problem in problems])
    scripts = np.array([_script(problem.text) for problem in problems])
    by_script = {name: compared(expected[scripts == name], measured[scripts == name])
                 for name in sorted(set(scripts.tolist()))}
    return {**compared(expected, measured), "reliability": reliability(expected, measured),
            "scripts": by_script}


def compared(expected: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """Return Spearman's rank correlation (null where one of both does not differ), the expected calibration
    error, the mean error, and what the latter is where the mean alone is expected of all."""
    from scipy.stats import spearmanr

    differ = len(set(expected.tolist())) > 1 and len(set(measured.tolist())) > 1
    return {"num_problems": len(measured),
            "spearman": float(spearmanr(expected, measured).statistic) if differ else None,
            "calibration_error": sum(
                abs(row["measured"] - row["expected"]) * row["num_problems"]
                for row in reliability(expected, measured)) / max(1, len(measured)),
            "mean_absolute_error": float(np.mean(np.abs(expected - measured))) if len(measured) else None,
            "mean_absolute_error_of_mean": float(np.mean(np.abs(measured - measured.mean())))
            if len(measured) else None}


def reliability(expected: np.ndarray, measured: np.ndarray) -> list[dict[str, Any]]:
    """Return for each tenth of expected pass rates how many problems there are, the mean expected rate and
    the mean measured one (Guo et al., arXiv 1706.04599, section 2)."""
    # an expected rate of 1 belongs to the last bin
    bins = np.minimum((expected * NUM_BINS).astype(int), NUM_BINS - 1)
    return [{"from": i / NUM_BINS, "to": (i + 1) / NUM_BINS, "num_problems": int((bins == i).sum()),
             "expected": float(expected[bins == i].mean()), "measured": float(measured[bins == i].mean())}
            for i in sorted(set(bins.tolist()))]


def figure_lines(content: dict[str, Any]) -> list[str]:
    lines = [f"  {_line(content)}", *(f"  {name.lower()}: {_line(of)}"
                                      for name, of in content["scripts"].items())]
    lines += ["  expected    problems  mean expected  mean measured"]
    return lines + [f"  {row['from']:.1f} to {row['to']:.1f}  {row['num_problems']:8,}  "
                    f"{row['expected']:13.3f}  {row['measured']:13.3f}" for row in content["reliability"]]


def _line(row: dict[str, Any]) -> str:
    if not row["num_problems"]:
        return "no problems"
    spearman = "-" if row["spearman"] is None else f"{row['spearman']:.3f}"
    return (f"{row['num_problems']:,} problems: Spearman {spearman}, calibration error "
            f"{row['calibration_error']:.3f}, mean error {row['mean_absolute_error']:.3f} (the mean alone: "
            f"{row['mean_absolute_error_of_mean']:.3f})")


def _script(text: str) -> str:
    counts = letters_by_script(text)
    return max(sorted(counts), key=counts.__getitem__) if counts else "none"
