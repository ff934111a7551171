"""From media files to a trained tokenizer's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.codecs.images.siglip import SiglipFeatures, load_siglip, siglip_settings
from megatron_sov.codecs.training.banks import SoundBank, picture_bank
from megatron_sov.codecs.training.files import PICTURES, SOUNDS, MediaFiles, media_files
from megatron_sov.codecs.training.loop import Plan, train
from megatron_sov.codecs.training.tokenizers import (
    AudioTokenizerTask,
    AudioTokenizerTraining,
    ImageTokenizerTask,
    ImageTokenizerTraining,
)
from megatron_sov.digests import file_digest
from megatron_sov.documents import BadRecord
from megatron_sov.errors import UserError
from megatron_sov.media.reading.reader import MediaReader
from megatron_sov.settings import plain

Training = ImageTokenizerTraining | AudioTokenizerTraining
SETTINGS: dict[str, type[Training]] = {"image-tokenizer": ImageTokenizerTraining,
                                       "audio-tokenizer": AudioTokenizerTraining}
"""Kind, as `codec train` has it -> its settings."""


def settings_of(kind: str, encoder: Path | None) -> Training:
    """Return the default settings of a kind.

    Args:
        kind: as `codec train` has it.
        encoder: folder of a SigLIP that is to see, frozen; its sizes are taken.

    Raises:
        UserError: it is no SigLIP, or what is trained does not see.
    """
    settings = SETTINGS[kind]()
    if encoder is None:
        return settings
    if not isinstance(settings, ImageTokenizerTraining):
        raise UserError(f"--encoder {encoder}: is for pictures; leave it out with {kind}")
    siglip, side = siglip_settings(encoder)
    return replace(settings, model=replace(settings.model, siglip=siglip, side_pixels=side,
                                           grid=side // siglip.patch_pixels))


def train_tokenizer(given: Path, output: Path, settings: Training, *, encoder: Path | None = None,
                    device: str = "cpu", checkpoint_every_s: float = 60.0, look_every: int = 0,
                    overwrite: bool = False) -> dict[str, float]:
    """Train a tokenizer from media, or go on; return its figures on held-out ones.

    Args:
        given: a folder of media, or a list of files.
        output: the codec's folder.
        settings: of which kind they are says what is trained.
        encoder: folder of the SigLIP whose sizes the settings have.
        device: where it learns, as torch spells it.
        checkpoint_every_s: seconds between two states that are kept.
        look_every: steps between two looks at held-out media; 0: at the end alone.
        overwrite: replace a codec that is already at `output`.

    Raises:
        UserError: there are no media, one of them cannot be read, or the output is taken.
    """
    sees = isinstance(settings, ImageTokenizerTraining)
    files = media_files(given, PICTURES if sees else SOUNDS, settings.learning.heldout_share)
    plan = Plan(kind="simvq" if sees else "fsq", output=output, steps=settings.learning.steps,
                settings={**plain(settings), "media": files.digest, **digests("encoder", encoder)},
                checkpoint_every_s=checkpoint_every_s, look_every=look_every, overwrite=overwrite)
    with MediaReader(files.root) as reader:
        return train(plan, lambda folder: _task(settings, files, reader, encoder, folder, device))


def digests(part: str, folder: Path | None) -> dict[str, str]:
    """Return what is written of the weights that a part of a codec takes from a folder."""
    return {f"{part}/{file.name}": file_digest(file)
            for file in sorted(folder.glob("*.safetensors") if folder is not None else [])}


def _task(settings: Training, files: MediaFiles, reader: MediaReader, encoder: Path | None,
          folder: Path, device: str) -> ImageTokenizerTask | AudioTokenizerTask:
    """Return what learns; media are decoded where the folder does not hold them yet."""
    if isinstance(settings, ImageTokenizerTraining):
        side = settings.model.side_pixels

        def picture(name: str) -> np.ndarray[Any, Any]:
            return reader.picture(name, (side,)).arrays[0]

        train, heldout = (picture_bank(folder / f"{part}.bin", names, side, said(files.root, picture))
                          for part, names in (("train", files.train), ("heldout", files.heldout)))
        task = ImageTokenizerTask.made(settings, train, heldout, device=device)
        if encoder is not None and isinstance(sees := task.network.encoder, SiglipFeatures):
            load_siglip(sees, encoder)
        return task
    rate_hz = settings.model.sample_rate_hz

    def sound(name: str) -> np.ndarray[Any, Any]:
        return reader.sound(name, rate_hz).arrays[0]

    sounds, others = (SoundBank(folder / f"{part}.bin", names, said(files.root, sound))
                      for part, names in (("train", files.train), ("heldout", files.heldout)))
    return AudioTokenizerTask.made(settings, sounds, others, device=device)


def said(root: Path, read: Callable[[str], np.ndarray[Any, Any]]) -> Callable[[str], np.ndarray[Any, Any]]:
    """Return a reader whose refusals are sentences for the user."""
    def checked(name: str) -> np.ndarray[Any, Any]:
        with named(root / name):
            return read(name)

    return checked


@contextmanager
def named(file: Path) -> Iterator[None]:
    """Turn the refusal of a medium into a sentence that begins with its name."""
    try:
        yield
    except BadRecord as e:
        raise UserError(f"{file}: {e.reason}") from None
