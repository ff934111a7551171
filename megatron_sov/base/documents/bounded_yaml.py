"""Load YAML from strangers as plain values, with a limit on growth by aliases and merge keys."""

import yaml

MAX_CHARS = 4 << 20
MAX_VALUES = 50_000
"""Maximum keys and values in a document, counting an alias as the value that it repeats."""


class BoundedLoader(yaml.SafeLoader):
    """A safe loader that refuses documents that are too large, or that aliases make too large."""

    def __init__(self, stream: str | bytes) -> None:
        if len(stream) > MAX_CHARS:  # the nodes take a hundred times the size
            raise yaml.YAMLError(f"it has more than {MAX_CHARS:,} characters")
        super().__init__(stream)

    def get_single_node(self) -> yaml.Node | None:
        """Compose the document. Raises `yaml.constructor.ConstructorError`: it has more than `MAX_VALUES`
        values, since each level with ten aliases multiplies the size by ten, or contains itself."""
        node = super().get_single_node()
        if node is not None and _count_values(node, {}) > MAX_VALUES:
            raise yaml.constructor.ConstructorError(None, None, f"more than {MAX_VALUES:,} values, aliases "
                                                    "counted", node.start_mark)
        return node


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Count the keys and values below a node, which is visited once; `counts`: id of a node -> its count."""
    if id(node) not in counts:
        counts[id(node)] = MAX_VALUES  # a document that contains itself has no end
        children = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]
