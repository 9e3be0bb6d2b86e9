"""What the notebooks share: how they look, the exact world of eight captions, fits in it, and
samples of the tiny LLaVA with bounds on Z. Each notebook says what it uses."""

import random
import time

import numpy as np
import torch

import symmpo
from support.files import write_lines  # noqa: F401 - the notebooks write records with it

# Okabe and Ito's palette, which can be told apart without colour vision.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, GREY = "#CC79A7", "#777777"
THRESHOLD = np.log(1.5)  # |c| beyond which sigma(-c) is not 1/2 to 20 %


def start():
    """Sets what all pictures look like (legible on a projector); returns the time."""
    import matplotlib.pyplot as plt
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it brings
    plt.rcParams.update({"figure.dpi": 80, "font.size": 13, "lines.linewidth": 2})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"legend.frameon": False, "figure.constrained_layout.use": True})
    return time.time()


def seconds(started):
    return round(time.time() - started)


# --- the exact world: notebooks 1 and 2 -----------------------------------------------------------


class ExactWorld:
    """Eight images, eight captions: each shows, or names, a subset of {cup, fork, knife}.

    reward (8, 8): +1 for a true object, -1 for a false one. ref (8, 8): log pi_ref(y|m) of a model
    that captions decently and adds a knife to a fork. optimal: log pi*; c[m, m']: the offset.
    """

    def __init__(self, beta):
        self.beta = beta
        sets = torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)]).double()
        self.labels = ["∅", "k", "f", "fk", "c", "ck", "cf", "cfk"]
        self.size = sets.sum(-1)  # objects in each image
        shown, named = sets[:, None].bool(), sets[None]  # image, caption
        p = torch.where(shown, torch.tensor([0.85, 0.80, 0.75]), torch.tensor([0.15, 0.10, 0.10]))
        p = p.double()
        p[:, :, 2][shown[:, :, 1] & ~shown[:, :, 2]] = 0.6  # a fork, so surely a knife?
        self.ref = (named * p.log() + (1 - named) * (1 - p).log()).sum(-1)
        self.reward = (named * (2.0 * shown - 1)).sum(-1)
        self.log_z = symmpo.log_partition(self.ref, self.reward, beta)
        self.optimal = self.ref + self.reward / beta - self.log_z[:, None]
        self.c = symmpo.partition_offset(self.log_z[:, None], self.log_z[None], beta)

    def log_ratios(self, theta):
        """rho(m, y) of the policy softmax(log pi_ref + theta), for any leading dimensions."""
        return theta - torch.logsumexp(self.ref + theta, -1, keepdim=True)


class Comparisons:
    """Every comparison of the exact world, and the four losses of them.

    A loss is a function of rho (..., 8, 8) that gives (..., comparisons, outcomes); `outcomes` has
    the probability of each outcome by a Bradley-Terry annotator. kappa scales every offset c and
    leaves pi* as it is: (1 - kappa) beta log Z(m) is taken from all rewards of image m.
    """

    def __init__(self, world):
        self.world = world
        low, high = np.triu_indices(8, 1)  # the 28 unordered pairs of eight things
        one, many = np.arange(8), len(low)
        self.m, self.a, self.b = np.repeat(one, many), np.tile(low, 8), np.tile(high, 8)
        self.i, self.j, self.y = np.repeat(low, 8), np.repeat(high, 8), np.tile(one, many)
        self.p, self.q = np.repeat(low, many), np.repeat(high, many)
        self.s, self.t = np.tile(low, many), np.tile(high, many)

    def dpo(self, rho):
        """Two captions, one image."""
        a, b, beta = rho[..., self.m, self.a], rho[..., self.m, self.b], self.world.beta
        return torch.stack([symmpo.dpo_m(a, b, beta), symmpo.dpo_m(b, a, beta)], -1)

    def vco(self, kappa):
        """One caption, two images; kappa 0 drops the offset: CoPO."""
        c, beta = kappa * self.world.c[self.i, self.j], self.world.beta

        def losses(rho):
            a, b = rho[..., self.i, self.y], rho[..., self.j, self.y]
            return torch.stack([symmpo.vco(a, b, beta, c), symmpo.vco(b, a, beta, -c)], -1)

        return losses

    def pair(self, rho):
        """Two captions under two images: (a under m, b under m'), (a, a), (b, b), (b, a)."""
        a, b = rho[..., self.p, self.s], rho[..., self.p, self.t]
        a_, b_, beta = rho[..., self.q, self.s], rho[..., self.q, self.t], self.world.beta
        four = (a, b, b_, a_), (a, b, a_, b_), (b, a, b_, a_), (b, a, a_, b_)
        return torch.stack([symmpo.pair(*cells, beta) for cells in four], -1)

    def outcomes(self, kappa):
        """{"response", "image", "both"}: probabilities with a total of 1."""
        world = self.world
        r = world.reward - (1 - kappa) * world.beta * world.log_z[:, None]
        response = torch.sigmoid(r[self.m, self.a] - r[self.m, self.b])
        image = torch.sigmoid(r[self.i, self.y] - r[self.j, self.y])
        a = torch.sigmoid(r[self.p, self.s] - r[self.p, self.t])
        b = torch.sigmoid(r[self.q, self.t] - r[self.q, self.s])
        found = {
            "response": torch.stack([response, 1 - response], -1),
            "image": torch.stack([image, 1 - image], -1),
            "both": torch.stack([a * b, a * (1 - b), (1 - a) * b, (1 - a) * (1 - b)], -1),
        }
        return {name: table / len(table) for name, table in found.items()}

    def methods(self, kappa):
        """{name: (losses, probabilities of their outcomes)}"""
        found = self.outcomes(kappa)
        return {
            "DPO": (self.dpo, found["response"]),
            "Pair": (self.pair, found["both"]),
            "VCO, offset kept": (self.vco(kappa), found["image"]),
            "CoPO, offset dropped": (self.vco(0), found["image"]),
        }

    def fit(self, losses, share, prior=0.0, tolerance=1e-10):
        """rho that minimises the losses weighted by share (..., comparisons, outcomes); a leading
        index is a fit of its own. prior: precision of a Gaussian prior on rho."""
        theta = torch.zeros(*share.shape[:-2], 8, 8, dtype=torch.float64, requires_grad=True)
        options = {"max_iter": 600, "history_size": 50, "line_search_fn": "strong_wolfe"}
        lbfgs = torch.optim.LBFGS([theta], tolerance_grad=tolerance, tolerance_change=0, **options)

        def closure():
            lbfgs.zero_grad()
            rho = self.world.log_ratios(theta)
            loss = (share * losses(rho)).sum() + prior / 2 * rho.pow(2).sum()
            loss.backward()
            return loss

        lbfgs.step(closure)
        assert theta.grad.abs().max() < 1e-6, "not converged"
        return self.world.log_ratios(theta.detach())

    def errors(self, rho):
        """(KL(pi* || pi) in nats, mean over images; RMS error of reward differences)."""
        w = self.world
        kl = (w.optimal.exp() * (w.optimal - w.ref - rho)).sum(-1).mean(-1)
        gap = w.beta * rho - w.reward
        gap = gap[..., self.m, self.a] - gap[..., self.m, self.b]
        return kl, gap.pow(2).mean(-1).sqrt()


# --- the tiny LLaVA: notebook 3 -------------------------------------------------------------------


def contrasts(record, others, root):
    """{kind: (contrast image, the objects that are true of it)} for a caption record.

    On a crop an object is true if half of its cell is left; on noise and black nothing is.
    """
    from PIL import Image

    from support.images import CROP, CROP_LARGE, crop, noise, open_image
    from tiny.world import CELL, mentioned

    image, objects = open_image(record["image"], root), mentioned(record["chosen"])
    seed = f"{record['image']} {record['rejected']}"
    other = random.Random(seed).choice(others)
    made = open_image(record["contrast_image"], root), mentioned(record["contrast_chosen"])
    found = {record["kind"]: made}
    found["random"] = open_image(other["image"], root), mentioned(other["chosen"])
    atlas = Image.new("L", image.size)  # each pixel says which cell it is in
    for cell in range(9):
        left, top = cell % 3 * CELL, cell // 3 * CELL
        atlas.paste(cell, (left, top, left + CELL, top + CELL))
    where = cells_of(image, objects)
    for kind, keep in (("crop 20–50 %", CROP_LARGE), ("crop 1–20 %", CROP)):
        seen = crop(atlas, random.Random(seed), keep).tobytes()  # the same crop of the atlas
        there = [noun for cell, noun in where.items() if seen.count(cell) >= CELL * CELL // 2]
        found[kind] = crop(image, random.Random(seed), keep), there
    found["noise"] = noise(image, random.Random(seed), 500), []
    found["black"] = Image.new("RGB", image.size), []
    return found


def cells_of(image, objects):
    """{cell: noun}: an object's shape is what differs from its cell's last pixel."""
    from tiny.world import CELL, draw

    def shape(picture, cell):
        left, top = cell % 3 * CELL, cell // 3 * CELL
        pixels = np.asarray(picture.crop((left, top, left + CELL, top + CELL)))
        return (pixels != pixels[-1, -1]).any(-1).tobytes()

    known = {}
    for noun in objects:
        for look in range(40):
            drawn = draw({"look": look, "cells": {4: (noun, "red")}})
            known[shape(drawn, 4)] = noun
    shapes = {cell: shape(image, cell) for cell in range(9)}
    return {cell: known[found] for cell, found in shapes.items() if any(found)}


@torch.no_grad()
def sample(model, prompts, image, prompt, n, rng, longest=40):
    """n responses of the model at temperature 1: (texts, counts, log-probs), distinct ones once.

    Samples that agree up to some word share its distribution: each distinct beginning is carried
    once, with the number of samples that it stands for, which multinomial draws divide.
    """
    out = model(**prompts.encode([prompt], [image]), use_cache=True)
    counts, logps, said = np.array([n]), np.zeros(1), [[]]
    texts, text_counts, text_logps = [], [], []
    for position in range(longest):
        step = torch.log_softmax(out.logits[:, -1].double(), -1).numpy()
        p = np.exp(step)
        drawn = rng.multinomial(counts, p / p.sum(-1, keepdims=True))
        rows, tokens = drawn.nonzero()
        counts, logps = drawn[rows, tokens], logps[rows] + step[rows, tokens]
        said = [[*said[row], token] for row, token in zip(rows, tokens)]
        done = (tokens == prompts.end_token) | (position == longest - 1)
        for k in done.nonzero()[0]:
            texts.append(prompts.tokenizer.decode(said[k], skip_special_tokens=True).strip())
            text_counts.append(counts[k])
            text_logps.append(logps[k])
        on = (~done).nonzero()[0]
        if not len(on):
            break
        counts, logps, said = counts[on], logps[on], [said[k] for k in on]
        out.past_key_values.batch_select_indices(torch.tensor(rows[on]))
        more = torch.tensor(tokens[on])[:, None]
        out = model(input_ids=more, past_key_values=out.past_key_values, use_cache=True)
    return texts, torch.tensor(np.array(text_counts)), torch.tensor(np.array(text_logps))


def caption_reward(text, objects):
    """True objects named, minus false and repeated ones."""
    from tiny.world import mentioned

    named = mentioned(text)
    true = len(set(named) & set(objects))
    return true - (len(named) - true)


def log_z_of(samples, objects, beta):
    """(Monte-Carlo log Z, lower bound, upper bound, effective samples).

    With S the distinct samples and P(S) their probability, Z is at least their part of the sum, and
    at most that and (1 - P(S)) exp(r_max / beta): no caption earns more than all its objects.
    """
    texts, counts, logps = samples
    rewards = torch.tensor([caption_reward(text, objects) for text in texts]).double()
    every = rewards.repeat_interleave(counts)
    value, _ = symmpo.log_partition_mc(every, beta)
    low = symmpo.log_partition(logps, rewards, beta)
    rest = torch.log((1 - logps.exp().sum()).clamp(min=1e-12))
    high = torch.logaddexp(low, rest + len(objects) / beta)
    weights = torch.softmax(every / beta, -1)
    return value.item(), low.item(), high.item(), (1 / weights.pow(2).sum()).item()


# --- tokens and cells as coloured strips: notebook 4 ----------------------------------------------


def strip(axis, values, rows, columns, limit):
    """Numbers on a purple (positive) to orange (negative) strip, written where they are not 0."""
    axis.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if abs(value) >= 0.05:
            colour = "white" if abs(value) > 0.6 * limit else "black"
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=10, color=colour)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=11)


def mask_picture(axis, visible, branch, titles):
    """Who sees whom in a packed row: query down, key across, a colour for each branch."""
    shades = np.ones((*visible.shape, 3)) * 0.95
    palette = ((0.5, 0.5, 0.5), (0, 0.45, 0.7), (0.9, 0.62, 0), (0, 0.62, 0.45))
    for k, colour in enumerate(palette):
        shades[(branch[:, None] == k) & visible] = colour
    axis.imshow(shades, interpolation="none")
    middles = [np.flatnonzero(branch == k).mean() for k in range(len(titles))]
    axis.set_xticks(middles, titles)
    axis.set_yticks(middles, titles)
    axis.set(xlabel="key: the token that is seen", ylabel="query: the token that looks")


# --- training: notebooks 5 and 6 ------------------------------------------------------------------


def train_quietly(flags, out, **settings):
    """A run of train.py's own loop with these options: (run, lines of its metrics.jsonl)."""
    import contextlib
    import io
    from pathlib import Path

    import train
    from support.files import whole_lines

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        options = train.read_options([*flags.split(), "--out", str(out)])
        for name, value in settings.items():
            setattr(options, name, value)
        options.cache = str(Path(out).parent / "reference")
        run, _ = train.train(options)
    return run, whole_lines(Path(out, "metrics.jsonl"))


def examine(model, prompts, folder):
    """Percent on AMBER's captions: {"CHAIR", "Cover"} greedy, and " T=1" sampled; and captions."""
    import contextlib
    import io

    from benchmarks.amber import amber
    from benchmarks.answers import answer
    from benchmarks.common import Settings

    settings, found = Settings(dimension="g"), {}
    questions = amber.questions(folder, settings)
    for name, temperature in (("", 0.0), (" T=1", 1.0)):
        how = {"batch_size": 120, "max_new_tokens": 40, "temperature": temperature}
        with contextlib.redirect_stderr(io.StringIO()):
            texts = list(answer(model, prompts, questions, **how))
        answers = [{**q.record, "response": text} for q, text in zip(questions, texts)]
        scores = amber.score(answers, folder, settings)[0]["generative"]
        found |= {f"CHAIR{name}": scores["CHAIR"], f"Cover{name}": scores["Cover"]}
        found[f"captions{name}"] = texts
    return found


def job(task):
    """For a pool of processes. task: (flags, folder of the run, test folder, settings)."""
    flags, out, folder, settings = task
    run, log = train_quietly(flags, out, **settings)
    return {"log": log, **examine(run.policy.eval(), run.prompts, folder)}


def train_all(tasks, processes=2):
    """The jobs' results, in order, two at a time."""
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return pool.map(job, tasks, chunksize=1)


def write_caption(axis, phrases, objects):
    """A caption phrase by phrase: false objects red, bold, marked; what is missing in brackets."""
    from tiny.world import mentioned

    axis.axis("off")
    lines = [(phrase, set(mentioned(phrase)) - set(objects)) for phrase in phrases]
    named = {noun for phrase in phrases for noun in mentioned(phrase)}
    for k, (phrase, false) in enumerate(lines):
        style = {"color": RED, "weight": "bold"} if false else {"color": "black"}
        text = f"✗ {phrase}" if false else phrase
        axis.text(0, 0.95 - 0.17 * k, text, va="top", transform=axis.transAxes, **style)
    for k, noun in enumerate(sorted(set(objects) - named), len(lines)):
        axis.text(0, 0.95 - 0.17 * k, f"({noun})", va="top", color=GREY, transform=axis.transAxes)


# --- a server of one's own: notebook 6 ------------------------------------------------------------


def serve(reply):
    """The address of an OpenAI-compatible server in this process; reply(text, image or None) gives
    the answer to a request's text and PIL image."""
    import base64
    import io
    import json
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from PIL import Image

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            size = int(self.headers["Content-Length"])
            content = json.loads(self.rfile.read(size))["messages"][-1]["content"]
            text, image = "", None
            for part in content:
                if part["type"] == "text":
                    text = part["text"]
                else:
                    raw = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                    image = Image.open(io.BytesIO(raw))
            message = {"role": "assistant", "content": reply(text, image)}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
            data = json.dumps({**answer, "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1"


# --- which cells a loss compares: notebook 0 ------------------------------------------------------


def draw_comparisons(axis, name, slope, pairs):
    """An objective's cells: green + where the loss raises a log-ratio, red – where it lowers it; a
    line joins cells that stand in one sigmoid, dashed red across two images."""
    for a, b in pairs:
        style = {"arrowstyle": "-", "lw": 2, "color": "black"}
        if abs(a - b) == 2:
            style["connectionstyle"] = "arc3,rad=-0.5"  # around the cell between them
        if a // 3 != b // 3:
            style |= {"color": "#c0392b", "ls": "--"}
        axis.annotate("", (b % 3, b // 3), (a % 3, a // 3), arrowprops=style, zorder=2)
    for image, response in symmpo.OBJECTIVES[name].cells:
        raised = slope[3 * image + response] < 0
        box = {"boxstyle": "square,pad=0.5", "color": "#a8d5ba" if raised else "#efb8b0"}
        sign = "+" if raised else "–"
        axis.text(response, image, sign, bbox=box, ha="center", va="center", size=13, zorder=3)
    axis.set(xlim=(-0.6, 2.6), ylim=(1.6, -0.6), title=name)
    axis.set_xticks(range(3), ["$y_w$", "$y_l$", "$y'_w$"])
    axis.set_yticks(range(2), ["$m$", "$m'$"])
    axis.tick_params(length=0)
    axis.spines[:].set_color("#cccccc")
