"""Both decoders learn, and a training that was killed ends with the bits of one that was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_sov.base.settings import problems_of
from megatron_sov.omni.codecs.bigvgan import UnitBigVGAN
from megatron_sov.omni.codecs.decoder_settings import DiTSettings, UnitBigVGANSettings
from megatron_sov.omni.codecs.dit import DiT
from megatron_sov.omni.codecs.folder import WEIGHTS, open_codec
from megatron_sov.omni.codecs.training.decoders import (
    DrawnPictures, ImageDecoderTask, ImageDecoderTraining, Spoken, VocoderLearning, VocoderTask,
    VocoderTraining)
from megatron_sov.omni.codecs.training.loop import CodecSchedule, CodecTask, CodecTrainingPlan, train

STEPS = 6
PICTURES = np.random.default_rng(0).integers(2, size=(8, 3, 4, 4), dtype=np.uint8) * 255
NUMBERS = np.arange(8, dtype=np.int32)[:, None]


def _painter(steps: int = STEPS) -> CodecTask:
    torch.manual_seed(0)
    decoder = DiT(DiTSettings(side_pixels=4, size_multiple_pixels=4, grid=1, codebook_size=8, token_width=8,
                              vae=None, patch=2, width=24, num_heads=2, num_layers=1, mlp_ratio=2.0,
                              rope_axes=(4, 4, 4)))
    decoder.token_embeddings.copy_(torch.eye(8))
    drawn = DrawnPictures(PICTURES, NUMBERS)
    return ImageDecoderTask(decoder, CodecSchedule(steps, batch_size=8, learning_rate=1e-2, warmup_steps=1),
                            drawn, drawn)


def _speaker(judges_from_step: int = 3, steps: int = STEPS) -> CodecTask:
    torch.manual_seed(0)
    vocoder = UnitBigVGAN(UnitBigVGANSettings(sample_rate_hz=800, codebook_size=4, speakers=("x", "y"),
                                              unit_width=8, speaker_width=4, channels=8, rates=(8, 4),
                                              kernels=(3,), dilations=(1,)))
    tone = torch.sin(torch.arange(2000) / 3)
    # neither the last token nor the shortest sound is full
    sounds = [Spoken(torch.tensor([i, 1, 2, 3] * 12)[:n], tone[:n * 32 - 5] * (i + 1) / 4, i % 2)
              for i, n in enumerate((40, 45, 30))]
    learning = VocoderLearning(steps, batch_size=3, segment_tokens=40, learning_rate=1e-2, warmup_steps=1,
                               windows=(16, 64), num_mels=8, judges_width=1, judges_periods=(3,),
                               judges_resolutions=((32, 8, 16),), quiet=1e-2,
                               judges_from_step=judges_from_step)
    return VocoderTask(vocoder, learning, sounds, sounds)


class Killed(Exception):
    """Stands for a power cut."""


class Dies:
    """A task that is killed at a step."""

    def __init__(self, task: CodecTask, at: int) -> None:
        self.task, self.at = task, at

    def __getattr__(self, name: str) -> object:
        return getattr(self.task, name)

    def learn(self, step: int) -> dict[str, float]:
        if step == self.at:
            raise Killed
        return self.task.learn(step)


@pytest.mark.parametrize(("kind", "make"), [("dit", _painter), ("unit-bigvgan", _speaker)])
def test_a_killed_training_ends_with_the_same_bits(kind: str, make: Callable[[], CodecTask],
                                                   tmp_path: Path) -> None:
    def plan(name: str) -> CodecTrainingPlan:
        return CodecTrainingPlan(kind, tmp_path / name, STEPS, {"seed": 0}, checkpoint_every_s=0.0)

    figures = train(plan("whole"), lambda _: make())
    with pytest.raises(Killed):
        train(plan("killed"), lambda _: Dies(make(), 5))  # type: ignore[arg-type,return-value]
    assert train(plan("killed"), lambda _: make()) == figures
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    open_codec(tmp_path / "killed", kind=kind)


def test_the_painter_learns_each_picture_by_its_token() -> None:
    task = _painter(100)
    before = task.look()["loss"]
    for step in range(1, 101):
        figures = task.learn(step)
    assert figures["loss"] > 0 and figures["grad_norm"] > 0
    assert before == pytest.approx(2.0, abs=0.5)  # noise of variance 1 minus pixels of -1 and 1
    assert task.look()["loss"] < 0.75 * before


@pytest.mark.parametrize("judges_from_step", [0, 1])
def test_the_speaker_comes_nearer_to_the_sound(judges_from_step: int) -> None:
    task = _speaker(judges_from_step, 20)
    before = task.look()["spectral"]
    for step in range(1, 21):
        figures = task.learn(step)
    assert ("judges" in figures) == ("judges" in task.networks) == (judges_from_step > 0)
    assert task.look()["spectral"] < 0.95 * before


def test_the_learning_rate_rises_and_falls() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    rates = []
    for step in range(1, 101):
        rates.append(CodecSchedule(100, learning_rate=2.0, warmup_steps=10).set_rate(optimizer, step))
    assert optimizer.param_groups[0]["lr"] == rates[-1]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[9] == pytest.approx(2.0)
    assert rates[54] == pytest.approx(1.1) and rates[-1] == pytest.approx(0.2)


@pytest.mark.parametrize(("settings", "num"), [
    (ImageDecoderTraining(), 0), (VocoderTraining(), 0),
    (ImageDecoderTraining(learning=CodecSchedule(steps=0, learning_rate=float("inf"), warmup_steps=-1)), 3),
    (VocoderTraining(learning=VocoderLearning(batch_size=0, windows=(20, 18), judges_from_step=-2)), 3),
])
def test_all_problems_of_settings_are_told(settings: ImageDecoderTraining | VocoderTraining,
                                           num: int) -> None:
    assert len(problems_of(settings)) == num
