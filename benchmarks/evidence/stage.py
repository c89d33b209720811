"""The model, loaded once, and the data sets, scores and folders that the runs share."""

import contextlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence.accuracy import option_log_likelihoods
from benchmarks.evidence.config import Config
from benchmarks.evidence.questions import Task, accuracies, load_task
from floe_kernels._types import ModuleSpec
from floe_kernels.integrations.transformers import find_modules
from floe_kernels.pipeline.models import Loaded, load_model
from floe_kernels.pipeline.options import Options
from floe_kernels.pipeline.runs import CONFIG, open_run
from floe_kernels.pipeline.workbench import Workbench


class Stage:
    """Everything that the runs of an experiment have in common.

    Args:
        config: The experiment.
        data: Folder of the question files; None where no data set needs one.
        work: Folder for scores and for runs in flight; never committed.
        threads: CPU threads; 0 leaves torch's.
    """

    def __init__(self, config: Config, data: Path | None, work: Path, threads: int = 0) -> None:
        self.config, self.data, self.work, self.threads = config, data, work, threads
        self._tasks: dict[str, Task] = {}

    @cached_property
    def loaded(self) -> Loaded:
        """The model; it carries no adapters between runs."""
        return load_model(self.options(self.config.datasets[0].label, threads=self.threads))

    @cached_property
    def modules(self) -> dict[str, ModuleSpec]:
        """Its adaptable linears, in model order."""
        options = self.options(self.config.datasets[0].label)
        return find_modules(self.loaded.model, options.target_names())

    @property
    def layers(self) -> list[str]:
        """Its blocks, in model order."""
        return list(dict.fromkeys(spec.layer for spec in self.modules.values()))

    def options(self, label: str, **more: Any) -> Options:
        """Return the pipeline's options on a data set."""
        return self.config.settings(self.config.data(label), **more)

    def task(self, label: str) -> Task:
        """Return a data set, encoded."""
        if label not in self._tasks:
            data = self.config.data(label)
            self._tasks[label] = load_task(self.config, data, self.data, self.loaded.tokenizer)
        return self._tasks[label]

    def folder(self, label: str) -> Path:
        """Return the folder of a data set under this setting, shared by experiments alike in it."""
        path = self.work / f"{label}-{self.config.setting(self.config.data(label))}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    @contextlib.contextmanager
    def bench(self, label: str, name: str, seed: int = 0) -> Iterator[Workbench]:
        """Open a folder of the pipeline's, new or taken up again."""
        folder = self.folder(label) / name
        options = self.options(label, seed=seed, cache=str(self.work / "spectra"))
        resume = (folder / CONFIG).exists()
        with open_run(folder, "evidence", options.to_json(), resume=resume) as run:
            yield Workbench(run, options, self.loaded, self.task(label).dataset)

    def base(self, label: str) -> dict[str, Any]:
        """Return loss and accuracy of the model without adapters."""
        with self.bench(label, "base") as bench:
            loss = bench.base_loss()
            if "answers" not in bench.run.state:
                bench.run.finish("answers", self.answers(label))
            return {"base_loss": loss, **{
                f"base_{name}": value for name, value in bench.run.state["answers"].items()
            }}  # fmt: skip

    def answers(self, label: str) -> dict[str, float | None]:
        """Let the model as it stands answer the held-out questions, if there are any to answer.

        Args:
            label: Of the data set.
        """
        questions = self.task(label).questions if self.config.answers else []
        if not questions:
            return {"accuracy": None, "accuracy_by_token": None}
        likelihoods = option_log_likelihoods(
            self.loaded.model, questions, batch_size=self.options(label).batch_size,
            pad=self.task(label).dataset.pad,
        )  # fmt: skip
        whole, by_token = accuracies(likelihoods, questions)
        return {"accuracy": whole, "accuracy_by_token": by_token}

    def use_threads(self) -> None:
        """Set torch's threads, where a number was asked for."""
        if self.threads:
            torch.set_num_threads(self.threads)
