"""Fakes for sampling without weights: a byte tokenizer that chats, and a sampler that replies by script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from atesd.envs.base import Environment
from atesd.envs.single_turn import SingleTurn
from atesd.exposure.prompt import PromptConfig, student_messages
from atesd.rollout.driver import Driver
from atesd.rollout.grading import RewardFunction
from atesd.rollout.render import Renderer
from atesd.rollout.sampler import SamplingConfig, Weights
from atesd.types import StopReason, Turn

END = "<|im_end|>"
PADDING = "<|endoftext|>"

# Qwen3's layout: a thinking flag of False closes an empty think block in the assistant's header.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}"""
# Qwen3's treatment of history: the thinking of a reply is dropped as soon as a user's message follows.
FORGETFUL_TEMPLATE = """\
{%- set last = namespace(user=-1) -%}
{%- for message in messages if message['role'] == 'user' -%}{% set last.user = loop.index0 %}{%- endfor -%}
{%- set seen = namespace(users=-1) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{%- set seen.users = seen.users + 1 -%}{%- endif -%}
{%- set content = message['content'] -%}
{%- if message['role'] == 'assistant' and seen.users < last.user -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
PLAIN_TEMPLATE = "{%- for message in messages -%}{{ message['content'] + '\\n' }}{%- endfor -%}"


def byte_tokenizer(*, pad: str | None = PADDING, template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerBase:
    """Return a byte-level tokenizer: one id a byte of UTF-8, and ids of its own for the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([PADDING, "<|im_start|>", END])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine, eos_token=END, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


@dataclass
class FakeSampler:
    """Replies `reply(prompt text, place in the request)`, closed by EOS, cut at `max_new_tokens`."""

    renderer: Renderer
    reply: Callable[[str, int], str]
    requests: list[int] = field(default_factory=list)
    """Number of prompts of each call."""
    seeds: list[int] = field(default_factory=list)
    version: int = 0

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        seed: int,
        part: Sequence[int] | None = None,
    ) -> list[Turn]:
        self.requests.append(len(prompts))
        self.seeds.append(seed)
        wanted = range(len(prompts)) if part is None else part
        return [self._turn(prompts[place], place, sampling.max_new_tokens) for place in wanted]

    def sync(self, weights: Weights) -> None:
        self.version = weights.version

    def _turn(self, prompt: Sequence[int], place: int, limit: int) -> Turn:
        ids = [*self.renderer.text_ids(self.reply(self.renderer.prompt_text(prompt), place)), self.renderer.eos_ids[0]]
        return Turn(
            prompt_ids=tuple(prompt),
            completion_ids=tuple(ids[:limit]),
            logprobs=(-1.0,) * len(ids[:limit]),
            text=self.renderer.decode(ids[:limit]),
            stop=StopReason.EOS if len(ids) <= limit else StopReason.LENGTH,
            weights_version=self.version,
        )


def fake_driver(
    reply: Callable[[str, int], str],
    reward: RewardFunction,
    environment: Environment | None = None,
    template: str = CHAT_TEMPLATE,
) -> tuple[Driver, FakeSampler]:
    """Return a driver around a `FakeSampler` and a byte tokenizer."""
    renderer = Renderer(byte_tokenizer(template=template))
    sampler = FakeSampler(renderer, reply)
    prompt = PromptConfig(student="{problem}")
    driver = Driver(
        sampler=sampler,
        renderer=renderer,
        environment=environment or SingleTurn(),
        student_messages=lambda problem: student_messages(problem, prompt),
        reward=reward,
    )
    return driver, sampler
