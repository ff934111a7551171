"""On GPUs each rank is a new process that reads its work from a file. A double of the GPU check makes that
happen on a CPU, and the results equal those of forked ranks."""

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import read_manifest

SETTINGS = ("train.steps=2", "train.async_save=false", "train.eval_every_steps=0", "optim.eps=1e-3",
            "train.deterministic=true")
OWN = '''
from megatron_sov.train.objectives.data_objective import LanguageModelling

class Own(LanguageModelling):
    """Of a file that a person names."""
'''


def run_commands(commands: list[list[str]], as_on_gpu: bool) -> list[int]:
    """Run commands one after another; returns their exit codes.  Runs in a process that has imported all."""
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


def files_of(checkpoint: Path) -> dict[str, Any]:
    """Return the hashes of a checkpoint's files, except the file with the hours worked."""
    return {name: record for name, record in read_manifest(checkpoint).files.items() if name != "state.json"}


@pytest.mark.deep
@pytest.mark.distributed
def test_spawned_ranks_equal_forked_ranks(ranks: Any, job: Any, pretrain: Any, tmp_path: Path) -> None:
    """A stage that does more than to train, too: a teacher's states."""
    (tmp_path / "own.py").write_text(OWN)
    own = (*SETTINGS, f"objective.name={tmp_path}/own.py:Own", "parallel.ep=2")

    def commands(folder: Path) -> list[list[str]]:
        base = str(folder / "base")
        longer = (*SETTINGS, "data.phases.0.seq_len=128", "optim.lr=4e-3")
        then = pretrain(folder / "distill", "--from", base, "--teacher", base, settings=longer)
        then[0] = "distill"
        return [pretrain(folder / "base", "--nproc", "2", settings=own), then]

    for way in ("forked", "new"):
        ((codes,),) = ranks(job(__file__, "run_commands", 1, {"commands": commands(tmp_path / way),
                                                               "as_on_gpu": way == "new"}))
        assert codes == [0, 0], way
    for run in ("base", "distill"):
        forked, new = (files_of(tmp_path / way / run / "checkpoints/step-2") for way in ("forked", "new"))
        assert forked == new, run
    assert (tmp_path / "new/distill.states").is_dir()
