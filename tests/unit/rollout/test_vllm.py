"""The engine `vllm` against a server that answers as vLLM does, and fails in every way that one may."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import CancelledError
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from atesd.config import RunConfig
from atesd.rollout.hf import HFSampler
from atesd.rollout.render import Renderer
from atesd.rollout.sampler import SamplingConfig, Weights
from atesd.rollout.served import VllmSampler
from atesd.rollout.vllm import VllmEngine
from atesd.sections import LoraConfig, ModelConfig
from atesd.train.model import load
from atesd.types import UserError

from support.fake_vllm import BASE, PICO, FakeVllm, repeated, sends, with_first, without

SAMPLING = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=6)
PROMPTS = [[2, 14, 15, 3], [2, 20, 3], [2, 14, 15, 3], [2, 14, 15, 3]]


@cache
def loaded(rank: int | None = 2) -> tuple[Any, Renderer]:
    """Return pico, with an adapter that changes what it says, and its renderer."""
    lora = None if rank is None else LoraConfig(r=rank, alpha=4)
    model, tokenizer = load(ModelConfig(path="pico", lora=lora), 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return model, Renderer(tokenizer)


def sampler_of(fake: FakeVllm, rank: int | None = 2, **settings: Any) -> VllmSampler:
    engine = VllmEngine.model_validate({"url": fake.url, "wait_s": 60.0, "timeout_s": 60.0} | settings)
    sampler = engine.build(*loaded(rank))
    assert isinstance(sampler, VllmSampler)
    return sampler


def weights(version: int) -> Weights:
    return Weights(version, is_adapter=True, tensors=dict)


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with FakeVllm() as server:
        yield server


@pytest.fixture
def warned() -> Iterator[list[warnings.WarningMessage]]:
    """Warnings are told, not raised."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", FutureWarning)  # peft on transformers
        yield told


def test_samples_are_those_of_the_adapter_that_trains(fake: FakeVllm) -> None:
    """Ids, log-probabilities, text, stop and version, each at the place of its prompt."""
    model, renderer = loaded()
    sampler = sampler_of(fake)
    sampler.sync(weights(3))
    turns = sampler.sample(PROMPTS, SAMPLING, seed=5)
    own = HFSampler(model, eos_ids=renderer.eos_ids, pad_id=renderer.pad_id, decode=renderer.decode)
    seeds = {len(body["prompt"]): body["seed"] for body in fake.asked}
    for place, offset in enumerate([0, 0, 1, 2]):
        (expected,) = own.sample([PROMPTS[place]], SAMPLING, seed=seeds[len(PROMPTS[place])] + offset)
        assert turns[place].completion_ids == expected.completion_ids
        assert turns[place].logprobs == pytest.approx(expected.logprobs, abs=1e-5)
        assert (turns[place].text, turns[place].stop) == (expected.text, expected.stop)
        assert turns[place].prompt_ids == tuple(PROMPTS[place])
        assert turns[place].weights_version == 3


def test_the_attempts_at_a_problem_are_one_request_with_the_same_seed_in_every_run(fake: FakeVllm) -> None:
    sampler_of(fake).sample(PROMPTS, SAMPLING, seed=5)
    first = {tuple(body["prompt"]): (body["n"], body["seed"]) for body in fake.asked}
    assert {prompt: count for prompt, (count, _) in first.items()} == {(2, 14, 15, 3): 3, (2, 20, 3): 1}
    fake.asked.clear()
    sampler = sampler_of(fake)
    sampler.sample(PROMPTS, SAMPLING, seed=5)
    assert {tuple(body["prompt"]): (body["n"], body["seed"]) for body in fake.asked} == first
    fake.asked.clear()
    sampler.sample(PROMPTS, SAMPLING, seed=6)
    seeds = {body["seed"] for body in fake.asked} | {seed for _, seed in first.values()}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_a_greedy_prompt_is_completed_once(fake: FakeVllm) -> None:
    turns = sampler_of(fake).sample(PROMPTS, SAMPLING.model_copy(update={"temperature": 0.0}), seed=5)
    assert sorted(body["n"] for body in fake.asked) == [1, 1]
    assert turns[0] == turns[2] == turns[3] != turns[1]


def test_every_version_has_a_name_and_a_folder_of_its_own_and_the_one_before_is_unloaded(fake: FakeVllm) -> None:
    sampler = sampler_of(fake)
    names = list(fake.adapters)
    for version in (1, 2):
        sampler.sync(weights(version))
        names += fake.adapters
        assert len(fake.adapters) == 1
    assert len(set(names)) == len(set(fake.paths)) == 3
    assert [name.rpartition("-")[2] for name in names] == ["v0", "v1", "v2"]
    assert [Path(path).exists() for path in fake.paths] == [False, True, True]
    saved = load_file(Path(fake.paths[-1]) / "adapter_model.safetensors")
    trained = {name: weight for name, weight in loaded()[0].named_parameters() if weight.requires_grad}
    assert {name.replace(".default", "") for name in trained} == set(saved)


def version_of(fake: FakeVllm) -> list[str]:
    return [name.rpartition("-")[2] for name in fake.adapters]


def test_what_is_under_way_keeps_its_adapter_and_its_version(fake: FakeVllm) -> None:
    """Other calls come and go meanwhile; its adapter goes when it was waited for."""
    sampler = sampler_of(fake)
    expected = sampler.sample(PROMPTS, SAMPLING, seed=5)
    submitted = sampler.submit(PROMPTS, SAMPLING, seed=5)
    sampler.sample(PROMPTS[:1], SAMPLING, seed=6)
    sampler.sync(weights(1))
    assert {turn.weights_version for turn in sampler.sample(PROMPTS, SAMPLING, seed=5)} == {1}
    assert version_of(fake) == ["v0", "v1"]
    sampler.sync(weights(2))
    assert version_of(fake) == ["v0", "v2"]
    assert submitted.result() == expected
    assert {turn.weights_version for turn in expected} == {0}
    sampler.sync(weights(3))
    assert version_of(fake) == ["v3"]
    assert submitted.seconds() > 0


def test_an_adapter_is_loaded_while_completions_take_all_places(fake: FakeVllm) -> None:
    sampler = sampler_of(fake, concurrency=1)
    asked, loaded_meanwhile = threading.Event(), threading.Event()

    def waits(_: FakeVllm, answer: Any) -> Any:
        asked.set()
        loaded_meanwhile.wait(timeout=30)
        return answer

    fake.faults += [waits]
    submitted = sampler.submit(PROMPTS, SAMPLING, seed=5)
    assert asked.wait(timeout=60)
    begun = time.monotonic()
    sampler.sync(weights(1))
    assert time.monotonic() - begun < 25, "the trainer waited for a completion"
    loaded_meanwhile.set()
    assert {turn.weights_version for turn in submitted.result()} == {0}
    assert fake.most_at_once == 1


def test_what_was_under_way_when_the_server_was_started_again_comes_of_the_same_weights(
    fake: FakeVllm, warned: list[warnings.WarningMessage]
) -> None:
    """Whether the trainer has swapped in other weights meanwhile, or not."""
    sampler = sampler_of(fake)
    for version in (1, 2):
        expected = sampler.sample(PROMPTS, SAMPLING, seed=5)
        submitted = sampler.submit(PROMPTS, SAMPLING, seed=5)
        if version == 2:
            sampler.sync(weights(version))
        fake.stop()
        fake.start()
        assert submitted.result() == expected
        sampler.sync(weights(version))
        assert version_of(fake) == [f"v{version}"]


class Crowd:
    """A team whose other processes hold what is told here."""

    def __init__(self, rank: int, size: int, told: dict[int, Any]) -> None:
        self.rank, self.size, self.told = rank, size, told

    def collect(self, mine: Any) -> list[Any]:
        self.told[self.rank] = mine
        return [self.told.get(rank) for rank in range(self.size)]


def test_a_process_samples_its_part_as_one_alone_would_and_leaves_adapters_to_the_first(
    fake: FakeVllm, warned: list[warnings.WarningMessage]
) -> None:
    """The second process takes name and path from the first; where the server was started again it helps itself."""
    told: dict[int, Any] = {}
    engine = VllmEngine(url=fake.url, wait_s=60.0)
    first, second = (VllmSampler(engine, *loaded(), Crowd(rank, 2, told)) for rank in range(2))
    assert version_of(fake) == ["v0"]
    for sampler in (first, second):
        sampler.sync(weights(1))
    assert version_of(fake) == ["v1"]
    prompts = [[2, 13 + place // 2, 3] for place in range(6)]
    whole = first.sample(prompts, SAMPLING, seed=5)
    fake.asked.clear()
    assert second.sample(prompts, SAMPLING, seed=5, part=[2, 3]) == whole[2:4]
    assert [body["n"] for body in fake.asked] == [2]
    assert second.sample(prompts, SAMPLING, seed=5, part=[]) == []
    # Equal prompts of two processes' problems have one request, whose draws are those of one process alone.
    assert second.sample(PROMPTS, SAMPLING, seed=5, part=[3]) == first.sample(PROMPTS, SAMPLING, seed=5)[3:]
    fake.stop()
    fake.start()
    assert second.sample(prompts, SAMPLING, seed=5, part=[2, 3]) == whole[2:4]
    assert first.sample(prompts, SAMPLING, seed=5, part=[0, 1]) == whole[:2]
    for sampler in (first, second):
        sampler.sync(weights(2))
    assert version_of(fake) == ["v2"], "what the second process had loaded itself it unloads"
    assert Path(fake.paths[-1]).exists()


def test_several_servers_want_as_many_processes() -> None:
    told: dict[int, Any] = {}
    with FakeVllm() as one, FakeVllm() as other:
        engine = VllmEngine(url=(one.url, other.url), wait_s=60.0)
        assert engine.path(torch.nn.Linear(1, 1), 5) == f"the vLLM servers at {one.url}, {other.url}"
        with pytest.raises(UserError, match=r"names 2 servers, of which each process asks one, and there are 1"):
            engine.build(*loaded())
        samplers = [VllmSampler(engine, *loaded(), Crowd(rank, 3, told)) for rank in range(3)]
        for sampler in samplers:
            sampler.sync(weights(1))
        assert version_of(one) == version_of(other) == ["v1"]
        for sampler in samplers:
            assert sampler.sample(PROMPTS[:1], SAMPLING, seed=5)
        assert (len(one.asked), len(other.asked)) == (2, 1)


def test_what_is_given_up_is_not_asked_again(fake: FakeVllm, warned: list[warnings.WarningMessage]) -> None:
    sampler = sampler_of(fake, concurrency=1)
    reached, dropped = threading.Event(), threading.Event()

    def away(_: FakeVllm, __: Any) -> Any:
        reached.set()
        assert dropped.wait(timeout=60)
        return 503, {}

    fake.faults += repeated(away, 1000)
    submitted = sampler.submit(PROMPTS, SAMPLING, seed=5)
    assert reached.wait(timeout=60)
    submitted.drop()
    dropped.set()
    with pytest.raises((UserError, CancelledError)):
        submitted.result()
    assert len(fake.asked) == 1


def test_a_program_that_ends_does_not_wait_for_what_it_gave_up(tmp_path: Path) -> None:
    """As after an error, or a second Ctrl-C: an answer may be minutes away."""
    script = tmp_path / "ends.py"
    script.write_text(
        "import time\n"
        "from atesd.rollout.answers import Order\n"
        "from atesd.rollout.requests import Requests\n"
        "from atesd.rollout.sampler import SamplingConfig\n"
        "class Slow:\n"
        "    url = 'http://slow'\n"
        "    def post(self, *given, **named):\n"
        "        time.sleep(600)\n"
        "orders = [Order((1,), (place,), 0) for place in range(3)]\n"
        "Requests(Slow(), orders, 'name', SamplingConfig(), [0], concurrency=2).give_up()\n"
    )
    subprocess.run([sys.executable, script], check=True, timeout=300)


def test_nothing_is_left_behind(fake: FakeVllm, tmp_path: Path) -> None:
    sampler = sampler_of(fake, adapters=str(tmp_path / "shared"))
    sampler.sync(weights(1))
    assert Path(fake.paths[-1]).parent == tmp_path / "shared"
    del sampler
    assert fake.adapters == {}
    assert list((tmp_path / "shared").iterdir()) == []


def test_a_folder_may_have_another_path_on_the_servers_side(fake: FakeVllm, tmp_path: Path) -> None:
    (tmp_path / "there").symlink_to(tmp_path / "here")
    (tmp_path / "here").mkdir()
    sampler_of(fake, adapters=str(tmp_path / "here"), adapters_there=str(tmp_path / "there"))
    assert Path(fake.paths[-1]).parent == tmp_path / "there"


def test_requests_are_under_way_together_and_bounded(fake: FakeVllm) -> None:
    sampler = sampler_of(fake, concurrency=2)
    meet = threading.Barrier(2, timeout=60)

    def together(_: FakeVllm, answer: Any) -> Any:
        meet.wait()
        return answer

    fake.faults += repeated(together, 4)
    turns = sampler.sample([[2, 13 + place, 3] for place in range(4)], SAMPLING, seed=0)
    assert len(turns) == 4
    assert fake.most_at_once == 2


@pytest.mark.parametrize(
    "fault",
    [
        sends((500, {"error": {"message": "boom"}})),
        sends((503, {})),
        sends((429, {})),
        sends("reset"),
        sends({"model": "other", "choices": []}),
        without("token_ids"),
        without("logprobs"),
        without("index"),
        with_first(finish_reason="abort"),
        lambda _, answer: answer | {"choices": answer["choices"][:1]},
        lambda _, answer: answer | {"model": "atesd-older-v0"},
    ],
)
def test_what_fails_once_is_asked_for_again_and_changes_nothing(
    fault: Any, fake: FakeVllm, warned: list[warnings.WarningMessage]
) -> None:
    sampler = sampler_of(fake, concurrency=1)  # the group of three is asked for first
    expected = sampler.sample(PROMPTS, SAMPLING, seed=5)
    fake.faults.append(fault)
    count = len(fake.asked)
    assert sampler.sample(PROMPTS, SAMPLING, seed=5) == expected
    assert len(fake.asked) == count + 3


def test_a_request_without_an_answer_in_time_is_asked_again(
    fake: FakeVllm, warned: list[warnings.WarningMessage]
) -> None:
    sampler = sampler_of(fake, timeout_s=4.0)
    expected = sampler.sample(PROMPTS[:1], SAMPLING, seed=5)
    fake.faults.append(sends("hang"))
    assert sampler.sample(PROMPTS[:1], SAMPLING, seed=5) == expected
    assert "does not answer (ReadTimeout" in str(warned[0].message)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (without("token_ids"), r"half an answer 3 times \(a choice has no token_ids"),
        (without("logprobs"), r"half an answer 3 times \(a choice has no log-probabilities\)"),
        (lambda _, answer: answer | {"choices": answer["choices"][:1]}, r"\(it has 1 of 2 choices\)"),
        (lambda _, answer: answer | {"model": "atesd-older-v0"}, r"it is of model 'atesd-older-v0', asked was 'atesd-"),
        (sends((400, {"error": {"message": "no such field"}})), "refuses to sample: no such field"),
    ],
)
def test_what_fails_every_time_ends_in_one_line(fault: Any, why: str, fake: FakeVllm) -> None:
    sampler = sampler_of(fake)
    fake.faults += repeated(fault, 10)
    with pytest.raises(UserError, match=why) as raised:
        sampler.sample(PROMPTS[2:], SAMPLING, seed=5)
    assert "\n" not in str(raised.value)
    assert len(fake.asked) == (1 if "refuses" in why else 3)


def test_a_server_that_stays_away_ends_in_one_line(fake: FakeVllm, warned: list[warnings.WarningMessage]) -> None:
    sampler = sampler_of(fake, wait_s=1.0)
    fake.stop()
    why = r"did not answer for 1 s \(Connect.*\): start it again and continue with atesd train --resume"
    with pytest.raises(UserError, match=why):
        sampler.sample(PROMPTS, SAMPLING, seed=5)
    fake.start()


def test_a_server_that_never_answered_may_stand_elsewhere(
    fake: FakeVllm, warned: list[warnings.WarningMessage]
) -> None:
    fake.stop()
    with pytest.raises(
        UserError, match=r"did not answer for 0.5 s .*: start it \(docs/vllm\.md\), correct .*engine\.url"
    ):
        sampler_of(fake, wait_s=0.5)
    fake.start()


def test_a_server_that_is_not_there_yet_is_waited_for(fake: FakeVllm, warned: list[warnings.WarningMessage]) -> None:
    fake.stop()
    starter = threading.Timer(0.5, fake.start)
    starter.start()
    assert sampler_of(fake).sample(PROMPTS, SAMPLING, seed=5)
    assert sum("does not answer" in str(each.message) for each in warned) == 1
    starter.join()


@pytest.mark.parametrize("is_under_way", [False, True])
def test_a_server_that_was_started_again_gets_the_adapter_again(
    is_under_way: bool, fake: FakeVllm, warned: list[warnings.WarningMessage]
) -> None:
    """Between two calls, and in the middle of one: nothing of the samples changes."""
    sampler = sampler_of(fake, concurrency=1)
    sampler.sync(weights(1))
    expected = sampler.sample(PROMPTS, SAMPLING, seed=5)

    def restarted(server: FakeVllm, _: Any) -> str:
        server.adapters.clear()
        server._models.clear()
        return "reset"

    if is_under_way:
        fake.faults += [lambda _, answer: answer, restarted]
    else:
        fake.stop()
        fake.start()
    assert sampler.sample(PROMPTS, SAMPLING, seed=5) == expected
    assert any("no longer knows the adapter, as after a restart; it is loaded again" in str(w.message) for w in warned)
    assert [name.rpartition("-")[2] for name in fake.adapters] == ["v1"]
    assert fake.paths[-1] == fake.paths[-2], "the very files of that version"


def test_after_a_failure_the_other_requests_are_not_asked_for_again(
    fake: FakeVllm, warned: list[warnings.WarningMessage]
) -> None:
    """Else their threads would keep the process alive for as long as a server is waited for."""
    sampler = sampler_of(fake, concurrency=4)
    fake.faults += [sends((400, {"error": {"message": "no"}})), *repeated(sends((503, {})), 1000)]
    with pytest.raises(UserError, match="refuses to sample: no"):
        sampler.sample([[2, 13 + place, 3] for place in range(4)], SAMPLING, seed=0)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("atesd-vllm")]
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)


def changed_pico(folder: Path) -> Path:
    """Return a model of the same shape with other weights."""
    model, tokenizer = load(ModelConfig(path=str(PICO)), 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_another_model_behind_the_address_is_refused_whenever_it_comes(
    fake: FakeVllm, tmp_path: Path, warned: list[warnings.WarningMessage]
) -> None:
    """At the start, after a restart, and where the connection broke in a call but the name is known."""
    sampler = sampler_of(fake)
    base = sampler_of(fake, rank=None)
    fake.folder = changed_pico(tmp_path)
    fake.stop()
    fake.start()
    why = r"serves base-model, which is not the base of the model that trains.*differ by .* nats"
    with pytest.raises(UserError, match=why):
        sampler.sample(PROMPTS, SAMPLING, seed=5)
    with pytest.raises(UserError, match=why):
        sampler_of(fake)
    fake.faults.append(sends("reset"))
    with pytest.raises(UserError, match=why):
        base.sample(PROMPTS, SAMPLING, seed=5)


def test_another_model_that_comes_while_the_trainer_updates_is_refused(
    fake: FakeVllm, tmp_path: Path, warned: list[warnings.WarningMessage]
) -> None:
    """It takes the adapter as well, and no request failed: but it does not know the adapter before."""
    sampler = sampler_of(fake)
    fake.folder = changed_pico(tmp_path)
    fake.stop()
    fake.start()
    with pytest.raises(UserError, match=r"differ by .* nats"):
        sampler.sync(weights(1))


@pytest.mark.parametrize(
    ("changed", "settings", "why"),
    [
        ({"name": "other"}, {"model": BASE}, f"serves other, not {BASE}: start it with the model that trains"),
        ({"vocabulary": 31}, {}, r"\(it refuses token 31, the last of 32: allowed_token_ids contains"),
        ({"vocabulary": 33}, {}, r"\(it has more tokens than 32\)"),
        ({"max_rank": 1}, {}, r"takes no adapter of rank 2 \(LoRA rank 2 is greater.*start it with --max-lora-rank 8"),
        ({"allows_updates": False}, {}, "has no /v1/load_lora_adapter .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        ({"max_length": 20}, {}, "context of 20 tokens, and the text .*: start it with a larger --max-model-len"),
        ({"key": "k"}, {}, r"VLLM_API_KEY is not set \(Unauthorized\): let it hold what the server .*--api-key"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_at_the_start(
    changed: dict[str, Any], settings: dict[str, Any], why: str
) -> None:
    with FakeVllm(**changed) as fake, pytest.raises(UserError, match=why):
        sampler_of(fake, **settings)


def test_a_key_that_is_not_the_servers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeVllm(key="theirs") as fake:
        monkeypatch.setenv("VLLM_API_KEY", "ours")
        with pytest.raises(UserError, match="VLLM_API_KEY is not the one that it wants"):
            sampler_of(fake)
        monkeypatch.setenv("VLLM_API_KEY", "theirs")
        assert sampler_of(fake).sample(PROMPTS[1:2], SAMPLING, seed=5)


def test_an_address_that_lists_no_models_is_refused(fake: FakeVllm) -> None:
    """As with /v1 behind it, which clients of OpenAI's want."""
    with pytest.raises(UserError, match=r"status 404 at /v1/models \(Not Found\): .* vLLM server, without /v1"):
        VllmEngine(url=f"{fake.url}/v1", wait_s=5.0).build(*loaded())


def test_a_server_that_completes_no_text_is_refused_at_the_start(
    fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "_sampled", lambda _: (405, {"detail": "Not Allowed"}))
    with pytest.raises(UserError, match=r"refuses to continue a text \(Not Allowed\): it must be vLLM 0\.10\.2"):
        sampler_of(fake)


def test_a_folder_that_cannot_be_made_is_named_with_its_setting(fake: FakeVllm, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"cannot be written to .*file.* \(Not a directory\): .* rollout\.engine\.adapters"
    ):
        sampler_of(fake, adapters=str(tmp_path / "file"))
    assert not fake.adapters


def test_a_server_of_something_else_is_refused(fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "_cards", lambda: None)
    with pytest.raises(UserError, match=r"answers, but lists no models at /v1/models"):
        sampler_of(fake)


def test_a_prompt_that_the_server_has_no_room_for_is_refused() -> None:
    long = SAMPLING.model_copy(update={"max_new_tokens": 130})
    with FakeVllm(max_length=133) as fake:
        sampler = sampler_of(fake)
        with pytest.raises(
            UserError, match=r"prompt of 4 tokens .* of up to 130 .* context of 133: start it with a larger"
        ):
            sampler.sample(PROMPTS, long, seed=5)
        assert sampler.sample(PROMPTS[1:2], long, seed=5)


def test_other_weights_under_the_adapters_name_are_noticed_before_a_call(
    fake: FakeVllm, warned: list[warnings.WarningMessage]
) -> None:
    """They are thrown out, and ours are loaded under a new name: caches may hold the others' under the old one."""
    sampler = sampler_of(fake)
    sampler.sync(weights(1))
    (name,) = fake.adapters
    fake.adapters[name] = fake.paths[0]
    turns = sampler.sample(PROMPTS, SAMPLING, seed=5)
    assert any("under the adapter's name it has other weights, of" in str(each.message) for each in warned)
    assert name not in fake.adapters
    assert list(fake.adapters.values()) == [fake.paths[1]]
    assert {turn.weights_version for turn in turns} == {1}


def test_completions_of_an_adapter_that_was_replaced_meanwhile_are_thrown_away(
    fake: FakeVllm, warned: list[warnings.WarningMessage]
) -> None:
    sampler = sampler_of(fake)
    expected = sampler.sample(PROMPTS[:1], SAMPLING, seed=5)

    def replaced(server: FakeVllm, answer: Any) -> Any:
        server.adapters[answer["model"]] = "/elsewhere"
        return with_first(token_ids=[1], logprobs={"token_logprobs": [-9.0]}, finish_reason="stop")(server, answer)

    fake.faults.append(replaced)
    assert sampler.sample(PROMPTS[:1], SAMPLING, seed=5) == expected
    fake.faults += repeated(replaced, 3)
    with pytest.raises(UserError, match="was replaced by another in 3 calls running"):
        sampler.sample(PROMPTS[:1], SAMPLING, seed=5)


def test_weights_older_than_the_lag_are_not_sampled_from(fake: FakeVllm, warned: list[warnings.WarningMessage]) -> None:
    """A load that fails leaves the version before, which `max_lag` may allow; completions say how old they are."""
    refused = sends((500, {"error": {"message": "no memory for LoRA"}}))

    def unloaded(server: FakeVllm, answer: Any) -> Any:
        server.adapters.pop(list(server.adapters)[-1])
        return refused(server, answer)

    strict, lenient = sampler_of(fake), sampler_of(fake, max_lag=1)
    for sampler in (strict, lenient):
        sampler.sync(weights(1))
    fake.load_faults += repeated(unloaded, 3)
    with pytest.raises(UserError, match=r"does not take the adapter .*no memory for LoRA"):
        strict.sync(weights(2))
    with pytest.raises(UserError, match=r"has the weights after update 1, 1 behind .*max_lag = 0"):
        strict.sample(PROMPTS, SAMPLING, seed=5)
    lenient.sync(weights(2))
    assert "completions are 1 updates old meanwhile" in str(warned[-1].message)
    assert {turn.weights_version for turn in lenient.sample(PROMPTS, SAMPLING, seed=5)} == {1}
    with pytest.raises(UserError, match="no memory for LoRA"):
        lenient.sync(weights(3))


def test_a_load_whose_answer_is_lost_is_not_refused_as_done_already(
    fake: FakeVllm, warned: list[warnings.WarningMessage]
) -> None:
    sampler = sampler_of(fake)
    fake.load_faults.append(sends("reset"))
    sampler.sync(weights(1))
    assert [name.rpartition("-")[2] for name in fake.adapters] == ["v1"]


def test_an_adapter_that_is_forgotten_before_it_is_listed_is_loaded_again(
    fake: FakeVllm, warned: list[warnings.WarningMessage]
) -> None:
    """As where the server is started anew between the load and the look whether it took it."""
    sampler = sampler_of(fake)
    asked: list[str] = []

    def forgotten(server: FakeVllm, answer: Any) -> Any:
        asked.extend(server.adapters)
        server.adapters.clear()
        return answer

    fake.load_faults += repeated(forgotten, 2)
    sampler.sync(weights(1))
    assert [path.rpartition("-v")[2] for path in fake.paths] == ["0", "1", "1", "1"]
    assert [name.rpartition("-")[2] for name in fake.adapters] == ["v1"]
    assert not {*asked} & {*fake.adapters}, "each loading has a name of its own"
    assert {turn.weights_version for turn in sampler.sample(PROMPTS, SAMPLING, seed=5)} == {1}
    fake.load_faults += repeated(forgotten, 3)
    with pytest.raises(UserError, match=r"took the adapter in .* 3 times, but does not list it"):
        sampler.sync(weights(2))


def test_an_adapter_that_is_listed_elsewhere_is_given_up_and_holds_no_place(fake: FakeVllm) -> None:
    sampler = sampler_of(fake)

    def moved(server: FakeVllm, answer: Any) -> Any:
        server.adapters[list(server.adapters)[-1]] = "/elsewhere"
        return answer

    (before,) = fake.adapters
    fake.load_faults += repeated(moved, 3)
    with pytest.raises(UserError, match=r"took the adapter in .* 3 times, but does not list it"):
        sampler.sync(weights(1))
    assert list(fake.adapters) == [before]


def test_an_engine_process_that_died_is_waited_for_while_an_adapter_is_loaded(
    fake: FakeVllm, warned: list[warnings.WarningMessage]
) -> None:
    sampler = sampler_of(fake)

    def died(server: FakeVllm, _: Any) -> Any:
        server.adapters.clear()
        return 500, {"error": {"message": "EngineCore encountered an issue."}}

    fake.load_faults.append(died)
    sampler.sync(weights(1))
    assert [name.rpartition("-")[2] for name in fake.adapters] == ["v1"]


def test_a_model_without_an_adapter_samples_but_cannot_be_trained(fake: FakeVllm) -> None:
    sampler = sampler_of(fake, rank=None)
    assert {turn.weights_version for turn in sampler.sample(PROMPTS, SAMPLING, seed=5)} == {0}
    assert {body["model"] for body in fake.asked} == {BASE}
    assert fake.paths == []
    for refused in (lambda: sampler.refuse_training(SAMPLING), lambda: sampler.sync(weights(1))):
        with pytest.raises(UserError, match=r"all weights train, which vLLM takes over no route .* model.lora = \{\}"):
            refused()


def test_a_model_without_an_adapter_is_the_servers_by_its_path(tmp_path: Path) -> None:
    """A model that was trained a little from the one that is served must not be taken for it."""
    model, tokenizer = load(ModelConfig(path="pico"), 0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with FakeVllm(folder=tmp_path) as fake:
        with pytest.raises(UserError, match=rf"serves {tmp_path}, and the model is that of .*pico: start it with"):
            sampler_of(fake, rank=None)
        sampler_of(fake, rank=None, model=BASE)
        sampler_of(fake)


UNCUT, CUT = {"top_p": 1.0, "top_k": 0}, {"top_p": 0.9, "top_k": 0}


@pytest.mark.parametrize(
    ("is_processed", "changed", "why"),
    [
        (False, {"temperature": 1.0} | UNCUT, ""),
        (False, {"temperature": 1.0} | CUT, ""),
        (False, {"temperature": 0.7} | UNCUT, "start it with --logprobs-mode processed_logprobs"),
        (False, {"temperature": 0.7} | CUT, "no vLLM server gives the log-probabilities"),
        (False, {"temperature": 0.0} | UNCUT, ""),
        (True, {"temperature": 1.0} | UNCUT, ""),
        (True, {"temperature": 1.0} | CUT, "start it with --logprobs-mode raw_logprobs"),
        (True, {"temperature": 1.0, "top_p": 1.0, "top_k": 5}, "start it with --logprobs-mode raw_logprobs"),
        (True, {"temperature": 0.7} | UNCUT, ""),
        (True, {"temperature": 0.7} | CUT, "no vLLM server gives the log-probabilities"),
    ],
)
def test_log_probabilities_are_of_the_tempered_untruncated_distribution_or_absent(
    is_processed: bool, changed: dict[str, float], why: str
) -> None:
    """Evaluation does without; training is refused."""
    sampling = SAMPLING.model_copy(update=changed)
    with FakeVllm(is_processed=is_processed) as fake:
        sampler = sampler_of(fake)
        (turn,) = sampler.sample(PROMPTS[:1], sampling, seed=5)
        assert bool(turn.logprobs) == (not why)
        if why:
            with pytest.raises(UserError, match=why):
                sampler.refuse_training(sampling)
        else:
            sampler.refuse_training(sampling)


def test_log_probabilities_of_an_unknown_kind_are_refused(fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    forced = fake._forced

    def logits(body: dict[str, Any]) -> Any:
        answer = forced(body)
        return answer if isinstance(answer, tuple) else with_first(logprobs={"token_logprobs": [-0.1]})(fake, answer)

    monkeypatch.setattr(fake, "_forced", logits)
    with pytest.raises(UserError, match=r"gives a token the log-probability -0.1, the model that trains gives it -"):
        sampler_of(fake)


def test_no_prompt_is_no_request(fake: FakeVllm) -> None:
    assert sampler_of(fake).sample([], SAMPLING, seed=0) == []
    assert fake.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://here",
        "",
        "http://",
        "http://:8000",
        "http://here:80a",
        "http://here:8000 ",
        "http://[::1",
    ],
)
def test_an_address_is_one_of_http(url: str) -> None:
    for given in (url, ["http://here:8000", url]):
        with pytest.raises(ValueError, match="is no address of a server, such as") as told:
            VllmEngine.model_validate({"url": given})
        assert told.value.error_count() == 1
    assert VllmEngine(url="https://[::1]:8000/behind").urls == ("https://[::1]:8000/behind",)


def test_a_list_of_no_address_says_what_to_write() -> None:
    with pytest.raises(ValueError, match=r'a list of no server: name one, such as "http://127\.0\.0\.1:8000"'):
        VllmEngine.model_validate({"url": []})


def test_a_recipe_chooses_it_by_kind() -> None:
    config = RunConfig.model_validate({"rollout": {"engine": {"kind": "vllm", "max_lag": 2}}})
    assert config.rollout.engine == VllmEngine(max_lag=2)
    assert not VllmEngine().samples_in_place
    assert VllmEngine().path(torch.nn.Linear(1, 1), 5) == "the vLLM server at http://127.0.0.1:8000"
