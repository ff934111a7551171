"""Tiny random models of two families, written by transformers as the reference for conversion."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from tests.convert.hf_folders import save_tensors

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "moe_intermediate_size": 24, "num_experts_per_tok": 2,
         "max_position_embeddings": 512}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def _save(model, folder: Path) -> None:
    """Save in bfloat16, with nonzero float32 router biases and a tokenizer."""
    model = model.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = torch.randn(8, generator=generator)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="session")
def solar_dir(tmp_path_factory) -> Path:
    """Solar Open with YaRN."""
    from transformers import SolarOpenConfig, SolarOpenForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hf") / "solar"
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 256}
    config = SolarOpenConfig(num_hidden_layers=2, n_routed_experts=8, n_shared_experts=1,
                             rope_parameters=yarn, bos_token_id=1, eos_token_id=2, pad_token_id=2, **SIZES)
    _save(SolarOpenForCausalLM(config), folder)
    return folder


@pytest.fixture(scope="session")
def exaone_dir(tmp_path_factory) -> Path:
    """K-EXAONE with a prediction layer, which transformers lacks, added by hand."""
    from transformers import ExaoneMoeConfig, ExaoneMoeForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hf") / "exaone"
    config = ExaoneMoeConfig(
        num_hidden_layers=5, num_experts=8, num_shared_experts=1, intermediate_size=40, sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, num_nextn_predict_layers=1,
        layer_types=["sliding_attention"] * 3 + ["full_attention", "sliding_attention"], **SIZES)
    _save(ExaoneMoeForCausalLM(config), folder)
    tensors = load_file(folder / "model.safetensors")
    layer = {name.replace("model.", "mtp."): torch.randn_like(t)
             for name, t in tensors.items() if ".layers.0." in name}
    norms = {f"mtp.{name}.weight": torch.randn(32).bfloat16()
             for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
    save_tensors(folder, tensors | layer | norms | {"mtp.fc.weight": torch.randn(32, 64).bfloat16()})
    return folder


@pytest.fixture(params=["solar_dir", "exaone_dir"])
def hf_dir(request) -> Path:
    return request.getfixturevalue(request.param)
