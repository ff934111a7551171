"""Training from a Hugging Face folder: the first loss equals that model's loss on the first batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sov.model.config import from_dict
from megatron_sov.train.data.order import SampleOrder
from megatron_sov.train.data.rows import build_row
from megatron_sov.train.data.sources import open_sources
from tests.run_files import read_run_events
from tests.typed_words import format_set_options

SETTINGS = ('data.phases=[{"name": "main", "seq_len": 64}]', "train.global_batch_size=4",
            "train.micro_batch_size=2", "train.steps=2", "data.heldout_tokens=128")


def test_the_first_step_has_the_models_own_loss(tmp_path: Path, hf_models: dict[str, Path],
                                                token_shards: Path, run_checked: Any) -> None:
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    run_checked("pretrain", "tiny-solar-open", "--data", str(token_shards), "--run", str(run), "--from",
                str(hf_models["solar_open"]), "--nproc", "2", *format_set_options(SETTINGS))
    first_step = read_run_events(run, "step")[0]

    config = from_dict(json.loads((run / "config.json").read_text()))
    sources = open_sources(config.data.paths, config.model.vocab_size)
    entry, samples = SampleOrder(config, sources).next_batch()
    model = AutoModelForCausalLM.from_pretrained(hf_models["solar_open"], dtype=torch.float32)
    loss_sum = weight_sum = 0.0
    for sample in samples:
        row = build_row(sample, sources[sample.source].open_split("train"), entry.seq_len)
        for start, end in zip(row.bounds, row.bounds[1:], strict=False):  # one document of the row
            with torch.no_grad():
                input_ids = torch.from_numpy(row.tokens[start:end])[None]
                logits = model(input_ids=input_ids, use_cache=False).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(row.labels[start:end]),
                                                       reduction="none")
            weights = torch.from_numpy(row.weights[start:end])
            loss_sum += float((losses * weights).sum())
            weight_sum += float(weights.sum())
    assert first_step["loss"] == pytest.approx(loss_sum / weight_sum, abs=1e-5)
