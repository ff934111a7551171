"""Checkpoints are bit-equal across layouts, and errors reach every process."""

import errno
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sov.base.artifacts import find_damaged_files, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint import load, sharded_tensors
from megatron_sov.checkpoint.initial_weights import generate_normals
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.engine.model.local_shards import list_local_shards
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel import world
from tests.checkpoints import save_checkpoint
from tests.tiny import tiny_model

SP = {"tp": 2, "sp": True}
ALL = {**SP, "pp": 2, "ep": 2}


def parts(layout: dict[str, Any], precision: str = "fp32", vocab_size: int = 96) -> tuple[Any, Any]:
    """Return a tiny model and its optimizer at a layout."""
    world.leave_world()
    config, model = tiny_model("tiny-k-exaone", f"model.vocab_size={vocab_size}",
                               f"train.precision={precision}", layout=layout)
    optimizer = Optimizer(model, config.optim)
    optimizer.sync_master_weights()
    return model, optimizer


def fill(model: Any, optimizer: Any) -> None:
    """Fill weights and optimizer state with values that depend on key and global index only."""
    for block in [*list_local_shards(model), *optimizer.state_shards()]:
        whole = generate_normals(9, block.key, 0, math.prod(block.global_shape)).reshape(block.global_shape)
        sizes = (1,) * (len(block.offset) - block.data.dim()) + tuple(block.data.shape)  # one expert, say
        own = tuple(slice(a, a + n) for a, n in zip(block.offset, sizes, strict=True))
        with torch.no_grad():
            block.data.copy_(torch.from_numpy(whole[own]).reshape(block.data.shape))


def write_checkpoint(layout: dict[str, Any], path: str) -> None:
    """Write a checkpoint with known values."""
    model, optimizer = parts(layout)
    fill(model, optimizer)
    save_checkpoint(Path(path), model, optimizer, {"step": 7, "tokens": 70}, {"made": "here"}, None)


def copy_checkpoint(layout: dict[str, Any], source: str, target: str) -> dict[str, Any]:
    """Load a checkpoint at a layout and write it again."""
    model, optimizer = parts(layout)
    load.check_weights(Path(source))
    load.load_model(Path(source), model)
    load.load_optimizer(Path(source), optimizer, 7)
    save_checkpoint(Path(target), model, optimizer, load.read_state(Path(source)), {}, None)
    return {"updates": optimizer.num_updates, "state": load.read_state(Path(target))}


def continue_training(path: str) -> dict[str, Any]:
    """Update, save and update in bf16; then load into a new model and repeat the second update."""

    def update(model: Any, optimizer: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        optimizer.zero_grad()
        for parameter in model.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step(1e-3)

    def everything(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
        return {f"{b.key}@{b.offset}": b.data.clone()
                for b in [*list_local_shards(model), *optimizer.state_shards()]}

    model, optimizer = parts({}, "bf16")
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.fill_(0.123456789)
    update(model, optimizer, 1)
    save_checkpoint(Path(path), model, optimizer, {"step": 1, "tokens": 1}, {}, None)
    update(model, optimizer, 2)
    expected = everything(model, optimizer)
    model, optimizer = parts({}, "bf16")
    load.load_model(Path(path), model)
    optimizer.sync_master_weights()
    load.load_optimizer(Path(path), optimizer, 1)
    loaded = everything(model, optimizer)
    update(model, optimizer, 2)
    result = everything(model, optimizer)
    bias = next(t for k, t in loaded.items() if "expert_bias" in k)
    counts = next(b for n, b in model.named_buffers() if n.endswith("local_tokens_per_expert"))
    masters = {k: t for k, t in loaded.items() if k.startswith("master/")}
    return {"differing": [k for k, t in expected.items() if not t.equal(result[k])], "bias": float(bias[0]),
            "dtype": str(bias.dtype), "counts": str(counts.dtype),
            "finer": [k for k, t in masters.items() if not t.bfloat16().float().equal(t)],
            "weights": sorted({str(p.dtype) for p in model.parameters()})}


@pytest.mark.distributed
@pytest.mark.essential
def test_checkpoint_is_bit_equal_across_layouts_and_resumes(ranks, job, tmp_path: Path) -> None:
    names = [tmp_path / n for n in ("written", "split", "alone")]
    layouts = [(4, ALL), (1, {})]
    (goes_on,), _, *results = ranks(job(__file__, "continue_training", 1, {"path": str(tmp_path / "step-1")}),
                                    job(__file__, "write_checkpoint", 2,
                                        {"layout": {"ep": 2}, "path": str(names[0])}),
                                    *(job(__file__, "copy_checkpoint", n,
                                          {"layout": layout, "source": str(a), "target": str(b)})
                                      for (n, layout), a, b in zip(layouts, names, names[1:], strict=False)))
    assert all(r == {"updates": 7, "state": {"step": 7, "tokens": 70}} for result in results for r in result)
    assert read_manifest(names[0]).content == {"step": 7, "tokens": 70, "parts": ["model", "optimizer"]}
    for part, count in (("model", 40), ("optimizer", 80)):
        first = TensorReader(names[0], part)
        assert len(first.keys()) > count
        for name in names[1:]:
            assert find_damaged_files(name) == []
            other = TensorReader(name, part)
            assert sorted(other.keys()) == sorted(first.keys())
            for key in first.keys():  # noqa: SIM118  (a reader is no dict)
                assert other.read(key).equal(first.read(key)), key
                assert first.read(key).std() > 0.5, key  # the known numbers, not initial ones

    assert goes_on["differing"] == []
    assert (goes_on["dtype"], goes_on["counts"], goes_on["weights"]) == (
        "torch.float32", "torch.float32", ["torch.bfloat16"])
    assert goes_on["bias"] == pytest.approx(0.123456789, abs=1e-8)
    assert len(goes_on["finer"]) > 40


def failures(folder: str) -> dict[str, str]:
    """Return the errors of this process for failed saves and loads."""
    model, optimizer = parts(SP)
    said: dict[str, str] = {}

    def told(name: str, action: Any) -> None:
        try:
            action()
            said[name] = "nothing"
        except UserError as e:
            said[name] = str(e)

    def save(path: Path) -> None:
        save_checkpoint(path, model, optimizer, {"step": 1, "tokens": 1}, {}, None)

    path, original = Path(folder) / "step-1", sharded_tensors.write_tensors

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if dist.get_rank() == 1:
        sharded_tensors.write_tensors = full
    told("full disk", lambda: save(path))
    sharded_tensors.write_tensors = original
    said["left over"] = ",".join(sorted(p.name for p in Path(folder).iterdir()))
    dist.barrier()
    (Path(folder) / "foreign" / "notes").mkdir(parents=True, exist_ok=True)
    told("foreign", lambda: save(Path(folder) / "foreign"))
    save(path)
    told("sound", lambda: load.check_weights(path))
    dist.barrier()
    if dist.get_rank() == 0:
        damaged = path / "model/00000/rank-00001-00000.safetensors"
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
    dist.barrier()
    told("damaged", lambda: load.check_weights(path))
    dist.barrier()
    if dist.get_rank() == 0:
        (path / "model/00000/rank-00001-00000.safetensors").unlink()
    dist.barrier()
    told("missing", lambda: load.load_model(path, model))
    return said


def other_model(path: str) -> str:
    """Return the error for a checkpoint with a larger vocabulary."""
    model, _ = parts(SP, vocab_size=64)
    try:
        load.load_model(Path(path), model)
    except UserError as e:
        return str(e)
    return "nothing"


@pytest.mark.distributed
def test_error_of_one_process_is_raised_on_all(ranks, job, tmp_path: Path) -> None:
    for name in ("failures", "sound"):
        (tmp_path / name).mkdir()
    failed, _, other = ranks(job(__file__, "failures", 2, {"folder": str(tmp_path / "failures")}),
                             job(__file__, "write_checkpoint", 2,
                                 {"layout": SP, "path": str(tmp_path / "sound/step-1")}),
                             job(__file__, "other_model", 2, {"path": str(tmp_path / "sound/step-1")}))
    for said in failed:
        assert ("rank 1 could not write its part of the checkpoint" in said["full disk"]
                and "No space left" in said["full disk"])
        assert said["left over"] == ""
        assert "foreign: already exists" in said["foreign"]
        assert said["sound"] == "nothing"
        assert ("rank-00001-00000.safetensors: its content differs from the hash in the manifest; there is no"
                in said["damaged"])
        assert "rank-00001-00000.safetensors: cannot be read" in said["missing"]
    assert all("has shape (96, 32), the model needs (64, 32)" in said for said in other)
