"""`megatron-sov plan`: uses the recommended layout on a cluster, and prints the memory and time that it
needs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.cli import main
from megatron_sov.plan.search import space
from tests.typed_words import format_set_options


@pytest.mark.deep
def test_a_plan_for_a_cluster_has_its_layout_and_memory(read_output: Any) -> None:
    lines = read_output("plan", "solar-open-102b", "--cluster", "h100", "--nodes", "64").splitlines()
    assert lines[0] == ("solar-open-102b: 102.7 B parameters (12.1 B active) on 20 T tokens (the recipe's), "
                        "64 x 8 H100-80GB: 146 days, $5.28 M")
    assert lines[1].startswith("layout: fastest of ")
    assert "priced with a host 2 times as slow, 147 days" in lines[1]
    assert "; the recipe's own takes 173 days " in lines[1]
    assert lines[2] == "512 GPUs: pp 8, ep 8, ZeRO-1"
    assert lines[3].startswith("memory: ") and " GiB per GPU (pipeline stage 1 of 8): weights " in lines[3]
    assert lines[4].startswith("experts: GPU memory suffices for ")
    assert lines[6] == "What it takes:" and lines[7].split()[:2] == ["stage", "context"]
    assert lines[12].split()[:2] == ["total", "20"]  # T tokens
    assert any(line.split()[:2] == ["step", "tokens"] for line in lines)  # header of the schedule
    plan = json.loads(read_output("plan", "tiny-solar-open", "--cluster", "local", "--json"))
    assert (plan["processes"], plan["gpu"], plan["steps"], plan["layout"]["ep"]) == (2, None, 200, 1)
    assert plan["memory_bytes"]["total"] == sum(v for k, v in plan["memory_bytes"].items() if k != "total")


def test_plan_without_cluster_prints_size_memory_and_epochs(token_shards: Path, get_refusal: Any,
                                                            read_output: Any) -> None:
    command = ["plan", "tiny-solar-open", "--data", f"web={token_shards}", "--set"]
    size, data, unused, layout, memory, *_ = read_output(*command, "model.vocab_size=2048").splitlines()
    assert size == "tiny-solar-open: 2.5 M parameters (1.32 M active)"
    assert re.fullmatch(r"data: [\d.]+ K tokens, of which the run reads 819.2 K \([\d.]+ passes\)", data)
    [vocab_size] = re.findall("pass --set model.vocab_size=([0-9]+)", unused)
    assert layout == "1 process: data parallel alone"
    assert memory.startswith("memory: ") and " GiB per process: weights " in memory
    assert "unused" not in read_output(*command, f"model.vocab_size={vocab_size}")
    assert f"pass --set model.vocab_size={vocab_size}" in get_refusal(*command, "model.vocab_size=99")


@pytest.mark.deep
@pytest.mark.parametrize(("arguments", "message"), [
    (["solar-open-102b", "--cluster", "h100", "--nodes", "60", "--set", "parallel.ep=8",
      "--set", "train.fp8=none"],
     "the nearest layout that fits: --set parallel.pp=2"),
    (["tiny-solar-open", "--nodes", "2"], "--nodes 2: needs a cluster; add --cluster, or pass --nproc"),
    (["tiny-solar-open", "--routes", "runs/a"], "--routes runs/a: needs a cluster; add --cluster"),
    (["tiny-solar-open", "--cluster", "h100", "--routes", "runs/a"],
     "--routes runs/a: events.jsonl has no expert load"),
    (["tiny-solar-open", "--cluster", "local", "--nproc", "2"],
     "--nproc 2: the processes are those of --nodes 1 of --cluster local; leave --nproc out"),
    (["tiny-solar-open", "--cluster", "h10"], "did you mean 'h100'?"),
    (["tiny-solar-open", "--cluster", "local", "--sweep"],
     "so the nodes' GPUs are unknown; use a profile with gpu set to one of a100"),
    (["solar-open-102b", "--cluster", "a100", "--nodes", "60", "--set", "train.fp8=tensorwise"],
     "train.fp8 = tensorwise: fp8 on A100-80GB: is not supported by its tensor cores"),
    (["solar-open-102b", "--cluster", "h100", "--nodes", "60", "--sweep", "--set", "train.fp8=nvfp4"],
     "the nearest that works: --set train.fp8=tensorwise"),
    (["k-exaone-236b", "--cluster", "h100", "--nodes", "2"],
     "the fewest nodes that it fits are 8: --nodes 8"),
    (["tiny-solar-open", "--page", "x.html"], "megatron-sov plan --page: was removed in this version"),
])
def test_mistakes_end_with_one_sentence(arguments: list[str], message: str, get_refusal: Any) -> None:
    assert message in get_refusal("plan", *arguments)


@pytest.mark.deep
def test_pinned_optimizer_memory_must_fit_the_profile(tmp_path: Path, get_refusal: Any) -> None:
    profile = tmp_path / "small.yaml"
    profile.write_text("description: nodes with little memory\ngpu: h200\naccount: ''\nmemory: 16G\n"
                       "network_gbits_per_gpu: 400\n")
    options = ["plan", "solar-open-102b", "--cluster", str(profile), "--nodes", "64"]
    assert main([*options, "--set", "gpu.optimizer_offload=0.1"]) == 0
    assert ("of the 16.0 GiB that it has; the nearest share that fits: --set gpu.optimizer_offload=0.52"
            in get_refusal(*options, "--set", "gpu.optimizer_offload=1"))


def test_unnamed_gpus_get_a_layout_but_no_price(read_output: Any) -> None:
    output = read_output("plan", "tiny-solar-open", "--cluster", "one-node", "--set",
                         "train.micro_batch_size=2")
    assert "no price: gpu is empty in the profile" in output and "What it takes" not in output


def test_search_without_a_fit_names_the_shortfall_and_the_nodes_needed(monkeypatch: pytest.MonkeyPatch,
                                                                       get_refusal: Any) -> None:
    monkeypatch.setattr(space, "MICRO_BATCH_SIZES", (1,))
    monkeypatch.setattr(space, "VPP", (1,))
    options = ["plan", "qwen3-moe-30b", "--cluster", "h100", "--sweep", "--set", "parallel.ep=1",
             "--set", "parallel.pp=1", "--set", "parallel.tp=1"]
    errors = get_refusal(*options)
    assert "qwen3-moe-30b on 1 node of 8 H100-80GB: fits nowhere; the nearest layout lacks" in errors
    assert "no number of nodes up to 4,096 is enough: set less of the layout" in errors


# A user's model folder with only a config.json.


SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
         "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu"}
# per layer: queries and output, keys and values, MLP, two norms; then embedding and head, and the last norm
NUM_PARAMS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + 2 * 128256 * 4096 + 4096


def count_adapter_params(rank: int) -> int:
    """Return the elements of A and B of all linear layers of a decoder of these sizes."""
    inputs_and_outputs = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336),
                          (4096, 14336), (14336, 4096)]
    return 32 * rank * sum(a + b for a, b in inputs_and_outputs)


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    folder = tmp_path / "my-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}))
    return folder


def plan_own_model(own_model: Path, read_output: Any, *words: str) -> Any:
    return json.loads(read_output("plan", "sft", "--from", str(own_model), "--cluster", "h100", "--json",
                                  "--set", "train.tokens=100000000", "--set", "parallel.zero1=true", *words))


@pytest.mark.parametrize("rank", [1, 4, 16, 64, 256])
def test_an_adapter_has_gradients_and_optimizer_states_only_for_its_weights(
        rank: int, own_model: Path, read_output: Any) -> None:
    plan = plan_own_model(own_model, read_output, "--set", f"lora.rank={rank}")
    memory, trained = plan["memory_bytes"], count_adapter_params(rank)
    assert plan["parameters"]["total"] == NUM_PARAMS
    assert memory["weights"] == pytest.approx(2 * (NUM_PARAMS + trained), rel=0.01)
    assert memory["gradients"] == pytest.approx(4 * trained, rel=0.01)
    # float32 master weights and two moments, shared by eight GPUs under ZeRO-1
    assert memory["optimizer"] == pytest.approx(12 * trained / 8, rel=0.02)


def test_an_adapter_saves_the_products_of_weight_gradients(own_model: Path, read_output: Any) -> None:
    full_s, adapter_s = (
        plan_own_model(own_model, read_output, "--set", "train.recompute=true", *more)["stages"][0]["seconds"]
        for more in ((), ("--set", "lora.rank=16")))
    # three products of four: forward, its recomputation, and gradients of inputs, but none of weights
    assert adapter_s["dense"] / full_s["dense"] == pytest.approx(3 / 4, rel=0.03)
    assert full_s["dp"] > 0 and full_s["optimizer"] > 0
    assert not adapter_s.get("dp") and not adapter_s.get("optimizer")


@pytest.mark.parametrize(("settings", "source", "tokens"), [
    (["train.tokens=100000000"], "train.tokens", "100.1 M"), (["train.steps=10"], "train.steps", "5.24 M"),
    (["train.steps=7", "lora.rank=8"], "train.steps", "3.67 M"),
    (["train.steps=7", "train.global_batch_size=64"], "train.steps", "1.84 M"),
    (["train.steps=7", "data.phases.0.seq_len=2048"], "train.steps", "1.84 M"),
    (["data.phases.0.seq_len=8192", "train.steps=1"], "train.steps", "1.05 M")])
def test_a_stage_without_data_is_as_long_as_a_setting_says(settings: list[str], source: str, tokens: str,
                                                           own_model: Path, read_output: Any) -> None:
    output = read_output("plan", "--from", str(own_model), "--cluster", "h100", *format_set_options(settings))
    [headline] = [line for line in output.splitlines() if line.startswith("my-8b: ")]
    assert f"on {tokens} tokens ({source}), 8 H100-80GB: " in headline


@pytest.mark.parametrize(("words", "message"), [
    (["--from", "MODEL"], "the stage's length is unknown; pass --data DIR"),
    (["qwen3-8b", "--from", "MODEL"], "and qwen3-8b: both name a model"),
    (["--from", "nowhere", "--set", "train.steps=9"], "--from nowhere: does not exist"),
    (["sft"], "sft: is a stage, which needs a model: add --from FOLDER"),
    (["rl", "--from", "MODEL"], "and rl: both name a model"),
    (["--from", "MODEL", "--data", "nowhere"], "nowhere"),
    (["--from", "MODEL", "--budget", "500", "--sweep", "--set", "train.steps=5"],
     "--budget and --sweep: exclude each other"),
    (["--days", "-1"], "--days"),
    (["qwen3-8b", "--days", "3", "--prove"], "--days and --prove: exclude each other"),
])
def test_incomplete_or_contradictory_models_and_budgets_are_refused(
        words: list[str], message: str, own_model: Path, get_refusal: Any) -> None:
    typed = [str(own_model) if word == "MODEL" else word for word in words]
    assert message in get_refusal("plan", *typed, "--cluster", "h100")


@pytest.mark.parametrize(("fields", "message"), [
    ({"model_type": "unheard-of"}, "unheard-of"), ({"hidden_size": "wide"}, "config.json: "),
    ({"num_hidden_layers": None}, "num_hidden_layers"), ({"hidden_act": "tanh"}, "hidden_act")])
def test_an_unsupported_config_json_is_refused_by_its_field(fields: dict[str, object], message: str,
                                                            own_model: Path, get_refusal: Any) -> None:
    file = own_model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    refusal = get_refusal("plan", "--from", str(own_model), "--cluster", "h100", "--set", "train.steps=5")
    assert f"--from {own_model}: " in refusal and message in refusal


def test_epochs_of_data_are_the_length_of_a_stage(own_model: Path, token_shards: Path, get_refusal: Any,
                                                  read_output: Any) -> None:
    command = ["plan", "distill", "--from", str(own_model), "--data", f"web={token_shards}",
               "--cluster", "h100"]
    data, headline, *_ = read_output(*command).splitlines()
    assert data.startswith("data: ") and " tokens (3 epochs of --data), 8 H100-80GB: " in headline
    assert "pass --set model.vocab_size" not in headline
    assert "contains conversations" in get_refusal("plan", "sft", *command[2:])
