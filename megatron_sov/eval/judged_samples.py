"""Judged responses, gathered by prompt into the figures of pass@k."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_sov.errors import UserError
from megatron_sov.eval.pass_at_k import (
    Estimate,
    PromptCounts,
    default_ks,
    majority_estimates,
    pass_estimates,
)
from megatron_sov.generate.request import LENGTH
from megatron_sov.rewards.answers import normalized

EXTRACTED = "extracted"
"""Component under which verifiers tell the final answer that they read; maj@k counts these."""


@dataclass
class Judged:
    """What became of all responses."""

    prompts: dict[str, PromptCounts] = field(default_factory=dict)
    """What tells a prompt from others -> its counts, in the order of the file."""
    statuses: Counter[str] = field(default_factory=Counter)
    """Status of the reward -> responses."""
    tells_answers: bool = False
    """Whether the reward has told final answers."""
    num_ended: int = 0
    """Responses that say why they ended."""
    num_at_limit: int = 0
    """Those of them that did not end by themselves."""

    def add(self, key: str, row: Mapping[str, Any], right_from: float) -> None:
        """Count a row that `score` has written; rewards from `right_from` are right."""
        counts = self.prompts.setdefault(key, PromptCounts())
        self.statuses[row["status"]] += 1
        if isinstance(row.get("finish_reason"), str):
            self.num_ended += 1
            self.num_at_limit += row["finish_reason"] == LENGTH
        if row["reward"] is None:
            counts.num_unscored += 1
            return
        counts.reward_sum += row["reward"]
        told, answer = final_answer(row["components"])
        self.tells_answers |= told
        if row["reward"] >= right_from:
            counts.num_right += 1
        elif answer:
            counts.wrong[answer] += 1
        else:
            counts.num_silent += 1

    def figures(self, ks: Sequence[int] = ()) -> dict[str, Any]:
        """Return pass@k, maj@k and the mean reward as JSON values.

        Args:
            ks: sizes of the draws; none: 1, 2, 4, ... up to the fewest scored samples of a prompt.

        Raises:
            UserError: no response has a reward, or no prompt has enough samples for one of the sizes.
        """
        scored = [p for p in self.prompts.values() if p.num_scored]
        if not scored:
            raise UserError("no response has a reward, so there is nothing to estimate: "
                            + ", ".join(f"{count:,} {status}" for status, count in self.statuses.items())
                            + "; the lines above say why")
        fewest, most = min(p.num_scored for p in scored), max(p.num_scored for p in scored)
        if any(k > most for k in ks):
            raise UserError(f"--k {max(ks)}: no prompt has more than {most} scored samples; ask for fewer, "
                            "or sample more")
        ks = sorted(set(ks)) or default_ks(fewest)
        prompts = list(self.prompts.values())
        found: dict[str, Any] = {
            "num_prompts": len(prompts), "num_samples": sum(self.statuses.values()),
            "statuses": dict(self.statuses), "num_unscored": sum(p.num_unscored for p in prompts),
            "num_right": sum(p.num_right for p in prompts),
            "mean_reward": fmean(p.reward_sum / p.num_scored for p in scored),
            "pass_at_k": _plain(pass_estimates(prompts, ks))}
        if self.tells_answers:
            found["maj_at_k"] = _plain(majority_estimates(prompts, ks))
        if any(p.num_unscored for p in prompts):
            # a pessimist's: what a broken verifier could not judge may well be wrong
            whole = [PromptCounts(p.num_right, num_silent=p.num_scored - p.num_right + p.num_unscored)
                     for p in prompts]
            found["pass_at_k_if_unscored_is_wrong"] = _plain(pass_estimates(whole, ks))
        if self.num_ended:
            found["share_at_limit"] = self.num_at_limit / self.num_ended
        return found


def _plain(estimates: Iterable[Estimate]) -> list[dict[str, Any]]:
    return [{**asdict(e), "interval": list(e.interval)} for e in estimates]


def final_answer(components: Mapping[str, Any]) -> tuple[bool, str]:
    """Return whether a reward's components tell the final answer, its own or that of one of its parts, and
    the answer without what tells no two answers apart; empty: the response has none."""
    for told in (components, *(part for part in components.values() if isinstance(part, Mapping))):
        if EXTRACTED in told:
            return True, normalized(str(told[EXTRACTED] or ""))
    return False, ""


def read_judged(path: Path, group_by: str, right_from: float) -> Judged:
    """Return what became of the rows of a file that `score_file` has written.

    Args:
        path: the file.
        group_by: field that the responses to one prompt have in common.
        right_from: least reward of a right response.
    """
    return read_judged_parts(path, None, group_by, right_from).get("", Judged())


def read_judged_parts(path: Path, part_by: str | None, group_by: str, right_from: float) -> dict[str, Judged]:
    """Return the same for each value of the field `part_by`, in the order of the file; None: all are "", one
    part."""
    parts: dict[str, Judged] = {}
    with open(path, "rb") as f:
        for line in f:
            row = json.loads(line)
            part = "" if part_by is None else str(row[part_by])
            parts.setdefault(part, Judged()).add(json.dumps(row[group_by], sort_keys=True), row, right_from)
    return parts


def table(figures: Mapping[str, Any]) -> str:
    majority = {e["k"]: e for e in figures.get("maj_at_k", [])}
    head = (f"{'k':>6}  {'pass@k':>8}  {'95 % interval':>17}" + f"  {'maj@k':>8}" * bool(majority)
            + "  prompts")
    rows = [f"{e['k']:>6}  {e['value']:>8.2%}  {e['interval'][0]:>7.2%} - {e['interval'][1]:>7.2%}"
            + (f"  {majority[e['k']]['value']:>8.2%}" if majority else "") + f"  {e['num_prompts']:>7,}"
            for e in figures["pass_at_k"]]
    counts = ", ".join(f"{count:,} {status}" for status, count in sorted(figures["statuses"].items()))
    ended = (f"; {figures['share_at_limit']:.1%} of the responses did not end by themselves"
             if figures.get("share_at_limit") else "")
    pessimist = [f"if all without a reward were wrong, pass@{e['k']} would be {e['value']:.2%}"
                 for e in figures.get("pass_at_k_if_unscored_is_wrong", [])[:1]]
    total = (f"{figures['num_prompts']:,} prompts, {counts} responses, mean reward "
             f"{figures['mean_reward']:.4f}{ended}")
    return "\n".join([head, *rows, *pessimist, total])
