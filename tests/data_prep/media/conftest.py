"""Small media, codecs with results computed by hand, and a tokenizer with media tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from data_prep.cli import main
from data_prep.media import encoder
from megatron_sov.base.artifacts import create_artifact
from megatron_sov.omni.media.reading.decoders import read_picture, read_sound, read_video
from megatron_sov.omni.media.reading.limits import MediaLimits, PictureRequest, VideoSampling
from megatron_sov.omni.media.reading.reader import DecodedMedia, resolve_media_path
from tests.data_prep.media.chats import Encode
from tokenizer.media import MediaTokens, add_media


class Greys:
    """Picture codec: one token per quarter of an 8 x 8 picture, its mean brightness in 8 shades."""

    side_pixels, grid, codebook_size = 8, 2, 8

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        quarters = pictures.mean(1).reshape(-1, 2, 4, 2, 4).mean((2, 4)).reshape(-1, 4)
        return (quarters * 7).round().long()


class Loudness:
    """Sound codec: one token per 0.1 s (800 samples), the largest magnitude in 8 steps."""

    sample_rate_hz, samples_per_token, codebook_size, max_piece_s = 8000, 800, 8, 0.5

    def encode(self, sound: torch.Tensor) -> torch.Tensor:
        filled = torch.nn.functional.pad(sound, (0, -len(sound) % 800)).reshape(-1, 800)
        return (filled.abs().amax(1) * 7).round().long().clamp(max=7)


class InProcessReader:
    """Replaces `MediaReader`: reads media in this process, without starting reader processes."""

    def __init__(self, root: Path, limits: MediaLimits, processes: int) -> None:
        self._root, self._limits = root.resolve(), limits

    def read_picture(self, path: str, sides: tuple[int, ...], animated: str) -> DecodedMedia:
        return self._wrap(read_picture(resolve_media_path(self._root, path), PictureRequest(sides, animated),
                                              self._limits))

    def read_sound(self, path: str, rate_hz: int) -> DecodedMedia:
        arrays, facts = read_sound(resolve_media_path(self._root, path), rate_hz, self._limits)
        return self._wrap(([arrays], facts))

    def read_video(self, path: str, sampling: VideoSampling) -> DecodedMedia:
        return self._wrap(read_video(resolve_media_path(self._root, path), sampling, self._limits))

    def close(self) -> None:
        pass

    def _wrap(self, decoded: tuple[list[np.ndarray], dict[str, Any]]) -> DecodedMedia:
        arrays, facts = decoded
        return DecodedMedia(arrays, **facts)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with a black and two white pictures, sounds of 0.1 and 1.5 s, an animation, a broken file."""
    root = tmp_path / "media"
    root.mkdir()
    for name, shade in (("dark", 0), ("light", 255), ("twin", 255)):
        Image.new("L", (16, 16), shade).save(root / f"{name}.png")
    soundfile.write(root / "short.wav", np.full(800, 0.99), 8000)
    soundfile.write(root / "long.wav", np.full(12_000, 0.5), 8000)
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
    frames[0].save(root / "moving.gif", save_all=True, append_images=frames[1:], duration=1000)
    (root / "broken.png").write_bytes(b"no picture")
    return root


@pytest.fixture
def encode(tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch,
           request: pytest.FixtureRequest) -> Encode:
    """A function that runs `sov-data encode-media` on records, with both codecs and with features for the
    encoders of both media: pictures of 4 x 4 pixels with 3 placeholders, and sounds in pieces of 1 s with 8
    bands and 5 placeholders."""
    codecs = {"images": Greys(), "sounds": Loudness()}
    for name in codecs:
        with create_artifact(tmp_path / name, "codec") as artifact:
            artifact.content = {"codec": name, "config": {}}
    monkeypatch.setattr(encoder, "_open_codec", lambda folder, *rest: codecs[folder.name] if folder else None)
    if request.module.__name__.rpartition(".")[2] != "test_page":  # test_page.py runs the real reader
        monkeypatch.setattr(encoder, "MediaReader", InProcessReader)

    def run(records: list[Any], *options: str, output: str = "corpus") -> int:
        (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return main(["encode-media", "--input", str(tmp_path / "records.jsonl"), "--media-root", str(media),
                     "--image-tokenizer", str(tmp_path / "images"),
                     "--audio-tokenizer", str(tmp_path / "sounds"), "--continuous-pictures", "4:3",
                     "--continuous-sounds", "8:1:5", "--threads", "1", "--output", str(tmp_path / output),
                     *options])

    return run


@pytest.fixture(scope="session")
def omni(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer artifact with 8 audio and 8 vision tokens."""
    folder = tmp_path_factory.mktemp("omni") / "omni"
    add_media(tokenizers["solar-open"], folder, MediaTokens(8, 8))
    return folder
