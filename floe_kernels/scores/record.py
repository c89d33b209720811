"""What a Fisher run measured: raw sums, counts, and how they were defined."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from floe_kernels.scores.names import layer_of

#: What must agree before two records may be added.
DEFINITION = ("kind", "unit", "per_sample", "granularity", "loss_reduction")
COUNTS = ("samples", "samples_with_loss", "tokens", "skipped")
FORMAT = 1


@dataclass
class FisherRecord:
    """Sums of per-sample squared gradients, normalised only when read.

    Attributes:
        sums: ``module.parameter`` to the sum of squares: shaped like the parameter, ``(rows,)`` or
            ``()`` by granularity; float64.
        sizes: ``module.parameter`` to its number of elements.
        hits: Module to ``(E,)`` int64, samples of which at least one token reached the expert.
        gates: ``(samples, modules)``: d loss_i / d gate of each adapted module, in ``modules``'
            order, not squared; no rows where they were not kept.
        modules: The adapted modules, in model order.
        counts: ``samples``, ``samples_with_loss``, ``tokens``, ``skipped`` (non-finite) steps.
        meta: The definition: kind, unit, per_sample, granularity, loss_reduction.

    Example:
        >>> import torch
        >>> counts = {"samples": 2, "samples_with_loss": 2, "tokens": 8, "skipped": 0}
        >>> sums, sizes = {"m.0.q.lora_B": torch.tensor(6.0)}, {"m.0.q.lora_B": 3}
        >>> FisherRecord(sums, sizes, {}, torch.zeros(2, 0), [], counts).read(how="sum")
        {'m.0.q.lora_B': 3.0}
    """

    sums: dict[str, Tensor]
    sizes: dict[str, int]
    hits: dict[str, Tensor]
    gates: Tensor
    modules: list[str]
    counts: dict[str, int]
    meta: dict[str, str] = field(default_factory=dict)

    def read(
        self,
        *,
        aggregate: str = "matrix",
        how: str,
        normalize: str = "samples",
        parameters: tuple[str, ...] = ("lora_A", "lora_B", "weight"),
    ) -> dict[str, float]:
        """Return scores as plain numbers.

        Args:
            aggregate: ``"matrix"`` one number per parameter, ``"module"`` or ``"layer"``.
            how: ``"sum"`` over elements, or ``"mean"`` per element. They rank layers of different
                width differently, so there is no default.
            normalize: Divide by ``"samples"``, by ``"tokens"``, or not: ``"none"``.
            parameters: Which parameters count.

        Returns:
            Name to score, in model order.

        Raises:
            ValueError: An unknown choice, or nothing was collected.

        Example:
            >>> import torch
            >>> sums, sizes = {"a.0.x.lora_B": torch.tensor(6.0)}, {"a.0.x.lora_B": 3}
            >>> counts = {"samples": 2, "samples_with_loss": 2, "tokens": 8, "skipped": 0}
            >>> record = FisherRecord(sums, sizes, {}, torch.zeros(2, 0), [], counts)
            >>> record.read(aggregate="layer", how="mean")
            {'a.0': 1.0}
        """
        names: dict[str, Callable[[str], str]] = {
            "matrix": str,
            "module": module_of,
            "layer": lambda key: layer_of(module_of(key)),
        }
        divisors = {"samples": "samples", "tokens": "tokens", "none": None}
        if aggregate not in names or how not in ("sum", "mean") or normalize not in divisors:
            raise ValueError(
                f"aggregate must be one of {sorted(names)}, how 'sum' or 'mean', normalize one of "
                f"{sorted(divisors)}, got {aggregate!r}, {how!r} and {normalize!r}"
            )
        count = divisors[normalize]
        divisor = self.counts[count] if count else 1
        if divisor == 0:
            raise ValueError(f"no {count} were collected (skipped: {self.counts['skipped']})")
        total: dict[str, float] = {}
        size: dict[str, int] = {}
        for key, value in self.sums.items():
            if key.rpartition(".")[2] in parameters:
                name = names[aggregate](key)
                total[name] = total.get(name, 0.0) + value.double().sum().item()
                size[name] = size.get(name, 0) + self.sizes[key]
        per = size if how == "mean" else dict.fromkeys(size, 1)
        return {name: total[name] / divisor / max(1, per[name]) for name in total}

    def gate_gradients(self, *, aggregate: str = "layer") -> tuple[list[str], Tensor]:
        """Return every sample's gradient of a scalar gate on each layer's adapter output.

        A layer's gate scales all its adapters at once, so its gradient is the sum of its modules'.

        Args:
            aggregate: ``"layer"`` or ``"module"``.

        Returns:
            The names, and ``(samples, len(names))`` float64. Skipped steps have no rows.

        Raises:
            ValueError: ``aggregate`` is neither, or the collector did not keep them.
        """
        if aggregate not in ("layer", "module"):
            raise ValueError(f"aggregate must be 'layer' or 'module', got {aggregate!r}")
        if self.modules and not self.has_gates:
            raise ValueError(
                f"gate gradients need FisherCollector(keep_gates=True), got {len(self.gates)} rows "
                f"for {self.counts['samples']} samples"
            )
        owners = [layer_of(m) if aggregate == "layer" else m for m in self.modules]
        names = list(dict.fromkeys(owners))
        columns = torch.tensor([names.index(owner) for owner in owners], dtype=torch.int64)
        out = self.gates.new_zeros(len(self.gates), len(names), dtype=torch.float64)
        return names, out.index_add(1, columns.to(out.device), self.gates.double())

    @property
    def has_gates(self) -> bool:
        """Whether every sample's gate gradients were kept."""
        return len(self.gates) == self.counts["samples"]

    def merge(self, other: "FisherRecord") -> "FisherRecord":
        """Return the record of both runs' samples, gate gradients if both kept theirs.

        Raises:
            ValueError: The two were defined differently, or measured other parameters.
        """
        for key in DEFINITION:
            if self.meta.get(key) != other.meta.get(key):
                raise ValueError(
                    f"only scores of one definition can be merged: {key} is "
                    f"{self.meta.get(key)!r} here and {other.meta.get(key)!r} there"
                )
        if self.sizes != other.sizes or self.modules != other.modules:
            raise ValueError("only scores of the same parameters can be merged, got other names")
        gates = torch.cat([self.gates, other.gates.to(self.gates)])
        return FisherRecord(
            {k: v + other.sums[k].to(v) for k, v in self.sums.items()},
            self.sizes,
            {k: v + other.hits[k].to(v) for k, v in self.hits.items()},
            gates if self.has_gates and other.has_gates else gates[:0],
            self.modules,
            {k: self.counts[k] + other.counts[k] for k in COUNTS},
            self.meta,
        )

    def save(self, path: str | Path) -> None:
        """Write the record to one safetensors file, under a temporary name and then renamed.

        Args:
            path: File to write or replace.

        Raises:
            ImportError: safetensors is not installed.
        """
        save_file = _safetensors().save_file
        path = Path(path)
        tensors = {f"sum:{k}": v for k, v in self.sums.items()}
        tensors |= {f"hits:{k}": v for k, v in self.hits.items()} | {"gates": self.gates}
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        header = {
            "format": FORMAT, "meta": self.meta, "counts": self.counts,
            "sizes": self.sizes, "modules": self.modules,
        }  # fmt: skip
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata={"fisher": json.dumps(header)})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> "FisherRecord":
        """Read a record that :meth:`save` wrote.

        Args:
            path: File to read.

        Raises:
            ValueError: The file is no record, or of another format.
            ImportError: safetensors is not installed.
        """
        safe_open = _safetensors("").safe_open
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("fisher", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} must be a Fisher record, got: {error}") from error
        if not isinstance(header, Mapping) or header.get("format") != FORMAT:
            raise ValueError(f"{path} must be a Fisher record of format {FORMAT}, got {header!r}")
        try:
            return cls(
                {k[4:]: v for k, v in tensors.items() if k.startswith("sum:")},
                dict(header["sizes"]),
                {k[5:]: v for k, v in tensors.items() if k.startswith("hits:")},
                tensors["gates"],
                list(header["modules"]),
                dict(header["counts"]),
                dict(header["meta"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must be a whole Fisher record, {error} is wrong") from error


def module_of(parameter: str) -> str:
    """Return the module that owns ``module.parameter``; the router belongs to its layer."""
    return parameter.rpartition(".")[0]


def _safetensors(part: str = ".torch") -> Any:
    try:
        import importlib

        return importlib.import_module(f"safetensors{part}")
    except ImportError as error:
        raise ImportError(
            "saving scores needs safetensors: pip install floe-kernels[transformers]"
        ) from error
