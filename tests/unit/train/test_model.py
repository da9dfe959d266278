"""Loading: which folders, tokenizers and architectures are refused, and what LoRA starts from."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig, FalconForCausalLM

from atesd.sections import LoraConfig, ModelConfig
from atesd.train.heads import head, output_layer
from atesd.train.model import add_lora, context_length, load, resolve, set_threads
from atesd.train.tokens import load_tokenizer
from atesd.types import UserError, first_line

from support.architectures import family
from support.folders import write_byte_model
from support.models import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_byte_model(tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def test_a_folder_becomes_the_model_that_was_saved_and_its_tokenizer(folder: Path) -> None:
    model, tokenizer = load(ModelConfig(path=str(folder)), seed=0)
    saved = transformers.Qwen3ForCausalLM.from_pretrained(folder)
    assert all(torch.equal(weight, saved.get_parameter(name)) for name, weight in model.named_parameters())
    assert {(weight.dtype, weight.requires_grad) for weight in model.parameters()} == {(torch.float32, True)}
    assert tokenizer.decode(tokenizer.encode("½ 数")) == "½ 数"


def test_an_absent_folder_is_named_with_a_remedy(tmp_path: Path) -> None:
    path = str(tmp_path / "absent")
    with pytest.raises(UserError, match=f"'{path}' is neither a folder here nor an id on the hub, such as Qwen"):
        load(ModelConfig(path=path), seed=0)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_a_model_is_named_with_a_remedy(missing: str, folder: Path) -> None:
    (folder / missing).unlink()
    with pytest.raises(UserError, match="no causal language model could be loaded") as caught:
        load(ModelConfig(path=str(folder)), seed=0)
    assert repr(str(folder)) in str(caught.value)
    assert str(caught.value).endswith("give a folder with config.json and safetensors weights, or a hub id")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "{"])
def test_a_folder_without_a_readable_tokenizer_is_named_with_a_remedy(content: str | None, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"no tokenizer could be loaded from .*tokenizer\.save_pretrained"):
        load_tokenizer(str(folder))


def test_a_tokenizer_without_a_chat_template_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template: use an .*, or set prompt.chat_template = \"plain\""):
        load_tokenizer(str(folder))


def test_a_recipes_template_replaces_the_tokenizers_and_is_tried(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(str(folder), template="plain")
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False) == "a\n\nb<|end|>\n\n"
    with pytest.raises(UserError, match=r"prompt\.chat_template does not render a question \(TypeError.*\): mend it"):
        load_tokenizer(str(folder), template="{{ messages[0].content + 1 }}")
    _, tokenizer = load(ModelConfig(path=str(folder)), 0, "{{ messages }}")
    assert tokenizer.chat_template == "{{ messages }}"


def test_a_template_that_writes_the_date_is_warned_about(folder: Path) -> None:
    with pytest.warns(UserWarning, match="writes today's date into prompts"):
        load_tokenizer(str(folder), template="{{ strftime_now('%d') }}{{ messages }}")


def test_a_tokenizer_without_an_end_token_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match="has no EOS token: completions could never end; set eos_token"):
        load_tokenizer(str(folder))


def test_a_tokenizer_that_encodes_nothing_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []})
    with pytest.raises(UserError, match="encodes nothing: its files are missing or damaged; save them again"):
        load_tokenizer(str(folder))


def test_texts_beyond_the_models_length_are_not_warned_of_by_transformers(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    edit(folder / "tokenizer_config.json", model_max_length=8)
    AutoTokenizer.from_pretrained(folder).encode("1" * 40)
    assert "longer than the specified maximum" in caplog.text, "else this test sees nothing"
    caplog.clear()
    load_tokenizer(str(folder)).encode("1" * 40)
    assert not caplog.text


def test_a_missing_pad_token_becomes_the_end_token_and_any_other_stays(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|end|>", tokenizer.eos_token_id)
    edit(folder / "tokenizer_config.json", pad_token="<|user|>")
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|user|>", "<|end|>")


class WithConfig(nn.Module):
    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config


def test_the_context_is_the_number_of_positions_or_unknown(folder: Path) -> None:
    assert context_length(tiny_model()) == 64
    adapted, _ = load(ModelConfig(path=str(folder), lora=LoraConfig(r=2)), seed=0)
    assert context_length(adapted) == 4096
    assert context_length(WithConfig(transformers.MambaConfig())) is None


def test_the_head_of_a_model_with_and_without_a_bias() -> None:
    model = tiny_model()
    assert head(model)[0] is model.lm_head.weight
    assert head(model)[1:] == (None, 1.0, None)
    model.set_output_embeddings(nn.Linear(32, 23))
    assert head(model)[1] is model.lm_head.bias


def test_what_logits_go_through_is_read_of_the_config() -> None:
    model = tiny_model()
    model.config.logit_scale, model.config.lm_head_multiplier, model.config.logits_scaling = 0.5, 3.0, 4.0
    model.config.final_logit_softcapping, model.config.unpadded_vocab_size = 30.0, 20
    weight, bias, scale, cap = head(model)
    assert torch.equal(weight, model.lm_head.weight[:20])
    assert (bias, scale, cap) == (None, 0.5 * 3 / 4, 30.0)
    model.set_output_embeddings(nn.Linear(32, 23))
    assert torch.equal(head(model)[1], model.lm_head.bias[:20])


def test_a_model_without_a_plain_head_is_refused() -> None:
    for layer in (None, nn.Identity(), nn.Conv1d(2, 2, 2)):
        model = tiny_model()
        model.get_output_embeddings = lambda layer=layer: layer
        assert output_layer(model) is layer
        with pytest.raises(UserError, match="Qwen3ForCausalLM has no output head with a matrix of weights"):
            head(model)


def adapters(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Return the weights that train with adapters on two layers."""
    config = ModelConfig(path=str(folder), lora=LoraConfig(r=2, alpha=4, targets=("q_proj", "v_proj")))
    model, _ = load(config, seed)
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def test_lora_trains_adapters_alone_from_a_start_that_the_seed_fixes(folder: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = adapters(folder, seed=5)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    # Two matrices for each of two targets in each of two layers; the second half starts at 0.
    assert sorted(name.rsplit("self_attn.")[1].split(".default")[0] for name in first) == sorted(
        [f"{target}.lora_{half}" for target in ("q_proj", "v_proj") for half in "AB"] * 2
    )
    assert all(bool(weight.any()) == ("lora_A" in name) for name, weight in first.items())
    torch.manual_seed(2)
    again, other = adapters(folder, seed=5), adapters(folder, seed=6)
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    assert not any(torch.equal(weight, other[name]) for name, weight in first.items() if "lora_A" in name)


def test_an_adapter_of_rank_r_adds_its_product_times_alpha_over_r(folder: Path) -> None:
    config = ModelConfig(path=str(folder), lora=LoraConfig(r=2, alpha=6, targets=("q_proj",)))
    model, _ = load(config, seed=0)
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    down = layer.get_parameter("lora_A.default.weight")
    up = layer.get_parameter("lora_B.default.weight")
    assert (down.shape, up.shape) == ((2, 32), (32, 2))
    inputs = torch.arange(96.0).reshape(3, 32) / 96
    with torch.no_grad():
        before = layer(inputs)
        nn.init.constant_(up, 1.0)
        # Every output gains 6 / 2 times the sum of the two inner values.
        expected = before + 3.0 * (inputs @ down.T).sum(dim=1, keepdim=True)
        torch.testing.assert_close(layer(inputs), expected)


def test_layers_of_a_kind_of_its_own_are_named_where_lora_fits_none(tmp_path: Path) -> None:
    """Falcon's are a subclass of torch's."""
    settings = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UserError, match=r"name some of its own, .*query_key_value"):
        add_lora(FalconForCausalLM(settings), LoraConfig(), 0)


def test_lora_that_fits_no_layer_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.lora\.targets names c_attn, but Qwen3ForCausalLM has no such layer"):
        load(ModelConfig(path=str(folder), lora=LoraConfig(targets=("q_proj", "c_attn"))), seed=0)
    with pytest.raises(UserError, match=r"LoRA does not fit this model .*: name its layers in model\.lora\.targets"):
        load(ModelConfig(path=str(folder), lora=LoraConfig(targets=("rotary_emb",))), seed=0)


def test_the_papers_lora_fits_by_name_and_a_model_with_other_names_says_which() -> None:
    """r 64, alpha 128, seven projections in each of two layers."""
    with pytest.raises(
        UserError, match=r"q_proj, k_proj, v_proj, gate_proj, up_proj, but Phi3.*down_proj, gate_up_proj, o"
    ):
        add_lora(family("phi3"), LoraConfig(), 0)
    for name in ("qwen3", "llama", "gemma3", "smollm3", "olmo2", "granite"):
        adapted = add_lora(family(name), LoraConfig(), 0)
        layers = [layer for layer in adapted.modules() if hasattr(layer, "lora_A")]
        assert len(layers) == 2 * 7
        assert {(layer.r["default"], layer.scaling["default"]) for layer in layers} == {(64, 128 / 64)}


def test_adapters_on_a_model_in_half_precision_stay_in_float32(folder: Path) -> None:
    config = ModelConfig(path=str(folder), dtype="bfloat16", lora=LoraConfig(r=2, targets=("q_proj",)))
    model, _ = load(config, seed=0)
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}


def test_names_of_packaged_models_become_folders_and_others_stay() -> None:
    assert (Path(resolve("pico")) / "model.safetensors").is_file()
    assert resolve("owner/name") == "owner/name"


def test_an_error_of_many_lines_is_cut_to_its_first() -> None:
    assert first_line(ValueError("\n first \n second")) == "first "
    assert first_line(ValueError("x" * 300)) == "x" * 200
    assert first_line(KeyError()) == "KeyError"


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    folder = write_byte_model(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"the weights in .* are damaged \(.*\): copy or download them again"):
        load(ModelConfig(path=str(folder)), 0)


def test_weights_that_are_cut_short_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"the weights in .* are damaged \(.*\): copy or download them again"):
        load(ModelConfig(path=str(folder)), 0)


def test_weights_of_another_vocabulary_are_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit(folder / "config.json", vocab_size=300)
    with pytest.raises(UserError, match=r"have other shapes than its config\.json says, as with another vocabulary"):
        load(ModelConfig(path=str(folder)), 0)


def test_a_tokenizer_of_another_vocabulary_is_named(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"has ids up to 259, but the model embeds 259 tokens: take both from the same"):
        load(ModelConfig(path=str(folder)), 0)


def saved_adapter(folder: Path, seed: int = 0) -> Path:
    """Save an adapter of a model beside it, all of whose weights are set."""
    model, tokenizer = load(ModelConfig(path=str(folder), lora=LoraConfig(r=2, alpha=2, targets=("q_proj",))), seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.5)
    model.save_pretrained(folder.parent / "adapter")
    tokenizer.save_pretrained(folder.parent / "adapter")
    return folder.parent / "adapter"


def test_an_adapter_is_its_base_with_it_merged_or_beside(folder: Path) -> None:
    adapter = saved_adapter(folder)
    base, _ = load(ModelConfig(path=str(folder)), 0)
    model, tokenizer = load(ModelConfig(path=str(adapter)), 0)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    saved = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    # alpha / r = 1, so that the merged weight is W + B A.
    expected = base.model.layers[1].self_attn.q_proj.weight + saved[f"{prefix}B.weight"] @ saved[f"{prefix}A.weight"]
    torch.testing.assert_close(model.model.layers[1].self_attn.q_proj.weight, expected)
    assert all(weight.requires_grad for weight in model.parameters()), "without model.lora all of it trains"
    assert tokenizer.eos_token == "<|end|>"
    trained, _ = load(ModelConfig(path=str(adapter), lora=LoraConfig(r=2, targets=("v_proj",))), 0)
    under = trained.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    torch.testing.assert_close(under.weight, expected)
    half, _ = load(ModelConfig.model_construct(path=str(adapter), dtype="bfloat16"), 0)
    assert half.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").lora_A["default"].weight.any()


def test_an_adapter_without_a_tokenizer_has_its_bases(folder: Path) -> None:
    adapter = saved_adapter(folder)
    (adapter / "tokenizer_config.json").unlink()
    assert load_tokenizer(str(adapter)).eos_token == "<|end|>"


def test_an_adapter_of_another_base_is_named(folder: Path) -> None:
    adapter = saved_adapter(folder)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)

    def refused(changed: dict[str, torch.Tensor], words: str) -> None:
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match=words) as caught:
            load(ModelConfig(path=str(adapter)), 0)
        assert f"its adapter_config.json names {str(folder)!r}" in str(caught.value)
        assert "\n" not in str(caught.value)

    refused({name: value[:, :1].clone() for name, value in tensors.items()}, "cannot be put .*size mismatch")
    refused({name.replace("layers.1", "layers.7"): value for name, value in tensors.items()}, "does not fit its base")
    refused(
        {name: value for name, value in tensors.items() if "layers.1" not in name}, "does not fit its base .*layers.1"
    )
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot be put on its base"):
        load(ModelConfig(path=str(adapter)), 0)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=f"names the adapter's base model {str(folder)!r}, where there is no folder"):
        load(ModelConfig(path=str(adapter)), 0)


def test_an_attention_reaches_the_model_and_an_impossible_one_is_named(folder: Path) -> None:
    model, _ = load(ModelConfig(path=str(folder), attn_implementation="eager"), 0)
    assert model.config._attn_implementation == "eager"
    for name in ("nonsense", "flash_attention_2"):
        with pytest.raises(UserError, match=rf"model\.attn_implementation = '{name}' does not work here .*: remove it"):
            load(ModelConfig(path=str(folder), attn_implementation=name), 0)


def test_four_bits_need_adapters_and_bitsandbytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match=r"leaves nothing that could train: add model\.lora = {}"):
        ModelConfig(quantization="4bit")
    config = ModelConfig(path=str(folder), dtype="bfloat16", lora=LoraConfig(r=2), quantization="4bit")
    monkeypatch.setattr("atesd.train.model.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'model\.quantization = "4bit" needs bitsandbytes: pip install bitsandbytes'):
        load(config, 0)
    monkeypatch.setattr("atesd.train.model.util.find_spec", lambda name: name)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **given: asked.update(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load(config, 0)
    assert asked["device_map"] == {"": torch.device("cpu")} or torch.accelerator.is_available()
    chosen = asked["quantization_config"]
    assert (chosen.load_in_4bit, chosen.bnb_4bit_quant_type, chosen.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert chosen.bnb_4bit_compute_dtype == torch.bfloat16


def test_weights_that_lack_a_tensor_are_refused_instead_of_drawn_at_random(tmp_path: Path) -> None:
    folder = write_byte_model(tmp_path / "model")
    path = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if ".layers.1." not in name}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack \d+ tensors \(model.layers.1.*save the whole model again"):
        load(ModelConfig(path=str(folder)), 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_the_name_of_the_first(value: float, folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    tensors["model.norm.weight"][0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"are not finite \(first model\.layers\.1\.mlp\.up_proj\.weight\): take an ear"
    ):
        load(ModelConfig(path=str(folder)), 0)


def test_pickled_weights_are_refused_unread(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"this would be run")
    with pytest.raises(UserError, match=r"are pickled \(pytorch_model\.bin\), .* convert them, if you trust them"):
        load(ModelConfig(path=str(folder)), 0)


def test_a_pickle_beside_safetensors_does_no_harm(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"this would be run")
    load(ModelConfig(path=str(folder)), 0)


def test_a_pickle_is_not_read_because_other_safetensors_lie_beside_it(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    torch.save({"model.norm.weight": torch.ones(32)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no causal language model could be loaded .*model\.safetensors"):
        load(ModelConfig(path=str(folder)), 0)


@pytest.mark.parametrize(("template", "named"), [
    ("{% for m in messages %}", "TemplateSyntaxError"),
    ("{{ raise_exception('only tools') }}", "TemplateError: only tools"),
    ("{{ messages[0].content + 1 }}", "TypeError"),
    ("{{ messages[3].content.x }}", "UndefinedError"),
])  # fmt: skip
def test_a_chat_template_that_does_not_render_is_refused(template: str, named: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=r"does not render a question .*: mend its chat_template\.jinja") as caught:
        load_tokenizer(str(folder))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", [
    "{% for m in messages %}<u>{{ m.text }}{% endfor %}<a>",
    "{% for m in messages %}<u>{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% endfor %}<a>",
])  # fmt: skip
def test_a_chat_template_that_shows_no_question_is_refused(template: str, folder: Path) -> None:
    with pytest.raises(UserError, match=r"prompt\.chat_template leaves out what the user says.*'<u><a>'\): mend it"):
        load_tokenizer(str(folder), template=template)


def test_an_adapter_on_the_output_head_is_refused_as_nothing_would_read_it(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load(ModelConfig(path=str(folder), lora=LoraConfig(targets=("q_proj",))), 0)
    with pytest.raises(UserError, match=r"names the output head lm_head, whose adapter would never be read.*remove it"):
        load(ModelConfig(path=str(folder), lora=LoraConfig(targets=("q_proj", "lm_head"))), 0)


def test_more_threads_than_cores_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    set_threads(0)
    set_threads(4)
    with pytest.warns(UserWarning, match="threads = 5, but the machine has 4 cores"):
        set_threads(5)
    assert given == [4, 5]
