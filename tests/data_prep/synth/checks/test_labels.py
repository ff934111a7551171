"""Agreement with people, beside scikit-learn's and by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, cohen_kappa_score, confusion_matrix

from data_prep.synth.checks.labels import ALL_CHECKS, LabelComparison, Labels, gate_of, read_labels
from data_prep.synth.generator import SampleVerdict
from megatron_sov.base.errors import UserError


def compared(pairs: list[tuple[bool, bool]]) -> LabelComparison:
    """Return a comparison of what people and the judge say of samples 0, 1, ..."""
    found = LabelComparison(Labels({str(i): good for i, (good, _) in enumerate(pairs)}, {}))
    for i, (_, passed) in enumerate(pairs):
        found.add(str(i), "", [SampleVerdict("length", True), SampleVerdict("judge: sound", passed)])
    return found


def test_agreement_is_that_of_scikit_learn() -> None:
    draw = random.Random(1)
    pairs = [(draw.random() < 0.6, draw.random() < 0.5) for _ in range(200)]
    good, passed = zip(*pairs, strict=True)
    checks, judge = compared(pairs).agreements()
    (_, false_kept), (false_rejected, _) = confusion_matrix(good, passed)
    for found, who in ((checks, ALL_CHECKS), (judge, "judge: sound")):
        assert found.who == who and found.num_samples == 200
        assert found.num_agreed / 200 == accuracy_score(good, passed)
        assert found.kappa == pytest.approx(cohen_kappa_score(good, passed))
        assert (found.num_false_kept, found.num_false_rejected) == (false_kept, false_rejected)


def test_kappa_is_undefined_where_all_say_one_thing_and_fails_a_gate() -> None:
    assert compared([(True, True)] * 5).agreements()[0].kappa is None
    # 0.75 agreed, 0.5 by chance
    some = compared([(True, True), (True, False), (False, False), (False, False)])
    assert some.agreements()[0].kappa == 0.5
    one = compared([(True, True), (False, False)])
    one.add("0", "", [SampleVerdict("judge: polite", True)])
    assert gate_of(one.agreements()).who == "judge: polite", "the worst judge decides, an undefined one above"


def test_labels_know_samples_by_id_and_by_text(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text('{"id": "i0/1", "good": true}\n\n{"text": " A tide. ", "good": false, "by": "Kim"}\n')
    labels = read_labels(file)
    assert labels.of("i0/1", "A tide.") is True and labels.of("x", "A tide.\n") is False
    assert labels.of("x", "") is None
    with pytest.raises(UserError, match="none of 2 labels is that of a sample"):
        LabelComparison(labels).agreements()


@pytest.mark.parametrize(("lines", "said"), [
    ([], "has no lines"), ([{"id": "a"}], "must have `good`"), ([{"good": True}], "either `id` or `text`"),
    ([{"id": "a", "text": "b", "good": True}], "either `id` or `text`"), ([{"id": 3, "good": True}], "`id`"),
    ([{"id": "a", "good": "yes"}], "true or false"),
    ([{"id": "a", "good": True}, {"id": "a", "good": False}], "l.jsonl:2: calls 'a' bad, another line the")])
def test_bad_labels_are_told_by_line(tmp_path: Path, lines: list[object], said: str) -> None:
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=said):
        read_labels(tmp_path / "l.jsonl")
