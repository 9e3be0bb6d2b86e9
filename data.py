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
import fcntl
import hashlib
import importlib
import io
import json
import os
import random
import re
import sys
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

TINY = Path(__file__).resolve().parent / "tiny"  # the embedded default: model, records, images
VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions.")
IMAGES = ("image", "contrast_image")  # the fields behind the table's rows: m, m'
RESPONSES = ("chosen", "rejected", "contrast_chosen")  # and its columns: y_w, y_l, y'_w
CROP, CROP_LARGE = (0.01, 0.2), (0.2, 0.5)  # share of the area that a crop keeps (mDPO Table 3)


class Problem(Exception):
    """A message for the person who typed the command: what is wrong, where, what to do."""


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
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise Problem(f"{folder}: another process is writing into this folder") from e
    return file


# --- records ---------------------------------------------------------------------------------


class Records:
    """A lazy sequence of normalised records: item i is read from the file when it is asked for.

    Memory: 16 bytes a record. Each item has the fields above, `source` ("file:line") and `root`,
    the folder its image paths start from. Raises Problem for a file or line that cannot be read.
    """

    def __init__(self, path):
        self.path, self.parquet = Path(path), None
        if not self.path.is_file() or self.path.suffix not in (".jsonl", ".json", ".parquet"):
            raise Problem(f"{path}: no such file, or neither .jsonl nor .parquet")
        if self.path.suffix == ".parquet":
            self.parquet, self.starts = _open_parquet(self.path)
        else:
            self.offsets = _line_offsets(self.path)
        if not len(self):
            raise Problem(f"{path}: the file has no records")

    def __len__(self):
        return int(self.starts[-1]) if self.parquet else len(self.offsets)

    def __getitem__(self, i):
        place = f" row {i + 1}" if self.parquet else self.offsets[i][1]
        source = f"{self.path}:{place}"
        try:
            raw = self._parquet_row(i) if self.parquet else self._json_line(i)
        except (ValueError, OSError, RuntimeError) as e:  # among them pyarrow's and RecursionError
            kind = "parquet" if self.parquet else "JSON"
            raise Problem(f"{source}: not valid {kind} ({e})") from e
        return {**normalise(raw, source), "source": source, "root": self.path.parent}

    def _json_line(self, i):
        with open(self.path, "rb") as f:
            f.seek(self.offsets[i][0])
            return json.loads(f.readline())

    def _parquet_row(self, i):
        group = int(self.starts.searchsorted(i, side="right")) - 1
        if getattr(self, "group", None) != group:  # the group read last is kept
            self.group, self.table = group, self.parquet.read_row_group(group)
        return self.table.slice(i - self.starts[group], 1).to_pylist()[0]


def _open_parquet(path):
    """(the open file, number of the first row of each row group and of the end)."""
    try:
        from pyarrow.parquet import ParquetFile
        file = ParquetFile(path, memory_map=True)
    except (ImportError, OSError, ValueError, RuntimeError) as e:
        raise Problem(f"{path}: not a readable parquet file, or no pyarrow to read it: {e}") from e
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    return file, np.cumsum([0, *sizes])


def _line_offsets(path):
    """[(byte offset, line number)] of the lines that are not blank, as a numpy array."""
    found, offset = bytearray(), 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.isspace():
                found += offset.to_bytes(8, "little") + number.to_bytes(8, "little")
            offset += len(line)
    return np.frombuffer(bytes(found), dtype="<i8").reshape(-1, 2)


def normalise(raw, source):
    """A raw record of any known shape -> {image, prompt, chosen, ...} with text where text belongs.

    Raises Problem when the shape is unknown or a field has the wrong type.
    """
    if not isinstance(raw, dict):
        raise Problem(f"{source}: a record is a JSON object, this is a {type(raw).__name__}")
    if "resp_1_w" in raw:  # the published SymMPO columns; resp_2_l is unused there too
        names = {"image": "image_1", "contrast_image": "image_2", "prompt": "question",
                 "chosen": "resp_1_w", "rejected": "resp_1_l", "contrast_chosen": "resp_2_w"}
        record = {ours: raw.get(theirs) for ours, theirs in names.items()}
    elif "text" in raw and "chosen" not in raw:  # RLHF-V keeps the texts in a JSON string
        try:
            text = json.loads(raw["text"]) if isinstance(raw["text"], str) else raw["text"]
            record = {**raw, **text, "prompt": text["question"]}
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise Problem(f"{source}: no JSON object with question, chosen, rejected in the field "
                          f"text ({e})") from e
    elif isinstance(raw.get("chosen"), list):
        record = _conversational(raw, source)
    else:
        record = {**raw, "prompt": raw.get("prompt", raw.get("question"))}
    record = {key: record[key] for key in IMAGES + RESPONSES + ("prompt",)
              if record.get(key) is not None}
    for field in ("image", "prompt", "chosen"):
        if field not in record:
            raise Problem(f"{source}: the field {field} is missing (fields: "
                          f"{', '.join(list(raw)[:12])}); `python data.py --help` shows a record")
    for field in ("prompt",) + RESPONSES:
        text = record.get(field, "-")
        if not isinstance(text, str) or not text.strip():
            raise Problem(f"{source}: the field {field} must be non-empty text, not "
                          f"{'empty' if isinstance(text, str) else type(text).__name__}")
        if field in record:  # unpaired surrogates survive json.loads but no tokeniser
            record[field] = text.encode("utf-8", "replace").decode().strip()
    return record


def _conversational(raw, source):
    """TRL's vision records: lists of messages, and `images` (exactly one) or `image`."""
    def text(messages):
        try:
            content = messages[-1]["content"]
            if isinstance(content, str):
                return content
            return "".join(part["text"] for part in content if part["type"] == "text")
        except (TypeError, KeyError, IndexError) as e:
            raise Problem(f"{source}: not a list of messages with role and content") from e

    images = raw.get("images") or raw.get("image")
    images = images if isinstance(images, list) else [images]
    prompt = raw.get("prompt") or raw["chosen"][:-1]  # TRL also allows the prompt inside chosen
    if len(images) != 1:
        raise Problem(f"{source}: {len(images)} images; a record has exactly one")
    if not isinstance(prompt, list) or len(prompt) != 1:
        raise Problem(f"{source}: the prompt must be one user turn; longer conversations and "
                      "system turns are not supported")
    record = {"image": images[0], "prompt": text(prompt), "chosen": text(raw["chosen"])}
    if "rejected" in raw:
        record["rejected"] = text(raw["rejected"])
    return record


def lacks(record, cells):
    """The fields that an objective's cells read and the record does not have.

    A missing contrast image alone is no lack: a crop is drawn (copo, mdpo). Next to a response
    written for the contrast image (symmpo) only that image will do.
    """
    needed = {RESPONSES[y] for _, y in cells}
    if "contrast_chosen" in needed:
        needed.add("contrast_image")
    return sorted(field for field in needed if field not in record)


# --- images ----------------------------------------------------------------------------------


def open_image(source, root=None, allow_outside=True):
    """An RGB PIL image, upright (EXIF), from a path, bytes, or {"bytes": ..., "path": ...}.

    Paths are relative to root; with allow_outside=False they must stay inside it. Palette, CMYK,
    16-bit and animated (first frame) files are converted; transparency is laid on black.
    Raises Problem naming the file: missing, no image, truncated, or a decompression bomb by PIL's
    limit (179 million pixels).
    """
    name = "image bytes"
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str):
        folder = Path(root or ".")
        name = path = folder / source
        try:
            there, inside = path.is_file(), path.resolve().is_relative_to(folder.resolve())
        except (OSError, ValueError, RuntimeError):  # too long, a NUL, a circle of links
            there = inside = False
        if not (inside or allow_outside):
            raise Problem(f"{path}: outside the data folder {root} (--allow-outside permits it)")
        if not there:
            raise Problem(f"{path}: no such image file")
    elif isinstance(source, bytes):
        path = io.BytesIO(source)
    else:
        raise Problem(f"an image is a path or bytes, not {type(source).__name__}")
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel: scale, since convert() would clip
                image = image.convert("I").point(lambda v: v / 256).convert("L")
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as e:  # PIL raises many kinds of error for the many ways to be broken
        raise Problem(f"{name}: not a readable image ({type(e).__name__}: {e})") from e


def record_image(record, field, allow_outside=True):
    """One of a record's images; the Problem of a bad one names the record."""
    try:
        return open_image(record[field], record["root"], allow_outside)
    except Problem as e:
        raise Problem(f"{record['source']}: {e}") from e


def crop(image, rng, keep=CROP):
    """A random crop that keeps a share of the area drawn from `keep`; same aspect within 4:3."""
    share, aspect = rng.uniform(*keep), rng.uniform(3 / 4, 4 / 3)
    w = max(1, min(image.width, round(image.width * (share * aspect) ** 0.5)))
    h = max(1, min(image.height, round(image.width * image.height * share / w)))
    x, y = rng.randint(0, image.width - w), rng.randint(0, image.height - h)
    return image.crop((x, y, x + w, y + h))


# --- models, prompts and tokens ----------------------------------------------------------------


def load_processor(path):
    """(config, processor) of a checkpoint folder or hub name; raises Problem when there is none."""
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        processor = transformers.AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except Exception as e:  # every reader of a damaged file has its own kind of error
        raise Problem(f"{path}: no vision-language model could be read there: "
                      f"{first_line(e)}") from e
    if not hasattr(processor, "tokenizer"):
        raise Problem(f"{path}: this is a text model, its processor takes no images")
    # Processors saved years ago lack what decides the number of image tokens (575 against 576).
    if getattr(processor, "patch_size", 0) is None:
        processor.patch_size = config.vision_config.patch_size
    if getattr(processor, "vision_feature_select_strategy", "") is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1  # CLIP's class token
    return config, processor


def first_line(error):
    return str(error).strip().partition("\n")[0] or type(error).__name__


def load_model(path, device="cpu", dtype=None, adapter=None):
    """(model, processor), in eval mode with sdpa attention; dtype by default bf16 on CUDA, else
    fp32; adapter: a PEFT folder. Raises Problem when either cannot be read or they do not fit."""
    _, processor = load_processor(path)
    dtype = dtype or (torch.bfloat16 if str(device).startswith("cuda") else torch.float32)
    try:
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
        model.to(device).eval()
    except Exception as e:
        raise Problem(f"{path}: the model cannot be loaded: {first_line(e)}") from e
    return (load_adapter(model, adapter) if adapter else model), processor


def load_adapter(model, folder):
    """The model with a PEFT adapter, in eval mode. Raises Problem for a folder that has none, or
    one for another base: train.py keeps the fingerprint of the base that it trained on."""
    made = Path(folder, "run.json")
    made = json.loads(made.read_text()) if made.is_file() else {}
    if made.get("dtype") == str(model.dtype)[6:] and made["base"] != fingerprint(model):
        raise Problem(f"{folder}: an adapter for another base model, {made['model']}")
    try:
        return peft.PeftModel.from_pretrained(model, folder).eval()
    except Exception as e:
        raise Problem(f"{folder}: the adapter cannot be loaded: {first_line(e)}") from e


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
    text = getattr(config, "text_config", None)
    if requested != "auto":
        return requested
    llava15 = config.model_type == "llava" and getattr(text, "model_type", "") == "llama"
    return "vicuna" if llava15 else "chat"


def render(processor, fmt, prompt, image=True):
    """The prompt as text with the image placeholder, from BOS to where the response begins."""
    tokenizer, prompt = processor.tokenizer, plain_text(processor, prompt)
    if fmt == "vicuna":
        place = processor.image_token + "\n" if image else ""
        text = f"{VICUNA} USER: {place}{prompt} ASSISTANT:"
    else:
        content = [{"type": "image"}] * image + [{"type": "text", "text": prompt}]
        try:
            text = processor.apply_chat_template([{"role": "user", "content": content}],
                                                 add_generation_prompt=True, tokenize=False)
        except ValueError as e:
            raise Problem("the model has no chat template; try --prompt-format vicuna") from e
    if writes_space(tokenizer):
        text = text.rstrip(" ")  # the response brings its own
    bos = tokenizer.bos_token or ""
    return bos + text.removeprefix(bos)  # exactly one, whether or not the template has it


def writes_space(tokenizer):
    """Does the tokenizer put a space before the first word by itself, as SentencePiece does?"""
    return tokenizer.tokenize("a")[0].startswith("▁")


def plain_text(processor, text):
    """User text in which no special token can act as one: "</s>" becomes "< /s>".

    An "<image>" alone on the first or last line is what LLaVA-style records write where the image
    belongs; it is removed, since the prompt format puts the image in its place.
    """
    text = re.sub(r"^\s*<image>\s*\n|\n\s*<image>\s*$", "", text)
    tokenizer = processor.tokenizer
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), "<image>"}
    for token in sorted(special, key=len, reverse=True):
        if len(token.strip()) > 1 and token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def encode_prompts(processor, fmt, prompts, images=None):
    """Tensors of a left-padded batch of prompts (input_ids, attention_mask, pixel_values, ...).

    images: one PIL image a prompt, or None for text alone. The text is tokenised without adding
    special tokens, since `render` has put the one BOS there.
    """
    texts = [render(processor, fmt, prompt, image=images is not None) for prompt in prompts]
    if images is not None:
        return dict(processor(text=texts, images=[[image] for image in images], padding=True,
                              padding_side="left", add_special_tokens=False, return_tensors="pt"))
    return dict(processor.tokenizer(texts, padding=True, padding_side="left",
                                    add_special_tokens=False, return_tensors="pt"))


def response_frame(processor, fmt):
    """(separator, end token id): what stands between prompt and response, and what ends it.

    For a chat template both are read off a rendered conversation, because some templates end a
    turn with another token than eos (<|im_end|>, <end_of_turn>) and some with none at all.
    """
    tokenizer = processor.tokenizer
    separator, end = " ", tokenizer.eos_token_id
    if fmt == "chat":
        turn = [{"role": "user", "content": [{"type": "text", "text": "Q"}]}]
        answer = [{"role": "assistant", "content": [{"type": "text", "text": "RESPONSE"}]}]
        start = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        whole = processor.apply_chat_template(turn + answer, tokenize=False)
        rest = whole[len(start):] if whole.startswith(start) else "RESPONSE"
        separator, tail = rest.split("RESPONSE", 1)
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        marks = [i for i in tokenizer(tail, add_special_tokens=False).input_ids if i in special]
        end = marks[0] if marks else end
    return separator.removesuffix(" ") if writes_space(tokenizer) else separator, end


def end_token_id(processor, fmt):
    """The token that ends a response in this format."""
    return response_frame(processor, fmt)[1]


def encode_response(processor, fmt, text):
    """Token ids of a response, tokenised by itself, with the one end token that is trained on."""
    separator, end = response_frame(processor, fmt)
    text = separator + plain_text(processor, text)
    return processor.tokenizer(text, add_special_tokens=False).input_ids + [end]


# --- rows: what the model sees (symmpo.py explains their form) ----------------------------------


def build_rows(record, processor, fmt, cells, number=0, seed=0, max_length=2048, no_image=False,
               allow_outside=True):
    """A record as rows for symmpo.logp_table: one per image among `cells`, responses behind it.

    number: the record's place in the batch; seed decides the crop that stands in for a missing
    contrast image. Raises Problem naming the record: a missing field, a bad image, or a sequence
    longer than max_length tokens (nothing is ever cut).
    """
    source, missing = record["source"], lacks(record, cells)
    if missing:
        raise Problem(f"{source}: the objective needs the field {', '.join(missing)}")
    rows = []
    for i in sorted({i for i, _ in cells}):
        images = None
        if not no_image:
            images = [record_image(record, IMAGES[i] if IMAGES[i] in record else "image",
                                   allow_outside)]
            if IMAGES[i] not in record:
                images = [crop(images[0], random.Random(f"{seed} {source.rpartition(':')[2]}"))]
        inputs = encode_prompts(processor, fmt, [record["prompt"]], images)
        wanted = [y for image, y in cells if image == i]
        responses = [encode_response(processor, fmt, record[RESPONSES[y]]) for y in wanted]
        rows.append({"inputs": inputs, "responses": [torch.tensor(r) for r in responses],
                     "cells": [(number, i, y) for y in wanted], "source": source})
        if row_length(rows[-1]) > max_length:
            raise Problem(f"{source}: {row_length(rows[-1])} tokens, --max-length is {max_length}: "
                          "raise it, or leave the record out with --skip-bad")
    return rows


def row_length(row):
    """Tokens of the prompt with its image and the longest response."""
    return row["inputs"]["input_ids"].shape[1] + max(map(len, row["responses"]))


# --- contrastive images ------------------------------------------------------------------------


def noise(image, rng, step):
    """Forward diffusion, sqrt(a) x + sqrt(1 - a) e: `step` steps of DDPM's 1000-step schedule."""
    a = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:step])
    x = np.asarray(image) / 127.5 - 1
    e = np.random.default_rng(rng.getrandbits(64)).standard_normal(x.shape)
    x = a ** 0.5 * x + (1 - a) ** 0.5 * e
    return Image.fromarray(np.uint8(((x + 1) * 127.5).round().clip(0, 255)))


def moco(image, rng):
    """MoCo-v2's augmentation with its strengths and probabilities: resized crop, colour jitter (in
    a fixed order), greyscale, blur (meant for 224 px, scaled to the image), flip."""
    image = crop(image, rng, (0.2, 1.0)).resize(image.size, Image.Resampling.BICUBIC)
    if rng.random() < 0.8:
        for enhance in ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color:
            image = enhance(image).enhance(rng.uniform(0.6, 1.4))
        (h, s, v), turn = image.convert("HSV").split(), round(256 * rng.uniform(-0.1, 0.1))
        hue = h.point(lambda value: (value + turn) % 256)
        image = Image.merge("HSV", (hue, s, v)).convert("RGB")
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:
        sigma = rng.uniform(0.1, 2.0) * min(image.size) / 224
        image = image.filter(ImageFilter.GaussianBlur(sigma))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def embed(files, encoder, cache, batch=64):
    """(N, d) unit image embeddings in fp32 and (N,) hashes of the images' pixels, in file order.

    encoder: a checkpoint with get_image_features: CLIP, SigLIP, or a LLaVA, whose features are
    averaged over the image tokens. Each batch is kept in the folder `cache` under a hash of the
    encoder's weights and the pixels: what is there is not computed again, killed run or new one.
    """
    try:
        safe = {"trust_remote_code": False}
        model = transformers.AutoModel.from_pretrained(encoder, dtype=torch.float32, **safe).eval()
        processor = transformers.AutoImageProcessor.from_pretrained(encoder, **safe)
        features = model.get_image_features
    except Exception as e:
        raise Problem(f"{encoder}: not an image encoder (CLIP, SigLIP, LLaVA): "
                      f"{first_line(e)}") from e
    weights = hashlib.sha256(str(processor).encode())
    for tensor in model.state_dict().values():
        weights.update(tensor.numpy())
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    vectors, pixels = [], []
    Path(cache).mkdir(exist_ok=True)
    for i in tqdm(range(0, len(files), batch), desc="embedding", unit=" batches"):
        images = [open_image(str(file)) for file in files[i:i + batch]]
        pixels += [hashlib.sha256(str(x.size).encode() + x.tobytes()).hexdigest() for x in images]
        key = hashlib.sha256("".join([weights.hexdigest(), *pixels[i:]]).encode()).hexdigest()
        kept, part = Path(cache, f"{key}.npy"), Path(cache, "part.npy")
        if not kept.exists():
            with torch.no_grad():
                inputs = processor(images=images, return_tensors="pt").to(model.device)
                found = features(**inputs, return_dict=True)
            pooled = [x.reshape(-1, x.shape[-1]).mean(0) for x in found.pooler_output]
            np.save(part, torch.nn.functional.normalize(torch.stack(pooled), dim=-1).cpu())
            os.replace(part, kept)
        vectors.append(np.load(kept))
    return torch.from_numpy(np.concatenate(vectors)), pixels


def neighbours(vectors, labels, max_sim=1.0, block=1024):
    """Each row's nearest other row, exactly: indices and cosines (N,), -inf where there is none.

    vectors: (N, d) of unit length. labels: integer tensors (N,); rows that share one (the same
    pixels, the same group) are no neighbours, nor are rows with a cosine above max_sim. Memory
    beside the vectors: tiles of block x 8 block cosines, whatever N.
    """
    best, index = torch.full((len(vectors),), -torch.inf), torch.zeros(len(vectors), dtype=int)
    for i in tqdm(range(0, len(vectors), block), desc="neighbours", unit=" blocks"):
        for j in range(0, len(vectors), 8 * block):
            rows, columns = slice(i, i + block), slice(j, j + 8 * block)
            cosine = vectors[rows] @ vectors[columns].T
            cosine[cosine > max_sim] = -torch.inf
            for label in labels:
                cosine[label[rows, None] == label[columns]] = -torch.inf
            top, at = cosine.max(1)
            index[rows] = torch.where(top > best[rows], at + j, index[rows])
            best[rows] = best[rows].maximum(top)
    return index, best


def choose(args, root, groups, cache):
    """{image: (contrast image, cosine)} for the kinds that take a picture that is there already.

    groups: {image: its group}. An image for which no other will do is not in the result.
    """
    images = list(groups)
    if args.kind == "synthetic":
        folder, pairs = image_records(args.mapping)
        return {r["image"]: (folder / r["contrast_image"], None) for r in pairs
                if r["image"] in groups and "contrast_image" in r}
    if args.kind == "random":
        rng = random.Random(args.seed)
        draws = {i: [j for j in rng.choices(images, k=20) if groups[j] != groups[i]]
                 for i in images}
        return {image: (root / others[0], None) for image, others in draws.items() if others}
    vectors, pixels = embed([root / image for image in images], args.encoder, cache)
    labels = [torch.tensor(np.unique(of, return_inverse=True)[1])
              for of in (pixels, list(groups.values()))]
    nearest = neighbours(vectors, labels, args.max_sim)
    return {image: (root / images[i], round(cosine, 4)) for image, i, cosine
            in zip(images, *(x.tolist() for x in nearest)) if cosine >= args.min_sim}


def image_records(path):
    """(folder, records as they stand) of a JSONL file, or one {"image"} per picture of a folder.

    Raises Problem for a path or line without records or without an image path.
    """
    path, records, number = Path(path), [], 0
    if path.is_dir():
        suffixes = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
        names = sorted(p.name for p in path.iterdir() if p.suffix.lower() in suffixes)
        return path, [{"image": name} for name in names]
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    records.append({**json.loads(line)})
                    path / records[-1]["image"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise Problem(f"{path}: line {number}: not a JSON record with an image path ({e!r})") from e
    return path.parent, records


def contrast(args):
    """`python data.py contrast`: write the records again, each with a contrast image."""
    made = {"crop": crop, "crop-large": lambda image, rng: crop(image, rng, CROP_LARGE),
            "black": lambda image, rng: Image.new("RGB", image.size),
            "noise": lambda image, rng: noise(image, rng, args.step), "moco": moco}
    out, (root, records), left_out = Path(args.out), image_records(args.data), 0
    folder = out.with_suffix("")  # of the pictures that are made, or of the embeddings
    out.parent.mkdir(parents=True, exist_ok=True)
    groups = {r["image"]: str(r.get(args.group, r["image"])) for r in records}
    if not groups:
        raise Problem(f"{args.data}: no images there")
    found = {} if args.kind in made else choose(args, root, groups, folder)
    with open(f"{out}.tmp", "w", encoding="utf-8") as f:
        for number, record in enumerate(tqdm(records, desc=args.kind, unit=" records")):
            image, cosine = record["image"], None
            if args.kind in made:
                rng = random.Random(f"{args.seed} {number} {image}")
                folder.mkdir(exist_ok=True)
                other = folder / f"{number:06d}.png"
                made[args.kind](open_image(image, root), rng).save(other)
            elif image in found:
                other, cosine = found[image]
            else:
                left_out += 1
                continue
            places = [os.path.relpath(p, out.parent) for p in (root / image, other)]
            f.write(json.dumps({**record, "image": places[0], "contrast_image": places[1],
                                "contrast_kind": args.kind, "contrast_seed": args.seed,
                                "similarity": cosine}, ensure_ascii=False) + "\n")
    os.replace(f"{out}.tmp", out)
    print(f"{out}: {len(records) - left_out:,} records; {left_out:,} left out, for which no other "
          "image will do")


# --- command line --------------------------------------------------------------------------------


def check(args):
    """`python data.py check`: every bad line with its reason; returns how many there are."""
    cells = {name: objective[0] for name, objective in symmpo.OBJECTIVES.items()}
    records, bad, shown, counts = Records(args.data), 0, None, dict.fromkeys(cells, 0)
    facts = {"width, pixels": [], "height, pixels": [], "length, tokens": []}
    if args.model:
        config, processor = load_processor(args.model)
        fmt = prompt_format(config, args.prompt_format)
    for i in tqdm(range(len(records)), desc="checking", unit=" records", disable=None):
        try:
            record = records[i]
            sizes = [record_image(record, field, args.allow_outside).size
                     for field in IMAGES if field in record]
            usable = [name for name in cells if not lacks(record, cells[name])]
            if args.model:
                most = max((cells[name] for name in usable), key=len)
                shown = build_rows(record, processor, fmt, most, max_length=args.max_length)
                facts["length, tokens"] += [row_length(row) for row in shown]
            facts["width, pixels"] += [w for w, _ in sizes]
            facts["height, pixels"] += [h for _, h in sizes]
            for name in usable:
                counts[name] += 1
        except Problem as e:
            bad += 1
            tqdm.write(f"bad: {e}")
    print(f"{len(records):,} records, {bad:,} bad; usable by "
          + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    for name, values in facts.items():
        if values:
            middle = sorted(values)[len(values) // 2]
            print(f"{name}: min {min(values)}, median {middle}, max {max(values)}")
    if shown:
        print(describe(processor, fmt, shown[0]))
    return bad


def describe(processor, fmt, row):
    """One rendered row for a person to read: the prompt's text and the decoded labels."""
    decode = processor.tokenizer.decode
    ids = row["inputs"]["input_ids"][0].tolist()
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    text = [i for k, i in enumerate(ids) if not (k and i == image == ids[k - 1])]
    lines = [f"prompt ({fmt}, {len(ids)} tokens, {ids.count(image)} of them image, shown as one):",
             "  " + repr(decode(text))]
    for response in row["responses"]:
        lines.append(f"label ({len(response)} tokens): {decode(response)!r}")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("check", help="count, show and find every bad record")
    p.add_argument("data", help="prefs.jsonl or a parquet file")
    p.add_argument("--model", help="also render and tokenise for this model (folder or hub name)")
    p.add_argument("--prompt-format", choices=("auto", "vicuna", "chat"), default="auto")
    p.add_argument("--max-length", type=int, default=2048, help="tokens (default 2048)")
    p.add_argument("--allow-outside", action="store_true",
                   help="permit image paths that leave the data file's folder")
    p.set_defaults(run=check)
    p = commands.add_parser("contrast", help="give every record a contrast image")
    p.add_argument("data", help="records (.jsonl) or a folder of images")
    p.add_argument("--out", required=True, help="records with contrast_image (.jsonl), to stand "
                   "beside the images; made pictures go into a folder of the same name")
    p.add_argument("--kind", default="clip", choices=("crop", "crop-large", "random", "clip",
                                                      "black", "noise", "moco", "synthetic"))
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--encoder", default="openai/clip-vit-large-patch14-336",
                   help="clip: a CLIP, SigLIP or LLaVA checkpoint (default %(default)s)")
    p.add_argument("--min-sim", type=float, default=-1.0, help="clip: least cosine of a neighbour")
    p.add_argument("--max-sim", type=float, default=0.98,
                   help="clip: what is nearer is a near-duplicate (default %(default)s)")
    p.add_argument("--group", default="image", help="field; images that share it are never paired")
    p.add_argument("--step", type=int, default=500, help="noise: of 1000 (default %(default)s)")
    p.add_argument("--mapping", default="synthetic.jsonl",
                   help="synthetic: file of {image, contrast_image} (default %(default)s)")
    p.set_defaults(run=contrast)
    args = parser.parse_args(argv)
    sys.exit(1 if command(lambda: args.run(args)) else 0)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # records hold what a terminal may not show
    main()
