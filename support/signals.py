"""Signals: the loop ends by itself, and its reading workers live as long as it needs them."""

import os
import signal
import threading


class StopRequest:
    """Inside the with block, Ctrl-C, SIGTERM and a closed terminal (SIGHUP) only set `.received`:
    the loop ends by itself."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __enter__(self):
        self.received = False
        self.before = {}
        for number in self.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self.received = True

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def outlive_a_signal(worker):
    """For data loading workers. A signal to the whole process group ends the run only after the
    micro-batch at hand, and they have to live until then; but not longer than three seconds, or a
    parent that fails would wait for them for ever."""

    def end_soon(number, frame):
        timer = threading.Timer(3, os._exit, [0])
        timer.daemon = True  # a worker that ends by itself does not wait for it
        timer.start()

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_soon)
