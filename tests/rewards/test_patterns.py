"""A pattern that explodes over a response ends after a moment, named."""

from __future__ import annotations

import time

import pytest

from megatron_sov.rewards import patterns


def test_a_catastrophic_pattern_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "TIME_LIMIT_S", 0.2)
    begin_s = time.process_time()
    with pytest.raises(TimeoutError, match=r"the pattern '\(x\+x\+\)\+y' takes longer than 0.2 s"):
        patterns.search(r"(x+x+)+y", "x" * 10_000)
    assert time.process_time() - begin_s < 5


def test_patterns_match_as_the_standard_library_has_it() -> None:
    assert patterns.search(r"b+", "abbc")[0] == "bb"
    assert patterns.fullmatch(r"b+", "abbc") is None
    assert patterns.findall(r"(\w)=(\d)", "a=1 b=2") == [("a", "1"), ("b", "2")]
    assert patterns.problem("(") != ""
    assert patterns.problem(r"\d+") == ""
