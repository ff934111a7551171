"""Checkpoints are bit-equal across layouts, and errors reach every process."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sov.base.artifacts import find_damaged_files, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint import load
from megatron_sov.checkpoint.initial_weights import generate_normals
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.engine.model.local_shards import list_local_shards
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel import world
from tests.checkpoints import save_checkpoint
from tests.tiny import tiny_model

SP = {"tp": 2, "sp": True}
ALL = {**SP, "pp": 2, "ep": 2}


def build_model_and_optimizer(layout: dict[str, Any], precision: str = "fp32",
                              vocab_size: int = 96) -> tuple[Any, Any]:
    """Return a tiny model and its optimizer at a layout."""
    world.leave_world()
    config, model = tiny_model("tiny-k-exaone", f"model.vocab_size={vocab_size}",
                               f"train.precision={precision}", layout=layout)
    optimizer = Optimizer(model, config.optim)
    optimizer.sync_master_weights()
    return model, optimizer


def fill_with_known_values(model: Any, optimizer: Any) -> None:
    """Fill weights and optimizer state with values that depend on key and global index only."""
    for shard in [*list_local_shards(model), *optimizer.state_shards()]:
        values = generate_normals(9, shard.key, 0, math.prod(shard.global_shape)).reshape(shard.global_shape)
        # A shard may lack leading axes of its tensor, such as the expert axis: it holds one index of each.
        sizes = (1,) * (len(shard.offset) - shard.data.dim()) + tuple(shard.data.shape)
        index = tuple(slice(start, start + size)
                      for start, size in zip(shard.offset, sizes, strict=True))
        with torch.no_grad():
            shard.data.copy_(torch.from_numpy(values[index]).reshape(shard.data.shape))


def write_checkpoint(layout: dict[str, Any], path: str) -> None:
    """Write a checkpoint with known values."""
    model, optimizer = build_model_and_optimizer(layout)
    fill_with_known_values(model, optimizer)
    save_checkpoint(Path(path), model, optimizer, {"step": 7, "tokens": 70}, {"made": "here"}, None)


def copy_checkpoint(layout: dict[str, Any], source: str, target: str) -> dict[str, Any]:
    """Load a checkpoint at a layout and write it again."""
    model, optimizer = build_model_and_optimizer(layout)
    load.check_weights(Path(source))
    load.load_model(Path(source), model)
    load.load_optimizer(Path(source), optimizer, 7)
    save_checkpoint(Path(target), model, optimizer, load.read_state(Path(source)), {}, None)
    return {"updates": optimizer.num_updates, "state": load.read_state(Path(target))}


def update(model: Any, optimizer: Any, seed: int) -> None:
    """Update the weights with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer.step(1e-3)


def copy_state(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Copy weights and optimizer state, by key and offset."""
    return {f"{shard.key}@{shard.offset}": shard.data.clone()
            for shard in [*list_local_shards(model), *optimizer.state_shards()]}


def continue_training(path: str) -> dict[str, Any]:
    """Update, save and update in bf16; then load into a new model and repeat the second update.

    Returns:
        "differing": keys of state that the repeated update left different;
        "bias", "dtype": first value of an expert bias, and its dtype, after loading;
        "counts": dtype of the router's token counts;
        "finer": keys of master weights that bf16 cannot hold;
        "weights": dtypes of the model's parameters.
    """
    model, optimizer = build_model_and_optimizer({}, "bf16")
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.fill_(0.123456789)
    update(model, optimizer, 1)
    save_checkpoint(Path(path), model, optimizer, {"step": 1, "tokens": 1}, {}, None)
    update(model, optimizer, 2)
    expected = copy_state(model, optimizer)
    model, optimizer = build_model_and_optimizer({}, "bf16")
    load.load_model(Path(path), model)
    optimizer.sync_master_weights()
    load.load_optimizer(Path(path), optimizer, 1)
    loaded = copy_state(model, optimizer)
    update(model, optimizer, 2)
    repeated = copy_state(model, optimizer)
    bias = next(values for key, values in loaded.items() if "expert_bias" in key)
    counts = next(buffer for name, buffer in model.named_buffers()
                  if name.endswith("local_tokens_per_expert"))
    masters = {key: values for key, values in loaded.items() if key.startswith("master/")}
    return {"differing": [key for key, values in expected.items() if not values.equal(repeated[key])],
            "bias": float(bias[0]), "dtype": str(bias.dtype), "counts": str(counts.dtype),
            "finer": [key for key, values in masters.items() if not values.bfloat16().float().equal(values)],
            "weights": sorted({str(p.dtype) for p in model.parameters()})}


@pytest.mark.distributed
@pytest.mark.essential
def test_checkpoint_is_bit_equal_across_layouts_and_resumes(ranks, job, tmp_path: Path) -> None:
    original, *copies = [tmp_path / name for name in ("two processes", "four processes", "one process")]
    copy_jobs = [job(__file__, "copy_checkpoint", num_ranks,
                     {"layout": layout, "source": str(source), "target": str(target)})
                 for num_ranks, layout, source, target in ((4, ALL, original, copies[0]), (1, {}, *copies))]
    (resumed,), _, *copy_results = ranks(
        job(__file__, "continue_training", 1, {"path": str(tmp_path / "step-1")}),
        job(__file__, "write_checkpoint", 2, {"layout": {"ep": 2}, "path": str(original)}), *copy_jobs)
    for results_by_rank in copy_results:
        assert all(result == {"updates": 7, "state": {"step": 7, "tokens": 70}} for result in results_by_rank)
    assert read_manifest(original).content == {"step": 7, "tokens": 70, "parts": ["model", "optimizer"]}
    for part, min_keys in (("model", 40), ("optimizer", 80)):
        reader = TensorReader(original, part)
        assert len(reader.keys()) > min_keys
        for folder in copies:
            assert find_damaged_files(folder) == []
            copy_reader = TensorReader(folder, part)
            assert sorted(copy_reader.keys()) == sorted(reader.keys())
            for key in reader.keys():  # noqa: SIM118  (a reader is no dict)
                assert copy_reader.read(key).equal(reader.read(key)), key
                assert reader.read(key).std() > 0.5, key  # the written values, not initial weights

    assert resumed["differing"] == []
    assert (resumed["dtype"], resumed["counts"], resumed["weights"]) == (
        "torch.float32", "torch.float32", ["torch.bfloat16"])
    assert resumed["bias"] == pytest.approx(0.123456789, abs=1e-8)
    assert len(resumed["finer"]) > 40


def collect_errors(folder: str) -> dict[str, str]:
    """Return this process's errors for failed loads, by case ("nothing": no error)."""
    model, optimizer = build_model_and_optimizer(SP)
    errors: dict[str, str] = {}

    def record_error(name: str, action: Any) -> None:
        try:
            action()
            errors[name] = "nothing"
        except UserError as e:
            errors[name] = str(e)

    path = Path(folder) / "step-1"
    save_checkpoint(path, model, optimizer, {"step": 1, "tokens": 1}, {}, None)
    record_error("sound", lambda: load.check_weights(path))
    dist.barrier()
    if dist.get_rank() == 0:
        damaged = path / "model/00000/rank-00001-00000.safetensors"
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
    dist.barrier()
    record_error("damaged", lambda: load.check_weights(path))
    dist.barrier()
    if dist.get_rank() == 0:
        (path / "model/00000/rank-00001-00000.safetensors").unlink()
    dist.barrier()
    record_error("missing", lambda: load.load_model(path, model))
    return errors


def load_larger_vocabulary(path: str) -> str:
    """Return the error for a checkpoint with a larger vocabulary."""
    model, _ = build_model_and_optimizer(SP, vocab_size=64)
    try:
        load.load_model(Path(path), model)
    except UserError as e:
        return str(e)
    return "nothing"


@pytest.mark.distributed
def test_error_of_one_process_is_raised_on_all(ranks, job, tmp_path: Path) -> None:
    for name in ("failures", "sound"):
        (tmp_path / name).mkdir()
    errors_by_rank, _, vocabulary_errors = ranks(
        job(__file__, "collect_errors", 2, {"folder": str(tmp_path / "failures")}),
        job(__file__, "write_checkpoint", 2, {"layout": SP, "path": str(tmp_path / "sound/step-1")}),
        job(__file__, "load_larger_vocabulary", 2, {"path": str(tmp_path / "sound/step-1")}))
    for errors in errors_by_rank:
        assert errors["sound"] == "nothing"
        assert ("rank-00001-00000.safetensors: its content differs from the hash in the manifest; there is no"
                in errors["damaged"])
        assert "rank-00001-00000.safetensors: cannot be read" in errors["missing"]
    assert all("has shape (96, 32), the model needs (64, 32)" in error for error in vocabulary_errors)
