"""`sov-tokenizer compare`: cost, overlap and speed of tokenizers, against figures by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from tokenizer.cli import main
from tokenizer.compare import command
from tokenizer.compare.command import choose_names, compute_costs, measure_shared_part, measure_speeds
from tokenizer.report.measures import NamedText, measure_text

Toy = Callable[..., Any]
TEXTS = [NamedText("en", "en", ["the cat the", " hat"], True), NamedText("ko", "ko", ["한국"], True)]


def test_fewer_tokens_against_a_larger_head(toy: Toy) -> None:
    first, second = toy(), toy("the", "한국", special=("<|end|>",))
    # FLOPs per token grow with the vocabulary: a body of 1000 parameters, and a head of 4 per token
    head_ratio = (1000 + 4 * 259) / (1000 + 4 * 256)
    result = compute_costs([measure_text(second, t) for t in TEXTS], [measure_text(first, t) for t in TEXTS],
                           head_ratio)
    assert result["en"]["num_tokens"] == 15 - 2 * 2  # "the" twice is one token instead of three
    assert result["en"]["relative_tokens"] == pytest.approx(11 / 15)
    assert result["en"]["relative_flops"] == pytest.approx(11 / 15 * head_ratio)
    assert result["ko"]["relative_tokens"] == pytest.approx(1 / 6)


def test_names_are_shortened_while_unique() -> None:
    def open_named(path: str) -> Any:
        return SimpleNamespace(path=Path(path), name=Path(path).name)

    assert choose_names([open_named("a/x"), open_named("a/y")]) == ["x", "y"]
    assert choose_names([open_named("a/x"), open_named("b/x"), open_named("y")]) == ["a/x", "b/x", "y"]


def test_shared_tokens_are_those_of_the_same_bytes(toy: Toy) -> None:
    first, second = toy("the", "cat", special=("<x>",)), toy("cat", "hat", "rat", special=("<x>",))
    assert measure_shared_part(first, second) == 257 / 258
    assert measure_shared_part(second, first) == 257 / 259


def test_speed_is_the_best_round_of_each_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first round the machine is busy, and all encoding takes four times as long."""
    clock, order = SimpleNamespace(now_s=0.0), []
    monkeypatch.setattr(command, "time", SimpleNamespace(process_time=lambda: clock.now_s))

    def build_timed(name: str, s_per_chunk: float) -> Any:
        def encode(text: str) -> None:
            order.append(name)
            clock.now_s += s_per_chunk * (4 if len(order) <= 6 else 1)

        return SimpleNamespace(encode=encode)

    result = measure_speeds([build_timed("slow", 3.0), build_timed("fast", 1.0)], TEXTS)
    num_mb = 21 / 1e6
    assert result == pytest.approx([num_mb / 9, num_mb / 3])
    assert order == (["slow"] * 3 + ["fast"] * 3) * command.SPEED_ROUNDS


Build = Callable[..., Path]


def test_the_command_equals_plain_counting(build: Build, heldout: dict[str, Path], tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    plain, none = build("plain"), build("none", pairs=[])
    arguments = ["compare", str(plain), str(none), "--text", *(f"{n}={p}" for n, p in heldout.items())]
    assert main([*arguments, "--json", str(tmp_path / "out/c.json"), "--hidden-size", "64",
                 "--body-params", "1e5"]) == 0
    parsed = json.loads((tmp_path / "out/c.json").read_text())
    texts = [json.loads(line)["text"] for line in heldout["english"].read_text().splitlines()]
    counts, sizes = {}, {}
    for name, folder in (("plain", plain), ("none", none)):
        raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
        counts[name], sizes[name] = sum(len(raw.encode(t).ids) for t in texts), raw.get_vocab_size()
    assert counts["none"] == sum(len(t.encode()) for t in texts)  # bytes
    ratio = counts["none"] / counts["plain"]
    figures = parsed["tokenizers"]["none"]["texts"]["english"]
    assert figures["relative_tokens"] == pytest.approx(ratio) and figures["bytes_per_token"] == 1
    assert figures["relative_flops"] == pytest.approx(
        ratio * (1e5 + 64 * sizes["none"]) / (1e5 + 64 * sizes["plain"]))
    assert parsed["tokenizers"]["plain"]["texts"]["english"]["relative_flops"] == 1
    printed = capsys.readouterr().out
    assert "bytes per token" in printed and "english" in printed and "MB per CPU second" in printed


def test_mistakes_give_one_sentence_and_no_output(build: Build, heldout: dict[str, Path], tmp_path: Path,
                                                  get_refusal: Any) -> None:
    it, text, output = str(build()), ["--text", str(heldout["english"])], tmp_path / "new.json"
    mistakes = {"is the only tokenizer": [it, *text], "--text is missing": [it, it],
                "does not exist": [it, "none", *text],
                "--hidden-size 0: must be at least 1": [it, it, *text, "--hidden-size", "0"],
                "--max-text-mb 0: must be above 0": [it, it, *text, "--max-text-mb", "0"],
                "--body-params nan: must be a finite number": [it, it, *text, "--body-params", "nan"]}
    for sentence, arguments in mistakes.items():
        assert sentence in get_refusal("compare", *arguments, "--json", str(output))
    assert not output.exists()
