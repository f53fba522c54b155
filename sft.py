"""Supervised fine-tuning: teaches a model to write completions like those of the data, as the starting point of GRPO.

    python sft.py                                          # MODEL=auto: tiny on a CPU, Qwen2.5-1.5B with QLoRA on a GPU
    python sft.py --model=Qwen/Qwen2.5-0.5B --load_4bit=0

MODEL=tiny is a Qwen2 of 0.9 million parameters trained from scratch on words, for machines without a GPU or a model hub.
Everything else is a Hugging Face causal LM, by name or by path. Loss on the completion alone, its end-of-sequence token
included. Differs from the usual trainer: no padding mask is needed (right padding under causal attention), and the output
layer sees completion tokens only, so the logits of a 152k vocabulary never fill the memory.
"""

import argparse
import contextlib
import difflib
import fcntl
import hashlib
import json
import math
import os
import pickle
import platform
import random
import re
import resource
import shutil
import signal
import statistics
import sys
import threading
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy
import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import GenerationConfig, set_seed
from transformers.utils.logging import disable_progress_bar

import reward

# Run
TASK = "game24"
MODEL = "auto"               # tiny, a hub name or a folder; auto: tiny without a CUDA device, else DEFAULT_MODEL
DEFAULT_MODEL = "Qwen/Qwen2.5-1.5B-Instruct"
REVISION = ""                # commit, tag or branch of a hub model; empty: the default branch
OUT = ""                     # root folder of the run; empty: runs/TASK
DATA = ""                    # folder of train.jsonl and val.jsonl; empty: OUT/data
VOCABULARY = ""              # a jsonl of later training, whose words a new tiny model has to know too
RESUME = 1                   # 0: start anew where a run is, finished or cut off
STRICT = 1                   # 0: bad rows of the data are skipped and counted, not refused
SEED = 0
THREADS = 0                  # CPU threads; 0: one for each core
# Model
LOAD_4BIT = 1                # NF4 with double quantisation; 0: bf16 on a GPU, fp32 on a CPU
LORA_RANK = 32               # on all linear layers; 0: train all weights
LORA_ALPHA = 64              # the update is scaled by LORA_ALPHA / LORA_RANK
BF16 = 1                     # bf16 matrix products where the processor has them; weights stay in fp32
GRADIENT_CHECKPOINTING = 1   # recompute activations in the backward pass: less memory, a third more time
# Training
STEPS = 600                  # optimizer steps, ...
MAX_EPOCHS = 0               # ... or fewer: at most so many passes over the data, which a small corpus needs; 0: no limit
LR = 2e-4                    # peak; about ten times that of training all weights
WARMUP = 0.03                # share of STEPS with a rising learning rate, then a cosine to MIN_LR
MIN_LR = 0.1                 # last learning rate as a share of LR
MUON_LR = 0.0                # of the matrices by Muon, for training from scratch; 0: AdamW trains everything
WEIGHT_DECAY = 0.0
OPTIMIZER_8BIT = 1           # 8-bit AdamW of bitsandbytes, paged on a GPU; 0: AdamW of torch
GRAD_CLIP = 1.0              # norm of the gradient
BATCH_TOKENS = 16384         # tokens of an optimizer step, padding included
MICRO_BATCH_TOKENS = 4096    # tokens of a forward pass: halved where memory runs out, the result stays the same
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
# Faults
SAVE_EVERY = 20              # steps between checkpoints: what a power cut costs at most
KEEP_LAST = 2                # checkpoints kept, beside the best
MAX_NONFINITE = 3            # updates in a row that are skipped for a loss or gradient that is not finite; then the run stops
SPIKE = 10.0                 # standard deviations above the mean of the last 100 gradient norms from which a norm is logged as a spike ...
SKIP_SPIKES = 0              # ... and 1: its update is skipped
# What MODEL=tiny has instead, where the command line does not say otherwise
TINY = {"MODEL": "tiny", "LOAD_4BIT": 0, "LORA_RANK": 0, "GRADIENT_CHECKPOINTING": 0, "OPTIMIZER_8BIT": 0, "STEPS": 3600, "LR": 3e-3, "MUON_LR": 3e-3,
        "MIN_LR": 0.05, "WARMUP": 0.05, "WEIGHT_DECAY": 0.05, "BATCH_TOKENS": 2048, "MAX_NEW_TOKENS": 256, "EVAL_EVERY": 1200,
        "SAVE_EVERY": 100}
# What TASK=lyrics has instead, and a tiny model in it
LYRICS = {"DEFAULT_MODEL": "Qwen/Qwen2.5-0.5B-Instruct", "MAX_EPOCHS": 4}
TINY_LYRICS = {"STEPS": 1600, "EVAL_EVERY": 1600, "MAX_NEW_TOKENS": 320}
TINY_SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


# ---- model and data of training -------------------------------------------------------------------------------------


def new_tiny_model(rows: list[dict]):
    """An untrained Qwen2 of TINY_SHAPE and its tokenizer of the words in the rows, and in those of VOCABULARY."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    rows = rows + (read_rows(Path(VOCABULARY), ("prompt", "completion")) if VOCABULARY else [])
    tokenizer = tiny_tokenizer([f"{row['prompt']} {row['completion']}" for row in rows])
    config = Qwen2Config(vocab_size=len(tokenizer), **TINY_SHAPE, max_position_embeddings=2048, tie_word_embeddings=True,
                         tiny=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager"), tokenizer


def tiny_tokenizer(texts: list[str]):
    """A word is a token: numbers, operators, tags, newline, a Chinese character or mark, in the order of their first use in the training data."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    word = r"\n|</?[a-z]+>|[^\s!-~]|[!-;=-~]+|<"
    words = dict.fromkeys(["<pad>", "<eos>", "<unk>"] + [found for text in texts for found in re.findall(word, text)] + ["\n"])
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(word), behavior="removed", invert=True)
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(), decoders.Replace(" \n ", "\n"),
                                           decoders.Replace(Regex(r"(?<=[^\x00-\x7f]) | (?=[^\x00-\x7f])"), "")])       # Chinese has no spaces
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)


def make_optimizers(model) -> list:
    """Muon for the matrices of a model that is trained from scratch, AdamW for all else, adapters among them."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if MUON_LR and p.ndim == 2 and not re.search("embed|lm_head|lora_", name)]
    others = [p for p in trained.values() if not any(p is m for m in matrices)]
    optimizers = [adamw(others, betas=(0.9, 0.95))]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learning_rate(step: int) -> float:
    """Share of LR at a step counted from 0: linear warm-up, then a cosine down to MIN_LR."""
    warmup = max(1, round(WARMUP * STEPS))
    if step < warmup:
        return (step + 1) / warmup
    return MIN_LR + (1 - MIN_LR) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, STEPS - warmup)))


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


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Sequences sorted by length into batches of at most `budget` tokens with the padding of collate; a longer one stands alone."""
    made, batch = [], []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and -(-lengths[index] // 8) * 8 * (len(batch) + 1) > budget:
            made.append(batch)
            batch = []
        batch.append(index)
    return made + [batch] if batch else made


def collate(samples: list[tuple[list[int], int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids (B, T) padded on the right to a multiple of 8, as matrix products like it, loss_mask (B, T-1) of completion tokens.

    A sample is its ids and its prompt's length.
    """
    lengths = torch.tensor([len(ids) for ids, _ in samples])
    prompts = torch.tensor([prompt for _, prompt in samples])
    input_ids = torch.zeros(len(samples), -(-int(lengths.max()) // 8) * 8, dtype=torch.long)
    for row, (ids, _) in enumerate(samples):
        input_ids[row, :len(ids)] = torch.tensor(ids)
    position = torch.arange(1, input_ids.shape[1])
    loss_mask = (position >= prompts[:, None]) & (position < lengths[:, None])
    return input_ids.to(device), loss_mask.to(device)


def completion_logprobs(model, input_ids: torch.Tensor, loss_mask: torch.Tensor, temperature: float = 1.0):
    """Log-probs and entropies (N,) of the N tokens input_ids[:, 1:][loss_mask] at a temperature; input_ids (B, T), right padding.

    Only those N positions (in 16s) reach the output layer, HEAD_CHUNK at a time, and their logits are made again in the backward pass.
    Right padding needs no attention mask under causal attention.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal_lm.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1][loss_mask]
    targets = input_ids[:, 1:][loss_mask]
    count = len(targets)
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, -count % 16))       # few shapes: the kernels that a CPU makes for each fill its memory
    targets = torch.nn.functional.pad(targets, (0, -count % 16))

    def of_chunk(hidden, targets):
        logprobs = torch.log_softmax(causal_lm.lm_head(hidden).float() / temperature, -1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, targets[:, None])[:, 0], entropy

    parts = []
    for chunk in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK)):
        again = torch.is_grad_enabled() and len(targets) > HEAD_CHUNK
        parts.append(checkpoint(of_chunk, *chunk, use_reentrant=False) if again else of_chunk(*chunk))
    return torch.cat([part[0] for part in parts])[:count], torch.cat([part[1] for part in parts])[:count]


# ---- the loop -------------------------------------------------------------------------------------------------------


def no_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out: the allocator of torch, a driver, cuBLAS and a CPU each have their own words."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in ("allocate memory", "out of memory", "ALLOC_FAILED"))


def fits(work) -> bool:
    """Does the work; False where memory ran out, and what it had taken is given back."""
    try:
        work()
        return True
    except RuntimeError as error:
        if not no_memory(error):
            raise
    torch.cuda.empty_cache()            # here, where the error holds no frame and no tensor any more
    return False


def each_micro_batch(batches: list[dict], work, again=lambda: None) -> list[dict]:
    """Calls work(batch) for every micro-batch, and returns them, smaller ones where memory ran out.

    Then MICRO_BATCH_TOKENS is halved, again() called, and work begins with the first: no gradient is lost or counted twice. Exits where a
    single sequence does not fit.
    """
    global MICRO_BATCH_TOKENS
    done = 0
    while done < len(batches):
        rows, width = batches[done]["input_ids"].shape
        if fits(lambda: work(batches[done])):
            done += 1
            continue
        if rows == 1:
            sys.exit(f"memory runs out in the update of one sequence of {width} tokens. Make it shorter (MAX_NEW_TOKENS of GRPO, MAX_TOKENS of SFT), "
                     f"lower HEAD_CHUNK={HEAD_CHUNK}, or set GRADIENT_CHECKPOINTING=1 (it is {GRADIENT_CHECKPOINTING})")
        MICRO_BATCH_TOKENS = (rows + 1) // 2 * width
        tqdm.write(f"memory ran out at {rows * width} tokens: MICRO_BATCH_TOKENS={MICRO_BATCH_TOKENS} from here on, with the same gradient")
        batches = [{name: value if value is None else value[start:start + size] for name, value in batch.items()} for batch in batches
                   for size in [max(1, MICRO_BATCH_TOKENS // batch["input_ids"].shape[1])] for start in range(0, len(batch["input_ids"]), size)]
        again()
        done = 0
    return batches


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
                scores.append(try_score(tokenizer.decode(ids, skip_special_tokens=True), row, bool(truncated)))
    model.train()
    good, faults = [s for s, fault in scores if s], [fault for _, fault in scores if fault]
    if faults:
        tqdm.write(f"no reward for {len(faults)} of {len(scores)} completions, the first: {faults[0]}")
    if not good:
        sys.exit(f"no completion of {len(scores)} has a reward: mend the reward of TASK={TASK}, then begin anew, with RESUME=0")
    log = {"val_loss": float(torch.cat(losses).mean())} if losses else {}
    return log | {"val_accuracy": sum(s["correct"] for s in good) / len(good), "val_unfinished": 1 - sum(s["answered"] for s in good) / len(good)}


def main() -> None:
    global STEPS
    constants = override_constants(sys.argv[1:], is_tiny)
    root = Path(OUT or f"runs/{TASK}")
    folder, data = root / "sft", Path(DATA or root / "data")
    for name in ("STEPS", "BATCH_TOKENS", "MICRO_BATCH_TOKENS", "HEAD_CHUNK", "MAX_NEW_TOKENS", "EVAL_EVERY", "EVAL_BATCH",
                 "LOG_EVERY", "SAVE_EVERY", "KEEP_LAST", "MAX_NONFINITE"):
        if constants[name] <= 0:
            sys.exit(f"{name} must be above 0, not {constants[name]}")
    train, val = read_rows(data / "train.jsonl", ("prompt", "completion")), read_rows(data / "val.jsonl", ("prompt",))
    val = held_out(train, val, data / "val.jsonl")
    if (data / "test.jsonl").is_file():
        held_out(train, read_rows(data / "test.jsonl", ("prompt",)), data / "test.jsonl")
    base = {"tiny": "", "auto": "" if is_tiny({}) else DEFAULT_MODEL}.get(MODEL, MODEL)
    inputs = {path.name: sha256(path) for path in (data / "train.jsonl", data / "val.jsonl")} | use_data(data)
    inputs |= (fingerprint("MODEL", base) if base else {}) | ({"VOCABULARY": sha256(Path(VOCABULARY))} if Path(VOCABULARY).is_file() else {})
    inputs |= {"MODEL": "a folder"} if Path(base or "-").is_dir() else {}       # its weights count, not its place
    header = start_run(folder, constants, inputs, device_name())
    checkpoint = None if header else newest_checkpoint(folder)
    set_seed(SEED)
    torch.set_num_threads(THREADS or os.cpu_count())
    model, tokenizer = load_model(str(checkpoint or base), trainable=True) if checkpoint or base else new_tiny_model(train)
    disable_progress_bar()       # one for every checkpoint otherwise
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
    if MAX_EPOCHS:
        STEPS = min(STEPS, MAX_EPOCHS * len(batches([len(ids) for ids, _ in samples], BATCH_TOKENS, random.Random(SEED))))
        print(f"{STEPS} steps")
    optimizers = make_optimizers(model)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    rng = random.Random(SEED)
    # all that a step leaves for the next, beside the policy, the optimizers and the random number generators
    run = SimpleNamespace(step=0, order=[], random_order=rng.getstate(), best=float("inf"), bests=[], best_log={}, tokens=0, skipped=0,
                          nonfinite=0, spikes=0, norms=[], seconds=0.0)
    if checkpoint:
        load_checkpoint(checkpoint, folder, run, optimizers)
        rng.setstate(run.random_order)
    else:
        new_run(folder, header)
        save_checkpoint(folder, run, model, tokenizer, optimizers)
    writer = SummaryWriter(folder / "tensorboard", purge_step=run.step + 1)
    model.train()
    began, stop = time.time() - run.seconds, catch_signals()
    for step in tqdm(range(run.step + 1, STEPS + 1), desc="sft", unit="step", dynamic_ncols=True, initial=run.step, total=STEPS):
        if not run.order:
            run.order = batches([len(ids) for ids, _ in samples], BATCH_TOKENS, rng)
        batch = [samples[i] for i in run.order.pop()]
        count = sum(len(ids) - prompt for ids, prompt in batch)
        parts, losses = [], []
        for indices in micro_batches([len(ids) for ids, _ in batch], MICRO_BATCH_TOKENS):
            input_ids, loss_mask = collate([batch[i] for i in indices], device)
            parts.append({"input_ids": input_ids, "loss_mask": loss_mask})
            run.tokens += input_ids.numel()

        def learn(part):
            with autocast():
                loss = -completion_logprobs(model, part["input_ids"], part["loss_mask"])[0].sum() / count
            loss.backward()
            losses.append(float(loss.detach()))

        def forget():
            losses.clear()
            model.zero_grad()

        each_micro_batch(parts, learn, forget)
        loss = sum(losses)
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], GRAD_CLIP)
        good = may_step(float(norm), loss, run)
        for optimizer, peak in zip(optimizers, peaks):
            for group, lr in zip(optimizer.param_groups, peak):
                group["lr"] = lr * learning_rate(step - 1)
            if good:
                optimizer.step()
            optimizer.zero_grad()
        run.step, run.seconds, run.random_order = step, time.time() - began, rng.getstate()
        log = {"step": step, "loss": loss, "grad_norm": float(norm), "lr": LR * learning_rate(step - 1), "skipped": run.skipped, "spikes": run.spikes,
               "tokens": run.tokens, "tokens_per_s": run.tokens / run.seconds, "seconds": run.seconds, "peak_gib": peak_memory()}
        if step % EVAL_EVERY == 0 or step == STEPS:
            log |= evaluate(model, tokenizer, val_samples, val)
            if log.get("val_loss", -log["val_accuracy"]) < run.best:         # by accuracy where val has no completions
                run.best, run.bests, run.best_log = log.get("val_loss", -log["val_accuracy"]), run.bests + [step], log
        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(log) + "\n")
        for name, value in log.items():
            writer.add_scalar(name, value, step)
        if step % LOG_EVERY == 0 or "val_loss" in log:
            tqdm.write("  ".join(f"{name} {value:.5g}" for name, value in log.items()))
        asked = stop[:1]            # a signal may come at any time
        if step % SAVE_EVERY == 0 or step in (*run.bests, STEPS) or asked or run.nonfinite >= MAX_NONFINITE:
            save_checkpoint(folder, run, model, tokenizer, optimizers)
        if run.nonfinite >= MAX_NONFINITE:
            sys.exit(f"{run.nonfinite} updates in a row were skipped, the last with loss {loss} and gradient norm {float(norm)}. The weights of the "
                     f"last good update are in {folder}/step-{step}. A lower LR may help, in another OUT=")
        if asked:
            sys.exit(128 + asked[0])
    writer.close()
    best = {f"best_{name}": value for name, value in run.best_log.items() if name == "step" or name.startswith("val_")}
    finish_run(folder, {"steps": STEPS, **best,
                        "skipped": run.skipped, "seconds": run.seconds, "peak_gib": peak_memory()})


# ---- plumbing, the same in every script that has it: model ----------------------------------------------------------


def load_model(path: str, trainable: bool):
    """Model and tokenizer of a policy folder, any local folder or a hub name; 4-bit, with a LoRA adapter, or neither.

    A folder with an adapter needs its base too, and the adapter never fails to load silently. Exits with what to do where a hub
    model cannot be reached.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast

    cuda = torch.cuda.is_available()
    adapter = Path(path, "adapter_config.json")
    refuse_damaged(Path(path))
    if adapter.is_file() and not Path(path, "adapter_model.safetensors").is_file():
        sys.exit(f"{path} has no adapter_model.safetensors: the base alone is not this policy")
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
        source = {"revision": REVISION or None, "trust_remote_code": False}
        tokenizer = (PreTrainedTokenizerFast if own else AutoTokenizer).from_pretrained(path if config.is_file() else base, **source)
        place = str(Path(base).resolve()) if Path(base).is_dir() else base      # an adapter stores it: it must hold in any working directory
        model, found = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **source, **options)
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(f"cannot load the model {base!r}: {str(error).splitlines()[0]}\nUse MODEL=tiny, which needs no download, or the path of "
                 "a folder that holds config.json, model.safetensors and the tokenizer")
    if found["missing_keys"] or found["mismatched_keys"]:
        sys.exit(f"the weights of {base!r} lack {', '.join(sorted(map(str, [*found['missing_keys'], *found['mismatched_keys']])))[:300]}: random "
                 "ones would stand in for them")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False     # its first forward in eval mode would repack the weights, without a gradient
    if adapter.is_file():
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")      # it would be the base in the policy's name
            try:
                model = PeftModel.from_pretrained(model, path, is_trainable=trainable)
            except UserWarning as error:
                sys.exit(f"the adapter {path} is not whole: {str(error)[:300]}")
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
    return bool(BF16) and (torch.cuda.is_available() or torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast():
    """bf16 matrix products with fp32 weights, where they are fast."""
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=bf16_works())


def end_ids(model, tokenizer) -> list[int]:
    """All ids that end a completion: the tokenizer's and those of the model's generation config (Qwen3 has two)."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *configured] if i is not None))


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, in the model's chat template where it has one."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt + "\n", add_special_tokens=False).input_ids
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
    text = re.sub(r"<think>\n$", "", text)       # DeepSeek-R1's template opens the reasoning; our completions do it themselves
    return tokenizer(text, add_special_tokens=False).input_ids


def adamw(parameters: list, betas: tuple[float, float]):
    """AdamW; with OPTIMIZER_8BIT that of bitsandbytes, whose 8-bit state moves from a GPU to the host when memory runs short."""
    if OPTIMIZER_8BIT:
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
        return (PagedAdamW8bit if torch.cuda.is_available() else AdamW8bit)(parameters, lr=LR, betas=betas, weight_decay=WEIGHT_DECAY)
    return torch.optim.AdamW(parameters, lr=LR, betas=betas, weight_decay=WEIGHT_DECAY)


def peak_memory() -> float:
    """Peak memory in GiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# ---- plumbing: constants, folder and data of a run ------------------------------------------------------------------


def override_constants(argv: list[str], is_tiny=lambda given: False) -> dict:
    """Sets the CAPS constants of this file and of reward.py from `--name=value`; returns all of them.

    Exits with the nearest names where there is no such constant, with the type where a value does not fit, and where it is negative.
    """
    scopes = {name: scope for scope in (vars(reward), globals()) for name, value in list(scope.items())
              if re.fullmatch("[A-Z][A-Z0-9_]*", name) and isinstance(value, (int, float, str))}
    source = "\n".join(Path(module.__file__).read_text(encoding="utf-8") for module in (reward, sys.modules[__name__]))
    comments = dict(re.findall(r"^([A-Z][A-Z0-9_]*) = [^#\n]*(?:# (.*))?$", source, re.MULTILINE))
    sets = {name: globals().get(name.upper().replace(" ", "_"), {}) for name in ("lyrics", "tiny", "tiny lyrics")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, scope in scopes.items():
        default = f"{scope[name]!r}" + "".join(f", {kind}: {values[name]!r}" for kind, values in sets.items() if name in values)
        parser.add_argument(f"--{name.lower()}", type=type(scope[name]), metavar=type(scope[name]).__name__,
                            help=f"({default}) {comments.get(name, '')}".replace("%", "%%"), default=argparse.SUPPRESS)
    known, unknown = parser.parse_known_args(argv)
    for word in unknown:
        name = word.split("=")[0].lstrip("-").upper()
        near = [f"--{n.lower()}" for n in difflib.get_close_matches(name, scopes, 3, 0.5)]
        parser.exit(2, f"{Path(__file__).name}: no constant {name}" + (f"; did you mean {' or '.join(near)}?\n" if near else "; see --help\n"))
    given = {name.upper(): value for name, value in vars(known).items()}
    for name, value in given.items():
        if not isinstance(value, str) and not (math.isfinite(value) and (value >= 0 or scopes[name][name] < 0)):
            parser.exit(2, f"{Path(__file__).name}: {name} must be finite{', and at least 0' * (scopes[name][name] >= 0)}, not {value}\n")
    kinds = [given.get("TASK", TASK)] + (["tiny", f"tiny {given.get('TASK', TASK)}"] if is_tiny(given) else [])
    for values in [sets.get(kind, {}) for kind in kinds] + [given]:
        for name, value in values.items():
            scopes[name][name] = value
    if TASK not in reward.TASKS:
        parser.exit(2, f"{Path(__file__).name}: unknown TASK {TASK!r}; there is {', '.join(reward.TASKS)}\n")
    return {name: scope[name] for name, scope in scopes.items()}


def is_tiny(given: dict) -> bool:
    """Whether the TINY constants hold: MODEL=tiny, MODEL=auto without a GPU, or a policy that began as one of these."""
    model = given.get("MODEL", MODEL)
    with contextlib.suppress(OSError, ValueError):          # what is damaged is named where it is loaded
        return bool(json.loads(Path(model, "config.json").read_text(encoding="utf-8")).get("tiny"))
    return model == "tiny" or (model == "auto" and not torch.cuda.is_available())


def start_run(folder: Path, constants: dict, inputs: dict[str, str], device: str) -> dict | None:
    """Takes the run folder for this process alone; returns the header of a new run, for new_run, or None where a cut-off one can go on.

    Exits with 0 where the folder holds the finished run of the same constants and inputs; with the difference and the two ways out
    where it holds another one; and where another process works in it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.parent / f".{folder.name}.lock", os.O_RDWR | os.O_CREAT)      # never closed: it is held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"{folder}: another process works in it. Wait for its end, or set OUT= to another folder")
    # they say where and how fast, not what
    free = ("OUT", "DATA", "SFT", "RAW", "RESUME", "STRICT", "THREADS", "ROLLOUT_ROWS", "ROLLOUT_COPY", "MICRO_BATCH_TOKENS", "EVAL_BATCH_TOKENS",
            "HEAD_CHUNK", "GRADIENT_CHECKPOINTING", "CUDA_GRAPHS", "SAVE_EVERY", "KEEP_LAST", "API_THREADS", "API_TIMEOUT", "API_RETRIES",
            "API_PRICE_IN", "API_PRICE_OUT", "API_MAX_COST", "MAX_MISSING")
    sources = [Path(__file__).resolve(), Path(reward.__file__).resolve()]
    header = {"constants": constants, "inputs": inputs | {path.name: sha256(path) for path in sources}, "device": device,
              "python": platform.python_version(), "versions": {p: version(p) for p in ("torch", "transformers", "peft", "bitsandbytes", "numpy")}}
    run, finished = folder / "run.json", (folder / "summary.json").is_file()
    if folder.is_dir() and any(path.suffix not in (".png", ".tmp") for path in folder.iterdir()) and not run.is_file():
        sys.exit(f"{folder} holds files that are not of a run: choose another OUT=")
    if RESUME and (finished or any(folder.glob("*.jsonl")) or any(folder.glob("step-*"))):
        try:
            old = json.loads(run.read_text(encoding="utf-8"))
            then, now = ({**h["constants"], **h["inputs"]} for h in (old, header))
        except (ValueError, TypeError, KeyError) as error:
            sys.exit(f"{run} is damaged: {error!r}.\nOUT= another folder keeps the run, RESUME=0 replaces it")
        changed = [f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in {**then, **now}
                   if then.get(name) != now.get(name) and name not in free]
        if changed:
            sys.exit(f"{folder} is {'a finished' if finished else 'an unfinished'} run of something else: {'; '.join(changed)}.\n"
                     "OUT= another folder keeps it, RESUME=0 replaces it")
        if finished:
            (folder / "summary.json").touch()
            print(f"{folder} is complete: nothing to do")
            sys.exit(0)
        return None
    return header


def new_run(folder: Path, header: dict) -> None:
    """Puts an empty run in the place of the folder, with source, constants, versions, device and hashes of the inputs; prints the constants.

    Called once all that may fail at the start, such as a model that is not there, has not: an old run is not lost to a typo.
    """
    replaced = folder.parent / f".{folder.name}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.is_dir():
        os.rename(folder, replaced)         # at once: half a folder would be nobody's
    folder.mkdir()
    write_json(folder / "run.json", header)
    for source in (__file__, reward.__file__):
        shutil.copy(source, folder)
    shutil.rmtree(replaced, ignore_errors=True)
    print("\n".join(f"{name} = {value!r}" for name, value in header["constants"].items()))


def finish_run(folder: Path, summary: dict) -> None:
    """Writes summary.json, whose presence says that the run is complete, and prints it as `name: value` lines."""
    write_json(folder / "summary.json", summary)
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))


def write_json(path: Path, value) -> None:
    """Writes a file aside, flushes it to the disk, and renames it into place: it is never half written."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    flush(aside)
    os.replace(aside, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def damage(folder: Path) -> str:
    """What is wrong with the files of a policy or checkpoint, by the sizes and sha256 of its manifest.json; empty where nothing is."""
    try:
        for name, (size, digest) in json.loads((folder / "manifest.json").read_bytes())["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if sha256(path) != digest:
                return f"the sha256 of {name} is not that of manifest.json"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read: {error}"
    return ""


def refuse_damaged(policy: Path) -> None:
    """Exits where the files of a policy are not those of its manifest; one that somebody else made has none."""
    found = damage(policy) if (policy / "manifest.json").is_file() else ""
    if found:
        sys.exit(f"the policy {policy} is damaged: {found}.\nRemove its summary.json and run the command that made it: it comes back from its step-N")


def use_data(data: Path) -> dict[str, str]:
    """Gives the reward what it takes from the data folder, or from the one above it, and returns its sha256. Exits where that is not there."""
    table = next((path for path in (data / "table.json", data.parent / "table.json") if path.is_file()), data / "table.json")
    try:
        reward.use_data(TASK, table.parent)
    except ValueError as error:
        sys.exit(str(error))
    return {"table.json": sha256(table)} if TASK == "lyrics" else {}


def try_score(text: str, row: dict, truncated: bool) -> tuple[dict[str, float] | None, str]:
    """Scores of a completion, or None and what is wrong: a reward of one's own may fail in any way, and a night's run must go on."""
    try:
        scores = {name: float(value) for name, value in reward.score(TASK, text, row, truncated).items()}
        if not {"reward", "correct", "answered"} <= set(scores) or not all(map(math.isfinite, scores.values())):
            raise ValueError(f"reward, correct and answered are expected, and finite numbers alone, not {scores}")
        return scores, ""
    except Exception as error:
        return None, f"{error!r}, for {row['prompt']!r} and {text!r}"[:1000]


def fingerprint(name: str, place: str) -> dict[str, str]:
    """sha256 of the weights of a policy folder and of its adapter's base, under `name/file`; the commit of a hub model."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    refuse_damaged(Path(place))
    if len(Path(place).parts) > 1 and Path(Path(place).parts[0]).is_dir() and not Path(place).is_dir():
        sys.exit(f"{name}={place}: there is no such folder")            # and no such name on the hub: its first part is a folder here
    adapter = Path(place, "adapter_config.json")
    base = fingerprint(f"{name}/base", json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]) if adapter.is_file() else {}
    if Path(place).is_dir():
        return {f"{name}/{file.name}": sha256(file) for file in sorted(Path(place).glob("*.safetensors"))} | base
    try:
        return {name: extract_commit_hash(cached_file(place, "config.json", revision=REVISION or None), None)}
    except OSError:
        return {}               # load_model says what to do


def read_rows(path: Path, needs: tuple[str, ...]) -> list[dict]:
    """Rows of a jsonl file, each with the named text fields. Blank lines are left out.

    Exits with file, line and reason at the first bad row; with STRICT=0 bad rows are skipped and counted.
    """
    if not path.is_file():
        sys.exit(f"{path} is missing: run `make data` (or set DATA= to a folder that has it)")

    def unique(pairs):
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
        return dict(pairs)

    def refuse(word):
        raise ValueError(f"{word} is no number of JSON")

    rows, ids, skipped = [], {}, []
    with open(path, "rb") as file:          # bytes, so that a line that is not UTF-8 is named too
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig")
                if not text.strip():
                    continue
                row = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
                if not isinstance(row, dict):
                    raise ValueError(f"an object is expected, not {type(row).__name__}")
                if "\\ud" in text.lower():
                    json.dumps(row, ensure_ascii=False).encode()        # half a surrogate pair is no text that a tokenizer takes
                for name in needs:
                    if not isinstance(row.get(name), str) or not row[name]:
                        raise ValueError(f"{name!r} must be a text, not {row.get(name)!r}")
                reward.check_row(TASK, row)
                if row.get("id") is not None and ids.setdefault(str(row["id"]), number) != number:
                    raise ValueError(f"the id {row['id']!r} is that of line {ids[str(row['id'])]} too")
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                skipped.append(f"{path}:{number}: {error}")
                if STRICT:
                    sys.exit(skipped[0])
                continue
            rows.append(row)
    if skipped:
        print(f"{len(skipped)} rows of {path} are bad and skipped, the first: {skipped[0]}")
    if not rows:
        sys.exit(f"{path} is empty: run `make data`")
    return rows


def held_out(train: list[dict], rows: list[dict], path: Path) -> list[dict]:
    """Rows of a file that is measured on. Exits where some are among those that are trained on; with STRICT=0 these are left out."""
    seen = {reward.identity(TASK, row) for row in train}
    kept = [row for row in rows if reward.identity(TASK, row) not in seen]
    if len(kept) < len(rows):
        shared = next(row["prompt"] for row in rows if reward.identity(TASK, row) in seen)
        found = f"{len(rows) - len(kept)} of {len(rows)} rows of {path} are in train.jsonl too, the first is {shared!r}"
        if STRICT or not kept:
            how = "make data HOLDOUT=file" if TASK == "game24" else "take their texts out of RAW, then make data"
            sys.exit(f"{found}: what is measured on them says nothing. Make data that holds them out ({how})")
        print(f"{found}: left out of what is measured")
    return kept


# ---- plumbing: checkpoints and faults -------------------------------------------------------------------------------


def save_checkpoint(folder: Path, run: SimpleNamespace, model, tokenizer, optimizers: list) -> None:
    """Writes folder/step-N: the policy as transformers or peft reads it, the logs, and state.pt with all else that the next step needs.

    Aside first, flushed to the disk, its manifest of sizes and sha256 last, then renamed and read back. Only then older ones go, but
    for the last KEEP_LAST and what was the best at each of them. A new best policy is copied to the run folder. Exits where it cannot be
    written, the older ones intact.
    """
    aside, place = folder / "saving", folder / f"step-{run.step}"
    shutil.rmtree(aside, ignore_errors=True)
    kind, keys, *rest = numpy.random.get_state()
    state = {"run": vars(run), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
             "random": {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest], "torch": torch.get_rng_state(),
                        "cuda": torch.cuda.get_rng_state_all()}}
    try:
        model.save_pretrained(aside, **({"selected_adapters": ["default"]} if hasattr(model, "peft_config") else {}))
        tokenizer.save_pretrained(aside)
        torch.save(state, aside / "state.pt")
        for file in (folder / "run.json", *folder.glob("*.jsonl")):
            shutil.copy(file, aside)
        seal(aside, run.step)
        shutil.rmtree(place, ignore_errors=True)            # a damaged one, where the run went on from an older one
        os.rename(aside, place)
        flush(folder)
        if damage(place):
            raise OSError(f"read back, {damage(place)}")
        if run.step in run.bests:
            publish(place, folder)
    except (OSError, RuntimeError, SafetensorError) as error:       # on a full disk torch and safetensors raise the latter two
        shutil.rmtree(aside, ignore_errors=True)
        sys.exit(f"{place} could not be written: {error}\nThe checkpoints before it are as they were. Make room, then start again: the run goes on")
    older = [step for step in checkpoint_steps(folder) if step <= run.step]
    best_then = {max(best for best in run.bests if best <= step) for step in older[-KEEP_LAST:] if step >= min(run.bests, default=math.inf)}
    for step in set(older[:-KEEP_LAST]) - best_then:
        shutil.rmtree(folder / f"step-{step}", ignore_errors=True)


def seal(folder: Path, step: int) -> None:
    """Flushes the files of a folder to the disk, then writes its manifest.json: the step, and the size and sha256 of each."""
    files = sorted(folder.iterdir())
    for file in files:
        flush(file)
    write_json(folder / "manifest.json", {"step": step, "files": {file.name: [file.stat().st_size, sha256(file)] for file in files}})


def publish(checkpoint: Path, folder: Path) -> None:
    """Copies the policy of a checkpoint to the run folder, where the next stage looks for it: each file is renamed into place."""
    aside = folder / "saving"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(checkpoint, aside, ignore=shutil.ignore_patterns("state.pt", "*.jsonl", "run.json", "manifest.json"))
    seal(aside, int(checkpoint.name[5:]))
    for file in sorted(aside.iterdir(), key=lambda path: path.name == "manifest.json"):
        os.replace(file, folder / file.name)
    aside.rmdir()
    flush(folder)


def checkpoint_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdigit())


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are those of its manifest. None where a run was cut off before its first.

    Newer ones that are damaged are named, and renamed to damaged-N. Exits where there are only damaged ones: a run never starts again from
    its first step by itself.
    """
    steps, log, damaged = checkpoint_steps(folder), folder / "log.jsonl", []
    for step in reversed(steps):
        found = damage(folder / f"step-{step}")
        if not found:
            print(f"{folder}: goes on after step {step}")
            for other in damaged:           # or it would count as one of those to keep
                shutil.rmtree(folder / f"damaged-{other}", ignore_errors=True)
                os.rename(folder / f"step-{other}", folder / f"damaged-{other}")
            return folder / f"step-{step}"
        print(f"{folder}/step-{step} is damaged and not used: {found}")
        damaged.append(step)
    if steps or (log.is_file() and log.read_bytes().count(b"\n") > 1):
        sys.exit(f"{folder} is a run that was cut off, and has no checkpoint that is whole. RESUME=0 starts it anew")
    log.unlink(missing_ok=True)
    return None


def load_checkpoint(checkpoint: Path, folder: Path, run: SimpleNamespace, optimizers: list) -> None:
    """Puts run, optimizers, random number generators, logs and the best policy back to where they were when the checkpoint was written.

    Exits where state.pt holds anything but numbers, text and tensors: such a file could run code.
    """
    shutil.rmtree(folder / "saving", ignore_errors=True)
    try:
        state = torch.load(checkpoint / "state.pt", weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        sys.exit(f"{checkpoint}/state.pt is refused, it is not what this script writes: {str(error)[:300]}")
    vars(run).update(state["run"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    random.setstate(state["random"]["python"])
    numpy.random.set_state(state["random"]["numpy"])
    torch.set_rng_state(state["random"]["torch"])
    torch.cuda.set_rng_state_all(state["random"]["cuda"])
    for name in ("log.jsonl", "samples.jsonl"):         # without the lines of steps that come again
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, folder / "copying.tmp")
            os.replace(folder / "copying.tmp", folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    for best in run.bests[-1:]:
        if not damage(folder / f"step-{best}"):
            publish(folder / f"step-{best}", folder)
        elif damage(folder) or json.loads((folder / "manifest.json").read_bytes())["step"] != best:
            sys.exit(f"the best policy, of step {best}, is damaged, in {folder}/step-{best} and in {folder}. RESUME=0 starts the run anew")


def catch_signals() -> list[int]:
    """A list that takes the first SIGINT, SIGTERM or SIGHUP, so that the step can end and be saved; a second one quits at once.

    Those within a second count as one: Ctrl-C and batch systems may reach a process twice, the other time through make.
    """
    received, (read_end, write_end) = [], os.pipe()

    def watch():            # a thread learns of a signal at once, also while the main one is deep in torch
        first = 0.0
        while number := os.read(read_end, 1)[0]:
            if not received:
                first = time.monotonic()
                received.append(number)
                os.write(2, b"\nstops after this step, with a checkpoint; a second signal quits at once\n")
            elif time.monotonic() - first > 1:
                os._exit(128 + number)

    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:          # as nohup sets it
            signal.signal(number, lambda *_: None)
    threading.Thread(target=watch, daemon=True).start()
    return received


def may_step(norm: float, loss: float, run: SimpleNamespace) -> bool:
    """Whether the optimizer may step: loss and gradient norm are finite, and the norm no spike where SKIP_SPIKES is set. Counted in run.

    A step with a NaN stays in the moments of Adam for good, and clipping makes NaN of an infinite gradient: so there is no step at all.
    """
    finite = math.isfinite(norm) and math.isfinite(loss)
    spike = finite and len(run.norms) >= 20 and norm > statistics.fmean(run.norms) + SPIKE * statistics.pstdev(run.norms)
    run.norms = (run.norms + [norm] * finite)[-100:]
    run.nonfinite = 0 if finite else run.nonfinite + 1
    run.spikes += spike
    run.skipped += not finite or (spike and bool(SKIP_SPIKES))
    return finite and not (spike and SKIP_SPIKES)


if __name__ == "__main__":
    main()
