"""A check of a proposed command line starts, submits, sends and writes nothing."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_sov.base.errors import DryRun, check_only
from megatron_sov.work.clusters.client import run_slurm_program
from megatron_sov.work.endpoints.http_client import HttpClient
from megatron_sov.work.processes.children import start_command, start_interpreter
from megatron_sov.work.progress.locks import lock_folder


@pytest.fixture
def checking() -> Iterator[None]:
    with check_only():
        yield


def build_client() -> HttpClient:
    return HttpClient("http://127.0.0.1:9/v1/chat/completions", "", 1.0, "", 1000, 1.0)


@pytest.mark.parametrize("action", [
    lambda folder: start_command([sys.executable, "-c", f"open({str(folder / 'made')!r}, 'w')"]),
    lambda folder: start_interpreter([sys.executable, "-c", "0"], [], {}),
    lambda folder: run_slurm_program("sbatch", "--parsable", "job.sh"),
    lambda folder: build_client().send_request("post", {"prompt": "a"}, ""),
    lambda folder: next(build_client().stream({"prompt": "a"})),
    lambda folder: lock_folder(folder / "locked", folder).__enter__()],
    ids=["command", "interpreter", "sbatch", "request", "stream", "lock"])
def test_a_check_has_no_side_effects(action: Callable[[Path], object], checking: None,
                                     tmp_path: Path) -> None:
    with pytest.raises(DryRun):
        action(tmp_path)
    assert not list(tmp_path.iterdir())
