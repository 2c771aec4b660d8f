"""Note [How time is taken on a GPU].

Times are those of CUDA events, of blocks of calls long enough that the wait before the first one
does not count. Variants take turns, block by block, in an order shuffled for every round by a fixed
seed, and the whole is done twice: where the two repeats differ by more than two variants do, the
variants are called equal. Kernels are timed as replays of a CUDA graph that goes once through
enough copies of all buffers to flush the L2 cache; a replay contains the gaps between launches,
about a microsecond each (estimated, not measured).

On a CPU, ``perf_counter`` takes the place of events, and a captured call is the call itself: for
dry runs of the script, whose times mean nothing.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]
L2_BYTES = 120e6  # buffers that take turns are together larger than this: twice an H200's L2
MOST_COPIES = 64


class Clock:
    """Time, memory and graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"

    def synchronize(self) -> None:
        """Waits for the device; raises what a kernel did wrong."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def alive(self) -> bool:
        """Whether the device still takes work.

        After an illegal access it does not, for good; and after a capture that failed, PyTorch's
        generator may refuse to draw.
        """
        try:
            if self.cuda:
                self.synchronize()
                torch.empty(1, device=self.device).normal_()
                self.synchronize()
        except RuntimeError:
            return False
        return True

    def block(self, call: Call, count: int = 1) -> float:
        """Seconds per call of ``count`` calls one after the other, from an idle device."""
        self.synchronize()
        if not self.cuda:
            begin = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - begin) / count
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / count

    def each(self, call: Call, count: int) -> list[float]:
        """Seconds of every one of ``count`` calls, without waiting between them."""
        if not self.cuda:
            return [self.block(call) for _ in range(count)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        self.synchronize()
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        self.synchronize()
        pairs = itertools.pairwise(events)
        return [begin.elapsed_time(end) * 1e-3 for begin, end in pairs]

    def host(self, call: Call, count: int) -> float:
        """Seconds per call that the host spends, the device not waited for."""
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        seconds = (time.perf_counter() - begin) / count
        self.synchronize()
        return seconds

    def capture(self, call: Call, warm_up: int = 3) -> Call:
        """``call`` as a CUDA graph: what is returned replays it."""
        if not self.cuda:
            call()
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm_up):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()

        def replay(graph: Any = graph, kept: object = kept) -> object:
            graph.replay()
            return kept

        return replay

    def peak(self, call: Call) -> int | None:
        """Bytes that a call allocates at most, above what is allocated before; None on a CPU."""
        call()
        if not self.cuda:
            return None
        self.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before


@contextlib.contextmanager
def no_collector():
    """Python's collector is off inside."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """low, median, high; linear between order statistics."""
    if len(values) == 1:
        return {"low": values[0], "median": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": low, "median": median, "high": high}


@dataclass(frozen=True)
class Effort:
    """How long a cell is measured: ``repeats`` times ``rounds`` blocks of ``seconds`` a variant."""

    rounds: int = 5
    repeats: int = 2
    seconds: float = 0.008
    most_calls: int = 400


def interleave(
    clock: Clock, calls: Mapping[str, Call], effort: Effort
) -> dict[str, list[list[float]]]:
    """Times every call by turns: name -> one list of seconds per repeat, all of one length."""
    shuffle = random.Random(0).shuffle
    counts = {}
    for name, call in calls.items():
        clock.block(call, 2)
        once = max(clock.block(call, 2), 1e-7)
        counts[name] = max(1, min(effort.most_calls, math.ceil(effort.seconds / once)))
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    order = list(calls)
    with no_collector():
        for _ in range(effort.repeats):
            for name in calls:
                times[name].append([])
            for _ in range(effort.rounds):
                shuffle(order)
                for name in order:
                    times[name][-1].append(clock.block(calls[name], counts[name]))
    return times


def summary(times: Mapping[str, list[list[float]]], base: str | None) -> dict[str, dict[str, Any]]:
    """Medians, quartiles, the spread of the repeats, and ratios to ``base`` round by round.

    Returns:
        name -> ``seconds`` (quartiles), ``spread`` (of the repeats' medians, relative), and where
        base is there ``ratio`` (quartiles), ``ratio_spread`` and ``verdict``: "equal" where the
        ratio is no further from 1 than the repeats are apart, else "slower" or "faster".
    """
    flat = {name: [t for repeat in repeats for t in repeat] for name, repeats in times.items()}
    table: dict[str, dict[str, Any]] = {}
    for name, repeats in times.items():
        medians = [statistics.median(repeat) for repeat in repeats]
        middle = statistics.median(flat[name])
        row: dict[str, Any] = {
            "seconds": quartiles(flat[name]),
            "spread": (max(medians) - min(medians)) / middle,
            "blocks": len(flat[name]),
        }
        table[name] = row
    for name, row in table.items():
        if base not in table:
            continue
        pairs = zip(flat[name], flat[base], strict=True)
        row["ratio"] = quartiles([mine / other for mine, other in pairs])
        row["ratio_spread"] = max(row["spread"], table[base]["spread"])
        distance = row["ratio"]["median"] - 1
        equal = name == base or abs(distance) <= row["ratio_spread"]
        row["verdict"] = "equal" if equal else "slower" if distance > 0 else "faster"
    return table


def copies(bytes_per_call: float, limit: float = L2_BYTES) -> int:
    """How many sets of buffers must take turns so that none is found in the L2 cache."""
    return max(2, min(MOST_COPIES, math.ceil(limit / max(bytes_per_call, 1.0)) + 1))


def sweep(clock: Clock, calls: Sequence[Call], replays: int = 50) -> dict[str, Any]:
    """Seconds per call of calls on different buffers, as replays of one graph of them all.

    Their results are kept until the end of a sweep, so that outputs take turns as well.
    """

    def everything() -> list[object]:
        return [call() for call in calls]

    mode = "graph" if clock.cuda else "eager"
    try:
        run = clock.capture(everything)
    except RuntimeError as error:
        if not clock.alive():
            raise
        run, mode = everything, f"eager, since capture failed: {str(error).splitlines()[0]}"
    for _ in range(5 if clock.cuda else 1):
        run()
    with no_collector():
        times = [seconds / len(calls) for seconds in clock.each(run, replays)]
    return {"seconds": quartiles(times), "replays": replays, "copies": len(calls), "mode": mode}
