"""docs/mixtures.md: its files are written, its commands typed, in order."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data_prep.cli import main
from megatron_sov.base.artifacts import read_manifest

PAGE = (Path(__file__).parents[3] / "docs/mixtures.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.deep
def test_what_the_page_shows_runs(tokenizers: dict[str, Path], tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tokenizer").symlink_to(tokenizers["solar-open"])
    for name, kind, synthetic in (("en-L2", "en", False), ("ko-L2", "ko", False),
                                  ("ko-synthetic", "ko", True)):
        rows = [{"text": f"{name} document {i} " * 200, "kind": kind, "level": "L2", "synthetic": synthetic}
                for i in range(60)]
        Path("text", name).mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), f"text/{name}/00000.parquet")
    Path("more").mkdir()
    Path("more/law.jsonl").write_text("\n".join(json.dumps({"text": f"Article {i}."}) for i in range(60)))
    [blend] = blocks("yaml")
    Path("blend.yaml").write_text(blend)
    shown = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert len(shown) == 4
    for program, *arguments in shown:
        assert program == "sov-data" and main(arguments) == 0, arguments
    phases = {p["name"]: p["blend"] for p in read_manifest("mixed").content["phases"]}
    assert phases["foundation"] == pytest.approx({"en-L2": 56 / 80, "ko-L2": 24 / 80 * 0.8,
                                                  "ko-synthetic": 0.06},
                                                 rel=0.2)
    assert phases["domains"] == pytest.approx({"law": 0.6, "en-L2": 0.4})
