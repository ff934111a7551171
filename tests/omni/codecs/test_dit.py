"""The picture decoder: its sampler is Euler's rule, its noise the seed's, its sizes the published ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import problems_of
from megatron_sov.omni.codecs.decoder_settings import DiTSettings, VAESettings
from megatron_sov.omni.codecs.dit import DiT
from megatron_sov.omni.codecs.folder import open_codec, save_codec

TINY = DiTSettings(side_pixels=8, size_multiple_pixels=2, grid=2, codebook_size=16, token_width=6, vae=None,
                   patch=2, width=24, num_heads=2, num_layers=2, mlp_ratio=2.0, rope_axes=(4, 4, 4), steps=3)
IDS = torch.randint(16, (3, 4), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def decoder() -> DiT:
    """Weights that do something: at the start every block is the identity."""
    return _filled(DiT(TINY))


def _filled(network: DiT) -> DiT:
    generator = torch.Generator().manual_seed(1)
    for weight in [*network.parameters(), network.token_embeddings]:
        torch.nn.init.normal_(weight, std=0.2, generator=generator)
    return network.eval()


def test_sampling_is_eulers_rule_from_noise_to_picture(decoder: DiT) -> None:
    steps = 7
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    levels = [*torch.linspace(1000, 1, steps) / 1000, torch.tensor(0.0)]
    with torch.no_grad():
        for level, after in pairwise(levels):
            x = x + (after - level) * decoder(x, level.expand(3), IDS)
    expected = (x.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(decoder.decode(IDS, steps=steps, seed=5), expected, atol=1e-5, rtol=0)


def test_a_picture_is_a_function_of_ids_and_seed(decoder: DiT) -> None:
    pictures = decoder.decode(IDS, steps=2, seed=1)
    assert pictures.shape == (3, 3, 8, 8) and pictures.min() >= 0 and pictures.max() <= 1
    assert torch.equal(decoder.decode(IDS, steps=2, seed=1), pictures)
    torch.testing.assert_close(decoder.decode(IDS[:1], steps=2, seed=1), pictures[:1], atol=1e-5, rtol=0)
    assert not torch.equal(decoder.decode(IDS, steps=2, seed=2), pictures)
    assert not torch.equal(decoder.decode((IDS + 1) % 16, steps=2, seed=1), pictures)
    assert torch.equal(decoder.decode(IDS), decoder.decode(IDS, steps=TINY.steps, seed=0))


def test_each_token_stands_at_its_place(decoder: DiT) -> None:
    """Beside the noise of each place stand the embeddings, here of one token each."""
    noise = torch.zeros(1, 3, 4, 4)
    seen: list[torch.Tensor] = []
    hook = decoder.place_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    decoder(noise, torch.ones(1), IDS[:1])
    hook.remove()
    torch.testing.assert_close(seen[0][0, :, 12:], decoder.token_embeddings[IDS[0]])


def test_other_shapes_have_the_same_area(decoder: DiT) -> None:
    # decoder/vision/track_b/serve.py of the authors: density 768 ** 2, factor 16
    assert DiTSettings().size_of(1, 1) == (768, 768)
    assert DiTSettings().size_of(9, 16) == (1024, 576)
    assert decoder.decode(IDS, steps=1, ratio=(1, 4)).shape == (3, 3, 16, 4)


def test_it_begins_as_no_velocity_at_all() -> None:
    assert (DiT(TINY)(torch.randn(2, 3, 8, 8), torch.ones(2), IDS[:2]) == 0).all()


@pytest.mark.parametrize(("ids", "ratio", "message"), [
    (IDS[:, :3], (1, 1), "2 x 2 = 4 tokens, and here are 3"),
    (IDS + 13, (1, 1), "is outside of the decoder's codebook"),
    (IDS, (1, 1000), "has no pixels"),
])
def test_what_it_cannot_draw_is_one_sentence(decoder: DiT, ids: torch.Tensor, ratio: tuple[int, int],
                                             message: str) -> None:
    with pytest.raises(UserError, match=message):
        decoder.decode(ids, steps=1, ratio=ratio)


def test_published_sizes_are_well_and_wrong_ones_are_told_at_once() -> None:
    assert problems_of(DiTSettings()) == []
    assert DiTSettings().latent_pixels == 8 and DiTSettings().patch_channels == 16
    with torch.device("meta"):
        network = DiT(DiTSettings())
    assert sum(w.numel() for n, w in network.named_parameters() if "vae" not in n) == 1_957_315_056
    found = problems_of(replace(TINY, side_pixels=9, num_heads=5, rope_axes=(3, 4, 4)))
    assert [problem.key for problem in found] == ["side_pixels", "side_pixels", "width", "rope_axes"]
    assert [p.key for p in problems_of(replace(TINY, vae=VAESettings(block_out_channels=(5,))))] == [
        "vae.block_out_channels"]


def test_a_folder_with_an_autoencoder_draws_the_same(tmp_path: Path) -> None:
    vae = VAESettings(latent_channels=2, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2)
    network = _filled(DiT(replace(TINY, vae=vae, patch=1, size_multiple_pixels=2)))
    save_codec(tmp_path / "dit", "dit", network)
    again = open_codec(tmp_path / "dit", kind="dit")
    assert again.settings == network.settings
    # where the weights lie in memory decides which sum is taken first
    torch.testing.assert_close(again.decode(IDS, seed=3), network.decode(IDS, seed=3), atol=1e-5, rtol=0)
