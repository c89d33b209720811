"""What a run trains on and what it holds out, ready as token ids."""

from pathlib import Path
from typing import Any, NamedTuple

from floe_kernels.pipeline.data import (
    FORMS,
    read_records,
    read_text,
    split_records,
    split_text,
)
from floe_kernels.pipeline.encoding import Samples, draw, encode_records, encode_texts
from floe_kernels.pipeline.options import Options
from floe_kernels.pipeline.stdlib_text import stdlib_text

STDLIB = "stdlib"
CHARS_PER_TOKEN = 4  # of code; more than it has, so that there is enough
STDLIB_TOKENS = 400_000  # where --max-samples sets no bound


class Dataset(NamedTuple):
    """The two sides of a run's data."""

    train: Samples
    held_out: Samples
    pad: int  #: token id that fills up batches
    notes: list[str]  #: what a user should know
    tasks: dict[str, Samples]  #: the training samples by the file that they are from

    def facts(self) -> dict[str, str]:
        """Return what a resumed run must find unchanged."""
        return {"training data": self.train.digest(), "held-out data": self.held_out.digest()}


def load_dataset(options: Options, tokenizer: Any, *, most_tokens: int | None = None) -> Dataset:
    """Read, split and encode what ``options.data`` and ``options.held_out`` name.

    Records are split by question, a text at its end, the standard library by module. Several files
    are each split alike, and joined; each of them is a task.

    Args:
        options: Of the run.
        tokenizer: The model's.
        most_tokens: Longest sequence that the model takes; None means any.

    Returns:
        The dataset.

    Raises:
        ValueError: A file is malformed, or an option does not fit.
        OSError: A file cannot be read.
    """
    if most_tokens is not None and options.length > most_tokens:
        raise ValueError(
            f"--length must be at most {most_tokens}, the model's longest sequence, "
            f"got {options.length}"
        )
    notes: list[str] = []
    names = file_names(options.data)
    if options.held_out:
        parts = [_encode(name, tokenizer, options, notes) for name in names]
        others = file_names(options.held_out)
        held_out = Samples.join(
            [_encode(name, tokenizer, options, notes, held_out=True) for name in others]
        )
    else:
        pairs = [_split(name, tokenizer, options, notes) for name in names]
        parts, held_out = [train for train, _ in pairs], Samples.join([out for _, out in pairs])
    train = Samples.join(parts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Dataset(
        draw(train, options.max_samples, options.seed, "training samples"),
        draw(held_out, options.eval_samples, options.seed, "held-out samples"),
        pad or 0,
        notes,
        dict(zip(_titles(names), parts, strict=True)),
    )


def file_names(text: str) -> list[str]:
    """Return the files that ``--data`` or ``--held-out`` names; a comma may be part of a name.

    Example:
        >>> file_names("arc.json, openbookqa.json")
        ['arc.json', 'openbookqa.json']
    """
    if not text or Path(text).exists():
        return [text] if text else []
    names = [name.strip() for name in text.split(",") if name.strip()]
    if len(set(names)) < len(names):
        raise ValueError(f"every file must be named once, got {text!r}")
    return names


def check_data(options: Options) -> None:
    """Read the data files once, so that a mistake in them shows before a model is loaded.

    Args:
        options: Of the run.

    Raises:
        ValueError: A file is malformed, or none is named.
        OSError: A file cannot be read.
    """
    if not file_names(options.data):
        raise ValueError("--data must name a .jsonl, .json or .txt file, or stdlib, got nothing")
    for name in dict.fromkeys(file_names(options.data) + file_names(options.held_out)):
        if name == STDLIB:
            continue
        path = _path(name)
        read_text(path) if path.suffix == ".txt" else read_records(path)


def _path(name: str) -> Path:
    path = Path(name)
    if path.suffix not in FORMS:
        raise ValueError(
            f"data must be a file ending in {', '.join(FORMS)}, or stdlib, got {name!r}"
        )
    return path


def _titles(names: list[str]) -> list[str]:
    """Call a task by its file's stem, or by the whole name where two stems are alike."""
    stems = [Path(name).stem for name in names]
    return [stem if stems.count(stem) == 1 else n for n, stem in zip(names, stems, strict=True)]


def _encode(
    name: str, tokenizer: Any, options: Options, notes: list[str], *, held_out: bool = False
) -> Samples:
    if name == STDLIB:
        return _stdlib(options, tokenizer)[int(held_out)]
    path, length = _path(name), options.length
    if path.suffix == ".txt":
        return encode_texts([read_text(path)], tokenizer, length)
    samples, cut = encode_records(read_records(path), tokenizer, length)
    _note_cut(cut, len(samples), length, path.name, notes)
    return samples


def _split(
    name: str, tokenizer: Any, options: Options, notes: list[str]
) -> tuple[Samples, Samples]:
    if name == STDLIB:
        return _stdlib(options, tokenizer)
    path, length = _path(name), options.length
    if path.suffix == ".txt":
        texts = split_text(read_text(path), options.held_out_fraction)
        train, held_out = (encode_texts([text], tokenizer, length) for text in texts)
        return train, held_out
    parts = split_records(read_records(path), options.held_out_fraction, options.seed)
    encoded = [encode_records(part, tokenizer, length) for part in parts]
    cut, total = sum(cut for _, cut in encoded), sum(len(samples) for samples, _ in encoded)
    _note_cut(cut, total, length, path.name, notes)
    return encoded[0][0], encoded[1][0]


def _note_cut(cut: int, total: int, length: int, name: str, notes: list[str]) -> None:
    if cut:
        notes.append(f"{cut} of {total} samples in {name} were cut to {length} tokens (--length)")


def _stdlib(options: Options, tokenizer: Any) -> tuple[Samples, Samples]:
    wanted = options.max_samples * options.length or STDLIB_TOKENS
    kept = options.eval_samples * options.length or STDLIB_TOKENS // 4
    text = stdlib_text(CHARS_PER_TOKEN * wanted, CHARS_PER_TOKEN * kept, options.seed)
    train = encode_texts(text.train, tokenizer, options.length)
    return train, encode_texts(text.held_out, tokenizer, options.length)
