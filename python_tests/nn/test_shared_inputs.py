"""Layers computed together against the same layers alone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import floe_kernels as fk
from floe_kernels.functional.shared_inputs import ExpertLinear, moe_lora_shared_linear
from floe_kernels.nn import BatchContext, shared_inputs
from floe_kernels.nn.shared_inputs import NOTHING, SharedInputMoELoRA
from floe_kernels.ops import shared_inputs as ops
from floe_kernels.reference import shared_inputs as reference

ALONE = shared_inputs.ALONE  # before the fixture below empties it


class Attention(nn.Module):
    """Three projections of one x, of every kind of mixture."""

    def __init__(self, **options):
        super().__init__()
        kinds = {
            "q_proj": {"ranks": [2, 3, 1], "load_balance_coef": 0.5},
            "k_proj": {"ranks": [2, 2], "shared_A": True, "z_loss_coef": 0.1},
            "v_proj": {"ranks": [1, 0, 2], "top_k": 1},
        }
        for i, (name, kind) in enumerate(kinds.items()):
            base = nn.Linear(8, 6 + i, bias=i > 0).double()
            layer = fk.FusedMoELoRA(base, **{"dtype": torch.float64, **kind, **options})
            nn.init.normal_(layer.lora_B)
            layer.batch = BatchContext()
            setattr(self, name, layer)
        self.k_proj.batch = self.v_proj.batch = self.q_proj.batch

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1).sin()


@pytest.fixture
def twins(request):
    """The same layers alone and together."""
    alone = Attention(**getattr(request, "param", {}))
    together = copy.deepcopy(alone)
    fk.fuse_shared_inputs(together)
    return alone, together


def x_of(*shape):
    return torch.randn(*shape, 8, dtype=torch.float64)


def run(model, x, call=None):
    """Output, gradients and routing statistics, with one state of the generator for every model."""
    torch.manual_seed(7)
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = (model if call is None else call)(x)
    out.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    loads = [layer.expert_load() for layer in layers(model)]
    losses = [layer.aux_loss() for layer in layers(model)]
    return {"out": out, "x": x.grad, **grads}, loads, losses


def layers(model):
    return [m for m in model.modules() if isinstance(m, fk.FusedMoELoRA)]


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def pending(model):
    return [layer.group.pending for layer in layers(model) if layer.group.pending is not None]


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    monkeypatch.setattr(shared_inputs, "ALONE", frozenset())  # a CPU shares for the tests alone


@pytest.fixture
def calls(monkeypatch):
    """How many linears each call of the shared operator served."""
    served, call = [], ops.call
    monkeypatch.setattr(ops, "call", lambda x, w, *rest: served.append(len(w)) or call(x, w, *rest))
    return served


@pytest.mark.parametrize(
    "twins", [{}, {"lora_dropout": 0.3}, {"ranks": [2, 2], "top_k": 2}], indirect=True, ids=str
)
@pytest.mark.parametrize("train", [False, True])
def test_same_as_alone(twins, train, calls):
    x = x_of(3, 5)
    alone, together = (run(model.train(train), x) for model in twins)
    assert_same(alone, together)
    assert calls == [3]
    assert not pending(twins[1])


def test_padding(twins):
    x = x_of(2, 4)
    for model in twins:
        model.q_proj.batch.token_mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    alone, together = (run(model, x) for model in twins)
    assert_same(alone, together)
    assert torch.equal(twins[1].q_proj.routing.token_mask, twins[0].q_proj.routing.token_mask)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("twins", [{"lora_dropout": 0.3}], indirect=True)
def test_activation_checkpointing(twins, reentrant, calls):
    x = x_of(3, 5)
    alone, together = (
        run(model, x, lambda x, m=model: checkpoint(m, x, use_reentrant=reentrant))
        for model in twins
    )
    assert_same(alone, together)
    assert calls == [3, 3], "once forward, once recomputed"
    assert not pending(twins[1])


@pytest.mark.filterwarnings("ignore:fuse_shared_inputs")
def test_a_recomputation_that_stops_within_the_group_is_forgotten(twins):
    model, x = twins[1], x_of(4)

    def last_is_unused(x):
        out = model.q_proj(x)
        return out + model.k_proj(x)[..., :6]  # and v_proj is never called

    out = checkpoint(last_is_unused, x.clone().requires_grad_(), use_reentrant=False)
    out.sum().backward()
    assert_same(run(twins[0], x), run(model, x))


@pytest.mark.parametrize("train", [False, True])
def test_compiled(twins, train, calls):
    x = x_of(3, 5)
    alone = run(twins[0].train(train), x)
    compiled = torch.compile(twins[1].train(train), backend="aot_eager", fullgraph=True)
    assert_same(alone, run(twins[1], x, compiled))
    assert calls == [3], "traced once"
    assert_same(run(twins[0], x * 2), run(twins[1], x * 2, compiled))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), twins[0](x))


def test_compiled_checkpointing_without_a_graph_break(twins):
    for layer in layers(twins[1]):
        layer.record_routing = False  # no state, hence no sharing either
    x = x_of(3, 5).requires_grad_()
    compiled = torch.compile(
        lambda x: checkpoint(twins[1], x, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x), twins[0](x))


def test_new_input_is_never_given_old_outputs(twins):
    alone, together = twins
    x = x_of(4)
    together.q_proj(x)
    together.k_proj(x)  # v_proj waits
    with torch.no_grad():
        x.mul_(2)
    torch.testing.assert_close(together.v_proj(x), alone.v_proj(x))
    together.q_proj.group.lost = 0
    with torch.no_grad():  # no graph where none is wanted
        assert not together.v_proj(x).requires_grad
        together.q_proj(x)
    together.q_proj.group.lost = 0
    assert together.v_proj(x).requires_grad


def test_a_step_between_two_calls_is_seen(twins):
    alone, together = twins
    x = x_of(4)
    together.q_proj(x)
    for model in twins:
        with torch.no_grad():
            model.k_proj.lora_A.add_(1.0)
    torch.testing.assert_close(together.k_proj(x), alone.k_proj(x))


def test_layers_that_take_different_inputs_are_right_and_warned_of(twins):
    alone, together = twins
    for i in range(2):
        x, y = x_of(3), x_of(3)
        torch.testing.assert_close(together.q_proj(x), alone.q_proj(x))
        if i:
            with pytest.warns(UserWarning, match="outputs are computed that nobody asks for"):
                key = together.k_proj(y)
        else:
            key = together.k_proj(y)
        torch.testing.assert_close(key, alone.k_proj(y))
        torch.testing.assert_close(together.v_proj(y), alone.v_proj(y))
        together.q_proj.group.pending = None


def test_fisher_scores_are_those_of_the_layers_alone(twins, calls):
    def scores(model):
        with fk.FisherCollector(model, loss_reduction="sum") as collector:
            model(x).square().sum().backward()
            collector.step()
        return collector.read(how="mean")

    x = x_of(3, 5)
    alone, together = (scores(model) for model in twins)
    assert alone == together
    assert not calls, "scored one by one"
    twins[1](x)
    assert calls == [3], "and together again afterwards"


def test_an_unused_output_leaves_its_layer_without_gradient(twins):
    for model in twins:
        x = x_of(4)
        model.k_proj(x), model.v_proj(x), model.q_proj(x).sum().backward()
        assert model.q_proj.lora_A.grad is not None
        assert model.v_proj.lora_A.grad is None


def test_second_derivatives_are_refused(twins):
    x = x_of(2).requires_grad_()
    (grad,) = torch.autograd.grad(twins[1](x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="for second derivatives use"):
        grad.sum().backward()


def test_hooked_base_runs_itself(twins, calls):
    seen = []
    for model in twins:
        model.k_proj.base_layer.register_forward_hook(lambda *_: seen.append(1))
    x = x_of(4)
    assert_same(run(twins[0], x), run(twins[1], x))
    assert seen == [1, 1]
    assert not calls


def test_autocast(twins):
    x = x_of(3, 5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = [model.float()(x) for model in twins]
    torch.testing.assert_close(*outs)


def test_copies_and_pickles_share_among_themselves(twins, calls):
    x = x_of(4)
    twins[1].q_proj(x)  # something waits, with a graph
    calls.clear()
    for twin in (copy.deepcopy(twins[1]), pickle.loads(pickle.dumps(twins[1]))):
        torch.testing.assert_close(twin(x), twins[0](x))
        assert twin.q_proj.group.members[0] is twin.q_proj
    assert calls == [3, 3]
    twins[1].k_proj(x), twins[1].v_proj(x)


def test_remove(twins, calls):
    model = copy.deepcopy(twins[0])
    state = set(model.state_dict())
    handle = fk.fuse_shared_inputs(model)
    assert handle.groups == [("q_proj", "k_proj", "v_proj")]
    assert set(model.state_dict()) == state
    with pytest.warns(UserWarning, match="it shares its input already"):
        fk.fuse_shared_inputs(model)
    handle.remove()
    assert not any(isinstance(m, SharedInputMoELoRA) for m in model.modules())
    x = x_of(3)
    assert_same(run(twins[0], x), run(model, x))
    assert not calls


def test_a_cpu_saves_nothing_and_runs_layers_alone(twins, calls, monkeypatch):
    monkeypatch.setattr(shared_inputs, "ALONE", ALONE)
    x = x_of(3)
    assert_same(run(twins[0], x), run(twins[1], x))
    assert not calls


def test_nothing_to_do_is_said_in_a_sentence():
    with pytest.warns(UserWarning, match=NOTHING):
        handle = fk.fuse_shared_inputs(nn.Linear(3, 3))
    assert repr(handle) == NOTHING
    handle.remove()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: setattr(m, "q_proj", nn.Linear(8, 8)), "not Linear"),
        (lambda m: setattr(m, "k_proj", fk.FusedMoELoRA(nn.Linear(8, 4), [])), "no experts"),
        (lambda m: m.v_proj.float(), "dtypes of the base differ: torch.float32, torch.float64"),
        (lambda m: m.v_proj.base_layer.requires_grad_(), "its base runs itself"),
        (lambda m: delattr(m, "v_proj"), "there is no layer v_proj"),
    ],
)
def test_refuses_in_a_sentence(change, says):
    model = Attention()
    change(model)
    with pytest.raises(ValueError, match=says):
        fk.fuse_shared_inputs(model, [["q_proj", "k_proj", "v_proj"]])


def test_cross_attention_is_left_alone():
    model = nn.ModuleDict({"cross_attn": Attention(), "self_attn": Attention()})
    handle = fk.fuse_shared_inputs(model)
    assert handle.groups == [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]
    assert "cross-attention" in handle.refused["cross_attn.q_proj"]


def siblings_of(model):
    return [
        reference.Sibling(
            m.weight, m.bias, m.lora_A, m.lora_B, m.router.weight, m.scaling, m.ranks, m.top_k,
            m.shared_A, m.top_k > 1, p, torch.tensor(i) if p else None, None,
        )
        for i, (m, p) in enumerate(zip(layers(model), (0.0, 0.25, 0.0), strict=True))
    ]  # fmt: skip


def test_reference_in_one_product_is_right():
    model, x = Attention(), x_of(9).requires_grad_()
    siblings = siblings_of(model)
    outs = reference.moe_lora_shared_linear(x, siblings)
    for s, out in zip(siblings, outs, strict=True):
        base = torch.nn.functional.linear(x, s.weight, s.bias)
        rest = (s.lora_A, s.lora_B, s.router_weight, s.scaling, s.ranks, s.top_k, s.shared_A)
        alone = fk.reference.moe_lora(
            x, base, *rest, s.renormalize, None, s.dropout_p, s.dropout_seed
        )
        torch.testing.assert_close(out, alone, rtol=1e-12, atol=1e-12)
    inputs = (x, *(p for s in siblings for p in s[2:5]))
    linears = [ExpertLinear(*s[:5], s.ranks, s.top_k, s.scaling, *s[8:]) for s in siblings]

    def call(*_):
        return tuple(result.out for result in moe_lora_shared_linear(x, linears))

    assert torch.autograd.gradcheck(call, inputs)


def test_registration():
    model, x = Attention(), x_of(5)
    columns = [list(column) for column in zip(*siblings_of(model), strict=True)]
    none = x.new_empty(0)
    for i in (1, 11, 12):
        columns[i] = [none if t is None else t.clone() for t in columns[i]]
    columns[6] = [rank for ranks in columns[6] for rank in ranks]
    args = (x, *columns[:10], torch.arange(5) > 0, *columns[10:])
    torch.library.opcheck(torch.ops.floe.moe_lora_shared_linear.default, args)
    default = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    operator = torch.ops.floe.moe_lora_shared_linear.default
    results = zip(operator(*args), operator.redispatch(default, *args), strict=True)
    for i, (one, other) in enumerate(results):
        if i not in (3, 7, 11):  # z: a kernel may leave out that of experts it need not run
            torch.testing.assert_close(one, other)
