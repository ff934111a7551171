"""Adapters in PEFT's format: PEFT loads ours with equal logits, the round trip is bit-exact, and merging is
exact."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov import convert, recipes
from megatron_sov.base.artifacts import create_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint import initial_weights, load
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.convert import export_weights
from megatron_sov.convert.peft import (
    CONFIG, WEIGHTS, find_frozen_copies, from_peft, get_base_name, merge_adapter, open_weights,
    parse_lora_config, to_peft)
from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model.chunk import ModelInputs
from megatron_sov.engine.model.language_model import build_model
from megatron_sov.engine.model.local_shards import list_local_shards
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import LoraConfig, apply_settings
from megatron_sov.model.families.adapters import MAGNITUDE, A, B, find_adapter_places
from megatron_sov.model.pretrained import find_hub_name
from megatron_sov.model.recipes import get
from megatron_sov.runs.checkpoints import AdapterBase
from megatron_sov.train.objectives.microbatch import MicroBatch
from tests.checkpoints import save_checkpoint

SIZES = ["model.vocab_size=95", "model.hidden_size=32", "model.head_dim=8", "model.num_layers=2",
         "model.init_std=0.2", "train.precision=fp32", "lora.rank=3", "lora.alpha=7"]
TOKENS = [(7 * i + 3) % 95 for i in range(41)]


def save_adapter(recipe: str, settings: list[str], folder: str) -> dict[str, Any]:
    """Write FOLDER/base, FOLDER/adapter with random values, and FOLDER/live.pt: the logits of `TOKENS` and
    the merged weights of the live model."""
    config = apply_settings(recipes.get(recipe), [*SIZES, *settings])
    base_config = apply_settings(config, ["lora.rank=0"])
    base, adapter, num_tokens = Path(folder) / "base", Path(folder) / "adapter", len(TOKENS)
    world.join_world(config.parallel)
    model = build_model(config.model, config.parallel, config.train)
    initial_weights.initialize_weights(model, config.model, 1)
    save_checkpoint(base, model, None, {"step": 0, "tokens": 0}, base_config.to_dict(), None)
    model = build_model(config.model, config.parallel, config.train, lora=config.lora)
    load.load_model(base, model)
    for shard in list_local_shards(model):
        if shard.key.startswith("adapter."):
            # the same numbers on every rank that has a replica of the block
            generator = torch.Generator().manual_seed(zlib.crc32(f"{shard.key} {shard.offset}".encode()))
            noise = torch.randn(shard.data.shape, generator=generator) * 0.2
            shard.data.copy_(shard.data * (1 + noise) if shard.key.endswith("magnitude") else noise)
    save_checkpoint(adapter, model, None, {"step": 3, "tokens": 9}, config.to_dict(), None)
    zeros = torch.zeros(num_tokens, dtype=torch.int64)
    inputs = ModelInputs(tokens=torch.tensor(TOKENS), positions=torch.arange(num_tokens),
                         max_document_tokens=num_tokens,
                         cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32),
                         padding=torch.zeros(num_tokens, dtype=torch.bool))
    rows = MicroBatch(inputs, zeros, torch.ones(num_tokens), zeros.byte(), zeros)
    logits = ForwardModel(model, 64).logits(rows, torch.arange(num_tokens))
    live = dict(export_weights(model))
    if live:  # rank 0 receives the tensors
        torch.save({"logits": logits, "live": live}, Path(folder) / "live.pt")
    return {}


LATENT = ["model.head_dim=20", 'model.latent_attention={"kv_lora_rank": 12, "qk_nope_head_dim": 12, '
          '"qk_rope_head_dim": 8, "v_head_dim": 10}']
CASES: dict[str, tuple[str, list[str]]] = {
    "dense": ("tiny-qwen3", ['lora.targets=["all-linear", "lm_head", "embed_tokens"]']),
    "dense, DoRA": ("tiny-qwen2", ["lora.dora=true", 'lora.targets=["q_proj", "o_proj", "up_proj"]']),
    "Solar": ("tiny-solar-open", ["model.num_experts=4", "model.expert_ffn_dim=16"]),
    "Solar Open 2": ("tiny-solar-open2", [
        "model.attention_pattern=GD", "model.num_experts=4", "model.expert_ffn_dim=16"]),
    "DeepSeek-V3": ("tiny-deepseek-v3", [
        "model.num_experts=4", "model.expert_ffn_dim=16", LATENT[0],
        LATENT[1].replace("{", '{"q_lora_rank": 20, '), "model.num_dense_layers=1",
        "model.num_expert_groups=2", "model.num_groups_per_token=1"]),
    "K-EXAONE": ("tiny-k-exaone", ["model.num_experts=4", "model.expert_ffn_dim=16"]),
}


@pytest.mark.usefixtures("solar_open2")
@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.deep] * (case == "DeepSeek-V3"))
                                  for case in CASES])
def test_adapter_round_trip_with_peft(case: str, ranks: Any, job: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    recipe, settings = CASES[case]
    ranks(job(__file__, "save_adapter", 1, {"recipe": recipe, "settings": settings, "folder": str(tmp_path)}))
    saved_live = torch.load(tmp_path / "live.pt")
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    to_peft(adapter, tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / CONFIG).read_text())["base_model_name_or_path"] == "base"
    convert.to_hf(base, tmp_path / "hf")
    convert.to_hf(adapter, tmp_path / "merged")
    for file in (p for name in ("peft", "hf", "merged") for p in (tmp_path / name).iterdir()):
        assert str(tmp_path).encode() not in file.read_bytes(), file

    base_model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", experts_implementation="eager")
    peft_model = peft.PeftModel.from_pretrained(base_model, tmp_path / "peft")
    peft_logits = peft_model(torch.tensor([TOKENS])).logits[0]
    tolerance = 1e-5 * float(peft_logits.abs().max())
    assert float((peft_logits - saved_live["logits"]).abs().max()) < tolerance
    with peft_model.disable_adapter():
        assert float((peft_model(torch.tensor([TOKENS])).logits[0] - saved_live["logits"]).abs().max()) > 0.1

    weights = open_weights(tmp_path / "merged")
    assert set(weights.list_names()) == set(saved_live["live"])
    for name in weights.list_names():
        assert weights.read(name).equal(saved_live["live"][name]), name
    merged_model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", experts_implementation="eager")
    merged_logits = merged_model(torch.tensor([TOKENS])).logits[0]
    assert float((merged_logits - saved_live["logits"]).abs().max()) < tolerance

    peft_model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / WEIGHTS)
    frozen_copies = find_frozen_copies(saved)
    assert len(frozen_copies) == 2 * (case == "dense"), "PEFT saves the weights of embedding and head, too"
    assert saved.keys() - frozen_copies.keys() == load_file(tmp_path / "peft" / WEIGHTS).keys()
    from_peft(tmp_path / "again", tmp_path / "back", base)
    original, imported = TensorReader(adapter, "adapter"), TensorReader(tmp_path / "back", "adapter")
    assert sorted(original.keys()) == sorted(imported.keys())
    for key in original.keys():  # noqa: SIM118
        assert original.read(key).equal(imported.read(key)), key
    for name in frozen_copies:
        save_file({**saved, name: saved[name] + 1}, tmp_path / "again" / WEIGHTS)
        with pytest.raises(UserError, match="trained together with the adapter"):
            from_peft(tmp_path / "again", tmp_path / "no", base)


@pytest.mark.parametrize(("precision", "tp"), [("bf16", 1), ("bf16", 2), ("fp32", 2)])
def test_live_merge_equals_checkpoint_merge(precision: str, tp: int, ranks: Any, job: Any,
                                            tmp_path: Path) -> None:
    settings = [f"train.precision={precision}", f"parallel.tp={tp}", "lora.alpha=0.01"]
    ranks(job(__file__, "save_adapter", tp,
              {"recipe": "tiny-qwen3", "settings": settings, "folder": str(tmp_path)}))
    live = torch.load(tmp_path / "live.pt")["live"]
    weights, base = open_weights(tmp_path / "adapter"), open_weights(tmp_path / "base")
    assert set(weights.list_names()) == set(live)
    for name, tensor in live.items():
        assert tensor.dtype == torch.float32 and tensor.equal(weights.read(name)), name
        assert tensor.equal(base.read(name).float()) == ("_proj" not in name), name


NAMES = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.weight"
         for i in range(4) for x in "AB"]
GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}


@pytest.mark.each(("config", "names", "message"), [
    ({"peft_type": "IA3"}, NAMES, "peft_type = 'IA3'"),
    ({"lora_bias": True}, NAMES, "lora_bias = True in adapter_config.json is not supported"),
    ({"rank_pattern": {"q_proj": 8}}, NAMES, "rank_pattern = {'q_proj': 8}"),
    ({"r": "four"}, NAMES, "r = 'four' and lora_alpha = 8"),
    ({"lora_alpha": math.nan}, NAMES, "r = 4 and lora_alpha = nan"),
    ({"r": 10**30}, NAMES, "must be positive numbers, up to 1,048,576 and 1e+30"),
    ({"lora_alpha": 10**400}, NAMES, "must be positive numbers, up to 1,048,576 and 1e+30"),
    ({"init_lora_weights": "pissa_niter_16"}, NAMES, "init_lora_weights = 'pissa_niter_16' in "
                                                     "adapter_config.json modified the base"),
    ({}, NAMES[2:], "adapts q_proj in some layers only"),
    ({}, [*NAMES, "base_model.model.score.lora_A.weight"],
     "score.lora_A.weight (1 such tensors) is not an adapter"),
    ({}, ["base_model.model.model.layers.0.experts.q_proj.lora_A.weight"],
     "--base, which has base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
    ({}, [], "has no adapter tensors"),
])
def test_unsupported_adapters_are_rejected(config: dict[str, Any], names: list[str], message: str) -> None:
    model = get("tiny-qwen3").model
    names = [name for name in names if ".layers." not in name or int(name.split(".")[4]) < model.num_layers]
    with pytest.raises(UserError) as error:
        parse_lora_config({**GOOD, **config}, names, model, "here")
    assert message in str(error.value) and str(error.value).startswith("here: ")


def test_adapter_of_a_tied_weight_is_rejected() -> None:
    names = ["base_model.model.model.embed_tokens.lora_embedding_A"]
    with pytest.raises(UserError, match=r".*embed_tokens.* adapts"):
        parse_lora_config(GOOD, names, get("tiny-qwen2").model, "here")


def test_dora_of_the_head_is_rejected() -> None:
    model = get("tiny-qwen3").model
    folder = "base_model.model.model.layers.{}.self_attn.q_proj"
    ends = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
    names = [folder.format(i) + end for i in range(model.num_layers) for end in ends]
    assert not model.tied_embeddings
    config = parse_lora_config({**GOOD, "use_dora": True}, names, model, "")
    assert config == LoraConfig(4, 8.0, ("q_proj",), True)
    head = [f"base_model.model.lm_head{end}" for end in ends]
    with pytest.raises(UserError, match=r"lm_head.lora_A.weight with use_dora"):
        parse_lora_config({**GOOD, "use_dora": True}, names + head, model, "here")


def test_rslora_is_converted_to_alpha() -> None:
    model = get("tiny-qwen3").model
    names = [name for name in NAMES if int(name.split(".")[4]) < model.num_layers]
    config = parse_lora_config({**GOOD, "use_rslora": True}, names, model, "")
    assert config == LoraConfig(4, 16.0, ("q_proj",))


def test_base_name_is_the_hub_or_run_name(tmp_path: Path) -> None:
    """The Hub name for models in the Hub's cache, the run's name for runs, never a path."""
    assert find_hub_name(Path("/root/.cache/hub/models--Qwen--Qwen3-8B/snapshots/12ab")) == "Qwen/Qwen3-8B"
    assert find_hub_name(tmp_path / "mymodel") == "mymodel"
    step, lost = tmp_path / "RUN/checkpoints/step-3", AdapterBase(tmp_path / "gone/checkpoints/step-3", "0")
    for content, name in (({"imported_from": "Qwen/Qwen3-8B"}, "Qwen/Qwen3-8B"), ({}, "RUN")):
        with create_artifact(step, "checkpoint", overwrite=True) as artifact:
            artifact.content = content
        assert get_base_name(tmp_path, AdapterBase.from_checkpoint(step)) == name
    assert get_base_name(tmp_path, lost) == "gone"


def test_peft_folder_without_config_is_rejected(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match=f"has no {WEIGHTS}"):
        from_peft(tmp_path, tmp_path / "out", tmp_path)


# An adapter inside its base's weights.


def test_untrained_dora_leaves_weights_unchanged() -> None:
    """In bf16 too, where the stored magnitude is rounded and the row's length is not."""
    config = apply_settings(get("tiny-qwen2"), ["lora.rank=2", "lora.dora=true"])
    place = find_adapter_places(config.model, config.lora)["model.layers.0.self_attn.q_proj.weight"]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(place.of.out_features, place.of.in_features, generator=generator).bfloat16()
    tensors = {place.of.key(A): torch.randn(2, place.of.in_features, generator=generator).bfloat16(),
               place.of.key(B): torch.zeros(place.of.out_features, 2).bfloat16(),
               place.of.key(MAGNITUDE): torch.linalg.vector_norm(weight.float(), dim=1).bfloat16()}
    assert merge_adapter(weight, place, tensors, config.lora).equal(weight.float())
    tensors[place.of.key(MAGNITUDE)] *= 2
    assert merge_adapter(weight, place, tensors, config.lora).equal(2 * weight.float())


# A base in bfloat16, whose spacing most updates of fine-tuning do not reach.

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 8, "num_hidden_layers": 2, "max_position_embeddings": 128, "intermediate_size": 40,
         "initializer_range": 0.2}
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "query": ("Llama", {"target_modules": ["q_proj"]}),
    "attention": ("Llama", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "feed-forward": ("Llama", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
    "head and embedding": ("Llama", {"target_modules": ["lm_head", "embed_tokens"]}),
    "DoRA": ("Llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "rank-stabilised": ("Llama", {"target_modules": ["v_proj", "up_proj"], "use_rslora": True}),
    "tied": ("Qwen2", {"target_modules": ["k_proj", "o_proj"]}),
    "experts": ("Qwen3Moe", {"target_modules": ["q_proj"], "target_parameters": [
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
}
SPACING = {"float32": 2**-23, "bfloat16": 2**-8, "float16": 2**-11}


def save_merge_by_peft(folder: Path, kind: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Write FOLDER/hf, a random model in `dtype`, FOLDER/peft, an adapter with updates below the bfloat16
    spacing, FOLDER/reference, merged by PEFT in float32, and the imported FOLDER/base and FOLDER/adapter."""
    import peft
    import transformers

    torch.manual_seed(0)
    sizes = {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    experts = sizes if kind.endswith("Moe") else {}
    tied = {"tie_word_embeddings": kind == "Qwen2"}
    config = getattr(transformers, f"{kind}Config")(**SMALL, **experts, **tied)
    transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder / "hf")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(0, 2e-4)
            elif "magnitude" in name:
                parameter.mul_(1 + 1e-4 * torch.randn_like(parameter))
    model.save_pretrained(folder / "peft")
    model.merge_and_unload().save_pretrained(folder / "reference")
    convert.from_hf(folder / "hf", folder / "base")
    from_peft(folder / "peft", folder / "adapter", folder / "base")


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.tier1_cases(3)
@pytest.mark.parametrize("case", MERGES)
def test_merge_rounds_once_to_the_written_dtype(case: str, tmp_path: Path,
                                                capfd: pytest.CaptureFixture[str]) -> None:
    kind, settings = MERGES[case]
    save_merge_by_peft(tmp_path, kind, settings, torch.bfloat16)
    base, reference = read_tensors(tmp_path / "hf"), read_tensors(tmp_path / "reference")
    for dtype, spacing in SPACING.items():
        convert.to_hf(tmp_path / "adapter", tmp_path / dtype, dtype)
        warning = capfd.readouterr().err
        is_warned = "of the adapter's own update; pass --dtype float32 to keep" in warning
        assert is_warned == (dtype != "float32")
        merged = read_tensors(tmp_path / dtype)
        assert merged.keys() == reference.keys()
        for name, tensor in merged.items():
            # the order of PEFT's sums may move the last bit of float32, and a tie then falls the other way
            tolerance = spacing * reference[name].abs() + 1e-7
            assert bool(((tensor.float() - reference[name]).abs() <= tolerance).all()), name
            if dtype != "float32":
                assert float((tensor != reference[name].to(tensor.dtype)).float().mean()) < 0.01, name
    convert.to_hf(tmp_path / "adapter", tmp_path / "default")
    default = read_tensors(tmp_path / "default")
    assert json.loads((tmp_path / "default/config.json").read_text())["dtype"] == "float32"
    assert all(default[name].equal(tensor) for name, tensor in read_tensors(tmp_path / "float32").items())
    changed_names = [name for name in base if not reference[name].equal(base[name].float())]
    assert changed_names and all(not default[name].equal(base[name].float()) for name in changed_names)


def test_adapter_with_a_missing_part_is_rejected(tmp_path: Path) -> None:
    save_merge_by_peft(tmp_path, "Llama", {"target_modules": ["q_proj"]}, torch.float32)
    index = tmp_path / "adapter/adapter.index.json"
    tensors = json.loads(index.read_text())
    key = min(tensors)
    tensors[key]["pieces"].pop()
    index.write_text(json.dumps(tensors))
    with pytest.raises(UserError, match=f"a part of {key} .* is missing"):
        open_weights(tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_verify_reports_rounding_of_the_update(dtype: torch.dtype, tmp_path: Path) -> None:
    save_merge_by_peft(tmp_path, "Llama", {"target_modules": ["q_proj", "up_proj"]}, dtype)
    for dtype_option in ("keep", "bfloat16"):
        convert.to_hf(tmp_path / "adapter", tmp_path / dtype_option, dtype_option)
        verification = convert.verify(tmp_path / "adapter", tmp_path / dtype_option, load=False)
        assert verification.passed
        (difference,) = [c for c in verification.checks if c.name == "largest difference of a weight"]
        assert ("rounding to bfloat16 changes the adapted weights by" in difference.detail) == (
            dtype_option == "bfloat16")
    trained, rounded, frozen = (
        torch.cat([tensor.double().flatten()
                   for name, tensor in sorted(read_tensors(tmp_path / folder).items())
                   if "q_proj" in name or "up_proj" in name]) for folder in ("keep", "bfloat16", "hf"))
    loss = float((rounded - trained).norm() / (trained - frozen).norm())
    assert f"by {loss:.0%} of the adapter's own update" in difference.detail
    assert not convert.verify(tmp_path / "base", tmp_path / "keep", load=False).passed
