"""Train a tiny image codec (diffusers' VQModel) or audio codec (transformers' DacModel) in minutes.

    python benchmarks/omni/train_codec.py pictures --input DIR --output HF_DIR --steps 1500

`megatron-sov codec import vqmodel | dac HF_DIR CODEC` imports the folder that the script writes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

SIDE_PIXELS, RATE_HZ, FRAME_SAMPLES, CHUNK_FRAMES = 16, 16_000, 640, 16
LEARNING_RATE = 1e-3
RESET_EVERY_STEPS = 50
"""Interval at which codes without a nearest vector become vectors of the batch."""


def read_pictures(folder: Path) -> torch.Tensor:
    """Return pictures [n, 3, side, side] in -1..1."""
    from PIL import Image

    pixels = [np.asarray(Image.open(file).convert("RGB").resize((SIDE_PIXELS, SIDE_PIXELS)))
              for file in sorted(folder.rglob("*.png"))]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def read_sounds(folder: Path) -> torch.Tensor:
    """Return chunks of sounds [n, 1, samples] in -1..1; the last chunk of a file is padded with zeros."""
    import soundfile

    chunks, size = list[np.ndarray](), FRAME_SAMPLES * CHUNK_FRAMES
    for file in sorted(folder.rglob("*.wav")):
        sound, rate_hz = soundfile.read(file, dtype="float32")
        assert rate_hz == RATE_HZ, file
        chunks += list(np.pad(sound, (0, -len(sound) % size)).reshape(-1, 1, size))
    return torch.from_numpy(np.stack(chunks))


def build_vqmodel(codes: int) -> Any:
    """Return an image codec with 4 x 4 tokens per picture."""
    from diffusers import VQModel

    return VQModel(block_out_channels=(32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
                   up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8, num_vq_embeddings=codes,
                   latent_channels=8, sample_size=SIDE_PIXELS)


def build_dac(codes: int) -> Any:
    """Return an audio codec with 25 tokens per second."""
    from transformers import DacConfig, DacModel

    return DacModel(DacConfig(
        encoder_hidden_size=16, decoder_hidden_size=256, downsampling_ratios=[4, 4, 5, 8], n_codebooks=1,
        codebook_size=codes, codebook_dim=8, sampling_rate=RATE_HZ))


def compute_picture_loss(network: Any, pictures: torch.Tensor, step: int) -> torch.Tensor:
    latents = network.encode(pictures).latents
    result = network.decode(latents)
    book = network.quantize.embedding.weight
    if step % RESET_EVERY_STEPS == 1:
        vectors = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
        reset_unused_codes(book, vectors, torch.cdist(vectors, book.detach()).argmin(1))
    return F.mse_loss(result.sample, pictures) + result.commit_loss


def compute_sound_loss(network: Any, sounds: torch.Tensor, step: int) -> torch.Tensor:
    result = network(sounds)
    decoded = F.pad(result.audio_values, (0, sounds.shape[-1] - result.audio_values.shape[-1]))
    if step % RESET_EVERY_STEPS == 1:
        (quantizer,) = network.quantizer.quantizers
        vectors = result.projected_latents.detach().transpose(1, 2).flatten(0, 1)
        reset_unused_codes(quantizer.codebook.weight, vectors, result.audio_codes.flatten())
    return result.loss.mean() + compute_spectral_distance(decoded, sounds[:, 0])


def compute_spectral_distance(decoded: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the L1 distances of magnitudes and log magnitudes, summed over three window lengths."""
    total = decoded.new_zeros(())
    for size in (2048, 512, 128):
        a, b = (torch.stft(sound, size, size // 4, window=torch.hann_window(size), return_complex=True).abs()
                for sound in (decoded, target))
        total = total + F.l1_loss(a, b) + F.l1_loss((a + 1e-4).log(), (b + 1e-4).log())
    return total


@torch.no_grad()
def reset_unused_codes(book: torch.Tensor, vectors: torch.Tensor, ids: torch.Tensor) -> None:
    """Replace codes of `book` [codes, width] that are absent from `ids` by random vectors of the batch."""
    unused = torch.bincount(ids, minlength=len(book)) == 0
    book[unused] = vectors[torch.randint(len(vectors), (int(unused.sum()),))]


def train_codec(kind: str, source: Path, output: Path, steps: int, codes: int, batch_size: int = 32) -> None:
    """Train a codec of "pictures" or "sounds" with `codes` codes, and write its Hugging Face folder."""
    torch.manual_seed(0)
    read_media, build_codec, compute_loss = KINDS[kind]
    media = read_media(source)
    network = build_codec(codes).train()
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        batch = media[torch.randint(len(media), (batch_size,))]
        loss = compute_loss(network, batch, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {float(loss.detach()):.4f}", flush=True)
    network.eval().save_pretrained(output)


KINDS: dict[str, tuple[Callable[[Path], torch.Tensor], Callable[[int], Any],
                       Callable[[Any, torch.Tensor, int], torch.Tensor]]] = {
    "pictures": (read_pictures, build_vqmodel, compute_picture_loss),
    "sounds": (read_sounds, build_dac, compute_sound_loss)}
"""Kind of media -> functions that read the files, build the codec, and compute its loss."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--codes", type=int, default=128)
    args = parser.parse_args()
    train_codec(args.kind, args.input, args.output, args.steps, args.codes)


if __name__ == "__main__":
    main()
