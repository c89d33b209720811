"""Texts become samples of token ids, and samples become padded batches."""

import ctypes
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from floe_kernels.pipeline.data import Record

IGNORE = -100  # the label that transformers and torch leave out of the loss
PIECE_CHARS = 16_384  # texts are tokenised in pieces of about this size, cut at line ends


class Samples:
    """Token sequences of any length, stored end to end.

    Dims: N samples, T tokens in all.

    Args:
        tokens: ``(T,)`` int32.
        starts: ``(N + 1,)`` int64; sample n is ``tokens[starts[n]:starts[n + 1]]``.
        answers: ``(N,)`` int64, at least 1: the first token of each sample that counts in the loss.

    Example:
        >>> samples = Samples.of([([5, 6, 7], 1), ([8, 9], 1)])
        >>> samples.batch([1, 0])["labels"]
        tensor([[-100,    9, -100],
                [-100,    6,    7]])
        >>> samples.loss_tokens([0, 1])
        3
    """

    def __init__(self, tokens: Tensor, starts: Tensor, answers: Tensor) -> None:
        self.tokens, self.starts, self.answers = tokens, starts, answers

    @classmethod
    def of(cls, sequences: Sequence[tuple[Sequence[int], int]]) -> "Samples":
        """Store (token ids, first token that counts) pairs."""
        lengths = torch.tensor([0, *(len(ids) for ids, _ in sequences)], dtype=torch.int64)
        flat = [i for ids, _ in sequences for i in ids]
        answers = [max(1, answer) for _, answer in sequences]
        return cls(
            torch.tensor(flat, dtype=torch.int32),
            lengths.cumsum(0),
            torch.tensor(answers, dtype=torch.int64),
        )

    @classmethod
    def join(cls, parts: Sequence["Samples"]) -> "Samples":
        """Put several sets of samples one behind the other; one alone is returned as it is."""
        if len(parts) == 1:
            return parts[0]
        before, shifted = 0, [torch.zeros(1, dtype=torch.int64)]
        for part in parts:
            shifted.append(part.starts[1:] + before)
            before += int(part.starts[-1])
        tokens, answers = ([getattr(p, name) for p in parts] for name in ("tokens", "answers"))
        return cls(torch.cat(tokens), torch.cat(shifted), torch.cat(answers))

    def __len__(self) -> int:
        return len(self.answers)

    def batch(self, indices: Sequence[int], pad: int = 0) -> dict[str, Tensor]:
        """Lay samples side by side, padded on the right.

        Args:
            indices: Which; B of them.
            pad: The token id that fills up; it is masked and has no label.

        Returns:
            ``input_ids``, ``labels`` and, where there is padding, ``attention_mask``; (B, L) int64.
        """
        rows = torch.as_tensor(indices)
        lengths = self.starts[rows + 1] - self.starts[rows]
        longest = int(lengths.max())
        input_ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
        labels = torch.full((len(rows), longest), IGNORE, dtype=torch.int64)
        for i, n in enumerate(rows.tolist()):
            ids = self.tokens[self.starts[n] : self.starts[n + 1]].long()
            answer = int(self.answers[n])
            input_ids[i, : len(ids)] = ids
            labels[i, answer : len(ids)] = ids[answer:]
        batch = {"input_ids": input_ids, "labels": labels}
        if int(lengths.min()) < longest:
            mask = torch.arange(longest) < lengths[:, None]
            batch["attention_mask"] = mask.long()
        return batch

    def loss_tokens(self, indices: Sequence[int] | None = None) -> int:
        """Count the tokens that count in the loss, of some samples or of all."""
        lengths = self.starts[1:] - self.starts[:-1] - self.answers
        rows = slice(None) if indices is None else torch.as_tensor(indices)
        return int(lengths[rows].sum())

    def subset(self, indices: Sequence[int]) -> "Samples":
        """Return some samples, in the order given."""
        pairs = [
            (self.tokens[self.starts[n] : self.starts[n + 1]].tolist(), int(self.answers[n]))
            for n in indices
        ]
        return Samples.of(pairs)

    def digest(self) -> str:
        """Return a checksum of everything in it."""
        sha = hashlib.sha256()
        for tensor in (self.tokens, self.starts, self.answers):
            sha.update(ctypes.string_at(tensor.contiguous().data_ptr(), tensor.nbytes))
        return sha.hexdigest()[:16]


def draw(samples: Samples, count: int, seed: int, name: str) -> Samples:
    """Draw ``count`` samples without repetition; all of them if there are not so many.

    Args:
        samples: Where from.
        count: How many; 0 means all.
        seed: Of the draw.
        name: What for: draws with different names are independent.
    """
    if count == 0 or count >= len(samples):
        return samples
    return samples.subset(permutation(len(samples), seed, name)[:count])


def permutation(n: int, seed: int, name: str) -> list[int]:
    """Return 0..n-1 in an order drawn by a seed and a name, the same in every process."""
    key = int.from_bytes(hashlib.sha256(f"{name} {seed}".encode()).digest()[:7], "big")
    order: list[int] = torch.randperm(n, generator=torch.Generator().manual_seed(key)).tolist()
    return order


def encode_texts(texts: Sequence[str], tokenizer: Any, length: int) -> Samples:
    """Lay texts end to end, each closed by the end-of-text token, and cut blocks of ``length``.

    What is left over at the end is dropped, unless it is all there is.

    Args:
        texts: The texts.
        tokenizer: A transformers tokenizer.
        length: Tokens of a block.

    Raises:
        ValueError: There are not even 2 tokens.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    flat: list[int] = []
    for text in texts:
        pieces = tokenizer(_pieces(text), add_special_tokens=False)["input_ids"]
        flat += [i for piece in pieces for i in piece] + end
    if len(flat) < 2:
        raise ValueError(f"a text must give at least 2 tokens, got {len(flat)}")
    blocks = [flat[i : i + length] for i in range(0, len(flat), length)]
    if len(blocks) > 1 and len(blocks[-1]) < length:
        blocks.pop()
    return Samples.of([(block, 1) for block in blocks])


def encode_records(records: Sequence[Record], tokenizer: Any, length: int) -> tuple[Samples, int]:
    """Turn records into prompt and answer; only the answer counts in the loss.

    The prompt is the tokenizer's chat template if it has one, else :func:`plain_prompt`. A sample
    that is too long loses the start of its prompt, then the end of its answer.

    Args:
        records: The records.
        tokenizer: A transformers tokenizer.
        length: Most tokens of a sample.

    Returns:
        The samples, and how many were shortened.
    """
    pairs, cut = [], 0
    for record in records:
        prompt, answer = _tokens(record, tokenizer)
        cut += len(prompt) + len(answer) > length
        answer = answer[: length - 1]  # the first token is never predicted
        prompt = prompt[max(0, len(prompt) + len(answer) - length) :]
        pairs.append(([*prompt, *answer], len(prompt)))
    return Samples.of(pairs), cut


def plain_prompt(record: Record) -> str:
    """Return the prompt for a tokenizer without a chat template.

    Example:
        >>> print(plain_prompt(Record("Add.", "1 and 2", "3")), end="")
        ### Instruction:
        Add.
        <BLANKLINE>
        ### Input:
        1 and 2
        <BLANKLINE>
        ### Response:
    """
    given = f"### Input:\n{record.input}\n\n" if record.input else ""
    return f"### Instruction:\n{record.instruction}\n\n{given}### Response:\n"


def _tokens(record: Record, tokenizer: Any) -> tuple[list[int], list[int]]:
    ending = tokenizer.eos_token or ""
    if tokenizer.chat_template:
        question = "\n\n".join(part for part in (record.instruction, record.input) if part)
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        turns.append({"role": "assistant", "content": record.output})
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        # some templates rewrite what came before; then the answer is spelled out
        answer = whole[len(prompt) :].rstrip() if whole.startswith(prompt) else ""
        answer = answer or record.output + ending
        return _ids(prompt, tokenizer), _ids(answer, tokenizer)
    start: list[int] = []
    if tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("")["input_ids"]:
        start = [tokenizer.bos_token_id]
    prompt = [*start, *_ids(plain_prompt(record), tokenizer)]
    return prompt, _ids(record.output + ending, tokenizer)


def _ids(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _pieces(text: str) -> list[str]:
    pieces, size = [""], 0
    for line in text.splitlines(keepends=True):
        if size > PIECE_CHARS:
            pieces.append("")
            size = 0
        pieces[-1] += line
        size += len(line)
    return pieces
