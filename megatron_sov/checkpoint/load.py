"""Checkpoints that belong to no layout: every process writes the blocks it owns and reads
the blocks it needs.

A checkpoint is an artifact folder: `model` and `optimizer` tensors (see `sharded_tensors.py`), `state.json`
(step, data cursors, counters), the run's settings and the tokenizer.  It appears under its name only when
every file of every process is on disk (`save.py`).

Weights that no checkpoint holds yet are made here too: they are a function of the seed and their names.
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

from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.save import Companions, Saver
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.local_shards import LocalShard, local_shards
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel.values import gather_objects
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.families.adapters import PREFIX, identity
from megatron_sov.model.families.encoders import PREFIXES as ENCODERS, is_encoder
from megatron_sov.runs import checkpoints
from megatron_sov.runs.checkpoints import ADAPTER, MODEL

# Initial weights as a function of (seed, name of the global tensor, index in it): the same at every
# layout.
#
# Numbers come from the counter-based generator Philox, keyed by seed and name, so that each process
# makes just the range of the flattened global tensor that its block spans.

NORM, ONES, ZEROS, NORMAL, RESIDUAL = "ones, of a norm", "ones", "zeros", "normal", "normal into the residual"
ADAPTER_INPUT, STANDARD = "normal of an adapter's input", "standard normal"
FAN_IN = "normal of spread 1 / sqrt(inputs)"
SINUSOIDS, STEPS, DECAYS = "sines and cosines", "even time steps", "logarithms of 1, 2, ..."
EVEN_DECAYS = "logarithms of even numbers up to 16"
RULES = (
    ("*[!_]norm.weight", NORM), ("*.layer_norm_weight", NORM), ("*.router.expert_bias", ZEROS),
    ("*.linear_*.bias", ZEROS),
    ("*.linear_proj.weight", RESIDUAL), ("*.linear_fc2.weight", RESIDUAL),
    ("*.linear_qkv.weight", NORMAL), ("*.linear_fc1.weight", NORMAL), ("*.router.weight", NORMAL),
    ("*.linear_q_proj.weight", NORMAL), ("*.linear_q_down_proj.weight", NORMAL),
    ("*.linear_q_up_proj.weight", NORMAL), ("*.linear_kv_down_proj.weight", NORMAL),
    ("*.linear_kv_up_proj.weight", NORMAL),
    ("*.gates_down_proj.weight", NORMAL), ("*.decay_up_proj.weight", NORMAL),
    ("*.output_up_proj.weight", NORMAL),
    ("*.in_proj.weight", NORMAL), ("*.out_proj.weight", RESIDUAL), ("*.conv1d.weight", FAN_IN),
    ("*.out_norm.weight", ONES), ("*.self_attention.dt_bias", STEPS),
    ("*.self_attention.A_log", EVEN_DECAYS),
    ("*.eh_proj.weight", NORMAL), ("*.word_embeddings.weight", NORMAL), ("output_layer.weight", NORMAL),
    ("*_proj*.lora_A", ADAPTER_INPUT), ("*.lm_head.lora_A", ADAPTER_INPUT),
    ("*.embed_tokens.lora_A", STANDARD),
    ("*.lora_B", ZEROS), ("*.magnitude", ONES),
)
"""Tensor name pattern -> distribution; each tensor must match exactly one.  Matrices that write into the
residual stream are scaled by 1 / sqrt(2 * num_layers) (GPT-2, Radford et al. 2019).  An adapter's A has the
spread of PEFT's default, which is uniform between +-1 / sqrt(columns), and for an embedding normal.  Time
steps and decays of linear attention cover the ranges that Gated DeltaNet's authors draw them from."""
ENCODER_RULES = (
    ("*.embed_positions.weight", SINUSOIDS), ("*.dt_bias", STEPS), ("*.A_log", DECAYS), ("*.D", ONES),
    ("*.query_token", STANDARD), ("*.bias", ZEROS), ("*norm*.weight", ONES), ("*.ln_q.weight", ONES),
    ("*.adapter.*", NORMAL), ("*", FAN_IN),
)
"""The same for encoders of pictures and sounds; the first that matches counts.  Places are Whisper's, time
steps lie between Mamba-2's bounds as its random ones do (arXiv 2405.21060), and its decays are S4D's."""
TIME_STEPS = (0.001, 0.1)
_CHUNK = 1 << 18
_PER_COUNTER = 8
"""Normals made of one Philox counter step: four 64-bit words, two 32-bit halves each."""


def rule_for(key: str) -> str:
    """Return the distribution of a tensor.

    Raises:
        ValueError: no rule or several rules match its name.
    """
    if is_encoder(key):
        return next(rule for pattern, rule in ENCODER_RULES if fnmatch.fnmatchcase(key, pattern))
    matches = [rule for pattern, rule in RULES if fnmatch.fnmatchcase(key, pattern)]
    if len(matches) != 1:
        raise ValueError(f"{key}: {len(matches)} rules of checkpoint/load.py match this name, "
                         "needs exactly one")
    return matches[0]


def normals(seed: int, key: str, start: int, count: int) -> np.ndarray:
    """Return standard normals number `start` to `start + count` of the stream (seed, key), as float32.

    Box-Muller on 32-bit uniforms: each counter step gives a fixed number of values,
    so any range can be made alone.
    """
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64))
    first = start // _PER_COUNTER
    # a counter, not a state: the values before `start` are never made
    generator.advance(first)
    steps = -(-(start + count) // _PER_COUNTER) - first
    words = generator.random_raw(steps * 4).view(np.uint32)
    # never 0, whose logarithm is infinite, and never 1
    u = (words.astype(np.float64) + 0.5) / 2.0**32
    radius, angle = np.sqrt(-2.0 * np.log(u[0::2])), 2.0 * np.pi * u[1::2]
    values = np.empty(len(u), dtype=np.float32)
    values[0::2], values[1::2] = radius * np.cos(angle), radius * np.sin(angle)
    skip = start - first * _PER_COUNTER
    return values[skip:skip + count]


@dataclass(frozen=True)
class _InitPart:
    """Some rows of a block that are to be normal."""

    key: str
    """The global tensor."""
    start: int
    """Number of the first row's first value in it."""
    columns: int
    """Values of a whole row."""
    place: slice
    """Those of a row that belong to the block."""
    target: torch.Tensor
    """[rows, columns of the block]."""
    std: float

    def values(self, seed: int) -> torch.Tensor:
        """Return what the rows become, float32."""
        count = len(self.target)
        rows = normals(seed, self.key, self.start, count * self.columns).reshape(count, self.columns)
        return torch.from_numpy(rows[:, self.place] * np.float32(self.std))


def _parts(block: LocalShard, std: float) -> Iterator[_InitPart]:
    """Yield the rows of a block, some hundred thousand values at a time: what fits a core's cache."""
    leading = block.offset[: len(block.global_shape) - 2]
    rows, columns = (1, *block.global_shape)[-2:]
    matrix = int(np.ravel_multi_index(leading, block.global_shape[:-2])) if leading else 0
    row0, column0 = (0, *block.offset)[-2:]
    target = block.data.reshape(-1, block.data.shape[-1]) if block.data.is_contiguous() else block.data
    step = max(1, _CHUNK // columns)
    for row in range(0, target.shape[0], step):
        # a row's first value has the same number in the stream whatever block holds the row; of a cut row all
        # columns are made, and the block's taken
        yield _InitPart(block.key, (matrix * rows + row0 + row) * columns, columns,
                        slice(column0, column0 + target.shape[1]), target[row:row + step], std)


def make_fixed(rule: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor that no random number enters, float64.

    Args:
        rule: `SINUSOIDS` of [places, width], `STEPS`, `DECAYS` or `EVEN_DECAYS` of [heads].
        shape: of the tensor.
    """
    index = torch.arange(shape[0], dtype=torch.float64)
    if rule == DECAYS:
        return (index + 1).log()
    if rule == EVEN_DECAYS:
        return (16 * (index + 0.5) / shape[0]).log()
    if rule == STEPS:
        low, high = map(math.log, TIME_STEPS)
        step = (low + (index + 0.5) / shape[0] * (high - low)).exp()
        return step + torch.log(-torch.expm1(-step))  # what softplus makes the step of
    half = shape[1] // 2
    turns = torch.exp(-math.log(10_000) / max(half - 1, 1) * torch.arange(half, dtype=torch.float64))
    angle = index[:, None] * turns
    return torch.cat([angle.sin(), angle.cos()], 1)


def _made_ahead(parts: Iterator[_InitPart], seed: int,
                num_threads: int) -> Iterator[tuple[_InitPart, torch.Tensor]]:
    """Yield parts and their values, which threads compute (numpy lets go of the interpreter)."""
    with ThreadPoolExecutor(num_threads) as pool:
        ahead: deque[tuple[_InitPart, Future[torch.Tensor]]] = deque()
        for part in parts:
            ahead.append((part, pool.submit(part.values, seed)))
            # few enough in flight: memory holds some parts, and not the model a second time
            if len(ahead) > 2 * num_threads:
                done, values = ahead.popleft()
                yield done, values.result()
        for done, values in ahead:
            yield done, values.result()


@torch.no_grad()
def initialise(model: LanguageModel, config: ModelConfig, seed: int, *,
               only: str | tuple[str, ...] = "") -> None:
    """Set the weights and buffers of this process's part of the model, with as many threads as torch has.

    Args:
        model: the model.
        config: its architecture.
        seed: what every number is a function of.
        only: what the names of those begin with that are set; "": all.
    """
    stds = {STANDARD: 1.0, NORMAL: config.init_std,
            RESIDUAL: config.init_std / math.sqrt(2 * config.num_layers)}
    normal = []
    for block in local_shards(model):
        if not block.key.startswith(only):
            continue
        rule = rule_for(block.key)
        if rule == ADAPTER_INPUT:
            normal.append((block, 1 / math.sqrt(3 * block.global_shape[-1])))
        elif rule == FAN_IN:
            normal.append((block, 1 / math.sqrt(math.prod(block.global_shape[1:]))))
        elif rule in (SINUSOIDS, STEPS, DECAYS, EVEN_DECAYS):
            own = tuple(slice(start, start + n) for start, n in zip(block.offset, block.shape, strict=True))
            block.data.copy_(make_fixed(rule, block.global_shape)[own])
        elif rule in stds:
            normal.append((block, stds[rule]))
        else:
            is_one = rule == ONES or (rule == NORM and not config.zero_centered_norms)
            block.data.fill_(1.0 if is_one else 0.0)
    parts = (part for block, std in normal for part in _parts(block, std))
    for part, values in _made_ahead(parts, seed, torch.get_num_threads()):
        part.target.copy_(values)


def save(path: Path, model: LanguageModel, optimizer: Optimizer | None, state: dict[str, Any],
         settings: dict[str, Any], tokenizer: Path | None) -> None:
    """Write one checkpoint and wait for it; called by every process together.  A run uses a `Saver`.

    Args:
        path: the checkpoint's folder; nothing may be there.
        state: plain values of the loop (the same on every process): must hold `step` and `tokens`.
        settings: the run's config.
        tokenizer: folder whose files are carried along.

    Raises:
        UserError: any process could not write; nothing is left under `path`, and every process raises.
    """
    saver = Saver()
    saver.begin(path, model, optimizer, Companions(state, settings, tokenizer), waits=True)
    saver.finish()


@contextlib.contextmanager
def agreement() -> Iterator[None]:
    """Run the block on every process; where it raises on any of them, every process raises,
    so that none waits for it."""
    problem: Exception | None = None
    try:
        yield
    except Exception as e:
        problem = e
    found = [p for p in gather_objects(problem) if p is not None]
    if found:
        raise found[0]


def damage(path: Path, *, weights_only: bool = False) -> str | None:
    """Return, on every process, what is wrong with a checkpoint's files, or None;
    each process looks at a share of them."""
    problem: str | None = None
    with agreement():
        problem = checkpoints.damage(path, rank=dist.get_rank(), size=dist.get_world_size(),
                                     weights_only=weights_only)
    return next((p for p in gather_objects(problem) if p is not None), None)


def check(path: Path) -> None:
    """Check the weights of a checkpoint against its manifest, each process a share of the files.

    Raises:
        UserError: on every process, naming the first damaged file and what to use in its place.
    """
    problem = damage(path, weights_only=True)
    if problem is not None:
        raise UserError(f"{problem}; {checkpoints.instead_of(path)}")


@torch.no_grad()
def load_model(path: Path, model: LanguageModel, *, new_encoders: bool = False) -> None:
    """Read this process's part of the weights, from whatever layout wrote them.

    Of an adapter's checkpoint its base is read too, which is checked before.  A model with adapters that
    reads a checkpoint of all weights keeps the adapters that it has, beside these weights.

    Args:
        path: the checkpoint.
        model: is given the weights.
        new_encoders: a model may have an encoder of pictures or sounds that the checkpoint has not; it keeps
            the weights that it has.

    Raises:
        UserError: on every process; the checkpoint holds other tensors or shapes than the
            model, or is damaged; it is an adapter, and its base is not there or the model has none.
    """
    base = checkpoints.adapter_base(path)
    if base is None:
        _load_part(path, MODEL, model, new_encoders)
    elif not model.lora.on:
        raise UserError(f"{path}: is an adapter, and lora.rank is 0; train with its lora settings, or from "
                        "what `megatron-sov convert to-hf` makes of it")
    else:
        with agreement():
            _refuse_other_adapters(path, model)
            frozen = checkpoints.found_base(path, base)
        check(frozen)
        _load_part(frozen, MODEL, model, new_encoders)
        _load_part(path, ADAPTER, model)
    model.finish_writing()
    if model.lora.on:
        model.adapter_base = base or checkpoints.AdapterBase.of(path)
    if model.lora.dora and base is None:
        for chunk in model.chunks:
            chunk.adapters.set_magnitudes(chunk)


def _refuse_other_adapters(path: Path, model: LanguageModel) -> None:
    """Raise `UserError` where an adapter was trained with other settings: with another alpha, say, it would
    be another adapter."""
    ours = identity(model.lora, model.architecture)
    for name, theirs in identity(checkpoints.settings_of(path).lora, model.architecture).items():
        if theirs != ours[name]:
            raise UserError(f"{path}: is an adapter with lora.{name} = {theirs}, not {ours[name]}; "
                            "use the setting that it was made with")


def _load_part(path: Path, part: str, model: LanguageModel, new_encoders: bool = False) -> None:
    reader = TensorReader(path, part)
    blocks = [b for b in local_shards(model) if b.key.startswith(PREFIX) == (part == ADAPTER)]
    if new_encoders:
        known = set(reader.keys())
        # an encoder that the checkpoint has nothing of is new, and keeps its initial weights
        new = [prefix for prefix in ENCODERS if not any(key.startswith(prefix) for key in known)]
        blocks = [b for b in blocks if not b.key.startswith(tuple(new))]
    mine = {b.key for b in blocks}
    names: set[str] = set().union(*gather_objects(mine))
    _refuse_difference(path, names, set(reader.keys()))
    with agreement():
        _fill(path, reader, blocks)


@torch.no_grad()
def load_optimizer(path: Path, optimizer: Optimizer, num_updates: int) -> None:
    """Read this process's part of the optimizer's state, from whatever layout wrote it.

    Raises:
        UserError: on every process; the checkpoint holds no such state, or is damaged.
    """
    reader = TensorReader(path, "optimizer")
    with agreement():
        _fill(path, reader, list(optimizer.state_shards()))
    optimizer.model.finish_writing()
    optimizer.restore_updates(num_updates)


def _fill(path: Path, reader: TensorReader, blocks: list[LocalShard]) -> None:
    known = set(reader.keys())
    for block in blocks:
        if block.key not in known:
            raise UserError(f"{path}: has no tensor {block.key}; was it written with another optimizer, "
                            "precision or model?")
        if reader.shape(block.key) != block.global_shape:
            raise UserError(f"{path}: {block.key} has shape {reader.shape(block.key)}, the model needs "
                            f"{block.global_shape}; use the recipe and settings that the "
                            "checkpoint was made with")
        block.data.copy_(reader.read(block.key, block.offset, block.shape).reshape(block.data.shape))


def _refuse_difference(path: Path, wanted: set[str], found: set[str]) -> None:
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing or extra:
        what = [f"lacks {len(missing)} tensors, e.g. {missing[0]}"] if missing else []
        what += [f"has {len(extra)} tensors that the model lacks, e.g. {extra[0]}"] if extra else []
        raise UserError(f"{path}: {' and '.join(what)}; use the recipe and settings that the "
                        "checkpoint was made with")


def read_state(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / checkpoints.STATE).read_text(encoding="utf-8")))
