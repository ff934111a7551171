"""Convert adapter checkpoints to and from PEFT folders, and merge adapters into base weights."""

import dataclasses
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.artifacts import (
    MANIFEST, ArtifactWriter, create_artifact, find_damaged_files, format_json, read_manifest,
    write_atomically)
from megatron_sov.base.errors import Fix, UserError, warn
from megatron_sov.checkpoint.safetensors_files import TensorFile, TensorSpec, write_tensors
from megatron_sov.checkpoint.sharded_tensors import TensorReader, TensorWriter, write_index
from megatron_sov.convert.dtypes import convert_tensor
from megatron_sov.convert.sources import FLOATS, CheckpointWeights, HfWeights, Weights, resolve_run
from megatron_sov.model.config import LoraConfig, ModelConfig
from megatron_sov.model.config.lora import EMBEDDING, EXPERTS, FEED_FORWARD, HEAD
from megatron_sov.model.families.adapters import (
    MAGNITUDE, A, AdaptedModule, AdapterPlace, B, find_adaptable_modules, find_adapted_modules,
    find_adapter_places, resolve_targets)
from megatron_sov.model.pretrained import CONFIG as HF_CONFIG, DAMAGED_HF, read_json
from megatron_sov.runs.checkpoints import (
    ADAPTER, BASE, CHECKPOINT_KIND, CHECKPOINTS_FOLDER, IMPORTED_RECIPE, PEFT_ADAPTER, RUN, SOURCE,
    AdapterBase, check_folder_kind, check_model_folder, check_model_path, find_adapter_base, find_damage,
    protect_adapter_base, read_adapter_base, read_checkpoint_settings, suggest_replacement)

# Names, shapes and settings of PEFT (0.21.2). The factors A and B of a linear layer have the layer's name.
# Stacked experts are parameters, not layers: PEFT wraps their module twice, with gate and up projections
# inside (`base_layer`), and concatenates the A of all experts along the rows and their B along the columns.
# In families with experts, `gate_proj` in `target_modules` means these stacks, so shared experts and dense
# layers must be listed in `target_parameters`; their tensors keep the same names. The factors of an embedding
# are transposed, with names swapped. Next to an adapter of embedding or head, PEFT saves the frozen weight
# too.

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_SUFFIXES = {A: ".lora_A.weight", B: ".lora_B.weight", MAGNITUDE: ".lora_magnitude_vector"}
_EMBEDDING_SUFFIXES = {A: ".lora_embedding_B", B: ".lora_embedding_A"}
_FROZEN = ".base_layer.weight"
MAX_RANK, MAX_ALPHA = 1 << 20, 1e30
"""Maximum plausible settings; larger values would overflow derived sizes and scales."""
_IGNORED = ("inference_mode", "lora_dropout", "task_type", "init_lora_weights", "base_model_name_or_path",
            "revision", "auto_mapping", "peft_version", "r", "lora_alpha", "target_modules", "peft_type",
            "target_parameters", "use_dora", "use_rslora", "megatron_core", "loftq_config",
            "runtime_config", "qalora_group_size", "fan_in_fan_out", "exclude_modules")
"""Fields in adapter_config.json that are handled, or that do not affect a trained adapter."""
_UNCHANGED_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
"""`init_lora_weights` values that leave the base unchanged; others, such as PiSSA, modify it."""


def format_peft_name(module: AdaptedModule, tensor: str) -> str:
    """Return PEFT's name for a module's tensor `A`, `B` or `MAGNITUDE`."""
    folder = module.name
    if is_embedding(module):
        return f"{_PREFIX}{folder}{_EMBEDDING_SUFFIXES[tensor]}"
    if module.num_experts:
        folder = module.name.rpartition(".")[0] + (".base_layer" if module.halves > 1 else "")
    return f"{_PREFIX}{folder}{_SUFFIXES[tensor]}"


def is_embedding(module: AdaptedModule) -> bool:
    return module.name.endswith(f".{EMBEDDING}")


def find_frozen_copies(names: Iterable[str]) -> dict[str, str]:
    """Return PEFT name -> base name for frozen weights that a PEFT folder contains."""
    return {name: name.removeprefix(_PREFIX).removesuffix(_FROZEN) + ".weight" for name in names
            if name.endswith((f"{HEAD}{_FROZEN}", f"{EMBEDDING}{_FROZEN}"))}


def to_peft_shape(module: AdaptedModule, tensor: str, value: torch.Tensor) -> torch.Tensor:
    """Convert an adapter tensor to the PEFT layout; inverse of `from_peft_shape`."""
    if is_embedding(module):
        return value.T
    if not module.num_experts:
        return value
    if tensor == A:
        return value.flatten(0, 1)
    stacked = value.reshape(module.num_experts, module.out_features, -1)
    return stacked.permute(1, 2, 0).reshape(module.out_features, -1)


def from_peft_shape(module: AdaptedModule, tensor: str, value: torch.Tensor,
                    shape: Sequence[int]) -> torch.Tensor:
    """Convert a PEFT tensor to our layout with `shape`; inverse of `to_peft_shape`."""
    if is_embedding(module):
        return value.T.contiguous()
    if module.num_experts and tensor == B:
        value = value.reshape(module.out_features, -1, module.num_experts).permute(2, 0, 1)
    return value.reshape(*shape).contiguous()


def build_peft_config(model: ModelConfig, lora: LoraConfig, base_name: str) -> dict[str, Any]:
    """Return adapter_config.json. Raises `UserError`: PEFT does not support the adapter."""
    modules: set[str] = set()
    parameters: set[str] = set()
    for module in find_adapted_modules(model, lora):
        kind = module.name.rpartition(".")[2]
        name_in_layer = module.name.removeprefix("model.layers.").partition(".")[2]
        if module.num_experts:
            parameters.add(name_in_layer)
        elif model.num_moe_layers() and kind in FEED_FORWARD:
            if lora.dora:
                raise UserError("lora.dora = True on feed-forward layers next to experts: PEFT 0.21 adapts "
                                "them as parameters, without DoRA; use `convert to-hf`")
            parameters.add(f"{name_in_layer}.weight")
        else:
            modules.add(kind)
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name,
            "inference_mode": True, "r": lora.rank, "lora_alpha": alpha, "lora_dropout": 0.0,
            "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": lora.dora,
            "target_modules": sorted(modules), "target_parameters": sorted(parameters) or None,
            "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "init_lora_weights": True}


def parse_lora_config(config: dict[str, Any], names: Sequence[str], model: ModelConfig,
                      where: object) -> LoraConfig:
    """Convert adapter_config.json of an adapter of the base `model`; the tensor `names` determine the
    targets. Raises `UserError`: the adapter in folder `where` is not supported; the message names the field
    or tensor."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type = {config.get('peft_type')!r}; only LORA adapters can be read")
    unknown = [f"{name} = {value!r}" for name, value in config.items()
               if name not in _IGNORED and (value is True or value not in (None, False, {}, [], "none", 1))]
    if unknown or config.get("fan_in_fan_out"):
        raise UserError(f"{where}: {', '.join(unknown) or 'fan_in_fan_out = True'} in {CONFIG} is not "
                        "supported; merge the adapter with PEFT, and convert the merged model")
    initialization = config.get("init_lora_weights", True)
    if str(initialization).lower() not in _UNCHANGED_BASE:
        raise UserError(f"{where}: init_lora_weights = {initialization!r} in {CONFIG} modified the base "
                        "weights, and the adapter is relative to them; merge it with PEFT, and convert the "
                        "merged model")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if (isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= MAX_RANK
            or isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= MAX_ALPHA):
        raise UserError(f"{where}: r = {rank!r} and lora_alpha = {alpha!r} in {CONFIG} must be positive "
                        f"numbers, up to {MAX_RANK:,} and {MAX_ALPHA:g}; restore it from its source")
    scale = math.sqrt(rank) if config.get("use_rslora") else 1.0
    dora = bool(config.get("use_dora"))
    targets = _find_targets(set(names), model, dora, where)
    return LoraConfig(rank, float(alpha) * scale, targets, dora)


def _find_targets(names: set[str], model: ModelConfig, dora: bool, where: object) -> tuple[Any, ...]:
    """Return the targets that the tensor names adapt; each target must be adapted in every layer."""
    names_by_target: dict[str, set[str]] = {}
    tables = (HEAD, EMBEDDING)
    target_names: Any = find_adaptable_modules(model)
    allows_tables = not (model.tied_embeddings or dora)
    all_targets = LoraConfig(1, 1.0, tuple(t for t in target_names if t not in tables or allows_tables))
    tensors = (A, B, MAGNITUDE) if dora else (A, B)
    for module in find_adapted_modules(model, all_targets):
        target = EXPERTS if module.num_experts else module.name.rpartition(".")[2]
        names_by_target.setdefault(target, set()).update(format_peft_name(module, name) for name in tensors)
    unknown = sorted(names.difference(*names_by_target.values()))
    vocabulary = [name for name in unknown if any(target in name for target in tables)]
    if vocabulary and model.tied_embeddings:
        raise UserError(f"{where}: {vocabulary[0]} adapts one of two uses of a weight that is both embedding "
                        "and head (model.tied_embeddings), so it cannot be merged; train an adapter without "
                        "it")
    if vocabulary and dora:
        raise UserError(f"{where}: {vocabulary[0]} with use_dora = True: DoRA is not supported for "
                        f"{' and '.join(tables)}; merge the adapter with PEFT, and convert the merged model")
    if unknown:
        similar = sorted(names_by_target.get("".join(unknown[0].split(".")[-3:-2]), names_by_target))[:4]
        raise UserError(f"{where}: {unknown[0]} ({len(unknown)} such tensors) is not an adapter "
                        f"of a module of --base, which has {', '.join(similar)}; pass the adapter's own base")
    targets = tuple(target for target, tensors in names_by_target.items() if tensors & names)
    for target in targets:
        missing = sorted(names_by_target[target] - names)
        if missing:
            raise UserError(f"{where}: adapts {target} in some layers only (it lacks {missing[0]}), which "
                            "lora.targets cannot express; merge it with PEFT, and convert the merged model")
    if not targets:
        raise UserError(f"{where}: has no adapter tensors")
    return targets


# The merged model of an adapter checkpoint: W + alpha / rank * B A.

def get_merged_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for merged weights: float32, or a wider base dtype.

    Updates are smaller than the bfloat16 spacing of most weights, so a bfloat16 sum would drop them (12 % of
    an update survived after two steps at learning rate 2e-4).
    """
    return torch.promote_types(dtype, torch.float32)


def merge_adapter(weight: torch.Tensor, place: AdapterPlace, tensors: dict[str, torch.Tensor],
                  lora: LoraConfig) -> torch.Tensor:
    """Merge `weight` [rows, columns] with the adapter tensors that `place` selects from `tensors`, in the
    dtype of `get_merged_dtype`; the caller rounds it once."""
    wide = get_merged_dtype(weight.dtype)
    a, b = (t.to(wide) for t in place.update(tensors))
    total = weight.to(wide) + lora.alpha / lora.rank * (b @ a)
    magnitude = tensors.get(place.of.key(MAGNITUDE))
    if magnitude is not None:
        # round as DoRA training does: rows with an unchanged magnitude keep the exact length
        lengths = torch.linalg.vector_norm(total, dim=1).to(magnitude.dtype)
        total *= (magnitude.to(wide) / lengths.to(wide))[:, None]
    return total


class AdaptedWeights(Weights):
    """An adapter's base tensors with the adapter merged, in the dtype of `get_merged_dtype`."""

    def __init__(self, path: Path, base: AdapterBase) -> None:
        self.base = CheckpointWeights(find_adapter_base(path, base))
        settings = read_checkpoint_settings(path)
        super().__init__(path, settings.model, self.base.links)
        self.lora = settings.lora
        self._places = find_adapter_places(self.model, self.lora)
        self.tensors = TensorReader(path, ADAPTER)
        expected: dict[str, tuple[int, ...]] = {}
        for module in find_adapted_modules(self.model, self.lora):
            expected |= module.shapes(self.lora)
        self.check_tensors(self.tensors.keys(), expected)

    def get_dtype(self, name: str) -> torch.dtype:
        # applies to every weight: config.json names a single dtype, and programs cast weights to that dtype
        return get_merged_dtype(self.base.get_dtype(name))

    def list_files(self, name: str) -> set[str]:
        keys = self._places[name].of.shapes(self.lora) if name in self._places else ()
        return {file for key in keys for file in self.tensors.list_files(key)}

    def read(self, name: str) -> torch.Tensor:
        weight = self.base.read(name)
        if name not in self._places:
            return weight.to(self.get_dtype(name))
        module = self._places[name].of
        # experts of a layer come from the same stacked factors
        factors = self.cache_last(module, lambda: {key: self.tensors.read(key)
                                                   for key in module.shapes(self.lora)})
        return merge_adapter(weight, self._places[name], factors, self.lora)

    def compute_update(self, name: str, merged: torch.Tensor) -> torch.Tensor | None:
        """Return the adapter's change to a weight that `read` returned as `merged`; None without adapter."""
        return merged - self.base.read(name).to(merged.dtype) if name in self._places else None


class UpdateRounding:
    """Rounding error in merged weights relative to the adapter's update; thread-safe."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self._dtype = weights, ""
        self._squares: list[tuple[float, float]] = []
        """(squared norm of the rounding error, squared norm of the update) per rounded weight."""

    def measure_weight(self, name: str, merged: torch.Tensor, dtype: torch.dtype) -> None:
        """Measure the rounding of weight `merged` to `dtype`."""
        if not isinstance(self._weights, AdaptedWeights) or dtype.itemsize >= merged.dtype.itemsize:
            return
        if (update := self._weights.compute_update(name, merged)) is not None:
            error = merged.double() - merged.to(dtype).double()
            self._squares.append((float(error.square().sum()), float(update.double().square().sum())))
            self._dtype = str(dtype).removeprefix("torch.")

    def format_loss(self) -> str:
        """Return the relative error as text; "" if no adapted weight was rounded."""
        errors = sum(error for error, _ in self._squares)
        updates = sum(update for _, update in self._squares)
        if not updates:
            return ""
        return (f"rounding to {self._dtype} changes the adapted weights by {math.sqrt(errors / updates):.0%} "
                "of the adapter's own update")


def open_checkpoint_weights(path: Path) -> CheckpointWeights | AdaptedWeights:
    """Open a checkpoint; adapters are merged. Raises `UserError`: other tensors, or the base is missing."""
    base = read_adapter_base(path)
    return CheckpointWeights(path) if base is None else AdaptedWeights(path, base)


def record_inputs(writer: ArtifactWriter, weights: Weights, *, for_export: bool = False) -> None:
    """Record a checkpoint and, for adapters, the base as artifact inputs (`ArtifactWriter.add_input`)."""
    writer.add_input(weights.path, for_export=for_export)
    if isinstance(weights, AdaptedWeights):
        writer.add_input(weights.base.path, for_export=for_export)


def describe_adapter(weights: Any) -> dict[str, Any]:
    """Return the facts that `inspect` prints about an adapter; {} for weights without adapter."""
    if not isinstance(weights, AdaptedWeights):
        return {}
    lora = weights.lora
    count = sum(math.prod(shape) for module in find_adapted_modules(weights.model, lora)
                for shape in module.shapes(lora).values())
    return {"adapter": f"{'DoRA' if lora.dora else 'LoRA'}, rank {lora.rank}, alpha {lora.alpha:g}, of "
                       f"{', '.join(sorted(resolve_targets(lora, weights.model)))}",
            "adapter_parameters": count, "base": str(weights.base.path)}


def to_peft(checkpoint: str | Path, out: str | Path, *, base_name: str | None = None,
            overwrite: bool = False) -> None:
    """Write the adapter of a checkpoint, or of a run's newest one, as a folder for
    `PeftModel.from_pretrained` (artifact kind `peft_adapter`), which appears when complete.

    `base_name`: Hugging Face model that PEFT loads as the base; None uses the folder name of the imported
    model, with a warning. Raises `UserError`: `checkpoint` is not an adapter or is damaged, or PEFT does not
    support the adapter.
    """
    check_folder_kind(Path(checkpoint), (CHECKPOINT_KIND, RUN), "an adapter's checkpoint or a run")
    checkpoint = resolve_run(Path(checkpoint))
    base = read_adapter_base(checkpoint)
    if base is None:
        raise UserError(f"{checkpoint}: contains all weights, not an adapter; use `megatron-sov convert "
                        "to-hf`", Fix(command="convert to-hf"))
    settings = read_checkpoint_settings(checkpoint)
    config = build_peft_config(settings.model, settings.lora, base_name or get_base_name(checkpoint, base))
    if problem := find_damage(checkpoint, weights_only=True):
        raise UserError(f"{problem}; {suggest_replacement(checkpoint)}")
    reader = TensorReader(checkpoint, ADAPTER)
    reader.check_complete()
    factors = {format_peft_name(module, tensor): (module, tensor)
               for module in find_adapted_modules(settings.model, settings.lora)
               for tensor in _list_factors(settings.lora.dora)}

    def read(name: str) -> torch.Tensor:
        module, tensor = factors[name]
        return to_peft_shape(module, tensor, reader.read(module.key(tensor))).contiguous()

    if base_name is None:
        name = config["base_model_name_or_path"]
        warn(f"{Path(out) / CONFIG}: base_model_name_or_path = {name!r}, the local name of the base; PEFT "
             "loads the base by this name, so pass --base-name if it has another name on the Hub")
    with create_artifact(out, PEFT_ADAPTER, overwrite=overwrite) as artifact:
        specs = [TensorSpec(name, tuple(read(name).shape), reader.get_dtype(module.key(tensor)))
                 for name, (module, tensor) in sorted(factors.items())]
        write_tensors(artifact.path / WEIGHTS, specs,
                      lambda spec: convert_tensor(read(spec.name), spec.dtype, checkpoint, spec.name))
        write_atomically(artifact.path / CONFIG, format_json(config))
        artifact.add_input(checkpoint, for_export=True)
        artifact.content = {"family": settings.model.family, "num_tensors": len(specs)}


def get_base_name(checkpoint: Path, base: AdapterBase) -> str:
    """Return the imported base model's name, otherwise the name of the base's run or folder."""
    try:
        name = read_manifest(find_adapter_base(checkpoint, base), CHECKPOINT_KIND).content.get(SOURCE)
    except UserError:  # the adapter can be exported without the base
        name = None
    if isinstance(name, str):
        return name
    return (base.path.parent.parent if base.path.parent.name == CHECKPOINTS_FOLDER else base.path).name


def from_peft(peft_dir: str | Path, out: str | Path, base: str | Path, *, overwrite: bool = False) -> None:
    """Write a PEFT adapter as a checkpoint (part `adapter`, step 0), to train or to merge, which appears when
    complete. `base`: checkpoint of the base model, e.g. from `convert from-hf`. Raises `UserError`: the
    adapter is not supported, or does not match the base."""
    peft_dir = Path(peft_dir)
    check_folder_kind(peft_dir, (PEFT_ADAPTER,), "a PEFT adapter")
    base = resolve_run(Path(base))
    for file in (CONFIG, WEIGHTS):
        if not (peft_dir / file).is_file():
            raise UserError(f"{peft_dir}: has no {file}, so it is not a PEFT adapter in safetensors format; "
                            "pass a folder written by `save_pretrained`")
    check_model_path(base)
    check_folder_kind(base, (CHECKPOINT_KIND,), "a checkpoint or a run")
    if read_adapter_base(base) is not None:
        raise UserError(f"--base {base}: is an adapter itself; pass the checkpoint of its base model")
    model = CheckpointWeights(base).model
    if (peft_dir / MANIFEST).is_file() and (problems := find_damaged_files(peft_dir)):
        raise UserError(f"{problems[0]}; {DAMAGED_HF}")
    weights = TensorFile(peft_dir / WEIGHTS, DAMAGED_HF)
    frozen = find_frozen_copies(weights.entries)
    names = [name for name in weights.entries if name not in frozen]
    lora = parse_lora_config(read_json(peft_dir / CONFIG), names, model, peft_dir)
    _check_frozen_weights(weights, frozen, CheckpointWeights(base))
    modules = find_adapted_modules(model, lora)
    settings = read_checkpoint_settings(base)
    protect_adapter_base(base.resolve())
    with create_artifact(out, CHECKPOINT_KIND, overwrite=overwrite) as artifact:
        writer = TensorWriter(artifact.path, ADAPTER)
        for module in modules:
            for tensor in _list_factors(lora.dora):
                key = module.key(tensor)
                shape = module.shapes(lora)[key]
                value = _read_factor(weights, module, tensor, shape)
                writer.add(key, from_peft_shape(module, tensor, value, shape))
        write_index(artifact.path, ADAPTER, [writer.finish()])
        artifact.hashed_files |= writer.files
        if (base / "tokenizer").is_dir():
            shutil.copytree(base / "tokenizer", artifact.path / "tokenizer",
                            ignore=shutil.ignore_patterns(MANIFEST))
        artifact.add_input(base)
        artifact.content = {"step": 0, "tokens": 0, "parts": [ADAPTER],
                            BASE: AdapterBase.from_checkpoint(base).to_dict()}
        artifact.settings = dataclasses.replace(settings, recipe=IMPORTED_RECIPE, lora=lora).to_dict()


def _list_factors(dora: bool) -> tuple[str, ...]:
    return (A, B, MAGNITUDE) if dora else (A, B)


def _check_frozen_weights(weights: TensorFile, frozen: dict[str, str], base: CheckpointWeights) -> None:
    """Raise `UserError` if a frozen weight saved by PEFT differs from the base."""
    for peft_key, base_name in frozen.items():
        saved = weights.read(peft_key)
        if base_name not in base.list_names() or not saved.equal(base.read(base_name).to(saved.dtype)):
            raise UserError(f"{weights.path}: {peft_key} differs from the base's {base_name}, so it was "
                            "trained together with the adapter or belongs to another model; merge it with "
                            "PEFT, and convert the merged model")


def _read_factor(weights: TensorFile, module: AdaptedModule, tensor: str,
                 shape: tuple[int, ...]) -> torch.Tensor:
    """Read a tensor from a PEFT folder, and check dtype and shape."""
    name = format_peft_name(module, tensor)
    value = weights.read(name)
    expected = tuple(to_peft_shape(module, tensor, torch.empty(shape, device="meta")).shape)
    if value.dtype not in FLOATS or tuple(value.shape) != expected:
        raise UserError(f"{weights.path}: {name} is {value.dtype} {list(value.shape)}, but the base needs "
                        f"floating-point numbers {list(expected)}; was it trained on another model?")
    return convert_tensor(value, value.dtype, weights.path, name)


def open_weights(path: str | Path) -> Weights:
    """Open a checkpoint, the newest checkpoint of a run, or a Hugging Face folder; adapters are merged.
    Raises `UserError`: `path` is none of these, or tensors do not match the model."""
    check_model_path(Path(path))
    path = resolve_run(Path(path))
    check_model_folder(path)
    if (path / HF_CONFIG).is_file():
        return HfWeights(path)
    return open_checkpoint_weights(path)
