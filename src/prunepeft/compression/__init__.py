"""Small adapters to ship: task vectors as sparse signs and a scale (ComPEFT), and their merging."""

from prunepeft.compression.adapter import CompressedAdapter, Settings, compress_tensors
from prunepeft.compression.compeft import compress, grid_search, prune_only, sparsify
from prunepeft.compression.folder import compress_adapter, decompress_adapter, read_compressed
from prunepeft.compression.merging import merge_adapters
from prunepeft.compression.vectors import TernaryVector

__all__ = [
    "CompressedAdapter",
    "Settings",
    "TernaryVector",
    "compress",
    "compress_adapter",
    "compress_tensors",
    "decompress_adapter",
    "grid_search",
    "merge_adapters",
    "prune_only",
    "read_compressed",
    "sparsify",
]
