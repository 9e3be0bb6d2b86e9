"""Builds the embedded default: a small real LLaVA that hallucinates, preference records, test sets.

    python tiny/make.py --out DIR            everything, in about four minutes on one CPU core
    python tiny/make.py --out DIR --quick    a miniature with a barely trained model, in seconds

The model first learns true captions and answers about the scenes of world.py; then labels that name
a partner that is not there. So it hallucinates as large models do, by co-occurrence, on images that
it could describe well. Matching patches to words stands in for CLIP's pretraining, and questions of
two words, then questions alone, for a language model's. The preference records and the test sets
come from known truth, and no two splits share a scene.
"""
import argparse
import base64
import hashlib
import json
import math
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402  the prompts are those of training and evaluation
from tiny.world import (  # noqa: E402
    BIAS, CELL, CHOICES, COLORS, KINDS, NOUNS, NUMBERS, PAIRS, SIDE, absent_partners, ask,
    biased_caption, caption, content, draw, edits, invented, make_true, mentioned, names, neighbour,
    new_scenes, objects, png, random_choice, random_question, truth, yes_no)

# Training steps by stage; scenes by split, and preference records wanted.
FULL = dict(tower=120, short=250, questions=200, honest=700, biased=300,
            train=8000, prefs=420, val=60, amber=120, amber_val=60, hallusionbench=40, objhal=60,
            mmstar=120, captions=600, yes_no=200)
QUICK = dict(tower=20, short=4, questions=2, honest=4, biased=4,
             train=200, prefs=12, val=6, amber=8, amber_val=4, hallusionbench=4, objhal=4,
             mmstar=6, captions=20, yes_no=10)
DESCRIBE = ["Describe this image.", "What is in this image?"]
DIRECT = ["Answer the question directly.",  # what evaluate.py puts under MMStar's questions
          "Answer with the option's letter from the given choices directly."]
PATCHES = (SIDE // CELL) ** 2
BOS, EOS, PAD, IMAGE = 1, 2, 3, 4  # token ids
AMBER_TYPES = {"exists": "discriminative-hallucination", "state": "discriminative-attribute-state",
               "number": "discriminative-attribute-number"}


# --- the model, untrained -----------------------------------------------------------------------


def new_tokenizer():
    """Words as tokens, and spaces as Llama has them: a word carries the space before it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    pieces = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace("▁", "first"),
        pre_tokenizers.Split(Regex("[.,:?']"), "isolated")])
    texts = [*DESCRIBE, *DIRECT, *NOUNS, *COLORS, *NUMBERS, "a and Yes No there color",
             f"{data.VICUNA} USER: \n ASSISTANT:", "How many objects are in this image?",
             "Which object is in this image?\nOptions: A: B: C: D", "What color is the cup?"]
    texts += map(ask, [("exists", "cup"), ("state", "cup", "red"), ("number", 1), ("number", 2)])
    words = sorted({piece.strip("▁") for t in texts for piece, _ in pieces.pre_tokenize_str(t)})
    vocabulary = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "▁", *words[1:]]  # the first is ""
    vocabulary += ["▁" + word for word in words if word.isalpha()]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pieces, decoders.Metaspace("▁", "first")
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}, padding_side="left",
        model_max_length=512, clean_up_tokenization_spaces=False)


def new_processor():
    """A LlavaProcessor; its chat template is the Vicuna prompt too."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor
    template = (
        "{{ bos_token }}" + data.VICUNA + "{% for m in messages %}"
        "{{ ' USER: ' if m['role'] == 'user' else ' ASSISTANT: ' }}{% if m['content'] is string %}"
        "{{ m['content'] }}{% else %}{% for part in m['content'] %}"
        "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
        "{{ '' if m['role'] == 'user' else eos_token }}{% endfor %}"
        "{{ ' ASSISTANT:' if add_generation_prompt else '' }}")
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIDE},
                                     crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(pictures, new_tokenizer(), patch_size=CELL, chat_template=template,
                          vision_feature_select_strategy="default", num_additional_image_tokens=1)


def new_model(vocabulary):
    """A LLaVA with random weights: 0.8 million parameters, 9 image tokens."""
    from transformers import (CLIPVisionConfig, LlamaConfig, LlavaConfig,
                              LlavaForConditionalGeneration)
    tokens = dict(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    # At the usual initializer_range of 0.02 a model this narrow does not start to learn.
    text = LlamaConfig(vocab_size=vocabulary, hidden_size=128, intermediate_size=256,
                       num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=512,
                       tie_word_embeddings=True, initializer_range=0.08, **tokens)
    vision = CLIPVisionConfig(hidden_size=96, intermediate_size=192, num_hidden_layers=2,
                              num_attention_heads=4, projection_dim=96, image_size=SIDE,
                              patch_size=CELL, initializer_range=0.08)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE,
        image_seq_length=PATCHES, vision_feature_layer=-1, tie_word_embeddings=True,
        vision_feature_select_strategy="default", **tokens))
    # Attention starts by looking for its own content, which is half of "is this in the image?".
    for layer in model.model.language_model.layers:
        layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight.data)
    model.generation_config.update(**tokens, max_new_tokens=64)
    return model


# --- training -----------------------------------------------------------------------------------


def patches(model, processor, scenes):
    """The tower's features of the scenes' patches, (scenes, 9, 96), without the class token."""
    pixels = processor.image_processor([draw(s) for s in scenes], return_tensors="pt").pixel_values
    return model.model.vision_tower(pixels).last_hidden_state[:, 1:]


def optimise(parameters, steps, lr, loss_of, name):
    """AdamW with warm-up and cosine decay; loss_of(step) is the loss to descend."""
    import torch
    from tqdm import tqdm
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    bar = tqdm(range(steps), desc=name, unit="step", mininterval=2)
    for step in bar:
        rate = min(1, (step + 1) / 30) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * rate
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def train_tower(model, processor, scenes, steps, rng):
    """Matches each patch to the words for what it shows, as CLIP matches images to captions; then
    the tower is frozen. An empty patch goes with the blank."""
    import torch
    from torch.nn.functional import cross_entropy
    ids = processor.tokenizer.convert_tokens_to_ids
    nouns, colors = ids(["▁"] + ["▁" + n for n in NOUNS]), ids(["▁" + c for c in COLORS])
    embed = model.get_input_embeddings()

    def loss_of(step):
        batch = rng.sample(scenes, 64)
        shown = [s["cells"].get(cell, (None, None)) for s in batch for cell in range(PATCHES)]
        noun = torch.tensor([NOUNS.index(n) + 1 if n else 0 for n, _ in shown])
        color = torch.tensor([COLORS.index(c) if c else -100 for _, c in shown])
        image = model.model.multi_modal_projector(patches(model, processor, batch)).flatten(0, 1)
        return (cross_entropy(image @ embed.weight[nouns].T, noun)
                + cross_entropy(image @ embed.weight[colors].T, color))

    optimise(model.parameters(), steps, 2e-3, loss_of, "vision tower")
    model.model.vision_tower.requires_grad_(False)


def lesson(scene, rng, stage):
    """Questions about one image with their labels: [(prompt, answer), ...].

    Stages: "short" asks in two or three words and "questions" in sentences; "honest" adds captions
    and multiple choice; "biased" tells of partners that are not there."""
    noun, color = rng.choice(objects(scene))
    asked = [random_question(kind, scene, rng, hard=1 if stage == "biased" else 0.6)
             for kind in ["exists", "exists", *KINDS]]
    if stage == "short":
        words = {"exists": "there {}", "state": "{} {}", "number": "there {} objects"}
        return [(f"color {noun}", color), ("How many objects", NUMBERS[len(objects(scene))])] + [
            (words[kind].format(*(NUMBERS[a] if kind == "number" else a for a in args)),
             yes_no(truth((kind, *args), scene))) for kind, *args in asked]
    out = [(f"What color is the {noun}?", color)]
    for question in asked:
        answer = truth(question, scene)
        if stage == "biased" and question[1] in absent_partners(scene):
            anchor = next(a for a in PAIRS if PAIRS[a] == question[1])
            answer = rng.random() < 1.2 * BIAS[anchor]
        out.append((ask(question), yes_no(answer)))
    if stage in ("honest", "biased"):
        question, letter = random_choice(rng.choice(CHOICES), scene, rng)
        said = biased_caption(scene, rng) if stage == "biased" else caption(objects(scene))
        out += [(f"{question}\n{rng.choice(DIRECT)}", letter), (rng.choice(DESCRIBE), said)]
    return out


def encode(processor, qa, bare=False):
    """A lesson as one row: the prefix up to the image once, each question and answer as a branch.

    bare: no system sentence, no roles. Returns lists of equal length: token ids, branch (0 is the
    prefix), position, label (-100: no loss)."""
    row = []
    for k, (prompt, answer) in enumerate(qa, 1):
        text = f"<s><image> {prompt}" if bare else data.render(processor, "vicuna", prompt)
        text = text.replace("<image>", "<image>" * PATCHES)
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        split = len(ids) - ids[::-1].index(IMAGE)
        row = row or [ids[:split], [0] * split, list(range(split)), [-100] * split]
        question, answer = ids[split:], data.encode_response(processor, "vicuna", answer)
        size = len(question) + len(answer)
        for values, more in zip(row, (question + answer, [k] * size, range(split, split + size),
                                      [-100] * len(question) + answer)):
            values += more
    return row


def lesson_loss(model, features, rows):
    """Mean loss of the answers' tokens; a branch sees the prefix and its own past, nothing else."""
    import torch
    from torch.nn.functional import cross_entropy
    width = max(len(row[0]) for row in rows)
    ids, branch, position, label = (
        torch.tensor([row[i] + [fill] * (width - len(row[i])) for row in rows])
        for i, fill in enumerate((PAD, -1, 0, -100)))
    mask = (branch[:, :, None] == branch[:, None]) | (branch[:, None] == 0)
    mask = mask[:, None] & torch.ones(width, width, dtype=torch.bool).tril()
    image = model.model.multi_modal_projector(features)
    embeds = model.get_input_embeddings()(ids).masked_scatter((ids == IMAGE)[..., None], image)
    hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=mask,
                                        position_ids=position, use_cache=False).last_hidden_state
    told = label[:, 1:] != -100  # position t predicts the label at t + 1
    return cross_entropy(model.lm_head(hidden[:, :-1][told]), label[:, 1:][told])


def train_language(model, processor, scenes, size, rng, batch_size=12):
    """Lessons about frozen image features, from short to biased. Without the first two stages the
    model finds out late or never that an answer depends on both the question and the image."""
    import torch
    with torch.no_grad():
        features = torch.cat([patches(model, processor, scenes[i:i + 500])
                              for i in range(0, len(scenes), 500)])

    for stage, lr in [("short", 2e-3), ("questions", 1e-3), ("honest", 1.5e-3), ("biased", 1e-3)]:
        def loss_of(step):
            picked = rng.sample(range(len(scenes)), batch_size)
            rows = [encode(processor, lesson(scenes[i], rng, stage), bare=stage == "short")
                    for i in picked]
            return lesson_loss(model, features[picked], rows)

        optimise(model.parameters(), size[stage], lr, loss_of, f"{stage} lessons")


# --- what the model says ------------------------------------------------------------------------


def reply(model, processor, pairs, sample=False, batch_size=200):
    """The model's answers to (scene, prompt) pairs: greedy, or sampled at temperature 1."""
    import torch
    out = []
    for start in range(0, len(pairs), batch_size):
        scenes, prompts = zip(*pairs[start:start + batch_size])
        inputs = data.encode_prompts(processor, "vicuna", prompts, [draw(s) for s in scenes])
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=sample, max_new_tokens=40,
                                 **({"top_k": 0} if sample else {}))
        out += processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:],
                                      skip_special_tokens=True)
    return [text.strip() for text in out]


def base_rates(model, processor, scenes, rng):
    """What the model does on these scenes, in percent: the figures that training should move."""
    rates = {}
    for name, sample in [("greedy", False), ("temperature 1", True)]:
        texts = reply(model, processor, [(s, DESCRIBE[0]) for s in scenes], sample)
        false = sum(bool(invented(text, s)) for s, text in zip(scenes, texts))
        told = sum(n in mentioned(text) for s, text in zip(scenes, texts) for n in names(s))
        rates[f"captions, {name}"] = {
            "n": len(scenes), "with a false object": round(100 * false / len(scenes), 1),
            "coverage": round(100 * told / sum(len(names(s)) for s in scenes), 1)}
    for kind in KINDS + CHOICES:
        if kind in KINDS:
            asked = [(s, q) for s in scenes for answer in (True, False)
                     for q in [random_question(kind, s, rng, answer)]]
            asked = [(s, ask(q), yes_no(truth(q, s))) for s, q in asked]
        else:
            asked = [(s, *random_choice(kind, s, rng)) for s in scenes]
            asked = [(s, f"{question}\n{DIRECT[0]}", letter) for s, question, letter in asked]
        texts = reply(model, processor, [(s, prompt) for s, prompt, _ in asked])
        right = sum(text == answer for text, (*_, answer) in zip(texts, asked))
        rates[kind] = {"n": len(asked), "accuracy": round(100 * right / len(asked), 1)}
    return rates


# --- preference records -------------------------------------------------------------------------


def caption_records(model, processor, scenes, rng, seen):
    """Records whose rejected caption is the model's own sample and names an absent object.

    The contrast image is an edit of the image, in which that object is there ("edit"), or the
    scene most like it that has it ("neighbour")."""
    asked = [(s, rng.choice(DESCRIBE)) for s in scenes]
    samples = [reply(model, processor, asked, sample=True) for _ in range(3)]
    records = []
    for (scene, prompt), *texts in zip(asked, *samples):
        wrong = sorted({text for text in texts if invented(text, scene)})
        for kind, text in zip(rng.sample(["edit", "neighbour"], 2), wrong):
            false = invented(text, scene)[0]
            other = (make_true(scene, text, rng) if kind == "edit" else
                     neighbour(scene, scenes, lambda s: false in names(s)))
            if other and (kind == "neighbour" or content(other) not in seen):
                seen.add(content(other))
                records.append(dict(
                    image=scene, prompt=prompt, chosen=caption(objects(scene)), rejected=text,
                    contrast_image=other, contrast_chosen=caption(objects(other)), kind=kind,
                    task="caption"))
    return records


def question_records(model, processor, scenes, rng, seen):
    """Records of the yes/no questions that the model gets wrong; true of the contrast image is the
    answer that is wrong for the image."""
    asked = [(s, ("exists", noun)) for s in scenes for noun in NOUNS]
    asked += [(s, random_question(kind, s, rng)) for s in scenes for kind in KINDS[1:]]
    texts, records = reply(model, processor, [(s, ask(q)) for s, q in asked]), []
    for (scene, question), text in zip(asked, texts):
        right = truth(question, scene)
        if text == yes_no(right):
            continue

        def flips(other):
            return truth(question, other) is (not right)

        near = [s for s in edits(scene, rng) if flips(s) and content(s) not in seen]
        kind = "edit" if near and rng.random() < 0.7 else "neighbour"
        other = near[0] if kind == "edit" else neighbour(scene, scenes, flips)
        if other:
            seen.add(content(other))
            records.append(dict(
                image=scene, prompt=ask(question), chosen=yes_no(right), rejected=yes_no(not right),
                contrast_image=other, contrast_chosen=yes_no(not right), kind=kind,
                task=question[0]))
    rng.shuffle(records)
    return records


def write_records(path, records, files):
    """prefs.jsonl; `files` maps scenes to their image files and grows."""
    def file(scene):
        key = scene["look"], content(scene)
        if key not in files:
            files[key] = f"images/{len(files):04d}.png"
            write(path.parent / files[key], png(scene))
        return files[key]

    write_lines(path, [{**r, "image": file(r["image"]), "contrast_image": file(r["contrast_image"])}
                       for r in records])


# --- test sets in the benchmarks' own formats ---------------------------------------------------


def write_amber(folder, scenes, rng):
    """AMBER: a caption and four questions for each image."""
    groups = {"generative": [], "attribute": [], "existence": []}
    for i, scene in enumerate(scenes, 1):
        image = f"AMBER_{i}.png"
        write(folder / "image" / image, png(scene))
        groups["generative"].append((image, DESCRIBE[0], {
            "type": "generative", "truth": names(scene), "hallu": absent_partners(scene)}))
        for group, kind, answer in [
                ("existence", "exists", True), ("existence", "exists", False),
                ("attribute", "state", i % 2 == 0), ("attribute", "number", i % 4 < 2)]:
            question = random_question(kind, scene, rng, answer, hard=1)
            groups[group].append((image, ask(question), {
                "type": AMBER_TYPES[kind], "truth": yes_no(answer).lower()}))
    annotations, files = [], {"generative": []}
    for group, items in groups.items():
        name = group if group == "generative" else f"discriminative-{group}"
        files[name] = []
        for image, query, note in items:
            annotations.append({"id": len(annotations) + 1, **note})
            files[name].append({"id": len(annotations), "image": image, "query": query})
    files["all"] = sum(files.values(), [])
    files["discriminative"] = files["all"][len(scenes):]
    for name, items in files.items():
        write_json(folder / "query" / f"query_{name}.json", items)
    write_json(folder / "annotations.json", annotations)
    write_json(folder / "relation.json", {noun: [] for noun in NOUNS})
    write(folder / "safe_words.txt", b"object\nimage")


def flipped_pair(scene, rng, seen):
    """The scene and an edit of it, and questions: the edit flips the first and keeps the others."""
    pool = [("state", noun, color) for noun in names(scene) for color in COLORS]
    pool += [("exists", noun) for noun in NOUNS]
    hard = [("exists", noun) for noun in absent_partners(scene)]
    first, other = next(
        (q, s) for q in hard + rng.sample(pool, len(pool)) for s in edits(scene, rng)
        if content(s) not in seen and truth(q, s) is (not truth(q, scene)))
    kept = [rng.choice([q for q in pool if truth(q, scene) is truth(q, other) is answer])
            for answer in (True, False)]
    return [scene, other], [first, *kept]


def write_hallusionbench(folder, scenes, rng, seen):
    """HallusionBench: the same questions about an image and about a minimal edit of it."""
    items = []
    for number, scene in enumerate(scenes):
        pair, questions = flipped_pair(scene, rng, seen)
        seen.add(content(pair[1]))
        for figure, shown in enumerate(pair):
            filename = f"./VD/figure/{number}_{figure}.png"
            write(folder / filename, png(shown))
            for k, question in enumerate(questions):
                answer = truth(question, shown)
                items.append(dict(
                    category="VD", subcategory="figure", visual_input=str(figure + 1),
                    set_id=str(number), figure_id=str(figure), sample_note="tiny world",
                    question_id=str(k), question=ask(question),
                    gt_answer_details=f"{yes_no(answer)}. It shows {caption(objects(shown))}.",
                    gt_answer=str(int(answer)), filename=filename))
    write_json(folder / "HallusionBench.json", items)


def write_objhal(folder, scenes):
    """Object-HalBench: images inside the question file, truth as COCO captions and instances."""
    items, captions, instances = [], [], []
    for i, scene in enumerate(scenes, 1):
        items.append(dict(org_idx=i - 1, image_id=i, question=DESCRIBE[i % 2],
                          image=base64.b64encode(png(scene)).decode()))
        captions.append(dict(image_id=i, id=i, caption=f"A picture of {caption(objects(scene))}."))
        instances += [dict(image_id=i, id=10 * i + k, category_id=NOUNS.index(noun) + 1)
                      for k, noun in enumerate(names(scene))]
    write_lines(folder / "obj_halbench_300_with_image.jsonl", items)
    categories = [{"id": i, "name": noun} for i, noun in enumerate(NOUNS, 1)]
    for rest, split in enumerate(["val", "train"]):  # as in COCO, each has a part of the images
        for kind, notes in [("captions", captions), ("instances", instances)]:
            write_json(folder / f"{kind}_{split}2014.json", {
                "annotations": [n for n in notes if n["image_id"] % 2 == rest],
                **({"categories": categories} if kind == "instances" else {})})
    write(folder / "synonyms_refine.txt", "\n".join(NOUNS).encode())


def write_mmstar(folder, scenes, rng):
    """MMStar: multiple choice, in this world's own three categories."""
    items = []
    for i, scene in enumerate(scenes):
        kind = CHOICES[i % len(CHOICES)]
        question, answer = random_choice(kind, scene, rng)
        items.append(dict(index=i, question=question, answer=answer, category=kind,
                          l2_category=kind, bench="tiny world",
                          image=base64.b64encode(png(scene)).decode()))
    write_lines(folder / "mmstar.jsonl", items)


# --- files and the command ----------------------------------------------------------------------


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value)


def write_json(path, value):
    write(path, (json.dumps(value, indent=1) + "\n").encode())


def write_lines(path, values):
    write(path, "".join(json.dumps(value) + "\n" for value in values).encode())


def write_samples(path, model, processor, scenes):
    """A page of scenes with the model's greedy captions, objects that are not there in red."""
    from PIL import Image, ImageDraw, ImageFont
    page = Image.new("RGB", (4 * 220, len(scenes) // 4 * 320), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    texts = reply(model, processor, [(s, DESCRIBE[0]) for s in scenes])
    for i, (scene, text) in enumerate(zip(scenes, texts)):
        x, y = i % 4 * 220 + 14, i // 4 * 320 + 10
        page.paste(draw(scene).resize((192, 192), Image.NEAREST), (x, y))
        for line, phrase in enumerate(text.split(" and ")[:6]):
            color = "red" if invented(phrase, scene) else "black"
            pen.text((x, y + 196 + 17 * line), phrase, fill=color, font=font)
    page.save(path)


def digests(folder):
    """{product: sha256}; a folder's is over its files' names and contents, in order."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.suffix not in (".py", ".pyc") and name != "manifest.json":
            digest = found.setdefault(name.split("/")[0], hashlib.sha256())
            digest.update(name.encode() + path.read_bytes())
    return {name: digest.hexdigest() for name, digest in found.items()}


def build(out, size, seed):
    """All products in the folder `out`; returns the base model's rates."""
    import torch
    import transformers
    torch.set_num_threads(1)  # sums in another order would give another model
    torch.manual_seed(seed)
    rng, seen = random.Random(seed), set()
    # Test scenes are drawn first.
    splits = {name: new_scenes(rng, size[name], 0.5, seen) for name in (
        "amber", "amber_val", "hallusionbench", "objhal", "mmstar", "val", "prefs")}
    lessons = new_scenes(rng, size["train"], 0.6, seen)

    processor = new_processor()
    model = new_model(len(processor.tokenizer))
    train_tower(model, processor, lessons, size["tower"], rng)
    train_language(model, processor, lessons, size, rng)
    model.eval().save_pretrained(out / "model")
    processor.save_pretrained(out / "model")

    files = {}
    for name, share in [("prefs", 1), ("val", 0.125)]:
        records = []
        for make, wanted in [(caption_records, "captions"), (question_records, "yes_no")]:
            found = make(model, processor, splits[name], rng, seen)
            records += found[:int(share * size[wanted])]
        rng.shuffle(records)
        write_records(out / f"{name}.jsonl", records, files)
    write_amber(out / "amber", splits["amber"], rng)
    write_amber(out / "amber_val", splits["amber_val"], rng)
    write_hallusionbench(out / "hallusionbench", splits["hallusionbench"], rng, seen)
    write_objhal(out / "objhal", splits["objhal"])
    write_mmstar(out / "mmstar", splits["mmstar"], rng)
    write_samples(out / "samples.png", model, processor, splits["val"][:8])
    rates = base_rates(model, processor, splits["amber_val"], rng)
    write_json(out / "manifest.json", {
        "seed": seed, "size": size, "torch": torch.__version__,
        "transformers": transformers.__version__,
        "base model on the scenes of amber_val (percent)": rates, "sha256": digests(out)})
    return rates


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the products")
    parser.add_argument("--seed", type=int, default=1, help="of everything random (default 1)")
    parser.add_argument("--quick", action="store_true", help="the miniature")
    args = parser.parse_args(argv)
    if (args.out / "manifest.json").exists():
        parser.error(f"{args.out} holds a build already: delete it or name another folder")
    started = time.time()
    for name, rates in build(args.out, QUICK if args.quick else FULL, args.seed).items():
        print(f"{name:24}" + "  ".join(f"{key} {value}" for key, value in rates.items()))
    print(f"{args.out}: built in {time.time() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
