"""The vocoder: a stream is the whole, what comes later changes nothing, and voices differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_sov.base.artifacts import MANIFEST
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import problems_of
from megatron_sov.omni.codecs.bigvgan import UnitBigVGAN
from megatron_sov.omni.codecs.decoder_settings import UnitBigVGANSettings
from megatron_sov.omni.codecs.folder import open_codec, save_codec

TINY = UnitBigVGANSettings(sample_rate_hz=800, tokens_per_s=25, codebook_size=32, speakers=("her", "him"),
                           unit_width=8, speaker_width=4, channels=16, rates=(8, 4), kernels=(3, 5),
                           dilations=(1, 3))
IDS = torch.randint(32, (23,), generator=torch.Generator().manual_seed(0))


def _loud(lookahead_tokens: int) -> UnitBigVGAN:
    """Loud weights, so that every layer counts."""
    network = UnitBigVGAN(replace(TINY, lookahead_tokens=lookahead_tokens))
    generator = torch.Generator().manual_seed(1)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.2, generator=generator)
    return network.eval()


@pytest.fixture(scope="module")
def vocoder() -> UnitBigVGAN:
    return _loud(0)


@pytest.fixture(scope="module")
def waiting() -> UnitBigVGAN:
    """A vocoder that hears two tokens ahead."""
    return _loud(2)


@pytest.mark.parametrize("sizes", [[1] * 23, [23], [2, 1, 13, 0, 7]])
def test_a_stream_is_the_whole(vocoder: UnitBigVGAN, sizes: list[int]) -> None:
    sounds = list(vocoder.stream(IDS.split(sizes), "her"))
    assert [len(sound) for sound in sounds] == [size * 32 for size in sizes if size]
    whole = vocoder.decode(IDS, "her")
    assert whole.abs().max() > 0.05
    torch.testing.assert_close(torch.cat(sounds), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sizes", [[1] * 23, [23], [1, 22]])
def test_what_is_late_comes_at_the_end(waiting: UnitBigVGAN, sizes: list[int]) -> None:
    sounds = list(waiting.stream(IDS.split(sizes), "her"))
    assert len(sounds) == len(sizes) + 1 and sum(map(len, sounds)) == len(IDS) * 32
    torch.testing.assert_close(torch.cat(sounds), waiting.decode(IDS, "her"), atol=1e-6, rtol=0)
    # as a whole, as training has it
    ids = torch.cat([IDS, torch.tensor([waiting.behind_end] * 2)])
    torch.testing.assert_close(waiting(ids[None], waiting.voice_of("her")[None])[0],
                               waiting.decode(IDS, "her"), atol=1e-6, rtol=0)
    assert len(waiting.decode(IDS[:1], "her")) == 32 and len(waiting.decode(IDS[:0], "her")) == 0


def test_sound_comes_before_the_next_ids_are_known(vocoder: UnitBigVGAN) -> None:
    asked = []

    def ids() -> object:
        for piece in IDS.split(1):
            asked.append(len(asked))
            yield piece

    next(iter(vocoder.stream(ids(), "him")))  # type: ignore[arg-type]
    assert asked == [0]


def test_a_later_id_changes_no_earlier_sample(vocoder: UnitBigVGAN) -> None:
    other = IDS.clone()
    other[9] = (other[9] + 1) % 32
    differs = vocoder.decode(IDS, "her") != vocoder.decode(other, "her")
    assert not differs[:9 * 32].any() and differs[9 * 32:10 * 32].any()


def test_it_hears_as_far_ahead_as_it_says(waiting: UnitBigVGAN) -> None:
    other = IDS.clone()
    other[9] = (other[9] + 1) % 32
    differs = waiting.decode(IDS, "her") != waiting.decode(other, "her")
    assert not differs[:7 * 32].any() and differs[7 * 32:8 * 32].any()


def test_a_voice_is_a_name_or_a_vector(vocoder: UnitBigVGAN) -> None:
    her = vocoder.decode(IDS, "her")
    assert not torch.equal(her, vocoder.decode(IDS, "him"))
    assert torch.equal(her, vocoder.decode(IDS, vocoder.voice_of("her")))
    assert len(vocoder.decode(IDS[:0], "her")) == 0


@pytest.mark.parametrize(("ids", "speaker", "message"), [
    (IDS, "it", "speaker 'it': this vocoder knows her, him"),
    (IDS, torch.zeros(5), "has 4 numbers"),
    (torch.tensor([3, 32]), "her", "audio token 32 is outside"),
    (torch.tensor([-1]), "her", "audio token -1 is outside"),
])
def test_what_it_cannot_say_is_one_sentence(vocoder: UnitBigVGAN, ids: torch.Tensor, speaker: str,
                                            message: str) -> None:
    with pytest.raises(UserError, match=message):
        vocoder.decode(ids, speaker)


def test_published_sizes_are_well_and_wrong_ones_are_told_at_once() -> None:
    assert problems_of(UnitBigVGANSettings()) == []
    assert UnitBigVGANSettings().samples_per_token == 960
    channels, rates = map(str, problems_of(replace(TINY, rates=(8, 5), channels=17)))
    assert "800 Hz at 25 tokens/s need 32" in rates and "multiple of 4" in channels
    assert [p.key for p in problems_of(replace(TINY, codebook_size=0, kernels=()))] == [
        "codebook_size", "kernels"]
    assert [p.key for p in problems_of(replace(TINY, speakers=("a", "a")))] == ["speakers"]


def test_a_folder_gives_back_the_same_voice(vocoder: UnitBigVGAN, tmp_path: Path) -> None:
    save_codec(tmp_path / "voc", "unit-bigvgan", vocoder)
    again = open_codec(tmp_path / "voc", kind="unit-bigvgan")
    assert again.settings == TINY
    assert torch.equal(again.decode(IDS, "him"), vocoder.decode(IDS, "him"))
    manifest = tmp_path / "voc" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"channels": 16', '"channels": 1600000'))
    with pytest.raises(UserError, match=str(tmp_path)):
        open_codec(tmp_path / "voc")
