"""Post-training by its jobs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sov import recipes
from megatron_sov.config import RunConfig, apply_settings
from megatron_sov.plan.machines import Machines, machines
from megatron_sov.plan.post_training.assumed import Assumed
from megatron_sov.plan.post_training.published import BUDGETS
from megatron_sov.plan.post_training.quotes import covers, quotes
from megatron_sov.plan.pricing import Pricing, pricing
from megatron_sov.plan.quote import Quote, totals


def gpus(num_gpus: int = 8) -> Pricing:
    profile = machines("h100", 1).profile
    found = pricing(Machines("h100", replace(profile, gpus_per_node=num_gpus), 1))
    assert found is not None
    return found


def priced(name: str, *settings: str, num_gpus: int = 8, assumed: Assumed | None = None) -> dict[str, Quote]:
    config = apply_settings(recipes.get(name), ["parallel.zero1=true", *settings])
    return {q.kind: q for q in quotes(config, gpus(num_gpus), assumed)}


def test_post_training_alone_is_covered() -> None:
    assert covers(recipes.get("typhoon-s-8b")) and covers(recipes.get("typhoon-s-4b-legal"))
    assert not covers(recipes.get("qwen3-8b")) and not covers(recipes.get("vibethinker-1.5b"))


@pytest.mark.parametrize(("name", "kinds"), [
    ("typhoon-s-8b", ["SFT"]),
    ("typhoon-s-8b-opd", ["distillation: write", "distillation: teacher", "distillation: train"]),
    ("typhoon-s-4b-legal", ["RL: generate", "RL: reward", "RL: train"]),
])
def test_jobs_of_an_objective(name: str, kinds: list[str]) -> None:
    found = priced(name)
    assert list(found) == kinds
    for q in found.values():
        assert q.hours == pytest.approx(q.steps * q.step_s / 3600) and q.hours > 0
        assert (q.cost_usd > 0) == (q.num_gpus > 0) == (q.energy_kwh > 0)
    assert totals(list(found.values())).gpu_hours == pytest.approx(
        8 * sum(q.hours for q in found.values() if q.num_gpus))


def test_a_reference_is_a_pass_that_only_looks() -> None:
    base = apply_settings(recipes.get("typhoon-s-8b"), ["objective.name=preference"])

    def hours(config: RunConfig) -> dict[str, float]:
        return {q.kind: q.hours for q in quotes(config, gpus())}

    with_reference = hours(base)
    assert list(with_reference) == ["preference: reference", "preference: train"]
    # two forward passes are recomputed or looked at for each of three that learn
    assert with_reference["preference: reference"] == pytest.approx(
        with_reference["preference: train"] / 4, rel=0.3)
    assert list(hours(apply_settings(base, ["preference.method=simper"]))) == ["preference: train"]


def test_the_distance_of_kto_is_a_forward_pass_more() -> None:
    base = apply_settings(recipes.get("typhoon-s-8b"), ["objective.name=preference"])
    step_s = {method: {q.kind: q.step_s for q in quotes(apply_settings(
        base, [f"preference.method={method}"]), gpus())} for method in ("dpo", "kto")}
    kto, dpo = (step_s[method]["preference: train"] for method in ("kto", "dpo"))
    assert kto - dpo == pytest.approx(step_s["dpo"]["preference: reference"], rel=0.3)


def test_adapters_need_less() -> None:
    whole, adapter = priced("typhoon-s-8b")["SFT"], priced("typhoon-s-8b", "lora.rank=16")["SFT"]
    assert 0.5 * whole.hours < adapter.hours < 0.95 * whole.hours
    assert adapter.memory.total_bytes < 0.6 * whole.memory.total_bytes


def test_shorter_conversations_attend_less() -> None:
    short, long = (priced("typhoon-s-8b", assumed=Assumed(document_tokens=n))["SFT"] for n in (500, 16384))
    assert short.seconds["attention"] < 0.3 * long.seconds["attention"]


def test_a_larger_teacher_reads_longer_and_turns_cost() -> None:
    small, large = (priced("typhoon-s-8b-opd", assumed=Assumed(teacher=name))["distillation: teacher"]
                    for name in ("qwen3-4b-2507", "qwen3-8b"))
    assert 1.5 < large.hours / small.hours < 2.5
    few, many = (priced("typhoon-s-8b-opd", assumed=Assumed(turns=n))["distillation: write"]
                 for n in (10, 2500))
    assert many.hours > 10 * few.hours and few.tokens == pytest.approx(many.tokens, rel=0.01)


def test_rounds_of_reinforcement_learning() -> None:
    found = priced("typhoon-s-4b-legal", num_gpus=4)
    generate, train = found["RL: generate"], found["RL: train"]
    assert generate.steps == train.steps == 100 and generate.tokens == 100 * 32 * 8 * 2048
    assert "text beside" in train.seconds, "InK-GRPO learns laws beside"
    assert found["RL: reward"].num_gpus == 0
    longer = priced("typhoon-s-4b-legal", "rollout.max_new_tokens=8192",
                    'data.phases=[{"name": "rounds", "seq_len": 10240}]', num_gpus=4)
    assert longer["RL: generate"].hours > 1.8 * generate.hours
    looked = priced("typhoon-s-4b-legal", "policy.kl=k3", "policy.kl_coeff=0.01", num_gpus=4)["RL: train"]
    # one pass of the three that learn, or of the four where activations are computed again
    assert 1 / 4.5 < looked.seconds["passes that look"] / train.seconds["optimizer steps"] < 1 / 2.5


def test_every_job_on_gpus_says_what_an_hour_costs() -> None:
    for q in priced("typhoon-s-4b-legal").values():
        told = [note for note in q.notes if note.startswith("Cost: 2.95 USD for a GPU and hour")]
        assert len(told) == (1 if q.num_gpus else 0)


def test_what_papers_said_stands_beside() -> None:
    assert any("8 H100, about 2 days" in note for note in priced("typhoon-s-8b")["SFT"].notes)
    assert {name for budget in BUDGETS for name in budget.recipes} <= set(recipes.RECIPES)
