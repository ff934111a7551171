"""Parameters in files: the package's, and those that a team has learnt from its own runs."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sov.clusters.chips import CHIPS, chip, default_links
from megatron_sov.errors import UserError
from megatron_sov.plan.speed.fit import Prior, Sample, error, fit
from megatron_sov.plan.speed.parameters import Parameters, default, of_json
from megatron_sov.plan.speed.priors import PRIORS
from megatron_sov.plan.speed.step import step_time
from megatron_sov.plan.speed.workload import Workload
from megatron_sov.plan.tables.models import published


def test_all_that_is_fitted_lies_within_what_is_possible() -> None:
    for path, prior in PRIORS.items():
        found: object = vars(default())
        for name in path.split("."):
            assert isinstance(found, dict)
            found = found[name]
        assert isinstance(found, float)
        assert prior.low <= found <= prior.high * 1.0001, path
        assert prior.low <= prior.value <= prior.high, path


def test_a_file_may_hold_a_part(tmp_path: Path) -> None:
    file = tmp_path / "ours.json"
    file.write_text(json.dumps({"parameters": {"hbm_fraction": 0.5, "ep_fraction": {"deepep": 0.25}},
                                "provenance": {"runs": 3}}))
    found = Parameters.read(file)
    assert found.hbm_fraction == 0.5 and found.ep_fraction["deepep"] == 0.25
    assert found.ep_fraction["alltoall"] == default().ep_fraction["alltoall"]
    assert found.product_fraction == default().product_fraction


@pytest.mark.parametrize(("text", "said"), [
    ("{", "is no file of parameters"), ("[]", "is no file of parameters"), ("{}", "is no file of parameters"),
    ('{"parameters": {"hbm_fractoin": 1}}', "hbm_fractoin is no parameter; did you mean 'hbm_fraction'?"),
    ('{"parameters": {"hbm_fraction": "fast"}}', "hbm_fraction = 'fast' must be a number"),
    ('{"parameters": {"ep_fraction": {"deepep": -1}}}', "ep_fraction.deepep = -1 must be a number"),
    ('{"parameters": {"hbm_fraction": NaN}}', "must be a number"),
    ('{"parameters": {"hbm_fraction": %s}}' % ("1" * 400), "must be a number"),
    ('{"parameters": {"hbm_fraction": 0}}', "something is divided by it"),
    ('{"parameters": {"product_fraction": {"hopper": {"fp8": 0}}}}', "something is divided by it"),
    ('{"parameters": {"inside_fraction": 90}}', "must be a share"),
    ('{"parameters": {"ep_fraction": 0.5}}', "must be an object with alltoall"),
    ('{"parameters": {"step_overhead_s": {"a": 1}}}', "must be a number"),
    ('{"parameters": {"ep_fraction": {"depep": 1}}}', "depep is no parameter; did you mean 'deepep'?"),
])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        Parameters.read(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Parameters.read(tmp_path / "none.json")


def test_every_chip_has_shares_of_its_generation() -> None:
    p = default()
    tables = (p.product_fraction, p.attention_fraction, p.attention_portable, p.reference_power_w)
    assert all(one.generation in table for one in CHIPS.values() for table in tables)


def test_parameters_are_read_as_they_are_written() -> None:
    assert of_json(dict(vars(default()))).hbm_fraction == default().hbm_fraction


# Fitting finds parameters again that made the measurements, though some of these are wrong.


def test_hidden_parameters_are_found() -> None:
    hidden = deepcopy(vars(default()))
    hidden["product_fraction"]["ampere"]["bf16"], hidden["hbm_fraction"] = 0.65, 0.6
    truth = Parameters(**hidden)
    a100 = chip("a100")
    samples = []
    for model in published():
        if model.names[0] in ("llama3-8b", "llama2-13b", "qwen2.5-7b", "qwen3-0.6b", "mpt-1b", "mpt-350m"):
            for seq_len in (512, 2048):
                w = Workload(model.shape, a100, default_links(a100), 8, seq_len, 4, 256, sharding="zero1")
                samples.append(Sample(w, step_time(w, truth).tokens_per_s_per_gpu))
    samples[3] = replace(samples[3], tokens_per_s_per_gpu=samples[3].tokens_per_s_per_gpu * 3)
    priors = {"product_fraction.ampere.bf16": Prior(0.8, 3.0, 0.4, 1.0),
              "hbm_fraction": Prior(0.8, 3.0, 0.3, 1.0)}
    found = fit(samples, priors, default())
    assert math.isclose(found.product_fraction["ampere"]["bf16"], 0.65, rel_tol=0.03)
    assert math.isclose(found.hbm_fraction, 0.6, rel_tol=0.06)
    assert all(abs(error(s, found)) < 0.02 for i, s in enumerate(samples) if i != 3)
