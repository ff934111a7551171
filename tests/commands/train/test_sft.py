"""`megatron-sov sft` from a run of `pretrain`, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.cli import main
from megatron_sov.runs.obs.events import read_events

SMALL = ("train.steps=2", 'data.phases=[{"name": "main", "seq_len": 64}]', "train.global_batch_size=4",
         "train.micro_batch_size=2", "data.heldout_tokens=128", "train.num_threads=1", "optim.lr=0.004")
MODEL = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.expert_ffn_dim=16",
         "model.num_experts=4")


def command(name: str, data: list[Path], run: Path, *arguments: str, settings: tuple[str, ...]) -> list[str]:
    shards = [part for d in data for part in ("--data", str(d))]
    chosen = [part for s in (*SMALL, *settings) for part in ("--set", s)]
    return [name, "tiny-solar-open", *shards, "--run", str(run), *arguments, *chosen]


@pytest.mark.essential
def test_a_run_becomes_a_chat_model(packed_data: Any, tmp_path: Path, run_command: Any,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    assert run_command(*command("pretrain", [packed_data.text], base, settings=MODEL)).returncode == 0
    both = [packed_data.chats, packed_data.text]
    argv = command("sft", both, tuned, "--from", str(base), "--nproc", "2",
                   settings=("objective.text_coeff=0.3",))
    done = subprocess.run([sys.executable, "-m", "megatron_sov", *argv], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    steps = [e for e in read_events(tuned / "events.jsonl") if e["event"] == "step"]
    assert len(steps) == 2 and set(steps[0]["losses"]) == {"response", "text"}
    assert json.loads((tuned / "config.json").read_text())["objective"] == {
        "name": "sft", "text_coeff": 0.3, "loss_per": "token", "options": {},
        "audio_weight": 1.0, "image_weight": 1.0}
    assert json.loads((tuned / "complete.json").read_text())["step"] == 2

    def refused(data: list[Path], *settings: str) -> str:
        argv = command("sft", data, tmp_path / "no", "--from", str(base), settings=settings)
        assert main(argv) == 2 and not (tmp_path / "no").exists()
        return capsys.readouterr().err

    assert "set objective.text_coeff (e.g. 0.1) or leave that data out" in refused(both)
    assert "holds conversations; pack some with `sov-data pack --format chat`" in refused([packed_data.text])
    assert "use `megatron-sov pretrain`" in refused([packed_data.chats], "objective.name=lm")
    assert main(["sft", "tiny-solar-open", "--data", str(packed_data.chats), "--run",
                 str(tmp_path / "no")]) == 2
    assert "required: --from" in capsys.readouterr().err
