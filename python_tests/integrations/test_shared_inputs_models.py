"""Models whose siblings are computed together against themselves with every layer alone."""

import copy

import pytest
import torch
from adapting import randomise, tokens

import floe_kernels as fk
from floe_kernels.allocation import uniform
from floe_kernels.integrations.transformers import find_modules
from floe_kernels.nn import shared_inputs
from floe_kernels.ops import shared_inputs as ops
from floe_kernels.testing.models import tiny_model

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    monkeypatch.setattr(shared_inputs, "ALONE", frozenset())  # a CPU shares for the tests alone


@pytest.fixture
def calls(monkeypatch):
    """How many linears each call of the shared operator served."""
    served, call = [], ops.call
    monkeypatch.setattr(ops, "call", lambda x, w, *rest: served.append(len(w)) or call(x, w, *rest))
    return served


def twins(architecture, **options):
    alone = tiny_model(architecture, num_hidden_layers=2).double()
    plan = uniform(find_modules(alone), experts=3, rank=2, **options)
    randomise(fk.apply_plan(alone, plan))
    together = copy.deepcopy(alone)
    handle = fk.fuse_shared_inputs(together)
    return alone, together, handle


def step(model):
    """Logits and gradients of one training step with padding, from one state of the generator."""
    torch.manual_seed(5)
    model.train().zero_grad()
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    out = model(input_ids=ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen2", "qwen3"])
def test_training_and_generation(architecture, calls):
    alone, together, handle = twins(architecture, lora_dropout=0.2)
    assert [len(group) for group in handle.groups] == [3, 2] * 2
    assert not handle.refused
    torch.testing.assert_close(step(together), step(alone), rtol=1e-12, atol=1e-12)
    assert calls == [3, 2] * 2
    ids = tokens(rows=2, columns=5)
    outs = [
        model.eval().generate(ids, max_new_tokens=4, do_sample=False) for model in (together, alone)
    ]
    assert torch.equal(*outs)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, calls):
    alone, together, _ = twins("llama", lora_dropout=0.2)
    for model in (alone, together):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    torch.testing.assert_close(step(together), step(alone), rtol=1e-12, atol=1e-12)
    assert calls == [3, 2] * 4, "twice each: forward, and recomputed in the backward"


def test_compiled_whole():
    alone, together, _ = twins("llama")
    compiled = torch.compile(together.eval(), backend="aot_eager", fullgraph=True)
    ids = tokens()
    out = compiled(input_ids=ids, labels=ids)
    want = alone.eval()(input_ids=ids, labels=ids)
    # rotary angles are float32 in these models, and compiled in another order
    torch.testing.assert_close(out.logits, want.logits, rtol=1e-5, atol=1e-5)
    out.loss.backward()
    want.loss.backward()
    grads = [
        {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        for m in (together, alone)
    ]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_adapter_file_of_a_fused_model(tmp_path):
    alone, together, handle = twins("llama")
    fk.save_adapter(together, tmp_path)
    fresh = fk.load_adapter(tiny_model("llama", num_hidden_layers=2).double(), tmp_path)
    ids = tokens()
    torch.testing.assert_close(fresh(ids).logits, alone(ids).logits)
    handle.remove()
    torch.testing.assert_close(together(ids).logits, alone(ids).logits)
    fk.remove_adapters(together)
    assert not any(isinstance(m, fk.FusedMoELoRA) for m in together.modules())


def test_one_fused_projection_has_no_sibling():
    model = tiny_model("gpt2")
    fk.apply_plan(model, uniform(find_modules(model), experts=2, rank=2))
    before = [type(m) for m in model.modules()]
    with pytest.warns(UserWarning, match="no two adapted layers of this model are known to take"):
        handle = fk.fuse_shared_inputs(model)
    assert not handle.groups
    assert [type(m) for m in model.modules()] == before


def test_encoder_decoder_is_left_to_its_owner():
    model = tiny_model("llama")
    fk.apply_plan(model, uniform(find_modules(model), experts=2, rank=2))
    model.config.is_encoder_decoder = True
    with pytest.warns(UserWarning, match="name the groups yourself"):
        assert not fk.fuse_shared_inputs(model).groups
    name = "model.layers.0.mlp."
    handle = fk.fuse_shared_inputs(model, [[name + "gate_proj", name + "up_proj"]])
    assert handle.groups == [(name + "gate_proj", name + "up_proj")]
