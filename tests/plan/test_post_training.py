"""Post-training by its jobs."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.model.config import ParallelConfig, RunConfig, apply_settings
from megatron_sov.plan.calibration.fitting import TEACHERS, fullest
from megatron_sov.plan.pages.quote import Quote, totals
from megatron_sov.plan.post_training import (
    DecodingRequest, EngineCosts, Engines, covers, quotes, step_s, touched_params, writing)
from megatron_sov.plan.pricing import Machines, Pricing, machines, pricing
from megatron_sov.plan.speed.parameters import default
from megatron_sov.plan.speed.workload import ModelShape, kv_bytes, kv_cuts, of_model
from megatron_sov.work.clusters.chips import chip, default_links


def gpus(num_gpus: int = 8) -> Pricing:
    profile = machines("h100", 1).profile
    found = pricing(Machines("h100", replace(profile, gpus_per_node=num_gpus), 1))
    assert found is not None
    return found


def priced(name: str, *settings: str, num_gpus: int = 8) -> dict[str, Quote]:
    config = apply_settings(recipes.get(name), ["parallel.zero1=true", *settings])
    return {q.kind: q for q in quotes(config, gpus(num_gpus))}


def test_post_training_alone_is_covered() -> None:
    assert covers(recipes.get("typhoon-s-8b")) and covers(recipes.get("typhoon-s-4b-legal"))
    assert not covers(recipes.get("qwen3-8b")) and not covers(recipes.get("vibethinker-1.5b"))


DISTILL = "objective.name=distill"


@pytest.mark.parametrize(("name", "settings", "kinds"), [
    ("typhoon-s-8b", (), ["SFT"]),
    ("typhoon-s-8b", (DISTILL,), ["distillation: write", "distillation: teacher", "distillation: train"]),
    ("typhoon-s-8b-opd", (), ["RL: generate", "RL: train"]),
    ("typhoon-s-4b-legal", (), ["RL: generate", "RL: reward", "RL: train"]),
])
def test_jobs_of_an_objective(name: str, settings: tuple[str, ...], kinds: list[str]) -> None:
    found = priced(name, *settings)
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


def test_a_larger_teacher_reads_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (DISTILL, "train.steps=2500", "train.global_batch_size=64", "data.phases.0.seq_len=4096",
             "data.phases.0.tokens=655360000")
    hours = []
    for name in ("qwen3-4b-2507", "qwen3-8b"):
        monkeypatch.setitem(TEACHERS, "typhoon-s-8b", name)
        hours.append(priced("typhoon-s-8b", *asked)["distillation: teacher"].hours)
    assert 1.5 < hours[1] / hours[0] < 2.5


def test_a_teacher_lies_beside_the_model_that_learns_its_distributions() -> None:
    found = priced("typhoon-s-8b-opd")
    beside = found["RL: train"].memory.by_component["teacher"]
    # bf16 weights, with the gaps of their buffers
    assert beside == pytest.approx(2 * of_model(recipes.get("qwen3-30b-a3b-2507").model).params(), rel=0.01)
    config = apply_settings(recipes.get("typhoon-s-8b-opd"), ["parallel.zero1=true"])
    assert fullest(config, 8)[1].teacher == beside, "the recipe's own teacher is counted"
    assert fullest(replace(config, recipe="mine"), 8)[1].teacher == fullest(config, 8)[1].weights
    # a quarter of the rounds is written
    assert found["RL: generate"].steps == 625 and found["RL: train"].steps == 2500


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


# The roofline of writing, against counts by hand and by brute force.


H100 = chip("h100")
FREE = EngineCosts(step_s=0, layer_s=0, response_s=0, message_s=0)
"""An engine of which the roofline tells everything."""
DENSE = of_model(recipes.get("qwen3-8b").model)
MOE = of_model(recipes.get("qwen3-30b-a3b-2507").model)


def engines(shape: ModelShape = DENSE, tp: int = 1, costs: EngineCosts = FREE, num_gpus: int = 8) -> Engines:
    return Engines(shape, H100, default_links(H100), num_gpus, tp, costs=costs)


def test_one_response_waits_for_the_weights() -> None:
    read = (DENSE.params() - DENSE.vocab_size * DENSE.hidden_size) * 2  # the embedding is looked up
    bandwidth = H100.hbm_bytes_per_s * default().hbm_fraction
    assert step_s(engines(), 1, 0, default()) == pytest.approx(read / bandwidth, rel=1e-3)
    assert step_s(engines(tp=2), 1, 0, default()) == pytest.approx(read / bandwidth / 2, rel=0.2)


def test_many_responses_wait_for_the_products() -> None:
    share = default().product_fraction["hopper"]["bf16"]
    flops = 4096 * DENSE.decode_flops_per_token(1)
    assert step_s(engines(), 4096, 1, default()) == pytest.approx(flops / H100.bf16_flops_per_s / share)


def test_costs_beside_the_roofline_add_up() -> None:
    costs = EngineCosts(step_s=1e-3, layer_s=1e-5, response_s=1e-6, message_s=0)
    beside = step_s(engines(costs=costs), 10, 100, default()) - step_s(engines(), 10, 100, default())
    assert beside == pytest.approx(1e-3 + DENSE.num_layers * 1e-5 + 10e-6)


def test_experts_that_tokens_meet_are_read() -> None:
    drawn = random.Random(0)
    for running in (1, 8, 64):
        met = [len({e for _ in range(running) for e in drawn.sample(range(128), 8)}) for _ in range(200)]
        expected = MOE.num_moe_layers * (sum(met) / len(met) - 8) * MOE.block_params("expert")
        alone = touched_params(MOE, 1)
        assert touched_params(MOE, running) - alone == pytest.approx(expected, rel=0.05)
    everything = MOE.params() - MOE.vocab_size * MOE.hidden_size
    assert touched_params(MOE, 1e6) == pytest.approx(everything)


def test_mean_lengths_are_met_by_the_law_of_their_ends() -> None:
    for mean in (200, 1000, 2500, 3800):
        asked = DecodingRequest(64, 100, mean, 4096)
        ends = asked.ends_after_tokens
        drawn = random.Random(1)
        found = sum(min(4096, drawn.expovariate(1 / ends)) for _ in range(40_000)) / 40_000
        assert found == pytest.approx(mean, rel=0.03)


def test_a_round_is_the_sum_of_its_steps() -> None:
    """Every token of rounds whose responses all run at once, step by step on the slowest of eight engines."""
    asked, e = DecodingRequest(64, 100, 80, 1024), engines(costs=EngineCosts())
    drawn, ends = random.Random(2), asked.ends_after_tokens
    rounds = []
    for _ in range(12):
        lengths = [[min(1024, round(drawn.expovariate(1 / ends))) for _ in range(8)] for _ in range(8)]
        rounds.append(max(sum(step_s(e, sum(n > t for n in of_engine), 100 + t, default())
                              for t in range(max(of_engine))) for of_engine in lengths))
    took = writing(e, asked, default())
    assert took.running == 8 and took.decode_s == 0
    assert took.tail_s == pytest.approx(sum(rounds) / len(rounds), rel=0.1)


def test_responses_that_do_not_fit_wait() -> None:
    small = writing(engines(), DecodingRequest(8 * 100, 100, 1000, 8192), default())
    large = writing(engines(), DecodingRequest(8 * 10_000, 100, 1000, 8192), default())
    assert small.running == 100 and small.decode_s == 0
    held = (0.85 * H100.memory_bytes - DENSE.params() * 2) / kv_bytes(DENSE, 1100)
    assert large.running == int(held) < 10_000 and large.decode_s > large.tail_s
    assert large.memory_bytes < 0.85 * H100.memory_bytes


def test_prompts_are_read_once_for_their_responses() -> None:
    one, many = (writing(engines(), DecodingRequest(512, 1000, 100, 200, n), default()).prefill_s for n in (1,
                                                                                                            8))
    assert one == pytest.approx(8 * many)


# Keys and values of a sequence, against sums by hand and against what the cached decoder keeps.


@pytest.mark.parametrize(("recipe", "tokens", "sizes", "by_hand"), [
    # 48 global layers of 8 key/value heads of 128, keys and values in two bytes
    ("solar-open-102b", 1000, {}, 1000 * 48 * 2 * 8 * 128 * 2),
    ("solar-open-102b", 1000, {"item_bytes": 1}, 1000 * 48 * 2 * 8 * 128),
    # three of four layers keep a window of 128 of 48
    ("k-exaone-236b", 10_000, {}, (12 * 10_000 + 36 * 128) * 2 * 8 * 128 * 2),
    ("k-exaone-236b", 100, {}, 48 * 100 * 2 * 8 * 128 * 2),
    # one vector of 512 and a rotated key of 64 for all heads of each of 61 layers
    ("deepseek-v3", 1000, {}, 61 * 1000 * (512 + 64) * 2)])
def test_a_sequence_keeps_what_is_counted_by_hand(recipe: str, tokens: int, sizes: dict[str, Any],
                                                  by_hand: int) -> None:
    assert kv_bytes(of_model(recipes.get(recipe).model), tokens, **sizes) == by_hand


def test_latent_attention_keeps_one_vector_for_all_heads() -> None:
    latent = ModelShape(61, 7168, 128, 128, 128, 129280, kv_lora_rank=512, rope_head_dim=64)
    assert kv_bytes(latent, 1000) == 61 * (512 + 64) * 2 * 1000
    assert kv_cuts(latent, 8) == 1


def test_beyond_the_number_of_heads_each_process_keeps_a_whole_one() -> None:
    shape = of_model(recipes.get("solar-open-102b").model)
    assert [kv_cuts(shape, tp) for tp in (1, 4, 8, 16)] == [1, 4, 8, 8]


def kept_by_a_decoder(recipe: str, tokens: int) -> int:
    """Return the bytes that a model's attention keeps once it has read a sequence."""
    import torch

    from megatron_sov.checkpoint import load
    from megatron_sov.engine.model import cache_rows, kv_cache
    from megatron_sov.engine.model.language_model import build
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import TrainConfig

    world.join(ParallelConfig())
    config = recipes.get(recipe)
    model = build(config.model, ParallelConfig(), TrainConfig(precision="fp32"))
    load.initialise(model, config.model, 1)
    model.eval()
    with kv_cache.keep(model, cache_rows.CacheSize(1, tokens - 1)) as layers, torch.no_grad():
        row = cache_rows.read_row([cache_rows.CacheSpan(0, 0, list(range(tokens - 1)))], tokens - 1,
                                  torch.device("cpu"))
        model.chunks[0].read(row)
    trunk = layers[:config.model.num_layers]
    world.leave()
    return sum(part.nbytes for layer in trunk for part in layer.stored)


def test_a_cached_decoder_keeps_as_much(ranks: Any, job: Any) -> None:
    """Its slots are as long as the sequence with the token that is read."""
    tokens = 100
    names = ("tiny-k-exaone", "tiny-deepseek-v3")
    jobs = (job(__file__, "kept_by_a_decoder", 1, {"recipe": name, "tokens": tokens}) for name in names)
    for name, (found,) in zip(names, ranks(*jobs), strict=True):
        assert found == kv_bytes(of_model(recipes.get(name).model), tokens, item_bytes=4), name
