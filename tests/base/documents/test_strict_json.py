"""JSON as files of rows have it, and what differs between two trees of values."""

from __future__ import annotations

from megatron_sov.base.documents.rows import changed_values


def test_changed_values_are_named_by_their_place() -> None:
    before = {"settings": {"min_score": 0.5, "keep": ["ko"]}, "version": 1, "old": 1}
    now = {"settings": {"min_score": 0.6, "keep": ["ko"]}, "version": 1}
    assert list(changed_values(before, now)) == [("settings.min_score", "0.5", "0.6"), ("old", "1", "null")]
