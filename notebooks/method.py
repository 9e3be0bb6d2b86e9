"""Draws docs/figures/method.png: two images, three responses, and what each objective compares.

    python -m notebooks.method

The panels are read off the registry in symmpo.py, by differentiating each term of the loss where
policy = reference. A cell is green (+) where the loss raises its log-ratio and red (-) where it
lowers it. A line joins two cells that stand in one sigmoid: black where both have one image, so
that Z cancels, and dashed red where they have two.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

import symmpo

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tiny" / "built"
SHOWN = ("dpo", "copo", "mdpo", "symmpo")
RAISED, LOWERED = "#a8d5ba", "#efb8b0"


def loss_of(name, term):
    """One term of an objective as a function of the nine log-ratios."""
    return lambda rho: terms_of(name, rho)[term].sum()


def terms_of(name, rho):
    table = symmpo.Table(rho.view(3, 3, 1), logp=rho.view(3, 3, 1), length=torch.ones(3, 1))
    return symmpo.loss_terms(name, table, symmpo.weights_of(name, {}))


def panel(axis, name):
    start, slope = torch.zeros(9), torch.zeros(9)
    for term, loss in terms_of(name, start).items():
        if loss.sum() == 0:
            continue  # Margin compares differences, whose Z is gone already
        slope += torch.autograd.functional.jacobian(loss_of(name, term), start)
        curvature = torch.autograd.functional.hessian(loss_of(name, term), start)
        for a, b in curvature.triu(diagonal=1).nonzero().tolist():
            join(axis, a, b)
    for image, response in symmpo.OBJECTIVES[name].cells:
        raised = slope[3 * image + response] < 0
        box = {"boxstyle": "square,pad=0.5", "color": RAISED if raised else LOWERED}
        sign = "+" if raised else "–"
        axis.text(response, image, sign, bbox=box, ha="center", va="center", size=13, zorder=3)
    axis.set(xlim=(-0.6, 2.6), ylim=(1.6, -0.6), title=name)
    axis.set_xticks(range(3), ["$y_w$", "$y_l$", "$y'_w$"], size=13)
    axis.set_yticks(range(2), ["$m$", "$m'$"], size=13)
    axis.tick_params(length=0)
    axis.spines[:].set_color("#cccccc")


def join(axis, a, b):
    """A line between two cells, given by their places in the flat table."""
    one_image = a // 3 == b // 3
    line = {"arrowstyle": "-", "lw": 2, "color": "black"}
    if abs(a - b) == 2:
        line["connectionstyle"] = "arc3,rad=-0.5"  # around the cell between them
    if not one_image:
        line |= {"color": "#c0392b", "ls": "--"}
    axis.annotate("", (b % 3, b // 3), (a % 3, a // 3), arrowprops=line, zorder=2)


def main():
    with open(TINY / "prefs.jsonl", encoding="utf-8") as lines:
        record = json.loads(lines.readlines()[1])
    figure, axes = plt.subplots(1, 6, figsize=(13, 2.5), layout="constrained")
    below = {
        "image": f"$y_w$: {record['chosen']}\n$y_l$: {record['rejected']}",
        "contrast_image": f"$y'_w$: {record['contrast_chosen']}",
    }
    for axis, field, title in zip(axes, below, ["$m$", "$m'$"]):
        axis.imshow(Image.open(TINY / record[field]))
        axis.set(title=title, xticks=[], yticks=[])
        axis.set_xlabel(below[field], size=9)
    for axis, name in zip(axes[2:], SHOWN):
        panel(axis, name)
    figure.savefig(ROOT / "docs" / "figures" / "method.png", dpi=110)


if __name__ == "__main__":
    main()
