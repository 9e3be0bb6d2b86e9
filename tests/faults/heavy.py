"""Imported once by the process that is forked for every child: what a command imports late."""

import matplotlib
import openai.resources.chat.completions  # noqa: F401
import peft  # noqa: F401
import torch.utils.data  # noqa: F401
import tqdm  # noqa: F401
import transformers.models.auto.processing_auto  # noqa: F401
import transformers.models.clip.image_processing_pil_clip  # noqa: F401
import transformers.models.clip.modeling_clip  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
import transformers.models.llama.tokenization_llama  # noqa: F401
import transformers.models.llava.modeling_llava  # noqa: F401
import transformers.models.llava.processing_llava  # noqa: F401

import construct.contrast  # noqa: F401
import construct.responses  # noqa: F401
import evaluate  # noqa: F401
import symmpo  # noqa: F401
import train  # noqa: F401

matplotlib.use("Agg")
import matplotlib.pyplot  # noqa: E402, F401
