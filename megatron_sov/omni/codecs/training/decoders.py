"""From media files and a tokenizer to a trained decoder's folder: pictures by flow matching, speech by a
vocoder that learns from the distance of spectra, and from judges that make it as crisp as BigVGAN's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Le, Len, MultipleOf
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from megatron_sov.base.artifacts import manifest_sha256
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Bound, Breach, ProblemCode, SettingsError, plain, problems_of
from megatron_sov.omni.codecs.bigvgan import UnitBigVGAN
from megatron_sov.omni.codecs.decoder_settings import DiTSettings, UnitBigVGANSettings
from megatron_sov.omni.codecs.dit import DiT, open_vae
from megatron_sov.omni.codecs.folder import open_codec
from megatron_sov.omni.codecs.training.banks import (
    PICTURES, SOUNDS, Ids, MediaFiles, Pictures, Ragged, SoundBank, id_bank, media_files, picture_bank)
from megatron_sov.omni.codecs.training.loop import (
    CodecSchedule, CodecTrainingPlan, batch_rows, generator, train)
from megatron_sov.omni.codecs.training.tokenizers import digests, name_refusals
from megatron_sov.omni.media.reading.reader import MediaReader

# Judges that a vocoder learns to deceive: of the samples at several periods, and of spectra at several
# resolutions. The shapes are BigVGAN's multi-period and multi-resolution discriminators (NVIDIA/BigVGAN,
# discriminators.py), with their widths as a setting; the losses are its least-squares ones (loss.py).

PERIODS = (2, 3, 5, 7, 11)
"""Samples that lie side by side for each judge of the samples."""
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
"""Samples of each transform, between two of its frames, and of its window."""
FEATURE_WEIGHT = 2.0
"""Of the distance between what the judges see in real and in made sound."""
_SLOPE = 0.1


class CriticVerdict(NamedTuple):
    """What one judge says of a batch of sound."""

    score: torch.Tensor
    """Above all 1 for real, 0 for made."""
    features: list[torch.Tensor]
    """What its layers saw."""


class PeriodJudge(nn.Module):
    """Convolutions over every `period`-th sample."""

    def __init__(self, period: int, width: int) -> None:
        super().__init__()
        self.period = period
        widths = [1, width, 4 * width, 16 * width, 32 * width]
        self.layers = nn.ModuleList(
            [*(weight_norm(nn.Conv2d(a, b, (5, 1), (3, 1), padding=(2, 0)))
               for a, b in pairwise(widths)),
             weight_norm(nn.Conv2d(widths[-1], widths[-1], (5, 1), padding=(2, 0)))])
        self.last = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, sound: torch.Tensor) -> CriticVerdict:
        """Judge [n, t] samples."""
        # to whole periods: samples become [t / period, period], and the kernel runs along time
        missing = -sound.shape[-1] % self.period
        padded = functional.pad(sound[:, None], (0, missing), mode="reflect")
        return _through(padded.unflatten(-1, (-1, self.period)), self.layers, self.last)


class SpectrumJudge(nn.Module):
    """Convolutions over the magnitudes of a spectrum."""

    def __init__(self, resolution: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.transform, self.hop, self.window = resolution
        strides = ((1, 1), (1, 2), (1, 2), (1, 2))
        self.layers = nn.ModuleList(
            [*(weight_norm(nn.Conv2d(width if i else 1, width, (3, 9), stride, padding=(1, 4)))
               for i, stride in enumerate(strides)),
             weight_norm(nn.Conv2d(width, width, (3, 3), padding=(1, 1)))])
        self.last = weight_norm(nn.Conv2d(width, 1, (3, 3), padding=(1, 1)))

    def forward(self, sound: torch.Tensor) -> CriticVerdict:
        """Judge [n, t] samples."""
        # so much at both ends that there is a frame for each hop, as in BigVGAN's code
        side = (self.transform - self.hop) // 2
        padded = functional.pad(sound[:, None], (side, side), mode="reflect").squeeze(1)
        spectrum = torch.stft(padded, self.transform, self.hop, self.window, center=False,
                              window=torch.ones(self.window, device=sound.device), return_complex=True)
        return _through(spectrum.abs()[:, None], self.layers, self.last)


class Judges(nn.Module):
    """All of them."""

    def __init__(self, width: int, periods: Sequence[int],
                 resolutions: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        self.judges = nn.ModuleList([*(PeriodJudge(period, width) for period in periods),
                                     *(SpectrumJudge(resolution, width) for resolution in resolutions)])

    def forward(self, sound: torch.Tensor) -> list[CriticVerdict]:
        """Return each one's verdict of [n, t] samples."""
        return [judge(sound) for judge in self.judges]


def judges_loss(real: list[CriticVerdict], made: list[CriticVerdict]) -> torch.Tensor:
    """Return how far the judges are from saying 1 of real sound and 0 of made sound."""
    return torch.stack([((1 - r.score)**2).mean() + (m.score**2).mean()
                        for r, m in zip(real, made, strict=True)]).sum()


def deceiving_loss(real: list[CriticVerdict], made: list[CriticVerdict]) -> torch.Tensor:
    """Return how far made sound is from a score of 1, and from what the judges see in real sound."""
    scores = torch.stack([((1 - m.score)**2).mean() for m in made]).sum()
    # the real side is a fixed target
    distances = torch.stack([(a.detach() - b).abs().mean() for r, m in zip(real, made, strict=True)
                             for a, b in zip(r.features, m.features, strict=True)]).sum()
    return scores + FEATURE_WEIGHT * distances


def _through(seen: torch.Tensor, layers: nn.ModuleList, last: nn.Module) -> CriticVerdict:
    features = []
    for layer in layers:
        seen = functional.leaky_relu(layer(seen), _SLOPE)
        features.append(seen)
    score = last(seen)
    return CriticVerdict(score.flatten(1), [*features, score])


# How far one sound is from another to the ear: logarithmic mel spectra at several resolutions. The form is
# that of BigVGAN-v2's training (NVIDIA/BigVGAN, loss.py `MultiScaleMelSpectrogramLoss`, after
# descript-audio-codec), with linear magnitudes beside the mels ("multi-resolution STFT", arXiv 1910.11480).

HOPS_PER_WINDOW = 4
"""Frames that overlap."""


def mel_filters(sample_rate_hz: int, window: int, num_mels: int) -> torch.Tensor:
    """Return [num_mels, window // 2 + 1] triangular filters, equally wide on Slaney's mel scale, of equal
    area (transformers' `mel_filter_bank`); one too narrow for the window's resolution is empty."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(window // 2 + 1, num_mels, 0.0, sample_rate_hz / 2, sample_rate_hz,
                              norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float().T


class SpectralLoss(nn.Module):
    """The mean distance of two batches of sound over all resolutions."""

    def __init__(self, sample_rate_hz: int, windows: tuple[int, ...], num_mels: int,
                 quiet: float = 1e-5) -> None:
        """Args:
            sample_rate_hz: of the sounds.
            windows: samples of each resolution's window.
            num_mels: of the largest window; a smaller window has fewer, in proportion.
            quiet: magnitudes well below it are all silence; a tone of amplitude 1 has window / 4.
        """
        super().__init__()
        self.windows, self.quiet = windows, quiet
        for window in windows:
            mels = max(num_mels * window // max(windows), 4)
            self.register_buffer(f"hann{window}", torch.hann_window(window), persistent=False)
            self.register_buffer(f"mels{window}", mel_filters(sample_rate_hz, window, mels), persistent=False)

    def forward(self, made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Return the distance of [n, t] samples from [n, t] samples, 0 where they are equal."""
        parts = []
        for window in self.windows:
            of_made, of_real = self._magnitudes(made, window), self._magnitudes(real, window)
            # spectral convergence: what is loud counts as much as it is loud
            parts.append((of_real - of_made).norm() / of_real.norm())
            filters = self.get_buffer(f"mels{window}")
            mels_of_made, mels_of_real = filters @ of_made + self.quiet, filters @ of_real + self.quiet
            parts += [(of_made.log() - of_real.log()).abs().mean(),
                      (mels_of_made.log() - mels_of_real.log()).abs().mean()]
        return torch.stack(parts).sum() / len(self.windows)

    def _magnitudes(self, sound: torch.Tensor, window: int) -> torch.Tensor:
        spectrum = torch.stft(sound, window, window // HOPS_PER_WINDOW, pad_mode="constant",
                              window=self.get_buffer(f"hann{window}"), return_complex=True)
        # never 0, where neither root nor logarithm has a slope
        return (spectrum.real**2 + spectrum.imag**2 + self.quiet**2).sqrt()


LOOK_SOUNDS = 64
"""Held-out sounds that are looked at."""
MAX_WINDOWS = 16
MAX_VOCODER_GRAD_NORM = 500.0
"""Longer gradients are shortened; BigVGAN-v2's."""


def _no_resolution(resolution: tuple[int, int, int]) -> Breach | None:
    transform, hop, window = resolution
    return None if 1 <= hop <= window <= transform <= 1 << 20 else (
        ProblemCode.BOUND, "must be transform, hop and window, none of them larger than the first", "")


@dataclass(frozen=True)
class VocoderLearning(CodecSchedule):
    """How a vocoder learns.  Windows, weight and widths of the judges are BigVGAN-v2's
    (configs/bigvgan_v2_24khz_100band_256x.json, loss.py); the rest is ours."""

    steps: Annotated[int, Ge(1), Le(100_000_000)] = 1_000_000
    """Optimizer steps."""
    batch_size: Annotated[int, Ge(1), Le(1_000_000)] = 32
    """Segments of a step."""
    learning_rate: Annotated[float, Ge(0), Le(10)] = 1e-4
    """Of AdamW, at its highest; the judges' too."""
    segment_tokens: Annotated[int, Ge(1), Le(10000)] = 32
    """Tokens of a segment; a shorter sound is taken whole."""
    windows: Annotated[tuple[Annotated[int, Ge(16), Le(1 << 20), MultipleOf(HOPS_PER_WINDOW)], ...],
                       Len(1, MAX_WINDOWS)] = (32, 64, 128, 256, 512, 1024, 2048)
    """Samples of the windows of the spectra."""
    num_mels: Annotated[int, Ge(4), Le(4096)] = 320
    """Bands of the largest window's mel spectrum."""
    quiet: Annotated[float, Ge(1e-09), Le(1)] = 1e-5
    """Magnitudes well below it count as silence."""
    judges_from_step: Annotated[int, Ge(0), Le(100000000)] = 1
    """Step from which the judges are asked; 0: never, there are none."""
    judges_width: Annotated[int, Ge(1), Le(1024)] = 32
    """Of their first layers."""
    judges_periods: tuple[Annotated[int, Ge(1), Le(1000)], ...] = PERIODS
    """Samples that lie side by side for each judge of samples."""
    judges_resolutions: tuple[Annotated[tuple[int, int, int], Bound(_no_resolution)], ...] = RESOLUTIONS
    """Transform, hop and window, in samples, for each judge of spectra."""
    spectral_weight: Annotated[float, Ge(1e-06), Le(1000000.0)] = 15.0
    """Of the spectra's distance beside the judges."""


@dataclass(frozen=True)
class VocoderTraining:
    """Settings of `codec train vocoder`."""

    model: UnitBigVGANSettings = field(default_factory=UnitBigVGANSettings)
    """Sizes; speakers and tokens are those of the media and of the tokenizer."""
    learning: VocoderLearning = field(default_factory=VocoderLearning)
    """How it learns."""


@dataclass(frozen=True)
class Spoken:
    """One sound to learn from."""

    ids: torch.Tensor
    """[t] tokens."""
    sound: torch.Tensor
    """[samples] float32 in -1..1 at the vocoder's rate."""
    speaker: int
    """Row of the vocoder's table."""


class VocoderTask:
    """A vocoder, judges where they are asked for, and sounds with their tokens."""

    def __init__(self, vocoder: UnitBigVGAN, learning: VocoderLearning, sounds: Sequence[Spoken],
                 heldout: Sequence[Spoken]) -> None:
        """Args:
            vocoder: what learns.
            learning: how it learns.
            sounds: to learn from.
            heldout: not to learn from.
        """
        self.vocoder, self.learning, self.sounds, self.heldout = vocoder, learning, sounds, heldout
        self.networks = nn.ModuleDict({"vocoder": vocoder})
        device = vocoder.voices.weight.device
        self.distance = SpectralLoss(vocoder.sample_rate_hz, learning.windows, learning.num_mels,
                                     learning.quiet).to(device)
        self.judges: Judges | None = None
        if learning.judges_from_step:
            self.judges = Judges(learning.judges_width, learning.judges_periods,
                                 learning.judges_resolutions).to(device)
            self.networks["judges"] = self.judges
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            name: torch.optim.AdamW(network.parameters(), learning.learning_rate, betas=(0.8, 0.99),
                                    weight_decay=0.0) for name, network in self.networks.items()}

    def learn(self, step: int) -> dict[str, float]:
        """Take an optimizer step of the judges, if they are asked, and one of the vocoder.

        Returns `loss`, `spectral`, `grad_norm`, and with judges `judges` and `deceiving`.
        """
        s = self.learning
        for optimizer in self.optimizers.values():
            s.set_rate(optimizer, step)
        rows = batch_rows(len(self.sounds), s.batch_size, s.seed, step).tolist()
        real, made = self._heard([self.sounds[row] for row in rows], generator(s.seed, step, "segments"))
        spectral = self.distance(made, real)
        if self.judges is None or step < s.judges_from_step:
            norm = self._step("vocoder", spectral)
            return {"loss": spectral.item(), "spectral": spectral.item(), "grad_norm": norm}
        # detached: the judges' step must not reach the vocoder
        judged = judges_loss(self.judges(real), self.judges(made.detach()))
        self._step("judges", judged)
        # the vocoder's gradient passes through them and none is kept of their own weights
        self.judges.requires_grad_(False)
        deceiving = deceiving_loss(self.judges(real), self.judges(made))
        loss = s.spectral_weight * spectral + deceiving
        norm = self._step("vocoder", loss)
        self.judges.requires_grad_(True)
        return {"loss": loss.item(), "spectral": spectral.item(), "grad_norm": norm, "judges": judged.item(),
                "deceiving": deceiving.item()}

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Return `spectral` on the begins of held-out sounds."""
        if not self.heldout:
            return {}
        rows = range(min(len(self.heldout), LOOK_SOUNDS))
        real, made = self._heard([self.heldout[row] for row in rows], None)
        return {"spectral": self.distance(made, real).item()}

    def codec(self) -> UnitBigVGAN:
        return self.vocoder

    def _step(self, name: str, loss: torch.Tensor) -> float:
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.networks[name].parameters(), MAX_VOCODER_GRAD_NORM)
        optimizer.step()
        return norm.item()

    def _heard(self, sounds: Sequence[Spoken],
               draws: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return real and made sound [n, samples] of a segment of each; silence behind short ones in both.

        Args:
            sounds: one a row.
            draws: where segments begin; None: at the begin.
        """
        sizes, length = self.vocoder.settings, self.learning.segment_tokens
        samples, ahead = sizes.samples_per_token, sizes.lookahead_tokens
        # ids have the lookahead behind the segment, the sound has not
        ids = torch.full((len(sounds), length + ahead), self.vocoder.behind_end)
        real = torch.zeros(len(sounds), length * samples)
        there = torch.zeros(len(sounds), length)
        for row, spoken in enumerate(sounds):
            # the segment begins at a token, so that ids and samples stay together
            last = max(len(spoken.ids) - length, 0)
            first = 0 if draws is None else int(torch.randint(last + 1, (), generator=draws))
            tokens = spoken.ids[first:first + length + ahead]
            num_tokens = min(len(tokens), length)
            piece = spoken.sound[first * samples:(first + num_tokens) * samples]
            ids[row, :len(tokens)], real[row, :len(piece)], there[row, :num_tokens] = tokens, piece, 1.0
        device = self.vocoder.voices.weight.device
        voices = self.vocoder.voices(torch.tensor([spoken.speaker for spoken in sounds], device=device))
        made = self.vocoder(ids.to(device), voices)
        # behind a short sound both are silent: what is made there is no fault
        return real.to(device), made * there.repeat_interleave(samples, 1).to(device)


# How the picture decoder learns: the velocity from a picture to noise, at random noise levels.
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


class DrawnPictures(NamedTuple):
    """Pictures and what their tokenizer says of them."""

    pictures: Pictures
    """[n, 3, side, side] uint8."""
    ids: Ids
    """[n, grid * grid] tokens of each."""


class ImageDecoderTask:
    """A picture decoder and pictures with their tokens."""

    def __init__(self, decoder: DiT, learning: CodecSchedule, drawn: DrawnPictures,
                 heldout: DrawnPictures) -> None:
        """Args:
            decoder: its `token_embeddings` are those of the tokenizer; an autoencoder stays as it is.
            learning: how it learns.
            drawn: to learn from.
            heldout: not to learn from.
        """
        if decoder.vae is not None:
            # the latents are its own: were it to learn, the target would move
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
        return self.decoder

    def _loss(self, pictures: Pictures, ids: Ids, draws: torch.Generator) -> torch.Tensor:
        device = self.decoder.place_in.weight.device
        with torch.no_grad():
            # a copy: the bank is mapped for reading alone, and torch wants memory that may be written
            latents = self.decoder.to_latents(torch.from_numpy(pictures.copy()).to(device) / 255)
        # drawn on the CPU: the same on every device
        noise = torch.randn(latents.shape, generator=draws).to(device)
        # the sigmoid of a normal number: logit-normal
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
    # what tokenizer and files say is not left to the user
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
    # the held-out ones as well: a voice that is heard there alone needs a row of the table, too
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
        DrawnPictures(picture_bank(folder / f"{part}.bin", names, side,
                           name_refusals(files.root, lambda name: reader.picture(name, (side,)).arrays[0])),
              id_bank(folder / f"{part}.ids", names, codec.grid**2, name_refusals(files.root, ids)))
        for part, names in (("train", files.train), ("heldout", files.heldout)))
    torch.manual_seed(settings.learning.seed)
    decoder = DiT(settings.model)
    # the tokenizer's embeddings go with the decoder, which then needs no tokenizer
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
        SpokenBank(SoundBank(folder / f"{part}.bin", names, name_refusals(files.root, sound)),
                   Ragged(folder / f"{part}.ids", names, name_refusals(files.root, ids), np.dtype(np.int32)),
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
        return Spoken(torch.from_numpy(self._ids.row(row).astype(np.int64)),
                      torch.from_numpy(self._sounds[row]), self._speakers[row])
