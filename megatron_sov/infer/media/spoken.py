"""A reply in parts: what a model writes, draws and says, taken from its ids one by one.

Codebook entries stand between marks (`base/chat/media_tokens.py`) among the ids of a text.  Speech and text
may alternate; all audio tokens of a reply are one sound, as in the authors' serving code (OmniServe,
`extract_audio_info`), and `speak` lets it be heard while the text goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_sov.base.chat import media_tokens as spelling
from megatron_sov.base.chat.media_tokens import AUDIO, IMAGE, VocabularyBlock

if TYPE_CHECKING:
    import torch

    from megatron_sov.omni.codecs.folder import Vocoder

_BOTH = re.compile(r"<user_transcript>.*?</user_transcript>\s*(?=.*<assistant_transcript>)", re.DOTALL)
_TAGS = re.compile(r"</?(?:user|assistant)_transcript>|\s*<audio_decoder_call>\s*")
_SPEAKER = re.compile(r"<speaker_info>(\{[^{}]*\})</speaker_info>")


@dataclass(frozen=True)
class Text:
    """Ids of text, marks of media taken out."""

    ids: tuple[int, ...]
    """In order."""


@dataclass(frozen=True)
class Audio:
    """Speech."""

    tokens: tuple[int, ...]
    """Entries of the audio codebook, from 0."""


@dataclass(frozen=True)
class Image:
    """A picture."""

    tokens: tuple[int, ...]
    """Entries of the image codebook, from 0, row by row."""
    ratio: tuple[int, int] = (1, 1)
    """Width : height."""
    complete: bool = True
    """Whether its end mark came; False: the reply broke off, or went on with something else."""


Part = Text | Audio | Image


@dataclass(frozen=True)
class MarkIds:
    """Ids of the marks in one vocabulary; without any, codebook entries alone say where a medium is."""

    image: tuple[int, ...] = ()
    """Start and end of a discrete picture."""
    audio: tuple[int, ...] = ()
    """Start and end of discrete speech."""
    in_image: frozenset[int] = frozenset()
    """Ends of rows and of the picture."""
    ratios: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Id -> width : height."""

    @staticmethod
    def of(id_of: Callable[[str], int | None]) -> MarkIds:
        """Return the ids of the published marks.

        Args:
            id_of: a token's id; None where the vocabulary has no such token.
        """
        def known(names: Iterable[str]) -> tuple[int, ...]:
            return tuple(found for found in map(id_of, names) if found is not None)

        ratios = {found: ratio for ratio in spelling.RATIOS
                  if (found := id_of(spelling.ratio(*ratio))) is not None}
        return MarkIds(known(spelling.DISCRETE_IMAGE), known(spelling.DISCRETE_AUDIO),
                       frozenset(known((spelling.END_OF_LINE, spelling.END_OF_FRAME))), ratios)


class SpokenReply:
    """Splits a reply while it comes."""

    def __init__(self, blocks: Sequence[VocabularyBlock], marks: MarkIds) -> None:
        """Args:
            blocks: of the vocabulary's codebooks.
            marks: of the vocabulary.
        """
        self._blocks = {block.kind: block for block in blocks}
        self._marks = marks
        self._picture: list[int] | None = None
        self._ratio = (1, 1)

    def feed(self, token_id: int) -> list[Part]:
        """Return the parts that an id completes: text and speech at once, a picture with its end mark."""
        entry = self._entry(IMAGE, token_id)
        if entry is not None:
            self._picture = [*(self._picture or []), entry]
            return []
        marks = self._marks
        if token_id in marks.image[:1]:
            done = self.finish()
            self._picture = []
            return done
        if self._picture is not None and (token_id in marks.in_image or token_id in marks.ratios):
            self._ratio = marks.ratios.get(token_id, self._ratio)
            return []
        done = self._close(complete=token_id in marks.image[1:])
        if token_id in (*marks.image, *marks.audio):
            return done
        entry = self._entry(AUDIO, token_id)
        return [*done, Text((token_id,)) if entry is None else Audio((entry,))]

    def finish(self) -> list[Part]:
        """Return what is left when no more ids come: a picture that broke off."""
        return self._close(complete=False)

    def _entry(self, kind: str, token_id: int) -> int | None:
        block = self._blocks.get(kind)
        return token_id - block.first if block is not None and block.first <= token_id < block.end else None

    def _close(self, complete: bool) -> list[Part]:
        if self._picture is None:
            return []
        picture = Image(tuple(self._picture), self._ratio, complete)
        self._picture, self._ratio = None, (1, 1)
        return [picture]


def parts_of(ids: Iterable[int], blocks: Sequence[VocabularyBlock], marks: MarkIds) -> list[Part]:
    """Return a whole reply's parts in order; neighbours of text, and of speech, are one part.

    Args:
        ids: of the reply, without the prompt.
        blocks: of the vocabulary's codebooks.
        marks: of the vocabulary.
    """
    reply, parts = SpokenReply(blocks, marks), list[Part]()
    for part in (part for token_id in [*ids, None]
                 for part in (reply.finish() if token_id is None else reply.feed(token_id))):
        last = parts[-1] if parts else None
        if isinstance(part, Text) and isinstance(last, Text):
            parts[-1] = Text(last.ids + part.ids)
        elif isinstance(part, Audio) and isinstance(last, Audio):
            parts[-1] = Audio(last.tokens + part.tokens)
        else:
            parts.append(part)
    return parts


def speak(parts: Iterable[Part], vocoder: Vocoder, speaker: str,
          piece_tokens: int = 5) -> Iterator[Text | Image | torch.Tensor]:
    """Yield text and pictures as they come, and the sound of a reply's speech as soon as it can be heard.

    Args:
        parts: of a reply, e.g. what `SpokenReply.feed` returns, one after another.
        vocoder: of the audio tokenizer.
        speaker: one of its voices.
        piece_tokens: audio tokens that become sound together; fewer are heard sooner, more cost less.
            What is left before a text or at the end is not held back.
    """
    import torch

    held, waiting = list[int](), list[torch.Tensor]()

    def pieces() -> Iterator[torch.Tensor]:
        while waiting:
            yield waiting.pop()

    # one sound comes out for one piece that goes in, so asking for the next sound takes the next piece; when
    # none is left, what is late comes
    sounds = vocoder.stream(pieces(), speaker)

    def say() -> Iterator[torch.Tensor]:
        if held:
            waiting.append(torch.tensor(held))
            held.clear()
            yield from (sound for sound in (next(sounds),) if len(sound))

    for part in parts:
        if isinstance(part, Audio):
            for token in part.tokens:
                held.append(token)
                if len(held) >= piece_tokens:
                    yield from say()
        else:
            yield from say()
            yield part
    yield from say()
    yield from sounds


def transcript(text: str) -> tuple[str, dict[str, Any]]:
    """Return what to show of a spoken reply's text, and what it says about the speaker.

    The rules are those of the authors' serving code (omni_chainer/core/openai/v1/track_b.py): what the user
    said goes where what the model says stands beside it, and the tags go always.
    """
    found, speaker = _SPEAKER.search(text), dict[str, Any]()
    if found:
        try:
            speaker = json.loads(found.group(1))
        except ValueError:
            speaker = {}
    return _TAGS.sub("", _BOTH.sub("", _SPEAKER.sub("", text))).strip(), speaker
