"""Background saves write the copied values, and errors reach every process."""

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sov.base.artifacts import find_damaged_files, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint import host_snapshot, save, sharded_tensors
from megatron_sov.checkpoint.gather import TensorGatherer, iter_gathered
from megatron_sov.checkpoint.host_snapshot import HostSnapshot
from megatron_sov.checkpoint.save import CheckpointMetadata, CheckpointSaver, SavedCheckpoint
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.engine.model.local_shards import LocalShard
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel import world
from megatron_sov.engine.parallel.collectives import all_reduce_world
from megatron_sov.engine.parallel.values import sum_dict
from megatron_sov.model.config import ParallelConfig
from tests.checkpoints import save_checkpoint
from tests.tiny import tiny_model


def parts(layout: dict[str, Any]) -> tuple[Any, Any]:
    """Return a tiny model and its optimizer at a layout."""
    config, model = tiny_model("tiny-solar-open", "model.num_layers=2", layout=layout)
    return model, Optimizer(model, config.optim)


def beside_the_training(folder: str) -> dict[str, Any]:
    """Save synchronously, then in the background while the model changes."""
    model, optimizer = parts({"tp": 2, "sp": True})
    at, saved, released = Path(folder), list[SavedCheckpoint](), threading.Event()
    save_checkpoint(at / "step-1", model, optimizer, {"step": 1, "tokens": 1}, {}, None)

    def write_later(*arguments: Any, now: Any = sharded_tensors.write_tensors) -> Any:
        assert released.wait(600)
        return now(*arguments)

    sharded_tensors.write_tensors, host_snapshot.MIN_FILE_BYTES, host_snapshot.count_writers = (
        write_later, 1, lambda: 3)
    saver = CheckpointSaver(saved.append)
    saver.begin(at / "step-2", model, optimizer, CheckpointMetadata({"step": 2, "tokens": 1}, {}, None))
    memory = {key: t.data_ptr() for key, t in saver._snapshot._memory.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    for _ in range(3):
        saver.advance(sum_dict(saver.progress(), all_reduce_world))
    waiting = [p.name for p in at.iterdir() if p.name.startswith("step-2")]
    released.set()
    # waits for the one before
    saver.begin(at / "step-3", model, None, CheckpointMetadata({"step": 3, "tokens": 1}, {}, None))
    reused = all(memory[key] == t.data_ptr() for key, t in saver._snapshot._memory.items())
    order = [(s.step, s.stall_s <= s.save_s) for s in saved]
    saver.finish()
    return {"waiting": waiting, "order": order, "reused": reused, "saved": [s.path.name for s in saved]}


def problems(folder: str) -> dict[str, Any]:
    """Return the errors of this process if a process cannot complete a checkpoint, hangs, or the name is
    taken."""
    model, optimizer = parts({"ep": 2})
    at, rank, said = Path(folder), dist.get_rank(), {}

    def told(name: str, timeout_s: float = 600) -> None:
        saver = save.CheckpointSaver(timeout_s=timeout_s)
        try:
            metadata = save.CheckpointMetadata({"step": 1, "tokens": 1}, {}, None)
            saver.begin(at / "step-1", model, optimizer, metadata)
            saver.finish()
        except (UserError, ValueError) as e:
            said[name] = f"{type(e).__name__}: {e}"
        said[f"{name}: left"] = sorted(p.name for p in at.iterdir())

    publish, write, index, end = save.publish_folder, HostSnapshot.write, save.write_index, os._exit
    save.publish_folder = _no_room
    told("no room to complete")
    save.publish_folder = publish
    save.write_index = _defect
    told("defect")
    save.write_index = index
    HostSnapshot.write = _no_room if rank == 1 else write
    told("no room to write")
    HostSnapshot.write = write
    told("sound")
    dist.barrier()
    told("taken")
    dist.barrier()
    left: list[int] = []
    gone = threading.Event()
    os._exit, save.EXIT_TIMEOUT_S = (lambda code: (left.append(code), gone.set())), 0.1
    HostSnapshot.write = (lambda self, folder, rank: threading.Event().wait()) if rank == 1 else write
    progress = save.CheckpointSaver.progress

    def patiently(self: save.CheckpointSaver) -> dict[str, float]:
        limit_s, self._timeout_s = self._timeout_s, 600.0  # a busy machine may be slower than it
        result = progress(self)
        self._timeout_s = limit_s
        return result

    if rank == 0:
        save.CheckpointSaver.progress = patiently  # type: ignore[method-assign]
    told("hangs", timeout_s=0.5)
    assert gone.wait(600)
    os._exit = end
    return {**said, "left with": left}


def behind_an_error(folder: str) -> dict[str, Any]:
    """Return the completed checkpoints after an error, with a slow process and with a process that never
    writes."""
    model, optimizer = parts({"ep": 2})
    at, write, saved = Path(folder), HostSnapshot.write, list[str]()

    def slowly(self: HostSnapshot, folder: Path, rank: int) -> None:
        time.sleep(0.5 * rank)
        write(self, folder, rank)

    def never(self: HostSnapshot, folder: Path, rank: int) -> None:
        if rank == 0:
            write(self, folder, rank)
        else:
            threading.Event().wait()

    for step, how, patience_s in ((1, slowly, 600.0), (2, never, 1.0)):
        HostSnapshot.write = how  # type: ignore[method-assign]
        save.FINISH_TIMEOUT_S = save.IDLE_LIMIT_S = patience_s
        saver = save.CheckpointSaver(lambda found: saved.append(found.path.name))
        saver.begin(at / f"step-{step}", model, optimizer,
                    save.CheckpointMetadata({"step": step, "tokens": 1}, {}, None))
        saver.finish_alone()
        saver.finish_alone()  # there is nothing more to do
        dist.barrier()
    return {"saved": saved, "there": sorted(p.name for p in at.glob("step-*"))}


def _no_room(*args: Any) -> None:
    raise OSError(28, "No space left on device")


def _defect(folder: Path, *args: Any) -> None:
    shutil.rmtree(folder)  # the error is reported even if the folder is gone
    raise ValueError("owned twice")


@pytest.mark.distributed
def test_background_save_writes_the_copy_and_reports_errors(ranks: Any, job: Any, tmp_path: Path) -> None:
    for name in ("beside", "problems"):
        (tmp_path / name).mkdir()
    beside, wrong = ranks(job(__file__, "beside_the_training", 2, {"folder": str(tmp_path / "beside")}),
                          job(__file__, "problems", 2, {"folder": str(tmp_path / "problems")}))
    for found in beside:
        assert found == {"waiting": [], "order": [[2, True]], "reused": True, "saved": ["step-2", "step-3"]}
    at_once, later, changed = (tmp_path / "beside" / f"step-{n}" for n in (1, 2, 3))
    assert len(list((at_once / "model").rglob("*.safetensors"))) == 2 < 6 <= len(
        list((later / "model").rglob("*.safetensors")))
    assert find_damaged_files(at_once) == find_damaged_files(later) == find_damaged_files(changed) == []
    assert not (later / "indices").exists() and sorted(p.name for p in (tmp_path / "beside").iterdir()) == [
        "step-1", "step-2", "step-3"]
    for part in ("model", "optimizer"):
        ours, theirs = TensorReader(later, part), TensorReader(at_once, part)
        assert sorted(ours.keys()) == sorted(theirs.keys())
        assert all(ours.read(key).equal(theirs.read(key))
                   for key in ours.keys())  # noqa: SIM118  (a reader is no dict)
    changed_norm = TensorReader(changed).read("decoder.final_layernorm.weight")
    assert ((changed_norm == 7).all()
            and read_manifest(changed).content == {"step": 3, "tokens": 1, "parts": ["model"]})
    assert json.loads((later / "state.json").read_text()) == {"step": 2, "tokens": 1}
    for said in wrong:
        assert "step-1: rank 0 could not write its part of the checkpoint" in said["no room to complete"]
        assert "step-1: rank 1 could not write its part of the checkpoint" in said["no room to write"]
        assert ("No space left on device" in said["no room to write"]
                and said["defect"] == "ValueError: owned twice")
        assert (said["no room to complete: left"] == said["no room to write: left"]
                == said["defect: left"] == [])
        assert (said["sound: left"] == said["taken: left"] == ["step-1"]
                and "step-1: already exists" in said["taken"])
        assert ("rank 1 did not finish writing within train.save_timeout_s = 0.5; check that"
                in said["hangs"])
        assert said["left with"] == [2], "what hangs in leaving is ended"


@pytest.mark.distributed
def test_finish_after_error_completes_written_checkpoints(ranks: Any, job: Any, tmp_path: Path) -> None:
    (found,) = ranks(job(__file__, "behind_an_error", 2, {"folder": str(tmp_path)}))
    assert [f["there"] for f in found] == [["step-1"]] * 2 and find_damaged_files(tmp_path / "step-1") == []
    assert [f["saved"] for f in found] == [["step-1"], []], "rank 0 tells"


# Gathering tensors from blocks of several processes: any grid, any owner, to rank 0 or to all ranks.


def gather_uneven_parts(everywhere: bool) -> dict[str, Any]:
    """Gather two tensors that the ranks own in uneven parts; only rank 1 has `lonely`."""
    rank = world.join_world(ParallelConfig()).rank
    whole = torch.arange(30.0).reshape(2, 3, 5)
    cuts = {0: [((0, 0, 0), (2, 1, 5)), ((1, 1, 0), (1, 2, 4))],
            1: [((0, 1, 0), (1, 2, 5)), ((1, 1, 4), (1, 2, 1))]}
    blocks = []
    for owner, places in cuts.items():
        for offset, shape in places:
            part = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
            # both hold it, one owns it
            blocks.append(LocalShard("spread", part, (2, 3, 5), offset, (int(rank != owner),)))
    if rank == 1:
        blocks.append(LocalShard("lonely", torch.full((4,), 7, dtype=torch.bfloat16), (4,), (0,), (0,)))
    gatherer = TensorGatherer(blocks, everywhere=everywhere)
    result = dict(iter_gathered(gatherer, ["lonely", "spread"]))
    first = iter_gathered(gatherer, ["spread", "lonely", "spread"])
    next(first)
    first.close()  # on both: the remaining values are gathered anyway, or the processes would get out of step
    again = gatherer.gather("lonely")
    world.leave_world()
    return {"shapes": gatherer.get_shapes(), "again": None if again is None else again.tolist(),
            "found": {key: None if t is None else [str(t.dtype), t.tolist()] for key, t in result.items()}}


@pytest.mark.distributed
def test_gather_assembles_blocks_of_any_grid(ranks: Any, job: Any) -> None:
    main_only, everywhere = ranks(job(__file__, "gather_uneven_parts", 2, {"everywhere": False}),
                                  job(__file__, "gather_uneven_parts", 2, {"everywhere": True}))
    spread = [[[float(15 * i + 5 * j + k) for k in range(5)] for j in range(3)] for i in range(2)]
    expected = {"lonely": ["torch.bfloat16", [7.0] * 4], "spread": ["torch.float32", spread]}
    assert [r["found"] for r in everywhere] == [expected, expected] and everywhere[1]["again"] == [7.0] * 4
    assert [r["found"] for r in main_only] == [expected, {"lonely": None, "spread": None}]
    assert (main_only[0]["again"] == [7.0] * 4
            and main_only[0]["shapes"] == {"spread": [2, 3, 5], "lonely": [4]})
