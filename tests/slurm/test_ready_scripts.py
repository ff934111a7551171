"""slurm/scripts: what the chains give, what a real Slurm takes, and what runs when somebody types `sbatch`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import cli, recipes
from megatron_sov.slurm import chain_file

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "slurm/scripts"
ALL = sorted(SCRIPTS.glob("*/*.sbatch"))
BIG = ("k-exaone-236b", "solar-open-102b")
TINY = ("tiny-k-exaone", "tiny-solar-open")


def test_there_are_scripts_for_the_published_recipes_and_their_tiny_ones() -> None:
    assert chain_file.names() == sorted(p.name for p in SCRIPTS.iterdir()) == [*BIG, *TINY]
    assert set(chain_file.names()) <= set(recipes.names())
    for name in chain_file.names():
        stages = [stage.stage for stage in chain_file.read_chain(name).stages]
        assert {"tokenizer", "data", "pretrain", "extend", "sft", "convert", "eval"} == set(stages), name


@pytest.mark.parametrize("name", [*BIG, *TINY])
def test_scripts_are_what_their_chain_gives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = f"slurm/scripts/{name}"
    assert cli.main(["submit", "chain", name, "--scripts", folder]) == 0
    fresh = {p.name: p.read_text() for p in (tmp_path / folder).iterdir()}
    kept = {p.name: p.read_text() for p in (SCRIPTS / name).iterdir()}
    assert sorted(fresh) == sorted(kept), "slurm/scripts is stale: run `make scripts`"
    assert [file for file in fresh if fresh[file] != kept[file]] == [], "slurm/scripts is stale: run `make scripts`"


def test_nothing_of_one_machine_stands_in_a_script() -> None:
    for script in ALL:
        text = script.read_text()
        assert not re.search(r"code-[0-9a-f]{12}|PYTHONPATH=|--chdir", text), script
        assert str(ROOT) not in text and sys.executable not in text, script
        assert text.count("records=\"$WORK\"/") == text.count("target=\"$WORK\"/") == 1, script
        account = "--account=NAME " if script.parent.name in BIG else ""
        assert f"#   sbatch {account}{script.relative_to(ROOT)}\n" in text


def test_slurm_would_take_every_script_as_it_stands(cluster: Any, site: Path) -> None:
    """On as many nodes as it asks for: 64, which a partition of the virtual cluster has in name."""
    for script in ALL:
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0, script
        cluster.run("sbatch", "--test-only", "--partition=wide", str(script))
    pretrain = SCRIPTS / "k-exaone-236b/04-pretrain.sbatch"
    refused = subprocess.run(["sbatch", "--test-only", "--partition=wide", "--nodes=65", str(pretrain)], env=cluster.env,
                             capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and "node configuration is not available" in refused.stderr
