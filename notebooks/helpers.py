"""What the notebooks share: how they look, the exact world of eight captions, contrast images,
quiet training runs, pictures, a chat server."""

import contextlib
import io
import json
import multiprocessing
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import symmpo
import train
from benchmarks.amber import amber
from benchmarks.answers import answer
from benchmarks.common import Settings
from support.files import whole_lines
from support.images import CROP, CROP_LARGE, crop, noise, open_image
from tiny.world import CELL, draw, mentioned, names

# Okabe and Ito's palette, which can be told apart without colour vision.
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
RED = "#D55E00"
PURPLE = "#CC79A7"
GREY = "#777777"
LIGHT = "#DDDDDD"
THRESHOLD = np.log(1.5)  # |c| beyond which sigma(-c) is not 1/2 to 20 %
HERE = Path(__file__).resolve().parent
CROPS = {"crop 20–50 %": CROP_LARGE, "crop 1–20 %": CROP}
TEMPERATURES = {" T=1": 1.0, "": 0.0}
TINY = HERE.parent / "tiny/built"


def start():
    """The first thing in every notebook: how pictures look, and how the machine is used."""
    import matplotlib.pyplot as plt
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it brings
    plt.style.use(HERE / "course.mplstyle")


@contextlib.contextmanager
def quiet():
    """What is printed inside goes into the StringIO that this gives; progress bars go nowhere."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        yield said


# --- the exact world: notebooks 1 and 2 -----------------------------------------------------------


class ExactWorld:
    """Eight images, eight captions: each shows, or names, a subset of {cup, fork, knife}.

    reward (8, 8): +1 for a true object, -1 for a false one. ref (8, 8): log pi_ref(y|m) of a model
    that captions decently and adds a knife to a fork. log_z (8,); optimal: log pi*; c[m, m']: the
    offset in nats.
    """

    labels = ["∅", "k", "f", "fk", "c", "ck", "cf", "cfk"]

    def __init__(self, beta):
        bit = torch.arange(2.0)
        sets = torch.cartesian_prod(bit, bit, bit).double()  # (8, 3) cup, fork, knife
        shown = sets[:, None]  # (8, 1, 3) in the images
        named = sets[None]  # (1, 8, 3) in the captions
        self.size = sets.sum(-1)  # objects in each image
        self.reward = (named * (2 * shown - 1)).sum(-1)

        right = torch.tensor([0.85, 0.80, 0.75]).double()  # p(an object that is there is named)
        wrong = torch.tensor([0.15, 0.10, 0.10]).double()
        p = torch.where(shown == 1, right, wrong)  # (8, 1, 3)
        p[[2, 6], 0, 2] = 0.6  # a fork and no knife: surely a knife?
        naming = torch.distributions.Bernoulli(p)
        self.ref = naming.log_prob(named).sum(-1)

        self.log_z = symmpo.log_partition(self.ref, self.reward, beta)
        of_m = self.log_z[:, None]  # (8, 1)
        self.optimal = self.ref + self.reward / beta - of_m
        self.c = symmpo.partition_offset(of_m, self.log_z, beta)

    def log_ratios(self, theta):
        """rho(m, y) of the policy softmax(log pi_ref + theta), for any leading dimensions."""
        return theta - torch.logsumexp(self.ref + theta, -1, keepdim=True)


def fit(world, loss, shape=(8, 8), tolerance=1e-10):
    """rho, of this shape, that minimises loss(rho), a scalar: a leading dimension is one of
    independent fits, over which the loss adds up."""
    theta = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS(
        [theta],
        max_iter=600,
        history_size=50,
        tolerance_grad=tolerance,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        lbfgs.zero_grad()
        value = loss(world.log_ratios(theta))
        value.backward()
        return value

    lbfgs.step(closure)
    assert theta.grad.abs().max() < 1e-6, "not converged"
    return world.log_ratios(theta.detach())


# --- the tiny LLaVA: notebooks 3 and 6 ------------------------------------------------------------


def contrasts(record, scenes, seed=0):
    """{kind: (contrast image, the objects that are true of it)} for a record of tiny.records.

    Random is any of the scenes. On a crop an object is true if half of its cell is left; on noise
    and black nothing is.
    """
    scene = record["image"]
    image = draw(scene)  # 48 x 48
    others = {
        record["kind"]: record["contrast_image"],
        "random": random.Random(seed).choice(scenes),
    }
    found = {kind: (draw(other), names(other)) for kind, other in others.items()}
    for kind, keep in CROPS.items():
        rest = crop(image, random.Random(seed), keep)
        numbers = crop(cell_numbers(), random.Random(seed), keep).tobytes()  # of the same pixels
        there = []
        for cell, (noun, _) in scene["cells"].items():
            if numbers.count(cell) >= CELL * CELL / 2:
                there.append(noun)
        found[kind] = rest, there
    found["noise"] = noise(image, random.Random(seed)), []
    found["black"] = Image.new("RGB", image.size), []
    return found


def cell_numbers():
    """A picture whose pixels say in which of the nine cells they are."""
    numbers = np.arange(9, dtype=np.uint8).reshape(3, 3)
    wide = numbers.repeat(CELL, axis=1)
    return Image.fromarray(wide.repeat(CELL, axis=0))


def show_pictures(pictures):
    """{title: (image, lines of text below it)} in a row."""
    import matplotlib.pyplot as plt

    count = len(pictures)
    _, axes = plt.subplots(1, count, figsize=(2 * count, 3.2))
    for axis, title in zip(axes, pictures):
        image, lines = pictures[title]
        axis.imshow(image)
        axis.set_title(title)
        axis.set_xlabel("\n".join(lines) or "(nothing)")
        axis.set(xticks=[], yticks=[])


def caption_reward(text, nouns):
    """True objects named, minus false and repeated ones."""
    named = mentioned(text)
    true = len(set(named) & set(nouns))
    return true - (len(named) - true)


# --- training: notebooks 4 to 6 -------------------------------------------------------------------


def train_quietly(options):
    """A run of train.py's own loop: (train.Run, the lines of its metrics.jsonl)."""
    with quiet():
        run, _ = train.train(options)
    return run, whole_lines(Path(options.out, "metrics.jsonl"))


def examine(model, prompts):
    """Captions of AMBER's 120 scenes: {"CHAIR", "Cover"} in percent, greedy, the same with " T=1"
    behind it, sampled, and the greedy "captions"."""
    settings = Settings(dimension="g")
    questions = amber.questions(TINY / "amber", settings)
    found = {}
    for name, temperature in TEMPERATURES.items():
        with quiet():
            decoding = {"max_new_tokens": 40, "temperature": temperature}
            texts = list(answer(model, prompts, questions, batch_size=120, **decoding))
        answers = []
        for question, text in zip(questions, texts):
            answers.append({**question.record, "response": text})
        metrics, *_ = amber.score(answers, TINY / "amber", settings)
        for metric in ("CHAIR", "Cover"):
            found[metric + name] = metrics["generative"][metric]
    found["captions"] = texts
    return found


def train_and_examine(options):
    """What `examine` gives, and "log": the lines of metrics.jsonl."""
    run, log = train_quietly(options)
    found = examine(run.policy.eval(), run.prompts)
    found["log"] = log
    return found


def train_all(runs):
    """`train_and_examine` for each of these options, two at a time; the results are in order."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(train_and_examine, runs, chunksize=1)


# --- pictures of numbers, masks, captions and losses: notebooks 0, 4 and 5 ------------------------


def strip(axis, values, rows, columns, limit):
    """Numbers on a purple (positive) to orange (negative) strip, written where they are not 0."""
    dark = 1.5 * limit  # black figures stay legible
    axis.imshow(values, cmap="PuOr", vmin=-dark, vmax=dark, aspect="auto")
    middle = {"ha": "center", "va": "center", "size": 12}
    for (i, j), value in np.ndenumerate(values):
        if abs(value) >= 0.05:
            axis.text(j, i, f"{value:.1f}", **middle)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")


def write_caption(axis, text, nouns):
    """A caption phrase by phrase, false objects red, bold and marked ✗; in brackets, what it leaves
    out."""
    axis.axis("off")
    lines = text.replace(" next to ", " and next to ").split(" and ")
    for noun in sorted(set(nouns) - set(mentioned(text))):
        lines.append(f"({noun})")
    for k, line in enumerate(lines):
        style = {"color": "black"}
        if set(mentioned(line)) - set(nouns):
            line = "✗ " + line
            style = {"color": RED, "weight": "bold"}
        axis.text(0, 0.95 - 0.12 * k, line, transform=axis.transAxes, **style)


def draw_comparisons(axis, name, slope, pairs):
    """An objective's cells: + where the loss raises a log-ratio, – where it lowers it; a line joins
    cells that stand in one sigmoid, dashed red across two images.

    slope: the loss by each of the nine cells, in the order of the table; pairs: of such numbers.
    """
    column = {symmpo.L: 0, symmpo.W: 1, symmpo.WP: 2}  # so no line has to go around a cell
    for a, b in pairs:
        image, y = divmod(a, 3)
        image_, y_ = divmod(b, 3)
        style = {"color": "black"}
        if image != image_:
            style = {"color": RED, "linestyle": "--"}
        axis.plot([column[y], column[y_]], [image, image_], **style)
    box = {"boxstyle": "square", "color": LIGHT}
    middle = {"ha": "center", "va": "center", "size": 18}
    for image, y in symmpo.OBJECTIVES[name].cells:
        sign = "+" if slope[3 * image + y] < 0 else "–"
        axis.text(column[y], image, sign, bbox=box, **middle)
    axis.set_title(name)
    axis.set_xlim(-0.6, 2.6)
    axis.set_ylim(1.6, -0.6)
    axis.set_xticks(range(3), ["$y_l$", "$y_w$", "$y'_w$"])
    axis.set_yticks(range(2), ["$m$", "$m'$"])


# --- a server of one's own: notebook 6 ------------------------------------------------------------


def serve(reply):
    """The address of an OpenAI-compatible server in this process: reply(text, images) gives the
    answer to a request's text and PIL images."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            size = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(size))
            content = body["messages"][-1]["content"]  # without a picture, the text alone
            pictures, text = [], content
            if isinstance(content, list):
                *pictures, part = content
                text = part["text"]
            images = [open_image(part["image_url"]["url"]) for part in pictures]
            message = {"role": "assistant", "content": reply(text, images)}
            answer = {"choices": [{"message": message, "finish_reason": "stop"}]}
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1"
