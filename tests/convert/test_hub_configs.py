"""Public models' config.json files: import and export preserve the fields, and logits equal transformers'.

`hub_configs.json` has the source of each config. Configs of families with one or two models are in
`tests/model/families/published_configs.json`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sov import convert
from megatron_sov.eval.parity import compare_logits, draw_random_prompts
from megatron_sov.model.families import supported as models

HUB: dict[str, dict[str, Any]] = {name: entry["config"] for name, entry in json.loads(
    Path(__file__).with_name("hub_configs.json").read_text()).items()}
PUBLISHED = json.loads((Path(__file__).parents[1] / "model/families/published_configs.json").read_text())
MULTIMODAL = ("gemma3",)
NOT_IN_TRANSFORMERS = ("solar_open2", "kimi_k2")
EXAMPLES = ("mistral", "mixtral", "glm4_moe", "kimi_linear")
"""Families in examples/families, whose configs test_example_families.py reads."""
CONFIGS = {
    name: config for name, config in (HUB | PUBLISHED).items()
    if config["model_type"] not in (*MULTIMODAL, *NOT_IN_TRANSFORMERS, *EXAMPLES)
    and "swiglu_limits" not in config}  # of K-EXAONE 2.0: this release of transformers ignores them
QUICK = {config["model_type"]: name for name, config in reversed(CONFIGS.items())}
"""Family -> its first model, which `make test` compares; `make deep` compares all."""
LAYERS, VOCABULARY, WINDOW = 6, 96, 8
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 256, "model_max_length": 256, "n_routed_experts": 8, "num_experts": 8,
    "num_local_experts": 8, "num_experts_per_tok": 2, "num_experts_per_token": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 12, "q_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
    "sliding_window": WINDOW, "initializer_range": 0.15}
"""Field -> its value in a tiny model, if the config has the field with a value other than null or 0."""
PROMPTS = draw_random_prompts([1, 3 * WINDOW, 100], VOCABULARY)
"""The second prompt is longer than the attention window, the third than the 64 positions after which a shrunk
config scales its rotary frequencies."""
FIELDS_OF_UNWRITTEN_TENSORS = (
    "quantization_config", "num_nextn_predict_layers", "mtp_layer_types", "mtp_sliding_windows",
    "mtp_loss_scaling_factor", "mtp_share_layers", "mtp_num_speculative_steps")
"""Fields that describe tensors which transformers' `save_pretrained` does not write."""


def shrink_config(config: dict[str, Any]) -> dict[str, Any]:
    """Replace the sizes in a config by those of a tiny model.

    The kind of attention (multi-head, grouped-query, multi-query) does not change, nor whether heads *
    head_dim equals the hidden size.
    """
    small = {name: value for name, value in config.items() if name not in FIELDS_OF_UNWRITTEN_TENSORS}
    small |= {name: size for name, size in SIZES.items() if config.get(name)}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    small["num_key_value_heads"] = {heads: 4, 1: 1}.get(kv_heads, 2)
    if config.get("head_dim"):
        small["head_dim"] = 8 if config["head_dim"] * heads == config["hidden_size"] else 16
    for name in ("n_group", "num_expert_group"):
        if config.get(name, 1) > 1:
            small |= {name: 2, "topk_group": 1}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == config["num_hidden_layers"]:
            small[name] = value[:LAYERS]  # one entry per layer
            if name == "sliding_windows":
                small[name] = [min(window, WINDOW) for window in small[name]]
        elif name.endswith("_token_id") and value is not None:
            small[name] = [3] if isinstance(value, list) else 3
        elif isinstance(value, dict) and "original_max_position_embeddings" in value:
            small[name] = value | {"original_max_position_embeddings": 64}
    if "linear_attn_config" in config:
        small["linear_attn_config"] |= {"num_heads": 4, "head_dim": 6, "kda_layers": [1, 2, 3, 5],
                                        "full_attn_layers": [4, 6]}
    return small


def save_random_model(config: dict[str, Any], folder: Path) -> None:
    """Save a random transformers model of a shrunk config, and `config` itself as config.json.

    transformers would write its own default fields into config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    # With the usual 0.02 all logits are near 0, and a wrong model would stay within the limit.
    wide_init = {"initializer_range": SIZES["initializer_range"]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | wide_init), dtype=torch.float32)
    if "logits_scaling" in config:
        model.lm_head.weight.data *= 10 / config["logits_scaling"]
    for name, tensor in model.named_parameters():
        # Slow decays: with the initial decays, transformers' float32 differs from its float64 by 2e-3.
        if name.endswith("A_log"):
            tensor.data = torch.randn_like(tensor) * 0.6 - 1.5
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))


def check_exported_config(config: dict[str, Any], hf_folder: Path, exported_folder: Path) -> None:
    """Fail unless the exported config.json describes the same model as `config`."""
    from transformers import AutoConfig

    exported = json.loads((exported_folder / "config.json").read_text())
    family = models.get_family(config["model_type"])
    carried = family.find_carried_fields(config)
    assert {field: exported[field] for field in carried} == carried
    assert exported["architectures"] == [family.hf_classes[0]]
    assert config["architectures"][0] in family.hf_classes
    # The family's own fields may be exported in another spelling, so the parsed ModelConfigs are compared.
    assert family.from_hf_config(exported) == family.from_hf_config(config)
    original_fields = AutoConfig.from_pretrained(hf_folder).to_dict()
    exported_fields = AutoConfig.from_pretrained(exported_folder).to_dict()
    family_fields = {field for item in family.config for field in item.names}
    for field in {**original_fields, **exported_fields}.keys() - family_fields:
        assert original_fields.get(field) == exported_fields.get(field), field


def test_hub_configs_name_their_sources() -> None:
    entries = json.loads(Path(__file__).with_name("hub_configs.json").read_text())
    assert len(HUB) >= 40 and len(QUICK) >= 9
    assert sum(entry["from"] != "from memory" for entry in entries.values()) >= 20


@pytest.mark.each("name", CONFIGS)
def test_public_config_is_parsed(name: str) -> None:
    config = CONFIGS[name]
    family = models.get_family(config["model_type"])
    model = family.from_hf_config(config)
    assert (model.num_layers, model.hidden_size) == (config["num_hidden_layers"], config["hidden_size"])
    carried = family.find_carried_fields(config)
    assert family.find_ignored_fields(config).items() <= carried.items()
    assert not {"auto_map", "dtype", "architectures"} & {*carried}


@pytest.mark.tier1_cases(5)
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", [
    *QUICK.values(),
    *(pytest.param(name, marks=pytest.mark.deep) for name in CONFIGS if name not in QUICK.values())])
def test_public_model_equals_transformers(name: str, tmp_path: Path) -> None:
    config, hf_folder, checkpoint = shrink_config(CONFIGS[name]), tmp_path / "hf", tmp_path / "ckpt"
    save_random_model(config, hf_folder)
    convert.from_hf(hf_folder, checkpoint)
    difference, greedy = compare_logits(checkpoint, hf_folder, PROMPTS)
    convert.to_hf(checkpoint, tmp_path / "exported")
    check_exported_config(config, hf_folder, tmp_path / "exported")
    assert difference.passed and greedy.passed, (difference, greedy)
    assert difference.limit > 1.5e-4, "logits too small to tell models apart"
    ignored = models.get_family(config["model_type"]).find_ignored_fields(config)
    print(f"{name} | imported | {difference.value:.1e} | {', '.join(ignored) or '-'}")
