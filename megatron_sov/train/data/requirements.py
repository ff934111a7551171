"""Checks of sources before reading: columns for the objective, routes and encoders for the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import ModelConfig, RunConfig
from megatron_sov.model.modality import check_encoders
from megatron_sov.train.data.sources import Source


@dataclass(frozen=True)
class NeededColumn:
    """A column that an objective reads.

    An objective of your own that reads the column `weight` declares it by a class attribute:

    >>> columns = {"weight": NeededColumn("sov-data pack --column weight", formats=("chat",))}"""

    made_by: str
    """Command that makes data with the column, for error messages."""
    formats: tuple[str, ...] = ()
    """Formats whose documents must have the column; () requires it in every format. In formats not listed, a
    missing column is 0."""


def check_columns(sources: Sequence[Source], needed: Mapping[str, NeededColumn]) -> None:
    """Raise `UserError` if a source lacks a column that the objective reads (`get_columns`)."""
    for name, column in needed.items():
        for source in sources:
            columns = source.columns
            if source.train_documents is not None:
                columns = source.train_documents.columns
            if name not in columns and (not column.formats or source.format in column.formats):
                raise UserError(
                    f"{source.artifact or 'a generated source'}: source {source.name!r} has no column "
                    f"{name!r} (columns: {', '.join(columns) or 'none'}), which the objective reads; "
                    f"{column.made_by} writes it")


def build_route_shape(model: ModelConfig) -> RouteShape:
    """Return the model's route shape. Raises `UserError` if no layer has experts."""
    if not model.num_moe_layers():
        raise UserError(f"model.num_experts = {model.num_experts} and model.num_dense_layers = "
                        f"{model.num_dense_layers}: no layer has experts, so there are no routes to "
                        "replay; leave the routes out")
    return RouteShape(model.num_moe_layers(), model.num_experts_per_token, model.num_experts)


def build_replay_shape(config: RunConfig) -> RouteShape | None:
    """Return the shape for replayed routes, or None if `policy.router_replay` is off.

    Raises `UserError` if no layer has experts."""
    return build_route_shape(config.model) if config.policy.router_replay else None


def check_route_shapes(sources: Sequence[Source], model: ModelConfig) -> None:
    """Raise `UserError` if a source's route shape differs from the model's route shape."""
    for source in sources:
        if source.routes is None:
            continue
        where, shape = source.artifact or "a generated source", build_route_shape(model)
        for name, setting in (("layers", "layers with experts"), ("top_k", "num_experts_per_token"),
                              ("num_experts", "num_experts")):
            source_size, model_size = getattr(source.routes, name), getattr(shape, name)
            if source_size != model_size:
                raise UserError(f"{where}: source {source.name!r} has routes with {name} = {source_size}, "
                                f"but the model has {setting} = {model_size}; replay routes from the "
                                "same model, or write the data without routes")


def check_routes_and_encoders(sources: Sequence[Source], model: ModelConfig) -> None:
    """Raise `UserError` if routes, pictures or sounds in a source do not fit the model."""
    check_route_shapes(sources, model)
    check_encoders(model, sources)
