"""Names and shapes of image and audio encoder weights, in checkpoints and in Hugging Face folders.

Checkpoint names are `vision.encoder.` or `audio.encoder.` plus the tensor's transformers name, `*.adapter.`,
and `audio.compressor.` plus the authors' names. All processes of the first pipeline stage hold full copies.
Hugging Face folders use the prefixes of the released HyperCLOVA X 8B Omni (OmniServe,
model_converter/README.md).
"""

import math
from collections.abc import Iterator

from megatron_sov.model.config import AudioEncoderConfig, MediaConfig, ModelConfig, VisionEncoderConfig
from megatron_sov.model.families.weights import Layout, Link

VISION, AUDIO = "vision.", "audio."
PREFIXES = (VISION, AUDIO)
"""Prefixes for all encoder tensors."""
ENCODER, ADAPTER, COMPRESSOR = "encoder.", "adapter.", "compressor."
HF_PREFIXES = {
    VISION + ENCODER: "model.vision_model.", VISION + ADAPTER: "model.mm_projector.",
    AUDIO + ENCODER: "model.audio_model.", AUDIO + ADAPTER: "model.audio_projector.",
    AUDIO + COMPRESSOR: "model.video_audio_compressor."}
"""Prefix in checkpoints -> prefix in Hugging Face folders."""
_POSITIONS = "encoder.embed_positions.weight"
_POSITION_TABLES = (_POSITIONS, "encoder.embeddings.position_embedding.weight")
Shapes = dict[str, tuple[int, ...]]


def encoder_shapes(model: ModelConfig) -> Shapes:
    """Return tensor name -> shape, in the order in which modules register the tensors."""
    shapes: Shapes = {}
    if model.vision is not None:
        shapes |= {VISION + name: shape for name, shape in _iter_vision(model.vision, model.hidden_size)}
    if model.audio is not None:
        shapes |= {AUDIO + name: shape for name, shape in _iter_audio(model.audio, model.hidden_size)}
    return shapes


def is_encoder(key: str) -> bool:
    return key.startswith(PREFIXES)


def is_position_table(key: str) -> bool:
    """Return whether a tensor is a table with a row per position."""
    return is_encoder(key) and key.endswith(_POSITION_TABLES)


def is_frozen(key: str, media: MediaConfig) -> bool:
    """Return whether an encoder tensor is not trained: frozen by `media`, or a sinusoidal position table."""
    if not is_encoder(key):
        return False
    # Whisper's positions are fixed sinusoids and are never trained.
    if key.endswith(_POSITIONS):
        return True
    encodes = key.startswith((VISION + ENCODER, AUDIO + ENCODER))
    return not (media.train_encoders if encodes else media.train_adapters)


def encoder_links(model: ModelConfig) -> list[Link]:
    """Return links from all encoder tensors to Hugging Face names."""
    return [Link(key, shape, (0,) * len(shape), (encoder_hf_name(key, model),),
                 Layout(shape, 0, (shape[0],), 1), fp32=False)
            for key, shape in encoder_shapes(model).items()]


def encoder_hf_name(key: str, model: ModelConfig) -> str:
    """Return the Hugging Face name of a tensor; a linear adapter has no submodule name."""
    # No prefix is the beginning of another prefix.
    prefix = next(prefix for prefix in HF_PREFIXES if key.startswith(prefix))
    name = key.removeprefix(prefix)
    encoder = model.vision if prefix.startswith(VISION) else model.audio
    if prefix.endswith(ADAPTER) and encoder is not None and encoder.adapter == "linear":
        name = name.removeprefix("fc2.")
    return HF_PREFIXES[prefix] + name


def _iter_linear(name: str, out: int, into: int, *,
                 bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def _iter_norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _iter_vision(c: VisionEncoderConfig, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _iter_siglip(c) if c.kind == "siglip" else _iter_qwen2_5_vl(c)
    yield from _iter_adapter(c.adapter, c.feature_size, hidden)


def _iter_siglip(c: VisionEncoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    w, places = c.hidden_size, (c.image_size // c.patch_size) ** 2
    yield "encoder.embeddings.patch_embedding.weight", (w, 3, c.patch_size, c.patch_size)
    yield "encoder.embeddings.patch_embedding.bias", (w,)
    yield "encoder.embeddings.position_embedding.weight", (places, w)
    for i in range(c.num_layers):
        layer = f"encoder.encoder.layers.{i}."
        yield from _iter_norm(layer + "layer_norm1", w)
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _iter_linear(f"{layer}self_attn.{name}", w, w)
        yield from _iter_norm(layer + "layer_norm2", w)
        yield from _iter_linear(layer + "mlp.fc1", c.ffn_dim, w)
        yield from _iter_linear(layer + "mlp.fc2", w, c.ffn_dim)
    yield from _iter_norm("encoder.post_layernorm", w)


def _iter_qwen2_5_vl(c: VisionEncoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    # The merger joins merge_size x merge_size neighbouring patches into one vector.
    w, merged = c.hidden_size, c.hidden_size * c.merge_size ** 2
    yield "encoder.patch_embed.proj.weight", (w, 3, c.temporal_patch_size, c.patch_size, c.patch_size)
    for i in range(c.num_layers):
        block = f"encoder.blocks.{i}."
        yield block + "norm1.weight", (w,)
        yield block + "norm2.weight", (w,)
        yield from _iter_linear(block + "attn.qkv", 3 * w, w)
        yield from _iter_linear(block + "attn.proj", w, w)
        yield from _iter_linear(block + "mlp.gate_proj", c.ffn_dim, w)
        yield from _iter_linear(block + "mlp.up_proj", c.ffn_dim, w)
        yield from _iter_linear(block + "mlp.down_proj", w, c.ffn_dim)
    yield "encoder.merger.ln_q.weight", (w,)
    yield from _iter_linear("encoder.merger.mlp.0", merged, merged)
    yield from _iter_linear("encoder.merger.mlp.2", c.out_hidden_size, merged)


def _iter_audio(c: AudioEncoderConfig, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    w = c.hidden_size
    yield "encoder.conv1.weight", (w, c.num_mels, 3)
    yield "encoder.conv1.bias", (w,)
    yield "encoder.conv2.weight", (w, w, 3)
    yield "encoder.conv2.bias", (w,)
    # The second convolution has stride 2, so the table has a position per two frames.
    yield _POSITIONS, (c.num_frames // 2, w)
    for i in range(c.num_layers):
        layer = f"encoder.layers.{i}."
        # Whisper's keys have no bias: softmax ignores a constant added to all scores of a query.
        yield from _iter_linear(layer + "self_attn.k_proj", w, w, bias=False)
        for name in ("v_proj", "q_proj", "out_proj"):
            yield from _iter_linear(f"{layer}self_attn.{name}", w, w)
        yield from _iter_norm(layer + "self_attn_layer_norm", w)
        yield from _iter_linear(layer + "fc1", c.ffn_dim, w)
        yield from _iter_linear(layer + "fc2", w, c.ffn_dim)
        yield from _iter_norm(layer + "final_layer_norm", w)
    yield from _iter_norm("encoder.layer_norm", w)
    yield from _iter_adapter(c.adapter, w, hidden)
    # Without compression the module does not exist.
    if c.compression > 1:
        for name, shape in _iter_compressor(c, hidden):
            yield COMPRESSOR + name, shape


def _iter_adapter(kind: str, width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if kind == "mlp":
        yield from _iter_linear("adapter.fc1", width, width)
    yield from _iter_linear("adapter.fc2", hidden, width)


def _iter_compressor(c: AudioEncoderConfig, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    w, heads = c.compressor_size, c.compressor_heads
    inner = 2 * w
    # Mamba-2's convolution runs over x, B and C together (one group).
    channels = inner + 2 * c.compressor_state_size
    block = "model.layers.0."
    yield "query_token", (w,)
    yield from _iter_linear("input_proj", w, hidden)
    yield block + "norm.weight", (w,)
    for name in ("dt_bias", "A_log", "D"):
        yield f"{block}mixer.{name}", (heads,)
    yield block + "mixer.conv1d.weight", (channels, 1, 4)
    yield block + "mixer.conv1d.bias", (channels,)
    # One projection makes gate z, then x, B, C, then dt for each head.
    yield from _iter_linear(block + "mixer.in_proj", inner + channels + heads, w, bias=False)
    yield block + "mixer.norm.weight", (inner,)
    yield from _iter_linear(block + "mixer.out_proj", w, inner, bias=False)
    yield from _iter_linear(block + "weight_fc", c.compression, w)
    yield from _iter_linear(block + "gate_fc", 1, w)
    yield "model.norm_f.weight", (w,)
    yield from _iter_norm("input_norm", w)
    yield from _iter_linear("output_proj", hidden, w)


def encoder_buffer_bytes(model: ModelConfig) -> int:
    """Return the bytes of encoder buffers: SigLIP's position ids, Qwen2.5-VL's rotary frequencies (stored
    twice)."""
    c = model.vision
    if c is None:
        return 0
    return c.slots * 8 if c.kind == "siglip" else 2 * (c.hidden_size // c.num_heads // 4) * 4


def count_encoder_params(model: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in encoder_shapes(model).values())
