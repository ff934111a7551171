"""A Hugging Face folder becomes one GGUF file, which llama.cpp and what is built on it run; memory holds one
tensor of the folder.

Names of tensors and fields are those of the library `gguf`, llama.cpp's own.  What its converter
(`conversion/llama.py`, `qwen.py`, `exaone.py`, `glm.py`, `base.py`) changes of a weight is changed here.
`benchmarks/gguf_llama_cpp.py` asks llama.cpp itself for each family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_sov.base.artifacts import new_file
from megatron_sov.base.errors import UserError, how_to_install, warn
from megatron_sov.base.outputs import check_output, refuse_input
from megatron_sov.chat.folder import TOKENIZER_JSON, chat_template, open_tokenizer
from megatron_sov.convert.dtypes import KEEP, check_space, convert_tensor
from megatron_sov.convert.hf_import import generation_ids, ids_as_list
from megatron_sov.convert.sources import HfWeights, check_dtypes, refuse_damaged_export
from megatron_sov.model.config.model import Llama3RopeConfig, ModelConfig
from megatron_sov.model.families.supported import QWEN2_SPLIT
from megatron_sov.model.pretrained import CONFIG, hub_name, read_json

ARCHITECTURES = {"llama": "LLAMA", "mixtral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3",
                 "qwen3_moe": "QWEN3MOE", "exaone4": "EXAONE4", "exaone_moe": "EXAONE_MOE",
                 "solar_open": "GLM4_MOE", "glm4_moe": "GLM4_MOE"}
"""Family -> its `gguf.MODEL_ARCH`."""
MAGIC = b"GGUF"
BLOCK = 32
"""Numbers of a row that share a scale in q8_0."""
INSTEAD = "use --type bf16 or f32"
_FREQUENCIES = "rope_freqs.weight"
"""Divisors of the rotary frequencies."""
_READS_DIVISORS = ("llama", "mixtral", "exaone4", "exaone_moe")
YARN_ENDS = (32, 1)
"""beta_fast and beta_slow of every YaRN that llama.cpp computes for these families."""
SLIDING_EXAONE4_LAYERS = 64
"""Layers of EXAONE 4.0 32B, the one model of its kind that slides."""
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.(.+)")
"""Name of one expert's tensor."""


@dataclass(frozen=True)
class WrittenTensor:
    """One tensor of the file."""

    name: str
    """In GGUF."""
    shape: tuple[int, ...]
    """As in the folder: GGUF lists it backwards."""
    kind: str
    """Name of its `gguf.GGMLQuantizationType`."""
    read: Callable[[], Iterator[torch.Tensor]]
    """Yields its numbers in order, in float32, bfloat16 or float16, finite ones: at once, or those of one
    expert at a time."""


def to_gguf(folder: str | Path, out: str | Path, type_: str = KEEP, *, overwrite: bool = False) -> None:
    """Write a Hugging Face folder as a GGUF file.

    Args:
        folder: a model of a family in `ARCHITECTURES`, with a byte-level BPE in tokenizer.json.
        out: the file to write; it appears only when complete.
        type_: "f32", "f16", "bf16" or "q8_0" for matrices, or "keep" for the dtype that each has in the
            folder (float32 for float64). Norms, biases and routers are float32 always, as llama.cpp wants
            them.
        overwrite: replace a GGUF file that is already there.

    Raises:
        UserError: the folder is damaged, llama.cpp computes its model otherwise or cannot split text as its
            tokenizer does, a value is not finite or overflows, the disk is full, or `out` is taken.
    """
    folder, out = Path(folder), Path(out)
    gguf = _library()
    _check_out(out, folder, overwrite)
    weights = HfWeights(folder)
    _check_model(weights)
    check_dtypes(weights)
    refuse_damaged_export(folder)
    tokenizer = read_tokenizer(folder, weights.model.vocab_size)
    tensors = list(_planned(gguf, weights, type_))
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[_architecture(gguf, weights.model)])
    _describe(gguf, writer, weights, _file_type(gguf, tensors))
    tokenizer.write(gguf, writer)
    sizes = [_size_bytes(gguf, tensor) for tensor in tensors]
    check_space(out, sum(sizes))
    for tensor, size_bytes in zip(tensors, sizes, strict=True):
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size_bytes,
                               raw_dtype=gguf.GGMLQuantizationType[tensor.kind])
    with new_file(out, makes_parents=True) as temporary:
        _write(gguf, writer, tensors, temporary)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError(f"GGUF files need the library gguf: {how_to_install('gguf')}") from None
    return gguf


def _check_out(out: Path, folder: Path, overwrite: bool) -> None:
    check_output("OUT", out)
    refuse_input("OUT", out, *(folder.iterdir() if folder.is_dir() else ()))
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out}: already exists; choose another file, or pass --overwrite to replace it")
    with out.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{out}: exists and is no GGUF file, so it is not replaced; choose another file")


def _architecture(gguf: Any, model: ModelConfig) -> Any:
    return gguf.MODEL_ARCH[ARCHITECTURES[model.family]]


def _check_model(weights: HfWeights) -> None:
    """Raise `UserError` where llama.cpp has no class for a model, or computes it otherwise."""
    model, where = weights.model, weights.path / CONFIG
    if model.family not in ARCHITECTURES:
        raise UserError(f"{where}: model_type = {model.family!r} is not written as GGUF; only "
                        f"{', '.join(ARCHITECTURES)} are. Use llama.cpp's own convert_hf_to_gguf.py")
    for broken, what in _otherwise(model):
        if broken:
            raise UserError(f"{where}: {what}")


def _otherwise(model: ModelConfig) -> list[tuple[bool, str]]:
    """Return what llama.cpp's classes (`src/models`) compute otherwise, and whether a model has it."""
    family, slides, yarn = model.family, "L" in model.attention_pattern, model.yarn
    width = model.num_heads * model.head_dim
    ends = f"beta_fast = {yarn.beta_fast:g}, beta_slow = {yarn.beta_slow:g}" if yarn else ""
    return [
        (slides and family not in ("exaone4", "exaone_moe"),
         "has layers with a sliding window, and llama.cpp attends to all tokens in models of "
         f"{family!r}; its logits would differ"),
        (yarn is not None and not yarn.truncate,
         "YaRN with truncate = false is not what llama.cpp computes; it rounds the ends of the ramp to whole "
         "channels"),
        (yarn is not None and (yarn.beta_fast, yarn.beta_slow) != YARN_ENDS,
         f"YaRN with {ends}, and llama.cpp takes {YARN_ENDS[0]} and {YARN_ENDS[1]} for models of {family!r}, "
         "whatever a file says"),
        (model.llama3_rope is not None and family not in _READS_DIVISORS,
         f"rope_type = llama3, and llama.cpp does not scale so in models of {family!r}"),
        (family in ("qwen2", "exaone4") and width != model.hidden_size,
         f"num_attention_heads x head_dim = {width} is not hidden_size = {model.hidden_size}, and llama.cpp "
         f"reads no other models of {family!r}"),
        (family == "qwen3_moe" and not model.norm_topk_prob,
         "norm_topk_prob = false, and llama.cpp divides the weights of the chosen experts by their sum"),
        (family == "qwen3_moe" and model.num_dense_layers > 0,
         "has layers without experts, and llama.cpp reads no such models of 'qwen3_moe'"),
        (family == "exaone4" and slides != (model.num_layers == SLIDING_EXAONE4_LAYERS),
         f"has {model.num_layers} layers, {'some' if slides else 'none'} with a sliding window; llama.cpp "
         f"knows by the number of layers, {SLIDING_EXAONE4_LAYERS}, which models slide"),
        (family == "exaone4" and slides == model.rope_on_global,
         f"{'rotates' if model.rope_on_global else 'does not rotate'} global layers, and llama.cpp does so "
         "exactly where no layer slides"),
        (family == "exaone_moe" and not slides,
         "has no layer with a sliding window, and llama.cpp reads no such models of 'exaone_moe'"),
        (bool(model.layer_windows), "has windows of several sizes, and llama.cpp knows one"),
        (any(model.swiglu_limits), "has swiglu_limits, which llama.cpp does not compute for it"),
    ]


# Tensors.


def _planned(gguf: Any, weights: HfWeights, type_: str) -> Iterator[WrittenTensor]:
    """Yield what is written, in the order of the weight map; a prediction layer is left out, and told."""
    model = weights.model
    names = gguf.get_tensor_name_map(_architecture(gguf, model), model.num_layers)
    shapes = {name: shape for link in weights.links for name, shape in link.hf_shapes().items()}
    left_out = []
    if model.llama3_rope is not None:
        factors = rope_divisors(model.llama3_rope, model.rope_theta, model.head_dim)
        yield WrittenTensor(_FREQUENCIES, tuple(factors.shape), "F32", lambda: iter([factors]))
    for name, parts in gathered(list(shapes)).items():
        theirs = names.get_name(name.replace("_correction_bias", "_correction.bias"),
                                try_suffixes=(".weight", ".bias"))
        shape = shapes[parts[0]]
        if theirs is None:
            left_out += parts
        else:
            yield _tensor(weights, parts, theirs, shape if parts == [name] else (len(parts), *shape), type_)
    if left_out and not model.num_mtp_layers:
        raise UserError(f"{weights.path}: GGUF has no name for {left_out[0]} in models of {model.family!r}")
    if left_out:
        warn(f"{weights.path}: left out {len(left_out)} tensors of the prediction layer, for which llama.cpp "
             f"has no place in models of {model.family!r}")


def gathered(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the folder's tensors that GGUF has as one, by a name without the expert's number, in order."""
    found: dict[str, list[str]] = {}
    for name in names:
        expert = _EXPERT.fullmatch(name)
        found.setdefault(f"{expert[1]}.{expert[2]}" if expert else name, []).append(name)
    return found


def _tensor(weights: HfWeights, parts: list[str], theirs: str, shape: tuple[int, ...],
            type_: str) -> WrittenTensor:
    own = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(weights.dtype(parts[0]), "F32")
    is_matrix = len(shape) > 1 and not theirs.endswith("ffn_gate_inp.weight")
    kind = "F32" if not is_matrix else own if type_ == KEEP else type_.upper()
    if kind == "Q8_0" and shape[-1] % BLOCK:
        raise UserError(f"--type q8_0: {parts[0]} has rows of {shape[-1]} numbers, which {BLOCK} does not "
                        f"divide; {INSTEAD}")
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(kind, torch.float32)
    heads = _rotated_heads(weights.model, parts[0])

    def read() -> Iterator[torch.Tensor]:
        for name in parts:
            tensor = convert_tensor(weights.read(name), dtype, weights.path, name, INSTEAD)
            yield interleaved(tensor, heads) if heads else tensor

    return WrittenTensor(theirs, shape, kind, read)


def _rotated_heads(model: ModelConfig, name: str) -> int:
    """Return the heads of a weight whose rows llama.cpp wants in pairs: of query and key in its `llama`; else
    0."""
    if ARCHITECTURES[model.family] != "LLAMA":
        return 0
    if name.endswith("q_proj.weight"):
        return model.num_heads
    return model.num_kv_heads if name.endswith("k_proj.weight") else 0


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return a weight [heads x width, inputs] whose rows that rotate together, i and i + width / 2 of a head
    in Hugging Face's order, stand side by side, as Llama's authors had them."""
    return (weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape))


def rope_divisors(scaling: Llama3RopeConfig, theta: float, head_dim: int) -> torch.Tensor:
    """Return what Llama 3.1's scaling divides each rotary frequency by: [head_dim / 2] float32."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    rotations = scaling.original_max_position_tokens * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / scaling.factor + share)).float()


# The tokenizer: tokens, merges, special ids, the chat template, and the name by which llama.cpp knows how
# text is split.

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION, _BLANKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = "gpt-2"
SPLITS = {
    QWEN2_SPLIT: {False: "qwen2"},
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_BLANKS}": {
        True: "llama-bpe", False: "smaug-bpe"},
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}": {False: "qwen35"},
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+": {False: "exaone-moe"},
}
"""Split pattern -> whether words that are tokens skip the merges (`ignore_merges`) -> llama.cpp's name
(src/llama-vocab.cpp)."""
KEPT_APART = ("Split", "Isolated", False)
"""Type, behavior and invert of a step that cuts text at each match and behind it."""
END_FIELDS = ("eos", "eot", "eom")
"""Fields for ids at which llama.cpp ends generation."""
NO_END, BESIDE = "<|end|>", (("<|call|>", "<|calls|>"), ("<|return|>", "<|flush|>"))
"""A token at which llama.cpp never ends generation, whatever the fields say, where a vocabulary has one of
each of these (src/llama-vocab.cpp: in gpt-oss and Solar Open it ends a thought)."""


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer as GGUF has it."""

    tokens: list[str]
    """Token of each id: of bytes as GPT-2 spells them, added ones as they are."""
    kinds: list[str]
    """Name of the `gguf.TokenType` of each."""
    merges: list[str]
    """Left and right side, with a blank between."""
    split: str
    """llama.cpp's name of the split of text."""
    ids: dict[str, int]
    """bos, eos, eot, eom, pad -> id, where there is one."""
    adds: dict[str, bool]
    """bos, eos -> whether it is added to text."""
    template: str
    """Chat template; empty: none."""

    def write(self, gguf: Any, writer: Any) -> None:
        """Add it to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types([gguf.TokenType[kind] for kind in self.kinds])
        writer.add_token_merges(self.merges)
        for name, id_ in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(id_)
        for name, adds in self.adds.items():
            getattr(writer, f"add_add_{name}_token")(adds)
        if self.template:
            writer.add_chat_template(self.template)


def read_tokenizer(folder: Path, vocab_size: int) -> GgufTokenizer:
    """Return a folder's tokenizer with a token for each of the model's ids.

    Raises:
        UserError: there is none, it is no byte-level BPE, splits text as llama.cpp never does, or has more
            tokens than the model.
    """
    file = folder / TOKENIZER_JSON
    if not file.is_file():
        raise UserError(f"{folder}: has no {TOKENIZER_JSON}, which a GGUF file holds beside the weights; put "
                        "the model's tokenizer there")
    raw, tokenizer = read_json(file), open_tokenizer(folder)  # the second checks what the first has
    split, added = _split_name(raw, file), tokenizer.get_added_tokens_decoder()
    found = {id_: text for text, id_ in tokenizer.get_vocab(with_added_tokens=True).items()}
    if max(found) >= vocab_size:
        raise UserError(f"{file}: has the id {max(found)}, and the model {vocab_size} ids; put the model's "
                        "own tokenizer there")
    # tables of embeddings are often longer than the vocabulary
    tokens = [found.get(id_, f"[PAD{id_}]") for id_ in range(vocab_size)]
    kinds = ["UNUSED" if id_ not in found else "NORMAL" if id_ not in added
             else "CONTROL" if added[id_].special else "USER_DEFINED" for id_ in range(vocab_size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]]
    ids = _special_ids(folder)
    if (NO_END in {found.get(ids.get(field, -1)) for field in END_FIELDS}
            and all({*some} & {*found.values()} for some in BESIDE)):
        warn(f"{file}: generation ends at {NO_END}, and llama.cpp goes on behind it in a vocabulary that has "
             f"{' and '.join(' or '.join(some) for some in BESIDE)}; give its programs {NO_END} as a stop "
             "string")
    encoded = tokenizer.encode("a").ids
    adds = {"bos": encoded[:1] == [ids.get("bos")], "eos": encoded[-1:] == [ids.get("eos")]}
    return GgufTokenizer(tokens, kinds, merges, split, ids, adds, chat_template(folder))


def _split_name(raw: dict[str, Any], file: Path) -> str:
    """Return llama.cpp's name of how text is split into words before bytes merge."""
    model, normalizer = raw["model"], raw.get("normalizer")
    step = raw.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    if (model.get("type") != "BPE" or model.get("byte_fallback") or not steps
            or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space")):
        raise UserError(f"{file}: is no byte-level BPE that adds no blank before text, which alone is "
                        "written as GGUF; use llama.cpp's own convert_hf_to_gguf.py")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise UserError(f"{file}: changes text by the normalizer {normalizer.get('type')}, which llama.cpp "
                        "does not do; train a tokenizer without it")
    ignores = bool(model.get("ignore_merges"))
    if len(steps) == 1 and steps[0].get("use_regex", True):
        names = {False: GPT2}
    elif (len(steps) == 2 and not steps[1].get("use_regex", True)
          and (steps[0].get("type"), steps[0].get("behavior"), steps[0].get("invert")) == KEPT_APART):
        names = SPLITS.get((steps[0].get("pattern") or {}).get("Regex", ""), {})
    else:
        names = {}
    if ignores not in names:
        known = [GPT2, *(name for found in SPLITS.values() for name in found.values())]
        raise UserError(f"{file}: its pre_tokenizer with ignore_merges = {ignores} is none of those that "
                        f"llama.cpp has and that are known here ({', '.join(known)}), so it would give other "
                        "ids; run the model by transformers or `megatron-sov serve`")
    if normalizer is not None:
        warn(f"{file}: composes text to NFC first, which llama.cpp does not do; give it composed text")
    return names[ignores]


def _special_ids(folder: Path) -> dict[str, int]:
    tokens = generation_ids(folder)
    ends = ids_as_list(tokens.eos)
    if more := ends[len(END_FIELDS):]:
        warn(f"{folder}: generation ends at {len(ends)} ids, and GGUF has fields for {len(END_FIELDS)}; "
             f"{', '.join(map(str, more))} are left out")
    found = {"bos": tokens.bos, **dict(zip(END_FIELDS, ends, strict=False)), "pad": tokens.pad}
    return {name: id_ for name, id_ in found.items() if id_ is not None}


# The file.


def _size_bytes(gguf: Any, tensor: WrittenTensor) -> int:
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.kind]]
    return math.prod(tensor.shape) // per_block * block_bytes


def _file_type(gguf: Any, tensors: list[WrittenTensor]) -> int:
    """Return what the file says that most of its matrices are."""
    kind = next(tensor.kind for tensor in tensors if len(tensor.shape) > 1)
    return int(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])


def _describe(gguf: Any, writer: Any, weights: HfWeights, file_type: int) -> None:
    """Add what llama.cpp reads of a model."""
    model = weights.model
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(hub_name(weights.path))
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(model.vocab_size)
    writer.add_block_count(model.num_layers)
    writer.add_context_length(model.max_position_tokens)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.dense_ffn_dim or model.expert_ffn_dim)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_rope_dimension_count(model.rotated_channels())
    if model.sliding_window_tokens:
        writer.add_sliding_window(model.sliding_window_tokens)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in model.layer_types()])
    if model.num_moe_layers():
        _describe_experts(gguf, writer, model)
    if model.linear_rope_factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.linear_rope_factor)
    if model.yarn is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(model.yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(model.yarn.original_max_position_tokens)


def _describe_experts(gguf: Any, writer: Any, model: ModelConfig) -> None:
    shared = model.num_shared_experts
    writer.add_leading_dense_block_count(model.num_dense_layers)
    writer.add_expert_count(model.num_experts)
    writer.add_expert_used_count(model.num_experts_per_token)
    writer.add_expert_feed_forward_length(model.expert_ffn_dim)
    if shared:
        writer.add_expert_shared_count(shared)
        writer.add_expert_shared_feed_forward_length(shared * model.expert_ffn_dim)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType[model.router_score.upper()])
    writer.add_expert_weights_norm(model.norm_topk_prob)
    writer.add_expert_weights_scale(model.routed_scaling_factor)
    if model.num_expert_groups > 1:
        writer.add_expert_group_count(model.num_expert_groups)
        writer.add_expert_group_used_count(model.num_groups_per_token)


@dataclass(frozen=True)
class _PartedTensor:
    """A tensor as `gguf.GGUFWriter.write_tensor_data` takes it, of which memory holds a part at a time."""

    nbytes: int
    parts: Iterator[np.ndarray]

    def tofile(self, file: Any) -> None:
        for part in self.parts:
            part.tofile(file)


def _write(gguf: Any, writer: Any, tensors: list[WrittenTensor], path: Path) -> None:
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tqdm(tensors, desc="to-gguf", unit="tensor", disable=None):
            parts = (_stored(gguf, tensor.kind, part) for part in tensor.read())
            writer.write_tensor_data(_PartedTensor(_size_bytes(gguf, tensor), parts))
        writer.flush()
    finally:
        writer.close()


def _stored(gguf: Any, kind: str, part: torch.Tensor) -> np.ndarray:
    numbers = part.contiguous()
    if kind == "BF16":  # numpy has no such dtype
        return numbers.view(torch.uint8).numpy()
    if kind == "Q8_0":
        stored: np.ndarray = gguf.quants.quantize(numbers.numpy(), gguf.GGMLQuantizationType.Q8_0)
        return stored
    return numbers.numpy()
