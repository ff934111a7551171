"""Megatron-Core's own model, optimizer and scheduler continue from a written `torch_dist` checkpoint."""

import dataclasses
import errno
import json
import re
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
import yaml
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig

from megatron_sov import convert
from megatron_sov.base.artifacts import find_damaged_files
from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.convert.dcp import writer
from megatron_sov.convert.dcp.to_dcp import to_dcp
from megatron_sov.convert.megatron.to_megatron import build_common_state, to_megatron
from megatron_sov.model import recipes
from megatron_sov.model.config import apply_settings
from megatron_sov.model.counterparts.architecture import (
    describe_model, describe_provider, infer_architecture, normalize_arguments)
from megatron_sov.model.families.supported import get_family
from megatron_sov.schedules import Schedule
from tests.convert.test_refusals import FC1_EXPERT, change_weights, set_value
from tests.packing import Packed

JOBS = str(Path(__file__).with_name("stock_training.py"))
DENSE, EXPERTS = "tiny-qwen3", "tiny-solar-open"
FIRST, STEPS, SAVED_AFTER = 4, 20, 8
TP2, PP2, EP2 = {"tp": 2, "sp": True}, {"pp": 2}, {"ep": 2}


class Case:
    """A run of our trainer, and continuations of its checkpoint."""

    def __init__(self, job: Any, data: Packed, folder: Path, recipe: str, precision: str) -> None:
        self._data = data
        self._job, self.folder, self._model = job, folder, {"recipe": recipe, "precision": precision}
        self.training = job(JOBS, "train_ours", 1, {"data": str(data.text), "run": str(folder), **self._model,
                                                    "first": FIRST, "steps": STEPS})

    def export(self, out: str, **options: bool) -> None:
        source, problem = to_megatron(self.folder / f"checkpoints/step-{FIRST}", self.folder / out, **options)
        assert (source.step, source.num_updates, problem) == (FIRST, FIRST, "")

    def continue_from(self, out: str, num_ranks: int, layout: dict[str, Any], *, distributed: bool,
                      saved: str = "") -> Any:
        return self._job(JOBS, "continue_stock", num_ranks, {
            "folder": str(self.folder / out), "batches": str(self.folder / "batches.pt"), **self._model,
            "layout": layout, "distributed": distributed, "saved": str(self.folder / saved),
            "saved_after": SAVED_AFTER if saved else 0})

    def resume_from(self, checkpoint: Path) -> Any:
        """Return the job of our trainer, which begins after the steps of both programs."""
        return self._job(JOBS, "resume_ours", 1, {
            "data": str(self._data.text), "run": str(self.folder / "resumed"), **self._model,
            "checkpoint": str(checkpoint), "num_skipped": FIRST + SAVED_AFTER, "steps": STEPS - SAVED_AFTER})


@pytest.mark.distributed
def test_stock_training_continues_with_our_losses(ranks: Any, job: Any, packed_data: Packed,
                                                  tmp_path: Path) -> None:
    case = Case(job, packed_data, tmp_path / "run", DENSE, "fp64")
    (expected,), = ranks(case.training)
    case.export("out")
    (losses,), = ranks(case.continue_from("out", 1, {}, distributed=False))
    assert len(losses) == STEPS and max(expected) - min(expected) > 0.5
    assert losses == pytest.approx(expected, rel=1e-12)


@pytest.mark.distributed
@pytest.mark.deep
def test_our_training_continues_a_stock_one(ranks: Any, te_ranks: Any, job: Any, packed_data: Packed,
                                            tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for precision, run_stock, rel in (("fp64", ranks, 1e-12), ("fp32", te_ranks, 1e-6)):
        case = Case(job, packed_data, tmp_path / precision, DENSE, precision)
        (expected,), = ranks(case.training)
        case.export("out")
        (losses, _), = run_stock(case.continue_from("out", 2, TP2, distributed=precision == "fp32",
                                                    saved="stock"))
        assert losses == pytest.approx(expected, rel=rel)
        ours = case.folder / "ours"
        assert main(["convert", "from-megatron", str(case.folder / "stock"), str(ours)]) == 0
        output = capsys.readouterr().out
        assert f"with the moments of {FIRST + SAVED_AFTER} updates" in output
        assert f"RUN/checkpoints/step-{FIRST + SAVED_AFTER}" in output
        for setting in ("optim.lr=0.01", "optim.schedule=cosine", "optim.warmup_steps=2", "train.steps=24",
                        "optim.beta2=0.95", "optim.weight_decay=0.1", "train.global_batch_size=4"):
            assert f"--set {setting}" in output
        (resumed,), = ranks(case.resume_from(ours))
        assert resumed == pytest.approx(expected[SAVED_AFTER:], rel=rel)


@pytest.mark.distributed
@pytest.mark.deep
def test_stock_training_continues_at_other_layouts(ranks: Any, job: Any, packed_data: Packed,
                                                   tmp_path: Path) -> None:
    """With experts the library computes routing scores in float32, whatever the model's dtype."""
    dense, experts = (Case(job, packed_data, tmp_path / recipe, recipe, "fp64")
                      for recipe in (DENSE, EXPERTS))
    (of_dense,), (of_experts,) = ranks(dense.training, experts.training)
    dense.export("out")
    experts.export("out")
    experts.export("one", one_optimizer=True)
    layouts = (TP2, PP2, {})
    for losses in ranks(*(dense.continue_from("out", 2, layout, distributed=False) for layout in layouts)):
        assert losses[0] == pytest.approx(of_dense, rel=1e-12)
    for losses in ranks(*(experts.continue_from("out", 2, layout, distributed=False)
                          for layout in (EP2, TP2)),
                        *(experts.continue_from("one", 2, layout, distributed=False)
                          for layout in (PP2, {}))):
        assert losses[0] == pytest.approx(of_experts, rel=1e-8)


@pytest.mark.distributed
@pytest.mark.deep
def test_distributed_optimizer_continues_with_our_losses(ranks: Any, te_ranks: Any, job: Any,
                                                         packed_data: Packed, tmp_path: Path) -> None:
    """Its state is float32. Without Transformer Engine it cannot load its own checkpoints: torch's AdamW
    counts steps in tensors that its files lack."""
    dense, experts = (Case(job, packed_data, tmp_path / recipe, recipe, "fp32")
                      for recipe in (DENSE, EXPERTS))
    (of_dense,), (of_experts,) = ranks(dense.training, experts.training)
    dense.export("out")
    experts.export("out")
    for losses in te_ranks(*(dense.continue_from("out", 2, layout, distributed=True)
                             for layout in (TP2, PP2, {}))):
        assert losses[0] == pytest.approx(of_dense, rel=1e-6)
    (losses, _), = te_ranks(experts.continue_from("out", 2, EP2, distributed=True))
    assert losses == pytest.approx(of_experts, rel=1e-6)


@pytest.mark.each("recipe", ["tiny-qwen2", "tiny-qwen3", "tiny-qwen3-moe", "tiny-solar-open", "llama-3.1-8b",
                             "solar-open-102b", "qwen3-30b-a3b-2507"])
def test_arguments_describe_the_model(recipe: str) -> None:
    model = recipes.get(recipe).model
    again = infer_architecture(normalize_arguments(describe_model(model)), model.family)
    assert (again.num_layers, again.rope_theta, again.llama3_rope) == (
        model.num_layers, model.rope_theta, model.llama3_rope)


@pytest.mark.each(("recipe", "field"), [
    ("tiny-gemma3", "embedding_multiplier"), ("tiny-exaone4", "block_norms"),
    ("tiny-hyperclovax", "attention_multiplier"), ("tiny-solar-open2", "linear_attention"),
    ("tiny-deepseek-v3", "latent_attention"), ("tiny-hyperclova-omni", "vision_config"),
    ("k-exaone-236b", "dense prediction layers")])
def test_models_beyond_gpt_model_are_refused(recipe: str, field: str) -> None:
    with pytest.raises(UserError, match=f"cannot be written for Megatron-Core's GPTModel.*{field}"):
        describe_model(recipes.get(recipe).model)


def test_weights_come_back_with_equal_bits(solar_dir: Path, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    convert.from_hf(solar_dir, tmp_path / "ours")
    assert main(["convert", "to-megatron", str(tmp_path / "ours"), str(tmp_path / "out")]) == 0
    assert "left out the optimizer" in capsys.readouterr().out
    assert find_damaged_files(tmp_path / "out") == []
    assert main(["convert", "from-megatron", str(tmp_path / "out"), str(tmp_path / "back"),
                 "--tokenizer", str(tmp_path / "ours/tokenizer")]) == 0
    assert convert.verify(tmp_path / "ours", tmp_path / "back", load=False).passed
    damaged = tmp_path / "out/iter_0000000/__5_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    assert main(["convert", "from-megatron", str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    assert re.search(r"__5_0\.distcp: its content differs.*\(it holds \S+\)", capsys.readouterr().err)


@pytest.mark.each("export", [to_megatron, to_dcp])
def test_damage_and_interruption_leave_no_folder(export: Callable[[Path, Path], Any], solar_dir: Path,
                                                 tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert.from_hf(solar_dir, tmp_path / "ours")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer, "sha256_file", Mock(side_effect=KeyboardInterrupt))
        export(tmp_path / "ours", tmp_path / "out")
    file = next((tmp_path / "ours").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match=rf"{file.name}.*changed|{file.name}.*differs"):
        export(tmp_path / "ours", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_rates_of_the_library_are_ours() -> None:
    """The library counts samples before a step, our schedule steps with it."""
    for schedule, decay in (("cosine", "linear"), ("linear", "linear"), ("inverse_sqrt", "linear"),
                            ("constant", "linear"), ("wsd", "cosine"), ("wsd", "one_minus_sqrt")):
        config = apply_settings(recipes.get(DENSE), [
            f"optim.schedule={schedule}", f"optim.decay_form={decay}", "train.steps=40", "optim.lr=0.01",
            "optim.min_lr=0.001", "optim.warmup_steps=5", "train.global_batch_size=8"])
        common, problem = build_common_state(config, 12, 12, one_optimizer=True)
        assert problem == ""
        state, args = common["opt_param_scheduler"], vars(common["args"])
        groups = common["optimizer"]["param_groups"]
        scheduler = OptimizerParamScheduler(
            SimpleNamespace(param_groups=groups), 0.0, 1.0, 0.0, 1, 2, state["lr_decay_style"], 0.1, 0.1, 1,
            "constant", wsd_decay_steps=args.get("lr_wsd_decay_samples"),
            lr_wsd_decay_style=args.get("lr_wsd_decay_style"))
        scheduler.load_state_dict(state)
        for step in range(12, 40):
            assert groups[0]["lr"] == pytest.approx(Schedule(config).learning_rate(step), rel=1e-12), step
            scheduler.step(8)


@pytest.mark.each(("setting", "reason"), [
    ("optim.schedule_by=tokens", "tokens"), ("optim.rewarm=[[3, 4]]", "rewarm"),
    ('data.phases=[{"name": "a", "seq_len": 32, "lr": 0.001}]', "a phase has its own learning rate"),
    ("train.ramp_from_batch_size=2", "the batch size changes")])
def test_other_schedules_are_written_as_constant(setting: str, reason: str) -> None:
    config = apply_settings(recipes.get(DENSE), [
        "train.steps=40", "train.global_batch_size=8", "train.ramp_increment=2", "train.ramp_steps=9",
        "optim.warmup_steps=0", setting])
    common, problem = build_common_state(config, 12, 12, one_optimizer=True)
    assert reason in problem and common["opt_param_scheduler"]["lr_decay_style"] == "constant"


def test_parameter_groups_of_the_settings_are_refused() -> None:
    config = apply_settings(recipes.get(DENSE), ['optim.groups=[{"pattern": "*", "lr_scale": 2.0}]'])
    with pytest.raises(UserError, match=r"optim\.groups: has 1 groups"):
        build_common_state(config, 1, 1, one_optimizer=True)


def test_a_value_that_is_not_finite_is_not_exported(solar_dir: Path, tmp_path: Path) -> None:
    convert.from_hf(solar_dir, tmp_path / "ours")
    change_weights(set_value(FC1_EXPERT, torch.inf))(tmp_path / "ours")
    with pytest.raises(UserError, match=r"ours: \S+linear_fc1.weight contains infinity \(1 of"):
        to_megatron(tmp_path / "ours", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_an_error_in_any_worker_ends_the_export(solar_dir: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors in the threads of torch's writer are lost, and the index would lack their tensors."""
    convert.from_hf(solar_dir, tmp_path / "ours")
    serialize = writer.DcpPlanner.resolve_data

    def fail_outside_the_main_thread(planner: Any, item: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, "No space left on device")
        return serialize(planner, item)

    monkeypatch.setattr(writer.DcpPlanner, "resolve_data", fail_outside_the_main_thread)
    with pytest.raises(UserError, match="no space left"):
        to_megatron(tmp_path / "ours", tmp_path / "out", workers=4)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


PROVIDER_FIELDS = {"position_embedding_type", "rotary_base", "rotary_percent", "rope_scaling", "seq_length",
                   "rope_scaling_factor", "seq_len_interpolation_factor", "transformer_layer_spec",
                   "share_embeddings_and_output_weights", "vocab_size", "hf_model_id",
                   *(f"yarn_{name}" for name in ("rotary_scaling_factor", "original_max_position_embeddings",
                                                 "beta_fast", "beta_slow", "correction_range_round_to_int"))}
"""Fields of Megatron-Bridge 0.6.2's GPTModelProvider that TransformerConfig of megatron-core lacks."""


def test_bridge_folder_describes_model_tokenizer_and_step(solar_dir: Path, tmp_path: Path) -> None:
    """benchmarks/megatron_bridge.py loads such folders with Megatron-Bridge itself."""
    convert.from_hf(solar_dir, tmp_path / "ours")
    assert main(["convert", "to-megatron", str(tmp_path / "ours"), str(tmp_path / "out"), "--framework",
                 "bridge"]) == 0
    folder = tmp_path / "out/iter_0000000"
    sections = yaml.safe_load((folder / "run_config.yaml").read_text())
    assert sections["tokenizer"]["tokenizer_model"] == str(folder / "tokenizer")
    assert sections["checkpoint"] | {"_target_": ""} == {
        "_target_": "", "ckpt_format": "torch_dist", "save_optim": False, "save_rng": False}
    assert sections["model"]["params_dtype"]["_target_"] == "torch.bfloat16" and sections["model"]["bf16"]
    assert json.loads((folder / "tokenizer/config.json").read_text())["model_type"] == "solar_open"
    assert (folder / "tokenizer/tokenizer.json").is_file()
    for file in (folder / "train_state.pt", tmp_path / "out/latest_train_state.pt"):
        state = torch.load(file, weights_only=True)
        assert state["step"].item() == 0 and state["floating_point_operations_so_far"].dtype == torch.float64
    assert find_damaged_files(tmp_path / "out") == []
    assert main(["convert", "from-megatron", str(tmp_path / "out"), str(tmp_path / "back"), "--tokenizer",
                 str(folder / "tokenizer")]) == 0
    assert convert.verify(tmp_path / "ours", tmp_path / "back", load=False).passed


@pytest.mark.each("recipe", ["tiny-qwen2", "tiny-qwen3", "tiny-qwen3-moe", "tiny-solar-open", "k-exaone-236b",
                             "llama-3.1-8b"])
def test_provider_has_fields_of_megatron_bridge(recipe: str) -> None:
    model = dataclasses.replace(recipes.get(recipe).model, num_mtp_layers=0)
    provider = describe_provider(model)
    known = {field.name for field in dataclasses.fields(TransformerConfig)} | PROVIDER_FIELDS
    assert provider.keys() - known == {"_target_"}
    assert ("transformer_layer_spec" in provider) == bool(model.num_experts)
    again = infer_architecture(provider, model.family)
    assert (again.num_layers, again.rope_theta, again.num_expert_groups, again.yarn) == (
        model.num_layers, model.rope_theta, model.num_expert_groups, model.yarn)


def test_bridge_of_solar_open_names_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", ".models.conversion.mapping_registry", ".models.conversion.model_bridge",
                 ".models.conversion.param_mapping"):
        monkeypatch.setitem(sys.modules, f"megatron.bridge{name}", MagicMock(MegatronModelBridge=MagicMock))
    monkeypatch.setattr(MagicMock, "register_bridge", lambda **_: lambda cls: cls, raising=False)
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples/bridge/solar_open.py"))
    named = example["RENAMED"] | {
        name: (f"{module}.gate_proj.weight", f"{module}.up_proj.weight")
        for name, module in example["GATED"].items()}
    model = recipes.get("tiny-solar-open").model
    stars = re.compile(r"(?<=layers\.)\d+|(?<=experts\.)\d+")
    expected: dict[str, Any] = {}
    for link in get_family(model.family).links(model):
        key = stars.sub("*", link.key.replace("experts.experts", "experts"))
        names = tuple(stars.sub("*", name) for name in link.hf_names)
        expected[key + "*" * (".experts.linear" in key)] = names[0] if len(names) == 1 else names
    assert len(expected.pop("decoder.layers.*.self_attention.linear_qkv.weight")) == 3
    assert named == expected
