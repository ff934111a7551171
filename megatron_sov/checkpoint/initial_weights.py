"""Initial weights: a function of seed, tensor key and index in the global tensor, equal at every layout.

Each process generates the index range of its block with the counter-based generator Philox, keyed by seed and
tensor key.
"""

import fnmatch
import hashlib
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.local_shards import LocalShard, list_local_shards
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.families.encoders import is_encoder

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
"""Least and greatest initial time step; steps between are even in their logarithms (Mamba-2)."""
_PART_VALUES = 1 << 18
"""Values of a part that a thread fills at a time; they fit a core's cache."""
_PER_COUNTER = 8
"""Normals per Philox counter step: four 64-bit words with two 32-bit halves."""


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
    random_shards = []
    for shard in list_local_shards(model):
        if not shard.key.startswith(only):
            continue
        rule = find_init_rule(shard.key)
        if rule == ADAPTER_INPUT:
            random_shards.append((shard, 1 / math.sqrt(3 * shard.global_shape[-1])))
        elif rule == FAN_IN:
            random_shards.append((shard, 1 / math.sqrt(math.prod(shard.global_shape[1:]))))
        elif rule in (SINUSOIDS, STEPS, DECAYS, EVEN_DECAYS):
            index = tuple(slice(start, start + n) for start, n in zip(shard.offset, shard.shape, strict=True))
            shard.data.copy_(compute_fixed_values(rule, shard.global_shape)[index])
        elif rule in stds:
            random_shards.append((shard, stds[rule]))
        else:
            is_one = rule == ONES or (rule == NORM and not config.zero_centered_norms)
            shard.data.fill_(1.0 if is_one else 0.0)
    parts = (part for shard, std in random_shards for part in _split_rows(shard, std))
    for part, values in _generate_values(parts, seed, torch.get_num_threads()):
        part.target.copy_(values)


def find_init_rule(key: str) -> str:
    """Return tensor `key`'s distribution. Raises `ValueError`: not exactly one of `RULES` matches."""
    if is_encoder(key):
        return next(rule for pattern, rule in ENCODER_RULES if fnmatch.fnmatchcase(key, pattern))
    matches = [rule for pattern, rule in RULES if fnmatch.fnmatchcase(key, pattern)]
    if len(matches) != 1:
        raise ValueError(f"{key}: {len(matches)} rules of checkpoint/initial_weights.py match this name, "
                         "needs exactly one")
    return matches[0]


def generate_normals(seed: int, key: str, start: int, count: int) -> np.ndarray:
    """Generate the standard normals `start` to `start + count` of the stream (seed, key); float32 [count].

    Box-Muller transform of 32-bit uniforms: a counter step yields a fixed number of values, so a range can be
    generated without the values before it.
    """
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64))
    first_step = start // _PER_COUNTER
    # Philox is counter-based: a skip to `start` costs no time
    generator.advance(first_step)
    num_steps = -(-(start + count) // _PER_COUNTER) - first_step
    words = generator.random_raw(num_steps * 4).view(np.uint32)
    # Uniforms in the open interval (0, 1): log(0) would be infinite.
    uniforms = (words.astype(np.float64) + 0.5) / 2.0**32
    radius, angle = np.sqrt(-2.0 * np.log(uniforms[0::2])), 2.0 * np.pi * uniforms[1::2]
    values = np.empty(len(uniforms), dtype=np.float32)
    values[0::2], values[1::2] = radius * np.cos(angle), radius * np.sin(angle)
    skip = start - first_step * _PER_COUNTER
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


def _split_rows(shard: LocalShard, std: float) -> Iterator[_InitPart]:
    """Split a shard into parts with about `_PART_VALUES` values."""
    leading_offset = shard.offset[: len(shard.global_shape) - 2]
    num_rows, num_columns = (1, *shard.global_shape)[-2:]
    # Flat index of the shard's matrix in a stack of matrices, such as an expert's.
    matrix = int(np.ravel_multi_index(leading_offset, shard.global_shape[:-2])) if leading_offset else 0
    first_row, first_column = (0, *shard.offset)[-2:]
    target = shard.data.reshape(-1, shard.data.shape[-1]) if shard.data.is_contiguous() else shard.data
    part_rows = max(1, _PART_VALUES // num_columns)
    for row in range(0, target.shape[0], part_rows):
        # The stream index of a row's first value is independent of the layout. If the shard has only some
        # columns, whole rows are generated and cut.
        yield _InitPart(shard.key, (matrix * num_rows + first_row + row) * num_columns, num_columns,
                        slice(first_column, first_column + target.shape[1]), target[row:row + part_rows], std)


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
    frequencies = torch.exp(-math.log(10_000) / max(half - 1, 1) * torch.arange(half, dtype=torch.float64))
    angle = index[:, None] * frequencies
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
