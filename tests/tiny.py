"A tiny LLaVA with random weights, built in code: what the tests run on, so that they need no trained model."
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration,
                          LlavaProcessor, PreTrainedTokenizerFast)

CHAT = ("{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}")
TEXTS = ["USER: <image>\n ASSISTANT:", "Is the cup to the left or right of the star?", "Is the dog above or below the cat?",
         "left right above below Left Right Above Below yes no Yes No near far", "the cup the star the dog the hot dog left right"]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]


def tiny_tokenizer(kind="metaspace", bos=False):
    """A byte-pair tokenizer so small that most names split into sub-words: `metaspace` marks spaces as SentencePiece does,
    `bytes` works on bytes as GPT-2 and Qwen do. With `bos` it puts `<s>` in front of every text."""
    if kind == "metaspace":
        tok = Tokenizer(models.BPE(unk_token="<unk>"))
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace(prepend_scheme="first")
        alphabet = [chr(c) for c in range(33, 127)] + ["\n"]
    else:
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(alphabet) + 90
    tok.train_from_iterator(TEXTS * 20, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False))
    if bos: tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                   extra_special_tokens={"image_token": "<image>"})


def tiny_llava(blocks=4, width=32, px=16, patch=4, chat=CHAT, kind="metaspace", bos=False, seed=0, dtype=torch.float32):
    "(model, processor) of a `LlavaForConditionalGeneration` with random weights, large enough to move the logits; (px / patch)² image tokens."
    tokenizer = tiny_tokenizer(kind, bos)
    processor = LlavaProcessor(CLIPImageProcessorPil(size={"shortest_edge": px}, crop_size={"height": px, "width": px}), tokenizer, patch_size=patch,
                               vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=chat)
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                       image_size=px, patch_size=patch),
        text_config=LlamaConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=blocks, num_attention_heads=4,
                                vocab_size=len(tokenizer), initializer_range=0.2, max_position_embeddings=512),
        image_token_id=processor.image_token_id, image_seq_length=(px // patch) ** 2)
    return LlavaForConditionalGeneration(config).eval().to(dtype), processor
