"""`sov-tokenizer compare`: ratios against plain recomputation, shared tokens, and what is cut differently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tokenizer.cli import main

Build = Callable[..., Path]


def test_the_command_writes_what_plain_counting_gives(build: Build, heldout: dict[str, Path], tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    plain, none = build("plain"), build("none", pairs=[])
    arguments = ["compare", str(plain), str(none), "--text", *(f"{n}={p}" for n, p in heldout.items())]
    assert main([*arguments, "--json", str(tmp_path / "out/c.json"), "--output", str(tmp_path / "out/c.html"),
                 "--hidden-size", "64", "--body-params", "1e5"]) == 0
    found = json.loads((tmp_path / "out/c.json").read_text())
    texts = [json.loads(line)["text"] for line in heldout["english"].read_text().splitlines()]
    counts, sizes = {}, {}
    for name, folder in (("plain", plain), ("none", none)):
        raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
        counts[name], sizes[name] = sum(len(raw.encode(t).ids) for t in texts), raw.get_vocab_size()
    assert counts["none"] == sum(len(t.encode()) for t in texts)  # bytes
    ratio = counts["none"] / counts["plain"]
    figures = found["tokenizers"]["none"]["texts"]["english"]
    assert figures["relative_tokens"] == pytest.approx(ratio) and figures["bytes_per_token"] == 1
    assert figures["relative_flops"] == pytest.approx(
        ratio * (1e5 + 64 * sizes["none"]) / (1e5 + 64 * sizes["plain"]))
    # 6 N for each token
    assert figures["training_flops_per_mb"] == pytest.approx(6e6 * (1e5 + 64 * sizes["none"]))
    assert found["tokenizers"]["none"]["embedding_params"] == 2 * 64 * sizes["none"]
    assert found["tokenizers"]["plain"]["texts"]["english"]["relative_flops"] == 1
    printed = capsys.readouterr().out
    assert "bytes per token" in printed and "english" in printed and "MB per CPU second" in printed


def test_mistakes_cost_one_sentence_and_leave_nothing(build: Build, heldout: dict[str, Path], tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    it, text, output = str(build()), ["--text", str(heldout["english"])], tmp_path / "new.html"
    mistakes = {"is the only tokenizer": [it, *text], "--text is missing": [it, it],
                "does not exist": [it, "none", *text],
                "--hidden-size 0: must be at least 1": [it, it, *text, "--hidden-size", "0"],
                "--max-text-mb 0: must be above 0": [it, it, *text, "--max-text-mb", "0"],
                "--body-params nan: must be a finite number": [it, it, *text, "--body-params", "nan"]}
    for sentence, arguments in mistakes.items():
        assert main(["compare", *arguments, "--output", str(output)]) == 2
        assert sentence in capsys.readouterr().err
    assert not output.exists()
