"""How the picture decoder learns: the velocity from a picture to noise, at random noise levels.

Rectified flow (arXiv 2209.03003): `x = (1 - level) * picture + level * noise`, and the network says
`noise - picture`.  Levels lie around the middle (logit-normal, arXiv 2403.03206); that choice is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from megatron_sov.codecs.images.dit import DiT
from megatron_sov.codecs.training.draws import batch_rows, generator
from megatron_sov.codecs.training.learning_rate import set_learning_rate

LOOK_PICTURES = 256
"""Held-out pictures that are looked at."""


@dataclass(frozen=True)
class ImageDecoderTraining:
    """How a picture decoder is trained; all of it is ours."""

    steps: int = 100_000
    """Optimizer steps."""
    batch_size: int = 64
    """Pictures of a step."""
    learning_rate: float = 3e-4
    """The highest."""
    warmup_steps: int = 100
    """Until it is reached."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened."""
    seed: int = 0
    """Of the order, the noise and the first weights."""

    def problems(self) -> list[str]:
        """Return what is wrong, one sentence each."""
        found = [f"{name} = {getattr(self, name)} must be at least 1" for name in ("steps", "batch_size")
                 if getattr(self, name) < 1]
        found += [f"{name} = {getattr(self, name)} must be above 0"
                  for name in ("learning_rate", "max_grad_norm") if not getattr(self, name) > 0]
        if self.warmup_steps < 0:
            found.append(f"warmup_steps = {self.warmup_steps} must be 0 or more")
        return found


class ImageDecoderTask:
    """A picture decoder and pictures with their tokens."""

    def __init__(self, settings: ImageDecoderTraining, decoder: DiT, pictures: torch.Tensor,
                 ids: torch.Tensor, heldout: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Args:
            settings: how to train.
            decoder: its `token_embeddings` are those of the tokenizer; an autoencoder stays as it is.
            pictures: [n, 3, side, side] uint8, or float32 in 0..1.
            ids: [n, grid * grid] tokens of each.
            heldout: pictures and ids that are not learned from.
        """
        if decoder.vae is not None:
            decoder.vae.requires_grad_(False)
        self.settings = settings
        self.decoder = decoder
        self.pictures, self.ids, self.heldout = pictures, ids, heldout
        self.networks = nn.ModuleDict({"decoder": decoder})
        learned = [weight for weight in decoder.parameters() if weight.requires_grad]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "decoder": torch.optim.AdamW(learned, settings.learning_rate, betas=(0.9, 0.95),
                                         weight_decay=0.0)}

    def learn(self, step: int) -> dict[str, float]:
        """Take an optimizer step; returns `loss`, the mean square of the velocity's error, `grad_norm` and
        `lr`."""
        s, optimizer = self.settings, self.optimizers["decoder"]
        set_learning_rate(optimizer, s.learning_rate, step, s.warmup_steps, s.steps)
        rows = batch_rows(len(self.pictures), s.batch_size, s.seed, step)
        self.decoder.train()
        loss = self._loss(self.pictures[rows], self.ids[rows], generator(s.seed, step, "noise"))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], s.max_grad_norm)
        optimizer.step()
        return {"loss": loss.item(), "grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"]}

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Return `loss` on held-out pictures, always under the same noise."""
        if self.heldout is None:
            return {}
        self.decoder.eval()
        pictures, ids = (part[:LOOK_PICTURES] for part in self.heldout)
        return {"loss": self._loss(pictures, ids, generator(self.settings.seed, 0, "look")).item()}

    def codec(self) -> DiT:
        """Return the decoder."""
        return self.decoder

    def _loss(self, pictures: torch.Tensor, ids: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
        device = self.decoder.place_in.weight.device
        clean = pictures.to(device)
        with torch.no_grad():
            latents = self.decoder.to_latents(clean / 255 if clean.dtype == torch.uint8 else clean)
        noise = torch.randn(latents.shape, generator=draws).to(device)
        level = torch.randn(len(latents), generator=draws).sigmoid().to(device)
        share = level[:, None, None, None]
        velocity = self.decoder((1 - share) * latents + share * noise, level, ids.to(device))
        return functional.mse_loss(velocity, noise - latents)
