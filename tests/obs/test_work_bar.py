"""The bar of long work: on a terminal, once it takes longer than a moment."""

from __future__ import annotations

import io

import pytest

from megatron_sov.obs import work_bar
from megatron_sov.obs.work_bar import work_bar as bar_of


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("delay_s", "shows", "screen", "seen"), [
    (0.0, True, Screen(), True), (60.0, True, Screen(), False), (0.0, False, Screen(), False),
    (0.0, True, io.StringIO(), False)], ids=["terminal", "a moment", "another process", "log file"])
def test_who_looks_on_sees_how_far_it_is(delay_s: float, shows: bool, screen: io.StringIO, seen: bool,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_bar, "BEGINS_AFTER_S", delay_s)
    monkeypatch.setattr("sys.stderr", screen)
    with bar_of("hashing", 2_000_000, "B", shows) as bar:
        bar.update(2_000_000)
    assert ("hashing: 100%" in screen.getvalue() and "2.00M/2.00M" in screen.getvalue()) == seen
