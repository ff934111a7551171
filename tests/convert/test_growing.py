"""A model that was grown computes, in transformers, what the one that it was grown from computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sov import convert
from megatron_sov.base.artifacts import manifest_sha256, read_manifest
from megatron_sov.cli import main

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
         "initializer_range": 0.3}


def logits(folder: Path) -> torch.Tensor:
    """Return transformers' logits of a text, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 experts_implementation="eager").eval()
    ids = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def exported(checkpoint: Path) -> Path:
    """Return the checkpoint as a Hugging Face folder."""
    out = checkpoint.with_name(f"{checkpoint.name}-hf")
    convert.to_hf(checkpoint, out)
    return out


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of dense models that transformers made, and their checkpoints beside them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, made = tmp_path_factory.mktemp("dense"), {}
    for family in ("llama", "qwen3"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES), dtype=torch.float32)
        model.save_pretrained(folder / f"{family}-from")
        convert.from_hf(folder / f"{family}-from", folder / family)
        made[family] = folder / family
    return made


@pytest.mark.parametrize(("family", "experts", "top_k", "granularity"), [
    ("llama", 4, 1, 1), ("llama", 4, 2, 1), ("qwen3", 12, 6, 3), ("qwen3", 8, 4, 4)])
def test_experts_that_are_copies_compute_what_the_dense_model_does(
        family: str, experts: int, top_k: int, granularity: int, dense: dict[str, Path],
        tmp_path: Path) -> None:
    assert main(["convert", "upcycle", str(dense[family]), str(tmp_path / "moe"), "--experts", str(experts),
                 "--top-k", str(top_k), "--granularity", str(granularity)]) == 0
    expected, found = logits(dense[family].with_name(f"{family}-from")), logits(exported(tmp_path / "moe"))
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    manifest = read_manifest(tmp_path / "moe", "checkpoint")
    assert manifest.content["upcycled"]["manifest_sha256"] == manifest_sha256(dense[family])
    assert [i["path"] for i in manifest.inputs] == [str(dense[family])]


def test_noise_and_router_follow_from_the_seed_alone(dense: dict[str, Path], tmp_path: Path) -> None:
    def tensors(name: str, *more: str) -> dict[str, Any]:
        assert main(["convert", "upcycle", str(dense["llama"]), str(tmp_path / name), "--experts", "4",
                     "--top-k", "2", *more]) == 0
        return load_file(exported(tmp_path / name) / "model.safetensors")

    plain, noisy = tensors("plain"), tensors("noisy", "--noise", "0.1")
    again, other = tensors("again", "--noise", "0.1"), tensors("other", "--noise", "0.1", "--seed", "1")
    assert all(tensor.equal(again[name]) for name, tensor in noisy.items())
    gate, expert = "model.layers.1.block_sparse_moe.gate.weight", "model.layers.1.block_sparse_moe.experts.{}"
    assert not noisy[gate].equal(other[gate]) and plain[gate].equal(noisy[gate])
    for part in ("w1", "w2", "w3"):
        one, two = (noisy[f"{expert.format(e)}.{part}.weight"] for e in (0, 1))
        base = plain[f"{expert.format(0)}.{part}.weight"]
        assert not one.equal(two) and base.equal(plain[f"{expert.format(1)}.{part}.weight"])
        assert float((one - base).std() / base.std()) == pytest.approx(0.1, rel=0.15)
    same = [name for name in plain if "block_sparse_moe" not in name]
    assert len(same) > 10 and all(plain[name].equal(noisy[name]) for name in same)


@pytest.mark.parametrize(("how", "origins"), [
    ("stack", [0, 1, 2, 0, 1, 2]), ("interleave", [0, 0, 1, 1, 2, 2])])
def test_repeated_layers_are_the_models_own(how: str, origins: list[int], dense: dict[str, Path],
                                            tmp_path: Path) -> None:
    assert main(["convert", "deepen", str(dense["qwen3"]), str(tmp_path / "deep"), "--layers", "6", "--how",
                 how]) == 0
    before = load_file(dense["qwen3"].with_name("qwen3-from") / "model.safetensors")
    after = load_file(exported(tmp_path / "deep") / "model.safetensors")
    names = [name for name in before if ".layers.0." in name]
    for layer, origin in enumerate(origins):
        for name in names:
            assert after[name.replace(".0.", f".{layer}.", 1)].equal(
                before[name.replace(".0.", f".{origin}.", 1)]), (name, layer)
    assert main(["convert", "deepen", str(dense["qwen3"]), str(tmp_path / "same"), "--layers", "5", "--how",
                 how, "--identity"]) == 0
    expected, found = logits(dense["qwen3"].with_name("qwen3-from")), logits(exported(tmp_path / "same"))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_mixture_of_experts_with_windows_grows_deeper(exaone_dir: Path, tmp_path: Path) -> None:
    """Kinds of layers go along: dense before experts, sliding and global, with the prediction layer."""
    from megatron_sov.runs.checkpoints import settings_of

    convert.from_hf(exaone_dir, tmp_path / "from")
    assert main(["convert", "deepen", str(tmp_path / "from"), str(tmp_path / "deep"), "--layers", "10"]) == 0
    before, after = (settings_of(tmp_path / name).model for name in ("from", "deep"))
    assert after.layer_types() == [kind for kind in before.layer_types() for _ in range(2)]
    assert (after.num_dense_layers, after.num_mtp_layers) == (2 * before.num_dense_layers, 1)


@pytest.mark.parametrize(("words", "sentence"), [
    (["upcycle", "--experts", "4", "--top-k", "2", "--granularity", "5"],
     "must divide model.dense_ffn_dim = 48"),
    (["upcycle", "--experts", "4", "--top-k", "1", "--granularity", "2"],
     "--top-k 1: must be a multiple"),
    (["upcycle", "--experts", "2", "--top-k", "4"], "must be at most --experts 2"),
    (["upcycle", "--experts", "2", "--top-k", "1", "--noise", "nan"], "--noise nan: must be a finite number"),
    (["upcycle", "--experts", "2", "--top-k", "1", "--family", "solar_open"], "must be at least 1"),
    (["upcycle", "--experts", "2", "--top-k", "1", "--family", "qwen3_moe"], "model.qk_norm"),
    (["deepen", "--layers", "3"], "must be more than the 3"),
])
def test_what_cannot_grow_is_told(words: list[str], sentence: str, dense: dict[str, Path], tmp_path: Path,
                                  capsys: Any) -> None:
    action, *rest = words
    assert main(["convert", action, str(dense["llama"]), str(tmp_path / "out"), *rest]) == 2
    assert sentence in capsys.readouterr().err and list(tmp_path.iterdir()) == []
