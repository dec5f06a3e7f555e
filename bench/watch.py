"""Run a benchmark in a process of its own, and end that process where one call outlasts its share.

A call cannot be interrupted within its process. So a worker measures, and this process receives the report after every
case, writes it, and watches the time. Where a call takes too long it ends the worker, lists the provider as absent with
the time it took, and starts another worker, which goes on where the report ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from .common import Case, Clock, Settings, Watch
from .report import Report

Work = Callable[[Report], None]
POLL = 0.1  # seconds between two looks at the clock
GRACE = 20.0  # seconds beyond the time limit for what follows the last case


def run(settings: Settings, work: Work, save: Callable[[Report], object]) -> Report:
    """Call ``work(report)`` in another process until it ends; ``save`` gets the report after each case.

    Args:
        settings: ``seconds`` limits the whole run, ``share`` a single call.
        work: called again with the same report after a call that took too long; it must leave out what is done.
        save: called in this process.

    Raises:
        RuntimeError: the worker failed, and its error is on stderr; or the time was over before there was a result.
    """
    # A fork is at once ready, but a process that has used CUDA or OpenMP threads must not be forked; this one has not.
    fork = settings.kind == "cpu" and sys.platform == "linux"
    context: Any = multiprocessing.get_context("fork" if fork else "spawn")
    began = time.monotonic()
    report: Report | None = None
    while True:
        clock = Clock(context)
        ours, theirs = context.Pipe()
        worker = context.Process(target=_measure, args=(settings, report, work, clock, theirs, ours if fork else None))
        worker.start()
        theirs.close()
        try:
            report, late = _follow(settings, report, clock, ours, began, save)
        finally:
            _end(worker)
        if not late:
            return report
        save(report)
        if report.over:
            return report


def _follow(
    settings: Settings, report: Report | None, clock: Clock, connection: Connection, began: float, save: Any
) -> tuple[Report, bool]:
    """Receive reports until the worker is done (False), or one call or the whole takes too long (True)."""
    case = Case("measuring the limits", 0, ())
    while True:
        if connection.poll(POLL):
            try:
                message = connection.recv()
            except EOFError:
                raise RuntimeError(f"the benchmark's process failed in: {case.what}; its error is above") from None
            if message is None and report is not None:
                return report, False
            if isinstance(message, Case):
                case = message
                print(f"[{time.monotonic() - began:.0f} s] {case.what}", file=sys.stderr, flush=True)
            else:
                report = message
                save(report)
        elif (running := clock.running) and running[0] > settings.share and report is not None and case.providers:
            key, size = case.providers[running[1]]
            report.drop(key, size, running[0], case.what, case.threads, ended=True)
            return report, True
        elif time.monotonic() - began > settings.seconds + GRACE:
            if report is None:
                raise RuntimeError(f"the time was over in: {case.what}; there is no result yet")
            report.over = True
            report.skipped.append(f"{case.what} (ended, the time was over)")
            return report, True


def _end(worker: Any) -> None:
    """End the worker and the processes that it has started."""
    if worker.is_alive() and hasattr(os, "killpg"):
        try:
            os.killpg(worker.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not yet become the leader of a group
            worker.kill()
    elif worker.is_alive():
        worker.kill()
    worker.join()


def _measure(
    settings: Settings, report: Report | None, work: Work, clock: Clock, connection: Connection, other: Any
) -> None:
    """The worker: measure, and send the report after each case; None at the end."""
    if other is not None:
        other.close()
    if hasattr(os, "setsid"):
        os.setsid()
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    torch.set_num_threads(settings.threads[0])
    torch.manual_seed(0)
    if report is None:
        report = Report(settings)
    else:
        report.resume()
    report.watch = Watch(clock, connection)
    report.watch.finished(report)
    work(report)
    report.watch.finished(report)
    connection.send(None)


def _end_with_parent(connection: Connection) -> None:
    try:
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)
