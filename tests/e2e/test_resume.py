"""A run that is stopped, killed and resumed has the same bits as an uninterrupted run."""

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_sov import recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.checkpoint.host_snapshot import HostSnapshot
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.engine.parallel.world import STORE_PORT
from megatron_sov.model.config import apply_settings
from megatron_sov.runs.checkpoints import find_damage
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.lock import find_living_holder
from megatron_sov.runs.obs.events import final_step_events, read_events
from megatron_sov.train.objectives.data_objective import LanguageModelling
from megatron_sov.train.stages.launch import run_stage
from megatron_sov.train.stages.stage import Stage

STEPS = 30
SETTINGS = (f"train.steps={STEPS}", "train.checkpoint_every_steps=5", "train.keep_checkpoints=0",
            "train.eval_every_steps=10", "optim.warmup_steps=4", "optim.eps=1e-3")
EP2 = ("--nproc", "2", "--set", "parallel.ep=2")


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Return every step's numbers, without times."""
    timed = ("time_s", "step_time_s", "tokens_per_s", "tokens_per_s_per_process", "tflops_per_process",
             "peak_memory_bytes")
    return [{k: v for k, v in e.items() if k not in timed}
            for e in final_step_events(list(read_events(run / "events.jsonl")))]


def last_step(run: Path) -> int:
    return max((e["step"] for e in read_events(run / "events.jsonl") if e["event"] == "step"), default=0)


def checkpoint_of(run: Path, step: int) -> Path:
    return next(p for p in (run / "checkpoints").glob("step-*") if int(p.name.removeprefix("step-")) == step)


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    readers = {part: TensorReader(checkpoint_of(run, STEPS), part) for part in ("model", "optimizer")}
    return {f"{part}/{key}": reader.read(key) for part, reader in readers.items()
            for key in reader.keys()}  # noqa: SIM118


@pytest.mark.distributed
@pytest.mark.essential
def test_stopped_killed_and_continued_equals_uninterrupted(
        tmp_path: Path, pretrain: Any, run_command: Any, start: Any, until: Any) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_command(*pretrain(whole, *EP2, settings=SETTINGS)).returncode == 0

    run = start(pretrain(broken, *EP2, settings=SETTINGS))
    until(lambda: last_step(broken) >= 3, run)
    holder = json.loads((broken / "lock.json").read_text())["pid"]
    os.kill(holder, signal.SIGSTOP)  # the run lives and stands still while another one tries
    second = run_command(*pretrain(broken, *EP2, "--resume", settings=SETTINGS))
    assert second.returncode == 2 and f"held by a living run (process {holder}" in second.stderr, (
        second.stderr)
    os.kill(psutil.Process(holder).ppid(), signal.SIGTERM)
    os.kill(holder, signal.SIGCONT)
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 75 and "everything is saved; last checkpoint: step " in errors, errors
    stopped_at = last_step(broken)
    assert checkpoint_of(broken, stopped_at).is_dir() and not (broken / "lock.json").exists()
    assert stopped_at < STEPS and not (broken / "complete.json").exists()

    run = start(pretrain(broken, *EP2, "--resume", settings=SETTINGS))
    until(lambda: last_step(broken) >= stopped_at + 8, run)
    rank_zero = json.loads((broken / "lock.json").read_text())["pid"]
    # the launcher; here its ranks end with its session, tests/engine/parallel/test_launcher.py has orphans
    os.kill(psutil.Process(rank_zero).ppid(), signal.SIGKILL)
    run.wait(timeout=600)
    assert (broken / "lock.json").exists()
    # a rank that waits for a processor may not have received it yet
    while find_living_holder(broken) is not None:
        time.sleep(0.05)

    # nothing is typed again: settings, data and the number of processes are in the folder
    result = run_command("resume", str(broken))
    assert result.returncode == 0, result.stderr
    reasons = [e["event"] for e in read_events(broken / "events.jsonl")
               if e["event"] in ("stop", "resume", "run_end")]
    assert reasons == ["stop", "resume", "resume", "run_end"]
    assert [s["step"] for s in steps_of(broken)] == list(range(1, STEPS + 1))
    for ours, theirs in zip(steps_of(broken), steps_of(whole), strict=True):
        assert ours == theirs
    ours, theirs = tensors_of(broken), tensors_of(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


KILLED_STEPS = 12
KILLED = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.head_dim=8",
          "model.expert_ffn_dim=16", 'data.phases=[{"name": "main", "seq_len": 32}]',
          "train.global_batch_size=8", "train.micro_batch_size=4", "data.heldout_tokens=128",
          f"train.steps={KILLED_STEPS}", "train.checkpoint_every_steps=2", "train.keep_checkpoints=1",
          "train.keep_every_steps=8", "train.eval_every_steps=6", "train.hidden_dropout=0.1",
          "parallel.ep=2")


def run_and_kill(data: str, folder: str) -> dict[str, Any]:
    """Runs in a process that has imported everything: forks runs of two ranks, and kills all but the last."""
    config = apply_settings(recipes.get("tiny-solar-open"),
                            [f"data.paths={json.dumps({data: 1.0})}", *KILLED])
    whole, broken = Path(folder) / "whole", Path(folder) / "broken"
    checkpoints, left, found = broken / "checkpoints", list[int](), list[str]()

    def started(run: Path, config: Any = config, before: Callable[[], None] = lambda: None) -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setsid()
                for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", STORE_PORT):
                    os.environ.pop(name, None)  # this process is not a rank, it starts ranks
                before()
                run_stage(Stage(config, RunFolder(run), LanguageModelling, resume=True), 2)
                code = 0
            except SystemExit as e:
                code = int(e.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        return child

    def killed(reached: Callable[[], bool]) -> None:
        child, deadline = started(broken), time.monotonic() + 600
        while not reached():
            assert os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline
            time.sleep(0.001)
        ranks = psutil.Process(child).children()
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:  # so early that it leads no group yet
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        psutil.wait_procs(ranks, timeout=600)
        left.append(len(list(checkpoints.glob(".*"))))
        found.extend(p for p in map(find_damage, checkpoints.glob("step-*")) if p is not None)

    def holder() -> int:
        try:
            return int(json.loads((broken / "lock.json").read_text())["pid"])
        except (OSError, ValueError):
            return 0

    def loading() -> Callable[[], bool]:
        before = holder()
        return lambda: holder() not in (0, before)

    def stepping() -> Callable[[], bool]:
        return lambda: any(e["event"] == "step" for e in read_events(broken / "events.jsonl"))

    def writing(at_least: str) -> Callable[[], bool]:
        return lambda: any((checkpoints / p.name / at_least).exists() for p in checkpoints.glob(".writing-*"))

    def hangs() -> None:
        """Let rank 1 never end its writing; ranks are forked from here."""
        now = HostSnapshot.write
        HostSnapshot.write = lambda self, folder, rank: (
            time.sleep(3600) if rank == 1 else now(self, folder, rank))

    assert os.waitpid(started(whole), 0)[1] == 0
    limited = apply_settings(config, ["train.save_timeout_s=1"])
    hung = os.waitstatus_to_exitcode(os.waitpid(started(Path(folder) / "hung", limited, hangs), 0)[1])
    for state in (stepping, lambda: writing("model"), loading, lambda: writing("model.index.json")):
        killed(state())
    assert os.waitpid(started(broken), 0)[1] == 0
    return {"hung": hung, "left": left, "damaged": found,
            "names": sorted(p.name for p in checkpoints.iterdir())}


@pytest.mark.deep
@pytest.mark.distributed
def test_kills_at_every_state_change_nothing(ranks: Any, job: Any, packed_data: Any, tmp_path: Path) -> None:
    arguments = {"data": str(packed_data.text), "folder": str(tmp_path)}
    ((found,),) = ranks(job(__file__, "run_and_kill", 1, arguments))
    assert found["hung"] == 2, "a thread that hangs keeps no process from leaving"
    assert not list((tmp_path / "hung" / "checkpoints").glob("step-*"))
    assert found["damaged"] == [], "under its name a checkpoint is whole"
    assert sum(found["left"]) >= 1, "at least one kill came while a checkpoint was written"
    assert found["names"] == [f"step-{KILLED_STEPS}", "step-8"], "no leftovers, newest and multiples stay"
    for step in (8, KILLED_STEPS):
        ours, theirs = (read_manifest(tmp_path / name / f"checkpoints/step-{step}").files
                        for name in ("broken", "whole"))
        state = ours.pop("state.json"), theirs.pop("state.json")  # holds the hours worked
        assert ours == theirs and abs(state[0].size_bytes - state[1].size_bytes) < 8
