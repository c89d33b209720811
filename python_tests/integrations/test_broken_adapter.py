"""An adapter that is cut off, edited or hostile is refused in one sentence, and changes nothing."""

import json
import struct

import pytest
import torch
from adapting import adapted, randomise, snapshot
from safetensors.torch import load_file, save

from floe_kernels.integrations import adapter_file
from floe_kernels.integrations.transformers import load_adapter, save_adapter
from floe_kernels.testing.models import tiny_model

JSON, TENSORS = "adapter.json", "adapter.safetensors"


@pytest.fixture
def saved(tmp_path):
    model = adapted(lora_alpha=8, lora_dropout=0.1)
    save_adapter(model, tmp_path / "new" / "adapter")
    return tmp_path / "new" / "adapter"


def edit(folder, change, reseal=True):
    """Change ``adapter.json``, as an attacker would: with its checksum put right."""
    path = folder / JSON
    document = json.loads(path.read_text())
    change(document)
    if reseal:
        document["sha256"] = adapter_file.seal(document)
    path.write_text(json.dumps(document))


def replace_tensors(folder, data):
    """Swap the tensor file and make ``adapter.json`` vouch for it."""
    (folder / TENSORS).write_bytes(data)

    def vouch(document):
        document.update(size=len(data), tensors=adapter_file.table(data))

    edit(folder, vouch)


def truncate(name, size):
    def change(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:size])

    return change


def flip(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(data)


def header(length):
    def change(folder):
        data = bytearray((folder / TENSORS).read_bytes())
        data[:8] = struct.pack("<Q", length)
        (folder / TENSORS).write_bytes(data)

    return change


def table_entry(**fields):
    """Rewrite one entry of the safetensors header in place, at the same length."""

    def change(folder):
        data = (folder / TENSORS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        entries[next(name for name in entries if name != "__metadata__")].update(fields)
        text = json.dumps(entries, separators=(",", ":")).encode()
        rest = data[8 + length :]
        new = struct.pack("<Q", len(text)) + text + rest
        (folder / TENSORS).write_bytes(new)
        edit(folder, lambda document: document.update(size=len(new)))

    return change


def tensors(change):
    def rewrite(folder):
        loaded = load_file(folder / TENSORS)
        change(loaded)
        replace_tensors(folder, save(loaded))

    return rewrite


def swap_dtype(loaded):
    name = next(name for name in loaded if name.endswith("lora_B"))
    loaded[name] = loaded[name].bfloat16()


def document(reseal=True, **fields):
    return lambda folder: edit(folder, lambda document: document.update(fields), reseal)


Q = "model.layers.0.self_attn.q_proj"
BROKEN = {
    "no json": (lambda f: (f / JSON).unlink(), "must hold adapter.json, .* does not"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "must hold adapter.safetensors, .* does not"),
    "json empty": (truncate(JSON, 0), "adapter.json must be whole JSON, it is cut off or edited: "),
    "json cut": (truncate(JSON, 900), "adapter.json must be whole JSON, it is cut off or edited: "),
    "json binary": (lambda f: (f / JSON).write_bytes(b"\xff\x00"), "must be whole JSON"),
    "json deep": (lambda f: (f / JSON).write_text("[" * 10**5), "must be whole JSON"),
    "json list": (lambda f: (f / JSON).write_text("[]"), "must be a JSON object of the format"),
    "json edited": (document(reseal=False, base_model="x"), "must match its own sha256: it was "),
    "json extra": (document(more=1), "must match its own sha256"),
    "json types": (document(tensors=[]), r"tensors must be of type dict, got \[\]"),
    "json size": (document(size="9"), "size must be of type int, got '9'"),
    "other format": (document(format="peft"), 'of the format "floe_kernels.adapter", got another'),
    "new version": (document(version=2), "must be of format version 1, got 2: update one side"),
    "plan": (document(plan={}), "adapter.json: a plan must have the key 'format', got none"),
    "tensors cut": (truncate(TENSORS, -1), r"must have \d+ bytes as adapter.json says, got \d+"),
    "tensors empty": (truncate(TENSORS, 0), r"must have \d+ bytes as adapter.json says, got 0: it"),
    "bit flipped": (flip, "must match the checksums in adapter.json, 'model.*' does not: it was"),
    "huge header": (header(2**63), rf"header must be at most 100000000 bytes .*, got {2**63} in "),
    "header past the end": (header(10**6), "header must be .* inside the file, got 1000000 in"),
    "header short": (header(40), "must be in the safetensors format: "),
    "offsets": (table_entry(data_offsets=[0, 2**40]), "must be in the safetensors format: "),
    "shape overflows": (table_entry(shape=[2**40, 2**40]), "must be in the safetensors format: "),
    "negative shape": (table_entry(shape=[-1, 5]), "must be in the safetensors format: "),
    "missing tensor": (tensors(lambda t: t.pop(f"{Q}.lora_A")), f"must hold '{Q}.lora_A', which t"),
    "extra tensor": (
        tensors(lambda t: t.update(x=torch.ones(1))), "must hold no tensor but the plan's, got 'x'",
    ),
    "shape": (
        tensors(lambda t: t.update({f"{Q}.lora_A": torch.ones(5, 31)})),
        rf"'{Q}.lora_A' must be floating point \[5, 32\], got F32 \[5, 31\]",
    ),
    "integers": (
        tensors(lambda t: t.update({f"{Q}.lora_A": torch.ones(5, 32).int()})),
        rf"'{Q}.lora_A' must be floating point \[5, 32\], got I32 \[5, 32\]",
    ),
    "mixed dtypes": (tensors(swap_dtype), "must share one dtype and its scaling be float32, got"),
    "scaling": (
        tensors(lambda t: t.update({f"{Q}.scaling": torch.ones(5).double()})),
        rf"router of '{Q}' must share one dtype and its scaling be float32, got .* torch.float64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("onto", ["bare", "adapted"])
def test_a_broken_adapter_changes_nothing(case, onto, saved):
    change, message = BROKEN[case]
    change(saved)
    model = tiny_model("llama") if onto == "bare" else adapted(lora_alpha=8, lora_dropout=0.1)
    before = snapshot(model)
    kind = FileNotFoundError if case in ("no json", "no tensors") else ValueError
    with pytest.raises(kind, match=message) as caught:
        load_adapter(model, saved)
    assert "\n" not in str(caught.value)
    assert snapshot(model) == before


def test_two_halves_of_two_adapters(saved, tmp_path):
    save_adapter(randomise(adapted(lora_alpha=8, lora_dropout=0.1), seed=1), tmp_path / "b")
    (tmp_path / "b" / TENSORS).replace(saved / TENSORS)
    with pytest.raises(ValueError, match="or the two files are of different"):
        load_adapter(tiny_model("llama"), saved)
