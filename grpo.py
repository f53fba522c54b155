"""Group relative policy optimisation (GRPO) with momentum-normalised advantages, written as one loop.

    python grpo.py                                         # from runs/game24/sft, which `make sft` makes
    python grpo.py --beta=0 --out=runs/no-kl --sft=runs/game24/sft --data=runs/game24/data

A step: 1 rollout, 2 rewards, 3 advantages, 4 old and reference log-probs, 5 clipped update with a KL penalty, 6 log,
evaluate, save. In 30 steps of 32 x 8 completions, 3 minutes on two CPU cores, the tiny model's accuracy on held-out
hands rises from 0.869 to 0.933 (mean of three seeds). Differs from textbook GRPO in four ways: rewards are normalised
by a mix of group and running statistics (report on the 24-point game, eq. 2-4), each line of reasoning can have its own
advantage, the reference is the SFT policy, and the policy that was best on val is kept, because RL curves can fall
again.
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
import statistics
import sys
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

import torch
from bitsandbytes.optim import AdamW8bit
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import reward

# Run
TASK = "game24"              # game24, lyrics, or your own in reward.py
DEVICE = "cuda" if torch.cuda.is_available() or os.path.exists("/dev/nvidia0") else "cpu"
MODEL = "Qwen/Qwen2.5-1.5B-Instruct" if DEVICE == "cuda" else "tiny"     # SFT's base model; sets other constants
TINY = MODEL == "tiny"
LYRICS = TASK == "lyrics"
OUT = f"runs/{TASK}"         # root of the run: this script writes OUT/grpo
DATA = f"{OUT}/data"         # folder with train.jsonl and val.jsonl
SFT = f"{OUT}/sft"           # policy to start from: a folder or a hub name
SEED = 0
THREADS = torch.get_num_threads()
# Model
LORA_RANK = 0 if TINY else 32                    # of the new adapter if SFT has none; 0: train all weights
LORA_ALPHA = 64                                  # the update is scaled by LORA_ALPHA / LORA_RANK
LOAD_4BIT = 1 if LORA_RANK else 0                # NF4 with double quantisation; 0: bf16 for LoRA on a GPU, else fp32
BF16 = int(torch.cuda.is_bf16_supported(False) if DEVICE == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported())
GRADIENT_CHECKPOINTING = 0 if TINY else 1        # recompute activations: less memory, a third more time
# Rollout
PROMPTS_PER_STEP = (16 if LYRICS else 32) if TINY else 12
GROUP_SIZE = 8                                   # completions per prompt
TEMPERATURE = 0.7                                # all log-probs are of logits / TEMPERATURE
TOP_P = 1.0 if TINY else 0.9                     # 1: sampling and log-probs use the same distribution
MAX_NEW_TOKENS = 320 if TINY else 1024
ROLLOUT_ROWS = 272 if TINY else 96               # completions generated at a time: affects memory, not the result
DECODE_CHECK = 16 if DEVICE == "cuda" else 8     # decode steps between checks for finished rows
DECODE_SHRINK = 0.75 if DEVICE == "cuda" else 0.9     # finished rows are dropped once at most this share is unfinished
DECODE_WINDOW = 256 if DEVICE == "cuda" else 16       # tokens by which the attention window grows: a graph for each
# Advantages
BASELINE = "momentum"        # momentum; group: plain GRPO; none: no std (Dr. GRPO); batch: std of the whole step;
                             # rft: 1 for right answers, 0 for others (online rejection sampling)
MOMENTUM_MIN = 0.0           # weight of the running mean and std at the first step, ...
MOMENTUM_STEP = 0.01         # ... what it gains per step, ...
MOMENTUM_MAX = 0.2           # ... and its maximum (the report's value)
CREDIT = "steps" if TINY and TASK == "game24" else "answer"      # steps: each line also has its own advantage
# Update
STEPS = 30 if TINY and not LYRICS else 100      # rollouts
UPDATES_PER_ROLLOUT = 1      # optimizer steps per rollout: clipping matters only above 1
LR = (3e-4 if LYRICS else 4e-4) if TINY else 2e-5     # for LoRA; the report's 2e-6 is for all weights of a large model
WARMUP = 5                   # steps with a rising learning rate, ...
MIN_LR = 0.1                 # ... which then falls linearly to this share of LR, so that late steps waver less
WEIGHT_DECAY = 0.0
GRAD_CLIP = 1.0              # maximum norm of the gradient
CLIP_LOW = 0.2               # the ratio is clipped from 1 - CLIP_LOW ...
CLIP_HIGH = 0.2              # ... to 1 + CLIP_HIGH
BETA = 0.01                  # weight of the KL to the reference, the SFT policy; 0: no reference
REFERENCE_EVERY = 0          # steps after which the policy replaces the reference, again and again; 0: never
ENTROPY_BONUS = 0.01 if TINY and LYRICS else 0.0      # weight of the entropy in the objective (report on PPO and GRPO)
AGGREGATE = "sequence"       # mean per completion first; token: over all tokens at once (DAPO); constant: Dr. GRPO
MICRO_BATCH_TOKENS = 1536 if TINY else 4096      # tokens per forward pass: affects memory and speed, not the result
HEAD_CHUNK = 2048 if TINY else 512               # completion tokens whose logits are in memory at a time
# Evaluation and saving
EVAL_EVERY = 10              # steps between evaluations on val; the best policy is kept
EVAL_SAMPLES = 4 if TINY else 1                  # completions per val prompt, sampled at TEMPERATURE and ...
EVAL_TOP_P = 0.9                                 # ... this top-p, as in eval.py
BEST_BY = "reward" if LYRICS else "accuracy"     # the val metric by which the best policy is chosen
MIN_DISTINCT = 0.9 if LYRICS else 0.0            # the best policy keeps at least this share of the first val distinct-2
PATIENCE = 6 if TINY else 4                      # stop after this many evaluations without a better policy

free = {"OUT", "DATA", "SFT", "THREADS", "ROLLOUT_ROWS", "DECODE_CHECK", "DECODE_SHRINK", "DECODE_WINDOW",
        "MICRO_BATCH_TOKENS", "HEAD_CHUNK", "GRADIENT_CHECKPOINTING"}     # may change within a run


# ---- advantages and loss: pure functions ----------------------------------------------------------------------------


def momentum_advantages(rewards: torch.Tensor, running_mean: float | None, running_std: float | None, momentum: float):
    """Advantages (P, G) of rewards (P, G), and the running mean and std after this step (report, eq. 2-4).

    For each prompt mean = momentum * running_mean + (1 - momentum) * mean of its group, std likewise (unbiased, as in
    TRL), and A = (reward - mean) / (std + 1e-4). Afterwards the running values are updated, with the same momentum, by
    the average over the prompts, so the order of the prompts does not matter. Momentum 0 is plain GRPO. A NaN reward is
    ignored and has advantage 0. Without running values (None at first, NaN after nothing but NaN) a step uses its own.
    """
    mean, std = group_statistics(rewards)
    if running_mean is None or math.isnan(running_mean):
        running_mean, running_std = mean.nanmean().item(), std.nanmean().item()
    prompt_mean = momentum * running_mean + (1 - momentum) * mean
    prompt_std = momentum * running_std + (1 - momentum) * std
    advantages = ((rewards - prompt_mean[:, None]) / (prompt_std[:, None] + 1e-4)).nan_to_num(0.0)
    running_mean = momentum * running_mean + (1 - momentum) * mean.nanmean().item()
    running_std = momentum * running_std + (1 - momentum) * std.nanmean().item()
    return advantages, running_mean, running_std


def group_statistics(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased std (P,) of rewards (P, G), ignoring NaN. Equal rewards have std 0, not a rounding error."""
    count = (~rewards.isnan()).sum(1)
    lowest = rewards.nan_to_num(math.inf).amin(1)
    highest = rewards.nan_to_num(-math.inf).amax(1)
    mean = torch.where(lowest == highest, lowest, rewards.nanmean(1))
    variance = ((rewards - mean[:, None]) ** 2).nansum(1) / (count - 1).clamp(min=1)
    return mean, variance.sqrt().masked_fill(count == 0, math.nan)


def baseline_advantages(rewards: torch.Tensor, baseline: str) -> torch.Tensor:
    """Advantages (P, G): group (GRPO), none (no std: Dr. GRPO, arXiv:2503.20783, eq. 3), batch (std of all rewards)."""
    mean, std = group_statistics(rewards)
    batch_std = group_statistics(rewards.reshape(1, -1))[1]
    scale = {"group": std[:, None] + 1e-4, "none": 1.0, "batch": batch_std + 1e-4}[baseline]
    return ((rewards - mean[:, None]) / scale).nan_to_num(0.0)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, loss_mask, *, clip_low, clip_high, beta, aggregate):
    """Loss and metrics of a batch (report on the 24-point game, eq. 1). Tensors are (B, T-1); advantages may be (B, 1).

    The objective of a token is min(ratio * A, clip(ratio) * A) - beta * k3, where ratio = exp(logprobs - old_logprobs)
    and k3 = exp(d) - d - 1, with d = ref_logprobs - logprobs, estimates the KL (arXiv:2402.03300, eq. 4). aggregate:
    "sequence" is the mean over a completion's tokens, then over completions; "token" the mean over all tokens (DAPO);
    a number n divides the sum by B * n (Dr. GRPO). ref_logprobs may be None if beta is 0.
    """
    mask = loss_mask.to(logprobs.dtype)
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    token_loss = -torch.min(unclipped, clipped)
    metrics = {"clip_fraction": aggregate_tokens(clipped < unclipped, mask, "token"),
               "ratio_error": aggregate_tokens((ratio - 1).abs(), mask, "token")}
    if beta:
        difference = (ref_logprobs - logprobs) * mask
        k3 = torch.exp(difference) - difference - 1
        token_loss = token_loss + beta * k3
        metrics["kl"] = aggregate_tokens(k3, mask, "token")
    return aggregate_tokens(token_loss, mask, aggregate), {name: value.detach() for name, value in metrics.items()}


def aggregate_tokens(values: torch.Tensor, mask: torch.Tensor, aggregate) -> torch.Tensor:
    """Reduces values (B, T-1) at the tokens of mask (B, T-1) to one number; see grpo_loss."""
    values = values * mask
    if aggregate == "sequence":
        return (values.sum(1) / mask.sum(1).clamp(min=1)).mean()
    if aggregate == "token":
        return values.sum() / mask.sum().clamp(min=1)
    return values.sum() / (len(mask) * aggregate)


# ---- rollout --------------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values (rows, heads, tokens, head size) of every layer, in memory that is reserved once and never moves.

    Stands in for the DynamicCache of transformers, which is copied for every token: `update` writes at `slots` and
    returns the first `window` tokens of the first `rows` rows. A CUDA graph can capture a step that uses it.
    """

    def __init__(self, padding: torch.Tensor, width: int, tokens: int):
        self.padding = padding                   # (rows,) number of padding tokens to the left of each prompt
        self.rows, self.tokens, self.window = len(padding), tokens, width
        self.slots = torch.arange(width, device=padding.device)
        self.next_ids = torch.zeros_like(padding)
        self.layers = {}
        self.graph, self.graph_shape, self.graph_logits = None, None, None

    def update(self, keys, values, layer, *args, **kwargs):
        if layer not in self.layers:             # zeros, because a NaN would get through any mask
            shape = (self.rows, keys.shape[1], self.tokens, keys.shape[3])
            self.layers[layer] = values.new_zeros(shape), values.new_zeros(shape)
        for store, new in zip(self.layers[layer], (keys, values)):
            store[:self.rows].index_copy_(2, self.slots, new.to(store.dtype))
        return [store[:self.rows, :, :self.window] for store in self.layers[layer]]

    def keep(self, rows: torch.Tensor) -> None:
        """Moves these rows to the front and drops the others."""
        for stores in self.layers.values():
            for store in stores:
                store[:len(rows), :, :self.window] = store[rows, :, :self.window]
        self.padding[:len(rows)] = self.padding[rows]
        self.rows = len(rows)


def forward(model, cache: KVCache, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits (rows, V) at the last of input_ids (rows, T), whose keys and values go to the slots of the cache."""
    device, padding = input_ids.device, cache.padding[:cache.rows, None]
    places, slots = torch.arange(cache.window, device=device), cache.slots[:, None]
    # a token sees itself and earlier tokens but no padding; padding sees only itself, as no row may be fully masked
    hidden = (places > slots) | (places < padding[:, None]) & (places != slots)
    # additive, because every layer would convert a boolean mask again
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, torch.finfo(dtype).min)
    return model(input_ids=input_ids, attention_mask=mask[:, None], position_ids=(cache.slots - padding).clamp(min=0),
                 cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def decode(model, cache: KVCache, slot: int) -> torch.Tensor:
    """Logits (rows, V) after cache.next_ids, which go to the given slot; on a GPU by replaying a CUDA graph."""
    cache.slots = cache.slots[:1].fill_(slot)
    cache.window = min(math.ceil((slot + 1) / DECODE_WINDOW) * DECODE_WINDOW, cache.tokens)
    if cache.padding.is_cuda and cache.graph_shape not in ((cache.rows, cache.window), "none"):
        capture_graph(model, cache)
    if cache.graph is None:
        return forward(model, cache, cache.next_ids[:cache.rows, None])
    cache.graph.replay()
    return cache.graph_logits


def capture_graph(model, cache: KVCache) -> None:
    """Captures a decode step for this number of rows and window, so that it is one launch instead of a thousand."""
    cache.graph = cache.graph_logits = None      # the old shape hardly ever comes back
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    capture = torch.cuda.graph(graph)
    try:
        capture.capture_stream.wait_stream(current)
        with torch.cuda.stream(capture.capture_stream):      # libraries allocate in a first call, captures must not
            forward(model, cache, cache.next_ids[:cache.rows, None])
        current.wait_stream(capture.capture_stream)
        with torch.cuda.stream(current), capture:            # a failed capture leaves its own stream current
            cache.graph_logits = forward(model, cache, cache.next_ids[:cache.rows, None])
        cache.graph, cache.graph_shape = graph, (cache.rows, cache.window)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        cache.graph_shape = "none"
        tqdm.write(f"decoding without CUDA graphs, which is slower: {error}")


def sample(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float):
    """Next tokens (B,) drawn from logits (B, V) with uniform numbers (B,), and their log-probs (B,).

    Exact nucleus sampling: from the smallest set of likeliest tokens with a mass of at least top_p. The 1,024 likeliest
    nearly always contain it; if not, all are sorted. The log-probs are those of logits / temperature before the nucleus
    is cut, as in the update. Temperature 0 is greedy.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniform)
    probs = torch.softmax(logits.float() / temperature, -1)
    top, tokens = probs, None
    if top_p < 1:
        top, tokens = probs.topk(min(1024, probs.shape[-1]))
        if (top.sum(-1) < top_p).any():
            top, tokens = probs.sort(-1, descending=True)
    mass = top.cumsum(-1)
    allowed = (mass - top < top_p).sum(-1, keepdim=True).clamp(min=1)       # 1 even for NaN logits, whose loss is NaN
    threshold = uniform[:, None] * mass.gather(1, allowed - 1)
    choice = torch.searchsorted(mass, threshold, right=True).minimum(allowed - 1)
    logprobs = top.gather(1, choice).log()
    return (choice if tokens is None else tokens.gather(1, choice))[:, 0], logprobs[:, 0]


@torch.no_grad()
def rollout(model, prompt_ids: list[list[int]], *, max_new_tokens: int, temperature: float, top_p: float,
            eos_ids: list[int], generator=None, logprobs: list | None = None) -> list[list[int]]:
    """One completion per prompt, as token ids without padding; if an EOS was reached, it is the last id.

    Prompts are padded on the left, so that all rows write to the same slot of the cache; finished rows leave the batch.
    `generator` is a torch.Generator or uniform numbers (B, max_new_tokens), which belong to the prompts, not to the
    rows, so dropping rows changes no completion. The list `logprobs`, if given, receives those of each completion. The
    model's mode and parameters are left as they were. Raises ValueError if a sliding attention window is too short.
    """
    count, width = len(prompt_ids), max(map(len, prompt_ids))
    device, was_training, attention = model.device, model.training, model.config._attn_implementation
    if (getattr(model.config, "sliding_window", None) or math.inf) < width + max_new_tokens:
        raise ValueError(f"the model sees {model.config.sliding_window} tokens at a time, not {width + max_new_tokens}")
    uniform = generator if torch.is_tensor(generator) else torch.rand(count, max_new_tokens, generator=generator)
    uniform, eos = uniform.to(device), torch.tensor(eos_ids, device=device)
    padding = torch.tensor([width - len(ids) for ids in prompt_ids], device=device)
    input_ids = torch.tensor([[eos_ids[0]] * (width - len(ids)) + list(ids) for ids in prompt_ids], device=device)
    cache = KVCache(padding, width, width + max_new_tokens)
    completions = torch.zeros(count, max_new_tokens, dtype=torch.long, device=device)
    token_logprobs = torch.zeros(count, max_new_tokens, device=device)
    rows = torch.arange(count, device=device)                    # the completion that each row of the cache writes
    model.eval()
    model.set_attn_implementation("sdpa")                        # faster than eager for one token per row
    try:
        logits = forward(model, cache, input_ids)
        for step in range(max_new_tokens):
            sampled = sample(logits, uniform[rows, step], temperature, top_p)
            completions[rows, step], token_logprobs[rows, step] = sampled
            if step % DECODE_CHECK == 0:
                unfinished = (~torch.isin(completions[rows, :step + 1], eos).any(1)).nonzero()[:, 0]
                if len(unfinished) == 0:
                    break
                if len(unfinished) <= DECODE_SHRINK * len(rows):
                    rows = rows[unfinished]
                    cache.keep(unfinished)
            if step + 1 < max_new_tokens:
                cache.next_ids[:len(rows)] = completions[rows, step]
                logits = decode(model, cache, width + step)
    finally:
        model.train(was_training)
        model.set_attn_implementation(attention)
    is_before_end = torch.isin(completions, eos).cumsum(1) == 0          # a finished row may have kept generating
    lengths = (is_before_end.sum(1) + 1).clamp(max=max_new_tokens).tolist()
    if logprobs is not None:
        logprobs += [row[:length] for row, length in zip(token_logprobs.tolist(), lengths)]
    return [row[:length] for row, length in zip(completions.tolist(), lengths)]


# ---- the loop -------------------------------------------------------------------------------------------------------


def main() -> None:
    constants = configure(sys.argv[1:])
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    data = Path(DATA)
    if Path(SFT, "run.json").is_file() and not Path(SFT, "summary.json").is_file():
        sys.exit(f"{SFT} is not finished: run `make sft`")
    train, val = (reward.read_rows(TASK, data / f"{split}.jsonl", "prompt") for split in ("train", "val"))
    reward.refuse_overlap(TASK, train, val, data / "val.jsonl")
    reward.use_data(TASK, data)
    choices = {"BASELINE": ["momentum", "group", "none", "batch", "rft"],
               "AGGREGATE": ["sequence", "token", "constant"],
               "CREDIT": ["answer", "steps"] if TASK in reward.LINE_REWARDS else ["answer"]}
    for name, allowed in choices.items():
        if constants[name] not in allowed:
            sys.exit(f"{name} must be one of {', '.join(allowed)}, not {constants[name]!r}")
    if GROUP_SIZE < 2 or TEMPERATURE <= 0 or min(STEPS, EVAL_EVERY, EVAL_SAMPLES, PATIENCE) < 1:
        sys.exit("needed: GROUP_SIZE >= 2, TEMPERATURE > 0, and STEPS, EVAL_EVERY, EVAL_SAMPLES, PATIENCE >= 1")
    model, tokenizer = load_model(SFT)
    train = list({row["prompt"]: row for row in train}.values())         # many SFT samples share a prompt
    for row in train + val:
        row["prompt_ids"] = encode_prompt(tokenizer, row["prompt"])
    longest = max(len(row["prompt_ids"]) for row in train + val) + MAX_NEW_TOKENS
    if longest > model.config.max_position_embeddings:
        sys.exit(f"the longest prompt and MAX_NEW_TOKENS={MAX_NEW_TOKENS} make {longest} tokens, but {SFT} knows only "
                 f"{model.config.max_position_embeddings} positions")
    inputs = {name: sha256(data / name) for name in ("train.jsonl", "val.jsonl")}
    inputs["weights"] = [sha256(path) for path in sorted(Path(SFT).glob("*.safetensors"))] or SFT
    folder = open_run(Path(OUT, "grpo"), constants, inputs)
    eos_ids = end_ids(model, tokenizer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    reference = [parameter.detach().clone() for parameter in parameters] if BETA else []
    make_optimizer = AdamW8bit if LORA_RANK else torch.optim.AdamW
    optimizer = make_optimizer(parameters, lr=LR, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)
    run = {"step": -1, "running": [None, None], "running_of_lines": [None, None], "best": -math.inf, "best_step": 0,
           "last": 0.0, "first_distinct_2": 0.0, "evaluations_since_best": 0, "skipped": 0, "seconds": 0.0}
    saved_parameters = parameters + (reference if REFERENCE_EVERY else [])
    load_checkpoint(folder, run, saved_parameters, [optimizer])
    vocabulary = range(model.get_input_embeddings().num_embeddings if CREDIT == "steps" else 0)
    newlines_of_token = torch.tensor([tokenizer.decode([token]).count("\n") for token in vocabulary], device=DEVICE)
    writer = SummaryWriter(folder / "tensorboard", purge_step=run["step"] + 1)
    began = time.time() - run["seconds"]
    # prompts in random order, epoch after epoch; a step takes a fixed number, so a resumed run skips those before it
    epochs = (random.Random(f"{SEED} {epoch}").sample(train, len(train)) for epoch in itertools.count())
    prompts = itertools.islice(itertools.chain.from_iterable(epochs), max(0, run["step"]) * PROMPTS_PER_STEP, None)
    model.train()

    for step in tqdm(range(run["step"] + 1, STEPS + 1), "grpo", unit="step", initial=run["step"] + 1, total=STEPS + 1):
        if run["evaluations_since_best"] >= PATIENCE:
            tqdm.write(f"no better policy in {PATIENCE} evaluations: stopping")
            break
        log = {"step": step}
        if step > 0:        # step 0 only evaluates the SFT policy
            # 1 rollout: GROUP_SIZE completions of each prompt
            clock = time.time()
            batch = [row for row in itertools.islice(prompts, PROMPTS_PER_STEP) for _ in range(GROUP_SIZE)]
            seed = SEED * 2**20 + step
            completions = halve_on_oom("ROLLOUT_ROWS", complete, model, tokenizer, batch, eos_ids, TOP_P, seed)
            prompts_and_ids = [(each["row"]["prompt_ids"], each["ids"]) for each in completions]
            input_ids, loss_mask = collate([(prompt + ids, len(prompt)) for prompt, ids in prompts_and_ids])
            log["rollout_seconds"] = time.time() - clock

            # 2 rewards
            shared = reward.shared_in_step(batch, [each["text"] for each in completions]) if LYRICS else {}
            for each in completions:
                each["scores"] = reward.score(TASK, each["text"], each["row"] | shared, each["truncated"])
            rewards = torch.tensor([each["scores"]["reward"] for each in completions]).double().view(-1, GROUP_SIZE)
            if rewards.isnan().any():
                sys.exit(f"a reward of TASK={TASK} is not a number: fix reward.py, then run this again")
            log |= summarise(completions)

            # 3 advantages
            momentum = 0.0         # for the other baselines; also used for the lines
            if BASELINE == "momentum":
                momentum = min(MOMENTUM_MAX, MOMENTUM_MIN + MOMENTUM_STEP * (step - 1))
                advantages, *run["running"] = momentum_advantages(rewards, *run["running"], momentum)
                log |= {"momentum": momentum, "running_mean": run["running"][0], "running_std": run["running"][1]}
            elif BASELINE == "rft":
                advantages = torch.tensor([each["scores"]["correct"] for each in completions]).double().view_as(rewards)
            else:
                advantages = baseline_advantages(rewards, BASELINE)
            token_advantages = advantages.view(-1, 1).expand(loss_mask.shape)
            if CREDIT == "steps":        # lines of a group are normalised together; each applies to its own tokens
                lines = [reward.LINE_REWARDS[TASK](each["text"], each["row"]) for each in completions]
                lines = list(map(torch.DoubleTensor, lines))
                lines = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=math.nan)
                line_advantages, *run["running_of_lines"] = momentum_advantages(
                    lines.view(len(rewards), -1), *run["running_of_lines"], momentum)
                line_advantages = line_advantages.view_as(lines)
                newlines = newlines_of_token[input_ids[:, 1:]] * loss_mask
                places = (newlines.cumsum(1) - newlines).clamp(max=lines.shape[1] - 1)     # a newline ends its own line
                token_advantages = token_advantages + line_advantages.gather(1, places.cpu())
            std = group_statistics(rewards)[1]
            log |= {"reward_std": std.mean().item(), "zero_variance": (std == 0).double().mean().item()}

            # 4 old and reference log-probs. With one update per rollout the old ones are the new ones
            clock = time.time()
            sampler_logprobs = torch.tensor([x for each in completions for x in each["logprobs"]], device=DEVICE)
            tensors = {"input_ids": input_ids, "loss_mask": loss_mask,
                       "lengths": [math.ceil(len(prompt + ids) / 8) * 8 for prompt, ids in prompts_and_ids],
                       "advantages": token_advantages.float().to(DEVICE),
                       "sampler_logprobs": loss_mask.float().masked_scatter(loss_mask, sampler_logprobs)}
            if BETA:
                swap_weights(parameters, reference)
                tensors["ref_logprobs"] = halve_on_oom("MICRO_BATCH_TOKENS", all_logprobs, model, tensors)
                swap_weights(parameters, reference)
            if UPDATES_PER_ROLLOUT > 1:
                tensors["old_logprobs"] = halve_on_oom("MICRO_BATCH_TOKENS", all_logprobs, model, tensors)

            # 5 clipped update
            decay = 1 - (1 - MIN_LR) * max(0, step - WARMUP) / max(1, STEPS - WARMUP)
            optimizer.param_groups[0]["lr"] = log["lr"] = LR * min(step / max(1, WARMUP), decay)
            for _ in range(UPDATES_PER_ROLLOUT):
                metrics = halve_on_oom("MICRO_BATCH_TOKENS", accumulate_gradient, model, tensors)
                log["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, GRAD_CLIP).item()
                if math.isfinite(log["grad_norm"]):        # a NaN would stay in Adam's moments for good
                    optimizer.step()
                run["skipped"] += not math.isfinite(log["grad_norm"])
            log |= metrics | {"skipped": run["skipped"], "update_seconds": time.time() - clock}
            if BETA and REFERENCE_EVERY and step % REFERENCE_EVERY == 0:
                set_weights(reference, parameters)

        # 6 log, evaluate, save
        if step % EVAL_EVERY == 0 or step == STEPS:
            log |= halve_on_oom("ROLLOUT_ROWS", evaluate, model, tokenizer, val, eos_ids)
            run["last"] = log[f"val_{BEST_BY}"]
            run["first_distinct_2"] = run["first_distinct_2"] or log["val_distinct_2"]
            run["evaluations_since_best"] += 1
            if run["last"] > run["best"] and log["val_distinct_2"] >= MIN_DISTINCT * run["first_distinct_2"]:
                run |= {"best": run["last"], "best_step": step, "evaluations_since_best": 0}
                with atomic_write(folder / "best.pt", "wb") as file:
                    torch.save([each.data for each in parameters], file)
        run |= {"step": step, "seconds": time.time() - began}
        log |= {"seconds": run["seconds"], "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(log) + "\n")
        for name, value in log.items():
            if not isinstance(value, list):
                writer.add_scalar(name, value, step)
        shown = ("reward", "accuracy", "unfinished", "wrong", "tokens", "kl", "entropy", "grad_norm", "rollout_seconds",
                 "update_seconds", "val_reward", "val_accuracy", "val_unfinished", "val_tokens")
        tqdm.write(f"step {step}  " + "  ".join(f"{name} {log[name]:.3g}" for name in shown if name in log))
        if step == 1 or step > 0 and step % EVAL_EVERY == 0:
            with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
                for i in range(0, len(completions), GROUP_SIZE):
                    logged = {"step": step, "prompt": batch[i]["prompt"], "completion": completions[i]["text"],
                              "scores": completions[i]["scores"], "advantage": advantages.view(-1)[i].item()}
                    if CREDIT == "steps":
                        logged["line_advantages"] = line_advantages[i].tolist()
                    file.write(json.dumps(logged, ensure_ascii=False) + "\n")
        if step == 1 and log["truncated"] > 0.5:
            tqdm.write(f"{log['truncated']:.0%} of the completions are cut off: raise MAX_NEW_TOKENS={MAX_NEW_TOKENS}")
        save_checkpoint(folder, run, saved_parameters, [optimizer])

    writer.close()
    # the best policy, in the format of transformers or peft, for the next stage
    set_weights(parameters, load_tensors(folder / "best.pt") or sys.exit(f"delete {folder} to train again"))
    model.save_pretrained(folder, save_embedding_layers=False)      # for peft: none is trained; transformers ignores it
    tokenizer.save_pretrained(folder)
    summary = {"steps": run["step"], "best_step": run["best_step"], f"best_val_{BEST_BY}": run["best"],
               f"last_val_{BEST_BY}": run["last"], "skipped": run["skipped"], "seconds": run["seconds"]}
    write_json(folder / "summary.json", summary)
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))


# ---- the parts of a step --------------------------------------------------------------------------------------------


def complete(model, tokenizer, batch: list[dict], eos_ids: list[int], top_p: float, seed: int) -> list[dict]:
    """A completion for each row of a batch: its row, ids, text, logprobs, and whether it is truncated."""
    uniform = torch.rand(len(batch), MAX_NEW_TOKENS, generator=torch.Generator().manual_seed(seed))
    ids, logprobs = [], []
    with torch.autocast(DEVICE, torch.bfloat16, enabled=bool(BF16)):
        for start in range(0, len(batch), ROLLOUT_ROWS):
            prompt_ids = [row["prompt_ids"] for row in batch[start:start + ROLLOUT_ROWS]]
            ids += rollout(model, prompt_ids, max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE, top_p=top_p,
                           eos_ids=eos_ids, generator=uniform[start:start + ROLLOUT_ROWS], logprobs=logprobs)
    torch.cuda.empty_cache()         # frees cache and graphs: the update needs blocks of other sizes
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [{"row": row, "ids": row_ids, "text": text, "logprobs": of_row, "truncated": row_ids[-1] not in eos_ids}
            for row, row_ids, text, of_row in zip(batch, ids, texts, logprobs, strict=True)]


def summarise(completions: list[dict]) -> dict[str, float]:
    """Means for the log: reward, outcomes, lengths in tokens, diversity, and each part of the reward as parts/NAME."""
    scores = [each["scores"] for each in completions]
    names = dict.fromkeys(name for each in scores for name in each)        # some completions may lack a part
    means = {name: statistics.fmean(each[name] for each in scores if name in each) for name in names}
    log = {"reward": means.pop("reward"), "accuracy": means.pop("correct"), "unfinished": 1 - means.pop("answered"),
           "truncated": statistics.fmean(each["truncated"] for each in completions),
           "tokens": statistics.fmean(len(each["ids"]) for each in completions),
           "distinct_2": distinct_2([each["text"] for each in completions])}
    log["wrong"] = 1 - log["accuracy"] - log["unfinished"]
    return log | {f"parts/{name}": value for name, value in means.items()}


def distinct_2(texts: list[str]) -> float:
    """Share of distinct pairs among all pairs of adjacent characters in the answers: falls with diversity."""
    return reward.distinct_share([re.sub(r"\W", "", text.rpartition("</think>")[2]) for text in texts], 2)


def swap_weights(parameters: list, others: list) -> None:
    """Turns the model into the reference policy, or back: the parameters swap their memory, and nothing is copied."""
    for parameter, other in zip(parameters, others, strict=True):
        parameter.data, other.data = other.data, parameter.data


@torch.no_grad()
def all_logprobs(model, batch: dict) -> torch.Tensor:
    """Log-probs (B, T-1) of the completions of a batch."""
    logprobs = torch.zeros(batch["loss_mask"].shape, device=DEVICE)
    for rows in micro_batches(batch["lengths"], MICRO_BATCH_TOKENS):
        width = max(batch["lengths"][row] for row in rows)
        logprobs[rows, :width - 1], _ = completion_logprobs(
            model, batch["input_ids"][rows, :width], batch["loss_mask"][rows, :width - 1], TEMPERATURE)
    return logprobs


def accumulate_gradient(model, batch: dict) -> dict[str, float]:
    """Computes the gradient of the loss of a batch and returns the metrics.

    A micro-batch is weighted by its share of the step's completions or tokens, so its size does not affect the result.
    """
    model.zero_grad()
    metrics = {}
    aggregate = MAX_NEW_TOKENS if AGGREGATE == "constant" else AGGREGATE
    for rows in micro_batches(batch["lengths"], MICRO_BATCH_TOKENS):
        width = max(batch["lengths"][row] for row in rows)
        part = {name: value[rows, :width - 1] for name, value in batch.items() if name not in ("input_ids", "lengths")}
        loss_mask = part["loss_mask"]
        logprobs, entropy = completion_logprobs(model, batch["input_ids"][rows, :width], loss_mask, TEMPERATURE,
                                                ENTROPY_BONUS != 0)
        old_logprobs = part.get("old_logprobs", logprobs.detach())
        loss, found = grpo_loss(logprobs, old_logprobs, part.get("ref_logprobs"), part["advantages"], loss_mask,
                                clip_low=CLIP_LOW, clip_high=CLIP_HIGH, beta=BETA, aggregate=aggregate)
        loss = loss - ENTROPY_BONUS * aggregate_tokens(entropy, loss_mask, aggregate)
        token_share = (loss_mask.sum() / batch["loss_mask"].sum()).item()
        loss = loss * (token_share if aggregate == "token" else len(rows) / len(batch["lengths"]))
        loss.backward()
        # how far the log-probs of the rollout are from the old ones, computed here
        found["sampler_error"] = aggregate_tokens((old_logprobs - part["sampler_logprobs"]).abs(), loss_mask, "token")
        found["entropy"] = aggregate_tokens(entropy.detach(), loss_mask, "token")
        metrics["loss"] = metrics.get("loss", 0.0) + loss.item()
        for name, value in found.items():
            metrics[name] = metrics.get(name, 0.0) + token_share * value.item()
    return metrics


def evaluate(model, tokenizer, val: list[dict], eos_ids: list[int]) -> dict:
    """Means over EVAL_SAMPLES completions of each val row, as val_NAME, and the length of each completion."""
    clock = time.time()
    completions = complete(model, tokenizer, val * EVAL_SAMPLES, eos_ids, EVAL_TOP_P, SEED)
    for each in completions:
        each["scores"] = reward.score(TASK, each["text"], each["row"], each["truncated"])
    log = {f"val_{name}": value for name, value in summarise(completions).items()}
    return log | {"val_lengths": [len(each["ids"]) for each in completions], "val_seconds": time.time() - clock}


def end_ids(model, tokenizer) -> list[int]:
    """Ids that end a completion: the tokenizer's, and those in the generation config, where Qwen3 has two."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return [i for i in dict.fromkeys([tokenizer.eos_token_id, *configured]) if i is not None]


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
