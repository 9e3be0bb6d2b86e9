"""What preference data looks like: records, prompts, rows for the model, contrastive images.

    python data.py check prefs.jsonl [--model M]      counts, a rendered prompt, every bad line
    python data.py contrast ...                       contrastive images for records (see --help)

A record (one JSON object a line in prefs.jsonl; image paths are relative to the file):
    {"image": "img/1.jpg", "prompt": "...", "chosen": "...", "rejected": "...",
     "contrast_image": "img/9.jpg", "contrast_chosen": "..."}
`rejected` is read by dpo, mdpo and symmpo; `contrast_image` by copo, mdpo and symmpo (when absent,
copo and mdpo draw a crop of the image, once, from a seed); `contrast_chosen` by symmpo.
Also read, told apart by their fields: the published SymMPO parquet files (image_1, image_2,
question, resp_1_w, resp_1_l, resp_2_w), RLHF-V / RLAIF-V records (image, question, chosen,
rejected, or these inside `text`), and TRL conversational records (images, and prompt, chosen,
rejected as lists of messages).

How this departs from the published code: prompt and response are tokenised separately, special
tokens that occur inside user text are broken up ("</s>" -> "< /s>"), a record that does not fit is
refused instead of cut, and mDPO's crop is drawn once per record.
"""
import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import io
import json
import math
import os
import random
import re
import sys
from array import array
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from tqdm import tqdm


class Later:
    """A module imported when it is first used: --help and data checks do not wait for torch."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self.name), attribute)


symmpo, torch, transformers, peft = map(Later, ("symmpo", "torch", "transformers", "peft"))
for name, oldest in {"torch": (2, 11), "transformers": (5, 17), "peft": (0, 21)}.items():
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # who uses it will say so
        version = importlib.metadata.version(name)
        if tuple(map(int, version.split(".")[:2])) < oldest:
            sys.exit(f"error: {name} {version} is older than {'.'.join(map(str, oldest))}, the "
                     "oldest that SymMPO runs with: pip install -r requirements.txt")
pyarrow = Later("pyarrow.parquet")

TINY = Path(__file__).resolve().parent / "tiny"  # the embedded default: model, records, images
VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions.")
IMAGES = ("image", "contrast_image")  # the fields behind the table's rows: m, m'
RESPONSES = ("chosen", "rejected", "contrast_chosen")  # and its columns: y_w, y_l, y'_w
NAMES = {"image": ("image", "image_1", "images"),  # each field in the record shapes that we know
         "prompt": ("prompt", "question"), "chosen": ("chosen", "resp_1_w"),
         "rejected": ("rejected", "resp_1_l"), "contrast_chosen": ("contrast_chosen", "resp_2_w"),
         "contrast_image": ("contrast_image", "image_2")}
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CROP, CROP_LARGE = (0.01, 0.2), (0.2, 0.5)  # share of the area that a crop keeps (mDPO Table 3)


class Problem(Exception):
    """A message for the person who typed the command: what is wrong, where, what to do."""


def need(condition, message):
    """Raises the Problem when the condition does not hold."""
    if not condition:
        raise Problem(message)


@contextlib.contextmanager
def problem_at(where, kinds=Problem):
    """Errors of these kinds in the with block become a Problem that says where."""
    try:
        yield
    except kinds as e:
        first_line = str(e).strip().partition("\n")[0]
        raise Problem(f"{where}: {first_line or type(e).__name__}") from e


def within(low, high=math.inf, kind=int):
    """A type for argparse: a number of this kind, finite and from low to high."""
    def number(text):
        if not low <= kind(text) <= high or math.isinf(kind(text)):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    return number


def command(run):
    """run(), where what its user can mend ends in one line on stderr and exit code 2."""
    try:
        return run()
    except (Problem, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


def lock(folder):
    """The folder's open .lock, ours until it is closed; Problem while another process has it."""
    file = open(Path(folder, ".lock"), "w")
    with problem_at(f"{folder}: another process is writing into this folder", OSError):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


# --- records ---------------------------------------------------------------------------------


class Records:
    """A lazy sequence of records in the form above, with `source` ("file:line") and `root` (where
    image paths start). Memory: 16 bytes a record. Problem for a file or line that is broken."""

    def __init__(self, path):
        self.path, self.parquet, self.group = Path(path), None, None
        self.lines = array("q")  # byte offset and number of each line that is not blank
        with problem_at(path, Exception):  # each reader of a damaged file has its kinds of error
            if self.path.suffix == ".parquet":
                self.parquet = file = pyarrow.ParquetFile(path, memory_map=True)
                sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                self.starts = np.cumsum([0, *sizes])  # the first row of each row group
            else:
                with open(path, "rb") as f:
                    for number, line in enumerate(f, 1):
                        if not line.isspace():
                            self.lines.extend((f.tell() - len(line), number))
            need(len(self), "the file has no records")

    def __len__(self):
        return int(self.starts[-1]) if self.parquet else len(self.lines) // 2

    def __getitem__(self, i):
        raw, source = self.read(i)
        with problem_at(f"{source}: not a record (`python data.py --help` shows one)", Exception):
            return {**normalise(raw), "source": source, "root": self.path.parent}

    def read(self, i, paths=()):
        """(record i as it stands, its source); Problem when a field among `paths` is no path."""
        i = range(len(self))[i]  # IndexError ends a loop over the records
        place = f" row {i + 1}" if self.parquet else self.lines[2 * i + 1]
        source = f"{self.path}:{place}"
        with problem_at(f"{source}: not valid {'parquet' if self.parquet else 'JSON'}", Exception):
            if self.parquet:
                group = int(self.starts.searchsorted(i, side="right")) - 1
                if self.group != group:  # the group read last is kept
                    self.group, self.table = group, self.parquet.read_row_group(group)
                raw = self.table.slice(i - self.starts[group], 1).to_pylist()[0]
            else:
                with open(self.path, "rb") as f:
                    f.seek(self.lines[2 * i])
                    raw = json.loads(f.readline())
        need(isinstance(raw, dict), f"{source}: not a JSON object but {type(raw).__name__}")
        for field in paths:
            need(isinstance(raw.get(field), str), f"{source}: the field {field} must hold a path")
        return raw, source


def normalise(raw):
    """A raw record of any known shape -> {image, prompt, chosen, ...}; some error if it is none."""
    if "text" in raw and not {"chosen", "resp_1_w"} & set(raw):  # RLHF-V: JSON inside a field
        with problem_at("the field text", Exception):
            raw = {**raw, **json.loads(raw["text"])}
    if isinstance(raw.get("chosen"), list):  # TRL, which allows the prompt inside chosen, too
        raw = {"prompt": raw["chosen"][:-1], **raw}
        need(len(raw["prompt"]) == 1, "the prompt must be one user turn")
    record = {}
    for field, names in NAMES.items():
        found = [raw[name] for name in names if raw.get(name) is not None]
        need(found or field not in ("image", "prompt", "chosen"), f"the field {field} is missing")
        if found:
            with problem_at(f"the field {field}", Exception):
                record[field] = found[0] if field in IMAGES else text_of(found[0])
    if isinstance(record["image"], list):
        need(len(record["image"]) == 1, f"{len(record['image'])} images; there must be one")
        record["image"] = record["image"][0]
    return record


def text_of(value):
    """A string, or the text of the last of TRL's messages."""
    content = value[-1].get("content") if isinstance(value, list) else value
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    need(isinstance(content, str) and content.strip(), f"empty, or no text: {content!r:.40}")
    return content.encode("utf-8", "replace").decode().strip()  # no unpaired surrogates


def lacks(record, cells):
    """The fields that an objective's cells read and the record does not have. A contrast image may
    be absent, a crop is drawn then (copo, mdpo); not beside a response written for it (symmpo)."""
    needed = {RESPONSES[y] for _, y in cells}
    if "contrast_chosen" in needed:
        needed.add("contrast_image")
    return sorted(needed - record.keys())


# --- images ----------------------------------------------------------------------------------


def need_inside(path, root, allow_outside):
    """Problem when the path, links followed, leaves the folder root and that is not allowed."""
    inside = allow_outside or Path(root, path).resolve().is_relative_to(Path(root).resolve())
    need(inside, f"{Path(root, path)}: outside the data folder {root} (--allow-outside permits it)")


def open_image(source, root=".", allow_outside=True):
    """An RGB PIL image, upright (EXIF), from a path relative to root, bytes, or {"bytes", "path"}.
    Palette, CMYK, 16-bit and animated (first frame) files are converted, transparency is dropped.
    Problem naming the file: missing, truncated, above PIL's limit of 179 million pixels, ..."""
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, bytes):
        name, file = "image bytes", io.BytesIO(source)
    else:
        need(isinstance(source, str), f"an image is a path or bytes, not {type(source).__name__}")
        name = file = os.path.join(root, source)
        need(os.path.isfile(file), f"{file}: no such image file")
        need_inside(source, root, allow_outside)
    with problem_at(f"{name}: not a readable image", Exception), Image.open(file) as image:
        if image.mode.startswith("I"):  # 16 bits a pixel: scale, since convert() would clip
            image = image.convert("I").point(lambda v: v / 256).convert("L")
        return ImageOps.exif_transpose(image).convert("RGB")


def crop(image, rng, keep=CROP):
    """A random crop that keeps a share of the area drawn from `keep`; same aspect within 4:3."""
    share, aspect = rng.uniform(*keep), rng.uniform(3 / 4, 4 / 3)
    w = max(1, min(image.width, round(image.width * (share * aspect) ** 0.5)))
    h = max(1, min(image.height, round(image.width * image.height * share / w)))
    x, y = rng.randint(0, image.width - w), rng.randint(0, image.height - h)
    return image.crop((x, y, x + w, y + h))


# --- models, prompts, tokens and rows --------------------------------------------------------


def load_processor(path):
    """(config, processor) of a checkpoint folder or hub name; Problem when there is none."""
    with problem_at(f"{path}: no vision-language model could be read there", Exception):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        processor = transformers.AutoProcessor.from_pretrained(path, trust_remote_code=False)
    need(hasattr(processor, "tokenizer"), f"{path}: a text model, its processor takes no images")
    # Processors saved years ago lack what decides the number of image tokens (575 against 576).
    if getattr(processor, "patch_size", 0) is None:
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1  # CLIP's class token
    return config, processor


def load_model(path, device="cpu", dtype=None, adapter=None, four_bit=False):
    """(model, processor), in eval mode; dtype: bf16 on CUDA, else fp32; adapter: a PEFT folder;
    four_bit: linear layers in NF4. Problem when one cannot be read or they do not fit."""
    _, processor = load_processor(path)
    dtype = dtype or (torch.bfloat16 if str(device).startswith("cuda") else torch.float32)
    with problem_at(f"{path}: the model cannot be loaded", Exception):
        packed = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype) if four_bit else None
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False,
            quantization_config=packed, device_map={"": device})
    return (load_adapter(model, adapter) if adapter else model), processor


def load_adapter(model, folder):
    """The model with a PEFT adapter, in eval mode. Problem for a folder that has none, or one for
    another base: train.py keeps the fingerprint of the base that it trained on."""
    with problem_at(f"{folder}: the adapter cannot be loaded", Exception):
        made = Path(folder, "run.json")
        made = json.loads(made.read_text()) if made.is_file() else {}
        if made.get("dtype") == str(model.dtype)[6:] and made["base"] != fingerprint(model):
            raise Problem(f"it is for another base model, {made['model']}")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def fingerprint(model):
    """Hash of a model's weights, from 4,096 values of each tensor; another one for each dtype."""
    digest = hashlib.blake2b(digest_size=16)
    for name, p in sorted(model.named_parameters()):
        sample = p.detach().flatten()[::max(1, p.numel() // 4096)].float().cpu()
        digest.update(f"{name} {tuple(p.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def prompt_format(model, requested="auto"):
    """"vicuna" or "chat" (the processor's own template). auto: LLaVA-1.5, that is llava over a
    llama, was trained with the Vicuna sentence, which its published chat template lacks."""
    config = getattr(model, "config", model)
    llava15 = config.model_type == "llava" and config.text_config.model_type == "llama"
    return ("vicuna" if llava15 else "chat") if requested == "auto" else requested


def render(processor, fmt, prompt, image=True):
    """The prompt as text with the image placeholder, from BOS to where the response begins."""
    prompt = plain_text(processor, prompt)
    if fmt == "vicuna":
        place = processor.image_token + "\n" if image else ""
        text = f"{VICUNA} USER: {place}{prompt} ASSISTANT:"
    else:
        content = [{"type": "image"}] * image + [{"type": "text", "text": prompt}]
        with problem_at("no chat template in the model (see --prompt-format vicuna)", ValueError):
            text = processor.apply_chat_template([{"role": "user", "content": content}],
                                                 add_generation_prompt=True, tokenize=False)
    if writes_space(processor.tokenizer):
        text = text.rstrip(" ")  # the response brings its own
    bos = processor.tokenizer.bos_token or ""
    return bos + text.removeprefix(bos)  # exactly one, whether or not the template has it


def writes_space(tokenizer):
    """Does the tokenizer put a space before the first word by itself, as SentencePiece does?"""
    return tokenizer.tokenize("a")[0].startswith("▁")


def plain_text(processor, text):
    """User text in which no special token can act as one: "</s>" becomes "< /s>". An "<image>" on
    the first or last line, as LLaVA's records have it, goes: the prompt format brings its own."""
    text = re.sub(r"^\s*<image>\s*\n|\n\s*<image>\s*$", "", text)
    tokenizer = processor.tokenizer
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), "<image>"}
    for token in sorted(special, key=len, reverse=True):
        if len(token.strip()) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def encode_prompts(processor, fmt, prompts, images=None):
    """Tensors of a left-padded batch of prompts (input_ids, attention_mask, pixel_values, ...);
    images: one PIL image a prompt, or None for text alone."""
    texts = [render(processor, fmt, prompt, images is not None) for prompt in prompts]
    return dict(processor(text=texts, images=images and [[image] for image in images], padding=True,
                          padding_side="left", add_special_tokens=False, return_tensors="pt"))


def response_frame(processor, fmt):
    """(separator, end token id): what stands between prompt and response, and what ends it, read
    off a rendered conversation: templates end a turn with <|im_end|>, <end_of_turn>, or nothing."""
    tokenizer, separator, tail = processor.tokenizer, " ", ""
    if fmt == "chat":
        turns = [{"role": role, "content": [{"type": "text", "text": text}]}
                 for role, text in (("user", "Q"), ("assistant", "RESPONSE"))]
        start = processor.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
        whole = processor.apply_chat_template(turns, tokenize=False)
        rest = whole[len(start):] if whole.startswith(start) else "RESPONSE"
        separator, _, tail = rest.partition("RESPONSE")
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    marks = [i for i in tokenizer(tail, add_special_tokens=False).input_ids if i in special]
    end = marks[0] if marks else tokenizer.eos_token_id
    return separator.removesuffix(" ") if writes_space(tokenizer) else separator, end


def end_token_id(processor, fmt):
    """The token that ends a response in this format."""
    return response_frame(processor, fmt)[1]


def encode_response(processor, fmt, text):
    """Token ids of a response, tokenised by itself, with the one end token that is trained on."""
    separator, end = response_frame(processor, fmt)
    text = separator + plain_text(processor, text)
    return processor.tokenizer(text, add_special_tokens=False).input_ids + [end]


def build_rows(record, processor, fmt, cells, number=0, seed=0, max_length=2048, no_image=False,
               allow_outside=True):
    """A record as rows for symmpo.logp_table: one per image among `cells`, responses behind it.
    number: the record's place in the batch; seed: of the crop for a missing contrast image. Problem
    for a missing field, a bad image, or more than max_length tokens (nothing is ever cut)."""
    rows, source, missing = [], record["source"], lacks(record, cells)
    with problem_at(source):
        need(not missing, f"the objective needs the field {', '.join(missing)}")
        for i in sorted({i for i, _ in cells}):
            images, columns = None, [y for image, y in cells if image == i]
            if not no_image:
                file = record.get(IMAGES[i], record["image"])
                images = [open_image(file, record["root"], allow_outside)]
                if IMAGES[i] not in record:
                    images = [crop(images[0], random.Random(f"{seed} {source.rpartition(':')[2]}"))]
            inputs = encode_prompts(processor, fmt, [record["prompt"]], images)
            responses = [encode_response(processor, fmt, record[RESPONSES[y]]) for y in columns]
            length = inputs["input_ids"].shape[1] + max(map(len, responses))
            need(length <= max_length, f"{length} tokens, --max-length is {max_length}: raise it, "
                 "or leave the record out with --skip-bad")
            rows.append({"inputs": inputs, "responses": list(map(torch.tensor, responses)),
                         "cells": [(number, i, y) for y in columns], "source": source,
                         "length": length})
    return rows


# --- contrastive images ----------------------------------------------------------------------


def noise(image, rng, step):
    """Forward diffusion, sqrt(a) x + sqrt(1 - a) e: `step` steps of DDPM's 1000-step schedule."""
    a = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:step])
    e = np.random.default_rng(rng.getrandbits(64)).standard_normal((image.height, image.width, 3))
    x = a ** 0.5 * (np.asarray(image) / 127.5 - 1) + (1 - a) ** 0.5 * e
    return Image.fromarray(np.uint8(((x + 1) * 127.5).round().clip(0, 255)))


def moco(image, rng):
    """MoCo-v2's augmentation with its strengths and probabilities: resized crop, colour jitter (in
    a fixed order), greyscale, blur (meant for 224 px, scaled to the image), flip."""
    image = crop(image, rng, (0.2, 1.0)).resize(image.size, Image.Resampling.BICUBIC)
    if rng.random() < 0.8:
        for enhance in ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color:
            image = enhance(image).enhance(rng.uniform(0.6, 1.4))
        (h, s, v), turn = image.convert("HSV").split(), round(256 * rng.uniform(-0.1, 0.1))
        image = Image.merge("HSV", (h.point(lambda hue: (hue + turn) % 256), s, v)).convert("RGB")
    image = image.convert("L").convert("RGB") if rng.random() < 0.2 else image
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2) * min(image.size) / 224))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def embed(files, encoder, cache, batch=64):
    """(N, d) unit image embeddings in fp32 and (N,) hashes of the images' pixels, in file order. A
    LLaVA's features are averaged over the image tokens. Each batch is kept in the folder `cache`
    under a hash of encoder and pixels: what is there is not computed again."""
    with problem_at(f"{encoder}: not an image encoder (CLIP, SigLIP, LLaVA)", Exception):
        model = transformers.AutoModel.from_pretrained(encoder, trust_remote_code=False).float()
        processor = transformers.AutoProcessor.from_pretrained(encoder, trust_remote_code=False)
        prepare = processor.image_processor
        features = model.requires_grad_(False).get_image_features
    weights, vectors, pixels = f"{fingerprint(model)} {prepare}", [], []
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    Path(cache).mkdir(exist_ok=True)
    for i in tqdm(range(0, len(files), batch), desc="embedding", unit=" batches"):
        images = [open_image(str(file)) for file in files[i:i + batch]]
        pixels += [hashlib.sha256(str(x.size).encode() + x.tobytes()).hexdigest() for x in images]
        key = hashlib.sha256(str((weights, pixels[i:])).encode()).hexdigest()
        kept, part = Path(cache, f"{key}.npy"), Path(cache, "part.npy")
        if not kept.exists():
            found = features(**prepare(images=images, return_tensors="pt").to(model.device))
            pooled = torch.stack([x.reshape(-1, x.shape[-1]).mean(0) for x in found.pooler_output])
            np.save(part, torch.nn.functional.normalize(pooled).cpu())
            os.replace(part, kept)
        vectors.append(np.load(kept))
    return torch.from_numpy(np.concatenate(vectors)), pixels


def neighbours(vectors, labels, max_sim=1.0, block=256):
    """Each row's nearest other row, exactly: indices and cosines (N,), -inf where there is none.
    vectors: (N, d) of unit length. labels: integer tensors (N,); rows that share one are none, nor
    are rows with a cosine above max_sim. Memory beside the vectors: block x N cosines."""
    best, index = torch.full((len(vectors),), -torch.inf), torch.zeros(len(vectors), dtype=int)
    for i in tqdm(range(0, len(vectors), block), desc="neighbours", unit=" blocks"):
        cosine = vectors[i:i + block] @ vectors.T
        cosine[cosine > max_sim] = -torch.inf
        for label in labels:
            cosine[label[i:i + block, None] == label] = -torch.inf
        best[i:i + block], index[i:i + block] = cosine.max(1)
    return index, best


def choose(args, root, records, cache):
    """{image: (contrast image, cosine)} for the kinds that take a picture that is there already;
    an image for which no other will do is not in it."""
    groups = {r["image"]: str(r.get(args.group, r["image"])) for r in records}
    images = list(groups)
    if args.kind == "synthetic":
        folder, pairs = image_records(args.mapping, IMAGES)
        return {r["image"]: (folder / r["contrast_image"], None) for r in pairs}
    if args.kind == "random":  # the first of 20 draws that is of another group
        rng = random.Random(args.seed)
        return {image: (root / other, None) for image in images
                for other in reversed(rng.choices(images, k=20)) if groups[other] != groups[image]}
    vectors, pixels = embed([root / image for image in images], args.encoder, cache)
    labels = [torch.tensor([hash(x) for x in of]) for of in (pixels, groups.values())]
    index, cosines = neighbours(vectors, labels, args.max_sim)
    return {image: (root / images[i], round(cosine, 4)) for image, i, cosine
            in zip(images, index.tolist(), cosines.tolist()) if cosine >= args.min_sim}


def image_records(path, fields=("image",)):
    """(folder, records as they stand) of a file, or one {"image"} per picture of a folder; Problem
    for what cannot be read, or a record without a path in one of the fields."""
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if name.lower().endswith(PICTURES))
        return Path(path), [{"image": name} for name in names]
    file = Records(path)
    return file.path.parent, [file.read(i, fields)[0] for i in range(len(file))]


def contrast(args):
    """`python data.py contrast`: write the records again, each with a contrast image."""
    made = {"crop": crop, "crop-large": lambda image, rng: crop(image, rng, CROP_LARGE),
            "black": lambda image, rng: Image.new("RGB", image.size), "moco": moco,
            "noise": lambda image, rng: noise(image, rng, args.step)}.get(args.kind)
    out, (root, records), lines = Path(args.out), image_records(args.data), []
    need(records, f"{args.data}: no images there")
    need(out.suffix, f"--out {out}: a file name such as {out}.jsonl; pictures go into {out}/")
    for record in records:
        need_inside(record["image"], root, args.allow_outside)
    folder = out.with_suffix("")  # of the pictures that are made, or of the embeddings
    (folder if made else out.parent).mkdir(parents=True, exist_ok=True)
    found = {} if made else choose(args, root, records, folder)
    for number, record in enumerate(tqdm(records, desc=args.kind, unit=" records")):
        image = record["image"]
        other, cosine = found.get(image, (None, None))
        if made:
            rng = random.Random(f"{args.seed} {number} {image}")
            other = folder / f"{number:06d}.png"
            made(open_image(image, root), rng).save(other)
        if other:
            record["image"] = os.path.relpath(root / image, out.parent)
            record["contrast_image"] = os.path.relpath(other, out.parent)
            record.update(contrast_kind=args.kind, contrast_seed=args.seed, similarity=cosine)
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    Path(f"{out}.tmp").write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    os.replace(f"{out}.tmp", out)
    print(f"{out}: {len(lines):,} records, {len(records) - len(lines):,} left out (no image fits)")


# --- command line ----------------------------------------------------------------------------


def check(args):
    """`python data.py check`: every bad line with its reason; returns how many there are."""
    cells = {name: objective[0] for name, objective in symmpo.OBJECTIVES.items()}
    records, bad, usable, sizes, tokens, rows = Records(args.data), 0, [], [], [], None
    if args.model:
        config, processor = load_processor(args.model)
        fmt = prompt_format(config, args.prompt_format)
    for i in tqdm(range(len(records)), desc="checking", unit=" records", disable=None):
        try:
            record = records[i]
            able = [name for name in cells if not lacks(record, cells[name])]
            with problem_at(record["source"]):
                sizes += [open_image(record[field], record["root"], args.allow_outside).size
                          for field in IMAGES if field in record]
            if args.model:
                most = max((cells[name] for name in able), key=len)
                rows = build_rows(record, processor, fmt, most, max_length=args.max_length)
                tokens += [row["length"] for row in rows]
            usable += able
        except Problem as e:
            bad += 1
            tqdm.write(f"bad: {e}")
    counts = ", ".join(f"{name} {usable.count(name):,}" for name in cells)
    print(f"{len(records):,} records, {bad:,} bad; usable by {counts}")
    for name, values in (("width, pixels", [w for w, _ in sizes]),
                         ("height, pixels", [h for _, h in sizes]), ("length, tokens", tokens)):
        if values:
            middle = sorted(values)[len(values) // 2]
            print(f"{name}: min {min(values)}, median {middle}, max {max(values)}")
    if rows:
        print(describe(processor, fmt, rows[0]))
    return bad


def describe(processor, fmt, row):
    """One rendered row for a person to read: the prompt's text and the decoded labels."""
    decode, ids = processor.tokenizer.decode, row["inputs"]["input_ids"][0].tolist()
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    text = decode([i for k, i in enumerate(ids) if not (k and i == image == ids[k - 1])])
    labels = [f"label ({len(label)} tokens): {decode(label)!r}" for label in row["responses"]]
    return "\n".join([f"prompt ({fmt}, {len(ids)} tokens, {ids.count(image)} of them image, shown "
                      f"as one):\n  {text!r}", *labels])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("check", help="count, show and find every bad record").add_argument
    add("data", help="prefs.jsonl or a parquet file")
    add("--model", help="also render and tokenise for this model (folder or hub name)")
    add("--prompt-format", choices=("auto", "vicuna", "chat"), default="auto")
    add("--max-length", type=within(1), default=2048, help="tokens (default %(default)s)")
    add("--allow-outside", action="store_true", help="permit image paths out of the data's folder")
    add = commands.add_parser("contrast", help="give every record a contrast image").add_argument
    add("data", help="records (.jsonl) or a folder of images")
    add("--out", required=True, help="FILE.jsonl beside the images; made pictures go to FILE/")
    add("--kind", default="clip", choices=("crop", "crop-large", "random", "clip", "black", "noise",
                                           "moco", "synthetic"))
    add("--seed", type=int, default=0)
    add("--encoder", default="openai/clip-vit-large-patch14-336", help="for clip")
    add("--min-sim", type=float, default=-1.0, help="clip: least cosine of a neighbour")
    add("--max-sim", type=float, default=0.98, help="clip: over it are duplicates (%(default)s)")
    add("--group", default="image", help="field; images that share it are never paired")
    add("--step", type=within(1, 1000), default=500, help="noise: of 1000 (default %(default)s)")
    add("--allow-outside", action="store_true", help="permit image paths out of the data's folder")
    add("--mapping", default="synthetic.jsonl", help="synthetic: file of {image, contrast_image}")
    args = parser.parse_args(argv)
    run = {"check": check, "contrast": contrast}[args.command]
    sys.exit(1 if command(lambda: run(args)) else 0)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # records hold what a terminal may not show
    main()
