"""Import, generation, serving and evaluation of the model, each compared with an independent program."""

import json
import os
from pathlib import Path

import torch
from model_folder import HUB_FIELDS
from session import CITIES, QUESTIONS, Outcome, Session, find_number

from megatron_sov.work.endpoints.local_server import serve_model


def import_folder(session: Session) -> Outcome:
    output = "checkpoint exists"
    if not session.checkpoint.exists():
        output = " ".join(session.run("convert", "from-hf", "my-model", "ck").split())
    session.run_once("out-hf", "convert", "to-hf", "ck", "out-hf")
    from safetensors.torch import load_file

    folders = (session.folder / "out-hf", session.model)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in folders)
    equal = ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((session.folder / "out-hf/config.json").read_text())
    has_fields = all(config.get(name) == value for name, value in HUB_FIELDS.items())
    return (f"{len(ours)} tensors imported and exported, bits equal: {equal}; the three fields of the Hub: "
            f"{has_fields}; {output[:160]}", "the folder itself", equal and has_fields)


def verify_export(session: Session) -> Outcome:
    verdict = session.verify_export("ck", "out-hf")
    return verdict[:160], "transformers runs the folder", verdict.startswith("verified")


def compare_greedy_texts(session: Session) -> Outcome:
    expected = session.answer_greedily(QUESTIONS, 24)
    session.write_rows("questions.jsonl", [{"prompt": question} for question in QUESTIONS])
    counts = []
    for target in ("ck", "my-model"):
        session.run("generate", target, "--chat", "--prompts", "questions.jsonl", "--max-new-tokens", "24",
                    "--output", f"{target}.texts.jsonl")
        rows = [*session.read_rows(f"{target}.texts.jsonl")]
        pairs = zip(rows, expected, strict=True)
        counts.append(sum(row["response"].strip() == text.strip() for row, text in pairs))
        (session.folder / f"{target}.texts.jsonl").unlink()
    return (f"checkpoint {counts[0]} and folder {counts[1]} of {len(QUESTIONS)} greedy texts equal",
            "transformers, float32", counts == [len(QUESTIONS)] * 2)


def chat_once(session: Session) -> Outcome:
    expected = session.answer_greedily(QUESTIONS[:1], 24)[0].strip()
    output = session.run("chat", "my-model", "--temperature", "0", "--max-new-tokens", "24",
                         stdin=f"{QUESTIONS[0]}\n")
    return f"answers {expected!r}: {expected in output}", f"transformers: {expected!r}", expected in output


def serve_openai(session: Session) -> Outcome:
    from openai import OpenAI

    expected = session.answer_greedily(QUESTIONS[:4], 24)
    with serve_model(session.model, f"{session.model}: ") as server:
        client = OpenAI(base_url=server.url, api_key=server.key)
        replies = [client.chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": question}], temperature=0,
            max_tokens=24) for question in QUESTIONS[:4]]
    answers = [(reply.choices[0].message.content or "").strip() for reply in replies]
    equal = sum(answer == text.strip() for answer, text in zip(answers, expected, strict=True))
    return f"{equal} of {len(expected)} greedy answers equal", "transformers, float32", equal == len(expected)


def write_capitals(session: Session) -> int:
    """Write an lm-eval task with four choices into the folder `tasks`; return the number of its items."""
    (session.folder / "tasks").mkdir(exist_ok=True)
    names = list(CITIES)
    rows = []
    for i, (country, city) in enumerate(CITIES.items()):
        wrong = [CITIES[names[(i + k) % len(names)]] for k in (1, 4, 7)]
        choices = [*wrong[:i % 4], city, *wrong[i % 4:]]
        rows += [{"q": text.format(country), "choices": choices, "right": i % 4}
                 for text in ("The capital of {} is", "The government of {} sits in the city of",
                              "Question: Which city is the capital of {}?\nAnswer:")]
    (session.folder / "tasks/capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (session.folder / "tasks/capitals.yaml").write_text(
        "task: capitals\ndataset_path: json\ndataset_kwargs: {data_files: {test: capitals.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\n"
        "doc_to_target: right\nmetric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "- {metric: acc_norm, aggregation: mean, higher_is_better: true}\nmetadata: {version: 1}\n")
    return len(rows)


def score_capitals(session: Session) -> Outcome:
    """Score the task with our command and with lm-eval."""
    write_capitals(session)
    scores = {}
    for target in ("ck", "my-model"):
        session.run("eval", "lm", target, "--tasks", "capitals", "--task-dir", "tasks", "--output",
                    f"{target}.scores.json")
        report = json.loads((session.folder / f"{target}.scores.json").read_text())
        scores[target] = {metric["name"]: round(metric["value"], 4)
                          for metric in report["tasks"]["capitals"]["metrics"]}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    here = Path.cwd()
    os.chdir(session.folder / "tasks")
    try:
        model, tokenizer = session.reference()
        reference_lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        theirs = simple_evaluate(reference_lm, tasks=["capitals"],
                                 task_manager=TaskManager(include_path=".", include_defaults=False),
                                 bootstrap_iters=0)["results"]["capitals"]
    finally:
        os.chdir(here)
    reference = {name: round(theirs[f"{name},none"], 4) for name in ("acc", "acc_norm")}
    return str(scores), f"lm-eval `hf`: {reference}", all(ours == reference for ours in scores.values())


FACTS = 2 * [f"{city} is the capital of {country}." for country, city in CITIES.items()]
TEXTS = [" ".join(FACTS[first:first + count]) for first, count in (
    (0, 12), (2, 4), (5, 7), (1, 9), (3, 3), (0, 6), (4, 12), (7, 8), (9, 10), (6, 5), (8, 12))]


def measure_perplexity(session: Session) -> Outcome:
    """Compare the perplexity of whole documents at two row lengths; the longest document fits into both."""
    session.write_rows("texts.jsonl", [{"text": text} for text in TEXTS])
    session.run_once("tokenizer", "import", "my-model", "--output", "tokenizer", program="tokenizer.cli")
    # one training document; all others are held out by the hash of their text
    session.run_once("texts", "pack", "--tokenizer", "tokenizer", "--input", "texts.jsonl", "--heldout",
                     "0.99", "--output", "texts", program="data_prep.cli")
    from data_prep.shards.token_artifact import open_split

    documents = [ids.tolist() for ids in open_split(session.folder / "texts/texts/heldout-00000").documents()]
    model, _ = session.reference()
    losses, count = 0.0, 0
    for ids in documents:
        with torch.no_grad():
            rows = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        losses -= float(rows.gather(1, torch.tensor(ids[1:])[:, None]).sum())
        count += len(ids) - 1
    figures = {}
    for length in (256, 1024):
        session.run("eval", "ppl", "ck", "--data", "texts", "--seq-len", str(length), "--output", "ppl.json")
        figures[length] = float(find_number(json.loads((session.folder / "ppl.json").read_text()), "loss"))
    gap = max(abs(ours - losses / count) for ours in figures.values())
    return (f"{figures[256]:.4f} and {figures[1024]:.4f} nats at rows of 256 and 1,024 tokens",
            f"transformers, whole documents: {losses / count:.4f}", gap < 2e-4)
