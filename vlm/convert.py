"""Checkpoints in the original format of LLaVA-1.5 and Bunny, as folders that transformers reads.

    python -m vlm.convert CHECKPOINT --vision-tower DIR --out DIR [--lora DIR]

CHECKPOINT is a LLaVA-1.5 over Llama (liuhaotian/llava-v1.5-7b and what was fine-tuned from it:
SymMPO, RLAIF-V, TPO, OPA-DPO, HA-DPO) or a Bunny over Phi-2 (BAAI/Bunny-v1_0-3B): config.json, the
tokenizer, and weights as safetensors or .bin. DIR of the vision tower is the CLIP or SigLIP that
config.json names in mm_vision_tower. --lora is a folder with adapter_model and, if it trained the
projector, non_lora_trainables.bin.

Where the original code is followed, and where not:
- The tower's weights are the folder's, unless config.json says that the tower was trained along.
- Bunny's loader cuts the vocabulary to the tokenizer's length; --keep-vocabulary does not, as mDPO.
- Text behind <image> is tokenised as the original does, as a piece of its own.
- <image> has a row of its own at the end of the tables. `vlm.load.load_model` gives it no
  probability, as in the original, which has no such row; other code may (by 1e-3 nats a sum).
- Images are padded to a square where config.json says so, as the original evaluates them.
- Phi's dropout of 0.1 (resid_pdrop) is off: it would make policy and reference differ.
- Merged LoRA weights are stored in fp32; the original merges in fp16.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from support.cli import NEEDED, UserError, parse, run_command
from support.files import lock, need_same, write_json
from vlm.load import named

ORIGINAL = Path(__file__).with_name("original.json")
DECODERS = {"LlavaLlamaForCausalLM": "llama", "BunnyPhiForCausalLM": "phi"}


def read_json(path):
    if not path.is_file():
        raise UserError(f"{path}: not there; checkpoint and vision tower are folders on this disk")
    return json.loads(path.read_text(encoding="utf-8"))


# --- weights --------------------------------------------------------------------------------------


def tensors_in(folder, stem="model"):
    """{name: tensor} of a folder with safetensors or .bin files, in one piece or in shards; they
    stay on the disk until they are used. Pickled code is refused. PEFT's prefix is taken off."""
    from transformers.modeling_utils import load_state_dict

    patterns = (f"{stem}*.safetensors", f"pytorch_{stem}*.bin", f"{stem}.bin")
    for pattern in patterns:
        tensors = {}
        for file in sorted(Path(folder).glob(pattern)):
            with named(f"{file}: cannot be read"):
                for name, tensor in load_state_dict(file).items():
                    tensors[name.removeprefix("base_model.model.")] = tensor
        if tensors:
            return tensors
    raise UserError(f"{folder}: no weights in there ({', '.join(patterns)})")


def original_weights(args, config):
    """{original name: tensor} of tower, checkpoint, adapter; the last one counts, but for a tower
    that was not trained."""
    tower = {}
    for name, tensor in tensors_in(args.vision_tower).items():
        if name.startswith("vision_model."):
            tower["model.vision_tower.vision_tower." + name] = tensor
    if not tower:
        raise UserError(f"{args.vision_tower}: no vision_model.* in there, so no CLIP or SigLIP")
    trained = config.get("unfreeze_mm_vision_tower") or config.get("unfreeze_vision_tower")
    weights = tower | tensors_in(args.checkpoint)
    if not trained:
        weights |= tower
    if args.lora and Path(args.lora, "non_lora_trainables.bin").is_file():
        weights |= tensors_in(args.lora, "non_lora_trainables")
    return weights


def renamed(name):
    """The name that transformers has for it; "" for what it computes itself or does not use."""
    for pattern, new in read_json(ORIGINAL)["names"]:
        found = re.fullmatch(pattern, name)
        if found:
            return found.expand(new)
    raise UserError(f"{name}: a weight that LLaVA-1.5 and Bunny-v1.0-3B do not have")


# --- LoRA -----------------------------------------------------------------------------------------


def read_lora(folder):
    """({original name: tensor}, scale) of an adapter of PEFT; nothing without a folder."""
    if folder is None:
        return {}, 0.0
    made = read_json(Path(folder, "adapter_config.json"))
    for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if made.get(name):
            raise UserError(f"{folder}: {name} is not understood")
    return tensors_in(folder, "adapter_model"), made["lora_alpha"] / made["r"]


def with_lora(weight, name, lora, scale):
    """W + scale B A"""
    module = name.removesuffix(".weight")
    if f"{module}.lora_A.weight" not in lora:
        return weight
    down = lora[f"{module}.lora_A.weight"]  # (rank, in)
    up = lora[f"{module}.lora_B.weight"]  # (out, rank)
    return weight.float() + scale * (up.float() @ down.float())


# --- what stands beside the weights ---------------------------------------------------------------


def read_config(args):
    """The original config.json, if all in it is what this module converts. LoRA folders bring their
    own, which says how the whole is used."""
    path = Path(args.lora or args.checkpoint, "config.json")
    if not path.is_file():
        path = Path(args.checkpoint, "config.json")
    config = read_json(path)
    for name, known in read_json(ORIGINAL)["understood"].items():
        if config.get(name, known[0]) not in known:
            raise UserError(f"{path}: {name} is {config[name]!r}; what is converted is {known[0]}")
    found = config.get("architectures")
    for architecture, decoder in DECODERS.items():
        if found == [architecture]:
            config["model_type"] = decoder  # there it is "llava" for either
            return config
    raise UserError(f"config.json's architectures are {found}; converted is {', '.join(DECODERS)}")


def tokenizer_of(args, config):
    """The original tokenizer, and <image> in it.

    The original cuts a text at <image> and tokenises each piece from its beginning, where
    SentencePiece writes a space. Llama's legacy way is the one that writes it in each piece.
    """
    from transformers import AddedToken, CodeGenTokenizer, LlamaTokenizer

    if config["model_type"] == "llama":
        tokenizer = LlamaTokenizer.from_pretrained(args.checkpoint, legacy=True)
    else:
        tokenizer = CodeGenTokenizer.from_pretrained(
            args.checkpoint,
            clean_up_tokenization_spaces=False,  # it would take spaces out of answers
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    length = len(tokenizer)
    tokenizer.add_tokens(AddedToken("<image>", special=True, normalized=False))
    return tokenizer, length


def model_config(args, config, length):
    """transformers' LlavaConfig; its `original_vocabulary` is the number of rows without <image>'s.

    length: of the original tokenizer.
    """
    from transformers import LlavaConfig

    tower = read_json(Path(args.vision_tower, "config.json"))
    tower = tower.get("vision_config", tower)
    rows = config["vocab_size"]
    if length > rows:
        raise UserError(f"{args.checkpoint}: {length} tokens, and {rows} rows in its tables")
    if not args.keep_vocabulary:
        rows = length
    decoder = {name: value for name, value in config.items() if not name.startswith("mm_")}
    decoder |= {"vocab_size": max(rows, length + 1), "resid_pdrop": 0.0}
    return LlavaConfig(
        text_config=decoder,
        vision_config={**tower, "vision_use_head": False},  # of SigLIP
        image_token_index=length,
        image_seq_length=(tower["image_size"] // tower["patch_size"]) ** 2,
        vision_feature_select_strategy="full" if "siglip" in tower["model_type"] else "default",
        vision_feature_layer=-2,
        original_vocabulary=rows,
        dtype=config.get("torch_dtype"),
    )


def save_processor(args, config, made, tokenizer):
    """Images as the original evaluates them, and the prompt of its conversation."""
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    vision = made.vision_config
    side = vision.image_size
    # It has no class token, and squeezes a picture to a square where CLIP cuts it.
    siglip = "siglip" in vision.model_type
    square = {"height": side, "width": side}
    given = read_json(Path(args.vision_tower, "preprocessor_config.json"))
    images = LlavaImageProcessorPil(
        do_pad=config.get("image_aspect_ratio") == "pad",
        size=square if siglip else {"shortest_edge": side},
        crop_size=square,
        do_center_crop=not siglip,
        image_mean=given["image_mean"],
        image_std=given["image_std"],
    )
    system = read_json(ORIGINAL)["systems"][args.conversation]
    template = ORIGINAL.with_suffix(".jinja").read_text(encoding="utf-8")
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=made.vision_feature_select_strategy,
        num_additional_image_tokens=0 if siglip else 1,
        chat_template=template.replace("{{ 'SYSTEM' }}", system),
    )
    processor.save_pretrained(args.out)


# --- convert --------------------------------------------------------------------------------------


def convert(args):
    """Write --out in files of 50 weights, one after the other: a killed conversion goes on, and no
    more than one file is in memory."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    config = read_config(args)
    tokenizer, length = tokenizer_of(args, config)
    made = model_config(args, config, length)
    weights = original_weights(args, config)
    lora, scale = read_lora(args.lora)
    for name in lora:
        if re.sub(r"lora_[AB]\.", "", name) not in weights:
            raise UserError(f"{name}: the adapter is not for this model")
    originals = {renamed(name): name for name in weights if renamed(name)}
    need_fit(made, weights, originals, args.checkpoint)

    Path(args.out).mkdir(parents=True, exist_ok=True)
    with lock(args.out):
        need_same_conversion(args)
        save_processor(args, config, made, tokenizer)
        made.architectures = ["LlavaForConditionalGeneration"]
        made.save_pretrained(args.out)
        ends = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ends, suppress_tokens=[length]).save_pretrained(args.out)
        names = sorted(originals)
        index = {}
        for number in tqdm(range(0, len(names), 50), desc="converting", unit=" files"):
            file = Path(args.out, f"model-{number:05}.safetensors")
            shard = names[number : number + 50]
            index |= dict.fromkeys(shard, file.name)
            if not file.exists():
                tensors = {}
                for name in shard:
                    original = originals[name]
                    weight = with_lora(weights[original], original, lora, scale)
                    tensors[name] = converted(original, weight, made)
                part = file.with_suffix(".part")
                save_file(tensors, part, metadata={"format": "pt"})
                part.rename(file)
        contents = {"metadata": {}, "weight_map": index}
        write_json(Path(args.out, "model.safetensors.index.json"), contents)


def converted(name, tensor, made):
    """A weight for transformers; name: its original one."""
    rows = made.original_vocabulary
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        missing = made.text_config.vocab_size - rows  # <image>'s, if there is none to spare
        tensor = torch.nn.functional.pad(tensor[:rows], (0, 0, 0, missing))  # (tokens, width)
    return tensor.contiguous()


def need_fit(made, weights, originals, checkpoint):
    """Every weight has its place in the model, every place its weight, of one shape."""
    from transformers import LlavaForConditionalGeneration

    shapes = {}
    for name, original in originals.items():
        shapes[name] = converted(original, weights[original].to("meta"), made)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(made)
    try:
        model.load_state_dict(shapes, assign=True)
    except RuntimeError as error:  # it names them
        raise UserError(f"{checkpoint}: not what its config.json says: {error}") from error


def need_same_conversion(args):
    """A folder that was begun with other arguments is refused."""
    known = Path(args.out, "conversion.json")
    given = {name: str(value) for name, value in vars(args).items() if name != "out"}
    if known.exists():
        need_same(known, read_json(known), given)
    write_json(known, given)


@dataclass
class Options:
    """What is typed.

    checkpoint          folder in the original format
    vision_tower        folder of its CLIP or SigLIP
    out                 folder to write
    lora                folder of an adapter in the original format
    keep_vocabulary     see above
    conversation        its first sentence; SymMPO and RLAIF-V were trained with llava_v1
    """

    checkpoint: str
    vision_tower: str = NEEDED
    out: str = NEEDED
    lora: str = None
    keep_vocabulary: bool = False
    conversation: Literal["vicuna_v1", "llava_v1"] = "vicuna_v1"


def main(argv=None):
    run_command(convert, parse(Options, __doc__, argv))


if __name__ == "__main__":
    main()
