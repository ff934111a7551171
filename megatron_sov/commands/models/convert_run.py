"""Runs the `megatron-sov convert` actions that write or show weights."""

import dataclasses
import math
import shlex
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import format_json
from megatron_sov.base.errors import ExitCode, warn
from megatron_sov.commands.models.convert import (
    AverageOptions, ConvertInspectOptions, FromDcpOptions, FromHfOptions, FromMegatronOptions,
    FromPeftOptions, ToDcpOptions, ToHfOptions, ToMegatronOptions, ToPeftOptions, resolve_architecture)
from megatron_sov.convert.averaging import average, choose_checkpoints
from megatron_sov.convert.dcp.from_dcp import from_dcp
from megatron_sov.convert.dcp.to_dcp import to_dcp
from megatron_sov.convert.hf_export import to_hf
from megatron_sov.convert.hf_import import from_hf
from megatron_sov.convert.megatron.from_megatron import ImportReport, from_megatron
from megatron_sov.convert.megatron.to_megatron import to_megatron
from megatron_sov.convert.peft import describe_adapter, from_peft, open_weights, to_peft
from megatron_sov.model.families.count import count_params
from megatron_sov.work.processes.children import run_command


def import_hf(options: FromHfOptions) -> int:
    """Import a folder; after warnings, compare with transformers and return exit code 3 if they differ."""
    warnings = from_hf(options.hf_dir, options.out, options.dtype, workers=options.workers,
                       overwrite=options.overwrite, redo=options.redo)
    print(f"wrote checkpoint {options.out}", flush=True)
    if not warnings or options.no_verify:
        return ExitCode.OK
    plugins = [word for reference in options.plugins for word in ("--plugin", reference)]
    command = ["convert", "verify", str(options.out), str(options.hf_dir), *plugins]
    typed = f"`megatron-sov {shlex.join(command)}`"
    # in a new process: ranks fork from it, and the conversion's threads would be missing in them
    code = run_command(["megatron_sov", *command], f"compare with transformers later: {typed}")
    if code == ExitCode.USER_ERROR:
        warn(f"{options.out}: was not compared with transformers (see above); if the model runs elsewhere, "
             f"type {typed} there")
        return ExitCode.OK
    return code


def export_hf(options: ToHfOptions) -> None:
    to_hf(options.checkpoint, options.out, options.dtype, max_shard_bytes=options.max_shard_bytes,
          workers=options.workers, overwrite=options.overwrite, redo=options.redo)
    print(f"wrote Hugging Face folder {options.out}")


def import_megatron(options: FromMegatronOptions) -> None:
    family, overrides = resolve_architecture(options)
    result = from_megatron(options.megatron_dir, options.out, options.dtype, family=family,
                           overrides=overrides, tokenizer=options.tokenizer,
                           weights_only=options.weights_only, workers=options.workers,
                           overwrite=options.overwrite, redo=options.redo)
    _print_import(options.out, result)


def import_dcp(options: FromDcpOptions) -> None:
    _print_import(options.out, from_dcp(
        options.dcp_dir, options.out, options.dtype, model_dir=options.model,
        weights_only=options.weights_only, workers=options.workers, overwrite=options.overwrite,
        redo=options.redo))


def _print_import(out: Path, result: ImportReport) -> None:
    """Print the parts left out of an import, and the command that continues the training."""
    iteration = "" if result.iteration is None else f", iteration {result.iteration}"
    print(f"wrote checkpoint {out}: a model of family {result.model.family}{iteration}")
    if result.num_padded_rows:
        print(f"left out {result.num_padded_rows} padding rows of the vocabulary's matrices, after the "
              f"{result.model.vocab_size} token ids")
    if result.num_optimizer_tensors:
        print(f"left out {result.num_optimizer_tensors} optimizer tensors")
    if result.training is None:
        print("the optimizer starts from zero")
        return
    settings = "".join(f" --set {setting}" for setting in result.training.settings)
    print(f"with the moments of {result.training.num_updates} updates; without data order and random state")
    print(f"as RUN/checkpoints/step-{result.training.step} it continues by `megatron-sov pretrain ... --run "
          f"RUN --resume{settings}`")


def export_megatron(options: ToMegatronOptions) -> None:
    source, problem = to_megatron(
        options.checkpoint, options.out, weights_only=options.weights_only,
        one_optimizer=options.one_optimizer, framework=options.framework, workers=options.workers,
        overwrite=options.overwrite)
    print(f"wrote torch_dist checkpoint {options.out}, iteration {source.step}")
    if source.num_updates is None:
        print("left out the optimizer: start with --finetune or --no-load-optim")
        return
    print(f"with the moments of {source.num_updates} updates; without data order and random state")
    if problem:
        print(f"the learning rate is constant, because {problem}: pass "
              "--override-opt_param-scheduler with your schedule")


def export_dcp(options: ToDcpOptions) -> None:
    source = to_dcp(options.checkpoint, options.out, names=options.names, weights_only=options.weights_only,
                    workers=options.workers, overwrite=options.overwrite)
    print(f"wrote torch.distributed checkpoint {options.out}/step-{source.step}")
    print("without optimizer" if source.num_updates is None else
          f"with the moments of {source.num_updates} updates; without data order and random state")


def export_peft(options: ToPeftOptions) -> None:
    to_peft(options.checkpoint, options.out, base_name=options.base_name, overwrite=options.overwrite)
    print(f"wrote PEFT adapter {options.out}")


def import_peft(options: FromPeftOptions) -> None:
    from_peft(options.peft_dir, options.out, options.base, overwrite=options.overwrite)
    print(f"wrote checkpoint {options.out}")


def average_checkpoints(options: AverageOptions) -> None:
    checkpoints = choose_checkpoints(options.run, options.last, (options.from_step, options.to_step),
                                     options.weights, options.decay)
    average(checkpoints, options.out, workers=options.workers, overwrite=options.overwrite, redo=options.redo)
    print(f"wrote checkpoint {options.out}, the mean of {len(checkpoints)}")


def show_weights(options: ConvertInspectOptions) -> None:
    facts = _describe_weights(options.a)
    if options.json:
        print(format_json(facts), end="")
        return
    for section in ("weights", "parameters", "model"):
        print(section)
        for name, value in facts[section].items():
            print(f"  {name:<24} {value:,}" if type(value) is int else f"  {name:<24} {value}")


def _describe_weights(path: Path) -> dict[str, Any]:
    """Describe weights by their file headers."""
    weights = open_weights(path)
    dtypes: dict[str, int] = {}
    size_bytes = 0
    for link in weights.links:  # a block of a Megatron tensor and its Hugging Face tensors
        for name, shape in link.hf_shapes().items():
            dtype = weights.get_dtype(name)
            label = str(dtype).removeprefix("torch.")
            dtypes[label] = dtypes.get(label, 0) + 1
            size_bytes += math.prod(shape) * dtype.itemsize
    return {
        "weights": {"path": str(path), "num_tensors": len(weights.list_names()), "size_bytes": size_bytes,
                    "dtypes": ", ".join(f"{label} x {n:,}" for label, n in sorted(dtypes.items())),
                    **describe_adapter(weights)},
        "parameters": dataclasses.asdict(count_params(weights.model)),
        "model": dataclasses.asdict(weights.model)}
