"""Every command of docs/generate.md and docs/eval.md runs, in order."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from megatron_sov.cli import main

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("page", "count"), [("generate.md", 5), ("eval.md", 8)])
def test_what_the_page_shows_runs(page: str, count: int, one_rank: None, imported: dict[str, Path],
                                  hf_models: dict[str, Path], token_shards: Path, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {"my-checkpoint": imported["solar_open"], "my-model": hf_models["solar_open"],
               "shards": token_shards}
    for name, folder in folders.items():
        shutil.copytree(folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text(encoding="utf-8")
    files = re.findall(r"^`([a-z_.]+)`:\n\n```[a-z]+\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for name, content in files:
        (tmp_path / name).write_text(content)
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    # that one: tests/train
    lines = [line for line in commands if not line.startswith("megatron-sov pretrain")]
    assert len(lines) == count
    for line in lines:
        program, *arguments = shlex.split(line.split(" --nproc")[0])  # several processes: tests/generate
        assert (program, main(arguments)) == ("megatron-sov", 0), line
