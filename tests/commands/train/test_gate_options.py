"""Benchmarks beside training that could never be measured are refused before the first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.commands.train.gate_options import refuse_unknown_benchmarks
from megatron_sov.model.config import apply_settings


def refuse(*changes: str) -> None:
    pytest.importorskip("megatron_sov.bench.lm.tasks")
    asked = ('evaluate.background.tasks=["lm"]', 'evaluate.lm.tasks=["capitals"]')
    refuse_unknown_benchmarks(apply_settings(recipes.get("tiny-solar-open"), [*asked, *changes]))


def test_what_is_not_there_is_named_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "capitals.yaml").write_text("task: capitals\ntag: geography\n")
    here = f"evaluate.lm.task_dirs={json.dumps([str(tmp_path)])}"
    refuse(here)
    refuse(here, 'evaluate.lm.tasks=["geography"]')
    refuse("evaluate.lm.allow_download=true")  # lm-eval may have it
    with pytest.raises(UserError, match=r"evaluate.lm.tasks = \['capitels'\]: .* did you mean .*capitals"):
        refuse(here, 'evaluate.lm.tasks=["capitels"]')
    for name, value in (("task_dirs", '["no such"]'), ("data_dir", "no such")):
        with pytest.raises(UserError, match=f"evaluate.lm.{name} = no such: is no folder"):
            refuse(here, f"evaluate.lm.{name}={value}")
