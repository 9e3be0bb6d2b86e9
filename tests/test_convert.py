"""Checkpoints in the original format: made here from their parts, and computed as the original code
does it, tower, projector and decoder one after the other, without LLaVA's class."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file, save_file

from support.cli import UserError
from vlm import convert
from vlm.load import load_model
from vlm.logprobs import Row, logp_table, plain_logps
from vlm.prompts import prompts_for

TEXT = "What is the man holding? The man is holding a large blue umbrella at night, in the rain."
SYSTEM = json.loads(convert.ORIGINAL.read_text())["systems"]["vicuna_v1"]
TOWER = "model.vision_tower.vision_tower."
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
DECODER = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2)


class Original:
    """The parts of a checkpoint, and its folders as its authors publish them."""

    def __init__(self, folder, kind, padding=0, seed=0):
        torch.manual_seed(seed)
        self.kind, self.folder, self.tower_folder = kind, folder / "model", folder / "tower"
        self.folder.mkdir(parents=True)
        vision = VISION | dict(image_size=28, patch_size=14)
        inner = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        if kind == "llama":
            tokens = train_sentencepiece(self.folder)
            whole = tf.CLIPModel(tf.CLIPConfig(text_config=inner, vision_config=vision))
            config, model = tf.LlamaConfig, tf.LlamaForCausalLM
            own = {"architectures": ["LlavaLlamaForCausalLM"], "mm_vision_select_layer": -2}
            own |= {"rms_norm_eps": 1e-5, "mm_use_im_start_end": False}
        else:
            tokens = train_byte_pairs(self.folder)
            whole = tf.SiglipModel(tf.SiglipConfig(text_config=inner, vision_config=vision))
            config, model = tf.PhiConfig, tf.PhiForCausalLM
            own = {"architectures": ["BunnyPhiForCausalLM"], "partial_rotary_factor": 0.4}
            own |= {"resid_pdrop": 0.1, "hidden_act": "gelu_new"}
        own |= {"mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"}
        self.config = DECODER | own | {"vocab_size": tokens + padding, "torch_dtype": "float32"}
        fields = DECODER | {"vocab_size": tokens + padding}
        fields |= {
            name: own[name] for name in ("rms_norm_eps", "partial_rotary_factor") if name in own
        }
        self.decoder = model(config(**fields)).eval()
        if kind == "phi":
            torch.nn.init.zeros_(self.decoder.lm_head.bias)  # Bunny has none
        self.projector = torch.nn.Sequential(
            torch.nn.Linear(16, 24), torch.nn.GELU(), torch.nn.Linear(24, 24)
        )
        self.tower = whole.vision_model.eval()
        whole.save_pretrained(self.tower_folder)
        mean, std = ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28])
        preprocess = {"image_mean": mean, "image_std": std}
        (self.tower_folder / "preprocessor_config.json").write_text(json.dumps(preprocess))
        self.mean, self.std = mean, std
        self.write()

    def write(self, **config):
        """Two shards, .bin as LLaVA's or safetensors as Bunny's, and what is not of the model."""
        (self.folder / "config.json").write_text(json.dumps(self.config | config))
        tensors = {k: v for k, v in self.decoder.state_dict().items() if k != "lm_head.bias"}
        for name, tensor in self.projector.state_dict().items():
            tensors[f"model.mm_projector.{name}"] = tensor
        if self.kind == "llama":
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        names = sorted(tensors)
        for k, own in enumerate((names[::2], names[1::2]), start=1):
            part = {name: tensors[name].contiguous() for name in own}
            if self.kind == "llama":
                torch.save(part, self.folder / f"pytorch_model-0000{k}-of-00002.bin")
            else:
                save_file(part, self.folder / f"model-0000{k}-of-00002.safetensors")

    def pixels(self, image):
        """Padded to a square with the mean colour, scaled and normalised, by Pillow and numpy."""
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * x) for x in self.mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        scaled = np.array(square.resize((28, 28), Image.Resampling.BICUBIC)) / 255
        return torch.tensor((scaled - self.mean) / self.std).permute(2, 0, 1)[None].float()

    @torch.no_grad()
    def logits(self, image, before, behind):
        """Of tokens behind the image: `before` and `behind` are the token ids around it."""
        found = self.tower(self.pixels(image), output_hidden_states=True).hidden_states[-2]
        features = self.projector(found[:, 1:] if self.kind == "llama" else found)
        embed = self.decoder.get_input_embeddings()
        parts = [embed(torch.tensor([before])), features, embed(torch.tensor([behind]))]
        whole = self.decoder(inputs_embeds=torch.cat(parts, dim=1)).logits
        return whole[0, -len(behind) :]


def train_sentencepiece(folder):
    """tokenizer.model of Llama's kind; returns the number of its tokens."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, SYSTEM] * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"legacy": False, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    )
    return 340


def train_byte_pairs(folder):
    """vocab.json and merges.txt of Phi's kind."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT, SYSTEM] * 20, 340, special_tokens=["<|endoftext|>"])
    tokenizer.save_model(str(folder))
    made = {"tokenizer_class": "CodeGenTokenizer", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(made))
    return tokenizer.get_vocab_size()


def run(original, out, *options):
    command = [str(original.folder), "--vision-tower", str(original.tower_folder)]
    convert.main([*command, "--out", str(out), *options])


def refused(original, out, *options, capsys):
    with pytest.raises(SystemExit):
        run(original, out, *options)
    return capsys.readouterr().err


@pytest.fixture(scope="module", params=["llama", "phi"])
def original(request, tmp_path_factory):
    return Original(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    run(original, out)
    return out


@pytest.fixture(scope="module")
def picture():
    noise = np.random.default_rng(0).integers(0, 256, (21, 40, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def around_the_image(original, text):
    """Token ids as the original's: a text is cut at <image>, each piece tokenised by itself."""
    if original.kind == "llama":
        path = str(original.folder / "tokenizer.model")
        pieces = sentencepiece.SentencePieceProcessor(model_file=path)
        before, behind = (pieces.encode(piece) for piece in text.split("<image>"))
        return [pieces.bos_id(), *before], behind
    tokenizer = tf.CodeGenTokenizer.from_pretrained(original.folder)
    return tuple(tokenizer(piece).input_ids for piece in text.split("<image>"))


def test_tokens_pixels_and_log_probs_are_the_originals(original, converted, picture):
    model, processor = load_model(str(converted))
    prompts = prompts_for(model.config, processor)
    question, answer = "What is the man holding?", "The man is holding a large blue umbrella."
    inputs = prompts.encode([question], [picture])
    text = f"{SYSTEM} USER: <image>\n{question} ASSISTANT:"
    before, behind = around_the_image(original, text)
    ids = inputs["input_ids"][0].tolist()
    image = [model.config.image_token_id] * 4
    assert ids == [*before, *image, *behind]
    assert torch.allclose(inputs["pixel_values"], original.pixels(picture), atol=1e-6)

    response = prompts.encode_response(answer)
    end = "</s>" if original.kind == "llama" else "<|endoftext|>"
    assert prompts.tokenizer.decode(response).strip() == f"{answer}{end}"
    logits = original.logits(picture, before, [*behind, *response])[-len(response) - 1 : -1]
    truth = logits.log_softmax(-1)[range(len(response)), response]
    row = Row(inputs, [torch.tensor(response)], [(0, 0)])
    with torch.no_grad():
        (plain,) = plain_logps(model, [row])
        packed = logp_table(model, [row], 1)[0, 0, 0]
    assert (plain - truth).abs().max() < 1e-5  # over the original's vocabulary, without <image>
    assert abs(packed - truth.sum()) < 1e-4


def test_a_row_for_the_image_alone_is_added(original, converted):
    config = json.loads((converted / "config.json").read_text())
    tables = {}
    for file in converted.glob("*.safetensors"):
        tables |= {k: v for k, v in load_file(file).items() if "embed_tokens" in k or "head" in k}
    rows = config["original_vocabulary"]
    assert rows == original.config["vocab_size"] == config["image_token_index"]
    for table in tables.values():
        assert len(table) == rows + 1 and not table[-1].any()


def test_pictures_are_cropped_for_training_and_padded_for_evaluation(converted, picture, capsys):
    config, pixels = load_model(str(converted))[0].config, {}
    for name, options in {
        "evaluation": {},
        "training": {"square": "auto"},
        "padded training": {"square": "pad"},
        "cropped evaluation": {"square": "crop"},
    }.items():
        processor = load_model(str(converted))[1]
        prompts = prompts_for(config, processor, **options)
        pixels[name] = prompts.encode(["What?"], [picture])["pixel_values"]
        said = capsys.readouterr().err
        assert ("cropped for training" in said) == (name == "training")
    assert torch.equal(pixels["evaluation"], pixels["padded training"])
    assert torch.equal(pixels["training"], pixels["cropped evaluation"])
    assert (pixels["training"] - pixels["evaluation"]).abs().mean() > 0.1


def test_another_way_of_squares_is_refused_where_there_is_none(llava):
    model, processor = load_model(llava)
    with pytest.raises(UserError, match="--square pad"):
        prompts_for(model.config, processor, square="pad")


@pytest.mark.parametrize("reach", ["decoder", "tower"])
def test_an_adapter_is_merged(reach, tmp_path):
    original = Original(tmp_path / "original", "llama")
    module = "model.layers.1.mlp.up_proj"
    if reach == "tower":
        module = TOWER + "vision_model.encoder.layers.0.mlp.fc1"
    place = dict(original.decoder.named_modules()).get(module)
    place = place or original.tower.encoder.layers[0].mlp.fc1
    down, up = torch.randn(2, place.in_features), torch.randn(place.out_features, 2)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    adapted = f"base_model.model.{module}"
    tensors = {f"{adapted}.lora_A.weight": down, f"{adapted}.lora_B.weight": up}
    torch.save(tensors, lora / "adapter_model.bin")
    projector = {"base_model.model.model.mm_projector.2.bias": torch.arange(24.0)}
    torch.save(projector, lora / "non_lora_trainables.bin")

    run(original, tmp_path / "out", "--lora", str(lora))
    weights = load_model(str(tmp_path / "out"))[0].state_dict()
    name = convert.renamed(f"{module}.weight")
    assert torch.allclose(weights[name], place.weight + 4.0 * up @ down, atol=1e-5)
    assert torch.equal(weights["model.multi_modal_projector.linear_2.bias"], torch.arange(24.0))


def test_the_tower_comes_from_the_checkpoint_where_it_was_trained(tmp_path):
    original = Original(tmp_path / "original", "phi")
    name = TOWER + "vision_model.post_layernorm.bias"
    save_file({name: torch.full((16,), 7.0)}, original.folder / "model-00003-of-00002.safetensors")
    for trained, value in ((False, 0.0), (True, 7.0)):
        original.write(unfreeze_vision_tower=trained)
        run(original, tmp_path / str(trained))
        weights = load_model(str(tmp_path / str(trained)))[0].state_dict()
        assert (weights["model.vision_tower.post_layernorm.bias"] == value).all()


def test_tables_are_cut_to_the_tokenizer_unless_told_otherwise(tmp_path):
    original = Original(tmp_path / "original", "phi", padding=9)
    tokens = original.config["vocab_size"] - 9
    for options, rows, table in (
        ((), tokens, tokens + 1),
        (("--keep-vocabulary",), tokens + 9, tokens + 9),
    ):
        run(original, tmp_path / str(rows), *options)
        model = load_model(str(tmp_path / str(rows)))[0]
        assert model.config.image_token_id == tokens
        assert model.config.original_vocabulary == rows
        head = original.decoder.lm_head.weight
        assert torch.equal(model.lm_head.weight[:rows], head[:rows])
        assert len(model.lm_head.weight) == table


def test_a_killed_conversion_goes_on(original, converted, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(converted, out)
    capsys.readouterr()
    shards = sorted(out.glob("*.safetensors"))
    shards[1].unlink()
    (out / "config.json").unlink()
    before = shards[0].stat().st_mtime_ns
    run(original, out)
    assert shards[0].stat().st_mtime_ns == before
    assert shards[1].read_bytes() == (converted / shards[1].name).read_bytes()
    assert (out / "config.json").read_text() == (converted / "config.json").read_text()
    assert "keep_vocabulary was 'False', is 'True'" in refused(
        original, out, "--keep-vocabulary", capsys=capsys
    )


def test_what_is_not_known_is_refused_by_its_name(tmp_path, capsys):
    original = Original(tmp_path / "original", "llama")
    out, extra = tmp_path / "out", original.folder / "pytorch_model-00003-of-00002.bin"
    for config, word in (
        ({"architectures": ["LlavaMptForCausalLM"]}, "LlavaMptForCausalLM"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"vocab_size": 200}, "340 tokens, and 200 rows"),
        ({"num_hidden_layers": 3}, "layers.2"),
    ):
        original.write(**config)
        assert word in refused(original, out, capsys=capsys)
    original.write()
    (original.tower_folder / "preprocessor_config.json").rename(tmp_path / "kept.json")
    assert "preprocessor_config.json: not there" in refused(original, out, capsys=capsys)
    (tmp_path / "kept.json").rename(original.tower_folder / "preprocessor_config.json")
    for name, word in (
        ("model.layers.0.self_attn.Wqkv.weight", "Unexpected key(s)"),
        ("model.image_newline", "model.image_newline"),
    ):
        torch.save({name: torch.zeros(2)}, extra)
        assert word in refused(original, out, capsys=capsys)
    extra.unlink()
    original.write(intermediate_size=48)
    said = refused(original, out, capsys=capsys)
    assert "shape torch.Size([40, 24])" in said and "current model is torch.Size([48, 24])" in said
    (original.folder / "pytorch_model-00002-of-00002.bin").unlink()
    original.write()
    (original.folder / "pytorch_model-00001-of-00002.bin").unlink()
    assert "Missing key(s)" in refused(original, out, capsys=capsys)


class Evil:
    def __reduce__(self):
        return print, ("run by the pickle",)


def test_a_pickle_with_code_is_not_run(tmp_path, capsys):
    original = Original(tmp_path / "original", "llama")
    torch.save({"model.norm.weight": Evil()}, original.folder / "pytorch_model-00003-of-00002.bin")
    said = refused(original, tmp_path / "out", capsys=capsys)
    assert "pytorch_model-00003" in said and "run by the pickle" not in capsys.readouterr().out
