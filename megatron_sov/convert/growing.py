"""A larger model that begins as a smaller one: what is read, and what is written and told of it."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from tqdm import tqdm

from megatron_sov.base.artifacts import MANIFEST, FileRecord, manifest_sha256, refuse_existing
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    AtLeastOne, NotNegative, ProblemCode, SettingsError, SettingsProblem, check, find_broken, name_options)
from megatron_sov.checkpoint.sharded_tensors import block_name, write_index
from megatron_sov.checkpoint.writer import TensorSpec
from megatron_sov.convert.dtypes import KEEP, check_space
from megatron_sov.convert.hf_import import checked_source, digest_of, index_of, planned_files, write_files
from megatron_sov.convert.peft import AdaptedWeights, add_inputs, checkpoint_weights
from megatron_sov.convert.sources import PART, CheckpointWeights, HfWeights, Weights, newest_of_run
from megatron_sov.model.config import ModelConfig, RunConfig
from megatron_sov.model.config.model import shortest_pattern
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.weights import Link
from megatron_sov.model.pretrained import CONFIG
from megatron_sov.runs.checkpoints import (
    IMPORTED, KIND, find_checkpoint, refuse_missing, refuse_no_model, settings_of)
from megatron_sov.work.progress.resumable import resumable_artifact

# A checkpoint whose blocks are computed from other checkpoints; a killed command goes on where it was.

Opened = CheckpointWeights | AdaptedWeights


@dataclass(frozen=True)
class Derived:
    """What a checkpoint is made of."""

    sources: Sequence[Opened]
    """Checkpoints that are read; the tokenizer is the first one's."""
    links: Mapping[str, Link]
    """Block -> its link, of the checkpoint that is written."""
    files: Mapping[str, list[TensorSpec]]
    """File -> its blocks."""
    block: Callable[[TensorSpec], torch.Tensor]
    """Computes one."""
    needs: Callable[[TensorSpec], Iterable[str]]
    """Hugging Face names of the tensors of the sources that a block is computed from."""
    settings: RunConfig
    """Of the checkpoint that is written."""
    content: Mapping[str, Any]
    """Of its manifest."""


def write_derived(out: Path, what: str, derived: Derived, plan: Mapping[str, Any], *, workers: int,
                  overwrite: bool, redo: bool) -> None:
    """Write a checkpoint (part "model"); it appears only when complete.

    Args:
        out: the checkpoint.
        what: name of the work, for its bar.
        derived: what it is made of.
        plan: with the files, all that decides its bytes.
        workers: files that are written at a time.
        overwrite: replace a checkpoint that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: a source is damaged, other work on it is unfinished, or the disk refuses.
    """
    files, links = dict(derived.files), dict(derived.links)
    whole = {**plan, "files": digest_of(files)}
    with resumable_artifact(out, KIND, f"megatron-sov convert {what}", whole, overwrite=overwrite,
                            redo=redo) as artifact, ExitStack() as held, tqdm(
                total=len(links), desc=what, unit="block", disable=None) as bar:
        missing = {name: blocks for name, blocks in files.items() if name not in artifact.finished}
        check_space(out, sum(spec.size_bytes for blocks in missing.values() for spec in blocks))
        bar.update(len(links) - sum(map(len, missing.values())))

        def read(spec: TensorSpec) -> torch.Tensor:
            block = derived.block(spec)
            bar.update()
            return block

        checks = [held.enter_context(checked_source(source, workers)) for source in derived.sources]

        def finish(name: str, record: FileRecord) -> None:
            for check in checks:
                # before the file counts as finished: a killed command would go on behind a file that was made
                # from damaged ones
                check.require(hf_name for spec in files[name] for hf_name in derived.needs(spec))
            artifact.finish(name, record)

        write_files(artifact.path, missing, read, workers, finish)
        write_index(artifact.path, PART, [index_of(files, links)])
        tokenizer = derived.sources[0].path / "tokenizer"
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, artifact.path / "tokenizer", dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns(MANIFEST))
        for source in derived.sources:
            add_inputs(artifact.writer, source)
        artifact.writer.content = {"parts": [PART], "tokens": 0, **derived.content}
        artifact.writer.settings = derived.settings.to_dict()


class Growth(Protocol):
    """How each block of the larger model is made."""

    def origin(self, link: Link) -> Link:
        """Return the block of the smaller model that a block has its dtype from, and its numbers unless it is
        drawn."""
        ...

    def block(self, link: Link) -> torch.Tensor:
        """Return a block."""
        ...


def opened_source(checkpoint: Path, out: Path, overwrite: bool) -> Opened:
    """Open the smaller model, where `out` may be written.

    Args:
        checkpoint: its folder; a run stands for its newest.
        out: the checkpoint to write.
        overwrite: whether one that is there may be replaced.

    Raises:
        UserError: `out` is taken, or there is no sound checkpoint.
    """
    refuse_existing(out, KIND, overwrite)
    refuse_missing(checkpoint)
    return checkpoint_weights(find_checkpoint(checkpoint))


def block_of(source: Opened, link: Link) -> torch.Tensor:
    block: torch.Tensor = link.join({name: source.read(name) for name in link.hf_names})
    return block


def write_grown(source: Opened, out: Path, model: ModelConfig, growth: Growth,
                told: tuple[str, Mapping[str, Any]], *, workers: int, overwrite: bool, redo: bool) -> None:
    """Write the larger model as a checkpoint (part "model"); a killed command goes on where it was.

    Args:
        source: the smaller one.
        out: the checkpoint.
        model: the larger architecture.
        growth: how its blocks are made.
        told: what the manifest's content says of it, under that name; with the source all that decides it.
        workers: files that are written at a time.
        overwrite: replace a checkpoint that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: the source is damaged, or the disk is full; nothing is left then.
    """
    links = {block_name(link.key, link.offset): link for link in models.get(model.family).links(model)}
    of_name = {name: link for link in links.values() for name in link.hf_names}
    name, asked = told
    grown = {name: {**asked, "path": str(source.path), "manifest_sha256": manifest_sha256(source.path)}}
    derived = Derived(
        [source], links,
        planned_files(links, lambda hf: source.dtype(growth.origin(of_name[hf]).hf_names[0]), KEEP),
        lambda spec: growth.block(links[spec.name]).to(spec.dtype),
        lambda spec: growth.origin(links[spec.name]).hf_names,
        RunConfig(IMPORTED, model, code=settings_of(source.path).code), {"step": 0, **grown})
    write_derived(out, name, derived, grown, workers=workers, overwrite=overwrite, redo=redo)


# A dense model becomes one with experts that computes the same, to go on from.
#
# Experts are copies of the dense feed-forward network (sparse upcycling, arXiv 2212.05055); with a
# granularity of G each is a G-th of it, and rows of the router are equal in groups of G, so that a token that
# chooses one shard of a copy chooses them all (virtual groups, arXiv 2410.07524). Before any noise the
# model's output is the dense one's.

UPCYCLED = "upcycled"
"""What a manifest's content says of it."""
SPARSE = {"llama": "mixtral", "qwen3": "qwen3_moe"}
"""Dense family -> the one that is the same with experts."""
OF_EXPERTS = ("family", "num_dense_layers", "dense_ffn_dim", "num_experts", "num_experts_per_token",
              "num_shared_experts", "expert_ffn_dim", "router_score", "norm_topk_prob", "router_bias",
              "routed_scaling_factor", "router_bias_update_rate", "seq_aux_loss_coeff")
"""Fields of an architecture that may become other ones."""
_LAYER_PART = re.compile(r"(decoder\.layers\.\d+\.)(.+)")
FC1, FC2, NORM = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight", "mlp.linear_fc1.layer_norm_weight"


@dataclass(frozen=True)
class Upcycling:
    """How experts are made."""

    num_experts: AtLeastOne
    """Of each layer."""
    num_experts_per_token: AtLeastOne
    """That a token visits."""
    granularity: AtLeastOne = 1
    """Experts that a copy of the dense network is cut into."""
    noise: NotNegative = 0.0
    """Standard deviation of what is added to each expert's weights, as a share of that of its matrix."""
    seed: int = 0
    """Of the router and the noise."""
    family: str = ""
    """Of the model with experts; empty: the one that fits the dense one's."""

    def problems(self, model: ModelConfig) -> list[SettingsProblem]:
        """Return every value that has no meaning for a dense model, by the name of the command's option."""
        if model.num_moe_layers():
            return [SettingsProblem(ProblemCode.RULE, "",
                                    "the model has experts already (model.num_experts = "
                                    f"{model.num_experts})", way_out="name a dense one")]
        whole = f"must be a multiple of --granularity {self.granularity}: a token visits whole copies"
        return name_options(check(self) or find_broken(
            self, "",
            (model.dense_ffn_dim % self.granularity == 0, "granularity",
             f"must divide model.dense_ffn_dim = {model.dense_ffn_dim}"),
            (self.num_experts % self.granularity == 0, "num_experts", whole),
            (self.num_experts_per_token % self.granularity == 0, "num_experts_per_token", whole),
            (self.num_experts_per_token <= self.num_experts, "num_experts_per_token",
             f"must be at most --experts {self.num_experts}")),
            num_experts="--experts", num_experts_per_token="--top-k")


def upcycle(checkpoint: Path, out: Path, asked: Upcycling, *, workers: int = 1,
            overwrite: bool = False, redo: bool = False) -> None:
    """Write a dense checkpoint as one with experts (part "model").

    Args:
        checkpoint: the dense one; a run stands for its newest.
        out: the checkpoint to write; it appears only when complete, and a killed command goes on where it
            was.
        asked: how experts are made.
        workers: files that are written at a time.
        overwrite: replace a checkpoint that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: sizes do not divide, no family has such a model, the checkpoint is damaged, or the disk is
            full; nothing is left then.
    """
    source = opened_source(checkpoint, out, overwrite)
    if problems := asked.problems(source.model):
        raise SettingsError(str(source.path), problems)
    model = upcycled(source.model, asked)
    write_grown(source, out, model, _Shards(source, model, asked), (UPCYCLED, dataclasses.asdict(asked)),
                workers=workers, overwrite=overwrite, redo=redo)


def upcycled(dense: ModelConfig, asked: Upcycling) -> ModelConfig:
    """Return the architecture with experts.

    Raises:
        UserError: no family has it; the sentence names what it cannot express.
    """
    name = asked.family or SPARSE.get(dense.family, "")
    if not name:
        raise UserError(f"model.family = {dense.family!r}: no family with experts is known for it; name one "
                        "with --family")
    family = models.get(name)
    model = dataclasses.replace(dense, **{
        "num_experts": asked.num_experts, "num_experts_per_token": asked.num_experts_per_token,
        "expert_ffn_dim": dense.dense_ffn_dim // asked.granularity, "num_dense_layers": 0,
        "num_shared_experts": 0, "norm_topk_prob": True, "router_bias": False, **family.training,
        **family.structure, "family": name})
    if not any("dense_ffn_dim" in vars(item).values() for item in family.config):
        model = dataclasses.replace(model, dense_ffn_dim=0)
    for field in dataclasses.fields(dense):
        before, after = getattr(dense, field.name), getattr(model, field.name)
        if before != after and field.name not in OF_EXPERTS:
            raise UserError(f"--family {name}: has model.{field.name} = {after!r} alone, and the dense model "
                            f"has {before!r}; name another family")
    family.check(model)
    return model


class _Shards:
    """The blocks of a model with experts, from those of a dense one."""

    def __init__(self, source: Opened, model: ModelConfig, asked: Upcycling) -> None:
        self._source, self._model, self._asked = source, model, asked
        self._dense = {link.key: link for link in source.links}

    def block(self, link: Link) -> torch.Tensor:
        """Return a block: copied, cut out of a dense matrix, or drawn."""
        if ".mlp.router." in link.key:
            return self._router(link)
        block = block_of(self._source, self.origin(link))
        return self._shard(block, link) if ".experts." in link.key else block

    def _shard(self, block: torch.Tensor, link: Link) -> torch.Tensor:
        """Return an expert's part of a dense matrix, with its noise."""
        asked, model = self._asked, self._model
        first = link.offset[0] % asked.granularity * model.expert_ffn_dim
        wide = block.to(torch.promote_types(block.dtype, torch.float32))
        if link.key.endswith("linear_fc1.weight"):  # gate above up
            part = wide.view(2, -1, wide.shape[1])[:, first:first + model.expert_ffn_dim]
        else:
            # the chosen weights add up to routed_scaling_factor, and each copy is met in all of its shards
            part = (wide[:, first:first + model.expert_ffn_dim]
                    * (asked.granularity / model.routed_scaling_factor))
        part = part.reshape(link.block_shape)
        if not asked.noise:
            return part
        return part + asked.noise * part.std() * self._drawn(part.shape, link.key, link.offset[0])

    def _router(self, link: Link) -> torch.Tensor:
        """Return rows that are equal in groups, or a selection bias of zeros."""
        if link.key.endswith("expert_bias"):
            return torch.zeros(link.block_shape)
        groups = self._asked.num_experts // self._asked.granularity
        rows = self._model.init_std * self._drawn(torch.Size((groups, self._model.hidden_size)), link.key, 0)
        return rows.repeat_interleave(self._asked.granularity, dim=0)

    def _drawn(self, shape: torch.Size, key: str, expert: int) -> torch.Tensor:
        """Return normal numbers that follow from the seed and the tensor's name."""
        digest = hashlib.sha256(f"{self._asked.seed} {key} {expert}".encode()).digest()
        return torch.randn(shape, generator=torch.Generator().manual_seed(
            int.from_bytes(digest[:8], "little") >> 1))

    def origin(self, link: Link) -> Link:
        """Return the dense link that a link's dtype and numbers come from."""
        if (found := _LAYER_PART.fullmatch(link.key)) is None:
            return self._dense[link.key]
        layer, name = found.groups()
        if name == "pre_mlp_layernorm.weight":
            name = NORM
        elif name.startswith("mlp.router.") or name.endswith("experts.linear_fc1.weight"):
            name = FC1
        elif name.endswith("experts.linear_fc2.weight"):
            name = FC2
        return self._dense[layer + name]


# A model with more layers than the one that it is made from: whole layers are repeated.
#
# `stack` repeats the whole trunk (stacking, arXiv 2405.15319), `interleave` each layer behind itself (block
# expansion, arXiv 2401.02415). With `identity` what repeated layers write to the residual is zero, so that
# the model computes what it did, and these layers learn from there.

How = Literal["stack", "interleave"]
DEEPENED = "deepened"
"""What a manifest's content says of it."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
WRITES = ("self_attention.linear_proj.weight", "linear_fc2.weight")
"""Endings of the matrices that write to the residual."""


@dataclass(frozen=True)
class Deepening:
    """How layers are repeated."""

    num_layers: int
    """Of the trunk that is made."""
    how: How = "interleave"
    """stack: 0 1 2 0 1 2; interleave: 0 0 1 1 2 2."""
    identity: bool = False
    """Whether repeated layers write nothing to the residual at first."""

    def origins(self, num_layers: int) -> list[int]:
        """Return the layer that each one is made from, of a trunk of so many."""
        if self.how == "stack":
            return [i % num_layers for i in range(self.num_layers)]
        return [i * num_layers // self.num_layers for i in range(self.num_layers)]


def deepen(checkpoint: Path, out: Path, asked: Deepening, *, workers: int = 1,
           overwrite: bool = False, redo: bool = False) -> None:
    """Write a checkpoint with more layers (part "model").

    Args:
        checkpoint: the shallower one; a run stands for its newest.
        out: the checkpoint to write; it appears only when complete, and a killed command goes on where it
            was.
        asked: how layers are repeated.
        workers: files that are written at a time.
        overwrite: replace a checkpoint that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: layers would not be more, the family has no such model, the checkpoint is damaged, or the
            disk is full; nothing is left then.
    """
    source = opened_source(checkpoint, out, overwrite)
    origins = asked.origins(source.model.num_layers)
    write_grown(source, out, deepened(source.model, asked), _Repeated(source, origins, asked.identity),
                (DEEPENED, {**dataclasses.asdict(asked), "origins": origins}), workers=workers,
                overwrite=overwrite, redo=redo)


class _Repeated:
    """Blocks of layers that come again."""

    def __init__(self, source: Opened, origins: list[int], identity: bool) -> None:
        self._source, self._origins, self._identity = source, origins, identity
        self._shallow = {(link.key, link.offset): link for link in source.links}

    def origin(self, link: Link) -> Link:
        """Return the same block of the layer that a block's layer is made from."""
        found = _LAYER.fullmatch(link.key)
        key = f"decoder.layers.{self._origins[int(found[1])]}.{found[2]}" if found else link.key
        return self._shallow[key, link.offset]

    def block(self, link: Link) -> torch.Tensor:
        made = block_of(self._source, self.origin(link))
        is_silent = self._identity and self._is_repeated(link) and link.key.endswith(WRITES)
        return torch.zeros_like(made) if is_silent else made

    def _is_repeated(self, link: Link) -> bool:
        found = _LAYER.fullmatch(link.key)
        return found is not None and self._origins[int(found[1])] in self._origins[:int(found[1])]


def deepened(model: ModelConfig, asked: Deepening) -> ModelConfig:
    """Return the deeper architecture: each layer is of the kind of the one that it is made from.

    Raises:
        UserError: it is not deeper, a dense layer would stand behind one with experts, or the family has no
            such model.
    """
    if asked.num_layers <= model.num_layers:
        raise UserError(f"--layers {asked.num_layers}: must be more than the {model.num_layers} that the "
                        "model has")
    origins = asked.origins(model.num_layers)
    dense = [origin < model.num_layers - model.num_moe_layers() for origin in origins]
    if dense != sorted(dense, reverse=True):
        raise UserError(f"--how {asked.how}: a dense layer would stand behind one with experts; pass --how "
                        "interleave")
    kinds = model.layer_types()
    pattern = shortest_pattern("".join("L" if kinds[origin] == "sliding_attention" else "G"
                                       for origin in origins))
    windows = tuple(model.layer_windows[origin] for origin in origins) if model.layer_windows else ()
    limits = tuple(model.swiglu_limits[origin] for origin in origins) if model.swiglu_limits else ()
    deeper = dataclasses.replace(model, num_layers=asked.num_layers, attention_pattern=pattern,
                                 layer_windows=windows, swiglu_limits=limits,
                                 num_dense_layers=sum(dense) if model.num_experts else 0)
    models.get(model.family).check(deeper)
    return deeper


# Which kind of folder a path names, and its weights under their Hugging Face names.

def open_weights(path: str | Path) -> Weights:
    """Open a checkpoint, the newest checkpoint of a run, or a Hugging Face folder.

    An adapter's checkpoint is opened as the model that it makes of its base.

    Raises:
        UserError: it is none of them, or its tensors are not exactly those of its model.
    """
    refuse_missing(Path(path))
    path = newest_of_run(Path(path))
    refuse_no_model(path)
    if (path / CONFIG).is_file():
        return HfWeights(path)
    return checkpoint_weights(path)
