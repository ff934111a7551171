"""A checkpoint as a running policy: on the processes of a joined world, or on processes started for
one piece of work."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint import load
from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model.language_model import build_configured
from megatron_sov.engine.parallel import launcher, world
from megatron_sov.infer.engines.target import Target, as_checkpoint, inference_config, report_precision
from megatron_sov.model.config import RunConfig
from megatron_sov.runs.launch_environment import is_first_rank


@dataclass(frozen=True)
class Loaded:
    """A model that runs on all processes together."""

    policy: ForwardModel
    """Forward only."""
    config: RunConfig
    """Architecture, layout, precision."""
    world: world.ParallelWorld
    """This process's place."""


def load_forward_model(path: Path, config: RunConfig) -> ForwardModel:
    """Build this process's part of a checkpoint's model; called by every process of a joined world.

    Raises:
        UserError: the checkpoint is damaged or belongs to another architecture than `config.model`.
    """
    load.check(path)
    # those of a run that has trained in this process: the library refuses another attention than it had;
    # what is only for backward passes is left out
    gpu = replace(config.gpu, recompute_modules=(), offload_modules=())
    # in bf16: what is exported, and there are no masters of weights in 8 bits here
    train = replace(config.train, fp8_weights=False)
    model = build_configured(replace(config, train=train), gpu)
    load.load_model(path, model)
    return ForwardModel(model, config.train.head_chunk_tokens)


def run_forward_model(target: Target, settings: Sequence[str], nproc: int | None,
                      work: Callable[[Loaded], Any], option: str = "--set") -> Any:
    """Start processes, load the target on them, and return what `work` gave on the first one.

    Args:
        target: the model; a Hugging Face folder is converted for the while.
        settings: `key=value` changes, e.g. ``parallel.ep=2`` or ``train.precision=bf16``.
        nproc: local processes; under torchrun or Slurm the environment decides.
        work: called on every process; its result must be plain JSON values.
        option: that the settings are given by, for sentences.

    Returns:
        The result; None on other processes than the first of a torchrun or Slurm job.

    Raises:
        SystemExit: a process failed, after it has said why.
    """
    with as_checkpoint(target) as path, tempfile.TemporaryDirectory(prefix="sov-result-") as folder:
        result = Path(folder) / "result.json"
        config = inference_config(path, settings, nproc, option)
        report_precision(target.path, "megatron", config.train.precision)

        def rank() -> int:
            place = world.join(config.parallel)
            try:
                value = work(Loaded(load_forward_model(path, config), config, place))
                # Ranks are processes of their own, so the result comes back as a file.
                if place.is_main:
                    result.write_text(json.dumps(value), encoding="utf-8")
                # Nobody leaves the group while the first one still works or writes.
                dist.barrier()
            finally:
                world.leave()
            return 0

        code = launcher.launch(rank, nproc, config.train.num_threads)
        if code != 0:
            raise SystemExit(code)
        if not is_first_rank():
            return None
        return json.loads(result.read_text(encoding="utf-8"))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer that travels with a model.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: has no tokenizer.json; put the tokenizer that the model was "
                        "trained with there")
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True)
    except Exception as e:  # the binding raises a bare Exception
        raise UserError(f"{folder}: its tokenizer cannot be read ({e}); restore it from a copy") from None
    return tokenizer
