"""The README's way of a model, typed line by line into an empty folder that has the `.venv` of `make demo`.

What is gathered is a few small documents instead of the machine's own, and two steps are trained: the rest is
what stands there.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import new_artifact

pytestmark = pytest.mark.checkout

README = (Path(__file__).parents[1] / "README.md").read_text()
STEPS = "train.steps=200"


def block_under(heading: str) -> list[str]:
    """Return the lines of the first commands under a heading."""
    found = re.search(rf"^## {heading}\n.*?^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1].splitlines()


def gather(folder: Path) -> None:
    """Write what `sov-data demo-corpus` would, in small."""
    modules = {"english": (textwrap,), "code": (inspect,)}
    with new_artifact(folder, "corpus") as corpus:
        for name, sources in modules.items():
            documents = [part for module in sources for part in inspect.getsource(module).split("\n\n")]
            (corpus.path / f"{name}.jsonl").write_text(
                "".join(json.dumps({"text": text}) + "\n" for text in documents))


@pytest.mark.distributed
def test_the_way_of_a_model_works_as_it_is_typed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_command: Callable[..., Any]) -> None:
    activate, demo_corpus, *lines = block_under("The way of a model")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    monkeypatch.chdir(tmp_path)
    programs = {shlex.split(line)[0] for line in (demo_corpus, *lines)}
    found = subprocess.run(["bash", "-ec", f"{activate}\ncommand -v {' '.join(programs)}"],
                           capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert len(found.stdout.split()) == len(programs) == 3, found.stderr
    assert demo_corpus == "sov-data demo-corpus --output work/corpus"
    gather(Path("work/corpus"))
    assert sum(STEPS in line for line in lines) == 1
    for line in lines:
        program, *argv = shlex.split(line.replace(STEPS, "train.steps=2"))
        done = run_command(*argv, program=program)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
    assert Path("work/pretrain/report.html").is_file() and Path("work/hf/model.safetensors").is_file()
