"""Fixtures that build small `pretrain` commands and start `megatron-sov` processes as a user does."""

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
    """A function `(run, *arguments, settings=())` that returns the words of a small `pretrain` command."""

    def command(run: Path, *arguments: str, settings: tuple[str, ...] = ()) -> list[str]:
        chosen = format_set_options((*SMALL, *settings))
        return ["pretrain", "tiny-solar-open", "--data", str(packed_data.text), "--run", str(run), *arguments,
                *chosen]

    return command


@pytest.fixture
def start(warm_python: str) -> Any:
    """A function `(argv) -> Popen` that starts `megatron-sov ARGV`; the test's end kills what still runs."""
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
    """Poll until `condition()` is true; fail if the process ends first, or after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def until() -> Any:
    """The function `wait_for`, as a fixture because test modules cannot import this file."""
    return wait_for
