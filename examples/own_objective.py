# What: your own loss: cross-entropy without the least likely tokens, which are often noise.
# Run:  megatron-sov pretrain examples/own_recipe.py:two_layers --data tokens --run runs/own_objective --set objective.name=examples/own_objective.py:Trimmed --set objective.options.least=-7.7
# See:  the loss `trimmed` and the meter `counted`, the share of tokens in the loss, in events.jsonl.

from megatron_sov import LossSums, per_source, with_denominators


class Trimmed:
    meters = ("counted",)

    def __init__(self, context, *, least: float = -12.0):
        self.batches, self.least = context.batches, least
        self.coefficients = {"trimmed": 1.0}  # term -> its weight in the loss

    def collect(self, policy, step):
        return self.batches.next()

    def prepare(self, batch):
        weights = sum(float(m.host.weights.sum()) for m in batch.micro_batches)
        return with_denominators(batch, {"trimmed": weights})

    def loss(self, hidden, head, batch):
        logprobs = head.logprobs(hidden[0], batch.labels)
        counted = (logprobs.detach() > self.least) * batch.weights
        by_source = per_source(-logprobs, batch.weights, batch.sources, self.batches.num_sources)
        return LossSums({"trimmed": -(logprobs * counted).sum()}, by_source,
                        {"counted": (counted.sum(), batch.weights.sum())})
