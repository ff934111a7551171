"""An adapter's checkpoint becomes a folder that PEFT loads, and such a folder an adapter's checkpoint."""

from __future__ import annotations

import dataclasses
import math
import shutil
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.artifacts import (
    MANIFEST, ArtifactWriter, atomic_write, damaged_files, new_artifact, read_manifest, to_json)
from megatron_sov.base.errors import UserError, warn
from megatron_sov.checkpoint.sharded_tensors import TensorReader, TensorWriter, write_index
from megatron_sov.checkpoint.writer import TensorFile, TensorSpec, write_file
from megatron_sov.convert.dtypes import convert_tensor
from megatron_sov.convert.sources import (
    FLOATS, CheckpointWeights, HfWeights, Weights, check_exact, newest_of_run)
from megatron_sov.model.config import LoraConfig, ModelConfig
from megatron_sov.model.config.lora import EMBEDDING, EXPERTS, FEED_FORWARD, HEAD, TARGETS
from megatron_sov.model.families.adapters import (
    MAGNITUDE, A, Adapted, AdapterPlace, B, adaptable, adapted, adapted_modules, places)
from megatron_sov.model.pretrained import CONFIG as HF_CONFIG, DAMAGED_HF, read_json
from megatron_sov.runs.checkpoints import (
    ADAPTER, BASE, CHECKPOINTS_OF_A_RUN, IMPORTED, KIND, PEFT_ADAPTER, RUN, SOURCE, AdapterBase, adapter_base,
    damage, found_base, instead_of, keep_as_base, refuse_missing, refuse_no_model, refuse_other_kind,
    settings_of)

# PEFT's names and shapes for the tensors of an adapter, and the settings that it wants beside them.
#
# What decides them (peft 0.21.2): a linear layer's A and B stand under its name. A stack of experts is a
# parameter and not a layer: PEFT wraps the folder of both stacks twice, the gate and up projections inside
# (`base_layer`), and lays all experts' A upon one another and their B beside one another. In families with
# experts PEFT takes `gate_proj` in `target_modules` for these stacks, so that feed-forward layers beside them
# (shared experts, dense layers) must be named as parameters too, which PEFT adapts by the same names. An
# embedding's factors are transposed, and have each other's names. Beside an adapter of embedding or head PEFT
# saves their frozen weights.

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_ENDS = {A: ".lora_A.weight", B: ".lora_B.weight", MAGNITUDE: ".lora_magnitude_vector"}
_ENDS_OF_EMBEDDING = {A: ".lora_embedding_B", B: ".lora_embedding_A"}
_FROZEN = ".base_layer.weight"
MAX_RANK, MAX_ALPHA = 1 << 20, 1e30
"""What no adapter reaches: sizes and scales that are computed from more leave the range of numbers."""
_IGNORED = ("inference_mode", "lora_dropout", "task_type", "init_lora_weights", "base_model_name_or_path",
            "revision", "auto_mapping", "peft_version", "r", "lora_alpha", "target_modules", "peft_type",
            "target_parameters", "use_dora", "use_rslora", "megatron_core", "loftq_config",
            "runtime_config", "qalora_group_size", "fan_in_fan_out", "exclude_modules")
"""Fields of adapter_config.json that are understood, or that change no number of a trained adapter."""
_KEEP_THE_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` under which the adapter belongs to the base as it is; PiSSA, OLoRA, CorDA,
LoftQ and LoRA-GA take something out of it first."""


def peft_name(of: Adapted, tensor: str) -> str:
    """Return PEFT's name of one of a module's tensors (`A`, `B`, `MAGNITUDE`)."""
    folder = of.name
    if is_embedding(of):
        return f"{_PREFIX}{folder}{_ENDS_OF_EMBEDDING[tensor]}"
    if of.num_experts:
        folder = of.name.rpartition(".")[0] + (".base_layer" if of.halves > 1 else "")
    return f"{_PREFIX}{folder}{_ENDS[tensor]}"


def is_embedding(of: Adapted) -> bool:
    return of.name.endswith(f".{EMBEDDING}")


def frozen_copies(names: Iterable[str]) -> dict[str, str]:
    """Return which tensors of a PEFT folder are frozen weights of the base: theirs -> the base's name."""
    return {name: name.removeprefix(_PREFIX).removesuffix(_FROZEN) + ".weight" for name in names
            if name.endswith((f"{HEAD}{_FROZEN}", f"{EMBEDDING}{_FROZEN}"))}


def to_peft_shape(of: Adapted, tensor: str, ours: torch.Tensor) -> torch.Tensor:
    """Return one of our tensors as PEFT has it."""
    if is_embedding(of):
        return ours.T
    if not of.num_experts:
        return ours
    if tensor == A:
        return ours.flatten(0, 1)
    stacked = ours.reshape(of.num_experts, of.out_features, -1)
    return stacked.permute(1, 2, 0).reshape(of.out_features, -1)


def from_peft_shape(of: Adapted, tensor: str, theirs: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return one of PEFT's tensors as we have it, with `shape`."""
    if is_embedding(of):
        return theirs.T.contiguous()
    if of.num_experts and tensor == B:
        theirs = theirs.reshape(of.out_features, -1, of.num_experts).permute(2, 0, 1)
    return theirs.reshape(*shape).contiguous()


def peft_config(model: ModelConfig, lora: LoraConfig, base_name: str) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Raises:
        UserError: PEFT does not know such an adapter.
    """
    modules: set[str] = set()
    parameters: set[str] = set()
    for of in adapted_modules(model, lora):
        kind = of.name.rpartition(".")[2]
        inside = of.name.removeprefix("model.layers.").partition(".")[2]
        if of.num_experts:
            parameters.add(inside)
        elif model.num_moe_layers() and kind in FEED_FORWARD:
            if lora.dora:
                raise UserError("lora.dora = True on feed-forward layers beside experts: PEFT 0.21 adapts "
                                "these as parameters, without DoRA; use `convert to-hf`")
            parameters.add(f"{inside}.weight")
        else:
            modules.add(kind)
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name,
            "inference_mode": True, "r": lora.rank, "lora_alpha": alpha, "lora_dropout": 0.0,
            "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": lora.dora,
            "target_modules": sorted(modules), "target_parameters": sorted(parameters) or None,
            "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "init_lora_weights": True}


def lora_of(config: dict[str, Any], names: Sequence[str], model: ModelConfig, where: object) -> LoraConfig:
    """Return the settings of a PEFT adapter.

    Args:
        config: the content of its adapter_config.json.
        names: of its tensors, which say what is adapted.
        model: the architecture of its base.
        where: the folder, for messages.

    Raises:
        UserError: it is no adapter that we have the like of; the message names the field or the tensor.
    """
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type = {config.get('peft_type')!r}; only LORA adapters can be read")
    unknown = [f"{name} = {value!r}" for name, value in config.items()
               if name not in _IGNORED and (value is True or value not in (None, False, {}, [], "none", 1))]
    if unknown or config.get("fan_in_fan_out"):
        raise UserError(f"{where}: {', '.join(unknown) or 'fan_in_fan_out = True'} in {CONFIG} cannot be "
                        "kept; merge the adapter with PEFT, and convert the merged model")
    started = config.get("init_lora_weights", True)
    if str(started).lower() not in _KEEP_THE_BASE:
        raise UserError(f"{where}: init_lora_weights = {started!r} in {CONFIG} has changed the base, and the "
                        "adapter belongs to what was left; merge it with PEFT, and convert the merged model")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if (isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= MAX_RANK
            or isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= MAX_ALPHA):
        raise UserError(f"{where}: r = {rank!r} and lora_alpha = {alpha!r} in {CONFIG} must be positive "
                        f"numbers, up to {MAX_RANK:,} and {MAX_ALPHA:g}; restore it from its source")
    scale = math.sqrt(rank) if config.get("use_rslora") else 1.0
    dora = bool(config.get("use_dora"))
    targets = _targets(set(names), model, dora, where)
    return LoraConfig(rank, float(alpha) * scale, targets, dora)


def _targets(names: set[str], model: ModelConfig, dora: bool, where: object) -> tuple[Any, ...]:
    """Return what a set of tensors adapts, which must be whole."""
    of_target: dict[str, set[str]] = {}
    tables = (HEAD, EMBEDDING)
    known: Any = adaptable(model)
    every = LoraConfig(1, 1.0, tuple(
        t for t in known if t not in tables or not (model.tied_embeddings or dora)))
    for of in adapted_modules(model, every):
        target = EXPERTS if of.num_experts else of.name.rpartition(".")[2]
        of_target.setdefault(target, set()).update(
            peft_name(of, tensor) for tensor in ((A, B, MAGNITUDE) if dora else (A, B)))
    unknown = sorted(names - {name for known in of_target.values() for name in known})
    vocabulary = [name for name in unknown if any(target in name for target in tables)]
    if vocabulary and model.tied_embeddings:
        raise UserError(f"{where}: {vocabulary[0]} adapts one side of a weight that is embedding and head "
                        "(model.tied_embeddings), so that no merged model could hold it; train an adapter "
                        "without it")
    if vocabulary and dora:
        raise UserError(f"{where}: {vocabulary[0]} under use_dora = True: DoRA is not built for "
                        f"{' and '.join(tables)}; merge the adapter with PEFT, and convert the merged model")
    if unknown:
        raise UserError(f"{where}: {unknown[0]} ({len(unknown)} such tensors) adapts nothing that can be "
                        f"adapted here ({', '.join(TARGETS[1:])})")
    found = tuple(target for target, known in of_target.items() if known & names)
    for target in found:
        missing = sorted(of_target[target] - names)
        if missing:
            raise UserError(f"{where}: adapts {target} in some layers and not in others (it lacks "
                            f"{missing[0]}), which cannot be said by lora.targets; merge it with PEFT, and "
                            "convert the merged model")
    if not found:
        raise UserError(f"{where}: holds no tensor of an adapter")
    return found


# An adapter's checkpoint read as the model that it makes of its base: W + alpha / rank B A.

def merged_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a model with its adapter merged: float32, or the base's wider one.

    An update of fine-tuning is smaller than the spacing of bfloat16 at most weights, so that a sum in the
    base's bfloat16 would be the base again (12 % of an update survived two steps at 2e-4).
    """
    return torch.promote_types(dtype, torch.float32)


def merge_adapter(weight: torch.Tensor, place: AdapterPlace, tensors: dict[str, torch.Tensor],
                  lora: LoraConfig) -> torch.Tensor:
    """Return a weight with its adapter merged, in `merged_dtype`; the caller rounds it once to the dtype that
    it writes.

    Args:
        weight: of the base, [rows, columns].
        place: which tensors of the adapter change the weight.
        tensors: the adapted module's, by name.
        lora: rank, scale and kind.
    """
    wide = merged_dtype(weight.dtype)
    a, b = (t.to(wide) for t in place.update(tensors))
    total = weight.to(wide) + lora.alpha / lora.rank * (b @ a)
    magnitude = tensors.get(place.of.key(MAGNITUDE))
    if magnitude is not None:
        # rounded as the trained lengths are: where these have not moved, rows stay as long as they were
        lengths = torch.linalg.vector_norm(total, dim=1).to(magnitude.dtype)
        total *= (magnitude.to(wide) / lengths.to(wide))[:, None]
    return total


class AdaptedWeights:
    """The tensors of an adapter's base with the adapter merged, all of them in `merged_dtype`."""

    def __init__(self, path: Path, base: AdapterBase) -> None:
        self.path, self.base = path, CheckpointWeights(found_base(path, base))
        settings = settings_of(path)
        self.model, self.links, self.lora = settings.model, self.base.links, settings.lora
        self._places, self._of_thread = places(self.model, self.lora), threading.local()
        self.reader = TensorReader(path, ADAPTER)
        """The adapter's own tensors."""
        expected: dict[str, tuple[int, ...]] = {}
        for of in adapted_modules(self.model, self.lora):
            expected |= of.shapes(self.lora)
        found = {key: self.reader.shape(key)
                 for key in self.reader.keys()}  # noqa: SIM118  (a method of the reader, not a dict)
        check_exact(path, found, expected, "the checkpoint is damaged or of another version")
        self.reader.check_complete()

    def names(self) -> list[str]:
        return self.base.names()

    def dtype(self, name: str) -> torch.dtype:
        # also of weights without an adapter: the config.json of a folder names one dtype, and readers round
        # to it
        return merged_dtype(self.base.dtype(name))

    def held_in(self, file: str) -> list[str]:
        """Return the adapter's tensors of which one of its files holds a block."""
        return self.reader.held_in(file)

    def files_of(self, name: str) -> set[str]:
        return {file for key in self._changing(name) for file in self.reader.files_of(key)}

    def _changing(self, name: str) -> list[str]:
        return list(self._places[name].of.shapes(self.lora)) if name in self._places else []

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor; `UserError` where a file is damaged."""
        weight = self.base.read(name)
        if name not in self._places:
            return weight.to(self.dtype(name))
        of = self._places[name].of
        # all experts of a layer come from one stack, which is therefore kept
        last: tuple[Adapted, dict[str, torch.Tensor]] | None = getattr(self._of_thread, "last", None)
        if last is None or last[0] is not of:
            self._of_thread.last = None
            last = self._of_thread.last = (of, {key: self.reader.read(key) for key in of.shapes(self.lora)})
        return merge_adapter(weight, self._places[name], last[1], self.lora)

    def update(self, name: str, merged: torch.Tensor) -> torch.Tensor | None:
        """Return what the adapter added to a weight, which `read` returned as `merged`; None: nothing."""
        return merged - self.base.read(name).to(merged.dtype) if name in self._places else None


class UpdateRounding:
    """How much of an adapter's update is lost where merged weights are written in a narrower dtype; threads
    may add weights at a time."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self._dtype = weights, ""
        self._squares: list[tuple[float, float]] = []
        """Of each rounded weight: the squared norms of rounding error and update."""

    def add(self, name: str, merged: torch.Tensor, dtype: torch.dtype) -> None:
        """Measure a weight that was read as `merged` and is rounded to `dtype`."""
        if not isinstance(self._weights, AdaptedWeights) or dtype.itemsize >= merged.dtype.itemsize:
            return
        if (update := self._weights.update(name, merged)) is not None:
            error = merged.double() - merged.to(dtype).double()
            self._squares.append((float(error.square().sum()), float(update.double().square().sum())))
            self._dtype = str(dtype).removeprefix("torch.")

    def describe(self) -> str:
        """Return the loss in words; "" if no adapted weight was rounded."""
        errors, updates = (sum(of[part] for of in self._squares) for part in (0, 1))
        return (f"rounding to {self._dtype} changes the adapted weights by {math.sqrt(errors / updates):.0%} "
                "of the adapter's own update") if updates else ""


def checkpoint_weights(path: Path) -> CheckpointWeights | AdaptedWeights:
    """Open a checkpoint: of an adapter as the model that it makes of its base.

    Raises:
        UserError: its tensors are not exactly those of its model, or its base is not there.
    """
    base = adapter_base(path)
    return CheckpointWeights(path) if base is None else AdaptedWeights(path, base)


def add_inputs(writer: ArtifactWriter, weights: Weights, *, leaves: bool = False) -> None:
    """Record what an artifact is made from, see `ArtifactWriter.add_input`: a checkpoint, and of an adapter
    its base."""
    writer.add_input(weights.path, leaves=leaves)
    if isinstance(weights, AdaptedWeights):
        writer.add_input(weights.base.path, leaves=leaves)


def adapter_facts(weights: Any) -> dict[str, Any]:
    """Return what `inspect` says about an adapter; empty: these are weights of their own."""
    if not isinstance(weights, AdaptedWeights):
        return {}
    lora = weights.lora
    count = sum(math.prod(shape) for of in adapted_modules(weights.model, lora)
                for shape in of.shapes(lora).values())
    return {"adapter": f"{'DoRA' if lora.dora else 'LoRA'}, rank {lora.rank}, alpha {lora.alpha:g}, of "
                       f"{', '.join(sorted(adapted(lora, weights.model)))}",
            "adapter_parameters": count, "base": str(weights.base.path)}


def to_peft(checkpoint: str | Path, out: str | Path, *, base_name: str | None = None,
            overwrite: bool = False) -> None:
    """Write an adapter as a folder for `PeftModel.from_pretrained` (an artifact of kind "peft_adapter").

    Args:
        checkpoint: an adapter's checkpoint, or a run's newest one.
        out: the folder to write; it appears only when complete.
        base_name: name or folder of the Hugging Face model that the adapter belongs to, for PEFT's
            settings; None: the name of the folder that its base was converted from, with a warning.
        overwrite: replace such a folder that is already there.

    Raises:
        UserError: it is no adapter, is damaged, or PEFT does not know its like.
    """
    refuse_other_kind(Path(checkpoint), (KIND, RUN), "an adapter's checkpoint or a run")
    checkpoint = newest_of_run(Path(checkpoint))
    base = adapter_base(checkpoint)
    if base is None:
        raise UserError(f"{checkpoint}: holds all weights and no adapter; use `megatron-sov convert to-hf`")
    settings = settings_of(checkpoint)
    config = peft_config(settings.model, settings.lora, base_name or base_name_of(checkpoint, base))
    if problem := damage(checkpoint, weights_only=True):
        raise UserError(f"{problem}; {instead_of(checkpoint)}")
    reader = TensorReader(checkpoint, ADAPTER)
    reader.check_complete()
    found = {peft_name(of, tensor): (of, tensor) for of in adapted_modules(settings.model, settings.lora)
             for tensor in _tensors(settings.lora.dora)}

    def read(name: str) -> torch.Tensor:
        of, tensor = found[name]
        return to_peft_shape(of, tensor, reader.read(of.key(tensor))).contiguous()

    if base_name is None:
        name = config["base_model_name_or_path"]
        warn(f"{Path(out) / CONFIG}: base_model_name_or_path = {name!r}, as this "
             "machine calls it; PEFT's users find the model by it, so pass --base-name where it has another "
             "name on the hub")
    with new_artifact(out, PEFT_ADAPTER, overwrite=overwrite) as artifact:
        specs = [TensorSpec(name, tuple(read(name).shape), reader.dtype(of.key(tensor)))
                 for name, (of, tensor) in sorted(found.items())]
        write_file(artifact.path / WEIGHTS, specs,
                   lambda spec: convert_tensor(read(spec.name), spec.dtype, checkpoint, spec.name))
        atomic_write(artifact.path / CONFIG, to_json(config))
        artifact.add_input(checkpoint, leaves=True)
        artifact.content = {"family": settings.model.family, "num_tensors": len(specs)}


def base_name_of(checkpoint: Path, base: AdapterBase) -> str:
    """Return what the base of an adapter is called: the model that it was converted from, else the run or
    folder that holds it."""
    try:
        name = read_manifest(found_base(checkpoint, base), KIND).content.get(SOURCE)
    except UserError:  # the adapter is whole without it
        name = None
    if isinstance(name, str):
        return name
    return (base.path.parent.parent if base.path.parent.name == CHECKPOINTS_OF_A_RUN else base.path).name


def from_peft(peft_dir: str | Path, out: str | Path, base: str | Path, *, overwrite: bool = False) -> None:
    """Write a PEFT adapter as a checkpoint (part "adapter", step 0), to train on or to merge.

    Args:
        peft_dir: a folder with adapter_config.json and adapter_model.safetensors.
        out: the checkpoint to write; it appears only when complete.
        base: the checkpoint of the model that it belongs to (`convert from-hf` makes one).
        overwrite: replace a checkpoint that is already there.

    Raises:
        UserError: the folder holds what we have no like of, or does not fit the base.
    """
    peft_dir = Path(peft_dir)
    refuse_other_kind(peft_dir, (PEFT_ADAPTER,), "a PEFT adapter")
    base = newest_of_run(Path(base))
    for file in (CONFIG, WEIGHTS):
        if not (peft_dir / file).is_file():
            raise UserError(f"{peft_dir}: has no {file}, so it is no PEFT adapter in safetensors; pass the "
                            "folder that `save_pretrained` wrote")
    refuse_missing(base)
    refuse_other_kind(base, (KIND,), "a checkpoint or a run")
    if adapter_base(base) is not None:
        raise UserError(f"--base {base}: is an adapter itself; name the checkpoint that it belongs to")
    model = CheckpointWeights(base).model
    if (peft_dir / MANIFEST).is_file() and (problems := damaged_files(peft_dir)):
        raise UserError(f"{problems[0]}; {DAMAGED_HF}")
    weights = TensorFile(peft_dir / WEIGHTS, DAMAGED_HF)
    frozen = frozen_copies(weights.entries)
    names = [name for name in weights.entries if name not in frozen]
    lora = lora_of(read_json(peft_dir / CONFIG), names, model, peft_dir)
    _refuse_trained(weights, frozen, CheckpointWeights(base))
    modules = adapted_modules(model, lora)
    settings = settings_of(base)
    keep_as_base(base.resolve())
    with new_artifact(out, KIND, overwrite=overwrite) as artifact:
        writer = TensorWriter(artifact.path, ADAPTER)
        for of in modules:
            for tensor in _tensors(lora.dora):
                key = of.key(tensor)
                shape = of.shapes(lora)[key]
                writer.add(key, from_peft_shape(of, tensor, _read(weights, of, tensor, shape), shape))
        write_index(artifact.path, ADAPTER, [writer.finish()])
        artifact.known_files |= writer.files
        if (base / "tokenizer").is_dir():
            shutil.copytree(base / "tokenizer", artifact.path / "tokenizer",
                            ignore=shutil.ignore_patterns(MANIFEST))
        artifact.add_input(base)
        artifact.content = {"step": 0, "tokens": 0, "parts": [ADAPTER], BASE: AdapterBase.of(base).to_dict()}
        artifact.settings = dataclasses.replace(settings, recipe=IMPORTED, lora=lora).to_dict()


def _tensors(dora: bool) -> tuple[str, ...]:
    return (A, B, MAGNITUDE) if dora else (A, B)


def _refuse_trained(weights: TensorFile, frozen: dict[str, str], base: CheckpointWeights) -> None:
    """Raise `UserError` where what PEFT saved of the base is not what the base has."""
    for theirs, ours in frozen.items():
        found = weights.read(theirs)
        if ours not in base.names() or not found.equal(base.read(ours).to(found.dtype)):
            raise UserError(f"{weights.path}: {theirs} is not the base's {ours}, so it was trained beside "
                            "the adapter or is of another model; merge it with PEFT, and convert the merged "
                            "model")


def _read(weights: TensorFile, of: Adapted, tensor: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return one tensor of a PEFT folder, whose dtype and shape fit."""
    name = peft_name(of, tensor)
    theirs = weights.read(name)
    expected = tuple(to_peft_shape(of, tensor, torch.empty(shape, device="meta")).shape)
    if theirs.dtype not in FLOATS or tuple(theirs.shape) != expected:
        raise UserError(f"{weights.path}: {name} is {theirs.dtype} {list(theirs.shape)}, and the base needs "
                        f"floating-point numbers {list(expected)}; was it trained on another model?")
    return convert_tensor(theirs, theirs.dtype, weights.path, name)


def open_weights(path: str | Path) -> Weights:
    """Open a checkpoint, the newest checkpoint of a run, or a Hugging Face folder.

    An adapter's checkpoint is opened as the model that it makes of its base.

    Raises:
        UserError: it is none of them, or its tensors are not exactly those of its model.
    """
    refuse_missing(Path(path))
    path = newest_of_run(Path(path))
    refuse_no_model(path)
    if (path / HF_CONFIG).is_file():
        return HfWeights(path)
    return checkpoint_weights(path)
