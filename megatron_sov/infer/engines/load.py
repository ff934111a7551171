"""Load a checkpoint for inference, in a joined world or in new processes."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint import load
from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model.language_model import build_run_model
from megatron_sov.engine.parallel import launcher, world
from megatron_sov.engine.parallel.device import on_gpu
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.infer.engines.target import (
    Target, build_inference_config, open_as_checkpoint, report_precision)
from megatron_sov.infer.request import Batching
from megatron_sov.model.config import RunConfig
from megatron_sov.runs.launch_environment import is_first_rank


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model, split over the processes."""

    policy: ForwardModel
    """Model for forward passes."""
    config: RunConfig
    """Architecture, layout and precision."""
    world: world.ParallelWorld
    """Rank and group sizes for this process."""


def load_forward_model(path: Path, config: RunConfig) -> ForwardModel:
    """Load this process's part of a checkpoint's model (collective). Raises `UserError`: the checkpoint is
    damaged, or `config.model` has another architecture."""
    load.check_weights(path)
    # Keep the GPU settings of the training: Megatron refuses a second attention backend in one process.
    # Settings for backward passes are dropped.
    gpu = replace(config.gpu, recompute_modules=(), offload_modules=())
    # load exported bf16 weights without 8-bit weights and float32 masters
    train = replace(config.train, fp8_weights=False)
    model = build_run_model(replace(config, train=train), gpu)
    load.load_model(path, model)
    if not on_gpu():
        store_by_columns(model)
    return ForwardModel(model, config.train.head_chunk_tokens)


def store_by_columns(model: torch.nn.Module) -> None:
    """Store the matrices by columns, by which MKL multiplies up to 15 rows in 0.4 to 0.95 of the time."""
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data = weight.data.t().contiguous().t()


def run_forward_model(target: Target, settings: Sequence[str], nproc: int | None,
                      work: Callable[[LoadedModel], Any], option: str = "--set") -> Any:
    """Load a model in new processes, run `work` there, and return the result of the first process.

    Args:
        target: model; a Hugging Face folder is converted temporarily.
        settings: `key=value` changes, e.g. ``parallel.ep=2`` or ``train.precision=bf16``.
        nproc: local processes; torchrun or Slurm set it by the environment.
        work: called on every process; returns JSON values.
        option: option that gives the settings, for messages.

    Returns:
        The result; None on processes other than the first of a torchrun or Slurm job.

    Raises:
        SystemExit: a process failed and has reported its error.
    """
    with open_as_checkpoint(target) as path, tempfile.TemporaryDirectory(prefix="sov-result-") as folder:
        result = Path(folder) / "result.json"
        config = build_inference_config(path, settings, nproc, option)
        report_precision(target.path, "megatron", config.train.precision)

        def run_rank() -> None:
            place = world.join_world(config.parallel)
            try:
                value = work(LoadedModel(load_forward_model(path, config), config, place))
                # ranks are separate processes: pass the result through a file
                if place.is_main:
                    result.write_text(json.dumps(value), encoding="utf-8")
                # ranks stay in the group until rank 0 has written the result
                dist.barrier()
            finally:
                world.leave_world()

        code = launcher.launch_ranks(run_rank, nproc, config.train.num_threads)
        if code != 0:
            raise SystemExit(code)
        if not is_first_rank():
            return None
        return json.loads(result.read_text(encoding="utf-8"))


def run_megatron_engine(target: Target, settings: Sequence[str], nproc: int | None,
                        work: Callable[[MegatronEngine], Any], batching: Batching | None, option: str) -> Any:
    """Run `work` with an engine of the loaded model; arguments as in `run_forward_model`."""
    return run_forward_model(target, settings, nproc,
                             lambda loaded: work(MegatronEngine(loaded.policy, batching)), option)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a model's tokenizer. Raises `UserError`: tokenizer.json is missing or damaged."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: has no tokenizer.json; copy the tokenizer of the model to this folder")
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True)
    except Exception as e:  # the binding raises a bare Exception
        raise UserError(f"{folder}: its tokenizer cannot be read ({e}); restore it from a copy") from None
    return tokenizer
