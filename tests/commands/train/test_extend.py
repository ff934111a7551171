"""`megatron-sov extend`: a run continues at a longer context, evaluated before and after."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.cli import main
from tests.run_files import read_run_events
from tests.typed_words import format_set_options

SMALL = {"model.vocab_size": 1024, "model.hidden_size": 32, "model.head_dim": 16, "model.expert_ffn_dim": 16,
         "model.num_experts": 4,
         "train.steps": 2, "train.global_batch_size": 4, "train.eval_every_steps": 0,
         "data.heldout_tokens": 300}
"""Settings of the short run; the long one takes the model from its checkpoint."""
LONG = {name: value for name, value in SMALL.items() if not name.startswith("model.")} | {
    "train.steps": 3, "needle.depths": "[0.0,0.9]", "needle.samples": 2}


@pytest.fixture
def short_run(request, one_rank: None, token_shards: Path, tmp_path: Path) -> Path:
    """A run of two steps at 64 tokens, of the recipe named by the test."""
    changes = {"data.phases": '[{"name":"main","seq_len":64}]', "train.micro_batch_size": 4}
    if request.param == "tiny-k-exaone":
        changes |= {"model.dense_ffn_dim": 32, "model.sliding_window_tokens": 8}
    run = tmp_path / "short"
    assert main(["pretrain", request.param, "--data", str(token_shards), "--run", str(run),
                 *format_set_options(SMALL | changes)]) == 0
    return run


def run_extend(recipe: str, short_run: Path, token_shards: Path, run: Path, **changes: Any) -> int:
    settings = LONG | {name.replace("__", "."): value for name, value in changes.items()}
    return main(["extend", recipe, "--from", str(short_run), "--data", str(token_shards), "--run", str(run),
                 *format_set_options(settings)])


@pytest.mark.parametrize("short_run", ["tiny-solar-open"], indirect=True)
def test_a_run_becomes_a_longer_one_with_needles(short_run: Path, token_shards: Path, tmp_path: Path,
                                                 capsys) -> None:
    run = tmp_path / "long"
    assert run_extend("tiny-solar-open", short_run, token_shards, run, needle__train_share=0.5) == 0
    config = json.loads((run / "config.json").read_text())
    assert [(p["name"], p["seq_len"]) for p in config["data"]["phases"]] == [("extend", 128)]
    assert config["model"]["yarn"]["factor"] == 2.0
    assert config["model"]["yarn"]["original_max_position_tokens"] == 64
    assert (config["model"]["hidden_size"], config["needle"]["lengths_tokens"]) == (32, [64, 128])
    before, after = read_run_events(run, "needle")
    assert [(event["when"], event["step"]) for event in (before, after)] == [("before", 0), ("after", 3)]
    for event in (before, after):
        cells = [(cell["length_tokens"], cell["depth"], cell["samples"]) for cell in event["cells"]]
        assert cells == [(64, 0.0, 2), (64, 0.9, 2), (128, 0.0, 2), (128, 0.9, 2)]
    completion = json.loads((run / "complete.json").read_text())
    assert (completion["needle"]["score"], completion["needle"]["cells"]) == (after["score"], after["cells"])
    consumed = read_run_events(run, "data_consumed")[-1]["tokens"]
    assert sum(consumed.values()) == 12 * 128  # 3 steps x 4 samples of 128 tokens
    assert consumed["needle"] == 6 * 128  # half of them
    assert "needle retrieval before the extension" in capsys.readouterr().out


@pytest.mark.deep
@pytest.mark.parametrize("short_run", ["tiny-solar-open"], indirect=True)
def test_needles_keep_their_share_in_a_blend_and_mistakes_are_named(short_run: Path, token_shards: Path,
                                                                    tmp_path: Path, capsys) -> None:
    blend = '[{"name":"a","seq_len":96,"blend":{"first":2.0,"second":1.0}}]'
    run = tmp_path / "long"
    assert run_extend("tiny-solar-open", short_run, token_shards, run, needle__train_share=0.25,
                      data__phases=blend) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["phases"][0]["blend"] == {"first": 2.0, "second": 1.0, "needle": 1.0}
    assert read_run_events(run, "data_consumed")[-1]["tokens"]["needle"] == 3 * 96  # a quarter of 12 samples
    for settings, sentence in (
        ({"needle__train_share": 1.0}, "needle.train_share = 1 must be below 1"),
        ({"needle__lengths_tokens": "[16]"}, "needle length 16"),
        ({"data__phases": '[{"name":"a","seq_len":96,"blend":{"first":1,"needle/12":1}}]'},
         "are too short for a needle and its question"),
        ({"data__phases": '[{"name":"a","seq_len":32}]'},
         "data.phases: seq_len = 32 is shorter than the 64 tokens that"),
    ):
        assert run_extend("tiny-solar-open", short_run, token_shards, tmp_path / "other", **settings) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
