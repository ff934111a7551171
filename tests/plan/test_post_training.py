"""Plans of fine-tuning, preference training and distillation, priced by their optimizer steps."""

from dataclasses import replace

import pytest

from megatron_sov import recipes
from megatron_sov.model.config import apply_settings
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.plan.cluster_plan import plan_on_cluster, quote_run
from megatron_sov.plan.footprint.gpu_capacity import find_fullest_stage
from megatron_sov.plan.pages.quotes import Quote
from megatron_sov.plan.pricing import Machines, Pricing, load_machines
from megatron_sov.plan.speed.workload import build_shape
from tests.plan.test_quotes import get_pricing


def price_gpus(num_gpus: int = 8) -> Pricing:
    """Return the pricing of one node with this number of H100s."""
    profile = load_machines("h100", 1).profile
    return get_pricing(Machines("h100", replace(profile, gpus_per_node=num_gpus), 1))


def price_example(name: str, *settings: str) -> Quote:
    """Return the quote of a recipe with these settings on eight H100s."""
    config = apply_settings(recipes.get(name), ["parallel.zero1=true", *settings])
    (quote,) = quote_run(config, price_gpus(), [])
    return quote


@pytest.mark.each(("settings", "left_out"), [
    ((), ""), (("objective.name=distill",), "The teacher's forward passes and output head are not priced."),
    (("objective.name=preference",), "The forward passes of the reference are not priced"),
    (("objective.name=preference", "preference.method=simper"), "")])
def test_conversations_attend_separately_and_notes_list_omissions(settings: tuple[str, ...],
                                                                  left_out: str) -> None:
    result = price_example("typhoon-s-8b", *settings)
    assert f"Documents of 1,000 tokens are assumed in rows of {result.seq_len:,}." in result.notes
    omissions = [note for note in result.notes if "not priced" in note]
    assert all(note.startswith(left_out) for note in omissions) and bool(omissions) == bool(left_out)
    pretraining = price_example("typhoon-s-8b", "objective.name=lm")
    assert result.seconds["attention"] < pretraining.seconds["attention"] / 2


def test_adapters_need_less() -> None:
    whole, adapter = price_example("typhoon-s-8b"), price_example("typhoon-s-8b", "lora.rank=16")
    assert 0.5 * whole.hours < adapter.hours < 0.95 * whole.hours
    assert adapter.memory.total_bytes < 0.6 * whole.memory.total_bytes


def test_a_teacher_is_counted_next_to_its_student() -> None:
    config = apply_settings(recipes.get("typhoon-s-8b-opd"), ["parallel.zero1=true"])
    _, account = find_fullest_stage(config, 8)
    # bf16 weights, with the gaps of their buffers
    teacher_params = build_shape(recipes.get("qwen3-30b-a3b-2507").model).count_params()
    assert account.teacher == pytest.approx(2 * teacher_params, rel=0.01)
    # a recipe without a known teacher counts one as large as the student
    _, own_account = find_fullest_stage(replace(config, recipe="mine"), 8)
    assert own_account.teacher == account.weights


def test_rounds_have_a_layout_and_no_price() -> None:
    request = RecipeRequest(recipes.get("typhoon-s-4b-legal"), (), False)
    result = plan_on_cluster(request, price_gpus(4).machines)
    assert "on 100 rounds (the recipe's), 4 H100" in result.format_headline() and not result.quotes
    assert "no price: rounds of reinforcement learning" in result.format_text()
