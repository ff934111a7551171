"""Published runs of reinforcement learning: their values, and what they leave to be set."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_sov.config import RunConfig, apply_settings
from megatron_sov.recipes import get
from megatron_sov.recipes.policies import STAGES, TINY

ROOMS = {field.name for field in dataclasses.fields(RunConfig)}


@pytest.mark.parametrize("name", STAGES)
def test_every_value_is_a_setting_and_has_a_source(name: str) -> None:
    stage = STAGES[name]
    settings = [s for s in stage.settings() if s.partition(".")[0] in ROOMS]
    config = apply_settings(get(stage.base), settings)
    assert config.optim.lr == 1e-6 and config.objective.name == "policy"
    assert all(source.kind in ("published", "ours") and source.where for source in stage.sources().values())


@pytest.mark.parametrize("name", STAGES)
def test_a_tiny_run_keeps_the_method_and_is_small(name: str) -> None:
    tiny = dict(setting.split("=", 1) for setting in STAGES[name].tiny_settings())
    assert tiny.keys() == STAGES[name].values.keys()
    assert tiny["policy.method"] == STAGES[name].values["policy.method"][0]
    assert all(tiny[key] == str(size) for key, size in TINY.items() if key in tiny)
    assert tiny["rollout.rounds"] == "2"


def test_typhoons_two_runs_differ_in_updates_lengths_and_text() -> None:
    single, agent = (dict(STAGES[f"typhoon-s-4b-legal{end}"].values) for end in ("", "-agent"))
    changed = {key: (single[key][0], agent[key][0]) for key in single if single[key][0] != agent[key][0]}
    assert changed == {"policy.knowledge_batch_size": (64, 16), "rollout.steps_per_round": (1, 4),
                       "rollout.max_new_tokens": (4096, 8192)}


def test_what_vibethinker_did_not_publish_has_no_value() -> None:
    for name in ("math-16k", "math-32k", "code"):
        values = STAGES[f"vibethinker-1.5b-{name}"].values
        assert not {"policy.mgpo_lambda", "policy.clip_low", "policy.clip_high"} & values.keys()
        assert values["rollout.samples_per_prompt"][1].kind == values["optim.lr"][1].kind == "ours"
