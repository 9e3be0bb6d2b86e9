"""Preference records of published layouts, in one form:

    {"image", "prompt", "chosen", "rejected", "contrast_image", "contrast_chosen"}

layouts.json has the layouts that differ in names alone, `normalise` a branch for each other one, in
its own field names. The form has one image (and a contrast image), one question and one answer of
each kind. What does not fit is refused with its reason, never cut: earlier turns, system messages,
second images, half of a chat template.
"""

import json
import re
from pathlib import Path

IMAGES = ("image", "contrast_image")  # the fields behind the table's images m and m'
RESPONSES = ("chosen", "rejected", "contrast_chosen")  # behind its responses y_w, y_l and y'_w
FIELDS = (*IMAGES, "prompt", *RESPONSES)
# other_names: layouts that differ in names alone, {a field that only it has: {ours: theirs}}, of
# SymMPO's published Parquet files, OPA-DPO, mDPO, ms-swift (two) and POVID; a later one counts.
# more_fields: of the layouts in `normalise`.
# notes: what is known to be written about a record, not trained on and not worth a remark.
# frames: of one question in a chat template, what stands before it and behind it.
KNOWN = json.loads(Path(__file__).with_name("layouts.json").read_text(encoding="utf-8"))
OTHER_NAMES, NOTES, FRAMES = KNOWN["other_names"], KNOWN["notes"], KNOWN["frames"]
LAYOUTS = set(KNOWN["more_fields"])  # the fields of published layouts that are not of the form
for names in OTHER_NAMES.values():
    LAYOUTS.update(names.values())
ONE_QUESTION = "put what the model should see into one question"
ROLES = {"human": "user", "gpt": "assistant"}  # of LLaVA's conversations
TAG = "<image>"

# What only a chat template has. A text with one of these is not a plain question or answer.
MARKERS = re.compile(
    r"<\|im_start\|>|<\|im_end\|>|\[/?INST\]|<start_of_turn>|<\|start_header_id\|>|<\|user\|>"
    r"|<\|assistant\|>|\b(USER|ASSISTANT):|### ?(Human|Assistant|Instruction|Response):"
    r"|<<SYS>>|^Human:|Assistant:$|</?img>|<\|(image|vision|video)\w*\|>"
)
END_TOKEN = re.compile(r"(</s>|<\|im_end\|>|<end_of_turn>|<\|eot_id\|>|<\|endoftext\|>)$")
# How other models write the image's place; each is read as TAG.
OTHER_TAGS = re.compile(
    r"<\|vision_start\|>(<\|image_pad\|>)+<\|vision_end\|>|<\|image(_1)?\|>|<start_of_image>"
    r"|<image_placeholder>|<image_1>"
)


def normalise(raw, needed=("image", "prompt", "chosen")):
    """A record of any known layout in the form above; ValueError, KeyError, ... if it is none.

    Besides the form's fields it has `stripped`, what was taken off the prompt, and `unread`, the
    names in raw that no layout has."""
    found = {**raw, "image": raw.get("image", raw.get("images"))}
    for only_here, names in OTHER_NAMES.items():
        if only_here in raw:
            found.update({ours: raw.get(theirs) for ours, theirs in names.items()})
    if "completions" in raw:  # VLFeedback
        raise ValueError(
            "ratings of several completions (VLFeedback, BPO) are no pair yet: choose two of them "
            "and write them as chosen and rejected"
        )
    elif "text" in raw and "chosen" not in raw:  # RLHF-V: question and answers as JSON in a field
        found.update(json_object(raw["text"]))
    elif "conversations" in raw and "rejected_conversations" not in raw:  # LLaMA-Factory
        found["prompt"] = raw["conversations"]
    # The rest is the form itself or near it: RLAIF-V and MMPR say question for prompt, TRL and
    # OpenRLHF have messages instead of texts.
    if found.get("prompt") is None:
        found["prompt"] = found.get("question")
    for name in ("system", "history"):
        if raw.get(name):
            raise ValueError(f"the field {name} would be lost; {ONE_QUESTION}")
    split_conversations(found)

    record = {"stripped": [], "unread": sorted(raw.keys() - {*FIELDS, *LAYOUTS, *NOTES})}
    for name in FIELDS:
        value = found.get(name)
        if value is None:
            continue
        if name in IMAGES:
            record[name] = the_only_image(name, value)
        elif name == "prompt":
            text, image = one_turn(name, value, "user")
            record[name] = plain_question(text, record["stripped"])
            if image is not None:
                record.setdefault("image", image)
        else:
            text, _ = one_turn(name, value, "assistant")
            record[name] = plain_answer(name, text)
    missing = [name for name in needed if name not in record]
    if missing:
        mapping = ",".join(f"{name}=THEIRS" for name in missing)
        raise ValueError(
            f"missing: {', '.join(missing)}; the record has {', '.join(raw)}; name yours with "
            f"--fields {mapping}"
        )
    return record


def split_conversations(found):
    """Where there is no prompt, it stands at the beginning of chosen, and of rejected."""
    chosen = found.get("chosen")
    rejected = found.get("rejected")
    if found.get("prompt") is not None or not isinstance(chosen, list):
        return
    found["prompt"] = chosen[:-1]
    found["chosen"] = chosen[-1:]
    if isinstance(rejected, list) and len(rejected) > 1:
        if rejected[:-1] != chosen[:-1]:
            raise ValueError("chosen and rejected answer different questions")
        found["rejected"] = rejected[-1:]


def json_object(text):
    """The object that the field text holds as JSON."""
    found = json.loads(text) if isinstance(text, str) else None
    if not isinstance(found, dict):
        raise ValueError("the field text holds no JSON object")
    return found


def the_only_image(name, images):
    """An image field that may be a list of one."""
    if not isinstance(images, list):
        return images
    if len(images) != 1:
        raise ValueError(f"{name}: {len(images)} images; there must be one")
    return images[0]


# --- texts ---------------------------------------------------------------------------------------


def one_turn(name, value, role):
    """(text, image or None) of a text, or of a conversation's only turn, which must be this
    role's."""
    if isinstance(value, str) and re.match(r"\[\s*\{\s*\"(role|from)\"", value):
        value = json.loads(value)  # as OpenRLHF has it
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value, None
    if not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"{name}: a list of {len(value)} texts; there must be one text")
    roles = []
    for turn in value:
        said_by = turn.get("role", turn.get("from"))
        roles.append(ROLES.get(said_by, said_by))
    if roles != [role]:
        there = ", ".join(r or "a turn without a role" for r in roles) or "none"
        raise ValueError(f"{name}: one turn of the {role} is read, not {there}; {ONE_QUESTION}")
    [turn] = value
    parts = turn.get("content", turn.get("value"))
    if not isinstance(parts, list):
        return parts, None
    text = ""
    image = None
    for part in parts:
        if not part["type"].startswith("image"):
            text += part["text"]
            continue
        text += TAG
        image = part.get("image")
        if part.get("image_url"):
            image = part["image_url"]["url"]
    return text, image


def plain_question(text, stripped):
    """The question alone: without the frame of a chat template and without the image's tag. What
    was taken off is added to the list `stripped`."""
    text = OTHER_TAGS.sub(TAG, text_of("prompt", text))
    for before, end in FRAMES:
        if text.startswith(before) and text.endswith(end):
            text = text.removeprefix(before).removesuffix(end).strip()
            stripped.append("a chat template")
            break
    if text.count(TAG) > 1:
        raise ValueError(f"prompt: {text.count(TAG)} {TAG} tags; the record has one image")
    if text.startswith(TAG) or text.endswith(TAG):
        text = text.removeprefix(TAG).removesuffix(TAG)
        stripped.append("an image tag")
    return no_markup("prompt", text)


def plain_answer(name, text):
    """The answer alone: its end token is the tokenizer's business."""
    return no_markup(name, END_TOKEN.sub("", text_of(name, text)))


def text_of(name, value):
    """The text without white space around it."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the field {name} is empty, or no text: {value!r:.40}")
    return value.encode("utf-8", "replace").decode().strip()  # no unpaired surrogates


def no_markup(name, text):
    """A text that is not empty and carries no tag and no marker of a template."""
    if not text.strip():
        raise ValueError(f"the field {name} has no text besides its markup")
    if TAG in text:
        raise ValueError(f"{name}: {TAG} in the middle of the text; the image stands before it")
    marker = MARKERS.search(text)
    if marker:
        raise ValueError(
            f"{name}: {marker[0]!r} belongs to a chat template; give the plain question or answer, "
            "the model's own template is put around it"
        )
    return text.strip()
