# What: the Python interface as a notebook: train, read the events, generate, export. Open it in VS Code or Jupytext.
# Run:  python examples/notebook.py
# See:  the loss of each step, a continuation of a prompt, and a Hugging Face folder in runs/notebook-hf.

# %% Change a recipe
from megatron_sov import apply_settings, convert, generate, pretrain, recipes

config = apply_settings(recipes.get("tiny-qwen3"), [
    "model.hidden_size=64", "model.num_layers=2", "model.dense_ffn_dim=128", "train.steps=3",
    "train.global_batch_size=8", 'data.phases=[{"name": "main", "seq_len": 64}]'])
print(config.model.num_layers, "layers")

# %% Train
completion = pretrain(config, {"tokens": 1.0}, "runs/notebook")
print("step", completion["step"], "tokens", completion["tokens"])

# %% Read the losses
import json
from pathlib import Path

events = [json.loads(line) for line in Path("runs/notebook/events.jsonl").read_text().splitlines()]
losses = [event["loss"] for event in events if event["event"] == "step"]
print(losses)

# %% Generate
answers = generate("runs/notebook", ["The"], max_new_tokens=8)
print(answers[0])

# %% Export
convert.to_hf("runs/notebook", "runs/notebook-hf")
print(sorted(file.name for file in Path("runs/notebook-hf").iterdir()))
