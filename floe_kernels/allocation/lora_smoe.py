"""LoRA-SMoE: experts per matrix by its gradient sensitivity over several tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from floe_kernels.allocation.arguments import finite, nearest
from floe_kernels.allocation.budget import allocate_budget
from floe_kernels.allocation.units import Per, PlanOptions, plan_of, unit_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack

    from floe_kernels._types import JSON, ModuleSpec
    from floe_kernels.allocation.costs import Unit
    from floe_kernels.allocation.plan import Plan

Pool = Literal["all", "type"] | Mapping[str, str]
TaskScores = Mapping[str, Mapping[str, float]]


def percentile(values: Sequence[float], q: float) -> float:
    """Interpolate the ``q``-th percentile linearly, as numpy's default does.

    Args:
        values: At least one finite number, in any order.
        q: Percent, 0 to 100.

    Returns:
        The number below which ``q`` percent lie.

    Raises:
        ValueError: There is no value, one is not finite, or ``q`` is out of range.

    Example:
        >>> percentile([4.0, 1.0, 3.0, 2.0], 50)
        2.5
    """
    ordered = sorted(finite(v, "a value") for v in values)
    if not ordered:
        raise ValueError("a percentile must be of at least one value, got none")
    if not 0 <= finite(q, "q") <= 100:
        raise ValueError(f"q must be in 0..100, got {q!r}")
    place = (len(ordered) - 1) * (q / 100)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    below, above, part = ordered[low], ordered[high], place - low
    # numpy steps from the nearer end, which decides a strict comparison with a value at the end
    return above - (above - below) * (1 - part) if part >= 0.5 else below + (above - below) * part


def votes(scores: TaskScores, *, p: float = 60, pool: Pool = "all") -> dict[str, int]:
    r"""Count for every matrix the tasks in which it is among the most sensitive ``p`` percent.

    .. math:: n(W) = \sum_t [\, S_t(W) > \mathrm{percentile}_{100 - p}(S_t) \,]

    The rule of the program released with arXiv 2505.06272. The comparison is strict, so equal
    scores at the threshold all lose; without ties ``n - 1 - floor((100 - p) / 100 (n - 1))`` of n
    matrices win each task.

    Args:
        scores: Task -> matrix name -> finite number; the same matrices in every task.
        p: Percent of the matrices that win a vote, 0 to 100.
        pool: What shares a threshold: ``"all"`` matrices, those of one ``"type"`` (the last part
            of the name: q_proj, up_proj), or a mapping of every name to its pool.

    Returns:
        Matrix name -> votes, from 0 to the number of tasks.

    Raises:
        ValueError: Tasks differ in their matrices, or a number is out of its range.

    Example:
        >>> votes({"a": {"q": 1.0, "k": 2.0, "v": 3.0}, "b": {"q": 9.0, "k": 2.0, "v": 3.0}}, p=50)
        {'q': 1, 'k': 0, 'v': 1}
    """
    names = _names(scores)
    pools: dict[str, list[str]] = {}
    for name in names:
        if isinstance(pool, Mapping) and name not in pool:
            raise ValueError(f"pool must name every matrix, {name!r} is missing")
        if not isinstance(pool, Mapping) and pool not in ("all", "type"):
            raise ValueError(f"pool must be all, type or a mapping of names, got {pool!r}")
        kind = name.rpartition(".")[2] if pool == "type" else ""
        pools.setdefault(pool[name] if isinstance(pool, Mapping) else kind, []).append(name)
    if not 0 <= finite(p, "p") <= 100:
        raise ValueError(f"p must be in 0..100, got {p!r}")
    won = dict.fromkeys(names, 0)
    for by_name in scores.values():
        for group in pools.values():
            threshold = percentile([by_name[name] for name in group], 100 - p)
            for name in group:
                won[name] += by_name[name] > threshold
    return won


def lora_smoe(
    scores: TaskScores,
    modules: Mapping[str, ModuleSpec],
    *,
    p: float = 60,
    pool: Pool = "all",
    total: int | None = None,
    unit: Unit = "experts",
    beta: float = 1.0,
    lo: int = 0,
    hi: int | None = None,
    per: Per = "module",
    **options: Unpack[PlanOptions],
) -> Plan:
    """Give every matrix as many experts as tasks voted for it, or its share of a total.

    By votes (arXiv 2505.06272, no ``total``): ``votes`` is the number of experts; a matrix that no
    task voted for stays untouched. By budget: each task's scores are divided by their sum, so that
    no task outweighs another, averaged, and shared out by ``allocate_budget``.

    Args:
        scores: Task -> module name -> sensitivity, finite and at least 0; one task is legal.
        modules: All adaptable linears, in model order.
        p: Percent of the modules that win a vote in each task.
        pool: What shares a threshold, as in ``votes``.
        total: Experts to share out, or a budget in ``unit``; None votes.
        unit: ``"experts"``, ``"parameters"`` or ``"bytes"`` of optimiser state.
        beta: Exponent of the shares.
        lo: Least experts of each unit, with ``total``.
        hi: Most experts of each unit, with ``total``.
        per: ``"module"`` or ``"layer"`` (module scores are then summed over a layer).
        options: ``rank``, ``top_k``, ``lora_alpha`` and the others of ``PlanOptions``.

    Returns:
        The plan.

    Raises:
        ValueError: A name is unknown or missing, or a number is out of its range.

    Example:
        >>> from floe_kernels._types import ModuleSpec
        >>> model = {"h.0.q": ModuleSpec(8, 8, "h.0"), "h.0.v": ModuleSpec(8, 8, "h.0")}
        >>> plan = lora_smoe({"boolq": {"h.0.q": 1.0, "h.0.v": 3.0}}, model, total=8)
        >>> [placement.experts for placement in plan.placements.values()]
        [2, 6]
    """
    _names(scores)
    by_task = {task: unit_scores(values, modules, per)[1] for task, values in scores.items()}
    for task, values in by_task.items():
        for name, score in values.items():
            finite(score, f"the score of {name!r} in {task!r}", least=0)
    record: dict[str, JSON] = {"scores": {**mean_share(by_task)}, "tasks": list(by_task)}
    if total is None:
        counts = votes(by_task, p=p, pool=pool)
        record["arguments"] = {"p": p, "pool": pool if isinstance(pool, str) else dict(pool)}
    else:
        rank, shared_A = options.get("rank", 8), options.get("shared_A", False)
        counts = allocate_budget(
            mean_share(by_task), modules, total,
            unit=unit, per=per, beta=beta, lo=lo, hi=hi, rank=rank, shared_A=shared_A,
        )  # fmt: skip
        record["arguments"] = {"total": total, "unit": unit, "beta": beta, "lo": lo, "hi": hi}
    return plan_of(counts, modules, per, "lora_smoe", record, options)


def _names(scores: TaskScores) -> list[str]:
    if not scores or not all(isinstance(by_name, Mapping) for by_name in scores.values()):
        raise ValueError("scores must be task -> module name -> number, with at least one task")
    first, *others = scores
    for task in others:
        if odd := set(scores[task]) ^ set(scores[first]):
            name = min(odd)
            raise ValueError(
                f"every task must score the same modules, {first!r} and {task!r} differ in "
                f"{name!r}{nearest(name, scores[first])}"
            )
    return list(scores[first])


def mean_share(by_task: TaskScores) -> dict[str, float]:
    """Return every unit's share of a task's sensitivity, averaged over the tasks.

    Example:
        >>> mean_share({"a": {"q": 1.0, "v": 3.0}, "b": {"q": 10.0, "v": 10.0}})
        {'q': 0.375, 'v': 0.625}
    """
    sums = {task: sum(values.values()) or 1.0 for task, values in by_task.items()}
    return {
        name: sum(by_task[task][name] / sums[task] for task in by_task) / len(by_task)
        for name in next(iter(by_task.values()))
    }
