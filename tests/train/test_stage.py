"""What is opened and planned before the ranks are forked is what they read; nothing is opened or planned twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.config import RunConfig, apply_settings
from megatron_sov.data.ledger import plan
from megatron_sov.data.token_shards import open_sources
from megatron_sov.data.views import with_views
from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

prepare_megatron()
from megatron_sov.runs.folder import RunFolder  # noqa: E402
from megatron_sov.train import stage as stage_module  # noqa: E402
from megatron_sov.train.lm import LanguageModelling  # noqa: E402
from megatron_sov.train.stage import Stage  # noqa: E402


def config(data: Path) -> RunConfig:
    phases = 'data.phases=[{"name": "main", "seq_len": 32, "blend": {"even": 1, "even/16": 1}}]'
    return apply_settings(recipes.get("tiny-solar-open"), [
        "model.vocab_size=368", phases, f"data.paths={json.dumps({str(data): 1.0})}", "data.skip_steps=[[3, 4]]"])


def test_data_is_opened_and_planned_with_its_views(packed_data: Any) -> None:
    settings = config(packed_data.text)
    data = stage_module._open_data(Stage(settings, RunFolder(Path("run")), LanguageModelling))
    expected = with_views(settings, open_sources(settings.data.paths, 368))
    assert [s.name for s in data.sources] == [s.name for s in expected] == ["even", "odd", "even/16"]
    assert data.planned == plan(settings, expected) and [e.skip for e in data.planned] == [False, True, False]


def test_what_a_command_has_opened_is_not_opened_again(packed_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(packed_data.text)
    opened = tuple(open_sources(settings.data.paths, 368))
    monkeypatch.setattr(stage_module, "open_sources", None)
    extra = opened[0].__class__("made", None, False, {}, {"train": 9}, 0.0)
    data = stage_module._open_data(Stage(settings, RunFolder(Path("run")), LanguageModelling, sources=opened,
                                         extra_sources=(extra,)))
    assert [s.name for s in data.sources] == ["even", "odd", "even/16", "made"]
    assert data.sources[0] is opened[0] and data.sources[-1] is extra
