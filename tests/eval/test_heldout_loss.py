"""Held-out documents are cut into rows, and unusable data are rejected."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_sov.base.artifacts import format_json, write_atomically
from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.eval.heldout_loss import HeldoutData, evaluate_rows, group_into_rows, open_heldout
from megatron_sov.runs.obs.events import EVENTS, EventLog, read_events
from megatron_sov.train.data.sources import open_sources


def test_loss_per_byte_of_known_losses(token_shards: Path) -> None:
    """With ln 2 nats per target byte, each source has exactly 1 bit per byte."""
    data = open_heldout({str(token_shards): 1.0}, 90, 2000)
    sizes = data.bytes_of_token(1024)  # UTF-8 bytes per token id
    assert sizes is not None
    results = evaluate_rows(data,
                            lambda row: np.where(row.weights > 0, sizes[row.labels] * math.log(2), math.nan))
    assert set(results) == {"first", "second"}
    for result in results.values():
        assert result.bits_per_byte == pytest.approx(1.0, rel=1e-12)
        assert 1000 < result.tokens < 2000


def test_data_without_learned_tokens_are_rejected(token_shards: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    rows = HeldoutData.rows
    monkeypatch.setattr(HeldoutData, "rows", lambda self, index: (
        dataclasses.replace(row, weights=0 * row.weights) for row in rows(self, index)))
    with pytest.raises(UserError, match="held-out tokens have loss weight 0"):
        open_heldout({str(token_shards): 1.0}, 90, 2000)


def test_data_without_heldout_documents_are_rejected(one_rank: None, imported: dict[str, Path],
                                                     token_shards: Path, tmp_path: Path, capsys) -> None:
    other = shutil.copytree(token_shards, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["eval", "ppl", str(imported["solar_open"]), "--data", str(other)]) == 2
    assert "2 ids mean other tokens than in" in capsys.readouterr().err
    manifest = json.loads((other / "manifest.json").read_text())
    for source in manifest["content"]["sources"]:
        source["splits"]["heldout"]["num_tokens"] = 0
    (other / "manifest.json").write_text(json.dumps(manifest | {"sha256": ""}))
    assert main(["eval", "ppl", str(imported["solar_open"]), "--data", str(other)]) == 2
    assert "has no held-out documents" in capsys.readouterr().err


LIMITS = ["--seq-len", "100", "--max-tokens", "1500"]


def read_printed_result(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    assert main(["eval", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", ["solar_open", pytest.param("exaone_moe", marks=pytest.mark.deep)])
def test_checkpoint_and_export_have_equal_loss(family: str, one_rank: None, imported: dict[str, Path],
                                               hf_models: dict[str, Path], token_shards: Path,
                                               capsys) -> None:
    ours, theirs = (read_printed_result(capsys, "ppl", str(folders[family]), "--data", str(token_shards),
                                        *LIMITS)
                    for folders in (imported, hf_models))
    assert set(ours) == {"first", "second"}
    for name, result in ours.items():
        assert result["tokens"] == theirs[name]["tokens"] > 1000
        assert result["loss"] == pytest.approx(theirs[name]["loss"], abs=2e-6)
        assert result["bits_per_byte"] == pytest.approx(theirs[name]["bits_per_byte"], abs=2e-6)


@pytest.mark.tier1_cases(1)
@pytest.mark.parametrize("seq_len", [512, 400, 60, 33])
def test_loss_equals_documents_and_strided_windows(seq_len: int, one_rank: None, imported: dict[str, Path],
                                                   hf_models: dict[str, Path], token_shards: Path,
                                                   capsys) -> None:
    """The reference: transformers' model on one document or window at a time, in a plain loop."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_models["solar_open"], dtype=torch.float32)
    result = read_printed_result(capsys, "ppl", str(imported["solar_open"]), "--data", str(token_shards),
                                 "--seq-len", str(seq_len), "--max-tokens", "1500")
    for source in open_sources({str(token_shards): 1.0}, 1024):
        shard, budget, total_loss, num_labels = source.open_split("heldout"), 1500, 0.0, 0
        for document, length in enumerate(shard.lengths):
            # the document's first tokens within the budget, and the label of the last one
            ids = torch.from_numpy(shard.tokens(document, 0, min(int(length), budget + 1)).astype(np.int64))
            budget -= min(int(length), budget)
            predicted = 1  # tokens without a label, or with a loss already
            while predicted < len(ids):
                # later windows spend half of their length on context
                num_new = seq_len if predicted == 1 else seq_len // 2
                end = min(predicted + num_new, len(ids))
                window = ids[max(0, end - 1 - seq_len):end]
                with torch.no_grad():
                    logits = model(window[None, :-1]).logits[0]
                losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
                total_loss += float(losses[-(end - predicted):].double().sum())
                num_labels += end - predicted
                predicted = end
            if not budget:
                break
        assert result[source.name]["tokens"] == num_labels
        assert result[source.name]["loss"] == pytest.approx(total_loss / num_labels, abs=2e-6)


def test_heldout_losses_are_recorded_as_events(one_rank: None, imported: dict[str, Path],
                                               hf_models: dict[str, Path], token_shards: Path, tmp_path: Path,
                                               capsys) -> None:
    log = EventLog(tmp_path / EVENTS)
    log.write("step", step=41, loss=1.0)
    log.close()
    config = {"recipe": "tiny", "model": {"family": "solar_open", "vocab_size": 1024, "hidden_size": 32,
                                          "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
              "data": {"phases": [{"name": "a", "seq_len": 100}], "heldout_tokens": 1500}}
    write_atomically(tmp_path / "config.json", format_json(config))
    run_options = ["--data", str(token_shards), "--run", str(tmp_path)]
    ours = read_printed_result(capsys, "ppl", str(imported["solar_open"]), *run_options, *LIMITS)
    theirs = read_printed_result(capsys, "ppl", str(hf_models["solar_open"]), *run_options, *LIMITS)
    # the checkpoint has a step of its own, the export gets the run's last step
    checkpoint, export = [e for e in read_events(tmp_path / EVENTS) if e["event"] != "step"]
    assert (checkpoint["event"], checkpoint["step"], checkpoint["heldout"]) == ("eval", 0, ours)
    assert (export["event"], export["step"], export["heldout"]) == ("eval", 41, theirs)


def test_rows_group_documents_in_order() -> None:
    assert group_into_rows([3, 4, 2, 9, 1, 20, 1], row_tokens=9) == [[0, 1, 2], [3], [4], [5], [6]]
    assert group_into_rows([]) == []
