"""Opening pictures that may be anything, and changing them: crops and the other contrast images
that are made from an image itself. No file here knows what a model is."""

import base64
import hashlib
import io
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps, PngImagePlugin

from support.cli import Unreadable, UserError

PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # a long text chunk is no reason to refuse a picture
BASE64 = re.compile(r"data:[\s\S]*|[A-Za-z0-9+/\s]{100,}+=*\s*")  # shorter is a path
FULL_SCALES = (1, 255, 1023, 4095, 16383, 65535)  # white of float, 8, 10, 12, 14 and 16 bits
# JPEG's reader opens MPO, too. EPS is not among them: its reader starts Ghostscript.
FORMATS = "PNG JPEG WEBP GIF BMP TIFF PPM JPEG2000 TGA ICO AVIF".split()
LONGEST = 200  # times the shorter side: processors scale that one up, whatever becomes of the other
# Shares of the area that a crop keeps (mDPO Table 3).
CROP = (0.01, 0.2)
CROP_LARGE = (0.2, 0.5)


def open_images(sources):
    """The images of some sources; those of one source are one object."""
    opened = {source: open_image(source) for source in set(sources)}
    return [opened[source] for source in sources]


def open_image(source, root=".", allow_outside=True):
    """An RGB image, upright (EXIF), from a path relative to root, bytes, base64 text, or {"bytes",
    "path"} as Parquet has it. Palette, CMYK, transparent, 16-bit and animated (first frame) files
    are converted."""
    name = "the image's bytes"
    if isinstance(source, str):
        name = f"base64 text {source[:40]!r}..."
    source = path_or_bytes(source, root, allow_outside)
    if isinstance(source, str):
        name = source
        try:
            source = Path(name).read_bytes()
        except OSError as error:
            raise Unreadable(f"{name}: {error}") from error
    if source.startswith(b"version https://git-lfs"):
        raise UserError(f"{name}: a Git LFS pointer, not the image: run `git lfs pull`")
    try:
        with Image.open(io.BytesIO(source), formats=FORMATS) as image:
            if max(image.size) > LONGEST * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels, too long and thin")
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # PIL's readers raise many kinds
        raise UserError(f"{name}: not a readable image: {str(error):.200}") from error


def path_or_bytes(source, root, allow_outside):
    """The path of an image's file, which is there, or the image's bytes; source as of open_image.

    Raises UserError also for a path that leaves the folder root, links followed."""
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str):
        source = decoded(source)
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str):
        raise UserError(f"an image is a path or bytes, not {type(source).__name__}")
    path = os.path.join(root, source)
    if not os.path.isfile(path):
        if not os.path.isdir(root):
            raise Unreadable(f"{path:.200}: there is no folder {root}: is its disk still there?")
        raise UserError(
            f"{path:.200}: no such image file; paths start at the data file's folder, or at "
            "--image-root DIR"
        )
    inside = Path(path).resolve().is_relative_to(Path(root).resolve())
    if not inside and not allow_outside:
        raise UserError(
            f"{Path(path)}: outside the data folder {root} (--allow-outside permits it)"
        )
    return path


def decoded(text):
    """The bytes of a data URI or of base64 text; a path stays as it is."""
    if re.match(r"https?://", text):
        raise UserError(f"{text:.100}: a web address; download the images and give their paths")
    text = text.removeprefix("file://")
    if not BASE64.fullmatch(text):
        return text
    try:
        return base64.b64decode(text.rpartition(",")[2])
    except ValueError as error:
        raise UserError(f"neither a path nor an image in base64: {text[:40]!r}...") from error


def pixel_hash(image):
    """Equal for images that show the same, however their files are written."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def to_rgb(image):
    """Transparency on white; more than 8 bits scaled by what is there, not by the container."""
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = values.max()
        full = next((full for full in FULL_SCALES if top <= full), top)
        if image.mode.startswith("I") and top <= 1:
            full = 255  # an integer picture that is nearly black, not a float one
        pixels = values.clip(0) * 255 / full
        return Image.fromarray(np.uint8(pixels.round())).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def crop(image, rng, keep=CROP):
    """A random crop that keeps a share of the area drawn from `keep`; same aspect within 4:3."""
    share = rng.uniform(*keep)
    aspect = rng.uniform(3 / 4, 4 / 3)
    width = round(image.width * (share * aspect) ** 0.5)
    width = max(1, min(image.width, width))
    height = round(image.width * image.height * share / width)
    height = max(1, min(image.height, height))
    x = rng.randint(0, image.width - width)
    y = rng.randint(0, image.height - height)
    return image.crop((x, y, x + width, y + height))


def noise(image, rng, step=500):
    """Forward diffusion, sqrt(a) x + sqrt(1 - a) e: `step` steps of DDPM's 1000-step schedule."""
    a = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:step])
    x = np.asarray(image) / 127.5 - 1  # (H, W, 3)
    e = np.random.default_rng(rng.getrandbits(64)).standard_normal(x.shape)
    noisy = a**0.5 * x + (1 - a) ** 0.5 * e
    pixels = (noisy + 1) * 127.5
    return Image.fromarray(np.uint8(pixels.round().clip(0, 255)))


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
        radius = rng.uniform(0.1, 2) * min(image.size) / 224
        image = image.filter(ImageFilter.GaussianBlur(radius))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return image
