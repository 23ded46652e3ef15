"""Read one data file into rows; every way it can be wrong has a message with the line or row.

Nothing here touches the network or runs code from the file.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

from prunepeft.data.arrays import parse_npz
from prunepeft.data.table import Table
from prunepeft.errors import DataError

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".npz")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}
BROKEN_JSON = (
    "{place}, line {number}: not valid JSON ({reason}). Every line must be one "
    "object in {{...}}; fix or remove it."
)


def read_file(path: Path) -> Table:
    """Read a jsonl, json, csv, tsv, parquet, txt or npz file.

    Raises:
        DataError: if it cannot be opened, has no rows, or is not what its ending says.
    """
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise DataError(
            f"{path}: the ending {path.suffix or '(none)'!r} is not one that can be read; "
            f"allowed are {', '.join(FORMATS)}. Convert or rename the file."
        )
    if not path.is_file():
        raise DataError(
            f"{path} is not an ordinary file; give a file, a folder of splits or a hub id."
        )
    try:
        data = path.read_bytes()
    except PermissionError as error:
        raise DataError(
            f"{path} cannot be read: no permission. Change its rights (chmod u+r) and try again."
        ) from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); check the disk and the path."
        ) from error
    table = parse_bytes(data, kind, str(path))
    if not table.rows:
        raise DataError(
            f"{path} has no rows; check that the right file was written and is complete."
        )
    return table


def parse_bytes(data: bytes, kind: str, place: str) -> Table:
    """Parse the content of a file whose ending is `kind`; `place` names it in messages."""
    if not data.strip():
        raise DataError(f"{place} is empty; check that the right file was written and is complete.")
    if kind == ".parquet":
        return _parse_parquet(data, place)
    if kind == ".npz":
        return parse_npz(data, place)
    text = _decode(data, place)
    if kind in DELIMITERS:
        return _parse_delimited(text, kind, place)
    if kind == ".txt":
        return _parse_lines(text, place)
    if kind == ".json" and text.lstrip().startswith("["):
        return _parse_json(text, place)
    return _parse_jsonl(text, place)


def _decode(data: bytes, place: str) -> str:
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{place}, line {line}: not valid {encoding.removesuffix('-sig').upper()} (byte "
            f"{error.start}); "
            "save the file as UTF-8."
        ) from error


def _parse_lines(text: str, place: str) -> Table:
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    kept = [(number, line) for number, line in lines if line]
    places = [(place, "line", number) for number, _ in kept]
    return Table([{"text": line} for _, line in kept], places, running=True)


def _json_value(text: str) -> Any:
    """Parse JSON; every failure, also too deep nesting or a number too long, is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _parse_jsonl(text: str, place: str) -> Table:
    rows: list[dict[str, Any]] = []
    places: list[tuple[str, str, int]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _json_value(line)
        except ValueError as error:
            raise DataError(BROKEN_JSON.format(place=place, number=number, reason=error)) from error
        rows.append(_check_object(row, f"{place}, line {number}"))
        places.append((place, "line", number))
    return Table(_same_keys(rows), places)


def _parse_json(text: str, place: str) -> Table:
    try:
        items = _json_value(text)
    except ValueError as error:
        raise DataError(
            f"{place}: not valid JSON ({error}). The file must be a list of objects, or one "
            f"object a line."
        ) from error
    rows = [_check_object(row, f"{place}, row {number}") for number, row in enumerate(items, 1)]
    return Table(_same_keys(rows), [(place, "row", number) for number in range(1, len(rows) + 1)])


def _check_object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: a row must be a JSON object such as "
            f'{{"text": "...", "label": 0}}, received {type(row).__name__}. Rewrite the row.'
        )
    return row


def _same_keys(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in keys} for row in rows]


def _parse_delimited(text: str, kind: str, place: str) -> Table:
    delimiter = DELIMITERS[kind]
    _check_delimiter(text, delimiter, place)
    try:
        return _read_delimited(text, delimiter, place, csv.QUOTE_MINIMAL)
    except DataError:
        # Many public TSV files hold bare quotation marks that are not CSV quoting.
        if delimiter != "\t":
            raise
        return _read_delimited(text, delimiter, place, csv.QUOTE_NONE)


def _check_delimiter(text: str, delimiter: str, place: str) -> None:
    header = text.lstrip("\r\n").split("\n", 1)[0].rstrip("\r")
    if delimiter in header:
        return
    for other, name in OTHER_DELIMITERS.items():
        if other in header:
            raise DataError(
                f"{place}, line 1: one column only, but the header holds {name} ({header[:60]!r}): "
                f"the delimiter looks wrong. Save the file with {OTHER_DELIMITERS[delimiter]}"
                + (", or name it .tsv." if other == "\t" else ".")
            )


def _read_delimited(text: str, delimiter: str, place: str, quoting: int) -> Table:
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True, quoting=quoting
    )
    header: list[str] = []
    rows: list[dict[str, Any]] = []
    places: list[tuple[str, str, int]] = []
    try:
        for fields in reader:
            if not fields:
                continue
            if not header:
                header = _check_header(fields, place)
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{place}, line {reader.line_num}: {len(fields)} fields, but the header "
                    f"has {len(header)} "
                    f"({', '.join(header)}). Put quotation marks around text that holds the "
                    f"delimiter."
                )
            rows.append(dict(zip(header, fields, strict=True)))
            places.append((place, "line", reader.line_num))
    except csv.Error as error:
        raise DataError(
            f"{place}, line {reader.line_num}: broken quoting or a field that is too long "
            f"({error}). "
            "Double every quotation mark inside a quoted field, or save the data as jsonl."
        ) from error
    return Table(rows, places, untyped=True)


def _check_header(fields: list[str], place: str) -> list[str]:
    header = [name.strip() for name in fields]
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise DataError(
            f"{place}, line 1: column {doubled[0]!r} appears more than once in the header; "
            "the first line must hold one distinct name per column. Add a header or rename."
        )
    return header


def _parse_parquet(data: bytes, place: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.ParquetFile(pa.BufferReader(data)).read().to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{place}: not a readable parquet file ({reason}). Write it again."
        ) from error
    return Table(rows, [(place, "row", number) for number in range(1, len(rows) + 1)])
