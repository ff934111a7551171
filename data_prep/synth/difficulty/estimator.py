"""An estimator of difficulty: what it sees of a problem, how it is fitted, and the pass rate that it expects.

It sees words and characters, as scorers do, and figures of the form: lengths, numbers, signs, scripts.

An artifact of kind "difficulty": `difficulty.json` (how texts are read, what the figures of the form are
brought to one scale by, and four numbers) and `weights.safetensors` (float32: one weight for each bucket of
n-grams and for each figure).  The figures on problems that were held out stand in the manifest.

It is fitted by scikit-learn's logistic regression, to shares of right answers and to pairs.  A problem with
the share p of right answers counts as p of a right one and 1 - p of a wrong one.  Of a pair the difference of
the two rows is what tells which is easier (Bradley and Terry, Biometrika 39, 1952, with strengths that are
linear in what is seen).  What is chosen is chosen on problems that nothing was fitted to, and the result is
calibrated there (Platt, 1999).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from data_prep.curate.scoring.ngram_settings import NgramSettings
from data_prep.curate.scoring.ngrams import Ngrams
from data_prep.curate.scoring.scorer import library_problems, sparse_rows
from data_prep.json_lines import read_objects
from data_prep.synth.difficulty.labels import DifficultyLabels, LabelledProblem, read_labels
from data_prep.synth.options import PairWeight
from data_prep.synth.problems import TEXT_FIELDS, problem_text
from megatron_sov.base.artifacts import (
    MANIFEST, damaged_files, new_artifact, read_manifest, refuse_existing, to_json)
from megatron_sov.base.documents.scripts import letters_by_script
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    RISING, SettingsError, Share, as_problem, name_options, problems_of, read)

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
    ngrams, figures = _read_weights(folder / WEIGHTS_FILE, settings.ngrams.num_buckets)
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


def _read_weights(file: Path, num_buckets: int) -> tuple[np.ndarray, np.ndarray]:
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


# Difficulty written into rows: of an estimator, or as it was measured; and the band that is kept.

GRADED = "corpus"
BUCKETS = ("hard", "middle", "easy")


@dataclass(frozen=True)
class DifficultyGradeSettings:
    """Settings of `difficulty grade`."""

    cuts: Annotated[tuple[Share, Share], RISING] = (0.2, 0.8)
    """A pass rate below the first is hard, from the second on easy, and between them middle."""
    keep: Annotated[tuple[Share, Share], RISING] = (0.0, 1.0)
    """Rows whose pass rate is from the first to the second are written, both included."""

    def bucket(self, pass_rate: float) -> str:
        return BUCKETS[bisect_right(self.cuts, pass_rate)]


def grade(files: Sequence[Path], output: Path, settings: DifficultyGradeSettings, model: Path | None,
          labels: Path | None, *, overwrite: bool = False) -> dict[str, Any]:
    """Write an artifact of kind "corpus" with a file for each input, its rows graded; returns its content.

    Args:
        files: of JSON lines, each with a name of its own.
        output: the artifact.
        settings: buckets and band.
        model: the estimator; None: only what was measured can be graded.
        labels: of problems whose pass rates were measured; these go before what the estimator expects.
        overwrite: replace a corpus that is already there.

    Raises:
        UserError: a setting breaks a rule, or a row has no problem, or one that nothing is known of.
    """
    problems = name_options(problems_of(settings)) + list(map(as_problem, _graded_names(files)))
    if model is None and labels is None:
        problems.append(as_problem("names neither --model nor --labels; give one of them"))
    if problems:
        raise SettingsError("difficulty grade", problems)
    refuse_existing(output, GRADED, overwrite)
    estimator = load_estimator(model) if model is not None else None
    measured = {p.text: p.pass_rate for p in read_labels(labels).problems.values()} if labels else {}
    counts: dict[str, Counter[str]] = {bucket: Counter() for bucket in BUCKETS}
    with new_artifact(output, GRADED, overwrite=overwrite) as artifact:
        for file in files:
            with open(artifact.path / file.name, "w", encoding="utf-8") as out:
                for where, row in tqdm(read_objects(file), desc=file.name, unit=" rows", disable=None):
                    found = _graded(row, where, settings, estimator, measured)
                    is_kept = settings.keep[0] <= found["pass_rate"] <= settings.keep[1]
                    counts[found["bucket"]].update(["kept" if is_kept else "left_out",
                                                    found["difficulty_from"]])
                    if is_kept:
                        out.write(json.dumps(found, ensure_ascii=False) + "\n")
        for path in (model, labels):
            if path is not None:
                artifact.add_input(path)
        num_kept = sum(count["kept"] for count in counts.values())
        # inside of the artifact, so that an empty one is never published
        if not num_kept:
            raise UserError(f"--keep {settings.keep[0]:g}:{settings.keep[1]:g}: no row is in this band; "
                            "widen it, or look at the pass rates without it")
        artifact.settings = {**vars(settings), "inputs": list(files)}
        artifact.content = {"buckets": {bucket: dict(count) for bucket, count in counts.items()},
                            "num_kept": num_kept, "keep": list(settings.keep)}
    return artifact.content


def _graded_names(files: Sequence[Path]) -> list[str]:
    return [f"--input {name}: {count} files bear this name, and the output has a file for each; rename them"
            for name, count in Counter(file.name for file in files).items() if count > 1] + [
            f"--input {file}: must be a .jsonl file" for file in files if file.suffix != ".jsonl"]


def _graded(row: Mapping[str, Any], where: str, settings: DifficultyGradeSettings,
            estimator: Estimator | None, measured: Mapping[str, float]) -> dict[str, Any]:
    text = problem_text(row)
    if text is None:
        raise UserError(f"{where}: has a problem in none of the fields {', '.join(TEXT_FIELDS)} (fields: "
                        f"{', '.join(row) or 'none'}); add one")
    # what was measured goes before what is expected
    if text in measured:
        source, rate = "measured", measured[text]
    elif estimator is not None:
        source, rate = "expected", estimator.pass_rate(text)
    else:
        raise UserError(f"{where}: its problem was not measured; give an estimator with --model")
    return {**row, "pass_rate": rate, "difficulty": 1.0 - rate, "difficulty_from": source,
            "bucket": settings.bucket(rate)}


HELD_OUT, CALIBRATION = 0.15, 0.15
"""Shares of the problems that judge the estimator, and that choose and calibrate it."""
MIN_PROBLEMS = 60
"""Below, these shares are a handful."""
INVERSE_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""C of logistic regression."""
NGRAM_SCALES = (0.0, 1.0, 4.0)
"""What a row of n-grams is multiplied by beside the figures of the form; 0: these alone."""
MAX_ITERATIONS = 1000
_SURE = 30.0
"""A logit beyond which a share is 0 or 1, near enough."""


@dataclass(frozen=True)
class FitSettings:
    """Settings of `difficulty fit`."""

    ngrams: NgramSettings
    """How words and characters are read."""
    pair_weight: PairWeight = 0.25
    """What a pair counts beside a problem, which counts 1."""


@dataclass(frozen=True)
class FittingSplits:
    """Problems cut into parts that share none."""

    fit: list[LabelledProblem]
    """What weights are fitted to."""
    calibration: list[LabelledProblem]
    """What chooses between fits, and calibrates the chosen one."""
    heldout: list[LabelledProblem]
    """What nothing was fitted to or chosen by: the figures in the manifest are of these."""


def fit(folder: Path, output: Path, settings: FitSettings, *, overwrite: bool = False) -> dict[str, Any]:
    """Write an artifact of kind "difficulty"; returns its content: counts and held-out figures.

    Raises:
        UserError: labels or settings that cannot be, or an output that may not be replaced.
    """
    if problems := [*map(as_problem, library_problems()), *problems_of(settings)]:
        raise SettingsError("difficulty fit", problems)
    refuse_existing(output, KIND, overwrite)
    labels = read_labels(folder)
    if len(labels.problems) < MIN_PROBLEMS:
        raise UserError(f"{folder}: has {len(labels.problems)} problems; at least {MIN_PROBLEMS} are needed")
    if len({problem.pass_rate for problem in labels.problems.values()}) < 2:
        raise UserError(f"{folder}: all pass rates are the same; take configurations that solve some "
                        "problems and not others")
    parts = split(list(labels.problems.values()))
    if not (parts.fit and parts.calibration and parts.heldout):
        raise UserError(f"{folder}: its problems are nearly all the same; add others")
    with new_artifact(output, KIND, overwrite=overwrite) as artifact:
        found, ngram_weights, form_weights, chosen = _best(labels, parts, settings)
        write_estimator(artifact.path, found, ngram_weights, form_weights)
        estimator = Estimator(found, ngram_weights, form_weights)
        artifact.add_input(folder)
        artifact.settings = {"pair_weight": settings.pair_weight}
        artifact.content = {
            "num_problems": len(labels.problems), "num_pairs": len(labels.pairs), "num_fit": len(parts.fit),
            "num_calibration": len(parts.calibration), "chosen": chosen,
            "heldout": figures(parts.heldout, estimator)}
    return artifact.content


def check(model: Path, folder: Path) -> dict[str, Any]:
    if problems := library_problems():
        raise UserError(problems[0])
    return figures(list(read_labels(folder).problems.values()), load_estimator(model))


def split(problems: Sequence[LabelledProblem]) -> FittingSplits:
    """Cut problems into parts by the hashes of their texts, so that a problem lies on the same side whatever
    stands beside it; those of one text lie together."""
    parts = FittingSplits([], [], [])
    for problem in problems:
        # blanks do not count: a copy must not get into another part
        digest = hashlib.sha256(" ".join(problem.text.split()).encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2 ** 64
        if place < HELD_OUT:
            parts.heldout.append(problem)
        elif place < HELD_OUT + CALIBRATION:
            parts.calibration.append(problem)
        else:
            parts.fit.append(problem)
    return parts


class _Rows:
    """The rows of problems: n-grams, figures of the form on one scale, and a one."""

    def __init__(self, ngrams: Ngrams, fitted: Sequence[LabelledProblem]) -> None:
        self._ngrams = ngrams
        seen = np.stack([form(problem.text, ngrams) for problem in fitted])
        spreads = seen.std(axis=0)
        self.means = tuple(seen.mean(axis=0).tolist())
        # a figure that is the same everywhere would divide by 0
        self.spreads = tuple(np.where(spreads > 1e-9, spreads, 1.0).tolist())

    def of(self, problems: Sequence[LabelledProblem]) -> tuple[Any, Any]:
        from scipy.sparse import csr_matrix

        words = sparse_rows([self._ngrams.row(problem.text) for problem in problems], self._ngrams.width)
        rest = np.stack([np.append(scaled(form(problem.text, self._ngrams), self.means, self.spreads), 1.0)
                         for problem in problems])
        return words.astype(np.float64), csr_matrix(rest)


def _best(labels: DifficultyLabels, parts: FittingSplits, settings: FitSettings
          ) -> tuple[EstimatorSettings, np.ndarray, np.ndarray, dict[str, Any]]:
    """Return the estimator that is best on the calibration part, calibrated there, and what was chosen."""
    from threadpoolctl import threadpool_limits

    rows = _Rows(Ngrams(settings.ngrams), parts.fit)
    own, other = rows.of(parts.fit), rows.of(parts.calibration)
    rates = np.array([problem.pass_rate for problem in parts.calibration])
    pairs = _pairs(labels, parts.fit)
    tried: list[tuple[float, int, EstimatorSettings, np.ndarray, dict[str, Any]]] = []
    with threadpool_limits(1):  # sums in another order would have other last bits
        for scale, penalty in product(NGRAM_SCALES, INVERSE_PENALTIES):
            weights = _fit_weights(own, [problem.pass_rate for problem in parts.fit], pairs, scale, penalty,
                                   settings.pair_weight)
            z = np.asarray(_joined(other, scale) @ weights).ravel()
            slope, offset = calibrated(z, rates)
            loss = _loss(slope * z + offset, rates)
            found = EstimatorSettings(settings.ngrams, scale, rows.means, rows.spreads, float(weights[-1]),
                                      slope, offset)
            tried.append((loss, len(tried), found, weights, {"ngram_scale": scale, "penalty": penalty}))
    # of equal losses the earlier, so that each fit chooses the same
    _, _, best, weights, chosen = min(tried, key=lambda entry: entry[:2])
    # columns: n-grams, figures of the form, and the one of the bias
    width = settings.ngrams.num_buckets
    return (best, weights[:width].astype(np.float32), weights[width:-1].astype(np.float32),
            {**chosen, "num_pairs_fitted": len(pairs)})


def _pairs(labels: DifficultyLabels, fitted: Sequence[LabelledProblem]) -> list[tuple[int, int]]:
    """Return the places of the easier and the harder problem of those pairs that are fitted wholly."""
    # a pair with one side held out would carry it into the fit
    places = {problem.id: i for i, problem in enumerate(fitted)}
    return [(places[easier], places[harder]) for easier, harder in labels.pairs
            if easier in places and harder in places]


def _joined(rows: tuple[Any, Any], scale: float) -> Any:
    from scipy.sparse import hstack

    return hstack([rows[0] * scale, rows[1]]).tocsr()


def _fit_weights(rows: tuple[Any, Any], rates: Sequence[float], pairs: Sequence[tuple[int, int]],
                 scale: float, penalty: float, pair_weight: float) -> np.ndarray:
    """Return a weight for each column, the last one being the bias."""
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    own, shares = _joined(rows, scale), np.array(rates)
    # a share p as two rows, target 1 with weight p and 0 with 1 - p: their loss is the cross-entropy of p
    blocks, targets, counts = [own, own], [np.ones(len(shares)), np.zeros(len(shares))], [shares, 1 - shares]
    if pairs and pair_weight:
        easier, harder = (own[[pair[side] for pair in pairs]] for side in (0, 1))
        # in both directions, each with half of the weight, so that the two classes are balanced
        half = np.full(len(pairs), pair_weight / 2)
        blocks += [easier - harder, harder - easier]
        targets += [np.ones(len(pairs)), np.zeros(len(pairs))]
        counts += [half, half]
    # the bias is a column of its own, which is 0 in the difference of a pair
    model = LogisticRegression(C=penalty, fit_intercept=False, max_iter=MAX_ITERATIONS)
    model.fit(vstack(blocks).tocsr(), np.concatenate(targets), sample_weight=np.concatenate(counts))
    weights: np.ndarray = np.ravel(model.coef_)
    return weights


def calibrated(z: np.ndarray, rates: np.ndarray) -> tuple[float, float]:
    """Return slope and offset under which the logistic function of z is nearest to the shares; a slope that
    would turn the order round is not taken."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e6, max_iter=MAX_ITERATIONS)
    least = 0.5 / max(1, len(rates))  # never quite 0 or 1, so that the slope stays finite
    # Platt: calibration by a logistic function of z, here to shares in the place of labels
    shares = np.clip(rates, least, 1 - least)
    model.fit(np.concatenate([z, z])[:, None], np.repeat([1, 0], len(z)),
              sample_weight=np.concatenate([shares, 1 - shares]))
    slope = float(model.coef_[0, 0])
    if slope > 0:
        return slope, float(model.intercept_[0])
    # z says nothing here: everyone gets the mean
    mean = float(np.clip(rates.mean(), least, 1 - least))
    return 0.0, math.log(mean / (1 - mean))


def _loss(logits: np.ndarray, rates: np.ndarray) -> float:
    sure = np.clip(logits, -_SURE, _SURE)
    return float(np.mean(np.logaddexp(0.0, sure) - rates * sure))
