"""What the actions of `megatron-sov convert` take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Gt, Le

from megatron_sov.commands.shared_options import (
    PARITY_LENGTHS,
    CheckpointOut,
    CheckpointPath,
    OverwriteOptions,
    RecordOptions,
    RedoOptions,
)
from megatron_sov.config.train import AverageKind
from megatron_sov.convert import DEFAULT_WORKERS, MAX_SHARD_BYTES
from megatron_sov.generate.request import RankOptions
from megatron_sov.recipes.requested import PluginOptions
from megatron_sov.settings import AtLeastOne, Flag, NotNegative

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
    """What weights are written in: float32, bfloat16, float16, float64, or keep: what they are in; to-hf then
    writes float32 for float64."""


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
class GrowingOptions(WrittenOptions, WorkersOptions, RedoOptions):
    """What a larger model begins as."""

    checkpoint: CheckpointPath
    out: CheckpointOut
    workers: AtLeastOne = 1


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions(GrowingOptions):
    """Write a dense checkpoint as one with experts that computes the same."""

    experts: Annotated[AtLeastOne, Flag(value="E")]
    """Experts of each layer."""
    top_k: Annotated[AtLeastOne, Flag(value="K")]
    """Experts that a token visits."""
    granularity: Annotated[AtLeastOne, Flag(value="G")] = 1
    """Cut each copy of the dense network into G experts."""
    noise: Annotated[NotNegative, Flag(value="S")] = 0.0
    """Add noise of S standard deviations of each matrix (default 0: the model computes exactly what the dense
    one does)."""
    seed: int = 0
    """Of the router and the noise."""
    family: Annotated[str, Flag(value="NAME")] = ""
    """Family of the model with experts (default: the one that fits)."""


@dataclass(frozen=True, kw_only=True)
class DeepenOptions(GrowingOptions):
    """Write a checkpoint with more layers, which repeat its own."""

    layers: AtLeastOne
    """Layers of the deeper model."""
    how: Literal["stack", "interleave"] = "interleave"
    """stack: layers 0 1 2 0 1 2; interleave: 0 0 1 1 2 2."""
    identity: bool = False
    """Repeated layers write nothing at first, so the model computes what it did."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(PluginOptions, RankOptions, WorkersOptions, RecordOptions):
    """Compare two models, checkpoint or Hugging Face folder each; exit code 3 where they differ."""

    a: Annotated[Path, Flag("A")]
    """The one."""
    b: Annotated[Path, Flag("B")]
    """The other."""
    no_load: bool = False
    """Compare files alone: load and run no model (saves memory)."""
    lengths: Annotated[tuple[AtLeastOne, ...], Flag(many=True)] = PARITY_LENGTHS
    """Tokens of the random prompts that both sides are run on."""
    card: Annotated[Path | None, Flag(value="FILE")] = None
    """Also write a verification card, e.g. OUT.verification.json."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions(PluginOptions):
    """Show a checkpoint's or Hugging Face folder's architecture, parameters and dtypes."""

    a: Annotated[Path, Flag("A")]
    """What is shown."""
    json: bool = False
    """Print as JSON."""


@dataclass(frozen=True, kw_only=True)
class TranslateOptions(PluginOptions):
    """Print settings of Megatron-LM or Megatron-Bridge as ours, with what has no counterpart."""

    source: Annotated[str, Flag("FILE|ARGUMENTS")]
    """A YAML file of Megatron-Bridge, a shell script with arguments of Megatron-LM, or these arguments
    themselves in quotes; read, never run."""
    family: Annotated[str, Flag(value="NAME")] = ""
    """Family of the model (default: the only one that fits)."""
    output: Annotated[Path | None, Flag(value="FILE")] = None
    """Also write the settings as a file for --config."""
