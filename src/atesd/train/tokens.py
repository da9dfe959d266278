"""Load a tokenizer, with its own chat template or the recipe's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from atesd.train.hub import base_of_adapter, cached_in_part, locate
from atesd.types import UserError, first_line

_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"
PLAIN = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{ message['content'] + eos_token }}
{%- else -%}{{ message['content'] }}
{%- endif -%}
{{ '\\n\\n' }}
{%- endfor -%}"""
"""Texts without roles, a blank line behind each, for base models; a reply is closed by the end token."""


def load_tokenizer(path: str, revision: str | None = None, template: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has a chat template, its own or the recipe's `template` (see `PromptConfig`).

    EOS stands in for a missing pad token, since masks go by length. An adapter without a tokenizer has its base's.
    """
    where, base = locate(path, revision), base_of_adapter(path)
    if base is not None and not (Path(path) / "tokenizer_config.json").is_file():
        path = base.path
        where = locate(path, base.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **where)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if "local_files_only" in where:
            raise cached_in_part(path) from error
        raise UserError(
            f"no tokenizer could be loaded from {path!r} ({first_line(error)}): "
            "save one beside the model with tokenizer.save_pretrained(...)"
        ) from error
    if not tokenizer.encode("0", add_special_tokens=False):
        if "local_files_only" in where:
            raise cached_in_part(path)
        raise UserError(f"the tokenizer in {path!r} encodes nothing: its files are missing or damaged; save them again")
    if template is not None:
        tokenizer.chat_template = chosen_template(template, tokenizer)
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer in {path!r} has no chat template: use an instruction-tuned model, or set "
            'prompt.chat_template = "plain", or to a file with a template'
        )
    if "strftime_now" in str(tokenizer.chat_template):
        warnings.warn(
            f"the chat template of {path!r} writes today's date into prompts, so that a run resumed or repeated "
            "on another day reads others: set prompt.chat_template to a copy with a fixed date",
            stacklevel=2,
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {path!r} has no EOS token: completions could never end; set eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.deprecation_warnings[_TOO_LONG] = True  # as if told already: texts that do not fit are named elsewhere
    _try_chat_template(path if template is None else None, tokenizer)
    return cast("PreTrainedTokenizerBase", tokenizer)


def chosen_template(template: str, tokenizer: Any) -> str:
    """Return the Jinja text of a recipe's `prompt.chat_template`: "plain", a text with braces, or a file's.

    The plain one begins with the token that the tokenizer itself puts in front of a text, if it does. UserError where
    the file cannot be read.
    """
    if template == "plain":
        begins = tokenizer.bos_token is not None and tokenizer.encode("0")[0] == tokenizer.bos_token_id
        return "{{- bos_token -}}\n" + PLAIN if begins else PLAIN
    if "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"prompt.chat_template = {template!r} cannot be read ({first_line(error)}): give 'plain', a file with a "
            "Jinja template, or the template itself"
        ) from error


def _try_chat_template(path: str | None, tokenizer: Any) -> None:
    """Render a question, which must be shown; a template is a program, and may fail in any way."""
    whose = "prompt.chat_template" if path is None else f"the chat template of the tokenizer in {path!r}"
    remedy = "mend it" if path is None else "mend its chat_template.jinja"
    question = "1 + 1 = ?"
    try:
        shown = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:
        raise UserError(
            f"{whose} does not render a question ({type(error).__name__}: {first_line(error)}): {remedy}"
        ) from error
    if question not in shown:  # a name that a message lacks is the empty text to it
        raise UserError(
            f"{whose} leaves out what the user says, as it reads something else than a message's role and content "
            f"(it writes {shown!r:.60}): {remedy}"
        )
