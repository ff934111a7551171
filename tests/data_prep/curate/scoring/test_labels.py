"""Labels: what is read, what is refused, and how they are cut."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep.curate.scoring.labels import Kind, Label, read_labels, refuse_one_class, split
from megatron_sov.base.errors import UserError

TEXT = '{"text": "a text", "label": %s}\n'


@pytest.mark.parametrize(("kind", "line", "said"), [
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
def test_a_wrong_line_is_told_with_its_place(tmp_path: Path, kind: Kind, line: str, said: str) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(TEXT % "1" + line)
    with pytest.raises(UserError) as found:
        read_labels(file, kind, 100)
    assert f"{file}:2: {said}" in str(found.value)


def test_all_wrong_lines_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(TEXT % "7" * 3)
    with pytest.raises(UserError, match="3 bad rows; correct or remove these lines") as found:
        read_labels(file, "regressor", 100)
    assert f"{file}:1, {file}:2, {file}:3: label = 7" in str(found.value)
    file.write_text(TEXT % "7" * 1000)
    with pytest.raises(UserError, match="1,000 bad rows"):
        read_labels(file, "regressor", 100)


def test_a_text_is_read_once_and_cut(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text('{"text": "abcd", "label": 1}\n{"text": "abce", "label": 0}\n\n'
                    '{"text": "x", "label": 0}\n')
    assert read_labels(file, "classifier", 3) == ([Label("abc", 1.0, ""), Label("x", 0.0, "")], 1)


@pytest.mark.parametrize(("kind", "given", "said"), [
    ("classifier", [1] * 60, "0 of 60 texts have label 0; a classifier needs at least 10 of each"),
    ("classifier", [1] * 9 + [0] * 60, "9 of 69 texts have label 1"),
    ("regressor", [3] * 60, "all 60 labels are 3; a regressor needs texts with different ones"),
])
def test_labels_that_teach_nothing_are_refused(
        tmp_path: Path, kind: Kind, given: list[int], said: str) -> None:
    labels = [Label(f"text {i}", float(label), "") for i, label in enumerate(given)]
    with pytest.raises(UserError) as found:
        refuse_one_class(tmp_path / "labels.jsonl", labels, kind)
    assert said in str(found.value)


def test_labels_are_cut_by_their_texts_within_each_class() -> None:
    labels = [Label(f"text {i}", float(i % 4 == 0), "") for i in range(200)]
    parts = split(labels)
    cut = (parts.fit, parts.calibration, parts.heldout)
    assert [Counter(item.label for item in part) for part in cut] == [
        {0.0: 120, 1.0: 40}, {0.0: 15, 1.0: 5}, {0.0: 15, 1.0: 5}]
    backwards = split(labels[::-1])
    assert backwards == parts
    without_one: dict[str, Any] = {item.text: item for item in labels[1:]}
    moved = {item.text for item in parts.heldout} ^ {item.text for item in split(
        list(without_one.values())).heldout}
    assert len(moved) <= 2
