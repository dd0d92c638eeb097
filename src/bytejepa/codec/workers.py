"""How the codec computes: threads, lanes and device. None of it changes what is computed."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Literal, TypeVar

from bytejepa.codec.lanes import Progress
from bytejepa.errors import CodecError, ConfigError
from bytejepa.processors import num_usable_processors

LANES = 8
"""Most lanes of a thread."""
GPU_LANES = 1024
"""The same on a GPU, where one thread feeds them all: keys and values of `default` then take 14 GB."""

Backend = Literal["auto", "cpu", "torch"]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to compute: none of it changes what is computed. Raises: ConfigError for no threads or lanes."""

    threads: int | None = None
    """None: as many as there are processors; one for a GPU."""
    lanes: int | None = None
    """Most lanes that a thread decodes together, but a whole block at least; None: 8, and 1,024 on a GPU. A lane is a block, or
    one of the up to 16 segments of a mixed one."""
    backend: Backend = "auto"
    """`cpu`: compiled for this processor; `torch`: PyTorch, on `device`; auto: torch if the device is a GPU."""
    device: str = "cpu"
    compile: bool | None = None
    """Let PyTorch compile the encoder; None: on a GPU, from 4 MB on."""
    on_progress: Progress | None = None
    """Called with the number of bytes done since the last call, from any thread but never from two at once."""

    def __post_init__(self) -> None:
        for name, value in (("threads", self.threads), ("lanes", self.lanes)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected 1 or more, got {value}")

    @property
    def num_threads(self) -> int:
        """Threads to use."""
        if self.threads:
            return self.threads
        if self.device != "cpu":
            return 1
        return num_usable_processors()

    @property
    def num_lanes(self) -> int:
        """Lanes of a thread to use."""
        return self.lanes or (LANES if self.device == "cpu" else GPU_LANES)


def in_threads(work: Callable[[Item, Progress], Result], items: Sequence[Item], settings: Settings) -> list[Result]:
    """Return the results of `work` on every item; an interruption or failure ends all threads at their next report."""
    lock, stopped = threading.Lock(), threading.Event()
    failures = list[BaseException]()

    def check() -> None:
        if stopped.is_set():
            raise CodecError("stopped")

    def report(num_bytes: int) -> None:
        check()
        if settings.on_progress is not None:
            with lock:
                settings.on_progress(num_bytes)

    def attempt(item: Item) -> Result:
        # the thread that fails stops the others itself: the waiting one may wake only after they took more items
        check()
        try:
            return work(item, report)
        except BaseException as error:
            failures.append(error)
            stopped.set()
            raise

    with ThreadPoolExecutor(settings.num_threads) as pool:
        futures = [pool.submit(attempt, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            if failures:
                raise failures[0]  # those after it may be no more than stopped
            return [future.result() for future in futures]
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
