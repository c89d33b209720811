"""transformers' ``Trainer`` and everything built on it (TRL's ``SFTTrainer``): one callback."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from floe_kernels import functional
from floe_kernels.integrations.adapter import save_adapter
from floe_kernels.integrations.apply import applied
from floe_kernels.integrations.wrapped import is_sharded, model_of
from floe_kernels.nn import FusedMoELoRA, LayerRouting

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(
        "a Trainer's callback needs transformers: pip install floe-kernels[transformers]"
    ) from error

_ADAPTER = ("lora_A", "lora_B", "router.weight", "scaling")


class AuxLossScale:
    """Keep the auxiliary losses of a model's layers in step with how its own loss is scaled.

    The gradient of the auxiliary losses is born inside a layer's backward, so whatever a training
    loop does to its loss must be done to their coefficients too: division by the steps of gradient
    accumulation, multiplication by the scale of a ``GradScaler``. Nothing is read back from the
    device.

    Args:
        model: A model with :class:`~floe_kernels.FusedMoELoRA` layers.
        load_balance_coef: Coefficient for all layers; None leaves every layer its own.
        z_loss_coef: Likewise, of the router z-loss.

    Raises:
        ValueError: The model has no adapted layer.

    Example:
        >>> layer = FusedMoELoRA(nn.Linear(8, 8), ranks=[4, 4], load_balance_coef=0.5)
        >>> scale = AuxLossScale(layer)
        >>> scale.set(steps=4)
        >>> layer.aux_coefs.tolist()
        [0.125, 0.0]
        >>> scale.reset()
        >>> layer.aux_coefs.tolist()
        [0.5, 0.0]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        load_balance_coef: float | None = None,
        z_loss_coef: float | None = None,
    ) -> None:
        self.layers = routed_layers(model)
        if not self.layers:
            raise ValueError(
                "a model must carry adapted layers with experts, got none: "
                "call apply_plan or get_peft_model first"
            )
        for layer in self.layers.values():
            layer.set_aux_loss(load_balance_coef, z_loss_coef)
        self.coefs = {name: layer.aux_coefs.clone() for name, layer in self.layers.items()}

    def set(self, *, steps: int = 1, scaler: Any = None) -> None:
        """Scale the coefficients for the forward passes of the next optimiser step.

        Args:
            steps: Backward passes whose gradients that step adds up.
            scaler: The ``torch.amp.GradScaler`` that multiplies the loss, or None.
        """
        for name, layer in self.layers.items():
            coefs = self.coefs[name].to(layer.aux_coefs.device)
            layer.aux_coefs.copy_((coefs if scaler is None else scaler.scale(coefs)) / steps)

    def reset(self) -> None:
        """Put the coefficients back as they were."""
        self.set()

    def figures(self, *, per_layer: bool = False, reduce: bool = False) -> dict[str, float]:
        """Read what the last forward pass routed.

        Args:
            per_layer: Give the entropy and every expert's load of each layer as well.
            reduce: Average over all processes of the default group, which must all call this.

        Returns:
            ``aux_loss``, summed over layers, times their unscaled coefficients;
            ``router_entropy``, averaged over layers, in units of log E (1 is uniform, 0 certain);
            ``expert_load_max``, any expert's largest share times E (1 is balanced). Empty before
            any forward pass.
        """
        routed = {name: layer.routing for name, layer in self.layers.items()}
        rows = {name: self._row(name, routing) for name, routing in routed.items() if routing}
        if not rows:
            return {}
        device = next(iter(rows.values())).device
        flat = torch.cat([row.to(device) for row in rows.values()])
        if reduce and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat)
            flat /= torch.distributed.get_world_size()
        sizes = [len(row) for row in rows.values()]
        numbers = dict(zip(rows, (part.tolist() for part in torch.split(flat, sizes)), strict=True))
        figures = {
            "aux_loss": sum(row[0] for row in numbers.values()),
            "router_entropy": sum(row[1] for row in numbers.values()) / len(numbers),
            "expert_load_max": max(max(row[2:]) * len(row[2:]) for row in numbers.values()),
        }
        for name, (_loss, entropy, *loads) in numbers.items() if per_layer else ():
            figures[f"router_entropy/{name}"] = entropy
            figures.update({f"expert_load/{name}/{e}": load for e, load in enumerate(loads)})
        return figures

    def _row(self, name: str, routing: LayerRouting) -> Tensor:
        """Return one layer's loss, entropy and expert loads, ``(2 + E,)``."""
        logits, experts, mask = routing
        coefs = self.coefs[name].to(logits.device, logits.dtype)
        balance = functional.load_balance_loss(logits, experts, token_mask=mask)
        z = functional.router_z_loss(logits, token_mask=mask)
        loss = coefs[0] * balance + coefs[1] * z
        load = self.layers[name].expert_load().to(logits.dtype)
        return torch.cat([torch.stack([loss, _entropy(logits, mask)]), load])


class MoELoRACallback(TrainerCallback):
    """Train adapted layers under transformers' ``Trainer``.

    It sets the auxiliary losses, whose gradient the layers add by themselves, and keeps it right
    under gradient accumulation (the short last step of an epoch too) and under the GradScaler of
    ``fp16``; it adds ``aux_loss``, ``router_entropy`` and ``expert_load_max`` to every training
    record in ``state.log_history``; and where :func:`apply_plan` put the adapters, it leaves the
    frozen base out of Trainer's checkpoints and writes ``adapter.safetensors`` and
    ``adapter.json`` into each. ``trainer.train(resume_from_checkpoint=...)`` takes these up again:
    on a CPU, training then ends in the very numbers of an undisturbed run.

    The base is left out from when the Trainer is made to when its training ends. Under FSDP2 the
    processes gather the adapter for its two files; FSDP1, which flattens parameters, is not
    supported. A dataset that does not know its length has full accumulation steps only. Under
    ``torch_compile`` with gradient checkpointing see :class:`~floe_kernels.FusedMoELoRA`'s
    ``record_routing``.

    Args:
        load_balance_coef: Coefficient of the load balancing loss for all layers; None leaves every
            layer its own.
        z_loss_coef: Likewise, of the router z-loss.
        per_layer: Log entropy and expert loads of every layer, too.
        leave_base_out: Whether checkpoints omit the base's weights, which do not change.

    Example:
        >>> MoELoRACallback(load_balance_coef=0.01).coefs
        {'load_balance_coef': 0.01, 'z_loss_coef': None}
    """

    def __init__(
        self,
        load_balance_coef: float | None = None,
        z_loss_coef: float | None = None,
        *,
        per_layer: bool = False,
        leave_base_out: bool = True,
    ) -> None:
        self.coefs = {"load_balance_coef": load_balance_coef, "z_loss_coef": z_loss_coef}
        self.per_layer, self.leave_base_out = per_layer, leave_base_out
        self.scale: AuxLossScale | None = None
        self._ignored: tuple[Any, Any] | None = None  # (model, what it ignored on save before)

    def add_to(self, trainer: Any) -> "MoELoRACallback":
        """Go ahead of a Trainer's other callbacks, so that progress bars and loggers see all.

        With ``Trainer(callbacks=[...])`` the figures reach ``log_history`` only, because Trainer
        calls its reporters first.

        Args:
            trainer: A ``Trainer``.

        Returns:
            This callback.
        """
        trainer.callback_handler.callbacks.insert(0, self)
        self._leave_out(trainer.model)
        return self

    def on_init_end(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        """Leave the base out of checkpoints."""
        self._leave_out(event.get("model"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        """Set the auxiliary losses."""
        self._leave_out(event["model"])
        if self.scale is not None:  # a training that broke off left its scale behind
            self.scale.reset()
        self.scale = AuxLossScale(event["model"], **self.coefs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        """Scale the auxiliary losses as Trainer is about to scale the loss."""
        if self.scale is not None:
            steps = accumulation(args, state.global_step, event.get("train_dataloader"))
            self.scale.set(steps=steps, scaler=getattr(event.get("optimizer"), "scaler", None))

    def on_log(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        """Add the figures of the last forward pass to a training record."""
        logs = event.get("logs") or {}
        if self.scale is not None and "loss" in logs:
            figures = self.scale.figures(per_layer=self.per_layer, reduce=True)
            logs.update(figures)
            if state.log_history:
                state.log_history[-1].update(figures)

    def on_save(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        """Write the adapter's own two files into the checkpoint."""
        model = event["model"]
        ours = state.is_world_process_zero or is_sharded(model)  # then all processes gather it
        if ours and applied(model) is not None:
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            save_adapter(model, folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        """Put everything back as it was."""
        if self.scale is not None:
            self.scale.reset()
        if self._ignored is not None:
            model, before = self._ignored
            model._keys_to_ignore_on_save = before
            self._ignored = None

    def _leave_out(self, model: Any) -> None:
        if not self.leave_base_out or self._ignored is not None or model is None:
            return
        inner: Any = model_of(model)
        if applied(inner) is None or not hasattr(inner, "_keys_to_ignore_on_save"):
            return  # PEFT leaves the base out by itself
        adapters = {f"{name}.{part}" for name in routed_layers(inner) for part in _ADAPTER}
        self._ignored = inner, inner._keys_to_ignore_on_save
        inner._keys_to_ignore_on_save = set(inner.state_dict()) - adapters


def routed_layers(model: nn.Module) -> dict[str, FusedMoELoRA]:
    """Return a model's layers that have experts, by name, whoever put them there."""
    modules = model_of(model).named_modules()
    return {name: m for name, m in modules if isinstance(m, FusedMoELoRA) and m.ranks}


def accumulation(args: Any, step: int, dataloader: Any) -> int:
    """Return over how many forward passes Trainer spreads optimiser step 0, 1, ..."""
    full: int = args.gradient_accumulation_steps
    try:
        passes = len(dataloader)
    except TypeError:
        return full
    steps = max(1, -(-passes // full))
    last = passes % full or full
    return last if step % steps == steps - 1 else full


def _entropy(logits: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        logits = logits[mask]
    experts = logits.shape[-1]
    if experts < 2 or not len(logits):
        return logits.new_zeros(())
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean() / torch.tensor(experts).log()
