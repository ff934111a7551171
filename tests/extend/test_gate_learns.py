"""The gate on a model that really learns: it fails while retrieval is not there, and passes when it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sov.obs.events import EVENTS, read_events

SIZES = {"model.vocab_size": 1024, "model.hidden_size": 64, "model.num_layers": 2,
         "model.attention_pattern": "LG", "model.num_dense_layers": 2, "model.dense_ffn_dim": 64,
         "model.sliding_window_tokens": 16, "model.init_std": 0.1, "model.num_mtp_layers": 0}
"""A sliding layer and a NoPE one: what retrieval needs at least."""
ALWAYS = {"train.num_threads": 1, "train.global_batch_size": 16, "train.micro_batch_size": 16,
          "train.eval_every_steps": 0, "train.checkpoint_every_steps": 1000, "data.heldout_tokens": 1000,
          "data.max_epochs": 0}
LEARN = {"optim.name": "muon", "optim.muon_scale": "original", "optim.lr": 2e-2, "optim.min_lr": 2e-2,
         "optim.weight_decay": 0, "optim.schedule": "constant", "optim.warmup_steps": 20,
         "needle.kinds": '["single"]', "needle.lengths_tokens": "[64]", "needle.depths": "[0.0,0.9]",
         "needle.samples": 10, "needle.train_share": 0, "extend.gate.every_steps": 50,
         "extend.gate.min_accuracy": 0.7, "extend.gate.max_overlap": 1}


def words(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def test_a_stage_ends_when_its_model_has_learned_to_retrieve(token_shards: Path, tmp_path: Path,
                                                             run_command: Any) -> None:
    """From nothing: a plateau of some hundred steps, then the answers; no needle of the
    test was in training."""
    short, run = tmp_path / "short", tmp_path / "long"
    begin = {"data.phases": '[{"name":"text","seq_len":32}]', "train.steps": 1}
    done = run_command("pretrain", "tiny-k-exaone", "--data", str(token_shards), "--run", str(short),
                       *words(SIZES | ALWAYS | begin))
    assert done.returncode == 0, done.stderr
    stage = {"name": "near", "seq_len": 64, "steps": 1, "max_steps": 800, "blend": {"needle": 1}}
    done = run_command("extend", "tiny-k-exaone", "--from", str(short), "--data", str(token_shards), "--run",
                       str(run), *words(ALWAYS | LEARN | {"extend.stages": json.dumps([stage])}))
    assert done.returncode == 0, done.stderr
    gate = json.loads((run / "complete.json").read_text())["gate"]
    checks = [e for e in read_events(run / EVENTS) if e["event"] == "gate"]
    shares = [sum(r["correct"] for r in e["rows"]) / 20 for e in checks]
    assert shares[:2] == [0.0, 0.0], "nothing is retrieved at first"
    assert shares[-1] >= 0.7 and max(shares[:-1]) < 0.7
    assert [e["passed"] for e in checks] == [False] * (len(checks) - 1) + [True]
    assert gate["passed"] and len(gate["checks"]) == len(checks) and 100 <= gate["checks"][-1]["step"] < 800
    assert checks[-1]["loss"] < checks[0]["loss"]
