"""Files with a checksum in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import (
    check_seal, read_json, seal_damage, seal_file, seal_of, write_json, write_sealed)


def test_a_sealed_file_is_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "numbers.f32"
    assert "cannot be read (No such file or directory)" in str(seal_damage(file))
    for content in (b"", b"1234", bytes(range(256)) * 9):
        write_sealed(file, content)
        whole = file.read_bytes()
        assert seal_damage(file) is None and whole.startswith(content)
        for damaged in (*(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:]
                          for place in {0, len(content) // 2, len(whole) - 1}), whole[:-1], whole + b"x"):
            file.write_bytes(damaged)
            assert "is damaged (it " in str(seal_damage(file))


def test_a_sound_file_of_something_else_is_none_of_this(tmp_path: Path) -> None:
    file = tmp_path / "numbers.f32"
    write_sealed(file, b"1234", "round 1")
    assert seal_damage(file, "round 1") is None
    for other in ("round 2", ""):
        assert "differs from its own checksum" in str(seal_damage(file, other))
    write_json(tmp_path / "a.json", {"a": 1}, "here")
    assert read_json(tmp_path / "a.json", of="here") == {"a": 1}
    with pytest.raises(UserError, match=r"a.json: is damaged or belongs elsewhere .it differs"):
        read_json(tmp_path / "a.json", of="there")


def test_an_older_sound_file_is_not_the_one_that_a_note_names(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    file.write_bytes(b"older")
    older = seal_file(file)
    assert seal_of(file) == older
    check_seal(file, seal=older)
    file.write_bytes(b"newer")
    newer = seal_file(file)
    with pytest.raises(UserError, match=r"rows: is not the file that was written here .its checksum is"):
        check_seal(file, seal=older)
    check_seal(file, seal=newer)
