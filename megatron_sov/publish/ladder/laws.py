"""Laws of loss over size, fitted to a few runs, with what they do not know.

`PowerLaw`, for models that all saw as many tokens per parameter: L = E + A N^-a.  Four to eight losses say
little about three numbers, so none is picked: with flat priors on the loss of the largest model and on the
fall from the smallest to it, a prior on a that is flat over its logarithm, and Jeffreys' prior on the
noise, the posterior given a is a linear regression's, and a is summed over on a grid.  Draws with E or A
below zero are left out.

`ParametricLaw`, for ladders that vary the tokens per parameter as well: L = E + A N^-a + B D^-b, approach 3
of Hoffmann et al. (arXiv 2203.15556): Huber's loss of log L, minimised by L-BFGS from many starts; summed
and not averaged over the runs, since an average ends the search too early (Besiroglu et al., arXiv
2404.10102).  Its interval is that of refits to drawn residuals.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sov.base.errors import UserError, how_to_install

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
EXPONENTS = (0.02, 2.0)
NUM_EXPONENTS = 2000
NUM_DRAWS = 8000
LEAST_DRAWS = 200
"""Draws of a law with positive terms that must be left."""
LEAST_SHARE_FALLING = 0.9
"""Share of draws in which losses fall with size, at least: others have no such law."""
NOISE_FLOOR = 1e-4
"""Least spread of losses around a law, as a share of them: what one seed tells cannot be more exact."""
LEAST_POINTS = {"power": 4, "parametric": 7}
HUBER_DELTA = 1e-3
NUM_STARTS = 12
NUM_REFITS = 100
SEED = 20240322


@dataclass(frozen=True)
class Prediction:
    """What a law says of a model that was not trained."""

    loss: float
    low: float
    """Lower end of the interval in which the loss of one run lies with probability `CONFIDENCE`."""
    high: float


class PowerLaw:
    """L = E + A N^-a, as a cloud of laws that the losses do not refute."""

    name = "E + A N^-a"

    def __init__(self, num_params: Sequence[float], losses: Sequence[float]) -> None:
        """Fit.

        Args:
            num_params: N of each run, not all equal.
            losses: of each.

        Raises:
            UserError: they are too few, or do not fall with size.
        """
        n, y = np.asarray(num_params, float), np.asarray(losses, float)
        _refuse_too_few(len(n), "power")
        self._small, self._large = n.min(), n.max()
        exponents = np.geomspace(*EXPONENTS, NUM_EXPONENTS)
        z = self._z(n, exponents[:, None])
        zbar, ybar = z.mean(1), y.mean()
        spread = ((z - zbar[:, None])**2).sum(1)
        falls = ((z - zbar[:, None]) * (y - ybar)).sum(1) / spread
        levels = ybar - falls * zbar
        rss = ((y - levels[:, None] - falls[:, None] * z)**2).sum(1) + len(n) * (NOISE_FLOOR * ybar)**2
        freedom = len(n) - 2
        log_weight = -0.5 * np.log(len(n) * spread) - 0.5 * freedom * np.log(rss)
        weight = np.exp(log_weight - log_weight.max())
        rng = np.random.default_rng(SEED)
        drawn = rng.choice(NUM_EXPONENTS, NUM_DRAWS, p=weight / weight.sum())
        noise = np.sqrt(rss[drawn] / rng.chisquare(freedom, NUM_DRAWS))
        fall = falls[drawn] + noise / np.sqrt(spread[drawn]) * rng.standard_normal(NUM_DRAWS)
        level = ybar - fall * zbar[drawn] + noise / np.sqrt(len(n)) * rng.standard_normal(NUM_DRAWS)
        a = exponents[drawn]
        scale = fall / (self._small**-a - self._large**-a)
        floor = level - scale * self._large**-a
        kept = (scale > 0) & (floor >= 0)
        if kept.sum() < LEAST_DRAWS or (fall > 0).mean() < LEAST_SHARE_FALLING:
            raise UserError(f"the losses {', '.join(f'{v:.4f}' for v in y)} do not fall with size as E + A "
                            "N^-a would; look at the runs' reports: a rate that is too high, or data that "
                            "are gone through too often, breaks a ladder")
        self._a, self._level, self._fall, self._noise = (v[kept] for v in (a, level, fall, noise))
        self._scale, self._floor = scale[kept], floor[kept]
        self._rng_state = rng.bit_generator.state

    def _z(self, n: Any, a: Any) -> Any:
        """Return N^-a, from 0 at the largest model to 1 at the smallest: so priors do not depend on a."""
        small, large = self._small**-a, self._large**-a
        return (np.asarray(n, float)**-a - large) / (small - large)

    def curve(self, num_params: float) -> Prediction:
        """Return the law itself at a size, without the noise of a run."""
        return _of_draws(self._level + self._fall * self._z(num_params, self._a))

    def predict(self, num_params: float, num_tokens: float = 0.0) -> Prediction:
        """Return the loss of a run of that size; the tokens follow from it."""
        rng = np.random.default_rng()
        rng.bit_generator.state = self._rng_state
        middle = self._level + self._fall * self._z(num_params, self._a)
        return _of_draws(middle + self._noise * rng.standard_normal(len(middle)))

    def parameters(self) -> dict[str, Prediction]:
        """Return E, A and a, each with its own interval."""
        return {"E": _of_draws(self._floor), "A": _of_draws(self._scale), "a": _of_draws(self._a)}


class ParametricLaw:
    """L = E + A N^-a + B D^-b."""

    name = "E + A N^-a + B D^-b"

    def __init__(self, num_params: Sequence[float], num_tokens: Sequence[float],
                 losses: Sequence[float]) -> None:
        """Fit.

        Args:
            num_params: N of each run.
            num_tokens: D of each run, not in one proportion to N.
            losses: of each.

        Raises:
            UserError: they are too few.
        """
        self._logs = np.log(np.asarray(num_params, float)), np.log(np.asarray(num_tokens, float))
        y = np.log(np.asarray(losses, float))
        _refuse_too_few(len(y), "parametric")
        self._theta = min((_minimise(start, *self._logs, y) for start in _starts(*self._logs, y)),
                          key=lambda found: found[0])[1]
        fitted = _log_loss(self._theta, *self._logs)
        residuals = (y - fitted) * np.sqrt(len(y) / (len(y) - 5))
        rng = np.random.default_rng(SEED)
        self._thetas = np.array([_minimise(self._theta, *self._logs, fitted + rng.choice(
            residuals, len(y)))[1] for _ in range(NUM_REFITS)])
        self._noise = rng.choice(residuals, NUM_REFITS)

    def predict(self, num_params: float, num_tokens: float) -> Prediction:
        """Return the loss of a run of that size on so many tokens."""
        at = np.log([num_params]), np.log([num_tokens])
        drawn = np.array([_log_loss(theta, *at)[0] for theta in self._thetas])
        spread = _of_draws(np.exp(drawn + self._noise))
        return Prediction(float(np.exp(_log_loss(self._theta, *at)[0])), spread.low, spread.high)

    def curve(self, num_params: float, num_tokens: float) -> Prediction:
        """Return the law itself, without the noise of a run."""
        at = np.log([num_params]), np.log([num_tokens])
        return _of_draws(np.exp([_log_loss(theta, *at)[0] for theta in self._thetas]))

    def parameters(self) -> dict[str, Prediction]:
        """Return E, A, a, B and b, each with its own interval."""
        found = {}
        for i, (name, is_log) in enumerate((("A", True), ("B", True), ("E", True), ("a", False),
                                            ("b", False))):
            values = np.exp(self._thetas[:, i]) if is_log else self._thetas[:, i]
            best = float(np.exp(self._theta[i]) if is_log else self._theta[i])
            spread = _of_draws(values)
            found[name] = Prediction(best, spread.low, spread.high)
        return found


def _refuse_too_few(count: int, law: str) -> None:
    if count < LEAST_POINTS[law]:
        raise UserError(f"a law of this form needs {LEAST_POINTS[law]} runs at least, and there are {count}; "
                        "add --sizes")


def _of_draws(values: Any) -> Prediction:
    low, middle, high = np.quantile(values, [(1 - CONFIDENCE) / 2, 0.5, (1 + CONFIDENCE) / 2])
    return Prediction(float(middle), float(low), float(high))


def _terms(theta: Floats, log_n: Floats, log_d: Floats) -> Floats:
    """Return the logarithms of the three terms, [3, runs]; theta is log A, log B, log E, a, b."""
    return np.stack([theta[0] - theta[3] * log_n, theta[1] - theta[4] * log_d,
                     np.full_like(log_n, theta[2])])


def _log_loss(theta: Floats, log_n: Floats, log_d: Floats) -> Floats:
    return np.asarray(np.logaddexp.reduce(_terms(theta, log_n, log_d), axis=0))


def _objective(theta: Floats, log_n: Floats, log_d: Floats, y: Floats) -> tuple[float, Floats]:
    """Return the sum of Huber's loss, and its gradient."""
    terms = _terms(theta, log_n, log_d)
    fitted = np.logaddexp.reduce(terms, axis=0)
    error = fitted - y
    small = np.abs(error) <= HUBER_DELTA
    value = np.where(small, error**2 / 2, HUBER_DELTA * (np.abs(error) - HUBER_DELTA / 2)).sum()
    slope = np.where(small, error, HUBER_DELTA * np.sign(error))
    shares = np.exp(terms - fitted) * slope
    gradient = np.array([shares[0].sum(), shares[1].sum(), shares[2].sum(), -(shares[0] * log_n).sum(),
                         -(shares[1] * log_d).sum()])
    scale = 1 / HUBER_DELTA**2  # the search ends by steps of the objective's own size
    return float(value * scale), gradient * scale


def _minimise(start: Floats, log_n: Floats, log_d: Floats, y: Floats) -> tuple[float, Floats]:
    try:
        from scipy.optimize import minimize
    except ImportError as e:
        raise UserError(f"a law of several --tokens-per-param needs scipy, which cannot be imported ({e}); "
                        f"{how_to_install('data')}, or give one --tokens-per-param") from None

    found = minimize(_objective, start, (log_n, log_d, y), "L-BFGS-B", jac=True, bounds=[
        (None, None), (None, None), (None, None), (0.0, 3.0), (0.0, 3.0)],
        options={"maxiter": 2000, "ftol": 1e-12, "gtol": 1e-8})
    return float(found.fun), np.asarray(found.x)


def _starts(log_n: Floats, log_d: Floats, y: Floats) -> list[Floats]:
    """Return the best places of a grid to begin at: exponents, a share of the loss that cannot be learned,
    and how the rest is shared by the other terms."""
    grid = []
    for a, b, floor, share in itertools.product((0.1, 0.3, 0.6, 1.0), (0.1, 0.3, 0.6, 1.0),
                                                (0.2, 0.5, 0.8, 0.95), (0.2, 0.5, 0.8)):
        rest = np.log(np.exp(y.min()) * (1 - floor))
        grid.append(np.array([np.log(share) + rest + a * log_n.max(), np.log(1 - share) + rest
                              + b * log_d.max(), np.log(floor) + y.min(), a, b]))
    return sorted(grid, key=lambda theta: _objective(theta, log_n, log_d, y)[0])[:NUM_STARTS]
