"""`megatron-sov distill rounds`: a door to `rl run` with policy.method=gkd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main as sov_data
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.cli import main
from megatron_sov.commands.train import distill
from megatron_sov.runs.obs.events import read_events
from tests.typed_words import typed


@pytest.mark.distributed
def test_a_student_learns_from_what_it_writes(packed_data: Any, teacher: Path, tiny: list[str],
                                              run_command: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(
        json.dumps({"prompt": f"What is {i} plus 1?"}) + "\n" for i in range(6)))
    words = ["distill", "rounds", "tiny-solar-open", "--from", str(teacher), "--teacher", str(teacher),
             "--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "out"),
             "--rounds", "2", "--max-new-tokens", "8", *tiny, "--set", "model.hidden_size=48", "--set",
             "rollout.prompts_per_round=3", "--set", "rollout.max_prompt_tokens=64", "--data",
             str(packed_data.chats)]
    done = run_command(*words)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "out/run"
    first, second = (e for e in read_events(run / "events.jsonl") if e["event"] == "step")
    # the first step's student is its own teacher
    assert abs(first["losses"]["divergence"]) < 1e-6 < second["losses"]["divergence"]
    assert read_manifest(run / "rounds/0002").content["round"] == 2
    (prompt,) = (e for e in read_events(run / "events.jsonl") if e["event"] == "heldout_divergence"
                 and e["step"] == 0)
    assert prompt["kl"] == pytest.approx(0, abs=1e-6)
    # again: there is nothing to do
    assert run_command(*words).returncode == 0


def test_the_door_asks_for_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["r", "--from", "s", "--teacher", "t", "--prompts", "p", "--data", "chats", "--share", "0.25",
             "--output", "out", "--plugin", "own.py:MINE", "--top-p", "0.95", "--seed", "3"]

    def asked(*more: str) -> Any:
        return distill.rl_options(typed(distill.DistillRoundsOptions, [*words, *more]))

    found = asked("--rounds", "7", "--set", "rollout.temperature=0.5")
    assert found.teacher == ("t",) and found.reward == "none" and found.plugins == ("own.py:MINE",)
    assert (found.run, found.store, found.resume) == (Path("out/run"), Path("out/store"), True)
    assert {"policy.method=gkd", "policy.on_policy_share=0.25", "rollout.top_p=0.95", "rollout.seed=3",
            "rollout.rounds=7"} <= set(found.settings)
    assert found.settings[-1] == "rollout.temperature=0.5", "what is typed goes before"
    assert "train.epochs=1" in asked().settings
    assert "train.epochs=1" not in asked("--set", "rollout.rounds=2").settings
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    assert main(["distill", "rounds", "tiny-solar-open", "--from", "nowhere", "--teacher", "t", "--prompts",
                 str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "out")]) == 2
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_code_of_ones_own_is_known_to_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    for command, option in (("write", "--prompts"), ("states", "--data")):
        assert main(["distill", command, "s", option, "p", "--output", "o", "--plugin", "no.py:MINE"]) == 2
        assert "no.py: cannot be read (No such file or directory); name a" in capsys.readouterr().err


@pytest.mark.distributed
def test_answers_are_kept_as_conversations(packed_data: Any, teacher: Path, run_command: Any, tmp_path: Path
                                           ) -> None:
    import numpy as np

    from megatron_sov.train.data.token_shards import open_sources

    (tmp_path / "prompts.jsonl").write_text("\n".join(
        json.dumps({"prompt": f"What is {i} plus 1?"}) for i in range(6)))
    assert sov_data(["pack", "--tokenizer", str(packed_data.tokenizer), "--heldout", "0", "--workers", "1",
                     "--format", "prompt", "--input", str(tmp_path / "prompts.jsonl"), "--output",
                     str(tmp_path / "prompts")]) == 0
    answers = tmp_path / "answers"
    done = run_command("distill", "write", str(teacher), "--prompts", str(tmp_path / "prompts"), "--output",
                       str(answers), "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    ((prompt,), (answer,)) = (open_sources({str(folder): 1.0}, 368, formats) for folder, formats in (
        (tmp_path / "prompts", ("prompt",)), (answers, ("chat",))))
    asked_shard, found = prompt.shard("train"), answer.shard("train")
    assert len(found.lengths) == 6 and answer.name == "prompts-answers"
    for document in range(6):
        length, whole = int(asked_shard.lengths[document]), int(found.lengths[document])
        assert length < whole <= length + 8
        assert np.array_equal(found.tokens(document, 0, length), asked_shard.tokens(document, 0, length))
        types, weights = found.types(document, 0, whole), found.loss_weights(document, 0, whole)
        assert types.tolist() == [1] * length + [2] * (whole - length)
        assert weights.tolist() == [0] * length + [1] * (whole - length)
    assert sov_data(["verify", str(answers)]) == 0
