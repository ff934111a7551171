"""`sov-tokenizer report`: its page, JSON file and printed lines, and messages about mistakes."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenizer.cli import main
from tokenizer.report.command import CHECKS

Build = Callable[..., Path]
HOSTILE = "<|<img src=x onerror=alert(1)>|>"


def test_page_and_json_hold_every_check(build: Build, heldout: dict[str, Path], tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    folder = build(special=("<|end|>", HOSTILE))
    texts = [f"{name}={path}" for name, path in heldout.items()]
    assert main(["report", str(folder), "--text", *texts, "--skip", "scalars",
                 "--output", str(tmp_path / "out/r.html"), "--json", str(tmp_path / "r.json")]) == 0
    report, page = json.loads((tmp_path / "r.json").read_text()), (tmp_path / "out/r.html").read_text()
    assert list(report["checks"]) == [name for name in CHECKS if name != "scalars"]
    assert report["sha256"] == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    printed = capsys.readouterr().out
    for check in report["checks"].values():
        assert check["verdict"] in ("good", "note", "bad") and check["numbers"]
        assert f"{check['verdict']:>4}  {check['title']}: {check['summary']}" in printed
        assert f"<h3>{check['title'].replace(chr(39), '&#39;')}</h3>" in page
    assert report["checks"]["neutral"]["verdict"] == "good" and "<img" not in page
    assert set(report["checks"]["texts"]["numbers"]["texts"]) == {"english", "thai"}


def test_mistakes_give_one_sentence_and_no_output(build: Build, tmp_path: Path, get_refusal: Any) -> None:
    folder = build()
    (tmp_path / "taken").mkdir()
    path, output = str(folder), ("--output", f"{tmp_path}/r.html")
    mistakes = {"error: none: does not exist": ["none", *output],
                "error: --skip digit: is no check; did you mean 'digits'?": [path, *output, "--skip",
                                                                             "digit"],
                f"error: --output {tmp_path}/taken: is a folder": [path, "--output", f"{tmp_path}/taken"],
                "error: --text 'x=': must be a path or NAME=PATH": [path, *output, "--text", "x="]}
    for sentence, arguments in mistakes.items():
        assert sentence in get_refusal("report", *arguments)
    assert not (tmp_path / "r.html").exists()
