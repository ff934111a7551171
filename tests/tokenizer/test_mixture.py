"""Inputs, groups and weights: how much of each text a tokenizer is trained on."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from megatron_sov.base.documents import Document, Message
from megatron_sov.base.errors import UserError
from tokenizer.mixture import (
    MIXTURES, NUM_BUCKETS, PIECE_BYTES, CountUnit, GroupShare, GroupSizes, SourceGroup, choose_share,
    compute_repeats, count_share_bytes, gather_groups, iter_pieces, measure_groups, parse_input,
    plan_count_units)


def build_sizes(buckets: dict[int, int]) -> GroupSizes:
    """Return the sizes of a group from bucket -> bytes, with one document per bucket."""
    row = np.zeros(NUM_BUCKETS, np.int64)
    row[list(buckets)] = list(buckets.values())
    return GroupSizes(len(buckets), int(row.sum()), row)


def test_input_arguments(tmp_path: Path) -> None:
    assert parse_input("a/b.txt") == SourceGroup("a/b.txt", (Path("a/b.txt"),))
    assert parse_input("a/b.txt:2.5") == SourceGroup("a/b.txt", (Path("a/b.txt"),), 2.5)
    assert parse_input("ko=a/b.txt:2") == SourceGroup("ko", (Path("a/b.txt"),), 2)
    # no number after the colon: a path
    assert parse_input("C:stuff") == SourceGroup("C:stuff", (Path("C:stuff"),))
    for name in ("x:2", "k=v"):
        (tmp_path / name).write_text("a name with a colon or an equals sign")
        assert parse_input(f"{tmp_path}/{name}") == SourceGroup(f"{tmp_path}/{name}", (tmp_path / name,))
    assert parse_input(f"n={tmp_path}/x:2") == SourceGroup("n", (tmp_path / "x:2",))
    for bad in ("a:0", "a:-1", "a:nan", "a:inf"):
        with pytest.raises(UserError, match="must be a positive number"):
            parse_input(bad)
    for bad in ("", ":2", "en=:2"):
        with pytest.raises(UserError, match="names no file or folder"):
            parse_input(bad)


def test_inputs_with_equal_names_form_one_group_in_any_order() -> None:
    groups = gather_groups(["ko=b:3", "en=a:1", "ko=c"], None)
    assert groups == [SourceGroup("en", (Path("a"),), 1), SourceGroup("ko", (Path("b"), Path("c")), 3)]
    assert [g.name for g in gather_groups(["ko=c", "ko=b:3", "en=a:1"], None)] == ["en", "ko"]


@pytest.mark.each(("inputs", "mixture", "message"), [
    (["en=a:1", "en=b:2"], None, "the group en has weight 1 already"),
    (["a", "a"], None, "is given twice"),
    (["en=a"], "solar", "--mixture 'solar': does not exist; did you mean 'solar-open'"),
    (["en=a", "fr=b"], "k-exaone", "has no group 'fr'"),
    (["en=a:2", "ko=b", "multi=c"], "k-exaone", "but --mixture k-exaone gives the weights"),
    (["en=a", "ko=b"], "k-exaone", "has a group 'multi' that no input belongs to"),
])
def test_weights_that_contradict_are_refused(inputs: list[str], mixture: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        gather_groups(inputs, mixture)


def test_published_mixtures() -> None:
    assert {g.name: g.weight for g in gather_groups(["en=a", "ko=b", "multi=c"], "k-exaone")} == {
        "en": 2, "ko": 3, "multi": 1}
    assert MIXTURES["solar-open"] == {"en": 40, "ko": 22, "code": 12, "math": 10, "multi": 8, "domain": 4}


def test_weighted_groups_share_bytes_and_others_are_unchanged() -> None:
    groups = [SourceGroup("a", (), 3), SourceGroup("b", (), 1), SourceGroup("c", ())]
    sizes = [build_sizes({0: n}) for n in (100, 300, 50)]
    # a and b together keep their 400 bytes: 300 of a, 100 of b
    assert compute_repeats(groups, sizes) == [300 / 100, 100 / 300, 1.0]


@given(st.dictionaries(st.integers(0, NUM_BUCKETS - 1), st.integers(1, 20_000), min_size=1, max_size=50),
       st.floats(0.001, 5))
def test_a_share_comes_nearest_and_is_never_empty(buckets: dict[int, int], factor: float) -> None:
    sizes = build_sizes(buckets)
    share = choose_share(sizes, factor)
    assert sum(share.count_passes(b) * n for b, n in buckets.items()) == count_share_bytes(sizes, share) > 0
    assert abs(count_share_bytes(sizes, share) - factor * sizes.num_bytes) <= max(buckets.values())


def test_a_smaller_share_is_a_part_of_a_larger_one() -> None:
    sizes = build_sizes(dict.fromkeys(range(0, NUM_BUCKETS, 64), 100))
    assert [choose_share(sizes, f) for f in (0.25, 0.5, 1, 2.5)] == [
        GroupShare(0, 16321), GroupShare(0, 32705), GroupShare(1, 0), GroupShare(2, 32705)]


def test_pieces_are_cut_at_blank_lines_and_chosen_by_their_content() -> None:
    text = "".join(f"paragraph {i} with words\n\n" for i in range(4000))
    result = list(iter_pieces(Document("x", text)))
    assert "".join(p.text for p in result) == text
    assert all(len(p.raw) <= PIECE_BYTES for p in result)
    assert all(p.text.endswith("\n\n") for p in result)
    buckets = [p.bucket for p in result]
    assert 0 < min(buckets) < NUM_BUCKETS // 4 and NUM_BUCKETS * 3 // 4 < max(buckets) < NUM_BUCKETS
    assert [p.bucket for p in iter_pieces(Document("elsewhere", text))] == buckets
    chat = Document("x", messages=(Message("user", "가"), Message("assistant", "b")))
    assert [p.text for p in iter_pieces(chat)] == ["가", "b"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with three files of two documents, each of seven bytes."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jsonl").write_text("\n".join(json.dumps({"text": f"가 {i} {k}"[:6]})
                                                     for k in range(2)))
    return folder


def test_every_file_belongs_to_a_unit_of_its_group(corpus: Path) -> None:
    units = plan_count_units([SourceGroup("a", (corpus,)), SourceGroup("b", (corpus / "1.jsonl",))], 1)
    assert [(u.group, u.spans[0].file.name) for u in units] == [(0, "0.jsonl"), (0, "1.jsonl"),
                                                                (0, "2.jsonl"), (1, "1.jsonl")]
    assert [u.group for u in plan_count_units([SourceGroup("a", (corpus,))], 1 << 20)] == [0]


def test_cache_key_covers_file_and_settings(corpus: Path) -> None:
    [unit] = plan_count_units([SourceGroup("a", (corpus / "0.jsonl",))], 1)
    key = unit.build_key({"pattern": "a"})
    assert unit.build_key({"pattern": "a"}) == key != unit.build_key({"pattern": "b"})
    (corpus / "0.jsonl").write_text((corpus / "0.jsonl").read_text())
    assert unit.build_key({"pattern": "a"}) != key
    (corpus / "0.jsonl").unlink()
    with pytest.raises(UserError, match=r"0\.jsonl: cannot be read"):
        unit.build_key({})


def test_sizes_of_groups_are_measured_once(corpus: Path, tmp_path: Path) -> None:
    groups = [SourceGroup("g", (corpus,)), SourceGroup("h", (corpus / "0.jsonl",))]
    (tmp_path / "work").mkdir()

    def measure(units: list[CountUnit]) -> list[int]:
        """Return per group the number of documents, the bytes, and the sum of the buckets' bytes."""
        read_bytes: list[int] = []
        result = measure_groups(groups, units, tmp_path / "work", 1, read_bytes.append)
        assert sum(read_bytes) == sum(f.stat().st_size for f in [*corpus.iterdir(), corpus / "0.jsonl"])
        return [n for s in result for n in (s.num_documents, s.num_bytes, int(s.bucket_bytes.sum()))]

    first = measure(plan_count_units(groups, 1))
    assert first == [6, 42, 42, 2, 14, 14]
    assert measure(plan_count_units(groups, 1)) == first  # read from the work folder
    (corpus / "0.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"--input h: .*0\.jsonl holds no text"):
        measure(plan_count_units(groups, 1))
