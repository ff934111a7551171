"""Stages of a context extension: blends of stages, gates, and resumption."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.commands.train.setup.stage_options import ExtendOptions
from megatron_sov.commands.train.setup.training import stage_request
from megatron_sov.model.config import ExtendStageConfig, PartConfig, YarnConfig
from megatron_sov.post.extend.stages import build_stage_blend, plan_stages
from megatron_sov.runs.checkpoints import find_checkpoint
from megatron_sov.train.data.sources import Source
from tests.run_files import read_run_events
from tests.typed_words import format_set_options, parse_settings

# The parts of a stage become one blend; a part without sources uses all sources of its kind.


def blend_source(name: str, lengths: list[int], share: float, is_chat: bool = False) -> Source:
    documents: Any = SimpleNamespace(is_plain=True, columns=(), lengths=np.array(lengths))
    return Source(name, None, "chat" if is_chat else "text", {}, {"train": sum(lengths)}, share,
                  train_documents=documents)


@pytest.fixture
def sources() -> list[Source]:
    """Two text sources, one of them with a long document, and chats."""
    return [blend_source("web", [10, 20], 0.6), blend_source("books", [5, 90], 0.2),
            blend_source("chats", [8], 0.2, is_chat=True)]


def build_stage(*parts: PartConfig, kind: str = "extension", **blend: float) -> ExtendStageConfig:
    return ExtendStageConfig("s", 64, kind=kind, parts=parts, blend=blend)  # type: ignore[arg-type]


@pytest.mark.each(("stage", "needle_share", "blend"), [
    (build_stage(), 0.0, {}), (build_stage(web=2.0), 0.0, {"web": 2.0}),
    # rehearsal is every text in pieces of the trained length, with short needle documents
    (build_stage(PartConfig("rehearsal", 0.2), books=1.0), 0.0,
     {"web/32": 0.15, "books/32": 0.05, "books": 0.8}),
    (build_stage(PartConfig("rehearsal", 0.2), books=1.0), 0.25,
     {"web/32": 0.1125, "books/32": 0.0375, "needle/32": 0.05, "books": 0.8}),
    (build_stage(PartConfig("trajectories", 0.5), PartConfig("replay", 0.5), kind="midtraining"), 0.25,
     {"chats": 0.5, "web/32": 0.375, "books/32": 0.125}),  # replay has no needles
    (build_stage(PartConfig("trajectories", 0.7), PartConfig("long", 0.1),
                 PartConfig("replay", 0.2, {"web/8": 3.0, "books": 1.0}), kind="midtraining"), 0.0,
     {"chats": 0.7, "books@33": 0.1, "web/8": 0.15, "books": 0.05}),
    # remaining tokens go to sources by their share
    (build_stage(PartConfig("long", 0.5, {"books@40": 1.0})), 0.0,
     {"books@40": 0.5, "web": 0.3, "books": 0.1, "chats": 0.1})])
def test_blend_of_a_stage_follows_its_parts(stage: ExtendStageConfig, needle_share: float,
                                            blend: dict[str, float], sources: list[Source]) -> None:
    assert build_stage_blend(stage, sources, 32, needle_share) == pytest.approx(blend)


@pytest.mark.parametrize(("part", "trained", "message"), [
    (PartConfig("long", 0.5), 90, "the data has no text source with documents of 91 tokens or more"),
    (PartConfig("long", 0.5, {"web": 0.0}), 32, "has no weight above 0"),
])
def test_stages_without_matching_data_are_refused(part: PartConfig, trained: int, message: str,
                                                  sources: list[Source]) -> None:
    with pytest.raises(UserError, match=message):
        build_stage_blend(build_stage(part), sources, trained, 0.0)


SHORT = {"model.vocab_size": 1024, "model.hidden_size": 32, "model.head_dim": 16, "model.expert_ffn_dim": 16,
         "model.num_layers": 2, "model.num_experts": 4,
         "train.steps": 1, "train.global_batch_size": 4, "train.micro_batch_size": 4,
         "train.eval_every_steps": 0, "data.heldout_tokens": 300,
         "data.phases": '[{"name":"main","seq_len":64}]'}
LONG = {"train.global_batch_size": 4, "train.eval_every_steps": 0, "data.heldout_tokens": 300,
        "needle.depths": "[0.0,0.9]", "needle.samples": 2, "train.num_threads": 1}


pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def short_run(run_checked: Any, token_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step at 64 tokens, which no test changes."""
    run = tmp_path_factory.mktemp("stages") / "short"
    run_checked("pretrain", "tiny-solar-open", "--data", str(token_shards), "--run", str(run),
                *format_set_options(SHORT | {"train.num_threads": 1}))
    return run


def build_command(short_run: Path, token_shards: Path, run: Path, stages: list[dict[str, Any]], *more: str,
                  **settings: Any) -> list[str]:
    all_settings = LONG | {"extend.stages": json.dumps(stages)} | {f"extend.gate.{name}": v
                                                                   for name, v in settings.items()}
    return ["extend", "tiny-solar-open", "--from", str(short_run), "--data", str(token_shards), "--run",
            str(run), *format_set_options(all_settings), *more]


@pytest.mark.essential
def test_two_stages_with_rehearsal_and_an_open_gate(short_run: Path, token_shards: Path,
                                                    tmp_path: Path) -> None:
    run = tmp_path / "long"
    rehearsal = {"name": "rehearsal", "share": 0.5, "blend": {"first/64": 1}}
    stages = [{"name": "near", "seq_len": 96, "steps": 2, "max_steps": 4, "parts": [rehearsal]},
              {"name": "far", "seq_len": 192, "steps": 1, "lr": 1e-3, "rope_theta": 5e6}]
    assert main(build_command(short_run, token_shards, run, stages, every_steps=1, min_accuracy=0,
                              loss_tolerance_nats=9)) == 0
    near, far = run / "stages" / "1-near", run
    near_config, far_config = (json.loads((folder / "config.json").read_text()) for folder in (near, far))
    assert [(c["data"]["phases"][0]["seq_len"], c["train"]["steps"]) for c in (near_config, far_config)] == [
        (96, 4), (192, 1)]
    assert near_config["model"]["yarn"]["factor"] == 1.5  # 96 / 64 tokens
    assert (far_config["model"]["yarn"], far_config["model"]["rope_theta"]) == (None, 5e6)
    assert far_config["optim"]["lr"] == 1e-3
    # an open gate ends the stage at its 2 steps: not earlier, and not at its 4 max_steps
    assert [(e["step"], e["judged"], e["passed"]) for e in read_run_events(near, "gate")] == [
        (0, True, False), (1, True, False), (2, True, True)]
    completion = json.loads((near / "complete.json").read_text())
    assert (completion["step"], completion["gate"]["passed"]) == (2, True)
    starts = {e["start_loss"] for folder in (near, far) for e in read_run_events(folder, "gate")}
    assert len(starts) == 1, "both gates compare with the loss before the first stage"
    blend = near_config["data"]["phases"][0]["blend"]
    # the rehearsal's share of 0.5, of which a tenth is needle documents
    assert blend["first/64"] / sum(blend.values()) == pytest.approx(0.5 * 0.9)
    assert main(build_command(short_run, token_shards, run, stages, "--resume", every_steps=1,
                              min_accuracy=0)) == 0


def test_recipe_defines_its_extension_stages(short_run: Path, token_shards: Path, tmp_path: Path) -> None:
    """The published stages of Solar Open, tiny: long documents and rehearsal in both, YaRN in the second."""
    shorter = format_set_options({"extend.stages.0.seq_len": 80, "extend.stages.1.seq_len": 96,
                                  "extend.stages.1.yarn_original_tokens": 48, "train.micro_batch_size": 1})
    args = parse_settings(ExtendOptions, ["tiny-solar-open-extend", "--from", str(short_run), "--data",
                                          str(token_shards), "--run", str(tmp_path / "long"), *shorter])
    request = stage_request(args, "lm", lengthens=True)
    planned = plan_stages(request, find_checkpoint(short_run), args.run, 1)
    near, far = (stage.config for stage in planned)
    assert near.problems(1) == far.problems(1) == []
    (near_phase,), (far_phase,) = near.data.phases, far.data.phases
    assert (near_phase.name, near_phase.seq_len, near.train.steps) == ("32k", 80, 40)
    assert (far_phase.name, far_phase.seq_len, far.train.steps) == ("100k", 96, 40)
    assert (near.model.yarn, far.model.yarn) == (None, YarnConfig(2.0, 48))
    assert {"first@65", "first/64", "needle/64"} <= set(near_phase.blend)
    assert near.extend.gate.every_steps == 20


@pytest.mark.each(("stage", "message"), [
    ({"seq_len": 96, "kind": "midtraining"}, "needs a part named trajectories"),
    ({"seq_len": 96, "parts": [{"name": "replay", "share": 0.1}]},
     "a stage of kind extension can have long, rehearsal"),
    ({"seq_len": 96, "steps": 3, "max_steps": 2}, "max_steps = 2 must be at least steps = 3"),
    ({"seq_len": 96, "kind": "midtraining", "parts": [{"name": "trajectories", "share": 0.1}]},
     "data has no source of chats"),
    ({"seq_len": 96, "yarn_factor": 0.5}, "yarn_factor = 0.5 must be 0 or at least 1"),
])
def test_mistakes_are_named_before_anything_is_written(stage: dict[str, Any], message: str, short_run: Path,
                                                       token_shards: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "long"
    assert main(build_command(short_run, token_shards, run, [{"name": "a", "steps": 1} | stage])) == 2
    assert message in capsys.readouterr().err
    assert not run.exists()
