"""Loading a model: damage is reported by name, on other processes as well."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.infer.engines import load as loading
from megatron_sov.infer.engines.load import load_tokenizer, run_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.model.config import GpuConfig, RunConfig, apply_settings


def test_run_forward_model_returns_the_result(one_rank: None, imported: dict[str, Path],
                                              hf_models: dict[str, Path]) -> None:
    for target in (Target(imported["exaone_moe"], False), Target(hf_models["exaone_moe"], True)):
        result = run_forward_model(target, ["train.head_chunk_tokens=7"], None, lambda loaded: [
            loaded.world.size, loaded.config.train.head_chunk_tokens,
            sum(p.numel() for p in loaded.policy.model.parameters())])
        manifest = json.loads((imported["exaone_moe"] / "model.index.json").read_text())
        biases = 4 * 8  # router biases are buffers, not parameters
        sizes = [entry["shape"] for entry in manifest.values()]
        assert result == [1, 7, sum(map(math.prod, sizes)) - biases]


def test_model_is_loaded_with_gpu_settings_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # a gate under Slurm runs where its run has trained, and there Megatron-Core refuses another attention
    found: list[GpuConfig] = []
    monkeypatch.setattr(loading, "build_run_model", lambda config, gpu: found.append(gpu))
    monkeypatch.setattr(loading, "ForwardModel", lambda *_: None)
    monkeypatch.setattr(loading, "store_by_columns", lambda model: None)
    for name in ("check_weights", "load_model"):
        monkeypatch.setattr(loading.load, name, lambda *_: None)
    config: RunConfig = apply_settings(recipes.get("tiny-solar-open"), [
        "gpu.attention=fused", 'gpu.offload_modules=["core_attn"]', 'gpu.recompute_modules=["moe"]'])
    loading.load_forward_model(Path("checkpoint"), config)
    assert found == [GpuConfig(attention="fused")]


def test_weights_by_columns_keep_their_values_and_accept_new_ones() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 7))
    tokens = torch.tensor([4, 0, 4])
    expected = model(tokens)
    loading.store_by_columns(model)
    assert [p.stride() for p in model.parameters()] == [(1, 5), (1, 7), (1,)]
    assert torch.allclose(model(tokens), expected, atol=1e-6)
    with torch.no_grad():
        model[1].weight[2:4].copy_(torch.zeros(2, 3))
    assert torch.equal(model(tokens)[:, 2:4], model[1].bias[2:4].expand(3, 2))


def test_damaged_checkpoint_is_named(one_rank: None, imported: dict[str, Path], tmp_path: Path,
                                     capsys) -> None:
    damaged = shutil.copytree(imported["solar_open"], tmp_path / "damaged")
    file = next(damaged.glob("model/*/*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(SystemExit) as e:
        run_forward_model(Target(damaged, False), [], None, lambda loaded: 1)
    assert e.value.code == 2
    assert f"error: {file}: its content differs from the hash" in capsys.readouterr().err


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        load_tokenizer(tmp_path)
