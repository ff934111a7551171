"""Tokenizers against the libraries that their quantisers come from, and what their interfaces promise."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import entropy
from vector_quantize_pytorch import FSQ, SimVQ

from megatron_sov.base.settings import problems_of
from megatron_sov.omni.codecs.quantised import (
    FSQSettings, FSQTokenizer, LevelQuantiser, LogMel, SimVQSettings, SimVQTokenizer, UnitSimVQ)
from megatron_sov.omni.codecs.training.tokenizers import CodebookUsage

PICTURES = SimVQSettings(side_pixels=16, grid=4, width=32, num_layers=1, num_heads=2, code_width=8,
                         codebook_size=64)
SOUNDS = FSQSettings(num_mels=20, width=16, num_blocks=1, levels=(4, 4, 3), max_piece_s=0.5)


@pytest.fixture
def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_the_nearest_code_is_the_one_with_the_largest_cosine(drawn: torch.Generator) -> None:
    torch.manual_seed(0)
    quantiser = UnitSimVQ(8, 50)
    vectors = torch.randn(3, 7, 8, generator=drawn)
    library = SimVQ(dim=8, codebook_size=50, codebook_transform=quantiser.book.code_transform)
    library.load_state_dict(quantiser.book.state_dict())
    codes, ids, _ = library(F.normalize(vectors, dim=-1))
    cosines = F.normalize(vectors, dim=-1) @ F.normalize(
        quantiser.book.frozen_codebook @ quantiser.book.code_transform[0].weight.T, dim=-1).T
    assert torch.equal(quantiser.nearest(vectors), ids)
    assert torch.equal(ids, cosines.argmax(-1))
    torch.testing.assert_close(quantiser.embed(ids), codes)
    torch.testing.assert_close(quantiser.embed(ids).norm(dim=-1), torch.ones(3, 7))


def test_a_large_codebook_is_searched_in_parts(monkeypatch: pytest.MonkeyPatch,
                                               drawn: torch.Generator) -> None:
    quantiser = UnitSimVQ(4, 30)
    vectors = torch.randn(5, 6, 4, generator=drawn)
    whole = quantiser.nearest(vectors)
    monkeypatch.setattr("megatron_sov.omni.codecs.quantised._SCORES", 70)
    assert torch.equal(quantiser.nearest(vectors), whole)


def test_levels_are_the_librarys(drawn: torch.Generator) -> None:
    numbers = 2 * torch.randn(2, 50, 3, generator=drawn)
    ours, library = LevelQuantiser((4, 4, 3)), FSQ([4, 4, 3])
    codes, ids = library(numbers)
    assert torch.equal(ours.nearest(numbers), ids.long())
    assert torch.equal(ours.embed(ids), codes)
    assert torch.equal(ours.embed(torch.arange(48)), library.indices_to_codes(torch.arange(48)))


def test_gradients_pass_straight_through_the_rounding() -> None:
    numbers = torch.linspace(-2, 2, 9).repeat(1, 1, 1).transpose(1, 2).requires_grad_()
    codes, _, _ = LevelQuantiser((5,))(numbers)
    codes.sum().backward()
    half = (5 - 1) * (1 + 1e-3) / 2
    assert numbers.grad is not None
    torch.testing.assert_close(numbers.grad, half / 2 * (1 - torch.tanh(numbers.detach()) ** 2))


def test_gradients_pass_the_codes_to_the_encoder(drawn: torch.Generator) -> None:
    torch.manual_seed(0)
    network = SimVQTokenizer(PICTURES)
    again, _, loss = network(torch.rand(2, 3, 16, 16, generator=drawn))
    (again.square().mean() + loss).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in network.parameters())
    assert not network.quantiser.book.frozen_codebook.requires_grad


def test_a_picture_has_a_token_for_each_patch(drawn: torch.Generator) -> None:
    torch.manual_seed(0)
    network = SimVQTokenizer(PICTURES).eval()
    pictures = torch.rand(3, 3, 16, 16, generator=drawn)
    ids = network.encode(pictures)
    assert (ids.shape, ids.dtype) == ((3, 16), torch.int64)
    assert bool(((ids >= 0) & (ids < network.codebook_size)).all())
    assert torch.equal(network.encode(pictures[1:2])[0], ids[1])
    assert network.embed(ids).shape == (3, 16, network.width)
    again = network.reconstruct(ids)
    assert again.shape == pictures.shape
    assert torch.equal(again, again.clamp(0, 1))


def test_patches_are_drawn_where_they_were_seen() -> None:
    network = SimVQTokenizer(PICTURES).eval()
    with torch.no_grad():
        network.to_pixels.weight.zero_()
        network.to_pixels.bias.copy_(torch.arange(48.0) / 48)
    drawn = network.reconstruct(torch.zeros(1, 16, dtype=torch.int64))[0]
    expected = (torch.arange(48.0) / 48 + 0.5).clamp(0, 1).view(3, 4, 4)
    torch.testing.assert_close(drawn, expected.repeat(1, 4, 4))


@pytest.mark.parametrize("samples", [0, 1, 639, 640, 641, 9000, 17_000])
def test_a_sound_has_a_token_for_each_begun_part(samples: int, drawn: torch.Generator) -> None:
    torch.manual_seed(0)
    network = FSQTokenizer(SOUNDS).eval()
    ids = network.encode(torch.rand(samples, generator=drawn) - 0.5)
    assert (len(ids), ids.dtype) == (math.ceil(samples / 640), torch.int64)
    assert bool(((ids >= 0) & (ids < network.codebook_size)).all())
    assert network.embed(ids).shape == (len(ids), network.width)
    if samples:
        assert len(network.reconstruct(ids)) == 640 * len(ids)


def test_frames_of_a_tone_are_loudest_at_its_band_and_come_back_as_that_tone() -> None:
    frames = LogMel(16_000, 160, 40)
    tone = 0.5 * torch.sin(2 * math.pi * 1000 * torch.arange(8000) / 16_000)
    seen = frames(tone[None])
    assert seen.shape == (1, 40, 50)
    again = frames.sound(seen)[0]
    assert len(again) == 8000
    hz = torch.fft.rfft(again).abs().argmax() * 16_000 / 8000
    assert abs(float(hz) - 1000) < 40
    loudest = seen[0].mean(-1).argmax()
    assert float(F.l1_loss(frames(again[None])[0, loudest, 5:45], seen[0, loudest, 5:45])) < 0.3


def test_perplexity_is_that_of_scipy(drawn: torch.Generator) -> None:
    usage = CodebookUsage(16)
    ids = torch.randint(0, 12, (300,), generator=drawn)
    usage.add(ids[:100])
    usage.add(ids[100:].view(2, 100))
    counts = torch.bincount(ids, minlength=16)
    assert usage.figures() == {"perplexity": pytest.approx(math.exp(entropy(counts))), "used_share": 12 / 16}
    assert CodebookUsage(4).figures()["used_share"] == 0


@pytest.mark.parametrize(("settings", "said"), [
    (SimVQSettings(side_pixels=100, grid=24), [("rule", "side_pixels")]),
    (FSQSettings(levels=(8,) * 7), [("bound", "levels")]),
    (FSQSettings(samples_per_token=642), [("bound", "samples_per_token")])])
def test_every_problem_of_settings_is_named(settings: SimVQSettings | FSQSettings,
                                            said: list[tuple[str, str]]) -> None:
    assert [(problem.code, problem.key) for problem in problems_of(settings)] == said
    assert (problems_of(SimVQSettings()), problems_of(FSQSettings())) == ([], [])
    assert math.prod(FSQSettings().levels) == 6561
