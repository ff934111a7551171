"""YAML of strangers: plain values, and no merge that makes a small file fill the memory."""

from __future__ import annotations

import yaml

MAX_MERGED = 50_000
"""Most values that `<<` may put into one mapping."""


class BoundedLoader(yaml.SafeLoader):
    """Reads plain values."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what `<<` names into a mapping, unless that makes it larger than any file of settings: each
        `<<` of ten aliases makes it ten times larger.

        Raises:
            yaml.constructor.ConstructorError: it does.
        """
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        parts = [part for value in merged
                 for part in (value.value if isinstance(value, yaml.SequenceNode) else [value])]
        # each part once: an alias of one mapping may be named many times
        for part in {id(part): part for part in parts}.values():
            if isinstance(part, yaml.MappingNode):
                self.flatten_mapping(part)
        # counted after the parts were flattened, so that growth by levels is seen before it happens
        if sum(1 + len(part.value) for part in parts) > MAX_MERGED:
            raise yaml.constructor.ConstructorError(None, None, f"<< of more than {MAX_MERGED:,} values",
                                                    node.start_mark)
        super().flatten_mapping(node)
