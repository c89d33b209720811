"""The diary of a run: one JSON object a line, in the order in which things happened."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from floe_kernels.pipeline import files


class History:
    """A file of JSON lines that a kill cannot spoil.

    A last line without its end, which a kill leaves, is dropped when the file is opened. What a
    resumed stretch of work will do again is taken out first (:meth:`rewind`), so every step is in
    the file once.

    Args:
        path: The file; it is made with the first line.
        mend: Also drop the half line from the file; only for the process that writes to it.

    Raises:
        ValueError: A line other than the last is no JSON object.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     history = History(pathlib.Path(folder, "history.jsonl"))
        ...     for step in (1, 2, 3):
        ...         history.add("train", step=step, run="floe")
        ...     history.rewind("train", after=1, run="floe")
        ...     history.lines
        [{'event': 'train', 'step': 1, 'run': 'floe'}]
    """

    def __init__(self, path: Path, *, mend: bool = True) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if not path.exists():
            return
        data = path.read_bytes()
        whole, _, half = data.rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), 1):
            self.lines.append(_parse(line, path, number))
        if half and mend:
            self._rewrite()

    def add(self, event: str, **facts: Any) -> None:
        """Append one line.

        Args:
            event: What happened.
            facts: What there is to say about it; numbers that are not finite become null.
        """
        line = {"event": event, **files.finite(facts)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self.lines.append(line)

    def rewind(self, event: str, *, after: int | None = None, **facts: Any) -> None:
        """Take out the lines of ``event`` with these facts, or those with a ``step`` beyond some.

        Args:
            event: What happened.
            after: Keep the lines up to this step; None keeps none.
            facts: Which lines of the event are meant.
        """

        def stays(line: Mapping[str, Any]) -> bool:
            if line.get("event") != event or any(line.get(k) != v for k, v in facts.items()):
                return True
            return after is not None and line.get("step", 0) <= after

        kept = [line for line in self.lines if stays(line)]
        if len(kept) < len(self.lines):
            self.lines = kept
            self._rewrite()

    def of(self, event: str, **facts: Any) -> list[dict[str, Any]]:
        """Return the lines of ``event`` with these facts."""
        return [
            line
            for line in self.lines
            if line.get("event") == event and all(line.get(k) == v for k, v in facts.items())
        ]

    def _rewrite(self) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines)
        files.write_text(self.path, text)


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: must be JSON, but is damaged") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}, line {number}: must be a JSON object, got {value!r}")
    return value
