"""Evaluates policies on hands that no training has seen, and draws the figures of a run.

    python eval.py                                                   # SFT against GRPO on the test split
    python eval.py --policies=base=Qwen/Qwen2.5-1.5B-Instruct        # any folder or hub model
    python eval.py --hands=hands.txt                                 # hands of one's own, one a line: 4 5 6 10
    python eval.py --ask="3 3 8 8"                                   # the reasoning before and after GRPO

Writes metrics.json, a jsonl of completions for each policy, three figures and report.md. Intervals are 95 % bootstrap intervals over
hands, because the samples of one hand are not independent.
"""

import argparse
import contextlib
import difflib
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError
from tqdm import tqdm

import reward

# Run
TASK = "game24"
OUT = ""                     # root folder of the run; empty: runs/TASK
DATA = ""                    # folder of the split and of train.jsonl; empty: OUT/data
SFT = ""                     # the policy before GRPO; empty: OUT/sft
POLICIES = ""                # name=folder-or-hub-model,name=...; empty: sft=SFT,grpo=OUT/grpo
REVISION = ""                # commit, tag or branch of a hub model; empty: the default branch
SPLIT = "test"               # test or val
HANDS = ""                   # file of hands, one a line, instead of the split; hands.txt goes to OUT/eval-hands
RESUME = 1                   # 0: start anew where an evaluation is, finished or cut off
STRICT = 1                   # 0: bad rows of the data are skipped and counted, not refused
SEED = 0
THREADS = 0                  # CPU threads; 0: one for each core
# Instead of an evaluation
ASK = ""                     # four numbers: prints the reasoning of each policy
EXPORT = ""                  # folder: writes the last policy there as a plain model of transformers, an adapter merged
PLOTS_ONLY = 0               # 1: only draws the figures, also of a run that is under way
# Model
LOAD_4BIT = 1                # NF4 with double quantisation, as in training; 0: bf16 on a GPU, fp32 on a CPU
LORA_RANK = 0                # nothing is trained here
LORA_ALPHA = 0
GRADIENT_CHECKPOINTING = 0
BF16 = 1                     # bf16 matrix products where the processor has them
# Sampling
SAMPLES = 4                  # sampled completions of a hand, beside the greedy one
TEMPERATURE = 0.7
TOP_P = 0.9
MAX_NEW_TOKENS = 1024
EVAL_BATCH_TOKENS = 131072   # tokens of a batch at most: lower it when memory runs out
BOOTSTRAP = 2000             # resamples of an interval
# What policies that began as MODEL=tiny have instead: fp32 gives the same numbers whatever the batch
TINY = {"LOAD_4BIT": 0, "BF16": 0, "MAX_NEW_TOKENS": 208}


# ---- rollout --------------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of every layer, allocated once: (rows, heads, tokens, head size). Rows can be dropped.

    It stands in for the cache of transformers, whose `update` grows a new tensor for every token.
    """

    def __init__(self, rows: int, tokens: int):
        self.rows, self.tokens, self.filled, self.layers = rows, tokens, 0, {}

    def update(self, keys, values, layer, *args, **kwargs):
        if layer not in self.layers:
            self.layers[layer] = [x.new_empty(self.rows, x.shape[1], self.tokens, x.shape[3]) for x in (keys, values)]
        end = self.filled + keys.shape[2]
        for store, new in zip(self.layers[layer], (keys, values)):
            store[:self.rows, :, self.filled:end] = new
        return [store[:self.rows, :, :end] for store in self.layers[layer]]

    def get_seq_length(self, layer=0) -> int:
        return self.filled

    def keep(self, alive: torch.Tensor) -> torch.Tensor:
        """Drops the rows that are not alive (rows,): the last live rows move into their slots. Returns the old index of each row."""
        self.rows = int(alive.sum())
        holes = (~alive[:self.rows]).nonzero().flatten()
        movers = self.rows + alive[self.rows:].nonzero().flatten()
        for stores in self.layers.values():
            for store in stores:
                store[holes, :, :self.filled] = store[movers, :, :self.filled]
        order = torch.arange(self.rows, device=alive.device)
        order[holes] = movers
        return order


def sample(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens (B,) from logits (B, V) and one uniform number a row, and the probability mass (B,) of the tokens allowed.

    Nucleus sampling is exact: the smallest set of tokens whose mass is at least top_p. The 1,024 likeliest hold it nearly always;
    where they do not, the whole vocabulary is sorted.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.ones_like(uniform)
    probs = torch.softmax(logits.float() / temperature, -1)
    for count in (min(1024, probs.shape[-1]), probs.shape[-1]):
        top, tokens = probs.topk(count)
        mass = top.cumsum(-1)
        if count == probs.shape[-1] or bool((mass[:, -1] >= top_p).all()):
            break
    allowed = (mass - top < top_p).sum(-1, keepdim=True).clamp(min=1)       # NaN logits: any token, the loss will be NaN and say so
    total = mass.gather(1, allowed - 1)
    choice = torch.searchsorted(mass, uniform[:, None] * total, right=True).minimum(allowed - 1)
    return tokens.gather(1, choice).flatten(), total.flatten()


@torch.no_grad()
def rollout(model, prompt_ids: list[list[int]], *, max_new_tokens: int, temperature: float, top_p: float, eos_ids: list[int],
            generator: torch.Generator | torch.Tensor | None = None, stats: dict | None = None) -> list[list[int]]:
    """One completion a prompt, as token ids without padding; an EOS that was reached is the last id. Temperature 0 is greedy.

    Prompts are padded on the left, so that every row writes the same slot of the cache; finished rows leave the batch. The random
    numbers belong to the prompts, not to the rows, so the dropping of rows changes no completion. The model's mode and parameters
    are left as they were. `generator` draws the numbers, or is a tensor (B, max_new_tokens) of them. `stats`, where given, receives
    nucleus_mass: the mean probability of what top_p allows.
    """
    device, count = next(model.parameters()).device, len(prompt_ids)
    if not count or min(map(len, prompt_ids)) == 0:
        raise ValueError(f"rollout needs at least one prompt, each of at least one token; got {count} prompts")
    if not 0 < top_p <= 1 or temperature < 0:
        raise ValueError(f"top_p must be above 0 and at most 1, temperature at least 0; got {top_p} and {temperature}")
    width = max(map(len, prompt_ids))
    input_ids = torch.tensor([[eos_ids[0]] * (width - len(ids)) + ids for ids in prompt_ids], device=device)
    padding = torch.tensor([width - len(ids) for ids in prompt_ids], device=device)
    eos, rows = torch.tensor(eos_ids, device=device), torch.arange(count, device=device)
    completions = torch.zeros(count, max_new_tokens, dtype=torch.long, device=device)
    lengths = torch.full((count,), max_new_tokens, device=device)
    cache, mass, training = KVCache(count, width + max_new_tokens), [], model.training
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else next(model.parameters()).dtype
    slots = torch.arange(width + max_new_tokens, device=device)
    hidden = torch.finfo(dtype).min * (slots < padding[:, None]).to(dtype)[:, None, None]       # (B, 1, 1, slots): left padding
    causal = torch.full((width, width), torch.finfo(dtype).min, dtype=dtype, device=device).triu(1)
    mask = torch.maximum(hidden[..., :width] + causal, torch.tensor(torch.finfo(dtype).min, dtype=dtype))
    positions = (slots[:width] - padding[:, None]).clamp(min=0)
    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")        # twice the speed of eager for one token a row; no change on a GPU
    model.eval()
    try:
        for step in range(max_new_tokens):
            logits = model(input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                           logits_to_keep=1).logits[:, -1]
            cache.filled += input_ids.shape[1]
            uniform = (generator[:, step] if isinstance(generator, torch.Tensor) else
                       torch.rand(count, generator=generator, device=generator.device if generator else device)).to(device)
            tokens, allowed = sample(logits, uniform[rows], temperature, top_p)
            mass.append(allowed)
            completions[rows, step] = tokens
            finished = torch.isin(tokens, eos)
            if bool(finished.any()):
                lengths[rows[finished]] = step + 1
                if bool(finished.all()):
                    break
                order = cache.keep(~finished)
                rows, tokens, padding, hidden = rows[order], tokens[order], padding[order], hidden[order]
            input_ids, mask, positions = tokens[:, None], hidden[..., :cache.filled + 1], (cache.filled - padding)[:, None]
    finally:
        model.train(training)
        model.set_attn_implementation(attention)
    if stats is not None:
        stats["nucleus_mass"] = float(torch.cat(mass).mean())
    return [row[:length] for row, length in zip(completions.tolist(), lengths.tolist())]


# ---- evaluation -----------------------------------------------------------------------------------------------------


def policies() -> dict[str, str]:
    """Names and places of the policies. Exits where a folder of the run is missing."""
    root = OUT or f"runs/{TASK}"
    if POLICIES:
        pairs = [pair.partition("=")[::2] if "=" in pair else (Path(pair).name, pair) for pair in POLICIES.split(",")]
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names) or not all(name and "/" not in name for name in names):
            sys.exit(f"POLICIES={POLICIES}: each needs a name of its own, without /, as in first=folder,second=folder")
        return dict(pairs)
    found = {"sft": SFT or f"{root}/sft", "grpo": f"{root}/grpo"}
    for name, place in found.items():
        if (name == "grpo" or not SFT) and not Path(place, "tokenizer_config.json").is_file():
            sys.exit(f"{place} holds no policy: run `make {name}`, or set POLICIES=name=folder")
    return found


def test_rows(data: Path) -> list[dict]:
    """Rows to evaluate. Exits where one of them is in the training data."""
    if HANDS:
        if not Path(HANDS).is_file():
            sys.exit(f"HANDS={HANDS}: there is no such file")
        try:
            rows, text = [], Path(HANDS).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            sys.exit(f"{HANDS}: {error}")
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                words = line.replace(",", " ").split()
                row = {"id": f"hand-{number}", "numbers": [int(word) if word.isascii() and word.isdigit() else word for word in words]}
                try:
                    rows.append({**row, "prompt": reward.prompt(TASK, row)})
                except ValueError as error:
                    sys.exit(f"{HANDS}:{number}: {error}")
    else:
        rows = read_rows(data / f"{SPLIT}.jsonl", ("prompt",))
    if not rows:
        sys.exit(f"{HANDS or data} holds no row to evaluate")
    if (data / "train.jsonl").is_file():
        rows = held_out(read_rows(data / "train.jsonl", ("prompt",)), rows, Path(HANDS or data / f"{SPLIT}.jsonl"))
    return rows


def complete(model, tokenizer, rows: list[dict], file: Path, name: str) -> list[dict]:
    """Completions with their scores: a greedy one for each row, then SAMPLES sampled ones for each.

    They are written after each batch of EVAL_BATCH_TOKENS, and each has random numbers of its own: an evaluation that was cut off goes
    on with what the file holds. Exits where a reward fails: a rate without it would be another one.
    """
    eos_ids, prompts = end_ids(model, tokenizer), [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    batch = max(1, EVAL_BATCH_TOKENS // (max(map(len, prompts)) + MAX_NEW_TOKENS))
    jobs = list(range(len(rows))) + [index for index in range(len(rows)) for _ in range(SAMPLES)]
    spans = [(start, min(start + batch, stop)) for first, stop in ((0, len(rows)), (len(rows), len(jobs))) for start in range(first, stop, batch)]
    made = []
    for entry, index in zip(read_log(file), jobs):          # what else a damaged file holds is made again
        whole = isinstance(entry, dict) and {"prompt", "completion", "tokens", "reward", "correct", "answered"} <= set(entry)
        if not whole or entry["prompt"] != rows[index]["prompt"]:
            break
        made.append(entry)
    write_rows(file, made)
    for start, stop in tqdm(spans, desc=name, unit="batch", dynamic_ncols=True):
        if len(made) >= stop:
            continue
        numbers = torch.stack([torch.rand(MAX_NEW_TOKENS, generator=torch.Generator().manual_seed(SEED * 2**20 + i)) for i in range(start, stop)])
        with autocast():
            completions = rollout(model, [prompts[index] for index in jobs[start:stop]], max_new_tokens=MAX_NEW_TOKENS, top_p=TOP_P, eos_ids=eos_ids,
                                  temperature=TEMPERATURE if start >= len(rows) else 0.0, generator=numbers)
        del made[start:]
        for index, ids in zip(jobs[start:stop], completions):
            row, text = rows[index], tokenizer.decode(ids, skip_special_tokens=True)
            scores, fault = try_score(text, row, ids[-1] not in eos_ids)
            if fault:
                sys.exit(f"no reward for a completion of {name}: {fault}\nMend the reward of TASK={TASK}, then evaluate again, with RESUME=0")
            made.append({"id": row.get("id"), "prompt": row["prompt"], "completion": text, "tokens": len(ids), **scores})
        write_rows(file, made)
    return made


def summarise(sampled: list[dict], greedy: list[dict]) -> dict:
    """Means and 95 % intervals over hands of one policy's n completions; SAMPLES of each hand, and a greedy one."""
    def of(name, completions=sampled):
        return numpy.array([c[name] for c in completions]).reshape(len(greedy), -1)

    values = {"accuracy": of("correct"), "unfinished": 1 - of("answered"), "wrong": of("answered") - of("correct"), "mean_tokens": of("tokens")}
    values |= {name: of(name) for name in ("process", "lines", "reward") if name in sampled[0]}
    values |= {f"pass@{SAMPLES}": of("correct").max(1, keepdims=True), "greedy_accuracy": of("correct", greedy),
               "greedy_unfinished": 1 - of("answered", greedy)}
    draws, summary = numpy.random.default_rng(SEED).integers(0, len(greedy), (BOOTSTRAP, len(greedy))), {}
    for name, value in values.items():
        summary[name] = float(value.mean())
        summary[f"{name}_ci"] = [float(x) for x in numpy.percentile(value.mean(1)[draws].mean(1), [2.5, 97.5])]
    return summary | {"median_tokens": float(numpy.median(of("tokens"))), "n": len(sampled), "hands": len(greedy)}


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes a jsonl file: aside first, then renamed into place, so that it is never half written."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    flush(aside)
    os.replace(aside, path)


def read_log(path: Path) -> list[dict]:
    """Objects of a jsonl file, as far as it is whole: a run that is cut off may leave half a line."""
    found = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in path.read_bytes().split(b"\n"):
            found += [json.loads(line)] if line else []
    return found


def draw(folder: Path, log: list[dict], completions: dict[str, list[dict]]) -> list[str]:
    """The three figures of the report, as far as their data exists; returns their file names."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []

    def finish(figure, name):
        figure.savefig(folder / name, dpi=120, bbox_inches="tight")
        pyplot.close(figure)
        drawn.append(name)

    steps = [entry for entry in log if "val_accuracy" in entry]
    if steps:
        figure, axes = pyplot.subplots(figsize=(7, 4))
        for name in ("accuracy", "unfinished", "wrong"):
            line, = axes.plot([e["step"] for e in steps], [e[f"val_{name}"] for e in steps], marker="o", label=f"{name} (val)")
            training = [(e["step"], e[name]) for e in log if name in e]
            axes.plot(*zip(*training), color=line.get_color(), alpha=0.25, linewidth=1) if training else None
        axes.set(xlabel="GRPO step", ylabel="share of completions", ylim=(0, 1), title="Accuracy, unfinished and wrong (pale: training batches)")
        axes.legend()
        finish(figure, "accuracy.png")
        figure, axes = pyplot.subplots(figsize=(7, 4))
        shown = [steps[i] for i in sorted({0, len(steps) // 3, 2 * len(steps) // 3, len(steps) - 1})]
        bins = numpy.linspace(0, max(max(e["val_lengths"]) for e in shown) + 1, 33)
        for entry in shown:
            axes.hist(entry["val_lengths"], bins=bins, histtype="step", label=f"step {entry['step']}, mean {numpy.mean(entry['val_lengths']):.0f}")
        axes.set(xlabel="tokens of a completion", ylabel="completions", title="Lengths of the completions on val")
        axes.legend()
        finish(figure, "lengths.png")
    if TASK == "game24":
        figure, axes = pyplot.subplots(figsize=(7, 4))
        lines = numpy.arange(0, 61)
        axes.plot(lines, [reward.length_reward(int(n)) for n in lines], color="black", label="length reward")
        axes.set(xlabel="lines of reasoning", ylabel="length reward", title="Length reward, and the lines of the completions")
        other = axes.twinx()
        for name, made in completions.items():
            other.hist([c["lines"] for c in made], bins=numpy.arange(0, 61, 2), alpha=0.4, density=True, label=name)
        other.set_yticks([])
        figure.legend(loc="upper right", bbox_to_anchor=(0.89, 0.87))
        finish(figure, "length_reward.png")
    return drawn


def table(metrics: dict[str, dict]) -> str:
    """Markdown table of the policies, with the 95 % interval of each mean."""
    names = {"accuracy": "accuracy", "unfinished": "unfinished", "wrong": "wrong", "mean_tokens": "mean tokens", "process": "steps right",
             "greedy_accuracy": "greedy accuracy", f"pass@{SAMPLES}": f"pass@{SAMPLES}"}
    first = next(iter(metrics.values()))
    names = {name: head for name, head in names.items() if name in first}
    lines = [f"| | {' | '.join(names.values())} |", "|---" * (len(names) + 1) + "|"]
    for policy, m in metrics.items():
        cells = ["{:.{digits}f} ({:.{digits}f}–{:.{digits}f})".format(m[name], *m[f"{name}_ci"], digits=1 if name == "mean_tokens" else 3)
                 for name in names]
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    note = (f"{first['n']} completions over {first['hands']} rows for each policy, T {TEMPERATURE}, top-p {TOP_P}; greedy: one for each row; in "
            "brackets 95 % bootstrap intervals over rows")
    return "\n".join(lines) + "\n\n" + note


def ask(question: str) -> None:
    """Streams the reasoning of every policy on one hand, and says whether the answer is right."""
    from transformers import GenerationConfig, TextStreamer

    row = {"numbers": [int(word) if word.isascii() and word.isdigit() else word for word in question.replace(",", " ").split()]}
    try:
        text = reward.prompt(TASK, row)
    except ValueError as error:
        sys.exit(f"ASK: {error}")
    for name, place in policies().items():
        model, tokenizer = load_model(place, trainable=False)
        torch.manual_seed(SEED)
        prompt = torch.tensor([encode_prompt(tokenizer, text)], device=next(model.parameters()).device)
        print(f"\n=== {name}: {text}")
        settings = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0,
                                    eos_token_id=end_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, generation_config=settings)
        ids = output[0, prompt.shape[1]:].tolist()
        scores = reward.score(TASK, tokenizer.decode(ids, skip_special_tokens=True), row, ids[-1] not in end_ids(model, tokenizer))
        verdict = "right" if scores["correct"] else "unfinished" if not scores["answered"] else "wrong"
        print(f"--- {name}: {verdict}, {len(ids)} tokens, {scores['process']:.0%} of the steps right, reward {scores['reward']:.3f}")


def export(place: str, folder: Path) -> None:
    """Writes a policy as a plain model of transformers. Exact: 4-bit weights are dequantised before the adapter is merged."""
    from peft import PeftModel

    model, tokenizer = load_model(place, trainable=False)
    adapted = hasattr(model, "peft_config")
    if LOAD_4BIT:
        model = model.unload() if adapted else model
        model.dequantize()
        model = PeftModel.from_pretrained(model, place) if adapted else model
    if adapted:
        model = model.merge_and_unload()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: reload it with AutoModelForCausalLM.from_pretrained({str(folder)!r})")


def main() -> None:
    constants = override_constants(sys.argv[1:], is_tiny)
    root = Path(OUT or f"runs/{TASK}")
    folder, data, log = root / (f"eval-{Path(HANDS).stem}" if HANDS else "eval"), Path(DATA or root / "data"), read_log(root / "grpo/log.jsonl")
    for name in ("SAMPLES", "MAX_NEW_TOKENS", "EVAL_BATCH_TOKENS", "BOOTSTRAP", "TEMPERATURE", "TOP_P"):
        if constants[name] <= 0 or (name == "TOP_P" and TOP_P > 1):
            sys.exit(f"{name} must be above 0{' and at most 1' if name == 'TOP_P' else ''}, not {constants[name]}")
    torch.set_num_threads(THREADS or os.cpu_count())
    if (ASK or HANDS) and TASK != "game24":
        sys.exit(f"ASK= and HANDS= are for TASK=game24, not {TASK}")
    if ASK:
        return ask(ASK)
    if EXPORT:
        return export(list(policies().values())[-1], Path(EXPORT))
    if PLOTS_ONLY:
        if not log:
            sys.exit(f"{root / 'grpo/log.jsonl'} is missing or empty: run `make grpo`")
        folder.mkdir(parents=True, exist_ok=True)
        made = {path.stem: read_log(path) for path in sorted(folder.glob("*.jsonl"), reverse=True)}
        sampled = {name: rows[len({row["prompt"] for row in rows}):] for name, rows in made.items()}      # the greedy completions come first
        sampled = {name: rows for name, rows in sampled.items() if rows}
        return print(*(folder / name for name in draw(folder, log, sampled)), sep="\n")
    places, rows = policies(), test_rows(data)
    source = Path(HANDS or data / f"{SPLIT}.jsonl")
    inputs = {source.name: sha256(source)} | {key: value for name, place in places.items() for key, value in fingerprint(name, place).items()}
    start_run(folder, constants, inputs, device_name())
    metrics, sampled = {}, {}
    for name, place in places.items():
        began = time.time()
        model, tokenizer = load_model(place, trainable=False)
        made = complete(model, tokenizer, rows, folder / f"{name}.jsonl", name)
        sampled[name] = made[len(rows):]
        metrics[name] = {**summarise(sampled[name], made[:len(rows)]), "seconds": time.time() - began}
        del model
    figures = draw(folder, log, sampled)
    example = rows[0]["prompt"]
    samples = "\n\n".join(f"**{name}**, {example}\n\n```\n{made[0]['completion']}\n```" for name, made in sampled.items())
    images = "\n".join(f"![{name[:-4]}]({name})" for name in figures)
    (folder / "report.md").write_text(f"# {TASK}\n\n{table(metrics)}\n\n{images}\n\n{samples}\n", encoding="utf-8")
    write_json(folder / "metrics.json", metrics)
    print(table(metrics))
    finish_run(folder, {f"{name}_accuracy": m["accuracy"] for name, m in metrics.items()} | {"report": str(folder / "report.md")})


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
    return bool(BF16) and (torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported())


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


# ---- plumbing: constants, folder and data of a run ------------------------------------------------------------------


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
    """Whether the TINY constants hold: the first policy began as MODEL=tiny."""
    root = given.get("OUT", OUT) or f"runs/{given.get('TASK', TASK)}"
    first = (given.get("POLICIES", POLICIES) or "sft=").split(",")[0].split("=", 1)[-1] or given.get("SFT", SFT) or f"{root}/sft"
    config = Path(first, "config.json")
    with contextlib.suppress(OSError, ValueError):          # what is damaged is named where it is loaded
        return bool(json.loads(config.read_text(encoding="utf-8")).get("tiny"))
    return False


def start_run(folder: Path, constants: dict, inputs: dict[str, str], device: str) -> bool:
    """Takes the run folder for this process alone; returns whether it holds a run that was cut off and can go on.

    A new run stores source, constants, versions, device and hashes of the inputs, and prints the constants. Exits with 0 where the
    folder holds the finished run of the same constants and inputs; with the difference and the two ways out where it holds another
    one; and where another process works in it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.parent / f".{folder.name}.lock", os.O_RDWR | os.O_CREAT)      # never closed: it is held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"{folder}: another process works in it. Wait for its end, or set OUT= to another folder")
    # they say where and how fast, not what
    free = ("OUT", "DATA", "SFT", "RESUME", "STRICT", "THREADS", "MICRO_BATCH_TOKENS", "EVAL_BATCH_TOKENS", "HEAD_CHUNK", "GRADIENT_CHECKPOINTING",
            "SAVE_EVERY", "KEEP_LAST")
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
        return True
    replaced = folder.parent / f".{folder.name}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.is_dir():
        os.rename(folder, replaced)         # at once: half a folder would be nobody's
    folder.mkdir()
    write_json(run, header)
    for source in sources:
        shutil.copy(source, folder)
    shutil.rmtree(replaced, ignore_errors=True)
    print("\n".join(f"{name} = {value!r}" for name, value in constants.items()))
    return False


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
            sys.exit(f"{found}: what is measured on them says nothing. Make data that holds them out (make data HOLDOUT=file)")
        print(f"{found}: left out of what is measured")
    return kept


if __name__ == "__main__":
    main()
