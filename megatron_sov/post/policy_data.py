"""What objective `policy` reads, which depends on the settings and is known before it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sov.config import RunConfig
from megatron_sov.data.as_text import TEXT, as_text
from megatron_sov.data.columns import NeededColumn
from megatron_sov.data.rounds import SOURCE
from megatron_sov.data.token_shards import TEXTS, Source, open_sources
from megatron_sov.documents import ROLLOUTS
from megatron_sov.errors import UserError
from megatron_sov.post.parts.policy_loss import PolicyLoss
from megatron_sov.post.policy import PolicyLearning
from megatron_sov.train.objective_context import ObjectiveContext


@dataclass(frozen=True)
class PolicyObjective:
    """Makes the objective."""

    formats: tuple[str, ...]
    """See `train.objective.formats_of`."""
    columns: Mapping[str, NeededColumn]
    """See `train.objective.columns_of`."""

    def __call__(self, context: ObjectiveContext) -> PolicyLearning:
        """Return it."""
        return PolicyLearning(context)


def objective_of(config: RunConfig) -> PolicyObjective:
    """Return what makes the objective of a run's `policy`."""
    needed = NeededColumn("`megatron-sov rl train`", (ROLLOUTS,))
    columns = PolicyLoss(config.policy, config.rollout.max_new_tokens).columns
    return PolicyObjective((ROLLOUTS, *([TEXT] if config.policy.has_text else [])),
                           dict.fromkeys(columns, needed))


def texts_of(config: RunConfig) -> tuple[Source, ...]:
    """Return the packed data of a run: text, and where text is learned beside responses, chats as such.

    Raises:
        UserError: they cannot be read, are of another kind, or do not fit the model.
    """
    if not config.data.paths:
        return ()
    formats = TEXTS if config.policy.has_text else (TEXT,)
    return tuple(as_text(source) for source in
                 open_sources(config.data.paths, config.model.vocab_size, formats))


def check_sources(config: RunConfig, sources: list[Source]) -> None:
    """Refuse data that leave the term of text without targets, or are called as the run's own rounds are.

    Raises:
        UserError: there is no text, or a source has the rounds' name.
    """
    if [source.name for source in sources].count(SOURCE) > 1:
        raise UserError(f"--data: has a source {SOURCE!r}, as the run's own rounds are called; pack it under "
                        "another name")
    if config.policy.has_text and not any(source.format == TEXT and source.num_tokens["train"]
                                          and source.share > 0 for source in sources):
        raise UserError(f"policy.knowledge_coeff = {config.policy.parts.knowledge_coeff} needs text; add "
                        "--data with packed text to train on, or set it to 0")
