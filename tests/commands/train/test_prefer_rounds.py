"""Rounds of preferences: `rl run` with policy.method=preference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.runs.obs.events import read_events

REWARD = """
from dataclasses import dataclass

@dataclass
class Sum:
    threads: int  # a reward that says so is judged in this process

    def score(self, row):
        return float(sum(map(ord, row["response"])) % 3)
"""


@pytest.mark.distributed
def test_rounds_are_one_run_with_one_schedule(teacher: Path, tiny: list[str], run_command: Any, tmp_path: Path
                                              ) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{i} plus?"}}\n' for i in range(6)))
    (tmp_path / "own.py").write_text(REWARD)
    run = tmp_path / "run"
    words = ["rl", "run", "tiny-solar-open", "--from", str(teacher), "--run", str(run), "--store",
             str(tmp_path / "store"), "--prompts", str(tmp_path / "prompts.jsonl"), "--reward",
             f"{tmp_path}/own.py:Sum", "--reward-set", "threads=1", *tiny, *(word for setting in (
                 "policy.method=preference", "policy.keep_unfinished=true", "rollout.rounds=2",
                 "rollout.samples_per_prompt=3", "rollout.temperature=1.0", "rollout.max_new_tokens=8",
                 "model.hidden_size=48", "rollout.prompts_per_round=4", "rollout.steps_per_round=2",
                 "rollout.max_prompt_tokens=48", "preference.method=ipo") for word in ("--set", setting))]
    done = run_command(*words)
    assert done.returncode == 0, done.stderr
    events = [*read_events(run / "events.jsonl")]
    assert sum(e["event"] == "round" for e in events) == 2
    # ipo's loss at the weights that begin a round, which the second step has left: 1 / (2 beta) squared
    steps = [e for e in events if e["event"] == "step"]
    assert [e["loss"] for e in steps if e["step"] % 2] == pytest.approx([25.0] * 2, rel=1e-6)
    assert len({e["lr"] for e in steps}) == len(steps)
    again = run_command("resume", str(run), "--reward", f"{tmp_path}/own.py:Sum")
    assert again.returncode == 0 and "complete" in again.stdout + again.stderr, again.stderr
