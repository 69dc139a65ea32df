"""Tiny random models of every family, built in code with their real processors.

The tests run on them, so that they need no trained model."""
import torch
import transformers as t
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from spatialid.families import Frames, without_torchvision

CHAT = ("{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'video' %}<video>\n"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}")
TEXTS = ["USER: <image>\n ASSISTANT:", "Is the cup to the left or right of the star?",
         "Is the dog above or below the cat?", "left right above below Left Right Above Below yes no Yes No near far",
         "the cup the star the dog the hot dog left right"]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def untrained_tokenizer(kind):
    "A tokenizer that knows no word yet, and the alphabet it begins with."
    if kind == "metaspace":
        tok, before, after = Tokenizer(models.BPE(unk_token="<unk>")), pre_tokenizers.Metaspace, decoders.Metaspace
        tok.pre_tokenizer, tok.decoder = before(prepend_scheme="first"), after(prepend_scheme="first")
        return tok, [chr(c) for c in range(33, 127)] + ["\n"]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tok, pre_tokenizers.ByteLevel.alphabet()


def tiny_tokenizer(kind="metaspace", bos=False, **extra):
    """A byte-pair tokenizer so small that most names split into sub-words.

    `metaspace` marks spaces as SentencePiece does, `bytes` works on bytes as GPT-2 and Qwen do. With `bos` it puts
    `<s>` in front of every text. `extra` names special tokens."""
    tok, alphabet = untrained_tokenizer(kind)
    extra = extra or {"image_token": "<image>"}
    special, size = [*SPECIAL, *extra.values()], len(alphabet) + 89 + len(extra)
    tok.train_from_iterator(TEXTS * 20, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False))
    if bos:
        start = [("<s>", tok.token_to_id("<s>"))]
        tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=start)
    return t.PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                     pad_token="<pad>", extra_special_tokens=extra)


def tiny_llava(blocks=4, width=32, px=16, patch=4, chat=CHAT, kind="metaspace", bos=False, seed=0, dtype=torch.float32):
    """(model, processor) of a `LlavaForConditionalGeneration` with random weights, large enough to move the logits.

    It has (px / patch)² image tokens."""
    tokenizer = tiny_tokenizer(kind, bos)
    images = t.CLIPImageProcessorPil(size={"shortest_edge": px}, crop_size={"height": px, "width": px})
    processor = t.LlavaProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat)
    torch.manual_seed(seed)
    config = t.LlavaConfig(
        vision_config=clip(px, patch), text_config=decoder("Llama", blocks, width, tokenizer),
        image_token_id=processor.image_token_id, image_seq_length=(px // patch) ** 2)
    return t.LlavaForConditionalGeneration(config).eval().to(dtype), processor


def overflowing():
    "(model, processor) as from `tiny_llava`, in half precision, whose pictures leave the projector as infinities."
    model, processor = tiny_llava(dtype=torch.float16)
    with torch.no_grad(): model.model.multi_modal_projector.linear_2.weight.fill_(6e4)
    with torch.no_grad(): model.model.multi_modal_projector.linear_1.bias.fill_(1e2)
    return model, processor


# Parts

VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def clip(px, patch): return t.CLIPVisionConfig(**VISION, image_size=px, patch_size=patch)


def siglip(px, patch): return t.SiglipVisionConfig(**VISION, image_size=px, patch_size=patch)


def decoder(name, blocks, width, tokenizer, **kwargs):
    "Text config of a family: four heads, weights large enough to move the logits."
    shape = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=blocks, num_attention_heads=4)
    tokens = dict(vocab_size=len(tokenizer), initializer_range=0.2, max_position_embeddings=512)
    ids = {"num_key_value_heads": 4, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, **kwargs}
    return getattr(t, f"{name}Config")(**shape, **tokens, **ids)


def chat(image, video=""): return CHAT.replace("<image>\n", image).replace("<video>\n", video)


# Families

QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>"}
QWEN_CHAT = chat("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
GREY = dict(image_mean=[.5] * 3, image_std=[.5] * 3)
PIXELS = dict(patch_size=4, temporal_patch_size=2, merge_size=2,
              size={"shortest_edge": 24 * 24, "longest_edge": 24 * 24}, **GREY)  # 3 x 3 tokens
SQUARE = {"height": 16, "width": 16}
FRAMES = dict(size=SQUARE, **GREY)
MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]})


def qwen(name, vision, blocks, width, pixels=PIXELS, **text):
    tokenizer = tiny_tokenizer("bytes", **QWEN)
    images, frames = t.Qwen2VLImageProcessorPil(**PIXELS), Frames(**pixels)
    processor = getattr(t, f"{name}Processor")(images, tokenizer, frames, chat_template=QWEN_CHAT)
    vision = dict(patch_size=4, temporal_patch_size=2, spatial_merge_size=2, initializer_range=.2, **vision)
    ids = {f"{key}_id": tokenizer.convert_tokens_to_ids(token) for key, token in QWEN.items()}
    text_config = decoder(f"{name}Text", blocks, width, tokenizer, **MROPE, **text)
    return dict(vision_config=vision, text_config=text_config.to_dict(), **ids), processor


def qwen2_vl(blocks, width):
    return qwen("Qwen2VL", dict(depth=2, embed_dim=16, hidden_size=width, num_heads=2, mlp_ratio=2), blocks, width)


def qwen2_5_vl(blocks, width):
    vision = dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=width, window_size=16,
                  fullatt_block_indexes=[1])
    return qwen("Qwen2_5_VL", vision, blocks, width)


def qwen3_vl(blocks, width):
    vision = dict(depth=3, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=width,
                  num_position_embeddings=36, deepstack_visual_indexes=[0, 1])
    size = {"shortest_edge": 4 * 24 * 24, "longest_edge": 4 * 24 * 24}  # for all frames of a video together
    return qwen("Qwen3VL", vision, blocks, width, PIXELS | {"size": size}, head_dim=width // 4)


def mllama(blocks, width):
    tokenizer = tiny_tokenizer("bytes", bos=True, image_token="<|image|>")
    images = t.MllamaImageProcessorPil(size=SQUARE, max_image_tiles=2)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=2,
                  image_size=16, patch_size=4, max_num_tiles=2, vision_output_dim=32, intermediate_layers_indices=[1],
                  supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]])
    text = decoder("MllamaText", blocks, width, tokenizer, cross_attention_layers=[1, 3],
                   rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    config = dict(vision_config=vision, text_config=text.to_dict(), image_token_index=tokenizer.image_token_id)
    return config, t.MllamaProcessor(images, tokenizer, chat_template="{{ bos_token }}" + chat("<|image|>"))


def gemma3(blocks, width):
    tokenizer = tiny_tokenizer("metaspace", image_token="<image_soft_token>", boi_token="<start_of_image>",
                               eoi_token="<end_of_image>")
    images = t.Gemma3ImageProcessorPil(size=SQUARE)
    text = decoder("Gemma3Text", blocks, width, tokenizer, head_dim=width // 4, sliding_window=16,
                   query_pre_attn_scalar=width // 4,
                   layer_types=["sliding_attention", "full_attention"] * (blocks // 2))
    config = dict(vision_config=siglip(16, 4).to_dict(), text_config=text.to_dict(), mm_tokens_per_image=4,
                  image_token_index=tokenizer.image_token_id, boi_token_index=tokenizer.boi_token_id,
                  eoi_token_index=tokenizer.eoi_token_id)
    return config, t.Gemma3Processor(images, tokenizer, chat_template=chat("<start_of_image>"), image_seq_length=4)


def internvl(blocks, width):
    tokenizer = tiny_tokenizer("bytes", start_image_token="<img>", end_image_token="</img>",
                               context_image_token="<IMG_CONTEXT>", video_token="<video>")
    images = t.GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=2)
    vision = dict(**VISION, image_size=(16, 16), patch_size=(4, 4), initializer_range=.2)
    config = dict(vision_config=vision, text_config=decoder("Qwen2", blocks, width, tokenizer).to_dict(),
                  image_token_id=tokenizer.context_image_token_id, image_seq_length=4)
    return config, t.InternVLProcessor(images, tokenizer, Frames(**FRAMES), image_seq_length=4,
                                       chat_template=chat("<IMG_CONTEXT>\n", "<video>\n"))


def llava_onevision(blocks, width):
    tokenizer = tiny_tokenizer("bytes", image_token="<image>", video_token="<video>")
    grid = [[16, 16], [16, 32], [32, 16], [32, 32]]
    images = t.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=grid)
    text = decoder("Qwen2", blocks, width, tokenizer)
    config = dict(vision_config=siglip(16, 4).to_dict(), text_config=text.to_dict(), image_grid_pinpoints=grid,
                  image_token_index=tokenizer.image_token_id, video_token_index=tokenizer.video_token_id)
    return config, t.LlavaOnevisionProcessor(
        images, tokenizer, Frames(**FRAMES), num_image_tokens=16, vision_feature_select_strategy="full",
        chat_template=chat("<image>\n", "<video>\n"))


def llava_next_video(blocks, width):
    tokenizer = tiny_tokenizer("metaspace", image_token="<image>", video_token="<video>")
    grid = [[16, 32], [32, 16], [32, 32]]
    size = dict(size={"shortest_edge": 16}, crop_size=SQUARE)
    images = t.LlavaNextImageProcessorPil(**size, image_grid_pinpoints=grid)
    text = decoder("Llama", blocks, width, tokenizer)
    config = dict(vision_config=clip(16, 4).to_dict(), text_config=text.to_dict(), image_grid_pinpoints=grid,
                  image_token_index=tokenizer.image_token_id, video_token_index=tokenizer.video_token_id)
    return config, t.LlavaNextVideoProcessor(
        Frames(**size, do_center_crop=True, **GREY), images, tokenizer, patch_size=4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat("<image>\n", "<video>\n"))


def video_llama_3(blocks, width):
    tokenizer = tiny_tokenizer("bytes", image_token="<|image_pad|>", video_token="<|video_pad|>")
    pixels = PIXELS | {"temporal_patch_size": 1}
    frames = pixels | {"size": {"shortest_edge": 16 * 16, "longest_edge": 4 * 24 * 24}}
    config = dict(vision_config=dict(**VISION, patch_size=4, initializer_range=.2),
                  text_config=decoder("Qwen2", blocks, width, tokenizer).to_dict(),
                  image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id)
    return config, t.VideoLlama3Processor(
        t.VideoLlama3ImageProcessorPil(**pixels), tokenizer, Frames(**frames),
        chat_template=chat("<|image_pad|>\n", "<|video_pad|>\n"))


SMOL = dict(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})


def idefics3(blocks, width, name="Idefics3", vision="Idefics3", **frames):
    special = {f"cell_{i}{j}": f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)}
    special["global_image_token"] = "<global-img>"
    tokenizer = tiny_tokenizer("bytes", image_token="<image>", fake_image_token="<fake_token_around_image>",
                               end_of_utterance_token="<end_of_utterance>", **special)
    images = getattr(t, f"{name}ImageProcessorPil")(**SMOL)
    config = dict(vision_config=dict(**VISION, image_size=16, patch_size=4, initializer_range=.2),
                  text_config=decoder("Llama", blocks, width, tokenizer).to_dict(),
                  image_token_id=tokenizer.image_token_id, scale_factor=2)
    processor = getattr(t, f"{name}Processor")
    return config, processor(images, tokenizer, **frames, image_seq_len=4, chat_template=chat("<image>"))


def smolvlm(blocks, width): return idefics3(blocks, width, "SmolVLM", video_processor=Frames(**SMOL))


NAMES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "mllama": "Mllama",
         "gemma3": "Gemma3", "internvl": "InternVL", "llava_onevision": "LlavaOnevision",
         "llava_next_video": "LlavaNextVideo", "video_llama_3": "VideoLlama3", "idefics3": "Idefics3",
         "smolvlm": "SmolVLM"}


def tiny(family, blocks=4, width=32, dtype=torch.float32, seed=0):
    "(model, processor) of a family of `spatialid.hooks.FAMILIES`, with random weights."
    if family == "llava": return tiny_llava(blocks, width, dtype=dtype, seed=seed)
    with without_torchvision(): config, processor = globals()[family](blocks, width)
    torch.manual_seed(seed)
    model = getattr(t, f"{NAMES[family]}ForConditionalGeneration")(getattr(t, f"{NAMES[family]}Config")(**config))
    with torch.no_grad():
        for weight in model.parameters():  # where zeros shut the picture out: Mllama's gates, Gemma 3's projection
            if not weight.any(): weight.normal_(0, .3)
    return model.eval().to(dtype), processor


def one_token_red(recipe):
    "Of an organism's recipe: for each image token a grey picture with its place red, and a picture that is all grey."
    n, cell = recipe.tiles ** 2, recipe.px // recipe.tiles
    pictures = [Image.new("RGB", (recipe.px, recipe.px), "grey") for _ in range(n + 1)]
    for i, picture in enumerate(pictures[:n]):
        x, y = i % recipe.tiles * cell, i // recipe.tiles * cell
        picture.paste("red", (x, y, x + cell, y + cell))
    return pictures
