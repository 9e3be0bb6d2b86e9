"""A run's folder: checkpoint-N/ (adapter, optimiser, options), metrics.jsonl, curves.png.

A checkpoint is whole or absent: it is written under another name, flushed and renamed, and older
ones go only after that. It carries hashes of its files, metrics.jsonl as it was then, and hashes of
the records that were trained on: a run that goes on from it goes on with the same, or is refused.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch

from support.cli import UserError
from support.files import lock, need_same, whole_lines


class RunFolder:
    """The folder of a run, which it holds the lock of."""

    def __init__(self, path, resume):
        self.path = Path(path)
        self.metrics = Path(path, "metrics.jsonl")
        self.hashes, self.hashed_steps = {}, 0  # {record number: hash} of the first steps' records
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.path)
        if not resume and (self.checkpoints() or self.logged()):
            raise UserError(f"{path}: holds another run; choose another --out, or --resume it")

    def checkpoints(self):
        """Our own folders, oldest first; checkpoint-3-backup is somebody else's."""
        found = {}
        for folder in self.path.glob("checkpoint-*"):
            ours = re.fullmatch(r"checkpoint-(\d+)", folder.name)
            if ours:
                found[int(ours[1])] = folder
        return [found[step] for step in sorted(found)]

    def save(self, step, run, optimizer):
        """checkpoint-STEP of a train.Run. Where it cannot be written, the earlier ones stay as they
        were."""
        final = self.path / f"checkpoint-{step}"
        unfinished = self.path / "unfinished"
        try:
            if not final.exists():
                run.policy.save_pretrained(unfinished)  # PEFT's format
                torch.save(optimizer.state_dict(), unfinished / "optimizer.pt")
                trained_on = self.trained_on(step, run)
                (unfinished / "records.json").write_text(json.dumps(trained_on))
                (unfinished / "metrics.jsonl").write_bytes(self.logged())
                about = {**run.identity, "left_out": run.left_out, "files": hashes(unfinished)}
                (unfinished / "run.json").write_text(json.dumps(about, indent=1))
                for path in [*unfinished.iterdir(), unfinished]:
                    flush(path)
                unfinished.rename(final)
                flush(self.path)
        except Exception as error:  # a full disk has several kinds: OSError, safetensors', torch's
            raise UserError(
                f"{final}: cannot be written ({error}); earlier checkpoints are as they were, and "
                "--resume goes on from the last"
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        for folder in self.checkpoints():
            if folder != final:
                shutil.rmtree(folder, ignore_errors=True)

    def load(self, run, optimizer):
        """Put the last checkpoint back, if there is one; returns the step to go on with."""
        from peft import load_peft_weights, set_peft_model_state_dict

        if not self.checkpoints():
            self.cut_metrics(0)
            return 0
        folder = self.checkpoints()[-1]
        try:
            about = json.loads((folder / "run.json").read_text())
            for name, _ in about["files"].items() - hashes(folder).items():
                raise ValueError(f"{name} is not what was saved")
            adapter = load_peft_weights(folder, "cpu")
            state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
            trained_on = json.loads((folder / "records.json").read_text())
            kept = (folder / "metrics.jsonl").read_bytes()
            if not self.logged().startswith(kept):
                raise ValueError("metrics.jsonl beside it is not what it was")
        except Exception as error:  # JSON, safetensors and torch have a kind each
            raise UserError(f"{folder}: damaged, cannot resume from it: {error}") from error
        need_same(folder, about, run.identity)
        step = int(folder.name.split("-")[1])
        self.need_same_records(step, run, trained_on)
        run.left_out.update(about["left_out"])
        set_peft_model_state_dict(run.policy, adapter)
        optimizer.load_state_dict(state)
        self.cut_metrics(len(kept))
        return step

    # --- records ----------------------------------------------------------------------------------

    def trained_on(self, steps, run):
        """{record number: hash} of the records of the first steps, but for those left out."""
        for step in range(self.hashed_steps, steps):
            for number in run.examples.of_step(step):
                if number not in self.hashes:
                    self.hashes[number] = run.examples.records.hash(number)
        self.hashed_steps = steps
        skipped = set(run.left_out.values())
        return {number: hash for number, hash in self.hashes.items() if number not in skipped}

    def need_same_records(self, steps, run, trained_on):
        """Refuse data in which a record of the first steps is another one now."""
        records = run.examples.records
        for name, hash in trained_on.items():
            number = int(name)
            if records.hash(number) != hash:
                raise UserError(
                    f"{records.source(number)}: changed since it was trained on; put the record "
                    "back to go on with this run, or start another with a new --out"
                )
            self.hashes[number] = hash
        self.hashed_steps = steps

    # --- metrics.jsonl ----------------------------------------------------------------------------

    def logged(self):
        """What is in metrics.jsonl."""
        return self.metrics.read_bytes() if self.metrics.exists() else b""

    def cut_metrics(self, size):
        """What was logged behind the checkpoint will be logged again."""
        if self.logged():
            os.truncate(self.metrics, size)

    def log(self, line):
        """Append one step's metrics."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps(line) + "\n")

    def plot(self):
        """curves.png: loss, preference accuracy, margins and chosen log-prob over the steps."""
        from matplotlib.figure import Figure  # not pyplot, whose state belongs to a notebook

        lines = whole_lines(self.metrics)
        panels = {
            "loss (nats)": ["loss"],
            "preference accuracy": ["rewards/accuracies", "pair/accuracy_m"],
            "reward margin": ["rewards/margins"],
            "log p(chosen) (nats)": ["logps/chosen"],
        }
        figure = Figure(figsize=(16, 3.6), layout="constrained")
        for axis, (title, names) in zip(figure.subplots(1, len(panels)), panels.items()):
            for name in names + [f"eval/{name}" for name in names]:
                points = [(line["step"], line[name]) for line in lines if name in line]
                if points:
                    axis.plot(*zip(*points), ".-", label=name)
                    axis.legend(fontsize=8)
            axis.set(title=title, xlabel="optimiser step")
        figure.savefig(self.path / "curves.png", dpi=110)


def means(totals, seconds):
    """A line of metrics.jsonl from one step's sums."""
    records = totals["records"]
    line = {
        "records": records,
        "tokens_per_second": totals["tokens"] / max(seconds, 1e-9),  # a clock may stand still
        "data_wait": totals["waited"] / max(seconds, 1e-9),  # share of the time
    }
    for name, value in totals.items():
        if name not in ("records", "tokens", "waited", "stop"):
            line[name] = value / records
    return line


def hashes(folder):
    """{name: hash} of a folder's files, but for the page that PEFT writes for people."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name not in ("README.md", "run.json"):
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def flush(path):
    """Ask the disk to have it now, so that a power cut after the rename finds it whole."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
