"""Prompts with media equal the start of training rows, and answers get the log-probabilities of training."""

import json
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from data_prep.cli import main as sov_data
from megatron_sov.base.errors import UserError
from megatron_sov.chat.media_tokens import AUDIO_PAD, IMAGE_PAD
from megatron_sov.engine.decode.forward_only import DocumentBatch, ForwardModel
from megatron_sov.engine.parallel.device import get_local_device
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.infer.engines.load import LoadedModel, run_forward_model
from megatron_sov.infer.engines.target import find_target
from megatron_sov.infer.request import Batching, Sampling
from megatron_sov.model.modality import EncoderInputs
from megatron_sov.omni.generation.prompts import PromptMediaEncoder, encode_media_prompts
from megatron_sov.train.data.order import OrderedSample
from megatron_sov.train.data.rows import PackedRow, build_row
from megatron_sov.train.data.sources import open_sources
from megatron_sov.train.data.streams import PackedSegment
from megatron_sov.train.objectives.microbatch import build_micro_batch
from tests.omni_model import save_codecs, save_omni_model

CONTENT = [{"type": "image", "path": "one.png"}, {"type": "audio", "path": "word.wav"},
           {"type": "text", "text": "What?"}]
OTHER_CONTENT = [{"type": "image", "path": "two.png"}, *CONTENT[1:]]
CODECS = "--image-tokenizer pictures --audio-tokenizer sounds"


@dataclass(frozen=True)
class Site:
    """A folder with a model, codecs and media files, and the training rows of both records in it."""

    folder: Path
    rows: list[PackedRow]

    @property
    def answers(self) -> list[list[int]]:
        """Token ids of the assistant's message in each row."""
        return [row.tokens[1:][row.weights[:-1] > 0].tolist() for row in self.rows]


@pytest.fixture(scope="module")
def shared_site(as_one_rank: dict[str, str], tmp_path_factory: pytest.TempPathFactory,
                packed_data: Any) -> Site:
    """Two records with a picture, a sound and a question, packed with the ids of codecs and with features."""
    folder, random = tmp_path_factory.mktemp("site"), np.random.default_rng(0)
    for name in ("one", "two"):
        Image.fromarray(random.integers(256, size=(20, 16, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    soundfile.write(folder / "word.wav", random.uniform(-0.5, 0.5, 40_000), 16_000)
    save_codecs(folder / "pictures", folder / "sounds")
    answer = {"role": "assistant", "content": "Seven and two."}
    records = [{"messages": [{"role": "user", "content": content}, answer]}
               for content in (CONTENT, OTHER_CONTENT)]
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in as_one_rank.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        save_omni_model(folder / "model", packed_data.tokenizer, (
            "train.precision=fp64", f'data.paths={json.dumps({str(folder / "shards"): 1.0})}'))
        assert sov_data(shlex.split(f"encode-media --input records.jsonl --media-root . {CODECS} --threads 1 "
                                    "--continuous-pictures 16:4 --continuous-sounds 16:2:50 --output corpus"
                                    )) == 0
        assert sov_data(shlex.split("pack --tokenizer model-tokenizer --format chat --heldout 0 --workers 1 "
                                    "--input corpus --output shards")) == 0
    (source,) = open_sources({str(folder / "shards"): 1.0}, sys.maxsize)
    documents = source.open_split("train")
    rows = [build_row(OrderedSample(0, (PackedSegment(i, 0, int(n)),)), documents, int(n))
            for i, n in enumerate(documents.lengths)]
    return Site(folder, rows)


@pytest.fixture
def site(shared_site: Site, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The shared site, whose folder is the working directory."""
    monkeypatch.chdir(shared_site.folder)
    return shared_site


def encode_prompts(tokenizers: dict[str, Path] | None = None, **options: Any) -> Any:
    """Encode the user's messages of both records, with the codecs of the site or other `tokenizers`."""
    codecs = tokenizers or {"image": Path("pictures"), "audio": Path("sounds")}
    return encode_media_prompts(find_target(Path("model")), [CONTENT, OTHER_CONTENT],
                                PromptMediaEncoder(Path(), codecs), **options)


def test_prompt_equals_the_start_of_its_training_row(site: Site) -> None:
    prompts = encode_prompts()
    for row, ids, inputs in zip(site.rows, prompts.ids, prompts.encoder_inputs, strict=True):
        assert ids == row.tokens[:len(ids)].tolist() and len(ids) + len(site.answers[0]) <= len(row.tokens)
        assert row.encoder_inputs is not None
        assert {"pictures", "sounds"} == set(inputs) == set(row.encoder_inputs)
        for kind, part in inputs.items():
            trained = row.encoder_inputs[kind]
            assert (part.places == trained.places).all() and (part.features == trained.features).all()
            assert all((a == b).all() for a, b in zip(part.records, trained.records, strict=True))
    # a picture has 4 features; a sound has 50 in each piece of 2 s, so 63 in 2.5 s
    assert [len(prompts.encoder_inputs[0][kind].places) for kind in ("pictures", "sounds")] == [4, 63]
    with pytest.raises(UserError, match="audio, which needs --audio-to"):
        encode_prompts(tokenizers={"image": Path("pictures")})
    discrete = encode_prompts(with_features=False)
    placeholders = {prompts.encoder.find_token_id(IMAGE_PAD), prompts.encoder.find_token_id(AUDIO_PAD)}
    assert placeholders < set(prompts.ids[0]) and not placeholders & set(discrete.ids[0])
    assert discrete.encoder_inputs == [{}, {}]


def score_answer(policy: ForwardModel, prompt: list[int], answer: list[int], media: EncoderInputs
                 ) -> list[float]:
    """Return the log-probabilities of an answer's tokens, computed by a forward pass without a cache."""
    batch = DocumentBatch([[*prompt, *answer]], get_local_device())
    batch.inputs = replace(batch.inputs, encoder_inputs=media)
    logits = policy.logits(batch, torch.arange(len(answer)) + len(prompt) - 1)
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()


@pytest.mark.deep
def test_decoder_and_training_logprobs_agree(site: Site) -> None:
    """Prompts with equal ids but different images have different log-probabilities."""
    prompts, answers = encode_prompts(), site.answers
    first, second = prompts.encoder_inputs
    other_picture = {**first, "pictures": replace(first["pictures"], records=second["pictures"].records)}
    media_inputs = (first, other_picture, first)

    def compute_logprobs(loaded: LoadedModel) -> Any:
        policy, trained = loaded.policy, []
        for batch in [build_micro_batch(row) for row in site.rows]:
            (row_logprobs,) = policy.map([batch], lambda hidden, head, b: head.logprobs(hidden[0], b.labels))
            trained.append(row_logprobs[batch.weights > 0].tolist())
        scored = [score_answer(policy, prompts.ids[i], answers[i], prompts.encoder_inputs[i]) for i in (0, 1)]
        written = [MegatronEngine(policy, Batching(prefill_tokens=tokens)).generate(
            [prompts.ids[0]] * 3, Sampling(4), encoder_inputs=list(media_inputs)) for tokens in (8192, 7)]
        rescored = [score_answer(policy, prompts.ids[0], answer, media)
                    for answer, media in zip(written[0].continuations, media_inputs, strict=True)]
        return trained, scored, [result.logprobs for result in written], rescored

    trained, scored, written, rescored = run_forward_model(
        find_target(Path("model")), ["train.precision=fp64"], None, compute_logprobs)
    for row_logprobs, answer_logprobs in zip(trained, scored, strict=True):
        assert answer_logprobs == pytest.approx(row_logprobs, abs=1e-9)
    for logprobs in written:
        assert logprobs[0] == pytest.approx(logprobs[2], abs=1e-12)
        assert logprobs[0] != pytest.approx(logprobs[1], abs=1e-6)
        assert np.array(logprobs) == pytest.approx(np.array(rescored), abs=1e-9)
