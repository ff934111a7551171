"""A dense model becomes one with experts that computes the same, to go on from.

Experts are copies of the dense feed-forward network (sparse upcycling, arXiv 2212.05055); with a granularity
of G each is a G-th of it, and rows of the router are equal in groups of G, so that a token that chooses one
shard of a copy chooses them all (virtual groups, arXiv 2410.07524).  Before any noise the model's output is
the dense one's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sov import models
from megatron_sov.config import ModelConfig
from megatron_sov.convert.derived import Opened
from megatron_sov.convert.growing import block_of, opened_source, write_grown
from megatron_sov.errors import UserError
from megatron_sov.models.weights import Link
from megatron_sov.settings import (
    AtLeastOne,
    Code,
    NotNegative,
    Problem,
    SettingsError,
    check,
    find_broken,
    name_options,
)

UPCYCLED = "upcycled"
"""What a manifest's content says of it."""
SPARSE = {"llama": "mixtral", "qwen3": "qwen3_moe"}
"""Dense family -> the one that is the same with experts."""
OF_EXPERTS = ("family", "num_dense_layers", "dense_ffn_dim", "num_experts", "num_experts_per_token",
              "num_shared_experts", "expert_ffn_dim", "router_score", "norm_topk_prob", "router_bias",
              "routed_scaling_factor", "router_bias_update_rate", "seq_aux_loss_coeff")
"""Fields of an architecture that may become other ones."""
_LAYER = re.compile(r"(decoder\.layers\.\d+\.)(.+)")
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

    def problems(self, model: ModelConfig) -> list[Problem]:
        """Return every value that has no meaning for a dense model, by the name of the command's option."""
        if model.num_moe_layers():
            return [Problem(Code.RULE, "", "the model has experts already (model.num_experts = "
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
        if (found := _LAYER.fullmatch(link.key)) is None:
            return self._dense[link.key]
        layer, name = found.groups()
        if name == "pre_mlp_layernorm.weight":
            name = NORM
        elif name.startswith("mlp.router.") or name.endswith("experts.linear_fc1.weight"):
            name = FC1
        elif name.endswith("experts.linear_fc2.weight"):
            name = FC2
        return self._dense[layer + name]
