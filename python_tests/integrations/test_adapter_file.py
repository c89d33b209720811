"""A saved adapter comes back bit for bit, or not at all, with a sentence that says why."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from adapting import adapted, randomise, snapshot, tokens, uneven_plan
from safetensors.torch import load_file
from torch import nn

from floe_kernels._types import ModuleSpec
from floe_kernels.allocation.plan import Placement, Plan
from floe_kernels.integrations import adapter_file
from floe_kernels.integrations.transformers import (
    adapted_modules,
    apply_plan,
    find_modules,
    load_adapter,
    remove_adapters,
    save_adapter,
)
from floe_kernels.nn import FusedMoELoRA
from floe_kernels.testing.models import tiny_model

JSON, TENSORS = "adapter.json", "adapter.safetensors"


def values(model):
    """Every tensor of the adapters, as bytes."""
    return {
        f"{name}.{key}": (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8))
        for name, layer in adapted_modules(model).items()
        for key, tensor in layer.state_dict().items()
        if not key.startswith("base_layer.")
    }


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, (dtype, shape, data) in left.items():
        assert (dtype, shape) == right[name][:2]
        assert torch.equal(data, right[name][2]), name


@pytest.fixture
def saved(tmp_path):
    model = adapted(lora_alpha=8, lora_dropout=0.1)
    save_adapter(model, tmp_path / "new" / "adapter")
    return tmp_path / "new" / "adapter"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip(architecture, dtype, tmp_path):
    model = adapted(architecture, lora_alpha=8, use_rslora=True)
    first = next(iter(adapted_modules(model).values()))
    first.scaling[1] = 0  # a rank component switched off
    first.lora_A.data[0, 0] = torch.nan
    first.lora_A.data[0, 1] = -0.0
    model.to(dtype)
    save_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [JSON, TENSORS]
    fresh = tiny_model(architecture).to(dtype)
    assert load_adapter(fresh, tmp_path) is fresh
    assert_same(values(model), values(fresh))
    assert {layer.use_rslora for layer in adapted_modules(fresh).values()} == {True}
    first.lora_A.data[0, 0] = next(iter(adapted_modules(fresh).values())).lora_A.data[0, 0] = 1
    assert torch.equal(model(tokens()).logits, fresh(tokens()).logits)
    frozen = {name for name, p in fresh.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}


def test_values_arrive_in_the_dtype_of_the_file(saved):
    model = tiny_model("llama").bfloat16()
    load_adapter(model, saved)
    assert_same(values(model), values(adapted(lora_alpha=8, lora_dropout=0.1)))
    model.bfloat16()
    assert next(iter(adapted_modules(model).values())).lora_B.dtype == torch.bfloat16
    load_adapter(model, saved)
    assert_same(values(model), values(adapted(lora_alpha=8, lora_dropout=0.1)))
    model(tokens(), labels=tokens()).loss.backward()


def test_an_equal_plan_is_overwritten_in_place(saved):
    model = adapted(lora_alpha=8, lora_dropout=0.1)
    want = {name: (d, s, data.clone()) for name, (d, s, data) in values(model).items()}
    parameters = {name: p.data_ptr() for name, p in model.named_parameters()}
    randomise(model, seed=9)
    load_adapter(model, saved)
    assert_same(values(model), want)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == parameters


def test_what_the_document_says(saved):
    document = json.loads((saved / JSON).read_text())
    tensors = load_file(saved / TENSORS)
    assert document["format"] == "floe_kernels.adapter"
    assert document["version"] == 1
    assert Plan.from_json(json.dumps(document["plan"])) == uneven_plan(
        tiny_model("llama"), lora_alpha=8, lora_dropout=0.1
    )
    assert set(document["tensors"]) == set(tensors)
    for name, tensor in tensors.items():
        entry = document["tensors"][name]
        assert (entry["dtype"], entry["shape"]) == ("F32", list(tensor.shape))
        assert len(entry["sha256"]) == 64
    parts = {name.split("proj.")[1] for name in tensors}
    assert parts == {"lora_A", "lora_B", "router.weight", "scaling"}


def test_the_base_is_named(tmp_path):
    model = adapted()
    model.config._name_or_path = "hub/base"
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / JSON).read_text())["base_model"] == "hub/base"
    with pytest.raises(
        ValueError, match=r"it was trained on hub/base \(fingerprint \w{12}\), got L"
    ):
        load_adapter(tiny_model("llama", seed=1), tmp_path)


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="must carry a plan's adapters to save them"):
        save_adapter(tiny_model("llama"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_wrong_base(saved):
    other = tiny_model("llama", seed=1)
    before = snapshot(other)
    with pytest.raises(
        ValueError, match=r"own base: it was trained on .* got LlamaForCausalLM \(fin"
    ):
        load_adapter(other, saved)
    assert snapshot(other) == before
    load_adapter(other, saved, check_base=False)
    assert len(adapted_modules(other)) == 15
    smaller = tiny_model("llama", num_hidden_layers=2)
    before = snapshot(smaller)
    with pytest.raises(
        ValueError, match=r"got module 'model.layers.2.self_attn.q_proj' that it lac"
    ):
        load_adapter(smaller, saved, check_base=False)
    assert snapshot(smaller) == before


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"lora_alpha": 9}, "lora_alpha"),
        ({"lora_dropout": 0.2}, "lora_dropout"),
        ({"use_rslora": True}, "use_rslora"),
        (None, "placements"),
    ],
)
def test_another_plan_is_refused(options, part, saved):
    model = tiny_model("llama")
    plan = uneven_plan(model, **{"lora_alpha": 8, "lora_dropout": 0.1, **(options or {})})
    if options is None:
        name = next(iter(plan.placements))
        placements = {**plan.placements, name: Placement((3, 2))}
        plan = Plan(placements, "x", 8, 0.1, modules=plan.modules)
    before = snapshot(apply_plan(model, plan))
    with pytest.raises(
        ValueError, match=rf"must carry the saved plan .* \({part} differ\): call rem"
    ):
        load_adapter(model, saved)
    assert snapshot(model) == before


def test_only_what_is_placed_must_agree(saved):
    model = tiny_model("llama")
    full = uneven_plan(model, lora_alpha=8, lora_dropout=0.1)
    kept = {name: p for name, p in full.placements.items() if p.experts}
    plan = Plan(kept, "another method", 8, 0.1, modules=full.modules, provenance={"seed": 1})
    load_adapter(apply_plan(model, plan), saved)


def test_layers_put_in_by_hand_are_no_plan(saved):
    model = remove_adapters(adapted())
    mlp = model.model.layers[0].mlp
    mlp.up_proj = FusedMoELoRA(mlp.up_proj, [2])
    with pytest.raises(ValueError, match="must carry the saved plan"):
        load_adapter(model, saved)


class Full:
    """A disk that takes ``room`` more bytes."""

    def __init__(self, file, disk):
        self.file, self.disk = file, disk

    def write(self, data):
        self.disk["room"] -= len(data)
        if self.disk["room"] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [10, -1], ids=["no room for tensors", "no room for the json"])
def test_a_full_disk_leaves_the_old_adapter(room, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = randomise(adapted(lora_alpha=8, lora_dropout=0.1), seed=5)
    disk = {"room": room if room > 0 else len(before[TENSORS]) + 10}
    real = adapter_file.Path.open
    with monkeypatch.context() as patch:
        patch.setattr(
            adapter_file.Path,
            "open",
            lambda path, *how, **text: Full(real(path, *how, **text), disk),
        )
        with pytest.raises(
            OSError, match=r"No space left on device; nothing in .* has changed"
        ) as e:
            save_adapter(model, saved)
    assert e.value.errno == errno.ENOSPC
    assert disk["room"] < 0
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    load_adapter(tiny_model("llama"), saved)


def test_interrupted_while_it_writes(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def interrupt(_descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(adapter_file.os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_adapter(randomise(adapted(), seed=5), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_the_document_comes_last(saved, monkeypatch):
    renamed, forced = [], []
    real_replace, real_fsync = adapter_file.Path.replace, os.fsync
    monkeypatch.setattr(
        adapter_file.Path,
        "replace",
        lambda path, to: (renamed.append((to.name, len(forced))), real_replace(path, to))[1],
    )
    monkeypatch.setattr(adapter_file.os, "fsync", lambda fd: (forced.append(fd), real_fsync(fd))[1])
    save_adapter(adapted(), saved)
    assert renamed == [(TENSORS, 2), (JSON, 2)], "both are on disk before either is renamed"
    assert len(forced) == 3, "and then the folder"


def test_experts_without_rank_and_other_corners(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    modules = find_modules(model)
    assert modules["1"] == ModuleSpec(4, 3, "1")
    plan = Plan({"0": Placement((0, 0)), "1": Placement(())}, "x", modules=modules)
    save_adapter(apply_plan(model, plan), tmp_path)
    want = values(model)
    load_adapter(remove_adapters(model), tmp_path)
    assert_same(values(model), want)
    empty = apply_plan(remove_adapters(model), Plan({}, "none"))
    save_adapter(empty, tmp_path)
    load_adapter(remove_adapters(empty), tmp_path)
    assert not adapted_modules(empty)
    shared = Plan({"1": Placement((2, 2))}, "x", shared_A=True, modules=modules)
    save_adapter(apply_plan(remove_adapters(empty), shared), tmp_path)
    load_adapter(remove_adapters(model), tmp_path)
    assert model[1].lora_A.shape == (2, 4)


def test_safetensors_is_asked_for_by_name(tmp_path):
    script = (
        "import sys; sys.modules['safetensors'] = sys.modules['safetensors.torch'] = None\n"
        "from torch import nn\n"
        "from floe_kernels.allocation.plan import Plan\n"
        "from floe_kernels.integrations.transformers import apply_plan, save_adapter\n"
        "try: save_adapter(apply_plan(nn.Linear(2, 2), Plan({}, 'none')), sys.argv[1])\n"
        "except ImportError as error: print(error)\n"
        "print('transformers' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    want = "adapter files need safetensors: pip install floe-kernels[transformers]\nFalse\n"
    assert out == want
