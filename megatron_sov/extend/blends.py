"""What the samples of a stage are made of: its parts and their shares as one blend of sources."""

from __future__ import annotations

from megatron_sov.config import ExtendStageConfig, PartConfig
from megatron_sov.data.long_documents import LongDocuments
from megatron_sov.data.token_shards import Source
from megatron_sov.data.views import LONG, SHORT
from megatron_sov.errors import UserError
from megatron_sov.eval.needle.documents import SOURCE_NAME


def stage_blend(stage: ExtendStageConfig, sources: list[Source], trained_tokens: int,
                needle_share: float) -> dict[str, float]:
    """Return source name -> share of the samples, summing to 1; empty where the stage asks for
    nothing in particular.

    Args:
        stage: its parts and blend.
        sources: the packed data.
        trained_tokens: length of the samples before the stage: what is longer is long,
            what is cut to it is short.
        needle_share: part of a phase's samples that are needle documents; of what is rehearsed too.

    Raises:
        UserError: a part has no source of its kind in the data.
    """
    if not stage.parts:
        return dict(stage.blend)
    blends = [(part.share, part.blend or _default(part, stage, sources, trained_tokens, needle_share))
              for part in stage.parts]
    rest = 1 - sum(part.share for part in stage.parts)
    if rest > 1e-9:
        blends.append((rest, stage.blend or {s.name: s.share for s in sources if s.num_tokens["train"]}))
    found: dict[str, float] = {}
    for share, blend in blends:
        total = sum(blend.values())
        if total <= 0:
            raise UserError(f"extend stage {stage.name}: blend {blend} has no weight above 0; "
                            "give at least one source a weight")
        for name, weight in blend.items():
            found[name] = found.get(name, 0.0) + share * weight / total
    return found


def _default(part: PartConfig, stage: ExtendStageConfig, sources: list[Source], trained_tokens: int,
             needle_share: float) -> dict[str, float]:
    """Return the blend of a part that names no source: every source of its kind by its own share.

    What is rehearsed has short needle documents in it, so that retrieval at the old length is not
    lost over the new one.
    """
    held = [s for s in sources if s.num_tokens["train"]]
    if part.name == "trajectories":
        blend, kind = ({s.name: s.share for s in held if s.is_chat},
                       "source of chats (sov-data pack --format chat)")
    elif part.name == "long":
        minimum = trained_tokens + 1
        blend = {f"{s.name}{LONG}{minimum}": s.share for s in held
                 if not s.is_chat and len(LongDocuments(s.shard("train"), minimum).index)}
        kind = f"text source with documents of {minimum} tokens or more"
    else:
        blend = {f"{s.name}{SHORT}{trained_tokens}": s.share for s in held if not s.is_chat}
        kind = "text source"
    if not blend:
        raise UserError(f"extend stage {stage.name}: its part {part.name} names no source, and the data has "
                        f"no {kind}; give the part a blend, or add such data")
    if part.name == "rehearsal" and needle_share:
        blend[f"{SOURCE_NAME}{SHORT}{trained_tokens}"] = sum(blend.values()) * needle_share / (
            1 - needle_share)
    return blend
