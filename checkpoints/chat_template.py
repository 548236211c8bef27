"""A model's chat template: messages to the one prompt text that the model was trained on.

Templates are Jinja programs that come with the weights, so they run in a sandbox and their failures are the
request's, never the gateway's. Filters and globals are those that transformers gives them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..proto.errors import InvalidRequest
from . import dummy
from .directory import CHAT_TEMPLATE, TOKENIZER_CONFIG, optional_json, special_token
from .gguf import GgufFile
from .gguf_tokenizer import special_tokens
from .model_files import ModelFiles, ModelKind, read_text

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RecursionError,
)
"""What a template's own code can raise."""

_MAX_REASON = 500
"""Characters: a template's own message may quote the whole conversation, and a status has to fit a header."""

Now = Callable[[], datetime]


class ChatTemplate:
    """A compiled template, or the knowledge that there is none."""

    def __init__(
        self,
        source: str | None,
        special_tokens: Mapping[str, str] | None = None,
        *,
        model: str,
        now: Now = datetime.now,
    ) -> None:
        """`special_tokens` are variables of the template (bos_token, eos_token, …); `model` names it in
        errors; `now` answers the template's strftime_now."""
        self._template: jinja2.Template | None = None
        self._variables = dict(special_tokens or {})
        self._absence = f"model {model} has no chat template; send a prompt instead of chat messages"
        if source is None:
            return
        try:
            self._template = _environment(now).from_string(source)
        except _TEMPLATE_ERRORS as error:
            self._absence = (
                f"the chat template of model {model} does not compile: {error}; send a prompt instead"
            )

    @property
    def available(self) -> bool:
        """Whether messages can be rendered."""
        return self._template is not None

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt for messages of `role` and `content`; with `add_generation_prompt` it ends where the
        assistant's answer begins. The template writes the special tokens: encode without adding them.

        Raises:
            InvalidRequest: the model has no template, or the template refuses these messages.
        """
        if self._template is None:
            raise InvalidRequest(self._absence)
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except _TEMPLATE_ERRORS as error:
            reason = str(error)[:_MAX_REASON]
            raise InvalidRequest(f"the model's chat template refuses these messages: {reason}") from error


def load_chat_template(files: ModelFiles, *, now: Now = datetime.now) -> ChatTemplate:
    """The chat template of a resolved model; without one, an object whose render says so.

    Raises:
        CheckpointError: a file that should hold it cannot be read.
    """
    source: str | None
    tokens: Mapping[str, str]
    if files.path is None:
        source, tokens = dummy.CHAT_TEMPLATE, {"bos_token": dummy.BOS, "eos_token": dummy.EOS}
    elif files.kind is ModelKind.GGUF:
        gguf = GgufFile(files.path)
        source, tokens = gguf_template(gguf), special_tokens(gguf)
    else:
        config = optional_json(files.path / TOKENIZER_CONFIG)
        found = {name: special_token(config, name) for name in _SPECIAL_TOKENS}
        tokens = {name: token for name, token in found.items() if token is not None}
        path = files.path / CHAT_TEMPLATE
        source = read_text(path) if path.is_file() else _configured_template(config)
    return ChatTemplate(source, tokens, model=files.name, now=now)


def gguf_template(gguf: GgufFile) -> str | None:
    """The template in a GGUF file's metadata."""
    source = gguf.metadata.get("tokenizer.chat_template")
    return source if isinstance(source, str) else None


def _configured_template(config: Mapping[str, object]) -> str | None:
    """tokenizer_config.json has one template, or a list of named ones of which `default` is used."""
    value = config.get("chat_template")
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, dict) and entry.get("name") == "default":
            value = entry.get("template")
    return value if isinstance(value, str) else None


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it only
    passes."""

    tags = {"generation"}  # noqa: RUF012 - declared so by the base class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: Now) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes characters of HTML, which a prompt must keep."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
