"""Rows that a killed command has left are of what they were asked for with."""

from __future__ import annotations

from pathlib import Path

from megatron_sov.rewards.journal import num_kept, opened


def test_rows_are_kept_for_the_same_options_and_no_others(tmp_path: Path) -> None:
    out, asked = tmp_path / "rows.jsonl", {"stop": ("\n",), "sampling": {"top_p": 1.0}}
    with opened(out, asked) as kept:
        kept.add([b"{}\n", b"{}\n", b"{"])
    assert num_kept(out, asked) == 2
    with opened(out, asked) as kept:
        assert kept.num_done == 2
    assert num_kept(out, {**asked, "stop": ()}) == 0
    with opened(out, {**asked, "stop": ()}) as kept:
        assert kept.num_done == 0
