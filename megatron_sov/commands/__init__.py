"""The commands of `megatron-sov`, each a row of this table, and the words of the trade that lead to one."""

from __future__ import annotations

from megatron_sov.base.command_line import Command

DATA, TRAIN, POST_TRAIN, EVALUATE, PUBLISH, OPERATE = (
    "data (more: sov-data --help, sov-tokenizer --help)", "train", "post-train", "evaluate",
    "serve and publish", "operate")
"""Headings of the help, in the order in which a model meets them."""

COMMANDS = {
    "inspect": Command(
        "megatron_sov.commands.inspect",
        "say what a folder or file is, what it was made from, and show some of its rows",
        DATA, "inspect.md",
        ("inspect shards",
         "inspect runs/pretrain --verify")),
    "map": Command(
        "megatron_sov.commands.map",
        "apply a class of yours to every row of a file, here or on a cluster",
        DATA, "own_code.md",
        ("map corpus.jsonl ./my_map.py:Shorten --output shortened --workers 2",
         "map corpus.jsonl ./my_map.py:Shorten --output shortened --set words=3")),
    "score": Command(
        "megatron_sov.commands.score",
        "score a file of responses with a reward: a verifier, a rule or a judge",
        DATA, "rewards.md",
        ("score --reward math --input answers.jsonl --output math.jsonl",
         "score --reward ./my_reward.py:Starts --input answers.jsonl --output own.jsonl")),
    "codec": Command(
        "megatron_sov.commands.models.codec",
        "import, reconstruct, inspect: codecs of pictures and sounds",
        DATA, "codecs.md",
        ("codec import ta-tok ta_tok.pth ta-tok",
         "codec inspect ta-tok")),
    "recipes": Command(
        "megatron_sov.commands.models.recipes",
        "list the recipes, or print one with every setting and its source",
        TRAIN, "recipes.md",
        ("recipes",
         "recipes tiny-qwen3 --yaml")),
    "plan": Command(
        "megatron_sov.commands.operate.plan",
        "what a run will do at each step, and what it takes on a cluster: layout, memory, speed, "
        "days, cost",
        TRAIN, "plan.md",
        ("plan tiny-solar-open",
         "plan solar-open-102b --cluster b200 --nodes 60")),
    "pretrain": Command(
        "megatron_sov.commands.train.kinds:PRETRAIN",
        "train a model from token shards, from scratch or --from a checkpoint",
        TRAIN, "pretrain.md",
        ("pretrain tiny-solar-open --data tokens --run runs/pretrain",
         "pretrain tiny-solar-open --data tokens --run runs/two --nproc 2 --set train.steps=200 "
         "--set optim.lr=1e-3")),
    "extend": Command(
        "megatron_sov.commands.train.kinds:EXTEND",
        "train on at longer contexts, stage by stage, each behind a needle gate",
        TRAIN, "extend.md",
        ("extend tiny-k-exaone-extend --from runs/pretrain --data tokens --run runs/long",
         "extend tiny-k-exaone-extend --from runs/pretrain --data tokens --run runs/long --dry-run")),
    "resume": Command(
        "megatron_sov.commands.train.resume:RESUME",
        "continue a stopped run: its folder knows the command and its options",
        TRAIN, "pretrain.md",
        ("resume runs/pretrain",
         "resume runs/pretrain --nproc 4 --set train.steps=400")),
    "sft": Command(
        "megatron_sov.commands.train.kinds:SFT",
        "fine-tune on chats, with an auxiliary text term",
        POST_TRAIN, "sft.md",
        ("sft tiny-solar-open --from runs/pretrain --data chats --run runs/sft",
         "sft tiny-solar-open --from runs/pretrain --data chats --run runs/lora --set lora.rank=16")),
    "prefer": Command(
        "megatron_sov.commands.train.kinds:PREFER",
        "learn from judged responses: DPO, IPO, SimPO, ORPO, KTO, SimPER, GrouPER",
        POST_TRAIN, "prefer.md",
        ("prefer tiny-solar-open --from runs/sft --data pairs --run runs/dpo --set optim.lr=5e-5",
         "prefer tiny-solar-open --from runs/sft --data unpaired --run runs/kto --method kto")),
    "distill": Command(
        "megatron_sov.commands.train.distill:DISTILL",
        "learn a teacher's distributions, over the whole vocabulary or its top tokens",
        POST_TRAIN, "distill.md",
        ("distill tiny-solar-open --from runs/sft --teacher teacher --data chats --run runs/small",
         "distill tiny-solar-open --from runs/sft --teacher teacher --top-k 128 --data chats --run "
         "runs/top")),
    "distill states": Command(
        "megatron_sov.commands.train.distill:STATES",
        "have a teacher read token shards, at a layout of its own, and keep its final hidden states",
        POST_TRAIN, "distill.md",
        ("distill states teacher --data chats --output states",
         "distill states teacher --data chats --top-k 128 --output top")),
    "rl run": Command(
        "megatron_sov.commands.rl.cycle:RUN",
        "reinforcement learning by one command: the model that learns writes its own rounds",
        POST_TRAIN, "rl.md",
        ("rl run tiny-solar-open --from runs/sft --prompts prompts.jsonl --reward math --store store "
         "--run runs/rl",
         "rl run tiny-solar-open --from runs/sft --prompts prompts.jsonl --reward "
         "./my_reward.py:Starts --store store --run runs/rl --set policy.method=dapo")),
    "rl engines": Command(
        "megatron_sov.commands.rl.engines:ENGINES",
        "keep the engine servers of a run whose trainer is on other machines",
        POST_TRAIN, "rl.md",
        ("rl engines --from runs/sft --prompts prompts.jsonl --reward math --store store --run runs/rl "
         "--engine vllm --engine-set tp=8 --port 8000",
         "rl engines tiny-solar-open --from runs/sft --prompts prompts.jsonl --reward math --store store "
         "--run runs/rl --engine vllm --engine-set servers=2 --engine-python vllm/bin/python")),
    "rl generate": Command(
        "megatron_sov.commands.rl.generate:GENERATE",
        "write responses to the prompts of rounds into a store, by the newest policy",
        POST_TRAIN, "rl_generate.md",
        ("rl generate tiny-solar-open --from runs/sft --prompts prompts.jsonl --store store --run "
         "runs/rl",
         "rl generate tiny-solar-open --from runs/sft --prompts prompts.jsonl --store store --run "
         "runs/rl --wait 3600")),
    "rl reward": Command(
        "megatron_sov.commands.rl.store.reward:REWARD",
        "judge the responses of a store that a reward has not judged yet",
        POST_TRAIN, "rl_generate.md",
        ("rl reward --store store --reward math",
         "rl reward --store store --reward math --wait 3600")),
    "rl train": Command(
        "megatron_sov.commands.rl.train:TRAIN",
        "reinforcement learning: train the rounds of responses that are written and judged",
        POST_TRAIN, "rl.md",
        ("rl train tiny-solar-open --from runs/sft --prompts prompts.jsonl --reward math --store "
         "store --run runs/rl",
         "rl train tiny-solar-open --from runs/sft --prompts prompts.jsonl --reward math --store "
         "store --run runs/rl --wait 600")),
    "rl store": Command(
        "megatron_sov.commands.rl.store.store",
        "show, gc: the rollout store between generation, reward and training",
        POST_TRAIN, "rollout_store.md",
        ("rl store show store round-0001-piece-0000 0",
         "rl store gc store --rounds 1-3 --yes")),
    "rl knowledge": Command(
        "megatron_sov.commands.rl.ssp.knowledge:KNOWLEDGE",
        "in-domain text for InK-GRPO: each section once, none of the test's answers",
        POST_TRAIN, "ssp.md",
        ("rl knowledge --input laws.jsonl --text-field text --document-field law "
         "--section-field section --tests test.jsonl --output knowledge",
         "rl knowledge --input laws.jsonl --text-field text --document-field law "
         "--section-field section --tests test.jsonl --split split=train --output knowledge")),
    "tools": Command(
        "megatron_sov.commands.rl.store.tools",
        "list, run: tool environments, played by a model",
        POST_TRAIN, "tools.md",
        ("tools list",
         "tools run virtual work/sft --output work/episodes")),
    "ssp probe": Command(
        "megatron_sov.commands.rl.ssp.probe:PROBE",
        "pass@k of a run's checkpoints in each domain, and the best one of each",
        POST_TRAIN, "ssp.md",
        ("ssp probe runs/sft --problems algebra=algebra.jsonl --reward math --k 8 --output probe",
         "ssp probe runs/sft --problems algebra=algebra.jsonl geometry=geometry.jsonl --reward math "
         "--samples 16 --k 8 --output probe")),
    "ssp fuse": Command(
        "megatron_sov.commands.rl.ssp.fuse:FUSE",
        "merge the best checkpoint of each domain, or any checkpoints, into one",
        POST_TRAIN, "ssp.md",
        ("ssp fuse probe --output merged",
         "ssp fuse runs/sft/checkpoints/step-50 runs/sft/checkpoints/step-100:2 --output merged")),
    "generate": Command(
        "megatron_sov.commands.models.generate",
        "continue prompts with a checkpoint or a Hugging Face folder",
        EVALUATE, "generate.md",
        ('generate hf --prompt "The model"',
         'generate runs/sft --chat --prompt "What is a list?"')),
    "eval": Command(
        "megatron_sov.commands.evaluate.eval",
        "ppl, needle, pairs, passk, lm, media: judge a checkpoint or a Hugging Face folder",
        EVALUATE, "eval.md",
        ("eval ppl runs/pretrain --data tokens",
         "eval lm hf --tasks quiz --task-dir tasks --output scores.json")),
    "eval difference": Command(
        "megatron_sov.commands.evaluate.eval_results:DIFFERENCE",
        "compare two models item by item, with confidence intervals",
        EVALUATE, "compare.md",
        ("eval difference base.json tuned.json",
         "eval difference base.json tuned.json --tasks quiz --json")),
    "eval contamination": Command(
        "megatron_sov.commands.evaluate.eval_results:CONTAMINATION",
        "find test items that are in the training data, and the score without them",
        EVALUATE, "compare.md",
        ("eval contamination base.json --data tokens",
         "eval contamination base.json --data tokens corpus.jsonl --workers 8")),
    "convert": Command(
        "megatron_sov.commands.models.convert",
        "from-hf, to-hf, from-megatron, verify, inspect, average, to-peft, from-peft: "
        "checkpoints, Hugging Face folders, adapters",
        PUBLISH, "convert.md",
        ("convert to-hf runs/sft hf",
         "convert from-hf hf checkpoint")),
    "chat": Command(
        "megatron_sov.commands.models.chat",
        "talk to a checkpoint, a Hugging Face folder or an endpoint in the terminal",
        PUBLISH, "chat.md",
        ("chat runs/sft",
         "chat hf --temperature 0.7")),
    "serve": Command(
        "megatron_sov.commands.models.serve:SERVE",
        "serve a model over HTTP with OpenAI's interface, at any layout",
        PUBLISH, "serve.md",
        ("serve runs/sft --name mine --port 8000",
         "serve hf --api-key-env SERVE_KEY")),
    "report": Command(
        "megatron_sov.commands.operate.report",
        "write the self-contained HTML report of one or more runs",
        PUBLISH, "report.md",
        ("report runs/pretrain",
         "report runs/sft runs/dpo")),
    "submit": Command(
        "megatron_sov.commands.operate.submit",
        "submit a stage or a chain of stages to a Slurm cluster",
        OPERATE, "slurm.md",
        ("submit pretrain --cluster h100 --account mine --nodes 4 solar-open-102b --data tokens "
         "--run runs/big",
         "submit chain solar-open-102b --account mine --dry-run")),
    "status": Command(
        "megatron_sov.commands.operate.status",
        "show step, speed, time left, restarts and use of time of runs",
        OPERATE, "watching.md",
        ("status runs",
         "status runs/pretrain --follow")),
    "logs": Command(
        "megatron_sov.commands.operate.logs",
        "show what a run's processes wrote, across ranks and restarts",
        OPERATE, "watching.md",
        ("logs runs/pretrain",
         "logs runs/pretrain --rank 3 --tail 20")),
    "doctor": Command(
        "megatron_sov.commands.operate.doctor",
        "say what this machine has, what is missing, and how to add it",
        OPERATE, "install.md",
        ("doctor",
         "doctor --json")),
}
