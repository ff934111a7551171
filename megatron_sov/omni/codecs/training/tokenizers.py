"""Training tokenizers of pictures and of sounds as autoencoders: what the plain decoder makes of the tokens
is to be what was seen or heard.  `reconstruct` shows what tokens still hold."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import nn
from torch.optim import AdamW, Optimizer

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.digests import file_digest
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import refuse_input
from megatron_sov.base.settings import plain
from megatron_sov.omni.codecs.folder import open_codec
from megatron_sov.omni.codecs.quantised import (
    FRAMES_PER_TOKEN, FSQSettings, FSQTokenizer, SimVQSettings, SimVQTokenizer)
from megatron_sov.omni.codecs.siglip import SiglipFeatures, load_siglip, siglip_settings
from megatron_sov.omni.codecs.training.banks import (
    PICTURES, SOUNDS, MediaFiles, Pictures, Read, SoundBank, Sounds, media_files, picture_bank)
from megatron_sov.omni.codecs.training.loop import (
    CodecSchedule, CodecTrainingPlan, batch_rows, generator, train)
from megatron_sov.omni.media.reading.reader import MediaReader

# How much of a codebook is used: what says everything with a few tokens has learned a small codebook.

class CodebookUsage:
    """Counts ids as they come.

    Args:
        codebook_size: ids are below it.
    """

    def __init__(self, codebook_size: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)
        """How often each id came."""

    def add(self, ids: torch.Tensor) -> None:
        """Count ids of any shape."""
        self.counts += torch.bincount(ids.detach().reshape(-1).cpu(), minlength=len(self.counts))

    def figures(self) -> dict[str, float]:
        """Return `perplexity` (e to the entropy of the ids: so many ids, equally frequent, would say as much)
        and `used_share` (of the codebook's entries that came at all; the others are dead)."""
        total = int(self.counts.sum())
        if not total:
            return {"perplexity": math.nan, "used_share": 0.0}
        # 0 log 0 is 0: ids that never came are left out
        shares = self.counts[self.counts > 0].double() / total
        return {"perplexity": float(torch.exp(-(shares * shares.log()).sum())),
                "used_share": float((self.counts > 0).double().mean())}


_DB = 10 / math.log(10)


@dataclass(frozen=True)
class Learning(CodecSchedule):
    """How a tokenizer learns: ours, for no source gives it."""

    steps: Annotated[int, Ge(1), Le(100_000_000)] = 20_000
    """Optimizer steps."""
    batch_size: Annotated[int, Ge(1), Le(1_000_000)] = 16
    """Pictures or pieces of sound in a step."""
    learning_rate: Annotated[float, Ge(0), Le(10)] = 1e-3
    """Of AdamW, at its highest."""
    weight_decay: Annotated[float, Ge(0), Le(10)] = 0.01
    """Of AdamW."""
    quantiser_weight: Annotated[float, Ge(0), Le(1000)] = 1.0
    """Of the quantiser's own loss beside the reconstruction's."""
    crop_tokens: Annotated[int, Ge(1), Le(10000)] = 32
    """Tokens of a piece of sound in training."""


@dataclass(frozen=True)
class ImageTokenizerTraining:
    """Settings of `codec train image-tokenizer`."""

    model: SimVQSettings = field(default_factory=SimVQSettings)
    """Sizes."""
    learning: Learning = field(default_factory=Learning)
    """How it learns."""


@dataclass(frozen=True)
class AudioTokenizerTraining:
    """Settings of `codec train audio-tokenizer`."""

    model: FSQSettings = field(default_factory=FSQSettings)
    """Sizes."""
    learning: Learning = field(default_factory=Learning)
    """How it learns."""


class _Autoencoder:
    """A network that returns reconstruction, ids and the quantiser's loss, and learns by AdamW.

    Args:
        network: the tokenizer.
        learning: how it learns.
        device: where.
    """

    network: Any
    """The tokenizer."""

    def __init__(self, network: nn.Module, learning: Learning, device: torch.device | str = "cpu") -> None:
        self.network, self.learning, self.device = network.to(device), learning, torch.device(device)
        self.networks = nn.ModuleDict({"tokenizer": network})
        self.optimizers: dict[str, Optimizer] = {
            "tokenizer": AdamW([p for p in network.parameters() if p.requires_grad],
                               lr=learning.learning_rate, betas=(0.9, 0.99),
                               weight_decay=learning.weight_decay)}

    def codec(self) -> nn.Module:
        network: nn.Module = self.network
        return network

    def _step(self, step: int, media: torch.Tensor) -> dict[str, float]:
        optimizer = self.optimizers["tokenizer"]
        rate = self.learning.set_rate(optimizer, step)
        self.network.train()
        media = media.to(self.device)
        again, ids, own_loss = self.network(media)
        error = self.error(again, media)
        loss = error + self.learning.quantiser_weight * own_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        optimizer.step()
        usage = CodebookUsage(self.network.codebook_size)
        usage.add(ids)
        return {"loss": loss.item(), "error": error.item(), "quantiser_loss": own_loss.item(),
                "grad_norm": norm.item(), "lr": rate,
                "perplexity": usage.figures()["perplexity"]}

    def error(self, again: torch.Tensor, media: torch.Tensor) -> torch.Tensor:
        """Return how far a reconstruction is from what it is to be."""
        raise NotImplementedError


class ImageTokenizerTask(_Autoencoder):
    """A tokenizer of pictures that learns from a bank; squared error of pixels.

    Args:
        network: `SimVQTokenizer`, or one that is called the same way.
        learning: how it learns.
        pictures: [n, 3, side, side] uint8.
        heldout: the same, not learned from.
        device: where it learns.
    """

    network: SimVQTokenizer

    def __init__(self, network: SimVQTokenizer, learning: Learning, pictures: Pictures, heldout: Pictures,
                 device: torch.device | str = "cpu") -> None:
        super().__init__(network, learning, device)
        self._pictures, self._heldout = pictures, heldout

    @classmethod
    def create(cls, settings: ImageTokenizerTraining, pictures: Pictures, heldout: Pictures,
             device: torch.device | str = "cpu") -> ImageTokenizerTask:
        """Return a task with a new tokenizer, whose weights are a function of the seed."""
        torch.manual_seed(settings.learning.seed)
        return cls(SimVQTokenizer(settings.model), settings.learning, pictures, heldout, device)

    def learn(self, step: int) -> dict[str, float]:
        rows = batch_rows(len(self._pictures), self.learning.batch_size, self.learning.seed, step)
        return self._step(step, _shares(self._pictures[rows.numpy()]))

    def error(self, again: torch.Tensor, media: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error of pixels in 0..1."""
        return F.mse_loss(again, media)

    def look(self) -> dict[str, float]:
        """Return peak signal-to-noise ratio and use of the codebook on held-out pictures."""
        if not len(self._heldout):
            return {}
        self.network.eval()
        usage, psnr_db = CodebookUsage(self.network.codebook_size), 0.0
        for begin in range(0, len(self._heldout), self.learning.batch_size):
            pictures = _shares(self._heldout[begin:begin + self.learning.batch_size]).to(self.device)
            ids = self.network.encode(pictures)
            usage.add(ids)
            # through the ids and back, as in use; the floor keeps a perfect picture at 100 dB
            error = (self.network.reconstruct(ids) - pictures).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
            psnr_db += float((-_DB * error.log()).sum())
        return {"psnr_db": psnr_db / len(self._heldout), **usage.figures()}


def _shares(pictures: Pictures) -> torch.Tensor:
    """Return uint8 pictures as float32 in 0..1."""
    return torch.from_numpy(pictures.copy()).float() / 255


class AudioTokenizerTask(_Autoencoder):
    """A tokenizer of sounds that learns from a bank; error of log-mel frames.

    Args:
        network: `FSQTokenizer`, or one that is called the same way.
        learning: how it learns.
        sounds: learned from.
        heldout: not learned from.
        device: where it learns.
    """

    network: FSQTokenizer

    def __init__(self, network: FSQTokenizer, learning: Learning, sounds: Sounds, heldout: Sounds,
                 device: torch.device | str = "cpu") -> None:
        super().__init__(network, learning, device)
        self._sounds, self._heldout = sounds, heldout

    @classmethod
    def create(cls, settings: AudioTokenizerTraining, sounds: Sounds, heldout: Sounds,
             device: torch.device | str = "cpu") -> AudioTokenizerTask:
        """Return a task with a new tokenizer, whose weights are a function of the seed."""
        torch.manual_seed(settings.learning.seed)
        return cls(FSQTokenizer(settings.model), settings.learning, sounds, heldout, device)

    def learn(self, step: int) -> dict[str, float]:
        """Take one step over pieces that begin anywhere."""
        rows = batch_rows(len(self._sounds), self.learning.batch_size, self.learning.seed, step)
        places = torch.rand(len(rows), generator=generator(self.learning.seed, step, "crops"))
        size = self.learning.crop_tokens * self.network.samples_per_token
        pieces = torch.zeros(len(rows), size)
        for piece, row, place in zip(pieces, rows.tolist(), places.tolist(), strict=True):
            sound = self._sounds[row]
            # a sound shorter than a piece begins at 0 and is followed by silence
            begin = int(place * max(1, len(sound) - size + 1))
            cut = sound[begin:begin + size]
            piece[:len(cut)] = torch.from_numpy(cut)
        return self._step(step, self.network.frames(pieces.to(self.device)))

    def error(self, again: torch.Tensor, media: torch.Tensor) -> torch.Tensor:
        """Return the mean absolute error of log-mel frames, in nepers of power."""
        return F.l1_loss(again, media)

    def look(self) -> dict[str, float]:
        """Return the error of held-out sounds' frames in dB, and use of the codebook."""
        self.network.eval()
        usage, error_db, num_sounds = CodebookUsage(self.network.codebook_size), 0.0, 0
        for row in range(len(self._heldout)):
            sound = torch.from_numpy(self._heldout[row]).to(self.device)
            # whole tokens alone: frames that are filled up would count as error
            tokens = len(sound) // (FRAMES_PER_TOKEN * self.network.frames.hop_samples)
            if not tokens:
                continue
            with torch.no_grad():
                frames = self.network.frames(sound[None, :tokens * self.network.samples_per_token])
                again, ids, _ = self.network(frames)
            usage.add(ids)
            error_db += _DB * F.l1_loss(again, frames).item()
            num_sounds += 1
        return {"mel_error_db": error_db / num_sounds, **usage.figures()} if num_sounds else {}


# From media files to a trained tokenizer's folder.

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
    plan = CodecTrainingPlan(kind="simvq" if sees else "fsq", output=output, steps=settings.learning.steps,
                             settings={**plain(settings), "media": files.digest,
                                       **digests("encoder", encoder)},
                             checkpoint_every_s=checkpoint_every_s, look_every=look_every,
                             overwrite=overwrite)
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

        train, heldout = (picture_bank(folder / f"{part}.bin", names, side,
                                       name_refusals(files.root, picture))
                          for part, names in (("train", files.train), ("heldout", files.heldout)))
        task = ImageTokenizerTask.create(settings, train, heldout, device=device)
        # over the weights that were drawn: what sees is the published network, and stays it
        if encoder is not None and isinstance(sees := task.network.encoder, SiglipFeatures):
            load_siglip(sees, encoder)
        return task
    rate_hz = settings.model.sample_rate_hz

    def sound(name: str) -> np.ndarray[Any, Any]:
        return reader.sound(name, rate_hz).arrays[0]

    sounds, others = (SoundBank(folder / f"{part}.bin", names, name_refusals(files.root, sound))
                      for part, names in (("train", files.train), ("heldout", files.heldout)))
    return AudioTokenizerTask.create(settings, sounds, others, device=device)


def name_refusals(root: Path, read: Read) -> Read:
    """Return a reader whose refusals are sentences for the user."""
    def checked(name: str) -> np.ndarray[Any, Any]:
        with naming_file(root / name):
            return read(name)

    return checked


@contextmanager
def naming_file(file: Path) -> Iterator[None]:
    """Turn the refusal of a medium into a sentence that begins with its name."""
    try:
        yield
    except BadRecord as e:
        raise UserError(f"{file}: {e.reason}") from None


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
    # before anything is written: the second would silently replace the first
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

    with MediaReader(file.parent) as reader, naming_file(file):
        seen = reader.picture(file.name, (codec.side_pixels,)).arrays[0]
    again = decode(codec.encode(torch.from_numpy(seen.copy())[None].float() / 255)[0])
    pixels = (again * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    write_output(target, written.getvalue())


def _sound(codec: Any, decode: Decode, rate_hz: int, file: Path, target: Path) -> None:
    import soundfile

    with MediaReader(file.parent) as reader, naming_file(file):
        heard = reader.sound(file.name, codec.sample_rate_hz).arrays[0]
    again: np.ndarray[Any, Any] = decode(codec.encode(torch.from_numpy(heard.copy()))).numpy()
    written = io.BytesIO()
    # without the silence that filled up the last token
    soundfile.write(written, again[:len(heard) * rate_hz // codec.sample_rate_hz], rate_hz, subtype="PCM_16",
                    format="WAV")
    write_output(target, written.getvalue())
