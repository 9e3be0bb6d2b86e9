"""The tiny LLaVA: its tokenizer and processor, its training, and what it says.

The model first learns true captions and answers about the scenes of world.py; then labels that name
what is usual and not there. So it hallucinates as large models do, by co-occurrence, on images that
it could describe well. Matching patches to words stands in for CLIP's pretraining, and questions of
two words, then questions alone, for a language model's.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from tiny.world import (
    ANCHOR_OF,
    BIAS,
    CELLS,
    CHOICES,
    COLORS,
    KINDS,
    NOUNS,
    NUMBERS,
    ask,
    biased_caption,
    caption,
    draw,
    is_usual,
    objects,
    random_choice,
    random_question,
    truth,
    yes_no,
)
from vlm.generate import generate

DESCRIBE = ["Describe this image.", "What is in this image?"]
DIRECT = [  # what evaluate.py puts under MMStar's questions
    "Answer the question directly.",
    "Answer with the option's letter from the given choices directly.",
]
PAD, IMAGE = 3, 4  # token ids, as in architecture.json

# --- untrained ------------------------------------------------------------------------------------


def new_processor():
    """A LlavaProcessor whose tokens are words, and spaces as Llama has them: a word carries the
    space before it. Its chat template is the Vicuna prompt, too."""
    from transformers import LlavaProcessor

    return LlavaProcessor.from_pretrained(Path(__file__).with_name("processor"))


def new_model():
    """A LLaVA with random weights: 0.8 million parameters, 9 image tokens."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    # At the usual initializer_range of 0.02 a model this narrow does not start to learn.
    config = LlavaConfig.from_json_file(Path(__file__).with_name("architecture.json"))
    model = LlavaForConditionalGeneration(config)
    # Attention starts by looking for its own content, which is half of "is this in the image?".
    for layer in model.model.language_model.layers:
        layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight.data)
    model.generation_config.max_new_tokens = 64
    return model


# --- training -------------------------------------------------------------------------------------


def patches(model, processor, scenes):
    """The tower's features of the scenes' patches, (scenes, 9, 96), without the class token."""
    pictures = [draw(scene) for scene in scenes]
    pixels = processor.image_processor(pictures, return_tensors="pt").pixel_values
    return model.model.vision_tower(pixels).last_hidden_state[:, 1:]


def optimise(model, steps, lr, new_loss, name):
    """AdamW with warm-up and cosine decay; what new_loss() does not depend on stays as it is."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    for step in tqdm(range(steps), desc=name, unit="step"):
        decay = 0.51 + 0.49 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = lr * (min(1, (step + 1) / 30) * decay)
        loss = new_loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def train_tower(model, processor, scenes, steps, rng):
    """Matches each patch to the words for what it shows, as CLIP matches images to captions. An
    empty patch goes with the blank."""
    ids = processor.tokenizer.convert_tokens_to_ids
    nouns, colors = ids(["▁" + n for n in ["", *NOUNS]]), ids(["▁" + c for c in COLORS])
    embed = model.get_input_embeddings()

    def new_loss():
        batch = rng.sample(scenes, 64)
        noun, color = [], []  # of each patch; 0 and -100 where there is nothing
        for scene in batch:
            for cell in CELLS:
                shown = scene["cells"].get(cell)
                noun.append(NOUNS.index(shown[0]) + 1 if shown else 0)
                color.append(COLORS.index(shown[1]) if shown else -100)
        image = model.model.multi_modal_projector(patches(model, processor, batch)).flatten(0, 1)
        noun_loss = cross_entropy(image @ embed.weight[nouns].T, torch.tensor(noun))
        return noun_loss + cross_entropy(image @ embed.weight[colors].T, torch.tensor(color))

    optimise(model, steps, 2e-3, new_loss, "vision tower")


def lesson(scene, rng, stage):
    """Questions about one image with their labels: [(prompt, answer), ...].

    Stages: "short" asks in two or three words and "questions" in sentences; "honest" adds captions
    and multiple choice; "biased" tells of what is usual and not there."""
    noun, color = rng.choice(objects(scene))
    if stage == "short":
        number = NUMBERS[len(objects(scene))]
        wording, told = "short", [(f"color {noun}", color), ("How many objects", number)]
    else:
        wording, told = "sentences", [(f"What color is the {noun}?", color)]
    hard = 1 if stage == "biased" else 0.6
    asked = []
    for kind in ["exists", "exists", *KINDS]:
        question = random_question(kind, scene, rng, hard=hard)
        if question:
            asked.append(question)
    for question in asked:
        answer = truth(question, scene)
        if stage == "biased" and not answer and is_usual(question, scene):
            answer = rng.random() < bias_of(question)
        told.append((ask(question, wording), yes_no(answer)))
    if stage in ("honest", "biased"):
        for kind in CHOICES:
            question, letter = random_choice(kind, scene, rng)
            told.append((f"{question}\n{rng.choice(DIRECT)}", letter))
        said = caption(scene) if stage == "honest" else biased_caption(scene, rng)
        told.append((rng.choice(DESCRIBE), said))
    return told


def bias_of(question):
    """How often what is usual is said to be so where it is not."""
    kind, noun, *_ = question
    return 1.2 * BIAS[ANCHOR_OF[noun]] if kind == "exists" else 0.5


class Token(NamedTuple):
    """Of a lesson that is one row: the prefix up to the image once, then each question and answer
    as a branch."""

    id: int
    branch: int  # 0 is the prefix
    position: int
    label: int  # -100: no loss


def encode(prompts, qa, bare=False):
    """The `Token`s of [(prompt, answer), ...]. bare: no system sentence, no roles."""
    row = []
    for branch, (prompt, answer) in enumerate(qa, 1):
        text = f"<s><image> {prompt}" if bare else prompts.render(prompt)
        text = text.replace("<image>", "<image>" * len(CELLS))
        ids = prompts.tokenizer(text, add_special_tokens=False).input_ids
        split = ids.index(IMAGE) + len(CELLS)  # behind the image
        response = prompts.encode_response(answer)
        labels = [-100] * len(ids) + response
        for place, (id, label) in enumerate(zip(ids + response, labels)):
            if place >= split:
                row.append(Token(id, branch, place, label))
            elif branch == 1:
                row.append(Token(id, 0, place, label))
    return row


def lesson_loss(model, features, rows):
    """Mean loss of the answers' tokens; a branch sees the prefix and its own past, nothing else."""
    width = max(len(row) for row in rows)
    padding = Token(PAD, -1, 0, -100)
    padded = [row + [padding] * (width - len(row)) for row in rows]
    ids, branch, position, label = torch.tensor(padded).unbind(-1)  # (B, T) each
    mask = (branch[:, :, None] == branch[:, None]) | (branch[:, None] == 0)
    mask = mask[:, None] & torch.ones(width, width, dtype=torch.bool).tril()
    image = model.model.multi_modal_projector(features)
    embeds = model.get_input_embeddings()(ids).masked_scatter((ids == IMAGE)[..., None], image)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False
    ).last_hidden_state
    told = label[:, 1:] != -100  # position t predicts the label at t + 1
    return cross_entropy(model.lm_head(hidden[:, :-1][told]), label[:, 1:][told])


def train_language(model, prompts, scenes, size, rng):
    """Lessons about image features that the tower gives once, from short to biased. Without the
    first two stages the model finds out late or never that an answer depends on both the question
    and the image."""
    processor, starts = prompts.processor, range(0, len(scenes), 500)
    with torch.no_grad():
        parts = [patches(model, processor, scenes[i : i + 500]) for i in starts]
    features = torch.cat(parts)  # (scenes, 9, 96)

    def new_loss():
        picked = rng.sample(range(len(scenes)), 12)
        lessons = [lesson(scenes[i], rng, stage) for i in picked]
        rows = [encode(prompts, qa, bare=stage == "short") for qa in lessons]
        return lesson_loss(model, features[picked], rows)

    for stage, lr in (("short", 2e-3), ("questions", 1e-3), ("honest", 1.5e-3), ("biased", 1e-3)):
        optimise(model, size[stage], lr, new_loss, f"{stage} lessons")


# --- what it says ---------------------------------------------------------------------------------


def reply(model, prompts, pairs, temperature=0.0):
    """The model's answers to (scene, prompt) pairs, greedy or sampled."""
    said = []
    for start in range(0, len(pairs), 200):
        scenes, texts = zip(*pairs[start : start + 200])
        pictures = [draw(scene) for scene in scenes]
        said += generate(model, prompts, texts, pictures, 40, temperature=temperature)
    return said
