"""Plain LoRA in and out: checkpoints become experts, and experts become checkpoints."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from floe_kernels import functional
from floe_kernels.integrations.apply import adapted_modules
from floe_kernels.integrations.peft import FusedMoELoRAConfig, peft_layers
from floe_kernels.integrations.peft_layer import Experts, as_lora
from floe_kernels.nn import FusedMoELoRA
from floe_kernels.nn.fused_moe_lora import is_conv1d

try:
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key
    from safetensors.torch import load_file, save_file
except ImportError as error:
    raise ImportError("LoRA checkpoints need peft: pip install floe-kernels[peft]") from error

Folder = str | os.PathLike[str]
LoRA = dict[str, tuple[Tensor, Tensor]]  # module name -> lora_A (r, I), lora_B (O, r) of scaling 1

_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)\.weight")
# what changes the function of a checkpoint beyond scaling * B A x
_VARIANTS = ("use_dora", "use_qalora", "target_parameters", "layer_replication", "arrow_config")
_MOVED_BASES = ("pissa", "olora", "corda", "loftq")


def read_lora(folder: Folder) -> LoRA:
    """Read a LoRA checkpoint of PEFT's, its scaling multiplied into lora_B.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        Module name -> lora_A ``(r, I)`` and lora_B ``(O, r)``.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: It is no plain LoRA of linear layers: DoRA, trained biases, an initialisation
            that changes the base (PiSSA and its kin), or ``target_parameters``, whose lora_B packs
            experts innermost and would be read as something else. Or a file is damaged.
    """
    folder = Path(folder)
    config, tensors = _read_files(folder)
    odd = [name for name in _VARIANTS if config.get(name)]
    bias = config.get("bias", "none")
    odd += [f"bias={bias}"] * (bias != "none")
    start = str(config.get("init_lora_weights", ""))
    odd += [f"init_lora_weights={start}"] * start.lower().startswith(_MOVED_BASES)
    if config.get("peft_type") != "LORA" or odd:
        got = ", ".join(odd) or config.get("peft_type")
        raise ValueError(f"an expert must be a plain LoRA, got {got} in {folder}")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise ValueError(f"an expert must hold lora_A and lora_B of linears only, got {key!r}")
        halves.setdefault(match[1], {})[match[2]] = tensor
    found: LoRA = {}
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, Mapping):
        raise ValueError(f"alpha_pattern in {folder} must be an object, got {alphas!r}")
    for name, half in halves.items():
        if set(half) != {"A", "B"} or len(half["A"]) != half["B"].shape[1]:
            raise ValueError(f"lora_A and lora_B of {name!r} in {folder} must fit, they do not")
        rank = len(half["A"])
        alpha = alphas.get(get_pattern_key(alphas, name), config.get("lora_alpha"))
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not rank:
            raise ValueError(
                f"lora_alpha and rank of {name!r} in {folder} must be numbers, the rank above 0, "
                f"got {alpha!r} and {rank}"
            )
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        found[name] = half["A"], half["B"] * scaling
    return found


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings and the tensors of a checkpoint that may be anybody's."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, it is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be a JSON object, got {config!r}")
    path = folder / "adapter_model.safetensors"
    try:
        return config, load_file(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # the library has one error type, and it is not exported
        raise ValueError(f"{path} must be a safetensors file, it is damaged: {error}") from error


def config_from_lora(folders: Sequence[Folder], **options: Any) -> FusedMoELoRAConfig:
    """Describe a mixture whose experts are existing LoRA checkpoints, one expert each.

    Args:
        folders: The checkpoints, all of the same modules of the same base; ranks may differ.
        options: Further fields of :class:`FusedMoELoRAConfig`: ``top_k``, ``task_type``.

    Returns:
        A config for ``get_peft_model``; then call :func:`load_lora_experts`.

    Raises:
        ValueError: No folder, or they adapt different modules.
    """
    experts = [read_lora(folder) for folder in folders]
    if not experts or any(set(e) != set(experts[0]) for e in experts):
        raise ValueError("a mixture needs LoRA checkpoints of the same modules, got others")
    ranks = {name: [len(expert[name][0]) for expert in experts] for name in experts[0]}
    targets = "|".join(re.escape(name) for name in ranks)
    return FusedMoELoRAConfig(
        target_modules=targets, rank_pattern=ranks, num_experts=len(experts), **options
    )


def load_lora_experts(
    model: nn.Module, folders: Sequence[Folder], *, adapter_name: str = "default"
) -> None:
    """Copy LoRA checkpoints into a model's experts, in order; routers stay as they are.

    Each expert then computes what its LoRA computed, to rounding. Nothing is written unless all
    fits.

    Args:
        model: What ``get_peft_model`` or :func:`floe_kernels.apply_plan` made.
        folders: One checkpoint per expert.
        adapter_name: Which of a PEFT model's adapters.

    Raises:
        ValueError: Modules, numbers of experts or ranks differ, or the experts share one A.
    """
    layers = named_experts(model, adapter_name)
    experts = [read_lora(folder) for folder in folders]
    for folder, expert in zip(folders, experts, strict=True):
        if odd := sorted(set(expert) ^ set(layers)):
            raise ValueError(
                f"a checkpoint must adapt the model's adapted modules, {odd[0]!r} is not in both "
                f"{folder} and the model"
            )
    for name, layer in layers.items():
        ranks = tuple(len(expert[name][0]) for expert in experts)
        if layer.shared_A or layer.ranks != ranks:
            own = "one shared A" if layer.shared_A else f"experts of ranks {list(layer.ranks)}"
            raise ValueError(f"{name!r} must have experts of ranks {list(ranks)}, it has {own}")
        for lora_A, lora_B in (expert[name] for expert in experts):
            if lora_A.shape[1] != layer.in_features or len(lora_B) != layer.out_features:
                raise ValueError(f"a LoRA of {name!r} must have the sizes of the linear")
    for name, layer in layers.items():
        lora_A = torch.cat([expert[name][0] for expert in experts])
        lora_B = torch.cat([expert[name][1].T for expert in experts])
        with torch.no_grad():
            layer.lora_A.copy_(lora_A)
            layer.lora_B.copy_(lora_B.to(layer.scaling.device) / layer.scaling[:, None])


def export_lora(
    model: nn.Module,
    folder: Folder,
    *,
    expert: int | None = None,
    gates: Mapping[str, Sequence[float] | Tensor] | None = None,
    adapter_name: str = "default",
) -> None:
    """Write one expert, or a mixture under fixed gates, as a plain LoRA that PEFT loads.

    Args:
        model: What ``get_peft_model`` or :func:`floe_kernels.apply_plan` made.
        folder: Made if it is not there.
        expert: Its number: its LoRA alone, as if its gate were 1.
        gates: Or: module name -> E numbers, as :func:`mean_gates` measures them. An approximation,
            of the experts' summed rank.
        adapter_name: Which of a PEFT model's adapters.

    Raises:
        ValueError: Neither or both of ``expert`` and ``gates``; a number is out of range; a module
            lacks gates; or nothing is left to write.
    """
    if (expert is None) == (gates is None):
        raise ValueError("export one expert or a mixture under gates, got neither or both")
    layers, tensors, ranks = named_experts(model, adapter_name), {}, {}
    for name, layer in layers.items():
        if expert is not None:
            if not 0 <= expert < len(layer.ranks):
                rule = f"expert must be in 0..E-1 = 0..{len(layer.ranks) - 1}"
                raise ValueError(f"{rule} for {name!r}, got {expert}")
            fixed: Any = [float(e == expert) for e in range(len(layer.ranks))]
        elif gates is None or name not in gates:
            raise ValueError(f"every adapted module needs gates, got none for {name!r}")
        else:
            fixed = gates[name]
        lora_A, lora_B = as_lora(layer, fixed)
        if len(lora_A):
            ranks[name] = len(lora_A)
            tensors[f"base_model.model.{name}.lora_A.weight"] = lora_A.cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = lora_B.cpu().contiguous()
    if not ranks:
        raise ValueError("a LoRA must adapt something, got experts of rank 0 or gates of 0 only")
    most = max(ranks.values())
    fewer = {re.escape(name): rank for name, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=fewer,
        alpha_pattern=dict(fewer),
        target_modules="|".join(re.escape(name) for name in ranks),
        fan_in_fan_out=all(is_conv1d(layers[name].base_layer) for name in ranks),
        base_model_name_or_path=getattr(getattr(model, "config", None), "_name_or_path", None),
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(tensors, Path(folder, "adapter_model.safetensors"), metadata={"format": "pt"})


def mean_gates(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Measure every module's gates, averaged over the tokens that are not padding.

    Args:
        model: What ``get_peft_model`` or :func:`floe_kernels.apply_plan` made; is called without
            gradients, in the mode it is in.
        batches: Keyword arguments of the model, one mapping a call.
        adapter_name: Which of a PEFT model's adapters; it must be active.

    Returns:
        Module name -> ``(E,)`` float32; zeros where no token came.
    """
    layers = named_experts(model, adapter_name)
    sums = {name: torch.zeros(len(layer.ranks)) for name, layer in layers.items()}
    tokens = dict.fromkeys(layers, 0)

    def watch(name: str, layer: FusedMoELoRA) -> Any:
        def add(*_: Any) -> None:
            if layer.routing is None:
                return
            logits, experts, mask = layer.routing
            gates = functional.topk_softmax(logits, layer.top_k).gates.float()
            if mask is not None:
                gates, experts = gates[mask], experts[mask]
            sums[name].index_add_(0, experts.reshape(-1).cpu(), gates.reshape(-1).cpu())
            tokens[name] += len(gates)

        return layer.register_forward_hook(add)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / max(1, tokens[name]) for name, total in sums.items()}


def named_experts(model: nn.Module, adapter_name: str) -> dict[str, FusedMoELoRA]:
    """Return a model's mixtures, by the names that their linears have in the base model.

    Raises:
        ValueError: There are none.
    """
    found: dict[str, FusedMoELoRA] = {
        name: layer.experts(adapter_name)
        for name, layer in peft_layers(model, adapter_name).items()
    }
    for name, layer in adapted_modules(model).items():
        if not isinstance(layer, Experts) and layer.ranks:
            found[name] = layer
    if not found:
        raise ValueError(f"a model must carry experts, got none under {adapter_name!r}")
    return found
