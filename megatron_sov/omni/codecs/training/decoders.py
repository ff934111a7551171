"""From media files and a tokenizer to a trained decoder's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from megatron_sov.base.artifacts import manifest_sha256
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError, plain, problems_of
from megatron_sov.omni.codecs.decoder_settings import DiTSettings
from megatron_sov.omni.codecs.folder import open_codec
from megatron_sov.omni.codecs.images.dit import DiT
from megatron_sov.omni.codecs.images.vae import open_vae
from megatron_sov.omni.codecs.sounds.bigvgan import UnitBigVGAN
from megatron_sov.omni.codecs.training.banks import (
    PICTURES, SOUNDS, Ids, MediaFiles, Pictures, Ragged, SoundBank, id_bank, media_files, picture_bank)
from megatron_sov.omni.codecs.training.draws import batch_rows, generator
from megatron_sov.omni.codecs.training.loop import CodecTrainingPlan, train
from megatron_sov.omni.codecs.training.schedule import CodecSchedule
from megatron_sov.omni.codecs.training.tokenizers import digests, said
from megatron_sov.omni.codecs.training.vocoder import Spoken, VocoderTask, VocoderTraining
from megatron_sov.omni.media.reading.reader import MediaReader

# How the picture decoder learns: the velocity from a picture to noise, at random noise levels.
#
# Rectified flow (arXiv 2209.03003): `x = (1 - level) * picture + level * noise`, and the network says
# `noise - picture`.  Levels lie around the middle (logit-normal, arXiv 2403.03206); that choice is ours.

LOOK_PICTURES = 256
"""Held-out pictures that are looked at."""
MAX_GRAD_NORM = 1.0
"""Longer gradients are shortened; ours."""


@dataclass(frozen=True)
class ImageDecoderTraining:
    """Settings of `codec train image-decoder`."""

    model: DiTSettings = field(default_factory=DiTSettings)
    """Sizes; those of the tokens are the tokenizer's."""
    learning: CodecSchedule = field(default_factory=CodecSchedule)
    """How it learns."""


class Drawn(NamedTuple):
    """Pictures and what their tokenizer says of them."""

    pictures: Pictures
    """[n, 3, side, side] uint8."""
    ids: Ids
    """[n, grid * grid] tokens of each."""


class ImageDecoderTask:
    """A picture decoder and pictures with their tokens."""

    def __init__(self, decoder: DiT, learning: CodecSchedule, drawn: Drawn, heldout: Drawn) -> None:
        """Args:
            decoder: its `token_embeddings` are those of the tokenizer; an autoencoder stays as it is.
            learning: how it learns.
            drawn: to learn from.
            heldout: not to learn from.
        """
        if decoder.vae is not None:
            decoder.vae.requires_grad_(False)
        self.decoder, self.learning, self.drawn, self.heldout = decoder, learning, drawn, heldout
        self.networks = nn.ModuleDict({"decoder": decoder})
        learned = [weight for weight in decoder.parameters() if weight.requires_grad]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "decoder": torch.optim.AdamW(learned, learning.learning_rate, betas=(0.9, 0.95),
                                         weight_decay=0.0)}

    def learn(self, step: int) -> dict[str, float]:
        """Take an optimizer step; returns `loss`, the mean square of the velocity's error, `grad_norm` and
        `lr`."""
        optimizer, seed = self.optimizers["decoder"], self.learning.seed
        rate = self.learning.set_rate(optimizer, step)
        rows = batch_rows(len(self.drawn.pictures), self.learning.batch_size, seed, step).numpy()
        self.decoder.train()
        loss = self._loss(self.drawn.pictures[rows], self.drawn.ids[rows], generator(seed, step, "noise"))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], MAX_GRAD_NORM)
        optimizer.step()
        return {"loss": loss.item(), "grad_norm": norm.item(), "lr": rate}

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Return `loss` on held-out pictures, always under the same noise."""
        if not len(self.heldout.pictures):
            return {}
        self.decoder.eval()
        pictures, ids = self.heldout.pictures[:LOOK_PICTURES], self.heldout.ids[:LOOK_PICTURES]
        return {"loss": self._loss(pictures, ids, generator(self.learning.seed, 0, "look")).item()}

    def codec(self) -> DiT:
        """Return the decoder."""
        return self.decoder

    def _loss(self, pictures: Pictures, ids: Ids, draws: torch.Generator) -> torch.Tensor:
        device = self.decoder.place_in.weight.device
        with torch.no_grad():
            latents = self.decoder.to_latents(torch.from_numpy(pictures.copy()).to(device) / 255)
        noise = torch.randn(latents.shape, generator=draws).to(device)
        level = torch.randn(len(latents), generator=draws).sigmoid().to(device)
        share = level[:, None, None, None]
        velocity = self.decoder((1 - share) * latents + share * noise, level,
                                torch.from_numpy(ids.copy()).long().to(device))
        return functional.mse_loss(velocity, noise - latents)


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
    plan = CodecTrainingPlan(kind="dit" if draws else "unit-bigvgan", output=output,
                             steps=fitted.learning.steps,
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
