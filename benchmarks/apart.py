"""One piece of work in a process of its own, which may crash, hang or grow without hurting the table it is for.

Limits are seconds of processor time, so that what else runs on the machine does not decide who finishes; a process that gets no processor
is given up after ten times as long and a minute.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from typing import Any


def apart(
    work: Callable[[Any], Any], state: Any, seconds: float, prepare: Callable[[Any], Any] | None = None, patience: float = 300.0
) -> Any:
    """`work(state)` or `work(prepare(state))` in a forked process; a string says why there is no result.

    Args:
        work: gets `seconds` of processor time from the moment at which `prepare` is done; must not return a string.
        prepare: what does not count, such as building the network; gets `patience` seconds.
    """
    context = multiprocessing.get_context("fork")
    mine, other = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, state, seconds, prepare, other))
    process.start()
    other.close()
    try:
        for limit, what in ((patience, "preparation"), (60 + 10 * seconds, "result")):
            if not mine.poll(limit):
                return f"no {what} after {limit:.0f} s of waiting"
            found = mine.recv()
            if isinstance(found, str):
                return found
        return found
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGXCPU
        return f"no result after {seconds:.0f} s" if late else f"the process died with code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _child(work: Callable[[Any], Any], state: Any, seconds: float, prepare: Callable[[Any], Any] | None, pipe: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        if prepare is not None:
            state = prepare(state)
        pipe.send(None)
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
        pipe.send(work(state))
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0][:300])
