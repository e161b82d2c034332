"""A pruned model in llama.cpp: converted to GGUF, it generates the same greedy tokens as in Transformers.

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-0.3.36.tar.gz
    CMAKE_BUILD_PARALLEL_LEVEL=2 pip install ./llama_cpp_python-0.3.36 && pip install --no-deps sentencepiece
    python tests/benchmarks/interchange.py llama_cpp_python-0.3.36/vendor/llama.cpp

The first line is there for llama.cpp's own `convert_hf_to_gguf.py`, which the source distribution carries; `sentencepiece`
is what that imports. The model is the embedded one without seven layers, in float32 on both sides.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import llama_cpp
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from hf_layerprobe import prune_layers
from hf_layerprobe.embedded import embedded_model, embedded_texts

PROMPT = 32  # tokens
CACHE = dict(type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)  # 16 bits by default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_cpp_folder", type=Path, help="with convert_hf_to_gguf.py")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=50, help="to generate from each")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "smaller"
        model = prune_layers(embedded_model(), remove=range(12, 19), output_dir=target, tokenizer=tokenizer).eval()
        converter = arguments.llama_cpp_folder / "convert_hf_to_gguf.py"
        command = [sys.executable, converter, target, "--outtype", "f32", "--outfile", target / "model.gguf"]
        subprocess.run(command, check=True, capture_output=True)
        llama = llama_cpp.Llama(str(target / "model.gguf"), n_ctx=512, verbose=False, **CACHE)
        texts = embedded_texts()[: arguments.prompts]
        same_prompts = same_runs = 0
        for text in texts:
            prompt = tokenizer(text).input_ids[:PROMPT]
            same_prompts += llama.tokenize(text.encode(), add_bos=False)[:PROMPT] == prompt
            llama.reset()
            found = list(islice(llama.generate(prompt, temp=0.0), arguments.tokens))
            limits = dict(min_new_tokens=arguments.tokens, max_new_tokens=arguments.tokens)
            expected = model.generate(torch.tensor([prompt]), do_sample=False, **limits)[0, PROMPT:].tolist()
            same_runs += found == expected
    print(
        f"{model.config.num_hidden_layers} layers, llama-cpp-python {llama_cpp.__version__}: {same_prompts} of {len(texts)} prompts "
        f"are the same tokens, {same_runs} of {len(texts)} continuations the same {arguments.tokens} greedy tokens."
    )


if __name__ == "__main__":
    main()
