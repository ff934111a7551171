"""`sov-tokenizer report` and its pages, opened in a real browser where there is one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenizer.cli import main
from tokenizer.report.command import CHECKS

Build = Callable[..., Path]
HOSTILE = "<|<img src=x onerror=alert(1)>|>"
LONG = ("worst", "scripts", "scalars", "reach")
"""Checks that take their time: all of Unicode, megabytes of one letter."""
QUICK = tuple(word for name in LONG for word in ("--skip", name))


def test_page_and_json_hold_every_check(build: Build, heldout: dict[str, Path], tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    folder = build(special=("<|end|>", HOSTILE))
    texts = [f"{name}={path}" for name, path in heldout.items()]
    assert main(["report", str(folder), "--text", *texts, *QUICK, "--output", str(tmp_path / "out/r.html"),
                 "--json", str(tmp_path / "r.json")]) == 0
    found, page = json.loads((tmp_path / "r.json").read_text()), (tmp_path / "out/r.html").read_text()
    assert list(found["checks"]) == [name for name in CHECKS if name not in LONG]
    assert found["sha256"] == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    printed = capsys.readouterr().out
    for check in found["checks"].values():
        assert check["verdict"] in ("good", "note", "bad") and check["numbers"]
        assert f"{check['verdict']:>4}  {check['title']}: {check['summary']}" in printed
        assert f"<h3>{check['title'].replace(chr(39), '&#39;')}</h3>" in page
    assert found["checks"]["neutral"]["verdict"] == "good" and "<img" not in page
    assert set(found["checks"]["texts"]["numbers"]["texts"]) == {"english", "thai"}


def test_both_pages_open_in_a_browser(build: Build, heldout: dict[str, Path], tmp_path: Path,
                                      open_page: Callable[[Path], tuple[str, list[str]]]) -> None:
    a, b = build("a", special=("<|end|>", HOSTILE)), build("b", pairs=[])
    shown = ("texts", "used", "inventory", "whitespace", "neutral")
    skip = [word for name in CHECKS if name not in shown for word in ("--skip", name)]
    texts = ["--text", *(f"<img>{name}={path}" for name, path in heldout.items())]
    assert main(["report", str(a), *texts, "--output", str(tmp_path / "r.html"), *skip]) == 0
    assert main(["compare", str(a), str(b), *texts, "--output", str(tmp_path / "c.html")]) == 0
    for name, num_plots in (("r.html", 5), ("c.html", 2)):
        dom, console = open_page(tmp_path / name)
        assert console == []
        body = re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
        plots = body.split('<div class="drawing"')[1:]
        assert len(plots) == num_plots and all(re.search(r"<rect x|<path class=.stroke", p) for p in plots)
        assert "<img" not in body


def test_mistakes_cost_one_sentence_and_leave_nothing(build: Build, heldout: dict[str, Path], tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    folder = build()
    (tmp_path / "taken").mkdir()
    it, output = str(folder), ("--output", f"{tmp_path}/r.html")
    mistakes = {"error: none: does not exist": ["none", *output],
                "error: --skip digit: is no check; did you mean 'digits'?": [it, *output, "--skip", "digit"],
                f"error: --output {tmp_path}/taken: is a folder": [it, "--output", f"{tmp_path}/taken"],
                "error: --text 'x=': must be a path or NAME=PATH": [it, *output, "--text", "x="]}
    for sentence, arguments in mistakes.items():
        assert main(["report", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
