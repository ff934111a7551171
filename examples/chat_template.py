# What: a tokenizer with your own chat template: training learns the text between the generation tags.
# Run:  python examples/chat_template.py tokenizer my-tokenizer
# See:  my-tokenizer, for `sov-data pack --format chat`; `sov-data sample` marks the learned text.

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TEMPLATE = """\
{%- for message in messages -%}
{{ message.role | upper }}: {% if message.role == "assistant" -%}
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{%- else -%}
{{ message.content }}
{%- endif -%}
{{ "\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT: {% endif -%}
"""
source, target = sys.argv[1:]
with tempfile.TemporaryDirectory() as name:
    folder = Path(name, "tokenizer")
    shutil.copytree(source, folder)
    (folder / "manifest.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    subprocess.run(["sov-tokenizer", "import", str(folder), "--output", target], check=True)
