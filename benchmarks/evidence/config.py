"""An experiment's committed file: what is trained, on which data, how often, in which order."""

import hashlib
import importlib
import itertools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from floe_kernels.pipeline.options import Options

FOLDER = Path(__file__).parent
STDLIB = "stdlib"
FORMS = ("text", "letter")
HELD_OUT_BLOCKS = 64  # of plain text; of questions, `questions` says how many


class Key(NamedTuple):
    """What makes a run: no two lines of a results file share it."""

    dataset: str
    method: str
    seed: int
    setting: str  #: checksum of everything else that its numbers depend on


@dataclass(frozen=True)
class Data:
    """One data set: question files, or the standard library.

    Attributes:
        label: What tables call it.
        train: File in the data folder; ``"stdlib"`` for the standard library's functions.
        test: File in the data folder that questions are drawn from.
        form: ``"text"``: the question alone is the prompt and an option's words the answer;
            ``"letter"``: the file's own instruction, which lists the options, and "the correct
            answer is answerN".
        length: Most tokens of a sample.
    """

    label: str
    train: str
    test: str = ""
    form: str = "text"
    length: int = 128

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        if self.train != STDLIB and not self.test:
            raise ValueError(f"data set {self.label!r} needs a test file beside its train file")


@dataclass(frozen=True)
class Config:
    """One experiment.

    Attributes:
        name: Of the file.
        title: What it asks.
        methods: The most informative first; see ``benchmarks.evidence.choices``.
        datasets: The most informative first.
        seeds: Of adapters, data order and scores; the earlier come first.
        options: Fields of ``floe_kernels.pipeline.options.Options``.
        questions: How many test questions are held out.
        draw_seed: Of the data: training samples and questions are the same in every run.
        sizes: Numbers of samples whose rankings are compared, of a stability experiment.
        draws: Of the comparisons at every size.
        answers: Whether questions are answered, too; their held-out loss is always taken.
        left_out: What was cut; the report says so.
    """

    name: str
    title: str
    methods: tuple[str, ...]
    datasets: tuple[Data, ...]
    seeds: tuple[int, ...]
    options: Mapping[str, Any]
    questions: int = 300
    draw_seed: int = 0
    sizes: tuple[int, ...] = ()
    draws: int = 50
    answers: bool = True
    rank_grid: Mapping[str, Any] = field(default_factory=dict)
    left_out: str = ""

    def settings(self, data: Data, **more: Any) -> Options:
        """Return the pipeline's options for one data set."""
        return Options(**{
            "rank": 8, "eval_samples": HELD_OUT_BLOCKS, "seed": self.draw_seed, **self.options,
            "data": data.label, "length": data.length, **more,
        })  # fmt: skip

    def setting(self, data: Data) -> str:
        """Return a checksum of what the numbers of a run depend on beside method and seed."""
        kept = {k: v for k, v in self.options.items() if k not in ("threads", "cache")}
        facts = [kept, vars(data), self.questions, self.draw_seed, list(self.sizes)]
        if not self.answers:
            facts.append("no answers")
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]

    def runs(self) -> list[Key]:
        """Return every run, in order: seed by seed, then method by method, then data sets."""
        return [
            Key(data.label, method, seed, self.setting(data))
            for seed in self.seeds
            for method in self.methods
            for data in self.datasets
        ]

    def data(self, label: str) -> Data:
        """Return the data set called ``label``."""
        return next(data for data in self.datasets if data.label == label)

    def only(self, label: str) -> "Config":
        """Return the experiment on one data set.

        Raises:
            ValueError: It has no such data set.
        """
        labels = [data.label for data in self.datasets]
        if label not in labels:
            raise ValueError(f"--only must be one of {', '.join(labels)}, got {label!r}")
        return replace(self, datasets=(self.data(label),))


def names() -> list[str]:
    """Return the experiments that have a file here."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str, folder: Path = FOLDER) -> Config:
    """Read an experiment's file, strictly.

    Args:
        name: Without ``.toml``.
        folder: Where it is.

    Raises:
        ValueError: There is no such experiment, or a key is unknown or missing.
    """
    path = folder / f"{name}.toml"
    if not path.exists():
        raise ValueError(f"an experiment must be one of {', '.join(names())}, got {name!r}")
    document = _read_toml(path.read_text(encoding="utf-8"))
    known = {f.name for f in fields(Config)} - {"name"}
    if unknown := sorted(document.keys() - known):
        raise ValueError(f"{path.name} must hold only {sorted(known)}, got {unknown}")
    grid = document.get("rank_grid", {})
    methods = [*document.get("methods", ()), *_grid_methods(grid)]
    document |= {
        "methods": tuple(methods),
        "datasets": tuple(Data(**data) for data in document["datasets"]),
        "seeds": tuple(document["seeds"]),
        "sizes": tuple(document.get("sizes", ())),
    }
    config = Config(name, **document)
    for what, values in (("methods", methods), ("seeds", config.seeds)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{path.name}: {what} must be given, each once, got {list(values)}")
    for data in config.datasets:
        config.settings(data)  # a wrong option shows before anything is loaded
    return config


def _grid_methods(grid: Mapping[str, Any]) -> list[str]:
    """Name every point of the rank grid: ``rank:8`` or, with depth groups, ``rank:8-16``."""
    points = itertools.product(grid.get("ranks", ()), repeat=grid.get("groups", 1))
    return ["rank:" + "-".join(map(str, point)) for point in points if point]


def _read_toml(text: str) -> dict[str, Any]:
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"  # pytest brings the latter
    document: dict[str, Any] = importlib.import_module(name).loads(text)
    return document
