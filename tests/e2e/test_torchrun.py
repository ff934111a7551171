"""Two nodes without Slurm, each with a torchrun agent as in docs/slurm.md, get the losses and gradient norms
of two local processes; and torchrun passes the options of every command in docs/."""

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import run as torchrun

from tests.pages_typed import blocks, page_section
from tests.run_files import read_run_events, read_steps

STEPS = 6
SECTION = page_section("slurm.md", "Several nodes without Slurm")
LOCAL_VALUES = {"$NODE_RANK": "{rank}", "node-0": "127.0.0.1", "$PORT": "{port}",
                "--nproc-per-node 8": "--nproc-per-node 1"}
"""Text of the page's command -> its replacement here: two agents on this machine with one process each."""


def build_agent_command(rank: int, port: int, arguments: list[str]) -> list[str]:
    """Return the page's torchrun command for the node `rank`, with these arguments of `pretrain`."""
    (command,) = (block for block in blocks(SECTION, "sh") if "--node-rank" in block)
    for text, replacement in LOCAL_VALUES.items():
        assert text in command, text
        command = command.replace(text, replacement.format(rank=rank, port=port))
    program, *words = shlex.split(command.replace("\\\n", " "))
    assert program == "torchrun", program
    return [sys.executable, "-W", "ignore", "-m", "torch.distributed.run",
            *words[:words.index("pretrain") + 1], *arguments]


PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
COMMANDS = sorted({(page.name, command) for page in PAGES
                   for command in re.findall(r"torchrun (-[^`]*?megatron_sov[^`]*)",
                                             page.read_text().replace("\\\n", " "))})


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[page for page, _ in COMMANDS])
def test_torchrun_passes_our_options_through_on_every_page(page: str, command: str) -> None:
    words = shlex.split(command.replace("$NODE_RANK", "1").replace("$PORT", "1"))
    ours = words[words.index("--") + 1:]
    parsed = torchrun.parse_args(words)
    assert (parsed.module, [parsed.training_script, *parsed.training_script_args]) == (True, ours), page


def test_without_the_double_dash_torchrun_reads_our_options_as_its_own(
        capsys: pytest.CaptureFixture[str]) -> None:
    (message,) = re.findall(r"ends with `([^`]*)`", SECTION)
    with pytest.raises(SystemExit):
        torchrun.parse_args(["--nproc-per-node", "2", "-m", "megatron_sov", "pretrain", "--run", "r"])
    assert message in capsys.readouterr().err


def read_losses(run: Path) -> list[tuple[int, float, float]]:
    return [(e["step"], e["loss"], e["grad_norm"]) for e in read_steps(run)]


@pytest.mark.deep
@pytest.mark.distributed
def test_two_nodes_give_the_bits_of_two_local_processes(
    pretrain: Callable[..., list[str]], run_command: Any, warm_python: str, tmp_path: Path,
) -> None:
    """One process is killed: both agents restart their processes, which resume from the last checkpoint."""
    settings = (f"train.steps={STEPS}", "train.checkpoint_every_steps=2", "train.eval_every_steps=0",
                "train.async_save=false", "parallel.ep=2")
    assert run_command(*pretrain(tmp_path / "local", "--nproc", "2", settings=settings)).returncode == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = pretrain(tmp_path / "nodes", "--inject", "kill@step=5,rank=1", settings=settings)
    arguments = command[command.index("pretrain") + 1:]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
                   "PYTHON_EXEC": warm_python}  # the Python with which agents start processes
    agents = [
        subprocess.Popen(build_agent_command(rank, port, arguments), stderr=subprocess.PIPE, text=True,
                         env=environment)
        for rank in (0, 1)]
    try:
        errors = [process.communicate(timeout=600)[1] for process in agents]
    finally:
        for process in agents:
            process.terminate()  # a terminated agent ends its ranks, a killed one would not
            process.wait(600)
    assert [process.returncode for process in agents] == [0, 0], errors
    assert (tmp_path / "nodes/complete.json").is_file()
    assert read_losses(tmp_path / "nodes") == read_losses(tmp_path / "local")
    assert len(read_losses(tmp_path / "local")) == STEPS
    assert [e["num_ranks"] for e in read_run_events(tmp_path / "nodes", "run_start")] == [2, 2]
    assert [e["step"] for e in read_run_events(tmp_path / "nodes", "resume")] == [4]
