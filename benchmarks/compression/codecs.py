"""Speed, size and memory of the codecs of compressed adapters.

    python -m benchmarks.compression.codecs

Times are processor seconds of this process with one thread. The peak of memory is measured in a
run of its own, since tracing slows numpy down.
"""

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import commit, machine
from prunepeft.compression.codecs import CODECS, decode, encode, golomb_bits
from prunepeft.compression.compeft import sparsify
from prunepeft.state import write_json

HERE = Path(__file__).parent
DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=int, default=20_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    tau = np.random.default_rng(0).normal(size=args.params).astype(np.float32)
    rows = []
    for density in DENSITIES:
        signs = sparsify(tau, density)
        rows += [measure(tau, signs, density, codec, args.repeats) for codec in CODECS]
        print(rows[-2:])
    result = {
        "commit": commit(),
        "machine": machine(),
        "params": args.params,
        "repeats": args.repeats,
        "rows": rows,
    }
    write_json(args.results / "codecs.json", result)


def measure(
    tau: np.ndarray, signs: np.ndarray, density: float, codec: str, repeats: int
) -> dict[str, Any]:
    """Millions of parameters a second, bytes and memory of one codec at one density."""
    encoded = encode(signs, codec)
    assert np.array_equal(decode(encoded), signs)
    formula = 2 * signs.size if codec == "bitmask" else golomb_bits(signs.size, density) - 16
    return {
        "codec": codec,
        "density": density,
        "encode": speed(lambda: encode(signs, codec), signs.size, repeats),
        "decode": speed(lambda: decode(encoded), signs.size, repeats),
        "packbits": speed(lambda: np.packbits(signs != 0), signs.size, repeats),
        "sparsify": speed(lambda: sparsify(tau, density), signs.size, 1),
        "bits_per_param": 8 * encoded.payload.size / signs.size,
        "over_formula": 8 * encoded.payload.size / formula,
        "memory": max(peak(lambda: encode(signs, codec)), peak(lambda: decode(encoded)))
        / tau.nbytes,
    }


def speed(action: Callable[[], object], size: int, repeats: int) -> float:
    """Millions of entries a second of processor time."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        action()
        times.append(time.process_time() - began)
    return size / 1e6 / statistics.median(times)


def peak(action: Callable[[], object]) -> int:
    """Largest number of bytes that arrays take while it runs, the result included."""
    tracemalloc.start()
    action()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


if __name__ == "__main__":
    main()
