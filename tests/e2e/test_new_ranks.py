"""Ranks on GPUs are new processes that read their work from a file. A replaced `launcher.on_gpu` starts such
processes on CPUs, and their checkpoints equal those of forked ranks."""

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import read_manifest

SETTINGS = ("train.steps=2", "train.async_save=false", "train.eval_every_steps=0", "optim.eps=1e-3",
            "train.deterministic=true")
OWN_OBJECTIVE = '''
from megatron_sov.train.objectives.data_objective import LanguageModelling

class Own(LanguageModelling):
    """An objective from a user's file."""
'''


def run_commands(commands: list[list[str]], as_on_gpu: bool) -> list[int]:
    """Run `megatron-sov` commands one after another in forks of this process and return their exit codes."""
    from megatron_sov.cli import main
    from megatron_sov.engine.parallel import launcher
    from megatron_sov.engine.parallel.world import STORE_PORT

    def run(argv: list[str]) -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", STORE_PORT):
                    os.environ.pop(variable, None)  # this process is not a rank, it starts one
                launcher.on_gpu = lambda: as_on_gpu
                code = main(argv)
            except SystemExit as e:
                code = int(e.code or 0)
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return [run(argv) for argv in commands]


def read_file_hashes(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest's record of each file of a checkpoint except `state.json`, which contains times."""
    return {name: record for name, record in read_manifest(checkpoint).files.items() if name != "state.json"}


@pytest.mark.deep
@pytest.mark.distributed
def test_spawned_ranks_equal_forked_ranks(ranks: Any, job: Any, pretrain: Any, tmp_path: Path) -> None:
    """Compares a pretraining run, and a distillation, which computes the teacher's states before training."""
    (tmp_path / "own.py").write_text(OWN_OBJECTIVE)
    base_settings = (*SETTINGS, f"objective.name={tmp_path}/own.py:Own", "parallel.ep=2")

    def commands(folder: Path) -> list[list[str]]:
        base = str(folder / "base")
        distill_settings = (*SETTINGS, "data.phases.0.seq_len=128", "optim.lr=4e-3")
        distill = pretrain(folder / "distill", "--from", base, "--teacher", base, settings=distill_settings)
        distill[0] = "distill"
        return [pretrain(folder / "base", "--nproc", "2", settings=base_settings), distill]

    for kind in ("forked", "spawned"):
        ((codes,),) = ranks(job(__file__, "run_commands", 1, {"commands": commands(tmp_path / kind),
                                                              "as_on_gpu": kind == "spawned"}))
        assert codes == [0, 0], kind
    for run in ("base", "distill"):
        forked, spawned = (read_file_hashes(tmp_path / kind / run / "checkpoints/step-2")
                           for kind in ("forked", "spawned"))
        assert forked == spawned, run
    assert (tmp_path / "spawned/distill.states").is_dir()
