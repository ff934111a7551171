"""Post-training by its jobs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sov import recipes
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.plan.calibration.fitting import TEACHERS, fullest
from megatron_sov.plan.on_cluster import placed
from megatron_sov.plan.pages.quote import Quote, totals
from megatron_sov.plan.pricing import Machines, Pricing, covers, machines, pricing, quotes
from megatron_sov.plan.speed.workload import of_model


def gpus(num_gpus: int = 8) -> Pricing:
    profile = machines("h100", 1).profile
    found = pricing(Machines("h100", replace(profile, gpus_per_node=num_gpus), 1))
    assert found is not None
    return found


def priced(name: str, *settings: str, num_gpus: int = 8) -> dict[str, Quote]:
    config = apply_settings(recipes.get(name), ["parallel.zero1=true", *settings])
    return {q.kind: q for q in quotes(config, gpus(num_gpus))}


def test_post_training_alone_is_covered() -> None:
    assert covers(recipes.get("typhoon-s-8b")) and not covers(recipes.get("typhoon-s-4b-legal"))
    assert not covers(recipes.get("qwen3-8b")) and not covers(recipes.get("vibethinker-1.5b"))


DISTILL = "objective.name=distill"


@pytest.mark.parametrize(("name", "settings", "kinds"), [
    ("typhoon-s-8b", (), ["SFT"]),
    ("typhoon-s-8b", (DISTILL,), ["distillation: teacher", "distillation: train"]),
])
def test_jobs_of_an_objective(name: str, settings: tuple[str, ...], kinds: list[str]) -> None:
    found = priced(name, *settings)
    assert list(found) == kinds
    for q in found.values():
        assert q.hours == pytest.approx(q.steps * q.step_s / 3600) and q.hours > 0
        assert q.cost_usd > 0 and q.energy_kwh > 0
        assert any(note.startswith("Cost: 2.95 USD for a GPU and hour") for note in q.notes)
    assert totals(list(found.values())).gpu_hours == pytest.approx(8 * sum(q.hours for q in found.values()))


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


def test_a_larger_teacher_reads_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (DISTILL, "train.steps=2500", "train.global_batch_size=64", "data.phases.0.seq_len=4096",
             "data.phases.0.tokens=655360000")
    hours = []
    for name in ("qwen3-4b-2507", "qwen3-8b"):
        monkeypatch.setitem(TEACHERS, "typhoon-s-8b", name)
        hours.append(priced("typhoon-s-8b", *asked)["distillation: teacher"].hours)
    assert 1.5 < hours[1] / hours[0] < 2.5


def test_a_teacher_lies_beside_the_model_that_learns_its_distributions() -> None:
    config = apply_settings(recipes.get("typhoon-s-8b-opd"), ["parallel.zero1=true"])
    beside = fullest(config, 8)[1].teacher
    # bf16 weights, with the gaps of their buffers
    assert beside == pytest.approx(2 * of_model(recipes.get("qwen3-30b-a3b-2507").model).params(), rel=0.01)
    assert fullest(replace(config, recipe="mine"), 8)[1].teacher == fullest(config, 8)[1].weights


def test_rounds_have_a_layout_and_no_price() -> None:
    request = RecipeRequest(recipes.get("typhoon-s-4b-legal"), (), False)
    found = placed(request, gpus(4).machines)
    assert "on 100 rounds (the recipe's), 4 H100" in found.headline() and not found.quotes
    assert "no price: rounds of reinforcement learning" in found.as_text()
