"""Data files: what is read from them, and what is said about bad ones."""

import json
from pathlib import Path

import pytest

from floe_kernels.pipeline.data import (
    Record,
    read_records,
    read_text,
    split_records,
    split_text,
)
from floe_kernels.pipeline.datasets import check_data, file_names, load_dataset
from floe_kernels.pipeline.options import Options
from floe_kernels.pipeline.stdlib_text import documented_functions, stdlib_text

GOOD = {"instruction": "Add.", "input": "1 and 2", "output": "3", "answer": "ignored"}


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_both_forms_give_the_same_records(tmp_path):
    rows = [GOOD, {"instruction": "Say é.", "output": "é"}]
    array = written(tmp_path, "a.json", "\n" + json.dumps(rows, indent=2) + "\n")
    lines = written(tmp_path, "a.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, rows)))
    expected = [Record("Add.", "1 and 2", "3"), Record("Say é.", "", "é")]
    assert read_records(array) == read_records(lines) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"must hold text, but is empty"),
        ("a.jsonl", " \n \n", r"must hold text, but is empty"),
        ("a.json", "[]", r"must hold at least one record, got none"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n{', r"line 2: must be JSON, but at col"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n\n[1]', r"line 3: must be an object"),
        ("a.jsonl", '{"instruction": "x"}', r"line 1: must have the key 'output', got \[\"instr"),
        ("a.jsonl", '{"instruction": "x", "output": 3}', r"'output' must be a string, got 3"),
        ("a.jsonl", '{"instruction": " ", "output": "y"}', r"'instruction' must not be blank"),
        ("a.jsonl", '{"instruction": "\\ud800", "output": "y"}', r"valid Unicode, got a lone"),
        ("a.jsonl", b'\n{"instruction": "\xff"}', r"line 2: must be UTF-8 text, got byte 0xff"),
        ("a.jsonl", "[" * 100_000, r"line 1: is nested too deeply"),
        ("a.json", "[" * 100_000, r"line 1: is nested too deeply"),
        ("a.json", '{"instruction": "x"}', r"line 1: must be an array of records, got '{"),
        ("a.json", '[\n\n{"instruction": 1}]', r"line 3: 'instruction' must be a string, got 1"),
        ("a.json", '[\n{"instruction": "x",\n oops}]', r"line 3: must be JSON, but at column 2"),
        ("a.json", '[{"instruction": "x", "output": "y"}\n', r"line 2: records must be separated"),
        ("a.json", '[{"instruction": "x", "output": "y"}] 7', r"nothing may follow the array"),
        ("a.json", '[{"instruction": "x", "output": "y"},\n]', r"line 2: must be JSON"),
    ],
)
def test_bad_files_are_named_with_line_rule_and_what_came(tmp_path, name, content, message):
    path = written(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as caught:
        read_records(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "nowhere.txt")


def test_equal_questions_stay_on_one_side():
    records = [Record(f"q{i % 10}", "", str(i)) for i in range(100)]
    train, held_out = split_records(records, 0.3, seed=1)
    assert len(train) + len(held_out) == 100
    assert not {r.instruction for r in train} & {r.instruction for r in held_out}
    assert len({r.instruction for r in held_out}) == 3
    assert (train, held_out) == split_records(records, 0.3, seed=1)
    assert held_out != split_records(records, 0.3, seed=2)[1]


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_neither_side_of_a_split_is_empty(fraction):
    records = [Record(f"q{i}", "", "a") for i in range(3)]
    assert all(split_records(records, fraction, seed=0))


def test_one_question_cannot_be_split():
    with pytest.raises(ValueError, match=r"at least 2 different questions .* got 1"):
        split_records([Record("q", "", "a")] * 5, 0.5, seed=0)


def test_a_text_is_cut_at_a_line_and_nothing_is_lost():
    text = "".join(f"line {i}\n" for i in range(100))
    train, held_out = split_text(text, 0.2)
    assert train + held_out == text
    assert train.endswith("\n")
    assert abs(len(held_out) / len(text) - 0.2) < 0.02
    assert split_text("no line ends", 0.5) == ("no lin", "e ends")


def test_library_functions_are_documented_and_split_by_module():
    text = stdlib_text(20_000, 5_000, seed=0)
    assert sum(map(len, text.train)) >= 20_000
    assert sum(map(len, text.held_out)) >= 5_000
    assert not set(text.train) & set(text.held_out)
    assert all("def " in f and ('"' in f or "'" in f) for f in text.train)
    assert text == stdlib_text(20_000, 5_000, seed=0)
    assert text != stdlib_text(20_000, 5_000, seed=1)


def test_functions_keep_their_decorators_and_what_does_not_parse_is_skipped():
    source = (
        "class A:\n    @property\n    def f(self):\n        'Doc.'\n\n    def g(self):\n        0\n"
    )
    assert list(documented_functions(source)) == ["@property\ndef f(self):\n    'Doc.'"]
    assert list(documented_functions("def f(:")) == []


def test_several_files_are_split_each_and_joined(model_folder, tmp_path):
    from tiny_model import write_data
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    one, two = write_data(tmp_path / "a.json", 20), write_data(tmp_path / "b.jsonl", 10)
    options = {"length": 32, "eval_samples": 0}
    both = load_dataset(Options(data=f"{one}, {two}", **options), tokenizer)
    parts = [load_dataset(Options(data=str(path), **options), tokenizer) for path in (one, two)]
    assert {name: len(task) for name, task in both.tasks.items()} == {"a": 18, "b": 9}
    assert [both.tasks[n].digest() for n in "ab"] == [part.train.digest() for part in parts]
    assert len(both.train) == 27
    assert len(both.held_out) == 3
    assert both.train.subset(range(18, 27)).digest() == parts[1].train.digest()
    assert both.train.loss_tokens() == sum(part.train.loss_tokens() for part in parts)
    alone = load_dataset(Options(data=str(one), held_out=f"{two}", **options), tokenizer)
    assert (len(alone.train), len(alone.held_out)) == (20, 10)


def test_a_comma_may_be_part_of_a_name(tmp_path):
    from tiny_model import write_data

    assert file_names(str(write_data(tmp_path / "a,b.json"))) == [str(tmp_path / "a,b.json")]
    assert file_names("") == []
    with pytest.raises(ValueError, match="every file must be named once, got 'a,a'"):
        file_names("a,a")
    with pytest.raises(ValueError, match=r"--data must name a \.jsonl"):
        check_data(Options(data=" , "))
