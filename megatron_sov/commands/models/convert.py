"""`megatron-sov convert from-hf | to-hf | from-megatron | from-peft | to-peft | average
| verify | inspect`.

The command stands here and not in `convert`, since `verify` runs both models, which rooms above that one do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le

from megatron_sov.base.artifacts import format_json, write_output
from megatron_sov.base.errors import ExitCode, UserError, suggest_name
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import Actions, AtLeastOne, Flag, add_actions, parse_nested, run_action
from megatron_sov.commands.shared_options import (
    CheckpointOut, CheckpointPath, OverwriteOptions, RecordOptions, RedoOptions)
from megatron_sov.convert import DEFAULT_WORKERS, MAX_SHARD_BYTES
from megatron_sov.infer.request import RankOptions
from megatron_sov.model import recipes
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.config.train import AverageKind
from megatron_sov.model.families.count import count_params
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.checkpoints import CHECKPOINT_KIND, HF_MODEL, RUN, check_folder_kind, check_model_path
from megatron_sov.runs.folder import RunEvents
from megatron_sov.runs.launch_environment import is_first_rank

# What the actions of `megatron-sov convert` take.

DtypeName = Literal["keep", "float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True, kw_only=True)
class WrittenOptions(PluginOptions, OverwriteOptions):
    """What every action takes that writes."""


@dataclass(frozen=True, kw_only=True)
class WorkersOptions:
    """How much is done at a time."""

    workers: AtLeastOne = DEFAULT_WORKERS
    """Files at a time, each with two tensors in memory."""


@dataclass(frozen=True, kw_only=True)
class ConversionOptions(WrittenOptions, WorkersOptions, RedoOptions):
    """What conversions of whole models take."""

    dtype: Annotated[DtypeName, Flag(value="D")] = "keep"
    """Dtype of the written weights: float32, bfloat16, float16, float64, or keep: that of the source; to-hf
    then writes float32 for float64 and for an adapter."""


@dataclass(frozen=True, kw_only=True)
class FromHfOptions(ConversionOptions):
    """Write a Hugging Face folder as a checkpoint that any layout can load."""

    hf_dir: Annotated[Path, Flag("HF_DIR")]
    """Folder with config.json and safetensors files."""
    out: CheckpointOut


@dataclass(frozen=True, kw_only=True)
class ToHfOptions(ConversionOptions):
    """Write a checkpoint as a Hugging Face folder."""

    checkpoint: CheckpointPath
    out: Annotated[Path, Flag("OUT")]
    """Hugging Face folder to write."""
    max_shard_bytes: AtLeastOne = MAX_SHARD_BYTES
    """Largest safetensors file."""


@dataclass(frozen=True, kw_only=True)
class FromMegatronOptions(ConversionOptions):
    """Write a torch_dist checkpoint of Megatron-LM, Megatron-Bridge or NeMo as one that any layout can
    load."""

    megatron_dir: Annotated[Path, Flag("DIR")]
    """Folder of an iteration (iter_0001000), or the one that holds them."""
    out: CheckpointOut
    family: Annotated[str, Flag(value="NAME")] = ""
    """Family of the model (default: the only one that fits)."""
    recipe: Annotated[str, Flag(value="RECIPE")] = ""
    """Take the architecture from a recipe, and not from what the checkpoint says."""
    settings: Annotated[tuple[str, ...], Flag("--set", "model.NAME=VALUE")] = ()
    """A field of the architecture that the checkpoint says wrongly or not at all; may be repeated."""
    tokenizer: Annotated[Path | None, Flag(value="DIR")] = None
    """Folder of its tokenizer, to put beside the weights."""


@dataclass(frozen=True, kw_only=True)
class ToPeftOptions(WrittenOptions):
    """Write an adapter's checkpoint as a folder that PEFT loads."""

    checkpoint: Annotated[Path, Flag("CHECKPOINT")]
    """Checkpoint of an adapter, or run (its newest one)."""
    out: Annotated[Path, Flag("OUT")]
    """Folder to write."""
    base_name: Annotated[str | None, Flag(value="NAME")] = None
    """Name or folder of the Hugging Face model that the adapter belongs to, which PEFT's settings then say
    (default: the name of the folder it was converted from)."""


@dataclass(frozen=True, kw_only=True)
class FromPeftOptions(WrittenOptions):
    """Write a PEFT adapter as a checkpoint, to train on or to merge."""

    peft_dir: Annotated[Path, Flag("PEFT_DIR")]
    """Folder with adapter_config.json and adapter_model.safetensors."""
    out: CheckpointOut
    base: Annotated[Path, Flag(value="CHECKPOINT")]
    """Checkpoint of the model that it belongs to (`convert from-hf` makes one)."""


@dataclass(frozen=True, kw_only=True)
class AverageOptions(WrittenOptions, WorkersOptions, RedoOptions):
    """Write the mean of a run's newest checkpoints as a checkpoint."""

    run: Annotated[Path, Flag("RUN")]
    """Run folder."""
    out: CheckpointOut
    last: int | None = None
    """How many of its complete checkpoints (default: all)."""
    from_step: int | None = None
    """Only checkpoints from this step on."""
    to_step: int | None = None
    """Only checkpoints up to this step."""
    weights: AverageKind = "uniform"
    """What each weighs: the same; 1, 2, 3, ... in their order; or --decay times what the one behind it
    weighs."""
    decay: Annotated[float, Gt(0), Le(1), Flag(value="D")] = 0.5
    """Of --weights ema."""
    workers: AtLeastOne = 1


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(PluginOptions, RankOptions, WorkersOptions, RecordOptions):
    """Compare two models, checkpoint or Hugging Face folder each; exit code 3 where they differ."""

    a: Annotated[Path, Flag("A")]
    """The one."""
    b: Annotated[Path, Flag("B")]
    """The other."""
    no_load: bool = False
    """Compare files alone: load and run no model (saves memory)."""
    lengths: Annotated[tuple[AtLeastOne, ...], Flag(many=True)] = (1, 7, 64, 200)
    """Tokens of the random prompts that both sides are run on."""
    card: Annotated[Path | None, Flag(value="FILE")] = None
    """Also write a verification card, e.g. OUT.verification.json."""


@dataclass(frozen=True, kw_only=True)
class ConvertInspectOptions(PluginOptions):
    """Show a checkpoint's or Hugging Face folder's architecture, parameters and dtypes."""

    a: Annotated[Path, Flag("A")]
    """What is shown."""
    json: bool = False
    """Print as JSON."""


# `megatron-sov convert from-megatron`: a checkpoint of Megatron-LM or Megatron-Bridge as one of ours.


def run_from_megatron(args: FromMegatronOptions) -> int:
    """Convert; returns the exit code."""
    overrides, family = model_settings(args.settings), args.family
    # --set wins over the recipe
    if args.recipe:
        model = dataclasses.asdict(recipes.get(args.recipe).model)
        family = family or model["family"]
        # the family goes by an argument of its own
        overrides = {name: value for name, value in model.items() if name != "family"} | overrides
    if args.tokenizer is not None and not (args.tokenizer / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {args.tokenizer}: has no tokenizer.json; name a tokenizer's folder")
    from megatron_sov.convert.megatron_import import from_megatron

    told = from_megatron(args.megatron_dir, args.out, args.dtype, family=family, overrides=overrides,
                         tokenizer=args.tokenizer, workers=args.workers, overwrite=args.overwrite,
                         redo=args.redo)
    at = "" if told.iteration is None else f", iteration {told.iteration}"
    print(f"wrote checkpoint {args.out}: a model of family {told.model.family}{at}")
    if told.num_padded_rows:
        print(f"left out {told.num_padded_rows} rows of the vocabulary's matrices that stand behind the "
              f"{told.model.vocab_size} token ids")
    if told.num_optimizer_tensors:
        print(f"left out {told.num_optimizer_tensors} tensors of the optimizer, which begins anew")
    return ExitCode.OK


def model_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Return what `--set model.NAME=VALUE` says, by field of `ModelConfig`.

    Raises:
        UserError: one is no field of the architecture.
    """
    known = [field.name for field in dataclasses.fields(ModelConfig) if field.name != "family"]
    parsed = parse_nested(settings)
    given = parsed.pop("model", {})
    for name in [*parsed, *(f"model.{name}" for name in given if name not in known)]:
        instead = suggest_name(name.removeprefix("model."), known, "model.")
        raise UserError(f"--set {name}: is no field of the architecture{instead}; fields are "
                        "model.num_layers and the like")
    return dict(given)


def _begin(args: PluginOptions, *models: Path) -> None:
    """Refuse models that are missing, and run the code that --plugin names."""
    for model in models:
        check_model_path(model)
    load_plugins(args.plugins)


def _from_hf(args: FromHfOptions) -> int:
    _begin(args, args.hf_dir)
    # before torch, which takes seconds to load
    check_folder_kind(args.hf_dir, (HF_MODEL,), "a Hugging Face folder")
    from megatron_sov import convert

    convert.from_hf(args.hf_dir, args.out, args.dtype, workers=args.workers,
                    overwrite=args.overwrite, redo=args.redo)
    print(f"wrote checkpoint {args.out}")
    return ExitCode.OK


def _to_hf(args: ToHfOptions) -> int:
    _begin(args, args.checkpoint)
    check_folder_kind(args.checkpoint, (CHECKPOINT_KIND, RUN), "a checkpoint or a run")
    from megatron_sov import convert

    convert.to_hf(args.checkpoint, args.out, args.dtype, max_shard_bytes=args.max_shard_bytes,
                  workers=args.workers, overwrite=args.overwrite, redo=args.redo)
    print(f"wrote Hugging Face folder {args.out}")
    return ExitCode.OK


def _to_peft(args: ToPeftOptions) -> int:
    _begin(args, args.checkpoint)
    from megatron_sov.convert.peft import to_peft

    to_peft(args.checkpoint, args.out, base_name=args.base_name, overwrite=args.overwrite)
    print(f"wrote PEFT adapter {args.out}")
    return ExitCode.OK


def _from_peft(args: FromPeftOptions) -> int:
    _begin(args, args.peft_dir, args.base)
    from megatron_sov.convert.peft import from_peft

    from_peft(args.peft_dir, args.out, args.base, overwrite=args.overwrite)
    print(f"wrote checkpoint {args.out}")
    return ExitCode.OK


def _average(args: AverageOptions) -> int:
    _begin(args)
    from megatron_sov import convert
    from megatron_sov.convert.averaging import choose_checkpoints

    found = choose_checkpoints(args.run, args.last, (args.from_step, args.to_step), args.weights,
                   args.decay)
    convert.average(found, args.out, workers=args.workers, overwrite=args.overwrite, redo=args.redo)
    print(f"wrote checkpoint {args.out}, the mean of {len(found)}")
    return ExitCode.OK


def _from_megatron(args: FromMegatronOptions) -> int:
    load_plugins(args.plugins)
    return run_from_megatron(args)


def _verify(args: VerifyOptions) -> int:
    check_output("--card", args.card)
    _begin(args, args.a, args.b)
    from megatron_sov import convert
    from megatron_sov.eval.parity import LogitsProof, build_card, prove_logits

    events = RunEvents(args.run)
    # first, since ranks are forked from this process and threads that later work starts would
    # be missing in them
    logits = LogitsProof([], {"not compared": "--no-load"}) if args.no_load else prove_logits(
        args.a, args.b, args.lengths, args.settings, args.nproc)
    # the ranks were there for the logits: files are compared by one process
    if not is_first_rank():
        return ExitCode.OK
    weights = convert.verify(args.a, args.b, load=not args.no_load, workers=args.workers)
    checks = [*weights.checks, *logits.checks]
    passed = all(check.passed for check in checks)
    if args.card:
        write_output(args.card, format_json(build_card(args.a, args.b, weights, logits)))
    events.add("conversion", target=f"{args.a} and {args.b}",
               checks=[dataclasses.asdict(check) for check in checks])
    if args.json:
        print(format_json({"passed": passed, "checks": checks}), end="")
    else:
        for check in checks:
            mark = "ok  " if check.passed else "FAIL"
            print(f"{mark}  {check.name}: {check.value:g} (limit "
                  f"{check.limit:g}){'; ' + check.detail if check.detail else ''}")
        if "not compared" in logits.method:
            print(f"      logits were not compared: {logits.method['not compared']}")
        print("verified: the same model" if passed else "NOT verified: see the lines marked FAIL")
    return ExitCode.OK if passed else ExitCode.GATE_FAILED


def _inspect(args: ConvertInspectOptions) -> int:
    _begin(args, args.a)
    facts = _facts(args.a)
    if args.json:
        print(format_json(facts), end="")
    else:
        for section in ("weights", "parameters", "model"):
            print(section)
            for name, value in facts[section].items():
                print(f"  {name:<24} {value:,}" if type(value) is int else f"  {name:<24} {value}")
    return ExitCode.OK


def _facts(path: Path) -> dict[str, Any]:
    """Return what `inspect` shows, from headers alone."""
    from megatron_sov import convert
    from megatron_sov.convert.peft import describe_adapter

    weights = convert.open_weights(path)
    dtypes: dict[str, int] = {}
    size_bytes = 0
    for link in weights.links:
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
        "model": dataclasses.asdict(weights.model),
    }


ACTIONS: Actions = {
    "from-hf": (FromHfOptions, _from_hf), "to-hf": (ToHfOptions, _to_hf),
    "from-megatron": (FromMegatronOptions, _from_megatron),
    "to-peft": (ToPeftOptions, _to_peft), "from-peft": (FromPeftOptions, _from_peft),
    "average": (AverageOptions, _average), "verify": (VerifyOptions, _verify),
    "inspect": (ConvertInspectOptions, _inspect)}
add_arguments = partial(add_actions, actions=ACTIONS)
run = partial(run_action, ACTIONS)
