"""transformers as an engine: requests, log-probabilities, weight updates, and folders that it refuses."""

import dataclasses
import io
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import DeepseekV3Config

from megatron_sov.base.errors import UserError
from megatron_sov.infer.engines.transformers_engine import (
    PAGE_TOKENS, HfEngine, compute_cache_sizes, copy_weights, get_live_views, load_hf)
from megatron_sov.infer.request import Batching, Sampling, StopRule

PROMPTS = [[5, 9, 2, 70], [300], [8, 8, 8, 8], list(range(100, 140))]


def test_generation_defaults_of_the_folder_are_ignored(hf_models: dict[str, Path], tmp_path: Path,
                                                       logged: list[logging.LogRecord]) -> None:
    expected = HfEngine(load_hf(hf_models["solar_open"])).generate(PROMPTS, Sampling(10)).continuations
    with_defaults = shutil.copytree(hf_models["solar_open"], tmp_path / "opinionated")
    defaults = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0,
                "eos_token_id": expected[0][0]}
    (with_defaults / "generation_config.json").write_text(json.dumps(defaults))
    assert HfEngine(load_hf(with_defaults)).generate(PROMPTS, Sampling(10)).continuations == expected
    assert all(len(c) == 10 for c in expected)
    assert not logged


def test_ignored_config_fields_are_rejected(hf_models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(hf_models["exaone_moe"], tmp_path / "second")
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"]
    for field, value in (("swiglu_limits", [0.0] * (layers - 1) + [7.0]),
                         ("sliding_windows", [4, 8] * layers)):
        (folder / "config.json").write_text(json.dumps(config | {field: value[:layers]}))
        with pytest.raises(UserError, match=f"does not read {field} of config.json, and would compute"):
            load_hf(folder)


def test_streams_are_part_of_the_seed_and_routes_are_refused(hf_models: dict[str, Path]) -> None:
    engine = HfEngine(load_hf(hf_models["solar_open"]))
    first, same_streams, other_streams = (engine.generate(PROMPTS, Sampling(4, temperature=1.0),
                                                          streams=range(s, s + 4))
                                          for s in (0, 0, 4))
    assert first == same_streams != other_streams
    with pytest.raises(UserError, match="--engine transformers:"):
        engine.generate(PROMPTS, Sampling(8, with_routes=True))


def test_unloadable_folder_is_named(hf_models: dict[str, Path], tmp_path: Path) -> None:
    damaged = shutil.copytree(hf_models["solar_open"], tmp_path / "broken")
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[:len(content) // 2])
    with pytest.raises(UserError, match=r"broken/model\.safetensors: cannot be read"):
        load_hf(damaged)
    (damaged / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"broken: has neither model\.safetensors nor"):
        load_hf(damaged)


@pytest.mark.each("longest", [10, 1000, 16_384, 131_072, 262_144, 1 << 20])
def test_mask_size_is_bounded_at_any_length(longest: int) -> None:
    slots, pages, pass_tokens = compute_cache_sizes(20, longest, Batching())
    assert pages * PAGE_TOKENS >= slots * longest
    assert 4 * pass_tokens * (pages * PAGE_TOKENS + pass_tokens) < 1.1 * 2**30, (
        "bytes of a mask in fp32, whole")
    assert pass_tokens >= min(1000, slots * longest, 2**28 // (longest + 2 * PAGE_TOKENS)), (
        "one long sequence is not read token by token")
    assert pass_tokens <= slots * longest, "a few short sequences need no large mask"
    assert slots == (20 if longest < 13_000 else max(1, 2**18 // (longest + 2 * PAGE_TOKENS)))


def test_prompts_without_memory_are_reported(hf_models: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="answered 0 of 1"):
        HfEngine(load_hf(hf_models["solar_open"])).generate([[5, 9, 2]], Sampling(10_000_000_000))


def test_code_in_a_folder_is_never_run(hf_models: dict[str, Path], tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(hf_models["solar_open"], tmp_path / "foreign")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    with pytest.raises(UserError, match=r"no class for model_type = 'evil' of config\.json"):
        load_hf(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.tier1_cases(1)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_of_the_sampled_distribution(temperature: float, hf_models: dict[str, Path]) -> None:
    """Compares with one forward pass over prompt and continuation, without a cache."""
    model = load_hf(hf_models["exaone_moe"])
    sampling = Sampling(12, temperature, seed=1, for_training=True)
    result = HfEngine(model, Batching(2, 5)).generate(PROMPTS, sampling, stop=StopRule((7,)))
    for prompt, tokens, logprobs in zip(PROMPTS, result.continuations, result.logprobs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0]
        expected = (logits / (temperature or 1)).log_softmax(-1)[len(prompt) - 1:-1].gather(
            1, torch.tensor(tokens)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(logprobs), expected, atol=1e-5, rtol=0)
    assert result.finish_reasons == ["stop" if c[-1] == 7 else "length" for c in result.continuations]
    assert (result.temperature, result.version) == (temperature, 0)


def test_truncated_sampling_for_training_needs_permission(hf_models: dict[str, Path]) -> None:
    engine = HfEngine(load_hf(hf_models["solar_open"]))
    sampling = Sampling(3, 1.0, top_k=1, for_training=True)
    with pytest.raises(UserError, match="samples for training"):
        engine.generate(PROMPTS, sampling)
    result = engine.generate(PROMPTS, dataclasses.replace(sampling, allow_truncation=True))
    assert all(logprob == 0 for logprobs in result.logprobs
               for logprob in logprobs), "of one token, it is certain"


def test_latent_attention_is_rejected() -> None:
    model = SimpleNamespace(config=DeepseekV3Config())
    with pytest.raises(UserError, match="kv_lora_rank = 512:"):
        HfEngine(model).generate([[1, 2]], Sampling(2))


def redraw_weights(folder: Path) -> Any:
    """Return the folder's model with other random weights."""
    model = load_hf(folder)
    torch.manual_seed(7)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn_like(tensor) * 0.1)
    return model


@pytest.mark.parametrize("family", ["solar_open", "exaone_moe"])
def test_live_views_write_to_the_model(family: str, hf_models: dict[str, Path], cwd: Path) -> None:
    written = load_file(hf_models[family] / "model.safetensors")
    model = redraw_weights(hf_models[family])
    views = get_live_views(model)
    assert {name: view.shape for name, view in views.items()} == {n: t.shape for n, t in written.items()}
    addresses = {name: t.data_ptr() for name, t in model.state_dict().items()}
    copy_weights(model, written.items())
    expected = load_hf(hf_models[family]).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
    assert addresses == {name: t.data_ptr() for name, t in model.state_dict().items()}, "not in place"
    assert not list(cwd.iterdir())


def test_tied_head_has_one_view() -> None:
    config = transformers.Qwen2Config(vocab_size=40, hidden_size=16, num_hidden_layers=1, intermediate_size=8,
                                      num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    model = transformers.Qwen2ForCausalLM(config)
    weights = {name: torch.full(view.shape, 2.0) for name, view in get_live_views(model).items()}
    assert "lm_head.weight" not in weights
    copy_weights(model, weights.items())
    assert torch.equal(model.lm_head.weight, torch.full((40, 16), 2.0))


def test_ignored_tensors_are_skipped_in_updates(hf_models: dict[str, Path]) -> None:
    written = load_file(hf_models["exaone_moe"] / "model.safetensors")
    model = redraw_weights(hf_models["exaone_moe"])
    copy_weights(model, [("mtp.norm.weight", torch.zeros(3)), *written.items()])
    with pytest.raises(UserError, match=r"1 unexpected \(mtp.norm.weight\)"):
        copy_weights(redraw_weights(hf_models["solar_open"]), [("mtp.norm.weight", torch.zeros(3))])
