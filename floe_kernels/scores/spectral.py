"""The weight spectrum as a score: AlphaLoRA (arXiv 2410.10054). No data, no gradient."""

import contextlib
import ctypes
import hashlib
import json
import math
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from floe_kernels._types import ModuleSpec
from floe_kernels.functional.spectrum import METHODS, gram_eigenvalues, hill_alpha
from floe_kernels.scores.eigen_threads import EigenThreads
from floe_kernels.scores.names import in_block, layer_of

FORMAT, VERSION = "floe_kernels.spectrum", 1  # raise the version when the numbers change
HASHED_AT_ONCE = 2**24  # bytes


def spectral(
    model: nn.Module,
    *,
    modules: Mapping[str, ModuleSpec] | Sequence[str] | None = None,
    method: str = "median",
    aggregate: str = "layer",
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, float]:
    r"""Score every linear by the power-law exponent of its weight's spectrum.

    .. math:: s_\ell = \frac{1}{|\ell|} \sum_{W \in \ell} \alpha\big(\lambda(W^\top W)\big)

    AlphaLoRA's score (arXiv 2410.10054), the mean of :func:`floe_kernels.functional.hill_alpha`
    over a block's linears; high means little trained, so more experts. Depends on the base weights
    alone: an adapter's wrapper is looked through to its ``base_layer``, and one result serves every
    task. The exponent also moves with the shape of a matrix, so compare blocks of equal shapes
    rather than the matrices of one. Weights of any floating point dtype are widened to float64 a
    slice at a time, on their own device. On a CPU that others keep busy the eigenvalues are found
    with one thread, where more would wait for each other.

    Args:
        model: Any model; it is only read.
        modules: Linears to score: their names, or names with their layers. None means every
            ``nn.Linear`` and ``Conv1D`` inside a numbered block.
        method: ``"median"``, ``"fix_finger"`` or ``"fix_finger_compat"``, see ``hill_alpha``.
        aggregate: ``"layer"`` (block, the mean over its linears) or ``"module"``.
        cache: Folder that keeps the exponents by the SHA-256 of the weight. Made when missing,
            safe to share and to delete; an entry that cannot be read is computed again, and a
            folder that cannot be written to is warned about once.
        progress: Called with linears done, linears in all and the name of the last one.

    Returns:
        Layer or module name to exponent, in model order (in that of ``modules``, when given).

    Raises:
        ValueError: An unknown choice or name, no linear at all, or a weight without a tail to
            measure: not a dense floating point matrix, not finite, or of fewer than 3 positive
            and 2 different eigenvalues. The sentence names the module.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
        >>> {name: round(alpha, 1) for name, alpha in spectral(model).items()}
        {'0': 2.2, '1': 2.2, '2': 2.1}
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if aggregate not in ("layer", "module"):
        raise ValueError(f"aggregate must be 'layer' or 'module', got {aggregate!r}")
    weights, layers = _linears(model, modules)
    stored = None if cache is None else _Cache(Path(cache))
    scores = {}
    threads = EigenThreads()
    for done, (name, weight) in enumerate(weights.items(), start=1):
        try:
            scores[name] = _alpha(weight, method, stored, threads)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if progress is not None:
            progress(done, len(weights), name)
    if aggregate == "module":
        return scores
    members: dict[str, list[float]] = {}
    for name, alpha in scores.items():
        members.setdefault(layers[name], []).append(alpha)
    return {layer: math.fsum(alphas) / len(alphas) for layer, alphas in members.items()}


def _linears(
    model: nn.Module, modules: Mapping[str, ModuleSpec] | Sequence[str] | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weight and the layer of every linear to score."""
    if isinstance(modules, str):
        raise ValueError(f"modules must be a list of names, got the one string {modules!r}")
    found: dict[str, nn.Module] = {}
    if modules is None:
        found = {name: leaf for name, leaf in _walk(model, "", set()) if in_block(name)}
        if not found:
            raise ValueError(
                "the model must have an nn.Linear or Conv1D inside a numbered block, "
                f"got {type(model).__name__} with none: name its linears through modules"
            )
    elif not modules:
        raise ValueError("modules must name at least one linear, got none")
    for name in modules or ():
        try:
            found[name] = _unwrap(model.get_submodule(name))
        except AttributeError as error:
            raise ValueError(
                f"modules must be names of the model's modules, got {name!r}"
            ) from error
    layers = {
        name: modules[name].layer if isinstance(modules, Mapping) else layer_of(name)
        for name in found
    }
    return {name: _weight(name, leaf) for name, leaf in found.items()}, layers


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yield every linear once, a wrapped one under its wrapper's name, no part of an adapter."""
    leaf = _unwrap(module)
    if id(leaf) in seen:
        return
    seen.add(id(leaf))
    if isinstance(leaf, nn.Linear) or type(leaf).__name__ == "Conv1D":
        yield name, leaf
    elif leaf is module:
        for child, inner in module.named_children():
            yield from _walk(inner, f"{name}.{child}" if name else child, seen)


def _unwrap(module: nn.Module) -> nn.Module:
    # what FusedMoELoRA and PEFT's layers have in common
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def _weight(name: str, module: nn.Module) -> Tensor:
    held: Any = getattr(module, "weight", None)
    if not isinstance(held, Tensor):
        raise ValueError(f"{name}: a module must have a weight, got {type(module).__name__}")
    weight: Tensor = held.detach()
    # a subclass may hold codes, or one process's share, and its bytes are not its numbers
    wrong = None
    if type(weight) is not Tensor:
        wrong = type(weight).__name__
    elif weight.layout != torch.strided:
        wrong = str(weight.layout)
    elif weight.is_meta:
        wrong = "one on the meta device"
    if wrong is not None:
        raise ValueError(
            f"{name}: the weight must be a dense tensor in memory, got {wrong}: "
            "load, gather or dequantise it first"
        )
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"{name}: the weight must be a floating point matrix, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    return weight


def _alpha(weight: Tensor, method: str, stored: "_Cache | None", threads: EigenThreads) -> float:
    key = "" if stored is None else weight_hash(weight)
    if stored is not None and (known := stored.read(key).get(method)) is not None:
        return known
    with threads.used():
        alpha = float(hill_alpha(gram_eigenvalues(weight), method=method))
    if not math.isfinite(alpha):
        raise ValueError("the weight's spectrum has no tail, its upper eigenvalues are all equal")
    if stored is not None:
        stored.write(key, {**stored.read(key), method: alpha})
    return alpha


def weight_hash(weight: Tensor) -> str:
    """Return the SHA-256 of a weight's dtype, shape and bytes, whatever its strides and device."""
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)} ".encode())
    step = max(1, HASHED_AT_ONCE // max(1, weight.shape[1] * weight.element_size()))
    for begin in range(0, len(weight), step):
        data = weight[begin : begin + step].detach().cpu().contiguous()
        # torch gives its bytes to nobody but NumPy, which is not among our dependencies
        digest.update((ctypes.c_char * data.nbytes).from_address(data.data_ptr()))
    return digest.hexdigest()


class _Cache:
    """A folder with one JSON file a weight; whatever is wrong with it costs time, not the run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warned = False

    def read(self, key: str) -> dict[str, float]:
        """Return the exponents of one weight by method; empty where there is no sound entry."""
        try:
            entry = json.loads(self._path(key).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(entry, dict):
            return {}
        alphas = entry.get("alpha")
        same = [entry.get(name) for name in ("format", "version", "weight")]
        if same != [FORMAT, VERSION, key] or not isinstance(alphas, dict):
            return {}
        return {
            method: alpha
            for method, alpha in alphas.items()
            if method in METHODS and type(alpha) is float and 1 < alpha < math.inf
        }

    def write(self, key: str, alphas: dict[str, float]) -> None:
        """Put an entry in place whole: a temporary name first, then the rename."""
        entry = {"format": FORMAT, "version": VERSION, "weight": key, "alpha": alphas}
        target = self._path(key)
        temporary = target.with_name(f".{key}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
                temporary.replace(target)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
        except OSError as error:
            if not self.warned:
                self.warned = True
                warnings.warn(
                    f"the spectra are not kept: cannot write to {self.folder} ({error})",
                    RuntimeWarning,
                    stacklevel=4,
                )

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"
