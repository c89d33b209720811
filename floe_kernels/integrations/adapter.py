"""Saving a model's adapters, and putting them back on the model they were trained on."""

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from floe_kernels.allocation.plan import Plan
from floe_kernels.integrations import adapter_file
from floe_kernels.integrations.adapter_file import DOCUMENT
from floe_kernels.integrations.apply import (
    Applied,
    adapted_modules,
    applied,
    check_fit,
    place,
    remove_adapters,
)
from floe_kernels.integrations.fingerprint import fingerprint
from floe_kernels.integrations.processes import once
from floe_kernels.integrations.wrapped import is_sharded, is_tuned, model_of, overwrite, whole

_PARTS = ("lora_A", "lora_B", "router.weight", "scaling")


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a model's adapters to ``adapter.safetensors`` and ``adapter.json`` in a folder.

    Every value is written as it is, in its dtype: lora_A, lora_B, router and scaling of every
    adapted module. Both files are written whole under temporary names before either is renamed,
    so a full disk or a kill leaves an older adapter as it was. Of a model that FSDP2 shards, every
    process must call this: they gather the values, and the first one writes. Otherwise call it in
    one process.

    Args:
        model: A model that :func:`apply_plan` changed; ``torch.compile`` or DDP may have wrapped
            it since.
        folder: Made if it is not there.

    Raises:
        ImportError: safetensors is not installed.
        OSError: The file system refused.
        ValueError: The model carries no plan.

    Example:
        >>> import tempfile
        >>> from floe_kernels.allocation.plan import Placement
        >>> from floe_kernels.integrations.apply import apply_plan
        >>> from floe_kernels.integrations.targets import find_modules
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        >>> plan = Plan({"1": Placement((4,))}, "by hand", modules=find_modules(model))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(apply_plan(model, plan), folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['adapter.json', 'adapter.safetensors']
    """
    state, base = applied(model), model_of(model)
    if state is None:
        peft = any(is_tuned(module) for module in base.modules())
        instead = "PEFT's are saved by save_pretrained" if peft else "call apply_plan first"
        raise ValueError(f"a model must carry a plan's adapters to save them: {instead}")
    tensors = {name: whole(t).cpu().contiguous() for name, t in _adapter(base).items()}
    data: bytes = _safetensors().save(tensors)
    document: dict[str, Any] = {
        "format": adapter_file.FORMAT,
        "version": adapter_file.VERSION,
        "package_version": _package_version(),
        "base_model": getattr(getattr(base, "config", None), "_name_or_path", "")
        or state.plan.base_model,
        "fingerprint": fingerprint(base),
        "plan": json.loads(state.plan.to_json()),
        "size": len(data),
        "tensors": adapter_file.table(data),
    }
    document["sha256"] = adapter_file.seal(document)
    text = json.dumps(document, indent=1)
    files = {adapter_file.TENSORS: data, DOCUMENT: text.encode()}

    def write() -> None:
        adapter_file.write(Path(folder), files)

    if is_sharded(base):
        once(write)
    else:
        write()


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, check_base: bool = True
) -> nn.Module:
    """Put a saved adapter on the model that it was trained on, in place.

    Everything is checked before the model is touched. A model without adapters gets the saved plan
    first; one that carries an equal plan has its values overwritten. Values arrive bit for bit, in
    the dtype in which they were saved. A model that FSDP2 shards must carry the plan already, in
    that dtype, and every process must call this.

    Args:
        model: The base model, adapted or not.
        folder: What :func:`save_adapter` wrote.
        check_base: Whether the model's :func:`fingerprint` must be that of the adapter's base.
            False allows a copy of the same base that was rounded or quantised since; sizes and
            names must fit all the same.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ImportError: safetensors is not installed.
        ValueError: A file is cut off, edited, or of an unknown version, the base is another model,
            or the model carries another plan; the sentence says which.

    Example:
        >>> load_adapter(nn.Linear(2, 2), "nowhere")
        Traceback (most recent call last):
        ...
        FileNotFoundError: an adapter folder must hold adapter.json, nowhere does not
    """
    folder = Path(folder)
    document = adapter_file.read_document(folder)
    try:
        plan = Plan.from_json(json.dumps(document["plan"]))
    except ValueError as error:
        raise ValueError(f"{folder / DOCUMENT}: {error}") from error
    base = model_of(model)
    if check_base and (ours := fingerprint(base)) != document["fingerprint"]:
        name = getattr(getattr(base, "config", None), "_name_or_path", "") or type(base).__name__
        raise ValueError(
            f"an adapter must be loaded onto its own base: it was trained on "
            f"{document['base_model'] or 'a model'} (fingerprint {document['fingerprint'][:12]}), "
            f"got {name} (fingerprint {ours[:12]}); check_base=False allows a rounded copy of it"
        )
    present = adapted_modules(base)
    if present or applied(base) is not None:
        _check_equal_plan(applied(base), plan)
    placed = check_fit(base, plan)
    data = adapter_file.read_tensors(folder, document, _shapes(plan, placed))
    tensors: dict[str, Tensor] = _safetensors().load(data)
    _check_dtypes(folder, placed, tensors)
    if is_sharded(base):
        _check_sharded(base, tensors)
    if not present:
        place(model, plan)
    try:
        _overwrite(base, tensors)
    except BaseException:
        if not present:
            remove_adapters(model)
        raise
    return model


def _adapter(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of all adapted modules by the names that they have on disk."""
    return {
        f"{name}.{part}": layer.router.weight if part == "router.weight" else getattr(layer, part)
        for name, layer in adapted_modules(model).items()
        for part in _PARTS
    }


def _overwrite(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = _adapter(model)
    moved = {name: tensors[name].to(tensor.device) for name, tensor in own.items()}
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.dtype == moved[name].dtype:
                overwrite(tensor, moved[name])
            else:
                tensor.data = moved[name]


def _check_sharded(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in _adapter(model).items():
        if tensor.dtype != tensors[name].dtype:
            raise ValueError(
                "a sharded model must have its adapter's dtype to load it, got "
                f"{tensor.dtype} for {name!r}, saved in {tensors[name].dtype}: load it first"
            )


def _check_equal_plan(state: Applied | None, plan: Plan) -> None:
    parts = ("placements", "lora_alpha", "lora_dropout", "shared_A", "use_rslora")
    for part in parts:
        if state is None or _kept(getattr(state.plan, part)) != _kept(getattr(plan, part)):
            raise ValueError(
                "a model that carries adapters must carry the saved plan to load its values, "
                f"got another one ({part} differ): call remove_adapters(model) first"
            )


def _check_dtypes(folder: Path, names: Iterable[str], tensors: dict[str, Tensor]) -> None:
    for name in names:
        *shared, scaling = [tensors[f"{name}.{part}"].dtype for part in _PARTS]
        if len(set(shared)) > 1 or scaling != torch.float32:
            raise ValueError(
                f"{folder}: lora_A, lora_B and router of {name!r} must share one dtype and its "
                f"scaling be float32, got {', '.join(map(str, shared))} and {scaling}"
            )


def _kept(value: Any) -> Any:
    """Leave out placements without experts, which place nothing."""
    if isinstance(value, dict):
        return {name: placement for name, placement in value.items() if placement.experts}
    return value


def _shapes(plan: Plan, names: Iterable[str]) -> dict[str, list[int]]:
    """Return the shape of every tensor of the plan's adapter."""
    shapes = {}
    for name in names:
        ranks, spec = plan.placements[name].ranks, plan.modules[name]
        total = sum(ranks)
        sizes = (
            [ranks[0] if plan.shared_A else total, spec.in_features],
            [total, spec.out_features],
            [len(ranks), spec.in_features],
            [total],
        )
        shapes.update({f"{name}.{part}": size for part, size in zip(_PARTS, sizes, strict=True)})
    return shapes


def _package_version() -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("floe-kernels")
    return ""


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "adapter files need safetensors: pip install floe-kernels[transformers]"
        ) from error
    return safetensors.torch
