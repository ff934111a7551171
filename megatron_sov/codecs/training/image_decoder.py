"""How the picture decoder learns: the velocity from a picture to noise, at random noise levels.

Rectified flow (arXiv 2209.03003): `x = (1 - level) * picture + level * noise`, and the network says
`noise - picture`.  Levels lie around the middle (logit-normal, arXiv 2403.03206); that choice is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from megatron_sov.codecs.images.dit import DiT
from megatron_sov.codecs.images.dit_settings import DiTSettings
from megatron_sov.codecs.training.banks import Ids, Pictures
from megatron_sov.codecs.training.draws import batch_rows, generator
from megatron_sov.codecs.training.schedule import Schedule

LOOK_PICTURES = 256
"""Held-out pictures that are looked at."""
MAX_GRAD_NORM = 1.0
"""Longer gradients are shortened; ours."""


@dataclass(frozen=True)
class ImageDecoderTraining:
    """Settings of `codec train image-decoder`."""

    model: DiTSettings = field(default_factory=DiTSettings)
    """Sizes; those of the tokens are the tokenizer's."""
    learning: Schedule = field(default_factory=Schedule)
    """How it learns."""



class Drawn(NamedTuple):
    """Pictures and what their tokenizer says of them."""

    pictures: Pictures
    """[n, 3, side, side] uint8."""
    ids: Ids
    """[n, grid * grid] tokens of each."""


class ImageDecoderTask:
    """A picture decoder and pictures with their tokens."""

    def __init__(self, decoder: DiT, learning: Schedule, drawn: Drawn, heldout: Drawn) -> None:
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
