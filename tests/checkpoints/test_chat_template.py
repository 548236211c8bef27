from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
from diphase.checkpoints.chat_template import ChatTemplate, load_chat_template
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.model_files import ModelFiles
from diphase.proto.errors import CheckpointError, InvalidRequest

MESSAGES = [{"role": "user", "content": "Hi <b>&'\" ünï"}]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " one "},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two\n"},
]
LLAMA3_LIKE = """{{- bos_token }}
{%- set date = strftime_now("%d %b %Y") %}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message['role']) }}
    {%- endif %}
    {%- if message.role == 'system' and date is defined %}{{- "Today: " + date + "\\n" }}{% endif %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if tools is not none %}{{- tools | tojson(indent=4) }}{% endif %}
{% if add_generation_prompt %}
{{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""


def template(source: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate(source, tokens, model="m", now=lambda: datetime(2026, 3, 4, 5, 6))


def test_the_built_in_models_prompt(smollm2: ModelFiles, smollm2_gguf: ModelFiles) -> None:
    expected = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
    )
    for files in (smollm2, smollm2_gguf):
        loaded = load_chat_template(files)
        assert loaded.available
        messages = [{"role": "user", "content": "Hi"}]
        assert loaded.render(messages) == expected + "<|im_start|>assistant\n"
        assert loaded.render(messages, add_generation_prompt=False) == expected


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("messages", [MESSAGES, CONVERSATION], ids=["one", "several"])
@pytest.mark.parametrize("source", [LLAMA3_LIKE, None], ids=["llama3-like", "built-in"])
def test_rendering_equals_that_of_transformers(
    smollm2: ModelFiles, source: str | None, messages: list[dict[str, str]], generation_prompt: bool
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    if source is None:
        assert smollm2.path is not None
        source = json.loads((smollm2.path / "tokenizer_config.json").read_text())["chat_template"]
        ours = load_chat_template(smollm2)
    else:
        source = source.replace('strftime_now("%d %b %Y")', '"today"')
        ours = template(source, bos_token="<s>")
    rendered: Any = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=generation_prompt, bos_token="<s>"
    )
    assert ours.render(messages, add_generation_prompt=generation_prompt) == rendered[0][0]


def test_the_date_is_the_callers() -> None:
    assert "Today: 04 Mar 2026" in template(LLAMA3_LIKE, bos_token="").render(CONVERSATION)


def test_json_keeps_characters_that_html_would_escape() -> None:
    source = "{{ messages[0] | tojson }}|{{ {'b': 1, 'a': [1]} | tojson(indent=2, sort_keys=true) }}"
    rendered = template(source).render(MESSAGES)
    assert rendered == (
        '{"role": "user", "content": "Hi <b>&\'\\" ünï"}|{\n  "a": [\n    1\n  ],\n  "b": 1\n}'
    )


def test_blocks_for_training_and_loop_controls_are_known() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert template(source).render(CONVERSATION) == "Be brief. one "


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages + 1 }}", "can only concatenate list"),
        ("{{ 'x' | int('y') + none }}", "refuses these messages"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_failure_of_the_template_is_the_requests(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        template(source).render(MESSAGES)


def test_the_reason_of_a_failure_is_short_however_much_it_quotes() -> None:
    long = [{"role": "x" * 100_000, "content": ""}]
    with pytest.raises(InvalidRequest, match="unknown role xxx") as caught:
        template(LLAMA3_LIKE, bos_token="").render(long)
    assert len(caught.value.message) < 1000


def test_a_template_cannot_change_the_callers_messages() -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(InvalidRequest):
        template("{{ messages[0].update({'content': 'y'}) }}").render(messages)
    assert messages == [{"role": "user", "content": "x"}]


def test_a_template_that_does_not_compile_is_reported_when_it_is_wanted() -> None:
    broken = template("{% if %}")
    assert not broken.available
    with pytest.raises(
        InvalidRequest, match=r"chat template of model m does not compile: .*send a prompt instead"
    ):
        broken.render(MESSAGES)


def test_a_model_without_a_template_says_so(make: Any) -> None:
    for path in (make.directory(), make.gguf(tokenizer__chat_template=None)):
        loaded = load_chat_template(resolve(str(path)))
        assert not loaded.available
        with pytest.raises(InvalidRequest, match=f"model {path} has no chat template; send a prompt instead"):
            loaded.render(MESSAGES)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": "config"}}, "config"),
        (
            {"tokenizer_config.json": {"chat_template": "config"}, "chat_template.jinja": "own file"},
            "own file",
        ),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "tools"},
                        {
                            "name": "default",
                            "template": "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}",
                        },
                    ],
                    "bos_token": "<s>",
                    "eos_token": {"content": "</s>"},
                    "pad_token": None,
                }
            },
            "<s></s>False",
        ),
    ],
)
def test_a_template_is_found_wherever_directories_keep_it(
    make: Any, files: dict[str, Any], expected: str
) -> None:
    assert load_chat_template(resolve(str(make.directory(files=files)))).render(MESSAGES) == expected


def test_a_list_without_a_default_is_no_template(make: Any) -> None:
    files = {"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "x"}]}}
    assert not load_chat_template(resolve(str(make.directory(files=files)))).available


def test_a_template_file_that_is_no_text_is_an_error(make: Any) -> None:
    path = make.directory()
    (path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        load_chat_template(resolve(str(path)))
