"""Load checkpoints at any parallel layout, and generate initial weights.

A checkpoint folder holds the `model` and `optimizer` tensors (see `sharded_tensors.py`), `state.json` (step,
data cursors, counters), the settings of the run and the tokenizer. `save.py` publishes it under its name when
all files of all processes are on disk. Each process reads the blocks that its layout needs.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_sov.base.errors import Fix, UserError
from megatron_sov.checkpoint.save import CheckpointMetadata, CheckpointSaver
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.local_shards import LocalShard, list_local_shards
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel.values import gather_objects
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.families.adapters import PREFIX, adapter_identity
from megatron_sov.model.families.encoders import PREFIXES as ENCODERS, is_encoder
from megatron_sov.runs import checkpoints
from megatron_sov.runs.checkpoints import ADAPTER, MODEL

# Initial weights are a function of seed, tensor key and index in the global tensor, and therefore equal at
# every layout. Each process generates the index range of its block with the counter-based generator Philox,
# keyed by seed and tensor key.

NORM, ONES, ZEROS, NORMAL, RESIDUAL = "ones, of a norm", "ones", "zeros", "normal", "normal into the residual"
ADAPTER_INPUT, STANDARD = "normal of an adapter's input", "standard normal"
FAN_IN = "normal of spread 1 / sqrt(inputs)"
SINUSOIDS, STEPS, DECAYS = "sines and cosines", "even time steps", "logarithms of 1, 2, ..."
EVEN_DECAYS = "logarithms of even numbers up to 16"
RULES = (
    ("*[!_]norm.weight", NORM), ("*.layer_norm_weight", NORM), ("*.router.expert_bias", ZEROS),
    ("*.linear_*.bias", ZEROS), ("*.linear_proj.weight", RESIDUAL), ("*.linear_fc2.weight", RESIDUAL),
    ("*.linear_qkv.weight", NORMAL), ("*.linear_fc1.weight", NORMAL), ("*.router.weight", NORMAL),
    ("*.linear_q_proj.weight", NORMAL), ("*.linear_q_down_proj.weight", NORMAL),
    ("*.linear_q_up_proj.weight", NORMAL), ("*.linear_kv_down_proj.weight", NORMAL),
    ("*.linear_kv_up_proj.weight", NORMAL),
    ("*.gates_down_proj.weight", NORMAL), ("*.decay_up_proj.weight", NORMAL),
    ("*.output_up_proj.weight", NORMAL),
    ("*.in_proj.weight", NORMAL), ("*.out_proj.weight", RESIDUAL), ("*.conv1d.weight", FAN_IN),
    ("*.out_norm.weight", ONES), ("*.self_attention.dt_bias", STEPS), ("*.self_attention.A_log", EVEN_DECAYS),
    ("*.eh_proj.weight", NORMAL), ("*.word_embeddings.weight", NORMAL), ("output_layer.weight", NORMAL),
    ("*_proj*.lora_A", ADAPTER_INPUT), ("*.lm_head.lora_A", ADAPTER_INPUT),
    ("*.embed_tokens.lora_A", STANDARD), ("*.lora_B", ZEROS), ("*.magnitude", ONES))
"""Key pattern -> distribution; each key must match a single pattern. Matrices that write into the residual
stream are scaled by 1 / sqrt(2 * num_layers) (GPT-2, Radford et al. 2019). `lora_A` has the standard
deviation of PEFT's default, uniform between +-1 / sqrt(columns); PEFT uses a standard normal for embeddings.
In linear attention, time steps and decays cover the ranges of Gated DeltaNet's random initial values."""
ENCODER_RULES = (
    ("*.embed_positions.weight", SINUSOIDS), ("*.dt_bias", STEPS), ("*.A_log", DECAYS), ("*.D", ONES),
    ("*.query_token", STANDARD), ("*.bias", ZEROS), ("*norm*.weight", ONES), ("*.ln_q.weight", ONES),
    ("*.adapter.*", NORMAL), ("*", FAN_IN))
"""Key pattern -> distribution for image and audio encoders; the first match counts. Sources: positions from
Whisper, time steps from Mamba-2 (arXiv 2405.21060), decays from S4D."""
TIME_STEPS = (0.001, 0.1)
_CHUNK = 1 << 18
_PER_COUNTER = 8
"""Normals per Philox counter step: four 64-bit words with two 32-bit halves."""


def find_init_rule(key: str) -> str:
    """Return the initial distribution for tensor `key`. Raises `ValueError`: not exactly one pattern of
    `RULES` matches `key`."""
    if is_encoder(key):
        return next(rule for pattern, rule in ENCODER_RULES if fnmatch.fnmatchcase(key, pattern))
    matches = [rule for pattern, rule in RULES if fnmatch.fnmatchcase(key, pattern)]
    if len(matches) != 1:
        raise ValueError(f"{key}: {len(matches)} rules of checkpoint/load.py match this name, "
                         "needs exactly one")
    return matches[0]


def generate_normals(seed: int, key: str, start: int, count: int) -> np.ndarray:
    """Generate the standard normals `start` to `start + count` of the stream (seed, key); float32 [count].

    Box-Muller transform of 32-bit uniforms: a counter step yields a fixed number of values, so a range can be
    generated without the values before it.
    """
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64))
    first = start // _PER_COUNTER
    # Philox is counter-based: a skip to `start` costs no time
    generator.advance(first)
    steps = -(-(start + count) // _PER_COUNTER) - first
    words = generator.random_raw(steps * 4).view(np.uint32)
    # Uniforms in the open interval (0, 1): log(0) would be infinite.
    u = (words.astype(np.float64) + 0.5) / 2.0**32
    radius, angle = np.sqrt(-2.0 * np.log(u[0::2])), 2.0 * np.pi * u[1::2]
    values = np.empty(len(u), dtype=np.float32)
    values[0::2], values[1::2] = radius * np.cos(angle), radius * np.sin(angle)
    skip = start - first * _PER_COUNTER
    return values[skip:skip + count]


@dataclass(frozen=True)
class _InitPart:
    """Rows in a local shard to fill with normals."""

    key: str
    """Global tensor's key."""
    start: int
    """Flat index of the first value in the global tensor."""
    columns: int
    """Columns in the global tensor."""
    local_columns: slice
    """Columns in the shard."""
    target: torch.Tensor
    """View into the shard [rows, local columns]."""
    std: float

    def draw_values(self, seed: int) -> torch.Tensor:
        """Return the initial values for `target`, float32."""
        count = len(self.target)
        rows = generate_normals(seed, self.key, self.start, count * self.columns).reshape(count, self.columns)
        return torch.from_numpy(rows[:, self.local_columns] * np.float32(self.std))


def _split_rows(block: LocalShard, std: float) -> Iterator[_InitPart]:
    """Split a shard into parts with about `_CHUNK` values, which fit a core's cache."""
    leading = block.offset[: len(block.global_shape) - 2]
    rows, columns = (1, *block.global_shape)[-2:]
    matrix = int(np.ravel_multi_index(leading, block.global_shape[:-2])) if leading else 0
    row0, column0 = (0, *block.offset)[-2:]
    target = block.data.reshape(-1, block.data.shape[-1]) if block.data.is_contiguous() else block.data
    step = max(1, _CHUNK // columns)
    for row in range(0, target.shape[0], step):
        # The stream index of a row's first value is independent of the layout. If the shard has only some
        # columns, whole rows are generated and cut.
        yield _InitPart(block.key, (matrix * rows + row0 + row) * columns, columns,
                        slice(column0, column0 + target.shape[1]), target[row:row + step], std)


def compute_fixed_values(rule: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return deterministic initial values, float64.

    Args:
        rule: `SINUSOIDS` for shape [positions, width]; `STEPS`, `DECAYS` or `EVEN_DECAYS` for shape [heads].
        shape: global shape.
    """
    index = torch.arange(shape[0], dtype=torch.float64)
    if rule == DECAYS:
        return (index + 1).log()
    if rule == EVEN_DECAYS:
        return (16 * (index + 0.5) / shape[0]).log()
    if rule == STEPS:
        low, high = map(math.log, TIME_STEPS)
        step = (low + (index + 0.5) / shape[0] * (high - low)).exp()
        return step + torch.log(-torch.expm1(-step))  # inverse of softplus
    half = shape[1] // 2
    turns = torch.exp(-math.log(10_000) / max(half - 1, 1) * torch.arange(half, dtype=torch.float64))
    angle = index[:, None] * turns
    return torch.cat([angle.sin(), angle.cos()], 1)


def _generate_values(parts: Iterator[_InitPart], seed: int,
                     num_threads: int) -> Iterator[tuple[_InitPart, torch.Tensor]]:
    """Yield (part, values), computed ahead by threads (numpy releases the GIL)."""
    with ThreadPoolExecutor(num_threads) as pool:
        queue: deque[tuple[_InitPart, Future[torch.Tensor]]] = deque()
        for part in parts:
            queue.append((part, pool.submit(part.draw_values, seed)))
            # bound the queue: queued values must not take as much memory as the model
            if len(queue) > 2 * num_threads:
                part, values = queue.popleft()
                yield part, values.result()
        for part, values in queue:
            yield part, values.result()


@torch.no_grad()
def initialize_weights(model: LanguageModel, config: ModelConfig, seed: int, *,
                       only: str | tuple[str, ...] = "") -> None:
    """Set this process's initial weights and buffers, with `torch.get_num_threads()` threads.

    Args:
        model: model to fill.
        config: architecture, with `init_std`.
        seed: seed of the weights; independent of the layout.
        only: key prefixes to set; "" sets all tensors.
    """
    stds = {STANDARD: 1.0, NORMAL: config.init_std,
            RESIDUAL: config.init_std / math.sqrt(2 * config.num_layers)}
    random_blocks = []
    for block in list_local_shards(model):
        if not block.key.startswith(only):
            continue
        rule = find_init_rule(block.key)
        if rule == ADAPTER_INPUT:
            random_blocks.append((block, 1 / math.sqrt(3 * block.global_shape[-1])))
        elif rule == FAN_IN:
            random_blocks.append((block, 1 / math.sqrt(math.prod(block.global_shape[1:]))))
        elif rule in (SINUSOIDS, STEPS, DECAYS, EVEN_DECAYS):
            local = tuple(slice(start, start + n) for start, n in zip(block.offset, block.shape, strict=True))
            block.data.copy_(compute_fixed_values(rule, block.global_shape)[local])
        elif rule in stds:
            random_blocks.append((block, stds[rule]))
        else:
            is_one = rule == ONES or (rule == NORM and not config.zero_centered_norms)
            block.data.fill_(1.0 if is_one else 0.0)
    parts = (part for block, std in random_blocks for part in _split_rows(block, std))
    for part, values in _generate_values(parts, seed, torch.get_num_threads()):
        part.target.copy_(values)


def save_checkpoint(path: Path, model: LanguageModel, optimizer: Optimizer | None, state: dict[str, Any],
                    settings: dict[str, Any], tokenizer: Path | None) -> None:
    """Save a checkpoint and wait for its completion (collective). Runs use a `CheckpointSaver` instead.

    Args:
        path: folder of the checkpoint; must not exist.
        state: state of the loop, equal on every process; must include `step` and `tokens`.
        settings: config of the run.
        tokenizer: tokenizer folder to copy.

    Raises:
        UserError: on every process, if a process could not write; `path` is then not created.
    """
    saver = CheckpointSaver()
    saver.begin(path, model, optimizer, CheckpointMetadata(state, settings, tokenizer), wait=True)
    saver.finish()


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise the `with` block's exception on every process if a process raises (collective)."""
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    errors = [p for p in gather_objects(error) if p is not None]
    if errors:
        raise errors[0]


def find_damage(path: Path, *, weights_only: bool = False) -> str | None:
    """Check the files of a checkpoint, a share per process; return the first problem or None (collective)."""
    problem: str | None = None
    with raise_on_all_ranks():
        problem = checkpoints.find_damage(path, rank=dist.get_rank(), size=dist.get_world_size(),
                                          weights_only=weights_only)
    return next((p for p in gather_objects(problem) if p is not None), None)


def check_weights(path: Path) -> None:
    """Check weight files against the checkpoint's manifest, a share per process (collective). Raises
    `UserError`: on every process, naming the first damaged file and the newest sound checkpoint."""
    problem = find_damage(path, weights_only=True)
    if problem is not None:
        raise UserError(f"{problem}; {checkpoints.suggest_replacement(path)}")


@torch.no_grad()
def load_model(path: Path, model: LanguageModel, *, new_encoders: bool = False) -> None:
    """Load this process's weights from a checkpoint with any layout (collective).

    For an adapter checkpoint, the base checkpoint is verified and loaded too. If `model` has adapters and the
    checkpoint holds all weights, the adapters of `model` keep their values.

    Args:
        path: checkpoint folder.
        model: model to fill.
        new_encoders: image and audio encoders of `model` that the checkpoint lacks keep their values.

    Raises:
        UserError: on every process: keys or shapes differ from the model, a file is damaged, the base of an
            adapter is missing, or the model has no adapter for an adapter checkpoint.
    """
    base = checkpoints.read_adapter_base(path)
    if base is None:
        _load_part(path, MODEL, model, new_encoders)
    elif not model.lora.on:
        raise UserError(f"{path}: is an adapter, and lora.rank is 0; use its lora settings, or merge it with "
                        "`megatron-sov convert to-hf`")
    else:
        with raise_on_all_ranks():
            _check_adapter_settings(path, model)
            frozen = checkpoints.find_adapter_base(path, base)
        check_weights(frozen)
        _load_part(frozen, MODEL, model, new_encoders)
        _load_part(path, ADAPTER, model)
    model.requantize_weights()
    if model.lora.on:
        model.adapter_base = base or checkpoints.AdapterBase.from_checkpoint(path)
    if model.lora.dora and base is None:
        for chunk in model.chunks:
            chunk.adapters.set_magnitudes(chunk)


def _check_adapter_settings(path: Path, model: LanguageModel) -> None:
    """Raise `UserError` if the adapter was trained with different LoRA settings, for example alpha."""
    ours = adapter_identity(model.lora, model.architecture)
    trained = checkpoints.read_checkpoint_settings(path).lora
    for name, theirs in adapter_identity(trained, model.architecture).items():
        if theirs != ours[name]:
            raise UserError(f"{path}: is an adapter with lora.{name} = {theirs}, not {ours[name]}; "
                            "use the setting that it was made with",
                            Fix(options=("--set", f"lora.{name}={json.dumps(theirs)}")))


def _load_part(path: Path, part: str, model: LanguageModel, new_encoders: bool = False) -> None:
    reader = TensorReader(path, part)
    blocks = [b for b in list_local_shards(model) if b.key.startswith(PREFIX) == (part == ADAPTER)]
    if new_encoders:
        stored_keys = set(reader.keys())
        # an encoder without tensors in the checkpoint is new and keeps the initial weights
        new = [prefix for prefix in ENCODERS if not any(key.startswith(prefix) for key in stored_keys)]
        blocks = [b for b in blocks if not b.key.startswith(tuple(new))]
    local_keys = {b.key for b in blocks}
    model_keys: set[str] = set().union(*gather_objects(local_keys))
    _check_keys(path, model_keys, set(reader.keys()))
    with raise_on_all_ranks():
        _copy_blocks(path, reader, blocks)


@torch.no_grad()
def load_optimizer(path: Path, optimizer: Optimizer, num_updates: int) -> None:
    """Load this process's optimizer state from a checkpoint with any layout (collective). Raises `UserError`:
    on every process: the checkpoint has no optimizer state, or a file is damaged."""
    reader = TensorReader(path, "optimizer")
    with raise_on_all_ranks():
        _copy_blocks(path, reader, list(optimizer.state_shards()))
    optimizer.model.requantize_weights()
    optimizer.restore_updates(num_updates)


def _copy_blocks(path: Path, reader: TensorReader, blocks: list[LocalShard]) -> None:
    stored_keys = set(reader.keys())
    for block in blocks:
        if block.key not in stored_keys:
            raise UserError(f"{path}: has no tensor {block.key}; was it written with another optimizer, "
                            "precision or model?")
        if reader.get_shape(block.key) != block.global_shape:
            raise UserError(f"{path}: {block.key} has shape {reader.get_shape(block.key)}, the model needs "
                            f"{block.global_shape}; use the recipe and settings that the "
                            "checkpoint was made with")
        block.data.copy_(reader.read(block.key, block.offset, block.shape).reshape(block.data.shape))


def _check_keys(path: Path, model_keys: set[str], stored_keys: set[str]) -> None:
    missing, extra = sorted(model_keys - stored_keys), sorted(stored_keys - model_keys)
    if missing or extra:
        problems = [f"lacks {len(missing)} tensors, e.g. {missing[0]}"] if missing else []
        problems += [f"has {len(extra)} tensors that the model lacks, e.g. {extra[0]}"] if extra else []
        raise UserError(f"{path}: {' and '.join(problems)}; use the recipe and settings that the "
                        "checkpoint was made with")


def read_state(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / checkpoints.STATE_FILE).read_text(encoding="utf-8")))
