"""Fitting an estimator: logistic regression to shares of right answers and to pairs, by scikit-learn.

A problem with the share p of right answers counts as p of a right one and 1 - p of a wrong one.  Of a pair
the difference of the two rows is what tells which is easier (Bradley and Terry, Biometrika 39, 1952, with
strengths that are linear in what is seen).  What is chosen is chosen on problems that nothing was fitted to,
and the result is calibrated there (Platt, 1999).
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from data_prep.curate.scoring.ngram_settings import NgramSettings
from data_prep.curate.scoring.ngrams import Ngrams
from data_prep.curate.scoring.scorer import library_problems, sparse_rows
from data_prep.json_lines import read_objects
from data_prep.synth.difficulty.estimator import (
    KIND, Estimator, EstimatorSettings, figures, form, load_estimator, scaled, write_estimator)
from data_prep.synth.difficulty.labels import DifficultyLabels, LabelledProblem, read_labels
from data_prep.synth.options import PairWeight
from data_prep.synth.problems import TEXT_FIELDS, problem_text
from megatron_sov.base.artifacts import new_artifact, refuse_existing
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import RISING, SettingsError, Share, as_problem, name_options, problems_of

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
            weights = _weights(own, [problem.pass_rate for problem in parts.fit], pairs, scale, penalty,
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


def _weights(rows: tuple[Any, Any], rates: Sequence[float], pairs: Sequence[tuple[int, int]], scale: float,
             penalty: float, pair_weight: float) -> np.ndarray:
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
