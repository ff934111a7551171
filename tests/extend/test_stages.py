"""Stages of an extension: several in one command, a gate that gives up with exit code 3,
goes on with more steps and passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.cli import main
from megatron_sov.config import YarnConfig
from megatron_sov.extend.stages import planned_stages
from megatron_sov.obs.events import EVENTS, read_events
from megatron_sov.runs.checkpoints import find_checkpoint
from megatron_sov.train.stage_config import TunedStageOptions, stage_request
from tests.typed_words import typed

SHORT = {"model.vocab_size": 1024, "model.hidden_size": 32, "model.head_dim": 16, "model.expert_ffn_dim": 16,
         "model.num_layers": 2, "model.num_experts": 4,
         "train.steps": 1, "train.global_batch_size": 4, "train.micro_batch_size": 4,
         "train.eval_every_steps": 0, "data.heldout_tokens": 300,
         "data.phases": '[{"name":"main","seq_len":64}]'}
LONG = {"train.global_batch_size": 4, "train.eval_every_steps": 0, "data.heldout_tokens": 300,
        "needle.depths": "[0.0,0.9]", "needle.samples": 2, "train.num_threads": 1,
        "extend.gate.max_overlap": 1}


def words(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def short_run(run_command: Any, token_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step at 64 tokens, which no test changes."""
    run = tmp_path_factory.mktemp("stages") / "short"
    done = run_command("pretrain", "tiny-solar-open", "--data", str(token_shards), "--run", str(run),
                       *words(SHORT | {"train.num_threads": 1}))
    assert done.returncode == 0, done.stderr
    return run


def command(short_run: Path, token_shards: Path, run: Path, stages: list[dict[str, Any]], *more: str,
            **settings: Any) -> list[str]:
    chosen = LONG | {"extend.stages": json.dumps(stages)} | {f"extend.gate.{name}": v
                                                             for name, v in settings.items()}
    return ["extend", "tiny-solar-open", "--from", str(short_run), "--data", str(token_shards), "--run",
            str(run), *words(chosen), *more]


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_events(run / EVENTS) if e["event"] == kind]


def test_two_stages_with_rehearsal_behind_an_open_gate(short_run: Path, token_shards: Path,
                                                       tmp_path: Path) -> None:
    run = tmp_path / "long"
    rehearsal = {"name": "rehearsal", "share": 0.5, "blend": {"first/64": 1}}
    stages = [{"name": "near", "seq_len": 96, "steps": 2, "max_steps": 4, "parts": [rehearsal]},
              {"name": "far", "seq_len": 192, "steps": 1, "lr": 1e-3, "rope_theta": 5e6}]
    assert main(command(short_run, token_shards, run, stages, every_steps=1, min_accuracy=0,
                        loss_tolerance_nats=9)) == 0
    near, far = run / "stages" / "1-near", run
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (near, far))
    assert ([(c["data"]["phases"][0]["seq_len"], c["train"]["steps"]) for c in (first, second)]
            == [(96, 4), (192, 1)])
    assert ((first["model"]["yarn"]["factor"], second["model"]["yarn"], second["model"]["rope_theta"])
            == (1.5, None, 5e6))
    assert second["optim"]["lr"] == 1e-3
    assert ([(e["step"], e["judged"], e["passed"]) for e in events_of(near, "gate")]
            == [(0, True, False), (1, True, False), (2, True, True)]), (
        "neither before its steps nor long behind them")
    completion = json.loads((near / "complete.json").read_text())
    assert (completion["step"], completion["gate"]["passed"]) == (2, True)
    starts = {e["start_loss"] for folder in (near, far) for e in events_of(folder, "gate")}
    assert len(starts) == 1, "both stages are held to the loss before the first one"
    blend = first["data"]["phases"][0]["blend"]
    assert blend["first/64"] / sum(blend.values()) == pytest.approx(0.5 * 0.9), "half of what is not needles"
    (found,) = events_of(near, "decontamination")
    assert ((found["questions_found"], found["questions"] > 100, found["scanned_tokens"]["needle"] > 0)
            == (0, True, True))
    assert main(command(short_run, token_shards, run, stages, "--resume", every_steps=1, min_accuracy=0)) == 0


def test_the_stages_of_a_recipe_are_its_own(short_run: Path, token_shards: Path, tmp_path: Path) -> None:
    """The published stages of Solar Open, tiny: long documents and rehearsal in both, YaRN in the second."""
    shorter = words({"extend.stages.0.seq_len": 80, "extend.stages.1.seq_len": 96,
                     "extend.stages.1.yarn_original_tokens": 48, "train.micro_batch_size": 1})
    args = typed(TunedStageOptions, ["tiny-solar-open-extend", "--from", str(short_run), "--data",
                                     str(token_shards), "--run", str(tmp_path / "long"), *shorter])
    planned = planned_stages(stage_request(args, "lm"), find_checkpoint(short_run), args.run, 1)
    near, far = (stage.config for stage in planned)
    assert near.problems(1) == far.problems(1) == []
    (first,), (second,) = near.data.phases, far.data.phases
    assert (first.name, first.seq_len, near.train.steps) == ("32k", 80, 40)
    assert (second.name, second.seq_len, far.train.steps) == ("100k", 96, 40)
    assert (near.model.yarn, far.model.yarn) == (None, YarnConfig(2.0, 48))
    assert {"first@65", "first/64", "needle/64"} <= set(first.blend)
    assert near.extend.gate.every_steps == 20


def test_an_objective_of_ones_own_says_which_data_it_learns_from(short_run: Path, token_shards: Path,
                                                                 tmp_path: Path, capsys) -> None:
    (tmp_path / "mine.py").write_text("""
class OfChatsAlone:
    formats = ("chat",)
    def __init__(self, context): ...
    def collect(self, policy, step): ...
    def prepare(self, batch): ...
    def loss(self, hidden, head, batch): ...
""")
    own = ("--set", f"objective.name={tmp_path}/mine.py:OfChatsAlone")
    for stages in ([{"name": "near", "seq_len": 96, "steps": 2}], []):
        assert main(command(short_run, token_shards, tmp_path / "long", stages, *own)) == 2
        assert "holds data of format 'text', this stage learns from chat; pass" in capsys.readouterr().err


def test_yarn_stretches_what_the_weights_were_trained_on(short_run: Path, token_shards: Path,
                                                         tmp_path: Path) -> None:
    """Neither the short samples of a fine-tuning since, nor a longer phase that is still to come."""
    def yarn_from(start: Path) -> YarnConfig | None:
        longer = words({"data.phases": '[{"name":"long","seq_len":256}]'})
        args = typed(TunedStageOptions, ["tiny-solar-open", "--from", str(start), "--data", str(token_shards),
                                  "--run", str(tmp_path / "long"), *longer])
        (planned,) = planned_stages(stage_request(args, "lm"), start, args.run, 1)
        return planned.config.model.yarn

    def train(name: str, phases: list[dict[str, Any]], *more: str) -> Path:
        settings = SHORT | {"data.phases": json.dumps(phases), "train.checkpoint_every_steps": 1,
                            "train.steps": len(phases)}
        assert main(["pretrain", "tiny-solar-open", "--data", str(token_shards), "--run",
                     str(tmp_path / name), *words(settings), *more]) == 0
        return tmp_path / name

    assert yarn_from(short_run) == YarnConfig(4.0, 64)
    tuned = train("tuned", [{"name": "answers", "seq_len": 32}], "--from", str(short_run))
    assert yarn_from(tuned) == YarnConfig(4.0, 64)
    twice = train("twice", [{"name": "answers", "seq_len": 16}], "--from", str(tuned))
    assert yarn_from(twice) == YarnConfig(4.0, 64)
    growing = train("growing", [{"name": "short", "seq_len": 64, "tokens": 4 * 64},
                                {"name": "long", "seq_len": 128, "tokens": 4 * 128}])
    first, last = (growing / "checkpoints" / f"step-{step}" for step in (1, 2))
    assert (yarn_from(first), yarn_from(last)) == (YarnConfig(4.0, 64), YarnConfig(2.0, 128))


def test_a_gate_that_does_not_pass_ends_with_3_and_passes_later(
        short_run: Path, token_shards: Path, tmp_path: Path, run_command: Any) -> None:
    run = tmp_path / "long"
    stages = [{"name": "near", "seq_len": 96, "steps": 1, "max_steps": 2},
              {"name": "far", "seq_len": 128, "steps": 1}]
    arguments = command(short_run, token_shards, run, stages, every_steps=1, min_accuracy=0.5)
    done = run_command(*arguments)
    assert done.returncode == 3, done.stderr
    assert "the gate has not passed within its 2 steps" in done.stderr and "below 50%" in done.stderr
    near = run / "stages" / "1-near"
    assert not (near / "complete.json").exists() and not (run / "config.json").exists(), (
        "the next stage has not begun")
    assert (near / "checkpoints" / "step-2").is_dir()
    assert [e["passed"] for e in events_of(near, "gate")] == [False] * 3
    before = events_of(near, "gate")[0]["start_loss"]
    stages[0]["max_steps"] = 3
    again = command(short_run, token_shards, run, stages, "--resume", every_steps=1, min_accuracy=0,
                    loss_tolerance_nats=9)
    assert main(again) == 0
    gate = json.loads((near / "complete.json").read_text())["gate"]
    assert [(c["step"], c["passed"]) for c in gate["checks"]] == [(0, False), (1, False),
                                                                  (2, False), (3, True)]
    assert gate["start_loss"] == before, "the gate went on from the checkpoint's state"
    assert (run / "complete.json").is_file() and not (near / "gate_failed.json").exists()


@pytest.mark.parametrize(("stage", "said"), [
    ({"seq_len": 96, "kind": "midtraining"}, "needs a part named trajectories"),
    ({"seq_len": 96, "parts": [{"name": "replay", "share": 0.1}]},
     "a stage of kind extension has parts long, rehearsal"),
    ({"seq_len": 96, "steps": 3, "max_steps": 2}, "max_steps = 2 must be at least steps = 3"),
    ({"seq_len": 96, "kind": "midtraining", "parts": [{"name": "trajectories", "share": 0.1}]},
     "data has no source of chats"),
    ({"seq_len": 96, "yarn_factor": 0.5}, "yarn_factor = 0.5 must be 0 or at least 1"),
])
def test_mistakes_are_named_before_anything_is_written(stage: dict[str, Any], said: str, short_run: Path,
                                                       token_shards: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "long"
    assert main(command(short_run, token_shards, run, [{"name": "a", "steps": 1} | stage])) == 2
    assert said in capsys.readouterr().err
    assert not run.exists()
