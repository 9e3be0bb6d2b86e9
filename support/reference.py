"""The reference's log-probabilities on disk: each is computed once, for all epochs and runs.

A SQLite file for each base model (weights, config, dtype, kind of device), a row for each record,
under a hash of everything that the model saw of it.
"""

import hashlib
import sqlite3
from pathlib import Path

import torch


class ReferenceCache:
    """{key: (3, 3) fp32 table}, shared by all processes of this machine."""

    def __init__(self, path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = sqlite3.connect(path, timeout=60)  # seconds to wait for the other processes
        self.file.execute("PRAGMA synchronous = OFF")  # a killed process loses nothing all the same
        self.file.execute("CREATE TABLE IF NOT EXISTS tables (key BLOB PRIMARY KEY, nats BLOB)")

    def get(self, key):
        found = self.file.execute("SELECT nats FROM tables WHERE key = ?", (key,)).fetchone()
        if found is None:
            return None
        return torch.frombuffer(bytearray(found[0]), dtype=torch.float32).view(3, 3)

    def put(self, tables):
        """{key: (3, 3) table}, all or nothing."""
        rows = [(key, table.cpu().numpy().tobytes()) for key, table in tables.items()]
        with self.file:
            self.file.executemany("INSERT OR IGNORE INTO tables VALUES (?, ?)", rows)


def key_of(rows):
    """A hash of all that the model sees of a record: tokens, pixels, cells. So template, tokenizer,
    image processing and data are in it without being named."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        seen = [*sorted(row.inputs.items()), *zip(row.cells, row.responses)]
        for name, tensor in seen:
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.digest()
