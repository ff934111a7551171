"""From media files and a tokenizer to a trained decoder's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from megatron_sov.artifacts import manifest_sha256
from megatron_sov.codecs.folder import open_codec
from megatron_sov.codecs.images.dit import DiT
from megatron_sov.codecs.images.dit_settings import DiTSettings
from megatron_sov.codecs.images.vae import open_vae
from megatron_sov.codecs.sounds.bigvgan import UnitBigVGAN
from megatron_sov.codecs.training.banks import Ragged, SoundBank, id_bank, picture_bank
from megatron_sov.codecs.training.files import PICTURES, SOUNDS, MediaFiles, media_files
from megatron_sov.codecs.training.image_decoder import Drawn, ImageDecoderTask, ImageDecoderTraining
from megatron_sov.codecs.training.loop import Plan, train
from megatron_sov.codecs.training.start import digests, said
from megatron_sov.codecs.training.vocoder import Spoken, VocoderTask, VocoderTraining
from megatron_sov.errors import UserError
from megatron_sov.media.reading.reader import MediaReader
from megatron_sov.settings import SettingsError, plain, problems_of

Training = ImageDecoderTraining | VocoderTraining
SETTINGS: dict[str, Training] = {"image-decoder": ImageDecoderTraining(DiTSettings(vae=None)),
                                 "vocoder": VocoderTraining()}
"""Kind, as `codec train` has it -> its settings before any change."""
ONE_SPEAKER = "speaker"
"""Name of the voice where all files lie in the folder itself."""


def train_decoder(given: Path, output: Path, settings: Training, tokenizer: Path, *, vae: Path | None = None,
                  device: str = "cpu", checkpoint_every_s: float = 60.0, look_every: int = 0,
                  overwrite: bool = False) -> dict[str, float]:
    """Train a decoder of a tokenizer's ids from media, or go on; return its figures on held-out ones.

    Args:
        given: a folder of media, or a list of files; of a vocoder's, each folder in it has one speaker's.
        output: the codec's folder.
        settings: of which kind they are says what is trained; what follows from tokenizer, autoencoder and
            files is taken from there.
        tokenizer: codec whose ids are decoded.
        vae: folder of diffusers' AutoencoderKL in whose latents pictures are drawn.
        device: where it learns, as torch spells it.
        checkpoint_every_s: seconds between two states that are kept.
        look_every: steps between two looks at held-out media; 0: at the end alone.
        overwrite: replace a codec that is already at `output`.

    Raises:
        UserError: there are no media, one of them cannot be read, the tokenizer is of other media, or the
            output is taken.
    """
    draws = isinstance(settings, ImageDecoderTraining)
    codec = _tokenizer(tokenizer, draws)
    files = media_files(given, PICTURES if draws else SOUNDS, settings.learning.heldout_share)
    fitted = _of_pictures(settings, codec, vae) if isinstance(settings, ImageDecoderTraining) else \
        _of_sounds(settings, codec, files)
    if problems := problems_of(fitted):
        raise SettingsError(f"--set, with tokenizer {tokenizer}", problems)
    made_from = {"media": files.digest, "tokenizer": manifest_sha256(tokenizer), **digests("vae", vae)}
    plan = Plan(kind="dit" if draws else "unit-bigvgan", output=output, steps=fitted.learning.steps,
                settings={**plain(fitted), **made_from}, checkpoint_every_s=checkpoint_every_s,
                look_every=look_every, overwrite=overwrite)
    with MediaReader(files.root) as reader:
        if isinstance(fitted, ImageDecoderTraining):
            return train(plan, lambda folder: _drawing(fitted, codec, vae, files, reader, folder, device))
        return train(plan, lambda folder: _speaking(fitted, codec, files, reader, folder, device))


def _tokenizer(folder: Path, of_pictures: bool) -> Any:
    """Return a tokenizer of the right kind of medium."""
    codec = open_codec(folder)
    wanted = "side_pixels" if of_pictures else "samples_per_token"
    if not hasattr(codec, "encode") or not hasattr(codec, wanted):
        media, kind = ("pictures", "image-tokenizer") if of_pictures else ("sounds", "audio-tokenizer")
        raise UserError(f"--tokenizer {folder}: is no tokenizer of {media}; pass what `megatron-sov codec "
                        f"train {kind}` wrote")
    return codec


def _of_pictures(settings: ImageDecoderTraining, codec: Any, vae: Path | None) -> ImageDecoderTraining:
    """Return settings with the tokenizer's sizes and the autoencoder's, or none."""
    return replace(settings, model=replace(settings.model, grid=codec.grid, codebook_size=codec.codebook_size,
                                           token_width=codec.width,
                                           vae=None if vae is None else open_vae(vae)[0]))


def _of_sounds(settings: VocoderTraining, codec: Any, files: MediaFiles) -> VocoderTraining:
    """Return settings with the tokenizer's codebook and the files' speakers."""
    rate = codec.sample_rate_hz / codec.samples_per_token
    if rate != settings.model.tokens_per_s:
        raise UserError(f"--set model.tokens_per_s={settings.model.tokens_per_s}: the tokenizer has {rate:g} "
                        "tokens a second; give its rate, and `model.rates` that fit it")
    speakers = tuple(sorted({_speaker(name) for name in (*files.train, *files.heldout)}))
    return replace(settings, model=replace(settings.model, codebook_size=codec.codebook_size,
                                           speakers=speakers))


def _speaker(name: str) -> str:
    """Return whose voice is in a file: the first folder of its name."""
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) > 1 else ONE_SPEAKER


def _drawing(settings: ImageDecoderTraining, codec: Any, vae: Path | None, files: MediaFiles,
             reader: MediaReader, folder: Path, device: str) -> ImageDecoderTask:
    """Return the task of a picture decoder; media and tokens are written where the folder lacks them."""
    side = settings.model.side_pixels

    def ids(name: str) -> np.ndarray[Any, Any]:
        seen = torch.from_numpy(reader.picture(name, (codec.side_pixels,)).arrays[0].copy())
        return np.asarray(codec.encode(seen[None].float() / 255)[0])

    drawn, heldout = (
        Drawn(picture_bank(folder / f"{part}.bin", names, side,
                           said(files.root, lambda name: reader.picture(name, (side,)).arrays[0])),
              id_bank(folder / f"{part}.ids", names, codec.grid**2, said(files.root, ids)))
        for part, names in (("train", files.train), ("heldout", files.heldout)))
    torch.manual_seed(settings.learning.seed)
    decoder = DiT(settings.model)
    decoder.token_embeddings.copy_(codec.embed(torch.arange(codec.codebook_size)[None])[0])
    if vae is not None and decoder.vae is not None:
        decoder.vae.load_state_dict(open_vae(vae)[1].state_dict())
    return ImageDecoderTask(decoder.to(device), settings.learning, drawn, heldout)


def _speaking(settings: VocoderTraining, codec: Any, files: MediaFiles, reader: MediaReader,
              folder: Path, device: str) -> VocoderTask:
    """Return the task of a vocoder; media and tokens are written where the folder lacks them."""
    def sound(name: str) -> np.ndarray[Any, Any]:
        return reader.sound(name, settings.model.sample_rate_hz).arrays[0]

    def ids(name: str) -> np.ndarray[Any, Any]:
        return np.asarray(codec.encode(torch.from_numpy(reader.sound(name, codec.sample_rate_hz).arrays[0])))

    spoken, heldout = (
        SpokenBank(SoundBank(folder / f"{part}.bin", names, said(files.root, sound)),
                   Ragged(folder / f"{part}.ids", names, said(files.root, ids), np.dtype(np.int32)),
                   [settings.model.speakers.index(_speaker(name)) for name in names])
        for part, names in (("train", files.train), ("heldout", files.heldout)))
    torch.manual_seed(settings.learning.seed)
    return VocoderTask(UnitBigVGAN(settings.model).to(device), settings.learning, spoken, heldout)


class SpokenBank(Sequence[Spoken]):
    """Sounds with their tokens and speakers, read as they are asked for."""

    def __init__(self, sounds: SoundBank, ids: Ragged, speakers: Sequence[int]) -> None:
        """Args:
            sounds: at the vocoder's rate.
            ids: of each.
            speakers: rows of the vocoder's table.
        """
        self._sounds, self._ids, self._speakers = sounds, ids, speakers

    def __len__(self) -> int:
        return len(self._sounds)

    def __getitem__(self, row: Any) -> Any:
        """Return one of them."""
        return Spoken(torch.from_numpy(self._ids.row(row).astype(np.int64)),
                      torch.from_numpy(self._sounds[row]), self._speakers[row])
