"""Label files: accepted and refused lines, and the n-gram features of their texts."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from data_prep.curate.scoring.labels import Kind, Label, check_label_variety, read_labels, split_labels
from data_prep.curate.scoring.ngrams import Ngrams, NgramSettings
from megatron_sov.base.errors import UserError
from tests.typed_words import keys_of

TEXT = '{"text": "a text", "label": %s}\n'


@pytest.mark.parametrize(("kind", "line", "message"), [
    ("classifier", TEXT % "2", "label = 2 must be 0 or 1 (a scale from 0 to 5 is for --kind regressor)"),
    ("classifier", TEXT % "true", "label = True must be a number"),
    ("regressor", TEXT % "NaN", "label = nan must be a number"),
    ("regressor", TEXT % ("9" * 400), "label = " + "9" * 40 + " must be from 0 to 5"),
    ("regressor", TEXT % "5.5", "label = 5.5 must be from 0 to 5"),
    ("regressor", '{"text": "a"}\n', "has no field 'label'"),
    ("regressor", '{"text": " ", "label": 1}\n', "text = ' ' must be a text that is not empty"),
    ("regressor", '{"text": "a", "label": 1, "language": "\\u001b[31m"}\n',
     "language = '\\x1b[31m' must be a code"),
    ("regressor", '{"text": "a", "label"\n', "is not valid JSON"),
])
def test_a_malformed_line_is_reported_with_its_number(tmp_path: Path, kind: Kind, line: str,
                                                      message: str) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(TEXT % "1" + line)
    with pytest.raises(UserError) as error:
        read_labels(file, kind, 100)
    assert f"{file}:2: {message}" in str(error.value)


def test_all_wrong_lines_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(TEXT % "7" * 3)
    with pytest.raises(UserError, match="3 bad rows; correct or remove these lines") as error:
        read_labels(file, "regressor", 100)
    assert f"{file}:1, {file}:2, {file}:3: label = 7" in str(error.value)
    file.write_text(TEXT % "7" * 1000)
    with pytest.raises(UserError, match="1,000 bad rows"):
        read_labels(file, "regressor", 100)


def test_texts_are_truncated_and_counted_once(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text('{"text": "abcd", "label": 1}\n{"text": "abce", "label": 0}\n\n'
                    '{"text": "x", "label": 0}\n')
    assert read_labels(file, "classifier", 3) == ([Label("abc", 1.0, ""), Label("x", 0.0, "")], 1)


@pytest.mark.parametrize(("kind", "values", "message"), [
    ("classifier", [1] * 60, "0 of 60 texts have label 0; a classifier needs at least 10 of each"),
    ("classifier", [1] * 9 + [0] * 60, "9 of 69 texts have label 1"),
    ("regressor", [3] * 60, "all 60 labels are 3; a regressor needs texts with different ones"),
])
def test_labels_that_teach_nothing_are_refused(
        tmp_path: Path, kind: Kind, values: list[int], message: str) -> None:
    labels = [Label(f"text {i}", float(value), "") for i, value in enumerate(values)]
    with pytest.raises(UserError) as error:
        check_label_variety(tmp_path / "labels.jsonl", labels, kind)
    assert message in str(error.value)


def test_labels_are_split_by_text_within_each_class() -> None:
    labels = [Label(f"text {i}", float(i % 4 == 0), "") for i in range(200)]
    split = split_labels(labels)
    # 80 %, 10 % and 10 % of 150 and of 50 texts
    counts = [Counter(label.label for label in part)
              for part in (split.fit, split.calibration, split.heldout)]
    assert counts == [{0.0: 120, 1.0: 40}, {0.0: 15, 1.0: 5}, {0.0: 15, 1.0: 5}]
    assert split_labels(labels[::-1]) == split
    # without one text, the others stay in their parts, except for rounding
    without_one = split_labels(labels[1:])
    moved = {label.text for label in split.heldout} ^ {label.text for label in without_one.heldout}
    assert len(moved) <= 2


BUCKETS = 1 << 10
NGRAMS = {n: Ngrams(NgramSettings(num_buckets=BUCKETS, max_ngram=n)) for n in (1, 2, 3)}
TEXTS = ["Hello, World! hello WORLD hello_2", "안녕하세요 세계", "ประเทศไทย", "日本語のテキスト。",
         "𠀀𠀁 😀 x\u0301", "", " \n\t\0", "ﬁ İstanbul Straße",
         "\ue000\ufffd\u200d\x85", "a" * 5000, "ab " * 300]


@pytest.mark.parametrize(("text", "units"), [
    ("Don't panic, R2-D2!", ["don", "'", "t", "panic", ",", "r2", "-", "d2", "!"]),
    ("한국어 문장", ["한", "국", "어", "문", "장"]),
    ("ไทยกำ", ["ไ", "ท", "ย", "ก", "ำ"]),
    ("Python의 길", ["python", "의", "길"]),
    ("x\u0301y  \n z", ["x\u0301y", "z"]),
    ("\u200b ", ["\u200b"]),
    ("a\ud800b", ["a", "b"]),
    ("", []),
])
def test_a_text_is_cut_into_units(text: str, units: list[str]) -> None:
    assert NGRAMS[1].split_text(text) == units


def compute_scikit_learn_rows(ngrams: Ngrams, texts: list[str]) -> np.ndarray:
    """Return dense rows of features from the same units, with scikit-learn's hashing, counting and
    scaling."""
    joined = [" ".join(ngrams.split_text(text)) for text in texts]
    hashing = HashingVectorizer(analyzer="word", token_pattern=r"[^ ]+", lowercase=False, norm=None,
                                ngram_range=(1, ngrams.settings.max_ngram), alternate_sign=False,
                                n_features=ngrams.settings.num_buckets)
    rows = TfidfTransformer(use_idf=False, sublinear_tf=True).fit_transform(hashing.transform(joined))
    return np.asarray(rows.toarray())


def check_rows(ngrams: Ngrams, texts: list[str]) -> None:
    np.testing.assert_allclose(ngrams.compute_rows(texts).toarray(), compute_scikit_learn_rows(ngrams, texts),
                               atol=1e-6)


@pytest.mark.parametrize("max_ngram", NGRAMS)
def test_rows_equal_scikit_learn(max_ngram: int) -> None:
    check_rows(NGRAMS[max_ngram], TEXTS)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_rows_of_any_text_equal_scikit_learn(text: str) -> None:
    check_rows(NGRAMS[2], [text])


def test_a_text_is_read_to_max_chars() -> None:
    ngrams = Ngrams(NgramSettings(num_buckets=BUCKETS, max_chars=5))
    assert ngrams.split_text("ab cd ef") == ["ab", "cd"]


@pytest.mark.parametrize("settings", [
    {"num_buckets": 1000}, {"num_buckets": 1 << 40}, {"max_ngram": 0}, {"max_chars": 0}])
def test_invalid_settings_are_reported(settings: dict[str, int]) -> None:
    assert keys_of(NgramSettings(**settings)) == [*settings]
    assert keys_of(NgramSettings()) == []
