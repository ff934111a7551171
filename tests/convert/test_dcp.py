"""Torch's loader and optimizer continue from a written checkpoint on a transformers model, and back."""

import json
import os
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.optim import lr_scheduler

from megatron_sov import convert
from megatron_sov.base.artifacts import find_damaged_files
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.cli import main
from megatron_sov.convert import hf_import
from megatron_sov.convert.dcp import writer
from megatron_sov.convert.dcp.from_dcp import from_dcp
from megatron_sov.convert.dcp.names import HF, TORCHTITAN, check_names, list_forms, order_rotary
from megatron_sov.convert.dcp.to_dcp import to_dcp
from megatron_sov.model import recipes
from megatron_sov.model.config import OptimConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds
from megatron_sov.schedules import compute_learning_rate
from tests.convert.test_hostile import CANARY, TOUCH_CANARY, Calls, nest_tuples
from tests.convert.test_to_megatron import FIRST, SAVED_AFTER, STEPS, Case
from tests.packing import Packed

JOBS = str(Path(__file__).with_name("torch_training.py"))
DENSE, EXPERTS = "tiny-qwen3", "tiny-qwen3-moe"


def continue_torch(case: Case, job: Any, num_ranks: int) -> Any:
    return job(JOBS, "continue_torch", num_ranks, {
        "folder": str(case.folder / f"out/step-{FIRST}"), "batches": str(case.folder / "batches.pt"),
        "saved": str(case.folder / f"saved-{num_ranks}"), "saved_after": SAVED_AFTER})


def import_saved(case: Case, num_ranks: int) -> Path:
    assert main(["convert", "from-dcp", str(case.folder / f"saved-{num_ranks}"),
                 str(case.folder / f"back-{num_ranks}"), "--model", str(case.folder / "out")]) == 0
    return case.folder / f"back-{num_ranks}"


@pytest.mark.distributed
def test_torch_loop_continues_with_our_losses_and_back(ranks: Any, job: Any, packed_data: Packed,
                                                       tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                       ) -> None:
    case = Case(job, packed_data, tmp_path / "run", DENSE, "fp64")
    (expected,), = ranks(case.training)
    source = to_dcp(case.folder / f"checkpoints/step-{FIRST}", case.folder / "out")
    assert (source.step, source.num_updates) == (FIRST, FIRST)
    (losses,), = ranks(continue_torch(case, job, 1))
    assert len(losses) == STEPS and max(expected) - min(expected) > 0.5
    assert losses == pytest.approx(expected, rel=1e-12)
    back = import_saved(case, 1)
    output = capsys.readouterr().out
    assert f"with the moments of {FIRST + SAVED_AFTER} updates" in output
    assert f"RUN/checkpoints/step-{FIRST + SAVED_AFTER}" in output
    for setting in ("train.precision=fp64", "optim.lr=0.01", "optim.weight_decay=0.1", "optim.beta2=0.95",
                    "optim.eps=0.0001"):
        assert f"--set {setting}" in output
    (resumed,), = ranks(case.resume_from(back))
    assert resumed == pytest.approx(expected[SAVED_AFTER:], rel=1e-12)


@pytest.mark.distributed
@pytest.mark.deep
def test_sharded_torch_loop_continues_and_back(ranks: Any, job: Any, packed_data: Packed, tmp_path: Path
                                               ) -> None:
    for recipe in (DENSE, EXPERTS):
        case = Case(job, packed_data, tmp_path / recipe, recipe, "fp64")
        (expected,), = ranks(case.training)
        to_dcp(case.folder / f"checkpoints/step-{FIRST}", case.folder / "out")
        for losses in ranks(continue_torch(case, job, 1), continue_torch(case, job, 2)):
            assert losses[0] == pytest.approx(expected, rel=1e-12)
        for (resumed,) in ranks(*(case.resume_from(import_saved(case, num_ranks)) for num_ranks in (1, 2))):
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
            for part in list_forms(HF, link)[0]}
    if model.tied_embeddings:  # both names are written
        ours["lm_head.weight"] = ours["model.embed_tokens.weight"]
    # transformers has no prediction layer
    assert {key: tuple(tensor.shape) for key, tensor in theirs.items()}.items() <= ours.items()


def test_names_are_those_of_torchtitan() -> None:
    """Recorded from the state dict adapter and the optimizer of torchtitan 0.3.0."""
    model = recipes.get(EXPERTS).model
    links = [link for link in models.get_family(model.family).links(model)
             if ".layers." not in link.key or f".layers.{model.num_layers - 1}." in link.key]
    weights, parameters = ({part.key.removeprefix(f"layers.{model.num_layers - 1}.")
                            for link in links for part in list_forms(TORCHTITAN, link, is_state=is_state)[0]}
                           for is_state in (False, True))
    projections = {f"attention.qkv_linear.{name}.weight" for name in ("wq", "wk", "wv")}
    assert weights - projections == parameters - {"attention.qkv_linear.wqkv.weight"} == {
        "tok_embeddings.weight", "norm.weight", "lm_head.weight", "attention_norm.weight", "ffn_norm.weight",
        "attention.wo.weight", "attention.q_norm.weight", "attention.k_norm.weight", "moe.router.gate.weight",
        *(f"moe.routed_experts.inner_experts.{name}" for name in ("w1_EFD", "w2_EDF", "w3_EFD"))}
    assert projections < weights and "attention.qkv_linear.wqkv.weight" in parameters
    with pytest.raises(UserError, match="no model of family 'solar_open', only llama, qwen3, qwen3_moe"):
        check_names(TORCHTITAN, recipes.get("tiny-solar-open").model)


def test_rotary_pairs_of_torchtitans_llama_are_neighbours() -> None:
    model = recipes.get("tiny-llama").model
    name, half = "model.layers.0.self_attn.q_proj.weight", model.head_dim // 2
    rows = torch.arange(2 * model.head_dim)[:, None]
    theirs = order_rotary(TORCHTITAN, model, name, rows)
    assert theirs[:4, 0].tolist() == [0, half, 1, half + 1]
    assert order_rotary(TORCHTITAN, model, name, theirs, inverse=True).equal(rows)


@pytest.mark.each(("names", "keys"), [
    (HF, ("model.model.embed_tokens.weight", "model.model.layers.1.self_attn.q_proj.weight",
          "model.model.layers.1.mlp.experts.down_proj")),
    (TORCHTITAN, ("tok_embeddings.weight", "layers.1.attention.qkv_linear.wq.weight",
                  "layers.1.moe.routed_experts.inner_experts.w2_EDF"))])
def test_weights_come_back_with_equal_bits(names: str, keys: tuple[str, ...], solar_dir: Path,
                                           tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_BLOCK_BYTES", 4 << 10)  # 2 of 8 experts, 64 rows of other matrices
    folder = solar_dir
    if names == TORCHTITAN:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        folder = tmp_path / "hf"
        Qwen3MoeForCausalLM(Qwen3MoeConfig(
            vocab_size=96, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            num_hidden_layers=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24,
            tie_word_embeddings=True)).bfloat16().save_pretrained(folder)
    convert.from_hf(folder, tmp_path / "ours")
    out, back = tmp_path / "out", tmp_path / "back"
    assert main(["convert", "to-dcp", str(tmp_path / "ours"), str(out), "--names", names]) == 0
    assert "without optimizer" in capsys.readouterr().out
    assert find_damaged_files(out) == []
    read = convert.open_weights(folder).read
    experts = [read(f"model.layers.1.mlp.experts.{expert}.down_proj.weight") for expert in range(8)]
    expected = (read("model.embed_tokens.weight"), read("model.layers.1.self_attn.q_proj.weight"),
                torch.stack(experts))
    state = {key: torch.zeros_like(tensor) for key, tensor in zip(keys, expected, strict=True)}
    dcp.load(state, checkpoint_id=out / "step-0")
    assert all(state[key].equal(tensor) for key, tensor in zip(keys, expected, strict=True))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hf_import, "write_tensors", Mock(side_effect=KeyboardInterrupt))
        from_dcp(out, back)
    assert not back.exists()
    assert main(["convert", "from-dcp", str(out), str(back)]) == 0
    assert "the optimizer starts from zero" in capsys.readouterr().out
    assert convert.verify(tmp_path / "ours", back, load=False).passed
    damaged = out / "step-0/__5_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    assert main(["convert", "from-dcp", str(out), str(tmp_path / "again")]) == 2
    assert re.search(r"__5_0\.distcp: its content differs.*\(it holds \S+", capsys.readouterr().err)


QWEN3 = {"model_type": "qwen3", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "head_dim": 8,
         "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
         "tie_word_embeddings": True, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 8}
SHAPES = {f"model.{name}.weight": (8,) * axes for axes, names in (
    (1, ("norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm",
         *(f"layers.0.self_attn.{name}_norm" for name in "qk"))),
    (2, ("embed_tokens", *(f"layers.0.self_attn.{name}_proj" for name in "qkvo"),
         *(f"layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))))) for name in names}
WEIGHTS = {name: torch.ones(shape) for name, shape in SHAPES.items()}
STATE = {f"optimizer.state.{name}.{state}": torch.full(shape if state != "step" else (), 7.0)
         for name, shape in SHAPES.items() for state in ("exp_avg", "exp_avg_sq", "step")}
GROUP = "optimizer.param_groups.model.embed_tokens.weight."
O_PROJ = "optimizer.state.model.layers.0.self_attn.o_proj.weight."
MUON = {name: tensor for name, tensor in STATE.items() if not name.startswith(O_PROJ)}
MUON[f"{O_PROJ}momentum_buffer"] = torch.ones(8, 8)


@pytest.mark.each(("state", "config", "sentence"), [
    ({"w": torch.ones(2)}, QWEN3, "has no weight model.embed_tokens.weight or tok_embeddings.weight"),
    (WEIGHTS, None, "has no config.json with the architecture; pass the folder .* with --model"),
    (WEIGHTS | {"model.norm.bias": torch.ones(8)}, QWEN3, r"1 unexpected \(model\.norm\.bias\).*--model"),
    (WEIGHTS | {"model.norm.weight": torch.ones(4)}, QWEN3, r"model.norm.weight \[4\] instead of \[8\]"),
    (WEIGHTS | {"lm_head.weight": torch.zeros(8, 8)}, QWEN3, "lm_head.weight differs from model.embed"),
    (WEIGHTS | {"optimizer.state.model.norm.weight.exp_avg": torch.ones(8)}, QWEN3,
     r"missing \(exp_avg/model\.embed_tokens\.weight.*--weights-only"),
    (WEIGHTS | STATE | {"optimizer.state.model.norm.weight.step": torch.tensor(5.0)}, QWEN3,
     r"counts \d updates in step/\S+ and \d in step/\S+, but a run has one count; pass --weights-only"),
    ({"tok_embeddings.weight": torch.ones(8, 8)}, QWEN3 | {"model_type": "qwen2"},
     "torchtitan 0.3 has no model of family 'qwen2'"),
    ({f"ema.{name}": tensor for name, tensor in WEIGHTS.items()} | WEIGHTS, QWEN3,
     "has 2 models .names begin with 'ema.', ''.; save one of them alone"),
    (WEIGHTS | STATE | {name.replace("optimizer", "optimizer.1"): tensor for name, tensor in STATE.items()},
     QWEN3, r"has two tensors for exp_avg/model\.norm\.weight; save one model with one optimizer"),
    (WEIGHTS | {"layers.0.moe.expert_bias_E": torch.zeros(9)}, QWEN3, "1 unexpected .layers.0.moe.expert"),
    (WEIGHTS | STATE | {f"{GROUP}betas": (nest_tuples(60), 0.9), f"{GROUP}eps": 1e-8}, QWEN3, ""),
    (WEIGHTS | STATE | {"lr_scheduler.last_epoch": 10**5000}, QWEN3, ""),
    (WEIGHTS | MUON, QWEN3, ""), (WEIGHTS | STATE | {"lm_head.weight": torch.ones(8, 8)}, QWEN3, ""),
    (WEIGHTS | STATE | {"lr_scheduler.last_epoch": Calls(os.system, TOUCH_CANARY)}, QWEN3, "")])
def test_other_checkpoints_are_refused(state: dict[str, Any], config: dict[str, Any] | None, sentence: str,
                                       tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dcp.save(state, checkpoint_id=tmp_path / "theirs/step-7", no_dist=True)
    (tmp_path / "theirs/step-²").mkdir()
    (tmp_path / "theirs/step-²/.metadata").touch()
    if config is not None:
        (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    code = main(["convert", "from-dcp", str(tmp_path / "theirs"), str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert re.search(sentence or "with the moments of 7 updates", captured.err if sentence else captured.out)
    assert not CANARY.exists()
    assert (code, (tmp_path / "out").exists()) == ((2, False) if sentence else (0, True))


COSINE, FALLING, WARM = (
    lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=1e-3),
    lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=20),
    lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=4))


def after_warmup(schedule: Any) -> Any:
    return lambda optimizer: lr_scheduler.SequentialLR(optimizer, [WARM(optimizer), schedule(optimizer)], [4])


@pytest.mark.each(("build", "kind"), [
    (COSINE, "cosine"), (FALLING, "linear"), (after_warmup(COSINE), "cosine"),
    (after_warmup(FALLING), "linear"), (WARM, ""),
    (lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1.0), "")])
def test_schedule_of_torch_continues(build: Any, kind: str, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=0.01)
    scheduler = build(optimizer)
    for _ in range(7):
        optimizer.step()
        scheduler.step()
    dcp.save(WEIGHTS | STATE | {f"{GROUP}initial_lr": 0.01, "lr_scheduler": scheduler.state_dict()},
             checkpoint_id=tmp_path / "theirs", no_dist=True)
    (tmp_path / "theirs/config.json").write_text(json.dumps(QWEN3))
    training = from_dcp(tmp_path / "theirs", tmp_path / "out").training
    assert training is not None
    settings = dict(setting.split("=") for setting in training.settings)
    assert (training.num_updates, settings.get("optim.schedule", "")) == (7, kind)
    if not kind:
        assert training.step == 7
        return
    optim = OptimConfig(lr=0.01, min_lr=float(settings["optim.min_lr"]), schedule=kind)
    steps, warmup = int(settings["train.steps"]), int(settings["optim.warmup_steps"])
    for step in range(training.step, training.step + 12):
        expected, = scheduler.get_last_lr()
        assert compute_learning_rate(optim, step + 1, steps, warmup) == pytest.approx(expected)
        optimizer.step()
        scheduler.step()


@pytest.mark.each(("command", "folder", "other"), [("from-megatron", "step-3", "from-dcp"),
                                                   ("from-dcp", "iter_0000003", "from-megatron")])
def test_a_folder_of_the_other_format_names_its_command(
        command: str, folder: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in" / folder).mkdir(parents=True)
    assert main(["convert", command, str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert f"convert {other}" in capsys.readouterr().err
