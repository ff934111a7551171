"""Training tokenizers of pictures and of sounds as autoencoders: what the plain decoder makes of the tokens
is to be what was seen or heard."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import nn
from torch.optim import AdamW, Optimizer

from megatron_sov.codecs.images.simvq import SimVQSettings, SimVQTokenizer
from megatron_sov.codecs.sounds.fsq import FRAMES_PER_TOKEN, FSQSettings, FSQTokenizer
from megatron_sov.codecs.training.banks import Pictures, Sounds
from megatron_sov.codecs.training.draws import batch_rows, generator
from megatron_sov.codecs.training.schedule import Schedule
from megatron_sov.codecs.usage import CodebookUsage

_DB = 10 / math.log(10)


@dataclass(frozen=True)
class Learning(Schedule):
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
        """Return the tokenizer."""
        network: nn.Module = self.network
        return network

    def _step(self, step: int, media: torch.Tensor) -> dict[str, float]:
        """Learn from one batch."""
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
    def made(cls, settings: ImageTokenizerTraining, pictures: Pictures, heldout: Pictures,
             device: torch.device | str = "cpu") -> ImageTokenizerTask:
        """Return a task with a new tokenizer, whose weights are a function of the seed."""
        torch.manual_seed(settings.learning.seed)
        return cls(SimVQTokenizer(settings.model), settings.learning, pictures, heldout, device)

    def learn(self, step: int) -> dict[str, float]:
        """Take one step; see `task.Task`."""
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
    def made(cls, settings: AudioTokenizerTraining, sounds: Sounds, heldout: Sounds,
             device: torch.device | str = "cpu") -> AudioTokenizerTask:
        """Return a task with a new tokenizer, whose weights are a function of the seed."""
        torch.manual_seed(settings.learning.seed)
        return cls(FSQTokenizer(settings.model), settings.learning, sounds, heldout, device)

    def learn(self, step: int) -> dict[str, float]:
        """Take one step over pieces that begin anywhere; see `task.Task`."""
        rows = batch_rows(len(self._sounds), self.learning.batch_size, self.learning.seed, step)
        places = torch.rand(len(rows), generator=generator(self.learning.seed, step, "crops"))
        size = self.learning.crop_tokens * self.network.samples_per_token
        pieces = torch.zeros(len(rows), size)
        for piece, row, place in zip(pieces, rows.tolist(), places.tolist(), strict=True):
            sound = self._sounds[row]
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
