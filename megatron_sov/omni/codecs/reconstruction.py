"""Media through a tokenizer and back by a decoder: what its tokens still hold."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import refuse_input
from megatron_sov.omni.codecs.folder import open_codec
from megatron_sov.omni.codecs.training.tokenizers import named
from megatron_sov.omni.media.reading.reader import MediaReader


@dataclass(frozen=True)
class Through:
    """Which decoder, and how it decodes."""

    decoder: Path | None = None
    """Folder of an image decoder or a vocoder; None: the tokenizer's own plain decoder."""
    speaker: str | None = None
    """Voice of the vocoder; None: its first."""
    steps: int | None = None
    """Of the image decoder's sampler; None: as its settings say."""
    seed: int = 0
    """Of the image decoder's noise."""


def reconstruct(folder: Path, files: Sequence[Path], output: Path,
                through: Through = Through()) -> Iterator[Path]:
    """Write a PNG or WAV file for each medium, and yield each as it is written.

    Args:
        folder: a tokenizer; without a decoder, one that was trained here.
        files: pictures or sounds.
        output: folder; a file is called as its medium, with another ending.
        through: which decoder.

    Raises:
        UserError: the codec has no decoder of its own and none is given, the decoder is of another kind, a
            medium cannot be read, or two have one name.
    """
    codec = open_codec(folder)
    if not hasattr(codec, "encode"):
        raise UserError(f"{folder}: is no tokenizer; pass one, and this one as --decoder")
    sees = hasattr(codec, "side_pixels")
    decode, rate_hz = _decoder(folder, codec, sees, through)
    targets = [output / f"{file.stem}{'.png' if sees else '.wav'}" for file in files]
    if len(set(targets)) < len(targets):
        raise UserError(f"--output {output}: two of the files would be written under one name; call the "
                        "command once for each of them")
    for target in targets:
        refuse_input("--output", target, *files)
    for file, target in zip(files, targets, strict=True):
        _picture(codec, decode, file, target) if sees else _sound(codec, decode, rate_hz, file, target)
        yield target


Decode = Callable[[torch.Tensor], torch.Tensor]


def _decoder(folder: Path, codec: Any, sees: bool, through: Through) -> tuple[Decode, int]:
    """Return what makes a picture or a sound of its ids, and the sound's rate in Hz (0 of a picture)."""
    if through.decoder is None:
        if not hasattr(codec, "reconstruct"):
            raise UserError(f"{folder}: has no decoder of its own; pass one as --decoder, or a tokenizer "
                            "that `megatron-sov codec train` wrote")
        if sees:
            return lambda ids: codec.reconstruct(ids[None])[0], 0
        return codec.reconstruct, codec.sample_rate_hz
    decoder = open_codec(through.decoder, kind="dit" if sees else "unit-bigvgan")
    if sees:
        return lambda ids: decoder.decode(ids[None], steps=through.steps, seed=through.seed)[0], 0
    return (lambda ids: decoder.decode(ids, through.speaker or decoder.speakers[0])), decoder.sample_rate_hz


def _picture(codec: Any, decode: Decode, file: Path, target: Path) -> None:
    from PIL import Image

    with MediaReader(file.parent) as reader, named(file):
        seen = reader.picture(file.name, (codec.side_pixels,)).arrays[0]
    again = decode(codec.encode(torch.from_numpy(seen.copy())[None].float() / 255)[0])
    pixels = (again * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    write_output(target, written.getvalue())


def _sound(codec: Any, decode: Decode, rate_hz: int, file: Path, target: Path) -> None:
    import soundfile

    with MediaReader(file.parent) as reader, named(file):
        heard = reader.sound(file.name, codec.sample_rate_hz).arrays[0]
    again: np.ndarray[Any, Any] = decode(codec.encode(torch.from_numpy(heard.copy()))).numpy()
    written = io.BytesIO()
    soundfile.write(written, again[:len(heard) * rate_hz // codec.sample_rate_hz], rate_hz, subtype="PCM_16",
                    format="WAV")
    write_output(target, written.getvalue())
