"""A ladder's file that somebody has changed is told as damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.errors import UserError
from megatron_sov.ladder.results import FILE, read

SOUND = {"name": "50K", "predicted": {"loss": 1.0}, "made_s": 3.0}


@pytest.mark.parametrize("predictions", [5, [5], {"a": 1}, ["50K"], [{"name": "50K"}],
                                         [{**SOUND, "made_s": "soon"}], [{**SOUND, "made_s": None}]])
def test_predictions_of_another_kind_are_refused(predictions: Any, tmp_path: Path) -> None:
    file = tmp_path / FILE
    file.write_text(json.dumps({"format_version": 1, "predictions": predictions}))
    with pytest.raises(UserError, match=r"ladder\.json: is damaged .*; delete it"):
        read(tmp_path)
    file.write_text(json.dumps({"format_version": 1, "predictions": [SOUND]}))
    assert read(tmp_path)["predictions"] == [SOUND]
