"""Recipes for continued training of models with published weights; data, learning rate and batch size suit
fine-tuning."""

from dataclasses import replace

from megatron_sov.chat.media_tokens import AUDIO_PAD, IMAGE_PAD, MARKS, VIDEO_PAD
from megatron_sov.model.config import (
    DataConfig, ExtendConfig, ExtendStageConfig, GateConfig, LatentAttentionConfig, ModelConfig, NeedleConfig,
    ObjectiveConfig, OptimConfig, ParallelConfig, PartConfig, PhaseConfig, RunConfig, TrainConfig, YarnConfig)
from megatron_sov.model.config.encoders import AudioEncoderConfig, MediaConfig, VisionEncoderConfig
from megatron_sov.model.config.model import IdBlock, Llama3RopeConfig
from megatron_sov.model.recipes.sources import (
    DEFAULT, Sources, config_json, derive_sources, ours, published, read_sources)

# HyperCLOVA X 8B Omni: a decoder that reads and writes text, images and speech; sizes, vocabulary, encoders
# and the order of stages are published. Learning rates, batch sizes, token budgets, data shares and the
# weight of the prediction loss are not available in any source and are our choice, marked as such.

AUDIO, IMAGE = IdBlock(128_606, 6_561), IdBlock(135_168, 65_536)
"""Behind the ids of text; one id between them is free, and the second one ends the vocabulary."""


def _placeholders(first_block_id: int, *names: str) -> tuple[int, ...]:
    """Return the media mark ids, which `sov-tokenizer media` places right before the first media token
    block."""
    return tuple(first_block_id - len(MARKS) + MARKS.index(name) for name in names)


def _hyperclova() -> ModelConfig:
    """Return the architecture: 36 Llama layers, one MTP layer, an image encoder (ViT) and a Whisper
    encoder."""
    return ModelConfig(
        family="llama", vocab_size=200_704, hidden_size=4096, num_layers=36, num_heads=32, num_kv_heads=8,
        head_dim=128, dense_ffn_dim=12288, num_experts=0, rope_theta=5e6, norm_eps=1e-5, num_mtp_layers=1,
        mtp_loss_coeff=0.1, max_position_tokens=32768, audio_tokens=AUDIO, image_tokens=IMAGE,
        vision=VisionEncoderConfig(placeholder_ids=_placeholders(AUDIO.first, IMAGE_PAD, VIDEO_PAD)),
        audio=AudioEncoderConfig(placeholder_ids=_placeholders(AUDIO.first, AUDIO_PAD)))


_HYPERCLOVA_DISCRETE = (
    PhaseConfig("text", tokens=2_000_000_000_000, seq_len=4096, blend={"text": 1.0}),
    PhaseConfig("discrete", tokens=500_000_000_000, seq_len=8192,
                blend={"text": 50.0, "image-tokens": 30.0, "audio-tokens": 20.0}))
_HYPERCLOVA_CONTINUOUS = (
    PhaseConfig("continuous", tokens=200_000_000_000, seq_len=8192,
                blend={"text": 30.0, "discrete": 20.0, "pictures": 30.0, "sounds": 20.0}),
    PhaseConfig("long", tokens=40_000_000_000, seq_len=32768,
                blend={"text": 40.0, "pictures": 20.0, "sounds": 20.0, "videos": 20.0}))
_HYPERCLOVA_SFT = (
    PhaseConfig("conversation", tokens=5_000_000_000, seq_len=8192, lr=2e-5, min_lr=2e-6, rewarm_steps=50,
                blend={"conversations": 90.0, "text": 10.0}),
    PhaseConfig("multimodal", tokens=20_000_000_000, seq_len=8192, lr=2e-5, min_lr=2e-6, rewarm_steps=50,
                blend={"conversations": 20.0, "pictures": 35.0, "speech": 35.0, "text": 10.0}),
    PhaseConfig("video-long", tokens=5_000_000_000, seq_len=32768, lr=1e-5, min_lr=1e-6, rewarm_steps=50,
                blend={"conversations": 20.0, "pictures": 20.0, "speech": 20.0, "videos": 30.0,
                       "text": 10.0}),
    PhaseConfig("intent-think", tokens=5_000_000_000, seq_len=32768, lr=1e-5, min_lr=1e-6, rewarm_steps=50,
                blend={"intent": 45.0, "reasoning": 45.0, "text": 10.0}))


def hyperclova_omni_8b() -> RunConfig:
    """Return pretraining stage 1: text, then text with discrete image and speech tokens."""
    return RunConfig(
        recipe="hyperclova-omni-8b", model=_hyperclova(),
        parallel=ParallelConfig(zero1=True, overlap_grad_reduce=True, overlap_param_gather=True),
        data=DataConfig(phases=_HYPERCLOVA_DISCRETE),
        optim=OptimConfig(lr=3e-4, min_lr=3e-5, schedule="wsd", warmup_steps=2000, decay_share=0.1,
                          weight_decay=0.1),
        train=TrainConfig(global_batch_size=1024, micro_batch_size=1, recompute=True),
        media=MediaConfig(train_encoders=False, train_adapters=False))


def hyperclova_omni_8b_continuous() -> RunConfig:
    """Return pretraining stage 2, run with --from stage 1: encoder features and 32K context."""
    run = hyperclova_omni_8b()
    return replace(
        run, recipe="hyperclova-omni-8b-continuous", data=DataConfig(phases=_HYPERCLOVA_CONTINUOUS),
        optim=replace(run.optim, lr=3e-5, min_lr=3e-6, schedule="cosine", warmup_steps=500),
        train=replace(run.train, global_batch_size=512),
        media=MediaConfig(train_encoders=True, train_adapters=True))


def hyperclova_omni_8b_sft() -> RunConfig:
    """Return fine-tuning in four stages, for `sft`: conversation, multimodal instructions, video and long
    context, intent and thinking; plain text is mixed in to keep the model's ability to write it."""
    run = hyperclova_omni_8b_continuous()
    return replace(
        run, recipe="hyperclova-omni-8b-sft", data=DataConfig(phases=_HYPERCLOVA_SFT),
        optim=replace(run.optim, lr=2e-5, min_lr=2e-6, warmup_steps=50, weight_decay=0.0),
        train=replace(run.train, global_batch_size=128),
        objective=ObjectiveConfig(name="sft", text_coeff=0.1),
        media=MediaConfig(train_encoders=False, train_adapters=True))


HYPERCLOVA_SOURCES: Sources = read_sources("hyperclova-omni-8b")
HYPERCLOVA_CONTINUOUS_SOURCES = derive_sources(HYPERCLOVA_SOURCES, {
    "media.train_encoders": ours("frozen or trained is not published")})
HYPERCLOVA_SFT_SOURCES = derive_sources(HYPERCLOVA_CONTINUOUS_SOURCES, read_sources("hyperclova-omni-8b-sft"))


# Qwen: start runs with `--from` converted weights; sizes come from the released config.json files.

PHASES = (PhaseConfig("continued", tokens=1_000_000_000, seq_len=4096),)


def continue_pretraining(recipe: str, model: ModelConfig, parallel: ParallelConfig) -> RunConfig:
    """Return a run that continues a trained model, with a low learning rate and a short warm-up."""
    return RunConfig(
        recipe=recipe, model=model, parallel=parallel, data=DataConfig(phases=PHASES),
        optim=OptimConfig(lr=2e-5, min_lr=2e-6, schedule="cosine", warmup_steps=50, weight_decay=0.1),
        train=TrainConfig(global_batch_size=128, micro_batch_size=1, recompute=True))


def qwen2_1_5b() -> RunConfig:
    """Return Qwen2.5-Math-1.5B: biases on query, key and value, tied embeddings, 4K."""
    return continue_pretraining("qwen2-1.5b", ModelConfig(
        family="qwen2", vocab_size=151936, hidden_size=1536, num_layers=28, num_heads=12, num_kv_heads=2,
        head_dim=128, dense_ffn_dim=8960, num_experts=0, rope_theta=10_000.0, qkv_bias=True,
        tied_embeddings=True, norm_eps=1e-6, max_position_tokens=4096), ParallelConfig())


def qwen3_8b() -> RunConfig:
    """Return Qwen3-8B: QK-norm, no biases, 40K."""
    return continue_pretraining("qwen3-8b", ModelConfig(
        family="qwen3", vocab_size=151936, hidden_size=4096, num_layers=36, num_heads=32, num_kv_heads=8,
        head_dim=128, dense_ffn_dim=12288, num_experts=0, rope_theta=1e6, qk_norm=True, norm_eps=1e-6,
        max_position_tokens=40960),
        ParallelConfig())


def qwen3_4b() -> RunConfig:
    """Return Qwen3-4B: like the 8B, narrower, with tied embeddings."""
    return continue_pretraining("qwen3-4b", ModelConfig(
        family="qwen3", vocab_size=151936, hidden_size=2560, num_layers=36, num_heads=32, num_kv_heads=8,
        head_dim=128, dense_ffn_dim=9728, num_experts=0, rope_theta=1e6, qk_norm=True, norm_eps=1e-6,
        tied_embeddings=True, max_position_tokens=40960), ParallelConfig())


def qwen3_4b_2507() -> RunConfig:
    """Return Qwen3-4B-Instruct-2507: the 4B with a larger RoPE base, 256K."""
    run = qwen3_4b()
    return replace(run, recipe="qwen3-4b-2507",
                   model=replace(run.model, rope_theta=5e6, max_position_tokens=262144))


def qwen3_moe_30b() -> RunConfig:
    """Return Qwen3-30B-A3B: 8 of 128 experts in every layer, softmax router, no shared expert, 40K."""
    return continue_pretraining("qwen3-moe-30b", ModelConfig(
        family="qwen3_moe", vocab_size=151936, hidden_size=2048, num_layers=48, num_heads=32, num_kv_heads=4,
        head_dim=128, dense_ffn_dim=6144, num_experts=128, num_experts_per_token=8, num_shared_experts=0,
        expert_ffn_dim=768, router_score="softmax", router_bias=False, seq_aux_loss_coeff=1e-3,
        rope_theta=1e6, qk_norm=True, norm_eps=1e-6, max_position_tokens=40960), ParallelConfig(ep=8))


def qwen3_30b_a3b_2507() -> RunConfig:
    """Return Qwen3-30B-A3B-Instruct-2507: the 30B-A3B with a larger RoPE base, 256K."""
    run = qwen3_moe_30b()
    return replace(run, recipe="qwen3-30b-a3b-2507",
                   model=replace(run.model, rope_theta=1e7, max_position_tokens=262144))


TRAINING_SOURCES: Sources = read_sources("training of open models")
"""Sources for training settings, which differ from the published models' own training."""


def moe_sources(released: str) -> Sources:
    return {
        "model.*": config_json(released), "model.router_bias_update*": DEFAULT,
        "model.seq_aux_loss_coeff": ours("router_aux_loss_coef in config.json, for our form of the loss"),
        "model.mtp_*": DEFAULT, **TRAINING_SOURCES}


def dense_sources(released: str) -> Sources:
    """Return the sources for a dense model, whose config.json has no expert fields."""
    without = ("num_experts_per_token", "num_shared_experts", "expert_ffn_dim", "router_*", "routed_*",
               "norm_topk_prob", "seq_aux_loss_coeff")
    return derive_sources(moe_sources(released),
                          dict.fromkeys((f"model.{name}" for name in without), DEFAULT))


# DeepSeek-V3 and Kimi K2.

LATENT = LatentAttentionConfig(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                               q_lora_rank=1536)
"""Latent attention of DeepSeek-V3 and Kimi K2."""
DEEPSEEK_RELEASED = "deepseek-ai/DeepSeek-V3, compared with Megatron-Bridge's test_deepseek_bridges.py"
REPORT = "arXiv 2412.19437, section 4.2"
DEEPSEEK_SOURCES = derive_sources(moe_sources(DEEPSEEK_RELEASED), {
    "model.mtp_experts": config_json(DEEPSEEK_RELEASED),
    "model.mtp_loss_coeff": published(f"{REPORT}: 0.3 for the first 10 T tokens, then 0.1")})
KIMI_SOURCES = derive_sources(
    moe_sources("moonshotai/Kimi-K2-Instruct, compared with MindSpeed-LLM's script"),
    {"model.mtp_loss_coeff": ours("DeepSeek-V3's; it has no prediction layer")})


def deepseek_v3() -> RunConfig:
    """Return DeepSeek-V3: 8 of 256 experts from 4 of 8 groups, sigmoid router, one shared expert, latent
    attention, one MTP layer with experts, 160K by YaRN."""
    return continue_pretraining("deepseek-v3", ModelConfig(
        family="deepseek_v3", vocab_size=129280, hidden_size=7168, num_layers=61, num_heads=128,
        num_kv_heads=128, head_dim=192, latent_attention=LATENT, num_dense_layers=3, dense_ffn_dim=18432,
        num_experts=256, num_experts_per_token=8, num_expert_groups=8, num_groups_per_token=4,
        num_shared_experts=1, expert_ffn_dim=2048, num_mtp_layers=1, mtp_experts=True, mtp_loss_coeff=0.1,
        routed_scaling_factor=2.5, rope_theta=10_000.0, yarn=YarnConfig(40.0, 4096), norm_eps=1e-6,
        max_position_tokens=163840), ParallelConfig(tp=4, sp=True, pp=8, ep=32, pipeline_layout=(
            7, 8, 8, 8, 8, 8, 8, 6)))


def kimi_k2() -> RunConfig:
    """Return Kimi K2: DeepSeek-V3 with half the heads, 8 of 384 experts, one dense layer; 128K by YaRN."""
    return continue_pretraining("kimi-k2", ModelConfig(
        family="deepseek_v3", vocab_size=163840, hidden_size=7168, num_layers=61, num_heads=64,
        num_kv_heads=64, head_dim=192, latent_attention=LATENT, num_dense_layers=1, dense_ffn_dim=18432,
        num_experts=384, num_experts_per_token=8, num_shared_experts=1, expert_ffn_dim=2048,
        mtp_loss_coeff=0.1, routed_scaling_factor=2.827, rope_theta=50_000.0,
        yarn=YarnConfig(32.0, 4096, 1.0, 1.0), norm_eps=1e-6, max_position_tokens=131072),
        ParallelConfig(tp=4, sp=True, pp=8, ep=32, pipeline_layout=(7, 8, 8, 8, 8, 8, 8, 6)))


# Gemma.

def gemma_3_1b() -> RunConfig:
    """Return Gemma-3-1B: 512-token windows in five of six layers, norms before and after blocks, 32K."""
    return continue_pretraining("gemma-3-1b", ModelConfig(
        family="gemma3_text", vocab_size=262144, hidden_size=1152, num_layers=26, num_heads=4, num_kv_heads=1,
        head_dim=256, dense_ffn_dim=6912, num_experts=0, attention_pattern="LLLLLG",
        sliding_window_tokens=512, rope_theta=1e6, local_rope_theta=1e4, qk_norm=True,
        zero_centered_norms=True, activation="gelu_tanh", block_norms="both",
        embedding_multiplier=1152 ** 0.5, tied_embeddings=True, norm_eps=1e-6, max_position_tokens=32768),
        ParallelConfig())


def gemma3_27b() -> RunConfig:
    """Return Gemma-3-27B's text model: 1,024-token windows in five of six layers, linear RoPE scaling by 8 in
    global layers, 128K."""
    return continue_pretraining("gemma3-27b", ModelConfig(
        family="gemma3_text", vocab_size=262208, hidden_size=5376, num_layers=62, num_heads=32,
        num_kv_heads=16, head_dim=128, dense_ffn_dim=21504, num_experts=0, attention_pattern="LLLLLG",
        sliding_window_tokens=1024, rope_theta=1e6, local_rope_theta=1e4, linear_rope_factor=8.0,
        qk_norm=True, zero_centered_norms=True, activation="gelu_tanh", block_norms="both",
        embedding_multiplier=5376 ** 0.5, attention_multiplier=168 ** -0.5, tied_embeddings=True,
        norm_eps=1e-6, max_position_tokens=131072), ParallelConfig(tp=4, sp=True, zero1=True))


# Llama's shape.

def llama_3_1_8b() -> RunConfig:
    """Return Llama-3.1-8B: RoPE scaled to 128K."""
    return continue_pretraining("llama-3.1-8b", ModelConfig(
        family="llama", vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8,
        head_dim=128, dense_ffn_dim=14336, num_experts=0, rope_theta=5e5, llama3_rope=Llama3RopeConfig(),
        norm_eps=1e-5, max_position_tokens=131072), ParallelConfig())


# Dense Korean models.

def exaone_4_32b() -> RunConfig:
    """Return EXAONE-4.0-32B: three of four layers slide, global layers without positions, 128K."""
    return continue_pretraining("exaone-4.0-32b", ModelConfig(
        family="exaone4", vocab_size=102400, hidden_size=5120, num_layers=64, num_heads=40, num_kv_heads=8,
        head_dim=128, dense_ffn_dim=27392, num_experts=0, attention_pattern="LLLG",
        sliding_window_tokens=4096, rope_on_global=False, rope_theta=1e6,
        llama3_rope=Llama3RopeConfig(factor=16.0), qk_norm=True, block_norms="post", norm_eps=1e-5,
        max_position_tokens=131072), ParallelConfig(tp=4, sp=True))


def exaone_4_1_2b() -> RunConfig:
    """Return EXAONE-4.0-1.2B: global attention with RoPE, tied embeddings, 64K."""
    return continue_pretraining("exaone-4.0-1.2b", ModelConfig(
        family="exaone4", vocab_size=102400, hidden_size=2048, num_layers=30, num_heads=32, num_kv_heads=8,
        head_dim=64, dense_ffn_dim=4096, num_experts=0, rope_theta=1e6,
        llama3_rope=Llama3RopeConfig(factor=16.0), qk_norm=True, block_norms="post", norm_eps=1e-5,
        tied_embeddings=True, max_position_tokens=65536), ParallelConfig())


def hyperclovax_14b() -> RunConfig:
    """Return HyperCLOVAX-SEED-Think-14B: norms before and after blocks; embedding, attention and logits
    multipliers."""
    return continue_pretraining("hyperclovax-14b", ModelConfig(
        family="hyperclovax", vocab_size=110592, hidden_size=6144, num_layers=38, num_heads=48,
        num_kv_heads=8, head_dim=128, dense_ffn_dim=14336, num_experts=0, rope_theta=1e8, block_norms="both",
        embedding_multiplier=10.0, attention_multiplier=0.0078125, logits_multiplier=0.125, norm_eps=1e-5,
        init_std=0.012727922061357855, max_position_tokens=131072), ParallelConfig(tp=4, sp=True))


# Typhoon-S 8B (arXiv 2601.18129): fine-tuning of ThaiLLM-8B or Qwen3-8B-Base, as in the authors' scripts.
# `policies` has the recipe for on-policy distillation after it.

TYPHOON_TOKENS = 680_000_000
"""Two epochs of about 340,000 conversations with a thousand tokens each."""


def typhoon_s_8b() -> RunConfig:
    """Return the run for `sft`: two epochs packed to 16K, 32 samples per step, cosine from 2e-5 to 0."""
    return RunConfig(
        recipe="typhoon-s-8b", model=replace(qwen3_8b().model, max_position_tokens=32768),
        parallel=ParallelConfig(zero1=True),
        data=DataConfig(phases=(PhaseConfig("sft", tokens=TYPHOON_TOKENS, seq_len=16384),)),
        optim=OptimConfig(lr=2e-5, min_lr=0.0, schedule="cosine", warmup_steps=65, weight_decay=0.0,
                          beta2=0.999),
        train=TrainConfig(global_batch_size=32, micro_batch_size=1, seed=42, recompute=True),
        objective=ObjectiveConfig(name="sft"))


TYPHOON_SOURCES: Sources = derive_sources(dense_sources("Qwen/Qwen3-8B-Base"), read_sources("typhoon-s-8b"))


# VibeThinker-1.5B (arXiv 2511.06221): Qwen2.5-Math-1.5B, extended to 40,960 tokens in three stages by
# `extend`, then fine-tuned by `sft`. The report has no learning rates and batch sizes.

LENGTHS, THETA = {"16k": 16384, "32k": 32768, "40k": 40960}, 500_000.0
VIBETHINKER_LENGTH = LENGTHS["40k"]
"""Response lengths in the report's reinforcement learning and generation; text training covers every position
that responses reach."""
VIBETHINKER_STAGES = tuple(
    ExtendStageConfig(name, seq_len=seq_len, steps=500, max_steps=2000, global_batch_size=128,
                      rope_theta=THETA, parts=(PartConfig("long", 0.5), PartConfig("rehearsal", 0.25)))
    for name, seq_len in LENGTHS.items())
"""The lengths at which the report trains by reinforcement, and the one that it generates: a response is
learned at no position that the model has not met in text."""


def vibethinker_1_5b() -> RunConfig:
    """Return the gated extension 4K -> 16K -> 32K -> 40,960 with a larger RoPE base, and fine-tuning at
    16K."""
    return RunConfig(
        recipe="vibethinker-1.5b",
        model=replace(qwen2_1_5b().model, rope_theta=THETA, max_position_tokens=VIBETHINKER_LENGTH),
        parallel=ParallelConfig(zero1=True),
        data=DataConfig(phases=(PhaseConfig("sft", tokens=5_000_000_000, seq_len=16384),)),
        optim=OptimConfig(lr=5e-5, min_lr=8e-8, schedule="cosine", warmup_steps=120, weight_decay=0.1),
        train=TrainConfig(global_batch_size=128, micro_batch_size=1, recompute=True,
                          checkpoint_every_steps=100, keep_every_steps=100),
        objective=ObjectiveConfig(name="sft"), needle=NeedleConfig(lengths_tokens=(4096, *LENGTHS.values())),
        extend=ExtendConfig(stages=VIBETHINKER_STAGES, gate=GateConfig(every_steps=100, min_accuracy=0.98)))


VIBETHINKER_SOURCES: Sources = derive_sources(dense_sources("Qwen/Qwen2.5-Math-1.5B"),
                                              read_sources("vibethinker-1.5b"))
