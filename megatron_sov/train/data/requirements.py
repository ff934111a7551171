"""What a run asks of its sources before it reads them: columns of the objective, routes and encoders of the
model.  Sources without it are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import ModelConfig, RunConfig
from megatron_sov.model.modality import check_encoders
from megatron_sov.train.data.token_shards import Source


@dataclass(frozen=True)
class NeededColumn:
    """A column that an objective reads.

    An objective of your own that reads the column `weight` says so by a class attribute:

    >>> columns = {"weight": NeededColumn("sov-data pack --column weight", formats=("chat",))}
    """

    made_by: str
    """What to type to get data with it, for the refusal of data without."""
    formats: tuple[str, ...] = ()
    """Formats whose documents must have it (those of others that have none count as 0); (): of all."""


def check_columns(sources: Sequence[Source], needed: Mapping[str, NeededColumn]) -> None:
    """Refuse data without what its objective reads.

    Args:
        sources: what is read.
        needed: column -> what is asked of it.

    Raises:
        UserError: a source does not have a column.
    """
    for name, column in needed.items():
        for source in sources:
            held = source.columns if source.train_documents is None else source.train_documents.columns
            if name not in held and (not column.formats or source.format in column.formats):
                raise UserError(
                    f"{source.artifact or 'a source made on the fly'}: source {source.name!r} has no column "
                    f"{name!r} ({', '.join(held) or 'it has none'}), and the objective reads it; "
                    f"{column.made_by} makes it")


# Routes of sources: the model's own shape of them, and the refusal of those of another model.

def build_route_shape(model: ModelConfig) -> RouteShape:
    """Return the shape of a model's routes.

    Raises:
        UserError: it has no experts.
    """
    if not model.num_moe_layers():
        raise UserError(f"model.num_experts = {model.num_experts} and model.num_dense_layers = "
                        f"{model.num_dense_layers}: no layer has experts, so there are no routes; leave them "
                        "out")
    return RouteShape(model.num_moe_layers(), model.num_experts_per_token, model.num_experts)


def build_replay_shape(config: RunConfig) -> RouteShape | None:
    """Return the shape of the routes that a run replays; None: it replays none.

    Raises:
        UserError: its model has none.
    """
    return build_route_shape(config.model) if config.policy.router_replay else None


def check_route_shapes(sources: Sequence[Source], model: ModelConfig) -> None:
    """Refuse sources whose routes are not the model's.

    Raises:
        UserError: a number of one differs.
    """
    for source in sources:
        if source.routes is None:
            continue
        where, own = source.artifact or "a source made on the fly", build_route_shape(model)
        for name, setting in (("layers", "layers with experts"), ("top_k", "num_experts_per_token"),
                              ("num_experts", "num_experts")):
            theirs, ours = getattr(source.routes, name), getattr(own, name)
            if theirs != ours:
                raise UserError(f"{where}: source {source.name!r} has routes with {name} = {theirs}, and the "
                                f"model's {setting} are {ours}; replay routes of the same model, or write "
                                "the data without them")


def check_routes_and_encoders(sources: Sequence[Source], model: ModelConfig) -> None:
    """Refuse sources whose routes, pictures or sounds are not the model's.

    Raises:
        UserError: they are those of another one.
    """
    check_route_shapes(sources, model)
    check_encoders(model, sources)
