"""Tiny codecs with random weights, saved as transformers and diffusers save them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def build_vqmodel(num_codes: int = 16) -> Any:
    """Return a codec of pictures: 16 x 16 pixels become 4 x 4 codes."""
    from diffusers import VQModel

    return VQModel(block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
                   up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8, num_vq_embeddings=num_codes,
                   latent_channels=4, sample_size=16)


def build_dac() -> Any:
    """Return a codec of 16 kHz sounds: a frame of 640 samples becomes three codes, each from 512."""
    from transformers import DacConfig, DacModel

    return DacModel(DacConfig(encoder_hidden_size=4, decoder_hidden_size=32, downsampling_ratios=[4, 4, 5, 8],
                              n_codebooks=3, codebook_size=512, codebook_dim=4, sampling_rate=16_000))


def build_mimi() -> Any:
    """Return another codec of 16 kHz sounds: a frame of 640 samples becomes four codes, each from 64."""
    from transformers import MimiConfig, MimiModel

    return MimiModel(MimiConfig(
        sampling_rate=16_000, hidden_size=16, num_filters=4, upsampling_ratios=[8, 5, 4, 2], codebook_size=64,
        codebook_dim=8, num_quantizers=4, vector_quantization_hidden_dimension=8, upsample_groups=16,
        num_hidden_layers=1, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2))


BUILDERS: dict[str, Callable[[], Any]] = {"vqmodel": build_vqmodel, "dac": build_dac, "mimi": build_mimi}


def save_network(kind: str, folder: Path, build: Callable[[], Any] | None = None) -> Any:
    """Save the codec of `build`, or of `BUILDERS[kind]`, into `folder`, and return its network."""
    torch.manual_seed(0)
    network = (build or BUILDERS[kind])().eval().requires_grad_(False)
    for name, tensor in network.state_dict().items():  # initial codes are nearly equal
        if name.endswith(("embed_sum", "quantize.embedding.weight")):
            tensor.normal_()
    network.save_pretrained(folder)
    return network
