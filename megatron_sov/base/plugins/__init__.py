"""Users' own code: recipes, model families, objectives, data steps and commands that are not built in.

Two doors lead in.  A person names a file or module (`load`, called with what stands on the command line and
with nothing else), or an installed package declares an entry point (`Registry`).  What a config, a checkpoint
or a Hugging Face folder says is only ever looked up by name among those two: a file is never run because
another file names it.
"""
