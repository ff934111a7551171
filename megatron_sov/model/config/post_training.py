"""Settings for post-training losses: distillation, preferences, and reinforcement learning from a policy's
rollouts."""

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
from megatron_sov.model.config.learning import has_objective, has_objective_or_method

PreferenceMethod = Literal["dpo", "ipo", "dpo-norm", "simpo", "orpo", "simper", "grouper"]
REFERENCE_METHODS = ("dpo", "ipo", "dpo-norm")
"""Methods that compare the policy with a reference model."""
BETAS = {"dpo": 0.1, "ipo": 0.1, "dpo-norm": 5.0, "simpo": 2.0, "orpo": 0.1}
"""Method -> default for `preference.beta`."""
SMOOTHING_METHODS = ("dpo", "dpo-norm", "simpo")
"""Methods with label smoothing."""
PolicyMethod = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "agapo", "agapo_exaone4", "mgpo",
                       "ink_grpo", "pkpo", "opd", "gkd", "preference"]
Ratio = Literal["token", "sequence"]
Clip = Literal["two_sided", "cispo", "none"]
Advantage = Literal["group", "group_no_std", "leave_one_out", "pass_at_k", "range", "none"]
Aggregation = Literal["token", "sequence", "constant"]
Kl = Literal["none", "k1", "k3", "sequence"]
Kept = Literal["drop", "keep"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
_PPO = {"clip_low": 0.2, "clip_high": 0.2}
"""PPO's clip bounds (arXiv 1707.06347, section 6.1), also used in GRPO implementations."""
_DROP_EQUAL_GROUPS: dict[str, Any] = {"all_wrong": "drop", "all_right": "drop"}
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"aggregation": "sequence", "kl": "k3", "kl_coeff": 0.0, **_PPO},
    "dr_grpo": {"advantage": "group_no_std", "aggregation": "constant", **_PPO},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "max_gen_batches": 10, **_DROP_EQUAL_GROUPS},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence"},
    "cispo": {"clip": "cispo", **_DROP_EQUAL_GROUPS},
    "agapo": {"clip": "cispo", "advantage": "leave_one_out", "normalise_over_batch": True,
              "aggregation": "sequence", "all_wrong_reward": None, **_DROP_EQUAL_GROUPS},
    "agapo_exaone4": {"clip": "none", "advantage": "leave_one_out", "normalise_over_batch": True,
                      "aggregation": "sequence", "kl": "sequence", "all_wrong_reward": None,
                      "all_right": "drop"},
    "mgpo": {"aggregation": "sequence", "mgpo_lambda": None},
    "ink_grpo": {"clip_low": 0.2, "clip_high": 0.24, "knowledge_coeff": 0.1, "knowledge_share": 0.6,
                 "knowledge_batch_size": 64},
    "pkpo": {"advantage": "pass_at_k", "aggregation": "constant", **_PPO},
    "opd": {"clip": "none", "advantage": "none", "opd_coeff": 1.0},
    "gkd": {"clip": "none", "advantage": "none"},
    "preference": {"clip": "none", "advantage": "range", **_DROP_EQUAL_GROUPS}}
"""Method -> parts that differ from the defaults in `PolicyParts`. None: a number the authors did not publish,
which the run must set."""
REQUIRED_NUMBERS = (("clip", ("two_sided",), "clip_low"), ("clip", ("two_sided", "cispo"), "clip_high"),
                    ("kl", ("k1", "k3", "sequence"), "kl_coeff"), ("advantage", ("pass_at_k",), "pkpo_k"),
                    ("all_wrong", ("keep",), "all_wrong_reward"), ("method", ("mgpo",), "mgpo_lambda"))
"""(part, values, number): if the part has one of the values, the number is required."""
NUMBERS_WITHOUT_DEFAULT = ("clip_low", "clip_high", "kl_coeff", "pkpo_k")
"""Numbers without a default in `PolicyParts`; method or run must set them."""
OVERLONG_SHARES = {"dapo": 0.2}
"""Method -> `overlong_buffer_tokens` as a share of `rollout.max_new_tokens`: 4,096 of 20,480 tokens (arXiv
2503.14476, section 4.1)."""
TOKEN_TRUNCATE_HIGH = 2.0
"""`correction_high` for token_truncate if not set, from "Your efficient RL framework secretly brings you
off-policy RL training" (Yao et al. 2025). token_truncate is the default correction because on-policy steps
need no extra forward pass and no response is dropped."""
NUMBER_PARTS = (("clip_low", ("clip", "ratio")), ("clip_high", ("clip", "ratio")), ("kl_coeff", ("kl",)))
"""Number -> parts it belongs to. If the run changes such a part, the method's number no longer applies."""


@dataclass(frozen=True)
class DistillationConfig:
    """Distillation loss for objective `distill`."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "": has_objective_or_method("distill", "gkd"), "keep_remainder": is_set(".top_k")}

    beta: Share = 0.0
    """Generalised Jensen-Shannon divergence (arXiv 2306.13649, equation 1). 0: forward KL; 1: reverse KL; in
    between: divergence from a student-teacher mixture."""
    temperature: AboveZero = 1.0
    """Divisor for student and teacher logits."""
    top_k: NotNegativeInt = 0
    """Stored teacher probabilities per position, for the most probable tokens. 0: store the teacher's final
    hidden states and learn the whole vocabulary."""
    keep_remainder: bool = True
    """top_k: treat all other tokens together as one more event. False: normalise student and teacher over the
    teacher's top_k tokens (arXiv 2601.18129)."""
    ce_coeff: NotNegative = 0.0
    """Weight for an auxiliary cross-entropy on the data's tokens, over the same positions."""


@dataclass(frozen=True)
class PreferenceConfig:
    """Preference loss for objective `preference`."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "": has_objective_or_method("preference", "preference"),
        "beta": is_one_of(".method", *BETAS),
        "simpo_gamma": is_one_of(".method", "simpo"),
        "label_smoothing": is_one_of(".method", *SMOOTHING_METHODS)}

    method: PreferenceMethod = "dpo"
    """dpo: direct preference optimisation (arXiv 2305.18290); ipo: squared loss (arXiv 2310.12036); dpo-norm:
    dpo over mean instead of summed log-probabilities (arXiv 2411.15124); simpo: dpo-norm without a reference,
    with a margin (arXiv 2405.14734); orpo: odds ratio plus cross-entropy on chosen responses, without a
    reference (arXiv 2403.07691); simper: inverse perplexities, without a reference and beta (arXiv
    2502.00883); grouper: simper over response groups with rewards (K-EXAONE)."""
    beta: AboveZero | None = None
    """dpo, ipo, dpo-norm: strength of the pull towards the reference model; simpo: loss slope; orpo:
    odds ratio weight (lambda in the paper). null: the authors' value (0.1; dpo-norm 5; simpo 2)."""
    simpo_gamma: NotNegative = 0.5
    """simpo: target margin for the chosen response, in beta times log-probability per token (the authors use
    0.3 to 5)."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """dpo, dpo-norm, simpo: assumed share of pairs with swapped labels (arXiv 2305.18290, appendix)."""
    chosen_coeff: NotNegative = 0.0
    """Weight for an auxiliary cross-entropy on chosen responses, averaged over their tokens (arXiv
    2404.19733)."""

    @property
    def effective_beta(self) -> float:
        """`beta`, or the method's default; 0 for methods without beta."""
        return BETAS.get(self.method, 0.0) if self.beta is None else self.beta


@dataclass(frozen=True)
class RolloutConfig:
    """Rollouts for `rl`, in rounds: generation, reward, training. Sampling settings belong here because the
    trainer computes log-probabilities at the sampling temperature."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "": has_objective("policy"),
        "validation_every_rounds validation_samples validation_temperature": is_set("--validation")}

    rounds: NotNegativeInt = 0
    """Rounds: generation, reward and training. 0: no reinforcement learning."""
    prompts_per_round: AtLeastOne = 64
    """Prompts (response groups) trained per round."""
    samples_per_prompt: AtLeastOne = 8
    """Responses per prompt: the group size."""
    steps_per_round: AtLeastOne = 1
    """Optimizer steps per round, each on some groups in the round. 1: on-policy; more: off-policy, with
    importance ratios against the policy at the round's start."""
    max_staleness: NotNegativeInt = 0
    """Maximum lag, in rounds, for the policy that generates a round. 0: generation waits until the previous
    round is trained."""
    temperature: AboveZero = 1.0
    """Sampling temperature; the trainer divides logits by it, too."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Nucleus sampling: sample from the smallest token set with this probability. Values below 1 need
    `policy.method` = gkd or preference, because other methods compare whole distributions."""
    max_new_tokens: AtLeastOne = 1024
    """Maximum response length in tokens; with tools, over all turns and tool results together."""
    max_prompt_tokens: AtLeastOne = 1024
    """Maximum prompt length in tokens. Longer prompts are skipped and listed in the store."""
    piece_prompts: AtLeastOne = 8
    """Prompts per work item. A generation job claims an item and publishes it as one part in the store."""
    deadline_s: NotNegative = 0.0
    """Generation seconds after which an unfinished response is saved, to be continued by the next policy. 0:
    no deadline."""
    lease_s: Annotated[float, Ge(1), Lt(math.inf)] = 600.0
    """Seconds without a heartbeat after which another job may take over a claim."""
    keep_rounds: AtLeastOne = 2
    """Rounds before the newest round whose files stay in RUN/rounds. Of older rounds only manifests stay,
    once the oldest kept checkpoint is past them and while the store has their responses."""
    seed: NotNegativeInt = 0
    """Random seed for prompt order and sampling."""
    validation_every_rounds: NotNegativeInt = 10
    """Rounds between validations on the --validation prompts, in addition to validations before the first and
    after the last round. 0: only these two."""
    validation_samples: AtLeastOne = 1
    """Responses per validation prompt; more than one gives pass@k."""
    validation_temperature: NotNegative | None = None
    """Sampling temperature in validations. 0: greedy decoding; null: `temperature`."""

    def problems(self) -> list[SettingsProblem]:
        """Return every violated rule between rollout settings."""
        num_prompts = nearest_multiple(self.prompts_per_round, self.steps_per_round)
        return find_broken_rules(
            self, "rollout",
            (self.prompts_per_round % self.steps_per_round == 0, "prompts_per_round",
             f"must be a multiple of rollout.steps_per_round = {self.steps_per_round}",
             f"set rollout.prompts_per_round={num_prompts}"),
            (self.validation_temperature != 0 or self.validation_samples == 1, "validation_samples",
             "must be 1: rollout.validation_temperature = 0 gives each prompt the same response again"))

    def for_validation(self, num_prompts: int) -> "RolloutConfig":
        """Return the settings for a validation on `num_prompts` held-out prompts.

        A validation is a separate round, generated without staleness and deadline.
        """
        samples, temperature = self.validation_samples, self.validation_temperature
        return dataclasses.replace(
            self, rounds=self.rounds + 1, prompts_per_round=num_prompts, samples_per_prompt=samples,
            temperature=self.temperature if temperature is None else temperature, max_staleness=0,
            # The number of responses per work item is the same as in training.
            piece_prompts=max(1, self.piece_prompts * self.samples_per_prompt // samples),
            deadline_s=0.0)


@dataclass(frozen=True)
class PolicyParts:
    """Building blocks of a policy loss; `PolicyConfig` documents each field."""

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
    all_wrong: Kept = "keep"
    all_wrong_reward: float = 0.0
    all_right: Kept = "keep"
    max_gen_batches: int = 1
    knowledge_coeff: float = 0.0
    knowledge_share: float = 0.0
    knowledge_batch_size: int = 0
    opd_coeff: float = 0.0


_PARTS = dataclasses.asdict(PolicyParts())
_ADVANTAGE_SETTINGS = " ".join((
    *(name for name in _PARTS if name != "max_gen_batches"), "mask_truncated", "correction",
    "correction_low", "correction_high", "geo_reject_high", "geo_reject_low"))
"""Settings that only act in losses with advantages."""


def _draw_event(event: str, share: float) -> bool:
    # A hash instead of a random generator: all ranks and resumed runs draw the same without any state.
    return int.from_bytes(hashlib.blake2b(event.encode(), digest_size=8).digest()) < share * 2 ** 64


@dataclass(frozen=True)
class PolicyConfig:
    """Policy loss for objective `policy`. `method` selects the parts; parts you set yourself take precedence
    (table in docs/policy_methods.md)."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "": has_objective("policy"),
        "clip_low": is_one_of(".parts.clip", "two_sided"),
        "clip_high": is_one_of(".parts.clip", "two_sided", "cispo"),
        "kl_coeff": is_none_of(".parts.kl", "none"),
        "kl_weighted": is_one_of(".parts.kl", "k3"),
        "pkpo_k": is_one_of(".parts.advantage", "pass_at_k"),
        "all_wrong_reward": is_one_of(".parts.all_wrong", "keep"),
        "knowledge_share knowledge_batch_size": is_set(".parts.knowledge_coeff"),
        "correction_low correction_high": is_none_of(".correction", "none"),
        "geo_reject_low": is_set(".geo_reject_high"),
        "overlong_penalty": AnyOf(is_set(".overlong_buffer_tokens"), is_one_of(".method", *OVERLONG_SHARES)),
        "on_policy_share": is_one_of(".method", "gkd"),
        "reference keep_unfinished": is_one_of(".method", "preference"),
        _ADVANTAGE_SETTINGS: is_none_of(".method", "preference")}

    method: PolicyMethod = "grpo"
    """grpo (arXiv 2402.03300), dr_grpo (2503.20783), dapo (2503.14476), gspo (2507.18071), cispo
    (2506.13585), agapo (K-EXAONE), agapo_exaone4 (EXAONE 4.0, 2507.11407), mgpo (2511.06221), ink_grpo
    (2601.18129), pkpo (2505.15201), opd (on-policy distillation, Tinker cookbook), gkd (2306.13649: a
    teacher's `distillation` divergence instead of rewards), preference (`preference` loss on each group's
    best and worst response, or on all responses with preference.method = grouper)."""
    ratio: Ratio | None = None
    """Importance ratio between the current policy and the policy at the round's start, both computed by the
    trainer. token: one ratio per token; sequence: one per response, the geometric mean over its tokens."""
    clip: Clip | None = None
    """two_sided: the smaller of ratio x advantage and clipped ratio x advantage; cispo: log-probabilities
    weighted by the ratio, which is capped at 1 + `clip_high` and has no gradient; none: ratio x advantage."""
    clip_low: NotNegative | None = None
    """two_sided: lower clip bound, as a distance from 1."""
    clip_high: NotNegative | None = None
    """two_sided, cispo: upper clip bound, as a distance from 1."""
    advantage: Advantage | None = None
    """group: (reward - group mean) / group standard deviation; group_no_std: reward - group mean;
    leave_one_out: reward - mean of the group's other rewards; pass_at_k: a response's contribution to the
    maximum over `pkpo_k` responses; range: rewards scaled to -1 (group minimum) .. 1 (group maximum); none:
    0."""
    normalise_over_batch: bool | None = None
    """Normalise advantages to mean 0 and standard deviation 1 over all responses in an optimizer step."""
    aggregation: Aggregation | None = None
    """token: mean over the step's tokens; sequence: mean over per-response token means; constant: sum over
    tokens divided by responses x `rollout.max_new_tokens`."""
    kl: Kl | None = None
    """KL divergence from the model at the run's start. k1, k3: per-token estimators; sequence: cumulative
    over whole responses."""
    kl_coeff: NotNegative | None = None
    """KL divergence weight. 0: none."""
    kl_weighted: bool | None = None
    """k3: multiply by the importance ratio, so that the gradient equals that for the policy's KL divergence
    from the reference even off-policy (arXiv 2512.02556, section 3.1)."""
    mgpo_lambda: NotNegative | None = None
    """Emphasis on groups with half the responses right: advantages are multiplied by exp(-lambda D), where D
    is the divergence between the right share and 1/2 (arXiv 2511.06221). 0: off."""
    pkpo_k: NotNegativeInt | None = None
    """pass_at_k: k; the best among k responses counts."""
    all_wrong: Kept | None = None
    """Action for groups with equal rewards below `right_from`. drop: leave them out; keep: train on them with
    `all_wrong_reward`."""
    all_wrong_reward: Annotated[float, Gt(-math.inf), Le(0)] | None = None
    """keep: value added to the zero advantages in all-wrong groups before normalisation over the batch; a
    small negative number, or 0."""
    all_right: Kept | None = None
    """Action for groups with equal rewards at or above `right_from`. drop: leave them out; keep: their
    advantages are 0, and they count in means and in the KL divergence."""
    max_gen_batches: AtLeastOne | None = None
    """Replace dropped groups by groups for further prompts, until `rollout.prompts_per_round` groups remain,
    generating at most this many times the prompts per round (arXiv 2503.14476, section 3.2). 1: no
    replacement."""
    right_from: Finite = 1.0
    """Reward at or above which a response counts as right."""
    overlong_buffer_tokens: NotNegativeInt | None = None
    """Tokens at the end of `rollout.max_new_tokens` over which a length penalty grows from 0 to
    `overlong_penalty` (arXiv 2503.14476, equation 13). 0: no penalty; null: a fifth of
    `rollout.max_new_tokens` for dapo, else 0."""
    overlong_penalty: NotNegative = 1.0
    """Penalty subtracted from the reward for a response with maximum length."""
    mask_truncated: bool = False
    """Exclude truncated responses (`rollout.max_new_tokens` reached) from the loss; their rewards still count
    in the group mean."""
    correction: Correction = "token_truncate"
    """Correction for generation engines with other log-probabilities than the trainer, and for stale
    policies: multiply the loss by the probability ratio trainer / engine, per token or per response.
    truncate: clamp the ratio between `correction_low` and `correction_high`; mask: set the loss to 0 outside
    these bounds; none: no correction."""
    correction_low: NotNegative = 0.0
    """Lower bound on the correction ratio."""
    correction_high: AboveZero | None = None
    """Upper bound on the correction ratio. null: 2 for token_truncate (Yao et al. 2025); other corrections
    need a value."""
    geo_reject_high: Annotated[float, Gt(1), Lt(math.inf)] | None = None
    """Reject responses whose geometric mean trainer / engine ratio is above this or below `geo_reject_low`,
    with any `correction`. null: reject none."""
    geo_reject_low: Annotated[float, Ge(0), Lt(1)] | None = None
    """Lower bound on the geometric mean. null: 1 / `geo_reject_high`."""
    knowledge_coeff: NotNegative | None = None
    """Weight for an auxiliary cross-entropy on --data text, averaged over the text's tokens (arXiv
    2601.18129). 0: none."""
    knowledge_share: Share | None = None
    """Probability that an optimizer step includes --data text."""
    knowledge_batch_size: NotNegativeInt | None = None
    """Text sequences in such a step."""
    opd_coeff: NotNegative | None = None
    """On-policy distillation weight: adds coefficient x (teacher log-probability - policy log-probability at
    the round's start) to each token's advantage, a per-token reverse KL to the teacher (--teacher,
    --teacher-url). 0: no teacher."""
    on_policy_share: Annotated[float, Gt(0), Le(1)] = 1.0
    """gkd: probability that a round uses the policy's own responses; otherwise its steps learn from --data,
    in batches with `train.global_batch_size` samples."""
    reference: Literal["round", "run"] = "round"
    """preference: reference model for dpo, ipo and dpo-norm. round: model at the round's start, so every
    round can move as far again; run: model at the run's start."""
    keep_unfinished: bool = False
    """preference: allow truncated responses as chosen responses."""
    share_prompts: bool = True
    """Compute a prompt once for all its responses in a micro-batch; the loss is unchanged. Unsupported
    settings fall back to separate copies (docs/rl.md)."""
    router_replay: bool = False
    """Route each token in the trainer to the experts used during generation."""

    @cached_property
    def parts(self) -> PolicyParts:
        """The method's parts with the run's overrides; settings must have no problems."""
        return PolicyParts(**{name: value for name, value in self._resolve().items() if value is not None})

    @property
    def has_text(self) -> bool:
        return self.parts.knowledge_coeff > 0

    @property
    def correction_bound(self) -> float:
        """Upper bound on the correction ratio; settings must have no problems."""
        return TOKEN_TRUNCATE_HIGH if self.correction_high is None else self.correction_high

    @property
    def geo_bounds(self) -> tuple[float, float] | None:
        """Bounds (low, high) for a response's geometric mean ratio; None: no rejection."""
        high = self.geo_reject_high
        if high is None:
            return None
        return 1 / high if self.geo_reject_low is None else self.geo_reject_low, high

    def overlong_buffer(self, max_new_tokens: int) -> int:
        """Count the last tokens with a length penalty; 0: no penalty.

        Args:
            max_new_tokens: maximum response length.
        """
        if self.overlong_buffer_tokens is not None:
            return self.overlong_buffer_tokens
        return round(OVERLONG_SHARES.get(self.method, 0.0) * max_new_tokens)

    @property
    def learns_distributions(self) -> bool:
        """Whether the loss is a teacher's divergence alone (method gkd)."""
        return self.method == "gkd"

    @property
    def learns_preferences(self) -> bool:
        """Whether the loss is that of `preference`."""
        return self.method == "preference"

    @property
    def learns_from_rewards(self) -> bool:
        """Whether only rewards decide the advantages: no teacher and no preference loss."""
        return (self.parts.advantage != "none" and not self.parts.opd_coeff and not self.learns_preferences)

    def is_on_policy(self, seed: int, number: int) -> bool:
        """Return whether a round uses the policy's own responses, drawn with probability `on_policy_share`.

        Args:
            seed: `rollout.seed`.
            number: round number, from 1.
        """
        return _draw_event(f"on-policy {seed} {number}", self.on_policy_share)

    def has_text_at(self, seed: int, step: int) -> bool:
        """Return whether an optimizer step includes text, drawn with probability `knowledge_share` from seed
        and step only.

        Args:
            seed: `rollout.seed`.
            step: optimizer step, from 1.
        """
        return self.has_text and _draw_event(f"knowledge {seed} {step}", self.parts.knowledge_share)

    def _resolve(self) -> dict[str, Any]:
        """Return part -> value from the run, else from the method; None for missing numbers."""
        overrides = {name: value for name in _PARTS if (value := getattr(self, name)) is not None}
        # Later entries win: defaults, numbers without a default, the method's parts.
        method_parts = _PARTS | dict.fromkeys(NUMBERS_WITHOUT_DEFAULT) | METHODS[self.method]
        # A number belongs to its part: a clip bound of 0.2 for token ratios is wrong for sequence ratios,
        # so the run must set the number again.
        outdated = {number: None for number, parts in NUMBER_PARTS
                    if any(overrides.get(part, method_parts[part]) != method_parts[part] for part in parts)}
        return method_parts | outdated | overrides

    def _distillation_rules(self, resolved: dict[str, Any]) -> list[tuple[bool, str, str]]:
        is_gkd = self.learns_distributions
        return [(is_gkd or self.on_policy_share == 1, "on_policy_share",
                 f"needs policy.method = gkd, not {self.method}"),
                (not is_gkd or resolved["advantage"] == "none", "advantage",
                 "must be none: policy.method = gkd does not learn from rewards"),
                (not is_gkd or not resolved["opd_coeff"], "opd_coeff",
                 "must be 0: policy.method = gkd learns the whole distribution")]

    def _sampling_problems(self, rollout: RolloutConfig) -> list[SettingsProblem]:
        return find_broken_rules(
            rollout, "rollout",
            (rollout.top_p == 1 or self.learns_distributions or self.learns_preferences, "top_p",
             f"must be 1: policy.method = {self.method} compares probabilities of the whole distribution"),
            (rollout.max_staleness == 0 or self.on_policy_share == 1, "max_staleness",
             f"must be 0: with policy.on_policy_share = {self.on_policy_share:g} some rounds are not "
             "generated"))

    def problems(self, rollout: RolloutConfig) -> list[SettingsProblem]:
        """Return every violated rule between policy and rollout settings."""
        resolved = self._resolve() | {"method": self.method}
        problems = [SettingsProblem(ProblemCode.RULE, f"policy.{number}",
                                    f"is missing: policy.{part} = {resolved[part]} needs it, and "
                                    f"policy.method = {self.method} has no default for it", way_out="set it")
                    for part, values, number in REQUIRED_NUMBERS
                    if resolved[part] in values and resolved[number] is None]
        rules = [
            (resolved["clip"] != "two_sided" or (resolved["clip_low"] or 0) <= 1, "clip_low",
             "must be at most 1: ratios are not negative"),
            (resolved["advantage"] != "pass_at_k" or resolved["pkpo_k"] is None
             or 1 <= resolved["pkpo_k"] <= rollout.samples_per_prompt, "pkpo_k",
             f"must be between 1 and rollout.samples_per_prompt = {rollout.samples_per_prompt}"),
            (resolved["advantage"] != "none" or resolved["opd_coeff"] > 0 or self.learns_distributions,
             "opd_coeff", "must be above 0: policy.advantage = none needs a teacher to learn from"),
            *self._distillation_rules(resolved),
            ((self.overlong_buffer_tokens or 0) <= rollout.max_new_tokens, "overlong_buffer_tokens",
             f"must be at most rollout.max_new_tokens = {rollout.max_new_tokens}"),
            *((not resolved["knowledge_coeff"] or resolved[name] > 0, name,
               f"must be above 0: policy.knowledge_coeff = {resolved['knowledge_coeff']} needs text")
              for name in ("knowledge_share", "knowledge_batch_size"))]
        problems += [SettingsProblem(ProblemCode.RULE, f"policy.{name}", rule,
                                     resolved.get(name, getattr(self, name)))
                     for is_met, name, rule in rules if not is_met]
        if rollout.rounds and rollout.samples_per_prompt < 2 and resolved["advantage"] != "none":
            problems.append(SettingsProblem(
                ProblemCode.RULE, "rollout.samples_per_prompt", "must be at least 2: objective policy "
                "compares the responses of a group", rollout.samples_per_prompt))
        if resolved["opd_coeff"] and rollout.temperature != 1:
            problems.append(SettingsProblem(
                ProblemCode.RULE, "rollout.temperature", f"must be 1: policy.opd_coeff = "
                f"{resolved['opd_coeff']:g} compares with the teacher's unscaled probabilities",
                rollout.temperature))
        problems += self._sampling_problems(rollout)
        bound, corrects = self.correction_bound, self.correction != "none"
        has_bound = self.correction_high is not None or self.correction in ("none", "token_truncate")
        return problems + find_broken_rules(
            self, "policy",
            (has_bound, "correction_high", f"must be a number: policy.correction = {self.correction} needs "
             "it", "set it"),
            (not corrects or not has_bound or self.correction_low < bound, "correction_low",
             f"must be below policy.correction_high = {bound:g}"))
