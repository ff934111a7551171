"""How far the student is from its teacher on held-out documents, before the first step and after the last."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_sov.data.order import Sample
from megatron_sov.data.rows import heldout_samples, join_rows, sample_row
from megatron_sov.data.token_shards import Source
from megatron_sov.mcore.model.logprobs import Head
from megatron_sov.mcore.parallel import collectives
from megatron_sov.post.parts.kept_teacher import KeptTeacher
from megatron_sov.train.gate import GateView
from megatron_sov.train.microbatch import MicroBatch, from_row

SPLIT = "heldout"


def measure_heldout(view: GateView, sources: Sequence[Source],
                    teacher: KeptTeacher) -> dict[str, dict[str, float]]:
    """Measure each source that has held-out documents, and record it; called by all processes together.

    Args:
        view: the run.
        sources: those that it reads, in their order.
        teacher: what is kept of it, held-out documents included.

    Returns:
        Source -> `tokens`, those that are learned of up to `data.heldout_tokens`, and means over them:
        `divergence`, the one that is learned, and `kl`, KL(teacher || student) in nats.
    """
    found = {}
    for index, source in enumerate(sources):
        if source.num_tokens.get(SPLIT, 0) > 1:
            tokens, divergence, kl = _sums(view, index, source, teacher).tolist()
            if tokens:
                found[source.name] = {"tokens": int(tokens), "divergence": divergence / tokens,
                                      "kl": kl / tokens}
                view.events.write("heldout_divergence", step=view.step, source=source.name,
                                  **found[source.name])
    return found


def _sums(view: GateView, index: int, source: Source, teacher: KeptTeacher) -> torch.Tensor:
    """Return [3] float64, on every process: learned tokens, and sums of divergence and KL over them."""
    config, world, shard = view.config, view.world, source.shard(SPLIT)
    seq_len, size = config.data.max_seq_len(), config.train.micro_batch_size
    samples = heldout_samples(shard, index, seq_len, config.data.heldout_tokens, whole=source.is_chat)
    samples += [Sample(index, ())] * (-len(samples) % (size * world.dp_size))
    own = [from_row(join_rows([sample_row(s, shard, seq_len) for s in samples[i:i + size]]))
           for i in range(world.dp_rank * size, len(samples), size * world.dp_size)]

    def sums(hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
        _, measured = head.divergence(hidden[0], teacher.at(batch, head, SPLIT), {}, teacher.divergence)
        learned = (teacher.heard(batch, SPLIT) > 0).double()
        return torch.stack([learned.sum(), (measured.divergence * learned).sum(),
                            (measured.kl * learned).sum()])

    parts = view.policy.map(own, sums)
    local = torch.stack(parts).sum(0).cpu() if parts else torch.zeros(3, dtype=torch.float64)
    return collectives.broadcast_from_last_stage(collectives.all_reduce_dp(local))
