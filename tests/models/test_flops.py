"""Training FLOPs against what torch counts in transformers' own model classes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sov import models
from megatron_sov.models.count import mean_keys, multiplied_weights, num_params, train_flops_per_token
from megatron_sov.models.family import TokenIds
from megatron_sov.recipes import get

SEQ_LEN = 64


@pytest.mark.parametrize("recipe", ["tiny-solar-open", "tiny-k-exaone", "tiny-qwen3",
                                    "tiny-deepseek-v3"])
def test_torch_counts_as_many_in_transformers(recipe: str) -> None:
    """Eager attention multiplies every query with every key, which the formula is asked for as well."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    model = replace(get(recipe).model, num_mtp_layers=0)
    config = AutoConfig.for_model(**models.get(model.family).to_hf_config(model, "float32", TokenIds()))
    config._attn_implementation = config._experts_implementation = "eager"
    reference = AutoModelForCausalLM.from_config(config)
    tokens = torch.arange(SEQ_LEN)[None] % model.vocab_size
    with FlopCounterMode(display=False) as counter:
        reference(input_ids=tokens, labels=tokens).loss.backward()
    latent = model.latent_attention
    widths = model.head_dim + (model.head_dim if latent is None else latent.v_head_dim)
    unmasked = 6 * model.num_layers * model.num_heads * widths * SEQ_LEN
    expected = 6 * multiplied_weights(model) + unmasked
    assert counter.get_total_flops() / SEQ_LEN == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("seq_len", "window"), [(1, 0), (7, 0), (7, 3), (7, 7), (7, 100)])
def test_keys_that_a_query_sees(seq_len: int, window: int) -> None:
    seen = [min(i + 1, window or seq_len) for i in range(seq_len)]
    assert mean_keys(seq_len, window) == pytest.approx(sum(seen) / seq_len)


def test_windows_cap_the_keys_and_prediction_layers_run_a_head_of_their_own() -> None:
    model = get("k-exaone-236b").model  # 36 sliding layers of 128, 12 global ones, a global prediction layer
    keys = 36 * mean_keys(8192, 128) + 13 * mean_keys(8192, 0)
    assert train_flops_per_token(model, 8192) == pytest.approx(
        6 * multiplied_weights(model) + 12 * model.num_heads * model.head_dim * keys)
    norms = 5 * model.hidden_size + 2 * model.head_dim
    more = multiplied_weights(model) - multiplied_weights(replace(model, num_mtp_layers=0))
    assert more == num_params(model).mtp - norms + model.vocab_size * model.hidden_size


def test_the_published_rule_of_six_per_active_parameter() -> None:
    """Active parameters count the embedding, which is looked up; norms are all that is left."""
    model = get("solar-open-102b").model
    active = num_params(model).active - model.vocab_size * model.hidden_size
    assert multiplied_weights(model) == pytest.approx(active, rel=1e-4)
