"""Pictures and sounds as files: those that a codec decodes, and those that it gives back of media."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import refuse_input_as_output
from megatron_sov.omni.media.reading.reader import MediaReader

if TYPE_CHECKING:
    import torch


def reconstruct(folder: Path, files: Sequence[Path], output: Path) -> Iterator[Path]:
    """Write a PNG or WAV file for each medium, and yield each as it is written.

    Args:
        folder: a codec that encodes and decodes.
        files: pictures or sounds.
        output: folder; a file is called as its medium, with another ending.

    Raises:
        UserError: the codec does not decode, a medium cannot be read, or two have one name.
    """
    from megatron_sov.omni.codecs.folder import open_codec

    codec = open_codec(folder)
    if not hasattr(codec, "encode") or not hasattr(codec, "decode"):
        raise UserError(f"{folder}: does not decode the ids that it gives ({type(codec).__name__}); pass a "
                        "codec of kind vqmodel, janus-vq, mimi or dac")
    sees = hasattr(codec, "side_pixels")
    targets = [output / f"{file.stem}{'.png' if sees else '.wav'}" for file in files]
    # before anything is written: the second would silently replace the first
    if len(set(targets)) < len(targets):
        raise UserError(f"--output {output}: two of the files would be written under one name; call the "
                        "command once for each of them")
    for target in targets:
        refuse_input_as_output("--output", target, *files)
    for file, target in zip(files, targets, strict=True):
        with MediaReader(file.parent) as reader, _naming(file):
            write_output(target, (_picture if sees else _sound)(codec, reader, file.name))
        yield target


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn the refusal of a medium into a sentence that begins with its name."""
    try:
        yield
    except BadRecord as e:
        raise UserError(f"{file}: {e.reason}") from None


def _picture(codec: Any, reader: MediaReader, name: str) -> bytes:
    import torch

    seen = reader.picture(name, (codec.side_pixels,)).arrays[0]
    return png_of(codec.decode(codec.encode(torch.from_numpy(seen.copy())[None].float() / 255))[0])


def _sound(codec: Any, reader: MediaReader, name: str) -> bytes:
    import torch

    heard = torch.from_numpy(reader.sound(name, codec.sample_rate_hz).arrays[0].copy())
    # without the silence that filled up the last frame
    return wav_of(codec.decode(codec.encode(heard))[:len(heard)], codec.sample_rate_hz)


def png_of(picture: torch.Tensor) -> bytes:
    """Return the PNG file of a picture [3, height, width] in 0..1."""
    import torch
    from PIL import Image

    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


def wav_of(sound: torch.Tensor, rate_hz: int) -> bytes:
    """Return the WAV file of a sound [samples] in -1..1, 16 bits a sample."""
    import soundfile

    written = io.BytesIO()
    soundfile.write(written, sound.clamp(-1, 1).numpy(), rate_hz, subtype="PCM_16", format="WAV")
    return written.getvalue()
