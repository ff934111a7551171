"""Load YAML from strangers as plain values, with a limit on growth by merge keys."""

from __future__ import annotations

import yaml

MAX_MERGED = 50_000
"""Maximum values that `<<` may add to a mapping."""


class BoundedLoader(yaml.SafeLoader):
    """A safe loader that refuses mappings that `<<` makes too large."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge mappings named by `<<`, up to `MAX_MERGED` values: each level with ten aliases multiplies the
        size by ten. Raises `yaml.constructor.ConstructorError`: the mapping would be too large."""
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        parts = [part for value in merged
                 for part in (value.value if isinstance(value, yaml.SequenceNode) else [value])]
        # visit each mapping once: many aliases may name the same mapping
        for part in {id(part): part for part in parts}.values():
            if isinstance(part, yaml.MappingNode):
                self.flatten_mapping(part)
        # count after flattening the parts, which shows growth before it happens
        if sum(1 + len(part.value) for part in parts) > MAX_MERGED:
            raise yaml.constructor.ConstructorError(None, None, f"<< of more than {MAX_MERGED:,} values",
                                                    node.start_mark)
        super().flatten_mapping(node)
