"""Opening pictures that may be anything, and changing them: crops and the other contrast images
that are made from an image itself. No file here knows what a model is."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from support.cli import UserError

CROP, CROP_LARGE = (0.01, 0.2), (0.2, 0.5)  # share of the area that a crop keeps (mDPO Table 3)


def need_inside(path, root, allow_outside):
    """Refuse a path that leaves the folder root, links followed."""
    if not allow_outside and not Path(root, path).resolve().is_relative_to(Path(root).resolve()):
        raise UserError(
            f"{Path(root, path)}: outside the data folder {root} (--allow-outside permits it)"
        )


def open_image(source, root=".", allow_outside=True):
    """An RGB image, upright (EXIF), from a path relative to root, bytes, or {"bytes", "path"} as
    parquet has it. Palette, CMYK, 16-bit and animated (first frame) files are converted."""
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, bytes):
        name, file = "image bytes", io.BytesIO(source)
    elif isinstance(source, str):
        name = file = os.path.join(root, source)
        if not os.path.isfile(file):
            raise UserError(f"{file}: no such image file")
        need_inside(source, root, allow_outside)
    else:
        raise UserError(f"an image is a path or bytes, not {type(source).__name__}")
    try:
        with Image.open(file) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel: scale, since convert() would clip
                image = image.convert("I").point(lambda v: v / 256).convert("L")
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # PIL's readers raise many kinds
        raise UserError(f"{name}: not a readable image: {error}") from error


def crop(image, rng, keep=CROP):
    """A random crop that keeps a share of the area drawn from `keep`; same aspect within 4:3."""
    share, aspect = rng.uniform(*keep), rng.uniform(3 / 4, 4 / 3)
    w = max(1, min(image.width, round(image.width * (share * aspect) ** 0.5)))
    h = max(1, min(image.height, round(image.width * image.height * share / w)))
    x, y = rng.randint(0, image.width - w), rng.randint(0, image.height - h)
    return image.crop((x, y, x + w, y + h))


def noise(image, rng, step=500):
    """Forward diffusion, sqrt(a) x + sqrt(1 - a) e: `step` steps of DDPM's 1000-step schedule."""
    a = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:step])
    x = np.asarray(image) / 127.5 - 1
    e = np.random.default_rng(rng.getrandbits(64)).standard_normal((image.height, image.width, 3))
    noisy = a**0.5 * x + (1 - a) ** 0.5 * e
    return Image.fromarray(np.uint8(((noisy + 1) * 127.5).round().clip(0, 255)))


def moco(image, rng):
    """MoCo-v2's augmentation, with its strengths and probabilities."""
    image = crop(image, rng, (0.2, 1.0)).resize(image.size, Image.Resampling.BICUBIC)
    if rng.random() < 0.8:  # colour jitter, in a fixed order
        for enhance in ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color:
            image = enhance(image).enhance(rng.uniform(0.6, 1.4))
        h, s, v = image.convert("HSV").split()
        turn = round(256 * rng.uniform(-0.1, 0.1))
        h = h.point(lambda hue: (hue + turn) % 256)
        image = Image.merge("HSV", (h, s, v)).convert("RGB")
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:  # meant for 224 px
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2) * min(image.size) / 224))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return image
