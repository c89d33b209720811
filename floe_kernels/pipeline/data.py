"""A user's data files: records of instruction, input and output, or plain text."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FORMS = (".jsonl", ".json", ".txt")


class Record(NamedTuple):
    """One exercise; only the answer is learnt."""

    instruction: str
    input: str  #: may be empty
    output: str


def read_records(path: Path) -> list[Record]:
    """Read a ``.jsonl`` file of JSON objects, or a ``.json`` file with an array of them.

    Every object has texts called ``instruction`` and ``output``, which are not blank, and may have
    one called ``input``. Other keys are ignored; so are blank lines.

    Args:
        path: The file, in UTF-8.

    Returns:
        The records, in the order of the file; at least one.

    Raises:
        ValueError: A rule is broken; the message names file, line, rule and what came.
        OSError: The file cannot be read.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "data.jsonl")
        ...     _ = path.write_text('{"instruction": "Add 1 and 2.", "output": "3"}')
        ...     read_records(path)
        [Record(instruction='Add 1 and 2.', input='', output='3')]
    """
    text = read_text(path)
    objects = _array(text, path) if path.suffix == ".json" else _lines(text, path)
    records = [_record(value, f"{path}, line {line}") for line, value in objects]
    if not records:
        raise ValueError(f"{path} must hold at least one record, got none")
    return records


def read_text(path: Path) -> str:
    """Read a file of UTF-8 text that is not blank.

    Args:
        path: The file.

    Returns:
        Its text, without a byte-order mark.

    Raises:
        ValueError: It is blank, or not UTF-8; the message names the line.
        OSError: It cannot be read.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise ValueError(
            f"{path}, line {line}: must be UTF-8 text, got byte 0x{byte:02x}"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} must hold text, but is empty")
    return text


def split_records(
    records: Sequence[Record], fraction: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Hold a part of the records out, drawn by the seed.

    Records with the same question stay on one side, so nothing held out was seen in training.

    Args:
        records: All of them.
        fraction: Part to hold out, in (0, 1); at least one question, and not all.
        seed: Of the draw.

    Returns:
        Those to train on and those held out, each in the order of the file.

    Raises:
        ValueError: There are not two different questions.

    Example:
        >>> records = [Record(f"Say {i}.", "", str(i)) for i in range(10)]
        >>> train, held_out = split_records(records, 0.2, seed=0)
        >>> len(train), len(held_out)
        (8, 2)
    """
    questions = list(dict.fromkeys(record[:2] for record in records))
    if len(questions) < 2:
        raise ValueError(
            f"data must hold at least 2 different questions to hold one out, got {len(questions)}"
        )
    count = min(max(1, round(fraction * len(questions))), len(questions) - 1)
    out = set(random.Random(f"split {seed}").sample(questions, count))
    return (
        [record for record in records if record[:2] not in out],
        [record for record in records if record[:2] in out],
    )


def split_text(text: str, fraction: float) -> tuple[str, str]:
    r"""Hold the end of a text out, from a line's start on.

    Args:
        text: The whole text.
        fraction: Part to hold out, in (0, 1).

    Returns:
        The text to train on and the text held out.

    Example:
        >>> split_text("one\ntwo\nthree\nfour\n", 0.25)
        ('one\ntwo\nthree\n', 'four\n')
    """
    cut = round(len(text) * (1 - fraction))
    start = text.rfind("\n", 0, cut) + 1 or cut
    return text[:start], text[start:]


def _lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: must be JSON, {_why(error)}") from error
            except RecursionError as error:
                raise ValueError(f"{path}, line {number}: is nested too deeply") from error


def _array(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of the elements of an array: their lines are what json.loads forgets."""
    decoder = json.JSONDecoder()
    at, line = 0, 1

    def skip() -> str:
        nonlocal at, line
        while at < len(text) and text[at] in " \t\r\n":
            line += text[at] == "\n"
            at += 1
        return text[at : at + 1]

    def wrong(rule: str) -> ValueError:
        got = repr(text[at : at + 20]) if at < len(text) else "the end of the file"
        return ValueError(f"{path}, line {line}: {rule}, got {got}")

    if skip() != "[":
        raise wrong("must be an array of records")
    at += 1
    mark = skip()
    while mark != "]":
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: must be JSON, {_why(error)}") from error
        except RecursionError as error:
            raise ValueError(f"{path}, line {line}: is nested too deeply") from error
        yield line, value
        line += text.count("\n", at, end)
        at = end
        mark = skip()
        if mark == ",":
            at += 1
            skip()
        elif mark != "]":
            raise wrong("records must be separated by commas and end with ]")
    at += 1
    if skip():
        raise wrong("nothing may follow the array")


def _why(error: json.JSONDecodeError) -> str:
    return f"but at column {error.colno}: {error.msg[:1].lower()}{error.msg[1:]}"


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: must be an object with instruction and output, got {_short(value)}"
        )
    texts = {"input": "", **value}
    for key in Record._fields:
        if key not in texts:
            raise ValueError(f"{where}: must have the key {key!r}, got {_short(sorted(value))}")
        text = texts[key]
        if not isinstance(text, str):
            raise ValueError(f"{where}: {key!r} must be a string, got {_short(text)}")
        if key != "input" and not text.strip():
            raise ValueError(f"{where}: {key!r} must not be blank, got {_short(text)}")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"{where}: {key!r} must be valid Unicode, got a lone surrogate")
    return Record(texts["instruction"], texts["input"], texts["output"])


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."
