"""A Hugging Face sequence classifier as a reward, against the model called by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.classifier import Classifier
from megatron_sov.judge.rewards.registry import make, order
from megatron_sov.judge.rewards.reward import Refused

WORDS = {"?": 0, "user": 1, "assistant": 2, "What": 3, "is": 4, "it": 5, "good": 6, "bad": 7}
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
ROW = {"prompt": "What is it", "response": "good good"}
IDS = [1, 3, 4, 5, 2, 6, 6]


def classifier(folder: Path, num_labels: int) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", pad_token="?")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    model = LlamaForSequenceClassification(LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_labels=num_labels, pad_token_id=0))
    model.save_pretrained(folder)
    return model.eval()


def test_the_reward_is_the_logit_of_the_conversation(tmp_path: Path) -> None:
    model = classifier(tmp_path, 1)
    reward = Classifier(str(tmp_path), max_tokens=10)
    reward.prepare()
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0, 0].item()
    assert reward.score(ROW).reward == pytest.approx(expected, abs=1e-6)
    assert reward.score({**ROW, "response": "bad"}).reward != pytest.approx(expected, abs=1e-4)
    with pytest.raises(Refused, match="at most 10 are read"):
        reward.score({**ROW, "response": "good " * 20})
    with pytest.raises(Refused, match=r"holds '\?', a special token"):
        reward.score({**ROW, "response": "good ? user bad"})


def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    classifier(tmp_path, 1)
    with pytest.raises(UserError, match="no classifier can be loaded"):
        Classifier(str(tmp_path), device="no-such-device").prepare()
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"folder = .*model\.safetensors: cannot be read as a safetensors"):
        Classifier(str(tmp_path)).prepare()


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    classifier(tmp_path, 1)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        Classifier(str(tmp_path)).prepare()


def test_a_label_of_several_is_a_probability(tmp_path: Path) -> None:
    model = classifier(tmp_path, 3)
    reward = Classifier(str(tmp_path), label=2)
    reward.prepare()
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0].softmax(-1)[2].item()
    assert reward.score(ROW).reward == pytest.approx(expected, abs=1e-6)


def test_other_weights_are_another_version(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = make(order("classifier", {"folder": str(tmp_path)})).version
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert make(order("classifier", {"folder": str(tmp_path)})).version != before
    before = make(order("classifier", {"folder": str(tmp_path)})).version
    (tmp_path / "vocab.txt").write_text("good")
    assert make(order("classifier", {"folder": str(tmp_path)})).version != before
    with pytest.raises(UserError, match=r"has no config\.json"):
        make(order("classifier", {"folder": str(tmp_path / "none")}))
