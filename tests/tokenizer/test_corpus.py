"""Inputs and weights: how much of each text a tokenizer sees."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sov.errors import UserError
from tokenizer.corpus import SAMPLE_BYTES, TextInput, count_bytes, parse_input, repeats, resampled, sample, training_text


def test_input_arguments(tmp_path: Path) -> None:
    assert parse_input("a/b.txt") == TextInput(Path("a/b.txt"))
    assert parse_input("a/b.txt:2.5") == TextInput(Path("a/b.txt"), 2.5)
    assert parse_input("C:stuff") == TextInput(Path("C:stuff"))
    (tmp_path / "x:2").write_text("a name with a colon")
    assert parse_input(f"{tmp_path}/x:2") == TextInput(tmp_path / "x:2")
    for bad in ("a:0", "a:-1", "a:nan", "a:inf"):
        with pytest.raises(UserError, match="must be a positive number"):
            parse_input(bad)


def test_weighted_inputs_share_their_bytes_and_others_stay() -> None:
    sources = [TextInput(Path("a"), 3), TextInput(Path("b"), 1), TextInput(Path("c"))]
    factors = repeats(sources, [100, 300, 50])
    assert factors == [3.0, 100 / 300, 1.0]
    assert sum(f * n for f, n in zip(factors, [100, 300, 50], strict=True)) == 450


@given(st.lists(st.text(alphabet="a가", min_size=1, max_size=30), max_size=40, unique=True), st.floats(0.05, 5))
def test_resampling_follows_the_factor_all_along(texts: list[str], factor: float) -> None:
    out = list(resampled(iter(texts), factor))
    size_bytes = sum(len(t.encode()) for t in texts)
    assert abs(sum(len(t.encode()) for t in out) - factor * size_bytes) <= max([len(t.encode()) for t in texts], default=0)
    assert [texts.index(t) for t in dict.fromkeys(out)] == sorted(texts.index(t) for t in dict.fromkeys(out))


def test_once_is_unchanged() -> None:
    texts = ["a", "bbbb", "cc", "d" * 100]
    assert list(resampled(iter(texts), 1.0)) == texts


def test_text_comes_in_chunks_and_progress_counts_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("paragraph\n\n" * 5000)
    source, told = TextInput(tmp_path / "a.txt"), []
    found = list(training_text([source], [2.0], told.append))
    assert all(len(t) <= 20_000 for t in found) and sum(map(len, found)) == sum(told) == 110_000
    assert count_bytes(source) == 55_000


def test_a_sample_is_spread_over_the_input(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"{i:09d}\n" * 2000 for i in range(200)))
    source = TextInput(tmp_path / "a.txt")
    found = sample(source, count_bytes(source))
    assert abs(sum(map(len, found)) - SAMPLE_BYTES) <= 20_000
    firsts = [int(t[:9]) for t in found]
    assert min(firsts) < 10 and max(firsts) > 190


def test_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(UserError, match="holds no text"):
        count_bytes(TextInput(tmp_path / "a.txt"))
