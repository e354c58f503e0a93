"""A table of numbers that takes long to compute: a file keeps it, for a resumed run and for later ones.

    NAME.part   while it is computed: a .npy file that is mapped into memory; NaN: not computed yet
    NAME.npy    when it is whole

NAME has a hash in it of all that the numbers depend on (files.content_hash), so no others are taken for them.
Rank 0 alone reads and writes the files; every rank has the numbers.
"""
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing import ranks
from plumbing.files import naming


class StoredTable:
    """table = StoredTable(path, n, 2); table.rows[i] = 0.5, 0.7; ...; numbers = table.finish()

    path: the .npy file; None on the other ranks
    rows: fp32 (n, columns); what rank 0 writes into it is in the file
    """

    def __init__(self, path: Path | None, n: int, columns: int):
        self.path = path
        self.rows = np.empty((n, columns), dtype=np.float32)
        if path is not None:
            self.part = path.with_suffix(".part")
            self.rows = self._whole() if path.exists() else self._begun(n, columns)
        self.rows = ranks.from_first(self.rows)

    def _whole(self) -> np.ndarray:
        print(f"cached: {self.path}")
        return np.load(self.path, allow_pickle=False)

    def _begun(self, n: int, columns: int) -> np.ndarray:
        """The table that a killed run has left, or a new one of NaN."""
        if not self.part.exists():
            aside = self.part.with_suffix(".tmp")
            nothing = np.full((n, columns), np.nan, dtype=np.float32)
            with naming(self.part), open(aside, "wb") as file:
                np.save(file, nothing)  # written: in a mapped file, a full disk is a SIGBUS and no error
            os.replace(aside, self.part)
        return np.lib.format.open_memmap(self.part, mode="r+")

    def missing(self, batches: list[list[int]]) -> Iterator[list[int]]:
        """Those of the batches of row numbers that are not computed yet, with a bar over all of them."""
        for numbers in tqdm(batches, desc="reference", unit="batch", disable=ranks.rank() > 0):
            if np.isnan(self.rows[numbers]).any():
                yield numbers

    def fill(self, numbers: list[int], found: dict[int, list[float]]) -> None:
        """Write these rows. found: this rank's, by number; each row is one rank's."""
        own = np.zeros((len(numbers), self.rows.shape[1]))
        for i, number in enumerate(numbers):
            if number in found:
                own[i] = found[number]
        self.rows[numbers] = np.reshape(ranks.total(*own.ravel()), own.shape)

    def finish(self) -> np.ndarray:
        """Give the file its final name, and return the numbers."""
        if self.path is not None and not self.path.exists():  # a run beside this one may have done so
            self.rows.flush()
            os.replace(self.part, self.path)
        return np.array(self.rows)
