"""Latent codes: what they add where, how samples and scores agree, and how they are kept beside a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3ForCausalLM

from atesd.codes.config import CodesConfig
from atesd.codes.model import FILE, attach, build_codes, codes_of, load_codes, save_codes, unsteered, with_codes
from atesd.codes.steer import Codes, Walk
from atesd.losses.divergence import LossConfig
from atesd.recipe import build_config
from atesd.rollout.hf import HFSampler
from atesd.rollout.sampler import SamplingConfig
from atesd.sections import LoraConfig, TeacherConfig
from atesd.train.batch import Passage
from atesd.train.checkpoint import load_weights, write_weights
from atesd.train.model import add_lora
from atesd.train.scorer import Scorer
from atesd.train.teacher import Teacher
from atesd.types import UserError

from support.models import EOS, PAD, VOCABULARY, ragged_rows, tiny_model

SETTINGS = CodesConfig(count=5, chunk=3, draws=4, scale=1.5)


def steered_model(layer: int = 0, *, seed: int = 0, size: float = 0.5, model: Any = None) -> tuple[Any, Codes]:
    """Return a tiny model and codes of it, which are far from nothing."""
    model = tiny_model(seed) if model is None else model
    codes = build_codes(SETTINGS.model_copy(update={"layer": layer}), model)
    attach(model, codes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        codes.vectors_CH.copy_(size * torch.randn(codes.vectors_CH.shape, generator=generator))
        codes.router_CH.copy_(torch.randn(codes.router_CH.shape, generator=generator))
    return model, codes


def scorer_of(model: nn.Module, budget: int = 4096) -> Scorer:
    return Scorer(model, pad_id=PAD, loss=LossConfig(), temperature=1.0, token_budget=budget)


def passages(count: int = 7, seed: int = 0) -> list[Passage]:
    return [row.student for row in ragged_rows(count, seed)]


def by_hand(model: Any, codes: Codes, passage: Passage, given: Sequence[int] | None = None) -> tuple[Tensor, list[int]]:
    """Return the logits [T, V] that predict a completion, steered token by token, and the codes in force, [M].

    Each position is added its vector by a pass of its own, in the order of tokens: nothing is vectorised.
    """
    ids = torch.tensor([[*passage.prompt, *passage.completion[:-1]]])
    first, used = len(passage.prompt) - 1, []
    deltas = torch.zeros(ids.shape[1], codes.vectors_CH.shape[1], dtype=codes.vectors_CH.dtype)
    with torch.no_grad(), unsteered(model):
        read = model(input_ids=ids, output_hidden_states=True).hidden_states[codes.layer + 1][0]
        if codes.layer + 1 == len(model.model.layers):  # transformers gives the last layer's behind the final norm
            kept: list[Tensor] = []
            handle = model.model.layers[-1].register_forward_hook(lambda *args: kept.append(args[2]))
            model(input_ids=ids)
            handle.remove()
            read = kept[0][0]
        for token in range(len(passage.completion)):
            if token % codes.chunk == 0:
                scores = [float(row @ read[first + token].to(row.dtype)) for row in codes.router_CH]
                used.append(scores.index(max(scores)) if given is None else given[token // codes.chunk])
            deltas[first + token] = codes.scale * codes.vectors_CH[used[-1]]
        handle = model.model.layers[codes.layer].register_forward_hook(lambda *args: args[2] + deltas)
        logits = model(input_ids=ids).logits[0, first:]
        handle.remove()
    return logits, used


# ---- what is added where --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_scores_are_steered_chunk_by_chunk_from_the_position_that_predicts_the_first_token(layer: int) -> None:
    """Completions of 1 to 12 tokens: shorter than a chunk, whole chunks, and a rest."""
    model, codes = steered_model(layer)
    chosen = passages()
    assert {len(each.completion) % 3 for each in chosen} == {0, 1, 2}
    assert min(len(each.completion) for each in chosen) < 3
    with torch.no_grad():
        found = scorer_of(model).each(chosen, scorer_of(model).log_likelihood)
    used = set()
    for passage, logprob_T in zip(chosen, found, strict=True):
        logits, own = by_hand(model, codes, passage)
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(passage.completion)[:, None])[:, 0]
        torch.testing.assert_close(logprob_T, expected, rtol=1e-4, atol=1e-4)
        used |= set(own)
    assert len(used) > 1


def test_given_codes_reach_their_passages_whatever_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch read in several passes, in another order, follows the same codes as each passage alone."""
    monkeypatch.setattr("atesd.train.batch.PASS_POSITIONS", 0)
    model, codes = steered_model()
    chosen = passages(9, seed=3)
    random = torch.Generator().manual_seed(1)
    given = [torch.randint(5, (-(-len(each.completion) // 3),), generator=random) for each in chosen]
    scorer = scorer_of(model, budget=40)
    assert len(scorer._input(chosen).passes) > 1
    assert scorer._input(chosen).order_N is not None
    with torch.no_grad(), codes.following(given):
        found = scorer.log_likelihood(chosen).split_with_sizes([len(each.completion) for each in chosen])
    for passage, own, logprob_T in zip(chosen, given, found, strict=True):
        logits, _ = by_hand(model, codes, passage, own.tolist())
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(passage.completion)[:, None])[:, 0]
        torch.testing.assert_close(logprob_T, expected, rtol=1e-4, atol=1e-4)


def test_what_the_router_reads_does_not_depend_on_codes() -> None:
    model, codes = steered_model()
    chosen = passages()
    read = []
    for size in (0.0, 7.0):
        with torch.no_grad():
            codes.vectors_CH.fill_(size)
            with codes.noting() as noted:
                scorer_of(model).log_likelihood(chosen)
        assert [len(noted[member]) for member in range(7)] == [-(-len(each.completion) // 3) for each in chosen]
        read.append(torch.cat([noted[member] for member in range(7)]))
    assert torch.equal(*read)


@pytest.mark.parametrize("mode", ["greedy", "given"])
def test_codes_of_zero_are_the_identity_bit_for_bit(mode: str) -> None:
    """Streams, and the gradients of all weights but the codes' own."""
    chosen, results = passages(), []
    for has_codes in (False, True):
        model = tiny_model()
        if has_codes:
            _, codes = steered_model(size=0.0, model=model)
        scorer = scorer_of(model)
        given = [torch.tensor([1] * -(-len(each.completion) // 3)) for each in chosen]
        if has_codes and mode == "given":
            with codes.following(given):
                logprob_N = scorer.log_likelihood(chosen)
        else:
            logprob_N = scorer.log_likelihood(chosen)
        logprob_N.sum().backward()  # type: ignore[no-untyped-call]
        weights = {name: each.grad for name, each in model.named_parameters() if "latent" not in name}
        results.append((logprob_N.detach(), weights))
    (plain, plain_gradients), (steered, gradients) = results
    assert torch.equal(plain, steered)
    for name, gradient in plain_gradients.items():
        assert gradient is not None
        assert torch.equal(gradient, gradients[name]), name


def test_vectors_and_model_learn_from_a_steered_score_and_the_router_does_not() -> None:
    model, codes = steered_model()
    chosen = [each for each in passages() if len(each.completion) > 3]
    with codes.following([torch.tensor([2] + [4] * (-(-len(each.completion) // 3) - 1)) for each in chosen]):
        scorer_of(model).log_likelihood(chosen).sum().backward()  # type: ignore[no-untyped-call]
    assert codes.router_CH.grad is None
    assert codes.vectors_CH.grad is not None
    assert codes.vectors_CH.grad.abs().sum(1).nonzero().flatten().tolist() == [2, 4]
    assert all(weight.grad is not None for name, weight in model.named_parameters() if "router" not in name)


def test_no_gradient_reaches_the_model_through_the_router() -> None:
    model, codes = steered_model()
    with codes.noting() as noted:
        scorer_of(model).log_likelihood(passages())
    hidden = torch.ones(1, 32, requires_grad=True)
    assert codes.logits(hidden).requires_grad
    codes.logits(hidden).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is None
    codes.logits(torch.cat(list(noted.values()))).square().sum().backward()  # type: ignore[no-untyped-call]
    assert codes.router_CH.grad is not None
    assert all(weight.grad is None for name, weight in model.named_parameters() if "router" not in name)


def test_teachers_and_unsteered_blocks_are_not_steered_and_blocks_may_be_nested() -> None:
    model, codes = steered_model()
    chosen, scorer = passages(), scorer_of(model)
    with torch.no_grad():
        steered = scorer.log_likelihood(chosen)
        codes_off = tiny_model()
        plain = scorer_of(codes_off).log_likelihood(chosen)
        with unsteered(model):
            assert torch.equal(scorer.log_likelihood(chosen), plain)
            with codes.noting():
                assert torch.equal(scorer.log_likelihood(chosen), steered)
            assert torch.equal(scorer.log_likelihood(chosen), plain)
        assert torch.equal(scorer.log_likelihood(chosen), steered)
        with codes.following([codes.starts(len(each.completion)) % 5 for each in chosen]):
            assert not torch.equal(scorer.log_likelihood(chosen), steered)
            with codes.noting():
                assert torch.equal(scorer.log_likelihood(chosen), steered)
        for kind in ("frozen", "live", "ema"):
            with Teacher(TeacherConfig(weights=kind), model).in_place():
                assert torch.equal(scorer.log_likelihood(chosen), plain)
    assert not torch.allclose(steered, plain, atol=1e-2)


# ---- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
def test_samples_are_steered_as_they_are_scored(layer: int, lora: bool, generate: bool) -> None:
    """Prompts of several lengths, some of them equal; rows that end early leave the batch. Nothing is guessed."""
    model: Any = tiny_model()
    if lora:
        model = add_lora(model, LoraConfig(r=2), 0)
    steered_model(layer, model=model)
    sampler = HFSampler(model, eos_ids=[EOS, 7, 9], pad_id=PAD, decode=str, always_generate=generate, guess=4)
    prompts = [(3, 4, 5, 6), (8,), (3, 4, 5, 6), (11, 12), (8,), (2, 13, 14)]
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=11)
    turns = sampler.sample(prompts, sampling, seed=4, references=prompts)
    lengths = [len(turn.completion_ids) for turn in turns]
    assert min(lengths) < max(lengths)
    scorer = scorer_of(model)
    chosen = [Passage(turn.prompt_ids, turn.completion_ids) for turn in turns]
    sampled = torch.tensor([value for turn in turns for value in turn.logprobs])
    with torch.no_grad():
        torch.testing.assert_close(scorer.log_likelihood(chosen), sampled, rtol=1e-4, atol=1e-4)
        with unsteered(model):
            assert not torch.allclose(scorer.log_likelihood(chosen), sampled, atol=1e-2)
            plain = sampler.sample(prompts, SamplingConfig(temperature=1.0, max_new_tokens=11), seed=4)
            own = torch.tensor([value for turn in plain for value in turn.logprobs])
            read = [Passage(turn.prompt_ids, turn.completion_ids) for turn in plain]
            torch.testing.assert_close(scorer.log_likelihood(read), own, rtol=1e-4, atol=1e-4)


def test_a_walk_keeps_its_code_for_a_chunk_and_drops_rows() -> None:
    """Identity router: the code is the largest of the first five entries at places 0, 3, ... alone."""
    codes = Codes(5, 5, chunk=3, layer=0, scale=2.0, dtype=torch.float32)
    with torch.no_grad():
        codes.router_CH.copy_(torch.eye(5))
        codes.vectors_CH.copy_(torch.diag(torch.arange(1.0, 6.0)))
    walk, rows = Walk(codes), torch.eye(5)[[4, 1]]
    assert walk.steer(rows).sub(rows).tolist() == [[0, 0, 0, 0, 10.0], [0, 4.0, 0, 0, 0]]
    other = torch.eye(5)[[0, 0]]
    assert walk.steer(other).sub(other).argmax(1).tolist() == [4, 1]
    walk.keep(torch.tensor([1]))
    assert walk.steer(other[:1]).sub(other[:1]).argmax(1).tolist() == [1]
    assert walk.steer(other[:1]).sub(other[:1]).argmax(1).tolist() == [0], "a new chunk"


# ---- beside a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_saved_codes_give_equal_logits_with_plain_transformers(lora: bool, tmp_path: Path) -> None:
    model: Any = tiny_model()
    if lora:
        model = add_lora(model, LoraConfig(r=2), 0)
        model.config.save_pretrained(tmp_path / "base")  # peft asks for its config, at the hub if need be
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    _, codes = steered_model(1 if lora else 0, model=model)
    write_weights(tmp_path, model)
    weights = load_file(tmp_path / ("adapter_model.safetensors" if lora else "model.safetensors"))
    assert not [name for name in weights if "latent" in name], "the model's own file is as without codes"
    assert codes_of(model) is codes
    plain: Any = tiny_model() if lora else Qwen3ForCausalLM.from_pretrained(tmp_path)
    again = load_codes(tmp_path)
    assert (again.shape, again.scale) == (codes.shape, codes.scale)
    assert not any(weight.requires_grad for weight in again.parameters()), "they are read as constants"
    chosen = passages()
    ids = [[*each.prompt, *each.completion[:-1]] for each in chosen]
    width = max(map(len, ids))
    ids_BL = torch.tensor([[*row, *[PAD] * (width - len(row))] for row in ids])
    with torch.no_grad():
        with again.reading(plain.eval(), [len(each.prompt) for each in chosen], list(map(len, ids))):
            logits_BLV = plain(input_ids=ids_BL).logits
        found = scorer_of(model.eval()).log_likelihood(chosen)
    expected = torch.cat(
        [
            logits_BLV[row, len(each.prompt) - 1 : len(ids[row])]
            .log_softmax(-1)
            .gather(-1, torch.tensor(each.completion)[:, None])[:, 0]
            for row, each in enumerate(chosen)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), again.generating(plain):
        written = plain.generate(
            torch.tensor([[3, 4, 5]]), max_new_tokens=8, do_sample=False, pad_token_id=PAD, eos_token_id=EOS
        )[0]
    logits, _ = by_hand(plain_with(plain, again), again, Passage((3, 4, 5), tuple(written[3:].tolist())))
    assert written[3:].tolist() == logits.argmax(-1).tolist()


def plain_with(model: Any, codes: Codes) -> Any:
    attach(model, codes)
    return model


def test_a_checkpoints_codes_come_back(tmp_path: Path) -> None:
    model, codes = steered_model()
    write_weights(tmp_path, model)
    other, others = steered_model(seed=5)
    load_weights(tmp_path, other)
    assert torch.equal(others.vectors_CH, codes.vectors_CH)
    assert torch.equal(others.router_CH, codes.router_CH)
    assert others.router_CH.requires_grad, "they train on"


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_the_layer_is_the_last_of_the_first_half_unless_named() -> None:
    """Of 2 layers 0, of 28 (Qwen3 1.7B; the paper's 14th) 13."""
    assert build_codes(CodesConfig(), tiny_model()).layer == 0
    with pytest.raises(UserError, match=r"codes.layer = 2, and the model's 2 decoder layers are numbered from 0 to 1"):
        build_codes(CodesConfig(layer=2), tiny_model())


def test_codes_of_a_model_in_half_precision_learn_in_float32() -> None:
    assert build_codes(SETTINGS, tiny_model().bfloat16()).vectors_CH.dtype == torch.float32
    assert build_codes(SETTINGS, tiny_model().double()).vectors_CH.dtype == torch.float64


def test_a_model_without_a_list_of_decoder_layers_is_refused_in_one_line() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=VOCABULARY, n_positions=8))
    with pytest.raises(UserError, match=r"GPT2LMHeadModel has no list of them, called layers: .* or remove codes") as e:
        build_codes(CodesConfig(), model)
    assert "\n" not in str(e.value)


def test_codes_of_another_model_are_refused(tmp_path: Path) -> None:
    save_codes(tmp_path, Codes(4, 16, chunk=2, layer=0, dtype=torch.float32))
    with pytest.raises(UserError, match="hidden size 16, and this one has 2 layers and hidden size 32"):
        attach(tiny_model(), load_codes(tmp_path))
    with pytest.raises(
        UserError, match="the codes steer layer 2 of a model of hidden size 32, and this one has 2 layers"
    ):
        attach(tiny_model(), Codes(4, 32, chunk=2, layer=2, dtype=torch.float32))


def test_missing_and_damaged_codes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"holds no {FILE}"):
        load_codes(tmp_path)
    save_codes(tmp_path, Codes(4, 16, chunk=2, layer=0, dtype=torch.float32))
    whole = (tmp_path / FILE).read_bytes()
    for bytes_ in (
        whole[:-3],
        b"{",
        whole.replace(b"chunk", b"chonk"),
        whole.replace(b"vectors", b"vectorz"),
    ):
        (tmp_path / FILE).write_bytes(bytes_)
        with pytest.raises(UserError, match="is damaged") as error:
            load_codes(tmp_path)
        assert "\n" not in str(error.value)


def test_a_folders_codes_are_trained_on_or_refused() -> None:
    model, codes = steered_model()
    codes.requires_grad_(False)
    with pytest.raises(
        UserError, match=r"does not train: add \[codes\] with count = 5, chunk = 3, layer = 0, scale = 1.5"
    ):
        with_codes(None, model, "folder")
    with pytest.raises(UserError, match=r"asks for count = 6, .* have count = 5"):
        with_codes(SETTINGS.model_copy(update={"count": 6}), model, "folder")
    with pytest.raises(UserError, match=r"asks for .* scale = 2, .* have .* scale = 1\.5"):
        with_codes(SETTINGS.model_copy(update={"scale": 2.0}), model, "folder")
    assert with_codes(SETTINGS, model, "folder") is codes
    assert codes.router_CH.requires_grad
    assert with_codes(None, tiny_model(), "folder") is None


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"routing": {"kind": "sft"}}, 'routing.kind = "sft" trains groups otherwise'),
        ({"routing": {"kind": "both"}, "rollout": {"group_size": 2}}, 'routing.kind = "both"'),
        ({"model": {"gradient_checkpointing": True}}, "gradient_checkpointing = true makes it once more"),
        ({"codes": {"count": 1}}, "greater than or equal to 2"),
        ({"codes": {"draws": 0}}, "greater than or equal to 1"),
    ],
)
def test_what_does_not_go_with_codes_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config({"codes": {}} | sections)
