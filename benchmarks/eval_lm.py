"""`eval lm` gives, item by item, what lm-eval's own `hf` model gives, at any layout; and kills cost nothing.

    python benchmarks/eval_lm.py [--items 24] [--kills 10] [--seed 0] [--family solar_open|exaone_moe]

Seven local tasks of all output types (likelihoods of a continuation, rolling likelihoods, generation with
stop strings and without, choices of words and of letters with examples, mutual information), made of Python's
own source text, are put to a random tiny model in fp32: by lm-eval's `hf` on the exported folder, by ours on
the same folder, on the checkpoint, and on the checkpoint at tp=2 and at pp=2.  Every item's scores are
compared: those that count, such as acc and exact_match, must be equal, likelihoods to 1e-4 relative; texts
must be equal.  Tokens a second are those that the model is given, over the seconds of asking it.

Then the evaluation is killed with SIGKILL at numbers of answers drawn over all of them, and started anew
with the same command: its results and items must be those of the undisturbed one, to the byte, and no
request that was answered may have been answered again.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.engine.parallel.cpu_shims import prepare_megatron

prepare_megatron()

import lm_eval  # noqa: E402
import torch  # noqa: E402

import megatron_sov.bench.lm.local  # noqa: E402
import megatron_sov.bench.lm.run  # noqa: E402
import megatron_sov.bench.lm.scoring  # noqa: E402
import megatron_sov.bench.lm.subject  # noqa: E402
import megatron_sov.infer.decoder.generator  # noqa: E402, F401  (forks share what is imported here)
from megatron_sov import convert  # noqa: E402
from megatron_sov.base.errors import ExitCode  # noqa: E402
from megatron_sov.cli import main as megatron_sov_main  # noqa: E402
from megatron_sov.infer.engines.libraries import load_hf  # noqa: E402
from megatron_sov.infer.engines.load import load_tokenizer  # noqa: E402
from megatron_sov.work.progress.journal import later_records  # noqa: E402

VOCAB_SIZE = 1024
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "moe_intermediate_size": 24, "num_experts_per_tok": 2,
         "max_position_embeddings": 512, "initializer_range": 0.25}
DATA = ("dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: data.jsonl\n    train: data.jsonl\n"
        "test_split: test\n")
CHOICES = "doc_to_choice: choices\ndoc_to_target: answer\n"


def metrics(**found: tuple[str, bool]) -> str:
    """Return a metric list: name -> aggregation, higher is better."""
    return "metric_list:\n" + "".join(
        f"  - metric: {name}\n    aggregation: {how}\n    higher_is_better: {str(up).lower()}\n"
        for name, (how, up) in found.items())


TASKS = {
    "last_word": 'output_type: loglikelihood\ndoc_to_text: "{{text}}"\ndoc_to_target: " {{last}}"\n'
                 + metrics(perplexity=("perplexity", False), acc=("mean", True)),
    "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{whole}}"\n' + metrics(
        word_perplexity=("weighted_perplexity", False), byte_perplexity=("weighted_perplexity", False),
        bits_per_byte=("bits_per_byte", False)),
    "words": 'output_type: multiple_choice\ndoc_to_text: "Question: {{text}}\\nAnswer:"\n' + CHOICES
             + metrics(acc=("mean", True), acc_norm=("mean", True), brier_score=("brier_score", False)),
    "letters": 'output_type: multiple_choice\nfewshot_split: train\nnum_fewshot: 2\ndoc_to_text: "{{text}}\\n'
               'A. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nD. {{choices[3]}}\\nAnswer:"\n'
               "doc_to_choice: letters\ndoc_to_target: answer\n" + metrics(acc=("mean", True)),
    "mutual": 'output_type: multiple_choice\ndoc_to_text: "{{text}}"\n' + CHOICES
              + metrics(acc_mutual_info=("mean", True)),
    "stopped": 'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{last}}"\n'
               'generation_kwargs:\n  until: ["\\n", "the"]\n  max_gen_toks: 24\n  do_sample: false\n'
               "filter_list:\n  - name: first\n    filter:\n      - function: regex\n"
               '        regex_pattern: "(\\\\w+)"\n      - function: take_first\n'
               + metrics(exact_match=("mean", True)),
    "unended": 'output_type: generate_until\ndoc_to_text: "{{whole}}"\ndoc_to_target: "{{last}}"\n'
               "generation_kwargs:\n  until: []\n  max_gen_toks: 16\n"
               + metrics(exact_match=("mean", True), bleu=("bleu", True)),
}


def write_tasks(folder: Path, items: int) -> None:
    """Write the tasks and their data."""
    folder.mkdir()
    lines = [line.strip() for line in inspect.getsource(difflib).splitlines() if len(line.split()) > 6]
    rows = []
    for i in range(items):
        *text, last = lines[7 * i % len(lines)].split()
        others = [lines[(5 * i + k) % len(lines)].split()[k] for k in range(3)]
        start = 9 * i % len(lines)
        rows.append({"text": " ".join(text), "last": last, "choices": [last, *others[:2], " ".join(others)],
                     "whole": "\n".join(lines[start:start + 8 + i % 9]), "answer": i % 4,
                     "letters": ["A", "B", "C", "D"]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{DATA}{text}")


def write_models(folder: Path, family: str) -> tuple[Path, Path]:
    """Write a random model as a Hugging Face folder and as a checkpoint, with a tokenizer."""
    from transformers import ExaoneMoeConfig, ExaoneMoeForCausalLM, SolarOpenConfig, SolarOpenForCausalLM

    from tokenizer import cli

    (folder / "text.jsonl").write_text(json.dumps({"text": inspect.getsource(argparse)}))
    assert cli.main(["train", "--preset", "solar-open", "--vocab-size", str(VOCAB_SIZE), "--input",
                     str(folder / "text.jsonl"), "--output", str(folder / "tokenizer")]) == 0
    torch.manual_seed(0)
    if family == "solar_open":
        model: Any = SolarOpenForCausalLM(SolarOpenConfig(
            num_hidden_layers=2, n_routed_experts=8, n_shared_experts=1, routed_scaling_factor=1.7,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4}, bos_token_id=None,
            eos_token_id=None, pad_token_id=None, **SIZES))
    else:
        model = ExaoneMoeForCausalLM(ExaoneMoeConfig(
            num_hidden_layers=4, num_experts=8, num_shared_experts=1, intermediate_size=40, sliding_window=8,
            routed_scaling_factor=2.5, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            layer_types=["sliding_attention"] * 3 + ["full_attention"], **SIZES))
    model.save_pretrained(folder / "hf")
    shutil.copytree(folder / "tokenizer", folder / "hf", dirs_exist_ok=True)
    convert.from_hf(folder / "hf", folder / "checkpoint")
    return folder / "hf", folder / "checkpoint"


def forked(work: Callable[[], int], log: Path, kill_when: Callable[[], bool] | None = None) -> int:
    """Do work in a fork of this process, which has imported everything, and kill it when that is so; returns
    its exit code."""
    child = os.fork()
    if not child:
        code = 1
        try:
            with open(log, "ab") as f:
                os.dup2(f.fileno(), 1)
                os.dup2(f.fileno(), 2)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if kill_when is not None:
        while not kill_when():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def by_lm_eval(hf: Path, tasks: Path, out: Path) -> int:
    """Have lm-eval's own model do it, and write its items as ours are written."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    os.chdir(tasks)  # lm-eval finds data files from there
    loaded, tokenizer = load_hf(hf, torch.float32), load_tokenizer(hf)
    # `load_hf` drops the folder's own settings, by which sequences end that wait for others of their batch
    loaded.generation_config.eos_token_id = tokenizer.eos_token_id
    model = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=8)
    spent: Counter[str] = Counter()
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        _timed(model, name, spent)
    found_tasks = TaskManager(include_path=str(tasks), include_defaults=False).load(list(TASKS))
    for task in found_tasks["tasks"].values():  # as its command does
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(1234)
    found = evaluate(model, found_tasks, bootstrap_iters=0)
    assert found is not None
    items = {}
    for task, samples in found["samples"].items():
        for sample in samples:
            end = "" if sample["filter"] == "none" else f",{sample['filter']}"
            texts = [r for resps in sample["resps"] for r in resps if isinstance(r, str)]
            items[f"{task} {sample['doc_id']}"] = {
                "scores": {f"{m}{end}": float(sample[m]) for m in sample["metrics"]
                           if isinstance(sample[m], (int, float))}, "texts": texts}
    figures = {task: {name: value for name, value in values.items() if isinstance(value, float)}
               for task, values in found["results"].items()}
    out.write_text(json.dumps({"items": items, "figures": figures, "asking_s": spent["s"]}, default=float))
    return 0


def _timed(model: Any, name: str, spent: Counter[str]) -> None:
    plain = getattr(model, name)

    def timed(requests: Any, **more: Any) -> Any:
        begin_s = time.monotonic()
        found = plain(requests, **more)
        spent["s"] += time.monotonic() - begin_s  # type: ignore[assignment]
        return found

    setattr(model, name, timed)


def ours(target: Path, tasks: Path, *more: str) -> list[str]:
    """Return the command without its output."""
    return ["eval", "lm", str(target), "--tasks", ",".join(TASKS), "--task-dir", str(tasks), *more]


def differences(reference: dict[str, Any], out: Path) -> tuple[int, int, float]:
    """Return how many items and figures are compared, how many differ, and the largest relative difference
    of a likelihood's figure."""
    results = json.loads(out.read_text())
    items = [json.loads(line) for line in out.with_suffix(".items.jsonl").read_text().splitlines()]
    compared = differ = 0
    largest = 0.0
    for item in items:
        theirs = reference["items"][f"{item['task']} {item['item']}"]
        compared += 1
        wrong = bool(theirs["texts"]) and [s["response"] for s in item["samples"]] != theirs["texts"]
        for metric, value in theirs["scores"].items():
            if isinstance(value, (int, float)) and metric.partition(",")[0] != "perplexity":
                wrong |= value != item["scores"][metric]
        differ += wrong
    for task, scores in results["tasks"].items():
        for metric in scores["metrics"]:
            theirs = reference["figures"][task].get(f"{metric['name']},{metric['filter']}")
            if theirs is not None:
                compared += 1
                relative = abs(theirs - metric["value"]) / max(abs(theirs), 1e-9)
                largest = max(largest, relative)
                differ += relative > 1e-4
    return compared, differ, largest


def kill_again_and_again(folder: Path, argv: Sequence[str], out: Path, kills: int, seed: int) -> None:
    """Kill an evaluation, start it anew, and compare what it leaves with the undisturbed one's."""
    begin_s = time.monotonic()
    assert forked(lambda: megatron_sov_main([*argv, "--output", str(folder / "whole.json")]),
                  folder / "log") == 0
    whole_s = time.monotonic() - begin_s
    cache, kept = out.with_suffix(".cache"), []
    total = len(_keys(folder / "whole.cache"))
    draw = random.Random(seed)
    # numbers of answers on disk at which it is killed, over the whole of the work
    for moment in sorted(draw.sample(range(1, total), kills)):
        code: int = ExitCode.USER_ERROR
        while code == ExitCode.USER_ERROR:  # the killed one's processes end a moment later, and hold its lock
            time.sleep(1)
            code = forked(lambda: megatron_sov_main([*argv, "--output", str(out)]), folder / "log",
                          kill_when=lambda moment=moment: len(_keys(cache)) >= moment)
        assert code == -signal.SIGKILL, (code, (folder / "log").read_text()[-3000:])
        kept.append(len(_keys(cache)))
    assert forked(lambda: megatron_sov_main([*argv, "--output", str(out)]), folder / "log") == 0
    keys = _keys(cache)
    same = [(folder / f"whole{end}").read_bytes().replace(b"whole", b"killed")
            == out.with_suffix(end).read_bytes() for end in (".json", ".items.jsonl")]
    print(f"killed {kills} times (undisturbed: {whole_s:.1f} s); answers on disk at each: {kept}")
    print(f"results and items as undisturbed, to the byte: {same}; answers written: {len(keys)}, "
          f"of them twice: {len(keys) - len(set(keys))}, undisturbed: "
          f"{len(_keys(folder / 'whole.cache'))}")


def _keys(cache: Path) -> list[str]:
    return [str(key) for folder in cache.glob("*/") for key, _ in later_records(folder, {})]


def main() -> int:
    """Run everything; returns 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--items", type=int, default=24, metavar="N", help="items of a task (default 24)")
    parser.add_argument("--kills", type=int, default=10, metavar="N", help="default 10")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments")
    parser.add_argument("--family", choices=("solar_open", "exaone_moe"), default="solar_open")
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, lm-eval "
          f"{lm_eval.__version__}; {args.family}, {args.items} items of {len(TASKS)} tasks")
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="eval-lm-") as name:
        folder = Path(name)
        write_tasks(folder / "tasks", args.items)
        assert forked(lambda: write_models(folder, args.family) and 0, folder / "log") == 0
        hf, checkpoint = folder / "hf", folder / "checkpoint"
        assert forked(lambda: by_lm_eval(hf, folder / "tasks", folder / "lm-eval.json"),
                      folder / "log") == 0, (folder / "log").read_text()[-3000:]
        reference = json.loads((folder / "lm-eval.json").read_text())
        layouts = {"folder": (hf, []), "checkpoint": (checkpoint, []),
                   "tp2": (checkpoint, ["--nproc", "2", "--set", "parallel.tp=2", "--set",
                                        "parallel.sp=true"]),
                   "pp2": (checkpoint, ["--nproc", "2", "--set", "parallel.pp=2"])}
        for layout, (target, more) in layouts.items():
            out, log = folder / f"{layout}.json", folder / f"{layout}.log"
            argv = [*ours(target, folder / "tasks", *more), "--output", str(out)]
            assert forked(lambda argv=argv: megatron_sov_main(argv), log) == 0, log.read_text()[-3000:]
            compared, differ, largest = differences(reference, out)
            wrong += differ
            said = next(line for line in log.read_text().splitlines() if line.startswith("asked"))
            words = said.replace(",", "").split()
            if layout == "folder":
                print(f"lm-eval hf   {float(words[4]) / reference['asking_s']:8,.0f} tokens/s (batches of 8)")
            print(f"{layout:<12} {float(words[4]) / max(float(words[7]), 0.05):8,.0f} tokens/s; {compared} "
                  f"items and figures compared, {differ} differ, largest relative difference of a figure "
                  f"{largest:.1e}")
        argv = ours(checkpoint, folder / "tasks", "--batch-size", "1")
        if args.kills:
            kill_again_and_again(folder, argv, folder / "killed.json", args.kills, args.seed)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
