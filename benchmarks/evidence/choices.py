"""The methods by the names that the configuration files use, and the plan that each makes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from benchmarks.evidence import measured, rules
from benchmarks.evidence.config import Key
from benchmarks.evidence.stage import Stage
from floe_kernels.allocation import (
    Plan,
    by_position,
    floe,
    inverted_scores,
    random,
    ranks_by_depth,
    uniform,
)
from floe_kernels.allocation.costs import experts_cost
from floe_kernels.allocation.units import keep_count
from floe_kernels.pipeline.compare import parameters_of
from floe_kernels.pipeline.methods import make_plan, read_method
from floe_kernels.pipeline.scoring import measure
from floe_kernels.scores.fisher import read_variant

FIRST_KEEP = 0.5  # of the layers, before a second scoring
MORE = 4  # times the usual samples


class Choice(NamedTuple):
    """A plan, and the scores it follows, where it follows any."""

    plan: Plan
    scores: dict[str, float]


@dataclass(frozen=True)
class Ask:
    """What a method may look at."""

    stage: Stage
    label: str
    seed: int
    argument: str  #: what follows the colon of the method's name

    @property
    def keywords(self) -> dict[str, Any]:
        """Experts and adapter, as every policy takes them."""
        options = self.stage.options(self.label)
        return {"experts": options.experts, **options.adapter(options.rank)}

    @property
    def keep(self) -> float:
        """Fraction of the layers kept."""
        return self.stage.options(self.label).keep

    @property
    def count(self) -> int:
        """Layers kept."""
        return keep_count(self.keep, len(self.stage.layers))

    def scores(self, variant: str, aggregate: str = "layer") -> dict[str, float]:
        """Score the layers, or the single matrices."""
        return measured.scores(self.stage, self.label, self.seed, variant, aggregate=aggregate)

    def gradients(self) -> list[list[float]]:
        """Return gate gradients, samples by layers."""
        return measured.gradients(self.stage, self.label, self.seed)

    def these(self, chosen: Sequence[str], method: str) -> Plan:
        """Put the usual experts on exactly these layers, or these matrices."""
        layers, modules = self.stage.layers, self.stage.modules
        names = layers if set(chosen) <= set(layers) else list(modules)
        ones = {name: float(name in chosen) for name in names}
        plan = floe(ones, modules, keep=len(chosen) / len(names), refine=False, **self.keywords)
        fields = {name: getattr(plan, name) for name in Plan.__dataclass_fields__}
        return Plan(**{**fields, "method": method})


def choose(stage: Stage, key: Key) -> Choice:
    """Make the plan of a run.

    ======================  ==============================================================
    ``all``                 experts on all layers
    ``floe:VARIANT``        the layers of highest Fisher score; ``floe:gate_refined`` with swaps
    ``matrices:VARIANT``    of highest score in sum, at the parameters of the layers ``floe`` keeps
    ``bottom:VARIANT``      the layers of lowest score
    ``random:N``            draw N, the same layers whatever the seed
    ``random:matrices``     matrices, drawn by the seed, at the parameters of the layers
    ``position:WHERE``      first, middle, last, spaced
    ``definition:WHAT``     floe:init, with a sequence, a token or a batch squared as a sample
    ``rule:NAME``           one of ``RULES``
    ``budget:METHOD``       of ``floe compare``, at one number of parameters; ``random/N``: draw N
    ``rank:A-B``            all layers, of rank A in the lower half and B in the upper
    ``experts:N``           all layers, N experts; 1 is plain LoRA
    ``kinds:A+B``           all layers, but only the linears called A or B
    ======================  ==============================================================

    Args:
        stage: The model, its data and its scores.
        key: Of the run.

    Raises:
        ValueError: There is no such method.
    """
    family, _, argument = key.method.partition(":")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"a method must be of one of {known}, got {key.method!r}")
    plan, scores = FAMILIES[family](Ask(stage, key.dataset, key.seed, argument))
    return Choice(plan, dict(scores))


def _all(ask: Ask) -> Choice:
    return Choice(uniform(ask.stage.modules, **ask.keywords), {})


def _floe(ask: Ask) -> Choice:
    variant = ask.argument.removesuffix("_refined")
    refine = variant != ask.argument
    scores = ask.scores(variant)
    plan = floe(
        scores, ask.stage.modules, keep=ask.keep, refine=refine,
        gradients=ask.gradients() if refine else None, **ask.keywords,
    )  # fmt: skip
    return Choice(plan, scores)


def _matrices_of(ask: Ask) -> Choice:
    scores = ask.scores(ask.argument, "module")
    plan = floe(
        scores, ask.stage.modules, per="module", budget=_prices(ask)[1], unit="parameters",
        **ask.keywords,
    )  # fmt: skip
    return Choice(plan, scores)


def _bottom(ask: Ask) -> Choice:
    scores = ask.scores(ask.argument)
    turned = inverted_scores(scores)
    return Choice(floe(turned, ask.stage.modules, keep=ask.keep, **ask.keywords), scores)


def _random(ask: Ask) -> Choice:
    if ask.argument == "matrices":
        dice = Random(f"matrices {ask.seed}")
        order = {name: dice.random() for name in ask.stage.modules}
        return Choice(ask.these(rules.within(order, *_prices(ask)), "random"), {})
    draw = int(ask.argument)
    return Choice(random(ask.stage.modules, keep=ask.keep, seed=draw, **ask.keywords), {})


def _position(ask: Ask) -> Choice:
    where: Any = ask.argument
    return Choice(by_position(ask.stage.modules, where=where, keep=ask.keep, **ask.keywords), {})


def _definition(ask: Ask) -> Choice:
    if ask.argument not in ("sequence", "token", "batch"):
        raise ValueError(f"a definition must be sequence, token or batch, got {ask.argument!r}")
    kind = "cold" if ask.argument == "sequence" else ask.argument
    found = measured.record(ask.stage, ask.label, ask.seed, kind)
    scores = read_variant(found, "init")
    return Choice(floe(scores, ask.stage.modules, keep=ask.keep, **ask.keywords), scores)


def _rank(ask: Ask) -> Choice:
    ranks = [int(rank) for rank in ask.argument.split("-")]
    config = {f"rank_{g}": r for g, r in enumerate(ranks)} if len(ranks) > 1 else {"rank": ranks[0]}
    options = ask.stage.options(ask.label)
    adapter = options.adapter(ranks_by_depth(config, ask.stage.modules))
    return Choice(uniform(ask.stage.modules, experts=options.experts, **adapter), {})


def _experts(ask: Ask) -> Choice:
    options = ask.stage.options(ask.label)
    adapter = options.adapter(options.rank)
    return Choice(uniform(ask.stage.modules, experts=int(ask.argument), **adapter), {})


def _kinds(ask: Ask) -> Choice:
    called = {name: name.rpartition(".")[2] for name in ask.stage.modules}
    kinds = ask.argument.split("+")
    if unknown := sorted(set(kinds) - set(called.values())):
        raise ValueError(f"kinds must be of {sorted(set(called.values()))}, got {unknown}")
    return Choice(ask.these([n for n, kind in called.items() if kind in kinds], ask.argument), {})


def _budget(ask: Ask) -> Choice:
    title, _, draw = ask.argument.partition("/")
    method = read_method(title)
    with ask.stage.bench(ask.label, f"measured.{ask.seed}", ask.seed) as bench:
        found = measure(bench, method.needs, bench.options.rank) if method.needs else None
        plan = make_plan(
            method, bench.modules, found, bench.options, rank=bench.options.rank,
            seed=int(draw or 0), total=parameters_of(bench.options, bench), unit="parameters",
        )  # fmt: skip
    return Choice(plan, found.scores if found else {})


def _rule(ask: Ask) -> Choice:
    if ask.argument not in RULES:
        raise ValueError(f"a rule must be one of {', '.join(RULES)}, got {ask.argument!r}")
    chosen, scores = RULES[ask.argument](ask)
    return Choice(ask.these(chosen, ask.argument), dict(scores))


Chosen = tuple[Sequence[str], Mapping[str, float]]


def _less_redundant(variant: str) -> Callable[[Ask], Chosen]:
    def rule(ask: Ask) -> Chosen:
        scores = ask.scores(variant)
        return rules.less_redundant(scores, ask.gradients(), ask.count), scores

    return rule


def _most_explained(ask: Ask) -> Chosen:
    scores = ask.scores("gate")
    return rules.most_explained(list(scores), ask.gradients(), ask.count), scores


def _spread_out(ask: Ask) -> Chosen:
    scores = ask.scores("init")
    return rules.spread_out(scores, ask.count), scores


def _spaced_above(ask: Ask) -> Chosen:
    scores = ask.scores("init")
    return rules.spaced_above(scores, ask.count), scores


def _rescored(ask: Ask) -> Chosen:
    """Keep half by the first scores, warm these up alone, and score what is left again."""
    scores = ask.scores("init")
    half = rules.best(scores, keep_count(FIRST_KEEP, len(scores)))
    found = measured.record(ask.stage, ask.label, ask.seed, "warm", layers=half)
    again = read_variant(found, "param_sum")
    kept = rules.best(again, ask.count)
    return kept, scores


def _more_samples(ask: Ask) -> Chosen:
    found = measured.record(ask.stage, ask.label, ask.seed, "cold", times=MORE)
    scores = read_variant(found, "init")
    return rules.best(scores, ask.count), scores


def _matrices(variant: str, price: str) -> Callable[[Ask], Chosen]:
    """Choose matrices by themselves, at no more parameters than the layers would cost."""

    def rule(ask: Ask) -> Chosen:
        scores = ask.scores(variant, "module")
        costs, budget = _prices(ask)
        return rules.within(rules.priced(scores, costs, price), costs, budget), scores

    return rule


def _prices(ask: Ask) -> tuple[dict[str, int], int]:
    """Return what every matrix costs in parameters, and what the layers kept would."""
    options = ask.stage.options(ask.label)
    costs = {
        name: experts_cost([spec], options.experts, unit="parameters", rank=options.rank)
        for name, spec in ask.stage.modules.items()
    }
    layers = by_position(ask.stage.modules, where="first", keep=ask.keep, **ask.keywords)
    return costs, layers.parameters()


RULES: dict[str, Callable[[Ask], Chosen]] = {
    "less_redundant": _less_redundant("init"),
    "less_redundant_gate": _less_redundant("gate"),
    "most_explained": _most_explained,
    "spread_out": _spread_out,
    "spaced_above": _spaced_above,
    "rescored": _rescored,
    "more_samples": _more_samples,
    "matrices": _matrices("init", "score"),
    "matrices_by_cost": _matrices("param_sum", "by_cost"),
    "matrices_by_root": _matrices("param_sum", "by_root"),
}
FAMILIES: dict[str, Callable[[Ask], Choice]] = {
    "all": _all,
    "floe": _floe,
    "matrices": _matrices_of,
    "bottom": _bottom,
    "random": _random,
    "position": _position,
    "definition": _definition,
    "rule": _rule,
    "budget": _budget,
    "rank": _rank,
    "experts": _experts,
    "kinds": _kinds,
}
