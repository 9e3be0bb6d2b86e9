"""A run's folder: checkpoint-N/ (adapter, optimiser, options), metrics.jsonl, curves.png.

A checkpoint is whole or absent: it is written under another name, flushed and renamed, and older
ones go only after that.
"""

import json
import os
import shutil
from pathlib import Path

import torch

from support.cli import UserError
from support.files import lock, whole_lines, write_lines


class RunFolder:
    """Rank 0 holds the folder's lock; all processes may read it. `identity` is what makes two runs
    the same, {name: value}; resuming with another is refused."""

    def __init__(self, path, resume, rank=0):
        self.path, self.rank = Path(path), rank
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.path) if rank == 0 else None
        used = self.checkpoints() or (self.path / "metrics.jsonl").exists()
        if rank == 0 and used and not resume:
            raise UserError(f"{path}: holds another run; choose another --out, or --resume it")

    def checkpoints(self):
        """The checkpoint folders, oldest first."""
        found = self.path.glob("checkpoint-*[0-9]")
        return sorted(found, key=lambda folder: int(folder.name.split("-")[1]))

    def save(self, step, policy, optimizer, identity):
        """checkpoint-STEP. Where it cannot be written, the earlier ones stay as they were."""
        final = self.path / f"checkpoint-{step}"
        unfinished = self.path / f"unfinished-{self.rank}"
        try:
            if not final.exists():
                policy.save_pretrained(unfinished)  # PEFT's format
                torch.save(optimizer.state_dict(), unfinished / "optimizer.pt")
                (unfinished / "run.json").write_text(json.dumps(identity, indent=1))
                for path in [*unfinished.iterdir(), unfinished]:
                    flush(path)
                self.put_in_place(unfinished, final)
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

    def put_in_place(self, unfinished, final):
        """Rename, unless another process has saved the same step in the meantime."""
        try:
            unfinished.rename(final)
        except OSError:
            if not final.exists():
                raise

    def load(self, policy, optimizer, identity):
        """Put the last checkpoint back, if there is one; returns the step to go on with."""
        from peft import load_peft_weights, set_peft_model_state_dict

        if not self.checkpoints():
            return 0
        folder = self.checkpoints()[-1]
        try:
            old = json.loads((folder / "run.json").read_text())
            adapter = load_peft_weights(folder, "cpu")
            state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        except Exception as error:  # JSON, safetensors and torch have a kind each
            raise UserError(f"{folder}: damaged, cannot resume from it: {error}") from error
        changes = [
            f"{name} was {old.get(name)!r}, is {value!r}"
            for name, value in identity.items()
            if old.get(name) != value
        ]
        if changes:
            raise UserError(f"{folder}: cannot resume, this is another run: {'; '.join(changes)}")
        set_peft_model_state_dict(policy, adapter)
        optimizer.load_state_dict(state)
        return int(folder.name.split("-")[1])

    # --- metrics.jsonl ----------------------------------------------------------------------------

    def metrics(self):
        """The lines of metrics.jsonl, dicts."""
        return whole_lines(self.path / "metrics.jsonl")

    def forget_metrics_after(self, step):
        """What was logged behind the checkpoint will be logged again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        write_lines(self.path / "metrics.jsonl", kept)

    def log(self, line):
        """Append one step's metrics."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def plot(self):
        """curves.png: loss, preference accuracy, margins and chosen log-prob over the steps."""
        from matplotlib.figure import Figure  # not pyplot, whose state belongs to a notebook

        lines = self.metrics()
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
                    style = "o--" if name.startswith("eval/") else "-"
                    axis.plot(*zip(*points), style, ms=4, label=name)
                    axis.legend(fontsize=8)
            axis.set(title=title, xlabel="optimiser step")
        figure.savefig(self.path / "curves.png", dpi=110)


def flush(path):
    """Ask the disk to have it now, so that a power cut after the rename finds it whole."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
