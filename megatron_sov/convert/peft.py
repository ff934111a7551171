"""An adapter's checkpoint becomes a folder that PEFT loads, and such a folder an adapter's checkpoint."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from megatron_sov.artifacts import MANIFEST, atomic_write, damaged_files, new_artifact, read_manifest, to_json
from megatron_sov.convert.peft_format import (
    CONFIG,
    WEIGHTS,
    from_peft_shape,
    frozen_copies,
    lora_of,
    peft_config,
    peft_name,
    to_peft_shape,
)
from megatron_sov.convert.sources import FLOATS, CheckpointWeights, newest_of_run
from megatron_sov.convert.values import converted
from megatron_sov.errors import UserError
from megatron_sov.mcore.checkpoint.safetensors_file import TensorFile
from megatron_sov.mcore.checkpoint.sharded_tensors import TensorReader, TensorWriter, write_index
from megatron_sov.mcore.checkpoint.writer import TensorSpec, write_file
from megatron_sov.models.adapters import MAGNITUDE, A, Adapted, B, adapted_modules
from megatron_sov.obs.warning import warn
from megatron_sov.pretrained import DAMAGED_HF, read_json
from megatron_sov.runs.checkpoints import (
    ADAPTER,
    BASE,
    CHECKPOINTS_OF_A_RUN,
    IMPORTED,
    KIND,
    PEFT_ADAPTER,
    RUN,
    SOURCE,
    AdapterBase,
    adapter_base,
    damage,
    found_base,
    instead_of,
    keep_as_base,
    refuse_missing,
    refuse_other_kind,
    settings_of,
)


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
                   lambda spec: converted(read(spec.name), spec.dtype, checkpoint, spec.name))
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
    return converted(theirs, theirs.dtype, weights.path, name)
