"""Search files: what they say, every mistake at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.mixture.search_file import MixtureSearchSettings, read_search
from megatron_sov.settings import SettingsError


def written(folder: Path, text: str) -> Path:
    (folder / "search.yaml").write_text(text)
    return folder / "search.yaml"


def test_a_short_file_and_a_long_one(tmp_path: Path) -> None:
    short = "recipe: tiny-qwen3-4b\ntargets: {clean: 1}\nsteps: 60\nseq_len: 128\n"
    assert read_search(written(tmp_path, short)) == MixtureSearchSettings(
        "tiny-qwen3-4b", {"clean": 1.0}, 60, 128)
    found = read_search(written(tmp_path, short + """
name: mine
settings: [optim.lr=1e-3]
from: runs/base
sources: ["web-*"]
group_by: topic
rounds: [8, 2]
judged: 0
fit: boosting
candidates: 500
tokens: 2e9
max_epochs: 2.5
seed: 3
"""))
    assert found == MixtureSearchSettings(
        "tiny-qwen3-4b", {"clean": 1.0}, 60, 128, "mine", ("optim.lr=1e-3",), "runs/base",
        ("web-*",), "topic", (8, 2), 0, "boosting", 500, 2e9, 2.5, 3)
    assert found.num_proxies == 11


def test_every_mistake_is_told_with_its_line(tmp_path: Path) -> None:
    file = written(tmp_path, """recipe: 3
targets: {clean: 0, other: x}
step: 5
seq_len: 1
rounds: [2, 0]
judged: -1
fit: forest
settings: train.steps=3
tokens: many
sources: [1]
seed: 1.5
""")
    with pytest.raises(SettingsError) as e:
        read_search(file)
    assert [(p.line, p.key) for p in e.value.problems] == [
        (1, "recipe"), (2, "targets.clean"), (2, "targets.other"), (4, "seq_len"),
        (8, "settings"), (10, "sources.0"), (5, "rounds.1"), (6, "judged"), (7, "fit"), (9, "tokens"),
        (11, "seed"), (3, "step")]  # which explains that there is no steps
    rest = "recipe: r\ntargets: {clean: 1}\nsteps: 6\nseq_len: 8\n"
    for wrong in ("rounds: [5, 6]", "settings: [train.seed=3]", "from: 3"):
        with pytest.raises(SettingsError) as e:
            read_search(written(tmp_path, rest + wrong))
        assert [p.line for p in e.value.problems] == [5], wrong
    with pytest.raises(SettingsError, match="recipe: is missing"):
        read_search(written(tmp_path, ""))
