"""`megatron-sov eval media`: rows of input and output modality, and figures that agree with jiwer and with
counting."""

from pathlib import Path

import jiwer
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.commands.evaluate.eval_media import PAIRS, MediaRow, load_judge, read_media_rows
from megatron_sov.commands.evaluate.eval_media_run import compute_media_figures
from megatron_sov.eval.statistics import compute_wilson_interval

WORDS = [{"type": "text", "text": "Say it."}]


def test_pairs_of_modalities_equal_those_of_the_model_card() -> None:
    assert set(PAIRS) == {"image-text", "image-audio", "text-image", "text-audio", "audio-text",
                          "audio-image", "audio-audio"}


def test_error_rates_count_recognized_words() -> None:
    """Case and punctuation are ignored; rates are over all words and characters together."""
    rows = [MediaRow(WORDS, text, ("a", "b", "c", "d")) for text in ("Hello, world!", "yellow", "서울 시청")]
    transcripts = ["hello world", "yell oh", ""]
    figures = compute_media_figures(rows, transcripts)
    assert (figures["num_rows"], figures["accuracy"], figures["chance"]) == (3, 1 / 3, 0.25)
    assert figures["accuracy_interval"] == list(compute_wilson_interval(1, 3))
    assert figures["wer"] == jiwer.wer(["hello world", "yellow", "서울 시청"], ["hello world", "yell oh", ""])
    assert figures["wer"] == (0 + 2 + 2) / 5
    assert figures["cer"] == pytest.approx((0 + 2 + 5) / (11 + 6 + 5))
    assert "chance" not in compute_media_figures([MediaRow(WORDS, "a")], ["a"])


@pytest.mark.each(("line", "message"), [
    ("{", ":1: is not "), ('{"content": [], "answer": "a"}', ":1: is not a"), ("", "has no rows"),
    ('{"content": [{"type": "text"}], "answer": ""}', ":1: is not a valid row"), ("[1]", ":1: "),
    ('{"content": [{"type": "text"}], "answer": "a", "labels": "b"}', ":1: is not a valid row")])
def test_bad_rows_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(line)
    with pytest.raises(UserError, match=message):
        read_media_rows(file)
    file.write_text('\n{"content": [{"type": "text", "text": "a"}], "answer": "b", "labels": ["b", "c"]}\n')
    assert read_media_rows(file) == [MediaRow([{"type": "text", "text": "a"}], "b", ("b", "c"))]


FILES, LABELS = [Path("one.png"), Path("two.png")], [("a", "b"), ()]


def test_a_function_of_a_file_judges(tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text("def seen(files, labels):\n"
                    "    return [f'{file.stem} of {len(of)}' for file, of in zip(files, labels)]\n")
    assert load_judge(f"{code}:seen")(FILES, LABELS) == ["one of 2", "two of 0"]


@pytest.mark.each(("code", "message"), [
    ("def seen(files, labels):\n    return ['a']\n", "returned .* for 2 files"),
    ("def seen(files, labels):\n    return [1, 2]\n", "returned .* for 2 files"),
    ("seen = 3\n", "a judge is a function")])
def test_an_invalid_judge_is_refused(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UserError, match=message):
        load_judge(f"{tmp_path / 'mine.py'}:seen")(FILES, LABELS)


@pytest.mark.each("judge", ["", "python3 judge.py", "judge.py", "mine.txt:seen"])
def test_a_judge_is_a_function(judge: str) -> None:
    with pytest.raises(UserError, match=r"must have the form FILE\.py:NAME"):
        load_judge(judge)
