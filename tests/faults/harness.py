"""Commands in forked children that can be killed at any moment and at any file operation."""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ["OMP_NUM_THREADS"] = "1"  # bitwise equality, and gentle to others on the machine
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
)
# A clean process imports the heavy modules once and is forked for every child.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["heavy"])
CHANGES = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "shutil.rmtree",
    "sqlite3.connect",
    "os.truncate",
}
WITHIN = {"os.remove", "os.rmdir"}  # shutil.rmtree names files relative to their folder


def child(module, argv, log, watch=None, kill_at=0, limits=None):
    """Start `python module.py argv` in a forked child, its output appended to the file `log`.

    watch: folders; at operation number `kill_at` that changes a file in them the child sends
    itself SIGKILL, before the operation. The number of operations ends up in LOG.count.
    """
    process = FORK.Process(
        target=_run,
        args=(
            module,
            [str(a) for a in argv],
            str(log),
            [str(w) for w in watch or []],
            kill_at,
            limits,
        ),
    )
    process.start()
    return process


def _run(module, argv, log, watch, kill_at, limits):
    os.setpgid(0, 0)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout.reconfigure(line_buffering=True)
    count = 0

    def hook(event, args):
        nonlocal count
        place = str(args[0]) if args else ""
        inside = any(place.startswith(w) for w in watch) or watch and event in WITHIN
        if event not in CHANGES or not inside:
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for name, value in (limits or {}).items():
        import resource

        resource.setrlimit(getattr(resource, name), (value, value))
    sys.addaudithook(hook)
    try:
        importlib.import_module(module).main(argv)
    finally:
        Path(log + ".count").write_text(str(count))


def run(module, argv, log, **options):
    """The exit code of a child that is waited for."""
    process = child(module, argv, log, **options)
    process.join(300)
    return process.exitcode


def killed_after(seconds, module, argv, log):
    """Start, SIGKILL after some seconds, and say whether it was still at work."""
    process = child(module, argv, log)
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def training(out):
    """What two equal runs have in common, bit by bit: losses, weights, optimiser, file names."""
    import torch
    from safetensors.torch import load_file

    out = Path(out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["tokens_per_second"], line["data_wait"]
    [last] = out.glob("checkpoint-*")
    state = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    tensors = {
        **load_file(last / "adapter_model.safetensors"),
        **{f"{k} {n}": v for k, values in state.items() for n, v in values.items()},
    }
    return {
        "lines": lines,
        "names": sorted(str(p.relative_to(out)) for p in out.rglob("*")),
        "bits": {name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
    }


@contextlib.contextmanager
def small_disk(folder, size="1m"):
    """A disk of its own size at `folder`; OSError where the machine does not let us mount one."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        raise OSError(made.stderr)
    try:
        yield Path(folder)
    finally:
        for _ in range(50):  # a child may still be on its way out
            if not subprocess.run(["umount", str(folder)], capture_output=True).returncode:
                break
            time.sleep(0.1)


def fill(folder, leave=0):
    """Use up the disk but for `leave` bytes; returns the file to delete for getting them back."""
    ballast = Path(folder) / "ballast"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    ballast.write_bytes(b"x" * max(0, free - leave))
    return ballast
