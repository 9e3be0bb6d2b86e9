"""How a model is spoken to: a prompt or a response in, token ids out.

Prompt and response are tokenised separately, so that a response has the same tokens whatever
stands before it. Special tokens inside user text are broken up ("</s>" -> "< /s>"): data cannot end
a turn.
"""

import re
import sys

from support.cli import UserError

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions."
)


# <|im_start|>, <|start_header_id|>, ..., or the sentence of llava_v1 (see vlm/convert.py).
OWN_FRAME = re.compile(r"<\||\[INST\]|<start_of_turn>|a curious human")


SQUARE_NOTE = (
    "pictures that are not square are cropped for training, as SymMPO's code does, and padded at "
    "evaluation; --square pad trains on padded ones"
)


def prompt_format(config, processor, requested="auto"):
    """The form in which a model was trained: "vicuna", or "chat" for the processor's own template.

    LLaVA-1.5, a llava over a llama, had the Vicuna sentence, which its published template lacks. A
    llava over another llama has turn tokens in its template, or another sentence.
    """
    if requested != "auto":
        return requested
    is_llava15 = config.model_type == "llava" and config.text_config.model_type == "llama"
    if is_llava15 and not OWN_FRAME.search(str(processor.chat_template)):
        return "vicuna"
    return "chat"


def prompts_for(config, processor, form="auto", square="own"):
    """The Prompts of a model, and how its pictures become squares.

    square: "pad" with the mean colour or "crop" the middle, which the checkpoints of vlm/convert.py
    can; "own" is as the checkpoint says, which is how its authors evaluate it; "auto" crops where
    it says to pad, as the published code of SymMPO and RLAIF-V does in training.
    """
    images = processor.image_processor
    if type(images).__name__.startswith("LlavaImageProcessor"):
        if square == "auto" and images.do_pad:
            print(f"note: {SQUARE_NOTE}", file=sys.stderr)
            images.do_pad = False
        elif square in ("pad", "crop"):
            images.do_pad = square == "pad"
    elif square in ("pad", "crop"):
        raise UserError(f"--square {square}: this checkpoint's processor has its own way alone")
    return Prompts(processor, prompt_format(config, processor, form))


class Prompts:
    """A processor together with the format in which its model was trained."""

    def __init__(self, processor, form):
        self.processor, self.tokenizer, self.form = processor, processor.tokenizer, form
        self.special = {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()}
        # SentencePiece writes a space before the first word by itself.
        self.adds_space = self.tokenizer.tokenize("a")[0].startswith("▁")
        # Where it is the end token as well (Phi-2), no prompt begins with it.
        self.has_bos = self.tokenizer.bos_token != self.tokenizer.eos_token
        self.separator, self.end_token = self._around_a_response()

    def encode(self, prompts, images=None):
        """The model's input tensors for prompts, left-padded, each behind its PIL image or none."""
        texts = [self.render(prompt, with_image=images is not None) for prompt in prompts]
        return dict(
            self.processor(
                text=texts,
                images=None if images is None else [[image] for image in images],
                padding=True,
                padding_side="left",
                add_special_tokens=False,
                return_tensors="pt",
            )
        )

    def encode_response(self, text):
        """The response's token ids, with the one end token that is trained on."""
        text = self.separator + self.plain(text)
        return self.tokenizer(text, add_special_tokens=False).input_ids + [self.end_token]

    def render(self, prompt, with_image=True):
        """The prompt as text, from BOS to where the response begins."""
        prompt = self.plain(prompt)
        if self.form == "vicuna":
            image = f"{self.processor.image_token}\n" if with_image else ""
            text = f"{VICUNA} USER: {image}{prompt} ASSISTANT:"
        else:
            content = [{"type": "text", "text": prompt}]
            if with_image:
                content.insert(0, {"type": "image"})
            text = self._chat([{"role": "user", "content": content}], add_generation_prompt=True)
        if self.adds_space:
            text = text.rstrip(" ")  # the response brings its own
        bos = self.tokenizer.bos_token or ""
        if self.has_bos:
            text = bos + text.removeprefix(bos)  # exactly one, whether or not the template has it
        return text

    def plain(self, text):
        """User text in which no special token can act as one."""
        for token in sorted({*self.special, "<image>"}, key=len, reverse=True):
            if len(token.strip()) > 1:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _around_a_response(self):
        """(text before a response, id of the token that ends it), read off a rendered conversation:
        templates end a turn with <|im_end|>, <end_of_turn>, or nothing."""
        before, after = " ", ""
        if self.form == "chat":
            question = {"role": "user", "content": [{"type": "text", "text": "Q"}]}
            answer = {"role": "assistant", "content": [{"type": "text", "text": "RESPONSE"}]}
            start = self._chat([question], add_generation_prompt=True)
            whole = self._chat([question, answer])
            if whole.startswith(start):
                before, _, after = whole[len(start) :].partition("RESPONSE")
            else:
                before = ""
        if self.adds_space:
            before = before.removesuffix(" ")

        for token in self.tokenizer(after, add_special_tokens=False).input_ids:
            if self.tokenizer.convert_ids_to_tokens(token) in self.special:
                return before, token
        return before, self.tokenizer.eos_token_id

    def _chat(self, turns, **options):
        try:
            return self.processor.apply_chat_template(turns, tokenize=False, **options)
        except Exception as error:  # a template is a program, and may raise anything
            raise UserError(
                f"the model's chat template cannot be used (try --prompt-format vicuna): {error}"
            ) from error

    def is_own(self):
        """Does the checkpoint's template give the same prompts?"""
        try:
            return Prompts(self.processor, "chat").render("Q") == self.render("Q")
        except UserError:
            return False

    def describe(self, row):
        """A row for a person to read: the prompt's text, and the labels decoded."""
        ids = row.inputs["input_ids"][0]
        is_image = ids == self.tokenizer.convert_tokens_to_ids(self.processor.image_token)
        if "token_type_ids" in row.inputs:  # of Gemma 3, whose image_token stands before an image
            is_image = row.inputs["token_type_ids"][0] == 1
        repeated = is_image & is_image.roll(1)
        form = self.form
        if not self.is_own():
            form += ", another one than the checkpoint's own template (--prompt-format chat)"
        lines = [
            f"prompt ({form}; {len(ids)} tokens, {int(is_image.sum())} of them image, shown as "
            "one):",
            f"  {self.tokenizer.decode(ids[~repeated])!r}",
        ]
        for (_, response), label in zip(row.cells, row.responses):
            name = ("chosen", "rejected", "contrast_chosen")[response]
            lines.append(f"label {name} ({len(label)} tokens): {self.tokenizer.decode(label)!r}")
        return "\n".join(lines)
