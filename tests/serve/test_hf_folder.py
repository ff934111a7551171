"""Serving a Hugging Face folder with transformers: greedy answers equal `generate`; refused requests."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

PROMPTS = ["def parse(self", "The ", "import argparse\n" * 5, "한국어 ", "x"]
NUM_NEW_TOKENS = 12


@pytest.fixture
def folder(tmp_path: Path, token_shards: Path) -> Path:
    """A tiny random GPT-2, a family that this project cannot import, with a tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_embd=32, n_layer=2, n_head=2, n_positions=256,
                                         max_position_embeddings=256, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    network.save_pretrained(tmp_path / "gpt2")
    shutil.copytree(token_shards / "tokenizer", tmp_path / "gpt2", dirs_exist_ok=True)
    return tmp_path / "gpt2"


def remove_special_tokens(text: str) -> str:
    """Return a text without special tokens; a server shows only those of chats."""
    return re.sub(r"<\|\w+\|>", "", text)


def test_greedy_answers_are_those_of_generate(folder: Path, serving: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        output = network.generate(ids, max_new_tokens=NUM_NEW_TOKENS, do_sample=False, eos_token_id=-1,
                                  pad_token_id=0)
        expected.append(remove_special_tokens(tokenizer.decode(output[0, ids.shape[1]:])))
    assert len(set(expected)) > 3
    with serving(folder, "--max-batch", "2", "--max-length", "128") as served:
        client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)

        def ask(prompt: str) -> str:
            return str(client.completions.create(
                model=served.model, prompt=prompt, max_tokens=NUM_NEW_TOKENS, temperature=0,
                extra_body={"ignore_eos": True}).choices[0].text)

        # more requests than slots
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            assert list(map(remove_special_tokens, pool.map(ask, PROMPTS))) == expected
        assert remove_special_tokens(ask(PROMPTS[0])) == expected[0]


@pytest.mark.parametrize(("words", "message"), [
    (["--nproc", "2"], "--nproc 2: "),
    (["--set", "parallel.tp=2", "--set", "train.precision=bf16"], "--set parallel.tp=2: "),
    (["--set", "train.precision=fp12"], "--set train.precision=fp12: must be one of")])
def test_a_layout_is_for_checkpoints(words: list[str], message: str, folder: Path, get_refusal: Any) -> None:
    errors = get_refusal("serve", str(folder), *words)
    assert message in errors and ("convert from-hf" in errors or "precision=fp12" in errors)


def test_latent_attention_is_served_from_a_checkpoint(folder: Path, one_rank: None, get_refusal: Any) -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    small = DeepseekV3ForCausalLM(DeepseekV3Config(
        vocab_size=1024, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8,
        qk_nope_head_dim=8, first_k_dense_replace=1, max_position_embeddings=64))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    small.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["kv_lora_rank"] == 8
    errors = get_refusal("serve", str(folder), "--port", "0")
    assert "kv_lora_rank = 8: latent attention has no cache" in errors
    assert "serve a checkpoint from `megatron-sov convert from-hf`" in errors
