"""Train a tiny image codec (diffusers' VQModel) or audio codec (transformers' DacModel) in minutes.

    python benchmarks/omni/train_codec.py pictures --input DIR --output HF_DIR --steps 1500

`megatron-sov codec import vqmodel | dac HF_DIR CODEC` reads what it writes.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

SIDE_PIXELS, RATE_HZ, FRAME_SAMPLES, PIECE_FRAMES = 16, 16_000, 640, 16
LEARNING_RATE = 1e-3
RENEW_EVERY = 50
"""Steps after which codes that nothing was near to become vectors of the batch."""


def read_pictures(folder: Path) -> torch.Tensor:
    """Return pictures [n, 3, side, side] in -1..1."""
    from PIL import Image

    found = [np.asarray(Image.open(file).convert("RGB").resize((SIDE_PIXELS, SIDE_PIXELS)))
             for file in sorted(folder.rglob("*.png"))]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 127.5 - 1


def read_sounds(folder: Path) -> torch.Tensor:
    """Return pieces of sounds [n, 1, samples] in -1..1; the last one of a file is filled up."""
    import soundfile

    found, size = [], FRAME_SAMPLES * PIECE_FRAMES
    for file in sorted(folder.rglob("*.wav")):
        sound, rate_hz = soundfile.read(file, dtype="float32")
        assert rate_hz == RATE_HZ, file
        filled = np.pad(sound, (0, -len(sound) % size))
        found += list(filled.reshape(-1, 1, size))
    return torch.from_numpy(np.stack(found))


def vqmodel(codes: int) -> Any:
    """Return a network of pictures: 4 x 4 tokens."""
    from diffusers import VQModel

    return VQModel(block_out_channels=(32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
                   up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8, num_vq_embeddings=codes,
                   latent_channels=8, sample_size=SIDE_PIXELS)


def dac(codes: int) -> Any:
    """Return a network of sounds: 25 tokens a second."""
    from transformers import DacConfig, DacModel

    return DacModel(DacConfig(
        encoder_hidden_size=16, decoder_hidden_size=256, downsampling_ratios=[4, 4, 5, 8], n_codebooks=1,
        codebook_size=codes, codebook_dim=8, sampling_rate=RATE_HZ))


def picture_loss(network: Any, pictures: torch.Tensor, step: int) -> torch.Tensor:
    latents = network.encode(pictures).latents
    result = network.decode(latents)
    book = network.quantize.embedding.weight
    if step % RENEW_EVERY == 1:
        vectors = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
        renew(book, vectors, torch.cdist(vectors, book.detach()).argmin(1))
    return F.mse_loss(result.sample, pictures) + result.commit_loss


def sound_loss(network: Any, sounds: torch.Tensor, step: int) -> torch.Tensor:
    result = network(sounds)
    again = F.pad(result.audio_values, (0, sounds.shape[-1] - result.audio_values.shape[-1]))
    if step % RENEW_EVERY == 1:
        (quantizer,) = network.quantizer.quantizers
        vectors = result.projected_latents.detach().transpose(1, 2).flatten(0, 1)
        renew(quantizer.codebook.weight, vectors, result.audio_codes.flatten())
    return result.loss.mean() + spectral_distance(again, sounds[:, 0])


def spectral_distance(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return how far magnitudes and their logarithms are apart, over windows of several lengths."""
    total = ours.new_zeros(())
    for size in (2048, 512, 128):
        one, other = (torch.stft(sound, size, size // 4, window=torch.hann_window(size), return_complex=True)
                      .abs() for sound in (ours, theirs))
        total = total + F.l1_loss(one, other) + F.l1_loss((one + 1e-4).log(), (other + 1e-4).log())
    return total


@torch.no_grad()
def renew(book: torch.Tensor, vectors: torch.Tensor, ids: torch.Tensor) -> None:
    """Put vectors of the batch in the place of codes [codes, width] that no vector was near to."""
    dead = torch.bincount(ids, minlength=len(book)) == 0
    book[dead] = vectors[torch.randint(len(vectors), (int(dead.sum()),))]


def train(kind: str, source: Path, output: Path, steps: int, codes: int, batch_size: int = 32) -> None:
    """Train a codec of "pictures" or "sounds", and write its folder."""
    torch.manual_seed(0)
    sees = kind == "pictures"
    media = (read_pictures if sees else read_sounds)(source)
    network = (vqmodel if sees else dac)(codes).train()
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        batch = media[torch.randint(len(media), (batch_size,))]
        loss = (picture_loss if sees else sound_loss)(network, batch, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {float(loss.detach()):.4f}", flush=True)
    network.eval().save_pretrained(output)


def main() -> None:
    """Train the codec of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["pictures", "sounds"])
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--codes", type=int, default=128)
    args = parser.parse_args()
    train(args.kind, args.input, args.output, args.steps, args.codes)


if __name__ == "__main__":
    main()
