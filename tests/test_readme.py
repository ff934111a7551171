"""The commands of "From raw text to a chat" in the README, line by line, in an empty folder with the
`.venv` of `make demo`, on a small corpus and with two steps per stage."""

import inspect
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import create_artifact

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


FEWER = "train.steps=2 --set train.global_batch_size=4 --set train.micro_batch_size=2"


def block_under(heading: str) -> list[str]:
    """Return the lines of the first commands under a heading."""
    match = re.search(rf"^## {heading}\n.*?^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert match is not None
    return match[1].splitlines()


def gather(folder: Path) -> None:
    """Write a small version of the files of `sov-data demo-corpus`."""
    modules = {"english": (textwrap,), "code": (inspect,)}
    with create_artifact(folder, "corpus") as corpus:
        for name, sources in modules.items():
            documents = [part for module in sources for part in inspect.getsource(module).split("\n\n")]
            (corpus.path / f"{name}.jsonl").write_text(
                "".join(json.dumps({"text": text}) + "\n" for text in documents))
        said = [[{"role": "user", "content": f"What is list {i}?"},
                 {"role": "assistant", "content": f"A sequence of {i} things."}] for i in range(40)]
        (corpus.path / "chat.jsonl").write_text(
            "".join(json.dumps({"messages": messages}) + "\n" for messages in said))
        (corpus.path / "judged.jsonl").write_text("".join(json.dumps(
            {"prompt": messages[0]["content"], "responses": [
                {"content": messages[1]["content"], "reward": 1.0},
                {"content": "Nothing.", "reward": 0.0}]}) + "\n" for messages in said))
        (corpus.path / "benchmarks").mkdir()
        (corpus.path / "benchmarks/test.jsonl").write_text('{"prompt": "Why?", "language": "en"}\n')


@pytest.mark.essential
@pytest.mark.distributed
def test_readme_commands_run_in_order(cwd: Path, monkeypatch: pytest.MonkeyPatch,
                                      run_command: Callable[..., Any], warm_python: str) -> None:
    activate, demo_corpus, *lines, serve = block_under("From raw text to a chat")
    (cwd / ".venv").symlink_to(sys.prefix)
    monkeypatch.setenv("SOV_TESTS_PYTHON", warm_python)  # by which `chat` starts a server
    programs = {shlex.split(line)[0] for line in (demo_corpus, *lines)}
    completed = subprocess.run(["bash", "-ec", f"{activate}\ncommand -v {' '.join(programs)}"],
                               capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert len(completed.stdout.split()) == len(programs) == 3, completed.stderr
    assert demo_corpus == "sov-data demo-corpus --output work/corpus"
    gather(Path("work/corpus"))
    trained = 0
    for line in lines:
        short, count = re.subn(r"train\.steps=\d+", FEWER, line)
        trained += count
        program, *argv = shlex.split(short)
        result = run_command(*argv, program=program)
        assert result.returncode == 0, f"{line}\n{result.stderr[-3000:]}"
    assert trained == 2
    assert Path("work/report.html").is_file() and Path("work/hf/model.safetensors").is_file()
    ask_server(serve, warm_python)


def ask_server(line: str, python: str) -> None:
    """Start the server of a command at a free port, and request its models."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, *words = shlex.split(line)
    assert (program, words[-2:]) == ("megatron-sov", ["--port", "8000"])
    with subprocess.Popen([python, "-m", "megatron_sov", *words[:-1], str(port)],
                          env={**os.environ, "PYTHONPATH": str(ROOT)}) as server:
        try:
            while True:
                assert server.poll() is None, f"{line}: ended with {server.returncode}"
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60) as answer:
                        assert json.load(answer)["data"]
                        return
                except OSError:
                    time.sleep(0.2)
        finally:
            server.terminate()
