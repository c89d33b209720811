"""python -m benchmarks.end_to_end: a training step of a Llama-shaped model, several adapters.

Sizes by flag, random weights, next-token loss on random tokens, AdamW. Every variant starts from
the same base weights with lora_B = 0, so all must give the same loss, which is checked first.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import memory, records, report
from benchmarks.registry import Step
from benchmarks.spread import Spread, ratio, seconds
from benchmarks.timing import interleave
from floe_kernels import FusedMoELoRA

#: What times are divided by: one LoRA with as many columns as all experts together.
BASE = "PEFT LoRA, equal columns"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoopedExperts(nn.Module):
    """MoLA's layer as published: softmax, top-k, and a Python loop over experts."""

    def __init__(self, base: nn.Linear, ranks: list[int], top_k: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        options: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": dtype}
        self.router = nn.Linear(base.in_features, len(ranks), **options)
        self.A = nn.ModuleList(nn.Linear(base.in_features, r, **options) for r in ranks)
        self.B = nn.ModuleList(nn.Linear(r, base.out_features, **options) for r in ranks)
        for layer in self.B:
            nn.init.zeros_(layer.get_parameter("weight"))
        self.scales, self.top_k = [16.0 / r for r in ranks], top_k

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        flat, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        tokens = flat.to(self.router.weight.dtype)
        values, experts = self.router(tokens).float().topk(self.top_k, dim=-1)
        gates = values.softmax(-1)
        for e, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            token, slot = torch.where(experts == e)
            delta = B(A(tokens[token])) * gates[token, slot, None] * self.scales[e]
            out = out.index_add(0, token, delta.to(out.dtype))
        return out.view(y.shape)


def base_model(options: argparse.Namespace) -> nn.Module:
    """Return the model, frozen; the same random weights at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=options.layers, num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads, vocab_size=options.vocab,
        max_position_embeddings=options.length, use_cache=False,
    )  # fmt: skip
    with torch.device(options.device):
        model = LlamaForCausalLM(config)
    return model.to(getattr(torch, options.dtype)).requires_grad_(False)  # type: ignore[no-any-return]


def replace(
    model: nn.Module, keep: Callable[[int], bool], make: Callable[[Any], nn.Module]
) -> nn.Module:
    """Put an adapter on every target linear of the layers that ``keep`` names."""
    for index, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
        for parent in (layer.self_attn, layer.mlp) if keep(index) else ():
            for name in TARGETS:
                if hasattr(parent, name):
                    setattr(parent, name, make(getattr(parent, name)))
    return model


def variants(options: argparse.Namespace) -> dict[str, Callable[[], nn.Module]]:
    """Return how to make each model. A quarter of the layers is every fourth, from the second."""
    quarter = {i for i in range(options.layers) if i % 4 == min(1, options.layers - 1)}
    ranks, dtype = [options.rank] * options.experts, getattr(torch, options.adapter_dtype)

    def peft() -> nn.Module:
        from peft import LoraConfig, get_peft_model

        # as many columns as all experts together
        config = LoraConfig(r=sum(ranks), lora_alpha=16, target_modules=list(TARGETS))
        return get_peft_model(base_model(options), config).to(options.device)  # type: ignore[no-any-return]

    def looped() -> nn.Module:
        make = lambda linear: LoopedExperts(linear, ranks, options.top_k, dtype)  # noqa: E731
        return replace(base_model(options), lambda _: True, make)

    def fused(keep: Callable[[int], bool]) -> nn.Module:
        make = lambda linear: FusedMoELoRA(linear, ranks, options.top_k, dtype=dtype)  # noqa: E731
        return replace(base_model(options), keep, make)

    return {
        BASE: peft,
        "MoLA's loop": looped,
        "ours, all layers": lambda: fused(lambda _: True),
        "ours, a quarter of the layers": lambda: fused(quarter.__contains__),
    }


class TrainingStep(Step):
    """Loss, backward, optimiser; the next of several batches each time."""

    def __init__(self, model: nn.Module, batches: list[Tensor]) -> None:
        self.model, self.batches, self.count = model.train(), batches, 0
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)

    def forward(self) -> Tensor:
        batch = self.batches[self.count % len(self.batches)]
        self.count += 1
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def backward(self, out: Tensor) -> None:
        out.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--hidden", type=int, default=576)
    add("--intermediate", type=int, default=1536)
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=9)
    add("--kv-heads", type=int, default=3)
    add("--vocab", type=int, default=8192)
    add("--batch", type=int, default=2)
    add("--length", type=int, default=256)
    add("--experts", type=int, default=8)
    add("--rank", type=int, default=8)
    add("--top-k", type=int, default=2)
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add("--adapter-dtype", default="float32", choices=("bfloat16", "float32"))
    add("--threads", type=int, default=2)
    add("--seconds", type=float, default=40.0)
    add("--out", type=Path)
    return parser.parse_args(argv)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Return the sizes, as a record's case."""
    sizes = {
        k: v for k, v in vars(options).items() if k not in ("out", "threads", "seconds", "device")
    }
    name = (
        f"llama-{options.layers}x{options.hidden}-T{options.batch * options.length}-{options.dtype}"
    )
    return {"name": name, **sizes}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every variant and return its record."""
    shape = (options.batch, options.length)
    batches = [torch.randint(options.vocab, shape, device=options.device) for _ in range(4)]
    steps: dict[str, TrainingStep] = {}
    losses, extras, why = {}, {}, {}
    for name, make in variants(options).items():
        try:
            step = TrainingStep(make(), batches)
        except ImportError as missing:
            why[name] = str(missing).splitlines()[0]
            continue
        losses[name] = step.forward().item()
        step.count = 0
        step.backward(step.forward())  # allocates the optimiser's state
        extras[name] = {
            "trained_parameters": sum(p.numel() for p in step.trained),
            "peak_bytes": memory.peak_bytes(step, options.device),
        }
        steps[name] = step
    reference = losses["ours, all layers"]
    timed = interleave(
        {n: [s] for n, s in steps.items()}, "fwdbwd", options.device, options.seconds, (5, 200)
    )
    base = timed.get(BASE)
    lines = []
    for name in variants(options):
        line: dict[str, Any] = {"op": "training_step", "mode": "step", "case": describe(options)}
        role = "base" if name == BASE else "ours" if name.startswith("ours") else "peer"
        line |= {"provider": name, "role": role}
        line |= {"status": "unavailable", "why": why.get(name, "")}
        if name in timed:
            error = abs(losses[name] - reference) / abs(reference)
            tolerance = 2 * torch.finfo(getattr(torch, options.dtype)).eps
            spread = seconds(timed[name])
            tokens = options.batch * options.length
            line |= {"status": "ok" if error <= tolerance else "wrong", "error": error}
            line |= {"rounds": len(timed[name]), "quiet_rounds": sum(s.quiet for s in timed[name])}
            line |= {"ms": [1e3 * s for s in spread], **extras[name]}
            line |= {"tokens_per_second": [tokens / s for s in spread]}
            line |= {"over_base": list(ratio(timed[name], base))} if base else {}
        lines.append(records.complete(line, options.device))
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Return the table of one run."""
    header = (
        "variant",
        "loss error",
        "tokens/s (20 to 80 %)",
        "time / PEFT LoRA",
        "peak MB",
        "trained",
    )
    rows = []
    for line in lines:
        if line["status"] == "unavailable":
            rows.append([line["provider"], "", f"cannot run: {line['why']}", "", "", ""])
            continue
        fast = Spread(*line["tokens_per_second"])
        rate = f"{fast.median:.0f} ({fast.high:.0f} to {fast.low:.0f})"
        wrong = "WRONG " * (line["status"] == "wrong")
        rows.append([
            line["provider"],
            f"{wrong}{line['error']:.1e}",
            rate,
            report.with_spread(line.get("over_base")),
            report.size(line["peak_bytes"]),
            f"{line['trained_parameters'] / 1e6:.2f} M",
        ])  # fmt: skip
    case, where = lines[0]["case"], f"{lines[0]['machine']}, {lines[0].get('threads', 1)} threads"
    return f"### training step, {case['name']}; {where}\n\n{report.markdown(header, rows)}\n"


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    lines = run(options)
    print(table(lines))
    print(f"({time.perf_counter() - start:.0f} s)\n", flush=True)
    if options.out:
        records.append(options.out, lines)


if __name__ == "__main__":
    main()
