"""Settings of learning after pre-training: from a teacher, from preferences, from a model's own responses."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from megatron_sov.base.settings import (
    AboveZero, ActsWhen, AnyOf, AtLeastOne, Finite, NotNegative, NotNegativeInt, ProblemCode, SettingsProblem,
    Share, find_broken_rules, is_none_of, is_one_of, is_set)
from megatron_sov.model.config.data import nearest_multiple
from megatron_sov.model.config.learning import learns, learns_by_policy


@dataclass(frozen=True)
class DistillationConfig:
    """What objective `distill` makes of what a teacher says of the data."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "": learns_by_policy("distill", "gkd"),
        "keep_remainder": is_set(".top_k")}

    beta: Share = 0.0
    """Which generalised Jensen-Shannon divergence (arXiv 2306.13649, equation 1): 0 forward KL, 1 reverse
    KL, between them a mixture of both models stands in the middle."""
    temperature: AboveZero = 1.0
    """What the logits of student and teacher are divided by."""
    top_k: NotNegativeInt = 0
    """Most probable tokens of the teacher that are kept and learned from at each position; 0: its final
    hidden states, and with them the whole vocabulary."""
    keep_remainder: bool = True
    """top_k: what each model gives to all other tokens together is one event more; false: both are
    normalised over the teacher's tokens (arXiv 2601.18129)."""
    other_tokenizer: bool = False
    """top_k: the teacher's tokens are other ones than the student's; it is heard byte by byte, and its
    probabilities become those of the student's tokens."""
    ce_coeff: NotNegative = 0.0
    """Weight of an auxiliary cross-entropy on the tokens of the data, over the same positions."""


PreferenceMethod = Literal["dpo", "ipo", "dpo-norm", "simpo", "orpo", "kto", "simper", "grouper"]
WITH_REFERENCE = ("dpo", "ipo", "dpo-norm", "kto")
"""Methods that compare the model with the one that it started from."""
BETAS = {"dpo": 0.1, "ipo": 0.1, "dpo-norm": 5.0, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}
"""Method -> its `beta` where the run says none: DPO's says nothing about a loss over means."""
SMOOTHED = ("dpo", "dpo-norm", "simpo")
"""Methods that may take some of the pairs to be the wrong way round."""


@dataclass(frozen=True)
class PreferenceConfig:
    """What objective `preference` makes of responses that were judged."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "": learns_by_policy("preference", "preference"),
        "beta": is_one_of(".method", *BETAS),
        "simpo_gamma": is_one_of(".method", "simpo"),
        "desirable_weight undesirable_weight": is_one_of(".method", "kto"),
        "label_smoothing": is_one_of(".method", *SMOOTHED)}

    method: PreferenceMethod = "dpo"
    """dpo: direct preference optimisation (arXiv 2305.18290); ipo: its squared form (arXiv 2310.12036);
    dpo-norm: dpo over means instead of sums of a response's log-probabilities (arXiv 2411.15124); simpo: the
    same without a reference, with a margin (arXiv 2405.14734); orpo: the ratio of odds beside the
    cross-entropy on chosen responses, without a reference (arXiv 2403.07691); kto: single responses that were
    judged good or bad (arXiv 2402.01306); simper: inverse perplexities, without a reference and without beta
    (arXiv 2502.00883); grouper: the same over groups of responses with rewards (K-EXAONE)."""
    beta: AboveZero | None = None
    """dpo, ipo, dpo-norm, kto: how strongly the model is held to its reference; the larger, the closer.
    simpo: how steeply the loss falls with the difference.  orpo: weight of the odds ratio, its paper's
    lambda.  null: the method's own: 0.1, of dpo-norm 5 and of simpo 2, as their authors take."""
    simpo_gamma: NotNegative = 0.5
    """simpo: margin by which the chosen response has to lead, in units of beta times log-probability per
    token (its authors take 0.3 to 5)."""
    desirable_weight: NotNegative = 1.0
    """kto: weight of responses that were judged good; its paper has good and bad ones weigh between 1 : 1 and
    4 : 3 in all, number times weight."""
    undesirable_weight: NotNegative = 1.0
    """kto: weight of responses that were judged bad."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """dpo, dpo-norm, simpo: share of pairs that are taken to be the wrong way round (arXiv 2305.18290,
    appendix)."""
    chosen_coeff: NotNegative = 0.0
    """Weight of an auxiliary cross-entropy on chosen responses, normalised over its own tokens
    (arXiv 2404.19733)."""

    @property
    def strength(self) -> float:
        """`beta`, or else the method's; 0 of a method that has none."""
        return BETAS.get(self.method, 0.0) if self.beta is None else self.beta


@dataclass(frozen=True)
class RolloutConfig:
    """What `rl` generates and trains in rounds.  It has the settings of responses as well, since a trainer
    computes at the temperature that they were drawn at."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "": learns("policy"),
        "validation_every_rounds validation_samples validation_temperature": is_set("--validation")}

    rounds: NotNegativeInt = 0
    """Rounds of generation, reward and training; 0: no reinforcement learning."""
    prompts_per_round: AtLeastOne = 64
    """Prompts (groups) that a round trains on."""
    samples_per_prompt: AtLeastOne = 8
    """Responses to each prompt: the size of a group."""
    steps_per_round: AtLeastOne = 1
    """Optimizer steps of a round, each with its own part of the round's groups.  1: on-policy; more:
    off-policy, by ratios against the policy that begins the round."""
    max_staleness: NotNegativeInt = 0
    """Rounds of training that a policy may be behind the round that it writes for; 0: a round is written by
    the policy that the round before has trained."""
    temperature: AboveZero = 1.0
    """Of samples; the trainer divides its logits by the same."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Of samples: the smallest set of tokens with this probability is drawn from; below 1 only where
    policy.method is gkd or preference, since others compare with the whole distribution."""
    max_new_tokens: AtLeastOne = 1024
    """Longest response; with tools, of all turns and results together."""
    max_prompt_tokens: AtLeastOne = 1024
    """Longest prompt; longer ones are set aside, and listed in the store."""
    piece_prompts: AtLeastOne = 8
    """Prompts of a piece of work, which one job claims and publishes as one part of the store."""
    deadline_s: NotNegative = 0.0
    """Seconds, from when an engine takes it, after which an unfinished response is kept as far as it is, to
    be continued by the next policy; 0: none."""
    lease_s: Annotated[float, Ge(1), Lt(math.inf)] = 600.0
    """Seconds without a sign of life after which a job's claim may be taken over."""
    keep_rounds: AtLeastOne = 2
    """Rounds before the newest one whose files stay in RUN/rounds; of those before them manifests alone stay,
    once the oldest checkpoint that is kept is behind them, and as long as the store has their responses."""
    budgets_tokens: tuple[AtLeastOne, ...] = ()
    """Lengths that the responses of a group are asked to have, each by an equal part of them, in order;
    empty: what a prompt's own field `target_tokens` says, if it has one."""
    budget_text: str = ""
    """Words with which a response begins that is asked to have a length, {tokens} in the place of the number;
    they count as part of its prompt. Empty: it is not told."""
    seed: NotNegativeInt = 0
    """Of the prompts' order, and of samples."""
    validation_every_rounds: NotNegativeInt = 10
    """Rounds between two validations on the prompts of --validation; there is one before the first round and
    one behind the last in any case. 0: these two alone."""
    validation_samples: AtLeastOne = 1
    """Responses to each prompt of a validation; more than one give pass@k."""
    validation_temperature: NotNegative | None = None
    """Of these; 0: the most probable tokens are taken; null: temperature."""

    def problems(self) -> list[SettingsProblem]:
        """Return every rule that these settings break."""
        budgets = self.budgets_tokens
        num_prompts = nearest_multiple(self.prompts_per_round, self.steps_per_round)
        return find_broken_rules(
            self, "rollout",
            (self.prompts_per_round % self.steps_per_round == 0, "prompts_per_round",
             f"must be a multiple of rollout.steps_per_round = {self.steps_per_round}",
             f"set rollout.prompts_per_round={num_prompts}"),
            (max(budgets, default=0) <= self.max_new_tokens, "budgets_tokens",
             f"must be at most rollout.max_new_tokens = {self.max_new_tokens}"),
            (self.samples_per_prompt % max(1, len(budgets)) == 0, "samples_per_prompt",
             f"must be a multiple of the {len(budgets)} rollout.budgets_tokens"),
            (not self.budget_text or "{tokens}" in self.budget_text, "budget_text",
             "must have {tokens} in the number's place"),
            (self.validation_temperature != 0 or self.validation_samples == 1, "validation_samples",
             "must be 1: rollout.validation_temperature = 0 gives each prompt the same response again"))

    def of_validation(self, num_prompts: int) -> RolloutConfig:
        """Return these settings as held-out prompts are asked by them: a validation is a round of its own,
        written to its end by the policy that is to write the training's round of the same number.

        Args:
            num_prompts: the held-out prompts, all of which are asked.
        """
        samples, temperature = self.validation_samples, self.validation_temperature
        return dataclasses.replace(
            self, rounds=self.rounds + 1, prompts_per_round=num_prompts, samples_per_prompt=samples,
            temperature=self.temperature if temperature is None else temperature, max_staleness=0,
            # as many responses at a time as training writes
            piece_prompts=max(1, self.piece_prompts * self.samples_per_prompt // samples),
            deadline_s=0.0, budgets_tokens=(), budget_text="" if self.budgets_tokens else self.budget_text)


PolicyMethod = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "agapo", "agapo_exaone4", "mgpo",
                       "ink_grpo", "pkpo", "lapo_d", "lapo_i", "hbpo", "opd", "gkd", "preference"]
Ratio = Literal["token", "sequence"]
Clip = Literal["two_sided", "cispo", "none"]
Advantage = Literal["group", "group_no_std", "leave_one_out", "pass_at_k", "range", "none"]
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
    kl_weighted: bool = True
    mgpo_lambda: float = 0.0
    pkpo_k: int = 0
    length_reward: LengthReward = "none"
    length_reward_coeff: float = 0.0
    length_width_tokens: float = 0.0
    all_wrong: Kept = "keep"
    all_wrong_reward: float = 0.0
    all_right: Kept = "keep"
    max_gen_batches: int = 1
    knowledge_coeff: float = 0.0
    knowledge_share: float = 0.0
    knowledge_batch_size: int = 0
    opd_coeff: float = 0.0


_PPO = {"clip_low": 0.2, "clip_high": 0.2}
"""What PPO's paper recommends (arXiv 1707.06347, section 6.1), and implementations of GRPO take."""
_DROPPED: dict[str, Any] = {"all_wrong": "drop", "all_right": "drop"}
_LAPO: dict[str, Any] = {
    "aggregation": "sequence", "kl": "k3", "kl_coeff": 1e-4, "kl_weighted": False, **_PPO}
"""What the authors' code has beside rewards."""
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"aggregation": "sequence", "kl": "k3", "kl_coeff": 0.0, **_PPO},
    "dr_grpo": {"advantage": "group_no_std", "aggregation": "constant", **_PPO},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "max_gen_batches": 10, **_DROPPED},
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
    "opd": {"clip": "none", "advantage": "none", "opd_coeff": 1.0},
    "gkd": {"clip": "none", "advantage": "none"},
    "preference": {"clip": "none", "advantage": "range", **_DROPPED},
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
OVERLONG_SHARES = {"dapo": 0.2}
"""Method -> its `overlong_buffer_tokens` as a share of the longest response: 4,096 of 20,480 (arXiv
2503.14476, section 4.1)."""
TOKEN_TRUNCATE_HIGH = 2.0
"""`correction_high` of token_truncate, as in "Your efficient RL framework secretly brings you off-policy RL
training" (Yao et al. 2025).  This correction is the default: it needs no pass of its own where a step is
on-policy, and leaves no response out."""
SCALES = (("clip_low", ("clip", "ratio")), ("clip_high", ("clip", "ratio")), ("kl_coeff", ("kl",)),
          ("length_reward_coeff", ("length_reward",)), ("length_width_tokens", ("length_reward",)))
"""Number, and the parts that it is a number of: that of a method says nothing about another such part."""
_PARTS = dataclasses.asdict(PolicyParts())
_OF_ADVANTAGES = " ".join((
    *(name for name in _PARTS if name != "max_gen_batches"), "mask_truncated", "correction",
    "correction_low", "correction_high", "geo_reject_high", "geo_reject_low"))
"""Settings of a policy whose loss is made of advantages."""


def _drawn(what: str, share: float) -> bool:
    # A hash, not a generator: every rank and every resume draws the same without any state.
    return int.from_bytes(hashlib.blake2b(what.encode(), digest_size=8).digest()) < share * 2 ** 64


@dataclass(frozen=True)
class PolicyConfig:
    """What objective `policy` makes of a model's own responses and their rewards.  `method` names a set of
    parts; a part that is set by itself goes before it (docs/policy_methods.md has the table)."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "": learns("policy"),
        "clip_low": is_one_of(".parts.clip", "two_sided"),
        "clip_high": is_one_of(".parts.clip", "two_sided", "cispo"),
        "kl_coeff": is_none_of(".parts.kl", "none"),
        "kl_weighted": is_one_of(".parts.kl", "k3"),
        "pkpo_k": is_one_of(".parts.advantage", "pass_at_k"),
        "length_reward_coeff": is_none_of(".parts.length_reward", "none"),
        "length_width_tokens": is_one_of(".parts.length_reward", "around_right", "target"),
        "all_wrong_reward": is_one_of(".parts.all_wrong", "keep"),
        "knowledge_share knowledge_batch_size": is_set(".parts.knowledge_coeff"),
        "correction_low correction_high": is_none_of(".correction", "none"),
        "geo_reject_low": is_set(".geo_reject_high"),
        "overlong_penalty": AnyOf(is_set(".overlong_buffer_tokens"), is_one_of(".method", *OVERLONG_SHARES)),
        "on_policy_share": is_one_of(".method", "gkd"),
        "reference keep_unfinished": is_one_of(".method", "preference"),
        _OF_ADVANTAGES: is_none_of(".method", "preference")}

    method: PolicyMethod = "grpo"
    """grpo (arXiv 2402.03300), dr_grpo (2503.20783), dapo (2503.14476), gspo (2507.18071), cispo
    (2506.13585), agapo (as K-EXAONE), agapo_exaone4 (as EXAONE 4.0, 2507.11407), mgpo (2511.06221), ink_grpo
    (2601.18129), pkpo (2505.15201), lapo_d and lapo_i (the two stages of 2507.15758), hbpo (2507.15844), opd
    (on-policy distillation, as Tinker's cookbook has it), gkd (2306.13649: no rewards, but the divergence of
    `distillation` from a teacher), preference (the loss of `preference`, over the best and the worst response
    of each group, or over all with preference.method = grouper)."""
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
    pkpo_k; range: 2 (reward - the group's least) / (its largest - its least) - 1; none: 0, whatever the
    reward."""
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
    """Weight of that divergence; 0: none."""
    kl_weighted: bool | None = None
    """k3: whether it is multiplied by the ratio, so that its derivative is that of the policy's KL from the
    reference, also off-policy (arXiv 2512.02556, section 3.1)."""
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
    max_gen_batches: AtLeastOne | None = None
    """A group that is left out is replaced by that of a further prompt, until rollout.prompts_per_round
    groups learn or so many times as many prompts were asked (arXiv 2503.14476, section 3.2); 1: none is."""
    right_from: Finite = 1.0
    """Reward from which on a response counts as right."""
    overlong_buffer_tokens: NotNegativeInt | None = None
    """Last tokens of rollout.max_new_tokens over which a penalty of length grows from 0 to overlong_penalty
    (arXiv 2503.14476, equation 13); 0: no penalty; null: a fifth of them for dapo, else none."""
    overlong_penalty: NotNegative = 1.0
    """Taken from the reward of a response of the largest length."""
    mask_truncated: bool = False
    """Whether a response that was cut off at rollout.max_new_tokens teaches nothing; its reward counts in its
    group's mean."""
    correction: Correction = "token_truncate"
    """For an engine that computes other log-probabilities than the trainer, and for responses of an earlier
    policy: the loss is multiplied by the ratio of the trainer's probability to the engine's, of each token or
    of the whole response. truncate: at most correction_high, at least correction_low; mask: 0 outside
    of these bounds, so that the advantage teaches nothing there; none: no such factor."""
    correction_low: NotNegative = 0.0
    """Smallest such ratio."""
    correction_high: AboveZero | None = None
    """Largest such ratio; null: 2 for token_truncate (Yao et al. 2025), the others need it."""
    geo_reject_high: Annotated[float, Gt(1), Lt(math.inf)] | None = None
    """A response teaches nothing where the geometric mean of these ratios over its tokens is above this, or
    below geo_reject_low, whatever correction is; null: none is rejected."""
    geo_reject_low: Annotated[float, Ge(0), Lt(1)] | None = None
    """null: 1 / geo_reject_high."""
    knowledge_coeff: NotNegative | None = None
    """Weight of an auxiliary cross-entropy on text of --data, normalised over its own tokens
    (arXiv 2601.18129); 0: none."""
    knowledge_share: Share | None = None
    """Probability with which an optimizer step has that text."""
    knowledge_batch_size: NotNegativeInt | None = None
    """Sequences of text of such a step."""
    opd_coeff: NotNegative | None = None
    """What is added to each token's advantage, times its log-probability by a teacher (--teacher,
    --teacher-url) minus that by the model when the round began: per token the reverse KL from the teacher;
    0: no teacher."""
    on_policy_share: Annotated[float, Gt(0), Le(1)] = 1.0
    """gkd: probability with which a round is of the model's own responses; else its steps learn from --data,
    in batches of train.global_batch_size."""
    reference: Literal["round", "run"] = "round"
    """preference: which model dpo, ipo and dpo-norm compare with. round: the one that begins the round, from
    which each round may go as far again; run: the one that the run starts from."""
    keep_unfinished: bool = False
    """preference: whether a response that was cut off may be learned as a good one."""
    share_prompts: bool = True
    """Whether the responses to one prompt that lie in one micro-batch have it computed once; the loss is the
    same.  Where it cannot be (see docs/rl.md) each has its own."""
    router_replay: bool = False
    """Whether the trainer sends each token to the experts that it went to when it was written."""

    @cached_property
    def parts(self) -> PolicyParts:
        """The method's parts with those that are set in their places; settings must have no problems."""
        return PolicyParts(**{name: value for name, value in self._resolve().items() if value is not None})

    @property
    def has_text(self) -> bool:
        return self.parts.knowledge_coeff > 0

    @property
    def correction_bound(self) -> float:
        """The largest ratio of a correction; settings must have no problems."""
        return TOKEN_TRUNCATE_HIGH if self.correction_high is None else self.correction_high

    @property
    def geo_bounds(self) -> tuple[float, float] | None:
        """The bounds between which the geometric mean of a response's ratios has to lie; None: none has."""
        high = self.geo_reject_high
        if high is None:
            return None
        return 1 / high if self.geo_reject_low is None else self.geo_reject_low, high

    def overlong_buffer(self, max_new_tokens: int) -> int:
        """Return over how many of the last tokens the penalty of length grows; 0: there is none.

        Args:
            max_new_tokens: longest response.
        """
        if self.overlong_buffer_tokens is not None:
            return self.overlong_buffer_tokens
        return round(OVERLONG_SHARES.get(self.method, 0.0) * max_new_tokens)

    @property
    def learns_distributions(self) -> bool:
        """Whether a teacher's distributions are learned, and nothing else."""
        return self.method == "gkd"

    @property
    def learns_preferences(self) -> bool:
        """Whether the loss is that of `preference`."""
        return self.method == "preference"

    @property
    def learns_from_rewards(self) -> bool:
        """Whether advantages alone decide what a response teaches: no teacher and no preferences do."""
        return (self.parts.advantage != "none" and not self.parts.opd_coeff
                and not self.learns_preferences)

    def is_on_policy(self, seed: int, number: int) -> bool:
        """Return whether a round is of the model's own responses: a draw with probability `on_policy_share`.

        Args:
            seed: `rollout.seed`.
            number: of the round, from 1.
        """
        return _drawn(f"on-policy {seed} {number}", self.on_policy_share)

    def has_text_at(self, seed: int, step: int) -> bool:
        """Return whether an optimizer step has text beside its responses: a draw with probability
        `knowledge_share` that depends on nothing but these.

        Args:
            seed: `rollout.seed`.
            step: from 1.
        """
        return self.has_text and _drawn(f"knowledge {seed} {step}", self.parts.knowledge_share)

    def _resolve(self) -> dict[str, Any]:
        """Return part -> what the run says of it, or else the method; None: a number that neither gives."""
        given = {name: value for name in _PARTS if (value := getattr(self, name)) is not None}
        # Later ones win: defaults, then numbers without a default, then what the method says.
        brought = _PARTS | dict.fromkeys(NUMBERS) | METHODS[self.method]
        # A number belongs to a part: 0.2 of a token ratio says nothing about a sequence ratio, so it is
        # asked for again.
        others = {number: None for number, parts in SCALES
                  if any(given.get(part, brought[part]) != brought[part] for part in parts)}
        return brought | others | given

    def _rules_of_distributions(self, told: dict[str, Any]) -> list[tuple[bool, str, str]]:
        alone = self.learns_distributions
        return [(alone or self.on_policy_share == 1, "on_policy_share",
                 f"belongs to policy.method = gkd, and the method is {self.method}"),
                (not alone or told["advantage"] == "none", "advantage",
                 "must be none: policy.method = gkd learns from no reward"),
                (not alone or not told["opd_coeff"], "opd_coeff",
                 "must be 0: policy.method = gkd learns the whole distribution")]

    def _problems_of_sampling(self, rollout: RolloutConfig) -> list[SettingsProblem]:
        return find_broken_rules(
            rollout, "rollout",
            (rollout.top_p == 1 or self.learns_distributions or self.learns_preferences, "top_p",
             f"must be 1: policy.method = {self.method} compares probabilities of the whole distribution"),
            (rollout.max_staleness == 0 or self.on_policy_share == 1, "max_staleness",
             f"must be 0: with policy.on_policy_share = {self.on_policy_share:g} a round may not be written "
             "at all"))

    def problems(self, rollout: RolloutConfig) -> list[SettingsProblem]:
        """Return every rule that these settings break.

        Args:
            rollout: the run's rounds.
        """
        # Rules are about what holds, whoever said it: the run or its method.
        told = self._resolve() | {"method": self.method}
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
            (told["advantage"] != "none" or told["opd_coeff"] > 0 or self.learns_distributions, "opd_coeff",
             "must be above 0: policy.advantage = none leaves a teacher alone to learn from"),
            *self._rules_of_distributions(told),
            ((self.overlong_buffer_tokens or 0) <= rollout.max_new_tokens, "overlong_buffer_tokens",
             f"must be at most rollout.max_new_tokens = {rollout.max_new_tokens}"),
            *((not told["knowledge_coeff"] or told[name] > 0, name,
               f"must be above 0: policy.knowledge_coeff = {told['knowledge_coeff']} asks for text")
              for name in ("knowledge_share", "knowledge_batch_size"))]
        p += [SettingsProblem(ProblemCode.RULE, f"policy.{name}", rule, told.get(name, getattr(self, name)))
              for holds, name, rule in rules if not holds]
        if rollout.rounds and rollout.samples_per_prompt < 2 and told["advantage"] != "none":
            p.append(SettingsProblem(ProblemCode.RULE, "rollout.samples_per_prompt",
                                     "must be at least 2: objective policy "
                                     "compares the responses of a group", rollout.samples_per_prompt))
        if told["opd_coeff"] and rollout.temperature != 1:
            p.append(SettingsProblem(ProblemCode.RULE, "rollout.temperature",
                                     f"must be 1: policy.opd_coeff = {told['opd_coeff']:g} compares with a "
                                     "teacher's own probabilities", rollout.temperature))
        p += self._problems_of_sampling(rollout)
        if told["length_reward"] == "budget" and rollout.rounds and not rollout.budgets_tokens:
            p.append(SettingsProblem(ProblemCode.RULE, "rollout.budgets_tokens",
                                     "is missing: policy.length_reward = budget "
                                     "is of what responses are told",
                                     way_out="set it, e.g. [512,1024,2048,2560], "
                                     "and rollout.budget_text"))
        low, high = self.correction_low, self.correction_high
        on, bound = self.correction != "none", self.correction_bound
        has_bound = high is not None or self.correction in ("none", "token_truncate")
        return p + find_broken_rules(
            self, "policy",
            (has_bound, "correction_high", f"must be a number: policy.correction = {self.correction} needs "
             "it", "set it"),
            (not on or not has_bound or low < bound, "correction_low",
             f"must be below policy.correction_high = {bound:g}"))
