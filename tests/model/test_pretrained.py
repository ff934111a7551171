"""Pretrained models load exactly the weights of their folder, or are refused with the names of the
tensors."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification,
    DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)

from megatron_sov import convert
from megatron_sov.base.errors import UserError
from megatron_sov.infer.engines.transformers_engine import load_hf
from megatron_sov.model import pretrained
from megatron_sov.model.pretrained import find_weight_files, load_pretrained

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1,
                         "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}
LM_TENSOR = "model.layers.0.self_attn.q_norm.weight"
CLASSIFIER_TENSOR = "bert.encoder.layer.0.attention.self.query.weight"


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any],
                 file: str = "model.safetensors") -> Path:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def build_changes(name: str) -> dict[str, Callable[[dict[str, torch.Tensor]], Any]]:
    """Return problem -> function that causes it for tensor `name`."""
    return {"missing": lambda t: t.pop(name),
            "unexpected": lambda t: t.update({name.replace(".0.", ".7."): t[name].clone()}),
            "mismatched": lambda t: t.update({name: torch.ones(3)})}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model and a classifier."""
    folder = tmp_path_factory.mktemp("models")
    Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)).save_pretrained(folder / "lm")
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(folder / "bert")
    words = Tokenizer(WordLevel({"[UNK]": 0}, "[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder / "bert")
    return {"lm": folder / "lm", "bert": folder / "bert"}


LOADERS = {"generate, eval, serve": ("lm", load_hf, LM_TENSOR),
           "a classifier": ("bert", partial(load_pretrained, AutoModelForSequenceClassification),
                            CLASSIFIER_TENSOR)}


@pytest.mark.each("kind", ["missing", "unexpected", "mismatched"])
@pytest.mark.each("command", LOADERS)
def test_every_command_refuses_other_tensors(command: str, kind: str, models: dict[str, Path],
                                             tmp_path: Path) -> None:
    model, load, name = LOADERS[command]
    folder = edit_tensors(shutil.copytree(models[model], tmp_path / "bad"), build_changes(name)[kind])
    with pytest.raises(UserError, match=rf"bad: its tensors are not those of the \w+ that its config.json "
                                        rf"describes: 1 {kind} \([\w.]+\.\d\.\w+.*\); compare the") as e:
        load(folder)
    assert "\n" not in str(e.value)


def test_another_architectures_config_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["lm"], tmp_path / "bad")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "bloom", "architectures": ["BloomForCausalLM"], "vocab_size": 32, "hidden_size": 16,
        "n_layer": 1, "n_head": 2}))
    with pytest.raises(UserError, match=r"BloomForCausalLM .*\d+ missing"):
        load_hf(folder)


def test_unknown_architecture_and_damaged_config_have_different_messages(models: dict[str, Path],
                                                                         tmp_path: Path) -> None:
    folder = shutil.copytree(models["lm"], tmp_path / "new")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "of_next_year"}))
    with pytest.raises(UserError, match=r"no class for model_type = 'of_next_year'") as e:
        load_hf(folder)
    assert "restore" not in str(e.value)
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(UserError, match="cannot load"):
        load_hf(folder)


def test_tensors_without_a_parameter_are_skipped(tmp_path: Path) -> None:
    """The prediction layer, at a size unknown to transformers; buffers of older files; a tied head."""
    c = DeepseekV3Config(**SIZES, moe_intermediate_size=8, n_routed_experts=2, num_experts_per_tok=1,
                         n_group=1, topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
                         qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1, num_key_value_heads=2)
    DeepseekV3ForCausalLM(c).save_pretrained(tmp_path / "v3")
    norm = "model.layers.{}.input_layernorm.weight"
    edit_tensors(tmp_path / "v3", lambda t: t.update({norm.format(1): t[norm.format(0)].clone()}))
    load_hf(tmp_path / "v3")
    edit_tensors(tmp_path / "v3", lambda t: t.update({norm.format(2): t[norm.format(0)].clone()}))
    with pytest.raises(UserError, match=r"1 unexpected \(model\.layers\.2\.input_layernorm\.weight\)"):
        load_hf(tmp_path / "v3")
    tied = Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    Qwen3ForCausalLM(tied).save_pretrained(tmp_path / "tied")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(tmp_path / "tied", lambda t: t.update({buffer: torch.ones(4)}))
    assert "lm_head.weight" not in load_file(tmp_path / "tied/model.safetensors")
    load_pretrained(AutoModelForCausalLM, tmp_path / "tied")


def add_second_weights(folder: Path) -> None:
    """Add a single file with other values next to the shards, as after a second download."""
    tensors = {name: tensor * 2 for file in folder.glob("model-*.safetensors")
               for name, tensor in load_file(file).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "two sets": (add_second_weights,
                 "holds model.safetensors and model.safetensors.index.json, which names other files"),
    "adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), "holds adapter_config.json next to"),
    "lost shard": (lambda d: next(iter(sorted(d.glob("model-*.safetensors")))).unlink(), "it should hold"),
    "in two shards": (lambda d: edit_tensors(d, lambda t: t.update({"model.norm.weight": torch.ones(16)}),
                                             min(d.glob("model-*.safetensors")).name), "holds as well"),
    "not in the index": (lambda d: edit_tensors(d, lambda t: t.update(stray=torch.ones(2)),
                                                min(d.glob("model-*.safetensors")).name),
                         "disagrees with the files about stray"),
    }


@pytest.mark.each("load", [load_hf, convert.open_weights])
@pytest.mark.each("case", DAMAGES)
def test_ambiguous_weight_files_are_refused(case: str, load: Any, models: dict[str, Path],
                                            tmp_path: Path) -> None:
    load_hf(models["lm"]).save_pretrained(tmp_path / "bad", max_shard_size=1500)
    damage, expected = DAMAGES[case]
    damage(tmp_path / "bad")
    with pytest.raises(UserError, match=expected):
        load(tmp_path / "bad")


def test_weights_in_other_formats_are_not_read(models: dict[str, Path], tmp_path: Path) -> None:
    """As transformers and convert both do; an index may name the single file."""
    folder = shutil.copytree(models["lm"], tmp_path / "hub")
    (folder / "pytorch_model.bin").write_bytes(b"evil")
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert find_weight_files(folder) == {"model.safetensors": names}
    load_hf(folder)
    assert convert.open_weights(folder).list_names()


@pytest.mark.each("file_name", ["other.safetensors", "sub/other.safetensors.index.json", 5])
def test_a_config_that_names_another_file_of_weights_is_refused(file_name: Any, models: dict[str, Path],
                                                                tmp_path: Path) -> None:
    """transformers would read that file, while the tensor check reads the other one."""
    folder = Path(shutil.copytree(models["lm"], tmp_path / "lm"))
    shutil.copyfile(folder / "model.safetensors", folder / "other.safetensors")
    edit_tensors(folder, lambda tensors: [tensor.mul_(2) for tensor in tensors.values()], "other.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for value in (None, "model.safetensors"):
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": value}))
        load_hf(folder)
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": file_name}))
    for read in (load_hf, find_weight_files, lambda folder: convert.from_hf(folder, tmp_path / "out")):
        with pytest.raises(UserError, match=r"config.json: transformers_weights"):
            read(folder)


def test_hash_of_a_model_changes_with_each_block_read(tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "MAX_FULL_BYTES", 64)
    monkeypatch.setattr(pretrained, "BLOCK_BYTES", 8)
    monkeypatch.setattr(pretrained, "NUM_BLOCKS", 8)
    weights = bytearray(range(256))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".cache").write_text("1")
    (tmp_path / "model.safetensors").write_bytes(weights)
    before = pretrained.hash_model_folder(tmp_path)
    (tmp_path / ".cache").write_text("2")
    assert pretrained.hash_model_folder(tmp_path) == before
    hashes = {before}
    for index in (0, 84, 255):  # in the first, a middle and the last block
        changed = weights.copy()
        changed[index] ^= 1
        (tmp_path / "model.safetensors").write_bytes(changed)
        hashes.add(pretrained.hash_model_folder(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    assert len(hashes | {pretrained.hash_model_folder(tmp_path)}) == 5
