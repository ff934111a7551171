"""NeMo's recognisers through a double of its class, and files that name other things."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_sov.base.errors import UserError
from megatron_sov.omni.codecs import recogniser
from megatron_sov.omni.codecs.folder import open_codec
from megatron_sov.omni.codecs.published import import_codec
from tests.omni.codecs.test_published import module, nemo_file

MODULES = "nemo.collections.asr.modules"
MELS = f"{MODULES}.AudioToMelSpectrogramPreprocessor"
PIECES = [" ", "a", "b", "\N{LOWER ONE EIGHTH BLOCK}c"]
CONFIG: dict[str, Any] = {
    "preprocessor": {"_target_": MELS, "sample_rate": 100},
    "encoder": {"_target_": f"{MODULES}.ConformerEncoder", "feat_in": 1},
    "decoder": {"_target_": f"{MODULES}.ConvASRDecoder", "vocabulary": PIECES, "num_classes": 4}}


class EncDecCTCModel(nn.Module):
    """NeMo's, with its signatures: a frame is ten samples, whose mean is a piece's number; 4: a blank."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        assert set(cfg) == {"preprocessor", "encoder", "decoder"}, "nothing else is handed to NeMo"
        self.encoder = nn.Linear(1, cfg["encoder"].get("width", 1))
        self.decoder = nn.Module()
        self.decoder.num_classes_with_blank = cfg["decoder"]["num_classes"] + 1

    def forward(self, *, input_signal: torch.Tensor, input_signal_length: torch.Tensor) -> Any:
        # as `normalize_batch` of nemo-toolkit 3.0.0 does on GPUs, of a frame of 0.01 s
        if bool((input_signal_length == 1).any()):
            raise ValueError("received a tensor of length 1")
        filled = torch.nn.functional.pad(input_signal, (0, -input_signal.shape[1] % 10))
        means = filled.view(1, -1, 10).mean(-1)
        scores = -(self.encoder(means[..., None]) - torch.arange(5.0)).abs()
        scores = torch.cat([scores, torch.zeros(1, 3, 5)], 1)  # what the batch's longest would have more
        return scores, -(-input_signal_length // 10), scores.argmax(-1)


@pytest.fixture
def nemo(monkeypatch: pytest.MonkeyPatch) -> EncDecCTCModel:
    """Put the double in NeMo's place; gives one with weights of its own."""
    module(monkeypatch, "nemo.collections.asr.models", EncDecCTCModel=EncDecCTCModel)
    module(monkeypatch, "omegaconf", OmegaConf=type("OmegaConf", (), {"create": staticmethod(dict)}))
    network = EncDecCTCModel(CONFIG)
    with torch.no_grad():
        network.encoder.weight.fill_(10)
        network.encoder.bias.fill_(0)
    return network


def sound(pieces: list[int]) -> torch.Tensor:
    return torch.tensor(pieces).repeat_interleave(10) / 10


def test_equal_neighbours_are_one_piece_and_blanks_none(tmp_path: Path, nemo: EncDecCTCModel) -> None:
    rest = {"decoding": {"beam": {"kenlm_path": "/etc/passwd"}}, "train_ds": {"_target_": "os.system"},
            "tokenizer": {"dir": "beside"}, "spec_augment": {"_target_": "a.b"}}
    file = nemo_file(tmp_path / "ears.nemo", {**CONFIG, **rest},
                     {**nemo.state_dict(), "loss.weight": torch.ones(1)})
    import_codec("nemo-asr", file, tmp_path / "ears")
    ears = open_codec(tmp_path / "ears", kind="nemo-asr")
    assert ears.sample_rate_hz == 100 and "passwd" not in str(ears.settings)
    assert ears.hear(sound([1, 1, 2, 0, 0, 1, 4, 1, 3, 2])) == "ab aa cb"
    assert ears.hear(sound([0, 4, 0])) == ears.hear(sound([])) == ""
    # 31 s: the last second is heard alone, and the space between is one
    assert ears.hear(sound([1] * 299 + [0] + [2] * 10)) == "a b"
    # what is left of 30.01 s is too short to say anything, and so is a whole sound of 0.01 s
    assert ears.hear(torch.cat([sound([1] * 300), torch.ones(1)])) == "a" and ears.hear(torch.ones(1)) == ""


@pytest.mark.parametrize(("part", "config", "said"), [
    ("encoder", {"_target_": "os.system"}, "config.encoder._target_ = 'os.system': names no network"),
    ("encoder", {"_target_": f"{MODULES}.torch.hub.load"}, "names no network"),
    ("encoder", {"_target_": f"{MODULES}.ConvASREncoder", "params": {}}, "encoder.params: is of an old"),
    ("encoder", {}, "config.encoder: is no network"),
    ("decoder", {"_target_": f"{MODULES}.RNNTDecoder"}, "config.decoder._target_ = "),
    ("decoder", {"_target_": f"{MODULES}.ConvASRDecoder"}, "must be a list of up to 131,072 texts"),
    ("preprocessor", {"_target_": MELS, "features": 10**6},
     "config.preprocessor.features = 1000000: must be a whole number up to 1,024"),
    ("preprocessor", {"_target_": MELS, "window_size": "${oc.env:A}"},
     "would be looked up outside of the file"),
    ("preprocessor", {"_target_": MELS, "sample_rate": 16000.5},
     "config.preprocessor.sample_rate = 16000.5"),
    ("preprocessor", {"_target_": MELS, "sample_rate": True}, "sample_rate is 'True', no whole number"),
    ("preprocessor", {"_target_": MELS, "window": b"a"}, "config.preprocessor.window: is a bytes, which no"),
    ("encoder", None, "config.encoder: is missing")])
def test_a_configuration_that_hears_in_another_way_is_refused(part: str, config: Any, said: str,
                                                              tmp_path: Path, nemo: EncDecCTCModel) -> None:
    whole = {name: value for name, value in {**CONFIG, part: config}.items() if value is not None}
    with pytest.raises(UserError, match=re.escape(said)):
        import_codec("nemo-asr", nemo_file(tmp_path / "x.nemo", whole, nemo.state_dict()), tmp_path / "ears")
    assert not (tmp_path / "ears").exists()


@pytest.mark.parametrize(("change", "said"), [
    ({"sample_rate_hz": 0}, "sample_rate_hz"), ({"max_piece_s": float("inf")}, "max_piece_s"),
    ({"max_piece_s": -1.0}, "max_piece_s"), ({"sample_rate_hz": 50}, "its spectrogram has 100")])
def test_a_folder_with_sizes_that_nothing_is_heard_with_is_refused(
        change: dict[str, float], said: str, tmp_path: Path, nemo: EncDecCTCModel) -> None:
    import_codec("nemo-asr", nemo_file(tmp_path / "x.nemo", CONFIG, nemo.state_dict()), tmp_path / "ears")
    file = tmp_path / "ears/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["content"]["config"] |= change
    file.write_text(json.dumps(manifest | {"sha256": ""}))
    with pytest.raises(UserError, match=said):
        open_codec(tmp_path / "ears")


def test_what_is_not_as_it_says_is_one_sentence(tmp_path: Path, nemo: EncDecCTCModel,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(config: Any, weights: Any, said: str) -> None:
        with pytest.raises(UserError, match=said):
            import_codec("nemo-asr", nemo_file(tmp_path / "x.nemo", config, weights), tmp_path / "ears")

    state = nemo.state_dict()
    refused({**CONFIG, "decoder": {**CONFIG["decoder"], "num_classes": 9}}, state,
            "its head knows 10 pieces and its vocabulary, with the blank, 5")
    refused(CONFIG, {"encoder.weight": 3}, r"x\.nemo: model_weights\.ckpt: holds no names with tensors")
    refused(CONFIG, {"encoder.weight": state["encoder.weight"]}, "lacks what is network.encoder.bias here")
    monkeypatch.setattr(recogniser, "_MAX_ELEMENTS", 1000)
    refused({**CONFIG, "encoder": {**CONFIG["encoder"], "width": 2000}}, state,
            "asks for 2,000 numbers in 1 tensors")


def test_without_nemo_the_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="extras omni and speech"):
        import_codec("nemo-asr", nemo_file(tmp_path / "x.nemo", CONFIG, {"encoder.weight": torch.ones(1)}),
                     tmp_path / "ears")
