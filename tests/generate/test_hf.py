"""transformers as an engine: what the folder's defaults say does not change what was asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_sov.errors import UserError
from megatron_sov.generate.hf import generate_hf, load_hf, next_tokens_hf

PROMPTS = [[5, 9, 2, 70], [300], [8, 8, 8, 8]]


def test_the_defaults_of_the_folder_do_not_count(hf_models: dict[str, Path], tmp_path: Path) -> None:
    plain = generate_hf(load_hf(hf_models["solar_open"]), PROMPTS, 10)
    opinionated = shutil.copytree(hf_models["solar_open"], tmp_path / "opinionated")
    defaults = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0, "eos_token_id": plain[0][0]}
    (opinionated / "generation_config.json").write_text(json.dumps(defaults))
    assert generate_hf(load_hf(opinionated), PROMPTS, 10) == plain
    assert all(len(c) == 10 for c in plain)


def test_greedy_text_is_made_of_the_most_probable_tokens(hf_models: dict[str, Path]) -> None:
    model = load_hf(hf_models["exaone_moe"])
    (continuation,) = generate_hf(model, PROMPTS[:1], 6)
    assert next_tokens_hf(model, [[*PROMPTS[0], *continuation[:-1]]], 6)[0].tolist() == continuation
    batched, alone = next_tokens_hf(model, PROMPTS), [next_tokens_hf(model, [p]) for p in PROMPTS]
    assert torch.equal(batched, torch.cat(alone))


def test_samples_depend_on_the_seed(hf_models: dict[str, Path]) -> None:
    model = load_hf(hf_models["solar_open"])
    first, again, other = (generate_hf(model, PROMPTS, 8, temperature=1.0, top_p=0.9, seed=s) for s in (1, 1, 2))
    assert first == again != other


def test_a_folder_that_does_not_load_is_named(hf_models: dict[str, Path], tmp_path: Path) -> None:
    broken = shutil.copytree(hf_models["solar_open"], tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match="broken: transformers cannot load it"):
        load_hf(broken)
