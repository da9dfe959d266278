"""Answers of a vLLM server are whole or none."""

from __future__ import annotations

from typing import Any

import pytest

from atesd.rollout.answers import HalfAnswer, Order, completions_of
from atesd.rollout.sampler import SamplingConfig
from atesd.types import StopReason

EOS = (1, 9)
SAMPLING = SamplingConfig(temperature=0.7, top_p=0.9, top_k=8, max_new_tokens=3)
ORDER = Order((4, 5), (0, 2), seed=11)
CLOSED = {
    "index": 0,
    "token_ids": [7, 9],
    "prompt_token_ids": [4, 5],
    "logprobs": {"token_logprobs": [-0.5, -0.25]},
    "finish_reason": "stop",
}
CUT = {
    "index": 1,
    "token_ids": [7, 8, 6],
    "logprobs": {"token_logprobs": [-0.5, 0.0005, -3]},
    "finish_reason": "length",
}


def answer(*choices: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return {"model": "m", "choices": list(choices), **changed}


def test_a_request_names_every_setting() -> None:
    """Else vLLM takes them from the model's generation config; neither does it end at other tokens than ours."""
    body = ORDER.body("m", SAMPLING, EOS)
    assert body == {
        "model": "m", "prompt": [4, 5], "n": 2, "seed": 11, "max_tokens": 3, "temperature": 0.7, "top_p": 0.9,
        "top_k": 8, "min_p": 0.0, "min_tokens": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "ignore_eos": True, "stop_token_ids": [1, 9], "logprobs": 0,
        "return_token_ids": True, "stream": False,
    }  # fmt: skip
    assert Order((4,), (0, 1, 2), 5, once=True).body("m", SAMPLING, EOS)["n"] == 1


def test_choices_are_taken_by_their_index() -> None:
    first, second = completions_of(answer(CUT, CLOSED), ORDER, "m", SAMPLING, EOS)
    assert (first.ids, first.logprobs, first.stop) == ((7, 9), (-0.5, -0.25), StopReason.EOS)
    assert (second.ids, second.logprobs, second.stop) == ((7, 8, 6), (-0.5, 0.0, -3.0), StopReason.LENGTH)


def test_an_end_token_in_the_last_place_closes_a_completion_whatever_the_server_calls_its_end() -> None:
    """vLLM looked for the length first until its scheduler was turned round: it says "length" of such a completion."""
    ended = {**CUT, "token_ids": [7, 8, 9]}
    for end in ("length", "stop"):
        _, second = completions_of(answer(CLOSED, ended | {"finish_reason": end}), ORDER, "m", SAMPLING, EOS)
        assert (second.ids, second.stop) == ((7, 8, 9), StopReason.EOS)
    with pytest.raises(HalfAnswer, match="ended by 'length' with 2 end tokens"):
        completions_of(answer(CLOSED, ended | {"token_ids": [7, 9, 9]}), ORDER, "m", SAMPLING, EOS)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("text", "no JSON object"),
        (answer(CLOSED, CUT, model="m2"), "it is of model 'm2', asked was 'm'"),
        ({"model": "m"}, "no choices"),
        (answer(CLOSED), "1 of 2 choices"),
        (answer(CLOSED, CLOSED), "2 of 2 choices"),
        (answer(CLOSED, CUT, CUT | {"index": 2}), "3 of 2 choices"),
        (answer(CLOSED | {"token_ids": None}, CUT), "no token_ids"),
        (answer(CLOSED | {"token_ids": []}, CUT), "no token_ids"),
        (answer(CLOSED | {"token_ids": [7, True]}, CUT), "no token_ids"),
        (answer(CLOSED | {"token_ids": [-7, 9]}, CUT), "no token_ids"),
        (answer(CLOSED | {"prompt_token_ids": [5]}, CUT), "another prompt"),
        (answer(CLOSED | {"logprobs": None}, CUT), "no log-probabilities"),
        (answer(CLOSED | {"logprobs": {"token_logprobs": [None, -1]}}, CUT), "no log-probabilities"),
        (answer(CLOSED | {"logprobs": {"token_logprobs": [-1]}}, CUT), "1 log-probabilities for 2 token ids"),
        (answer(CLOSED | {"logprobs": {"token_logprobs": [0.5, -1]}}, CUT), "that are none"),
        (answer(CLOSED | {"logprobs": {"token_logprobs": [float("nan"), -1]}}, CUT), "that are none"),
        (answer(CLOSED | {"finish_reason": "abort"}, CUT), "ended by 'abort'"),
        (answer(CLOSED | {"finish_reason": "length"}, CUT), "ended by 'length' with 1 end tokens"),
        (answer(CLOSED, CUT | {"finish_reason": "stop"}), "ended by 'stop' with 0 end tokens"),
        (answer(CLOSED | {"token_ids": [9, 9]}, CUT), "with 2 end tokens"),
        (
            answer(CLOSED, CUT | {"token_ids": [7, 8], "logprobs": {"token_logprobs": [-1, -1]}}),
            "of 2 tokens, at most 3",
        ),
        (
            answer(CLOSED | {"token_ids": [7, 7, 7, 9], "logprobs": {"token_logprobs": [-1] * 4}}, CUT),
            "of 4 tokens, at most 3",
        ),
    ],
)
def test_half_an_answer_is_refused(given: Any, why: str) -> None:
    with pytest.raises(HalfAnswer, match=why):
        completions_of(given, ORDER, "m", SAMPLING, EOS)
