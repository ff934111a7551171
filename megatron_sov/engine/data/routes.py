"""Routes of sources: the model's own shape of them, and the refusal of those of another model."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.base.errors import UserError
from megatron_sov.engine.data.token_shards import Source
from megatron_sov.model.config import ModelConfig, RunConfig


def shape_of(model: ModelConfig) -> RouteShape:
    """Return the shape of a model's routes.

    Raises:
        UserError: it has no experts.
    """
    if not model.num_moe_layers():
        raise UserError(f"model.num_experts = {model.num_experts} and model.num_dense_layers = "
                        f"{model.num_dense_layers}: no layer has experts, so there are no routes; leave them "
                        "out")
    return RouteShape(model.num_moe_layers(), model.num_experts_per_token, model.num_experts)


def replayed_routes(config: RunConfig) -> RouteShape | None:
    """Return the shape of the routes that a run replays; None: it replays none.

    Raises:
        UserError: its model has none.
    """
    return shape_of(config.model) if config.policy.router_replay else None


def refuse_other_routes(sources: Sequence[Source], model: ModelConfig) -> None:
    """Refuse sources whose routes are not the model's.

    Raises:
        UserError: a number of one differs.
    """
    for source in sources:
        if source.routes is None:
            continue
        where, own = source.artifact or "a source made on the fly", shape_of(model)
        for name, setting in (("layers", "layers with experts"), ("top_k", "num_experts_per_token"),
                              ("num_experts", "num_experts")):
            theirs, ours = getattr(source.routes, name), getattr(own, name)
            if theirs != ours:
                raise UserError(f"{where}: source {source.name!r} has routes with {name} = {theirs}, and the "
                                f"model's {setting} are {ours}; replay routes of the same model, or write "
                                "the data without them")
