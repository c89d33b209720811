"""A plan's file: strict JSON in, whole files out. Knows the layout, not the meaning."""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from floe_kernels.allocation.arguments import nearest

if TYPE_CHECKING:
    from floe_kernels._types import JSON

FORMAT = "floe_kernels.plan"
VERSION = 1
OPTIONS = (
    "method", "base_model", "fingerprint", "lora_alpha", "lora_dropout", "shared_A", "use_rslora",
)  # fmt: skip
REQUIRED = ("format", "version", "method", "placements", "modules")
TABLES = ("placements", "modules")  # written one line an entry


def plain(value: Any, where: str) -> JSON:
    """Copy ``value`` as what JSON gives back: lists for tuples, string keys, finite numbers."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise ValueError(f"{where} must be something JSON can hold, all numbers finite, got {value!r}")


def render(document: dict[str, JSON]) -> str:
    """Write ``document`` as JSON that a person can read and a diff can show."""
    parts = []
    for key, value in document.items():
        if key in TABLES and isinstance(value, dict) and value:
            lines = (f"    {_dumps(name)}: {_dumps(row)}" for name, row in value.items())
            text = "{\n" + ",\n".join(lines) + "\n  }"
        else:
            text = _dumps(value)
        parts.append(f"  {_dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _dumps(value: JSON) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, as odd file names give, has no UTF-8
        return json.dumps(value, allow_nan=False)
    return text


def parse(text: str) -> dict[str, Any]:
    """Read the top level of a plan: whole JSON, known keys, this format and version."""
    if not text.strip():
        raise ValueError("a plan must be whole JSON: the text is empty")
    try:
        document = json.loads(text, parse_constant=_not_finite, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"a plan must be whole JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("a plan must be whole JSON: it is nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError(f"a plan must be a JSON object, got {_kind(document)}")
    if "format" in document and document["format"] != FORMAT:
        raise ValueError(f'a plan\'s format must be "{FORMAT}", got {document["format"]!r}')
    version = document.get("version", VERSION)
    if type(version) is not int or version != VERSION:
        raise ValueError(f"a plan's format version must be {VERSION}, got {version!r}")
    _only(document, (*REQUIRED, *OPTIONS, "provenance"), REQUIRED, "a plan")
    if not isinstance(document.get("provenance", {}), dict):
        raise ValueError(f"provenance must be an object, got {_kind(document['provenance'])}")
    return document


def rows(document: dict[str, Any], table: str, row_type: Any) -> dict[str, dict[str, Any]]:
    """Return the objects of one table, each with exactly the fields of ``row_type``."""
    names = [f.name for f in fields(row_type)] if is_dataclass(row_type) else list(row_type._fields)
    if not isinstance(document[table], dict):
        raise ValueError(f"{table} must be an object, got {_kind(document[table])}")
    for name, row in document[table].items():
        if not isinstance(row, dict):
            raise ValueError(f"{table}[{name!r}] must be an object, got {_kind(row)}")
        _only(row, names, names, f"{table}[{name!r}]")
    checked: dict[str, dict[str, Any]] = document[table]
    return checked


def read(path: str | os.PathLike[str]) -> str:
    """Return a file's text; it is UTF-8, whatever the locale."""
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")  # some editors prepend a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"a plan must be UTF-8 text, got {error}") from error


def write(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to a temporary name beside ``path``, force it to disk, rename it."""
    target = Path(path)
    temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    with contextlib.suppress(OSError):  # a folder cannot be opened on every system
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself survives a power cut
        finally:
            os.close(folder)


def _only(row: dict[str, Any], known: Any, required: Any, where: str) -> None:
    for key in row:
        if key not in known:
            raise ValueError(f"{where} has no key {key!r}{nearest(key, known)}")
    for key in required:
        if key not in row:
            raise ValueError(f"{where} must have the key {key!r}, got {', '.join(row) or 'none'}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key, value in pairs:
        if key in document:
            raise ValueError(f"a key must be given once, got {key!r} twice")
        document[key] = value
    return document


def _not_finite(constant: str) -> NoReturn:
    raise ValueError(f"every number must be finite, got {constant}")


def _kind(value: object) -> str:
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), "a number")
