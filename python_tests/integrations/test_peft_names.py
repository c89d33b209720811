"""A model under PEFT is still itself: names, fingerprints, scores and generation."""

import pytest
from adapting import tokens, uneven_plan
from test_peft import Config, pytestmark, shake, wrapped  # noqa: F401

from floe_kernels import FisherCollector
from floe_kernels.integrations.transformers import (
    apply_plan,
    find_modules,
    fingerprint,
    save_adapter,
)
from floe_kernels.scores.fisher import block_linears
from floe_kernels.testing.models import tiny_model

peft = pytest.importorskip("peft")


def test_it_is_seen_through_by_name():
    bare, model = tiny_model("llama"), tiny_model("llama")
    model = shake(peft.get_peft_model(model, Config(num_experts=2, r=2, modules_to_save=["norm"])))
    assert fingerprint(model) == fingerprint(bare)
    assert find_modules(model) == find_modules(bare)
    with FisherCollector(model, frozen=("model.layers.0.mlp.up_proj",)) as collector:
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        collector.step()
    names = {*collector.read(how="sum", aggregate="module")}
    assert names == {*find_modules(bare)}
    assert "model.layers.0.mlp.up_proj.weight" in collector.record().sums
    assert block_linears(model) == tuple(find_modules(bare))
    plan = uneven_plan(bare)
    with pytest.raises(ValueError, match=r"got PEFT's: call its merge_and_unload\(\)"):
        apply_plan(model, plan)
    with pytest.raises(ValueError, match="PEFT's are saved by save_pretrained"):
        save_adapter(model, "nowhere")


def test_plain_lora_is_seen_through_too():
    bare = tiny_model("llama")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config)
    assert fingerprint(model) == fingerprint(bare)
    assert find_modules(model) == find_modules(bare)


def test_adapters_of_one_linear_are_scored_apart():
    model = shake(wrapped(Config(num_experts=2, r=2, target_modules=["q_proj"])))
    model.add_adapter("other", Config(num_experts=2, r=1, target_modules=["q_proj"]))
    collector = FisherCollector(model)
    assert len(collector.layers) == 6
    assert list(collector.layers)[1].endswith("q_proj.floe_experts.other")


def test_generation_and_the_fisher_collector_work_through_peft():
    model = shake(wrapped(Config(num_experts=2, r=2, task_type="CAUSAL_LM")))
    ids = tokens(2, 5)
    out = model.generate(
        input_ids=ids, max_new_tokens=3, num_beams=2, do_sample=False, eos_token_id=None
    )
    assert out.shape == (2, 8)
    with FisherCollector(model) as collector:
        model(input_ids=ids, labels=ids).loss.backward()
        collector.step()
    scores = collector.read(how="mean", aggregate="module")
    assert len(scores) == 21
    assert all(value > 0 for value in scores.values())
