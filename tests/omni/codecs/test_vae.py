"""An autoencoder from a local folder of diffusers, and folders that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_sov.base.errors import UserError
from megatron_sov.omni.codecs.decoder_settings import VAESettings
from megatron_sov.omni.codecs.dit import new_vae, open_vae

TINY = VAESettings(latent_channels=2, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
                   scaling_factor=0.5, shift_factor=0.25)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    new_vae(TINY).save_pretrained(tmp_path)
    return tmp_path


def test_its_settings_and_weights_come_back(folder: Path) -> None:
    settings, vae = open_vae(folder)
    assert settings == TINY and settings.pixels == 2
    assert vae.encode(torch.zeros(1, 3, 8, 8)).latent_dist.mode().shape == (1, 2, 4, 4)


@pytest.mark.parametrize(("field", "value"), [("act_fn", "relu"), ("latents_mean", [0.0, 0.0]),
                                              ("mid_block_add_attention", False), ("norm_num_groups", 3),
                                              ("scaling_factor", "much"),
                                              ("block_out_channels", [65536] * 8)])
def test_another_arithmetic_is_refused(folder: Path, field: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(UserError, match=str(folder)):
        open_vae(folder)


@pytest.mark.parametrize("damage", ["nothing", "a pickle", "half a file", "no config"])
def test_a_folder_that_is_none_is_refused(folder: Path, damage: str) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "half a file":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        weights.unlink()
        if damage == "a pickle":
            torch.save(new_vae(TINY).state_dict(), folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="is no folder of diffusers' AutoencoderKL"):
        open_vae(folder)
