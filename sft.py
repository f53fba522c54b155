"""Supervised fine-tuning: teaches a model to write completions like those of the data, as the starting point of GRPO.

    python sft.py                                          # MODEL=auto: tiny on a CPU, Qwen2.5-1.5B with QLoRA on a GPU
    python sft.py --model=Qwen/Qwen2.5-0.5B --load_4bit=0

MODEL=tiny is a Qwen2 of 0.9 million parameters trained from scratch on words, for machines without a GPU or a model hub.
Everything else is a Hugging Face causal LM, by name or by path. Loss on the completion alone, its end-of-sequence token
included. Differs from the usual trainer: no padding mask is needed (right padding under causal attention), and the output
layer sees completion tokens only, so the logits of a 152k vocabulary never fill the memory.
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import GenerationConfig

import reward

# Run
TASK = "game24"
MODEL = "auto"               # tiny, a hub name or a folder; auto: tiny without a CUDA device, else DEFAULT_MODEL
DEFAULT_MODEL = "Qwen/Qwen2.5-1.5B-Instruct"
REVISION = ""                # commit, tag or branch of a hub model; empty: the default branch
OUT = ""                     # root folder of the run; empty: runs/TASK
DATA = ""                    # folder of train.jsonl and val.jsonl; empty: OUT/data
RESUME = 1                   # 0: start anew where a finished run of other constants is
SEED = 0
THREADS = 0                  # CPU threads; 0: one for each core
# Model
LOAD_4BIT = 1                # NF4 with double quantisation; 0: bf16 on a GPU, fp32 on a CPU
LORA_RANK = 32               # on all linear layers; 0: train all weights
LORA_ALPHA = 64              # the update is scaled by LORA_ALPHA / LORA_RANK
BF16 = 1                     # bf16 matrix products where the processor has them; weights stay in fp32
GRADIENT_CHECKPOINTING = 1   # recompute activations in the backward pass: less memory, a third more time
# Training
STEPS = 600                  # optimizer steps
LR = 2e-4                    # peak; about ten times that of training all weights
WARMUP = 0.03                # share of STEPS with a rising learning rate, then a cosine to MIN_LR
MIN_LR = 0.1                 # last learning rate as a share of LR
MUON_LR = 0.0                # of the matrices by Muon, for training from scratch; 0: AdamW trains everything
WEIGHT_DECAY = 0.0
OPTIMIZER_8BIT = 1           # paged 8-bit AdamW of bitsandbytes on a GPU; on a CPU AdamW has 32 bits
GRAD_CLIP = 1.0              # norm of the gradient
BATCH_TOKENS = 16384         # tokens of an optimizer step, padding included
MICRO_BATCH_TOKENS = 4096    # tokens of a forward pass: lower it when memory runs out, the result stays the same
MAX_TOKENS = 1536            # longer samples are left out, and counted
HEAD_CHUNK = 2048            # completion tokens whose logits exist at a time
# Evaluation
LOG_EVERY = 20               # steps between lines on the screen; log.jsonl has every step
EVAL_EVERY = 200             # steps between evaluations on val; the best by loss is kept
EVAL_ROWS = 64               # rows of val that are sampled for accuracy
EVAL_BATCH = 64              # completions sampled at a time
TEMPERATURE = 0.7
TOP_P = 0.9
MAX_NEW_TOKENS = 1024
# What MODEL=tiny has instead, where the command line does not say otherwise
TINY = {"MODEL": "tiny", "LOAD_4BIT": 0, "LORA_RANK": 0, "GRADIENT_CHECKPOINTING": 0, "OPTIMIZER_8BIT": 0, "STEPS": 3600, "LR": 3e-3, "MUON_LR": 3e-3,
        "MIN_LR": 0.05, "WARMUP": 0.05, "WEIGHT_DECAY": 0.05, "BATCH_TOKENS": 2048, "MAX_NEW_TOKENS": 256, "EVAL_EVERY": 1200}
TINY_SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


def override_constants(argv: list[str], is_tiny=lambda given: False) -> dict:
    """Sets the CAPS constants of this file and of reward.py from `--name=value`; returns all of them.

    Exits with the nearest names where there is no such constant, and with the type where a value does not fit.
    """
    scopes = {name: scope for scope in (vars(reward), globals()) for name, value in list(scope.items())
              if re.fullmatch("[A-Z][A-Z0-9_]*", name) and isinstance(value, (int, float, str))}
    source = "\n".join(Path(module.__file__).read_text(encoding="utf-8") for module in (reward, sys.modules[__name__]))
    comments = dict(re.findall(r"^([A-Z][A-Z0-9_]*) = [^#\n]*(?:# (.*))?$", source, re.MULTILINE))
    tiny = globals().get("TINY", {})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, scope in scopes.items():
        default = f"{scope[name]!r}" + (f", tiny: {tiny[name]!r}" if name in tiny else "")
        parser.add_argument(f"--{name.lower()}", type=type(scope[name]), metavar=type(scope[name]).__name__,
                            help=f"({default}) {comments.get(name, '')}".replace("%", "%%"), default=argparse.SUPPRESS)
    known, unknown = parser.parse_known_args(argv)
    for word in unknown:
        name = word.split("=")[0].lstrip("-").upper()
        near = [f"--{n.lower()}" for n in difflib.get_close_matches(name, scopes, 3, 0.5)]
        parser.exit(2, f"{Path(__file__).name}: no constant {name}" + (f"; did you mean {' or '.join(near)}?\n" if near else "; see --help\n"))
    given = {name.upper(): value for name, value in vars(known).items()}
    for name, value in {**(tiny if is_tiny(given) else {}), **given}.items():
        scopes[name][name] = value
    if TASK not in reward.TASKS:
        parser.exit(2, f"{Path(__file__).name}: unknown TASK {TASK!r}; there is {', '.join(reward.TASKS)}\n")
    return {name: scope[name] for name, scope in scopes.items()}


def is_tiny(given: dict) -> bool:
    """Whether the TINY constants hold: MODEL=tiny, or MODEL=auto without a GPU."""
    model = given.get("MODEL", MODEL)
    return model == "tiny" or (model == "auto" and not torch.cuda.is_available())


def start_run(folder: Path, constants: dict, inputs: list[Path], device: str) -> None:
    """Stores source, constants, versions, device and hashes of the inputs in a run folder, and prints the constants.

    Exits with 0 where the folder holds the finished run of the same constants and inputs, and with the difference and the two ways
    out where it holds another one. A run that was cut off is begun again.
    """
    # they say where and how fast, not what
    free = ("OUT", "DATA", "SFT", "RESUME", "THREADS", "MICRO_BATCH_TOKENS", "EVAL_BATCH_TOKENS", "HEAD_CHUNK", "GRADIENT_CHECKPOINTING")
    sources = [Path(__file__).resolve(), Path(reward.__file__).resolve()]
    hashes = {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs}
    hashes |= {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}
    header = {"constants": constants, "inputs": hashes, "device": device,
              "python": platform.python_version(), "versions": {p: version(p) for p in ("torch", "transformers", "peft", "bitsandbytes", "numpy")}}
    run = folder / "run.json"
    if folder.is_dir() and any(path.suffix != ".png" for path in folder.iterdir()) and not run.is_file():
        sys.exit(f"{folder} holds files that are not of a run: choose another OUT=")
    if (folder / "summary.json").is_file() and RESUME:
        old = json.loads(run.read_text(encoding="utf-8"))
        then, now = ({**h["constants"], **h["inputs"]} for h in (old, header))
        changed = [f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in {**then, **now}
                   if then.get(name) != now.get(name) and name not in free]
        if changed:
            sys.exit(f"{folder} is a finished run of something else: {'; '.join(changed)}.\nOUT= another folder keeps it, RESUME=0 replaces it")
        (folder / "summary.json").touch()
        print(f"{folder} is complete: nothing to do")
        sys.exit(0)
    if run.is_file() and not (folder / "summary.json").is_file():
        print(f"{folder}: a run that was cut off is begun again")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run.write_text(json.dumps(header, indent=1, ensure_ascii=False), encoding="utf-8")
    shutil.copy(__file__, folder)
    shutil.copy(reward.__file__, folder)
    print("\n".join(f"{name} = {value!r}" for name, value in constants.items()))


def finish_run(folder: Path, summary: dict) -> None:
    """Writes summary.json, whose presence says that the run is complete, and prints it as `name: value` lines."""
    aside = folder / "summary.json.tmp"
    aside.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    os.replace(aside, folder / "summary.json")
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))


def read_rows(path: Path, needs: tuple[str, ...]) -> list[dict]:
    """Rows of a jsonl file, each with the named text fields. Exits with file, line and reason at the first bad row."""
    if not path.is_file():
        sys.exit(f"{path} is missing: run `make data` (or set DATA= to a folder that has it)")
    rows = []
    with open(path, "rb") as file:          # bytes, so that a line that is not UTF-8 is named too
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.decode("utf-8-sig"))
                if not isinstance(row, dict):
                    raise ValueError(f"an object is expected, not {type(row).__name__}")
                for name in needs:
                    if not isinstance(row.get(name), str) or not row[name]:
                        raise ValueError(f"{name!r} must be a text, not {row.get(name)!r}")
                reward.check_row(TASK, row)
            except ValueError as error:
                sys.exit(f"{path}:{number}: {error}")
            rows.append(row)
    if not rows:
        sys.exit(f"{path} is empty: run `make data`")
    return rows


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, in the model's chat template where it has one."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt + "\n", add_special_tokens=False).input_ids
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
    text = re.sub(r"<think>\n$", "", text)       # DeepSeek-R1's template opens the reasoning; our completions do it themselves
    return tokenizer(text, add_special_tokens=False).input_ids


def tiny_tokenizer(texts: list[str]):
    """A word is a token: numbers, operators, tags, newline, in the order of their first use in the training data."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(["<pad>", "<eos>", "<unk>"] + [word for text in texts for word in re.findall(r"\n|\S+", text)] + ["\n"])
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\S+"), behavior="removed", invert=True)
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(), decoders.Replace(" \n ", "\n")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)


def load_model(path: str, trainable: bool):
    """Model and tokenizer of a policy folder, any local folder or a hub name; 4-bit, with a LoRA adapter, or neither.

    A folder with an adapter needs its base too, and the adapter never fails to load silently. Exits with what to do where a hub
    model cannot be reached.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast

    cuda = torch.cuda.is_available()
    adapter = Path(path, "adapter_config.json")
    base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"] if adapter.is_file() else path
    if trainable and LOAD_4BIT and not LORA_RANK and not adapter.is_file():
        sys.exit("LORA_RANK=0 trains all weights, which LOAD_4BIT=1 does not allow: set LOAD_4BIT=0 or LORA_RANK above 0")
    options = {"dtype": torch.bfloat16 if cuda and (LORA_RANK or not trainable) else torch.float32, "use_safetensors": True}
    if LOAD_4BIT:
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                                            bnb_4bit_compute_dtype=torch.bfloat16 if bf16_works() else torch.float32)
    if cuda:
        options["device_map"] = {"": 0}
    else:
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")      # a kernel for every new shape would fill a gigabyte
        options["attn_implementation"] = "eager"     # the fused attention of a CPU is slower at the lengths that a CPU can train
    config = Path(path, "tokenizer_config.json")
    # AutoTokenizer gives every Qwen2 the tokenizer of Qwen2, also where the folder names another: the word tokenizer of MODEL=tiny
    own = config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class") == "TokenizersBackend"
    try:
        tokenizer = (PreTrainedTokenizerFast if own else AutoTokenizer).from_pretrained(path if config.is_file() else base, revision=REVISION or None)
        model = AutoModelForCausalLM.from_pretrained(base, revision=REVISION or None, **options)
    except OSError as error:
        sys.exit(f"cannot load the model {base!r}: {str(error).splitlines()[0]}\nUse MODEL=tiny, which needs no download, or the path of "
                 "a folder that holds config.json, model.safetensors and the tokenizer")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False     # its first forward in eval mode would repack the weights, without a gradient
    if adapter.is_file():
        model = PeftModel.from_pretrained(model, path, is_trainable=trainable)
    elif trainable and LORA_RANK:
        model = get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules="all-linear",
                                                 task_type="CAUSAL_LM"))
    if trainable and GRADIENT_CHECKPOINTING:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, tokenizer


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def bf16_works() -> bool:
    """Whether BF16 is wanted and the processor has fast bf16 matrix products."""
    return bool(BF16) and (torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast():
    """bf16 matrix products with fp32 weights, where they are fast."""
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=bf16_works())


def end_ids(model, tokenizer) -> list[int]:
    """All ids that end a completion: the tokenizer's and those of the model's generation config (Qwen3 has two)."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *configured] if i is not None))


def peak_memory() -> float:
    """Peak memory in GiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def save_policy(model, tokenizer, folder: Path) -> None:
    """Writes a policy into a folder: all files aside first, then each renamed into place, so that none is ever half written."""
    aside = folder / "saving"
    shutil.rmtree(aside, ignore_errors=True)
    options = {"selected_adapters": ["default"]} if hasattr(model, "peft_config") else {}
    model.save_pretrained(aside, **options)
    tokenizer.save_pretrained(aside)
    for file in aside.iterdir():
        os.replace(file, folder / file.name)
    aside.rmdir()


def completion_logprobs(model, input_ids: torch.Tensor, loss_mask: torch.Tensor, temperature: float = 1.0):
    """Log-probs and entropies (N,) of the N tokens input_ids[:, 1:][loss_mask] at a temperature; input_ids (B, T), right padding.

    Only those N positions reach the output layer, HEAD_CHUNK at a time, and their logits are made again in the backward pass.
    Right padding needs no attention mask under causal attention.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal_lm.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1][loss_mask]
    targets = input_ids[:, 1:][loss_mask]

    def of_chunk(hidden, targets):
        logprobs = torch.log_softmax(causal_lm.lm_head(hidden).float() / temperature, -1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, targets[:, None])[:, 0], entropy

    parts = []
    for chunk in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK)):
        again = torch.is_grad_enabled() and len(targets) > HEAD_CHUNK
        parts.append(checkpoint(of_chunk, *chunk, use_reentrant=False) if again else of_chunk(*chunk))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def batches(lengths: list[int], budget: int, rng: random.Random) -> list[list[int]]:
    """Rows in batches of similar length, each at most `budget` tokens with its padding; the batches in random order.

    Rows are sorted by length within pools of 64 batches, so that batches differ from epoch to epoch.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool, made = max(1, 64 * budget // max(1, sum(lengths) // len(lengths))), []
    for start in range(0, len(order), pool):
        batch = []
        for row in sorted(order[start:start + pool], key=lengths.__getitem__):
            if batch and lengths[row] * (len(batch) + 1) > budget:
                made.append(batch)
                batch = []
            batch.append(row)
        made.append(batch)
    rng.shuffle(made)
    return made


def collate(samples: list[tuple[list[int], int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids (B, T) padded on the right, loss_mask (B, T-1) of completion tokens; a sample is its ids and its prompt's length."""
    lengths = torch.tensor([len(ids) for ids, _ in samples])
    prompts = torch.tensor([prompt for _, prompt in samples])
    input_ids = torch.zeros(len(samples), int(lengths.max()), dtype=torch.long)
    for row, (ids, _) in enumerate(samples):
        input_ids[row, :len(ids)] = torch.tensor(ids)
    position = torch.arange(1, input_ids.shape[1])
    loss_mask = (position >= prompts[:, None]) & (position < lengths[:, None])
    return input_ids.to(device), loss_mask.to(device)


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Sequences sorted by length into batches of at most `budget` tokens with their padding; a longer one stands alone."""
    made, batch = [], []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[index] * (len(batch) + 1) > budget:
            made.append(batch)
            batch = []
        batch.append(index)
    return made + [batch] if batch else made


def learning_rate(step: int) -> float:
    """Share of LR at a step counted from 0: linear warm-up, then a cosine down to MIN_LR."""
    warmup = max(1, round(WARMUP * STEPS))
    if step < warmup:
        return (step + 1) / warmup
    return MIN_LR + (1 - MIN_LR) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, STEPS - warmup)))


def new_tiny_model(rows: list[dict]):
    """An untrained Qwen2 of TINY_SHAPE and its tokenizer of the words in the rows."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    tokenizer = tiny_tokenizer([f"{row['prompt']} {row['completion']}" for row in rows])
    config = Qwen2Config(vocab_size=len(tokenizer), **TINY_SHAPE, max_position_embeddings=2048, tie_word_embeddings=True,
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager"), tokenizer


def make_optimizers(model) -> list:
    """Muon for the matrices of a model that is trained from scratch, AdamW for all else; on a GPU AdamW is paged and has 8 bits."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if MUON_LR and p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    others = [p for p in trained.values() if not any(p is m for m in matrices)]
    if OPTIMIZER_8BIT and torch.cuda.is_available():
        from bitsandbytes.optim import PagedAdamW8bit
        optimizers = [PagedAdamW8bit(others, lr=LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)]
    else:
        optimizers = [torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"))
    return optimizers


@torch.no_grad()
def evaluate(model, tokenizer, samples, rows: list[dict]) -> dict[str, float]:
    """Loss on val samples, and the accuracy of one sampled completion for each of the first EVAL_ROWS rows."""
    model.eval()
    device, losses, scores = next(model.parameters()).device, [], []
    with autocast():
        for batch in micro_batches([len(ids) for ids, _ in samples], MICRO_BATCH_TOKENS):
            losses.append(-completion_logprobs(model, *collate([samples[i] for i in batch], device))[0])
        for start in range(0, min(EVAL_ROWS, len(rows)), EVAL_BATCH):
            part = rows[start:min(start + EVAL_BATCH, EVAL_ROWS)]
            prompts = [encode_prompt(tokenizer, row["prompt"]) for row in part]
            prompts = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
            output = model.generate(**prompts.to(device), generation_config=GenerationConfig(
                max_new_tokens=MAX_NEW_TOKENS, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0,
                eos_token_id=end_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id))
            for ids, row in zip(output[:, prompts["input_ids"].shape[1]:], part):
                truncated = not torch.isin(ids, torch.tensor(end_ids(model, tokenizer), device=device)).any()
                scores.append(reward.score(TASK, tokenizer.decode(ids, skip_special_tokens=True), row, bool(truncated)))
    model.train()
    scores = [s for s in scores if s is not None]
    log = {"val_loss": float(torch.cat(losses).mean())} if losses else {}
    return log | {"val_accuracy": sum(s["correct"] for s in scores) / len(scores),
                  "val_unfinished": 1 - sum(s["answered"] for s in scores) / len(scores)}


def main() -> None:
    constants = override_constants(sys.argv[1:], is_tiny)
    root = Path(OUT or f"runs/{TASK}")
    folder, data = root / "sft", Path(DATA or root / "data")
    train, val = read_rows(data / "train.jsonl", ("prompt", "completion")), read_rows(data / "val.jsonl", ("prompt",))
    start_run(folder, constants, [data / "train.jsonl", data / "val.jsonl"], device_name())
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS or os.cpu_count())
    model, tokenizer = new_tiny_model(train) if is_tiny({}) else load_model(DEFAULT_MODEL if MODEL == "auto" else MODEL, trainable=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    device = next(model.parameters()).device
    print(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} of {sum(p.numel() for p in model.parameters()):,} parameters train")

    def encode(rows):
        samples = []
        for start in range(0, len(rows), 1000):         # of 100,000 rows at once the tokenizer's own objects would fill gigabytes
            part = rows[start:start + 1000]
            for row, completion in zip(part, tokenizer([row["completion"] for row in part], add_special_tokens=False).input_ids):
                prompt = encode_prompt(tokenizer, row["prompt"])
                samples.append((prompt + completion + [tokenizer.eos_token_id], len(prompt)))
        kept = [sample for sample in samples if len(sample[0]) <= MAX_TOKENS]
        if len(kept) < len(samples):
            print(f"{len(samples) - len(kept)} of {len(samples)} samples are longer than MAX_TOKENS={MAX_TOKENS} and left out")
        if samples and not kept:
            sys.exit(f"no sample of {len(samples)} is within MAX_TOKENS={MAX_TOKENS}")
        return kept

    samples, val_samples = encode(train), encode([row for row in val if row.get("completion")])
    optimizers = make_optimizers(model)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    writer = SummaryWriter(folder / "tensorboard")
    rng, order, best, best_log, tokens = random.Random(SEED), [], float("inf"), {}, 0
    model.train()
    began = time.time()
    for step in tqdm(range(1, STEPS + 1), desc="sft", unit="step", dynamic_ncols=True):
        if not order:
            order = batches([len(ids) for ids, _ in samples], BATCH_TOKENS, rng)
        batch = [samples[i] for i in order.pop()]
        count = sum(len(ids) - prompt for ids, prompt in batch)
        loss = 0.0
        for indices in micro_batches([len(ids) for ids, _ in batch], MICRO_BATCH_TOKENS):
            input_ids, loss_mask = collate([batch[i] for i in indices], device)
            with autocast():
                part = -completion_logprobs(model, input_ids, loss_mask)[0].sum() / count
            part.backward()
            loss += float(part.detach())
            tokens += input_ids.numel()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], GRAD_CLIP)
        for optimizer, peak in zip(optimizers, peaks):
            for group, lr in zip(optimizer.param_groups, peak):
                group["lr"] = lr * learning_rate(step - 1)
            if bool(torch.isfinite(norm)):
                optimizer.step()
            optimizer.zero_grad()
        seconds = time.time() - began
        log = {"step": step, "loss": loss, "grad_norm": float(norm), "lr": LR * learning_rate(step - 1), "tokens": tokens,
               "tokens_per_s": tokens / seconds, "seconds": seconds, "peak_gib": peak_memory()}
        if step % EVAL_EVERY == 0 or step == STEPS:
            log |= evaluate(model, tokenizer, val_samples, val)
            if log.get("val_loss", -log["val_accuracy"]) < best:         # by accuracy where val has no completions
                best, best_log = log.get("val_loss", -log["val_accuracy"]), log
                save_policy(model, tokenizer, folder)
        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(log) + "\n")
        for name, value in log.items():
            writer.add_scalar(name, value, step)
        if step % LOG_EVERY == 0 or "val_loss" in log:
            tqdm.write("  ".join(f"{name} {value:.5g}" for name, value in log.items()))
    writer.close()
    finish_run(folder, {"steps": STEPS, **{f"best_{name}": best_log[name] for name in best_log if name == "step" or name.startswith("val_")},
                        "seconds": time.time() - began, "peak_gib": peak_memory()})


if __name__ == "__main__":
    main()
