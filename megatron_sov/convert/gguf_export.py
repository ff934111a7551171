"""A Hugging Face folder becomes one GGUF file, which llama.cpp and what is built on it run; memory holds one
tensor.

Names of tensors and fields are those of the library `gguf`, llama.cpp's own.  What its converter
(`conversion/llama.py`, `qwen.py`, `base.py`) changes of a weight is changed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
from megatron_sov.convert.hf_import import ids_beside, with_turn_ends
from megatron_sov.convert.sources import HfWeights, check_dtypes, refuse_damaged_export
from megatron_sov.model.config.model import Llama3RopeConfig, ModelConfig
from megatron_sov.model.families.supported import QWEN2_SPLIT
from megatron_sov.model.pretrained import CONFIG, hub_name, read_json

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Family -> its `gguf.MODEL_ARCH`."""
MAGIC = b"GGUF"
BLOCK = 32
"""Numbers of a row that share a scale in q8_0."""
INSTEAD = "use --type bf16 or f32"
_FREQUENCIES = "rope_freqs.weight"
"""Divisors of the rotary frequencies."""


@dataclass(frozen=True)
class WrittenTensor:
    """One tensor of the file."""

    name: str
    """In GGUF."""
    shape: tuple[int, ...]
    """As in the folder: GGUF lists it backwards."""
    kind: str
    """Name of its `gguf.GGMLQuantizationType`."""
    read: Callable[[], torch.Tensor]
    """Returns its numbers in float32, bfloat16 or float16, finite ones."""


def to_gguf(folder: str | Path, out: str | Path, type_: str = KEEP, *, overwrite: bool = False) -> None:
    """Write a Hugging Face folder as a GGUF file.

    Args:
        folder: a dense model of a family in `ARCHITECTURES`, with a byte-level BPE in tokenizer.json.
        out: the file to write; it appears only when complete.
        type_: "f32", "f16", "bf16" or "q8_0" for matrices, or "keep" for the dtype that each has in the
            folder (float32 for float64). Norms and biases are float32 always, as llama.cpp wants them.
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
    if set(model.attention_pattern) != {"G"}:
        raise UserError(f"{where}: has layers with a sliding window, and llama.cpp attends to all tokens in "
                        f"models of {model.family!r}; its logits would differ")
    if model.yarn is not None and not model.yarn.truncate:
        raise UserError(f"{where}: YaRN with truncate = false is not what llama.cpp computes; it rounds the "
                        "ends of the ramp to whole channels")


# Tensors.


def _planned(gguf: Any, weights: HfWeights, type_: str) -> Iterator[WrittenTensor]:
    """Yield what is written, in the order of the weight map; a prediction layer is left out, and told."""
    model = weights.model
    names = gguf.get_tensor_name_map(_architecture(gguf, model), model.num_layers)
    shapes = {name: shape for link in weights.links for name, shape in link.hf_shapes().items()}
    left_out = []
    if model.llama3_rope is not None:
        factors = rope_divisors(model.llama3_rope, model.rope_theta, model.head_dim)
        yield WrittenTensor(_FREQUENCIES, tuple(factors.shape), "F32", lambda: factors)
    for name, shape in shapes.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            left_out.append(name)
        else:
            yield _tensor(weights, name, theirs, shape, type_)
    if left_out and not model.num_mtp_layers:
        raise UserError(f"{weights.path}: GGUF has no name for {left_out[0]} in models of {model.family!r}")
    if left_out:
        warn(f"{weights.path}: left out {len(left_out)} tensors of the prediction layer, for which llama.cpp "
             f"has no place in models of {model.family!r}")


def _tensor(weights: HfWeights, name: str, theirs: str, shape: tuple[int, ...], type_: str) -> WrittenTensor:
    own = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(weights.dtype(name), "F32")
    kind = "F32" if len(shape) == 1 else own if type_ == KEEP else type_.upper()
    if kind == "Q8_0" and shape[-1] % BLOCK:
        raise UserError(f"--type q8_0: {name} has rows of {shape[-1]} numbers, which {BLOCK} does not "
                        f"divide; {INSTEAD}")
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(kind, torch.float32)
    heads = _rotated_heads(weights.model, name)

    def read() -> torch.Tensor:
        tensor = convert_tensor(weights.read(name), dtype, weights.path, name, INSTEAD)
        return interleaved(tensor, heads) if heads else tensor

    return WrittenTensor(theirs, shape, kind, read)


def _rotated_heads(model: ModelConfig, name: str) -> int:
    """Return the heads of a weight whose rows llama.cpp wants in pairs: of query and key in `llama`; else
    0."""
    if model.family != "llama":
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
    tokens = with_turn_ends(folder, ids_beside(folder))
    ends = tokens.eos if isinstance(tokens.eos, list) else [] if tokens.eos is None else [tokens.eos]
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
    writer.add_feed_forward_length(model.dense_ffn_dim)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_rope_dimension_count(model.head_dim)
    if model.linear_rope_factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.linear_rope_factor)
    if model.yarn is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(model.yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(model.yarn.original_max_position_tokens)
        writer.add_rope_scaling_yarn_beta_fast(model.yarn.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(model.yarn.beta_slow)


def _write(gguf: Any, writer: Any, tensors: list[WrittenTensor], path: Path) -> None:
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tqdm(tensors, desc="to-gguf", unit="tensor", disable=None):
            writer.write_tensor_data(_stored(gguf, tensor))
        writer.flush()
    finally:
        writer.close()


def _stored(gguf: Any, tensor: WrittenTensor) -> np.ndarray:
    numbers = tensor.read().contiguous()
    if tensor.kind == "BF16":  # numpy has no such dtype
        return numbers.view(torch.uint8).numpy()
    if tensor.kind == "Q8_0":
        stored: np.ndarray = gguf.quants.quantize(numbers.numpy(), gguf.GGMLQuantizationType.Q8_0)
        return stored
    return numbers.numpy()
