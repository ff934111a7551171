"""`MediaReader`, which decodes in child processes: paths outside its root, and hostile decoders."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from megatron_sov.base.documents import BadRecord
from megatron_sov.omni.media.reading.limits import MediaLimits
from megatron_sov.omni.media.reading.reader import MediaReader
from megatron_sov.sandbox import reader_process

HOSTILE = '''
import os, time
from pathlib import Path
from megatron_sov.omni.media.reading import decoder_process
read = decoder_process.read_picture

def hostile(file, request, limits):
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
    arrays, facts = read(file, request, limits)
    return (arrays * 1000 if name == "much" else arrays), facts

decoder_process.read_picture = hostile
'''


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of media with a picture and a sound; its parent has the picture outside.png."""
    (tmp_path / "media/deep").mkdir(parents=True)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "media/deep/a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    soundfile.write(tmp_path / "media/a.wav", np.full(800, 0.25), 8000, subtype="FLOAT")
    return tmp_path / "media"


@pytest.fixture
def reader(root: Path) -> Iterator[MediaReader]:
    with MediaReader(root) as reader:
        yield reader


def test_reader_decodes_pictures_and_sounds(reader: MediaReader) -> None:
    picture = reader.read_picture("deep/a.png", (4, 2))
    assert [a.shape for a in picture.arrays] == [(3, 4, 4), (3, 2, 2)] and (picture.arrays[0] == 9).all()
    sound = reader.read_sound("a.wav", 8000)
    assert sound.arrays[0].dtype == np.float32 and (sound.arrays[0] == 0.25).all()
    assert (sound.duration_s, sound.mime_type, picture.width) == (0.1, "audio/wav", 8)


@pytest.mark.parametrize("path", [
    "../outside.png", "/etc/passwd", "", "deep/../../outside.png", "a\0b", "link.png", "links/outside.png",
    "deep\\a.png"])
def test_paths_outside_the_root_are_refused(reader: MediaReader, root: Path, path: str) -> None:
    (root / "link.png").symlink_to(root.parent / "outside.png")
    (root / "links").symlink_to(root.parent)
    with pytest.raises(BadRecord) as error:
        reader.read_picture(path, (4,))
    assert error.value.code == "outside"


def test_missing_and_large_files_are_refused(root: Path) -> None:
    with MediaReader(root, MediaLimits(file_bytes=1000)) as reader:
        for path, code in (("gone.png", "missing"), ("deep", "missing"), ("a.wav", "size")):
            with pytest.raises(BadRecord) as error:
                reader.read_picture(path, (4,))
            assert error.value.code == code


@pytest.fixture
def hostile(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """A function that reads a picture with a misbehaving decoder (see `HOSTILE`); returns its error code."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/hostile.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    code = reader_process._CODE.replace("from {", "import hostile; from {")
    monkeypatch.setattr(reader_process, "_CODE", code)
    reader = MediaReader(root, MediaLimits(time_s=0.5))

    def read(name: str) -> str:
        os.link(root / "deep/a.png", root / f"{name}.png")
        try:
            reader.read_picture(f"{name}.png", (4,))
        except BadRecord as e:
            return e.code
        return "read"

    return read


def test_reader_survives_hostile_decoders(hostile: Callable[[str], str]) -> None:
    assert {name: hostile(name) for name in ("crash", "spin", "eat", "much", "write")} == {
        "crash": "crash", "spin": "time", "eat": "memory", "much": "decoder", "write": "broken"}
    assert hostile("unharmed") == "read"  # in a new process
    assert not os.path.exists("/tmp/left-by-a-decoder")


def test_several_threads_share_the_processes(root: Path) -> None:
    for i in range(6):
        Image.new("RGB", (8, 8), (i, i, i)).save(root / f"{i}.png")
    with MediaReader(root, processes=2) as reader, ThreadPoolExecutor(4) as pool:
        result = list(pool.map(lambda i: reader.read_picture(f"{i}.png", (2,)).arrays[0], range(6)))
    assert [int(a.max()) for a in result] == list(range(6))
