"""Workers: results in the order of the input, and a worker that is ended from outside is said."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from data_prep.encode import EncodingSettings
from data_prep.units import UnitSettings
from data_prep.workers import encode_units
from megatron_sov.documents import Reading, plan_units
from megatron_sov.errors import UserError


def worker_processes() -> list[psutil.Process]:
    """Return the encoding processes, without the tracker that Python starts beside them."""
    return [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


def test_order_is_the_inputs_and_an_ended_worker_is_said(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    for i in range(12):  # the first ones are the largest, so they end last
        (tmp_path / f"{i:02}.jsonl").write_text("\n".join(json.dumps({"text": f"{i} {k}"})
                                                          for k in range(2000 - 160 * i)))
    units = list(plan_units(sorted(tmp_path.glob("*.jsonl")), 1))
    settings = UnitSettings(tokenizers["solar-open"], "a", "b", "uint16", Reading("text"), EncodingSettings())
    records = encode_units(units, settings, tmp_path / "work", 2)
    first = next(records)
    workers = worker_processes()
    assert [first.num_sequences, *(r.num_sequences for r in records)] == [2000 - 160 * i for i in range(12)]
    assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=600)[1]
    records = encode_units(units, settings, tmp_path / "other", 2)
    next(records)
    worker_processes()[-1].kill()
    with pytest.raises(UserError, match="run the same command again"):
        list(records)
