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


def row() -> tuple[dict[str, Any], Any, Any]:
    """Return columns, log-probabilities and responses of a row, with masked labels between responses, some of
    them impossible."""
    drawn = random.Random(SEED)
    index: list[int] = []
    for response, length in enumerate(LENGTHS):
        index += [len(LENGTHS)] * drawn.randint(1, 3) + [response] * length
    learned = torch.tensor(index) < len(LENGTHS)

    def numbers(spread: float, near: Any = None) -> Any:
        base = torch.tensor([-3 * drawn.random() - 1.5 for _ in index]).double() if near is None else near
        return base + spread * torch.tensor([drawn.uniform(-1, 1) for _ in index]).double()

    behaviour = numbers(0.0)
    columns = {"behaviour_logprobs": behaviour, "old_logprobs": numbers(0.3, behaviour),
               "reference_logprobs": numbers(0.5, behaviour),
               "advantage": torch.tensor([(-1.5, 0.7, 1.1, -0.4, 0.9, 9.0)[i] for i in index]).double()}
    logprobs = torch.where(learned, numbers(1.2, behaviour), -torch.inf)
    lengths = torch.tensor([float(n) for n in LENGTHS]).double()
    return columns, logprobs, ResponseSpans(torch.tensor(index), lengths)


def ours(policy: PolicyConfig, columns: Any, logprobs: Any, responses: Any) -> tuple[Any, Any, Any]:
    """Return the whole loss, its derivatives and the meters."""
    policy_loss = PolicyLoss(policy, LONGEST)
    logprobs = logprobs.clone().requires_grad_()
    terms, meters = policy_loss.compute_terms(logprobs, columns, responses)
    counts = policy_loss.count_denominators(responses)
    loss = sum(policy_loss.coefficients[t] * terms[t] / counts[t] for t in policy_loss.coefficients)
    (slopes,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), slopes.tolist(), {name: float(a / b) for name, (a, b) in meters.items()}


def written_out(policy: PolicyConfig, columns: Any, logprobs: Any,
                responses: Any) -> tuple[float, list[float]]:
    """Return the same by loops in plain Python, derivatives by hand."""
    parts, (low, high) = policy.parts, (policy.correction_low, policy.correction_bound)
    x, old, behaviour, reference = (v.tolist() for v in (
        logprobs, columns["old_logprobs"], columns["behaviour_logprobs"], columns["reference_logprobs"]))
    factor, learned = [1.0] * len(x), []
    for response in range(len(LENGTHS)):
        places = [t for t, i in enumerate(responses.index.tolist()) if i == response]
        whole = math.prod(math.exp(old[t] - behaviour[t]) for t in places)
        for t in places:
            w = whole if policy.correction.startswith("sequence") else math.exp(old[t] - behaviour[t])
            if policy.correction.endswith("truncate"):
                factor[t] = min(max(w, low), high)
            elif policy.correction.endswith("mask"):
                factor[t] = w if low <= w <= high else 0.0
        mean_ratio = math.exp(sum(old[t] - behaviour[t] for t in places) / len(places))
        if (most := policy.geo_reject_high) and not (policy.geo_reject_low or 1 / most) <= mean_ratio <= most:
            factor = [0.0 if t in places else w for t, w in enumerate(factor)]
        learned.append(places)  # a mask takes nothing out of a mean (IcePop, and TRL's trainer)
    num_tokens, loss, slopes = sum(map(len, learned)), 0.0, [0.0] * len(x)
    for places in learned:
        n, a = len(places), columns["advantage"][places[0]].item()
        share = {"token": 1 / num_tokens, "sequence": 1 / (n * len(learned)),
                 "constant": 1 / (len(learned) * LONGEST)}[parts.aggregation]
        mean = math.exp(sum(x[t] - old[t] for t in places) / n)
        cumulative = sum(x[t] - reference[t] for t in places)
        if parts.kl == "sequence":
            loss += parts.kl_coeff * cumulative / len(learned)
        for t in places:
            by_sequence = parts.ratio == "sequence"
            ratio = mean if by_sequence else math.exp(x[t] - old[t])
            moved = [(u, 1 / n) for u in places] if by_sequence else [(t, 1.0)]
            weight = share * factor[t]
            if parts.clip == "cispo":
                bounded = min(ratio, 1 + parts.clip_high)
                loss -= weight * bounded * a * x[t]
                slopes[t] -= weight * bounded * a
            else:
                bound = (1 + parts.clip_high) if a > 0 else (1 - parts.clip_low)
                is_clipped = parts.clip == "two_sided" and (ratio > bound if a > 0 else ratio < bound)
                loss -= weight * a * (bound if is_clipped else ratio)
                for u, part in moved:
                    slopes[u] -= 0.0 if is_clipped else weight * a * ratio * part
            apart = x[t] - reference[t]
            if parts.kl == "k3":
                estimate, by = math.exp(-apart) + apart - 1, ratio if parts.kl_weighted else 1.0
                loss += parts.kl_coeff * share * by * estimate
                slopes[t] += parts.kl_coeff * share * by * (1 - math.exp(-apart))
                for u, part in moved if parts.kl_weighted else ():
                    slopes[u] += parts.kl_coeff * share * ratio * part * estimate
            elif parts.kl == "k1":
                loss += parts.kl_coeff * share * apart
                slopes[t] += parts.kl_coeff * share * apart
            elif parts.kl == "sequence":
                slopes[t] += parts.kl_coeff * cumulative / len(learned)
    return loss, slopes


@pytest.mark.each("asked", CASES)
def test_loss_and_derivatives_are_the_papers(asked: dict[str, Any]) -> None:
    policy = PolicyConfig(**asked)
    loss, slopes, meters = ours(policy, *row())
    expected, by_hand = written_out(policy, *row())
    assert loss == pytest.approx(expected, abs=1e-12) and math.isfinite(loss)
    assert slopes == pytest.approx(by_hand, abs=1e-12)
    if policy.parts.clip != "none":
        assert 0 < meters["clip_share"] < 1, "the case shows nothing of the clip"


@pytest.mark.each("clip", ["two_sided", "cispo", "none"])
@pytest.mark.each("ratio", ["token", "sequence"])
def test_on_responses_of_the_policy_itself_every_method_is_reinforce(clip: Any, ratio: Any) -> None:
    columns, logprobs, responses = row()
    learned = responses.index < len(responses)
    columns["behaviour_logprobs"] = logprobs.where(learned, 0.0)
    columns["old_logprobs"][:] = math.nan  # as of a round's first step
    _, slopes, meters = ours(PolicyConfig("dapo", clip=clip, ratio=ratio), columns, logprobs, responses)
    expected = (-columns["advantage"] * learned / sum(LENGTHS)).tolist()
    assert slopes == pytest.approx(expected, abs=1e-15)
    assert (meters["ratio"], meters["clip_share"], meters["engine_gap"], meters["engine_kl"]) == (1, 0, 0, 0)


@pytest.mark.each("method", ["gspo", "grpo", "dapo", "cispo"])
def test_engine_rounding_is_not_clipped_and_both_signs_have_gradients(method: Any) -> None:
    """At the mismatch that arXiv 2510.11370 measured for Qwen3-8B: KL of 6.4e-4 a token, Gaussian."""
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
    (slopes,) = torch.autograd.grad(terms["policy"], logprobs)
    teaches = (slopes.view(num, length).abs().sum(1) > 0).view(-1, 2).double().mean(0)
    assert teaches.tolist() == [1, 1] and float(meters["clip_share"][0]) == 0
    up, down = slopes.view(-1, 2, length).sum((0, 2)).tolist()
    assert up == pytest.approx(-down, rel=1e-3)
    assert float(meters["engine_kl"][0] / meters["engine_kl"][1]) == pytest.approx(kl, rel=0.02)


def test_a_user_loss_replaces_the_surrogate() -> None:
    """At ratio 1 the configured surrogate is REINFORCE's, with the same derivative."""
    columns, logprobs, responses = row()
    policy = PolicyConfig("grpo", clip_low=0.2, clip_high=0.2, kl="none", correction="none")
    columns["old_logprobs"] = logprobs.detach().clone()
    slopes = []
    for loss in (None, lambda ratio, logprobs, advantage: -advantage * logprobs,
                 lambda ratio, logprobs, advantage: -2 * advantage * logprobs):
        at = logprobs.detach().clone().requires_grad_()
        terms, _ = PolicyLoss(policy, LONGEST, loss).compute_terms(at, columns, responses)
        slopes.append(torch.autograd.grad(terms["policy"], at)[0].double())
    assert torch.allclose(slopes[0], slopes[1]) and torch.allclose(2 * slopes[0], slopes[2])
    assert slopes[0].abs().sum() > 0


def test_teacher_signal_is_the_difference_of_logprobs() -> None:
    columns, logprobs, responses = row()
    learned = responses.index < len(LENGTHS)
    # masked positions may have any teacher value
    teacher = columns["behaviour_logprobs"] - 0.3 * columns["advantage"]
    columns["teacher_logprobs"] = torch.where(learned, teacher, torch.inf)
    columns["old_logprobs"] = torch.full_like(logprobs, torch.nan)  # a step on responses of its own
    cases: list[tuple[Any, float, float]] = [("opd", 1.0, 0.0), ("opd", 0.5, 0.0), ("dapo", 2.0, 1.0)]
    for method, coeff, of_reward in cases:
        policy = PolicyConfig(method, opd_coeff=coeff, correction="none")
        advantage = of_reward * columns["advantage"]
        loss, slopes, meters = ours(policy, {**columns, "advantage": advantage}, logprobs, responses)
        apart = [(float(t), float(x), float(a)) for t, x, a, is_learned in zip(
            columns["teacher_logprobs"], logprobs, advantage, learned, strict=True) if is_learned]
        expected = [-(a + coeff * (t - x)) / len(apart) for t, x, a in apart]
        assert [s for s, is_learned in zip(slopes, learned, strict=True) if is_learned] == (
            pytest.approx(expected, rel=1e-12))
        assert not any(s for s, is_learned in zip(slopes, learned, strict=True) if not is_learned)
        assert loss == pytest.approx(sum(expected), rel=1e-12)
        assert meters["reverse_kl"] == pytest.approx(sum(x - t for t, x, _ in apart) / len(apart), rel=1e-12)


def compute_trl_loss(asked: dict[str, Any], columns: Any, logprobs: Any, index: Any) -> Any:
    """Return the loss as `GRPOTrainer` of TRL 1.16 computes it with vLLM, in words of ours: over padded
    responses, `vllm_importance_sampling_mode` as the correction."""
    rows, width = sorted(set(index.tolist())), int(index.bincount().max())
    mask = torch.zeros(len(rows), width).double()
    padded = {name: torch.zeros(len(rows), width).double() for name in (*columns, "x")}
    for row, response in enumerate(rows):
        places = (index == response).nonzero()[:, 0]
        mask[row, :len(places)] = 1
        for name, values in (*columns.items(), ("x", logprobs)):
            padded[name][row, :len(places)] = values[places]
    x, old = padded["x"], padded["old_logprobs"]
    apart = (old - padded["behaviour_logprobs"]) * mask
    level, kind = asked["correction"].split("_")
    importance = (apart.sum(1, keepdim=True) if level == "sequence" else apart).exp()
    low, high = asked["correction_low"], asked["correction_high"]
    importance = (importance.clamp(low, high) if kind == "truncate"
                  else importance.masked_fill((importance < low) | (importance > high), 0.0))
    moved = x - old
    if asked["method"] == "gspo":
        moved = ((moved * mask).sum(1) / mask.sum(1).clamp(min=1))[:, None]
    ratio, gains = moved.exp(), padded["advantage"]
    clip = asked["clip_low"]
    loss = -torch.min(ratio * gains, ratio.clamp(1 - clip, 1 + clip) * gains) * importance
    if asked["method"] == "grpo":
        beyond = padded["reference_logprobs"] - x
        loss = loss + asked["kl_coeff"] * (beyond.exp() - beyond - 1) * ratio  # use_bias_correction_kl
    return ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


@pytest.mark.each("masked", ["some", "one whole response", "the whole batch"])
@pytest.mark.each("correction", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.each("method", ["grpo", "gspo"])
def test_two_steps_of_a_round_equal_trl(method: Any, correction: Any, masked: str) -> None:
    """A linear model learns a round of two batches; in the first `old` is the step's own."""
    asked: dict[str, Any] = {"method": method, "clip_low": 0.1, "clip_high": 0.1, "correction": correction,
                             "correction_low": 0.8, "correction_high": 1.25}
    asked |= {"kl_coeff": 0.3} if method == "grpo" else {}
    policy_loss = PolicyLoss(PolicyConfig(**asked), LONGEST)
    columns, _, responses = row()
    torch.manual_seed(0)
    features, begin = torch.randn(len(responses.index), 3).double(), torch.randn(3).double()
    before = -torch.nn.functional.softplus(features @ begin)
    columns["behaviour_logprobs"] = before + columns["behaviour_logprobs"] - columns["old_logprobs"]
    columns["old_logprobs"] = before
    away = {"some": torch.zeros_like(before), "one whole response": 2.0 * (responses.index == 2),
            "the whole batch": torch.full_like(before, 2.0)}[masked]
    columns["behaviour_logprobs"] = columns["behaviour_logprobs"] - away
    ours_at, trl_at = begin.clone().requires_grad_(), begin.clone().requires_grad_()
    for step, batch in enumerate(([0, 2], [1, 2, 3, 4])):
        written = torch.isin(responses.index, torch.tensor(batch))
        index = torch.where(written, responses.index, len(LENGTHS))
        here = ResponseSpans(index, torch.tensor([n * (i in batch) for i, n in enumerate(LENGTHS)]).double())
        given = columns if step else columns | {"old_logprobs": torch.full_like(before, math.nan)}
        terms, meters = policy_loss.compute_terms(-torch.nn.functional.softplus(features @ ours_at), given,
                                                  here)
        counts = policy_loss.count_denominators(here)
        loss = sum(policy_loss.coefficients[t] * terms[t] / counts[t] for t in policy_loss.coefficients)
        x = -torch.nn.functional.softplus(features @ trl_at)
        now = columns if step else columns | {"old_logprobs": x.detach()}
        expected = compute_trl_loss(asked, {k: v[written] for k, v in now.items()}, x[written],
                                    index[written])
        assert loss.item() == pytest.approx(expected.item(), abs=1e-14)
        if correction.endswith("mask") and masked == "the whole batch":
            assert float(meters["masked_share"][0] / meters["masked_share"][1]) == 1
        for at, value in ((ours_at, loss), (trl_at, expected)):
            (slope,) = torch.autograd.grad(value, at)
            with torch.no_grad():
                at -= 0.5 * slope
    assert ours_at.tolist() == pytest.approx(trl_at.tolist(), abs=1e-13)
    still = correction.endswith("mask") and masked == "the whole batch" and method == "gspo"
    assert (ours_at.tolist() == begin.tolist()) is still


def test_masked_labels_are_measured() -> None:
    columns, logprobs, responses = row()
    written = responses.index < len(responses)
    gaps = (columns["old_logprobs"] - columns["behaviour_logprobs"])[written]
    means = [gap.mean().exp() for gap in gaps.split(list(LENGTHS))]
    rejected = sum(n for n, mean in zip(LENGTHS, means, strict=True) if not 1 / 1.02 <= mean <= 1.02)
    cases: Any = (({"correction": "token_mask"}, ((gaps.exp() < 0.9) | (gaps.exp() > 1.1)).double().mean()),
                  ({"correction": "token_truncate", "geo_reject_high": 1.02}, rejected / sum(LENGTHS)),
                  ({"correction": "token_truncate"}, None))
    for asked, masked in cases:
        policy: Any = PolicyConfig("dapo", correction_low=0.9, correction_high=1.1, **asked)
        _, _, meters = ours(policy, columns, logprobs, responses)
        assert meters["engine_gap"] == pytest.approx(float(gaps.mean()), abs=1e-12)
        assert meters["engine_kl"] == pytest.approx(float((gaps.exp() - gaps - 1).mean()), abs=1e-12)
        assert meters.get("masked_share") == (None if masked is None else pytest.approx(float(masked)))
        assert masked is None or 0 < masked < 1


def test_divergences_have_the_documented_gradients() -> None:
    """By enumeration of all responses of two tokens, so that expectations are exact."""
    torch.manual_seed(0)
    first, second, ref_first, ref_second = (torch.randn(s).double() for s in ((3,), (3, 3), (3,), (3, 3)))
    inputs = (first.requires_grad_(), second.requires_grad_())
    p, q = first.log_softmax(-1), ref_first.log_softmax(-1)
    p2, q2 = second.log_softmax(-1), ref_second.log_softmax(-1)

    def slopes(value: Any) -> Any:
        return torch.cat([g.flatten() for g in torch.autograd.grad(
            value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)])

    def close(a: Any, b: Any) -> bool:
        return bool(torch.allclose(slopes(a), slopes(b), atol=1e-12, rtol=0))

    odds = p.detach().exp()
    assert close((odds * policy.k1(p, q)).sum(), (p.exp() * (p - q)).sum())
    assert close((odds * policy.k3(p, q)).sum(), (q.exp() * (q - p)).sum())
    # responses of an older policy, weighted by the ratio: k3 is unbiased in value and gradient
    older = torch.randn(3).double().softmax(-1)
    assert close((older * (p.exp() / older) * policy.k3(p, q)).sum(), (p.exp() * (p - q)).sum())
    exact = (p.exp() * (p - q)).sum() + (p.exp()[:, None] * p2.exp() * (p2 - q2)).sum()
    estimated: Any = 0.0
    for a, b in itertools.product(range(3), repeat=2):
        both, reference = torch.stack([p[a], p2[a, b]]), torch.stack([q[a], q2[a, b]])
        whole = ResponseSpans(torch.tensor([0, 0]), torch.tensor([2.0]).double())
        estimated = estimated + both.detach().sum().exp() * policy.sequence_kl(both, reference, whole).sum()
    assert close(estimated, exact) and estimated.item() == pytest.approx(exact.item(), abs=1e-12)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_infinite_log_ratios_keep_gradients_finite(kind: Any) -> None:
    responses = ResponseSpans(torch.zeros(2, dtype=torch.long), torch.tensor([2.0]).double())
    far = torch.tensor([-1.0, -2.0]).double()
    for sign in (1, -1):  # the policy, then the other one, holds the tokens for next to impossible
        logprobs = (far - (2000 if sign < 0 else 0)).requires_grad_()
        other = far - (2000 if sign > 0 else 0)
        ratios = policy.compute_importance_ratios(logprobs, other, responses, kind)
        policy_config = PolicyConfig(method="grpo", correction="sequence_truncate", correction_high=2.0)
        weights = policy.compute_engine_correction(logprobs.detach(), other, responses, policy_config)
        # of both a bound makes something finite in the end; an infinite factor on the way would make NaN
        loss = torch.min(ratios * -1.0, ratios.clamp(0.8, 1.2) * -1.0) * weights
        (loss + policy.k3(logprobs, other)).sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(logprobs.grad).all()
        assert ratios.tolist() == pytest.approx([math.exp(sign * 20)] * 2)
