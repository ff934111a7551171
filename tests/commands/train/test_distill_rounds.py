"""On-policy distillation: `rl run` with policy.method=gkd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.cli import main
from megatron_sov.runs.obs.events import read_events


@pytest.mark.distributed
def test_a_student_learns_from_what_it_writes(packed_data: Any, teacher: Path, tiny: list[str],
                                              run_command: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(
        json.dumps({"prompt": f"What is {i} plus 1?"}) + "\n" for i in range(6)))
    run, settings = tmp_path / "run", (
        "model.hidden_size=48", "policy.method=gkd", "rollout.rounds=2", "rollout.samples_per_prompt=1",
        "rollout.max_new_tokens=8", "rollout.prompts_per_round=3", "rollout.max_prompt_tokens=64")
    words = ["rl", "run", "tiny-solar-open", "--from", str(teacher), "--teacher", str(teacher), "--prompts",
             str(tmp_path / "prompts.jsonl"), "--store", str(tmp_path / "store"), "--run", str(run),
             "--reward", "none", "--resume", *tiny, "--data", str(packed_data.chats),
             *(word for setting in settings for word in ("--set", setting))]
    done = run_command(*words)
    assert done.returncode == 0, done.stderr
    first, second = (e for e in read_events(run / "events.jsonl") if e["event"] == "step")
    # the first step's student is its own teacher
    assert abs(first["losses"]["divergence"]) < 1e-6 < second["losses"]["divergence"]
    assert read_manifest(run / "rounds/0002").content["round"] == 2
    (prompt,) = (e for e in read_events(run / "events.jsonl") if e["event"] == "heldout_divergence"
                 and e["step"] == 0)
    assert prompt["kl"] == pytest.approx(0, abs=1e-6)
    # again: there is nothing to do
    assert run_command(*words).returncode == 0


def test_code_of_ones_own_is_known_to_the_teachers_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "states", "s", "--data", "p", "--output", "o", "--plugin", "no.py:MINE"]) == 2
    assert "no.py: cannot be read (No such file or directory); name a" in capsys.readouterr().err
