"""A run's folder: who works in it, what was asked for, and what is finished."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from floe_kernels.pipeline import files
from floe_kernels.pipeline.history import History

CONFIG, STATE, HISTORY = "config.json", "state.json", "history.jsonl"
RESULTS = "results.jsonl"
FORMAT = 1
CONTENTS = (
    CONFIG, STATE, HISTORY, RESULTS, "plans", "search.journal", "search.journal.locks",
    "checkpoints", "plan.json", "adapter", "report.html",
)  # fmt: skip
"""All that a run leaves; the configuration goes first, and with it the run."""


class Run:
    """A folder in which work stopped at any moment can be taken up again.

    ==================  ======================================================================
    ``config.json``     the command, its arguments, and hashes of the model and the data
    ``state.json``      what every finished phase found
    ``history.jsonl``   every trial, training step and evaluation
    ``search.journal``  the trials of the rank search
    ``results.jsonl``   of a comparison, every run that is finished; ``plans/``, what each placed
    ``checkpoints/``    training in flight: adapter, optimiser and random state, data position
    ==================  ======================================================================

    Every one but the history is replaced whole. Made by :func:`open_run`.

    Attributes:
        folder: Where it is.
        command: What made it: ``"tune"``, ``"train"``, ``"compare"`` or ``"demo"``.
        arguments: What was asked for.
        facts: Hashes and other things that must not change under a run.
        state: Phase -> what it found.
        history: The diary.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, mend: bool = True) -> None:
        self.folder = folder
        self.command: str = config["command"]
        self.arguments: dict[str, Any] = dict(config["arguments"])
        self.facts: dict[str, Any] = dict(config.get("facts", {}))
        state = folder / STATE
        self.state: dict[str, Any] = files.read_json(state) if state.exists() else {}
        self.history = History(folder / HISTORY, mend=mend)

    def finish(self, phase: str, found: Mapping[str, Any]) -> None:
        """Note on disk that a phase is finished, and what it found.

        Args:
            phase: Its name.
            found: What JSON can hold.
        """
        self.state[phase] = files.finite(dict(found))
        files.write_json(self.folder / STATE, self.state)

    def pin(self, **facts: Any) -> None:
        """Note facts that a resumed run must find unchanged.

        Args:
            facts: Name -> what JSON can hold.

        Raises:
            ValueError: One of them has changed since the run began.
        """
        for name, value in facts.items():
            if name in self.facts and self.facts[name] != value:
                raise ValueError(
                    f"a resumed run needs the {name} it began with, {self.facts[name]}, got {value}"
                )
        if any(name not in self.facts for name in facts):
            self.facts |= facts
            self._write_config()

    def checkpoint(self, name: str) -> Path:
        """Return the path of a checkpoint file."""
        folder = self.folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.safetensors"

    def _write_config(self) -> None:
        config = {
            "format": FORMAT,
            "command": self.command,
            "arguments": self.arguments,
            "facts": self.facts,
        }
        files.write_json(self.folder / CONFIG, config)


@contextlib.contextmanager
def open_run(
    folder: Path, command: str, arguments: Mapping[str, Any], *, resume: bool = False
) -> Iterator[Run]:
    """Make a run's folder, or take up the run in it; nobody else may while this one does.

    Args:
        folder: Where; made if missing.
        command: The command's name.
        arguments: What is asked for; when resuming, those that were named again.
        resume: Take up the run that is there.

    Raises:
        FileExistsError: A run is there already, and ``resume`` was not asked for.
        FileNotFoundError: There is nothing to resume.
        BlockingIOError: Another process works there.
        ValueError: The run there is another command's, or began with other arguments.
        OSError: The folder cannot be written to.
    """
    config = folder / CONFIG
    if resume and not config.exists():
        raise FileNotFoundError(f"{folder} holds no run to resume: leave out --resume to start one")
    files.check_writable(folder)
    with files.lock(folder):
        files.remove_partials(folder)
        if not config.exists():
            run = Run(folder, {"command": command, "arguments": files.finite(dict(arguments))})
            run._write_config()
            yield run
            return
        if not resume:
            raise FileExistsError(
                f"{folder} holds a run already: add --resume to go on with it, "
                "or choose another folder with --out"
            )
        yield resumed(folder, command, arguments)


def clear_run(folder: Path) -> None:
    """Delete the run in a folder, and nothing else that may be there.

    Args:
        folder: The run's folder.

    Raises:
        FileNotFoundError: There is no run.
        BlockingIOError: Another process works there.
    """
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no {CONFIG}")
    with files.lock(folder):
        for name in CONTENTS:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def resumed(folder: Path, command: str, arguments: Mapping[str, Any]) -> Run:
    """Read the run in a folder, and check that it is the one that is meant."""
    run = load_run(folder, mend=True)
    if run.command != command:
        raise ValueError(f"the run in {folder} is of floe {run.command}, got floe {command}")
    for name, value in files.finite(dict(arguments)).items():
        if run.arguments.get(name) != value:
            raise ValueError(
                f"a resumed run keeps its arguments: {name} was {run.arguments.get(name)!r}, "
                f"got {value!r}; leave it out, or choose another folder with --out"
            )
    return run


def load_run(folder: Path, *, mend: bool = False) -> Run:
    """Read a run's folder; with ``mend``, in order to work in it.

    Raises:
        FileNotFoundError: There is no run.
        ValueError: A file is damaged, or of another format.
    """
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no {CONFIG}")
    config = files.read_json(folder / CONFIG)
    if config.get("format") != FORMAT or not {"command", "arguments"} <= set(config):
        raise ValueError(
            f"{folder / CONFIG} must be of format {FORMAT}, got {config.get('format')!r}"
        )
    for name in ("arguments", "facts"):
        value = config.get(name, {})
        if not isinstance(value, dict):
            raise ValueError(f"{name} in {folder / CONFIG} must be an object, got {value!r:.80}")
    return Run(folder, config, mend=mend)
