"""Users' own code: recipes, model families, objectives, rewards, environments and data steps.

The command line names a file or module (`load_plugin`), and a `Registry` then knows its code by name. Names
in configs, checkpoints and Hugging Face folders are only looked up: no file can cause another file to run.
"""
