"""Everything that reaches the disk: atomic files, folders, the journal and the run folder."""

from prunepeft.state.files import (
    canonical_json,
    clean_temporaries,
    disk_free,
    read_json,
    write_bytes,
    write_json,
    write_text,
)
from prunepeft.state.folder import verify_folder, write_folder
from prunepeft.state.journal import Journal, call_key
from prunepeft.state.mapped import map_tensor, mapped_file
from prunepeft.state.run_folder import RunFolder
from prunepeft.state.tensors import read_tensors, read_tensors_and_metadata, write_tensors

__all__ = [
    "canonical_json",
    "RunFolder",
    "Journal",
    "call_key",
    "write_bytes",
    "write_text",
    "write_json",
    "write_tensors",
    "write_folder",
    "read_json",
    "read_tensors",
    "read_tensors_and_metadata",
    "verify_folder",
    "clean_temporaries",
    "map_tensor",
    "mapped_file",
    "disk_free",
]
