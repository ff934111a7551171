"""Saving checkpoints in the background, its errors, and gathering tensors from the shards of all ranks."""

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


def build_model_and_optimizer(layout: dict[str, Any]) -> tuple[Any, Any]:
    """Return a tiny model and its optimizer at a layout."""
    config, model = tiny_model("tiny-solar-open", "model.num_layers=2", layout=layout)
    return model, Optimizer(model, config.optim)


def save_while_model_changes(folder: str) -> dict[str, Any]:
    """Inside ranks: save a checkpoint synchronously, then one in the background while the model changes.

    The thread that writes the second checkpoint waits until the model has changed.
    """
    model, optimizer = build_model_and_optimizer({"tp": 2, "sp": True})
    folder_path, saved, released = Path(folder), list[SavedCheckpoint](), threading.Event()
    save_checkpoint(folder_path / "step-1", model, optimizer, {"step": 1, "tokens": 1}, {}, None)

    def write_later(*arguments: Any, now: Any = sharded_tensors.write_tensors) -> Any:
        assert released.wait(600)
        return now(*arguments)

    sharded_tensors.write_tensors, host_snapshot.MIN_FILE_BYTES, host_snapshot.count_writers = (
        write_later, 1, lambda: 3)
    saver = CheckpointSaver(saved.append)
    saver.begin(folder_path / "step-2", model, optimizer,
                CheckpointMetadata({"step": 2, "tokens": 1}, {}, None))
    memory = {key: t.data_ptr() for key, t in saver._snapshot._memory.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    for _ in range(3):
        saver.advance(sum_dict(saver.progress(), all_reduce_world))
    unfinished_folders = [p.name for p in folder_path.iterdir() if p.name.startswith("step-2")]
    released.set()
    # The third save first finishes the second.
    saver.begin(folder_path / "step-3", model, None, CheckpointMetadata({"step": 3, "tokens": 1}, {}, None))
    memory_is_reused = all(memory[key] == t.data_ptr() for key, t in saver._snapshot._memory.items())
    saved_before_third = [(s.step, s.stall_s <= s.save_s) for s in saved]
    saver.finish()
    return {"unfinished_folders": unfinished_folders, "saved_before_third": saved_before_third,
            "memory_is_reused": memory_is_reused, "saved": [s.path.name for s in saved]}


def collect_save_errors(folder: str) -> dict[str, Any]:
    """Inside ranks: save checkpoints that fail in different ways.

    Returns, for each case, this process's error and the files that remain; "left with": the exit codes of the
    process that waits for a rank that hangs.
    """
    model, optimizer = build_model_and_optimizer({"ep": 2})
    folder_path, rank, outcomes = Path(folder), dist.get_rank(), {}

    def try_save(name: str, timeout_s: float = 600) -> None:
        saver = save.CheckpointSaver(timeout_s=timeout_s)
        try:
            metadata = save.CheckpointMetadata({"step": 1, "tokens": 1}, {}, None)
            saver.begin(folder_path / "step-1", model, optimizer, metadata)
            saver.finish()
        except (UserError, ValueError) as e:
            outcomes[name] = f"{type(e).__name__}: {e}"
        outcomes[f"{name}: left"] = sorted(p.name for p in folder_path.iterdir())

    publish, write_index = save.publish_folder, save.write_index
    write, exit_process = HostSnapshot.write, os._exit
    save.publish_folder = raise_no_space
    try_save("no room to complete")
    save.publish_folder = publish
    save.write_index = raise_defect
    try_save("defect")
    save.write_index = write_index
    HostSnapshot.write = raise_no_space if rank == 1 else write
    try_save("no room to write")
    HostSnapshot.write = write
    try_save("sound")
    dist.barrier()
    try_save("taken")
    dist.barrier()
    exit_codes: list[int] = []
    exited = threading.Event()
    os._exit, save.EXIT_TIMEOUT_S = (lambda code: (exit_codes.append(code), exited.set())), 0.1
    HostSnapshot.write = (lambda self, folder, rank: threading.Event().wait()) if rank == 1 else write
    progress = save.CheckpointSaver.progress

    def read_progress(self: save.CheckpointSaver) -> dict[str, float]:
        limit_s, self._timeout_s = self._timeout_s, 600.0  # rank 0 must not time out on a busy machine
        result = progress(self)
        self._timeout_s = limit_s
        return result

    if rank == 0:
        save.CheckpointSaver.progress = read_progress  # type: ignore[method-assign]
    try_save("hangs", timeout_s=0.5)
    assert exited.wait(600)
    os._exit = exit_process
    return {**outcomes, "left with": exit_codes}


def finish_after_error(folder: str) -> dict[str, Any]:
    """Inside ranks: call `finish_alone`, first while rank 1 writes slowly, then while it never writes.

    Returns the checkpoints that the saver reports, and the folders that exist.
    """
    model, optimizer = build_model_and_optimizer({"ep": 2})
    folder_path, write, saved = Path(folder), HostSnapshot.write, list[str]()

    def write_slowly(self: HostSnapshot, folder: Path, rank: int) -> None:
        time.sleep(0.5 * rank)
        write(self, folder, rank)

    def never_write_on_rank_1(self: HostSnapshot, folder: Path, rank: int) -> None:
        if rank == 0:
            write(self, folder, rank)
        else:
            threading.Event().wait()

    for step, write_double, patience_s in ((1, write_slowly, 600.0), (2, never_write_on_rank_1, 1.0)):
        HostSnapshot.write = write_double  # type: ignore[method-assign]
        save.FINISH_TIMEOUT_S = save.IDLE_LIMIT_S = patience_s
        saver = save.CheckpointSaver(lambda found: saved.append(found.path.name))
        saver.begin(folder_path / f"step-{step}", model, optimizer,
                    save.CheckpointMetadata({"step": step, "tokens": 1}, {}, None))
        saver.finish_alone()
        saver.finish_alone()  # a second call does nothing
        dist.barrier()
    return {"saved": saved, "there": sorted(p.name for p in folder_path.glob("step-*"))}


def raise_no_space(*args: Any) -> None:
    raise OSError(28, "No space left on device")


def raise_defect(folder: Path, *args: Any) -> None:
    shutil.rmtree(folder)  # the error is reported even if the folder is gone
    raise ValueError("owned twice")


@pytest.mark.distributed
def test_background_save_writes_the_copy_and_reports_errors(ranks: Any, job: Any, tmp_path: Path) -> None:
    saved_folder, failed_folder = tmp_path / "saved", tmp_path / "failed"
    saved_folder.mkdir()
    failed_folder.mkdir()
    results, outcomes = ranks(job(__file__, "save_while_model_changes", 2, {"folder": str(saved_folder)}),
                              job(__file__, "collect_save_errors", 2, {"folder": str(failed_folder)}))
    for result in results:
        assert result == {"unfinished_folders": [], "saved_before_third": [[2, True]],
                          "memory_is_reused": True,
                          "saved": ["step-2", "step-3"]}
    foreground, background, changed = (saved_folder / f"step-{step}" for step in (1, 2, 3))
    assert len(list((foreground / "model").rglob("*.safetensors"))) == 2
    files = list((background / "model").rglob("*.safetensors"))
    assert len(files) >= 2 * 3, "each rank writes with three threads"
    assert all(find_damaged_files(checkpoint) == [] for checkpoint in (foreground, background, changed))
    assert not (background / "indices").exists()
    assert sorted(path.name for path in saved_folder.iterdir()) == ["step-1", "step-2", "step-3"]
    for part in ("model", "optimizer"):
        reader, expected = TensorReader(background, part), TensorReader(foreground, part)
        keys = sorted(reader.keys())
        assert keys == sorted(expected.keys())
        assert all(reader.read(key).equal(expected.read(key)) for key in keys)
    changed_norm = TensorReader(changed).read("decoder.final_layernorm.weight")
    assert (changed_norm == 7).all()
    assert read_manifest(changed).content == {"step": 3, "tokens": 1, "parts": ["model"]}
    assert json.loads((background / "state.json").read_text()) == {"step": 2, "tokens": 1}
    for outcome in outcomes:
        assert "step-1: rank 0 could not write its part of the checkpoint" in outcome["no room to complete"]
        assert "step-1: rank 1 could not write its part of the checkpoint" in outcome["no room to write"]
        assert "No space left on device" in outcome["no room to write"]
        assert outcome["defect"] == "ValueError: owned twice"
        for case in ("no room to complete", "no room to write", "defect"):
            assert outcome[f"{case}: left"] == [], case
        assert outcome["sound: left"] == outcome["taken: left"] == ["step-1"]
        assert "step-1: already exists" in outcome["taken"]
        assert ("rank 1 did not finish writing within train.save_timeout_s = 0.5; check that"
                in outcome["hangs"])
        assert outcome["left with"] == [2], "a process that hangs while it exits is ended by `os._exit`"


@pytest.mark.distributed
def test_finish_after_error_completes_written_checkpoints(ranks: Any, job: Any, tmp_path: Path) -> None:
    (results,) = ranks(job(__file__, "finish_after_error", 2, {"folder": str(tmp_path)}))
    assert [result["there"] for result in results] == [["step-1"]] * 2
    assert find_damaged_files(tmp_path / "step-1") == []
    assert [result["saved"] for result in results] == [["step-1"], []], "rank 0 reports"


# Gathering tensors from shards of several processes: any grid, any owner, to rank 0 or to all ranks.


def gather_uneven_parts(everywhere: bool) -> dict[str, Any]:
    """Inside ranks: gather `spread`, which the ranks own in uneven parts, and `lonely`, which only rank 1
    has."""
    rank = world.join_world(ParallelConfig()).rank
    tensor = torch.arange(30.0).reshape(2, 3, 5)
    owned_parts = {0: [((0, 0, 0), (2, 1, 5)), ((1, 1, 0), (1, 2, 4))],
                   1: [((0, 1, 0), (1, 2, 5)), ((1, 1, 4), (1, 2, 1))]}
    blocks = []
    for owner, parts in owned_parts.items():
        for offset, shape in parts:
            data = tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
            # Both ranks have the shard; the rank with replica number 0 owns it.
            blocks.append(LocalShard("spread", data, (2, 3, 5), offset, (int(rank != owner),)))
    if rank == 1:
        blocks.append(LocalShard("lonely", torch.full((4,), 7, dtype=torch.bfloat16), (4,), (0,), (0,)))
    gatherer = TensorGatherer(blocks, everywhere=everywhere)
    gathered = dict(iter_gathered(gatherer, ["lonely", "spread"]))
    interrupted = iter_gathered(gatherer, ["spread", "lonely", "spread"])
    next(interrupted)
    # Closing gathers the remaining tensors: otherwise the next collective of the ranks would not match.
    interrupted.close()
    gathered_again = gatherer.gather("lonely")
    return {"shapes": gatherer.get_shapes(),
            "gathered_again": None if gathered_again is None else gathered_again.tolist(),
            "gathered": {key: None if tensor is None else [str(tensor.dtype), tensor.tolist()]
                         for key, tensor in gathered.items()}}


@pytest.mark.distributed
def test_gather_assembles_blocks_of_any_grid(ranks: Any, job: Any) -> None:
    main_only, everywhere = ranks(job(__file__, "gather_uneven_parts", 2, {"everywhere": False}),
                                  job(__file__, "gather_uneven_parts", 2, {"everywhere": True}))
    spread = [[[float(15 * i + 5 * j + k) for k in range(5)] for j in range(3)] for i in range(2)]
    expected = {"lonely": ["torch.bfloat16", [7.0] * 4], "spread": ["torch.float32", spread]}
    assert [result["gathered"] for result in everywhere] == [expected, expected]
    assert everywhere[1]["gathered_again"] == [7.0] * 4
    assert [result["gathered"] for result in main_only] == [expected, {"lonely": None, "spread": None}]
    assert main_only[0]["gathered_again"] == [7.0] * 4
    assert main_only[0]["shapes"] == {"spread": [2, 3, 5], "lonely": [4]}
