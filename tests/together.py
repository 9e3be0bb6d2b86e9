"""How many times faster fifteen questions an image are answered together than each by itself.

    python -m tests.together --size mid --images 2

A random LLaVA of speed/sizes.json with 576 image tokens and a real Llama tokenizer, one thread,
AMBER's kinds of question, three new tokens each. The sides take turns on an image: one by one (a
batch of one question), a batch of copies (as before), together. It fails if their tokens differ.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from PIL import Image

from benchmarks.answers import answer
from benchmarks.common import Question
from tests.conftest import ROOT, save_llava15
from vlm.load import load_processor
from vlm.prompts import Prompts

NOUNS = "person dog tree car table chair sky cup hat ball bird boat flower bridge horse".split()
FORMS = ("Is there a {} in this image?", "Is the {} red in this image?")
FORMS += ("Are there two {}s in this image?", "Is there direct contact between the {} and the sky?")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="mid")
    parser.add_argument("--images", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = json.loads((ROOT / "speed" / "sizes.json").read_text())[args.size]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        save_llava15(folder)
        _, processor = load_processor(folder)
        prompts = Prompts(processor, "vicuna")
        image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
        parts = {name: size[name] for name in ("text_config", "vision_config")}
        parts["text_config"]["vocab_size"] = 32064
        torch.manual_seed(0)
        config = tf.LlavaConfig(**parts, image_token_id=image_token)
        model = tf.AutoModelForImageTextToText.from_config(config).eval()

        said, read = [], []
        model_generate = model.generate

        def generate(generation_config, **inputs):
            generation_config.eos_token_id = None  # three tokens, whatever they are
            tokens = model_generate(generation_config=generation_config, **inputs)
            said.append(tokens[:, -3:])
            return tokens

        def note(module, args, options):
            read.append(options["inputs_embeds"].shape[:2].numel())

        model.generate = generate
        model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)

        rows = []
        for number in range(args.images):
            pixels = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(folder, "image.jpg"))
            same = Path(folder, "image.jpg").read_bytes()
            questions, copies = [], []
            for n, noun in enumerate(NOUNS):
                prompt = FORMS[n % len(FORMS)].format(noun)
                questions.append(Question(prompt, same, {}))
                copies.append(Question(prompt, same + bytes(n), {}))  # other bytes, same picture
            row, tokens = {}, {}
            for name, asked, batch in (
                ("one by one", questions, 1),
                ("batch of copies", copies, 16),
                ("together", questions, 16),
            ):
                said.clear()
                read.clear()
                wall, processor_time = time.perf_counter(), time.process_time()
                list(answer(model, prompts, asked, batch_size=batch, max_new_tokens=3))
                row[name] = (time.process_time() - processor_time, time.perf_counter() - wall)
                row[name] += (sum(read),)
                tokens[name] = torch.cat(said)
            first = tokens["one by one"]
            for name in tokens:
                assert torch.equal(tokens[name], first), name
            rows.append(row)
            print(f"image {number}: (processor s, wall s, tokens read)", row, flush=True)
            print(f"same tokens, {len(first.unique())} different ones", flush=True)
        for name in ("one by one", "batch of copies"):
            for k, what in enumerate(("processor time", "wall time", "tokens")):
                ratios = sorted(row[name][k] / row["together"][k] for row in rows)
                middle = statistics.median(ratios)
                print(f"{name} / together, {what}: {middle:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
