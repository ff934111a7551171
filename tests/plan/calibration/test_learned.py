"""What a team's own runs teach: factors on the shipped parameters, a processor's speed, and their file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_sov import recipes
from megatron_sov.clusters.chips import chip
from megatron_sov.config import apply_settings
from megatron_sov.errors import UserError
from megatron_sov.models.count import train_flops_per_token
from megatron_sov.plan.calibration.calibrate import FACTORS, NOISE, fit, scaled, solved
from megatron_sov.plan.calibration.local_machine import LocalMachine, Passes, learn, passes_of
from megatron_sov.plan.calibration.parameters_file import Learned, as_json, read_learned, shipped
from megatron_sov.plan.speed.parameters import Parameters, default


def test_what_is_written_is_read(tmp_path: Path) -> None:
    learned = Learned(default(), {"AMD EPYC": LocalMachine(5e10, 1e-3)})
    file = tmp_path / "ours.json"
    file.write_text(json.dumps(as_json(learned, {"by": "a test"})))
    found = read_learned(file)
    assert vars(found.parameters) == vars(learned.parameters) and found.machines == learned.machines
    assert vars(Parameters.read(file)) == vars(default()), "machines are nothing to the model of speed"
    assert shipped().machines == {}


@pytest.mark.parametrize(("content", "said"), [
    ("", "is no file"), ("[]", "no object `parameters`"), ('{"parameters": 1}', "no object `parameters`"),
    ('{"parameters": {"hbm_fractoin": 1}}', "did you mean 'hbm_fraction'"),
    ('{"parameters": {}, "machines": []}', "`machines` is no object"),
    ('{"parameters": {}, "machines": {"a": {"flops_per_s": 0, "layer_s": 0}}}', "`machines.a` must have"),
    ('{"parameters": {}, "machines": {"a": {"flops_per_s": 1}}}', "`machines.a` must have"),
    ("[" * 100_000, "is no file"), (" " * (2 << 20), "more than"),
])
def test_other_files_are_refused_with_the_way_out(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "odd.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"--parameters .*odd.json") as refusal:
        read_learned(file)
    assert said in str(refusal.value) and "plan --calibrate RUN --out FILE" in str(refusal.value)


def test_files_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"cannot be read"):
            read_learned(path)


# A processor's speed from the steps of runs on it.


def seconds(machine: LocalMachine, passes: Passes) -> float:
    return sum(machine.seconds(passes).values())


def test_what_made_the_times_is_found_again() -> None:
    machine = LocalMachine(flops_per_s=5e10, layer_s=2e-3)
    steps = [Passes(10, 1e9), Passes(20, 1e9), Passes(10, 8e9)]
    found = learn([(passes, seconds(machine, passes)) for passes in steps])
    assert found.flops_per_s == pytest.approx(5e10) and found.layer_s == pytest.approx(2e-3)


def test_noisy_times_give_the_least_squares_of_relative_errors() -> None:
    drawn = np.random.default_rng(0)
    steps = [Passes(float(n), float(f)) for n, f in zip(drawn.integers(5, 50, 30),
                                                        drawn.uniform(1e8, 1e10, 30), strict=True)]
    truth = LocalMachine(4e10, 3e-3)
    measured = [(p, seconds(truth, p) * float(drawn.lognormal(0, 0.05))) for p in steps]
    found = learn(measured)
    rows = np.array([[p.layers / s, p.flops_per_thread / s] for p, s in measured])
    expected, *_ = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)
    assert (found.layer_s, 1 / found.flops_per_s) == pytest.approx(tuple(expected))


def test_steps_that_are_all_alike_tell_one_number() -> None:
    found = learn([(Passes(10, 1e9), 0.5), (Passes(10, 1.2e9), 0.6)])
    assert found.layer_s == 0 and found.flops_per_s == pytest.approx(2e9)


def test_nothing_negative_is_learned() -> None:
    slow_when_small = [(Passes(10, 1e9), 0.01), (Passes(10, 8e9), 2.0)]
    found = learn(slow_when_small)
    assert found.layer_s == 0 and found.flops_per_s > 0


def test_passes_of_a_step() -> None:
    config = apply_settings(recipes.get("tiny-qwen3"), ["train.micro_batch_size=2", "parallel.pp=2"])
    passes = passes_of(config, num_ranks=4, threads=2, seq_len=64, batch_size=16)
    micro_batches = 16 / 2 / 2  # two replicas of two stages
    flops = train_flops_per_token(config.model, 64) * 16 * 64 / 4
    assert passes.layers == (4 / 2 + 1) * (micro_batches + 1)
    assert passes.flops_per_thread == pytest.approx(flops * (micro_batches + 1) / micro_batches / 2)
    again = passes_of(apply_settings(config, ["train.recompute=true"]), 4, 2, 64, 16)
    assert again.flops_per_thread == pytest.approx(passes.flops_per_thread * 4 / 3)


# The factors on shipped parameters.


NAMES = [factor.name for factor in FACTORS]
PARTS = np.array([[1.0, 0.1, 0.0], [0.5, 1.0, 0.1], [0.3, 0.1, 1.0], [1.0, 1.0, 1.0], [2.0, 0.2, 0.3]])
"""Seconds of products, links and host of some steps."""


def sums(parts: np.ndarray) -> Callable[[dict[str, float]], Sequence[float]]:
    """Return a model whose steps are sums of parts, each divided by its factor."""
    return lambda factors: [float(s) for s in parts @ np.array([1 / factors[name] for name in NAMES])]


def test_what_many_runs_show_is_found() -> None:
    truth = dict(zip(NAMES, (0.8, 0.6, 1.5), strict=True))
    many = np.repeat(PARTS, 40, axis=0)
    found = fit(sums(many)(truth), sums(many))
    assert [found[name] for name in NAMES] == pytest.approx([0.8, 0.6, 1.5], rel=0.02)


def test_one_run_moves_each_factor_as_far_as_it_is_believed_to_vary() -> None:
    one = PARTS[3:4]
    found = fit([3.3], sums(one))  # 10 % slower than predicted
    logs = [math.log(found[name]) for name in NAMES]
    assert sums(one)(found)[0] == pytest.approx(3.3, rel=0.01)
    # at the optimum each log is (spread of the factor)^2 times its share of the step
    moved = [log / factor.spread ** 2 * found[name]
             for log, factor, name in zip(logs, FACTORS, NAMES, strict=True)]
    assert moved == pytest.approx([moved[0]] * 3, rel=0.01) and all(log < 0 for log in logs)


def test_the_optimum_is_that_of_a_search() -> None:
    measured = [float(s) for s in PARTS.sum(axis=1) * (1.1, 1.2, 0.95, 1.1, 1.05)]
    found = fit(measured, sums(PARTS))

    def cost(logs: Sequence[float]) -> float:
        predicted = sums(PARTS)({name: math.exp(log) for name, log in zip(NAMES, logs, strict=True)})
        r = np.abs(np.log(np.array(predicted) / measured)) / NOISE
        huber = np.where(r <= 2, r * r / 2, 2 * (r - 1))
        prior = sum((log / f.spread) ** 2 / 2 for log, f in zip(logs, FACTORS, strict=True))
        return float(huber.sum()) + prior

    at = [math.log(found[name]) for name in NAMES]
    drawn = np.random.default_rng(0)
    around = [cost([a + d for a, d in zip(at, drawn.normal(0, 0.01, 3), strict=True)]) for _ in range(200)]
    assert cost(at) <= min(around) + 1e-6


def test_equal_times_change_nothing() -> None:
    found = fit([float(s) for s in PARTS.sum(axis=1)], sums(PARTS))
    assert list(found.values()) == pytest.approx([1.0] * 3)


def test_factors_go_on_what_was_seen_and_shares_stay_shares() -> None:
    base = default()
    found = scaled(base, {"products": 2.0, "links": 0.5, "host": 3.0}, [chip("h100")])
    assert found.product_fraction["hopper"]["bf16"] == min(1.0, 2 * base.product_fraction["hopper"]["bf16"])
    assert found.product_fraction["blackwell"] == base.product_fraction["blackwell"]
    assert found.inside_fraction == 0.5 * base.inside_fraction
    assert found.step_overhead_s == 3 * base.step_overhead_s and found.hbm_fraction == base.hbm_fraction
    assert all(share <= 1 for share in found.product_fraction["hopper"].values())


def test_equations_are_solved() -> None:
    drawn = np.random.default_rng(1)
    root = drawn.normal(size=(3, 3))
    matrix, right = root @ root.T + np.eye(3), drawn.normal(size=3)
    assert solved(matrix.tolist(), right.tolist()) == pytest.approx(np.linalg.solve(matrix, right).tolist())
