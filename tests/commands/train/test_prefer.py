"""`megatron-sov prefer`: pairs and groups, starts from a run, and a reference that is computed once."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main as sov_data
from tests.run_files import read_run_events
from tests.typed_words import format_set_options

MODEL = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.num_experts=4",
         'data.phases=[{"name": "main", "seq_len": 128}]', "train.global_batch_size=4",
         "train.micro_batch_size=2", "train.steps=2", "optim.lr=0.004")


def build_command(name: str, data: Path, run: Path, *more: str) -> list[str]:
    settings = format_set_options(MODEL)
    return [name, "tiny-solar-open", "--data", str(data), "--run", str(run), *settings, *more]


@pytest.mark.deep
@pytest.mark.distributed
def test_a_model_learns_from_pairs_and_from_groups(packed_data: Any, run_checked: Any, tmp_path: Path,
                                                   get_refusal: Any) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(
        {"prompt": f"{i} plus 1?", "chosen": f"{i + 1}.", "rejected": f"{i}, I am sure."})
        for i in range(40)))
    (tmp_path / "judged.jsonl").write_text("\n".join(json.dumps(
        {"prompt": f"{i} plus 1?", "responses": [{"content": f"{i + 1}.", "reward": 1},
                                                 {"content": f"{i}.", "reward": 0}]}) for i in range(40)))
    pack = ["pack", "--tokenizer", str(packed_data.tokenizer), "--heldout", "0.2", "--workers", "1"]
    assert sov_data([*pack, "--format", "preference", "--input", str(tmp_path / "pairs.jsonl"), "--output",
                     str(tmp_path / "pairs")]) == 0
    assert sov_data(["groups", "--input", str(tmp_path / "judged.jsonl"), "--output",
                     str(tmp_path / "judged")]) == 0
    assert sov_data([*pack, "--format", "chat", "--column", "advantage", "--column", "group_share", "--input",
                     str(tmp_path / "judged/groups.jsonl"), "--output", str(tmp_path / "groups")]) == 0
    base, tuned, grouped = (tmp_path / name for name in ("base", "tuned", "grouped"))
    run_checked(*build_command("pretrain", packed_data.text, base))
    result = run_checked(*build_command("prefer", tmp_path / "pairs", tuned, "--from", str(base),
                                        "--nproc", "2", "--method", "dpo"))
    steps = read_run_events(tuned, "step")
    # ln 2: in the first step, the model equals its reference
    assert steps[0]["losses"]["preference"] == pytest.approx(0.693147, abs=1e-5)
    assert set(steps[1]["meters"]) == {"pairs_right", "margin", "chosen_logprob", "rejected_logprob"}
    before, after = read_run_events(tuned, "heldout_pairs")
    assert (before["step"], before["pairs_right"], before["margin"]) == (0, 0.5, 0.0)
    measured = json.loads((tuned / "complete.json").read_text())["heldout_pairs"]["pairs"]
    assert after["step"] == 2 and measured == {name: after[name] for name in measured}
    assert measured["pairs"] > 0 and set(measured) == {"pairs", "chosen_likelier", "pairs_right", "margin"}
    assert "held-out pairs right 50 % -> " in result.stderr and "held-out margin 0 -> " in result.stderr

    run_checked("convert", "to-hf", str(tuned), str(tmp_path / "hf"), "--workers", "1")
    for target in (tuned, tmp_path / "hf"):
        run_checked("eval", "pairs", str(target), "--data", str(tmp_path / "pairs"), "--seq-len",
                    "128", "--output", str(tmp_path / "judged.json"))
        assert json.loads((tmp_path / "judged.json").read_text()) == {
            "pairs": {name: measured[name] for name in ("pairs", "chosen_likelier")}}

    run_checked(*build_command("prefer", tmp_path / "groups", grouped, "--from", str(base),
                               "--method", "grouper"))
    assert not (grouped / "reference").exists()

    exports = ("--set", "train.export_every_checkpoints=1", "--set", 'evaluate.background.tasks=["ppl"]')
    words = build_command("prefer", tmp_path / "pairs", tmp_path / "no", "--from", str(base), *exports)
    assert "ppl cannot use source 'pairs', which holds data of format 'preference'; use pairs" in (
        get_refusal(*words))
    words = build_command("prefer", packed_data.chats, tmp_path / "no", "--from", str(base))
    assert "holds data of format 'chat'" in get_refusal(*words)
    assert "has no column 'advantage'" in get_refusal(*words, "--method", "grouper")
    assert not (tmp_path / "no").exists()
