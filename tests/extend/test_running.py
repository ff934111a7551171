"""Stages one after the other: when each begins, and what is said of a gate that proves less
than its stage is for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.config import apply_settings
from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

prepare_megatron()
from megatron_sov.extend import running  # noqa: E402
from megatron_sov.extend.running import asks_too_little, run_stages  # noqa: E402


class Folder:
    """Stands for the folder of a stage, complete or not."""

    def __init__(self, name: str, complete: bool) -> None:
        self.path, self.checkpoints, self._complete = Path(name), Path(name) / "checkpoints", complete

    def completion(self) -> dict[str, int] | None:
        return {"step": 4} if self._complete else None


@pytest.mark.parametrize(("complete", "begins_s"),
                         [(0, [1000, 5000, 6000]), (1, [1000, 1000, 6000]), (3, [1000] * 3)])
def test_the_first_stage_that_works_began_with_the_command_and_each_later_one_with_the_end_of_the_one_before(
        complete: int, begins_s: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    config = apply_settings(recipes.get("tiny-solar-open"), ["extend.gate.every_steps=0"])
    stages = [SimpleNamespace(config=config, folder=Folder(f"stage-{i}", i < complete)) for i in range(3)]
    ran: list[tuple[str, Path, float]] = []

    def run_stage(stage: Any, nproc: int | None, began_s: float) -> bool:
        ran.append((stage.folder.path.name, stage.start_from, began_s))
        return True

    monkeypatch.setattr(running, "run_stage", run_stage)
    monkeypatch.setattr(running, "make_needles",
                        lambda config, start, formats: SimpleNamespace(
                            data=(), sources=(), before=None, after=None))
    monkeypatch.setattr(running, "with_needles_in_blends", lambda config: config)
    monkeypatch.setattr(running, "find_checkpoint", lambda path: path / "checkpoints/step-4")
    monkeypatch.setattr(running, "time", SimpleNamespace(time=lambda: 4000.0 + 1000 * len(ran)))
    objective: Any = SimpleNamespace()
    run_stages(stages, Path("start"), objective, 1, True, began_s=1000.0)  # type: ignore[arg-type]
    starts = [Path("start"), *(Path(f"stage-{i}/checkpoints/step-4") for i in range(2))]
    assert ran == [(f"stage-{i}", starts[i], begins_s[i]) for i in range(3)]


@pytest.mark.parametrize(("lengths", "said"), [
    ("[64, 512]", None), ("[64]", "the gate asks at most 64 tokens, and the stage has 512"),
    ("[1024]", None)])
def test_a_gate_that_asks_less_than_its_stage_has_is_said(lengths: str, said: str | None) -> None:
    phases = 'data.phases=[{"name": "a", "seq_len": 128}, {"name": "b", "seq_len": 512}]'
    config = apply_settings(recipes.get("tiny-solar-open"), [phases, f"needle.lengths_tokens={lengths}"])
    found = asks_too_little(config)
    assert found is None if said is None else said in str(found)
