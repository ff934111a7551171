"""Torch's loader and optimizer continue from a written checkpoint on a transformers model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_sov import convert
from megatron_sov.base.artifacts import find_damaged_files
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.cli import main
from megatron_sov.convert.dcp import writer
from megatron_sov.convert.dcp.to_dcp import list_parts, to_dcp
from megatron_sov.model import recipes
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds
from tests.convert.test_to_megatron import FIRST, STEPS, Case
from tests.packing import Packed

JOBS = str(Path(__file__).with_name("torch_training.py"))
DENSE, EXPERTS = "tiny-qwen3", "tiny-qwen3-moe"


def continue_torch(case: Case, job: Any, num_ranks: int) -> Any:
    return job(JOBS, "continue_torch", num_ranks, {
        "folder": str(case.folder / f"out/step-{FIRST}"), "batches": str(case.folder / "batches.pt")})


@pytest.mark.distributed
def test_torch_loop_continues_with_our_losses(ranks: Any, job: Any, packed_data: Packed, tmp_path: Path
                                              ) -> None:
    case = Case(job, packed_data, tmp_path / "run", DENSE, "fp64")
    (expected,), = ranks(case.training)
    source = to_dcp(case.folder / f"checkpoints/step-{FIRST}", case.folder / "out")
    assert (source.step, source.num_updates) == (FIRST, FIRST)
    (losses,), = ranks(continue_torch(case, job, 1))
    assert len(losses) == STEPS and max(expected) - min(expected) > 0.5
    assert losses == pytest.approx(expected, rel=1e-12)


@pytest.mark.distributed
@pytest.mark.deep
def test_sharded_torch_loop_continues(ranks: Any, job: Any, packed_data: Packed,
                                                     tmp_path: Path) -> None:
    for recipe in (DENSE, EXPERTS):
        case = Case(job, packed_data, tmp_path / recipe, recipe, "fp64")
        (expected,), = ranks(case.training)
        to_dcp(case.folder / f"checkpoints/step-{FIRST}", case.folder / "out")
        for losses in ranks(continue_torch(case, job, 1), continue_torch(case, job, 2)):
            assert losses[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.distributed
def test_masters_are_the_weights_of_the_torch_loop(ranks: Any, job: Any, packed_data: Packed,
                                                   tmp_path: Path) -> None:
    case = Case(job, packed_data, tmp_path / "run", DENSE, "bf16")
    ranks(case.training)
    ours, out = case.folder / f"checkpoints/step-{FIRST}", case.folder / "out"
    to_dcp(ours, out)
    weight = {"model.model.norm.weight": torch.zeros(32)}
    dcp.load(weight, checkpoint_id=out / f"step-{FIRST}")
    masters = TensorReader(ours, "optimizer")
    assert weight["model.model.norm.weight"].equal(masters.read("master/decoder.final_layernorm.weight"))


@pytest.mark.each("recipe", [
    "tiny-solar-open", "tiny-k-exaone", "tiny-deepseek-v3", "tiny-qwen2", "tiny-qwen3-moe", "tiny-llama",
    "tiny-gemma3", "tiny-exaone4", "tiny-hyperclovax"])
def test_names_are_those_of_the_transformers_class(recipe: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = recipes.get(recipe).model
    family = models.get_family(model.family)
    (tmp_path / "config.json").write_text(json.dumps(family.to_hf_config(model, "float32", TokenIds())))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).state_dict()
    ours = {part.key: part.tensor_shape for link in family.links(model)
            for part in list_parts(link)}
    if model.tied_embeddings:  # both names are written
        ours["lm_head.weight"] = ours["model.embed_tokens.weight"]
    # transformers has no prediction layer
    assert {key: tuple(tensor.shape) for key, tensor in theirs.items()}.items() <= ours.items()


def test_written_files_have_the_weights_of_the_checkpoint(
        solar_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
        ) -> None:
    monkeypatch.setattr(writer, "MAX_BLOCK_BYTES", 4 << 10)  # 2 of 8 experts, 64 rows of other matrices
    convert.from_hf(solar_dir, tmp_path / "ours")
    out = tmp_path / "out"
    assert main(["convert", "to-dcp", str(tmp_path / "ours"), str(out)]) == 0
    assert "without optimizer" in capsys.readouterr().out
    assert find_damaged_files(out) == []
    weights = convert.open_weights(solar_dir)
    experts = torch.zeros(8, 32, 24, dtype=torch.bfloat16)
    names = ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight")
    matrices = {f"model.{name}": torch.zeros_like(weights.read(name)) for name in names}
    dcp.load({"model.model.layers.1.mlp.experts.down_proj": experts, **matrices},
             checkpoint_id=out / "step-0")
    assert all(matrices[f"model.{name}"].equal(weights.read(name)) for name in names)
    for expert in range(8):
        assert experts[expert].equal(weights.read(f"model.layers.1.mlp.experts.{expert}.down_proj.weight"))
