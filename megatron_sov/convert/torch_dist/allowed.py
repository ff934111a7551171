"""The names that may stand in a checkpoint's pickles.  None of them is ever imported."""

from __future__ import annotations

from megatron_sov.convert.torch_dist.inert import Name

_META, _PLAN = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
METADATA = Name(_META, "Metadata")
MCORE_METADATA = Name("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata")
"""The library's own class for it, up to 0.15."""
TENSOR, BYTES = Name(_META, "TensorStorageMetadata"), Name(_META, "BytesStorageMetadata")
PROPERTIES, CHUNK = Name(_META, "TensorProperties"), Name(_META, "ChunkStorageMetadata")
PLACE = Name(_META, "MetadataIndex")
STORED = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
SIZE = Name("torch", "Size")
DTYPE_NAMES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8",
               "bool", "float8_e4m3fn", "float8_e5m2")
MEMBER = Name("builtins", "getattr")
"""How Python 3.11 writes a member of an enumeration."""
_INDEX = {
    METADATA, MCORE_METADATA, TENSOR, BYTES, PROPERTIES, CHUNK, PLACE, STORED, SIZE,
    Name(_META, "StorageMeta"), Name(_META, "_MEM_FORMAT_ENCODING"),
    Name("torch.serialization", "_get_layout"),
    # plans of the processes, which the library keeps for the next time it saves
    Name("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    *(Name(_PLAN, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData",
                                     "BytesIOWriteData")),
    *(Name(module, name) for module in ("pathlib", "pathlib._local")
      for name in ("PosixPath", "PurePosixPath", "Path")),
    Name("collections", "OrderedDict"), MEMBER,
    *(Name("torch", name) for name in DTYPE_NAMES),
}
REBUILT, ORDERED = Name("torch._utils", "_rebuild_tensor_v2"), Name("collections", "OrderedDict")
STORAGES = {Name("torch", f"{name}Storage"): dtype for name, dtype in {
    "Double": "float64", "Float": "float32", "BFloat16": "bfloat16", "Half": "float16", "Long": "int64",
    "Int": "int32", "Byte": "uint8", "Bool": "bool"}.items()}
"""What torch calls a storage -> the dtype of a tensor that stands in it."""
NAMESPACE = Name("argparse", "Namespace")
_OF_SETTINGS = ("megatron", "torch", "transformer_engine", "nvidia_resiliency_ext", "numpy", "datetime",
                "enum", "types")
"""Packages whose classes and enumerations stand among settings; they are told as names."""
_PLAIN = {"set", "frozenset", "complex", "bytearray", "slice", "range"}
_CODECS = Name("_codecs", "encode")
"""How protocol 2 writes bytes."""


def in_index(name: Name) -> bool:
    """Return whether a name may stand in the index."""
    return name in _INDEX


def in_tensor(name: Name) -> bool:
    """Return whether a name may stand in the header of a stored tensor."""
    return name in STORAGES or name in (REBUILT, ORDERED)


def in_settings(name: Name) -> bool:
    """Return whether a name may stand in the settings that a checkpoint carries."""
    return (name in (NAMESPACE, ORDERED, _CODECS, MEMBER) or name.module.split(".")[0] in _OF_SETTINGS
            or (name.module in ("builtins", "__builtin__") and name.name in _PLAIN)
            or name.module in ("pathlib", "pathlib._local") or name == Name("signal", "Signals"))
