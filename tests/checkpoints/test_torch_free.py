"""A gateway reads models without loading torch: an import contract alone does not see what is loaded."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_using_a_model_does_not_load_torch() -> None:
    code = """
import sys
from diphase.checkpoints.chat_template import load_chat_template
from diphase.checkpoints.hub import fetch_snapshot
from diphase.checkpoints.lookup import resolve
from diphase.checkpoints.tokenizer import load_tokenizer
from diphase.checkpoints.weights import open_weights
import huggingface_hub
files = resolve("smollm2")
open_weights(files).read("model.norm.weight")
tokenizer = load_tokenizer(files)
prompt = load_chat_template(files).render([{"role": "user", "content": "Hi"}])
assert tokenizer.decode(tokenizer.encode(prompt, False))
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    assert run(code) == "False False\n"
