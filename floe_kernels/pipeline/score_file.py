"""Layer scores in a file of their own, between ``floe score`` and ``floe plan``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floe_kernels._types import ModuleSpec
from floe_kernels.pipeline import files

FORMAT = "floe_kernels.scores"


@dataclass(frozen=True)
class ScoreFile:
    """What a model's layers scored, and what a plan needs to know about the model.

    Raises:
        ValueError: :meth:`load` met a file of another kind, or a damaged one.

    Example:
        >>> import tempfile, pathlib
        >>> modules = {"h.0.q": ModuleSpec(4, 4, "h.0")}
        >>> scores = ScoreFile("toy", "", "init", {"h.0": 1.5}, modules, None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     scores.save(pathlib.Path(folder, "scores.json"))
        ...     ScoreFile.load(pathlib.Path(folder, "scores.json")) == scores
        True
    """

    model: str
    fingerprint: str
    variant: str
    scores: dict[str, float]
    modules: dict[str, ModuleSpec]
    gradients: dict[str, list[float]] | None

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        modules = {name: spec._asdict() for name, spec in self.modules.items()}
        files.write_json(path, {"format": FORMAT, **vars(self), "modules": modules})

    @classmethod
    def load(cls, path: Path) -> "ScoreFile":
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
