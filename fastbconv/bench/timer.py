"""Note [How time is taken].

All columns of one cell take turns in one process, one call each, in an order that is shuffled for
every turn (by a fixed seed), so that each meets the same machine and no column always follows the
same neighbour. A call is timed by wall clock from its start until its results have been released:
giving pages back is part of what a large output costs. Everything that a column does not do again
at each call (building leaves, converting layouts) lies outside. Warm-up turns are thrown away.
Beside each time stand the page faults and the involuntary context switches of the process: the
first say whether outputs were fresh pages, the second whether the machine was shared. The garbage
collector of Python is off meanwhile.
"""

from __future__ import annotations

import gc
import random
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

Call = Callable[[], object]
MAX_TURNS = 2000


class Usage(NamedTuple):
    """Counters of the process since it started."""

    faults: int
    preemptions: int


def process_usage() -> Usage:
    """Page faults that read no disk, and involuntary context switches, of all threads so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(usage.ru_minflt, usage.ru_nivcsw)


@dataclass
class Samples:
    """One entry per turn."""

    seconds: list[float] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)
    preempted: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Effort:
    """How long one cell is measured.

    Attributes:
        budget: seconds per column, on average over columns; turns go on until it is spent.
        turns: least number of turns, whatever they cost.
        warm_up: turns before the first that counts.
    """

    budget: float = 1.0
    turns: int = 15
    warm_up: int = 3


def interleave(
    calls: Mapping[str, Call],
    effort: Effort,
    *,
    between: Call | None = None,
    clock: Callable[[], float] = time.perf_counter,
    usage: Callable[[], Usage] = process_usage,
) -> dict[str, Samples]:
    """Times every call by turns; see Note [How time is taken].

    Args:
        calls: column name -> what to time.
        effort: when to stop.
        between: done before each call, untimed: evicts caches, say.
        clock: seconds, for tests.
        usage: counters, for tests.

    Returns:
        column name -> samples; all columns have the same number of turns.
    """
    samples = {name: Samples() for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        began = clock()
        turn = -effort.warm_up
        while turn < MAX_TURNS:
            if turn == 0:
                began = clock()
            enough = turn >= effort.turns
            if enough and clock() - began >= effort.budget * len(calls):
                break
            shuffle(order)
            for name in order:
                if between is not None:
                    between()
                _time_one(calls[name], samples[name] if turn >= 0 else Samples(), clock, usage)
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def _time_one(
    call: Call, into: Samples, clock: Callable[[], float], usage: Callable[[], Usage]
) -> None:
    before = usage()
    start = clock()
    call()  # its result is dropped here, before the clock is read again
    seconds = clock() - start
    after = usage()
    into.seconds.append(seconds)
    into.faults.append(after.faults - before.faults)
    into.preempted.append(after.preemptions > before.preemptions)
