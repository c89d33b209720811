"""Questions with options to choose from, and the samples that a model learns from them."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evidence.config import STDLIB, Config, Data
from floe_kernels.pipeline.data import Record
from floe_kernels.pipeline.datasets import Dataset, load_dataset
from floe_kernels.pipeline.encoding import Samples, encode_records, permutation

_LEAD = "Please choose the correct answer to the question:"
_OPTION = re.compile(r"\s*\bAnswer(\d+):\s*")


class Question(NamedTuple):
    """One question, ready to be answered."""

    prompt: str
    options: tuple[str, ...]
    answer: int  #: index of the right option


class Encoded(NamedTuple):
    """Its token ids: every option is closed as the tokenizer closes an answer."""

    prompt: list[int]
    options: list[list[int]]
    answer: int


class Task(NamedTuple):
    """What a data set comes to: samples, and the questions behind the held-out ones."""

    dataset: Dataset
    questions: list[Encoded]  #: none for plain text


def read_questions(path: Path, form: str) -> list[Question]:
    """Read a file of records whose ``instruction`` lists the options.

    Args:
        path: JSON: an array of objects with ``instruction`` ("... question: Q, Answer1: a
            Answer2: b ... Answer format: ...") and ``answer`` ("answer2").
        form: As in ``Data``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A record is not of this form; the message names it.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path.name} must lie in the data folder, see --data")
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [_question(row, form, f"{path.name}, record {n}") for n, row in enumerate(rows, 1)]


def load_task(config: Config, data: Data, folder: Path | None, tokenizer: Any) -> Task:
    """Encode a data set; its training samples and questions are drawn once, by ``draw_seed``.

    Args:
        config: The experiment.
        data: Which of its data sets.
        folder: Holds the question files.
        tokenizer: The model's.

    Raises:
        ValueError: A folder is needed and was not given, or a file is malformed.
        FileNotFoundError: A file is missing.
    """
    options = config.settings(data)
    if data.train == STDLIB:
        return Task(load_dataset(replace(options, data=STDLIB), tokenizer), [])
    if folder is None:
        raise ValueError(f"--data FOLDER must hold {data.train} and {data.test}")
    train = read_questions(folder / data.train, data.form)
    train = [train[i] for i in permutation(len(train), config.draw_seed, "training questions")]
    train = train[: options.max_samples or None]
    test = read_questions(folder / data.test, data.form)
    chosen = permutation(len(test), config.draw_seed, "questions")[: config.questions]
    test = [test[i] for i in sorted(chosen)]
    samples, cut = encode_records([_record(q) for q in train], tokenizer, options.length)
    held_out, cut_too = encode_records([_record(q) for q in test], tokenizer, options.length)
    notes = [f"{cut + cut_too} samples were cut to {options.length} tokens"] * bool(cut + cut_too)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    dataset = Dataset(samples, held_out, pad or 0, notes, {data.label: samples})
    return Task(dataset, [encode(q, tokenizer, options.length) for q in test])


def encode(question: Question, tokenizer: Any, length: int) -> Encoded:
    """Encode a question and its options as training samples are encoded.

    Args:
        question: The question.
        tokenizer: The model's.
        length: Most tokens of prompt and option.
    """
    records = [Record(question.prompt, "", option) for option in question.options]
    samples, _ = encode_records(records, tokenizer, length)
    pairs = [_split(samples, i) for i in range(len(samples))]
    prompt = min((prompt for prompt, _ in pairs), key=len)  # a cut takes its start
    return Encoded(prompt, [answer for _, answer in pairs], question.answer)


def _split(samples: Samples, i: int) -> tuple[list[int], list[int]]:
    ids = samples.tokens[samples.starts[i] : samples.starts[i + 1]].tolist()
    at = int(samples.answers[i])
    return ids[:at], ids[at:]


def _record(question: Question) -> Record:
    return Record(question.prompt, "", question.options[question.answer])


def _question(row: Any, form: str, where: str) -> Question:
    text, right = str(row.get("instruction", "")), str(row.get("answer", ""))
    body, _, _ = text.partition("Answer format:")
    asked, *parts = _OPTION.split(body)
    words = tuple(part.strip() for part in parts[1::2])
    numbers = parts[::2]
    index = right.removeprefix("answer")
    if len(words) < 2 or index not in numbers or not all(words):
        raise ValueError(f"{where}: must list options and name one of them as its answer")
    answer = numbers.index(index)
    if form == "text":
        return Question(_strip(asked), words, answer)
    letters = tuple(f"the correct answer is answer{n}" for n in numbers)
    return Question(text, letters, answer)


def _strip(asked: str) -> str:
    return asked.strip().removeprefix(_LEAD).strip()


def accuracies(likelihoods: Sequence[Sequence[float]], questions: Sequence[Encoded]) -> Any:
    """Return the share of questions whose right option is likeliest: in sum, and by token.

    Args:
        likelihoods: Log-likelihood of every option of every question.
        questions: The questions.
    """
    whole = by_token = 0
    for values, question in zip(likelihoods, questions, strict=True):
        means = [v / len(o) for v, o in zip(values, question.options, strict=True)]
        whole += values.index(max(values)) == question.answer
        by_token += means.index(max(means)) == question.answer
    return whole / len(questions), by_token / len(questions)
