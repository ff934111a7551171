"""HyperCLOVA X 8B Omni: text, pictures and speech in and out of one decoder; sizes, vocabulary, encoders and
the order of its stages as published.

No source at hand has learning rates, batches, token budgets, shares of data, or the scale of the prediction
layer's loss: those are ours, and labelled so.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_sov.base.chat.media_tokens import AUDIO_PAD, IMAGE_PAD, MARKS, VIDEO_PAD
from megatron_sov.model.config import (
    DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, ParallelConfig, PhaseConfig, RunConfig,
    TrainConfig)
from megatron_sov.model.config.encoders import AudioEncoderConfig, MediaConfig, VisionEncoderConfig
from megatron_sov.model.config.model import IdBlock
from megatron_sov.model.recipes.sources import Sources, derive, ours, published

REPORT = "HyperCLOVA X 8B Omni report"
SERVING = "NAVER-Cloud-HyperCLOVA-X/OmniServe"
AUDIO, IMAGE = IdBlock(128_606, 6_561), IdBlock(135_168, 65_536)
"""Behind the ids of text; one id between them is free, and the second one ends the vocabulary."""


def placeholders(first_block_id: int, *names: str) -> tuple[int, ...]:
    """Return the ids of placeholders where `sov-tokenizer media` writes all marks right before the first
    block."""
    return tuple(first_block_id - len(MARKS) + MARKS.index(name) for name in names)


def model() -> ModelConfig:
    """Return the architecture: 36 layers of Llama's shape, one MTP layer, a ViT and a Whisper encoder."""
    return ModelConfig(
        family="llama", vocab_size=200_704, hidden_size=4096, num_layers=36, num_heads=32, num_kv_heads=8,
        head_dim=128, dense_ffn_dim=12288, num_experts=0, rope_theta=5e6, norm_eps=1e-5, num_mtp_layers=1,
        mtp_loss_coeff=0.1, max_position_tokens=32768, audio_tokens=AUDIO, image_tokens=IMAGE,
        vision=VisionEncoderConfig(placeholder_ids=placeholders(AUDIO.first, IMAGE_PAD, VIDEO_PAD)),
        audio=AudioEncoderConfig(placeholder_ids=placeholders(AUDIO.first, AUDIO_PAD)))


DISCRETE = (
    PhaseConfig("text", tokens=2_000_000_000_000, seq_len=4096, blend={"text": 1.0}),
    PhaseConfig("discrete", tokens=500_000_000_000, seq_len=8192,
                blend={"text": 50.0, "image-tokens": 30.0, "audio-tokens": 20.0}),
)
CONTINUOUS = (
    PhaseConfig("continuous", tokens=200_000_000_000, seq_len=8192,
                blend={"text": 30.0, "discrete": 20.0, "pictures": 30.0, "sounds": 20.0}),
    PhaseConfig("long", tokens=40_000_000_000, seq_len=32768,
                blend={"text": 40.0, "pictures": 20.0, "sounds": 20.0, "videos": 20.0}),
)
SFT = (
    PhaseConfig("conversation", tokens=5_000_000_000, seq_len=8192, lr=2e-5, min_lr=2e-6, rewarm_steps=50,
                blend={"conversations": 90.0, "text": 10.0}),
    PhaseConfig("multimodal", tokens=20_000_000_000, seq_len=8192, lr=2e-5, min_lr=2e-6, rewarm_steps=50,
                blend={"conversations": 20.0, "pictures": 35.0, "speech": 35.0, "text": 10.0}),
    PhaseConfig("video-long", tokens=5_000_000_000, seq_len=32768, lr=1e-5, min_lr=1e-6, rewarm_steps=50,
                blend={"conversations": 20.0, "pictures": 20.0, "speech": 20.0, "videos": 30.0,
                       "text": 10.0}),
    PhaseConfig("intent-think", tokens=5_000_000_000, seq_len=32768, lr=1e-5, min_lr=1e-6, rewarm_steps=50,
                blend={"intent": 45.0, "reasoning": 45.0, "text": 10.0}),
)


def hyperclova_omni_8b() -> RunConfig:
    """Return pretraining stage 1: text, then discrete tokens of pictures and speech among it."""
    return RunConfig(
        recipe="hyperclova-omni-8b", model=model(),
        parallel=ParallelConfig(zero1=True, overlap_grad_reduce=True, overlap_param_gather=True),
        data=DataConfig(phases=DISCRETE),
        optim=OptimConfig(lr=3e-4, min_lr=3e-5, schedule="wsd", warmup_steps=2000, decay_share=0.1,
                          weight_decay=0.1),
        train=TrainConfig(global_batch_size=1024, micro_batch_size=1, recompute=True),
        media=MediaConfig(train_encoders=False, train_adapters=False))


def hyperclova_omni_8b_continuous() -> RunConfig:
    """Return pretraining stage 2, to be run --from the first: features of encoders, and 32K."""
    run = hyperclova_omni_8b()
    return replace(
        run, recipe="hyperclova-omni-8b-continuous", data=DataConfig(phases=CONTINUOUS),
        optim=replace(run.optim, lr=3e-5, min_lr=3e-6, schedule="cosine", warmup_steps=500),
        train=replace(run.train, global_batch_size=512),
        media=MediaConfig(train_encoders=True, train_adapters=True))


def hyperclova_omni_8b_sft() -> RunConfig:
    """Return fine-tuning in four stages, for `sft`: conversation, multimodal instructions at scale, video and
    long context, intent and thinking; plain text goes along, or the model forgets how to write it."""
    run = hyperclova_omni_8b_continuous()
    return replace(
        run, recipe="hyperclova-omni-8b-sft", data=DataConfig(phases=SFT),
        optim=replace(run.optim, lr=2e-5, min_lr=2e-6, warmup_steps=50, weight_decay=0.0),
        train=replace(run.train, global_batch_size=128),
        objective=ObjectiveConfig(name="sft", text_coeff=0.1),
        media=MediaConfig(train_encoders=False, train_adapters=True))


_SIZES = published(f"{REPORT}, model")
_VIT = published(f"{SERVING}, encoder/vision/track_b: omni_cont_config.yaml")
_WHISPER = published(f"{SERVING}, encoder/audio/track_b: audio_config.json")
_NOT = ours("not published")
_STAGES = published(f"{REPORT}, pretraining: two stages")
SOURCES: Sources = {
    "model.family": ours("Llama's shape has exactly the published sizes; the released text config is not "
                         "at hand"),
    **dict.fromkeys((f"model.{name}" for name in (
        "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "dense_ffn_dim",
        "num_experts", "rope_theta", "num_mtp_layers", "max_position_tokens")), _SIZES),
    "model.mtp_loss_coeff": ours("a scale is published, its value is not"),
    "model.norm_eps": _NOT,
    "model.audio_tokens.*": published(f"{REPORT}, vocabulary: FSQ of 6,561 behind the text"),
    "model.image_tokens.*": published(f"{REPORT}, vocabulary: 65,536 from 135,168"),
    "model.vision.*": _VIT,
    "model.vision.placeholder_ids": ours("as `sov-tokenizer media --audio-first 128606` numbers the marks"),
    "model.vision.image_size": ours("the published encoder takes any size; banks have one"),
    "model.audio.*": _WHISPER,
    "model.audio.placeholder_ids": ours("as `sov-tokenizer media --audio-first 128606` numbers the marks"),
    "model.audio.compression": ours("25 is published for long sound; set it where there is much"),
    "model.audio.compressor_*": published(f"{SERVING}, mambamia_videoaudio_compressor.py"),
    "parallel.*": _NOT,
    "data.phases.*.name": _STAGES,
    "data.phases.*.tokens": _NOT,
    "data.phases.*.seq_len": ours("32K at the end is published, not the lengths before"),
    "data.phases.*.blend.*": ours("the kinds are published, their shares are not"),
    **dict.fromkeys((f"optim.{name}" for name in (
        "lr", "min_lr", "schedule", "warmup_steps", "decay_share", "weight_decay")), _NOT),
    "train.global_batch_size": _NOT,
    "train.micro_batch_size": ours("memory"),
    "train.recompute": ours("memory"),
    "media.*": published(f"{REPORT}, pretraining: discrete tokens first, encoders second"),
}
CONTINUOUS_SOURCES = derive(SOURCES, {
    "media.train_encoders": ours("frozen or trained is not published"),
})
SFT_SOURCES = derive(CONTINUOUS_SOURCES, {
    "data.phases.*.name": published(f"{REPORT}, fine-tuning: four stages"),
    **dict.fromkeys((f"data.phases.*.{name}" for name in ("lr", "min_lr", "rewarm_steps")), _NOT),
    "objective.name": published(f"{REPORT}, fine-tuning"),
    "objective.text_coeff": ours("without plain text, bits per byte of it grow while media are learned"),
})
