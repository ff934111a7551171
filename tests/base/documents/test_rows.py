"""Rows of a file: what each must have, or any objects."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.base.documents.rows import check_rows, read_rows
from megatron_sov.base.errors import UserError


def test_rows_may_be_any_objects(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"answer": "4"}\n\n{}\n')
    assert check_rows(file, "--tests", "") == 2
    assert list(read_rows(file, "--tests", "")) == [(1, {"answer": "4"}), (3, {})]
    with pytest.raises(UserError, match="line 1: has no 'prompt'"):
        check_rows(file, "--tests", "prompt")
    file.write_text("[]\n")
    with pytest.raises(UserError, match="line 1: is no JSON object, but a list"):
        check_rows(file, "--tests", "")
    file.write_text("\n")
    with pytest.raises(UserError, match=r"has no rows; each line is a JSON object$"):
        check_rows(file, "--tests", "")
