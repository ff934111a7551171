"""Public models' config.json files: import and export preserve the fields, and logits equal transformers'.

`hub_configs.json` has the source of each config, and most configs as changes to another (`like`). Those of
families with one or two models are in `tests/model/families/published_configs.json`. All are in the table of
`benchmarks/published_configs.py`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sov import convert
from megatron_sov.convert.sources import has_same_bits
from megatron_sov.eval.parity import ParityCheck, compare_logits, draw_random_prompts
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import extract_text_config

ROOT = Path(__file__).parents[2]
ENTRIES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("hub_configs.json").read_text())
"""Model -> `from`, and `config` or its changes to the config of model `like` (fields `without` removed)."""
PUBLISHED = json.loads((ROOT / "tests/model/families/published_configs.json").read_text())
EXAMPLES = ("mistral", "mixtral", "glm4_moe", "kimi_linear")
"""Families in examples/families."""
REFERENCE_TYPES = {"kimi_k2": "deepseek_v3"}
"""`model_type` that transformers does not know -> the class that it names."""


def find_exclusion(config: dict[str, Any]) -> str:
    """Return why a config is not compared here ("": it is)."""
    reasons = {
        "other tests compare a text model in a folder with images": config["model_type"] == "gemma3",
        "transformers 5.24 has no class": config["model_type"] == "solar_open2",
        "transformers 5.24 ignores swiglu_limits": "swiglu_limits" in config,
        "refused: lacks 'max_position_embeddings'": not config.keys() & {
            "max_position_embeddings", "model_max_length"}}
    return next((reason for reason, applies in reasons.items() if applies), "")


def read_hub_configs() -> dict[str, dict[str, Any]]:
    configs: dict[str, dict[str, Any]] = {}
    for name, entry in ENTRIES.items():
        base = configs.get(entry.get("like", ""), {})
        configs[name] = {field: value for field, value in base.items()
                         if field not in entry.get("without", ())} | entry["config"]
    return configs


HUB = read_hub_configs()
PUBLISHED_CONFIGS = HUB | PUBLISHED
CONFIGS = {name: config for name, config in PUBLISHED_CONFIGS.items() if not find_exclusion(config)}
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
    small["num_hidden_layers"] = min(LAYERS, config["num_hidden_layers"])
    heads = config["num_attention_heads"]
    if kv_heads := config.get("num_key_value_heads"):
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


@pytest.fixture(autouse=True, scope="module")
def example_families() -> None:
    load_example_families()


def load_example_families() -> None:
    for name in EXAMPLES:
        models.FAMILY_PLUGINS.load(f"{ROOT}/examples/families/{name}.py:{name.upper()}")


def save_random_model(config: dict[str, Any], folder: Path) -> None:
    """Save a random transformers model of a shrunk config, and `config` itself as config.json.

    transformers would write its own default fields into config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    # With the usual 0.02 all logits are near 0, and a wrong model would stay within the limit.
    wide_init = {"initializer_range": SIZES["initializer_range"]}
    known = {"model_type": REFERENCE_TYPES.get(config["model_type"], config["model_type"])}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | wide_init | known),
                                             dtype=torch.float32)
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
    family = models.get_family(exported["model_type"])
    carried = family.find_carried_fields(config)
    assert {field: exported[field] for field in carried} == carried
    assert exported["architectures"] == [family.hf_classes[0]]
    assert config["architectures"][0] in family.hf_classes
    # The family's own fields may be exported in another spelling, so the parsed ModelConfigs are compared.
    assert family.from_hf_config(exported) == family.from_hf_config(config)
    if config["model_type"] in REFERENCE_TYPES:
        return
    original_fields = AutoConfig.from_pretrained(hf_folder).to_dict()
    exported_fields = AutoConfig.from_pretrained(exported_folder).to_dict()
    family_fields = {field for item in family.config for field in item.names}
    for field in {**original_fields, **exported_fields}.keys() - family_fields:
        assert original_fields.get(field) == exported_fields.get(field), field


def find_differing_tensors(folder: Path, other: Path) -> list[str]:
    weights, others = convert.open_weights(folder), convert.open_weights(other)
    return [name for name in {*weights.list_names(), *others.list_names()}
            if not has_same_bits(weights.read(name), others.read(name))]


def convert_round_trip(config: dict[str, Any], folder: Path) -> tuple[list[str], list[list[ParityCheck]]]:
    """Import a random model of a config and export it, with equal bits. Return the warnings of the import,
    and the differences of our logits from transformers' logits of both folders."""
    hf_folder, checkpoint, exported = folder / "hf", folder / "ckpt", folder / "exported"
    save_random_model(config, hf_folder)
    warnings = convert.from_hf(hf_folder, checkpoint)
    convert.to_hf(checkpoint, exported)
    check_exported_config(config, hf_folder, exported)
    assert not find_differing_tensors(hf_folder, exported)
    references = [exported] if config["model_type"] in REFERENCE_TYPES else [hf_folder, exported]
    return warnings, [compare_logits(checkpoint, reference, PROMPTS) for reference in references]


def test_hub_configs_name_their_sources() -> None:
    sources = [entry["from"] for entry in ENTRIES.values()]
    assert len(sources) >= 90 and len(QUICK) >= 13
    assert sum("memory" not in source for source in sources) >= 75


@pytest.mark.each("name", CONFIGS)
def test_public_config_is_parsed(name: str) -> None:
    config = {field: value for field, value in CONFIGS[name].items() if field != "quantization_config"}
    family = models.get_family(extract_text_config(config)["model_type"])
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
    config = shrink_config(CONFIGS[name])
    warnings, checks = convert_round_trip(config, tmp_path)
    assert len(warnings) == bool(models.get_family(extract_text_config(config)["model_type"])
                                 .find_ignored_fields(config))
    for difference, greedy in checks:
        assert difference.passed and greedy.passed, (difference, greedy)
        assert difference.limit > 1.5e-4, "logits too small to tell models apart"
