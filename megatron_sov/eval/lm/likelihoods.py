"""Likelihoods of tokens by a model on Megatron-Core at any layout, and by transformers' model.

What lm-eval asks of either is the sum of log-probabilities, and whether each token is the most probable one.
Requests for which the same tokens are read share a forward pass (`requests.readings`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_sov.eval.filling import rows_of
from megatron_sov.eval.lm.requests import Answer, Score
from megatron_sov.generate.load import Loaded
from megatron_sov.mcore.decode.forward_only import Inputs
from megatron_sov.mcore.model.language_model import ModelInputs, states_for_head
from megatron_sov.mcore.model.logprobs import Head
from megatron_sov.mcore.parallel import collectives, context
from megatron_sov.mcore.parallel.device import local_device

LOGITS_BYTES = 1 << 29
"""Logits that transformers' model is asked for at a time, unless one document alone has more."""
Group = Sequence[Score]
"""Scores for which the same tokens are read."""


def of_forward_model(loaded: Loaded, groups: Sequence[Group]) -> dict[str, Answer]:
    """Return the answers to groups of scores, on every process; called by all of them together."""
    dp_rank, dp_size = collectives.data_place()
    rows: list[list[Group]] = [[groups[i] for i in row] for row in rows_of([len(g[0].read) for g in groups])]
    rows += [[]] * (-len(rows) % dp_size)  # processes that share experts must run forward equally often
    starts = _starts(rows)
    found = torch.zeros(sum(map(len, groups)), 2, dtype=torch.float64)
    # a pipeline works on several rows at a time, which then are of one length
    pipeline = loaded.config.parallel.pp
    at_a_time = 1 if pipeline == 1 else 2 * pipeline
    own = range(dp_rank, len(rows), dp_size)
    for begin in range(0, len(own), at_a_time):
        numbers = own[begin:begin + at_a_time]
        longest = max(sum(len(g[0].read) for g in rows[i]) for i in numbers)
        batches = [_Row(rows[i], longest) for i in numbers]
        for i, values in zip(numbers, loaded.policy.map(batches, _row_values), strict=False):
            found[starts[i]:starts[i] + len(values)] = values
    total = collectives.broadcast_from_last_stage(collectives.all_reduce_dp(found))
    return _answers(groups, total)


@torch.no_grad()
def of_hf_model(model: Any, groups: Sequence[Group]) -> dict[str, Answer]:
    """Return the answers of transformers' model to groups of scores."""
    limit_tokens = LOGITS_BYTES // (4 * model.config.get_text_config().vocab_size)
    parts = []
    for lines in _lines(groups, limit_tokens):
        # padded at the end, which no token before can see
        ids = torch.zeros(len(lines), max(len(g[0].read) for g in lines), dtype=torch.int64)
        for line, group in enumerate(lines):
            ids[line, :len(group[0].read)] = torch.tensor(group[0].read)
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        for line, group in enumerate(lines):
            end = len(group[0].read)
            for score in group:
                asked = logits[line, end - len(score.continuation):end].float()
                labels = torch.tensor(score.continuation, device=asked.device)
                logprobs = asked.log_softmax(-1).gather(1, labels[:, None])
                parts.append([float(logprobs.sum()), float((asked.argmax(-1) == labels).all())])
    return _answers(groups, torch.tensor(parts, dtype=torch.float64).reshape(-1, 2))


class _Row:
    """A row of documents with what is asked at their ends."""

    def __init__(self, groups: Sequence[Group], min_tokens: int) -> None:
        batch = Inputs([group[0].read for group in groups] or [[0]], local_device(), min_tokens)
        self.inputs: ModelInputs = batch.inputs
        self.groups = groups
        self.ends: list[int] = (batch.ends + 1).tolist()
        """Behind each document."""


def _row_values(hidden: list[torch.Tensor], head: Head, row: _Row) -> torch.Tensor:
    """Return [scores of the row, 2]: the sum of log-probabilities, and whether each token is the best one."""
    count = sum(map(len, row.groups))
    values = torch.zeros(count, 2, dtype=torch.float64)
    if not count:
        return values
    ends = row.ends[:len(row.groups)]
    places = torch.cat([torch.arange(end - max(len(s.continuation) for s in group), end)
                        for group, end in zip(row.groups, ends, strict=True)])
    states = states_for_head(hidden[0], head.config)
    best = torch.zeros(len(row.inputs.tokens), dtype=torch.int64)
    best[places] = head.top_tokens(context.pick(states, places)).cpu()
    number = [0]
    for group in row.groups:
        number.append(number[-1] + len(group))
    # documents that are judged twice and more, such as choices of one token, take the head as often
    for variant in range(max(map(len, row.groups))):
        labels = torch.zeros_like(best)
        wanted = torch.zeros(len(best), dtype=torch.bool)
        judged = [(i, end - len(group[variant].continuation), end) for i, (group, end)
                  in enumerate(zip(row.groups, ends, strict=True)) if variant < len(group)]
        for i, first, end in judged:
            labels[first:end] = torch.tensor(row.groups[i][variant].continuation)
            wanted[first:end] = True
        logprobs = head.logprobs(hidden[0], labels.to(states.device), wanted=wanted).double().cpu()
        for i, first, end in judged:
            values[number[i] + variant] = torch.tensor(
                [float(logprobs[first:end].sum()), float((best[first:end] == labels[first:end]).all())],
                dtype=torch.float64)
    return values


def _starts(rows: Sequence[Sequence[Group]]) -> list[int]:
    """Return the number of scores before each row."""
    found = [0]
    for row in rows:
        found.append(found[-1] + sum(map(len, row)))
    return found


def _lines(groups: Sequence[Group], limit_tokens: int) -> list[Sequence[Group]]:
    """Return the documents that go through a model together, as lines of one length."""
    found: list[Sequence[Group]] = []
    begin = 0
    for end in range(1, len(groups) + 1):
        longest = max(len(g[0].read) for g in groups[begin:end + 1])
        if end == len(groups) or longest * (end + 1 - begin) > limit_tokens:
            found.append(groups[begin:end])
            begin = end
    return found


def _answers(groups: Sequence[Group], values: torch.Tensor) -> dict[str, Answer]:
    scores = [score for group in groups for score in group]
    return {score.key: {"logprob": logprob, "greedy": greedy == 1}
            for score, (logprob, greedy) in zip(scores, values.tolist(), strict=True)}
