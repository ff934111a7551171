"""Registry of `megatron-sov` commands: module, help, documentation page and examples."""

from megatron_sov.base.command_line import Command

DATA, TRAIN, POST_TRAIN, EVALUATE, PUBLISH, OPERATE = (
    "data (more: sov-data --help, sov-tokenizer --help)", "train", "post-train", "evaluate",
    "serve and publish", "operate")
"""Help headings, in the order in which a model is made."""

COMMANDS = {
    "inspect": Command(
        "megatron_sov.commands.inspect:INSPECT",
        "show the kind, inputs and sample rows of a folder or file", DATA, "watching.md",
        ("inspect shards", "inspect runs/pretrain --verify")),
    "map": Command(
        "megatron_sov.commands.map:MAP",
        "apply your own class to every row in a file, locally or on a cluster", DATA, "own_code.md",
        ("map corpus.jsonl ./my_map.py:Shorten --output shortened --workers 2",
         "map corpus.jsonl ./my_map.py:Shorten --output shortened --set words=3")),
    "score": Command(
        "megatron_sov.commands.score:SCORE",
        "score responses in a file with a reward: a verifier, a rule or a judge", DATA, "rewards.md",
        ("score --reward math --input answers.jsonl --output math.jsonl",
         "score --reward ./my_reward.py:Starts --input answers.jsonl --output own.jsonl")),
    "codec": Command(
        "megatron_sov.commands.models.codec:CODEC",
        "import, reconstruct: codecs for pictures and sounds", DATA, "omni.md",
        ("codec import ta-tok HyperCLOVAX-SEED-Omni-8B ta-tok",
         "codec reconstruct image-tokenizer pictures/0.png --output again")),
    "recipes": Command(
        "megatron_sov.commands.models.recipes:RECIPES",
        "list the recipes, or print a recipe's settings with their sources", TRAIN, "recipes.md",
        ("recipes", "recipes tiny-qwen3 --yaml")),
    "plan": Command(
        "megatron_sov.commands.operate.plan.plan:PLAN",
        "show a run's schedule, and its layout, memory, speed, days and cost on a cluster",
        TRAIN, "plan.md", ("plan tiny-solar-open", "plan solar-open-102b --cluster b200 --nodes 60")),
    "pretrain": Command(
        "megatron_sov.commands.train.kinds:PRETRAIN",
        "train a model from token shards, from scratch or --from a checkpoint", TRAIN, "pretrain.md",
        ("pretrain tiny-solar-open --data tokens --run runs/pretrain",
         "pretrain tiny-solar-open --data tokens --run runs/two --nproc 2 --set train.steps=200 --set "
         "optim.lr=1e-3")),
    "extend": Command(
        "megatron_sov.commands.train.kinds:EXTEND",
        "continue training at longer contexts, in stages with needle gates", TRAIN, "extend.md",
        ("extend tiny-k-exaone-extend --from runs/pretrain --data tokens --run runs/long",
         "extend tiny-k-exaone-extend --from runs/pretrain --data tokens --run runs/long --dry-run")),
    "resume": Command(
        "megatron_sov.commands.train.resume:RESUME",
        "continue a stopped run with the command and options from its folder", TRAIN, "pretrain.md",
        ("resume runs/pretrain", "resume runs/pretrain --nproc 4 --set train.steps=400")),
    "sft": Command(
        "megatron_sov.commands.train.kinds:SFT", "fine-tune on chats, with an auxiliary text term",
        POST_TRAIN, "sft.md", ("sft tiny-solar-open --from runs/pretrain --data chats --run runs/sft",
         "sft tiny-solar-open --from runs/pretrain --data chats --run runs/lora --set lora.rank=16")),
    "prefer": Command(
        "megatron_sov.commands.train.kinds:PREFER",
        "learn from judged responses: DPO, IPO, SimPO, ORPO, SimPER, GrouPER", POST_TRAIN, "prefer.md",
        ("prefer tiny-solar-open --from runs/sft --data pairs --run runs/dpo --set optim.lr=5e-5",
         "prefer tiny-solar-open --from runs/sft --data pairs --run runs/simper --method simper")),
    "distill": Command(
        "megatron_sov.commands.train.distill:DISTILL",
        "learn a teacher's distributions, over the whole vocabulary or its top tokens", POST_TRAIN,
        "distill.md",
        ("distill tiny-solar-open --from runs/sft --teacher teacher --data chats --run runs/small",
         "distill tiny-solar-open --from runs/sft --teacher teacher --top-k 128 --data chats --run "
         "runs/top")),
    "distill states": Command(
        "megatron_sov.commands.train.distill:STATES",
        "run a teacher over token shards, and save its final hidden states or top tokens",
        POST_TRAIN, "distill.md", ("distill states teacher --data chats --output states",
         "distill states teacher --data chats --top-k 128 --output top")),
    "rl run": Command(
        "megatron_sov.commands.rl.options:RUN",
        "reinforcement learning in one command: generate, judge and train every round", POST_TRAIN, "rl.md",
        ("rl run tiny-solar-open --from runs/sft --prompts prompts.jsonl --reward math --store store "
         "--run runs/rl",
         "rl run tiny-solar-open --from runs/sft --prompts prompts.jsonl --reward ./my_reward.py:Starts "
         "--store store --run runs/rl --set policy.method=dapo")),
    "rl engines": Command(
        "megatron_sov.commands.rl.options:ENGINES",
        "run the engine servers for an `rl run` on other machines", POST_TRAIN, "rl.md",
        ("rl engines --from runs/sft --prompts prompts.jsonl --reward math --store store --run runs/rl "
         "--engine vllm --engine-set tp=8 --port 8000",
         "rl engines tiny-solar-open --from runs/sft --prompts prompts.jsonl --reward math --store store "
         "--run runs/rl --engine vllm --engine-set servers=2 --engine-python vllm/bin/python")),
    "rl generate": Command(
        "megatron_sov.commands.rl.options:GENERATE",
        "generate responses for rounds with the newest policy, into a store", POST_TRAIN, "rl.md",
        ("rl generate tiny-solar-open --from runs/sft --prompts prompts.jsonl --store store --run runs/rl",
         "rl generate tiny-solar-open --from runs/sft --prompts prompts.jsonl --store store --run "
         "runs/rl --wait 3600")),
    "rl reward": Command(
        "megatron_sov.commands.rl.store.reward:REWARD",
        "judge the responses in a store that have no reward yet", POST_TRAIN, "rl.md",
        ("rl reward --store store --reward math", "rl reward --store store --reward math --wait 3600")),
    "rl train": Command(
        "megatron_sov.commands.rl.options:TRAIN",
        "reinforcement learning: train on generated and judged rounds", POST_TRAIN, "rl.md",
        ("rl train tiny-solar-open --from runs/sft --prompts prompts.jsonl --reward math --store store "
         "--run runs/rl",
         "rl train tiny-solar-open --from runs/sft --prompts prompts.jsonl --reward math --store store "
         "--run runs/rl --wait 600")),
    "rl store": Command(
        "megatron_sov.commands.rl.store.store:STORE",
        "show, gc: the rollout store between generation, reward and training", POST_TRAIN, "rl.md",
        ("rl store show store round-0001-piece-0000 0", "rl store gc store --rounds 1-3 --yes")),
    "rl knowledge": Command(
        "megatron_sov.commands.rl.ssp.knowledge:KNOWLEDGE",
        "write in-domain text for InK-GRPO, without duplicates and test answers", POST_TRAIN, "sft.md",
        ("rl knowledge --input laws.jsonl --text-field text --document-field law --section-field section "
         "--tests test.jsonl --output knowledge",
         "rl knowledge --input laws.jsonl --text-field text --document-field law --section-field section "
         "--tests test.jsonl --split split=train --output knowledge")),
    "tools": Command(
        "megatron_sov.commands.rl.store.tools:TOOLS", "list, run: tool environments, played by a model",
        POST_TRAIN, "tools.md", ("tools list", "tools run virtual work/sft --output work/episodes")),
    "ssp probe": Command(
        "megatron_sov.commands.rl.ssp.probe:PROBE",
        "measure a run's checkpoints by pass@k, and find the best per domain", POST_TRAIN, "sft.md",
        ("ssp probe runs/sft --problems algebra=algebra.jsonl --reward math --k 8 --output probe",
         "ssp probe runs/sft --problems algebra=algebra.jsonl geometry=geometry.jsonl --reward math "
         "--samples 16 --k 8 --output probe")),
    "ssp fuse": Command(
        "megatron_sov.commands.rl.ssp.fuse:FUSE",
        "average the best checkpoint per domain, or chosen checkpoints", POST_TRAIN, "sft.md",
        ("ssp fuse probe --output merged",
         "ssp fuse runs/sft/checkpoints/step-50 runs/sft/checkpoints/step-100:2 --output merged")),
    "generate": Command(
        "megatron_sov.commands.models.generate:GENERATE",
        "continue prompts with a checkpoint or a Hugging Face folder", EVALUATE, "serve.md",
        ('generate hf --prompt "The model"', 'generate runs/sft --chat --prompt "What is a list?"')),
    "eval": Command(
        "megatron_sov.commands.evaluate.eval:EVAL",
        "ppl, needle, pairs, passk, lm, media: evaluate a checkpoint or a Hugging Face folder", EVALUATE,
        "eval.md", ("eval ppl runs/pretrain --data tokens",
         "eval lm hf --tasks quiz --task-dir tasks --output scores.json")),
    "eval difference": Command(
        "megatron_sov.commands.evaluate.scores.difference:DIFFERENCE",
        "compare two models item by item, with confidence intervals", EVALUATE, "eval.md",
        ("eval difference base.json tuned.json", "eval difference base.json tuned.json --tasks quiz --json")),
    "eval contamination": Command(
        "megatron_sov.commands.evaluate.scores.contamination:CONTAMINATION",
        "find evaluation items in the training data, and score the rest", EVALUATE, "eval.md",
        ("eval contamination base.json --data tokens",
         "eval contamination base.json --data tokens corpus.jsonl --workers 8")),
    "convert": Command(
        "megatron_sov.commands.models.convert:CONVERT",
        "from-hf, to-hf, from-megatron, to-megatron, from-dcp, to-dcp, verify, inspect, average, to-peft, "
        "from-peft: checkpoints, Hugging Face folders, adapters", PUBLISH, "convert.md",
        ("convert to-hf runs/sft hf", "convert from-hf hf checkpoint")),
    "chat": Command(
        "megatron_sov.commands.models.chat:CHAT",
        "talk to a checkpoint, a Hugging Face folder or an endpoint in the terminal", PUBLISH, "serve.md",
        ("chat runs/sft", "chat hf --temperature 0.7")),
    "serve": Command(
        "megatron_sov.commands.models.serve:SERVE",
        "serve a model over HTTP with OpenAI's interface, at any layout", PUBLISH, "serve.md",
        ("serve runs/sft --name mine --port 8000", "serve hf --api-key-env SERVE_KEY")),
    "report": Command(
        "megatron_sov.commands.operate.runs.report:REPORT",
        "write a self-contained HTML report for one or more runs", PUBLISH, "watching.md",
        ("report runs/pretrain", "report runs/sft runs/dpo")),
    "submit": Command(
        "megatron_sov.commands.operate.submit.submit",
        "submit a stage or a chain to a Slurm cluster", OPERATE, "slurm.md",
        ("submit pretrain --cluster h100 --account mine --nodes 4 solar-open-102b --data tokens --run "
         "runs/big", "submit chain solar-open-102b --account mine --dry-run")),
    "status": Command(
        "megatron_sov.commands.operate.runs.status:STATUS",
        "show the step, speed, remaining time and restarts for each run", OPERATE, "watching.md",
        ("status runs", "status runs/pretrain --follow")),
    "logs": Command(
        "megatron_sov.commands.operate.runs.logs:LOGS",
        "show the logs from a run's processes, across ranks and restarts", OPERATE, "watching.md",
        ("logs runs/pretrain", "logs runs/pretrain --rank 3 --tail 20")),
    "doctor": Command(
        "megatron_sov.commands.operate.doctor.doctor:DOCTOR",
        "check this machine, and show how to install missing parts", OPERATE, "install.md", ("doctor",
         "doctor --json"))}
