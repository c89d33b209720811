"""A batch taken apart into its samples, for scores that need every sample by itself."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor


def one_by_one(batches: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield every sample of every batch as a batch of one.

    Tensors with as many rows as the batch are cut; whatever else there is goes along as it is.

    Args:
        batches: Keyword arguments of a model; the first tensor's first dimension counts samples.

    Raises:
        ValueError: A batch has no tensor with a first dimension.

    Example:
        >>> import torch
        >>> batch = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "use_cache": False}
        >>> [sample["input_ids"].tolist() for sample in one_by_one([batch])]
        [[[1, 2]], [[3, 4]]]
    """
    for batch in batches:
        rows = [len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim]
        if not rows:
            raise ValueError(f"a batch must hold a tensor of samples, got {sorted(batch)}")
        for i in range(rows[0]):
            yield {
                name: v[i : i + 1] if isinstance(v, Tensor) and v.ndim and len(v) == rows[0] else v
                for name, v in batch.items()
            }
