"""Write PNG and WAV files, and run media files through a codec and back."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import refuse_input_as_output
from megatron_sov.omni.codecs.folder import open_codec
from megatron_sov.omni.media.reading.reader import MediaReader


def reconstruct_media(folder: Path, files: Sequence[Path], output: Path) -> Iterator[Path]:
    """Encode and decode media files; write a PNG or WAV file for each and yield its path.

    Args:
        folder: codec with `encode` and `decode`.
        files: pictures or sounds.
        output: output folder; files keep their names, with another suffix.

    Raises:
        UserError: the codec does not decode, a file cannot be read, or two outputs have the same name.
    """
    codec = open_codec(folder)
    if not hasattr(codec, "encode") or not hasattr(codec, "decode"):
        raise UserError(f"{folder}: does not both encode and decode ({type(codec).__name__}); pass a codec "
                        "of kind vqmodel, mimi or dac")
    is_image_codec = hasattr(codec, "side_pixels")
    targets = [output / f"{file.stem}{'.png' if is_image_codec else '.wav'}" for file in files]
    if len(set(targets)) < len(targets):
        raise UserError(f"--output {output}: two of the files would be written under one name; call the "
                        "command once for each of them")
    for target in targets:
        refuse_input_as_output("--output", target, *files)
    for file, target in zip(files, targets, strict=True):
        with MediaReader(file.parent) as reader:
            try:
                content = (_reconstruct_picture if is_image_codec else _reconstruct_sound)(codec, reader,
                                                                                           file.name)
            except BadRecord as e:
                raise UserError(f"{file}: {e.reason}") from None
            write_output(target, content)
        yield target


def _reconstruct_picture(codec: Any, reader: MediaReader, name: str) -> bytes:
    pixels = reader.read_picture(name, (codec.side_pixels,)).arrays[0]
    return encode_png(codec.decode(codec.encode(torch.from_numpy(pixels.copy())[None].float() / 255))[0])


def _reconstruct_sound(codec: Any, reader: MediaReader, name: str) -> bytes:
    samples = torch.from_numpy(reader.read_sound(name, codec.sample_rate_hz).arrays[0].copy())
    # Cut off the silence after the sound, which padded the last frame.
    return encode_wav(codec.decode(codec.encode(samples))[:len(samples)], codec.sample_rate_hz)


def encode_png(picture: torch.Tensor) -> bytes:
    """Encode a picture, [3, height, width] in 0..1, as a PNG file."""
    from PIL import Image  # optional package; `MediaReader` reports a missing package

    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encode_wav(sound: torch.Tensor, rate_hz: int) -> bytes:
    """Encode a sound, [samples] in -1..1, as a 16-bit WAV file."""
    import soundfile  # optional package; `MediaReader` reports a missing package

    file = io.BytesIO()
    soundfile.write(file, sound.clamp(-1, 1).numpy(), rate_hz, subtype="PCM_16", format="WAV")
    return file.getvalue()
