"""Our model is transformers' model: logits agree to rounding for both families,
and a wrong detail is seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_sov.cli import main
from megatron_sov.errors import UserError
from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron
from megatron_sov.obs.events import EVENTS, EventLog, read_events

prepare_megatron()

from megatron_sov.eval.parity import compare_logits, random_prompts  # noqa: E402

FAMILIES = ("solar_open", "exaone_moe")
PROMPTS = random_prompts([1, 6, 40, 300, 17], 1024)
"""The fourth is longer than Solar's original context (256) and than K-EXAONE's window (8)."""


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_for_packed_documents(family: str, imported: dict[str, Path], hf_models: dict[str, Path],
                                            one_rank: None) -> None:
    difference, greedy = compare_logits(imported[family], hf_models[family], PROMPTS)
    assert difference.passed and greedy.passed
    assert difference.value < 1e-4
    assert difference.limit > 2e-4, "logits of this size would agree whatever the model does"


PLAIN = {"rope_type": "default", "rope_theta": 1e6}
WRONG = [
    ("solar_open", {"rope_parameters": PLAIN | {"rope_type": "yarn", "factor": 4.0,
                                                "original_max_position_embeddings": 256}}),
    ("solar_open", {"rope_parameters": PLAIN}),
    ("solar_open", {"routed_scaling_factor": 1.6}),
    ("solar_open", {"num_experts_per_tok": 3}),
    ("exaone_moe", {"sliding_window": 9}),
    ("exaone_moe", {"layer_types": ["full_attention"] + ["sliding_attention"] * 4}),
    ("exaone_moe", {"rms_norm_eps": 1e-2}),
]


@pytest.mark.parametrize(("family", "change"), WRONG, ids=lambda x: str(x)[:40])
def test_a_wrong_detail_is_seen(family: str, change: dict, imported: dict[str, Path],
                                hf_models: dict[str, Path], one_rank: None, tmp_path: Path) -> None:
    other = shutil.copytree(hf_models[family], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | change))
    difference, _ = compare_logits(imported[family], other, PROMPTS)
    assert not difference.passed and difference.value > 3 * difference.limit


def test_the_command_prints_and_records_the_checks(imported: dict[str, Path], hf_models: dict[str, Path],
                                                   one_rank: None, tmp_path: Path, capsys) -> None:
    EventLog(tmp_path / EVENTS).close()
    ask = ["eval", "logits", str(imported["exaone_moe"])]
    assert main([*ask, str(hf_models["exaone_moe"]), "--run", str(tmp_path), "--json", "--lengths",
                 "5", "30"]) == 0
    shown = json.loads(capsys.readouterr().out)
    (event,) = read_events(tmp_path / EVENTS)
    assert (event["event"], event["checks"]) == ("conversion", shown)
    assert [(c["passed"], c["detail"]) for c in shown][1] == (True, "of 35")
    other = shutil.copytree(hf_models["exaone_moe"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": 1.0}))
    assert main([*ask, str(other)]) == 3
    assert "FAIL  largest difference of a logit" in capsys.readouterr().out
    assert main([*ask, str(tmp_path)]) == 2
    assert "is not a Hugging Face folder" in capsys.readouterr().err


def test_models_of_other_vocabularies_are_not_compared() -> None:
    from megatron_sov.eval.parity import _Difference

    with pytest.raises(UserError, match="the models have 10 and 12 token ids"):
        _Difference().add(0, torch.zeros(3, 10), torch.zeros(3, 12))
