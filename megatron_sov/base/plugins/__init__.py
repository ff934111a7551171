"""Users' own code: recipes, model families, objectives, rewards, environments and steps.

A person names a file or module on the command line (`load`), and `Registry` knows it by its name from then
on.  What a config, a checkpoint or a Hugging Face folder says is only ever looked up by name there: a file is
never run because another file names it.
"""
