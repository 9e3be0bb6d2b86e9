"""Models from a folder or the hub, and the LoRA adapters on them.

transformers and peft take seconds to import: that happens in the functions that need them.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import warnings
from pathlib import Path

import torch

from support.cli import UserError
from vlm.logprobs import decoder
from vlm.savings import save_work

OLDEST = {"torch": (2, 11), "transformers": (5, 17), "peft": (0, 21)}  # that the tests pass with


OUTSIDE_THE_DECODER = r"(?!.*\b(?:language_model|text_model)\.).*"  # names of modules
NOT_READ = {  # families that could be trained wrongly: why
    "mllama": "its images are read by cross-attention, not as tokens of the prompt",
    "paligemma": "its prompt is read in both directions, apart from the response",
}


def check_versions():
    """Refuse packages that are older than what this code was tried with, and attention by cuDNN,
    PyTorch's first choice on an H100: it gives NaN gradients at some lengths (pytorch#196678), and
    plans anew, for half a second, at each new length."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    for name, oldest in OLDEST.items():
        version = importlib.metadata.version(name)
        if tuple(map(int, version.split(".")[:2])) < oldest:
            raise UserError(
                f"{name} {version} is older than {oldest[0]}.{oldest[1]}, the oldest that SymMPO "
                "runs with: pip install -r requirements.txt"
            )


def load_processor(path):
    """(config, processor) of a vision-language model."""
    from transformers import AutoConfig, AutoProcessor

    check_versions()
    with named(f"{path}: no vision-language model could be read there"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type in NOT_READ:
            raise ValueError(f"{config.model_type} is not supported: {NOT_READ[config.model_type]}")
        # PIL's resizing, as the published code's, whether or not torchvision is there.
        options = {"trust_remote_code": False, "backend": "pil"}
        processor = AutoProcessor.from_pretrained(path, **options)
    if not hasattr(processor, "tokenizer"):
        raise UserError(f"{path}: a text model, its processor takes no images")
    if getattr(processor, "patch_size", 0) is None:
        # Saved years ago, without what decides the number of image tokens (575 against 576).
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1  # CLIP's class token
    return config, processor


def load_model(path, device=None, dtype=None, four_bit=False):
    """(model, processor), in eval mode.

    device: CUDA when there is one, if not given. dtype: bfloat16 on CUDA and float32 elsewhere, if
    not given. four_bit: the decoder's linear layers in NF4, and no others.
    Raises UserError for a folder or name without a model, or packages that are too old.
    """
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    _, processor = load_processor(path)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = torch.bfloat16 if str(device).startswith("cuda") else torch.float32
    with named(f"{path}: the model cannot be loaded"):
        quantization = None
        if four_bit:
            quantization = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=[OUTSIDE_THE_DECODER],
            )
        model, found = AutoModelForImageTextToText.from_pretrained(
            path,
            output_loading_info=True,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=False,
            quantization_config=quantization,
            device_map={"": device},
        )
    need_all_weights(path, found, ("missing_keys", "mismatched_keys", "unexpected_keys"))
    hide_image_row(model)
    return model, processor


def hide_image_row(model):
    """Give the row for <image> no probability where the original checkpoint has no such row (see
    convert.py): a bias of -10,000 on its logit."""
    rows = getattr(model.config, "original_vocabulary", None)
    if rows is not None:
        head = model.get_output_embeddings()
        bias = torch.zeros(len(head.weight), dtype=head.weight.dtype, device=head.weight.device)
        bias[rows:] = -1e4
        head.bias = torch.nn.Parameter(bias, requires_grad=False)


def need_all_weights(path, found, kinds):
    """Refuse a model of which weights are random, since its files lack them, or whose files have
    some that it does not use: it is not what it seems. found: transformers' loading info."""
    for kind in kinds:
        names = sorted(str(name) for name in found[kind])
        if names:
            raise UserError(
                f"{path}: {len(names):,} weights are {kind.removesuffix('_keys')}, such as "
                f"{names[0]}: files and config.json are not of one model, or not of this version "
                "of transformers"
            )


def load_adapter(model, folder):
    """The model with a PEFT adapter, in eval mode.

    Refuses an adapter that train.py made for another base (run.json beside it has the fingerprint),
    and one that does not fit or does nothing.
    """
    from peft import PeftModel

    with named(f"{folder}: the adapter cannot be loaded"):
        made = Path(folder, "run.json")
        if made.is_file():
            made = json.loads(made.read_text())
            if made["base"] != fingerprint(model.name_or_path):
                raise UserError(f"it is for another base model, {made['model']}")
        adapted = PeftModel.from_pretrained(model, folder).eval()
        need_all_tensors(adapted, folder)
        return adapted


def need_all_tensors(adapted, folder):
    """Every tensor of the file has its place in the model, every place its tensor, and they do
    something."""
    from peft import get_peft_model_state_dict, load_peft_weights

    given, places = load_peft_weights(folder, "cpu"), get_peft_model_state_dict(adapted)
    odd = given.keys() ^ places.keys()
    if odd:
        raise UserError(
            f"{len(odd):,} tensors are in it or in the model alone, such as {min(odd)}: it is "
            "for another model"
        )
    if not any(tensor.any() for name, tensor in given.items() if "lora_A" not in name):
        raise UserError("all of it is zero: it changes nothing, and was perhaps never trained")


def add_lora(model, rank, alpha, dropout=0.0, grad_checkpointing=False):
    """Trainable LoRA on every linear layer of the language model and on the matrices of experts,
    which are one parameter (experts, out, in); on nothing else.

    By full path, since suffixes alone (q_proj) would match the vision tower, too.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    language_model = decoder(model)
    path = next(name for name, module in model.named_modules() if module is language_model)
    layers = {
        name.split(".")[-1]
        for name, module in language_model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    experts = [name for name, p in language_model.named_parameters() if p.dim() == 3]
    if experts and dropout:
        raise UserError(f"--lora-dropout {dropout}: experts ({experts[0]}) are adapted without it")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=rf"{path}\..*\.({'|'.join(sorted(layers))})",
        target_parameters=[f"{path}.{name}" for name in experts],
        task_type="CAUSAL_LM",
    )
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT's use
    policy = get_peft_model(model.requires_grad_(False), config)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained and all(f"{path}." in name for name in trained), "adapters in a wrong place"
    policy.lora_layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    save_work(language_model.layers)
    if grad_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    return policy.train()  # checkpointing is off in eval mode; dropout is 0 unless asked for


@contextlib.contextmanager
def switched(policy, flag, value):
    """With a flag that PEFT has in every LoRA layer set to a value. PEFT's own ways to do so look
    for the layers among all modules of the model: 0.1 s for a 7B's, in which a GPU waits."""
    before = getattr(policy.lora_layers[0], flag)
    for layer in policy.lora_layers:
        setattr(layer, flag, value)
    try:
        yield
    finally:
        for layer in policy.lora_layers:
            setattr(layer, flag, before)


def adapter_off(policy):
    """The reference: what the layers compute without LoRA. For use without gradients."""
    return switched(policy, "_disable_adapters", True)


@contextlib.contextmanager
def mixed_precision(policy, mixed, grad_checkpointing=False):
    """bf16 autocast on CUDA. It brings the adapters' inputs to bf16, before PEFT would copy each of
    them to fp32."""
    casting = grad_checkpointing or not mixed
    with (
        torch.autocast("cuda", torch.bfloat16, enabled=mixed),
        switched(policy, "cast_input_dtype_enabled", casting),
    ):
        yield


def fingerprint(path):
    """A hash of the weights of a model or an adapter: of all bytes of their files, a second for
    each gigabyte."""
    from huggingface_hub import snapshot_download

    folder, digest = Path(path), hashlib.blake2b(digest_size=16)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(path), local_files_only=True))
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with open(file, "rb") as opened:
            own = hashlib.file_digest(opened, "blake2b").hexdigest()
        digest.update(f"{file.name} {own}".encode())
    return digest.hexdigest()


def config_hash(model):
    """A short hash of the model's configuration."""
    config = model.config.to_json_string().encode()
    return hashlib.blake2b(config, digest_size=4).hexdigest()


def load_encoder(path):
    """(model in fp32, its image processor) of an image encoder: CLIP, SigLIP, or a LLaVA."""
    from transformers import AutoModel, AutoProcessor

    check_versions()
    with named(f"{path}: not an image encoder (CLIP, SigLIP, LLaVA)"):
        options = {"trust_remote_code": False, "output_loading_info": True}
        model, found = AutoModel.from_pretrained(path, **options)
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False, backend="pil")
        image_processor = processor.image_processor
    need_all_weights(path, found, ("missing_keys", "mismatched_keys"))  # a head may be too many
    model = model.float().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    return model, image_processor


@contextlib.contextmanager
def named(what):
    """Errors of JSON, transformers, PEFT and safetensors, which have a kind each and messages of a
    page, in one line that says what failed."""
    try:
        yield
    except Exception as error:
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        if "custom code" in str(error):
            text = "it brings its own code; use the checkpoint for transformers, often named ...-hf"
        raise UserError(f"{what}: {text}") from error
