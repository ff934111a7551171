"""From mixtures that were tried to the loss of those that were not.

CLIMB (arXiv 2504.13161) fits gradient boosted trees to 112 mixtures, RegMix (2407.01492) to 512.  Tens of
small runs are too few for trees: they know nothing between the mixtures that they have seen.  A ridge
regression on shares and their logarithms has the form that losses are known to have, quickly falling with a
cluster's first tokens and slowly with more, and its best mixture lies inside, not in a corner.  Which of them
predicts better is measured by cross-validation, and that one is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.mixture.blend_file import FitName
from megatron_sov.base.errors import UserError

FLOOR = 0.02
"""Added to a share before its logarithm: below it, more of a cluster gains in proportion.  Of 0.005, 0.02,
0.05 and 0.1 it chose best or second best on drawn losses (exponential, logarithm, power, means of these; 12
to 40 mixtures of 3 or 5 clusters)."""
PENALTIES = np.logspace(-4, 3, 22)
"""Of the ridge, on features of unit variance; leave-one-out chooses."""
NUM_FOLDS = 5
BOOSTING = {"n_estimators": 100, "learning_rate": 0.1, "max_depth": 4, "min_samples_leaf": 5,
            "subsample": 0.8}
"""Trees of CLIMB's size (depth 4, 5 mixtures in a leaf)."""

Shares = NDArray[np.float64]
"""[clusters] or [mixtures, clusters]: shares, each row summing to 1."""
Predict = Callable[[Shares], NDArray[np.float64]]
"""[mixtures, clusters] shares -> [mixtures] losses."""


@dataclass(frozen=True)
class Judgement:
    """How well losses were predicted that were not fitted."""

    rmse: float
    """Root of the mean squared error, in the unit of the loss."""
    spearman: float | None
    """Rank correlation of predicted and measured; None where either is constant, or of fewer than three."""

    def describe(self) -> str:
        rank = "none (too few, or all alike)" if self.spearman is None else f"{self.spearman:.2f}"
        return f"within {self.rmse:.4f} (rmse), rank correlation {rank}"


def fit_log_ridge(shares: Shares, losses: NDArray[np.float64], seed: int) -> Predict:
    """Fit a ridge regression on shares and log(share + `FLOOR`), its penalty chosen by leave-one-out."""
    from sklearn.linear_model import RidgeCV

    # Standardised, so that one penalty fits shares and logarithms alike.
    features = _features(shares)
    mean, spread = features.mean(axis=0), features.std(axis=0)
    spread[spread == 0] = 1.0
    model = RidgeCV(alphas=PENALTIES).fit((features - mean) / spread, losses)
    return lambda wanted: np.asarray(model.predict((_features(wanted) - mean) / spread))


def _features(shares: Shares) -> NDArray[np.float64]:
    return np.concatenate([shares, np.log(shares + FLOOR)], axis=1)


def fit_boosting(shares: Shares, losses: NDArray[np.float64], seed: int) -> Predict:
    from sklearn.ensemble import GradientBoostingRegressor

    model: Any = GradientBoostingRegressor(random_state=seed, **BOOSTING).fit(shares, losses)
    return lambda wanted: np.asarray(model.predict(wanted))


FITS: dict[str, Callable[[Shares, NDArray[np.float64], int], Predict]] = {
    "log_ridge": fit_log_ridge, "boosting": fit_boosting}
"""Name -> fit."""


@dataclass(frozen=True)
class Fitted:
    name: str
    """Which of `FITS` it is."""
    predict: Predict
    """The fit to all mixtures."""
    judged: dict[str, Judgement]
    """Fit -> how well it predicts mixtures that it was not fitted to (cross-validation)."""


def fit(shares: Shares, losses: NDArray[np.float64], name: FitName = "auto", seed: int = 0) -> Fitted:
    """Fit losses to mixtures.

    Args:
        shares: [mixtures, clusters].
        losses: [mixtures].
        name: the fit, or auto: the one of smallest error in cross-validation.
        seed: of folds and trees.
    """
    names = FITS if name == "auto" else (name,)
    judged = {one: cross_validated(shares, losses, one, seed) for one in names}
    # Judged by other folds, and then fitted to all: no measurement is wasted.
    best = min(judged, key=lambda one: judged[one].rmse)
    return Fitted(best, FITS[best](shares, losses, seed), judged)


def cross_validated(shares: Shares, losses: NDArray[np.float64], name: str, seed: int) -> Judgement:
    """Return how well each mixture's loss is predicted by a fit to those of the other folds."""
    # A permutation modulo the folds: all are of the same size, give or take one.
    folds = np.random.default_rng(seed).permutation(len(losses)) % min(NUM_FOLDS, len(losses))
    predicted = np.empty(len(losses))
    for fold in np.unique(folds):
        kept = folds != fold
        predicted[~kept] = FITS[name](shares[kept], losses[kept], seed)(shares[~kept])
    return judge(predicted, losses)


def judge(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> Judgement:
    """Compare predicted with measured losses, [mixtures] each, at least one."""
    rmse = float(np.sqrt(np.mean((predicted - measured) ** 2)))
    # A rank correlation of constants, or of two points, says nothing.
    if len(measured) < 3 or np.ptp(predicted) == 0 or np.ptp(measured) == 0:
        return Judgement(rmse, None)
    from scipy.stats import spearmanr

    return Judgement(rmse, float(spearmanr(predicted, measured).statistic))


# Mixtures that are drawn.


DECIMALS = 4
"""Of a share; a smaller one is none, and mixtures that differ by less are one."""
STRENGTHS = (0.3, 3.0)
"""Bounds of a Dirichlet distribution's mean concentration: below 1 most mixtures lack some clusters, above
they resemble the centre (RegMix, arXiv 2407.01492, draws over such a range as well)."""
NEAR_STRENGTH = 30.0
"""Concentration, for each cluster, of what is drawn around a good mixture."""
MIN_ALPHA = 1e-2
MIN_CENTRE = 1e-3
"""Share that a centre gives to what it lacks, so that a draw can bring it back."""


@dataclass(frozen=True)
class MixtureSpace:
    """The mixtures that are allowed."""

    names: tuple[str, ...]
    natural: Shares
    """[clusters] shares by tokens."""
    caps: Shares
    """[clusters] largest shares."""

    @property
    def uniform(self) -> Shares:
        return np.full(len(self.names), 1 / len(self.names))

    def allowed(self, shares: Shares) -> Shares:
        """Return mixtures within the caps, without shares below 10^-`DECIMALS`; what lies above a cap goes to
        the others in proportion.

        Args:
            shares: [mixtures, clusters], or [clusters] of a single one.
        """
        found = _capped(np.atleast_2d(shares), self.caps)
        # Traces go first; what they leave is then given to others, within their caps.
        found = np.where(found < 10.0**-DECIMALS, 0.0, found)
        room = self.caps - found
        held = np.where(found > 0, room, 0.0)
        missing = 1 - found.sum(axis=1, keepdims=True)
        # to those that have a share already, where they can take it
        room = np.where(held.sum(axis=1, keepdims=True) >= missing, held, room)
        allowed: Shares = found + missing * room / np.maximum(room.sum(axis=1, keepdims=True), 1e-300)
        return allowed


def space_of(names: Sequence[str], num_tokens: Sequence[int], budget_tokens: float,
             max_epochs: float) -> MixtureSpace:
    """Return the mixtures that a run of `budget_tokens` can read without passing over a cluster more than
    `max_epochs` times; a budget of 0 allows all.

    Raises:
        UserError: there are too few tokens for any.
    """
    tokens = np.array(num_tokens, np.float64)
    # A share's tokens over a cluster's own are its epochs.
    caps = np.minimum(1.0, max_epochs * tokens / budget_tokens) if budget_tokens else np.ones(len(tokens))
    if caps.sum() < 1:
        raise UserError(f"tokens = {budget_tokens:,.0f}: {len(names)} clusters have {int(tokens.sum()):,} "
                        f"tokens, which {max_epochs:g} epochs make {max_epochs * tokens.sum():,.0f}; lower "
                        "tokens, raise max_epochs, or add data")
    return MixtureSpace(tuple(names), tokens / tokens.sum(), caps)


def _capped(shares: Shares, caps: Shares) -> Shares:
    """Return mixtures below their caps (water filling); `caps` sum to 1 at least.

    Args:
        shares: [mixtures, clusters].
        caps: [clusters].
    """
    found = shares / shares.sum(axis=1, keepdims=True)
    full = np.zeros(found.shape, bool)
    # Water filling: what flows over a cap is spread by the weights of those that are not full, which may fill
    # more of them. Each round fills at least one cluster, so it ends.
    while (over := (found > caps + 1e-12) & ~full).any():
        full |= over
        rest = 1 - (caps * full).sum(axis=1, keepdims=True)
        weights = np.where(full, 0.0, found)
        # clusters that have nothing take what is left where all others are full
        weights = np.where(weights.sum(axis=1, keepdims=True) > 0, weights, np.where(full, 0.0, caps))
        scaled = rest * weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
        found = np.where(over.any(axis=1, keepdims=True), np.where(full, caps, scaled), found)
    return found


def draw(space: MixtureSpace, count: int, generator: np.random.Generator) -> Shares:
    """Return [count, clusters] mixtures: by turns around the natural one and around the uniform one, from
    sparse to close.

    Around the natural one alone a small cluster would hardly ever have a share that shows what it is worth.
    """
    # Uniform in the logarithm: as many sparse mixtures as close ones.
    low, high = (float(np.log(strength)) for strength in STRENGTHS)
    strengths = np.exp(generator.uniform(low, high, (count, 1)))
    centres = np.stack([space.natural, space.uniform])[np.arange(count) % 2]
    return space.allowed(_dirichlet(centres * strengths * len(space.names), generator))


def draw_near(space: MixtureSpace, centres: Shares, count: int, generator: np.random.Generator) -> Shares:
    """Return [count, clusters] mixtures close to `centres`, [n, clusters], taken in turn."""
    alphas = np.maximum(centres[np.arange(count) % len(centres)], MIN_CENTRE) * NEAR_STRENGTH
    return space.allowed(_dirichlet(alphas * len(space.names), generator))


def _dirichlet(alphas: Shares, generator: np.random.Generator) -> Shares:
    """Return a draw for each row of concentrations; such small ones are raised that every share would
    underflow."""
    found = generator.standard_gamma(np.maximum(alphas, MIN_ALPHA)) + 1e-300
    shares: Shares = found / found.sum(axis=1, keepdims=True)
    return shares


def distinct(shares: Shares, known: Shares) -> Shares:
    """Return the rows that are neither among `known` nor repeat an earlier one, in order."""
    # Rounded as shares are written: mixtures that a file would not tell apart are one.
    seen = {row.tobytes() for row in np.round(known, DECIMALS)}
    kept = []
    for row in shares:
        if (key := np.round(row, DECIMALS).tobytes()) not in seen:
            seen.add(key)
            kept.append(row)
    return np.array(kept).reshape(len(kept), shares.shape[1])
