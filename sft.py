"""Supervised fine-tuning: teaches a model to write completions like those in the data, the starting point for GRPO.

    python sft.py                                           # MODEL=tiny on a CPU, Qwen2.5-1.5B with QLoRA on a GPU
    python sft.py --model=Qwen/Qwen2.5-0.5B --load_4bit=0

MODEL=tiny is a word-level Llama with 0.8 million parameters, trained from scratch in 11 minutes on two CPU cores, for
machines without a GPU or a model hub. Any other MODEL is a Hugging Face causal LM, by name or folder. The loss covers
only the completion, including its end-of-sequence token. Differs from the usual trainer in two ways: batches are padded
on the right, which needs no attention mask under causal attention, and only completion tokens reach the output layer,
so the logits of a vocabulary of 152,000 never fill the memory.
"""

import ast
import contextlib
import difflib
import fcntl
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
import zipfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import torch
from bitsandbytes.optim import AdamW8bit
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, PreTrainedTokenizerFast

import reward

# Run
TASK = "game24"              # game24, lyrics, or your own in reward.py
DEVICE = "cuda" if torch.cuda.is_available() or os.path.exists("/dev/nvidia0") else "cpu"
MODEL = "Qwen/Qwen2.5-1.5B-Instruct" if DEVICE == "cuda" else "tiny"     # tiny, a hub name, or a folder
TINY = MODEL == "tiny"
LYRICS = TASK == "lyrics"
OUT = f"runs/{TASK}"         # root of the run: this script writes OUT/sft
DATA = f"{OUT}/data"         # folder with train.jsonl and val.jsonl
INIT_FROM = MODEL            # policy to start from: MODEL, or the folder of an earlier stage
VOCABULARY = ""              # jsonl of a later stage whose words a new tiny model must also know
SEED = 0
THREADS = torch.get_num_threads()
# Model
LORA_RANK = 0 if TINY else 32          # on all linear layers; 0: train all weights
LORA_ALPHA = 64                        # the update is scaled by LORA_ALPHA / LORA_RANK
LOAD_4BIT = 1 if LORA_RANK else 0      # NF4 with double quantisation; 0: bf16 for LoRA on a GPU, else fp32
BF16 = int(torch.cuda.is_bf16_supported(False) if DEVICE == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported())
GRADIENT_CHECKPOINTING = 0 if TINY else 1        # recompute activations: less memory, a third more time
# Training
SFT_STEPS = (1600 if LYRICS else 5400) if TINY else 600      # optimizer steps, ...
MAX_EPOCHS = 4 if LYRICS else 0        # ... or fewer: at most this many passes over the data; 0: no limit
SFT_LR = 3e-3 if TINY else 2e-4        # peak; LoRA takes about ten times the rate for all weights
MUON_LR = 3e-3 if TINY else 0.0        # peak of Muon, for matrices trained from scratch; 0: AdamW trains everything
SFT_WARMUP = 0.05                      # share of the steps in which the learning rate rises; then a cosine down to ...
SFT_MIN_LR = 0.05                      # ... this share of the peak
SFT_WEIGHT_DECAY = 0.05 if TINY else 0.0
GRAD_CLIP = 1.0                        # maximum norm of the gradient
BATCH_TOKENS = 2048 if TINY else 16384 # tokens per optimizer step, padding included
MICRO_BATCH_TOKENS = 4096              # tokens per forward pass: affects memory and speed, not the result
MAX_TOKENS = 1536                      # longer samples are left out and counted
HEAD_CHUNK = 2048 if TINY else 512     # completion tokens whose logits are in memory at a time
# Evaluation and saving
SFT_EVAL_EVERY = (1600 if LYRICS else 1800) if TINY else 200      # steps between val losses; the best policy is kept
SAVE_EVERY = 100 if TINY else 20       # steps between checkpoints: the most a crash can cost
# The shape of MODEL=tiny
TINY_WIDTH = 128                       # hidden size; the MLP is three times as wide
TINY_LAYERS = 4
TINY_HEADS = 4                         # query heads; half as many key-value heads

free = {"OUT", "DATA", "VOCABULARY", "THREADS", "MICRO_BATCH_TOKENS", "HEAD_CHUNK", "GRADIENT_CHECKPOINTING",
        "SAVE_EVERY", *filter(str.isupper, vars(reward))}     # may change within a run: they affect no result


# ---- model and data -------------------------------------------------------------------------------------------------


def new_tiny_model(texts: list[str]):
    """An untrained Llama, and a tokenizer whose vocabulary is the words in the texts."""
    tokenizer = tiny_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=TINY_WIDTH, intermediate_size=3 * TINY_WIDTH, tie_word_embeddings=True,
        num_hidden_layers=TINY_LAYERS, num_attention_heads=TINY_HEADS, num_key_value_heads=TINY_HEADS // 2,
        max_position_embeddings=2048, tiny=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(DEVICE), tokenizer


def tiny_tokenizer(texts: list[str]):
    """A token is a number, operator, tag, newline, or Chinese character or mark; ids follow the order of first use."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    word = r"\n|</?[a-z]+>|[^\s!-~]|[!-;=-~]+|<"
    words = dict.fromkeys(["<pad>", "<eos>", "<unk>"])
    for text in texts:
        words.update(dict.fromkeys(re.findall(word, text)))
    words["\n"] = None
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(word), behavior="removed", invert=True)
    no_space = Regex(r"(?<=[^\x00-\x7f]) | (?=[^\x00-\x7f])")        # Chinese has no spaces between words
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(),
                                           decoders.Replace(" \n ", "\n"), decoders.Replace(no_space, "")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)


def encode(tokenizer, rows: list[dict]) -> list[tuple[list[int], int]]:
    """Samples (token ids of prompt, completion and EOS; length of the prompt) with at most MAX_TOKENS tokens."""
    prompts = {prompt: encode_prompt(tokenizer, prompt) for prompt in {row["prompt"] for row in rows}}
    samples = []
    for row in rows:
        completion = tokenizer(row["completion"], add_special_tokens=False).input_ids
        samples.append((prompts[row["prompt"]] + completion + [tokenizer.eos_token_id], len(prompts[row["prompt"]])))
    kept = [sample for sample in samples if len(sample[0]) <= MAX_TOKENS]
    print(f"{len(samples) - len(kept)} of {len(samples)} samples exceed MAX_TOKENS={MAX_TOKENS} and are left out")
    return kept


def epoch_batches(lengths: list[int], seed: str) -> list[list[int]]:
    """All rows once, in batches of similar lengths with at most BATCH_TOKENS tokens, in random order.

    Rows are sorted by length only within random pools of 4,096, so that batches differ from epoch to epoch.
    """
    rng = random.Random(seed)
    order = rng.sample(range(len(lengths)), len(lengths))
    batches = []
    for start in range(0, len(order), 4096):
        pool = order[start:start + 4096]
        batches += [[pool[i] for i in batch] for batch in micro_batches([lengths[row] for row in pool], BATCH_TOKENS)]
    rng.shuffle(batches)
    return batches


def make_optimizers(model) -> list:
    """Muon for the matrices of a model trained from scratch, AdamW for everything else, including adapters."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = MUON_LR > 0 and parameter.ndim == 2 and not re.search("embed|lm_head|lora_", name)
            (matrices if is_matrix else others).append(parameter)
    make_adamw = AdamW8bit if LORA_RANK else torch.optim.AdamW
    optimizers = [make_adamw(others, lr=SFT_LR, betas=(0.9, 0.95), weight_decay=SFT_WEIGHT_DECAY)]
    if matrices:
        optimizers.append(Muon(matrices, {"lr": MUON_LR, "weight_decay": SFT_WEIGHT_DECAY}))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz iterations, scaled to suit AdamW's learning rates (arXiv:2502.16982).

    torch's Muon takes one matrix at a time, in bf16 even on a CPU that emulates it: SFT took three times as long there.
    """

    @torch.no_grad()
    def step(self) -> None:
        [group] = self.param_groups
        by_shape = defaultdict(list)
        for matrix in group["params"]:
            momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
            momentum.lerp_(matrix.grad, 0.05)
            by_shape[matrix.shape].append((matrix, matrix.grad.lerp(momentum, 0.95)))
        for (rows, columns), matrices_and_updates in by_shape.items():
            matrices, updates = zip(*matrices_and_updates)
            updates = torch.stack(updates).to(torch.bfloat16 if BF16 else torch.float32)
            updates = updates / updates.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            wide = updates if rows <= columns else updates.mT
            for _ in range(5):          # drives the singular values towards 1
                gram = wide @ wide.mT
                polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
                wide = torch.baddbmm(wide, polynomial, wide, beta=3.4445)
            for matrix, update in zip(matrices, wide if rows <= columns else wide.mT):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * max(rows, columns) ** 0.5 * group["lr"])


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak at a step, counted from 1: linear warm-up, then a cosine down to SFT_MIN_LR."""
    warmup = max(1, round(SFT_WARMUP * steps))
    if step <= warmup:
        return step / warmup
    progress = (step - 1 - warmup) / max(1, steps - warmup)
    return SFT_MIN_LR + (1 - SFT_MIN_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def mean_loss(model, samples: list[tuple[list[int], int]]) -> float:
    """Mean loss over the completion tokens; also computes its gradient if gradients are enabled."""
    model.zero_grad()
    count = sum(len(ids) - prompt_length for ids, prompt_length in samples)
    total = 0.0
    for rows in micro_batches([len(ids) for ids, _ in samples], MICRO_BATCH_TOKENS):
        input_ids, loss_mask = collate([samples[row] for row in rows])
        loss = -completion_logprobs(model, input_ids, loss_mask)[0].sum() / count
        if torch.is_grad_enabled():
            loss.backward()
        total += loss.item()
    return total


# ---- training -------------------------------------------------------------------------------------------------------


def main() -> None:
    constants = configure(sys.argv[1:])
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    data = Path(DATA)
    train = reward.read_rows(TASK, data / "train.jsonl", "prompt", "completion")
    val = reward.read_rows(TASK, data / "val.jsonl", "prompt")
    reward.refuse_overlap(TASK, train, val, data / "val.jsonl")
    inputs = {path.name: sha256(path) for path in (data / "train.jsonl", data / "val.jsonl")}
    if VOCABULARY:
        inputs["vocabulary"] = sha256(Path(VOCABULARY))
    if INIT_FROM != "tiny":
        model, tokenizer = load_model(INIT_FROM)
        inputs["weights"] = [sha256(path) for path in sorted(Path(INIT_FROM).glob("*.safetensors"))]
    folder = open_run(Path(OUT, "sft"), constants, inputs)
    if INIT_FROM == "tiny":
        later = reward.read_rows(TASK, Path(VOCABULARY), "prompt", "completion") if VOCABULARY else []
        model, tokenizer = new_tiny_model([f"{row['prompt']} {row['completion']}" for row in train + later])
    samples = encode(tokenizer, train) or sys.exit("no sample is left: raise MAX_TOKENS")
    val_samples = encode(tokenizer, [row for row in val if row.get("completion")])
    lengths = [len(ids) for ids, _ in samples]
    if max(lengths) > model.config.max_position_embeddings:
        sys.exit(f"the longest sample has {max(lengths)} tokens, but {INIT_FROM} knows only "
                 f"{model.config.max_position_embeddings} positions: lower MAX_TOKENS={MAX_TOKENS}")
    batches_per_epoch = len(epoch_batches(lengths, f"{SEED} 0"))
    steps = min(SFT_STEPS, MAX_EPOCHS * batches_per_epoch) if MAX_EPOCHS else SFT_STEPS
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = make_optimizers(model)
    print(f"{sum(p.numel() for p in parameters):,} of {model.num_parameters():,} parameters train for {steps} steps")
    run = {"step": 0, "tokens": 0, "seconds": 0.0, "best_step": 0, "best_val_loss": math.inf, "skipped": 0}
    load_checkpoint(folder, run, parameters, optimizers)
    writer = SummaryWriter(folder / "tensorboard", purge_step=run["step"] + 1)
    began = time.time() - run["seconds"]
    # each step takes one batch, so a resumed run skips those of the steps before it
    epochs = (epoch_batches(lengths, f"{SEED} {epoch}") for epoch in itertools.count())
    batches = itertools.islice(itertools.chain.from_iterable(epochs), run["step"], None)
    model.train()

    for step in tqdm(range(run["step"] + 1, steps + 1), "sft", unit="step", initial=run["step"], total=steps):
        batch = [samples[row] for row in next(batches)]
        loss = halve_on_oom("MICRO_BATCH_TOKENS", mean_loss, model, batch)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, GRAD_CLIP).item()
        for optimizer, peak in zip(optimizers, (SFT_LR, MUON_LR)):
            optimizer.param_groups[0]["lr"] = peak * learning_rate(step, steps)
            if math.isfinite(grad_norm):        # a NaN would stay in Adam's moments for good
                optimizer.step()
        run["skipped"] += not math.isfinite(grad_norm)
        run["tokens"] += sum(len(ids) for ids, _ in batch)
        run |= {"step": step, "seconds": time.time() - began}
        log = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": SFT_LR * learning_rate(step, steps),
               "skipped": run["skipped"], "tokens": run["tokens"], "tokens_per_s": run["tokens"] / run["seconds"],
               "seconds": run["seconds"], "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
        if step % SFT_EVAL_EVERY == 0 or step == steps:
            with torch.no_grad():        # if val has no completions, the last policy counts as best
                log["val_loss"] = mean_loss(model, val_samples) if val_samples else 0.0
            tqdm.write("  ".join(f"{name} {value:.5g}" for name, value in log.items()))
            if log["val_loss"] <= run["best_val_loss"]:
                run |= {"best_step": step, "best_val_loss": log["val_loss"]}
                with atomic_write(folder / "best.pt", "wb") as file:
                    torch.save([each.data for each in parameters], file)
        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(log) + "\n")
        for name, value in log.items():
            writer.add_scalar(name, value, step)
        if step % SAVE_EVERY == 0 or step % SFT_EVAL_EVERY == 0 or step == steps:
            save_checkpoint(folder, run, parameters, optimizers)

    writer.close()
    # the best policy, in the format of transformers or peft, for the next stage
    set_weights(parameters, load_tensors(folder / "best.pt") or sys.exit(f"delete {folder} to train again"))
    model.save_pretrained(folder, save_embedding_layers=False)      # for peft: none is trained; transformers ignores it
    tokenizer.save_pretrained(folder)
    summary = {"steps": steps, **{name: run[name] for name in ("best_step", "best_val_loss", "skipped", "seconds")}}
    write_json(folder / "summary.json", summary)
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))


# ---- log-probs and micro-batches: the same in sft.py and grpo.py ----------------------------------------------------


def completion_logprobs(model, input_ids, loss_mask, temperature: float = 1.0, entropy_has_gradient: bool = False):
    """Log-probs (B, T-1) of the tokens input_ids[:, 1:] at a temperature, 0 outside loss_mask; entropies likewise.

    input_ids (B, T) is padded on the right, which needs no attention mask under causal attention. Only the positions of
    loss_mask (B, T-1) reach the output layer, HEAD_CHUNK at a time; with more, the backward pass recomputes the logits.
    """
    def of_chunk(hidden, targets):
        logprobs = torch.log_softmax(model.lm_head(hidden).float() / temperature, -1)
        of_targets = logprobs.gather(1, targets[:, None])[:, 0]      # first: recomputation can stop here
        with torch.set_grad_enabled(entropy_has_gradient and torch.is_grad_enabled()):
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return of_targets, entropy

    with torch.autocast(DEVICE, torch.bfloat16, enabled=bool(BF16)):
        hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1][loss_mask]
        targets = input_ids[:, 1:][loss_mask]
        chunks = []
        for chunk in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK)):
            recompute = torch.is_grad_enabled() and len(targets) > HEAD_CHUNK
            chunks.append(checkpoint(of_chunk, *chunk, use_reentrant=False) if recompute else of_chunk(*chunk))
    return [loss_mask.float().masked_scatter(loss_mask, torch.cat(values)) for values in zip(*chunks)]


def collate(samples: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids (B, T), padded on the right to a multiple of 8, and loss_mask (B, T-1) of the completion tokens.

    A sample is (token ids, length of the prompt): the mask comes from lengths, never from token values.
    """
    lengths = torch.tensor([len(ids) for ids, _ in samples])
    prompt_lengths = torch.tensor([prompt_length for _, prompt_length in samples])
    input_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in samples], batch_first=True)
    input_ids = torch.nn.functional.pad(input_ids, (0, -input_ids.shape[1] % 8))
    position = torch.arange(1, input_ids.shape[1])
    loss_mask = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
    return input_ids.to(DEVICE), loss_mask.to(DEVICE)


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Rows sorted by length, in batches of at most `budget` tokens, padding included; a longer row is its own batch."""
    batches = [[]]
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches[-1] and math.ceil(lengths[row] / 8) * 8 * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def halve_on_oom(name: str, work, *args):
    """work(*args), retried with the constant `name`, which it reads, halved whenever the GPU runs out of memory."""
    while True:
        try:
            return work(*args)
        except torch.OutOfMemoryError:
            if globals()[name] == 1:
                raise
        torch.cuda.empty_cache()       # not in `except`, where the error still holds the tensors of the failed work
        globals()[name] //= 2
        tqdm.write(f"out of memory: {name}={globals()[name]} from here on")


# ---- model: the same in sft.py and grpo.py --------------------------------------------------------------------------


def load_model(path: str):
    """Model to train and its tokenizer, by hub name or folder: with the folder's LoRA adapter, else with a new one if
    LORA_RANK > 0. Exits if the model cannot be loaded, or if MODEL is tiny and it is not, or the reverse.
    """
    is_adapter = Path(path, "adapter_config.json").is_file()
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.bfloat16 if BF16 else torch.float32)
    try:
        torch.zeros(1, device=DEVICE)        # before any download: raises if the GPU's driver does not work
        if not Path(path).exists() and (path.count("/") > 1 or "/" in path and Path(path).parent.is_dir()):
            raise OSError("no such folder")
        base = PeftConfig.from_pretrained(path).base_model_name_or_path if is_adapter else path
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            base, use_safetensors=True, quantization_config=nf4 if LOAD_4BIT else None, device_map={"": DEVICE},
            dtype=torch.bfloat16 if DEVICE == "cuda" and BF16 and LORA_RANK else torch.float32,
            attn_implementation="sdpa" if DEVICE == "cuda" else "eager")     # eager trains faster on a CPU
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        sys.exit(f"cannot load {path!r}: {str(error).splitlines()[0]}\nMODEL is tiny, which needs no download, a "
                 "hub name, or a folder with config.json, model.safetensors and tokenizer, such as models/smollm2 from "
                 "`make smollm2` (tests/smollm2.py converts a .gguf); `make sft` makes SFT; DEVICE=cpu uses no GPU")
    if TINY != getattr(model.config, "tiny", False):
        sys.exit(f"the constants are for MODEL={MODEL}, but {path} is {'not ' if TINY else ''}a tiny model: set MODEL= "
                 "to the model that it was trained from")
    if is_adapter:
        model = PeftModel.from_pretrained(model, path, is_trainable=True)
    elif LORA_RANK:
        model = get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0,
                                                 target_modules="all-linear", task_type="CAUSAL_LM"))
    for module in model.modules():
        # else the first rollout would repack the 4-bit weights, for good, into a form that has no gradient
        module.support_avx512bf16_for_cpu = False
        if isinstance(module, torch.nn.Dropout):        # of an adapter from elsewhere: log-probs would be random
            module.p = 0.0
    if GRADIENT_CHECKPOINTING:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model, tokenizer


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, in the model's chat template if it has one."""
    if tokenizer.chat_template is None:
        ids = tokenizer(prompt + "\n").input_ids        # with a BOS if the model has one, but without an EOS
        return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
    # some templates show today's date: fix it, so that the prompt is the same every day
    template = re.sub(r"strftime_now\([^()]*\)", "'1 Jan 2025'", tokenizer.chat_template)
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], chat_template=template, tokenize=False,
                                         add_generation_prompt=True)
    text = text.removesuffix("<think>\n")        # some templates open it, but our completions open it themselves
    return tokenizer(text, add_special_tokens=False).input_ids


# ---- checkpoints: the same in sft.py and grpo.py --------------------------------------------------------------------


def save_checkpoint(folder: Path, run: dict, parameters: list, optimizers: list) -> None:
    """Writes step-N.pt, all that the next step needs, and keeps the one before. Random numbers are seeded per step."""
    state = {"run": run, "weights": [parameter.data for parameter in parameters],
             "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    with atomic_write(folder / f"step-{run['step']:06d}.pt", "wb") as file:
        torch.save(state, file)
    for path in sorted(folder.glob("step-*.pt"))[:-2]:
        path.unlink()


def load_checkpoint(folder: Path, run: dict, parameters: list, optimizers: list) -> None:
    """Restores run, weights and optimizers from the newest intact checkpoint, if any, and truncates the logs to it."""
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        if state := load_tensors(path):
            print(f"resuming {folder} after step {state['run']['step']}")
            run |= state["run"]
            set_weights(parameters, state["weights"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            break
        path.unlink()
    for path in folder.glob("*.jsonl"):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]       # without the half line that a kill can leave
        with atomic_write(path) as file:
            file.writelines(f"{line}\n" for line in lines if json.loads(line)["step"] <= run["step"])


def load_tensors(path: Path):
    """What torch.save wrote; None if missing or damaged, by the zip's checksums, which torch.load does not check."""
    with contextlib.suppress(zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        if zipfile.ZipFile(path).testzip() is None:
            return torch.load(path, map_location=DEVICE, weights_only=True)
    print(f"{path} is missing or damaged")
    return None


def set_weights(parameters: list, weights: list) -> None:
    for parameter, saved in zip(parameters, weights, strict=True):
        parameter.data.copy_(saved)


# ---- constants and run folders: the same in every script ------------------------------------------------------------


def configure(argv: list[str]) -> dict:
    """Sets constants of this script and reward.py from NAME=value or --name=value, and returns all of them.

    The top of each file is run again, statement by statement, with these values reapplied after each one, so constants
    that depend on a changed one follow it. Exits if no script has the name. Constants of other scripts are ignored,
    because make passes every constant to every script.
    """
    own = Path(__file__)
    given = {name.lstrip("-").upper(): value for name, _, value in (word.partition("=") for word in argv)}
    if {"H", "HELP"} & given.keys():
        print(own.read_text(encoding="utf-8").partition("\n\n\n#")[0])
        sys.exit()
    tops = {path.name: re.split("\ndef |\n@", path.read_text(encoding="utf-8"))[0] for path in own.parent.glob("*.py")}
    known = set(re.findall(r"^([A-Z]\w*) *=", "\n".join(tops.values()), re.M))
    for name in given.keys() - known:
        sys.exit(f"no script has a constant {name}; nearest: {', '.join(difflib.get_close_matches(name, known))}")
    for path, scope in ((Path(reward.__file__), vars(reward)), (own, globals())):
        for statement in ast.parse(tops[path.name]).body:
            exec(compile(ast.Module([statement], []), str(path), "exec"), scope)
            for name in given.keys() & scope.keys():
                kind = int if isinstance(scope[name], bool) else type(scope[name])
                try:
                    scope[name] = kind(given[name])
                except ValueError:
                    sys.exit(f"{name} must be of type {kind.__name__}, not {given[name]!r}")
    return {name: value for name, value in (vars(reward) | globals()).items() if name in known}


def open_run(folder: Path, constants: dict, inputs: dict) -> Path:
    """Opens the folder of a run, new or resumed; a different run in its place is first renamed to NAME.1, NAME.2, ...

    A run is the same if its inputs and constants are, except for those in `free`. Exits if it is complete or in use.
    Returns the folder with links resolved, so that a link to another disk survives the renaming.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    open_run.lock = open(folder.with_name(f".{folder.name}.lock"), "a")        # held until the process ends
    try:
        fcntl.flock(open_run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        sys.exit(f"{folder} is in use by another process: set OUT= to another folder ({error})")
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "numpy")}
    run = json.loads(json.dumps({"constants": constants, "inputs": inputs, "versions": versions}))
    if (folder / "run.json").is_file():
        old = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        before, now = ({name: value for name, value in each["constants"].items() if name not in free} | each["inputs"]
                       for each in (old, run))
        changed = [name for name in before | now if before.get(name) != now.get(name)]
        if changed:
            kept = next(path for path in map(f"{folder}.{{}}".format, itertools.count(1)) if not Path(path).exists())
            changes = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed)
            print(f"{folder} holds a different run, moved to {kept} (rename it back to continue it): {changes}")
            folder.rename(kept)
        elif (folder / "summary.json").is_file():
            print(f"{folder} is complete")
            sys.exit()
    folder.mkdir(exist_ok=True)
    write_json(folder / "run.json", run)
    shutil.copy(__file__, folder)
    shutil.copy(reward.__file__, folder)
    print("\n".join(f"{name} = {value!r}" for name, value in constants.items()))
    return folder


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w"):
    """A file that gets its name only once it is complete and on disk, so that it is never half-written."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_json(path: Path, value) -> None:
    with atomic_write(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
