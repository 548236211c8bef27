from __future__ import annotations

import json
from typing import Any

import pytest
from diphase.checkpoints.chat_template import load_chat_template
from diphase.checkpoints.dummy import PRESETS
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.tokenizer import load_tokenizer
from diphase.proto.errors import CheckpointError


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_need_no_files(preset: str) -> None:
    files = resolve(f"dummy:{preset}")
    assert files.is_dummy
    assert files.weight_files == ()
    assert files.config.num_layers == PRESETS[preset].num_layers
    assert files.config.eos_token_ids == (1,)


def test_a_config_file_gives_the_shape(make: Any) -> None:
    path = make.folder / "shape.json"
    path.write_text(json.dumps(make.config(num_hidden_layers=7)))
    assert resolve(f"dummy:{path}").config.num_layers == 7


def test_the_seed_is_part_of_the_identity() -> None:
    names = ["dummy:tiny", "dummy:tiny@1", "dummy:tiny@2", "dummy:smollm2-135m"]
    assert len({resolve(name).fingerprint for name in names}) == 4
    assert resolve("dummy:tiny@17").seed == 17
    assert resolve("dummy:tiny@0").fingerprint == resolve("dummy:tiny").fingerprint


@pytest.mark.parametrize("text", ["Hello, world", "ünï — 😀\n\tcode();", "", "\x00\x7f"])
def test_any_text_survives_its_byte_level_tokenizer(text: str) -> None:
    tokenizer = load_tokenizer(resolve("dummy:tiny"))
    ids = tokenizer.encode(text, add_special=True)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_every_id_that_a_random_model_may_sample_reads_as_text() -> None:
    files = resolve("dummy:smollm2-135m")
    tokenizer = load_tokenizer(files)
    assert tokenizer.vocab_size == files.config.vocab_size
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    assert all(pieces)
    assert len(set(pieces)) == len(pieces)
    assert tokenizer.decode([1, 300, 258, 0]) == pieces[300].decode() + pieces[258].decode()


def test_messages_become_a_prompt() -> None:
    template = load_chat_template(resolve("dummy:tiny"))
    assert template.render([{"role": "user", "content": "Hi"}]) == "user: Hi\nassistant: "


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dummy:huge", "'huge' is no preset and no file; write dummy:PRESET, one of tiny"),
        ("dummy:", "names no shape"),
        ("dummy:tiny@x", "'tiny@x' is no preset"),
    ],
)
def test_unknown_shapes_name_the_known_ones(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve(name)


def test_a_vocabulary_below_the_bytes_is_an_error(make: Any) -> None:
    path = make.folder / "small.json"
    path.write_text(json.dumps(make.config(vocab_size=100)))
    with pytest.raises(CheckpointError, match="vocabulary of 100; its byte-level tokenizer needs 258"):
        resolve(f"dummy:{path}")
