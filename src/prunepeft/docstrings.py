"""The built-in data set: which library does this sentence of a docstring come from?

Sentences are read from the source files of libraries that are always installed with this one;
nothing of them is imported or run. The same versions give the same rows on every machine.
"""

import ast
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from prunepeft.errors import DataError

LIBRARIES = ("matplotlib", "numpy", "scipy", "sklearn", "torch", "transformers")
N_TRAIN, N_VALIDATION = 720, 120
MAX_PER_FILE = 32
MAX_FILES = 700
MAX_BYTES = 80_000  # parsing takes time, so only files are parsed that are not too long
MAX_BYTES_PER_QUOTE = 2_000  # and that hold many docstrings
VALIDATION_SHARE = 0.2
SKIPPED_FOLDERS = {
    "tests",
    "test",
    "testing",
    "_vendor",
    "vendor",
    "externals",
    "_external",
    "_extern",
}
SKIPPED_FILES = (
    "test",
    "conftest",
    "version.py",
    "_version.py",
    "__config__.py",
)  # some differ from build to build

MASK = "this library"
NAMES = (
    "matplotlib|pyplot|pylab|mpl|plt|numpy|np|scipy|scikit-learn|scikits?|sklearn|pytorch|torch|"
    "transformers|hugging ?face|hf|libtorch|torchscript|ndarrays?"
)
NAME = re.compile(rf"(?<![A-Za-z0-9_])(?:{NAMES})(?![A-Za-z0-9_])(?:\.\w+)*", re.IGNORECASE)
HIDDEN_NAME = re.compile(
    r"numpy|scipy|sklearn|scikit|matplotlib|pyplot|torch|hugging|transformers", re.IGNORECASE
)
SECTION = re.compile(r"^\s*(?:[A-Z][A-Za-z ]{2,30}:\s*$|[-=~^*]{3,}\s*$|\.\. |>>> |:[a-z]+|@)")
SENTENCE_END = re.compile(r"(?<=[a-z0-9)][.!?])\s+(?=[A-Z])")
ROLE = re.compile(r":[a-z:]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`")
NOT_PROSE = re.compile(r"[=<>{}\[\]|\\_*#@$`~^]|::|https?:|\.\w+\(|\d{4}|e\.g\.|i\.e\.|\.\.\.")
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
MIN_WORDS, MAX_WORDS = 6, 40


def make_docstrings(libraries: Sequence[str] = LIBRARIES) -> dict[str, list[dict[str, str]]]:
    """Build the data set from installed libraries.

    Files are split by the hash of their path, so that no module is in both splits, and a sentence
    that occurs in two libraries or in both splits is left out.

    Args:
        libraries: Import names of at least two installed packages.

    Returns:
        "train" and "validation" rows with the keys `sentence` and `label` (the library's name);
        every library has the same number of rows in a split.

    Raises:
        DataError: if a library is not installed or has too few sentences.
    """
    found = {library: _find_sentences(library) for library in libraries}
    owners: dict[str, set[tuple[str, str]]] = {}
    for library, splits in found.items():
        for split, sentences in splits.items():
            for sentence in sentences:
                owners.setdefault(_key(sentence), set()).add((library, split))
    rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for split, part in rows.items():
        unique = {
            library: [s for s in splits[split] if len(owners[_key(s)]) == 1]
            for library, splits in found.items()
        }
        size = min(
            N_TRAIN if split == "train" else N_VALIDATION,
            *(len(items) for items in unique.values()),
        )
        if size < 2:
            poorest = min(unique, key=lambda library: len(unique[library]))
            raise DataError(
                f"docstrings: {poorest} has too few sentences; reinstall it with its source files."
            )
        part += [
            {"sentence": s, "label": library}
            for library, items in unique.items()
            for s in items[:size]
        ]
        part.sort(key=lambda row: _hash(row["sentence"]))
    return rows


def _find_sentences(library: str) -> dict[str, list[str]]:
    """Distinct sentences of one library by split, in the order of file hashes."""
    wanted = {"train": N_TRAIN * 11 // 10, "validation": N_VALIDATION * 5 // 4}
    found: dict[str, dict[str, str]] = {"train": {}, "validation": {}}
    n_files = {"train": 0, "validation": 0}
    for name, path in _source_files(library):
        split = "validation" if int(_hash(name)[-8:], 16) < VALIDATION_SHARE * 16**8 else "train"
        if len(found[split]) >= wanted[split] or n_files[split] >= MAX_FILES:
            continue
        n_files[split] += 1
        sentences = sorted(_file_sentences(path), key=_hash)[:MAX_PER_FILE]
        found[split].update((_key(sentence), sentence) for sentence in sentences)
        if all(len(found[s]) >= wanted[s] for s in wanted):
            break
    return {split: list(sentences.values()) for split, sentences in found.items()}


def _source_files(library: str) -> list[tuple[str, Path]]:
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"docstrings: the package {library!r} is not installed; install it, or give your "
            f"own data."
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    files = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        skipped = SKIPPED_FOLDERS & set(parts) or parts[-1].startswith(SKIPPED_FILES)
        if not skipped and path.stat().st_size <= MAX_BYTES:
            files.append(("/".join((library, *parts)), path))
    return sorted(files, key=lambda item: _hash(item[0]))


def _file_sentences(path: Path) -> set[str]:
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > MAX_BYTES_PER_QUOTE * text.count('"""'):
            return set()
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return set()
    return {sentence for docstring in _docstrings(tree) for sentence in find_sentences(docstring)}


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text:
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def find_sentences(docstring: str) -> list[str]:
    """Take the natural-language sentences out of a docstring, with library names masked.

    Headings, indented blocks, lists, tables, code and what stands under a heading are left out.

    Example:
        >>> find_sentences("Return the mean of the values of a torch tensor.\\n\\n>>> mean(x)")
        ['Return the mean of the values of a this library tensor.']
    """
    sentences = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.split("\n")
        if any(SECTION.match(line) for line in lines) or any(
            line[:1].isspace() for line in lines[1:]
        ):
            continue
        text = ROLE.sub(r"\1", " ".join(line.strip() for line in lines)).replace("``", "")
        for sentence in SENTENCE_END.split(" ".join(text.split())):
            masked = NAME.sub(MASK, sentence.strip())
            if _is_prose(masked):
                sentences.append(masked)
    return sentences


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    if not MIN_WORDS <= len(words) <= MAX_WORDS or not sentence.isascii():
        return False
    if not sentence[0].isupper() or sentence[-1] not in ".!?" or NOT_PROSE.search(sentence):
        return False
    if HIDDEN_NAME.search(sentence) or sentence.count(MASK) > 2:
        return False
    return sum(bool(WORD.fullmatch(word.strip(".,;:()\"'!?"))) for word in words) >= 0.8 * len(
        words
    )


def _key(sentence: str) -> str:
    return re.sub(r"[^a-z]+", " ", sentence.lower()).strip()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
