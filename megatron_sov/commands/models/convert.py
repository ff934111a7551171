"""Options and checks for the `megatron-sov convert` actions."""

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Gt, Le

from megatron_sov.base.errors import Fix, UserError, fix_missing, suggest_name
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import ActionGroup, AtLeastOne, DeclaredCommand, Flag, parse_nested
from megatron_sov.commands.shared_options import (
    CheckpointOut, CheckpointPath, FigureOptions, OverwriteOptions, RedoOptions)
from megatron_sov.convert import DEFAULT_WORKERS, MAX_SHARD_BYTES
from megatron_sov.infer.request import RankOptions
from megatron_sov.model import recipes
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.config.train import AverageKind
from megatron_sov.model.pretrained import is_hf_folder
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.checkpoints import (
    ANY_MODEL, CHECKPOINT_KIND, HF_MODEL, MODEL_KINDS, PEFT_ADAPTER, RUN, check_folder_kind, check_model,
    check_model_path, fix_adapter)

RUN_MODULE = "megatron_sov.commands.models.convert_run"
DtypeName = Literal["keep", "float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True, kw_only=True)
class WrittenOptions(PluginOptions, OverwriteOptions):
    """Options for actions that write."""


@dataclass(frozen=True, kw_only=True)
class WorkersOptions:
    """Parallelism for conversions."""

    workers: AtLeastOne = DEFAULT_WORKERS
    """Files processed at a time; a file holds two tensors in memory (default: one per core, at most 4)."""


@dataclass(frozen=True, kw_only=True)
class ConversionOptions(WrittenOptions, WorkersOptions, RedoOptions):
    """Options for conversions of whole models."""

    dtype: Annotated[DtypeName, Flag(value="D")] = "keep"
    """Dtype for the written weights: float32, bfloat16, float16, float64, or keep (the source's dtype). With
    keep, to-hf writes float32 for float64 and for an adapter."""


@dataclass(frozen=True, kw_only=True)
class FromHfOptions(ConversionOptions):
    """Convert a Hugging Face folder to a checkpoint that loads at any layout."""

    hf_dir: Annotated[Path, Flag("HF_DIR")]
    """Folder with config.json and safetensors files."""
    out: CheckpointOut
    no_verify: bool = False
    """After an import with warnings, do not run `convert verify`."""


@dataclass(frozen=True, kw_only=True)
class ToHfOptions(ConversionOptions):
    """Convert a checkpoint to a Hugging Face folder."""

    checkpoint: CheckpointPath
    out: Annotated[Path, Flag("OUT")]
    """Hugging Face folder to write."""
    max_shard_bytes: AtLeastOne = MAX_SHARD_BYTES
    """Largest safetensors file."""


@dataclass(frozen=True, kw_only=True)
class FromMegatronOptions(ConversionOptions):
    """Convert a torch_dist or fsdp_dtensor checkpoint from Megatron-LM, Megatron-Bridge or NeMo to a
    checkpoint that loads at any layout."""

    megatron_dir: Annotated[Path, Flag("DIR")]
    """Iteration folder (iter_0001000), or its parent folder."""
    out: CheckpointOut
    family: Annotated[str, Flag(value="NAME")] = ""
    """Model family (default: the single family that fits)."""
    recipe: Annotated[str, Flag(value="RECIPE")] = ""
    """Take the architecture from a recipe instead of the checkpoint."""
    weights_only: bool = False
    """Leave out the optimizer, for a run with --from."""
    settings: Annotated[tuple[str, ...], Flag("--set", "model.NAME=VALUE")] = ()
    """Architecture field that is missing or wrong in the checkpoint; may be repeated."""
    tokenizer: Annotated[Path | None, Flag(value="DIR")] = None
    """Tokenizer folder to copy into the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TrainedOptions(WrittenOptions, WorkersOptions):
    """Options for exports with the optimizer."""

    checkpoint: CheckpointPath
    weights_only: bool = False
    """Leave out optimizer, step and schedule."""


@dataclass(frozen=True, kw_only=True)
class ToMegatronOptions(TrainedOptions):
    """Convert a checkpoint, with its optimizer, to a torch_dist checkpoint of Megatron-Core."""

    out: Annotated[Path, Flag("OUT")]
    """Folder to write, for Megatron-LM's --load."""
    framework: Literal["megatron-lm", "bridge"] = "megatron-lm"
    """bridge: also write the settings, tokenizer and step that Megatron-Bridge 0.6 reads."""
    one_optimizer: bool = False
    """The run that loads the optimizer has expert-parallel size 1, and expert-tensor-parallel size equal to
    tensor-parallel size: Megatron-Core then has no second optimizer for experts."""


@dataclass(frozen=True, kw_only=True)
class ToDcpOptions(TrainedOptions):
    """Convert a checkpoint, with its optimizer, to a checkpoint of torch.distributed.checkpoint."""

    out: Annotated[Path, Flag("OUT")]
    """Folder to write, with step-N, config.json and tokenizer."""
    names: Literal["hf", "torchtitan"] = "hf"
    """Parameter names: hf, of the transformers class; torchtitan, of torchtitan 0.3."""


@dataclass(frozen=True, kw_only=True)
class FromDcpOptions(ConversionOptions):
    """Convert a checkpoint of torch.distributed.checkpoint to a checkpoint that loads at any layout."""

    dcp_dir: Annotated[Path, Flag("DCP_DIR")]
    """Folder with .metadata, or with folders step-N (newest step)."""
    out: CheckpointOut
    model: Annotated[Path | None, Flag(value="MODEL_DIR")] = None
    """Hugging Face folder with config.json and tokenizer (default: DCP_DIR)."""
    weights_only: bool = False
    """Leave out the optimizer, for a run with --from."""


@dataclass(frozen=True, kw_only=True)
class ToPeftOptions(WrittenOptions):
    """Convert an adapter checkpoint to a folder that PEFT loads."""

    checkpoint: Annotated[Path, Flag("CHECKPOINT")]
    """Adapter checkpoint, or run (newest checkpoint)."""
    out: Annotated[Path, Flag("OUT")]
    """Folder to write."""
    base_name: Annotated[str | None, Flag(value="NAME")] = None
    """Name or folder for the adapter's Hugging Face base model, written to adapter_config.json (default: the
    name of the converted folder)."""


@dataclass(frozen=True, kw_only=True)
class FromPeftOptions(WrittenOptions):
    """Convert a PEFT adapter to a checkpoint, for training or merging."""

    peft_dir: Annotated[Path, Flag("PEFT_DIR")]
    """Folder with adapter_config.json and adapter_model.safetensors."""
    out: CheckpointOut
    base: Annotated[Path, Flag(value="CHECKPOINT")]
    """The adapter's base model as a checkpoint (from `convert from-hf`)."""


@dataclass(frozen=True, kw_only=True)
class AverageOptions(WrittenOptions, WorkersOptions, RedoOptions):
    """Average a run's newest checkpoints."""

    run: Annotated[Path, Flag("RUN")]
    """Run folder."""
    out: CheckpointOut
    last: int | None = None
    """Complete checkpoints to average (default: all)."""
    from_step: int | None = None
    """Skip checkpoints before this step."""
    to_step: int | None = None
    """Skip checkpoints after this step."""
    weights: AverageKind = "uniform"
    """Checkpoint weights. uniform: equal; linear: 1, 2, 3, ... in step order; ema: --decay times the next
    checkpoint's weight."""
    decay: Annotated[float, Gt(0), Le(1), Flag(value="D")] = 0.5
    """Decay for --weights ema."""
    workers: AtLeastOne = 1


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(PluginOptions, RankOptions, WorkersOptions, FigureOptions):
    """Compare two models (checkpoints or Hugging Face folders); exit code 3 if they differ."""

    a: Annotated[Path, Flag("A")]
    """First model."""
    b: Annotated[Path, Flag("B")]
    """Second model."""
    no_load: bool = False
    """Compare files alone: load and run no model (saves memory)."""
    lengths: Annotated[tuple[AtLeastOne, ...], Flag(many=True)] = (1, 7, 64, 200)
    """Token counts for the random prompts."""
    card: Annotated[Path | None, Flag(value="FILE")] = None
    """Also write a verification card, e.g. OUT.verification.json."""


@dataclass(frozen=True, kw_only=True)
class ConvertInspectOptions(PluginOptions):
    """Show a checkpoint's or Hugging Face folder's architecture, parameters and dtypes."""

    a: Annotated[Path, Flag("A")]
    """Checkpoint, run or Hugging Face folder."""
    json: bool = False
    """Print JSON."""


OptionsT = TypeVar("OptionsT", bound=PluginOptions)


def _check_paths(*names: str, kinds: tuple[str, ...] = (), expected: str = ""
                 ) -> Callable[[OptionsT], OptionsT]:
    """Return a check that loads --plugin, and refuses missing models in the option fields `names`, and models
    outside `kinds` (in words `expected`; (): all)."""
    def check(options: OptionsT) -> OptionsT:
        for name in names:
            path = getattr(options, name)
            check_model_path(path, "", kinds or MODEL_KINDS, expected or ANY_MODEL)
            if kinds:
                check_folder_kind(path, kinds, expected)
        load_plugins(options.plugins)
        return options

    return check


def _check_from_megatron(options: FromMegatronOptions) -> FromMegatronOptions:
    load_plugins(options.plugins)
    resolve_architecture(options)
    if options.tokenizer is not None and not (options.tokenizer / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {options.tokenizer}: has no tokenizer.json; pass a tokenizer folder")
    return options


def resolve_architecture(options: FromMegatronOptions) -> tuple[str, dict[str, Any]]:
    """Return the family ("": the only one that fits) and the `ModelConfig` fields of recipe and --set."""
    overrides, family = parse_model_settings(options.settings), options.family
    if options.recipe:
        model = dataclasses.asdict(recipes.get(options.recipe).model)
        recipe_family = model.pop("family")
        return family or recipe_family, model | overrides
    return family, overrides


def _check_from_peft(options: FromPeftOptions) -> FromPeftOptions:
    fix = fix_adapter(options.peft_dir) if not options.base.exists() and options.peft_dir.is_dir() else None
    if fix is not None:  # `fix.before` ends with the command itself
        base = shlex.split(fix.before[-1])[-1]
        raise UserError(f"{options.peft_dir}: names its base model; make a checkpoint of it for --base",
                        Fix(options=("--base", base), before=fix.before[:-1]))
    _check_paths("peft_dir", kinds=(PEFT_ADAPTER,), expected="a PEFT adapter")(options)
    return _check_paths("base")(options)


def _check_verify(options: VerifyOptions) -> VerifyOptions:
    check_output("--card", options.card)
    if options.a.exists() and not options.b.exists() and fix_missing(options.b) is None:
        action = "from-hf" if is_hf_folder(options.a) else "to-hf"
        conversion = shlex.join(["megatron-sov", "convert", action, str(options.a), str(options.b)])
        raise UserError(f"{options.b}: does not exist; compare a model with its export or import",
                        Fix(before=(conversion,)))
    _check_paths("a", "b")(options)
    for path in (options.a, options.b) if options.settings else ():
        check_model(path, options.settings, options.nproc)
    return options


def parse_model_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Parse `--set model.NAME=VALUE` to `ModelConfig` fields. Raises `UserError`: a name that is no field of
    the architecture."""
    field_names = [field.name for field in dataclasses.fields(ModelConfig) if field.name != "family"]
    parsed = parse_nested(settings)
    values = parsed.pop("model", {})
    for name in [*parsed, *(f"model.{name}" for name in values if name not in field_names)]:
        instead = suggest_name(name.removeprefix("model."), field_names, "model.")
        raise UserError(f"--set {name}: is not an architecture field{instead}; fields are model.num_layers "
                        "and the like")
    return dict(values)


_check_trained = _check_paths("checkpoint", kinds=(CHECKPOINT_KIND, RUN), expected="a checkpoint or a run")
CONVERT = ActionGroup({
    "from-hf": DeclaredCommand(
        FromHfOptions, _check_paths("hf_dir", kinds=(HF_MODEL,), expected="a Hugging Face folder"),
        f"{RUN_MODULE}:import_hf"),
    "to-hf": DeclaredCommand(ToHfOptions, _check_trained, f"{RUN_MODULE}:export_hf"),
    "from-megatron": DeclaredCommand(FromMegatronOptions, _check_from_megatron,
                                     f"{RUN_MODULE}:import_megatron"),
    "to-megatron": DeclaredCommand(ToMegatronOptions, _check_trained, f"{RUN_MODULE}:export_megatron"),
    "from-dcp": DeclaredCommand(FromDcpOptions, _check_paths("dcp_dir"), f"{RUN_MODULE}:import_dcp"),
    "to-dcp": DeclaredCommand(ToDcpOptions, _check_trained, f"{RUN_MODULE}:export_dcp"),
    "to-peft": DeclaredCommand(ToPeftOptions, _check_paths("checkpoint"), f"{RUN_MODULE}:export_peft"),
    "from-peft": DeclaredCommand(FromPeftOptions, _check_from_peft, f"{RUN_MODULE}:import_peft"),
    "average": DeclaredCommand(AverageOptions, _check_paths(), f"{RUN_MODULE}:average_checkpoints"),
    "verify": DeclaredCommand(VerifyOptions, _check_verify,
                              "megatron_sov.commands.models.verify_run:verify_models"),
    "inspect": DeclaredCommand(ConvertInspectOptions, _check_paths("a"), f"{RUN_MODULE}:show_weights")})
