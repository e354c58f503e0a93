"""The order of work that a killed run continues to the same bytes."""
from collections.abc import Iterable, Iterator, Sequence

import torch

ROUND = 8  # batches in a round of sampling


def round_size(batch_size: int, device: str, is_served: bool) -> int | None:
    """Items after which the batch is emptied. A resumed run begins its round anew: the same bytes.

    Among other rows a row's sums are rounded otherwise: P(Yes) would differ in its last digits, and now and
    then a token. An emptying batch has a price, which a GPU shall not pay: there all is one round (None),
    with those differences. A server batches as it likes.
    """
    if is_served or torch.device(device).type != "cpu":
        return None
    return ROUND * batch_size


def rounds(items: Sequence, done: int, size: int | None) -> Iterator[Sequence]:
    """The items after the first `done`, in rounds of `size` (None: in one)."""
    size = size or max(1, len(items))
    for first in range(done, len(items), size):
        yield items[first:first + size]


def in_order(found: Iterable[tuple[int, list]]) -> Iterator[list]:
    """(index, value) pairs in any order -> the values in the order of their index, as soon as can be."""
    early = {}
    following = 0
    for index, value in found:
        early[index] = value
        while following in early:
            yield early.pop(following)
            following += 1
