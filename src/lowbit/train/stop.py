"""What SIGINT, SIGTERM and SIGHUP do to a run: it ends once what it did is saved."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Leave(BaseException):
    """Ends a run from within; it does not leave `lowbit.train.trainer`."""


class Stop:
    """Which signal asked for the end of a run, and whether it waits for what is being done.

    Attributes:
        signal: the first signal that came; None so far.
        patient: whether a signal lets the run go on, which then looks at `signal`. Otherwise it raises `Leave`, as
            the second signal of a kind always does.
        saved: the step that the run would go on from; None before there is anything to go on from.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.patient = False
        self.saved: int | None = None
        self._before = {number: signal.getsignal(number) for number in SIGNALS}

    def install(self) -> None:
        """Take the signals, but for those that the process was started to ignore, as by ``nohup``."""
        if threading.current_thread() is threading.main_thread():
            for number, before in self._before.items():
                if before is not signal.SIG_IGN:
                    signal.signal(number, self._receive)

    def restore(self) -> None:
        """Give the signals back to who had them."""
        if threading.current_thread() is threading.main_thread():
            for number, before in self._before.items():
                if before is not None:
                    signal.signal(number, before)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.signal not in {None, number}:
            return  # on its way out for another reason
        again = self.signal is not None
        self.signal = signal.Signals(number)
        if again or not self.patient:
            raise Leave
        with contextlib.suppress(OSError):  # print() is not safe here: the signal may have come within another print()
            text = f"\nlowbit: {self.signal.name}: finishing this step and saving; once more stops at once\n"
            os.write(2, text.encode())


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """Take the signals within this context."""
    stop = Stop()
    stop.install()
    try:
        yield stop
    finally:
        stop.restore()
