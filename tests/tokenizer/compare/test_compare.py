"""`sov-tokenizer compare`: ratios against plain recomputation, shared tokens, and what is cut differently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tokenizer.cli import main
from tokenizer.compare.command import ModelSize, different_lines, different_words, names_of, overlap, speeds
from tokenizer.formats.reader import open_tokenizer
from tokenizer.report.measures import read_texts

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


def test_vocabularies_share_tokens_by_their_bytes(build: Build) -> None:
    a, b = (open_tokenizer(build("a", special=("<x>", "<y>"))),
            open_tokenizer(build("b", pairs=[("t", "h"), ("o", "f")])))
    assert overlap(a, b) == {"num_shared": 257, "share_of_first": 257 / 263, "share_of_second": 257 / 258,
                             "jaccard": 257 / 264}


def test_different_cuts_are_shown_and_equal_ones_not(build: Build, tmp_path: Path) -> None:
    tokenizers = [open_tokenizer(build("a")), open_tokenizer(build("b", pairs=[("t", "h"), ("Ġ", "a")]))]
    (tmp_path / "t.txt").write_text("the a the with\nthe other theme in the text\n")
    text = read_texts([str(tmp_path / "t.txt")], 1)[0]
    words = different_words(tokenizers, text)
    assert words[0] == {"text": "the", "count": 4, "cuts": ["␣the", "␣|th|e"]}
    assert "a" not in [w["text"] for w in words]
    lines = different_lines(tokenizers, text)
    assert [line["text"] for line in lines] == ["the other theme in the text"]
    assert lines[0]["num_tokens"] == [len(t.encode(lines[0]["text"])) for t in tokenizers]
    assert different_lines([tokenizers[0], tokenizers[0]], text) == []


def test_size_and_speed(build: Build, heldout: dict[str, Path]) -> None:
    size = ModelSize(4096, 8e9)
    assert size.embedding_params(196_608) == 1_610_612_736
    assert size.training_flops_per_token(0) == 6 * 8e9
    opened = [open_tokenizer(build("a")), open_tokenizer(build("b"))]
    assert all(speed > 0 for speed in speeds(opened, read_texts([str(p) for p in heldout.values()], 1)))
    assert names_of(opened) == ["a", "b"] and names_of([opened[0], opened[0]]) == [str(opened[0].path)] * 2


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
