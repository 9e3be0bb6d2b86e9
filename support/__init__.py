"""Plumbing. Imported first, it makes Ctrl-C one line even while the slow packages are imported."""

import os
import sys


def in_one_line(kind, error, trace):
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, error, trace)
    print("error: interrupted at the start", file=sys.stderr, flush=True)
    os._exit(2)


sys.excepthook = in_one_line
