"""docs/mixtures.md: its files are written, its commands typed, in order."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from data_prep.cli import main
from data_prep.mixture import search as search_module
from data_prep.mixture.blend_file import MixtureSearchSettings
from data_prep.mixture.search import Losses, ProxySettings
from megatron_sov.base.artifacts import read_manifest

PAGE = (Path(__file__).parents[3] / "docs/mixtures.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


class Pretend:
    """In the place of the training of small models."""

    def __init__(self, work: Path, settings: ProxySettings, workers: int) -> None:
        assert settings.recipe == "tiny-qwen3-4b" and len(settings.settings) == 2

    def losses(self, blends: Sequence[dict[str, float]], done: Callable[[], object]) -> list[Losses]:
        return [{"en-L2": 2 - 0.1 * np.log(blend.get("en-L2", 0) + 0.1), "ko-L2": 2.0} for blend in blends]


def test_what_the_page_shows_runs(tokenizers: dict[str, Path], tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search_module, "Proxies", Pretend)
    Path("tokenizer").symlink_to(tokenizers["solar-open"])
    for name, kind, synthetic in (("en-L2", "en", False), ("ko-L2", "ko", False),
                                  ("ko-synthetic", "ko", True)):
        rows = [{"text": f"{name} document {i} " * 200, "kind": kind, "level": "L2", "synthetic": synthetic}
                for i in range(60)]
        Path("text", name).mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), f"text/{name}/00000.parquet")
    Path("more").mkdir()
    Path("more/law.jsonl").write_text("\n".join(json.dumps({"text": f"Article {i}."}) for i in range(60)))
    blend, search = blocks("yaml")
    Path("blend.yaml").write_text(blend)
    Path("search.yaml").write_text(search)
    shown = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert len(shown) == 7
    for program, *arguments in shown:
        assert program == "sov-data" and main(arguments) == 0, arguments
    phases = {p["name"]: p["blend"] for p in read_manifest("mixed").content["phases"]}
    assert phases["foundation"] == pytest.approx({"en-L2": 56 / 80, "ko-L2": 24 / 80 * 0.8,
                                                  "ko-synthetic": 0.06},
                                                 rel=0.2)
    assert phases["domains"] == pytest.approx({"law": 0.6, "en-L2": 0.4})
    assert read_manifest("found", "mixture").content["chosen"]["en-L2"] > 0.6


def test_every_key_of_a_search_file_is_on_the_page() -> None:
    [table] = [block for block in PAGE.split("\n\n") if block.startswith("| key |")]
    assert set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:]))) == (
        {f.name.rstrip("_") for f in dataclasses.fields(MixtureSearchSettings)} - {"name", "candidates"})
