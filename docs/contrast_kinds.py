"""Draws contrast_kinds.png: every kind of `data.py contrast` for images of the tiny world.

    python docs/contrast_kinds.py
"""
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

KINDS = ("crop", "crop-large", "random", "clip", "black", "noise", "moco", "synthetic")


def contrasts(folder, records):
    """{kind: records with a contrast image}; the edits in tiny/prefs.jsonl serve as synthetic."""
    edits = [{"image": r["image"], "contrast_image": str(data.TINY / r["contrast_image"])}
             for r in records]
    (folder / "edits.jsonl").write_text("".join(json.dumps(r) + "\n" for r in edits))
    made = {}
    for kind in KINDS:
        out = folder / f"{kind}.jsonl"
        try:
            data.main(["contrast", str(data.TINY / "prefs.jsonl"), "--out", str(out),
                       "--kind", kind, "--encoder", str(data.TINY / "model"), "--step", "300",
                       "--mapping", str(folder / "edits.jsonl")])
        except SystemExit as end:
            assert end.code == 0
        lines = [json.loads(line) for line in open(out, encoding="utf-8")]
        made[kind] = {(r["image"], r["prompt"]): r for r in lines}
    return made


def main():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    records = [json.loads(line) for line in open(data.TINY / "prefs.jsonl", encoding="utf-8")]
    edited = [r for r in records if r["kind"] == "edit" and len(r["chosen"].split()) > 9][:3]
    with tempfile.TemporaryDirectory() as folder:
        made = contrasts(Path(folder), edited)
        figure, axes = plt.subplots(len(edited), len(KINDS) + 1, figsize=(13.5, 5))
        for row, record in zip(axes, edited):
            own = next(k for k in made["crop"] if k[0].endswith(record["image"])
                       and k[1] == record["prompt"])
            shown = [("image", data.TINY / record["image"])]
            for kind in KINDS:
                found = made[kind][own]
                title = f"{kind} {found['similarity']:.2f}" if kind == "clip" else kind
                shown.append((title, Path(folder) / found["contrast_image"]))
            for axis, (title, file) in zip(row, shown):
                axis.imshow(data.open_image(str(file)), interpolation="nearest")
                axis.set_title(title, fontsize=10)
                axis.axis("off")
        figure.tight_layout()
        figure.savefig(ROOT / "docs" / "contrast_kinds.png", dpi=110)


if __name__ == "__main__":
    main()
