"""The adapter on disk: ``adapter.safetensors`` holds the values, ``adapter.json`` vouches for them.

Version 1 of ``adapter.json`` has the keys of ``_KEYS``. Its ``tensors`` give dtype, shape and
SHA-256 of every tensor, ``size`` the bytes of the whole tensor file, and ``sha256`` the checksum of
all other keys. It is renamed into place last, so it never vouches for values that are not there.
"""

import contextlib
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

FORMAT, VERSION = "floe_kernels.adapter", 1
TENSORS, DOCUMENT = "adapter.safetensors", "adapter.json"
_KEYS = (
    "format", "version", "package_version", "base_model", "fingerprint", "plan", "size", "tensors",
    "sha256",
)  # fmt: skip
_HEADER_LIMIT = 100_000_000  # bytes, the safetensors format's own
_FLOATS = ("BF16", "F16", "F32", "F64")

Table = dict[str, dict[str, Any]]  # tensor name -> dtype, shape, sha256


def read_document(folder: Path) -> dict[str, Any]:
    """Return ``adapter.json``, whole, known and unedited.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is cut off, edited, or of another format or version.
    """
    path = folder / DOCUMENT
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        rule = f"an adapter folder must hold {DOCUMENT}"
        raise FileNotFoundError(f"{rule}, {folder} does not") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be whole JSON, it is cut off or edited: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f'{path} must be a JSON object of the format "{FORMAT}", got another file')
    if document.get("version") != VERSION:
        got = document.get("version")
        raise ValueError(
            f"{path} must be of format version {VERSION}, got {got!r}: update one side"
        )
    if set(document) != set(_KEYS) or document["sha256"] != seal(document):
        raise ValueError(f"{path} must match its own sha256: it was edited after it was written")
    for key, kind in (("base_model", str), ("fingerprint", str), ("size", int), ("tensors", dict)):
        if not isinstance(document[key], kind):
            raise ValueError(
                f"{path}: {key} must be of type {kind.__name__}, got {document[key]!r}"
            )
    return document


def read_tensors(folder: Path, document: dict[str, Any], shapes: dict[str, list[int]]) -> bytes:
    """Return the tensor file once it holds what the document says, and tensors of these shapes.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is cut off, edited, or holds other tensors.
    """
    path = folder / TENSORS
    if not path.exists():
        raise FileNotFoundError(f"an adapter folder must hold {TENSORS}, {folder} does not")
    if (size := path.stat().st_size) != document["size"]:
        raise ValueError(
            f"{path} must have {document['size']} bytes as {DOCUMENT} says, got {size}: "
            "it is cut off, or the two files are of different adapters"
        )
    data = path.read_bytes()
    try:
        found = table(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for name in [*shapes, *found]:
        if name not in found:
            raise ValueError(f"{path} must hold {name!r}, which the plan calls for, but does not")
        if name not in shapes:
            raise ValueError(f"{path} must hold no tensor but the plan's, got {name!r}")
    for name, entry in found.items():
        if entry["shape"] != shapes[name] or entry["dtype"] not in _FLOATS:
            got = f"{entry['dtype']} {entry['shape']}"
            raise ValueError(f"{path}: {name!r} must be floating point {shapes[name]}, got {got}")
        if entry != document["tensors"].get(name):
            raise ValueError(
                f"{path} must match the checksums in {DOCUMENT}, {name!r} does not: "
                "it was edited, or the two files are of different adapters"
            )
    return data


def table(data: bytes) -> Table:
    """Return dtype, shape and SHA-256 of every tensor in a safetensors file.

    Raises:
        ValueError: The bytes are no well-formed safetensors file.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _HEADER_LIMIT):
        raise ValueError(
            f"a safetensors header must be at most {_HEADER_LIMIT} bytes and inside the file, "
            f"got {length} in {len(data)} bytes"
        )
    import safetensors

    deserialize: Any = safetensors.deserialize
    try:
        entries = deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"the file must be in the safetensors format: {error}") from error
    return {
        name: {
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "sha256": hashlib.sha256(entry["data"]).hexdigest(),
        }
        for name, entry in sorted(entries, key=lambda pair: pair[0])
    }


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files under temporary names, force them to disk, then rename them in order.

    Raises:
        OSError: The file system refused, and nothing has changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{uuid.uuid4().hex[:8]}.tmp" for name in files}
    try:
        for name, data in files.items():
            with temporary[name].open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    except BaseException as error:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()
        if isinstance(error, OSError):
            why = f"{error.strerror}; nothing in {folder} has changed"
            raise OSError(error.errno, why) from error
        raise
    for name, path in temporary.items():
        path.replace(folder / name)
    with contextlib.suppress(OSError):  # a folder cannot be opened on every system
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the renames themselves survive a power cut
        finally:
            os.close(descriptor)


def seal(document: dict[str, Any]) -> str:
    """Return the SHA-256 of a document without its own ``sha256``."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
