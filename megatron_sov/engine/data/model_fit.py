"""Sources that a model cannot read, whatever it learns of them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sov.engine.data.media_shards import check_encoders
from megatron_sov.engine.data.routes import refuse_other_routes
from megatron_sov.engine.data.token_shards import Source
from megatron_sov.model.config import ModelConfig


def refuse_unreadable(sources: Sequence[Source], model: ModelConfig) -> None:
    """Refuse sources whose routes, pictures or sounds are not the model's.

    Raises:
        UserError: they are those of another one.
    """
    refuse_other_routes(sources, model)
    check_encoders(model, sources)
