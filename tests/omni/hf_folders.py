"""Folders of tiny codecs with random weights, as transformers and diffusers write them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def vqmodel(num_codes: int = 16) -> Any:
    """Pictures of 16 x 16 pixels in 4 x 4 tokens."""
    from diffusers import VQModel

    return VQModel(block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
                   up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8, num_vq_embeddings=num_codes,
                   latent_channels=4, sample_size=16)


def dac() -> Any:
    """Sounds of 16 kHz in frames of 640 samples, three codes of 512 in each."""
    from transformers import DacConfig, DacModel

    return DacModel(DacConfig(encoder_hidden_size=4, decoder_hidden_size=32, downsampling_ratios=[4, 4, 5, 8],
                              n_codebooks=3, codebook_size=512, codebook_dim=4, sampling_rate=16_000))


def mimi() -> Any:
    """The same by another network, four codes of 64."""
    from transformers import MimiConfig, MimiModel

    return MimiModel(MimiConfig(
        sampling_rate=16_000, hidden_size=16, num_filters=4, upsampling_ratios=[8, 5, 4, 2], codebook_size=64,
        codebook_dim=8, num_quantizers=4, vector_quantization_hidden_dimension=8, upsample_groups=16,
        num_hidden_layers=1, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2))


MADE: dict[str, Callable[[], Any]] = {"vqmodel": vqmodel, "dac": dac, "mimi": mimi}


def save(kind: str, folder: Path, made: Callable[[], Any] | None = None) -> Any:
    """Write a folder; returns its network."""
    torch.manual_seed(0)
    network = (made or MADE[kind])().eval().requires_grad_(False)
    for name, tensor in network.state_dict().items():  # codebooks begin as codes that are nearly the same
        if name.endswith(("embed_sum", "quantize.embedding.weight")):
            tensor.normal_()
    network.save_pretrained(folder)
    return network
