"""Fitting finds parameters again that made the measurements, though some of these are wrong."""

from __future__ import annotations

import math
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from megatron_sov import recipes
from megatron_sov.plan.speed.parameters import Parameters, default
from megatron_sov.plan.speed.step import step_time
from megatron_sov.plan.speed.workload import Workload, of_model
from megatron_sov.work.clusters.chips import default_links, find_chip

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from plan_fit import PRIORS, Prior, Sample, error, fit


def test_all_that_is_fitted_lies_within_what_is_possible() -> None:
    for path, prior in PRIORS.items():
        found: object = vars(default())
        for name in path.split("."):
            assert isinstance(found, dict)
            found = found[name]
        assert isinstance(found, float)
        assert prior.low <= found <= prior.high * 1.0001, path
        assert prior.low <= prior.value <= prior.high, path


def test_hidden_parameters_are_found() -> None:
    hidden = deepcopy(vars(default()))
    hidden["product_fraction"]["ampere"]["bf16"], hidden["hbm_fraction"] = 0.65, 0.6
    truth = Parameters(**hidden)
    a100 = find_chip("a100")
    samples = []
    for name in ("llama-3.1-8b", "exaone-4.0-1.2b", "qwen2-1.5b", "qwen3-4b", "qwen3-8b", "gemma-3-1b"):
        for seq_len in (512, 2048):
            w = Workload(of_model(recipes.get(name).model), a100, default_links(a100), 8, seq_len, 4, 256,
                         sharding="zero1")
            samples.append(Sample(w, step_time(w, truth).tokens_per_s_per_gpu))
    samples[3] = replace(samples[3], tokens_per_s_per_gpu=samples[3].tokens_per_s_per_gpu * 3)
    priors = {"product_fraction.ampere.bf16": Prior(0.8, 3.0, 0.4, 1.0),
              "hbm_fraction": Prior(0.8, 3.0, 0.3, 1.0)}
    found = fit(samples, priors, default())
    assert math.isclose(found.product_fraction["ampere"]["bf16"], 0.65, rel_tol=0.03)
    assert math.isclose(found.hbm_fraction, 0.6, rel_tol=0.06)
    assert all(abs(error(s, found)) < 0.02 for i, s in enumerate(samples) if i != 3)
