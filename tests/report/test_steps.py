"""Step curves: restarts, downsampling, smoothing."""

from __future__ import annotations

import math
import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_sov.obs.events import final_steps
from megatron_sov.report.steps import Curve, StepTable, downsample, moving_mean

steps_in_any_order = st.lists(st.fixed_dictionaries(
    {"event": st.just("step"), "step": st.integers(0, 30), "loss": st.floats(0, 10)}, optional={
        "losses_by_source": st.dictionaries(st.sampled_from(["en", "ko"]), st.floats(0, 10), max_size=2)}),
                              max_size=60)


@given(steps_in_any_order)
def test_the_last_of_a_repeated_step_counts_as_in_final_steps(events: list[dict]) -> None:
    table = StepTable()
    for event in events:
        table.add(event)
    curves = table.curves()
    final = final_steps(events)
    if final:
        loss = curves[""]["loss"]
        assert loss.steps.tolist() == [e["step"] for e in final]
        assert loss.values.tolist() == [e["loss"] for e in final]
    for name in ("en", "ko"):
        expected = {e["step"]: e["losses_by_source"][name]
                    for e in final if name in e.get("losses_by_source", {})}
        found = curves["losses_by_source"].get(name)
        assert expected == (dict(zip(found.steps.tolist(), found.values.tolist(), strict=True))
                            if found else {})


def test_phases_are_what_the_steps_name() -> None:
    table = StepTable()
    # step 3 done again
    for step, phase in ((1, "a"), (2, "a"), (3, "b"), (4, "b"), (2, "a"), (3, "a"), (4, "b"), (5, "a")):
        table.add({"event": "step", "step": step, "phase": phase})
    assert table.phases() == [("a", 1, 3), ("b", 4, 4), ("a", 5, 5)]
    assert StepTable().phases() == []


def test_numbers_spelt_as_text_are_read() -> None:
    table = StepTable()
    for step, loss in enumerate((1.5, "nan", "inf", "-inf", None)):
        table.add({"event": "step", "step": step, "loss": loss})
    loss = table.curves()[""]["loss"]
    assert (loss.values[0] == 1.5 and math.isnan(loss.values[1])
            and loss.values[2:].tolist() == [math.inf, -math.inf])
    assert loss.steps.tolist() == [0, 1, 2, 3]  # a step without a loss has no point
    assert loss.finite().steps.tolist() == [0]


def test_downsampling_keeps_every_spike_of_a_long_curve() -> None:
    noise = np.random.default_rng(0)
    values = noise.normal(size=300_000) * 0.01
    spikes = random.Random(0).sample(range(300_000), 100)
    values[spikes] = 5 + np.arange(100)
    drawn = downsample(Curve("loss", np.arange(300_000) + 1, values))
    assert len(drawn.steps) <= 2000
    assert drawn.steps[0] == 1 and drawn.steps[-1] == 300_000
    assert np.all(np.diff(drawn.steps) > 0)
    assert drawn.values.max() == 104 and drawn.values.min() == values.min()
    for spike in spikes:  # a spike may only hide behind a higher one in its own stretch of 300 steps
        near = np.abs(drawn.steps - 1 - spike) <= 301
        assert drawn.values[near].max() >= values[spike]


def test_short_curves_are_not_touched() -> None:
    curve = Curve("loss", np.arange(2000), np.arange(2000.0))
    assert downsample(curve) is curve
    assert len(downsample(Curve("loss", np.arange(2001), np.arange(2001.0))).steps) <= 2000


def test_moving_mean_agrees_with_convolution() -> None:
    values = np.random.default_rng(1).normal(size=101)
    smooth = moving_mean(Curve("loss", np.arange(101), values), 7)
    np.testing.assert_allclose(smooth.values[3:-3], np.convolve(values, np.ones(7) / 7, mode="valid"))
    np.testing.assert_allclose(smooth.values[0], values[:4].mean())
