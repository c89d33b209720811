"""Named shapes and random inputs of every operation, shared by tests and benchmarks.

Dims: T tokens, I inputs, O outputs, E experts, K experts kept per token, R packed columns.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: The least distance between the last logit kept and the first one dropped. Wider than the
#: rounding of bf16 logits of size 3, so that every right implementation keeps the same experts.
LOGIT_GAP = 0.02


@dataclass(frozen=True)
class MoELoRACase:
    """One frozen linear with its experts, and a batch of tokens for it."""

    name: str
    tokens: int
    inputs: int
    outputs: int
    ranks: tuple[int, ...]
    top_k: int = 2
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype | None = None  #: None means ``dtype``
    shared_A: bool = False
    routing: str = "even"  #: "even", "zipf" (expert e asked for 1/(e+1)) or "hot" (nearly all to 0)
    samples: int = 1  #: sequences the tokens belong to, for per-sample squares
    tags: frozenset[str] = frozenset()
    source: str = ""  #: where the shape is published

    @property
    def experts(self) -> int:
        """E."""
        return len(self.ranks)

    @property
    def columns(self) -> int:
        """R."""
        return sum(self.ranks)

    @property
    def renormalize(self) -> bool:
        """Whether the kept gates sum to 1: the layer's own rule."""
        return self.top_k > 1

    @property
    def equal_rank(self) -> int | None:
        """The rank of every expert, or None where ranks differ."""
        return self.ranks[0] if len(set(self.ranks)) == 1 else None


class MoELoRAInputs(NamedTuple):
    """Random tensors for one case; leaves of no graph yet."""

    case: MoELoRACase
    x: Tensor  #: ``(T, I)``
    grad_out: Tensor  #: ``(T, O)``
    weight: Tensor  #: ``(O, I)``
    lora_A: Tensor  #: ``(R, I)``, or ``(r, I)`` with a shared A
    lora_B: Tensor  #: ``(R, O)``
    router_weight: Tensor  #: ``(E, I)``
    scaling: Tensor  #: ``(R,)`` float32


def moe_lora_inputs(
    case: MoELoRACase, device: str | torch.device = "cpu", seed: int = 0
) -> MoELoRAInputs:
    """Draw inputs of unit scale in which no token's choice of experts is a close call.

    Tokens whose K-th and next logit lie closer than :data:`LOGIT_GAP` are drawn again: which of
    two equal experts wins depends on the order of a sum, and would be counted as an error.

    Args:
        case: What to draw.
        device: Where; the numbers come from that device's generator.
        seed: Of the generator.

    Returns:
        The tensors. lora_B is random, not zero as at initialisation, so that lora_A has a gradient.

    Raises:
        ValueError: The case's routing has no such name.

    Example:
        >>> case = MoELoRACase("tiny", 5, 8, 6, (2, 2), dtype=torch.float32)
        >>> moe_lora_inputs(case).grad_out.shape
        torch.Size([5, 6])
    """
    generator = torch.Generator(device).manual_seed(seed)
    adapter_dtype = case.adapter_dtype or case.dtype

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        numbers = torch.randn(*shape, generator=generator, device=device)
        return numbers.mul_(scale).to(dtype)

    fan_in = case.inputs**-0.5
    rows_A = case.ranks[0] if case.shared_A else case.columns
    # one shared direction in x, which the router's rows weigh differently, skews the routing
    direction = torch.randn(case.inputs, generator=generator, device=device)
    direction *= 2.0 / direction.norm()
    router = torch.randn(case.experts, case.inputs, generator=generator, device=device) * fan_in
    bias = torch.zeros(case.experts, device=device)
    if case.routing == "zipf":
        bias = -torch.arange(1, case.experts + 1, device=device).float().log()
    elif case.routing == "hot":
        bias[0] = 8.0
    elif case.routing != "even":
        raise ValueError(f"routing must be 'even', 'zipf' or 'hot', got {case.routing!r}")
    router = router - (router @ direction)[:, None] * direction / 4 + bias[:, None] * direction / 4
    router_weight = router.to(adapter_dtype)

    x = (torch.randn(case.tokens, case.inputs, generator=generator, device=device) + direction).to(
        case.dtype
    )
    read = router_weight.to(case.dtype).float()
    rows = torch.arange(case.tokens, device=device)
    for _ in range(100 if case.top_k < case.experts else 0):
        best = (x[rows].float() @ read.T).topk(case.top_k + 1).values
        rows = rows[best[:, -2] - best[:, -1] < LOGIT_GAP]
        if len(rows) == 0:
            break
        again = torch.randn(len(rows), case.inputs, generator=generator, device=device)
        x[rows] = (again + direction).to(case.dtype)

    return MoELoRAInputs(
        case,
        x,
        draw(case.tokens, case.outputs),
        draw(case.outputs, case.inputs, scale=fan_in),
        draw(rows_A, case.inputs, scale=fan_in, dtype=adapter_dtype),
        draw(case.columns, case.outputs, scale=0.1, dtype=adapter_dtype),
        router_weight,
        torch.tensor([16.0 / r for r in case.ranks for _ in range(r)], device=device),
    )


def sample_offsets(case: MoELoRACase, device: str | torch.device = "cpu") -> Tensor:
    """Return the first row of each sample and the end of the last, ``(samples + 1,)`` int64."""
    bounds = [round(case.tokens * i / case.samples) for i in range(case.samples + 1)]
    return torch.tensor(bounds, device=device)


LLAMA2_7B = "Llama-2-7B, arXiv 2307.09288"
LLAMA_1B = "Llama-3.2-1B"
LLAMA_8B = "Llama-3.1-8B, arXiv 2407.21783"
MISTRAL_7B = "Mistral-7B, arXiv 2310.06825"


def _case(
    name: str,
    inputs: int,
    outputs: int,
    experts: int,
    rank: int,
    tags: str,
    source: str = "",
    tokens: int = 2048,
    **rest: object,
) -> MoELoRACase:
    return MoELoRACase(
        name,
        tokens,
        inputs,
        outputs,
        (rank,) * experts,
        tags=frozenset(tags.split()),
        source=source,
        **rest,  # type: ignore[arg-type]
    )


def _both_dtypes(cases: list[MoELoRACase]) -> list[MoELoRACase]:
    named = [
        dataclasses.replace(case, name=f"{case.name}-{label}", dtype=dtype)
        for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"))
        for case in cases
    ]
    return named


PUBLISHED = [
    _case("mola-q", 4096, 4096, 8, 8, "published", f"MoLA (arXiv 2402.08562) on {LLAMA2_7B}"),
    _case("mola-down", 11008, 4096, 8, 8, "published", f"MoLA (arXiv 2402.08562) on {LLAMA2_7B}"),
    _case(
        "mixlora-up", 4096, 11008, 8, 16, "published", f"MixLoRA (arXiv 2404.15159) on {LLAMA2_7B}"
    ),
    _case(
        "hydralora-q", 4096, 4096, 3, 8, "published shared",
        f"HydraLoRA (arXiv 2404.19245) on {LLAMA2_7B}", top_k=3, shared_A=True,
    ),
    _case("llama1b-q", 2048, 2048, 8, 16, "published", LLAMA_1B),
    _case("llama1b-kv", 2048, 512, 8, 16, "published", LLAMA_1B),
    _case("llama1b-gate", 2048, 8192, 8, 16, "published", LLAMA_1B),
    _case("llama1b-down", 8192, 2048, 8, 16, "published", LLAMA_1B),
    _case("llama8b-q", 4096, 4096, 8, 16, "published", LLAMA_8B),
    _case("llama8b-gate", 4096, 14336, 8, 16, "published", LLAMA_8B),
    _case("llama8b-down", 14336, 4096, 8, 16, "published", LLAMA_8B),
    _case("mistral-kv", 4096, 1024, 8, 16, "published", MISTRAL_7B),
    _case("smollm-q", 576, 576, 4, 8, "published", "SmolLM2-135M, arXiv 2502.02737"),
]  # fmt: skip
SKEWED = [
    _case("hot-expert", 1024, 1024, 8, 16, "skew", routing="hot"),
    _case("zipf", 1024, 1024, 8, 16, "skew", routing="zipf"),
    _case("hot-large-R", 1024, 1024, 64, 16, "skew", routing="hot"),
    _case("zipf-large-R", 1024, 1024, 64, 16, "skew", routing="zipf"),
]
UNEVEN = [
    dataclasses.replace(
        _case("uneven-ranks", 1024, 1024, 8, 16, "uneven"),
        ranks=(2, 4, 8, 16, 16, 24, 26, 32),
    ),
    dataclasses.replace(
        _case("uneven-with-zero", 1024, 1024, 6, 16, "uneven"), ranks=(0, 4, 64, 8, 3, 49)
    ),
]
#: Speed against T, at one shape.
T_SWEEP = [
    _case(f"T{t}", 1024, 1024, 8, 16, "t-sweep", tokens=t)
    for t in (1, 8, 64, 512, 2048, 8192, 32768)
]
#: Speed against R, at one shape: few experts of large rank, then many of small.
R_SWEEP = [
    _case(f"R{e * r}-E{e}", 1024, 1024, e, r, "r-sweep", tokens=1024)
    for e, r in ((4, 8), (8, 16), (16, 16), (32, 16), (64, 16), (64, 32), (64, 64))
]
#: The shapes the goals for an H100 are stated at.
GOALS = [
    _case("goal-4096", 4096, 4096, 8, 16, "goal", tokens=8192),
    _case("goal-1024", 1024, 1024, 8, 16, "goal", tokens=8192),
    _case("goal-grouped", 4096, 4096, 64, 64, "goal", tokens=8192),
]
#: float32 adapters on bf16 activations: what PEFT makes by default.
MIXED = [
    _case("fp32-adapter", 1024, 1024, 8, 16, "mixed", adapter_dtype=torch.float32),
]


def moe_lora_cases() -> list[MoELoRACase]:
    """Return every case of the layer, names unique."""
    both = _both_dtypes([*PUBLISHED, *SKEWED, *UNEVEN, *T_SWEEP, *R_SWEEP])
    return [*both, *GOALS, *MIXED]


def _fisher(
    name: str,
    experts: int,
    rank: int,
    samples: int,
    length: int,
    tags: str = "",
    width: int = 1024,
    **rest: object,
) -> list[MoELoRACase]:
    return [
        dataclasses.replace(
            _case(name, width, width, experts, rank, tags, tokens=samples * length, **rest),  # type: ignore[arg-type]
            name=f"{name}-{label}",
            samples=samples,
            dtype=dtype,
        )
        for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"))
    ]


def fisher_cases() -> list[MoELoRACase]:
    """Return every case of the per-sample squares: a layer, and samples of equal length.

    ``dense-*`` has one expert that every token takes, which is plain LoRA: there the peers that
    hook into linear layers see whole samples, and are right.
    """
    lists = [
        _fisher("dense-r16-len512", 1, 16, 8, 512, "dense", top_k=1),
        _fisher("dense-r64-len128", 1, 64, 16, 128, "dense", top_k=1),
        _fisher("routed-r16-len512", 8, 16, 8, 512, "routed"),
        _fisher("routed-r16-len128", 8, 16, 16, 128, "routed"),
        _fisher("routed-r64-len128", 8, 64, 16, 128, "routed"),
        _fisher("routed-r16-len32", 8, 16, 64, 32, "routed"),
        _fisher("routed-r16-len8", 8, 16, 128, 8, "routed"),
    ]
    return list(itertools.chain.from_iterable(lists))


@dataclass(frozen=True)
class GradSquareCase:
    """One linear map's output gradient and input, cut into samples."""

    name: str
    tokens: int
    inputs: int  #: D, columns of the weight
    columns: int  #: R, rows of the weight
    samples: int
    dtype: torch.dtype = torch.bfloat16
    ragged: bool = False  #: samples of unequal length, the first one empty
    tags: frozenset[str] = frozenset()


class GradSquareInputs(NamedTuple):
    """Random tensors for one case."""

    case: GradSquareCase
    g: Tensor  #: ``(T, R)``
    x: Tensor  #: ``(T, D)``
    offsets: Tensor  #: ``(samples + 1,)`` int64


def grad_square_inputs(
    case: GradSquareCase, device: str | torch.device = "cpu", seed: int = 0
) -> GradSquareInputs:
    """Draw inputs of unit scale.

    Args:
        case: What to draw.
        device: Where; the numbers come from that device's generator.
        seed: Of the generator.

    Returns:
        The tensors.

    Example:
        >>> case = GradSquareCase("tiny", 10, 8, 2, 3, ragged=True)
        >>> grad_square_inputs(case).offsets
        tensor([ 0,  0,  4, 10])
    """
    generator = torch.Generator(device).manual_seed(seed)
    g, x = (
        torch.randn(case.tokens, width, generator=generator, device=device).to(case.dtype)
        for width in (case.columns, case.inputs)
    )
    power = 2 if case.ragged else 1  # lengths that grow from sample to sample
    bounds = [int(case.tokens * (i / case.samples) ** power) for i in range(case.samples + 1)]
    bounds[1] = 0 if case.ragged else bounds[1]
    bounds[-1] = case.tokens
    return GradSquareInputs(case, g, x, torch.tensor(bounds, device=device))


def grad_square_cases() -> list[GradSquareCase]:
    """Return every case of the fused weight gradient and square."""
    cases = [
        GradSquareCase(
            f"r{rank}-len{length}-{label}",
            8192,
            2048,
            rank,
            8192 // length,
            dtype,
        )
        for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"))
        for rank in (16, 64)
        for length in (512, 128, 32, 8)
    ]
    ragged = dataclasses.replace(cases[0], name="r16-ragged-bf16", samples=100, ragged=True)
    wide = dataclasses.replace(cases[1], name="r128-len128-bf16", columns=128)
    return [*cases, ragged, wide]
