"""Policy losses and gradients against the formulas of the papers, token by token."""

import itertools
import math
import random
from typing import Any

import pytest
import torch

from megatron_sov.model.config import PolicyConfig
from megatron_sov.post import policy
from megatron_sov.post.policy import PolicyLoss
from megatron_sov.post.sft import ResponseSpans

LENGTHS, LONGEST, SEED = (5, 1, 3, 4, 2), 6, 0
"""Lengths of the responses in a row, the longest allowed length, and the seed of all draws."""
CASES: list[dict[str, Any]] = [
    {"method": "grpo", "kl_coeff": 0.3}, {"method": "grpo", "kl_coeff": 0.3, "kl_weighted": False},
    {"method": "dr_grpo"}, {"method": "dapo"},
    {"method": "gspo", "clip_low": 0.05, "clip_high": 0.05, "kl": "k3", "kl_coeff": 0.4},
    {"method": "dapo", "geo_reject_high": 1.05},
    {"method": "dr_grpo", "geo_reject_low": 0.97, "geo_reject_high": 1.2, "correction": "none"},
    {"method": "grpo", "geo_reject_high": 1.05, "correction": "token_mask", "correction_low": 0.75,
     "correction_high": 1.3},
    {"method": "gspo", "clip_low": 0.05, "clip_high": 0.05}, {"method": "cispo", "clip_high": 0.25},
    {"method": "agapo", "clip_high": 0.25},
    {"method": "agapo_exaone4", "kl_coeff": 0.2, "all_wrong_reward": -0.1},
    {"method": "mgpo", "clip_low": 0.2, "clip_high": 0.2, "mgpo_lambda": 1.0},
    {"method": "ink_grpo"}, {"method": "pkpo", "pkpo_k": 2},
    {"method": "dapo", "kl": "k1", "kl_coeff": 0.5, "ratio": "sequence", "clip_low": 0.2, "clip_high": 0.28,
     "correction": "none"},
    {"method": "cispo", "clip_high": 0.2, "ratio": "sequence", "aggregation": "constant"},
    *({"method": method, "correction": correction, "correction_low": 0.75, "correction_high": 1.3}
      for method in ("grpo", "dapo", "gspo")
      for correction in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"))]


def draw_row() -> tuple[dict[str, Any], Any, Any]:
    """Draw a row of responses with masked labels between them.

    Returns the columns of the rollouts, the policy's log-probabilities (some masked labels have -inf), and
    the spans of the responses.
    """
    generator = random.Random(SEED)
    index: list[int] = []
    for response, length in enumerate(LENGTHS):
        index += [len(LENGTHS)] * generator.randint(1, 3) + [response] * length
    is_learned = torch.tensor(index) < len(LENGTHS)

    def draw_values(spread: float, center: Any = None) -> Any:
        if center is None:
            center = torch.tensor([-3 * generator.random() - 1.5 for _ in index]).double()
        return center + spread * torch.tensor([generator.uniform(-1, 1) for _ in index]).double()

    behaviour = draw_values(0.0)
    columns = {"behaviour_logprobs": behaviour, "old_logprobs": draw_values(0.3, behaviour),
               "reference_logprobs": draw_values(0.5, behaviour),
               "advantage": torch.tensor([(-1.5, 0.7, 1.1, -0.4, 0.9, 9.0)[i] for i in index]).double()}
    logprobs = torch.where(is_learned, draw_values(1.2, behaviour), -torch.inf)
    lengths = torch.tensor([float(n) for n in LENGTHS]).double()
    return columns, logprobs, ResponseSpans(torch.tensor(index), lengths)


def compute_loss(policy: PolicyConfig, columns: Any, logprobs: Any, responses: Any) -> tuple[Any, Any, Any]:
    """Return the loss, its gradient over the log-probabilities, and the meters."""
    policy_loss = PolicyLoss(policy, LONGEST)
    logprobs = logprobs.clone().requires_grad_()
    terms, meters = policy_loss.compute_terms(logprobs, columns, responses)
    counts = policy_loss.count_denominators(responses)
    loss = sum(policy_loss.coefficients[t] * terms[t] / counts[t] for t in policy_loss.coefficients)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient.tolist(), {name: float(a / b) for name, (a, b) in meters.items()}


def compute_by_hand(policy: PolicyConfig, columns: Any, logprobs: Any,
                    responses: Any) -> tuple[float, list[float]]:
    """Compute loss and gradient of `compute_loss` by loops in plain Python, with derivatives by hand."""
    parts = policy.parts
    logprob, old, reference = (
        values.tolist() for values in (logprobs, columns["old_logprobs"], columns["reference_logprobs"]))
    index = responses.index.tolist()
    positions_by_response = [[t for t, i in enumerate(index) if i == response]
                             for response in range(len(LENGTHS))]
    corrections = compute_corrections_by_hand(policy, columns, positions_by_response)
    # Masked tokens still count in the denominators, as in IcePop and TRL's trainer.
    num_tokens, loss, gradient = sum(map(len, positions_by_response)), 0.0, [0.0] * len(logprob)
    for positions in positions_by_response:
        n, a = len(positions), columns["advantage"][positions[0]].item()
        normalizer = {"token": 1 / num_tokens, "sequence": 1 / (n * len(positions_by_response)),
                      "constant": 1 / (len(positions_by_response) * LONGEST)}[parts.aggregation]
        sequence_ratio = math.exp(sum(logprob[t] - old[t] for t in positions) / n)
        cumulative = sum(logprob[t] - reference[t] for t in positions)
        if parts.kl == "sequence":
            loss += parts.kl_coeff * cumulative / len(positions_by_response)
        for t in positions:
            is_sequence_ratio = parts.ratio == "sequence"
            ratio = sequence_ratio if is_sequence_ratio else math.exp(logprob[t] - old[t])
            ratio_terms = [(u, 1 / n) for u in positions] if is_sequence_ratio else [(t, 1.0)]
            weight = normalizer * corrections[t]
            if parts.clip == "cispo":
                clipped_ratio = min(ratio, 1 + parts.clip_high)
                loss -= weight * clipped_ratio * a * logprob[t]
                gradient[t] -= weight * clipped_ratio * a
            else:
                bound = (1 + parts.clip_high) if a > 0 else (1 - parts.clip_low)
                is_clipped = parts.clip == "two_sided" and (ratio > bound if a > 0 else ratio < bound)
                loss -= weight * a * (bound if is_clipped else ratio)
                for u, share in ratio_terms:
                    gradient[u] -= 0.0 if is_clipped else weight * a * ratio * share
            log_ratio = logprob[t] - reference[t]
            if parts.kl == "k3":
                estimate = math.exp(-log_ratio) + log_ratio - 1
                kl_weight = ratio if parts.kl_weighted else 1.0
                loss += parts.kl_coeff * normalizer * kl_weight * estimate
                gradient[t] += parts.kl_coeff * normalizer * kl_weight * (1 - math.exp(-log_ratio))
                for u, share in ratio_terms if parts.kl_weighted else ():
                    gradient[u] += parts.kl_coeff * normalizer * ratio * share * estimate
            elif parts.kl == "k1":
                loss += parts.kl_coeff * normalizer * log_ratio
                gradient[t] += parts.kl_coeff * normalizer * log_ratio
            elif parts.kl == "sequence":
                gradient[t] += parts.kl_coeff * cumulative / len(positions_by_response)
    return loss, gradient


def compute_corrections_by_hand(policy: PolicyConfig, columns: Any,
                                positions_by_response: Any) -> list[float]:
    """Return the weight of each token for the difference between trainer and engine; 0: masked."""
    low, high = policy.correction_low, policy.correction_bound
    log_ratios = (columns["old_logprobs"] - columns["behaviour_logprobs"]).tolist()
    corrections = [1.0] * len(log_ratios)
    for positions in positions_by_response:
        total = sum(log_ratios[t] for t in positions)
        for t in positions:
            weight = math.exp(total if policy.correction.startswith("sequence") else log_ratios[t])
            if policy.correction.endswith("truncate"):
                corrections[t] = min(max(weight, low), high)
            elif policy.correction.endswith("mask"):
                corrections[t] = weight if low <= weight <= high else 0.0
        if policy.geo_reject_high:
            mean_ratio = math.exp(total / len(positions))
            geo_low = policy.geo_reject_low or 1 / policy.geo_reject_high
            if not geo_low <= mean_ratio <= policy.geo_reject_high:
                for t in positions:
                    corrections[t] = 0.0
    return corrections


@pytest.mark.each("case", CASES)
def test_loss_and_derivatives_are_the_papers(case: dict[str, Any]) -> None:
    policy = PolicyConfig(**case)
    loss, gradient, meters = compute_loss(policy, *draw_row())
    expected_loss, expected_gradient = compute_by_hand(policy, *draw_row())
    assert loss == pytest.approx(expected_loss, abs=1e-12) and math.isfinite(loss)
    assert gradient == pytest.approx(expected_gradient, abs=1e-12)
    if policy.parts.clip != "none":
        assert 0 < meters["clip_share"] < 1, "the case clips no token, or all tokens"


@pytest.mark.each("clip", ["two_sided", "cispo", "none"])
@pytest.mark.each("ratio", ["token", "sequence"])
def test_on_responses_of_the_policy_itself_every_method_is_reinforce(clip: Any, ratio: Any) -> None:
    columns, logprobs, responses = draw_row()
    is_learned = responses.index < len(responses)
    columns["behaviour_logprobs"] = logprobs.where(is_learned, 0.0)
    columns["old_logprobs"][:] = math.nan  # in the first step of a round the loss must not read this column
    _, gradient, meters = compute_loss(PolicyConfig("dapo", clip=clip, ratio=ratio), columns, logprobs,
                                       responses)
    expected = (-columns["advantage"] * is_learned / sum(LENGTHS)).tolist()
    assert gradient == pytest.approx(expected, abs=1e-15)
    assert (meters["ratio"], meters["clip_share"], meters["engine_gap"], meters["engine_kl"]) == (1, 0, 0, 0)


@pytest.mark.each("method", ["gspo", "grpo", "dapo", "cispo"])
def test_engine_rounding_is_not_clipped_and_both_signs_have_gradients(method: Any) -> None:
    """Log-probabilities of trainer and engine differ as arXiv 2510.11370 measured for Qwen3-8B: a Gaussian
    gap with a KL divergence of 6.4e-4 per token."""
    torch.manual_seed(0)
    num, length, kl = 32, 4096, 6.4e-4
    gap = torch.randn(num * length).double() * math.sqrt(2 * kl) - kl  # trainer - engine
    advantage = torch.tensor([1.0, -1.0]).double().repeat(num // 2).repeat_interleave(length)
    logprobs = torch.full_like(gap, -1.0).requires_grad_()
    columns = {"advantage": advantage, "behaviour_logprobs": logprobs.detach() - gap,
               "old_logprobs": torch.full_like(gap, math.nan),
               "reference_logprobs": torch.full_like(gap, -1.0)}
    responses = ResponseSpans(torch.arange(num).repeat_interleave(length),
                              torch.full((num,), float(length)).double())
    policy = PolicyConfig(method, clip_high=0.2 if method == "cispo" else None)
    terms, meters = PolicyLoss(policy, length).compute_terms(logprobs, columns, responses)
    (gradient,) = torch.autograd.grad(terms["policy"], logprobs)
    has_gradient = (gradient.view(num, length).abs().sum(1) > 0).view(-1, 2).double().mean(0)
    assert has_gradient.tolist() == [1, 1] and float(meters["clip_share"][0]) == 0
    up, down = gradient.view(-1, 2, length).sum((0, 2)).tolist()
    assert up == pytest.approx(-down, rel=1e-3)
    assert float(meters["engine_kl"][0] / meters["engine_kl"][1]) == pytest.approx(kl, rel=0.02)


def test_a_user_loss_replaces_the_surrogate() -> None:
    """At ratio 1 the configured surrogate is REINFORCE's, with the same derivative."""
    columns, logprobs, responses = draw_row()
    policy = PolicyConfig("grpo", clip_low=0.2, clip_high=0.2, kl="none", correction="none")
    columns["old_logprobs"] = logprobs.detach().clone()
    gradients = []
    for loss in (None, lambda ratio, logprobs, advantage: -advantage * logprobs,
                 lambda ratio, logprobs, advantage: -2 * advantage * logprobs):
        parameters = logprobs.detach().clone().requires_grad_()
        terms, _ = PolicyLoss(policy, LONGEST, loss).compute_terms(parameters, columns, responses)
        gradients.append(torch.autograd.grad(terms["policy"], parameters)[0].double())
    assert torch.allclose(gradients[0], gradients[1]) and torch.allclose(2 * gradients[0], gradients[2])
    assert gradients[0].abs().sum() > 0


def test_teacher_signal_is_the_difference_of_logprobs() -> None:
    columns, logprobs, responses = draw_row()
    is_learned = responses.index < len(LENGTHS)
    # The loss must not read the teacher's log-probabilities at masked positions.
    teacher = columns["behaviour_logprobs"] - 0.3 * columns["advantage"]
    columns["teacher_logprobs"] = torch.where(is_learned, teacher, torch.inf)
    columns["old_logprobs"] = torch.full_like(logprobs, torch.nan)  # first step of a round
    cases: list[tuple[Any, float, float]] = [("opd", 1.0, 0.0), ("opd", 0.5, 0.0), ("dapo", 2.0, 1.0)]
    for method, coeff, reward_coeff in cases:
        policy = PolicyConfig(method, opd_coeff=coeff, correction="none")
        advantage = reward_coeff * columns["advantage"]
        loss, gradient, meters = compute_loss(policy, {**columns, "advantage": advantage}, logprobs,
                                              responses)
        gaps = (columns["teacher_logprobs"] - logprobs)[is_learned]
        expected = -(advantage[is_learned] + coeff * gaps) / len(gaps)
        torch.testing.assert_close(torch.tensor(gradient, dtype=torch.float64)[is_learned], expected,
                                   rtol=1e-12, atol=0)
        assert not torch.tensor(gradient)[~is_learned].any()
        assert loss == pytest.approx(float(expected.sum()), rel=1e-12)
        assert meters["reverse_kl"] == pytest.approx(float(-gaps.mean()), rel=1e-12)


def compute_trl_loss(settings: dict[str, Any], columns: Any, logprobs: Any, index: Any) -> Any:
    """Compute the loss of TRL 1.16's `GRPOTrainer` with vLLM, over padded responses.

    `settings` are ours: "correction" stands for TRL's `vllm_importance_sampling_mode`.
    """
    rows, width = sorted(set(index.tolist())), int(index.bincount().max())
    mask = torch.zeros(len(rows), width).double()
    padded = {name: torch.zeros(len(rows), width).double() for name in (*columns, "x")}
    for row, response in enumerate(rows):
        positions = (index == response).nonzero()[:, 0]
        mask[row, :len(positions)] = 1
        for name, values in (*columns.items(), ("x", logprobs)):
            padded[name][row, :len(positions)] = values[positions]
    x, old = padded["x"], padded["old_logprobs"]
    log_importance = (old - padded["behaviour_logprobs"]) * mask
    level, kind = settings["correction"].split("_")
    importance = (log_importance.sum(1, keepdim=True) if level == "sequence" else log_importance).exp()
    low, high = settings["correction_low"], settings["correction_high"]
    if kind == "truncate":
        importance = importance.clamp(low, high)
    else:
        importance = importance.masked_fill((importance < low) | (importance > high), 0.0)
    log_ratios = x - old
    if settings["method"] == "gspo":
        log_ratios = ((log_ratios * mask).sum(1) / mask.sum(1).clamp(min=1))[:, None]
    ratio, advantages = log_ratios.exp(), padded["advantage"]
    clip = settings["clip_low"]
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages) * importance
    if settings["method"] == "grpo":
        log_ratio = padded["reference_logprobs"] - x
        kl = log_ratio.exp() - log_ratio - 1
        loss = loss + settings["kl_coeff"] * kl * ratio  # `ratio` as with TRL's use_bias_correction_kl
    return ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


@pytest.mark.each("masked", ["some", "one whole response", "the whole batch"])
@pytest.mark.each("correction", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.each("method", ["grpo", "gspo"])
def test_two_steps_of_a_round_equal_trl(method: Any, correction: Any, masked: str) -> None:
    """A linear model with our loss and one with TRL's learn a round of two batches: responses 0 and 2, then
    1 to 4. At the first step of a round, the old log-probabilities are the current ones."""
    settings: dict[str, Any] = {"method": method, "clip_low": 0.1, "clip_high": 0.1, "correction": correction,
                                "correction_low": 0.8, "correction_high": 1.25}
    settings |= {"kl_coeff": 0.3} if method == "grpo" else {}
    policy_loss = PolicyLoss(PolicyConfig(**settings), LONGEST)
    columns, _, responses = draw_row()
    torch.manual_seed(0)
    features, initial_weights = torch.randn(len(responses.index), 3).double(), torch.randn(3).double()
    initial_logprobs = -torch.nn.functional.softplus(features @ initial_weights)
    columns["behaviour_logprobs"] = initial_logprobs + columns["behaviour_logprobs"] - columns["old_logprobs"]
    columns["old_logprobs"] = initial_logprobs
    shift = {"some": torch.zeros_like(initial_logprobs), "one whole response": 2.0 * (responses.index == 2),
             "the whole batch": torch.full_like(initial_logprobs, 2.0)}[masked]
    columns["behaviour_logprobs"] = columns["behaviour_logprobs"] - shift
    weights, trl_weights = initial_weights.clone().requires_grad_(), initial_weights.clone().requires_grad_()
    for step, batch in enumerate(([0, 2], [1, 2, 3, 4])):
        is_in_batch = torch.isin(responses.index, torch.tensor(batch))
        index = torch.where(is_in_batch, responses.index, len(LENGTHS))
        lengths = torch.tensor([n * (i in batch) for i, n in enumerate(LENGTHS)]).double()
        batch_responses = ResponseSpans(index, lengths)
        unset = {"old_logprobs": torch.full_like(initial_logprobs, math.nan)}
        step_columns = columns if step else columns | unset
        terms, meters = policy_loss.compute_terms(-torch.nn.functional.softplus(features @ weights),
                                                  step_columns, batch_responses)
        counts = policy_loss.count_denominators(batch_responses)
        loss = sum(policy_loss.coefficients[t] * terms[t] / counts[t] for t in policy_loss.coefficients)
        trl_logprobs = -torch.nn.functional.softplus(features @ trl_weights)
        trl_columns = columns if step else columns | {"old_logprobs": trl_logprobs.detach()}
        expected = compute_trl_loss(settings, {k: v[is_in_batch] for k, v in trl_columns.items()},
                                    trl_logprobs[is_in_batch], index[is_in_batch])
        assert loss.item() == pytest.approx(expected.item(), abs=1e-14)
        if correction.endswith("mask") and masked == "the whole batch":
            assert float(meters["masked_share"][0] / meters["masked_share"][1]) == 1
        for parameters, step_loss in ((weights, loss), (trl_weights, expected)):
            (gradient,) = torch.autograd.grad(step_loss, parameters)
            with torch.no_grad():
                parameters -= 0.5 * gradient
    assert weights.tolist() == pytest.approx(trl_weights.tolist(), abs=1e-13)
    is_unchanged = correction.endswith("mask") and masked == "the whole batch" and method == "gspo"
    assert (weights.tolist() == initial_weights.tolist()) is is_unchanged


def test_masked_labels_are_measured() -> None:
    columns, logprobs, responses = draw_row()
    is_learned = responses.index < len(responses)
    gaps = (columns["old_logprobs"] - columns["behaviour_logprobs"])[is_learned]
    means = [gap.mean().exp() for gap in gaps.split(list(LENGTHS))]
    rejected = sum(n for n, mean in zip(LENGTHS, means, strict=True) if not 1 / 1.02 <= mean <= 1.02)
    cases: Any = (({"correction": "token_mask"}, ((gaps.exp() < 0.9) | (gaps.exp() > 1.1)).double().mean()),
                  ({"correction": "token_truncate", "geo_reject_high": 1.02}, rejected / sum(LENGTHS)),
                  ({"correction": "token_truncate"}, None))
    for settings, expected_share in cases:
        policy: Any = PolicyConfig("dapo", correction_low=0.9, correction_high=1.1, **settings)
        _, _, meters = compute_loss(policy, columns, logprobs, responses)
        assert meters["engine_gap"] == pytest.approx(float(gaps.mean()), abs=1e-12)
        assert meters["engine_kl"] == pytest.approx(float((gaps.exp() - gaps - 1).mean()), abs=1e-12)
        if expected_share is None:
            assert "masked_share" not in meters
        else:
            assert meters["masked_share"] == pytest.approx(float(expected_share)) and 0 < expected_share < 1


def test_divergences_have_the_documented_gradients() -> None:
    """Expectations are exact: they are sums over all responses of two tokens."""
    torch.manual_seed(0)
    first, second, ref_first, ref_second = (torch.randn(s).double() for s in ((3,), (3, 3), (3,), (3, 3)))
    inputs = (first.requires_grad_(), second.requires_grad_())
    # log-probabilities of the first token by policy (p) and reference (q), and of the second given the first
    p, q = first.log_softmax(-1), ref_first.log_softmax(-1)
    p2, q2 = second.log_softmax(-1), ref_second.log_softmax(-1)

    def compute_gradient(value: Any) -> Any:
        return torch.cat([g.flatten() for g in torch.autograd.grad(
            value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)])

    def have_equal_gradients(a: Any, b: Any) -> bool:
        return bool(torch.allclose(compute_gradient(a), compute_gradient(b), atol=1e-12, rtol=0))

    probabilities = p.detach().exp()
    assert have_equal_gradients((probabilities * policy.k1(p, q)).sum(), (p.exp() * (p - q)).sum())
    assert have_equal_gradients((probabilities * policy.k3(p, q)).sum(), (q.exp() * (q - p)).sum())
    # On responses of an older policy, k3 weighted by the importance ratio is unbiased in value and gradient.
    older = torch.randn(3).double().softmax(-1)
    assert have_equal_gradients((older * (p.exp() / older) * policy.k3(p, q)).sum(),
                                (p.exp() * (p - q)).sum())
    exact = (p.exp() * (p - q)).sum() + (p.exp()[:, None] * p2.exp() * (p2 - q2)).sum()
    estimated: Any = 0.0
    responses = ResponseSpans(torch.tensor([0, 0]), torch.tensor([2.0]).double())
    for a, b in itertools.product(range(3), repeat=2):
        logprobs, reference = torch.stack([p[a], p2[a, b]]), torch.stack([q[a], q2[a, b]])
        divergence = policy.sequence_kl(logprobs, reference, responses).sum()
        estimated = estimated + logprobs.detach().sum().exp() * divergence
    assert have_equal_gradients(estimated, exact)
    assert estimated.item() == pytest.approx(exact.item(), abs=1e-12)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_infinite_log_ratios_keep_gradients_finite(kind: Any) -> None:
    responses = ResponseSpans(torch.zeros(2, dtype=torch.long), torch.tensor([2.0]).double())
    likely = torch.tensor([-1.0, -2.0]).double()
    for sign in (1, -1):  # the engine, then the policy, gives the tokens a probability of about e^-2000
        logprobs = (likely - (2000 if sign < 0 else 0)).requires_grad_()
        other = likely - (2000 if sign > 0 else 0)
        ratios = policy.compute_importance_ratios(logprobs, other, responses, kind)
        policy_config = PolicyConfig(method="grpo", correction="sequence_truncate", correction_high=2.0)
        weights = policy.compute_engine_correction(logprobs.detach(), other, responses, policy_config)
        # The clip and the correction bound the loss, but an infinite ratio before them would make the
        # gradient NaN.
        loss = torch.min(ratios * -1.0, ratios.clamp(0.8, 1.2) * -1.0) * weights
        (loss + policy.k3(logprobs, other)).sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(logprobs.grad).all()
        assert ratios.tolist() == pytest.approx([math.exp(sign * 20)] * 2)  # clamped to e^20 or e^-20
