"""Commands, options, settings and folders of earlier versions that this one has no part for.

Each is refused by its name, with what serves in its place. An entry stays for one release.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError

COMMANDS = {
    "megatron-sov audit": "`megatron-sov inspect RUN --verify` checks the hashes of a run's manifests",
    "megatron-sov bundle": "`pip wheel` and `pip install --no-index` install without a network "
                           "(docs/install.md)",
    "megatron-sov completion": "--help lists commands and options",
    "megatron-sov counterfactual": "train a second run on shards that `sov-data pack` makes without the "
                                   "documents, and compare their `megatron-sov report` pages",
    "megatron-sov card": "`megatron-sov convert to-hf` writes a README.md with the model's origins",
    "megatron-sov codec train": "train a codec with diffusers or transformers, and read the folder of its "
                                "`save_pretrained` with `megatron-sov codec import`",
    "megatron-sov convert deepen": "use mergekit's passthrough method on the folder of `convert to-hf`",
    "megatron-sov convert settings": "type the option to `megatron-sov pretrain`, which names ours",
    "megatron-sov convert to-gguf": "use convert_hf_to_gguf.py of llama.cpp on the folder of `convert to-hf`",
    "megatron-sov convert upcycle": "use mergekit-moe on the folder of `convert to-hf`",
    "megatron-sov eval bigram": "`megatron-sov eval ppl` has bits per byte, which compare tokenizers",
    "megatron-sov eval logits": "`megatron-sov convert verify CHECKPOINT HF_DIR` compares weights and logits",
    **dict.fromkeys(("megatron-sov eval inspect", "megatron-sov eval play"),
                    "serve the model with `megatron-sov serve` and run inspect-ai on its address"),
    "megatron-sov distill write": "`megatron-sov rl run ... --teacher TEACHER --reward none --set "
                                  "policy.method=gkd` has the student answer (docs/distill.md); "
                                  "`megatron-sov generate --prompts` writes answers to pack",
    "megatron-sov distill rounds": "use `megatron-sov rl run ... --teacher TEACHER --reward none --set "
                                   "policy.method=gkd` (docs/distill.md)",
    "megatron-sov eval suites": "docs/eval_suites.md lists the tasks and their files; `eval lm` reads a "
                                "publisher's JSON Lines, Parquet or CSV below --data-dir",
    "megatron-sov ladder": "train the sizes with `megatron-sov pretrain` and fit their losses yourself",
    "megatron-sov reproduce": "python benchmarks/learning.py runs the claims in a checkout",
    "megatron-sov rl replay": "type the command of `rl run` again with another --run and --store",
    "megatron-sov rl store page": "`megatron-sov rl store show` prints responses and their rewards",
    "megatron-sov rl store ls": "`megatron-sov inspect STORE` lists parts and claims",
    "megatron-sov rl store stats": "`megatron-sov report RUN` has the figures of rounds; the store's Parquet "
                                   "files have the rows (docs/rollout_store.md)",
    "megatron-sov rl store verify": "use `megatron-sov inspect STORE --verify`",
    "megatron-sov rl why": "`megatron-sov rl store show` prints responses and their rewards",
    "megatron-sov watch": "`megatron-sov status RUN --follow` prints each step; --set obs.tensorboard=true "
                          "draws curves",
    "sov-data report": "`sov-data inspect DIR` shows what each step of a pipeline dropped; summary.json of "
                       "`sov-data synth` has the counts of its checks",
    **dict.fromkeys(("sov-data difficulty fit", "sov-data difficulty check"),
                    "use `sov-data scorer train --kind regressor --labels LABELS/labels.jsonl` on the output "
                    "of `sov-data difficulty label`, and `sov-data scorer check`"),
    "sov-data card": "manifest.json and summary.json of the output have sources, counts and hashes",
    "sov-tokenizer graft": "resize the model with transformers' `resize_token_embeddings`; `sov-tokenizer "
                           "media` adds tokens of pictures and sounds to a tokenizer",
}
"""Program and command -> what to use in its place."""
OPTIONS = {
    **dict.fromkeys(("megatron-sov chat --tools", "megatron-sov chat --tool-set"),
                    "`megatron-sov tools run ENV TARGET` has a model play a tool environment"),
    "megatron-sov convert to-hf --quantize": "quantize the folder with llm-compressor",
    **dict.fromkeys((f"megatron-sov eval lm --{name}" for name in (
        "key-env", "same-model", "tokenizer", "concurrent")),
        "ask an endpoint with lm-eval's own command `lm_eval --model local-chat-completions`"),
    **dict.fromkeys(("megatron-sov inspect --page", "sov-data inspect --page"),
                    "redirect the text: `megatron-sov inspect PATH > facts.txt`"),
    "megatron-sov logs --grep": "pipe the lines: `megatron-sov logs RUN | grep PATTERN`",
    "megatron-sov eval needle --by": "answers are generated greedily",
    "megatron-sov eval needle --text": "pack the text with `sov-data pack --heldout 0.5` for --data",
    **dict.fromkeys(("megatron-sov eval passk --sampled", "megatron-sov eval passk --group-by"),
                    "`megatron-sov score` judges responses that are there"),
    "megatron-sov score --disagreements": "the command prints the lines where two rewards disagree",
    "megatron-sov tools play": "call the world in Python (docs/tools.md, \"Try one by hand\"), or use "
                               "`megatron-sov tools run`",
    **dict.fromkeys(("megatron-sov plan --calibrate-engine", "megatron-sov plan --engine-gpus"),
                    "rounds of RL have no price; multiply the seconds of one round of `rl run`"),
    "megatron-sov plan --page": "redirect the text: `megatron-sov plan RECIPE --cluster P > plan.txt`",
    "megatron-sov plan --table": "in a checkout, python benchmarks/plan_calibration.py --no-refit predicts "
                                 "published runs",
    **dict.fromkeys((f"megatron-sov prefer --{name}" for name in (
        "rounds", "prompts", "reward", "reward-set", "samples", "temperature", "max-new-tokens",
        "keep-unfinished")),
        "use `megatron-sov rl run ... --set policy.method=preference` (docs/prefer.md)"),
    "megatron-sov report --compare": "draw the curves of several runs with TensorBoard (obs.tensorboard) or "
                                     "Weights & Biases; `megatron-sov eval difference` compares scores",
    **{f"megatron-sov codec reconstruct --{name}": "a codec decodes its own tokens"
       for name in ("decoder", "decoder-steps", "seed", "speaker")},
    **dict.fromkeys(("megatron-sov eval media --retrieval", "megatron-sov eval media --candidates"),
                    "rank texts by `eval lm` tasks with choices, or by code of your own over `generate`"),
    "megatron-sov eval media --speaker": "a codec has one voice",
    "megatron-sov generate --speaker": "a codec has one voice",
    **dict.fromkeys((f"megatron-sov submit --{name}" for name in ("job-name", "manifest", "apply")),
                    "submit to a Slurm cluster; Kubernetes is not supported"),
    **dict.fromkeys((f"sov-data encode-media --{name}" for name in ("recogniser", "max-wer", "max-cer")),
                    "filter the speech with NeMo or Whisper before it is encoded"),
    "sov-data mix --search": "set the shares with --blend",
    **dict.fromkeys(("sov-data scorer train --encoder", "sov-data scorer train --max-tokens"),
                    "train the linear model over n-grams, which needs no GPU"),
    **dict.fromkeys((f"sov-data scorer train --{name}" for name in ("max-chars", "max-ngram", "buckets")),
                    "the sizes are fixed: 20,000 characters, pairs of words, 262,144 buckets"),
    **dict.fromkeys((f"sov-data inspect --{name}" for name in ("id", "where", "text", "dropped", "source")),
                    "`sov-data inspect OUT` prints what each step dropped; read shards/ and quarantine/ of "
                    "the output with pandas or DuckDB for single documents"),
    **dict.fromkeys((f"sov-data synth --{name}" for name in ("cluster", "account", "partition", "serve-vllm",
                                                             "vllm-args")),
                    "start the model's server and `sov-data synth --engine URL` in jobs of your own; the "
                    "same command goes on after a requeue"),
    **dict.fromkeys((f"sov-data synth --{name}" for name in ("input-price", "output-price", "max-cost",
                                                             "judge-input-price", "judge-output-price")),
                    "limit tokens with --max-tokens-total; summary.json counts them"),
    "sov-data synth --max-time": "timeout --signal TERM 2h sov-data synth ... ends it with 75 as well",
    "sov-data pack --step": "apply the function with `megatron-sov map`, or as the step `code` of a pipeline "
                            "(`sov-data run`), before you pack",
    "sov-data synth --judge-max-tokens-field": "--max-tokens-field holds for both models",
    "sov-data synth --same-model": "another model under the same name is not noticed; name another --output",
    "sov-data synth --prompts": "copy the generator's YAML file, change its prompts, and name the copy",
    **dict.fromkeys(("sov-data synth --benchmarks", "sov-data synth --languages"),
                    "write the steps `decontaminate` and `language` into a file for --checks"),
    **dict.fromkeys(("sov-data probing-sets --against", "sov-data probing-sets --per-domain"),
                    "take the problems out of the training input: `sov-data decontaminate --benchmarks "
                    "SETS`"),
    **dict.fromkeys(("sov-tokenizer media --noise", "sov-tokenizer media --seed"),
                    "resize a model with transformers' `resize_token_embeddings`"),
    **dict.fromkeys(("sov-data verify --tokens", "sov-data verify --blend"),
                    "`megatron-sov plan RECIPE --data DIR` says how often a run reads its data"),
    "megatron-sov generate --compare-speed": "run the command twice, with and without --speculative",
    "sov-tokenizer compare --output": "the command prints its tables; --json FILE has all numbers",
    **dict.fromkeys(("sov-data synth --labels", "sov-data synth --min-kappa"),
                    "compare kept.jsonl and rejected.jsonl with scikit-learn's `cohen_kappa_score`"),
}
"""Program, command and option -> what to use in its place."""
_GPT_OSS = "only gpt-oss needs it, which this version does not read"
_CURVES = "set obs.tensorboard or obs.wandb for curves"
_ALERTS = "set obs.wandb, and let Weights & Biases send alerts"
SETTINGS: dict[str, tuple[Any, str]] = {
    "data.without": ([], "pack shards without the documents"),
    "model.attention_sinks": (False, _GPT_OSS),
    "model.attention_softcap": (None, "only Gemma 2 needs it, which this version does not read"),
    "model.linear_bias": (False, _GPT_OSS),
    "model.shared_expert_gate": (False, "only Qwen3-Next and Qwen3.5 need it, which this version does not "
                                        "read"),
    "model.yarn.longer": ("heads", "only A.X K1 needs it, which this version does not read"),
    "model.yarn.truncate": (True, _GPT_OSS),
    "needle.train_kinds": ([], "documents teach the one needle that tests ask for"),
    "obs.alert_on": (["stop", "rollback", "hang", "gate_failed", "restart", "sdc", "failure"], _ALERTS),
    "obs.alert_webhook": ("", _ALERTS),
    "obs.mlflow": (False, _CURVES),
    "obs.mlflow_experiment": ("megatron-sov", _CURVES),
    "obs.nvml": (True, "Weights & Biases (obs.wandb) measures GPUs"),
    "obs.otlp_endpoint": ("", _CURVES),
    "obs.prometheus_host": ("127.0.0.1", _CURVES),
    "obs.prometheus_port": (0, _CURVES),
    "obs.prometheus_textfile": ("", _CURVES),
    "obs.telemetry_every_s": (15.0, _CURVES),
    "policy.missing_share": (0.0, "a round waits for all of its responses"),
}
"""Setting of a run -> its default, and what to use in its place."""
_TRL = "train it with TRL or Megatron-Bridge"
_EXAMPLE = ("add --plugin examples/families/{0}.py:{1} of a checkout; its recipe is "
            "examples/families/{0}.py:{2}")
_CODECS = "import a codec of kind vqmodel, janus-vq, mimi or dac, and encode the media again"
VALUES = {
    **dict.fromkeys(("multi-value", "multi-query", "variable-tracking"),
                    "lm-eval's tasks `ruler` ask several needles: `megatron-sov eval lm --allow-download`"),
    **dict.fromkeys(("gpt_oss", "gpt-oss-20b", "gpt-oss-120b", "tiny-gpt-oss", "tiny-gpt-oss-120b",
                     "clamped_swiglu", "gemma2", "gemma2-9b", "tiny-gemma2", "qwen3_next",
                     "qwen3-next-80b", "tiny-qwen3-next", "qwen3_5_moe_text", "qwen3_5_moe",
                     "qwen3.5-35b-a3b", "tiny-qwen3.5-moe", "axk1", "ax-k1", "tiny-ax-k1"), _TRL),
    **dict.fromkeys(("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a",
                     "out_proj"), "no model that this version reads has such a matrix"),
    "mistral": "add --plugin examples/families/mistral.py:MISTRAL of a checkout",
    **dict.fromkeys(("mixtral", "mixtral-8x7b", "tiny-mixtral"), _EXAMPLE.format(
        "mixtral", "MIXTRAL", "mixtral_8x7b")),
    **dict.fromkeys(("glm4_moe", "glm-4.5-air", "tiny-glm4-moe"), _EXAMPLE.format(
        "glm4_moe", "GLM4_MOE", "glm_4_5_air")),
    **dict.fromkeys(("kimi_linear", "kimi-linear-48b", "tiny-kimi-linear"), _EXAMPLE.format(
        "kimi_linear", "KIMI_LINEAR", "kimi_linear_48b")),
    **dict.fromkeys(("simvq", "fsq", "dit", "unit-bigvgan", "nemo-audio"), _CODECS),
    "nemo-asr": "judge speech by a function of your own (FILE.py:NAME) that runs NeMo or Whisper",
    **dict.fromkeys(("questions", "textbook", "multihop", "triples"),
                    "write a generator file of your own (docs/synth.md)"),
    "classifier": "serve the model with vLLM and use `judge` with kind=reward-model (docs/rewards.md)",
    "functions": "use `virtual`, whose tasks describe tools in Python",
    "tickets": "use `virtual`, whose tasks describe tables and tools in Python",
    "code": "take prompts with tests from a data set, or write a generator file of your own (docs/synth.md)",
    "mcp": "use an environment of `verifiers`, or one of your own (FILE.py:NAME)",
    "nemo_gym": "use an environment of `verifiers`, or one of your own (FILE.py:NAME)",
    "openenv": "use an environment of `verifiers`, or one of your own (FILE.py:NAME)",
    "sglang": "use vllm",
}
"""Value of an option or setting, such as an engine, recipe or model family -> what to use in its place."""
PIPELINE = {
    **dict.fromkeys(("arrow", "dataset"), "save it as Parquet with `to_parquet` of datasets"),
    **dict.fromkeys(("epub", "office"), "convert the files to text with pandoc"),
    "parallel": "write a JSON line with `text` for each pair of sentences",
    **dict.fromkeys(("pdf.repeated_lines", "pdf.max_pages", "warc.repeated_lines", "warc.max_pages"),
                    "running heads are always taken out, and `time_s` limits a file"),
    "safety": "drop documents by a function of your own: the step `code`",
    "topics": "find topics in the output with scikit-learn or BERTopic",
    **dict.fromkeys(("kind.words", "kind.min_words", "kind.min_words_per_1000_chars"),
                    "train a classifier for each domain, and name it in `domains`"),
    "exact_dedup.compare": "texts are compared in Unicode's form NFKC with single blanks",
    **dict.fromkeys(("paragraph_dedup.keep", "paragraph_dedup.split"),
                    "lines are compared, and the first document keeps them"),
    "minhash_dedup.verify": "candidates are always compared by all their shingles",
    "minhash_dedup.keep": "the longest document stays; `priority` of a source goes before",
    "decontaminate.action": "documents are dropped; the step `code` can cut them",
    "decontaminate.context_chars": "the column `contamination` names the items",
}
"""Format, step, or FORMAT.option or STEP.setting of a pipeline file -> what to use in its place."""
KINDS = {
    "difficulty": "label the problems again, and use `sov-data scorer train --kind regressor`",
    "codec_training": "it is half of a codec; import a published one with `megatron-sov codec import`",
    "mixture": "its file blend.yaml is a blend for `sov-data mix --blend`",
}
"""Kind of artifact -> what to use in its place."""
FOLDERS = {
    "begun.json": ("audit or a replay", "train the run again with another --run to compare it"),
    "ladder.json": ("a ladder", "open its runs, the folders inside, one by one"),
    "reproduce.html": ("`megatron-sov reproduce`", "open the runs inside one by one"),
    "removal.json": ("a counterfactual run", "open its folder `run` as any run"),
}
"""File that a folder of a removed command holds -> what made the folder, and what to use in its place."""


def check_command(program: str, words: Sequence[str]) -> None:
    """Refuse a command line of a removed command or option.

    Args:
        program: e.g. "megatron-sov".
        words: the words after it, as they were typed.

    Raises:
        UserError: the command or option was removed; the message says what serves in its place.
    """
    for count in (3, 2, 1):
        typed = " ".join([program, *words[:count]])
        if instead := COMMANDS.get(typed):
            raise UserError(f"{typed}: was removed in this version; {instead}")
        for word in words[count:]:
            option = word.partition("=")[0]
            # next to an endpoint it named the model there; else it is a word of lm-eval, which `words` reads
            if option == "--model" and any(one.startswith(("http://", "https://")) for one in words):
                option = "--key-env"
            if instead := OPTIONS.get(f"{typed} {option}"):
                raise UserError(f"{typed} {word.partition('=')[0]}: was removed in this version; {instead}")


def without_removed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of saved settings of a run without removed settings that have their default: the run
    did not use them."""
    kept = copy.deepcopy(dict(raw))
    for code in kept.get("code") or ():
        if isinstance(code, dict):
            code.pop("package", None)
    for name, (default, _) in SETTINGS.items():
        *groups, last = name.split(".")
        block: Any = kept
        for group in groups:
            block = block.get(group) if isinstance(block, dict) else None
        if isinstance(block, dict) and last in block and block[last] == default:
            del block[last]
    return kept


def check_folder(path: Path) -> None:
    """Refuse a folder that a removed command wrote.

    Raises:
        UserError: it is one; the message says what serves in its place.
    """
    for name, (maker, instead) in FOLDERS.items():
        if (path / name).is_file():
            raise UserError(f"{path}: holds {name} of {maker}, which was removed in this version; {instead}")


def check_kind(path: str | Path, kind: str) -> None:
    """Refuse an artifact of a kind that only a removed command made.

    Raises:
        UserError: it is one; the message says what serves in its place.
    """
    if instead := KINDS.get(kind):
        raise UserError(f"{path}: is a '{kind}' artifact, which this version cannot read; {instead}")


def was_removed(value: str, table: Mapping[str, str] = VALUES) -> str:
    """Return the end of a sentence about a value that an earlier version took; "" for others."""
    return f"; it was removed in this version: {table[value]}" if value in table else ""
