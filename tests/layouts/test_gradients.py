"""Loss and all gradients of a training step equal transformers', document by document.

K-EXAONE's MTP layer, which transformers lacks, is written here in plain torch; transformers' `MtpModel`
computes GLM's and DeepSeek's.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, linear, rms_norm, silu

from tests.layouts.k_exaone2_reference import apply_layer_limits

RUN = str(Path(__file__).with_name("layout_run.py"))
SETTINGS = ["train.precision=fp32", "model.seq_aux_loss_coeff=0", "model.num_mtp_layers=0",
            "model.init_std=0.2", "train.global_batch_size=4", "train.micro_batch_size=4"]
"""The reference has no balancing loss; a large init_std makes every detail visible."""
ADDED_UP = ["train.micro_batch_size=2"]
"""Two micro-batches, for features that do not depend on the family."""
PREDICTION = ["model.num_mtp_layers=1", "model.mtp_loss_coeff=0.3"]
SPLIT = ["parallel.tp=2", "parallel.sp=true"]
CASES = {
    "exaone2 lm and predictions": ("tiny-k-exaone2", "lm", [*PREDICTION, *SPLIT, *ADDED_UP]),
    "qwen2 lm": ("tiny-qwen2", "lm", []),
    "qwen3_moe lm": ("tiny-qwen3-moe", "lm", [
        "model.norm_topk_prob=false", "model.num_dense_layers=1", "model.dense_ffn_dim=48"]),
    "exaone4 lm": ("tiny-exaone4", "lm", SPLIT),
    "gemma3 lm": ("tiny-gemma3", "lm", [*SPLIT, "model.embedding_multiplier=5.656854249492381",
                                        "model.logits_softcap=2.5"]),
    "deepseek_v3 lm and prediction": ("tiny-deepseek-v3", "lm", [*PREDICTION, *SPLIT]),
    "solar_open2 lm": ("tiny-solar-open2", "lm", [*SPLIT, "model.init_std=0.12"]),  # theirs are noisier
    "hyperclovax lm": ("tiny-hyperclovax", "lm", [*SPLIT, "model.residual_multiplier=0.4"]),
    "solar sft": ("tiny-solar-open", "sft",
                  ["objective.text_coeff=0.3", 'data.phases=[{"name": "main", "seq_len": 64}]']),
}
"""Each case covers a backward pass that differs between families: windows and limits, biases, chunks of
linear attention, softcaps, expert groups, latent attention."""


def _segments(result: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield tokens, labels, weights and types of each document part in the batch, without padding."""
    for m in result["micro_batches"]:
        for a, b in zip(m["bounds"], m["bounds"][1:], strict=False):
            if b > a and not m["padding"][a]:
                yield {name: torch.tensor(m[name][a:b]) for name in ("tokens", "labels", "weights", "types")}


def _predict(w: dict[str, torch.Tensor], config: dict[str, Any], hidden: torch.Tensor,
             next_embedding: torch.Tensor) -> torch.Tensor:
    """Return hidden states [n, H] of the MTP layer (DeepSeek-V3, arXiv 2412.19437, eq. 21-23; published
    names).

    Args:
        w: the `mtp.*` tensors, without the prefix.
        config: config.json.
        hidden: [n, H] hidden states of the trunk after the final norm.
        next_embedding: [n, H] embeddings of the next tokens.
    """
    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], w[f"{name}.weight"], config["rms_norm_eps"])

    def heads(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, w[f"layers.0.self_attn.{name}_proj.weight"]).unflatten(-1, (-1, dim)).transpose(0, 1)

    n, dim, slides = len(hidden), config["head_dim"], config["mtp_layer_types"] == ["sliding_attention"]
    x = linear(torch.cat([norm(next_embedding, "pre_fc_norm_embedding"), norm(hidden, "pre_fc_norm_hidden")],
                         -1), w["fc.weight"])
    normed = norm(x, "layers.0.input_layernorm")
    q, k = (norm(heads(normed, name), f"layers.0.self_attn.{name}_norm") for name in "qk")
    v = heads(normed, "v")
    distance = torch.arange(n)[:, None] - torch.arange(n)
    visible = distance >= 0
    if slides:  # only sliding layers apply rotary positions
        visible &= distance < config["mtp_sliding_windows"][0]
        angle = torch.outer(torch.arange(n),
                            config["rope_parameters"]["rope_theta"] ** (-torch.arange(0, dim, 2) / dim))
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
        q, k = (t * cos + torch.cat([-t[..., dim // 2:], t[..., :dim // 2]], -1) * sin for t in (q, k))
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    scores = (q @ k.transpose(1, 2) / dim ** 0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    x = x + linear((scores @ v).transpose(0, 1).flatten(1), w["layers.0.self_attn.o_proj.weight"])
    normed = norm(x, "layers.0.post_attention_layernorm")
    gate, up = (linear(normed, w[f"layers.0.mlp.{name}_proj.weight"]) for name in ("gate", "up"))
    return norm(x + linear(silu(gate) * up, w["layers.0.mlp.down_proj.weight"]), "norm")


def _predictor(model: Any, weights: Path, num_layers: int) -> Any:
    """Return transformers' model of the MTP layer in the folder, or None. `MtpModel` knows the layer names of
    published sizes only."""
    from transformers.modeling_layers import MtpModel

    if (not model.config.to_dict().get("num_nextn_predict_layers")
            or model.config.model_type != "deepseek_v3"):
        return None
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{num_layers}\..*"]
    return MtpModel.from_pretrained(model)


def _gradients_behind(predictor: Any, num_layers: int, embedding: torch.Tensor,
                      head: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the MTP layer's gradients with the names of a folder, copies included."""
    prefix = f"model.layers.{num_layers}."
    gradients = {f"{prefix}embed_tokens.weight": embedding, f"{prefix}shared_head.head.weight": head}
    for name, parameter in predictor.layers[0].named_parameters():
        name = prefix + name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        if "gate_up_proj" in name:
            for e, (gate, up) in enumerate(parameter.grad.unflatten(1, (2, -1)).unbind()):
                stem = name.replace("gate_up_proj", str(e))
                gradients |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            gradients |= {name.replace("down_proj", f"{e}.down_proj.weight"): down
                          for e, down in enumerate(parameter.grad)}
        else:
            gradients[name] = parameter.grad
    return {name: tensor.clone() for name, tensor in gradients.items()}


def _reference(weights: Path, gradients: Path, result: dict[str, Any], objective: str) -> dict[str, float]:
    """Run transformers on each document part; return the losses and save a model with gradients as
    weights."""
    from transformers import AutoModelForCausalLM

    model = apply_layer_limits(AutoModelForCausalLM.from_pretrained(
        weights, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"))
    config = json.loads((weights / "config.json").read_text())
    prediction = {name.removeprefix("mtp."): tensor.requires_grad_() for name, tensor in load_file(
        weights / "model.safetensors").items() if name.startswith("mtp.")}
    predictor = _predictor(model, weights, config["num_hidden_layers"])
    predicted, num_predicted = torch.zeros(()), 0.0
    sums: dict[int, torch.Tensor] = {}
    counts: dict[int, float] = {}
    for s in _segments(result):
        hidden = model.model(input_ids=s["tokens"][None], use_cache=False).last_hidden_state[0]
        logits = model.lm_head(hidden) * getattr(model.config, "logits_scaling", 1.0)
        if cap := getattr(model.config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        losses = cross_entropy(logits, s["labels"], reduction="none")
        # labels are the next tokens; the last position of a part has no second next token
        states = hidden
        depths = config.get("mtp_num_speculative_steps", int(bool(prediction or predictor)))
        for depth in range(1, 1 + depths):
            ahead = s["labels"][depth - 1:-1]
            states = _predict(prediction, config, states[:-1], model.model.embed_tokens(
                ahead)) if prediction else predictor.forward_layer(
                    0, states[None, :-1], torch.arange(1, len(states))[None], None, input_ids=ahead[None])[0]
            mtp_losses = cross_entropy(model.lm_head(states), s["labels"][depth:], reduction="none")
            predicted = predicted + (mtp_losses * s["weights"][depth:]).sum()
            num_predicted += float(s["weights"][depth:].sum())
        for kind in set(s["types"].tolist()):
            weights_of_kind = s["weights"] * (s["types"] == kind)
            sums[kind] = sums.get(kind, torch.zeros(())) + (losses * weights_of_kind).sum()
            counts[kind] = counts.get(kind, 0.0) + float(weights_of_kind.sum())
    text, response = 0, 2
    terms = {"lm": sums[text] / counts[text]} if objective == "lm" else {
        "response": sums[response] / counts[response], "text": sums[text] / counts[text]}
    if num_predicted:
        terms["mtp"] = predicted / num_predicted
    sum({"text": 0.3, "mtp": 0.3}.get(name, 1.0) * term  # type: ignore[union-attr]
        for name, term in terms.items()).backward()
    mtp_gradients = _gradients_behind(
        predictor, config["num_hidden_layers"], model.model.embed_tokens.weight.grad,
        model.lm_head.weight.grad) if predictor else {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else 0.0)
    model.save_pretrained(gradients)
    save_file({f"mtp.{name}": tensor.grad for name, tensor in prediction.items()} | mtp_gradients,
              gradients / "prediction.safetensors")
    return {name: term.item() for name, term in terms.items()}


@pytest.mark.essential
@pytest.mark.usefixtures("solar_open2")
def test_loss_and_all_gradients_equal_transformers(ranks: Any, job: Any, packed_data: Any,
                                                   tmp_path: Path) -> None:
    from megatron_sov.convert import to_hf

    jobs = []
    for name, (recipe, objective, settings) in CASES.items():
        paths = [str(packed_data.text)] + ([str(packed_data.chats)] if objective == "sft" else [])
        jobs.append(job(RUN, "compute_first_batch", 2 if "parallel.tp=2" in settings else 1,
                        {"recipe": recipe, "settings": [*SETTINGS, *settings], "paths": paths,
                         "objective": objective, "out": str(tmp_path / name)}))
    for (name, (_, objective, _)), (result, *_) in zip(CASES.items(), ranks(*jobs), strict=True):
        out = tmp_path / name
        for part in ("weights", "gradients"):
            to_hf(out / part, out / f"hf-{part}")
        expected = _reference(out / "hf-weights", out / "reference", result, objective)
        assert result["losses"] == pytest.approx(expected, abs=1e-5), name
        ours = load_file(out / "hf-gradients/model.safetensors")
        theirs = load_file(out / "reference/model.safetensors") | load_file(
            out / "reference/prediction.safetensors")
        checked = [key for key in theirs if not key.endswith("e_score_correction_bias")]
        assert len(checked) > 30
        assert set(checked) == {key for key in ours if not key.endswith("e_score_correction_bias")}
        for key in checked:
            scale = theirs[key].abs().max()
            assert (ours[key] - theirs[key]).abs().max() <= 1e-4 * scale + 1e-8, f"{name}: {key}"
        assert sum(bool(theirs[key].abs().max() > 1e-6) for key in checked) > 0.7 * len(checked), (
            "gradients reach the experts")
