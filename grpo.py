"""Group relative policy optimisation (GRPO) with momentum-normalised advantages, as one loop that reads like the algorithm.

    python grpo.py                                         # from runs/game24/sft, which `make sft` makes
    python grpo.py --beta=0 --out=runs/no-kl --sft=runs/game24/sft --data=runs/game24/data

A step: 1 rollout, 2 rewards, 3 advantages, 4 old and reference log-probs, 5 clipped update with a KL penalty, 6 log, evaluate,
save. What differs from the textbook algorithm: rewards are normalised by a mix of their group's statistics and running ones
(report on the 24-point game, eq. 2-4); the reference is the SFT policy; the best policy on val is kept, and training stops
when val accuracy falls, because RL curves rise and then fall.
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
from types import MethodType, SimpleNamespace

import numpy
import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

import reward

# Run
TASK = "game24"
SFT = ""                     # policy to start from, a folder or a hub name; empty: OUT/sft
REVISION = ""                # commit, tag or branch of a hub model; empty: the default branch
OUT = ""                     # root folder of the run; empty: runs/TASK
DATA = ""                    # folder of train.jsonl and val.jsonl; empty: OUT/data
RESUME = 1                   # 0: start anew where a run is, finished or cut off
STRICT = 1                   # 0: bad rows of the data are skipped and counted, not refused
SEED = 0
THREADS = 0                  # CPU threads; 0: one for each core
# Model
LOAD_4BIT = 1                # NF4 with double quantisation; 0: bf16 on a GPU, fp32 on a CPU
LORA_RANK = 32               # of a new adapter, where SFT is not one already; 0: train all weights
LORA_ALPHA = 64              # the update is scaled by LORA_ALPHA / LORA_RANK
BF16 = 1                     # bf16 matrix products where the processor has them; weights stay in fp32
GRADIENT_CHECKPOINTING = 1   # recompute activations in the backward pass: less memory, a third more time
OPTIMIZER_8BIT = 1           # 8-bit AdamW of bitsandbytes, paged on a GPU; 0: AdamW of torch
# Rollout
PROMPTS_PER_STEP = 12
GROUP_SIZE = 8               # completions of a prompt
TEMPERATURE = 0.7            # log-probs are of logits / TEMPERATURE everywhere
TOP_P = 0.9                  # 1: what is sampled is what is scored
MAX_NEW_TOKENS = 1024
MAX_PROMPT_TOKENS = 512      # longer prompts are left out, and counted
ROLLOUT_ROWS = 96            # completions generated at a time: halved where memory runs out
ROLLOUT_COPY = 1             # the rollout has its own copy of the weights, fused and not in 4 bits: faster; 0: less memory
CUDA_GRAPHS = 1              # on a GPU a step of the rollout is one launch instead of a thousand; 0: as it is without
# Advantages
BASELINE = "momentum"        # momentum; group: plain GRPO; none: no std (Dr. GRPO); batch: std of the whole step
MOMENTUM_MIN = 0.0           # share of the running mean and std at the first step, ...
MOMENTUM_STEP = 0.01         # ... what it gains a step, ...
MOMENTUM_MAX = 0.2           # ... and where it stays (the report's value)
# Update
STEPS = 100                  # rollouts
UPDATES_PER_ROLLOUT = 1      # optimizer steps on each rollout; above 1 the clipping matters
LR = 2e-5                    # QLoRA; the report's 2e-6 is for all weights of a large model
WARMUP = 5                   # steps with a rising learning rate, ...
MIN_LR = 0.1                 # ... which then falls in a line to this share of LR: late steps waver less
WEIGHT_DECAY = 0.0
GRAD_CLIP = 1.0              # norm of the gradient
CLIP_LOW = 0.2               # the ratio is clipped from 1 - CLIP_LOW ...
CLIP_HIGH = 0.2              # ... to 1 + CLIP_HIGH
BETA = 0.01                  # weight of the KL to the reference; 0: no reference at all
AGGREGATE = "sequence"       # mean over a completion's tokens, then completions; token: over all tokens (DAPO); constant: Dr. GRPO
MICRO_BATCH_TOKENS = 4096    # tokens of a forward pass: halved where memory runs out, the result stays the same
HEAD_CHUNK = 2048            # completion tokens whose logits exist at a time
# Evaluation
EVAL_EVERY = 10              # steps between evaluations on val; the best is kept
EVAL_SAMPLES = 1             # completions of a val prompt ...
EVAL_TEMPERATURE = 0.7       # ... and how they are sampled: as in eval.py
EVAL_TOP_P = 0.9
BEST_BY = "accuracy"         # what the best has most of on val: accuracy or reward
MIN_DISTINCT = 0.0           # no evaluation is the best with distinct-2 of val, across prompts, below this share of its first value ...
MIN_DISTINCT_GROUP = 0.0     # ... or within the completions of a prompt, which share their keywords, below this one; 0: off
PATIENCE = 4                 # stop after so many evaluations in a row that are below the best or may not be it
SAMPLES_EVERY = 10           # steps between sample completions in samples.jsonl
# Faults
SAVE_EVERY = 1               # steps between checkpoints: what a power cut costs at most
KEEP_LAST = 2                # checkpoints kept, beside the best
MAX_NO_REWARD = 0.1          # share of completions whose reward may fail; above it the run stops
MAX_NONFINITE = 3            # updates in a row that are skipped for a loss or gradient that is not finite; then the run stops
SPIKE = 10.0                 # standard deviations above the mean of the last 100 gradient norms from which a norm is logged as a spike ...
SKIP_SPIKES = 0              # ... and 1: its update is skipped
# What a policy that began as MODEL=tiny has instead, where the command line does not say otherwise
TINY = {"LOAD_4BIT": 0, "LORA_RANK": 0, "GRADIENT_CHECKPOINTING": 0, "OPTIMIZER_8BIT": 0, "MAX_NEW_TOKENS": 208, "PROMPTS_PER_STEP": 32, "TOP_P": 1.0,
        "LR": 2e-4, "STEPS": 100, "ROLLOUT_ROWS": 272, "MICRO_BATCH_TOKENS": 1536, "EVAL_EVERY": 10, "EVAL_SAMPLES": 4, "PATIENCE": 6}
# What TASK=lyrics has instead, and a tiny model in it
LYRICS = {"BEST_BY": "reward", "MIN_DISTINCT": 0.9, "MIN_DISTINCT_GROUP": 0.8, "EVAL_SAMPLES": 4}
TINY_LYRICS = {"MAX_NEW_TOKENS": 320, "PROMPTS_PER_STEP": 16, "LR": 3e-4}

SHOWN = ("reward", "reward_std", "accuracy", "unfinished", "wrong", "tokens", "kl", "entropy", "clip_fraction", "grad_norm", "rollout_tokens_per_s",
         "update_tokens_per_s", "val_accuracy", "val_reward", "val_unfinished", "val_tokens", "val_distinct_2")      # of the log, on the screen


# ---- advantages and loss: pure functions ----------------------------------------------------------------------------


def momentum_advantages(rewards: torch.Tensor, running_mean: float, running_std: float, momentum: float):
    """Advantages (P, G) of rewards (P, G), and the running mean and std after this step (report on the 24-point game, eq. 2-4).

    For each prompt mean = momentum * running_mean + (1 - momentum) * mean of its group, std likewise (unbiased, as in TRL), and
    A = (reward - mean) / (std + 1e-4). Afterwards the running values take the average over the prompts in by the same momentum;
    so the order of the prompts does not matter, and momentum 0 is plain GRPO. A NaN reward is left out and has advantage 0.
    """
    mean, std = group_statistics(rewards)
    prompt_mean = momentum * running_mean + (1 - momentum) * mean
    prompt_std = momentum * running_std + (1 - momentum) * std
    advantages = ((rewards - prompt_mean[:, None]) / (prompt_std[:, None] + 1e-4)).nan_to_num(0.0)
    running_mean = momentum * running_mean + (1 - momentum) * float(mean.nanmean())
    running_std = momentum * running_std + (1 - momentum) * float(std.nanmean())
    return advantages, running_mean, running_std


def group_statistics(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased std (P,) of rewards (P, G), NaN left out. Equal rewards have exactly their value and 0, no rounding."""
    valid = ~rewards.isnan()
    count = valid.sum(1)
    low = rewards.masked_fill(~valid, float("inf")).amin(1)
    equal = low == rewards.masked_fill(~valid, float("-inf")).amax(1)
    mean = torch.where(equal, low, rewards.nansum(1) / count)
    square = ((rewards - mean[:, None]) ** 2).nansum(1)
    return mean, torch.where(equal, torch.zeros_like(mean), (square / (count - 1)).sqrt()).masked_fill(count == 0, float("nan"))


def baseline_advantages(rewards: torch.Tensor, baseline: str) -> torch.Tensor:
    """Advantages (P, G) without momentum: group (GRPO), none (Dr. GRPO, eq. 3 of arXiv:2503.20783), batch (std of all rewards)."""
    mean, std = group_statistics(rewards)
    scale = {"group": std[:, None], "batch": group_statistics(rewards.reshape(1, -1))[1]}.get(baseline)
    return (rewards - mean[:, None] if scale is None else (rewards - mean[:, None]) / (scale + 1e-4)).nan_to_num(0.0)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, loss_mask, *, clip_low, clip_high, beta, aggregate):
    """Loss and metrics of a batch (report on the 24-point game, eq. 1). All tensors (B, T-1), advantages also (B, 1).

    A token has min(ratio * A, clip(ratio) * A) - beta * k3, with ratio = exp(logprobs - old_logprobs) and the k3 estimate
    exp(d) - d - 1 of the KL, d = ref_logprobs - logprobs (arXiv:2402.03300, eq. 4). aggregate: "sequence" takes the mean over
    a completion's tokens, then over completions; "token" over all tokens (DAPO); a number n divides the sum by B * n (Dr. GRPO).
    ref_logprobs may be None where beta is 0.
    """
    mask = loss_mask.to(logprobs.dtype)
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    token_loss = -torch.min(ratio * advantages, clipped * advantages)
    tokens = mask.sum().clamp(min=1)
    metrics = {"clip_fraction": (((ratio < 1 - clip_low) & (advantages < 0) | (ratio > 1 + clip_high) & (advantages > 0)) * mask).sum() / tokens,
               "ratio_error": ((ratio - 1).abs() * mask).max()}
    if beta:
        difference = (ref_logprobs - logprobs) * mask
        k3 = torch.exp(difference) - difference - 1
        token_loss = token_loss + beta * k3
        metrics["kl"] = (k3 * mask).sum() / tokens
    token_loss = token_loss * mask
    if aggregate == "sequence":
        loss = (token_loss.sum(1) / mask.sum(1).clamp(min=1)).mean()
    elif aggregate == "token":
        loss = token_loss.sum() / tokens
    else:
        loss = token_loss.sum() / (len(mask) * aggregate)
    return loss, {name: value.detach() for name, value in metrics.items()}


# ---- rollout --------------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of every layer: (rows, heads, tokens, head size). Rows can be dropped.

    It stands in for the cache of transformers, whose `update` grows a new tensor for every token. New ones are written at `slots`, a
    tensor, and attention reads the first `window` tokens: so that a CUDA graph can hold a step.
    """

    def __init__(self, rows: int, tokens: int, slots: torch.Tensor, dtype: torch.dtype | None = None):
        self.rows, self.tokens, self.slots, self.window, self.dtype, self.layers = rows, tokens, slots, len(slots), dtype, {}

    def update(self, keys, values, layer, *args, **kwargs):
        if layer not in self.layers:
            self.layers[layer] = [x.new_empty(self.rows, x.shape[1], self.tokens, x.shape[3], dtype=self.dtype or x.dtype) for x in (keys, values)]
        for store, new in zip(self.layers[layer], (keys, values)):
            store[:self.rows].index_copy_(2, self.slots, new)
        return [store[:self.rows, :, :self.window] for store in self.layers[layer]]

    def get_seq_length(self, layer=0) -> int:
        return self.window

    def repeat(self, index: torch.Tensor, tokens: int) -> None:
        """Row i becomes a copy of the old row index[i] (rows,), with room for `tokens` tokens."""
        self.rows, self.tokens = len(index), tokens
        for stores in self.layers.values():
            for place, store in enumerate(stores):
                stores[place] = store.new_empty(self.rows, store.shape[1], tokens, store.shape[3])
                stores[place][:, :, :self.window] = store[index, :, :self.window]

    def widen(self, window: int) -> None:
        """Lets attention read the first `window` tokens. Those that are not written yet become 0: a NaN would get through any mask."""
        for stores in self.layers.values() if window > self.window + 1 else ():
            for store in stores:
                store[:, :, self.window:window] = 0
        self.window = window

    def keep(self, kept: torch.Tensor) -> torch.Tensor:
        """Drops the rows that are not kept (rows,): the last kept ones move into their places. Returns the old index of each row."""
        self.rows = int(kept.sum())
        holes = (~kept[:self.rows]).nonzero().flatten()
        movers = self.rows + kept[self.rows:].nonzero().flatten()
        for stores in self.layers.values():
            for store in stores:
                store[holes, :, :self.window] = store[movers, :, :self.window]
        order = torch.arange(self.rows, device=kept.device)
        order[holes] = movers
        return order


def product(x, weight, bias=None):
    """x (..., in) @ weight.T + bias by oneDNN, which has fast products in fp32 and bf16 for CPUs of every maker."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def fused(linears: list, dtype: torch.dtype):
    """A function of x (..., in) -> (..., out of all): linear layers over one input as one, in `dtype`, out of their 4 bits.

    Adapters stay beside the weights: small ones would be rounded away in bf16 ones.
    """
    weights, downs, ups = [], [], []
    for linear in linears:
        base = getattr(linear, "base_layer", linear)
        weight = base.weight
        if hasattr(weight, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit
            weight = dequantize_4bit(weight.data, weight.quant_state)
        weights.append(weight.to(dtype))
        active = [] if base is linear or linear.disable_adapters else [name for name in linear.active_adapters if name in linear.lora_A]
        downs += [linear.lora_A[name].weight for name in active]
        ups.append(torch.cat([weight.new_zeros(len(weight), 0), *(linear.lora_B[name].weight * linear.scaling[name] for name in active)], 1))
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    down, up = (torch.cat(downs).to(dtype), torch.block_diag(*ups).to(dtype)) if downs else (None, None)
    biases = [getattr(linear, "base_layer", linear).bias for linear in linears]
    bias = None if biases[0] is None else torch.cat(biases).to(dtype)
    # in the layout of the matrix library of a CPU a product takes half the time
    known = weight.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight) if known else None
    weight = weight if packed is None else None

    def project(x):
        x = x.to(dtype)
        if packed is None:
            made = torch.nn.functional.linear(x, weight, bias)
        else:
            made = product(x, packed, bias)
        return made if down is None else made + torch.nn.functional.linear(torch.nn.functional.linear(x, down), up)

    return project


def fast_forward(model, dtype: torch.dtype, tokens: int):
    """forward(ids (B, T), positions (B, T), mask (B, 1, T, window), cache) -> logits (B, V) of the last token; None for a model it does not know.

    It computes what the forward pass of transformers does: projections of one input are one, weights are in the precision `dtype` of the
    products, angles of `tokens` positions are looked up, and on a CPU the attention of one token is two products.
    """
    from peft.tuners.lora import LoraLayer

    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    if causal_lm.config.model_type not in ("llama", "qwen2", "qwen3"):
        return None
    config, body = causal_lm.config, causal_lm.model
    parts = [x for layer in body.layers for block in (layer.self_attn, layer.mlp) for x in block.children()]
    linears = [causal_lm.lm_head, *(x for x in parts if hasattr(x, "in_features"))]
    adapted = [x for x in linears if hasattr(x, "base_layer")]
    if not (body.rotary_emb.rope_type in ("default", "linear", "llama3", "yarn") and config.hidden_act == "silu"
            and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
            and type(body.embed_tokens) is torch.nn.Embedding and (adapted or causal_lm is model)
            and all(type(getattr(x, "base_layer", x)).__name__ in ("Linear", "Linear4bit") for x in linears)
            and all(isinstance(x, LoraLayer) and not any({**x.lora_bias, **x.lora_variant}.values()) for x in adapted)):
        return None
    size, kv = body.layers[0].self_attn.head_dim, config.num_key_value_heads
    heads, eps, scale, embedding = config.num_attention_heads, config.rms_norm_eps, body.layers[0].self_attn.scaling, body.embed_tokens.weight
    cos, sin = (x[0] for x in body.rotary_emb(embedding[:1, None], torch.arange(tokens, device=embedding.device)[None]))
    sin = torch.cat([-sin[:, :size // 2], sin[:, size // 2:]], 1)       # the halves of a head turn in opposite ways
    layers = []
    for layer in body.layers:
        own, mlp = layer.self_attn, layer.mlp
        qk_norm = torch.cat([own.q_norm.weight.expand(heads, -1), own.k_norm.weight.expand(kv, -1)]) if hasattr(own, "q_norm") else None
        layers.append((layer.input_layernorm.weight, fused([own.q_proj, own.k_proj, own.v_proj], dtype), qk_norm, fused([own.o_proj], dtype),
                       layer.post_attention_layernorm.weight, fused([mlp.gate_proj, mlp.up_proj], dtype), fused([mlp.down_proj], dtype)))
    head = fused([causal_lm.lm_head], dtype)

    def norm(x, weight):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

    def forward(ids, positions, mask, cache):
        rows, new = ids.shape
        x, turn, turn_half = embedding[ids], cos[positions][:, :, None], sin[positions][:, :, None]
        products = ids.device.type == "cpu" and new == 1
        # the heads that share keys and values are like so many tokens
        mask = mask[:, :, None].expand(-1, kv if products else 1, heads // kv, -1, -1).flatten(2, 3)
        mask = mask.flatten(0, 1) if products else mask
        for index, (norm_1, qkv, qk_norm, out, norm_2, gate_up, down) in enumerate(layers):
            states = qkv(norm(x, norm_1)).view(rows, new, heads + 2 * kv, size)
            turned, values = states.split([heads + kv, kv], 2)
            turned = turned if qk_norm is None else norm(turned, None) * qk_norm
            turned = (turned * turn + turned.roll(size // 2, -1) * turn_half).to(cache.dtype).transpose(1, 2)
            keys, values = cache.update(turned[:, heads:], values.transpose(1, 2).to(cache.dtype), index)
            queries = turned[:, :heads].reshape(rows, kv, -1, size)
            if products:
                scores = torch.baddbmm(mask, queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=scale)
                seen = torch.bmm(scores.softmax(-1), values.flatten(0, 1))
            else:
                seen = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
            x = x + out(seen.reshape(rows, heads, new, size).transpose(1, 2).reshape(rows, new, -1))
            gate, up = gate_up(norm(x, norm_2)).chunk(2, -1)
            x = x + down(torch.nn.functional.silu(gate) * up)
        return head(norm(x[:, -1], body.norm.weight))

    return forward


def sample(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float, likeliest: int = 1024):
    """Next tokens of logits (B, V) and a uniform number a row; their log-probs, the mass of the tokens allowed, (B,) all; and whether that is right.

    Nucleus sampling: the smallest set of tokens whose mass is at least top_p. The 1,024 likeliest hold it nearly always. Where they do
    not, the last value is False, and the call has to be made again with likeliest=V; it is a tensor, as to look at it is to wait for a GPU.
    The log-probs are those before the nucleus is cut: of logits / temperature, as the update scores them.
    """
    right, whole = torch.ones((), dtype=torch.bool, device=logits.device), torch.ones_like(uniform)
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniform), whole, right
    probs = torch.softmax(logits.float() / temperature, -1)
    if top_p == 1:      # none is left out: no order is needed
        mass = probs.cumsum(-1)
        tokens = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True).clamp(max=probs.shape[-1] - 1)
        return tokens.flatten(), probs.gather(1, tokens).flatten().log(), whole, right
    top, tokens = probs.topk(min(likeliest, probs.shape[-1]))
    mass = top.cumsum(-1)
    if likeliest < probs.shape[-1]:
        right = (mass[:, -1] >= top_p).all()
    allowed = (mass - top < top_p).sum(-1, keepdim=True).clamp(min=1)       # NaN logits: any token, the loss will be NaN and say so
    total = mass.gather(1, allowed - 1)
    choice = torch.searchsorted(mass, uniform[:, None] * total, right=True).minimum(allowed - 1)
    return tokens.gather(1, choice).flatten(), top.gather(1, choice).flatten().log(), total.flatten(), right


def no_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out: the allocator of torch, a driver, cuBLAS and a CPU each have their own words."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in ("allocate memory", "out of memory", "ALLOC_FAILED"))


def capture(forward):
    """A CUDA graph of a decode step, and the logits that its replay writes: one launch instead of a thousand."""
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    scope = torch.cuda.graph(graph)         # its stream is the same each time: every stream has a cuBLAS workspace of its own
    scope.capture_stream.wait_stream(current)
    with torch.cuda.stream(scope.capture_stream):
        forward()           # the first time libraries allocate and autocast casts weights, which a capture must not do
    current.wait_stream(scope.capture_stream)
    with torch.cuda.stream(current), scope:         # the outer one: a capture that fails would leave its stream the current one
        logits = forward()
    return graph, logits


@torch.no_grad()
def rollout(model, prompt_ids: list[list[int]], *, max_new_tokens: int, temperature: float, top_p: float, eos_ids: list[int],
            generator: torch.Generator | torch.Tensor | None = None, stats: dict | None = None, buckets: bool | None = None) -> list[list[int]]:
    """One completion a prompt, as token ids without padding; an EOS that was reached is the last id. Temperature 0 is greedy.

    Prompts are padded on the left, so that every row writes the same slot of the cache; finished rows leave the batch. The random
    numbers belong to the prompts, not to the rows, so the dropping of rows changes no completion. The model's mode and parameters
    are left as they were. `generator` draws the numbers, or is a tensor (B, max_new_tokens) of them. `stats`, where given, receives
    nucleus_mass, the mean probability of what top_p allows, and logprobs, of the tokens, as lists. With `buckets`, the default on a GPU, there
    are few shapes, each captured as a CUDA graph, and the host waits for the GPU every 16 steps only, to see what has finished; without, on a
    CPU, little work is in vain.
    """
    device, count = next(model.parameters()).device, len(prompt_ids)
    if not count or min(map(len, prompt_ids)) == 0:
        raise ValueError(f"rollout needs at least one prompt, each of at least one token; got {count} prompts")
    if not 0 < top_p <= 1 or temperature < 0:
        raise ValueError(f"top_p must be above 0 and at most 1, temperature at least 0; got {top_p} and {temperature}")
    buckets = device.type == "cuda" if buckets is None else buckets
    every, wide, fine = (16, 256, 2) if buckets else (4, 1, 4)
    width, unique = max(map(len, prompt_ids)), {tuple(ids): i for i, ids in enumerate(dict.fromkeys(map(tuple, prompt_ids)))}
    if (getattr(model.config, "sliding_window", None) or math.inf) < width + max_new_tokens:
        raise ValueError(f"this model sees the last {model.config.sliding_window} tokens only, and prompt and completion may have "
                         f"{width + max_new_tokens}: rollout has no mask for that, lower MAX_NEW_TOKENS")
    input_ids = torch.tensor([[eos_ids[0]] * (width - len(ids)) + list(ids) for ids in unique], device=device)
    padding = torch.tensor([width - len(ids) for ids in unique], device=device)
    eos, rows, live = torch.tensor(eos_ids, device=device), torch.arange(count, device=device), torch.ones(count, dtype=torch.bool, device=device)
    completions = torch.zeros(count, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(count, max_new_tokens, device=device)
    lengths, mass, training = torch.zeros_like(rows), torch.zeros((), device=device), model.training
    weights = model.get_input_embeddings().weight.dtype
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weights
    places, tokens = torch.arange(width + max_new_tokens, device=device), torch.zeros_like(rows)
    fast = fast_forward(model, dtype, len(places)) if ROLLOUT_COPY else None
    # the attention of our own pass is faster in fp32 on a CPU than in bf16; that of transformers has keys and values of several kinds
    cache = KVCache(len(unique), width, places[:width], (weights if device.type == "cpu" else dtype) if fast else None)
    graph, shape, output = None, None, None

    def forward(input_ids=None):
        input_ids, kind = tokens[:cache.rows, None] if input_ids is None else input_ids, cache.dtype or dtype
        seen, own = places[:cache.window], padding[:cache.rows, None]
        positions = (cache.slots - own).clamp(min=0)
        hidden = (seen < own)[:, None] & (seen != cache.slots[:, None]) | (seen > cache.slots[:, None])        # padding sees itself: no NaN
        mask = hidden[:, None].to(kind) * torch.finfo(kind).min       # (rows, 1, tokens, window)
        if fast:
            with torch.autocast(device.type, enabled=False):
                return fast(input_ids, positions, mask, cache)
        return model(input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                     logits_to_keep=1).logits[:, -1]

    def decode(step):
        """Logits of a step, after the tokens of the one before went into the cache."""
        nonlocal graph, shape, output
        global CUDA_GRAPHS
        cache.slots.fill_(width + step - 1)
        cache.widen(min(-(-(width + step) // wide) * wide, len(places)))
        if device.type == "cuda" and CUDA_GRAPHS and shape != (cache.rows, cache.window):
            graph = output = None           # rows fall and the window grows: it is hardly ever needed again
            try:
                graph, output = capture(forward)
                shape = cache.rows, cache.window
            except RuntimeError as error:
                if no_memory(error) or no_memory(error.__context__):        # the end of a capture that ran out is an error of its own
                    raise torch.OutOfMemoryError(str(error)) from None
                CUDA_GRAPHS = 0
                tqdm.write(f"no CUDA graphs, the rollout goes on without: {str(error)[:300]}")
        if graph is None:
            return forward()
        graph.replay()
        return output

    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")        # twice the speed of eager for one token a row; no change on a GPU
    model.eval()
    try:
        index = torch.tensor([unique[tuple(ids)] for ids in prompt_ids], device=device)
        logits, padding = forward(input_ids)[index], padding[index]         # a prompt is read once, whatever the size of its group
        cache.repeat(index, len(places))
        cache.slots = places[width - 1:width].clone()
        for start in range(0, max_new_tokens, every):
            steps = range(start, min(start + every, max_new_tokens))
            uniform = (generator[:count, steps].T if isinstance(generator, torch.Tensor) else torch.rand(
                len(steps), count, generator=generator, device=generator.device if generator else device)).to(device)
            first = logits.clone() if buckets else logits       # the next replay writes over it
            for likeliest in (1024, logits.shape[-1]):
                logits, masses, right = first, [], True
                for step in steps:
                    logits = decode(step) if step > start else logits
                    tokens[:cache.rows], chosen, allowed, enough = sample(logits, uniform[step - start, rows], temperature, top_p, likeliest)
                    completions[rows, step], logprobs[rows, step] = tokens[:cache.rows], chosen
                    masses.append(allowed)
                    right = right & enough
                if bool(right):
                    break
            ended = torch.isin(completions[rows, start:step + 1], eos)
            taken = live[:, None] & (ended.cumsum(1) - ended.long() == 0)          # up to the first EOS
            lengths[rows] += taken.sum(1)
            mass += (torch.stack(masses, 1) * taken).sum()
            live = live & ~ended.any(1)
            left = int(live.sum())
            if not left or step + 1 == max_new_tokens:
                break
            grain = 2 ** max(0, left.bit_length() - fine)       # few sizes: a CPU too makes a kernel for every new one
            size = -(-left // grain) * grain
            if size < cache.rows:
                order = cache.keep(live | ((~live).cumsum(0) <= size - left))       # finished ones fill up
                rows, live = rows[order], live[order]
                tokens[:size], padding[:size] = tokens[order], padding[order]
            logits = decode(step + 1)
    finally:
        model.train(training)
        model.set_attn_implementation(attention)
    if stats is not None:
        stats |= {"nucleus_mass": float(mass / lengths.sum()), "logprobs": [row[:n] for row, n in zip(logprobs.tolist(), lengths.tolist())]}
    return [row[:length] for row, length in zip(completions.tolist(), lengths.tolist())]


# ---- log-probs ------------------------------------------------------------------------------------------------------


class Product(torch.autograd.Function):
    """`product` with a gradient. MKL, which multiplies fp32 elsewhere, takes its general path on an AMD: twice the time."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        inputs, rows = x.flatten(0, -2), grad.flatten(0, -2)
        narrow = x.shape[-1] <= grad.shape[-1]          # the first factor is copied: the smaller one
        of_weights = product(inputs.t(), rows.t()).t() if of_weight and narrow else product(rows.t(), inputs.t()) if of_weight else None
        return product(grad, weight.t()) if of_x else None, of_weights, rows.sum(0) if of_bias else None


def use_onednn(model) -> None:
    """The linear layers of a model on a CPU multiply by `Product` from here on, where autocast does not make bf16 of it."""
    def forward(self, x):
        if torch.is_autocast_enabled("cpu") or x.dtype != torch.float32:
            return torch.nn.functional.linear(x, self.weight, self.bias)
        return Product.apply(x, self.weight, self.bias)

    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
            module.forward = MethodType(forward, module)


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


@contextlib.contextmanager
def reference_policy(model, frozen):
    """The SFT policy: a frozen copy where all weights train, the frozen second adapter, or the model without its new adapter."""
    if frozen is not None:
        yield frozen
    elif "reference" in model.peft_config:
        model.set_adapter("reference", inference_mode=True)
        try:
            yield model
        finally:
            model.set_adapter("default")
    else:
        with model.disable_adapter():
            yield model


def spread(values: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Values (N,) of the completion tokens back at their places (B, T-1), 0 elsewhere."""
    return torch.zeros(loss_mask.shape, dtype=values.dtype, device=values.device).masked_scatter(loss_mask, values)


# ---- the loop -------------------------------------------------------------------------------------------------------


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


def generate(model, rows: list[dict], prompts: list[list[int]], eos_ids: list[int], tokenizer, generator, temperature, top_p, stats=None):
    """Completions of prompts as (ids, text, scores), ROLLOUT_ROWS at a time; scores is None where the reward could not be computed.

    Exits where that are more than MAX_NO_REWARD of them. `stats` receives that of rollout and reward_seconds.
    """
    global ROLLOUT_ROWS, ROLLOUT_COPY
    uniform = torch.rand(len(prompts), MAX_NEW_TOKENS, generator=generator)         # a number has its place, whatever ROLLOUT_ROWS is
    made, failed, stats = [], [], {} if stats is None else stats
    stats |= {"nucleus_mass": 0.0, "reward_seconds": 0.0, "logprobs": []}
    while len(made) < len(prompts):
        part, completions, found = prompts[len(made):len(made) + ROLLOUT_ROWS], [], {}

        def work():
            with autocast():
                completions.extend(rollout(model, part, max_new_tokens=MAX_NEW_TOKENS, temperature=temperature, top_p=top_p, eos_ids=eos_ids,
                                           generator=uniform[len(made):], stats=found))

        if not fits(work):
            if ROLLOUT_COPY:
                ROLLOUT_COPY = 0
                tqdm.write(f"memory ran out at {len(part)} completions at a time: ROLLOUT_COPY=0 from here on, which is slower")
                continue
            if len(part) == 1:
                sys.exit(f"memory runs out in the rollout of one completion. Lower MAX_NEW_TOKENS={MAX_NEW_TOKENS} or "
                         f"MAX_PROMPT_TOKENS={MAX_PROMPT_TOKENS}, set LOAD_4BIT=1 (it is {LOAD_4BIT}), or take a smaller model")
            ROLLOUT_ROWS = (len(part) + 1) // 2
            tqdm.write(f"memory ran out at {len(part)} completions at a time: ROLLOUT_ROWS={ROLLOUT_ROWS} from here on")
            continue
        stats["nucleus_mass"] += found["nucleus_mass"] * len(part) / len(prompts)
        stats["logprobs"] += found["logprobs"]
        clock = time.time()
        for ids, row in zip(completions, rows[len(made):]):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            scores, fault = try_score(text, row, ids[-1] not in eos_ids)
            failed += [fault] if fault else []
            made.append((ids, text, scores))
        stats["reward_seconds"] += time.time() - clock
    torch.cuda.empty_cache()            # of cache and graphs, which are gone: the update needs other sizes
    if failed:
        tqdm.write(f"no reward for {len(failed)} of {len(made)} completions, the first: {failed[0]}")
        if len(failed) > MAX_NO_REWARD * len(made) or len(failed) == len(made):
            sys.exit(f"that is more than MAX_NO_REWARD={MAX_NO_REWARD}: mend the reward of TASK={TASK}, then begin anew, with RESUME=0")
    return made


def distinct_2(texts: list[str]) -> float:
    """Share of different pairs of neighbouring characters among all such pairs of some completions, their reasoning left out."""
    bodies = [re.sub(r"\W", "", text.rpartition("</think>")[2]) for text in texts]
    pairs = [body[i:i + 2] for body in bodies for i in range(len(body) - 1)]
    return len(set(pairs)) / max(1, len(pairs))


def summarise(completions: list[tuple], eos_ids: list[int], group: int) -> dict[str, float]:
    """Means of every part and fact of the rewards, and lengths in tokens, by right and wrong answers; with a bound on it, distinct-2 too."""
    scores = [s for _, _, s in completions if s is not None]
    lengths = torch.tensor([float(len(ids)) for ids, _, s in completions if s is not None])
    right = torch.tensor([s["correct"] == 1 for s in scores])
    log = {name: statistics.fmean(s[name] for s in scores if name in s) for name in dict.fromkeys(name for s in scores for name in s)}
    log["no_reward"] = 1 - len(scores) / len(completions)
    log["accuracy"], log["unfinished"] = log.pop("correct"), 1 - log.pop("answered")
    log["wrong"] = 1 - log["accuracy"] - log["unfinished"]
    log["truncated"] = sum(ids[-1] not in eos_ids for ids, _, _ in completions) / len(completions)
    log |= {"tokens": float(lengths.mean()), "tokens_p50": float(lengths.quantile(0.5)), "tokens_p95": float(lengths.quantile(0.95))}
    log |= {f"tokens_{name}": float(lengths[rows].mean()) for name, rows in (("right", right), ("wrong", ~right)) if rows.any()}
    if MIN_DISTINCT or MIN_DISTINCT_GROUP:
        texts = [text for _, text, _ in completions]
        groups = [distinct_2(texts[start:start + group]) for start in range(0, len(texts), group)]
        across = [distinct_2(texts[start::group]) for start in range(group)]        # one completion of each prompt
        log |= {"distinct_2": statistics.fmean(across), "distinct_2_group": statistics.fmean(groups)}
    return log


def main() -> None:
    constants = override_constants(sys.argv[1:], is_tiny)
    root = Path(OUT or f"runs/{TASK}")
    folder, data, start = root / "grpo", Path(DATA or root / "data"), SFT or str(root / "sft")
    for name, choices in {"BASELINE": ("momentum", "group", "none", "batch"), "AGGREGATE": ("sequence", "token", "constant"),
                          "BEST_BY": ("accuracy", "reward")}.items():
        if constants[name] not in choices:
            sys.exit(f"unknown {name} {constants[name]!r}; there is {', '.join(choices)}")
    for name in ("STEPS", "PROMPTS_PER_STEP", "MAX_NEW_TOKENS", "ROLLOUT_ROWS", "UPDATES_PER_ROLLOUT", "MICRO_BATCH_TOKENS", "HEAD_CHUNK",
                 "EVAL_EVERY", "EVAL_SAMPLES", "SAMPLES_EVERY", "PATIENCE", "SAVE_EVERY", "KEEP_LAST", "TEMPERATURE", "TOP_P", "EVAL_TOP_P",
                 "MAX_NONFINITE", "GRAD_CLIP"):
        if constants[name] <= 0:
            sys.exit(f"{name} must be above 0, not {constants[name]}")
    for name in ("TOP_P", "EVAL_TOP_P", "MOMENTUM_MIN", "MOMENTUM_MAX", "MIN_LR", "CLIP_LOW", "MAX_NO_REWARD"):
        if constants[name] > 1:
            sys.exit(f"{name} must be at most 1, not {constants[name]}")
    if GROUP_SIZE < 2:
        sys.exit(f"GROUP_SIZE={GROUP_SIZE}: an advantage compares completions of one prompt, 2 at least")
    if not SFT and not Path(start, "summary.json").is_file():
        sys.exit(f"{start} holds no finished SFT: run `make sft`, or set SFT= to a policy folder or a hub model")
    train, val = read_rows(data / "train.jsonl", ("prompt",)), read_rows(data / "val.jsonl", ("prompt",))
    val = held_out(train, val, data / "val.jsonl")
    if (data / "test.jsonl").is_file():
        held_out(train, read_rows(data / "test.jsonl", ("prompt",)), data / "test.jsonl")
    inputs = {path.name: sha256(path) for path in (data / "train.jsonl", data / "val.jsonl")} | use_data(data) | fingerprint("SFT", start)
    header = start_run(folder, constants, inputs, device_name())
    checkpoint = None if header else newest_checkpoint(folder)
    set_seed(SEED)
    torch.set_num_threads(THREADS or os.cpu_count())
    model, tokenizer = load_model(str(checkpoint or start), trainable=True)
    disable_progress_bar()       # one for every checkpoint otherwise
    device = next(model.parameters()).device
    eos_ids = end_ids(model, tokenizer)
    frozen = None
    if BETA and not hasattr(model, "peft_config"):
        frozen = load_model(start, trainable=True)[0].requires_grad_(False).eval()
    elif BETA and Path(start, "adapter_config.json").is_file():
        model.load_adapter(start, adapter_name="reference", is_trainable=False)
    for policy in (model, frozen) if frozen else (model,):
        use_onednn(policy)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, betas=(0.9, 0.99))
    generator, random_order = torch.Generator().manual_seed(SEED), random.Random(SEED)
    # all that a step leaves for the next, beside the policy, the optimizer and the random number generators
    run = SimpleNamespace(step=-1, order=[], running_mean=None, running_std=None, best=-math.inf, bests=[], below=0, last=0.0, first={},
                          ended="", skipped=0, nonfinite=0, spikes=0, norms=[], seconds=0.0)
    if checkpoint:
        load_checkpoint(checkpoint, folder, run, [optimizer])
        generator.set_state(run.generator)
        random_order.setstate(run.random_order)

    def encode(rows):
        ids = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
        kept = [i for i in range(len(rows)) if len(ids[i]) <= MAX_PROMPT_TOKENS]
        if len(kept) < len(rows):
            print(f"{len(rows) - len(kept)} of {len(rows)} prompts are longer than MAX_PROMPT_TOKENS={MAX_PROMPT_TOKENS} and left out")
        if not kept:
            sys.exit(f"no prompt of {len(rows)} is within MAX_PROMPT_TOKENS={MAX_PROMPT_TOKENS}")
        return [rows[i] for i in kept], [ids[i] for i in kept]

    train = list({row["prompt"]: row for row in train}.values())       # many SFT samples may share a prompt
    train, train_ids = encode(train)
    val, val_ids = encode(val)
    if header:
        new_run(folder, header)
    writer = SummaryWriter(folder / "tensorboard", purge_step=run.step + 1)
    began, stop = time.time() - run.seconds, catch_signals()

    for step in tqdm(range(run.step + 1, STEPS + 1), desc="grpo", unit="step", dynamic_ncols=True, initial=run.step + 1, total=STEPS + 1):
        if run.ended:
            tqdm.write(f"stopped: {run.ended}")
            break
        log = {"step": step}
        if step:
            # 1 rollout: GROUP_SIZE completions of each prompt
            clock = time.time()
            while len(run.order) < PROMPTS_PER_STEP:
                run.order += random_order.sample(range(len(train)), len(train))
            picked, run.order = run.order[:PROMPTS_PER_STEP], run.order[PROMPTS_PER_STEP:]
            rows = [train[i] for i in picked for _ in range(GROUP_SIZE)]
            prompts = [train_ids[i] for i in picked for _ in range(GROUP_SIZE)]
            stats = {}
            completions = generate(model, rows, prompts, eos_ids, tokenizer, generator, TEMPERATURE, TOP_P, stats)
            log["rollout_seconds"], sampler_logprobs = time.time() - clock - stats["reward_seconds"], stats.pop("logprobs")

            # 2 rewards, which generate() has computed
            rewards = torch.tensor([float("nan") if s is None else s["reward"] for _, _, s in completions], dtype=torch.float64)
            rewards = rewards.view(PROMPTS_PER_STEP, GROUP_SIZE)
            log |= summarise(completions, eos_ids, GROUP_SIZE) | stats

            # 3 advantages
            mean, std = group_statistics(rewards)
            log |= {"reward_std": float(std.nanmean()), "zero_variance": float((std == 0).double().mean())}
            if run.running_mean is None:
                run.running_mean, run.running_std = float(mean.nanmean()), float(std.nanmean())
            if BASELINE == "momentum":
                momentum = min(MOMENTUM_MAX, MOMENTUM_MIN + MOMENTUM_STEP * (step - 1))
                advantages, run.running_mean, run.running_std = momentum_advantages(rewards, run.running_mean, run.running_std, momentum)
                log |= {"momentum": momentum, "running_mean": run.running_mean, "running_std": run.running_std}
            else:
                advantages = baseline_advantages(rewards, BASELINE)

            # 4 old and reference log-probs, in the micro-batches of the update
            clock = time.time()
            samples = [(prompt + ids, len(prompt)) for prompt, (ids, _, _) in zip(prompts, completions)]
            all_tokens, batches = sum(len(ids) for ids, _, _ in completions), []
            for indices in micro_batches([len(ids) for ids, _ in samples], MICRO_BATCH_TOKENS):
                input_ids, loss_mask = collate([samples[i] for i in indices], device)
                sampled = torch.tensor([x for i in indices for x in sampler_logprobs[i]], device=device)
                batches.append({"input_ids": input_ids, "loss_mask": loss_mask, "ref_logprobs": None, "old_logprobs": None,
                                "sampler_logprobs": spread(sampled, loss_mask),
                                "advantages": advantages.flatten()[indices].float().to(device)[:, None]})

            def look(batch):
                given = batch["input_ids"], batch["loss_mask"], TEMPERATURE
                with torch.no_grad(), autocast():
                    if BETA:
                        with reference_policy(model, frozen) as reference:
                            batch["ref_logprobs"] = spread(completion_logprobs(reference, *given)[0], batch["loss_mask"])
                    if UPDATES_PER_ROLLOUT > 1:
                        batch["old_logprobs"] = spread(completion_logprobs(model, *given)[0], batch["loss_mask"])

            batches = each_micro_batch(batches, look)

            # 5 clipped update: the loss of the step is the sum over micro-batches, each with its share of completions or tokens
            sums = {}

            def learn(batch):
                with autocast():
                    logprobs, entropy = completion_logprobs(model, batch["input_ids"], batch["loss_mask"], TEMPERATURE)
                share = len(entropy) / all_tokens
                logprobs = spread(logprobs, batch["loss_mask"])
                old_logprobs = logprobs.detach() if batch["old_logprobs"] is None else batch["old_logprobs"]
                loss, metrics = grpo_loss(logprobs, old_logprobs, batch["ref_logprobs"], batch["advantages"], batch["loss_mask"],
                                          clip_low=CLIP_LOW, clip_high=CLIP_HIGH, beta=BETA,
                                          aggregate=MAX_NEW_TOKENS if AGGREGATE == "constant" else AGGREGATE)
                loss = loss * (share if AGGREGATE == "token" else len(logprobs) / len(samples))
                loss.backward()
                away = (old_logprobs - batch["sampler_logprobs"]).abs().sum() / len(entropy)       # of the sampler from the scorer
                for name, value in {**metrics, "entropy": entropy.mean(), "sampler_error": away}.items():
                    sums[name] = max(sums.get(name, 0.0), float(value)) if name == "ratio_error" else sums.get(name, 0.0) + share * float(value)
                sums["loss"] = sums.get("loss", 0.0) + float(loss.detach())

            def forget():
                sums.clear()
                optimizer.zero_grad()

            for group in optimizer.param_groups:
                group["lr"] = LR * min(step / max(1, WARMUP), 1 - (1 - MIN_LR) * max(0, step - WARMUP) / max(1, STEPS - WARMUP))
            for _ in range(UPDATES_PER_ROLLOUT):
                forget()
                batches = each_micro_batch(batches, learn, forget)
                norm = torch.nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
                if may_step(float(norm), sums["loss"], run):
                    optimizer.step()
            optimizer.zero_grad()
            log |= sums | {"grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"], "skipped": run.skipped, "spikes": run.spikes}
            log |= {"update_seconds": time.time() - clock, "rollout_tokens_per_s": all_tokens / log["rollout_seconds"]}
            log |= {"update_tokens_per_s": all_tokens / log["update_seconds"]}

        # 6 log, evaluate, save
        if step and (step == 1 or step % SAMPLES_EVERY == 0):
            with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
                for i in range(0, len(rows), GROUP_SIZE):
                    sample = {"step": step, "prompt": rows[i]["prompt"], "completion": completions[i][1], "scores": completions[i][2],
                              "advantage": float(advantages.flatten()[i])}
                    file.write(json.dumps(sample, ensure_ascii=False) + "\n")
        if step == 1 and log["truncated"] > 0.5:
            tqdm.write(f"{log['truncated']:.0%} of the completions are cut off at MAX_NEW_TOKENS={MAX_NEW_TOKENS}: raise it, or the token "
                       "budget decides the rewards and not the model")
        if step % EVAL_EVERY == 0 or step == STEPS:
            clock = time.time()
            rows, prompts = ([x for x in xs for _ in range(EVAL_SAMPLES)] for xs in (val, val_ids))
            completions = generate(model, rows, prompts, eos_ids, tokenizer, torch.Generator().manual_seed(SEED), EVAL_TEMPERATURE, EVAL_TOP_P)
            log |= {f"val_{name}": value for name, value in summarise(completions, eos_ids, EVAL_SAMPLES).items()}
            log |= {"val_lengths": [len(ids) for ids, _, _ in completions], "val_seconds": time.time() - clock}
            least = {"val_distinct_2": MIN_DISTINCT, "val_distinct_2_group": MIN_DISTINCT_GROUP}
            faded = [f"{name} {log[name]:.3f} is below {least[name]} of {first:.3f}, its first" for name, first in run.first.items()
                     if log[name] < least[name] * first]
            run.first, run.last = run.first or {name: log[name] for name in least if name in log}, log[f"val_{BEST_BY}"]
            run.below = 0 if run.last >= run.best and not faded else run.below + 1
            if run.below >= PATIENCE:
                best = f"none of the last {PATIENCE} evaluations could be the best, which is step {run.bests[-1]} with val {BEST_BY} {run.best:.3f}"
                run.ended = "; ".join([best, *faded])
            if run.last > run.best and not faded:       # what lost its diversity is never the best
                run.best, run.bests = run.last, run.bests + [step]
        run.step, run.seconds, run.generator, run.random_order = step, time.time() - began, generator.get_state(), random_order.getstate()
        log |= {"seconds": run.seconds, "peak_gib": peak_memory()}
        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(log) + "\n")
        for name, value in log.items():
            if name not in ("step", "val_lengths"):
                writer.add_scalar(name, value, step)
        tqdm.write(f"step {step}  " + "  ".join(f"{name} {log[name]:.3f}" for name in SHOWN if name in log))
        asked = stop[:1]            # a signal may come at any time
        if step % SAVE_EVERY == 0 or step in (*run.bests, STEPS) or asked or run.nonfinite >= MAX_NONFINITE:
            save_checkpoint(folder, run, model, tokenizer, [optimizer])
        if run.nonfinite >= MAX_NONFINITE:
            sys.exit(f"{run.nonfinite} updates in a row were skipped, the last with loss {log['loss']} and gradient norm {log['grad_norm']}. The "
                     f"weights of the last update are in {folder}/step-{step}, the best ones in {folder}. A lower LR may help, in another OUT=")
        if asked:
            sys.exit(128 + asked[0])

    writer.close()
    finish_run(folder, {"steps": run.step, "best_step": run.bests[-1], f"best_val_{BEST_BY}": run.best, f"last_val_{BEST_BY}": run.last,
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
    """Whether the TINY constants hold: the policy to start from began as MODEL=tiny."""
    root = given.get("OUT", OUT) or f"runs/{given.get('TASK', TASK)}"
    config = Path(given.get("SFT", SFT) or f"{root}/sft", "config.json")
    with contextlib.suppress(OSError, ValueError):          # what is damaged is named where it is loaded
        return bool(json.loads(config.read_text(encoding="utf-8")).get("tiny"))
    return False


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
