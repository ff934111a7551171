"""Export a checkpoint, with its optimizer, as a `torch_dist` checkpoint of Megatron-Core.

Optimizer state has the library's `fully_reshardable` form, which loads at any layout.
"""

import json
import shutil
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_sov.base.artifacts import write_atomically
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.hints.kinds import TRACKER
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.convert import DEFAULT_WORKERS
from megatron_sov.convert.dcp.writer import (
    ADAMW_DEFAULTS, DcpPlanner, DcpTensor, TrainedModel, open_trained_model, write_export, write_hf_files)
from megatron_sov.convert.megatron.from_megatron import (
    BACKEND, DECAY_STYLES, EXPERTS, FORMAT, RUN_CONFIG, STATES, VERSIONS)
from megatron_sov.convert.megatron.inert_pickle import COMMON_STATE
from megatron_sov.engine.model.specs import PRECISION
from megatron_sov.model.config import RunConfig
from megatron_sov.model.counterparts.architecture import describe_model, describe_provider
from megatron_sov.runs.checkpoints import MODEL, OPTIMIZER
from megatron_sov.schedules import Schedule, bound_lengths

KIND = "megatron_checkpoint"
EMPTY_STATE = "empty/shard_0_1"
CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": False,
           "non_homogeneous_layers": True, "chained_optim_avoid_prefix": True}
"""Form of the tensors, which Megatron-LM reads before it declares its own."""
BRIDGE, TRAIN_STATE = "bridge", "train_state.pt"
WSD_STYLES = {"linear": "linear", "cosine": "cosine", "one_minus_sqrt": "minus_sqrt"}


def to_megatron(checkpoint: str | Path, out: str | Path, *, weights_only: bool = False,
                one_optimizer: bool = False, framework: str = "megatron-lm",
                workers: int = DEFAULT_WORKERS, overwrite: bool = False) -> tuple[TrainedModel, str]:
    """Write a checkpoint for Megatron-LM's `--load` (artifact kind `megatron_checkpoint`), which appears when
    complete; return its source, and why its learning rate is written as constant ("": it is not).

    `framework`: `bridge` adds the files that Megatron-Bridge reads. `one_optimizer`: write one optimizer
    for experts and other weights, as Megatron-Core builds without expert parallelism if tensor parallelism
    splits both alike. `workers`: files written at a time, each with one block in memory. Raises
    `UserError`: Megatron-Core cannot build the model or its optimizer, the checkpoint is damaged, or the disk
    is full.
    """
    source = open_trained_model(checkpoint, weights_only=weights_only)
    common, problem = build_common_state(source.settings, source.step, source.num_updates,
                                         one_optimizer=one_optimizer)
    if source.settings.model.router_bias_update == "quantile":
        warn("model.router_bias_update = quantile: the exported settings update router biases by their sign")
    tensors = _list_tensors(source)
    planner = DcpPlanner(source.path, tensors, {COMMON_STATE: [common], EMPTY_STATE: [None]},
                         _list_aliases(tensors))
    subfolder = f"iter_{source.step:07d}"

    def write_companions(folder: Path) -> None:
        write_atomically(folder / TRACKER, str(source.step))
        write_atomically(folder / subfolder / FORMAT, json.dumps({"sharded_backend": BACKEND,
                                                                  "sharded_backend_version": VERSIONS[0]}))
        if framework == BRIDGE:
            _write_bridge_files(source, next(iter(tensors.values())).dtype, folder / subfolder,
                                Path(out).absolute() / subfolder)

    write_export(Path(out), KIND, source=source, planner=planner, subfolder=subfolder,
                 write_companions=write_companions, workers=workers, overwrite=overwrite)
    return source, problem


def _write_bridge_files(source: TrainedModel, dtype: torch.dtype, folder: Path, published: Path) -> None:
    """Write tokenizer, settings and `TrainState` for Megatron-Bridge 0.6 into the folder of an iteration.
    `dtype`: of the weights; `published`: path of the folder after the export."""
    write_hf_files(source, folder / "tokenizer", dtype)
    tokenizer, package = str(published / "tokenizer"), "megatron.bridge.training"
    run_config = {
        "model": describe_provider(source.settings.model) | {
            "bf16": dtype == torch.bfloat16, "params_dtype": {"_target_": str(dtype), "_call_": False},
            "hf_model_id": tokenizer},
        "tokenizer": {"_target_": f"{package}.tokenizers.config.TokenizerConfig",
                      "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tokenizer},
        "checkpoint": {"_target_": f"{package}.config.CheckpointConfig", "ckpt_format": BACKEND,
                       "save_optim": source.num_updates is not None, "save_rng": False}}
    write_atomically(folder / RUN_CONFIG, yaml.safe_dump(run_config))
    samples = source.step * source.settings.train.global_batch_size
    torch.save({
        "step": torch.tensor(source.step), "consumed_train_samples": torch.tensor(samples),
        "floating_point_operations_so_far": torch.tensor(0.0, dtype=torch.float64),
        **dict.fromkeys(("skipped_train_samples", "consumed_valid_samples"), torch.tensor(0)),
        **dict.fromkeys(("do_train", "do_valid", "do_test"), torch.tensor(False))}, folder / TRAIN_STATE)
    shutil.copyfile(folder / TRAIN_STATE, folder.parent / f"latest_{TRAIN_STATE}")


def _list_tensors(source: TrainedModel) -> dict[str, DcpTensor]:
    """Return tensors under Megatron's keys; raises `UserError` for damage, or state without counterpart."""
    tensors = {}
    for part in (MODEL,) if source.num_updates is None else (MODEL, OPTIMIZER):
        reader = TensorReader(source.path, part)
        reader.check_complete()
        for key in reader.keys():  # noqa: SIM118  (a method of the reader, not a dict)
            state, _, name = key.partition("/")
            if part == OPTIMIZER and state not in STATES:
                raise UserError(f"{source.path}: {key} is Muon's state, for which Megatron-Core needs "
                                "another package (emerging_optimizers); pass --weights-only")
            theirs = key if part == MODEL else f"optimizer.state.{STATES[state]}.{name}"
            tensors[theirs] = DcpTensor(reader.get_shape(key), reader.get_dtype(key),
                                        partial(reader.read, key))
    return tensors


def _list_aliases(tensors: Mapping[str, DcpTensor]) -> dict[str, list[str]]:
    """Return key -> further names of the same values.

    The distributed optimizer asks for the weights that it updates: masters, or in float32 the weights
    themselves. With Transformer Engine, modules with weights and attention ask for `_extra_state`, which is
    empty without FP8 history.
    """
    empty: list[str] = []
    prefix, masters = "optimizer.state.exp_avg.", f"optimizer.state.{STATES['master']}."
    aliases = {EMPTY_STATE: empty}
    for key, tensor in tensors.items():
        if not key.startswith("optimizer."):
            module, num_parts = key.rpartition(".")[0], tensor.shape[0] if EXPERTS in key else 1
            empty += [f"{module}._extra_state/shard_{part}_{num_parts}" for part in range(num_parts)]
            if module.endswith(".linear_proj"):
                empty.append(f"{module.removesuffix('linear_proj')}core_attention._extra_state/shard_0_1")
        elif key.startswith(prefix):
            name = key.removeprefix(prefix)
            updated = masters + name if masters + name in tensors else name
            aliases[updated] = [f"optimizer.state.param.{name}"]
    return aliases


def build_common_state(settings: RunConfig, step: int, num_updates: int | None, *,
                       one_optimizer: bool) -> tuple[dict[str, Any], str]:
    """Return everything but tensors that Megatron-LM stores, and why the schedule is missing ("": it is not).

    Args:
        settings: config of the run.
        step: completed steps.
        num_updates: updates in the moments; None: no optimizer.
        one_optimizer: see `to_megatron`.
    """
    optim, samples = settings.optim, settings.train.global_batch_size
    args = describe_model(settings.model) | {
        "padded_vocab_size": settings.model.vocab_size,
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
        "params_dtype": PRECISION[settings.train.precision], "bf16": settings.train.precision == "bf16",
        "seq_length": min(settings.data.phases[-1].seq_len, settings.model.max_position_tokens),
        "global_batch_size": samples, "iteration": step, "consumed_train_samples": step * samples,
        "consumed_valid_samples": 0, "ckpt_format": BACKEND, "use_distributed_optimizer": True,
        "data_parallel_random_init": False, "add_position_embedding": True,
        # random numbers follow from seed, step and rank, so a checkpoint has no generator state
        "no_save_rng": True, "no_save_optim": num_updates is None}
    common = {"checkpoint_version": 3.0, "iteration": step, "content_metadata": dict(CONTENT),
              "num_floating_point_operations_so_far": 0}
    if num_updates is None:
        return common | {"args": Namespace(**args)}, ""
    if optim.groups:
        raise UserError(f"optim.groups: has {len(optim.groups)} groups of parameters, which a torch_dist "
                        "checkpoint cannot describe; pass --weights-only")
    scheduler, schedule_args, problem = _describe_schedule(settings, step)
    args |= schedule_args | {
        "lr": optim.lr, "min_lr": optim.min_lr, "weight_decay": optim.weight_decay, "optimizer": "adam",
        "adam_beta1": optim.beta1, "adam_beta2": optim.beta2, "adam_eps": optim.eps,
        "clip_grad": optim.clip_grad}
    optimizers = [_describe_optimizer(settings, num_updates, is_expert=False)]
    if settings.model.num_experts and not one_optimizer:
        optimizers.append(_describe_optimizer(settings, num_updates, is_expert=True))
    common |= {"args": Namespace(**args), "opt_param_scheduler": scheduler,
               OPTIMIZER: optimizers[0] if len(optimizers) == 1 else dict(enumerate(optimizers))}
    return common, problem


def _describe_optimizer(settings: RunConfig, num_updates: int, *, is_expert: bool) -> dict[str, Any]:
    """Return the state of one of the library's optimizers without its tensors.

    `optimizer` and `param_state_sharding_type` are read by the distributed optimizer, `state` and
    `param_groups` by the optimizer of float32 weights that every process repeats.
    """
    optim = settings.optim
    # vectors do not decay, and experts have none
    decays_by_group = (1.0,) if is_expert else (1.0, 0.0)
    groups = [{
        "lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps,
        "weight_decay": optim.weight_decay * decays, "wd_mult": decays, "lr_mult": 1.0,
        "is_decoupled_lr": False, "is_expert_parallel": is_expert, "default_config": True,
        "max_lr": optim.lr, "min_lr": optim.min_lr, "bias_correction": True,
        **ADAMW_DEFAULTS} for decays in decays_by_group]
    return {"optimizer": {"param_groups": [{**group, "step": num_updates} for group in groups]},
            "param_state_sharding_type": CONTENT["distrib_optim_sharding_type"], "param_groups": groups,
            "state": {"common_step": torch.tensor(float(num_updates))}}


def _describe_schedule(settings: RunConfig, step: int) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return the state of the library's scheduler, Megatron-LM's arguments for it, and why the learning rate
    is written as constant ("": it is not). The library counts in samples."""
    optim, schedule = settings.optim, Schedule(settings)
    samples, end = settings.train.global_batch_size, schedule.num_steps
    warmup, decay = bound_lengths(optim, end, optim.warmup_steps)
    problem = _find_schedule_problem(settings, schedule)
    style = "constant" if problem else DECAY_STYLES[optim.schedule]
    scheduler = {
        "max_lr": optim.lr, "min_lr": optim.min_lr, "lr_decay_style": style,
        "lr_warmup_steps": warmup * samples, "lr_decay_steps": end * samples,
        # our first step has the rate after one step of warm-up, the library's has the rate before it
        "num_steps": (step + 1) * samples, "start_wd": optim.weight_decay, "end_wd": optim.weight_decay,
        "wd_incr_style": "constant", "wd_incr_steps": end * samples}
    arguments = {"lr_decay_style": style, "lr_warmup_samples": warmup * samples, "lr_warmup_init": 0.0,
                 "lr_decay_samples": end * samples, "train_samples": end * samples, "train_iters": end}
    if style == "WSD":
        arguments |= {"lr_wsd_decay_samples": decay * samples,
                      "lr_wsd_decay_style": WSD_STYLES[optim.decay_form]}
    return scheduler, arguments, problem


def _find_schedule_problem(settings: RunConfig, schedule: Schedule) -> str:
    optim = settings.optim
    problems = {
        "optim.schedule_by = tokens": optim.schedule_by == "tokens", "optim.rewarm": bool(optim.rewarm),
        "a phase has its own learning rate": any(p.lr or p.rewarm_steps for p in settings.data.phases),
        "the batch size changes": len({stretch.batch_size for stretch in schedule.stretches}) > 1,
        "inverse_sqrt without warm-up": optim.schedule == "inverse_sqrt" and not optim.warmup_steps}
    return next((sentence for sentence, applies in problems.items() if applies), "")
