"""A task folder with small lm-eval tasks of every output type, built from source text."""

import inspect
import json
import textwrap
from pathlib import Path

import pytest

DATA = ("dataset_path: json\ndataset_kwargs: {data_files: {test: data.jsonl, train: train.jsonl}}\n"
        "test_split: test\n")
MEAN = "- {metric: %s, aggregation: mean, higher_is_better: true}\n"
TASKS = {
    "last_word": "output_type: loglikelihood\ndoc_to_text: '{{text}}'\ndoc_to_target: ' {{last}}'\n"
                 "metric_list:\n- {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
                 + MEAN % "acc",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{whole}}'\n"
               "metric_list:\n- {metric: bits_per_byte, aggregation: bits_per_byte, "
               "higher_is_better: false}\n",
    "words": "output_type: multiple_choice\ndoc_to_text: 'Q: {{text}}\n\n  A:'\ndoc_to_choice: choices\n"
             "doc_to_target: answer\nmetric_list:\n" + MEAN % "acc" + MEAN % "acc_norm"
             + "metadata: {version: 1, sov: {cluster_field: page}}\n",
    "letters": "output_type: multiple_choice\nfewshot_split: train\nnum_fewshot: 2\n"
               "doc_to_text: '{{text}}\n\n  A. {{choices[0]}}\n\n  B. {{choices[1]}}\n\n  Answer:'\n"
               "doc_to_choice: ['A', 'B']\n"
               "doc_to_target: right\nmetric_list:\n" + MEAN % "acc",
    "stopped": "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{last}}'\n"
               "generation_kwargs: {until: ['\n\n', the], max_gen_toks: 12}\nfilter_list:\n- name: first\n"
               "  filter:\n  - {function: regex, regex_pattern: '(\\w+)'}\n  - {function: take_first}\n"
               "metric_list:\n" + MEAN % "exact_match",
    "unended": "output_type: generate_until\ndoc_to_text: '{{whole}}'\ndoc_to_target: '{{last}}'\n"
               "generation_kwargs: {until: [], max_gen_toks: 4}\nmetric_list:\n" + MEAN % "exact_match",
}
"""lm-eval's output types, stop strings, filters, examples in front; one whose answers never end."""
GROUP = ("group: choices\ntask: [words, letters]\n"
         "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n")
NUM_ITEMS = 6


@pytest.fixture(scope="session")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task folder."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [line.strip() for line in inspect.getsource(textwrap).splitlines() if len(line.split()) > 6]
    rows = []
    for i in range(2 * NUM_ITEMS):  # the second half: examples
        *text, last = lines[7 * i].split()
        rows.append({"text": " ".join(text), "last": last, "page": f"page {i // 2}", "answer": i % 3,
                     "right": i % 2, "choices": [last, lines[5 * i + 1].split()[0], "three words more"],
                     "whole": "\n".join(lines[3 * i:3 * i + 2 + 9 * i])})
    for name, part in (("data", rows[:NUM_ITEMS]), ("train", rows[NUM_ITEMS:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{DATA}{text}")
    (folder / "choices.yaml").write_text(GROUP)
    return folder
