"""`pretrain` and `run` as a user calls them, with small settings."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.typed_words import format_set_options

SMALL = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4",
         "model.num_kv_heads=2", "model.head_dim=8", "model.expert_ffn_dim=16",
         'data.phases=[{"name": "main", "seq_len": 32}]', "train.global_batch_size=8",
         "train.micro_batch_size=4", "model.num_experts=4", "data.heldout_tokens=128", "train.num_threads=1")
Command = Callable[..., list[str]]


@pytest.fixture(scope="session")
def pretrain(packed_data: Any) -> Command:
    """Return `command(run, *arguments, **settings)`: the arguments of a small `megatron-sov pretrain`."""

    def command(run: Path, *arguments: str, settings: tuple[str, ...] = ()) -> list[str]:
        chosen = format_set_options((*SMALL, *settings))
        return ["pretrain", "tiny-solar-open", "--data", str(packed_data.text), "--run", str(run), *arguments,
                *chosen]

    return command


@pytest.fixture
def start(warm_python: str) -> Any:
    """Return `start(argv) -> Popen`: a process equivalent to `megatron-sov ARGV`; remaining processes are
    killed at the end."""
    running: list[subprocess.Popen[str]] = []

    def run(argv: list[str]) -> subprocess.Popen[str]:
        running.append(subprocess.Popen([warm_python, "-m", "megatron_sov", *argv],
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 600) -> None:
    """Wait until the condition holds while the process runs."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def until() -> Any:
    """Return `wait_for` (test modules cannot import this file)."""
    return wait_for
