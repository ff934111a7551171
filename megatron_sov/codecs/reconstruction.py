"""Media through a tokenizer and back by its own plain decoder: what its tokens still hold."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sov.artifacts import write_output
from megatron_sov.codecs.folder import open_codec
from megatron_sov.codecs.training.start import named
from megatron_sov.errors import UserError
from megatron_sov.media.reading.reader import MediaReader
from megatron_sov.outputs import refuse_input


def reconstruct(folder: Path, files: Sequence[Path], output: Path) -> Iterator[Path]:
    """Write a PNG or WAV file for each medium, and yield each as it is written.

    Args:
        folder: a tokenizer that was trained here.
        files: pictures or sounds.
        output: folder; a file is called as its medium, with another ending.

    Raises:
        UserError: the codec has no decoder of its own, a medium cannot be read, or two have one name.
    """
    codec = open_codec(folder)
    if not hasattr(codec, "reconstruct"):
        raise UserError(f"{folder}: has no decoder of its own; pass a tokenizer that `megatron-sov codec "
                        "train` wrote")
    sees = hasattr(codec, "side_pixels")
    targets = [output / f"{file.stem}{'.png' if sees else '.wav'}" for file in files]
    if len(set(targets)) < len(targets):
        raise UserError(f"--output {output}: two of the files would be written under one name; call the "
                        "command once for each of them")
    for target in targets:
        refuse_input("--output", target, *files)
    for file, target in zip(files, targets, strict=True):
        (_picture if sees else _sound)(codec, file, target)
        yield target


def _picture(codec: Any, file: Path, target: Path) -> None:
    from PIL import Image

    with MediaReader(file.parent) as reader, named(file):
        seen = reader.picture(file.name, (codec.side_pixels,)).arrays[0]
    again = codec.reconstruct(codec.encode(torch.from_numpy(seen.copy())[None].float() / 255))[0]
    pixels = (again * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    write_output(target, written.getvalue())


def _sound(codec: Any, file: Path, target: Path) -> None:
    import soundfile

    with MediaReader(file.parent) as reader, named(file):
        heard = reader.sound(file.name, codec.sample_rate_hz).arrays[0]
    again: np.ndarray[Any, Any] = codec.reconstruct(codec.encode(torch.from_numpy(heard.copy()))).numpy()
    written = io.BytesIO()
    soundfile.write(written, again[:len(heard)], codec.sample_rate_hz, subtype="PCM_16", format="WAV")
    write_output(target, written.getvalue())
