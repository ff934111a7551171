"""Tables: first publisher wins, added columns, damage, deletable folders."""

from pathlib import Path

import pyarrow as pa
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.work.tables.table import Table, TablePart, delete_folders

WORDS = pa.schema([pa.field("word", pa.string(), nullable=False)])
LENGTHS = pa.schema([pa.field("length", pa.int32(), nullable=False)])


class Words(Table[TablePart]):
    """Words of files, and how long they are."""

    NOUN, HEAD, ROWS, ADDED, VERSION, CLAIM = "word table", "words.json", "words", "lengths", "by", "length"
    FIRST, EXAMPLE, CREATE_HINT, PART = "file", "7", "make one", TablePart
    IDENTITY, REPEATED, SPLIT = {"language": str}, ("word",), ()

    @staticmethod
    def key_of(name: str) -> tuple[int, ...] | None:
        return (int(name),) if name.isdigit() else None

    @staticmethod
    def tell(identity: object) -> str:
        return f"language {identity}"


def build_table(*given: str) -> pa.Table:
    return pa.table({"word": pa.array(given)}, WORDS)


def test_rows_and_added_columns_of_table(tmp_path: Path) -> None:
    table = Words.create(tmp_path / "words", "ko")
    assert table.publish("10", "", build_table("a", "bc"), {"job": 1}) and table.publish("2", "",
                                                                                         build_table("d"), {})
    assert not table.publish("2", "", build_table("other"), {})  # the first one stays
    lengths = pa.table({"length": pa.array([1, 2], pa.int32())}, LENGTHS)
    assert table.publish("10", "counter-v1", lengths, {})
    assert [part.name for part in Words.open(table.path).parts()] == ["2", "10"]
    assert table.read(table.part("10"), WORDS)["word"].to_pylist() == ["a", "bc"]
    assert table.read(table.part("2"), WORDS)["word"].to_pylist() == ["d"]
    assert table.read(table.part("10", "counter-v1"), LENGTHS)["length"].to_pylist() == [1, 2]
    assert table.has_part("10", "counter-v1") and not table.has_part("2", "counter-v1")
    with pytest.raises(UserError, match="whose first 12 characters are those of 'counter-v1-xb'"):
        Words(table.path, {"language": "ko"}).publish("7", "counter-v1-xa", lengths, {})
        table.part("7", "counter-v1-xb")
    with pytest.raises(UserError, match="choose another store"):
        Words.create(table.path, "en")

    file = table.part("10").file
    file.write_bytes(file.read_bytes()[:-5] + b"x" + file.read_bytes()[-4:])
    with pytest.raises(UserError, match=r"words\.parquet: its content differs"):
        table.read(table.part("10"), WORDS)
    (table.claims / table.claim_name("2")).mkdir()
    assert [item.why for item in table.clearable(firsts=[10])] == [
        "of file 10", "of file 10", "what it claims is done"]
    delete_folders(table.clearable(["counter-v1"], firsts=[10]))
    assert [part.name for part in table.parts()] == ["2"] and not list(table.claims.iterdir())
