"""A served model with linear attention: requests of several lengths at once, in fewer slots, get what
`generate` writes for each alone, and what its layers keep does not grow with the length."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from megatron_sov.cli import main

PROMPTS = ["def parse(self, text):\n    return", "The ", "import argparse\n" * 6, "한국어 ", "x", "class A:"]
NEW = 9


@pytest.fixture
def hybrid(tmp_path: Path, token_shards: Path, solar_open2: None) -> Path:
    """A checkpoint of a tiny random model, three of whose four layers attend linearly."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_sov import convert, recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.model.families import supported as models
    from megatron_sov.model.families.family import TokenIds

    model = apply_settings(recipes.get("tiny-solar-open2"), [
        "model.vocab_size=1024", "model.hidden_size=32", "model.num_experts=4", "model.expert_ffn_dim=16",
        "model.num_mtp_layers=0"]).model
    config = AutoConfig.for_model(**models.get(model.family).to_hf_config(model, "float32", TokenIds()))
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    reference.save_pretrained(tmp_path / "hf")
    shutil.copytree(token_shards / "tokenizer", tmp_path / "hf", dirs_exist_ok=True)
    convert.from_hf(tmp_path / "hf", tmp_path / "hybrid")
    return tmp_path / "hybrid"


def test_requests_at_once_get_what_generate_writes(hybrid: Path, serving: Any, one_rank: None,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    asked = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert main(["generate", str(hybrid), *asked, "--max-new-tokens", str(NEW), "--json"]) == 0
    expected = [found["text"] for found in json.loads(capsys.readouterr().out)]
    assert len(set(expected)) > 3
    with serving(hybrid, "--max-batch", "2", "--set", "train.num_threads=1") as served:
        client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)

        def ask(prompt: str) -> str:
            return client.completions.create(model=served.model, prompt=prompt, max_tokens=NEW,
                                             temperature=0).choices[0].text

        # slots are taken by one sequence after another: whose state stayed would be heard in the next
        for _ in range(2):
            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                assert list(pool.map(ask, PROMPTS)) == expected


def kept(longest: list[int]) -> list[dict[str, int]]:
    """Return the numbers that layers of each kind keep of two sequences, for caches of several lengths."""
    import torch

    from megatron_sov.engine.decode.cached_decoder import CachedDecoder
    from megatron_sov.engine.decode.forward_only import ForwardModel
    from megatron_sov.engine.model.cache_rows import CacheSize, CacheSpan
    from megatron_sov.engine.model.kv_cache import CachedAttention
    from megatron_sov.engine.parallel import world
    from tests.tiny import tiny_model

    _, model = tiny_model("tiny-solar-open2", "model.num_experts=4", layout={})
    found = []
    for tokens in longest:
        with CachedDecoder(ForwardModel(model, 50), CacheSize(2, tokens)) as decoder:
            for past, length in ((0, 7), (7, 1), (8, 1)):
                spans = [CacheSpan(slot, past, [5] * length) for slot in range(2)]
                decoder.read(spans, decoder.common_row_tokens(2 * length))
            sizes = {"linear": 0, "attention": 0}
            for layer in decoder._layers:
                kind = "attention" if isinstance(layer, CachedAttention) else "linear"
                tensors = layer.stored or () if isinstance(layer, CachedAttention) else vars(layer).values()
                sizes[kind] += sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))
            found.append(sizes)
    world.leave()
    return found


@pytest.mark.distributed
def test_what_linear_layers_keep_is_constant_in_length(ranks: Any, job: Any) -> None:
    ((short, long),) = ranks(job(__file__, "kept", 1, {"longest": [64, 4096]}))[0]
    assert short["linear"] == long["linear"] > 0
    assert long["attention"] == short["attention"] * (4096 + 1) // (64 + 1)
