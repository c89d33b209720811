"""A PEFT tuner: ``get_peft_model``, ``save_pretrained``, named adapters and all that follows.

PEFT's ``PeftType`` is a closed enumeration. Of the two ways around that, ``register`` extends it,
once, when this module is imported; ``LoraConfig._register_custom_module`` would not do, because
what it registers is not saved: ranks, top_k and auxiliary losses have no place in a
``LoraConfig``, and ``PeftModel.from_pretrained`` would rebuild a plain LoRA. With a type of our
own, ``adapter_config.json`` holds the whole description and PEFT's saving, loading, switching and
deleting work as they are, routers included. Its price: **import this module before**
``PeftModel.from_pretrained`` reads such an adapter.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from floe_kernels.allocation.plan import Plan
from floe_kernels.integrations.batch_hook import BatchHook
from floe_kernels.integrations.peft_layer import FusedMoELoRALayer
from floe_kernels.integrations.targets import DEFAULT_TARGETS
from floe_kernels.nn import BatchContext

try:
    from peft import PeftConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import register_peft_method
    from peft.utils.other import get_pattern_key
except ImportError as error:
    raise ImportError("PEFT's tuner needs peft: pip install floe-kernels[peft]") from error

TYPE = "FUSED_MOE_LORA"


@dataclass
class FusedMoELoRAConfig(PeftConfig):
    """What :class:`~floe_kernels.FusedMoELoRA` needs to know, in PEFT's terms.

    Args:
        target_modules: As in ``LoraConfig``; None means the architecture's default.
        exclude_modules: As in ``LoraConfig``.
        layers_to_transform: As in ``LoraConfig``.
        layers_pattern: As in ``LoraConfig``.
        modules_to_save: As in ``LoraConfig``.
        num_experts: Experts per module.
        r: Rank of every expert.
        rank_pattern: Module name, or its end as a regular expression -> the ranks of its experts,
            where they differ from ``num_experts`` times ``r``.
        top_k: Experts kept per token; None means 2, or all of them with ``shared_A``.
        top_k_pattern: Likewise where it differs.
        lora_alpha: Column scaling is ``lora_alpha / rank``.
        lora_dropout: Dropout probability on the input of lora_A.
        shared_A: One A for all experts (arXiv 2404.19245).
        use_rslora: Scale by ``lora_alpha / sqrt(rank)``.
        load_balance_coef: Coefficient of the load balancing loss.
        z_loss_coef: Coefficient of the router z-loss.
        init_weights: Whether a new adapter changes nothing yet; False draws lora_B at random, too.

    Example:
        >>> FusedMoELoRAConfig(num_experts=4, r=8).peft_type
        <PeftType.FUSED_MOE_LORA: 'FUSED_MOE_LORA'>
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    num_experts: int = 8
    r: int = 8
    rank_pattern: dict[str, list[int]] = field(default_factory=dict)
    top_k: int | None = None
    top_k_pattern: dict[str, int] = field(default_factory=dict)
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    shared_A: bool = False
    use_rslora: bool = False
    load_balance_coef: float = 0.0
    z_loss_coef: float = 0.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[TYPE]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))

    @classmethod
    def from_plan(cls, plan: Plan, **options: Any) -> "FusedMoELoRAConfig":
        """Describe a plan's experts.

        Args:
            plan: Where the experts go.
            options: Further fields: ``task_type``, ``load_balance_coef``.

        Returns:
            A config that places the very same experts.

        Example:
            >>> from floe_kernels._types import ModuleSpec
            >>> from floe_kernels.allocation.plan import Placement
            >>> modules = {"h.0.q": ModuleSpec(8, 8, "h.0")}
            >>> plan = Plan({"h.0.q": Placement((4, 2), 1)}, "by hand", modules=modules)
            >>> FusedMoELoRAConfig.from_plan(plan).rank_pattern
            {'h.0.q': [4, 2]}
        """
        placed = {name: p for name, p in plan.placements.items() if p.experts}
        return cls(
            # a regular expression, because a list would also match whatever ends in a name
            target_modules="|".join(re.escape(name) for name in placed),
            rank_pattern={name: list(p.ranks) for name, p in placed.items()},
            top_k_pattern={n: p.top_k for n, p in placed.items() if p.top_k is not None},
            lora_alpha=plan.lora_alpha,
            lora_dropout=plan.lora_dropout,
            shared_A=plan.shared_A,
            use_rslora=plan.use_rslora,
            **options,
        )

    def options(self, name: str) -> dict[str, Any]:
        """Return the arguments of :class:`~floe_kernels.FusedMoELoRA` for one module.

        Args:
            name: The module's name.

        Returns:
            Keyword arguments.
        """
        shared = ("lora_alpha", "lora_dropout", "shared_A", "use_rslora")
        coefs = ("load_balance_coef", "z_loss_coef")
        return {
            "ranks": _of(self.rank_pattern, name, [self.r] * self.num_experts),
            "top_k": _of(self.top_k_pattern, name, self.top_k),
            **{key: getattr(self, key) for key in (*shared, *coefs)},
        }


class FusedMoELoRAModel(BaseTuner):
    """What ``get_peft_model`` makes of a model and a :class:`FusedMoELoRAConfig`.

    Padding reaches the layers as under :func:`floe_kernels.apply_plan`. Adapters are float32 on a
    bfloat16 or float16 base, too, unless ``autocast_adapter_dtype`` is False. Several active
    adapters add up, each with its own router. ``merge_adapter`` and ``merge_and_unload`` are
    refused unless :func:`set_merge_gates` stated gates, or there is one expert.
    """

    prefix = "floe_"
    tuner_layer_cls = FusedMoELoRALayer
    target_module_mapping = {kind: list(names) for kind, names in DEFAULT_TARGETS.items()}  # noqa: RUF012

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        # called once, whatever adapters come later
        self._batch = BatchContext()
        self._batch_handles = BatchHook(model, self._batch).install(model)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_further: Any,
    ) -> None:
        options = peft_config.options(current_key)
        how = {
            "init_weights": peft_config.init_weights,
            "inference_mode": peft_config.inference_mode,
        }
        if isinstance(target, FusedMoELoRALayer):
            target.update_layer(adapter_name, options, **how)
            return
        try:
            layer = FusedMoELoRALayer(target, self._batch).train(target.training)
        except TypeError as error:
            raise ValueError(f"target module {current_key!r} is not supported: {error}") from error
        layer.update_layer(adapter_name, options, **how)
        self._replace_module(parent, target_name, layer, target)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        for handle in self._batch_handles:
            handle.remove()
        return model


def set_merge_gates(
    model: nn.Module,
    gates: Mapping[str, Sequence[float] | Tensor] | None,
    *,
    adapter_name: str = "default",
) -> None:
    r"""State the fixed gates under which PEFT may merge an adapter into the base.

    A routed mixture is not one matrix; with gates :math:`g_e` fixed for all tokens it is
    :math:`W + \sum_e g_e s_e B_e^\top A_e`, an approximation whose quality you should measure.

    Args:
        model: What ``get_peft_model`` returned.
        gates: Module name -> E numbers, for every adapted module, as
            :func:`floe_kernels.integrations.peft_lora.mean_gates` measures them; None means 1 / E.
        adapter_name: Which adapter.

    Raises:
        ValueError: A module lacks gates, or they are not E finite numbers.
    """
    layers, stated = peft_layers(model, adapter_name), {}
    for name, layer in layers.items():
        size = len(layer.experts(adapter_name).ranks)
        if gates is not None and name not in gates:
            raise ValueError(f"every adapted module needs gates to merge, got none for {name!r}")
        given = torch.full((size,), 1 / size) if gates is None else torch.as_tensor(gates[name])
        if given.shape != (size,) or not given.isfinite().all():
            raise ValueError(f"gates of {name!r} must be {size} finite numbers, got {given}")
        stated[name] = given.detach().clone()
    for name, layer in layers.items():
        layer.merge_gates[adapter_name] = stated[name]


def peft_layers(model: nn.Module, adapter_name: str) -> dict[str, FusedMoELoRALayer]:
    """Return the layers that have this adapter, by the names they have in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, FusedMoELoRALayer) and adapter_name in module.floe_experts
    }


def register() -> None:
    """Make PEFT know the tuner; done when this module is imported, harmless to repeat.

    Raises:
        ImportError: This version of PEFT keeps its types in another way.
    """
    types: Any = PeftType
    if TYPE not in types.__members__:
        member: Any = str.__new__(types, TYPE)
        member._name_ = member._value_ = TYPE
        type.__setattr__(types, TYPE, member)
        types._member_names_.append(TYPE)
        types._member_map_[TYPE] = types._value2member_map_[TYPE] = member
    try:
        known = types(TYPE) is types[TYPE] is getattr(types, TYPE)
        if types[TYPE] not in PEFT_TYPE_TO_CONFIG_MAPPING:
            register_peft_method(
                name=TYPE.lower(),
                config_cls=FusedMoELoRAConfig,
                model_cls=FusedMoELoRAModel,
                prefix=FusedMoELoRAModel.prefix,
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ImportError(f"this version of PEFT takes no further type: {error}") from error
    if not known:
        raise ImportError("this version of PEFT takes no further type: it does not keep it")


def _of(pattern: dict[str, Any], name: str, default: Any) -> Any:
    return pattern.get(name, pattern.get(get_pattern_key(pattern, name), default))


register()
