"""What was measured of a model: scores by layer or by linear, and how they came about."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floe_kernels._types import ModuleSpec
from floe_kernels.allocation.lora_smoe import mean_share
from floe_kernels.pipeline import files

FORMAT = "floe_kernels.scores"
MEASURES = ("fisher", "sensitivity", "spectral", "influence")


@dataclass(frozen=True)
class Measurement:
    """What a model's layers or linears scored, and what a plan needs to know about the model.

    Attributes:
        model: Its name.
        fingerprint: Checksum of its weights.
        variant: Which Fisher score, or which estimator of the spectrum.
        scores: Layer or module name -> score; of several tasks, the mean share.
        modules: All adaptable linears, in model order.
        gradients: Layer -> gradient of its gate for every sample, for refinement.
        method: One of ``MEASURES``.
        tasks: Task -> module name -> sensitivity, summed over a matrix's elements.
        stability: Task -> how far other samples would rank the linears alike.

    Raises:
        ValueError: :meth:`load` met a file of another kind, or a damaged one.

    Example:
        >>> import tempfile, pathlib
        >>> modules = {"h.0.q": ModuleSpec(4, 4, "h.0")}
        >>> scores = Measurement("toy", "", "init", {"h.0": 1.5}, modules)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     scores.save(pathlib.Path(folder, "scores.json"))
        ...     Measurement.load(pathlib.Path(folder, "scores.json")) == scores
        True
    """

    model: str
    fingerprint: str
    variant: str
    scores: dict[str, float]
    modules: dict[str, ModuleSpec]
    gradients: dict[str, list[float]] | None = None
    method: str = "fisher"
    tasks: dict[str, dict[str, float]] | None = None
    stability: dict[str, dict[str, Any]] | None = None

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        modules = {name: spec._asdict() for name, spec in self.modules.items()}
        files.write_json(path, {"format": FORMAT, **vars(self), "modules": modules})

    @classmethod
    def load(cls, path: Path) -> "Measurement":
        """Read what :meth:`save` wrote."""
        document = files.read_json(path)
        if document.pop("format", None) != FORMAT:
            raise ValueError(f"{path} must be a file of scores, as floe score writes it")
        try:
            modules: dict[str, Any] = document.pop("modules")
            specs = {name: ModuleSpec(**spec) for name, spec in modules.items()}
            return cls(modules=specs, **document)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} must be a file of scores, but is damaged: {error}") from error

    @classmethod
    def join(cls, parts: Sequence["Measurement"]) -> "Measurement":
        """Put the tasks of several files of sensitivities together.

        Raises:
            ValueError: There are several of another method, or of different models.
        """
        first = parts[0]
        if len(parts) == 1:
            return first
        tasks: dict[str, dict[str, float]] = {}
        stability: dict[str, dict[str, Any]] = {}
        for part in parts:
            if part.tasks is None:
                raise ValueError(
                    f"only scores of --method sensitivity can be several, got {part.method}"
                )
            if (part.fingerprint, part.modules) != (first.fingerprint, first.modules):
                raise ValueError("all scores must be of one model, got two")
            for task in part.tasks:
                if task in tasks:
                    raise ValueError(f"every task must be given once, got {task!r} twice")
            tasks |= part.tasks
            stability |= part.stability or {}
        return cls(
            first.model, first.fingerprint, first.variant, mean_share(tasks), first.modules,
            None, first.method, tasks, stability,
        )  # fmt: skip

    def task_scores(self, how: str) -> dict[str, dict[str, float]]:
        """Return every task's scores: the ``"sum"`` over a matrix's elements, or their ``"mean"``.

        Args:
            how: Which of them.
        """
        sizes = {n: spec.in_features * spec.out_features for n, spec in self.modules.items()}
        return {
            task: {name: s / sizes[name] if how == "mean" else s for name, s in scores.items()}
            for task, scores in (self.tasks or {}).items()
        }
