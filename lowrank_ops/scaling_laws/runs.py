"""Read runs from CSV and JSONL files, and report every bad value by its row."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import load_row
from .laws import Runs, listed

# Accepted names of columns, in lower case with _ for anything between words; --columns gives others.
COLUMNS = {
    "name": ("name", "run", "run_name", "label"),
    "parameters": ("parameters", "params", "n", "model_size", "num_parameters"),
    "embedding_parameters": ("embedding_parameters", "embedding_params"),
    "tokens": ("tokens", "d", "training_tokens", "num_tokens"),
    "flops": ("flops", "flop", "c", "compute", "training_flop", "training_flops"),
    "loss": ("loss", "final_loss", "validation_loss", "val_loss"),
    "score": ("score", "mrr_after", "accuracy"),
}


class ScalingError(Exception):
    """An error the user can fix; the message says how."""


def read_runs(
    paths: Sequence[str | Path],
    *,
    metric: str = "loss",
    columns: dict[str, str] | None = None,
    counting: str | None = None,
    names: Sequence[str] | None = None,
) -> tuple[Runs, list[str]]:
    """Read runs from CSV or JSONL files (by suffix), in order; return them and remarks about them.

    Args:
        metric: ``"loss"`` or ``"score"``, the measured column.
        columns: the column of a quantity, if its name is not in COLUMNS.
        counting: which parameters are counted; None: all. It is required with a column of embedding parameters, which
            ``"non-embedding"`` subtracts.
        names: read only runs with these names.

    Missing tokens are computed as FLOPs / (6 parameters), with the parameters in the file. Rows are numbered as lines
    of the file, where the header of a CSV is line 1; with several files the numbers continue.

    Raises:
        ScalingError: a file cannot be read; a column is missing or occurs twice; or values are missing, not numbers,
            not finite or not above 0: all of them are listed by row.
    """
    gathered: dict[str, list[Any]] = {key: [] for key in ("name", "parameters", "tokens", "value", "row")}
    said: list[str] = []
    begins: list[str] = []
    offset = 0
    has_names = True
    for path in map(Path, paths):
        rows, last = _table(path)
        found = _columns(path, rows, metric, columns or {})
        where = f"{path}: " if len(paths) > 1 else ""
        if "embedding_parameters" in found and counting is None:
            raise ScalingError(
                f"{path} has the column {found['embedding_parameters']!r}: say --counting all or --counting non-embedding"
            )
        wrong, off = [], 0.0
        has_names = has_names and "name" in found
        for number, row in rows:
            if names and str(row.get(found.get("name", ""))) not in names:
                continue
            values = {}
            for key, column in found.items():
                if key == "name":
                    continue
                try:
                    values[key] = _number(row.get(column), zero=key == "embedding_parameters")
                except ValueError as error:
                    wrong.append(f"row {number}: {column} {error}")
            if len(values) < len(found) - ("name" in found):
                continue
            N = values["parameters"]
            D = values["tokens"] if "tokens" in values else values["flops"] / 6 / N
            if not 0 < D < math.inf:
                wrong.append(
                    f"row {number}: {found['flops']} {values['flops']:g} with {N:g} parameters gives {D:g} tokens"
                )
                continue
            if "tokens" in values and "flops" in values:
                off = max(off, abs(math.log(values["flops"]) - math.log(6 * N) - math.log(D)))
            if counting == "non-embedding":
                N -= values.get("embedding_parameters", 0)
                if N <= 0:
                    wrong.append(f"row {number}: {found['embedding_parameters']} leaves no parameters")
                    continue
            record = (str(row.get(found.get("name", ""))), N, D, values[metric], offset + number)
            for key, value in zip(gathered, record, strict=True):
                gathered[key].append(value)
        if wrong:
            raise ScalingError(f"{path}: {len(wrong)} bad values; {listed(wrong, 20)}")
        if off:
            said.append(
                f"{where}tokens are used and FLOPs are not; they differ from 6 N D by up to {math.expm1(min(off, 700)):.1%}"
            )
        if len(paths) > 1:
            begins.append(f"{path} from {offset + 1}")
        offset += last
    if begins:
        said.append(f"rows are numbered on through the files: {listed(begins, 20)}")
    if not gathered["row"]:
        raise ScalingError(
            f"no runs in {', '.join(map(str, paths))}" + (f" by the name {', '.join(names)}" if names else "")
        )
    if names and not has_names:
        raise ScalingError("--name needs a column with names")
    # If every run has a different name, names do not mark curves.
    labels = gathered["name"] if has_names and len(set(gathered["name"])) < len(gathered["name"]) else None
    sizes, lengths, measured = (np.array(gathered[key]) for key in ("parameters", "tokens", "value"))
    return Runs(sizes, lengths, measured, labels, gathered["row"], counting or "all"), said


def _table(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    """Read rows with their numbers, and the number of the last line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ScalingError(f"{path} cannot be read: {error}") from error
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise ScalingError(f"{path} must be a .csv or a .jsonl file")
    if not text.strip():
        raise ScalingError(f"{path} is empty")
    rows: list[tuple[int, dict[str, Any]]] = []
    if suffix == ".jsonl":
        lines = text.split("\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append((number, load_row(line)))
            except ValueError as error:
                raise ScalingError(f"{path}: row {number} {error}") from error
        return rows, len(lines)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [cell.strip() for cell in next(reader)]
        twice = sorted({cell for cell in header if header.count(cell) > 1})
        if twice:
            raise ScalingError(f"{path} has more than one column {', '.join(map(repr, twice))}")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise ScalingError(f"{path}: row {reader.line_num} has {len(cells)} values for {len(header)} columns")
            rows.append((reader.line_num, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise ScalingError(f"{path}: row {reader.line_num}: {error}") from error
    return rows, reader.line_num


def _columns(path: Path, rows: list[tuple[int, dict[str, Any]]], metric: str, named: dict[str, str]) -> dict[str, str]:
    """Quantity -> its column."""
    if not rows:
        raise ScalingError(f"{path} has no rows")
    there = list(dict.fromkeys(column for _, row in rows for column in row))
    found = {}
    for key, known in COLUMNS.items():
        if key in ("loss", "score") and key != metric:
            continue
        if key in named:
            if named[key] not in there:
                raise ScalingError(f"{path} has no column {named[key]!r}; its columns are {', '.join(there)}")
            found[key] = named[key]
            continue
        fit = [column for column in there if "_".join(column.lower().replace("-", " ").split()) in known]
        if len(fit) > 1:
            raise ScalingError(
                f"{path} has several columns for {key}, {', '.join(fit)}; choose by --columns {key}=NAME"
            )
        if fit:
            found[key] = fit[0]
    missing = [key for key in ("parameters", metric) if key not in found]
    if "tokens" not in found and "flops" not in found:
        missing.append("tokens or flops")
    if missing:
        raise ScalingError(
            f"{path} has no column for {', '.join(missing)}; its columns are {', '.join(there)}; name them by "
            "--columns, as in --columns loss=val,parameters=size"
        )
    return found


def _number(value: Any, zero: bool = False) -> float:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("is missing")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"is not a number: {value!r}")
    try:
        number = float(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"is not a number: {value!r}") from error
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"must be finite and {'at least' if zero else 'above'} 0, got {value}")
    return number
