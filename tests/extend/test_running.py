"""Stages one after the other: what is said of a gate that proves less than its stage is for."""

from __future__ import annotations

import pytest

from megatron_sov import recipes
from megatron_sov.config import apply_settings
from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

prepare_megatron()
from megatron_sov.extend.running import asks_too_little  # noqa: E402


@pytest.mark.parametrize(("lengths", "said"), [
    ("[64, 512]", None), ("[64]", "the gate asks at most 64 tokens, and the stage has 512"), ("[1024]", None)])
def test_a_gate_that_asks_less_than_its_stage_has_is_said(lengths: str, said: str | None) -> None:
    phases = 'data.phases=[{"name": "a", "seq_len": 128}, {"name": "b", "seq_len": 512}]'
    config = apply_settings(recipes.get("tiny-solar-open"), [phases, f"needle.lengths_tokens={lengths}"])
    found = asks_too_little(config)
    assert found is None if said is None else said in str(found)
