"""Streams and gradients of every family are those of a dense computation from the model's own logits."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from atesd import sections
from atesd.config import RunConfig
from atesd.losses.divergence import LossConfig
from atesd.losses.target import Plain
from atesd.rollout.hf import HFEngine
from atesd.train.agree import refuse_disagreement
from atesd.train.batch import Passage, labels
from atesd.train.gap import GapRule
from atesd.train.heads import beside_text, head, refuse_router_loss
from atesd.train.loop import Trainer
from atesd.train.model import _freeze_what_text_never_reaches, add_lora
from atesd.train.scorer import Scorer
from atesd.train.setup import assemble
from atesd.types import UserError

from support.architectures import FAMILIES, SIZES, family
from support.folders import write_byte_model

TEMPERATURE = 1.25
PADDED = "recurrent-gemma"
"""The family whose own logits depend on padding: it is warned about, and compared on one passage."""


def passages(seed: int) -> list[Passage]:
    """Return three passages of different prompts; the completions are the same for every seed."""
    rng, fixed = random.Random(seed), random.Random(0)
    return [
        Passage(tuple(rng.randrange(2, 120) for _ in range(length)), tuple(fixed.randrange(2, 120) for _ in range(4)))
        for length in (3 + seed, 9, 5)
    ]


def scorer_of(model: nn.Module, **settings: Any) -> Scorer:
    return Scorer(model, pad_id=0, loss=LossConfig(**settings), temperature=TEMPERATURE, token_budget=1000)


def own_logprobs(model: Any, chosen: list[Passage]) -> Tensor:
    """Return the model's own log-probabilities behind each passage's scored positions, [N, V], one passage a pass."""

    def each() -> Iterator[Tensor]:
        for prompt, completion, _ in chosen:
            logits = model(torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
            yield logits[len(prompt) - 1 : -1]

    return (torch.cat(list(each())) / TEMPERATURE).log_softmax(-1)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in model.named_parameters()
    }


def warned(name: str) -> AbstractContextManager[object]:
    """The family that lets padding in front of a prompt change its logits is warned about."""
    return pytest.warns(UserWarning, match="lets padding in front") if name == PADDED else nullcontext()


@pytest.mark.parametrize("name", FAMILIES)
def test_streams_and_gradients_are_those_of_the_models_own_logits(name: str) -> None:
    model, student, teacher = family(name), passages(0), passages(1)
    scorer = scorer_of(model, tile_logits=5 * 128)
    with warned(name):
        refuse_disagreement(scorer, [each.prompt + each.completion for each in student])
    with torch.no_grad():
        view = scorer.hidden(teacher).detached()
        log_p = own_logprobs(model, teacher)
    weigh = torch.linspace(0.5, 2, 4 * len(student))

    streams = scorer.streams(student, [view], Plain())
    found = gradients((weigh * streams.divergence_N + 0.1 * streams.logprob_N).sum(), model)
    log_q = own_logprobs(model, student)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    logprob = log_q.gather(-1, labels(student, torch.device("cpu"))[:, None])[:, 0]
    expected = gradients((weigh * divergence + 0.1 * logprob).sum(), model)

    torch.testing.assert_close(streams.divergence_N, divergence, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(streams.logprob_N, logprob, atol=1e-5, rtol=1e-5)
    assert float(divergence.detach().min()) > 1e-4
    for weight, want in expected.items():
        torch.testing.assert_close(found[weight], want, atol=1e-5 * max(1.0, float(want.abs().max())), rtol=1e-5)
    moved = sum(bool(want.any()) for want in expected.values())
    assert moved > 0.8 * len(expected)


PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [2, 3, 4, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_is_refused_for_its_precision(name: str, dtype: torch.dtype) -> None:
    """Peaked distributions, so that rounding has something to round: logits of some tens."""
    model = family(name, dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore" if name == PADDED else "error", message=".*padding in front")
        refuse_disagreement(scorer_of(model), PROMPTS)


def test_padding_that_changes_logits_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="RecurrentGemmaForCausalLM lets padding in front .*rollout.batch_tokens = 1"):
        refuse_disagreement(scorer_of(family(PADDED)), PROMPTS)


def test_heads_with_a_transform_before_the_decoder_are_refused() -> None:
    settings = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"} | {"is_decoder": True}
    for kind, config in (("BertLMHeadModel", "BertConfig"), ("RobertaForCausalLM", "RobertaConfig")):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
        with pytest.raises(
            UserError, match=rf"{kind} makes its logits in a way .*differ by up to \d.*from the model's"
        ):
            refuse_disagreement(scorer_of(model), PROMPTS)


def test_a_config_that_names_what_the_model_does_not_do_is_refused() -> None:
    """Llama's own forward pass knows no scale: the comparison decides, not the name."""
    with pytest.raises(UserError, match="LlamaForCausalLM makes its logits in a way that losses do not reproduce"):
        refuse_disagreement(scorer_of(family("llama", logit_scale=0.5)), PROMPTS)


@pytest.mark.parametrize(("factor", "dtype", "refused"), [
    (1.001, torch.float32, True),
    (1.00001, torch.float32, False),
    (1.1, torch.bfloat16, True),
    (1.005, torch.bfloat16, False),
])  # fmt: skip
def test_what_is_more_than_rounding_is_refused(factor: float, dtype: torch.dtype, refused: bool) -> None:
    """A scale of 1 + e moves log-probabilities by some e of the largest logit."""
    model = family("llama", dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.config.logit_scale = factor
    with pytest.raises(UserError, match="differ by up to") if refused else nullcontext():
        refuse_disagreement(scorer_of(model), PROMPTS)


def test_a_head_of_other_rows_and_a_model_that_does_not_run_are_refused() -> None:
    model = family("inkling")
    forward = model.forward
    model.forward = lambda **given: SimpleNamespace(logits=forward(**given).logits[..., :100])
    with pytest.raises(UserError, match="InklingForCausalLM gives 100 logits a token, but its output head has 120 row"):
        refuse_disagreement(scorer_of(model), PROMPTS)
    model.forward = lambda input_ids, use_cache: forward(input_ids, use_cache=use_cache)
    with pytest.raises(UserError, match=r"does not run as a causal language model on text alone \(TypeError: .*"):
        refuse_disagreement(scorer_of(model), PROMPTS)


def test_broken_weights_and_prompts_of_one_token_decide_nothing() -> None:
    model = family("llama", logit_scale=0.5)
    refuse_disagreement(scorer_of(model), [[5], [6]])
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    refuse_disagreement(scorer_of(model), PROMPTS)


def test_the_comparison_is_short_and_leaves_the_model_as_it_was() -> None:
    model, lengths = family("llama"), []
    model.train()
    model.register_forward_pre_hook(lambda _, __, given: lengths.append(given["input_ids"].shape), with_kwargs=True)
    refuse_disagreement(scorer_of(model), [list(range(2, 100))] * 5)
    assert lengths == [(2, 31), (1, 15), (1, 31)]  # together, alone, and alone behind padding
    assert model.training


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_settings_that_would_end_every_logit_are_refused_by_name(value: float) -> None:
    with pytest.raises(UserError, match=rf"CohereForCausalLM has logit_scale = {value} in its config.json, which must"):
        head(family("cohere", logit_scale=value))


def test_a_run_begins_with_the_comparison_and_says_what_samples(tmp_path: Path) -> None:
    folder = write_byte_model(tmp_path / "model")
    rollout = {"max_new_tokens": 8, "gap_warning": 0.125, "gap_limit": 0.5}
    config = RunConfig.model_validate({"model": {"path": str(folder)}, "rollout": rollout})
    said: list[str] = []
    trainer = Trainer.start(config, tmp_path / "run", say=said.append)
    assert trainer.parts.stepper._gap_rule == GapRule(0.125, 0.5)
    assert said == ["completions are sampled by atesd's own loop"]
    assert json.loads((tmp_path / "run" / "env.json").read_text())["sampling"] == "atesd's own loop"
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"logit_scale": 0.5}))
    with pytest.raises(UserError, match="Qwen3ForCausalLM makes its logits in a way that losses do not reproduce"):
        assemble(config)


def test_the_way_of_sampling_is_named_with_its_reason() -> None:
    assert HFEngine().path(family("qwen3"), 16) == "atesd's own loop"
    assert HFEngine(decode="generate").path(family("qwen3"), 16).startswith("transformers' generate, as rollout.eng")
    slower = "transformers' generate, which is slower: its architecture is Gemma2ForCausalLM"
    assert HFEngine().path(family("gemma2"), 16) == slower
    adapted = get_peft_model(family("gemma2"), LoraConfig(r=2, target_modules=["q_proj"]))
    assert HFEngine().path(adapted, 16) == slower
    assert "exceed its sliding window of 8" in HFEngine().path(family("mistral", sliding_window=8), 16)


def test_a_mixture_with_a_loss_of_its_routers_is_refused_and_none_is_invented() -> None:
    refuse_router_loss(family("qwen3-moe", router_aux_loss_coef=0.01))
    refuse_router_loss(family("qwen3-moe", router_aux_loss_coef=0.0, output_router_logits=True))
    with pytest.raises(
        UserError, match=r"Qwen3MoeForCausalLM adds a loss .*\(router_aux_loss_coef = 0\.01\).* to false"
    ):
        refuse_router_loss(family("qwen3-moe", router_aux_loss_coef=0.01, output_router_logits=True))


def multimodal() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.Gemma3Config(
            text_config={**SIZES, "head_dim": 8, "bos_token_id": 1},
            vision_config={**vision, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            image_token_index=100,
        )
    ).eval()


def test_a_multimodal_model_trains_its_text_part_alone_and_says_so() -> None:
    model = multimodal()
    with pytest.warns(
        UserWarning, match=r"Gemma3ForConditionalGeneration reads more than text: .* \d\d,\d+ weights of"
    ):
        _freeze_what_text_never_reaches(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(("model.language", "lm_head"))}
    scorer = scorer_of(model)
    refuse_disagreement(scorer, PROMPTS)
    found = gradients(scorer.streams(passages(0)).logprob_N.sum(), model)
    assert all(bool(found[name].any()) for name in trained)
    adapted = add_lora(multimodal(), sections.LoraConfig(r=2), 0)
    assert {name.split(".layers")[0] for name, weight in adapted.named_parameters() if weight.requires_grad} == {
        "base_model.model.model.language_model"
    }


def test_a_model_of_text_alone_keeps_all_its_weights() -> None:
    for name in ("qwen3", "gpt-j, a head with a bias", "falcon-h1"):
        assert not beside_text(family(name))
