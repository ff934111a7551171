"""Tokenizers that quantise: SimVQ over unit vectors for pictures, finite scalar quantisation for speech.

Both are small enough to be trained here, and have a decoder that training needs and use does not; TA-Tok is
the published tokenizer in SimVQ's shape.  The quantisers are those of vector-quantize-pytorch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le, Len, MultipleOf
from torch import nn
from vector_quantize_pytorch import FSQ, SimVQ

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Bound, Breach, ProblemCode, SettingsProblem, find_broken, multiple_of
from megatron_sov.omni.codecs.siglip import SiglipFeatures, SiglipSettings, used

# SimVQ (https://arxiv.org/abs/2411.02038) over unit vectors, as TA-Tok (https://arxiv.org/abs/2506.18898) has
# it: codes are a frozen table behind one linear layer that is learned, and all of them move with it, so that
# none dies for want of use. Codes and vectors are normalised: the nearest code has the largest cosine.

_SCORES = 1 << 26
"""Numbers of a table of vectors by codes that is made at a time."""


class UnitLength(nn.Module):
    """Vectors at length 1."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return vectors of the last axis, normalised."""
        return F.normalize(vectors, dim=-1)


class UnitSimVQ(nn.Module):
    """SimVQ over unit vectors.

    Args:
        width: of the vectors.
        codebook_size: codes.
        bias: whether the layer before the codes has one; TA-Tok's does.
    """

    def __init__(self, width: int, codebook_size: int, bias: bool = False) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.book = SimVQ(dim=width, codebook_size=codebook_size,
                          codebook_transform=nn.Sequential(nn.Linear(width, width, bias=bias), UnitLength()))
        """The library's: `frozen_codebook` [codes, width] and `code_transform`."""

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return codes [n, t, width], ids [n, t] and the commitment loss of [n, t, width] vectors; gradients
        pass the codes by the library's rotation."""
        codes, ids, loss = self.book(F.normalize(vectors, dim=-1))
        return codes, ids, loss

    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the ids [n, t] of [n, t, width] vectors, in bounded memory."""
        # once and not for each part: the whole table goes through the learned layer
        codes, flat = self.book.codebook, F.normalize(vectors, dim=-1).flatten(0, 1)
        # 1,024 vectors at a time for 65,536 codes, else the table of distances is the largest tensor
        rows = max(1, _SCORES // self.codebook_size)
        ids = torch.cat([torch.cdist(part, codes).argmin(-1) for part in flat.split(rows)])
        return ids.view(vectors.shape[:2])

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        codes: torch.Tensor = self.book.code_transform(F.embedding(ids, self.book.frozen_codebook))
        return codes


MAX_CODEBOOK_SIZE = 1 << 20


@dataclass(frozen=True)
class SimVQSettings:
    """Sizes of the networks."""

    side_pixels: Annotated[int, Ge(1), Le(4096)] = 384
    """Height and width of a picture; a whole number of patches."""
    grid: Annotated[int, Ge(1), Le(256)] = 24
    """Patches of a row and of a column: a picture has grid * grid tokens."""
    width: Annotated[int, Ge(1), Le(16384), multiple_of("num_heads")] = 384
    """Of the transformers."""
    num_layers: Annotated[int, Ge(1), Le(100)] = 6
    """Of the encoder, and of the decoder."""
    num_heads: Annotated[int, Ge(1), Le(256)] = 6
    """Of attention; divides `width`."""
    code_width: Annotated[int, Ge(1), Le(16384)] = 64
    """Of the codebook's vectors."""
    codebook_size: Annotated[int, Ge(2), Le(MAX_CODEBOOK_SIZE)] = 65_536
    """Tokens there are."""
    siglip: SiglipSettings | None = None
    """A SigLIP, frozen, that sees in place of an encoder that is learned."""

    def problems(self) -> list[SettingsProblem]:
        found = []
        if self.siglip is not None and self.side_pixels // self.siglip.patch_pixels != self.grid:
            found.append(SettingsProblem(ProblemCode.RULE, "grid",
                                         "must be the number of siglip's patches of "
                                         f"{self.siglip.patch_pixels} pixels in side_pixels = "
                                         f"{self.side_pixels}",
                                         self.grid))
        if self.siglip is None and self.side_pixels % self.grid:
            found.append(SettingsProblem(ProblemCode.RULE, "side_pixels",
                                         f"must be a multiple of grid = {self.grid}", self.side_pixels))
        return found


class SimVQTokenizer(nn.Module):
    """Pictures as ids; an `folder.ImageTokenizer` with a decoder of its own."""

    Settings = SimVQSettings

    def __init__(self, settings: SimVQSettings) -> None:
        super().__init__()
        self.settings = settings
        self.side_pixels, self.grid = settings.side_pixels, settings.grid
        self.codebook_size, self.width = settings.codebook_size, settings.code_width
        patch = settings.side_pixels // settings.grid
        tokens = settings.grid ** 2
        if settings.siglip is None:
            self.encoder: nn.Module = _PatchEncoder(settings)
            self.to_code = nn.Linear(settings.width, settings.code_width)
        else:
            # published features, which a codebook is learned over
            self.encoder = SiglipFeatures(settings.siglip, settings.side_pixels).requires_grad_(False)
            self.to_code = nn.Linear(settings.siglip.width, settings.code_width)
        self.quantiser = self.make_quantiser()
        self.from_code = nn.Linear(settings.code_width, settings.width)
        self.drawn_at = nn.Parameter(torch.randn(tokens, settings.width) * 0.02)
        self.decoder = _transformer(settings)
        self.to_pixels = nn.Linear(settings.width, 3 * patch * patch)

    def make_quantiser(self) -> Any:
        """Return what finds codes; a baseline may put another one here."""
        return UnitSimVQ(self.settings.code_width, self.settings.codebook_size)

    def _vectors(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return the vectors [n, tokens, code_width] before the codebook."""
        vectors: torch.Tensor = self.to_code(self.encoder(pictures))
        return vectors

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return reconstructions [n, 3, side, side], ids and the quantiser's loss, for training."""
        codes, ids, loss = self.quantiser(self._vectors(pictures))
        return self._draw(codes), ids, loss

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return [n, grid * grid] int64 ids of [n, 3, side, side] float32 pictures in 0..1."""
        with torch.no_grad():
            ids: torch.Tensor = self.quantiser.nearest(self._vectors(pictures))
        return ids

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [n, grid * grid, width] float32 embeddings of ids."""
        with torch.no_grad():
            codes: torch.Tensor = self.quantiser.embed(ids)
        return codes

    def reconstruct(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the pictures [n, 3, side, side] in 0..1 that the plain decoder draws of ids."""
        with torch.no_grad():
            return self._draw(self.embed(ids)).clamp(0, 1)

    def _draw(self, codes: torch.Tensor) -> torch.Tensor:
        patches = self.to_pixels(self.decoder(self.from_code(codes) + self.drawn_at)).transpose(1, 2)
        patch = self.side_pixels // self.grid
        # around grey, the middle of 0..1: the network need not learn it
        drawn = F.fold(patches, self.grid * patch, kernel_size=patch, stride=patch) + 0.5
        # SigLIP leaves a border unseen where patches do not fill the side: the picture is stretched over it
        if self.grid * patch == self.side_pixels:
            return drawn
        return F.interpolate(drawn, size=self.side_pixels, mode="bilinear", align_corners=False)


class _PatchEncoder(nn.Module):
    """A small vision transformer."""

    def __init__(self, settings: SimVQSettings) -> None:
        super().__init__()
        patch = settings.side_pixels // settings.grid
        self.to_patches = nn.Conv2d(3, settings.width, patch, stride=patch)
        self.seen_at = nn.Parameter(torch.randn(settings.grid ** 2, settings.width) * 0.02)
        self.layers = _transformer(settings)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return states [n, patches, width] of pictures in 0..1."""
        patches = self.to_patches(pictures * 2 - 1).flatten(2).transpose(1, 2)
        states: torch.Tensor = self.layers(patches + self.seen_at)
        return states


def _transformer(settings: SimVQSettings) -> nn.Module:
    layers = (nn.TransformerEncoderLayer(settings.width, settings.num_heads, 4 * settings.width, dropout=0.0,
                                         activation="gelu", batch_first=True, norm_first=True)
              for _ in range(settings.num_layers))
    return nn.Sequential(*layers, nn.LayerNorm(settings.width))


_SO400M_HEADS = 16
"""Of attention in SigLIP so400m; no tensor tells it."""
_POSITIONS = "encoder.embeddings.position_embedding.weight"
_PATCHES = "encoder.embeddings.patch_embedding.weight"


@dataclass(frozen=True)
class TATokSettings:
    """Sizes: TA-Tok's own."""

    side_pixels: Annotated[int, Ge(1), Le(4096)] = 384
    """Height and width of a picture: 27 patches of 14, and 6 pixels that are not seen."""
    encoder: SiglipSettings = field(default_factory=SiglipSettings)
    """SigLIP 2 so400m."""
    code_width: Annotated[int, Ge(1), Le(16384)] = 1536
    """Of the codebook's vectors."""
    codebook_size: Annotated[int, Ge(2), Le(1 << 20)] = 65_536
    """Tokens there are."""

    def problems(self) -> list[SettingsProblem]:
        return find_broken(self, "", (
            self.encoder.patch_pixels <= self.side_pixels, "encoder.patch_pixels",
            f"must be at most side_pixels = {self.side_pixels}"))


class TATok(nn.Module):
    """Pictures as ids; an `folder.ImageTokenizer`."""

    Settings = TATokSettings

    def __init__(self, settings: TATokSettings) -> None:
        super().__init__()
        self.settings = settings
        self.side_pixels = settings.side_pixels
        self.grid = settings.side_pixels // settings.encoder.patch_pixels
        self.codebook_size, self.width = settings.codebook_size, settings.code_width
        width = settings.encoder.width
        self.encoder = SiglipFeatures(settings.encoder, settings.side_pixels)
        self.task = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.to_code = nn.Linear(width, settings.code_width)
        self.quantiser = UnitSimVQ(settings.code_width, settings.codebook_size, bias=True)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return [n, grid * grid] int64 ids of [n, 3, side, side] float32 pictures in 0..1."""
        with torch.no_grad():
            return self.quantiser.nearest(self.to_code(self.task(self.encoder(pictures))))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [n, grid * grid, width] float32 embeddings of ids: unit vectors."""
        with torch.no_grad():
            return self.quantiser.embed(ids)


def ta_tok_state(found: Mapping[str, torch.Tensor],
                 where: str) -> tuple[TATokSettings, dict[str, torch.Tensor]]:
    """Return settings and state of `TATok` from the tensors of TA-Tok as published.

    Tensors that only its decoder needs are left out; sizes are read off the shapes.

    Args:
        found: TA-Tok's names -> tensors.
        where: the file, for sentences.

    Raises:
        UserError: it is no TA-Tok, or one of another layout.
    """
    regularizer = "bottleneck.regularizer"
    needed = (_PATCHES, _POSITIONS, "encoder.encoder.layers.0.mlp.fc1.weight", "bottleneck.in_linear.weight",
              f"{regularizer}.embedding.weight", f"{regularizer}.embedding_proj.bias",
              "encode_task_layer.0.weight")
    if missing := [name for name in needed if name not in found]:
        raise UserError(f"{where}: lacks {missing[0]}, so it is no TA-Tok; pass ta_tok.pth or the "
                        "safetensors files of a model that has it inside")
    # the file has the last layer too, which is not used: see `used`
    layers = 1 + max(int(name.split(".")[3]) for name in found
                     if name.startswith("encoder.encoder.layers.") and name.split(".")[3].isdigit())
    width, _, patch, _ = _shape(found, _PATCHES, 4, where)
    grid = round(_shape(found, _POSITIONS, 2, where)[0] ** 0.5)
    codebook_size, code_width = _shape(found, f"{regularizer}.embedding.weight", 2, where)
    # 384 = 27 * 14 + 6: the side is not known from the weights where patches do not fill it
    side = 384 if 384 // patch == grid else grid * patch
    encoder = SiglipSettings(patch_pixels=patch, width=width, num_layers=layers - 1,
                             feed_forward_width=_shape(found, needed[2], 2, where)[0],
                             num_heads=_SO400M_HEADS if width % _SO400M_HEADS == 0 else 1)
    settings = TATokSettings(side_pixels=side, encoder=encoder, code_width=code_width,
                             codebook_size=codebook_size)
    names = {"encode_task_layer.": "task.", "bottleneck.in_linear.": "to_code.",
             f"{regularizer}.embedding_proj.": "quantiser.book.code_transform.0.",
             f"{regularizer}.embedding.weight": "quantiser.book.frozen_codebook",
             "encoder.": "encoder.network."}
    state = {}
    for name, tensor in found.items():
        old = next((begin for begin in names if name.startswith(begin)), None)
        if old is not None and (old != "encoder." or used(name.removeprefix(old), layers - 1)):
            state[names[old] + name.removeprefix(old)] = tensor
    return settings, state


def _shape(found: Mapping[str, Any], name: str, num_axes: int, where: str) -> tuple[int, ...]:
    """Return a tensor's shape; `UserError` where it has another number of axes."""
    shape = tuple(found[name].shape)
    if len(shape) != num_axes:
        raise UserError(f"{where}: {name} has the shape {list(shape)}, not {num_axes} axes; it is no TA-Tok")
    return shape


FLOOR = 1e-5
"""Smallest power of a mel band; silence lies here."""
_GRIFFIN_LIM_STEPS = 32
FRAMES_PER_TOKEN = 4
_DILATIONS = (1, 3, 9)
_MEAN, _SCALE = -5.0, 4.0  # of log-mel frames of speech, roughly


# Sound as log-mel frames, and back by Griffin and Lim's search for phases (IEEE TASSP 32, 1984).


class LogMel(nn.Module):
    """Log-mel frames of sounds at one rate.

    Args:
        sample_rate_hz: of the sounds.
        hop_samples: samples from frame to frame.
        num_mels: bands.
    """

    filters: torch.Tensor
    window: torch.Tensor

    def __init__(self, sample_rate_hz: int, hop_samples: int, num_mels: int) -> None:
        super().__init__()
        from transformers.audio_utils import mel_filter_bank

        self.hop_samples = hop_samples
        self.window_samples = 4 * hop_samples
        with warnings.catch_warnings(), torch.device("cpu"):
            warnings.simplefilter("ignore")  # of bands that no frequency falls into, where there are many
            filters = mel_filter_bank(self.window_samples // 2 + 1, num_mels, 0.0, sample_rate_hz / 2,
                                      sample_rate_hz, norm="slaney", mel_scale="slaney")
            transposed = torch.from_numpy(filters).float().T.contiguous()
            self.register_buffer("filters", transposed, persistent=False)
            self.register_buffer("window", torch.hann_window(self.window_samples), persistent=False)

    def forward(self, sounds: torch.Tensor) -> torch.Tensor:
        """Return [n, mels, samples / hop] frames, natural logarithms, of [n, samples] sounds."""
        # a centred transform has one frame more than hops
        power = self._spectra(sounds).abs()[..., :-1] ** 2
        return (self.filters @ power).clamp_min(FLOOR).log()

    def _spectra(self, sounds: torch.Tensor) -> torch.Tensor:
        return torch.stft(sounds, self.window_samples, self.hop_samples, window=self.window, center=True,
                          pad_mode="constant", return_complex=True)

    def sound(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the sounds [n, frames * hop] in -1..1 of [n, mels, frames] log-mel frames; phases begin at
        zero, so that it is a function of them."""
        # least squares: mel bands are fewer than frequencies; negative powers are cut off below
        power = torch.linalg.pinv(self.filters) @ frames.exp()
        size = F.pad(power.clamp_min(0).sqrt(), (0, 1), mode="replicate")
        length = frames.shape[-1] * self.hop_samples
        spectrum = size.to(torch.complex64)
        for _ in range(_GRIFFIN_LIM_STEPS):
            again = self._spectra(self._back(spectrum, length))
            # the magnitudes that are wanted with the phases that a real sound has
            spectrum = size * again / again.abs().clamp_min(1e-8)
        return self._back(spectrum, length).clamp(-1, 1)

    def _back(self, spectrum: torch.Tensor, length: int) -> torch.Tensor:
        return torch.istft(spectrum, self.window_samples, self.hop_samples, window=self.window, length=length)


def _too_many(levels: tuple[int, ...]) -> Breach | None:
    return None if math.prod(levels) <= 1 << 20 else (
        ProblemCode.BOUND, f"must have a product of at most {1 << 20:,}", "")


@dataclass(frozen=True)
class FSQSettings:
    """Sizes of the networks."""

    sample_rate_hz: Annotated[int, Ge(1000), Le(192000)] = 16_000
    """Of what it hears."""
    samples_per_token: Annotated[int, Ge(64), Le(48_000), MultipleOf(FRAMES_PER_TOKEN)] = 640
    """640 at 16 kHz are 25 tokens a second; a multiple of 4."""
    num_mels: Annotated[int, Ge(4), Le(512)] = 80
    """Bands of a frame; a token has four frames."""
    width: Annotated[int, Ge(1), Le(16384)] = 384
    """Of the convolutions."""
    num_blocks: Annotated[int, Ge(1), Le(100)] = 6
    """Of the encoder, and of the decoder."""
    levels: Annotated[tuple[Annotated[int, Ge(3), Le(1024)], ...], Len(1, 16), Bound(_too_many)] = (3,) * 8
    """Of each of the quantised numbers; their product is the size of the codebook."""
    max_piece_s: Annotated[float, Ge(0.5), Le(600)] = 30.0
    """A longer sound is cut into pieces of this length."""


class FSQTokenizer(nn.Module):
    """Speech as ids; an `folder.AudioTokenizer` with a decoder of its own."""

    Settings = FSQSettings

    def __init__(self, settings: FSQSettings) -> None:
        super().__init__()
        self.settings = settings
        self.sample_rate_hz, self.samples_per_token = settings.sample_rate_hz, settings.samples_per_token
        self.codebook_size, self.max_piece_s = math.prod(settings.levels), settings.max_piece_s
        self.width = self.code_width = len(settings.levels)
        self.frames = LogMel(settings.sample_rate_hz, settings.samples_per_token // FRAMES_PER_TOKEN,
                             settings.num_mels)
        width = settings.width
        self.encoder = nn.Sequential(
            nn.Conv1d(settings.num_mels, width, 3, padding=1), nn.GELU(),
            nn.Conv1d(width, width, 4, stride=2, padding=1), nn.GELU(),
            nn.Conv1d(width, width, 4, stride=2, padding=1),
            *(FsqBlock(width, _DILATIONS[i % len(_DILATIONS)]) for i in range(settings.num_blocks)))
        self.to_code = nn.Linear(width, self.code_width)
        self.quantiser = self.make_quantiser()
        self.from_code = nn.Linear(self.code_width, width)
        self.decoder = nn.Sequential(
            *(FsqBlock(width, _DILATIONS[i % len(_DILATIONS)]) for i in range(settings.num_blocks)),
            nn.ConvTranspose1d(width, width, 4, stride=2, padding=1), nn.GELU(),
            nn.ConvTranspose1d(width, width, 4, stride=2, padding=1), FsqBlock(width, 1), nn.GELU(),
            nn.Conv1d(width, settings.num_mels, 3, padding=1))

    def make_quantiser(self) -> Any:
        """Return what finds codes; a baseline may put another one here."""
        return LevelQuantiser(self.settings.levels)

    def _vectors(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the numbers [n, tokens, code_width] before they are rounded."""
        vectors: torch.Tensor = self.to_code(self.encoder((frames - _MEAN) / _SCALE).transpose(1, 2))
        return vectors

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return reconstructed frames, ids and the quantiser's loss of [n, mels, 4 * tokens] frames."""
        codes, ids, loss = self.quantiser(self._vectors(frames))
        return self._frames_of(codes), ids, loss

    def encode(self, sound: torch.Tensor) -> torch.Tensor:
        """Return [t] int64 ids of [s] samples; the last token's silence is filled up."""
        # pieces end between tokens, so that only the last one is filled up
        tokens = int(self.max_piece_s * self.sample_rate_hz / self.samples_per_token)
        piece = max(1, tokens) * self.samples_per_token
        with torch.no_grad():
            ids = [self._piece(part) for part in sound.split(piece)] if len(sound) else []
        return torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int64)

    def _piece(self, sound: torch.Tensor) -> torch.Tensor:
        filled = F.pad(sound, (0, -len(sound) % self.samples_per_token))
        ids: torch.Tensor = self.quantiser.nearest(self._vectors(self.frames(filled[None])))[0]
        return ids

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [t, width] float32 embeddings of ids: the rounded numbers, in -1..1."""
        with torch.no_grad():
            codes: torch.Tensor = self.quantiser.embed(ids)
        return codes

    def reconstruct(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the sound [t * samples_per_token] in -1..1 that the plain decoder and Griffin and Lim's
        search for phases make of ids."""
        with torch.no_grad():
            return self.frames.sound(self._frames_of(self.embed(ids)[None]))[0]

    def _frames_of(self, codes: torch.Tensor) -> torch.Tensor:
        frames: torch.Tensor = self.decoder(self.from_code(codes).transpose(1, 2))
        return frames * _SCALE + _MEAN


class LevelQuantiser(nn.Module):
    """vector-quantize-pytorch's FSQ, as the networks here ask a quantiser."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        with torch.device("cpu"):  # it reads its tables while it is made, and has no weights
            self.grid = FSQ(list(levels))

    def forward(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rounded numbers, ids and no loss; gradients pass straight through the rounding."""
        codes, ids = self.grid(numbers)
        return codes, ids.long(), numbers.new_zeros(())

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the ids [n, t] of [n, t, levels] numbers."""
        ids: torch.Tensor = self.grid(numbers)[1].long()
        return ids

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rounded numbers [..., levels] of ids."""
        codes: torch.Tensor = self.grid.implicit_codebook[ids]
        return codes


class FsqBlock(nn.Module):
    """A residual block of two convolutions over time."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.wide = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.back = nn.Conv1d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, width, t] of the same."""
        out: torch.Tensor = x + self.back(F.gelu(self.wide(self.norm(x))))
        return out
