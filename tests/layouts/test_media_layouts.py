"""Images and audio in place of placeholder tokens: every layout computes the results of one process, which
equal transformers' model with the same features."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear, rms_norm, silu, softplus

from megatron_sov import recipes
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.convert.hf_export import to_hf
from megatron_sov.convert.hf_import import from_hf
from megatron_sov.model.config import apply_settings
from megatron_sov.model.config.encoders import CLIP_MEAN, CLIP_STD
from megatron_sov.model.families.encoders import encoder_shapes
from tests.layouts.media_run import AUDIO, SMALL, VISION

RUN = str(Path(__file__).with_name("media_run.py"))
FP64 = ["train.precision=fp64"]
EXPERTS = ["model.num_experts=4", "model.expert_ffn_dim=16", "model.seq_aux_loss_coeff=0.01"]
SP = ["parallel.tp=2", "parallel.sp=true"]
SENT = ["parallel.overlap_grad_reduce=true", "parallel.bucket_params=3000"]
OVERLAP = [*SENT, "parallel.zero1=true", "parallel.overlap_param_gather=true"]
LAYOUTS = {
    "TP2": ("tiny-qwen3", 2, ["parallel.tp=2"]),
    "TP2+SP recompute": ("tiny-qwen3", 2, [*SP, "train.recompute=true"]),
    "PP2": ("tiny-qwen3", 2, ["parallel.pp=2"]),
    "DP2 overlapped": ("tiny-qwen3", 2, SENT),
    "TP2+SP x CP2 x EP2": ("tiny-qwen3-moe", 4, [*SP, "parallel.cp=2", "parallel.ep=2"]),
}
FIRST = "TP2+SP x CP2 x EP2"
"""Layout that `make test` runs."""


def trained_config() -> Any:
    """Return the config of the tiny model."""
    return apply_settings(recipes.get("tiny-qwen3"), [
        f"model.vision={json.dumps(VISION)}", f"model.audio={json.dumps(AUDIO)}", *SMALL])


def _apart(ours: Path, theirs: Path, part: str = "model") -> dict[str, float]:
    """Return each tensor's difference relative to its largest value; the gradient of a key bias is rounding
    noise only."""
    a, b = TensorReader(ours, part), TensorReader(theirs, part)
    assert sorted(a.keys()) == sorted(b.keys())
    return {key: float((a.read(key) - b.read(key)).abs().max() / b.read(key).abs().max().clamp(min=1e-6))
            for key in sorted(a.keys())}


@pytest.mark.distributed
@pytest.mark.essential
@pytest.mark.parametrize("names", [
    [FIRST], pytest.param([name for name in LAYOUTS if name != FIRST], marks=pytest.mark.deep)],
                         ids=["all at once", "further"])
def test_layouts_agree_with_one_rank(ranks: Any, job: Any, tmp_path: Path, names: Collection[str]) -> None:
    def settings(recipe: str, layout: list[str]) -> list[str]:
        return [*FP64, *(EXPERTS if "moe" in recipe else []), *layout]

    layouts = {name: LAYOUTS[name] for name in names}
    one = {recipe: (recipe, 1, []) for recipe, _, _ in layouts.values()}
    all_runs = {**one, **layouts}
    results = ranks(*(job(RUN, "compute_first_batch", n, {
        "recipe": recipe, "settings": settings(recipe, layout), "out": str(tmp_path / name)})
                      for name, (recipe, n, layout) in all_runs.items()))
    losses = {name: per_rank[0]["losses"] | per_rank[0]["meters"]
              for name, per_rank in zip(all_runs, results, strict=True)}
    assert {"lm", "text_loss", "audio_loss", "image_loss"} <= set(losses[next(iter(one))])
    for name, (recipe, _, _) in layouts.items():
        assert losses[name] == pytest.approx(losses[recipe], rel=1e-12), name
        differences = _apart(tmp_path / name / "gradients", tmp_path / recipe / "gradients")
        assert max(differences.values()) < 1e-10, (name, {k: v for k, v in differences.items() if v > 1e-10})
    gradients = TensorReader(tmp_path / next(iter(one)) / "gradients", "model")
    for key in ("vision.encoder.embeddings.patch_embedding.weight", "audio.encoder.conv1.weight",
                "audio.compressor.query_token", "vision.adapter.fc2.weight"):
        assert float(gradients.read(key).abs().max()) > 1e-6, key


@pytest.mark.deep
@pytest.mark.distributed
def test_gradients_reach_encoders_exactly_when_they_are_trained(ranks: Any, job: Any, tmp_path: Path) -> None:
    cases = {"both": (True, True), "adapters": (False, True), "none": (False, False)}
    results = ranks(*(job(RUN, "compute_first_batch", 1, {
        "recipe": "tiny-qwen3", "out": str(tmp_path / name), "settings": [
            *FP64, f"media.train_encoders={encoders}", f"media.train_adapters={adapters}"]})
                      for name, (encoders, adapters) in cases.items()))
    all_tensors = set(encoder_shapes(trained_config().model))
    places = {"audio.encoder.embed_positions.weight"}
    encoders = {key for key in all_tensors if ".encoder." in key}
    expected = {"both": places, "adapters": encoders, "none": all_tensors}
    for (name, frozen), (result,) in zip(expected.items(), results, strict=True):
        assert {key.removeprefix("encoders.") for key in result["frozen"]} == frozen, name
        moments = {key.removeprefix("exp_avg/") for key in result["moments"]}
        assert moments & all_tensors == all_tensors - frozen, name
        gradients = TensorReader(tmp_path / name / "gradients", "model")
        assert {key for key in all_tensors if float(gradients.read(key).abs().max()) == 0} == frozen, name


@pytest.mark.deep
@pytest.mark.distributed
def test_a_run_resumes_bit_for_bit_and_at_another_layout(ranks: Any, job: Any, tmp_path: Path) -> None:
    """Includes the encoders' optimizer moments, from a checkpoint of two processes with ZeRO-1."""
    fp64 = [*FP64, "optim.name=muon"]
    one = [*fp64, *OVERLAP]
    first, same, other = ranks(
        job(RUN, "train_with_checkpoint", 2, {"settings": one, "run": str(tmp_path / "one")}),
        job(RUN, "resume_training", 2, {"settings": one, "run": str(tmp_path / "one")}),
        job(RUN, "resume_training", 2, {"settings": [*fp64, *SP], "run": str(tmp_path / "one")}))
    assert same == [steps[1] for steps in first]
    assert other[0]["loss"] == pytest.approx(first[0][1]["loss"], rel=1e-9)
    assert first[0][1]["loss"] != first[0][0]["loss"]


@pytest.mark.distributed
def test_a_run_may_start_from_a_model_without_encoders(ranks: Any, job: Any, tmp_path: Path) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    SiglipVisionModel(SiglipVisionConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, vision_use_head=False)).save_pretrained(tmp_path / "vit")
    ((tensors,),) = ranks(job(RUN, "start_with_encoders", 1, {
        "plain": str(tmp_path / "plain"), "encoder": str(tmp_path / "vit")}))
    all_tensors = set(encoder_shapes(trained_config().model))
    assert not set(tensors["checkpoint"]) & all_tensors and len(tensors["checkpoint"]) > 20
    assert set(tensors["folder"]) == {key for key in all_tensors if key.startswith("vision.encoder.")}
    assert set(tensors["neither"]) == all_tensors - set(tensors["folder"])


# comparison with transformers

def scan_tokens(x: torch.Tensor, w: dict[str, torch.Tensor], head_dim: int, state_size: int) -> torch.Tensor:
    """Compute a Mamba-2 mixer token by token on one sequence [n, width]."""
    heads = len(w["D"])
    inner = heads * head_dim
    gate, mixed, dt = (x @ w["in_proj.weight"].T).split([inner, inner + 2 * state_size, heads], -1)
    padded = torch.cat([mixed.new_zeros(3, mixed.shape[1]), mixed])
    windows = torch.stack([padded[i:i + 4] for i in range(len(x))])
    mixed = silu((windows * w["conv1d.weight"][:, 0].T).sum(1) + w["conv1d.bias"])
    values, b, c = mixed.split([inner, state_size, state_size], -1)
    values, step = values.unflatten(-1, (heads, head_dim)), softplus(dt + w["dt_bias"])
    state, outputs = x.new_zeros(heads, head_dim, state_size), []
    for t in range(len(x)):
        decay = (-w["A_log"].exp() * step[t]).exp()
        state = decay[:, None, None] * state + (step[t][:, None] * values[t])[..., None] * b[t]
        outputs.append((state @ c[t] + w["D"][:, None] * values[t]).flatten())
    y = rms_norm(torch.stack(outputs), (inner,), w["norm.weight"], 1e-5) * silu(gate)
    return y @ w["out_proj.weight"].T


def compress_features(features: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compress every five features of a record [n, hidden] to one."""
    def select(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}

    chunks = linear(features, w["input_proj.weight"], w["input_proj.bias"]).unflatten(0, (-1, 5))
    rows = torch.cat([torch.cat([chunk, w["query_token"][None]]) for chunk in chunks])
    rows = layer_norm(rows, rows.shape[-1:], w["input_norm.weight"], w["input_norm.bias"], 1e-6)
    block = select("model.layers.0.")
    normed, compressed_rows = rms_norm(rows, rows.shape[-1:], block["norm.weight"], 1e-5), []
    for chunk in normed.split(6):
        query = chunk[5]
        attention = linear(query, block["weight_fc.weight"], block["weight_fc.bias"]).softmax(0)
        gate = linear(query, block["gate_fc.weight"], block["gate_fc.bias"]).sigmoid() * 0.98 + 0.01
        summary = (attention[:, None] * chunk[:5]).sum(0) * gate + query * (1 - gate)
        compressed_rows += [chunk[:5], summary[None]]
    out = scan_tokens(torch.cat(compressed_rows), select("model.layers.0.mixer."), 8, 4) + rows
    out = rms_norm(out, out.shape[-1:], w["model.norm_f.weight"], 1e-5)[5::6]
    return linear(out, w["output_proj.weight"], w["output_proj.bias"])


def hf_encoders(w: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """Return transformers' encoders with the weights of an exported folder."""
    from transformers import Qwen2AudioEncoderConfig, SiglipVisionConfig, SiglipVisionModel
    from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

    vision = SiglipVisionModel(SiglipVisionConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, vision_use_head=False)).double()
    audio = Qwen2AudioEncoder(Qwen2AudioEncoderConfig(
        num_mel_bins=4, max_source_positions=30, d_model=16, encoder_layers=1, encoder_attention_heads=2,
        encoder_ffn_dim=24)).double()
    for network, prefix in ((vision, "model.vision_model."), (audio, "model.audio_model.")):
        network.load_state_dict({name.removeprefix(prefix): t.detach() for name, t in w.items()
                                 if name.startswith(prefix)})
    return vision, audio


@pytest.mark.distributed
def test_losses_and_gradients_are_those_of_transformers(ranks: Any, job: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ((result,),) = ranks(job(RUN, "compute_first_batch", 1, {
        "recipe": "tiny-qwen3", "settings": FP64, "out": str(tmp_path)}))
    for name in ("weights", "gradients"):
        to_hf(tmp_path / name, tmp_path / f"hf-{name}", "float64")
    from_hf(tmp_path / "hf-weights", tmp_path / "again")
    assert set(_apart(tmp_path / "again", tmp_path / "weights").values()) == {0.0}
    w = {name: t.requires_grad_() for name, t in load_file(tmp_path / "hf-weights/model.safetensors").items()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf-weights", dtype=torch.float64)
    for norm in [m for m in model.modules() if type(m).__name__ == "Qwen3RMSNorm"]:  # it rounds to float32
        norm.forward = lambda x, norm=norm: rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    vision, audio = hf_encoders(w)

    def mlp(features: torch.Tensor, name: str) -> torch.Tensor:
        inner = gelu(linear(features, w[f"model.{name}.fc1.weight"], w[f"model.{name}.fc1.bias"]))
        return linear(inner, w[f"model.{name}.fc2.weight"], w[f"model.{name}.fc2.bias"])

    def features_of(kind: str, records: torch.Tensor) -> torch.Tensor:
        if kind == "pictures":
            pixels = (records / 255 - torch.tensor(CLIP_MEAN).double()[:, None, None]) / torch.tensor(
                CLIP_STD).double()[:, None, None]
            return mlp(vision(pixel_values=pixels).last_hidden_state, "mm_projector").flatten(0, 1)
        audio_features = mlp(audio(records).last_hidden_state, "audio_projector")
        prefix = "model.video_audio_compressor."
        compressor = {name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}
        return torch.cat([compress_features(record, compressor) for record in audio_features])

    total, count = torch.zeros(()).double(), 0.0
    for m in result["micro_batches"]:
        embedded = model.model.embed_tokens(torch.tensor(m["tokens"]))
        for kind, part in m["media"].items():
            features = features_of(kind, torch.tensor(part["records"], dtype=torch.float64))
            embedded = embedded.index_copy(0, torch.tensor(part["places"]), features[part["features"]])
        for first, end in zip(m["bounds"], m["bounds"][1:], strict=False):
            states = model.model(inputs_embeds=embedded[None, first:end], use_cache=False)
            weights = torch.tensor(m["weights"][first:end], dtype=torch.float64)
            losses = cross_entropy(model.lm_head(states.last_hidden_state[0]),
                                   torch.tensor(m["labels"][first:end]), reduction="none")
            total, count = total + (losses * weights).sum(), count + float(weights.sum())
    assert result["losses"]["lm"] == pytest.approx(float(total) / count, rel=1e-6)
    (total / count).backward()
    ours = load_file(tmp_path / "hf-gradients/model.safetensors")
    theirs = {name: t.grad for name, t in w.items() if t.grad is not None}
    for prefix, network in (("", model), ("model.vision_model.", vision), ("model.audio_model.", audio)):
        theirs |= {prefix + name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    places = "model.audio_model.embed_positions.weight"
    assert set(ours) - set(theirs) == {places} | ({"lm_head.weight"} - set(theirs))
    for name, gradient in theirs.items():
        difference = float((ours[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-6))
        assert difference < 1e-6, (name, difference)
