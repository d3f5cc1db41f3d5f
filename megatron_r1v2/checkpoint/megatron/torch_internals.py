"""All names that we take from inside torch: the formats of torch.save and torch.distributed.checkpoint depend on them.

A new release of torch may move or change them. The test of this file's name holds each against the torch that is
installed, so that an upgrade fails there and not in somebody's checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo

__all__ = ["METADATA_NAMES", "REBUILD_MODULE", "REBUILD_NAMES", "STORAGES", "UNTYPED_DTYPES", "StorageInfo"]

# All that the pickle of `.metadata` may name: plain descriptions of tensors.
METADATA_NAMES: Mapping[str, set[str]] = {
    "collections": {"OrderedDict"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32"}
    | {"int16", "int8", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}

# `data.pkl` of torch.save calls one of these with (storage, offset, shape, stride, requires_grad, hooks[, metadata]),
# the third version with the dtype before the metadata.
REBUILD_MODULE = "torch._utils"
REBUILD_NAMES = ("_rebuild_tensor_v2", "_rebuild_tensor_v3")

# The classes that `data.pkl` names a storage by.
STORAGES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# torch keeps these in a storage without a type; the tensor itself names the dtype.
UNTYPED_DTYPES: Mapping[str, torch.dtype] = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
