"""Import torch.distributed checkpoints (DCP) of torchtitan, or of a torch loop on a transformers model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.artifacts import check_output_folder
from megatron_sov.base.errors import UserError
from megatron_sov.convert import DEFAULT_WORKERS
from megatron_sov.convert.companion_files import read_token_ids
from megatron_sov.convert.dcp.names import (
    EMBEDDINGS, TITAN_BIAS, TORCHTITAN, Part, check_names, list_parts, order_rotary)
from megatron_sov.convert.dtypes import DTYPES, KEEP, check_dtype_name
from megatron_sov.convert.hf_import import ImportSource, StateBlock, write_imported
from megatron_sov.convert.megatron.from_megatron import METADATA, DistTensors, DistWeights
from megatron_sov.convert.megatron.inert_pickle import TORCH_STATE_KEY, TRAINING_PREFIXES, read_in_subprocess
from megatron_sov.convert.sources import check_dtypes, check_shapes
from megatron_sov.engine.optimizer.state_shards import MASTER
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.weights import Link
from megatron_sov.model.pretrained import CONFIG, HEAD, read_json
from megatron_sov.runs.checkpoints import CHECKPOINT_KIND

MOMENTS = ("exp_avg", "exp_avg_sq")


def from_dcp(folder: str | Path, out: str | Path, dtype: str = KEEP, *, model_dir: Path | None = None,
             weights_only: bool = False, workers: int = DEFAULT_WORKERS, overwrite: bool = False,
             redo: bool = False) -> int | None:
    """Convert a DCP checkpoint to this project's format; return the updates in AdamW's moments, None without
    optimizer.

    A killed command continues where it stopped. `folder` has `.metadata` or folders `step-N`; `model_dir` has
    config.json and tokenizer (default: `folder` or its parent folder). Rounded weights are kept as masters.
    For the other arguments see `from_hf`. Raises `UserError`: the index contains forbidden names, or a tensor
    is missing, unexpected or damaged.
    """
    out = Path(out)
    check_dtype_name(dtype)
    check_output_folder(out, CHECKPOINT_KIND, overwrite)
    step_folder = _find_step(Path(folder))
    model_folder = model_dir or _find_model_folder(step_folder)
    weights = DcpWeights(step_folder, read_json(model_folder / CONFIG))
    check_dtypes(weights)
    with_masters = DTYPES.get(dtype, torch.float32).itemsize < torch.float32.itemsize
    states = [] if weights_only else weights.list_states(with_masters=with_masters)
    step = weights.count_updates() if states else None
    origin = {"path": str(step_folder),
              "index_sha256": hashlib.sha256((step_folder / METADATA).read_bytes()).hexdigest()}
    loop = None if step is None else {
        "step": step, "tokens": 0, "wall_s": 0.0, "num_updates": step, "data": {}}
    source = ImportSource(weights, "from-dcp", model_folder, read_token_ids(model_folder),
                          {"from_dcp": origin}, states, loop)
    write_imported(out, source, dtype, workers=workers, overwrite=overwrite, redo=redo)
    return step


def _find_step(folder: Path) -> Path:
    if (folder / METADATA).is_file():
        return folder
    steps = {int(match[1]): path for path in folder.glob("step-*")
             if (match := re.fullmatch(r"step-(\d{1,12})", path.name)) and (path / METADATA).is_file()}
    if not steps:
        raise UserError(f"{folder}: has no {METADATA}, and no folder step-N with one; pass a complete "
                        "torch.distributed checkpoint")
    return steps[max(steps)]


def _find_model_folder(step_folder: Path) -> Path:
    for folder in (step_folder, step_folder.absolute().parent):
        if (folder / CONFIG).is_file():
            return folder
    raise UserError(f"{step_folder}: has no {CONFIG} with the architecture; pass the folder of the Hugging "
                    "Face model with --model")


class DcpWeights(DistWeights):
    """Tensors of a DCP checkpoint, split into Hugging Face tensors. Raises `UserError`: the tensors do not
    match the model of config.json; the message names them."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        index = read_in_subprocess("index", path / METADATA)["tensors"]
        self._names, self._prefix = _find_names(path, index)
        weights = {key.removeprefix(self._prefix): shape for key, (_, shape, _) in index.items()
                   if key.startswith(self._prefix) and not key.startswith(TRAINING_PREFIXES)}
        try:
            family = models.get_family(str(config.get("model_type")))
            model = family.from_hf_config(config, weights)
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
        check_names(self._names, model)
        super().__init__(path, model, family.links(model))
        self.tensors = DistTensors(path, index)
        self._stored = {*weights}
        self._states = {match.groups(): key for key in index if (match := TORCH_STATE_KEY.fullmatch(key))}
        """(tensor, AdamW's name of a state) -> key."""
        self._check_weights(weights)
        self.tensors.check_complete()

    def list_keys(self, link: Link) -> list[str]:
        return [self._prefix + part.key for part in self._list_parts(link)]

    def list_states(self, *, with_masters: bool) -> list[StateBlock]:
        """Return AdamW's moments, and the weights as masters if asked for; [] without moments. Raises
        `UserError`: a weight has no moments, although others do."""
        blocks = []
        for state in MOMENTS if self._states else ():
            for link in (link for link in self.links if not link.fp32):
                key = self._find_state(self._list_parts(link, state)[0], state)
                blocks.append(StateBlock(f"{state}/{link.key}", link, self.tensors.get_dtype(key),
                                         partial(self._read_block, link, state)))
        if blocks and with_masters:
            blocks += [StateBlock(f"{MASTER}/{link.key}", link, self.get_dtype(link.hf_names[0]),
                                  partial(self._read_block, link)) for link in self.links if not link.fp32]
        return blocks

    def count_updates(self) -> int:
        """Return AdamW's step count."""
        key = next((key for (_, state), key in self._states.items() if state == "step"), None)
        if key is None:
            raise UserError(f"{self.path}: its optimizer has no step count; pass --weights-only")
        return int(self.tensors.read(key))

    def _list_parts(self, link: Link, state: str = "") -> list[Part]:
        if state:
            return list_parts(self._names, link, lambda key: (key, state) in self._states, state=True)
        return list_parts(self._names, link, self._stored.__contains__, state=False)

    def _find_state(self, part: Part, state: str) -> str:
        if (part.key, state) not in self._states:
            raise UserError(f"{self.path}: its optimizer has no {state} of {part.key}; save it with "
                            "get_optimizer_state_dict, or pass --weights-only")
        return self._states[part.key, state]

    def _read_block(self, link: Link, state: str = "") -> torch.Tensor:
        tensors: dict[str, torch.Tensor] = {}
        for part in self._list_parts(link, state):
            key = self._find_state(part, state) if state else self._prefix + part.key
            block = self.tensors.read(key, part.offset, part.extent).reshape(part.shape)
            tensors |= link.split(block) if len(part.names) > 1 else {part.names[0]: block}
        if self._names == TORCHTITAN:
            tensors = {name: order_rotary(self.model, name, tensor, inverse=True)
                       for name, tensor in tensors.items()}
        joined: torch.Tensor = link.join(tensors)
        return joined

    def _check_weights(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Check that the weights are those of the model; tied copies and a zero bias of torchtitan's router
        are not read."""
        expected = {part.key: part.tensor_shape for link in self.links for part in self._list_parts(link)}
        unread = {*models.get_family(self.model.family).find_copies(self.model), *[HEAD] * (
            self.model.tied_embeddings)} - expected.keys()
        unread |= {key for key in shapes if key.endswith(TITAN_BIAS)
                   and not self.tensors.read(self._prefix + key).any()}
        check_shapes(self.path, {key: tuple(shape) for key, shape in shapes.items() if key not in unread},
                     expected, f"pass the {CONFIG} of this training with --model")


def _find_names(path: Path, keys: Collection[str]) -> tuple[str, str]:
    """Return the names of a checkpoint and the prefix of its weights."""
    for names, embedding in EMBEDDINGS.items():
        for key in keys:
            if key.endswith(embedding):
                return names, key.removesuffix(embedding)
    raise UserError(f"{path}: has no weight {' or '.join(EMBEDDINGS.values())}; parameters need the names of "
                    "transformers or torchtitan")
