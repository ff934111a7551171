"""Torch's loader and optimizer continue from a written checkpoint on a transformers model, and back."""

import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_sov import convert
from megatron_sov.base.artifacts import find_damaged_files
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.cli import main
from megatron_sov.convert.dcp import writer
from megatron_sov.convert.dcp.names import HF, TORCHTITAN, check_names, list_parts, order_rotary
from megatron_sov.convert.dcp.to_dcp import to_dcp
from megatron_sov.model import recipes
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds
from tests.convert.test_to_megatron import FIRST, SAVED_AFTER, STEPS, Case
from tests.packing import Packed

JOBS = str(Path(__file__).with_name("torch_training.py"))
DENSE, EXPERTS = "tiny-qwen3", "tiny-qwen3-moe"


def continue_torch(case: Case, job: Any, num_ranks: int, saved: str = "") -> Any:
    return job(JOBS, "continue_torch", num_ranks, {
        "folder": str(case.folder / f"out/step-{FIRST}"), "batches": str(case.folder / "batches.pt"),
        "saved": str(case.folder / saved), "saved_after": SAVED_AFTER if saved else 0})


def import_theirs(case: Case, saved: str) -> Path:
    assert main(["convert", "from-dcp", str(case.folder / saved), str(case.folder / f"from-{saved}"),
                 "--model", str(case.folder / "out")]) == 0
    return case.folder / f"from-{saved}"


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
def test_sharded_torch_loop_continues_and_comes_back(ranks: Any, job: Any, packed_data: Packed,
                                                     tmp_path: Path) -> None:
    for recipe in (DENSE, EXPERTS):
        case = Case(job, packed_data, tmp_path / recipe, recipe, "fp64")
        (expected,), = ranks(case.training)
        to_dcp(case.folder / f"checkpoints/step-{FIRST}", case.folder / "out")
        for losses in ranks(continue_torch(case, job, 1, "one"), continue_torch(case, job, 2, "two")):
            assert losses[0] == pytest.approx(expected, rel=1e-12)
        for saved in ("one", "two"):
            (resumed,), = ranks(case.resume_from(import_theirs(case, saved)))
            assert resumed == pytest.approx(expected[SAVED_AFTER:], rel=1e-12)


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
    assert main(["convert", "from-dcp", str(out), str(tmp_path / "back"), "--dtype", "bfloat16"]) == 0
    for part in ("model", "optimizer"):
        before, after = TensorReader(ours, part), TensorReader(tmp_path / "back", part)
        assert set(before.keys()) == set(after.keys())
        assert all(before.read(key).equal(after.read(key)) for key in before.keys())  # noqa: SIM118


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
            for part in list_parts(HF, link, lambda key: True, state=False)}
    if model.tied_embeddings:  # both names are written
        ours["lm_head.weight"] = ours["model.embed_tokens.weight"]
    # transformers has no prediction layer
    assert {key: tuple(tensor.shape) for key, tensor in theirs.items()}.items() <= ours.items()


def test_names_are_those_of_torchtitan(tmp_path: Path) -> None:
    """Recorded from torchtitan 0.3.0: a layer of its Qwen3 with experts and fused query, key, value."""
    model = recipes.get(EXPERTS).model
    links = [link for link in models.get_family(model.family).links(model)
             if f"layers.{model.num_layers - 1}." in link.key]
    last = f"layers.{model.num_layers - 1}."
    parameters = {part.key.removeprefix(last) for link in links
                  for part in list_parts(TORCHTITAN, link, lambda key: True, state=True)}
    assert parameters == {
        "attention.qkv_linear.wqkv.weight", "attention.wo.weight", "attention.q_norm.weight",
        "attention.k_norm.weight", "attention_norm.weight", "ffn_norm.weight", "moe.router.gate.weight",
        *(f"moe.routed_experts.inner_experts.{name}" for name in ("w1_EFD", "w2_EDF", "w3_EFD"))}


def test_rotary_pairs_of_torchtitans_llama_are_neighbours() -> None:
    model = recipes.get("tiny-llama").model
    name, half = "model.layers.0.self_attn.q_proj.weight", model.head_dim // 2
    rows = torch.arange(2 * model.head_dim)[:, None]
    theirs = order_rotary(model, name, rows)
    assert theirs[:4, 0].tolist() == [0, half, 1, half + 1]
    assert order_rotary(model, name, theirs, inverse=True).equal(rows)


@pytest.mark.each("names", [HF, TORCHTITAN])
def test_weights_come_back_with_equal_bits(names: str, solar_dir: Path, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    folder = solar_dir
    if names == TORCHTITAN:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        folder = tmp_path / "hf"
        Qwen3MoeForCausalLM(Qwen3MoeConfig(
            vocab_size=96, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
            tie_word_embeddings=True)).save_pretrained(folder)
    convert.from_hf(folder, tmp_path / "ours")
    out = tmp_path / "out"
    assert main(["convert", "to-dcp", str(tmp_path / "ours"), str(out), "--names", names]) == 0
    assert "without optimizer" in capsys.readouterr().out
    assert find_damaged_files(out) == []
    assert main(["convert", "from-dcp", str(out), str(tmp_path / "back")]) == 0
    assert convert.verify(tmp_path / "ours", tmp_path / "back", load=False).passed
    damaged = out / "step-0/__0_5.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    assert main(["convert", "from-dcp", str(out), str(tmp_path / "again")]) == 2
    assert re.search(r"__0_5\.distcp: its content differs.*\(it holds \S+", capsys.readouterr().err)


def test_damage_and_interruption_leave_no_folder(solar_dir: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    convert.from_hf(solar_dir, tmp_path / "ours")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer, "sha256_file", Mock(side_effect=KeyboardInterrupt))
        to_dcp(tmp_path / "ours", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


CONFIG = {"model_type": "qwen3", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "head_dim": 8,
          "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
          "tie_word_embeddings": False, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 8}
SHAPES = {"embed_tokens": (8, 8), "norm": (8,), "layers.0.input_layernorm": (8,),
          "layers.0.post_attention_layernorm": (8,), "layers.0.self_attn.q_norm": (8,),
          "layers.0.self_attn.k_norm": (8,),
          **{f"layers.0.{name}_proj": (8, 8) for name in ("self_attn.q", "self_attn.k", "self_attn.v",
                                                          "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}}
WEIGHTS = {"lm_head.weight": torch.ones(8, 8),
           **{f"model.{name}.weight": torch.ones(shape) for name, shape in SHAPES.items()}}
MOMENT = {"optimizer": {"state.model.norm.weight.exp_avg": torch.ones(8)}}


@pytest.mark.each(("state", "config", "sentence"), [
    ({"w": torch.ones(2)}, CONFIG, "has no weight model.embed_tokens.weight or tok_embeddings.weight"),
    (WEIGHTS, None, "has no config.json with the architecture; pass the folder .* with --model"),
    (WEIGHTS | {"model.norm.bias": torch.ones(8)}, CONFIG, r"model\.norm\.bias.*--model"),
    (WEIGHTS | {"model.norm.weight": torch.ones(4)}, CONFIG, r"model\.norm\.weight.*\[4\].*--model"),
    (WEIGHTS | MOMENT, CONFIG, "optimizer has no exp_avg of model.embed_tokens.weight.*--weights-only"),
    ({"tok_embeddings.weight": torch.ones(8, 8)}, CONFIG | {"model_type": "qwen2"},
     "torchtitan 0.3 has no model of family 'qwen2'")])
def test_other_checkpoints_are_refused(state: dict[str, Any], config: dict[str, Any] | None, sentence: str,
                                       tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dcp.save(state, checkpoint_id=tmp_path / "theirs", no_dist=True)
    if config is not None:
        (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    assert main(["convert", "from-dcp", str(tmp_path / "theirs"), str(tmp_path / "out")]) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_weights_alone_are_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dcp.save({"app": WEIGHTS, **MOMENT}, checkpoint_id=tmp_path / "step-7", no_dist=True)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert main(["convert", "from-dcp", str(tmp_path), str(tmp_path / "out"), "--weights-only"]) == 0
    assert "the optimizer starts from zero" in capsys.readouterr().out


def test_families_without_counterpart_are_refused() -> None:
    with pytest.raises(UserError, match="no model of family 'solar_open', only llama, qwen3, qwen3_moe"):
        check_names(TORCHTITAN, recipes.get("tiny-solar-open").model)
