"""The tables of compressed adapters for `docs/benchmarks.md`."""

import json
from pathlib import Path

HERE = Path(__file__).parent
HEADS = ("codec", "density", "encode, M/s", "decode, M/s", "packbits, M/s", "bits", "of formula")


def compression_table() -> list[str]:
    """Lines of the section; none before the benchmark has run."""
    file = HERE / "results" / "codecs.json"
    if not file.is_file():
        return []
    result = json.loads(file.read_text("utf-8"))
    heads = (*HEADS, "memory")
    lines = [
        "",
        (HERE / "about.md").read_text("utf-8").rstrip(),
        "",
        f"### {result['params'] / 1e6:g} million parameters, cpu",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for r in result["rows"]:
        speeds = " | ".join(f"{r[key]:,.0f}" for key in ("encode", "decode", "packbits"))
        lines.append(
            f"| {r['codec']} | {r['density']:g} | {speeds} | {r['bits_per_param']:.3f} "
            f"| {r['over_formula']:.1%} | {r['memory']:.2f} |"
        )
    return [*lines, ""]
