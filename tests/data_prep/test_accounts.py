"""`sov-data pack` counts each record as written, or as set aside for a reason."""

from pathlib import Path

import pytest

from data_prep.shards.assemble import EncodedSource
from data_prep.shards.pack_run import account_source
from data_prep.shards.units import UnitRecord
from megatron_sov.base.documents.accounting import RecordAccount


def test_lost_record_stops_the_command() -> None:
    source = EncodedSource("web", "text", Path("web"), [((), UnitRecord("key", 2, 9, (3,), {}, num_read=3))])
    with pytest.raises(RuntimeError, match="does not add up: 3 records read: 2 written, 0 set aside"):
        account_source(source, {"": 2}, {})
    assert account_source(source, {"": 2}, {"json": 1}) == RecordAccount(3, 2, {"json": 1})
