"""Fits of losses to mixtures: as scikit-learn alone does it, better than guessing, judged on what they have
not seen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from data_prep.mixture.fitting import (
    DECIMALS, FLOOR, PENALTIES, MixtureSpace, Shares, cross_validated, distinct, draw, draw_near, fit,
    fit_log_ridge, judge, space_of)
from megatron_sov.base.errors import UserError

SPACE = space_of("abcde", [50, 20, 10, 10, 10], 0, 4)


def law(shares: Shares) -> NDArray[np.float64]:
    """A loss as mixing laws have it (arXiv 2403.16952), c + k exp(t . r), and diminishing returns."""
    return 1.5 + 0.5 * np.exp(-shares @ np.array([2.0, 0.2, 0.5, 0.0, 1.0])) + 0.02 / (shares[:, 2] + 0.05)


def sample(count: int, seed: int, noise: float = 0.003) -> tuple[Shares, NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    shares = draw(SPACE, count, generator)
    return shares, law(shares) + generator.normal(0, noise, count)


def test_the_ridge_is_scikit_learns_on_shares_and_their_logarithms() -> None:
    shares, losses = sample(30, 0)
    features = FunctionTransformer(lambda x: np.concatenate([x, np.log(x + FLOOR)], axis=1))
    theirs = make_pipeline(features, StandardScaler(), RidgeCV(alphas=PENALTIES)).fit(shares, losses)
    fresh, _ = sample(50, 1)
    assert fit_log_ridge(shares, losses, 0)(fresh) == pytest.approx(theirs.predict(fresh), abs=1e-9)


def test_of_tens_of_mixtures_the_ridge_knows_more_than_trees() -> None:
    shares, losses = sample(30, 0)
    fresh = draw(SPACE, 300, np.random.default_rng(9))
    found = fit(shares, losses)
    assert found.name == "log_ridge"
    assert found.judged["log_ridge"].rmse < found.judged["boosting"].rmse
    judged = {name: judge(fit(shares, losses, name).predict(fresh), law(fresh)) for name in found.judged}
    assert judged["log_ridge"].rmse < judged["boosting"].rmse < np.std(law(fresh))
    assert judged["log_ridge"].spearman is not None and judged["log_ridge"].spearman > 0.9


def test_cross_validation_judges_what_was_not_fitted() -> None:
    shares, losses = sample(40, 3, noise=0.0)
    assert cross_validated(shares, losses, "log_ridge", 0).rmse < 0.25 * np.std(losses)
    noise = np.random.default_rng(0).normal(size=40)
    guessing = judge(cross_val_predict(DummyRegressor(), shares, noise, cv=KFold(5)), noise)
    found = cross_validated(shares, noise, "log_ridge", 0)
    assert found.rmse > 0.8 * guessing.rmse and abs(found.spearman or 0) < 0.5


def test_judgements() -> None:
    perfect = judge(np.array([1.0, 2, 3]), np.array([10.0, 20, 30]))
    assert perfect.spearman == 1.0 and perfect.rmse == pytest.approx(np.sqrt((81 + 324 + 729) / 3))
    assert judge(np.array([1.0, 1, 1]), np.array([1.0, 2, 3])).spearman is None
    assert judge(np.array([1.0, 2]), np.array([1.0, 2])).describe() == (
        "within 0.0000 (rmse), rank correlation none (too few, or all alike)")


NAMES = ("a", "b", "c", "d")
FREE = space_of(NAMES, [100, 10, 1000, 5], 0, 4)
CAPPED = space_of(NAMES, [100, 10, 1000, 5], 1000, 4)


def test_what_a_run_can_read_caps_shares() -> None:
    assert FREE.natural == pytest.approx(np.array([100, 10, 1000, 5]) / 1115)
    assert FREE.caps.tolist() == [1] * 4
    assert CAPPED.caps == pytest.approx([0.4, 0.04, 1.0, 0.02])
    with pytest.raises(UserError, match=r"tokens = 5,000: 4 clusters have 1,115 tokens, which 4 epochs make"):
        space_of(NAMES, [100, 10, 1000, 5], 5000, 4)


@pytest.mark.parametrize("space", [FREE, CAPPED])
def test_draws_are_mixtures_within_caps(space: MixtureSpace) -> None:
    generator = np.random.default_rng(0)
    for found in (draw(space, 200, generator), draw_near(space, np.eye(4), 200, generator)):
        assert found.shape == (200, 4) and found.min() >= 0
        assert found.sum(axis=1) == pytest.approx(1.0, abs=1e-9)
        assert (found <= space.caps + 1e-9).all()
        assert space is CAPPED or ((found == 0) | (found >= 10**-DECIMALS)).all()


def test_the_same_seed_draws_the_same() -> None:
    one, other = (draw(FREE, 20, np.random.default_rng(7)) for _ in range(2))
    assert (one == other).all() and len(distinct(one, one[:5])) == 15
    assert draw(FREE, 0, np.random.default_rng(7)).shape == (0, 4)


def test_small_clusters_are_drawn_too() -> None:
    """Around the natural mixture alone cluster d, of half a percent, would hardly ever be seen."""
    found = draw(FREE, 400, np.random.default_rng(1))
    assert (found[:, 3] > 0.1).mean() > 0.2
    assert abs(found[::2].mean(axis=0) - FREE.natural).max() < 0.05
    assert abs(found[1::2].mean(axis=0) - 0.25).max() < 0.05


def test_draws_near_a_mixture_are_nearer_than_others() -> None:
    centre = np.array([[0.7, 0.2, 0.1, 0.0]])
    generator = np.random.default_rng(2)
    near = abs(draw_near(FREE, centre, 100, generator) - centre).sum(axis=1).mean()
    assert near < 0.15 < abs(draw(FREE, 100, generator) - centre).sum(axis=1).mean() / 2


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda x: sum(x) > 1e-3),
       st.lists(st.floats(0.25, 1), min_size=4, max_size=4))
def test_what_is_above_a_cap_goes_to_the_others_in_proportion(raw: list[float], caps: list[float]) -> None:
    space = space_of(NAMES, [round(1000 * cap) for cap in caps], 1000, 1)
    wanted = np.array(raw) / sum(raw)
    [found] = space.allowed(wanted)
    # what is below its cap keeps its proportion to the others that are
    free = (found < space.caps - 1e-3) & (wanted > 1e-2)
    ratios = found[free] / wanted[free]
    assert found.sum() == pytest.approx(1.0) and (found <= space.caps + 1e-9).all()
    assert np.ptp(ratios) < 0.05 * ratios.max() if free.any() else True
