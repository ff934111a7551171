"""Random models of every family with odd sizes, created by transformers: exports keep their bits at every
layout, and logits equal transformers'."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov import convert
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.checkpoint import load
from megatron_sov.engine.decode.forward_only import DocumentBatch, ForwardModel
from megatron_sov.engine.model.language_model import build_model
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import ParallelConfig, apply_settings, from_dict
from megatron_sov.model.families import supported as models
from megatron_sov.model.recipes.requested import load_plugins
from tests.checkpoints import save_checkpoint
from tests.layouts.k_exaone2_reference import apply_layer_limits

LENGTH, BEFORE = 160, 37
"""Tokens of the compared document, and of the document before it in the row."""
MAX_DIFFERENCE = 1e-5
"""Tolerance relative to the largest logit."""
SEEDS = range(3)
"""`make test` runs one seed per family, `make deep` all."""
SECOND = "k_exaone_2"
"""K-EXAONE 2.0 (family exaone_moe): per-layer windows and limits, and one MTP layer applied several times."""
WITH_STATES = ("kimi_linear", "solar_open2")
"""Families whose reference computes the delta rule in float32, which alone causes half of the tolerance."""
LAYOUTS = {
    "one": (1, {}),
    "TP2+SP": (2, {"tp": 2, "sp": True}),
    "EP2": (2, {"ep": 2}),
    "PP2": (2, {"pp": 2}),
    "EP4 x PP2": (8, {"ep": 4, "pp": 2}),
}


def odd_config(family: str, seed: int) -> dict[str, Any]:
    """Return a config.json with sizes that share few divisors; structure varies with the seed."""
    config, experts = odd_sizes(family, seed)
    kv_heads, heads = config["num_key_value_heads"], config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    if family == "solar_open":
        return {**config, **experts, "n_routed_experts": (8, 4, 12)[seed],
                "n_shared_experts": (1, 2, 1)[seed], "routed_scaling_factor": 1.7, "rope_parameters": yarn}
    if family == "solar_open2":
        rates = {"kda_allow_neg_eigval": seed != 1, "use_qk_norm": seed == 2}
        return {**odd_config("solar_open", seed), **rates, "model_type": family, "num_hidden_layers": 4,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "first_k_dense_replace": (0, 1, 2)[seed], "linear_attn_config": {
                    "num_heads": (2, 4, 6)[seed], "head_dim": (6, 10, 7)[seed], "num_kv_heads": None,
                    "short_conv_kernel_size": (4, 3, 2)[seed]},
                "gqa_layers": ([0, 2], [0], [1, 2])[seed]}
    if family == SECOND:
        windows = (15, 0, 6 + seed, 6 + seed)
        return {**odd_config("exaone_moe", seed), "num_hidden_layers": 4, "sliding_windows": windows,
                "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
                "swiglu_limits": [0.4, 0, (0.6, 0, 7.0)[seed], 0.2], "mtp_sliding_windows": [6 + seed],
                "mlp_layer_types": ["dense"] * (1 + seed // 2) + ["sparse"] * (3 - seed // 2),
                "sliding_window": 4096,
                "mtp_layer_types": ["sliding_attention"], "mtp_num_speculative_steps": 4}
    if family == "exaone_moe":
        return {**config, **experts, "num_experts": (8, 16, 4)[seed], "num_shared_experts": 1,
                "sliding_window": 9 + seed,
                "layer_types": (["sliding_attention", "full_attention"] * layers)[:layers],
                "first_k_dense_replace": 1, "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1),
                "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1}
    if family == "gemma3_text":
        scaled = {"rope_type": "linear", "factor": 8.0} if seed == 0 else {"rope_type": "default"}
        return {**config, "hidden_size": 12 * kv_heads * 2, "num_attention_heads": 2 * kv_heads,
                "final_logit_softcapping": 5.0 if seed == 2 else None,
                "sliding_window": 9 + seed, "layer_types": (
                    ["sliding_attention", "full_attention"] * layers)[:layers],
                "query_pre_attn_scalar": (config["head_dim"], 5, 30)[seed], "rope_parameters": {
                    "full_attention": {**scaled, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    if family == "deepseek_v3":
        mscale = (1.0, 0.707, None)[seed]
        config.pop("head_dim")
        return {**config, **experts, "n_routed_experts": (8, 4, 12)[seed],
                "n_shared_experts": (1, 2, 1)[seed], "num_key_value_heads": heads, "n_group": (2, 1, 3)[seed],
                "topk_group": (1, 1, 2)[seed], "routed_scaling_factor": 2.5,
                "first_k_dense_replace": min(seed, 1), "num_nextn_predict_layers": int(seed != 1),
                "q_lora_rank": (10, None, 26)[seed], "kv_lora_rank": (14, 22, 6)[seed],
                "qk_nope_head_dim": (6, 10, 8)[seed], "qk_rope_head_dim": (4, 6, 10)[seed],
                "v_head_dim": (12, 6, 30)[seed],
                **({"rope_parameters": {**yarn, "mscale": mscale, "mscale_all_dim": mscale}}
                   if mscale else {})}
    config["tie_word_embeddings"] = seed != 1
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    if family == "exaone4":
        return {**config, "sliding_window": None if seed == 1 else 11 + seed,
                "layer_types": (["full_attention" if seed == 1 else "sliding_attention", "full_attention"]
                                * layers)[:layers], **({"rope_parameters": llama3} if seed == 0 else {})}
    if family == "hyperclovax":
        return {**config, "hidden_size": 12 * kv_heads * 2, "num_attention_heads": 2 * kv_heads,
                "use_post_norm": seed != 2, "embedding_multiplier": 10.0, "residual_multiplier": 0.4,
                "logits_scaling": 0.6, "attention_multiplier": 0.3,
                **({"rope_parameters": yarn} if seed == 0 else {})}
    slides = {"use_sliding_window": seed == 2, "sliding_window": 11}
    if family == "qwen3_moe":
        return {**config, **experts, **slides, "num_experts": (8, 4, 16)[seed], "norm_topk_prob": seed != 1,
                "mlp_only_layers": [0] if seed == 2 else []}
    if family == "llama":
        linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
        return {**config, **({"rope_parameters": (llama3, {}, linear)[seed]} if seed != 1 else {})}
    return {**config, **slides, "max_window_layers": 1, **({"rope_parameters": yarn} if seed == 0 else {})}


def odd_sizes(family: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config.json fields common to all families, and the additional fields of MoE families."""
    draw = random.Random(f"{family} {seed}")
    kv_heads = (2, 1, 4)[seed]
    heads = kv_heads * draw.choice((1, 2, 3))
    layers = draw.choice((2, 4))
    config: dict[str, Any] = {
        "model_type": family, "vocab_size": draw.choice((97, 101, 113)),
        "hidden_size": draw.choice((24, 36, 40)), "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": draw.choice((6, 10, 14)),
        "intermediate_size": draw.choice((22, 38)), "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "rms_norm_eps": draw.choice((1e-5, 1e-6)), "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice((1e4, 1e6))}}
    return config, {"moe_intermediate_size": draw.choice((14, 18)), "num_experts_per_tok": (2, 1, 3)[seed]}


def make(config: dict[str, Any], folder: Path, seed: int) -> None:
    """Write a random transformers model with nonzero biases; MTP layers of K-EXAONE, GLM and DeepSeek are
    added by hand."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("bias", "norm.weight", "layernorm.weight", "norm1.weight", "norm2.weight")):
            # Gemma adds 1 to the weight
            is_zero_centered = config["model_type"].startswith("gemma")
            is_factor = name.endswith("weight") and not is_zero_centered
            tensor.data = torch.randn_like(tensor) * 0.3 + (1.0 if is_factor else 0.0)
        if name.endswith(("A_log", "conv1d.weight")):  # slow decay, and values of visible size
            tensor.data = torch.randn_like(tensor) * 0.6 - (1.5 if name.endswith("A_log") else 0.0)
    if seed == 1:  # bfloat16, except tensors that transformers keeps in float32
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder)
    if config["model_type"] in ("glm4_moe", "deepseek_v3") and config["num_nextn_predict_layers"]:
        add_layer_behind(folder, config["num_hidden_layers"])
    if config["model_type"] == "exaone_moe":
        tensors = load_file(folder / "model.safetensors")
        like_layer_0 = {n.replace("model.", "mtp."): torch.randn_like(t)
                        for n, t in tensors.items() if ".layers.0." in n}
        norm, hidden = tensors["model.norm.weight"], config["hidden_size"]
        norms = {f"mtp.{n}.weight": torch.randn_like(norm)
                 for n in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
        fc = {"mtp.fc.weight": torch.randn(hidden, 2 * hidden).to(norm.dtype)}
        all_tensors = tensors | like_layer_0 | norms | fc
        save_file(all_tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_layer_behind(folder: Path, num_layers: int) -> None:
    """Add an MTP layer with the names of published folders: a copy of the last layer's shapes, and its
    norms."""
    tensors, prefix = load_file(folder / "model.safetensors"), f"model.layers.{num_layers}."
    last = f"model.layers.{num_layers - 1}."
    like_last = {n.replace(last, prefix): torch.randn_like(t)
                 for n, t in tensors.items() if n.startswith(last)}
    norm, embedding = tensors["model.norm.weight"], tensors["model.embed_tokens.weight"]
    norms = {f"{prefix}{n}.weight": torch.randn_like(norm) for n in ("enorm", "hnorm", "shared_head.norm")}
    norms[f"{prefix}eh_proj.weight"] = torch.randn(len(norm), 2 * len(norm)).to(norm.dtype)
    copies = {f"{prefix}embed_tokens.weight": embedding.clone(),
              f"{prefix}shared_head.head.weight": tensors["lm_head.weight"].clone()}
    save_file(tensors | like_last | norms | copies, folder / "model.safetensors", metadata={"format": "pt"})


def documents(vocab_size: int) -> list[list[int]]:
    """Return the first document of the row and the compared document."""
    draw = random.Random(7)
    return [[draw.randrange(vocab_size) for _ in range(n)] for n in (BEFORE, LENGTH)]


def run(names: list[str], layout: dict[str, Any], folder: str, label: str,
        plugins: Sequence[str] = ()) -> None:
    """Load each checkpoint, write its logits, and save it again from this layout."""
    load_plugins(plugins)
    place = world.join_world(ParallelConfig(**layout))
    for name in names:
        source = Path(folder) / name / "ckpt"
        config = apply_settings(from_dict(read_manifest(source, "checkpoint").settings),
                                ["train.precision=fp32"])
        model = build_model(config.model, ParallelConfig(**layout), config.train)
        load.load_model(source, model)
        row = DocumentBatch(documents(config.model.vocab_size), torch.device("cpu"))
        logits = ForwardModel(model, 100).logits(row, torch.arange(BEFORE, BEFORE + LENGTH))
        out = Path(folder) / name / label
        if place.is_main:
            out.mkdir()
            save_file({"logits": logits.contiguous()}, out / "logits.safetensors")
        torch.distributed.barrier()
        save_checkpoint(out / "ckpt", model, None, {"step": 0, "tokens": 0}, config.to_dict(), None)


def fits(config: dict[str, Any], layout: dict[str, Any]) -> bool:
    """Return whether the layout divides the model's heads and experts."""
    experts = next((config[name] for name in ("num_experts", "n_routed_experts", "num_local_experts")
                    if name in config), 1)
    return (config["num_key_value_heads"] % layout.get("tp", 1) == 0 and experts % layout.get("ep", 1) == 0)


def taking_turns(configs: dict[str, dict[str, Any]], most: int) -> dict[str, list[str]]:
    """Distribute the models over the layouts: one process gets all models, other layouts at most `most` each,
    so that every family meets every layout that divides it."""
    models_by_layout: dict[str, list[str]] = {layout: [] for layout in LAYOUTS}
    on_eight = ("solar_open-0", "exaone_moe-1", "qwen3_moe-2")
    models_by_layout |= {"one": list(configs), "EP4 x PP2": [name for name in on_eight if name in configs]}

    def count_family(layout: str, family: str) -> int:
        return sum(n.rpartition("-")[0] == family for n in models_by_layout[layout])

    for name, config in configs.items():
        family = name.rpartition("-")[0]
        fitting = [x for x in ("TP2+SP", "EP2", "PP2") if fits(config, LAYOUTS[x][1])]
        least_used = min(fitting, key=lambda x, family=family: (count_family(x, family),
                                                                len(models_by_layout[x])))
        if len(models_by_layout[least_used]) < most:
            models_by_layout[least_used].append(name)
    return models_by_layout


def hf_logits(folder: Path) -> Any:
    """Return transformers' logits [LENGTH, vocabulary] float32 for the document alone."""
    from transformers import AutoModelForCausalLM

    model = apply_layer_limits(AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager").eval())
    with torch.no_grad():
        return model(input_ids=torch.tensor(documents(model.config.vocab_size)[1:]),
                     use_cache=False).logits[0]


def same_bits(a: Path, b: Path) -> bool:
    """Return whether two Hugging Face folders contain tensors with equal bits."""
    tensors, other_tensors = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return tensors.keys() == other_tensors.keys() and all(
        t.dtype == other_tensors[n].dtype
        and torch.equal(t.view(torch.uint8), other_tensors[n].view(torch.uint8))
        for n, t in tensors.items())


@pytest.mark.essential
@pytest.mark.distributed
@pytest.mark.usefixtures("solar_open2")
@pytest.mark.parametrize("every_seed", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_bits_survive_every_layout_and_logits_are_those_of_transformers(
        ranks: Any, job: Any, tmp_path: Path, every_seed: bool) -> None:
    """`make test` runs each family once, mostly on one process; test_gradients.py uses two."""
    families = (*models.FAMILIES, SECOND)
    configs = {f"{family}-{seed}": odd_config(family, seed) for i, family in enumerate(families)
               for seed in (SEEDS if every_seed else (i % 3,))}
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        make(config, tmp_path / name / "hf", int(name[-1]))
        convert.from_hf(tmp_path / name / "hf", tmp_path / name / "ckpt")
    models_by_layout = taking_turns(configs, len(configs) if every_seed else 2)
    assert all(models_by_layout.values()) and len(models_by_layout["one"]) == len(configs)
    assert not every_seed or min(map(len, models_by_layout.values())) == 3
    ranks(*(job(__file__, "run", nproc,
                {"names": models_by_layout[name], "layout": layout, "folder": str(tmp_path), "label": name})
            for name, (nproc, layout) in LAYOUTS.items()))
    for name in configs:
        check_equal(tmp_path / name, [layout for layout, names in models_by_layout.items() if name in names])


def check_equal(folder: Path, layouts: Iterable[str]) -> None:
    """Compare logits and exported tensors of a model at these layouts with transformers and its folder."""
    name, expected = folder.name, hf_logits(folder / "hf")
    assert expected.abs().max() > 1.5, f"{name}: logits too small to tell models apart"
    for layout in layouts:
        out = folder / layout
        difference = (load_file(out / "logits.safetensors")["logits"] - expected).abs().max()
        bound = MAX_DIFFERENCE * (2 if name.startswith(WITH_STATES) else 1)
        assert difference <= bound * expected.abs().max(), (
            f"{name} at {layout}: logits differ by {difference:.1e}")
        convert.to_hf(out / "ckpt", out / "hf", "bfloat16" if name.endswith("1") else "keep")
        assert same_bits(out / "hf", folder / "hf"), f"{name} from {layout}: bits differ"
    convert.to_hf(folder / "ckpt", folder / "back")
    assert same_bits(folder / "back", folder / "hf"), name
