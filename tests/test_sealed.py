"""Files of numbers with a checksum at their end."""

from __future__ import annotations

from pathlib import Path

from megatron_sov.sealed import seal_damage, write_sealed


def test_a_sealed_file_is_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "numbers.f32"
    assert "cannot be read (No such file or directory)" in str(seal_damage(file, 4))
    for content in (b"", b"1234", bytes(range(256)) * 9):
        write_sealed(file, content)
        whole = file.read_bytes()
        assert seal_damage(file, len(content)) is None and whole.startswith(content)
        assert "bytes, must have" in str(seal_damage(file, len(content) + 4))
        for place in {0, len(content) // 2, len(whole) - 1}:
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:])
            assert "its content differs from the checksum at its end" in str(seal_damage(file, len(content)))
        file.write_bytes(whole[:-1])
        assert "bytes, must have" in str(seal_damage(file, len(content)))
