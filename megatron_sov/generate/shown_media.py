"""Pictures and sounds that a model is shown: files as items of a prompt's text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_sov.documents import BadRecord
from megatron_sov.errors import UserError
from megatron_sov.media.items import Item, discrete_audio, discrete_image
from megatron_sov.media.marks import spelled
from megatron_sov.media.reading.reader import MediaReader
from megatron_sov.media.vocabulary import AUDIO, IMAGE

OPTIONS = {IMAGE: "--image-tokenizer", AUDIO: "--audio-tokenizer"}


@dataclass(frozen=True)
class ShownMedia:
    """The folder of media, and the tokenizers that see and hear."""

    root: Path
    """Nothing outside of it is read."""
    tokenizers: Mapping[str, Path]
    """`IMAGE` or `AUDIO` -> folder of a codec."""

    def text(self, parts: Sequence[Mapping[str, Any]], reader: MediaReader, where: str) -> str:
        """Return what a user shows and says, as `sov-data encode-media` writes it.

        Args:
            parts: {"type": "text", "text": ...}, {"type": "image" or "audio", "path": ...}.
            reader: of the media below `root`.
            where: names the parts in a message.

        Raises:
            UserError: a part is none, there is no tokenizer for it, or it cannot be read.
        """
        said, numbers = list[str](), Counter[str]()
        for part in parts:
            kind = part.get("type")
            if kind == "text" and isinstance(part.get("text"), str):
                if mark := spelled(part["text"]):
                    raise UserError(f"{where}: its text spells {mark!r}, which is a token of media; remove "
                                    "it: media are named by their paths alone")
                said.append(part["text"])
            elif kind in OPTIONS and isinstance(part.get("path"), str):
                said.append(self._item(str(kind), part["path"], numbers[str(kind)], reader, where))
                numbers[str(kind)] += 1
            else:
                raise UserError(f"{where}: {str(part)[:80]} is no part; write "
                                '{"type": "text", "text": ...} or {"type": "image" | "audio", "path": ...}')
        return "\n".join(said)

    def _item(self, kind: str, path: str, number: int, reader: MediaReader, where: str) -> str:
        import numpy as np
        import torch

        codec = self._codecs.get(kind)
        if codec is None:
            raise UserError(f"{where}: {path} is of kind {kind}, which needs {OPTIONS[kind]} CODEC")
        try:
            if kind == IMAGE:
                read = reader.picture(path, (codec.side_pixels,))
                picture = torch.from_numpy(read.arrays[0].astype(np.float32) / 255)
                block = discrete_image(codec.encode(picture[None])[0].tolist(), codec.grid, read.width,
                                       read.height)
            else:
                read = reader.sound(path, codec.sample_rate_hz)
                piece = int(codec.max_piece_s * codec.sample_rate_hz)
                block = discrete_audio([i for part in torch.from_numpy(read.arrays[0].copy()).split(piece)
                                        for i in codec.encode(part).tolist()])
        except BadRecord as e:
            raise UserError(f"{where}: {path} {e}") from None
        return Item(kind, number, read.mime_type, PurePosixPath(path).name, read.duration_s, block).text()

    @cached_property
    def _codecs(self) -> dict[str, Any]:
        from megatron_sov.codecs.folder import open_codec

        found = {}
        for kind, folder in self.tokenizers.items():
            codec = open_codec(folder)
            if not hasattr(codec, "side_pixels" if kind == IMAGE else "samples_per_token") \
                    or not hasattr(codec, "encode"):
                raise UserError(f"{OPTIONS[kind]} {folder}: is a codec of another kind "
                                f"({type(codec).__name__}); pass a tokenizer")
            found[kind] = codec
        return found
