"""Items in order, into as few groups of at most `most` tokens as can be, and those of like size."""
from bisect import bisect_left
from collections.abc import Sequence


def fill_evenly(alone: Sequence[int], own: Sequence[int], most: int) -> list[list[int]]:
    """The numbers of the items, group by group. No item alone may be larger than `most`.

    alone: the tokens of an item that begins a group; own: those that it adds to a group that has the item
    before it. The groups are filled one after the other, to the lowest limit that needs no more of them.

    Sixteen items of 100 behind 50 that all share, most = 1000: nine fit into a group (950), so two groups are
    needed. The lowest limit that needs no third is 850: each gets eight.
    """
    largest = max(alone, default=0)
    assert largest <= most, f"an item has {largest} tokens, more than a group of {most}"

    def fill(limit: int) -> list[list[int]]:
        """The groups, if an item that would bring one over the limit begins the next."""
        groups = []
        size = 0
        for i in range(len(alone)):
            if groups and size + own[i] <= limit:
                groups[-1].append(i)
                size += own[i]
            else:
                groups.append([i])
                size = alone[i]
        return groups

    # What an item shares with the one before it is no more than the group of that one has. So a higher limit
    # never needs more groups, and the lowest that needs no more can be bisected.
    fewest = len(fill(most))
    limits = range(largest, most)
    lowest = limits.start + bisect_left(limits, True, key=lambda limit: len(fill(limit)) == fewest)
    return fill(lowest)
