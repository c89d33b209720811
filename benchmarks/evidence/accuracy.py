"""Log-likelihoods of the options of multiple-choice questions: each question is read once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence.questions import Encoded


def option_log_likelihoods(
    model: Any, questions: Sequence[Encoded], *, batch_size: int = 8, pad: int = 0
) -> list[list[float]]:
    """Return log p(option | prompt), summed over the option's tokens, for every option.

    The options of a question stand side by side behind its prompt; each sees the prompt and
    itself, from the same position on, and only their tokens go through the head's softmax.

    Args:
        model: A causal model of transformers that takes finished four-dimensional masks.
        questions: The questions.
        batch_size: Questions of a forward pass.
        pad: Token id that fills up batches.
    """
    order = sorted(range(len(questions)), key=lambda i: len(_row(questions[i])[0]))
    found: list[list[float]] = [[] for _ in questions]
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for at in range(0, len(order), batch_size):
                chosen = [questions[i] for i in order[at : at + batch_size]]
                inputs = _batch(chosen, pad, dtype)
                first = min(len(q.prompt) for q in chosen) - 1
                length = inputs["input_ids"].shape[1]
                logits = model(
                    **{name: value.to(device) for name, value in inputs.items()},
                    logits_to_keep=torch.arange(first, length, device=device),
                ).logits
                for i, question, row in zip(order[at:], chosen, logits, strict=False):
                    found[i] = _read(question, row, first)
    finally:
        model.train(training)
    return found


def _row(question: Encoded) -> tuple[list[int], list[int], list[int]]:
    """Lay a question out: token ids, positions, and which option (0: the prompt) each is of."""
    ids, positions = [*question.prompt], [*range(len(question.prompt))]
    owners = [0] * len(ids)
    for n, option in enumerate(question.options, 1):
        inner = option[:-1]  # the last token is predicted, and predicts nothing
        ids += inner
        positions += range(len(question.prompt), len(question.prompt) + len(inner))
        owners += [n] * len(inner)
    return ids, positions, owners


def _batch(questions: Sequence[Encoded], pad: int, dtype: torch.dtype) -> dict[str, Tensor]:
    rows = [_row(question) for question in questions]
    length = max(len(ids) for ids, _, _ in rows)
    input_ids = torch.full((len(rows), length), pad)
    positions = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.full((len(rows), 1, length, length), torch.finfo(dtype).min, dtype=dtype)
    mask[:, 0].diagonal(dim1=1, dim2=2).zero_()  # padding sees itself, so that no row is empty
    for i, (ids, places, owners) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        positions[i, : len(ids)] = torch.tensor(places)
        owner = torch.tensor(owners)
        seen = ((owner[None] == 0) | (owner[None] == owner[:, None])).tril()
        mask[i, 0, : len(ids), : len(ids)][seen] = 0
    return {"input_ids": input_ids, "position_ids": positions, "attention_mask": mask}


def _read(question: Encoded, logits: Tensor, first: int) -> list[float]:
    """Sum what a question's rows of logits, from position ``first`` on, say of its options."""
    at, values = len(question.prompt), []
    for option in question.options:
        inner = range(at, at + len(option) - 1)
        places = torch.tensor([len(question.prompt) - 1, *inner]) - first
        chosen = logits[places.to(logits.device)].float().log_softmax(-1)
        targets = torch.tensor(option, device=logits.device)
        values.append(float(chosen.gather(1, targets[:, None]).sum(dtype=torch.float64)))
        at += len(option) - 1
    return values
