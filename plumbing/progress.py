"""The bar of a run that samples: how many items are done, a figure of the caller's, and tokens a second."""
import time
from typing import Any

from tqdm import tqdm

from plumbing import ranks


class Progress:
    """with Progress("score", "solution", n, done, engine) as progress: ...; progress.step("F1 61.2")

    n: the items of this rank; done: those that a killed run has done. engine: its `new_tokens` are counted.
    """

    def __init__(self, name: str, unit: str, n: int, done: int, engine: Any):
        self.engine = engine
        self.start = time.perf_counter()
        self.bar = tqdm(total=n, initial=done, desc=name, unit=unit, disable=ranks.rank() > 0)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def step(self, figure: str) -> None:
        """An item is done."""
        speed = self.engine.new_tokens / self.seconds
        self.bar.update()
        self.bar.set_postfix_str(f"{figure}, {speed:.0f} tokens/s")
