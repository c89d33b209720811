"""scores.spectral: which linears, through what wrappers, and what the cache may do."""

import json
import math
import re
import sys
import types
import warnings

import pytest
import torch
from torch import nn

from floe_kernels._types import ModuleSpec
from floe_kernels.functional.spectrum import hill_alpha
from floe_kernels.nn import FusedMoELoRA
from floe_kernels.scores.spectral import spectral, weight_hash

SPECTRAL = sys.modules[spectral.__module__]  # the function has the name of its module
LINEARS = ("attn.q", "attn.k", "mlp")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.attn = nn.ModuleDict({"q": nn.Linear(24, 24), "k": nn.Linear(24, 12)})
        self.mlp = nn.Linear(24, 48, bias=False)


class Model(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.embed = nn.Embedding(10, 24)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.lm_head = nn.Linear(24, 10)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def computed(monkeypatch):
    """The shapes of the weights whose spectrum was computed."""
    shapes, real = [], SPECTRAL.gram_eigenvalues

    def counted(weight):
        shapes.append(tuple(weight.shape))
        return real(weight)

    monkeypatch.setattr(SPECTRAL, "gram_eigenvalues", counted)
    return shapes


def alpha_of(weight, method="median"):
    return float(hill_alpha(torch.linalg.svdvals(weight.detach().double()) ** 2, method=method))


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def set_weight(model, name, weight):
    model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize("method", ["median", "fix_finger", "fix_finger_compat"])
def test_every_linear_of_the_blocks(model, method):
    got = spectral(model, aggregate="module", method=method)
    assert list(got) == [f"layers.{i}.{name}" for i in range(3) for name in LINEARS]
    for name, alpha in got.items():
        assert type(alpha) is float
        expected = alpha_of(model.get_submodule(name).weight, method)
        assert alpha == pytest.approx(expected, rel=1e-9)


def test_a_layer_is_the_mean_of_its_linears(model):
    by_module = spectral(model, aggregate="module")
    by_layer = spectral(model)
    assert list(by_layer) == ["layers.0", "layers.1", "layers.2"]
    for layer, alpha in by_layer.items():
        members = [by_module[f"{layer}.{name}"] for name in LINEARS]
        assert alpha == pytest.approx(sum(members) / 3, rel=1e-15)


def test_sees_through_wrappers(model):
    before = spectral(model, aggregate="module")
    for block in model.layers:
        block.attn["q"] = FusedMoELoRA(block.attn["q"], ranks=[4, 4, 2])
        block.mlp = FusedMoELoRA(FusedMoELoRA(block.mlp, ranks=[4]), ranks=[2, 2])
    assert spectral(model, aggregate="module") == before
    assert spectral(model, modules=["layers.1.mlp"]) == {"layers.1": before["layers.1.mlp"]}


def test_no_part_of_an_adapter_is_a_linear(model):
    class Codes(nn.Module):
        in_features, out_features = 24, 48

    before = spectral(model, aggregate="module")
    model.layers[0].mlp = FusedMoELoRA(Codes(), ranks=[4, 4, 2, 2])  # with a router of 4 rows
    del before["layers.0.mlp"]
    assert spectral(model, aggregate="module") == before


def test_reads_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"c_attn": conv1d(36, 12)})])})
    weight = model["h"][0]["c_attn"].weight
    assert weight.shape == (12, 36)
    assert spectral(model)["h.0"] == pytest.approx(alpha_of(weight), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widens_half_precision(model, dtype):
    model.to(dtype)
    got = spectral(model, aggregate="module")["layers.0.mlp"]
    assert got == pytest.approx(alpha_of(model.layers[0].mlp.weight), rel=1e-9)


def test_a_factor_changes_nothing(model):
    before = spectral(model.double())
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.mul_(-7.3)
    after = spectral(model)
    assert after == pytest.approx(before, rel=1e-12)


def test_modules_chooses_and_orders(model):
    names = ["lm_head", "layers.2.mlp", "layers.0.mlp", "layers.0.attn.k", "layers.0.mlp"]
    every = spectral(model, modules=names, aggregate="module")
    assert list(every) == ["lm_head", "layers.2.mlp", "layers.0.mlp", "layers.0.attn.k"]
    got = spectral(model, modules=names)
    assert list(got) == ["lm_head", "layers.2", "layers.0"]
    two = every["layers.0.mlp"], every["layers.0.attn.k"]
    assert got["layers.0"] == pytest.approx(sum(two) / 2, rel=1e-15)


def test_a_mapping_names_the_layers(model):
    specs = {f"layers.{i}.mlp": ModuleSpec(24, 48, "first" if i < 2 else "last") for i in range(3)}
    every = spectral(model, modules=specs, aggregate="module")
    got = spectral(model, modules=specs)
    assert list(got) == ["first", "last"]
    two = every["layers.0.mlp"], every["layers.1.mlp"]
    assert got["first"] == pytest.approx(sum(two) / 2, rel=1e-15)


def test_a_shared_block_counts_once(model):
    model.layers.append(model.layers[0])
    model.layers[2].mlp = FusedMoELoRA(model.layers[1].mlp, ranks=[2, 2])
    got = spectral(model, aggregate="module")
    assert list(got) == [f"layers.{i}.{name}" for i in range(3) for name in LINEARS][:-1]


def test_leaves_the_model_alone(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    spectral(model.train())
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_progress(model, tmp_path):
    calls = []
    for _ in range(2):  # computed, then remembered
        spectral(model, cache=tmp_path, progress=lambda *call: calls.append(call))
    names = [f"layers.{i}.{name}" for i in range(3) for name in LINEARS]
    assert calls == 2 * [(n, 9, name) for n, name in enumerate(names, start=1)]


def test_the_second_call_computes_nothing(model, computed, tmp_path):
    folder = tmp_path / "made" / "here"
    first = spectral(model, cache=folder)
    assert len(computed) == 9
    assert spectral(model, cache=folder) == first
    assert len(computed) == 9
    assert len(files(folder)) == 9
    assert all(re.fullmatch(r"[0-9a-f]{64}\.json", name) for name in files(folder))


def test_one_changed_weight_is_computed_again(model, computed, tmp_path):
    first = spectral(model, cache=tmp_path, aggregate="module")
    with torch.no_grad():
        model.layers[1].mlp.weight[47, 23] += 1  # the last byte counts too
    second = spectral(model, cache=tmp_path, aggregate="module")
    assert computed[9:] == [(48, 24)]
    assert [name for name in first if first[name] != second[name]] == ["layers.1.mlp"]


def test_methods_share_an_entry(model, computed, tmp_path):
    modules = ["layers.0.mlp"]
    median = spectral(model, modules=modules, cache=tmp_path)
    finger = spectral(model, modules=modules, cache=tmp_path, method="fix_finger")
    assert len(computed) == 2
    assert len(files(tmp_path)) == 1
    assert spectral(model, modules=modules, cache=tmp_path) == median != finger
    assert spectral(model, modules=modules, cache=tmp_path, method="fix_finger") == finger
    assert len(computed) == 2


def entry_with(**changes):
    return lambda text: json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\0" + text,
        lambda text: "[" * 100_000,
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace("spectrum", "plan"),
        entry_with(version=0),
        entry_with(weight="0" * 64),
        entry_with(alpha=[2.5]),
        entry_with(alpha={"median": "2.5"}),
        entry_with(alpha={"median": True}),
        entry_with(alpha={"median": math.nan}),
        entry_with(alpha={"median": math.inf}),
        entry_with(alpha={"median": 0.5}),
    ],
)
def test_a_spoilt_entry_is_rewritten(spoil, model, computed, tmp_path):
    modules = ["layers.0.mlp"]
    first = spectral(model, modules=modules, cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    sound = entry.read_text()
    entry.write_text(spoil(sound))
    assert spectral(model, modules=modules, cache=tmp_path) == first
    assert len(computed) == 2
    assert entry.read_text() == sound


def test_an_entry_that_is_no_text_is_rewritten(model, computed, tmp_path):
    spectral(model, modules=["layers.0.mlp"], cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    sound = entry.read_bytes()
    entry.write_bytes(b"\xff\xfe\x80")
    spectral(model, modules=["layers.0.mlp"], cache=tmp_path)
    assert entry.read_bytes() == sound


def test_a_folder_that_cannot_be_written_warns_once(model, tmp_path):
    (tmp_path / "file").write_text("")  # root may write anywhere, but not below a file
    with pytest.warns(RuntimeWarning, match="cannot write to .*file") as seen:
        got = spectral(model, cache=tmp_path / "file" / "cache")
    assert got == spectral(model)
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_a_failed_write_leaves_nothing_behind(model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(SPECTRAL.Path, "replace", full)
    with pytest.warns(RuntimeWarning, match="no space left"):
        spectral(model, cache=tmp_path)
    assert files(tmp_path) == []


def test_no_cache_no_files(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectral(model)
    assert files(tmp_path) == []


def test_the_hash_is_of_the_numbers(monkeypatch):
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    expected = weight_hash(weight)
    monkeypatch.setattr(SPECTRAL, "HASHED_AT_ONCE", 7 * 20 * 4)  # slices of 7 rows
    assert weight_hash(weight.T.contiguous().T) == expected
    assert weight_hash(nn.Parameter(weight)) == expected
    changed = weight.clone()
    changed[29, 19] = torch.nextafter(changed[29, 19], torch.tensor(9.0))
    others = [changed, weight.T, weight.view(20, 30), weight.view(torch.int32), weight.double()]
    assert len({expected, *map(weight_hash, others)}) == 6
    assert len({weight_hash(torch.zeros(0, 3)), weight_hash(torch.zeros(3, 0))}) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_names_the_module(model, bad, tmp_path):
    with torch.no_grad():
        model.layers[1].attn["k"].weight[3, 5] = bad
    with pytest.raises(ValueError, match=r"layers\.1\.attn\.k: weight must be finite"):
        spectral(model, cache=tmp_path)


def test_no_spectrum_names_the_module(model):
    set_weight(model, "layers.2.mlp", torch.zeros(48, 24))
    with pytest.raises(ValueError, match=r"layers\.2\.mlp: .* at least 3 positive .* got 0"):
        spectral(model)
    set_weight(model, "layers.2.mlp", torch.eye(24))
    with pytest.raises(ValueError, match=r"layers\.2\.mlp: .* has no tail"):
        spectral(model)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.zeros(48, 24, dtype=torch.uint8), r"floating point matrix, got torch\.uint8"),
        (torch.zeros(48), r"floating point matrix, got torch\.float32 \(48,\)"),
        (torch.zeros(48, 24, device="meta"), r"got one on the meta device: load"),
        (torch.zeros(48, 24).to_sparse(), r"dense tensor in memory, got torch\.sparse_coo"),
    ],
    ids=["codes", "vector", "meta", "sparse"],
)
def test_unreadable_weights_name_the_module(model, weight, says):
    set_weight(model, "layers.0.mlp", weight)
    with pytest.raises(ValueError, match=rf"layers\.0\.mlp: the weight must be .*{says}"):
        spectral(model)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "hill"}, r"method must be one of median, fix_finger, .*, got 'hill'"),
        ({"aggregate": "block"}, r"aggregate must be 'layer' or 'module', got 'block'"),
        ({"modules": []}, r"modules must name at least one linear"),
        ({"modules": {}}, r"modules must name at least one linear"),
        ({"modules": "mlp"}, r"list of names, got the one string 'mlp'"),
        ({"modules": ["layers.7.mlp"]}, r"names of the model's modules, got 'layers\.7\.mlp'"),
        ({"modules": ["layers.0"]}, r"layers\.0: a module must have a weight, got Block"),
    ],
)
def test_says_what_is_wrong(model, options, says):
    with pytest.raises(ValueError, match=says):
        spectral(model, **options)


def test_a_model_without_blocks():
    model = nn.ModuleDict({"encoder": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    with pytest.raises(ValueError, match=r"numbered block, got ModuleDict with none"):
        spectral(model)
    assert list(spectral(model, modules=["encoder"])) == ["encoder"]


@pytest.mark.parametrize(("all_threads", "one", "chosen"), [(5, 10, 2), (9, 10, 1), (100, 10, 1)])
def test_eigenvalues_take_one_thread_where_more_are_slower(monkeypatch, all_threads, one, chosen):
    threads = sys.modules["floe_kernels.scores.eigen_threads"]
    now = [0.0]
    monkeypatch.setattr(threads, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    eigvalsh = torch.linalg.eigvalsh

    def timed(matrix):
        now[0] += all_threads if torch.get_num_threads() == 2 else one
        return eigvalsh(matrix)

    monkeypatch.setattr(torch.linalg, "eigvalsh", timed)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        choice = threads.EigenThreads()
        for _ in range(2):
            tried = now[0]
            with choice.used():
                assert torch.get_num_threads() == chosen
            assert torch.get_num_threads() == 2
        assert now[0] == tried  # the second time there is nothing to try
    finally:
        torch.set_num_threads(before)


def test_a_cached_spectrum_tries_no_threads(model, tmp_path, monkeypatch):
    first = spectral(model, cache=tmp_path)
    monkeypatch.setattr(SPECTRAL.EigenThreads, "used", None)
    assert spectral(model, cache=tmp_path) == first
