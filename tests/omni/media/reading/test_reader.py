"""Media through processes of their own: paths that lead out, decoders that die, and what goes on behind
them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from megatron_sov.base.documents import BadRecord
from megatron_sov.omni.media.reading.kinds import MediaLimits
from megatron_sov.omni.media.reading.reader import MediaReader
from megatron_sov.sandbox import readers

HOSTILE = '''
import os, time
from pathlib import Path
from megatron_sov.omni.media.reading import child
read = child.read_picture

def hostile(file, asked, limits):
    name = Path(file).stem
    if name == "crash":
        os.abort()
    if name == "spin":
        while True:
            pass
    if name == "eat":
        return [bytearray(1 << 36)], {}
    if name == "steal":
        open("/etc/passwd").read()
    if name == "write":
        open("/tmp/left-by-a-decoder", "w").write("x")
    arrays, facts = read(file, asked, limits)
    return (arrays * 1000 if name == "much" else arrays), facts

child.read_picture = hostile
'''


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "media/deep").mkdir(parents=True)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "media/deep/a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    soundfile.write(tmp_path / "media/a.wav", np.full(800, 0.25), 8000, subtype="FLOAT")
    return tmp_path / "media"


@pytest.fixture
def reader(root: Path) -> Iterator[MediaReader]:
    with MediaReader(root) as found:
        yield found


def test_pictures_and_sounds_come_as_numbers(reader: MediaReader) -> None:
    picture = reader.picture("deep/a.png", (4, 2))
    assert [a.shape for a in picture.arrays] == [(3, 4, 4), (3, 2, 2)] and (picture.arrays[0] == 9).all()
    sound = reader.sound("a.wav", 8000)
    assert sound.arrays[0].dtype == np.float32 and (sound.arrays[0] == 0.25).all()
    assert (sound.duration_s, sound.mime_type, picture.width) == (0.1, "audio/wav", 8)


@pytest.mark.parametrize("path", ["../outside.png", "/etc/passwd", "", "deep/../../outside.png", "a\0b",
                                  "link.png",
                                  "links/outside.png", "deep\\a.png"])
def test_nothing_outside_of_the_root_is_read(reader: MediaReader, root: Path, path: str) -> None:
    (root / "link.png").symlink_to(root.parent / "outside.png")
    (root / "links").symlink_to(root.parent)
    with pytest.raises(BadRecord) as found:
        reader.picture(path, (4,))
    assert found.value.code == "outside"


def test_what_is_missing_or_too_large_is_told(root: Path) -> None:
    with MediaReader(root, MediaLimits(file_bytes=1000)) as reader:
        for path, code in (("gone.png", "missing"), ("deep", "missing"), ("a.wav", "size")):
            with pytest.raises(BadRecord) as found:
                reader.picture(path, (4,))
            assert found.value.code == code


@pytest.fixture
def hostile(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """A function that reads a picture whose name tells its decoder what harm to do, and says what came of
    it."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/hostile.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.setattr(readers, "_CODE", readers._CODE.replace("from {", "import hostile; from {"))
    reader = MediaReader(root, MediaLimits(time_s=0.5))

    def read(name: str) -> str:
        os.link(root / "deep/a.png", root / f"{name}.png")
        try:
            reader.picture(f"{name}.png", (4,))
        except BadRecord as e:
            return e.code
        return "read"

    return read


def test_harm_costs_the_medium_and_nothing_else(hostile: Callable[[str], str]) -> None:
    assert {name: hostile(name) for name in ("crash", "spin", "eat", "much", "write")} == {
        "crash": "crash", "spin": "time", "eat": "memory", "much": "decoder", "write": "broken"}
    assert hostile("unharmed") == "read"  # by the process that was started after the others
    assert not os.path.exists("/tmp/left-by-a-decoder")


def test_several_threads_share_the_processes(root: Path) -> None:
    for i in range(6):
        Image.new("RGB", (8, 8), (i, i, i)).save(root / f"{i}.png")
    with MediaReader(root, processes=2) as reader, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: reader.picture(f"{i}.png", (2,)).arrays[0], range(6)))
    assert [int(a.max()) for a in found] == list(range(6))
