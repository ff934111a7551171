"""What a ladder's runs gave, the law through it and its predictions: RUN/ladder.json."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from megatron_sov.base.artifacts import atomic_write, to_json
from megatron_sov.base.errors import UserError, how_to_install
from megatron_sov.base.figures import format_count
from megatron_sov.base.pages.page import (
    Chapter, Chart, PageSection, PageTable, chart, colour, plain, render as render_page)
from megatron_sov.publish.ladder.family import Member, size_of
from megatron_sov.runs.folder import COMPLETION
from megatron_sov.runs.obs.events import EVENTS, final_steps, read_events
from megatron_sov.runs.obs.figures import number

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
    low: float | None
    """Lower end of the interval in which the loss of one run lies with probability `CONFIDENCE`; None: the
    runs are not in the regime of the law, which has no interval for them."""
    high: float | None


class PowerLaw:
    """L = E + A N^-a, as a cloud of laws that the losses do not refute; for models that all saw as many
    tokens per parameter.

    Four to eight losses say little about three numbers, so none is picked: with flat priors on the loss of
    the largest model and on the fall from the smallest to it, a prior on a that is flat over its logarithm,
    and Jeffreys' prior on the noise, the posterior given a is a linear regression's, and a is summed over on
    a grid.  Draws with E or A below zero are left out.
    """

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
        self.in_regime = falls_slow_down(n, n, y)
        self._small, self._large = n.min(), n.max()
        # even in log a: that is the flat prior over its logarithm
        exponents = np.geomspace(*EXPONENTS, NUM_EXPONENTS)
        # [exponents, runs]: for each a the law is a line in z
        z = self._z(n, exponents[:, None])
        zbar, ybar = z.mean(1), y.mean()
        spread = ((z - zbar[:, None])**2).sum(1)
        falls = ((z - zbar[:, None]) * (y - ybar)).sum(1) / spread
        levels = ybar - falls * zbar
        # the floor keeps a perfect fit of few points from claiming no noise at all
        rss = ((y - levels[:, None] - falls[:, None] * z)**2).sum(1) + len(n) * (NOISE_FLOOR * ybar)**2
        # two coefficients of the line are estimated
        freedom = len(n) - 2
        # marginal likelihood of a: level, fall and noise are integrated out
        log_weight = -0.5 * np.log(len(n) * spread) - 0.5 * freedom * np.log(rss)
        # shifted by the largest, or all would underflow
        weight = np.exp(log_weight - log_weight.max())
        rng = np.random.default_rng(SEED)
        drawn = rng.choice(NUM_EXPONENTS, NUM_DRAWS, p=weight / weight.sum())
        # scaled inverse chi-square: what Jeffreys' prior gives for the variance
        noise = np.sqrt(rss[drawn] / rng.chisquare(freedom, NUM_DRAWS))
        fall = falls[drawn] + noise / np.sqrt(spread[drawn]) * rng.standard_normal(NUM_DRAWS)
        # mean and slope are independent when z is centred, so they are drawn apart
        level = ybar - fall * zbar[drawn] + noise / np.sqrt(len(n)) * rng.standard_normal(NUM_DRAWS)
        a = exponents[drawn]
        # back from (level, fall) to A and E
        scale = fall / (self._small**-a - self._large**-a)
        floor = level - scale * self._large**-a
        kept = (scale > 0) & (floor >= 0)
        if kept.sum() < LEAST_DRAWS or (fall > 0).mean() < LEAST_SHARE_FALLING:
            raise UserError(f"the losses {', '.join(f'{v:.4f}' for v in y)} do not fall with size as E + A "
                            "N^-a would; look at the runs' reports: a rate that is too high, or data that "
                            "are gone through too often, breaks a ladder")
        self._a, self._level, self._fall, self._noise = (v[kept] for v in (a, level, fall, noise))
        self._scale, self._floor = scale[kept], floor[kept]
        # each prediction draws the same noise, so asking twice gives the same interval
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
        return _told(_of_draws(middle + self._noise * rng.standard_normal(len(middle))), self.in_regime)

    def parameters(self) -> dict[str, Prediction]:
        """Return E, A and a, each with its own interval."""
        return {"E": _of_draws(self._floor), "A": _of_draws(self._scale), "a": _of_draws(self._a)}


class ParametricLaw:
    """L = E + A N^-a + B D^-b, for ladders that vary the tokens per parameter as well: approach 3 of Hoffmann
    et al. (arXiv 2203.15556).

    Huber's loss of log L, minimised by L-BFGS from many starts; summed and not averaged over the runs, since
    an average ends the search too early (Besiroglu et al., arXiv 2404.10102).  The interval is that of refits
    to drawn residuals.
    """

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
        n, d = np.asarray(num_params, float), np.asarray(num_tokens, float)
        self._logs = np.log(n), np.log(d)
        y = np.log(np.asarray(losses, float))
        _refuse_too_few(len(y), "parametric")
        self.in_regime = falls_slow_down(n, d, np.exp(y))
        # the objective has many minima, and a search ends in the nearest one
        self._theta = min((_minimise(start, *self._logs, y) for start in _starts(*self._logs, y)),
                          key=lambda found: found[0])[1]
        fitted = _log_loss(self._theta, *self._logs)
        # residuals of a fit are too small: 5 parameters took their share
        residuals = (y - fitted) * np.sqrt(len(y) / (len(y) - 5))
        rng = np.random.default_rng(SEED)
        # a refit starts at the best fit, so it stays in its basin
        self._thetas = np.array([_minimise(self._theta, *self._logs, fitted + rng.choice(
            residuals, len(y)))[1] for _ in range(NUM_REFITS)])
        self._noise = rng.choice(residuals, NUM_REFITS)

    def predict(self, num_params: float, num_tokens: float) -> Prediction:
        """Return the loss of a run of that size on so many tokens."""
        at = np.log([num_params]), np.log([num_tokens])
        drawn = np.array([_log_loss(theta, *at)[0] for theta in self._thetas])
        spread = _of_draws(np.exp(drawn + self._noise))
        return _told(Prediction(float(np.exp(_log_loss(self._theta, *at)[0])), spread.low, spread.high),
                     self.in_regime)

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


def falls_slow_down(num_params: Floats, num_tokens: Floats, losses: Floats) -> bool:
    """Return whether losses fall less and less from size to size: where they do not, no law of these forms
    holds yet.

    Each term of a law is convex over log N, at equal tokens per parameter.  So the square's coefficient of a
    parabola through the losses over log N is positive; of several ratios the mean counts.

    Args:
        num_params: N of each run.
        num_tokens: D of each run; a ratio D / N with fewer than three sizes says nothing.
        losses: of each.
    """
    ratios = np.round(num_tokens / num_params, 3)
    groups = [ratios == ratio for ratio in np.unique(ratios)]
    bends = [np.polyfit(np.log(num_params[g]), losses[g], 2)[0] for g in groups if g.sum() >= 3]
    return not bends or bool(np.mean(bends) > 0)


def _told(found: Prediction, in_regime: bool) -> Prediction:
    return found if in_regime else Prediction(found.loss, None, None)


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
    # softmax of the terms: the gradient of logaddexp
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
        # logarithms are free; exponents outside this range are no law
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


FILE = "ladder.json"
FORMAT_VERSION = 1
Law = PowerLaw | ParametricLaw


@dataclass(frozen=True)
class Point:
    name: str
    num_params: int
    num_tokens: int
    loss: float
    """Held-out loss at its end, in nats per token, over all held-out tokens."""


@dataclass(frozen=True)
class LadderText:
    """A prediction beside what came of it."""

    name: str
    num_params: int
    num_tokens: int
    predicted: Prediction
    made_s: float
    """Unix time at which it was first written: before its run began, unless that stood there already."""
    measured: float | None = None
    """Held-out loss of its run; None: there is none."""

    @property
    def error(self) -> float | None:
        return None if self.measured is None else self.predicted.loss / self.measured - 1

    @property
    def inside(self) -> bool | None:
        low, high = self.predicted.low, self.predicted.high
        return None if self.measured is None or low is None or high is None else low <= self.measured <= high


def is_complete(run: Path) -> bool:
    return (run / COMPLETION).is_file()


def final_loss(run: Path) -> float:
    """Return a complete run's held-out loss at its end: the mean over the held-out tokens of all sources.

    Raises:
        UserError: nothing was held out, or the loss is no number.
    """
    evals = final_steps(list(read_events(run / EVENTS)), "eval")
    rows = evals[-1].get("heldout", {}).values() if evals else []
    tokens = sum(number(row.get("tokens")) for row in rows)
    if not tokens > 0:
        raise UserError(f"{run}: has no held-out loss; pack the data with --heldout, and begin the ladder "
                        "anew")
    loss = sum(number(row.get("loss")) * number(row.get("tokens")) for row in rows) / tokens
    if not math.isfinite(loss):
        raise UserError(f"{run}: ended with a held-out loss of {loss}; look at its report, lower --set "
                        "optim.lr, and begin the ladder anew")
    return loss


def points(folder: Path, members: Sequence[Member]) -> list[Point]:
    """Return the runs that are complete.

    Raises:
        UserError: as `final_loss`.
    """
    return [Point(m.name, m.num_params, m.num_tokens, final_loss(folder / m.name))
            for m in members if is_complete(folder / m.name)]


def fitted(found: Sequence[Point]) -> Law:
    """Return the law through runs: that of size alone where all saw as many tokens per parameter.

    Raises:
        UserError: they are too few, or have no such law.
    """
    params, tokens, losses = ([getattr(p, name) for p in found]
                              for name in ("num_params", "num_tokens", "loss"))
    # rounded: tokens are whole, so equal ratios differ in their last digits
    ratios = {round(p.num_tokens / p.num_params, 3) for p in found}
    return ParametricLaw(params, tokens, losses) if len(ratios) > 1 else PowerLaw(params, losses)


def tell(law: Law, member: Member, folder: Path) -> LadderText:
    """Return the prediction for a model, with what its run gave where it is complete; one that was written
    before and is the same keeps its time."""
    predicted = law.predict(member.num_params, member.num_tokens)
    made_s = time.time()
    for earlier in read(folder).get("predictions", []):
        if earlier["name"] == member.name and earlier["predicted"] == asdict(predicted):
            made_s = earlier["made_s"]
    run = folder / member.name
    return LadderText(member.name, member.num_params, member.num_tokens, predicted, made_s,
                      final_loss(run) if is_complete(run) else None)


def read(folder: Path) -> dict[str, Any]:
    """Return what the folder's file holds; nothing where there is none.

    Raises:
        UserError: it is damaged, or of a newer version.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        version = int(found["format_version"])
        for told in found.get("predictions", []):
            if not {"name", "predicted", "made_s"} <= set(told) or not math.isfinite(told["made_s"]):
                raise ValueError(f"a prediction in it is {str(told)[:80]}")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({e}); delete it, it is written anew from the runs") from None
    if version > FORMAT_VERSION:
        raise UserError(f"{file}: has format version {version}, and this version reads {FORMAT_VERSION}; "
                        "use the newer megatron-sov")
    return dict(found)


def write(folder: Path, recipe: str, rates: str, found: Sequence[Point], law: Law,
          told: Sequence[LadderText]) -> None:
    atomic_write(folder / FILE, to_json({
        "format_version": FORMAT_VERSION, "kind": "ladder", "recipe": recipe, "rates": rates,
        "points": list(found),
        "law": {"form": law.name, "parameters": law.parameters(), "in_regime": law.in_regime},
        "predictions": [{**asdict(t), "error": t.error, "inside": t.inside} for t in told]}))


# The page of a ladder: its losses, the law through them, and predictions beside what came of them.


OUTSIDE = ("The losses fall faster from size to size, where a law of this form falls more slowly: these runs "
           "are not in its regime yet. So the prediction has no interval, and may be far off. Take larger "
           "--sizes, or more --tokens-per-param.")
"""What is said of such a ladder."""
NUM_POINTS = 60
"""Sizes at which the law is drawn."""


def page(recipe: str, rates: str, members: Sequence[Member], found: Sequence[Point], law: Law,
         told: Sequence[LadderText]) -> str:
    sections = [
        PageSection("Loss over size", charts=[_chart(found, law, told)], tables=law_tables(law),
                    text="Held-out loss at the end of each run. " + (
                        f"The band is where the law lies with probability {CONFIDENCE:.0%}; a prediction's "
                        "bar is where one run's loss lies." if law.in_regime else OUTSIDE)),
        PageSection("Predictions", tables=[prediction_table(told)],
                    text="Each was written before its run began, unless the run was there already."),
        PageSection("Models", tables=[member_table(members, found)],
                    text=f"Sizes count the parameters of the trunk that one token meets; rates: {rates}.")]
    return render_page("Scaling ladder", recipe, "",
                       [Chapter(recipe, f"{len(members)} runs", [], sections)])


def member_table(members: Sequence[Member], found: Sequence[Point]) -> PageTable:
    losses = {p.name: f"{p.loss:.4f}" for p in found}
    rows = []
    for m in members:
        c, o, t = m.config.model, m.config.optim, m.config.train
        ffn = f"{c.num_experts} x {c.expert_ffn_dim}" if c.num_experts else f"{c.dense_ffn_dim}"
        scale = o.groups[0].lr_scale if o.groups else 1.0
        rows.append([m.name, format_count(size_of(c)), f"{c.hidden_size} x {c.num_layers}",
                     f"{c.num_heads}/{c.num_kv_heads} of {c.head_dim}", ffn, format_count(m.num_tokens),
                     f"{m.config.num_steps():,} of {t.global_batch_size}", f"{o.lr:.3g}",
                     f"{o.lr * scale:.3g}", losses.get(m.name, "–")])
    return PageTable(["run", "parameters", "width x layers", "heads", "inner width", "tokens",
                      "steps of samples", "rate", "rate of matrices", "held-out loss"], rows)


def prediction_table(told: Sequence[LadderText]) -> PageTable:
    rows = [[t.name, format_count(t.num_params), format_count(t.num_tokens), spelled(t.predicted),
             time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(t.made_s)),
             "–" if t.measured is None else f"{t.measured:.4f}",
             "–" if t.error is None else f"{t.error:+.2%}",
             {None: "–", True: "inside", False: "outside"}[t.inside]] for t in told]
    return PageTable(["run", "parameters", "tokens", f"predicted loss ({CONFIDENCE:.0%} interval)", "written",
                      "measured", "error", "interval"], rows)


def law_tables(law: Law) -> list[PageTable]:
    """Return the law's parameters, each with its own interval."""
    rows = [[name, spelled(value)] for name, value in law.parameters().items()]
    return [PageTable([law.name, f"median ({CONFIDENCE:.0%} interval)"], rows)]


def spelled(value: Prediction) -> str:
    if value.low is None or value.high is None:
        return f"{value.loss:.4g} (no interval)"
    return f"{value.loss:.4g} ({value.low:.4g} to {value.high:.4g})"


def _chart(found: Sequence[Point], law: Law, told: Sequence[LadderText]) -> Chart:
    figure = go.Figure()
    sizes = [p.num_params for p in found] + [t.num_params for t in told]
    if isinstance(law, PowerLaw):
        x = np.geomspace(min(sizes), max(sizes), NUM_POINTS)
        band = [law.curve(float(n)) for n in x]
        if law.in_regime:
            figure.add_trace(go.Scatter(
                x=np.concatenate([x, x[::-1]]), y=[b.low for b in band] + [b.high for b in band][::-1],
                fill="toself", line={"width": 0}, fillcolor="var(--band)", name="interval of the law",
                hoverinfo="skip"))
        figure.add_trace(go.Scatter(x=x, y=[b.loss for b in band], mode="lines", name=law.name,
                                    line={"color": colour(0), "width": 1.6}))
    figure.add_trace(go.Scatter(x=[p.num_params for p in found], y=[p.loss for p in found], mode="markers",
                                name="runs", marker={"color": colour(0), "size": 8},
                                text=[plain(p.name) for p in found]))
    figure.add_trace(go.Scatter(
        x=[t.num_params for t in told], y=[t.predicted.loss for t in told], mode="markers",
        name="predicted", marker={"color": colour(1), "size": 8, "symbol": "diamond"},
        error_y={"type": "data", "symmetric": False, "color": colour(1),
                 "array": [(t.predicted.high or t.predicted.loss) - t.predicted.loss for t in told],
                 "arrayminus": [t.predicted.loss - (t.predicted.low or t.predicted.loss) for t in told]}))
    measured = [t for t in told if t.measured is not None]
    if measured:
        figure.add_trace(go.Scatter(
            x=[t.num_params for t in measured], y=[t.measured for t in measured], mode="markers",
            name="measured", marker={"color": colour(2), "size": 9, "symbol": "x"}))
    figure.update_layout(xaxis={"title": "parameters", "type": "log"},
                         yaxis={"title": "held-out loss (nats per token)"})
    return chart(figure, "Held-out loss over the parameters of the trunk that one token meets.",
                 height_px=380)
