"""Import torch.distributed checkpoints (DCP) of torchtitan, or of a torch loop on a transformers model."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.artifacts import check_output_folder
from megatron_sov.base.errors import UserError
from megatron_sov.convert import DEFAULT_WORKERS
from megatron_sov.convert.companion_files import read_token_ids
from megatron_sov.convert.dcp.names import EMBEDDINGS, TITAN_BIAS, Part, check_names, list_forms, order_rotary
from megatron_sov.convert.dcp.to_dcp import STATE_NAMES
from megatron_sov.convert.dtypes import KEEP, check_dtype_name, choose_dtype
from megatron_sov.convert.hf_import import (
    ImportSource, StateBlock, TrainingState, list_states, write_imported)
from megatron_sov.convert.megatron.from_megatron import (
    METADATA, DistTensors, ImportReport, add_entry, read_adamw, read_numbers, read_objects)
from megatron_sov.convert.megatron.inert_pickle import (
    MAX_SIZE, TORCH_STATE_KEY, TRAINING_PREFIXES, parse_file, read_index)
from megatron_sov.convert.sources import BlockPlace, Weights, check_dtypes, check_shapes, has_same_bits
from megatron_sov.engine.optimizer.state_shards import MASTER
from megatron_sov.engine.parallel.device import PRECISION
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.weights import Link
from megatron_sov.model.pretrained import CONFIG, EMBEDDING, HEAD, format_names, read_json
from megatron_sov.runs.checkpoints import CHECKPOINT_KIND, checkpoint_step

STEP = "step"
"""Torch's name of AdamW's update count."""
COUNTER_KEY = re.compile(r"(?:.+\.)?(lr_scheduler\.last_epoch|train_state\.step)")
SCHEDULER_KEY = re.compile(r"(?:.+\.)?lr_scheduler\.(.+)")


def from_dcp(folder: str | Path, out: str | Path, dtype: str = KEEP, *, model_dir: Path | None = None,
             weights_only: bool = False, workers: int = DEFAULT_WORKERS, overwrite: bool = False,
             redo: bool = False) -> ImportReport:
    """Convert a DCP checkpoint to this project's format, with AdamW's state; weights that are stored in 16
    bits become float32 masters too.

    `folder` has `.metadata` or folders `step-N`; `model_dir` has config.json and tokenizer (default: `folder`
    or its parent folder). For the other arguments see `from_megatron`. Raises `UserError`: the index contains
    forbidden names, or a tensor is missing, unexpected or damaged.
    """
    out = Path(out)
    check_dtype_name(dtype)
    check_output_folder(out, CHECKPOINT_KIND, overwrite)
    step_folder = _find_step(Path(folder))
    model_folder = model_dir or _find_model_folder(step_folder)
    weights = DcpWeights(step_folder, read_json(model_folder / CONFIG), with_optimizer=not weights_only)
    check_dtypes(weights)
    written_dtype = choose_dtype(dtype, fp32=False, stored_dtype=weights.get_dtype(EMBEDDING))
    states = weights.list_states(written_dtype)
    training = weights.describe_training(written_dtype) if states else None
    origin = {"path": str(step_folder),
              "index_sha256": hashlib.sha256((step_folder / METADATA).read_bytes()).hexdigest()}
    source = ImportSource(weights, "from-dcp", tokenizer=model_folder, tokens=read_token_ids(model_folder),
                          content={"from_dcp": origin}, states=states, training=training)
    write_imported(out, source, dtype, workers=workers, overwrite=overwrite, redo=redo)
    return ImportReport(None, 0, weights.num_skipped, weights.model, training)


def _find_step(folder: Path) -> Path:
    if (folder / METADATA).is_file():
        return folder
    steps = [path for path in folder.glob("step-*")
             if path.name[5:].isdecimal() and (path / METADATA).is_file()]
    if not steps:
        raise UserError(f"{folder}: has no {METADATA}, and no folder step-N with one; pass a complete "
                        "torch.distributed checkpoint, or one of Megatron-LM to `megatron-sov convert "
                        "from-megatron`")
    return max(steps, key=checkpoint_step)


def _find_model_folder(step_folder: Path) -> Path:
    for folder in (step_folder, step_folder.absolute().parent):
        if (folder / CONFIG).is_file():
            return folder
    raise UserError(f"{step_folder}: has no {CONFIG} with the architecture; pass the folder of the Hugging "
                    "Face model with --model")


class DcpWeights(Weights):
    """Tensors of a DCP checkpoint, split into Hugging Face tensors. Raises `UserError`: the tensors do not
    match the model of config.json; the message names them."""

    def __init__(self, path: Path, config: dict[str, Any], *, with_optimizer: bool) -> None:
        index = parse_file(read_index, path / METADATA)
        self._names, prefix = _find_names(path, index["tensors"])
        weights: dict[str, Any] = {}
        states: dict[str, Any] = {}
        for key, entry in index["tensors"].items():
            if match := TORCH_STATE_KEY.fullmatch(key):
                add_entry(path, states, f"{match[2]}/{match[1]}", entry)
            elif key.startswith(prefix) and not key.startswith(TRAINING_PREFIXES):
                weights[key.removeprefix(prefix)] = entry
        self.num_skipped: int = index["num_skipped"] + (0 if with_optimizer else len(states))
        """Omitted optimizer tensors."""
        self._objects: dict[str, Any] = index["objects"]
        entries = weights | states if with_optimizer else weights
        self._stored = {key: tuple(shape) for key, (_, shape, _) in entries.items()}
        try:
            family = models.get_family(str(config.get("model_type")))
            model = family.from_hf_config(config, weights)
            check_names(self._names, model)
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
        super().__init__(path, model, family.links(model))
        self.tensors = DistTensors(path, entries)
        self._check_shapes()
        self.tensors.check_complete()

    def locate(self, link: Link, state: str = "") -> list[BlockPlace]:
        return [part.place for part in self._list_parts(link, state)]

    def read_block(self, link: Link, state: str = "") -> torch.Tensor:
        tensors: dict[str, torch.Tensor] = {}
        for part in self._list_parts(link, state):
            block = self.tensors.read(*part.place).reshape(part.shape)
            tensors |= link.split(block) if len(part.names) > 1 else {part.names[0]: block}
        joined: torch.Tensor = link.join({
            name: order_rotary(self._names, self.model, name, tensor, inverse=True)
            for name, tensor in tensors.items()})
        return joined

    def list_states(self, dtype: torch.dtype) -> list[StateBlock]:
        """Return moments or momentum and, for weights written in 16 bits, masters; [] without optimizer."""
        if not any("/" in key for key in self._stored):
            return []
        masters = {MASTER: ""} if dtype.itemsize < torch.float32.itemsize else {}
        return list_states(self, lambda link: self._get_states(link) | masters)

    def _get_states(self, link: Link) -> dict[str, str]:
        """Return our name -> torch's name of a weight's moments: Muon's momentum, if stored, or AdamW's."""
        is_muon = all(part.key in self._stored for part in self._list_parts(link, STATE_NAMES["momentum"]))
        return {ours: theirs for ours, theirs in STATE_NAMES.items() if (ours == "momentum") == is_muon}

    def describe_training(self, dtype: torch.dtype) -> TrainingState:
        """Return the state to continue from. Raises `UserError`: AdamW has no step count, or several."""
        counts: dict[float, str] = {}
        for key in self._stored:
            if key.startswith(f"{STEP}/"):
                counts.setdefault(self.tensors.read(key).item(), key)
        if not counts:
            raise UserError(f"{self.path}: its optimizer has no step count of AdamW; pass --weights-only")
        if len(counts) > 1:
            (first, key), (second, other), *_ = counts.items()
            raise UserError(f"{self.path}: its optimizer counts {first:g} updates in {key} and {second:g} in "
                            f"{other}, but a run has one count; pass --weights-only")
        steps = [value for value in read_objects(self.path, self._objects, COUNTER_KEY).values()
                 if type(value) is int]
        values = {"updates": next(iter(counts)), STEP: next(iter([*steps, *counts]))}
        numbers = read_numbers(self.path, values, {name: name for name in values})
        settings = self._read_settings(self._list_parts(self._links_by_name[EMBEDDING])[0].key)
        step = int(numbers[STEP])
        if schedule := self._read_schedule(step, settings.get("optim.lr", 0.0)):
            # our first step has the rate after a step of the schedule, torch's has the rate before it
            settings, step = settings | schedule, max(0, step - 1)
        precisions = [f"train.precision={name}" for name, value in PRECISION.items() if value == dtype]
        return TrainingState(step, int(numbers["updates"]),
                             (*precisions, *(f"{name}={value}" for name, value in settings.items())))

    def _read_settings(self, parameter: str) -> dict[str, Any]:
        """Return our settings for the parameter group of a matrix."""
        group = read_objects(self.path, self._objects,
                             re.compile(rf".+\.param_groups\.{re.escape(parameter)}\.(\w+)"))
        group["lr"] = group.get("initial_lr", group.get("lr"))
        names = {f"optim.{field}": field for field in ("lr", "weight_decay")
                 if isinstance(group.get(field), (int, float))}
        return read_numbers(self.path, group, names) | read_adamw(self.path, group)

    def _read_schedule(self, step: int, peak: float) -> dict[str, Any]:
        """Return our settings for torch's CosineAnnealingLR or falling LinearLR, alone or after a warm-up
        (SequentialLR) that is over; {} for other schedules, for example LambdaLR, whose function is not
        stored."""
        fields = read_objects(self.path, self._objects, SCHEDULER_KEY)
        milestones = fields.get("_milestones", [0])
        warmup, prefix = fields.get("_schedulers.0.total_iters", 0), ""
        if "_milestones" in fields:
            prefix = "_schedulers.1."
        if type(warmup) is not int or step < warmup or milestones != [warmup]:
            return {}
        kind, steps = "cosine", fields.get(f"{prefix}T_max")
        floor, rates = fields.get(f"{prefix}eta_min"), fields.get(f"{prefix}base_lrs")
        if fields.get(f"{prefix}start_factor") == 1.0:
            kind, steps = "linear", fields.get(f"{prefix}total_iters")
            end = fields.get(f"{prefix}end_factor")
            floor = peak * end if isinstance(end, (int, float)) else None
        if floor is None or not isinstance(rates, list) or rates != [peak] * len(rates):
            return {}
        # our warm-up is at most half of the run
        if type(steps) is not int or not max(1, warmup) <= steps <= MAX_SIZE:
            return {}
        values = {"optim.min_lr": floor, "optim.warmup_steps": warmup, "train.steps": steps + warmup}
        return {"optim.schedule": kind} | read_numbers(self.path, values, {name: name for name in values})

    def _list_parts(self, link: Link, state: str = "") -> list[Part]:
        """Return the first form whose tensors are all stored, with our keys for optimizer tensors."""
        forms = list_forms(self._names, link, is_state=bool(state))
        if state:
            forms = [[replace(part, key=f"{state}/{part.key}") for part in parts] for parts in forms]
        return next((parts for parts in forms if all(part.key in self._stored for part in parts)), forms[0])

    def _check_shapes(self) -> None:
        """Compare names and shapes of weights and optimizer tensors with the model. Tied copies, and a zero
        bias in torchtitan's router, are left out."""
        expected = {part.key: part.tensor_shape for link in self.links for part in self._list_parts(link)}
        copies = models.get_family(self.model.family).find_copies(self.model)
        if self.model.tied_embeddings:
            copies |= {HEAD: EMBEDDINGS[self._names]}
        copies = {copy: name for copy, name in copies.items()
                  if copy in self._stored and copy not in expected}
        remedy = f"pass the {CONFIG} of this training with --model"
        check_shapes(self.path, {key: shape for key, shape in self._stored.items()
                                 if "/" not in key and not (
                                     key.endswith(TITAN_BIAS) and shape == (self.model.num_experts,)
                                     and not self.tensors.read(key).any())},
                     expected | {copy: expected[name] for copy, name in copies.items()}, remedy)
        for copy, name in copies.items():
            if not has_same_bits(self.tensors.read(copy), self.tensors.read(name)):
                raise UserError(f"{self.path}: {copy} differs from {name}, but the model has one tensor for "
                                f"both; {remedy}")
        states = {key: shape for key, shape in self._stored.items() if "/" in key}
        expected_states: dict[str, tuple[int, ...]] = {}
        trained_links = [link for link in self.links if states and not link.fp32]
        for link in trained_links:
            names = self._get_states(link)
            for theirs in names.values():
                expected_states |= {part.key: part.tensor_shape for part in self._list_parts(link, theirs)}
            if "momentum" not in names:
                expected_states |= {part.key: () for part in self._list_parts(link, STEP)}
        check_shapes(self.path, states, expected_states,
                     "save the state of get_optimizer_state_dict, or pass --weights-only")


def _find_names(path: Path, keys: Iterable[str]) -> tuple[str, str]:
    """Return the names of a checkpoint and the prefix of its weights."""
    for names, embedding in EMBEDDINGS.items():
        prefixes = [key.removesuffix(embedding) for key in keys if key.endswith(embedding)]
        if len(prefixes) > 1:
            raise UserError(f"{path}: has {len(prefixes)} models (names begin with "
                            f"{format_names([*map(repr, prefixes)])}); save one of them alone")
        if prefixes:
            return names, prefixes[0]
    raise UserError(f"{path}: has no weight {' or '.join(EMBEDDINGS.values())}; parameters need the names of "
                    "transformers or torchtitan")
