"""Held-out loss: one number for the trainer's evaluator and for transformers, on exactly the same targets."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sov.artifacts import atomic_write, to_json
from megatron_sov.cli import main
from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron
from megatron_sov.obs import work_bar
from megatron_sov.obs.events import EVENTS, EventLog, read_events

prepare_megatron()

from megatron_sov.data.token_shards import open_sources  # noqa: E402
from megatron_sov.eval.heldout import (  # noqa: E402
    evaluate_bigram,
    evaluate_rows,
    open_heldout,
)

CUT = ["--seq-len", "100", "--max-tokens", "1500"]


def ask(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    assert main(["eval", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", ["solar_open", "exaone_moe"])
def test_checkpoint_and_hugging_face_folder_have_one_loss(
        family: str, one_rank: None, imported: dict[str, Path], hf_models: dict[str, Path],
        token_shards: Path, capsys) -> None:
    ours, theirs = (ask(capsys, "ppl", str(folders[family]), "--data", str(token_shards), *CUT)
                    for folders in (imported, hf_models))
    assert set(ours) == {"first", "second"}
    for name, result in ours.items():
        assert result["tokens"] == theirs[name]["tokens"] > 1000
        assert result["loss"] == pytest.approx(theirs[name]["loss"], abs=2e-6)
        assert result["bits_per_byte"] == pytest.approx(theirs[name]["bits_per_byte"], abs=2e-6)


def test_the_baseline_is_judged_on_the_same_targets(one_rank: None, imported: dict[str, Path],
                                                    token_shards: Path, capsys) -> None:
    model = ask(capsys, "ppl", str(imported["solar_open"]), "--data", str(token_shards), *CUT)
    baseline = ask(capsys, "bigram", "--data", str(token_shards), *CUT)
    shards = {s.name: s.shard("heldout") for s in open_sources({str(token_shards): 1.0}, 1024)}
    for name, result in baseline.items():
        shard = shards[name]
        flat = [[*shard.tokens(i, 0, int(n))] for i, n in enumerate(shard.lengths)]
        budget, expected = 1500, 0  # 15 rows of 100: a token counts if a token follows it in its document
        for document in flat:
            expected += min(max(len(document) - 1, 0), budget)
            budget = max(0, budget - len(document))
        assert result["tokens"] == model[name]["tokens"] == expected
        assert 2.0 < result["loss"] < math.log(1024)
        bytes_judged = result["loss"] * result["tokens"] / math.log(2) / result["bits_per_byte"]
        assert bytes_judged == pytest.approx(model[name]["loss"] * expected / math.log(2)
                                             / model[name]["bits_per_byte"])


def test_more_training_text_makes_a_better_baseline(token_shards: Path) -> None:
    data = open_heldout({str(token_shards): 1.0}, 256, 65536)
    few, all_ = (evaluate_bigram(data, tokens) for tokens in (300, 1 << 30))
    assert all(all_[name].loss < few[name].loss - 0.5 for name in few)


def test_figures_go_into_the_events_of_a_run(one_rank: None, imported: dict[str, Path],
                                             hf_models: dict[str, Path], token_shards: Path, tmp_path: Path,
                                             capsys) -> None:
    log = EventLog(tmp_path / EVENTS)
    log.write("step", step=41, loss=1.0)
    log.close()
    config = {"recipe": "tiny", "model": {"family": "solar_open", "vocab_size": 1024, "hidden_size": 32,
                                          "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
              "data": {"phases": [{"name": "a", "seq_len": 100}], "heldout_tokens": 1500}}
    atomic_write(tmp_path / "config.json", to_json(config))
    run = ["--data", str(token_shards), "--run", str(tmp_path)]
    cut = ask(capsys, "bigram", "--data", str(token_shards), *CUT)
    assert ask(capsys, "bigram", *run) == cut, "without options it judges as the run itself does"
    ours = ask(capsys, "ppl", str(imported["solar_open"]), *run, *CUT)
    theirs = ask(capsys, "ppl", str(hf_models["solar_open"]), *run, *CUT)
    baseline, checkpoint, export = [e for e in read_events(tmp_path / EVENTS) if e["event"] != "step"]
    assert (baseline["event"], baseline["bigram"]) == ("baseline", cut)
    assert (checkpoint["event"], checkpoint["step"], checkpoint["heldout"]) == ("eval", 0, ours)
    assert (export["event"], export["step"], export["heldout"]) == ("eval", 41, theirs)


def test_who_waits_is_told_of_every_row(token_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_heldout({str(token_shards): 1.0}, 100, 1500)
    shown: list[int] = []

    class Bar(work_bar.tqdm):  # type: ignore[name-defined, misc]
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings | {"disable": False, "file": io.StringIO()})

        def close(self) -> None:
            shown[:] = [self.n, self.total]

    monkeypatch.setattr(work_bar, "tqdm", Bar)
    evaluate_rows(data, lambda row: np.ones(len(row.tokens)))
    num_rows = sum(len(list(data.rows(index))) for index, _ in data.judged())
    assert shown == [num_rows, num_rows] and num_rows > 10
