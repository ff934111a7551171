"""Layout proofs: correct layouts equal one process, and planted faults are detected and located."""

import importlib
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layout_proof import cpu_shims
from megatron_sov import cli
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint import host_snapshot
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.model import recipes
from megatron_sov.model.config import apply_settings
from megatron_sov.proof.miniature import OVERRIDES, ROW_TOKENS, UNCOVERED, Miniature, build_miniature

cpu_shims.prepare_without_gpu()
random_documents = importlib.import_module("megatron_sov.proof.random_documents")
layout_proof = importlib.import_module("megatron_sov.proof.layout_proof")  # imports megatron-core
context = importlib.import_module("megatron_sov.engine.parallel.context")
parallel_state = importlib.import_module("megatron.core.parallel_state")
DIFFERS, EQUAL, STANDS = layout_proof.DIFFERS, layout_proof.EQUAL, layout_proof.STANDS
LAYOUT = ("parallel.tp=2", "parallel.sp=true", "parallel.pp=2", "parallel.ep=2", "train.global_batch_size=32")


SPLIT_ROW = "parallel.cp=2", "train.global_batch_size=8", "train.micro_batch_size=1"
"""Settings that split each row over two processes."""


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Miniature:
    """K-EXAONE with a multi-token-prediction layer, on four processes."""
    documents = tmp_path_factory.mktemp("proof") / "documents"
    miniature = build_miniature(apply_settings(recipes.get("tiny-k-exaone"), LAYOUT), 4, documents)
    random_documents.write_documents(documents, miniature.config)
    return miniature


@pytest.fixture(scope="module")
def reference(miniature: Miniature) -> Any:
    """Results of the miniature on one process."""
    return layout_proof.run_reference(miniature)


@pytest.mark.parametrize(("kind", "group", "function", "place", "site"), [
    # the embedding's sum comes first, then each layer's
    ("reduce_scatter", "TENSOR", "_reduce_scatter_along_first_dim", "forward of embedding.word_embeddings",
     "reduce_scatter over TENSOR_MODEL_PARALLEL_GROUP at mappings.py"),
    # groups of a single process share one group, named after the first; values through modules are correct
    ("allreduce", "GROUP", "start_grad_sync", "gradient of decoder.final_layernorm.weight",
     "start_grad_sync")])
def test_a_wrong_collective_is_located(miniature: Miniature, reference: Any, kind: str, group: str,
                                       function: str, place: str, site: str) -> None:
    """The output of every collective of `kind` in `group` called by `function` is halved."""
    def plant_fault(called: Any, parts: Sequence[Any], run_call: Callable[[Any], None]) -> bool:
        if called.kind != kind or group not in called.group or function not in called.where:
            return False
        run_call(parts)
        for part in parts:
            part.outputs[0].mul_(0.5)
        return True

    verdict = layout_proof.prove_miniature(miniature, plant_fault, reference)
    assert (verdict.outcome, verdict.places[0]) == (DIFFERS, f"step 1: {place}")
    assert any(site in line for line in verdict.sites)


def test_a_step_rejected_only_in_the_layout_is_a_difference(miniature: Miniature, reference: Any,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_proof, "_run_step", lambda trainer: None)

    verdict = layout_proof.prove_miniature(miniature, reference=reference)
    assert verdict.places == ["step 1: a guard refuses it"]


@pytest.mark.deep
def test_checkpoint_reads_at_a_wrong_offset_are_detected(miniature: Miniature, reference: Any,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    read = TensorReader.read
    monkeypatch.setattr(TensorReader, "read", lambda self, key, offset, shape: read(
        self, key, (0,) * len(offset), shape))

    verdict = layout_proof.prove_miniature(miniature, reference=reference)

    assert verdict.outcome == DIFFERS
    assert {place.partition(":")[0] for place in verdict.places} == {"read from one process' checkpoint"}


@pytest.mark.deep
def test_wrong_checkpoint_values_are_detected(miniature: Miniature, reference: Any,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    add = host_snapshot.TensorWriter.add
    monkeypatch.setattr(host_snapshot.TensorWriter, "add", lambda self, key, block, *place: add(
        self, key, block.flip(0) if "linear_qkv.weight" in key else block, *place))

    verdict = layout_proof.prove_miniature(miniature, reference=reference)

    assert verdict.outcome == DIFFERS and len(verdict.places) > 2
    assert all(place.startswith("written into a checkpoint: ") and "linear_qkv" in place
               for place in verdict.places)


@pytest.mark.each(("recipe", "kinds"), [
    ("solar-open2-250b", {("linear_attention", 0)}), ("k-exaone-236b", {("sliding_attention", 8)}),
    ("gemma-3-1b", {("sliding_attention", 8)}),
    ("k-exaone2-750b", {("sliding_attention", 8), ("sliding_attention", 12)})])
def test_a_miniature_has_every_kind_of_attention(recipe: str, kinds: set[tuple[str, int]]) -> None:
    """With pattern LLLG, the first layers alone would all be sliding."""
    config = apply_settings(recipes.get(recipe), [
        "parallel.pp=1", "parallel.vpp=1", "parallel.pipeline_layout=[]"])
    model = build_miniature(config, 64, Path("documents")).config.model

    # after the dense layers, if there are any
    first = model.num_dense_layers if model.num_experts else 0
    assert {*zip(model.layer_types()[first:], model.windows()[first:], strict=True)} == {
        *kinds, ("full_attention", 0)}


@pytest.mark.parametrize(("is_global", "cp"), [(True, 2), (False, 4)], ids=["global", "sliding"])
def test_a_fault_of_one_kind_of_attention_layers_is_detected(monkeypatch: pytest.MonkeyPatch, is_global: bool,
                                                             cp: int) -> None:
    """Global layers exchange keys of the whole row; sliding layers only send the ends of chunks."""
    reduce_scatter = context._reduce_scatter
    monkeypatch.setattr(context, "_reduce_scatter", lambda row: (
        context.select_local(row) if (len(row) == ROW_TOKENS) == is_global else reduce_scatter(row)))

    config = apply_settings(recipes.get("tiny-exaone4"), [*SPLIT_ROW, f"parallel.cp={cp}"])
    assert layout_proof.prove_run(config, cp)[1].outcome == DIFFERS


def test_a_deadlock_refutes_a_layout(miniature: Miniature, reference: Any,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    all_to_all = dispatcher.all_to_all

    def skip_on_rank_1(group: Any, tokens: torch.Tensor, *sizes: Any, **kwargs: Any) -> Any:
        return tokens if group.rank() == 1 else all_to_all(group, tokens, *sizes, **kwargs)

    monkeypatch.setattr(dispatcher, "all_to_all", skip_on_rank_1)

    verdict = layout_proof.prove_miniature(miniature, reference=reference)

    assert verdict.outcome in (STANDS, "fails") and verdict.places


def test_a_nan_loss_is_a_difference(miniature: Miniature, reference: Any,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    real = layout_proof._run_step

    def run_with_nan_loss(trainer: Any) -> dict[str, float]:
        return {**real(trainer), "loss": float("nan")}

    monkeypatch.setattr(layout_proof, "_run_step", run_with_nan_loss)

    verdict = layout_proof.prove_miniature(miniature, reference=reference)

    assert verdict.outcome == DIFFERS and "step 1: loss" in verdict.places
    # the second step is not run after a difference
    assert not any(place.startswith("step 2") for place in verdict.places)


def test_failure_of_the_reference_is_a_user_error(miniature: Miniature,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(trainer: Any) -> None:
        raise ValueError("no rows")

    monkeypatch.setattr(layout_proof, "_run_step", fails)

    with pytest.raises(UserError, match="process cannot do"):
        layout_proof.run_reference(miniature)


def test_duplicate_ownership_has_its_own_message(miniature: Miniature) -> None:
    verdict = layout_proof.Verdict(DIFFERS, 4, 1e-15, ["step 1: weights/a: 0 of 8 elements are written by "
                                                       "nobody, 1 by several"])

    text = layout_proof.format_proof(miniature, verdict)
    assert "NOT equal to one process: not each element is held once" in text


def test_json_has_no_infinity(miniature: Miniature) -> None:
    deadlock = layout_proof.Verdict(STANDS, 4, float("inf"), ["rank 0 waits"])
    result = layout_proof.proof_to_json(miniature, deadlock)

    assert json.loads(json.dumps(result, allow_nan=False))["largest"] is None


DISTILL = "objective.name=distill"
STAGES = "parallel.pp=2", "parallel.tp=2", "parallel.sp=true"
CONTEXT = "parallel.cp=2", "parallel.tp=2", "parallel.sp=true"
EXPERTS = "parallel.ep=2"
OVERLAP = ("parallel.zero1=true", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
SHARDED_EXPERTS = ("parallel.cp=2", EXPERTS, *OVERLAP)
FROZEN = 'optim.groups=[{"pattern": "decoder.layers.0.*", "frozen": true}]'
FAST_CASES = [
    # objectives
    ("tiny-solar-open-dpo", CONTEXT, 4, {"preference"}),
    ("tiny-qwen3", (*STAGES, "objective.name=preference", "preference.method=grouper"), 4, {"preference"}),
    ("tiny-solar-open-rl", ("parallel.pp=2", "policy.kl=k3", "policy.kl_coeff=0.1"), 2, {"policy", "kl"}),
    ("tiny-typhoon-s", (*CONTEXT, DISTILL, "distillation.ce_coeff=0.5"), 4, {"divergence", "cross_entropy"}),
    ("tiny-typhoon-s", (*STAGES, DISTILL, "distillation.top_k=0"), 4, {"divergence"}),
    ("tiny-typhoon-s-opd", CONTEXT, 4, {"policy"}),
    ("tiny-k-exaone", (*CONTEXT[:1], EXPERTS, "objective.name=sft", "objective.loss_per=turn"), 2,
     {"response"}),
    # families
    ("tiny-qwen2", ("parallel.tp=2", "model.tied_embeddings=true"), 2, {"lm"}),
    ("tiny-qwen3-moe", SHARDED_EXPERTS, 4, {"lm"}),
    ("tiny-solar-open2", (*CONTEXT, EXPERTS), 4, {"lm"}),
    # parts of unequal size, another optimizer, frozen weights
    ("tiny-qwen3", ("parallel.pp=2", "model.num_layers=4", "parallel.pipeline_layout=[1, 3]"), 2, {"lm"}),
    ("tiny-qwen3", (*OVERLAP, "gpu.pad_buckets=on"), 2, {"lm"}),
    ("tiny-qwen3-moe", ("parallel.tp=2", "parallel.sp=true", EXPERTS, "optim.name=muon"), 2, {"lm"}),
    ("tiny-qwen3", ("parallel.pp=2", *OVERLAP, "train.recompute=true", "optim.name=muon", FROZEN), 4, {"lm"})]
SLOW_CASES = [
    ("tiny-solar-open-dpo", (*STAGES, "preference.chosen_coeff=0.5"), 4, {"preference", "chosen"}),
    ("tiny-solar-open-rl", CONTEXT, 4, {"policy"}),
    ("tiny-k-exaone", ("parallel.pp=2", "parallel.vpp=2", *OVERLAP, "objective.name=sft"), 4, {"response"}),
    ("tiny-k-exaone2", (*SHARDED_EXPERTS, "train.recompute=true"), 2, {"lm"}),
    ("tiny-qwen2", ("parallel.pp=2", "parallel.vpp=2", *OVERLAP, "model.tied_embeddings=true"), 4, {"lm"}),
    ("tiny-deepseek-v3", (*STAGES, EXPERTS), 4, {"lm"}), ("tiny-deepseek-v3", SHARDED_EXPERTS, 4, {"lm"}),
    ("tiny-qwen3-moe", (*STAGES, EXPERTS), 4, {"lm"})]


@pytest.mark.tier1_cases(3)
@pytest.mark.parametrize(("recipe", "settings", "num_ranks", "terms"), [
    *FAST_CASES, *(pytest.param(*row, marks=pytest.mark.deep) for row in SLOW_CASES)])
def test_objectives_families_and_optimizers_equal_one_process(recipe: str, settings: tuple[str, ...],
                                                              num_ranks: int, terms: set[str]) -> None:
    """tests/layouts covers real processes and messages, at other layouts."""
    config = apply_settings(recipes.get(recipe), [*settings, "train.global_batch_size=8",
                                                  "train.micro_batch_size=1"])

    miniature, verdict = layout_proof.prove_run(config, num_ranks)

    assert (verdict.outcome, verdict.places) == (EQUAL, [])
    assert verdict.largest < 1e-12 and verdict.compared["weights"] > 10 and verdict.messages > 50
    assert miniature.config.objective.name == config.objective.name
    # a loss that is always zero would be equal too
    assert terms <= {name for name, value in verdict.losses.items() if value}


def skip_reduction(values: dict[str, float], over: Any) -> dict[str, float]:
    """A faulty `sum_dict` that returns the values of this process."""
    return values


@pytest.mark.tier1_cases(2)
@pytest.mark.parametrize(("recipe", "settings", "module", "name", "wrong", "place"), [
    ("tiny-solar-open", ("parallel.pp=2",), "train.objectives.objective", "sum_dict", skip_reduction,
     "final_layernorm"),
    ("tiny-k-exaone", ("objective.name=sft", *CONTEXT[:1]), "train.objectives.objective", "sum_dict",
     skip_reduction, "mtp.layers.0.final_layernorm"),
    ("tiny-solar-open-rl", ("parallel.pp=2",), "train.objectives.objective", "sum_dict", skip_reduction,
     "final_layernorm"),
    ("tiny-solar-open-dpo", CONTEXT[:1], "engine.model.logprobs", "context",
     SimpleNamespace(**vars(context) | {"select_local": lambda row: row[:len(row) // context.get_cp_size()]}),
     "final_layernorm"),
    ("tiny-typhoon-s", ("parallel.tp=2", DISTILL, "distillation.top_k=4"), "engine.model.divergence",
     "_sum_over_group", lambda values: values, "final_layernorm")])
def test_a_fault_in_every_built_in_loss_is_detected(recipe: str, settings: tuple[str, ...], module: str,
                                                    name: str, wrong: Any, place: str,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference begins in the gradient that the loss returns to the last layer."""
    config = apply_settings(recipes.get(recipe), [*settings, "train.global_batch_size=8",
                                                  "train.micro_batch_size=1"])
    monkeypatch.setattr(importlib.import_module(f"megatron_sov.{module}"), name, wrong)

    verdict = layout_proof.prove_run(config, 2 * config.parallel.ranks_per_replica)[1]

    assert verdict.outcome == DIFFERS and place in verdict.places[0]


@pytest.mark.parametrize(("recipe", "missing"), [
    ("tiny-hyperclova-omni-sft", "encoder of pictures"), ("tiny-hyperclova-omni", "encoder of sound")])
def test_uncovered_parts_are_listed(recipe: str, missing: str, tmp_path: Path) -> None:
    miniature = build_miniature(apply_settings(recipes.get(recipe), ()), 2, tmp_path / "documents")

    assert miniature.config.problems(2) == []
    assert any(missing in part for part in miniature.uncovered)


def test_sigterm_removes_the_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def raise_sigterm(miniature: Miniature) -> None:
        assert list(tmp_path.rglob("documents/*"))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(layout_proof, "prove_miniature", raise_sigterm)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ending:
            layout_proof.prove_run(recipes.get("tiny-qwen3"), 1)
        assert ending.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.iterdir())


def test_a_padding_mask_of_the_wrong_tokens_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of pretraining have padding, too."""
    chunk = importlib.import_module("megatron_sov.engine.model.chunk").Chunk
    real = chunk._local_padding
    monkeypatch.setattr(chunk, "_local_padding", lambda self, padding, route: (
        padding[:real(self, padding, route).shape[1]][None]))

    config = apply_settings(recipes.get("tiny-solar-open"), CONTEXT[1:])
    assert layout_proof.prove_run(config, 2)[1].outcome == DIFFERS


@pytest.mark.each(("pp", "vpp"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (2, 4), (4, 2), (8, 3)])
def test_the_first_stage_alternates_forward_and_backward_passes(pp: int, vpp: int) -> None:
    config = apply_settings(recipes.get("tiny-qwen3"), [
        f"model.num_layers={pp * vpp}", f"parallel.pp={pp}", f"parallel.vpp={vpp}",
        "train.micro_batch_size=1", "train.global_batch_size=64"])
    train = build_miniature(config, 2 * pp, Path("documents")).config.train

    micro_batches = train.global_batch_size // 2
    warm_up = pp - 1 if vpp == 1 else 2 * (pp - 1) + (vpp - 1) * pp
    assert micro_batches > 1 and micro_batches * vpp > warm_up
    assert vpp == 1 or micro_batches % pp == 0


def test_a_fault_of_the_steady_pipeline_phase_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of three stages warms up with two micro-batches."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    real = P2PCommunicator.send_forward_recv_backward

    def halve_gradient(self: Any, *args: Any, **kwargs: Any) -> Any:
        [gradient] = real(self, *args, **kwargs)
        return [gradient * 0.5 if torch.distributed.get_rank() == 0 else gradient]

    monkeypatch.setattr(P2PCommunicator, "send_forward_recv_backward", halve_gradient)
    config = apply_settings(recipes.get("tiny-qwen3"), [
        "model.num_layers=3", "parallel.pp=3", "train.micro_batch_size=1", "train.global_batch_size=8"])

    verdict = layout_proof.prove_run(config, 3)[1]

    assert (verdict.outcome, verdict.places[0][:16]) == (DIFFERS, "step 1: backward")


@pytest.mark.each(("layers", "expected"), [
    ([12, 13, 13, 10], (2, 3, 3, 1)), ([2, 4], (1, 3)), ([5, 1], (3, 1)),
    ([6, *[5] * 6, 2], (2, *[1] * 7)), ([2, *[5] * 6, 6], (1, *[2] * 6, 3)),
    ([7, 5, 4, 2], (3, 2, 2, 1)), ([3, 3], (2, 2))])
def test_a_miniature_keeps_uneven_stages(layers: list[int], expected: tuple[int, ...]) -> None:
    """With equal stages, layer offsets that assume equal stages would pass."""
    config = apply_settings(recipes.get("tiny-qwen3"), [
        f"model.num_layers={sum(layers)}", f"parallel.pp={len(layers)}",
        f"parallel.pipeline_layout={layers}"])
    miniature = build_miniature(config, len(layers), Path("documents"))

    assert miniature.config.parallel.pipeline_layout == expected
    assert any("are played" in part for part in miniature.uncovered) == (len({*layers}) > len({*expected}))


def test_uneven_stages_have_each_kind_of_layers() -> None:
    """The first three layers of DeepSeek-V3 have no experts."""
    config = apply_settings(recipes.get("deepseek-v3"), [
        "parallel.pp=2", "parallel.tp=2", "parallel.ep=2", "parallel.pipeline_layout=[31, 30]"])
    miniature = build_miniature(config, 4, Path("documents")).config

    assert miniature.parallel.pipeline_layout == (3, 1) and miniature.problems(4) == []


@pytest.mark.parametrize("layers", [[2, 4], pytest.param([1, 2, 2, 1], marks=pytest.mark.deep)])
def test_layer_offsets_that_assume_equal_stages_are_detected(layers: list[int],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    config = apply_settings(recipes.get("tiny-qwen3"), [
        f"model.num_layers={sum(layers)}", f"parallel.pp={len(layers)}",
        f"parallel.pipeline_layout={layers}"])

    def assume_equal_stages(config: Any, *_: Any, **__: Any) -> int:
        stages = int(config.pipeline_model_parallel_size)
        return int(config.num_layers) // stages * int(parallel_state.get_pipeline_model_parallel_rank())

    for module in [m for m in sys.modules.values() if hasattr(m, "get_transformer_layer_offset")]:
        monkeypatch.setattr(module, "get_transformer_layer_offset", assume_equal_stages)

    assert layout_proof.prove_run(config, len(layers))[1].outcome == DIFFERS


def sync_first_bucket_only(sync: Callable[..., None]) -> Callable[..., None]:
    """Return a faulty gradient synchronization that skips all groups without the first bucket."""
    def sync_if_first(group: Any, *args: Any, **kwargs: Any) -> None:
        if not any(bucket.bucket_id for bucket in group.buckets):
            sync(group, *args, **kwargs)

    return sync_if_first


def test_a_missing_sum_after_the_first_bucket_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """With overlap the first stage reduces its gradients, including those of experts, in several buckets."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    for name in ("start_grad_sync", "finish_grad_sync"):
        monkeypatch.setattr(Group, name, sync_first_bucket_only(getattr(Group, name)))
    config = apply_settings(recipes.get("tiny-qwen3-moe"), [
        "parallel.overlap_grad_reduce=true", "train.micro_batch_size=1", "train.global_batch_size=8"])

    verdict = layout_proof.prove_run(config, 2)[1]

    assert verdict.outcome == DIFFERS
    assert {f"step 1: gradient of {name}" for name in (
        "embedding.word_embeddings.weight", "decoder.layers.0.mlp.experts.experts.linear_fc1.weight")
    } <= {*verdict.places}


OVERRIDDEN_WITHOUT_EFFECT = {
    # length of the run, and its data
    "train.tokens", "train.epochs", "train.steps", "data.heldout_tokens", "data.max_epochs",
    "data.skip_steps",
    # size of updates and initial weights; chunks of the output head; cores of a kernel
    "optim.eps", "optim.warmup_steps", "optim.rewarm", "model.init_std", "train.head_chunk_tokens",
    "gpu.exchange_sms", "guards.hang_timeout_s", "data.prefetch_steps"}


def test_overridden_settings_are_listed_or_harmless() -> None:
    assert OVERRIDES.keys() - UNCOVERED.keys() == OVERRIDDEN_WITHOUT_EFFECT


@pytest.mark.each(("settings", "listed"), [
    (("train.hidden_dropout=0.1",), "dropout"), ((), "precision"),
    (("train.ramp_from_batch_size=4", "train.ramp_increment=4", "train.ramp_steps=10"), "batches that grow"),
    (("gpu.grad_dtype=bf16",), "sums of gradients in bf16"),
    (('data.phases=[{"name": "a"}, {"name": "b", "seq_len": 1024}]',), "rows of other lengths"),
    (('data.phases=[{"name": "a"}, {"name": "b", "global_batch_size": 16}]',), "other numbers of rows"),
    (('data.phases=[{"name": "a", "lr": 1e-5}]',), "learning rates of phases"),
    (("train.fp8=tensorwise", "train.fp8_format=e4m3", "train.fp8_bf16_layers_at_start=1"), "fp8"),
    (('optim.groups=[{"pattern": "decoder.layers.3.*", "frozen": true}]',), "optim.groups")])
def test_uncovered_settings_are_listed(settings: tuple[str, ...], listed: str) -> None:
    config = apply_settings(recipes.get("tiny-qwen3"), [
        "train.precision=bf16", "train.global_batch_size=8", "train.micro_batch_size=1", *settings])
    miniature = build_miniature(config, 1, Path("documents"))

    assert any(listed in part for part in miniature.uncovered)


def test_valid_settings_have_a_miniature() -> None:
    config = apply_settings(recipes.get("tiny-qwen3"), [
        "optim.rewarm=[[4, 2]]", "model.head_dim=16", "model.rope_share=0.625",
        'optim.groups=[{"pattern": "decoder.layers.[1-3].*", "lr_scale": 2}, {"pattern": "*layers.3.*"}]'])
    miniature = build_miniature(config, 1, Path("documents")).config

    assert (miniature.optim.rewarm, miniature.model.head_dim) == ((), 16)
    # the miniature has layers 0 and 1
    assert [group.pattern for group in miniature.optim.groups] == ["decoder.layers.[1-3].*"]


def test_a_rule_broken_only_by_the_miniature_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OVERRIDES, "train.average_last", 1)

    with pytest.raises(UserError, match=r"breaks a rule: .*average_last"):
        build_miniature(recipes.get("tiny-qwen3"), 1, Path("documents"))


def test_a_pattern_without_a_tensor_in_the_miniature_is_reported() -> None:
    config = apply_settings(recipes.get("tiny-k-exaone"), ['optim.groups=[{"pattern": "*.experts.15.*"}]'])

    with pytest.raises(UserError, match=r"rule: .*experts\.15.*matches no parameter"):
        layout_proof.prove_run(config, 1)


def test_prove_prints_json_and_exits_with_0(run_command: Any) -> None:
    result = run_command("plan", "tiny-qwen3", "--set", "parallel.tp=2", "--set", "parallel.pp=2", "--nproc",
                         "4", "--prove", "--json")

    parsed = json.loads(result.stdout)
    assert result.returncode == 0, result.stderr
    assert parsed["outcome"] == EQUAL and parsed["num_ranks"] == 4 and parsed["layout"]["pp"] == 2
    assert any("Transformer Engine" in line for line in parsed["assumed"])


def test_prove_names_differences_and_exits_with_3(capsys: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("megatron_sov.train.objectives.objective"), "sum_dict",
                        skip_reduction)

    assert cli.main(["plan", "tiny-qwen3", "--set", "parallel.pp=2", "--nproc", "4", "--prove"]) == 3

    output = capsys.readouterr().out
    assert "NOT equal to one process" in output and "  step 1: backward of decoder.final_layernorm" in output


def test_prove_refuses_options_of_other_plans(run_command: Any) -> None:
    result = run_command("plan", "tiny-qwen3", "--prove", "--sweep", "--cluster", "h100")

    assert result.returncode == 2 and "--prove" in result.stderr and "--sweep" in result.stderr


@pytest.mark.deep
def test_overlapped_gathers_of_convolution_weights_are_awaited() -> None:
    """No computing module owns the convolution weights and output norm of linear attention, so no module hook
    waits for their gather."""
    config = apply_settings(recipes.get("solar-open2-250b"), ["parallel.pp=1", "parallel.ep=2"])
    assert config.parallel.overlap_param_gather
    assert layout_proof.prove_run(config, 2)[1].outcome == EQUAL
