"""Builds the embedded default: a small real LLaVA that hallucinates, preference records, test sets.

    python -m tiny.make --out DIR            everything (half an hour, one thread of a busy machine)
    python -m tiny.make --out DIR --quick    a miniature with a barely trained model, in seconds

The products that the repository has are in built/. The preference records and the test sets come
from known truth, and no two splits share a scene.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.answers import measure
from support.cli import NEEDED, UserError, parse, run_command
from support.files import write_json
from tiny.model import new_model, new_processor, train_language, train_tower
from tiny.records import Writer, write_records
from tiny.sets import (
    SIZES,
    draw_splits,
    write_amber,
    write_hallusionbench,
    write_mmstar,
    write_objhal,
)
from tiny.world import new_scenes
from vlm.prompts import Prompts


def build(out, size, seed):
    """All products in the folder `out`; returns the base model's rates."""
    import transformers

    torch.set_num_threads(1)  # sums in another order would give another model
    torch.manual_seed(seed)
    rng, seen, splits = draw_splits(size, seed)
    lessons = new_scenes(rng, size["train"], 0.6, seen)

    processor = new_processor()
    model = new_model()
    train_tower(model, processor, lessons, size["tower"], rng)
    prompts = Prompts(processor, "vicuna")
    train_language(model, prompts, lessons, size, rng)
    model.eval().save_pretrained(out / "model")
    processor.save_pretrained(out / "model")

    files = {}
    for name, share in (("prefs", 1), ("val", 0.125)):
        writer = Writer(model, prompts, splits[name], rng, seen)
        records = writer.captions()[: int(share * size["captions"])]
        records += writer.questions()[: int(share * size["yes_no"])]
        rng.shuffle(records)
        write_records(out / f"{name}.jsonl", records, files)
    write_amber(out / "amber", splits["amber"], rng)
    write_amber(out / "amber_val", splits["amber_val"], rng)
    write_hallusionbench(out / "hallusionbench", splits["hallusionbench"])
    write_objhal(out / "objhal", splits["objhal"])
    write_mmstar(out / "mmstar", splits["mmstar"], rng)
    rates = measure(model, prompts, out / "amber_val")["metrics"]
    manifest = {
        "seed": seed,
        "size": size,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "base model on amber_val (percent)": rates,
        "sha256": digest_of(out),
    }
    write_json(out / "manifest.json", manifest)
    return rates


def digest_of(folder):
    """sha256 over the products' names and contents, in order."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass
class Options:
    """What is typed.

    out                 folder for the products
    seed                of everything random
    quick               the miniature
    """

    out: Path = NEEDED
    seed: int = 1
    quick: bool = False


def make(args):
    if (args.out / "manifest.json").exists():
        raise UserError(f"{args.out} holds a build already: delete it or name another folder")
    print(json.dumps(build(args.out, SIZES["quick" if args.quick else "full"], args.seed)))


def main(argv=None):
    run_command(make, parse(Options, __doc__, argv))


if __name__ == "__main__":
    main()
