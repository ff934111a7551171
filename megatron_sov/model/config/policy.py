"""Learning from one's own responses: which parts a policy's loss is made of, by a method's name or one by
one."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le

from megatron_sov.base.settings import (
    AboveZero, Finite, Fraction, NotNegative, NotNegativeInt, ProblemCode, SettingsProblem, Share,
    find_broken)
from megatron_sov.model.config.rollout import RolloutConfig

PolicyMethod = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "agapo", "agapo_exaone4", "mgpo",
                       "ink_grpo", "pkpo", "lapo_d", "lapo_i", "hbpo"]
Ratio = Literal["token", "sequence"]
Clip = Literal["two_sided", "cispo", "none"]
Advantage = Literal["group", "group_no_std", "leave_one_out", "pass_at_k"]
Aggregation = Literal["token", "sequence", "constant"]
Kl = Literal["none", "k1", "k3", "sequence"]
LengthReward = Literal["none", "around_right", "target", "budget"]
Kept = Literal["drop", "keep"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True)
class PolicyParts:
    """What a method is made of, every part told; see `PolicyConfig` for each."""

    ratio: Ratio = "token"
    clip: Clip = "two_sided"
    clip_low: float = 0.0
    clip_high: float = 0.0
    advantage: Advantage = "group"
    normalise_over_batch: bool = False
    aggregation: Aggregation = "token"
    kl: Kl = "none"
    kl_coeff: float = 0.0
    mgpo_lambda: float = 0.0
    pkpo_k: int = 0
    length_reward: LengthReward = "none"
    length_reward_coeff: float = 0.0
    length_width_tokens: float = 0.0
    all_wrong: Kept = "keep"
    all_wrong_reward: float = 0.0
    all_right: Kept = "keep"
    knowledge_coeff: float = 0.0
    knowledge_share: float = 0.0
    knowledge_batch_size: int = 0


_PPO = {"clip_low": 0.2, "clip_high": 0.2}
"""What PPO's paper recommends (arXiv 1707.06347, section 6.1), and implementations of GRPO take."""
_DROPPED: dict[str, Any] = {"all_wrong": "drop", "all_right": "drop"}
_LAPO: dict[str, Any] = {"aggregation": "sequence", "kl": "k3", "kl_coeff": 1e-4, **_PPO}
"""What the authors' code has beside rewards."""
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"aggregation": "sequence", "kl": "k3", "kl_coeff": 0.04, **_PPO},
    "dr_grpo": {"advantage": "group_no_std", "aggregation": "constant", **_PPO},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, **_DROPPED},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence"},
    "cispo": {"clip": "cispo", **_DROPPED},
    "agapo": {"clip": "cispo", "advantage": "leave_one_out", "normalise_over_batch": True,
              "aggregation": "sequence", "all_wrong_reward": None, **_DROPPED},
    "agapo_exaone4": {"clip": "none", "advantage": "leave_one_out", "normalise_over_batch": True,
                      "aggregation": "sequence", "kl": "sequence", "all_wrong_reward": None,
                      "all_right": "drop"},
    "mgpo": {"aggregation": "sequence", "mgpo_lambda": None},
    "ink_grpo": {"clip_low": 0.2, "clip_high": 0.24, "knowledge_coeff": 0.1, "knowledge_share": 0.6,
                 "knowledge_batch_size": 64},
    "pkpo": {"advantage": "pass_at_k", "aggregation": "constant", **_PPO},
    "lapo_d": {**_LAPO, "length_reward": "around_right", "length_reward_coeff": 0.7,
               "length_width_tokens": 100.0},
    "lapo_i": {**_LAPO, "length_reward": "target", "length_reward_coeff": 0.8, "length_width_tokens": 120.0},
    "hbpo": {"clip_low": 0.2, "clip_high": 0.28, "length_reward": "budget", "length_reward_coeff": 4.0},
}
"""Method -> its parts that are not `PolicyParts`' own; None: a number that its authors did not publish, and
that a run has to set."""
NEEDS = (("clip", ("two_sided",), "clip_low"), ("clip", ("two_sided", "cispo"), "clip_high"),
         ("kl", ("k1", "k3", "sequence"), "kl_coeff"), ("advantage", ("pass_at_k",), "pkpo_k"),
         ("all_wrong", ("keep",), "all_wrong_reward"), ("method", ("mgpo",), "mgpo_lambda"),
         ("length_reward", ("around_right", "target", "budget"), "length_reward_coeff"),
         ("length_reward", ("around_right", "target"), "length_width_tokens"))
"""Part, its values that need a number, and which."""
NUMBERS = ("clip_low", "clip_high", "kl_coeff", "pkpo_k", "length_reward_coeff", "length_width_tokens")
"""Those that have no value but what the method or the run gives."""
TOKEN_TRUNCATE_HIGH = 2.0
"""`correction_high` of token_truncate, as in "Your efficient RL framework secretly brings you off-policy RL
training" (Yao et al. 2025).  This correction is the default: it needs no pass of its own where a step is
on-policy, and leaves no response out."""
SCALES = (("clip_low", ("clip", "ratio")), ("clip_high", ("clip", "ratio")), ("kl_coeff", ("kl",)),
          ("length_reward_coeff", ("length_reward",)), ("length_width_tokens", ("length_reward",)))
"""Number, and the parts that it is a number of: that of a method says nothing about another such part."""
_PARTS = dataclasses.asdict(PolicyParts())


@dataclass(frozen=True)
class PolicyConfig:
    """What objective `policy` makes of a model's own responses and their rewards.  `method` names a set of
    parts; a part that is set by itself goes before it (docs/policy_methods.md has the table)."""

    method: PolicyMethod = "grpo"
    """grpo (arXiv 2402.03300), dr_grpo (2503.20783), dapo (2503.14476), gspo (2507.18071), cispo
    (2506.13585), agapo (as K-EXAONE), agapo_exaone4 (as EXAONE 4.0, 2507.11407), mgpo (2511.06221), ink_grpo
    (2601.18129), pkpo (2505.15201), lapo_d and lapo_i (the two stages of 2507.15758), hbpo (2507.15844)."""
    ratio: Ratio | None = None
    """Of the policy to that which began the round, both by the trainer. token: of each token; sequence: one
    of each response, the geometric mean over its tokens."""
    clip: Clip | None = None
    """two_sided: the smaller of ratio x advantage and clipped ratio x advantage; cispo: the ratio, at most
    1 + clip_high, weighs log-probabilities and is not differentiated; none: ratio x advantage."""
    clip_low: NotNegative | None = None
    """two_sided: how far below 1 a ratio counts."""
    clip_high: NotNegative | None = None
    """two_sided, cispo: how far above 1 a ratio counts."""
    advantage: Advantage | None = None
    """group: (reward - mean of the group) / its standard deviation; group_no_std: without the division;
    leave_one_out: reward - mean of the group's others; pass_at_k: what the response adds to the best of
    pkpo_k."""
    normalise_over_batch: bool | None = None
    """Whether advantages are shifted and scaled to mean 0 and standard deviation 1 over all responses of the
    optimizer step."""
    aggregation: Aggregation | None = None
    """token: mean over the step's tokens; sequence: mean over responses of each one's mean over tokens;
    constant: sum over tokens divided by responses x rollout.max_new_tokens."""
    kl: Kl | None = None
    """Divergence from the model that the run starts from. k1, k3: of each token, by these estimators;
    sequence: of whole responses, cumulative."""
    kl_coeff: NotNegative | None = None
    """Weight of that divergence."""
    mgpo_lambda: NotNegative | None = None
    """How strongly groups are preferred of which half is right: their advantages are multiplied by
    exp(-lambda D), D the divergence of the share of right responses from 1/2 (arXiv 2511.06221); 0: not."""
    pkpo_k: NotNegativeInt | None = None
    """pass_at_k: how many responses the best is taken of."""
    length_reward: LengthReward | None = None
    """What the length of a right response counts. around_right: more near the lengths of its group's right
    ones; target: more near its prompt's `target_tokens`; both are added to the reward. budget: the reward is
    that of the budget it was told (rollout.budgets_tokens), less beyond it."""
    length_reward_coeff: NotNegative | None = None
    """around_right, target: largest such addition; budget: the reward of a budget of no tokens."""
    length_width_tokens: AboveZero | None = None
    """around_right: over how many tokens outside of those lengths the addition falls to 0; target: its
    standard deviation."""
    all_wrong: Kept | None = None
    """Groups whose rewards are all the same and below right_from: left out, or kept with all_wrong_reward."""
    all_wrong_reward: Annotated[float, Gt(-math.inf), Le(0)] | None = None
    """Added to the advantages, which are 0, of groups that are all wrong and kept, before they are normalised
    over the batch: a small negative number, or 0."""
    all_right: Kept | None = None
    """Groups whose rewards are all the same, and right_from or more: left out, or kept (their advantages are
    0, and they count in means and in the divergence)."""
    right_from: Finite = 1.0
    """Reward from which on a response counts as right."""
    overlong_buffer_tokens: NotNegativeInt = 0
    """Last tokens of rollout.max_new_tokens over which a penalty of length grows from 0 to overlong_penalty
    (arXiv 2503.14476, equation 13); 0: no penalty."""
    overlong_penalty: NotNegative = 1.0
    """Taken from the reward of a response of the largest length."""
    correction: Correction = "token_truncate"
    """For an engine that computes other log-probabilities than the trainer, and for responses of an earlier
    policy: the loss is multiplied by the ratio of the trainer's probability to the engine's, of each token or
    of the whole response. truncate: at most correction_high, at least correction_low; mask: 0 outside
    of these bounds, so that the advantage teaches nothing there; none: no such factor."""
    correction_low: NotNegative = 0.0
    """Smallest such ratio."""
    correction_high: AboveZero | None = None
    """Largest such ratio; null: 2 for token_truncate (Yao et al. 2025), the others need it."""
    knowledge_coeff: NotNegative | None = None
    """Weight of an auxiliary cross-entropy on text of --data, normalised over its own tokens
    (arXiv 2601.18129); 0: none."""
    knowledge_share: Share | None = None
    """Probability with which an optimizer step has that text."""
    knowledge_batch_size: NotNegativeInt | None = None
    """Sequences of text of such a step."""
    share_prompts: bool = True
    """Whether the responses to one prompt that lie in one micro-batch have it computed once; the loss is the
    same.  Where it cannot be (see docs/rl.md) each has its own."""
    router_replay: bool = False
    """Whether the trainer sends each token to the experts that it went to when it was written."""
    missing_share: Fraction = 0.0
    """Share of a round's groups that may be without their last responses when it is trained."""

    @property
    def parts(self) -> PolicyParts:
        """The method's parts with those that are set in their places; settings must have no problems."""
        return PolicyParts(**{name: value for name, value in self._told().items() if value is not None})

    @property
    def has_text(self) -> bool:
        """Whether text is learned beside responses."""
        return self.parts.knowledge_coeff > 0

    @property
    def correction_bound(self) -> float:
        """The largest ratio of a correction; settings must have no problems."""
        return TOKEN_TRUNCATE_HIGH if self.correction_high is None else self.correction_high

    def has_text_at(self, seed: int, step: int) -> bool:
        """Return whether an optimizer step has text beside its responses: a draw with probability
        `knowledge_share` that depends on nothing but these.

        Args:
            seed: `rollout.seed`.
            step: from 1.
        """
        drawn = hashlib.blake2b(f"knowledge {seed} {step}".encode(), digest_size=8).digest()
        return self.has_text and int.from_bytes(drawn) < self.parts.knowledge_share * 2 ** 64

    def _told(self) -> dict[str, Any]:
        """Return part -> what the run says of it, or else the method; None: a number that neither gives."""
        given = {name: value for name in _PARTS if (value := getattr(self, name)) is not None}
        brought = _PARTS | dict.fromkeys(NUMBERS) | METHODS[self.method]
        others = {number: None for number, parts in SCALES
                  if any(given.get(part, brought[part]) != brought[part] for part in parts)}
        return brought | others | given

    def problems(self, rollout: RolloutConfig) -> list[SettingsProblem]:
        """Return every rule that these settings break.

        Args:
            rollout: the run's rounds.
        """
        told = self._told() | {"method": self.method}
        p = [SettingsProblem(ProblemCode.RULE, f"policy.{number}",
                             f"is missing: policy.{part} = {told[part]} needs it, and "
                             f"policy.method = {self.method} brings none for it", way_out="set it")
             for part, values, number in NEEDS if told[part] in values and told[number] is None]
        rules = [
            (told["clip"] != "two_sided" or (told["clip_low"] or 0) <= 1, "clip_low",
             "must be at most 1: ratios are not negative"),
            (told["advantage"] != "pass_at_k" or told["pkpo_k"] is None
             or 1 <= told["pkpo_k"] <= rollout.samples_per_prompt, "pkpo_k",
             f"must lie between 1 and rollout.samples_per_prompt = {rollout.samples_per_prompt}"),
            (self.overlong_buffer_tokens <= rollout.max_new_tokens, "overlong_buffer_tokens",
             f"must be at most rollout.max_new_tokens = {rollout.max_new_tokens}"),
            *((not told["knowledge_coeff"] or told[name] > 0, name,
               f"must be above 0: policy.knowledge_coeff = {told['knowledge_coeff']} asks for text")
              for name in ("knowledge_share", "knowledge_batch_size"))]
        p += [SettingsProblem(ProblemCode.RULE, f"policy.{name}", rule, told.get(name, getattr(self, name)))
              for holds, name, rule in rules if not holds]
        if rollout.rounds and rollout.samples_per_prompt < 2:
            p.append(SettingsProblem(ProblemCode.RULE, "rollout.samples_per_prompt",
                                     "must be at least 2: objective policy "
                                     "compares the responses of a group", rollout.samples_per_prompt))
        if told["length_reward"] == "budget" and rollout.rounds and not rollout.budgets_tokens:
            p.append(SettingsProblem(ProblemCode.RULE, "rollout.budgets_tokens",
                                     "is missing: policy.length_reward = budget "
                                     "is of what responses are told",
                                     way_out="set it, e.g. [512,1024,2048,2560], "
                                     "and rollout.budget_text"))
        low, high = self.correction_low, self.correction_high
        on, bound = self.correction != "none", self.correction_bound
        has_bound = high is not None or self.correction in ("none", "token_truncate")
        return p + find_broken(
            self, "policy",
            (on or (high is None and low == 0), "correction", "takes no policy.correction_low and "
             "policy.correction_high", "name one, or leave them out"),
            (has_bound, "correction_high", f"must be a number: policy.correction = {self.correction} needs "
             "it", "set it"),
            (not on or not has_bound or low < bound, "correction_low",
             f"must be below policy.correction_high = {bound:g}"))
