"""Columns that an objective requires of its data in addition to weights and token types."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.train.data.requirements import NeededColumn, check_columns


def test_data_without_a_required_column_name_the_command_that_adds_it(make_source: Any) -> None:
    scored = make_source("scored", [5])
    text, chat = (replace(make_source(n, [5], is_chat=n == "chat"), columns=(), train_documents=None)
                  for n in ("text", "chat"))
    check_columns([scored], {"score": NeededColumn("sov-data pack --column score")})
    check_columns([scored, text], {"score": NeededColumn("", formats=("chat",))})
    with pytest.raises(UserError, match="sov-data pack --column score"):
        check_columns([scored, chat],
                               {"score": NeededColumn("sov-data pack --column score", formats=("chat",))})
    with pytest.raises(UserError, match=r"column 'advantage' \(columns: score\)"):
        check_columns([scored], {"advantage": NeededColumn("")})
