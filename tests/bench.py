"""Speed and memory of grpo.py on this machine against transformers and TRL: `make bench`, after `make train`.

    python tests/bench.py                       # all parts
    python tests/bench.py real rollout          # some of real, rollout, update, step, memory; on a GPU also floor, fits
    python tests/bench.py real --sft=runs/x/sft --data=runs/x/data

The contenders take turns in one process. Each round gives a ratio; the median and range over rounds are reported. Peak
memory is measured in separate processes. `real` trains the policy of `make train` on its own prompts; the models of the
other parts have random weights. Prints the rows of a table and writes bench.json, one flat object.
"""

import contextlib
import copy
import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from commands import read, write
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402
import reward  # noqa: E402
import sft  # noqa: E402

SFT = str(ROOT / "runs/game24/sft")          # for the part `real`: the trained policy ...
DATA = str(ROOT / "runs/game24/data")        # ... and its data
TEMPERATURE = 0.7
# constants of grpo.py, also given to TRL
STEP = {"MODEL": "tiny", "CREDIT": "answer", "TEMPERATURE": TEMPERATURE, "TOP_P": 1.0, "LR": 2e-4, "WARMUP": 5,
        "GROUP_SIZE": 8}
REAL = {**STEP, "PROMPTS_PER_STEP": 32, "MAX_NEW_TOKENS": 208, "BETA": 0.01}
NATURAL = {**STEP, "PROMPTS_PER_STEP": 12, "MAX_NEW_TOKENS": 300, "BETA": 0.0}
FIXED = {**NATURAL, "MAX_NEW_TOKENS": 128}
MEAN_TOKENS = 83             # mean length of completions that end on their own
WORDS = 256                  # in the prompts, and in the vocabulary of the tiny shape
# width, MLP width, layers, query heads, vocabulary
SHAPES = {"tiny": (sft.TINY_WIDTH, 3 * sft.TINY_WIDTH, sft.TINY_LAYERS, sft.TINY_HEADS, WORDS),
          "0.5B": (896, 4864, 24, 14, 151936),
          "1.5B": (1536, 8960, 28, 12, 151936),
          "3B": (2048, 11008, 36, 16, 151936)}
CUDA = grpo.DEVICE == "cuda"
results = {}


# ---- models and data ------------------------------------------------------------------------------------------------


def random_model(shape: str, mean: float = math.inf, dtype=torch.float32):
    """A Llama of a given shape whose completions end, with id 0, after `mean` tokens on average, or never.

    The first feature is equal and large in all embeddings, so after the last norm it is the square root of the width,
    whatever the tokens. The tied head then gives all words the same logit, and the end token that of its own feature.
    """
    torch.manual_seed(0)
    width, mlp_width, layers, heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=mlp_width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=2, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=4096,
        initializer_range=0.002, tiny=shape == "tiny", bos_token_id=None, eos_token_id=0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        features = model.lm_head.weight[:, 0]
        features.fill_(8 / math.sqrt(width))
        features[0] += -1000 if mean == math.inf else TEMPERATURE * math.log(vocabulary / mean) / math.sqrt(width)
    return model


def random_prompts(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1, WORDS) for _ in range(8)] for _ in range(count)]


def random_policy(folder: str, shape: str, mean: float = math.inf, dtype=torch.float32) -> None:
    """Writes a random model, a tokenizer with the words w0 (the end), w1, ..., and data, in the form grpo.py reads."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w0").save_pretrained(folder)
    random_model(shape, mean, dtype).save_pretrained(folder)
    rows = [{"prompt": " ".join(f"w{i}" for i in ids), "numbers": [number, 1, 1, 1]}
            for number, ids in enumerate(random_prompts(64), 1)]
    write(Path(folder, "train.jsonl"), *rows[1:])
    write(Path(folder, "val.jsonl"), rows[0])


# ---- measuring ------------------------------------------------------------------------------------------------------


def seconds(work, *args) -> float:
    began = time.perf_counter()
    work(*args)
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_above(work, *args, **kwargs) -> float:
    """Peak memory of the work, in GiB above what was in use before."""
    if CUDA:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work(*args, **kwargs)
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")       # resets the peak of the process
    work(*args, **kwargs)
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    return (int(peak) * 2**10 - before) / 2**30


def apart(expression: str) -> float:
    """Evaluates an expression of this module in a separate process. Raises RuntimeError with the reason if it dies."""
    code = f"import bench, trl; bench.prepare(); print(eval({expression!r}, vars(bench)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError((run.stderr.strip() or f"exit {run.returncode}").split("\n")[-1])
    return float(run.stdout.split()[-1])


def alternate(*works, rounds: int, warmup: int = 1) -> list[tuple[float]]:
    """The numbers that each work returns, by round. The works take turns, and warm-up rounds do not count."""
    numbers = []
    for _ in range(warmup + rounds):
        numbers.append([])
        for work in works:
            gc.unfreeze()
            gc.collect()
            gc.freeze()          # objects that outlive one work would slow down the garbage collector in the next
            numbers[-1].append(work())
    return list(zip(*numbers[warmup:]))


def report(name: str, unit: str, ours, others) -> None:
    """Adds the median and range of ours / others over rounds to bench.json, and prints a row of the table."""
    ratios = sorted(a / b for a, b in zip(ours, others, strict=True))
    results[name] = round(statistics.median(ratios), 3)
    results[f"{name}_range"] = [round(ratios[0], 3), round(ratios[-1], 3)]
    print(f"| {name} | {results[name]:.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) | "
          f"{statistics.median(ours):.4g} | {statistics.median(others):.4g} | {unit} |", flush=True)


# ---- whole steps ----------------------------------------------------------------------------------------------------


def our_steps(policy: str, data: str, steps: int, **constants) -> float:
    """Completion tokens per second of grpo.py, over `steps` steps after one to warm up.

    A step lasts from one line of the log to the next, minus the evaluation, which only the last step has.
    """
    with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as nowhere:
        constants |= {"SFT": policy, "DATA": data, "OUT": out, "STEPS": steps + 1, "EVAL_EVERY": 10**6}
        sys.argv = ["grpo.py", *(f"{name}={value}" for name, value in constants.items())]
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            grpo.main()
        log = read(Path(out, "grpo/log.jsonl"))
    total = log[-1]["seconds"] - log[1]["seconds"] - log[-1]["val_seconds"]
    tokens = constants["PROMPTS_PER_STEP"] * constants["GROUP_SIZE"] * sum(line["tokens"] for line in log[2:])
    share = sum(line["rollout_seconds"] for line in log[2:]) / total
    print(f"ours: {total / steps:.2f} s per step, {tokens / steps:,.0f} tokens, rollout {share:.0%}", flush=True)
    return tokens / total


def trl_steps(policy: str, data: str, steps: int, bf16: int, micro_batch: int, **constants) -> float:
    """The same for TRL's GRPOTrainer, by its own clock, which leaves out the few ms of the optimizer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = reward.read_rows("game24", Path(data, "train.jsonl"), "prompt")
    rows = [{"prompt": row["prompt"] + "\n", "numbers": row["numbers"]} for row in rows]      # as in grpo.encode_prompt
    completions = constants["PROMPTS_PER_STEP"] * constants["GROUP_SIZE"]
    with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as nowhere:
        settings = GRPOConfig(
            output_dir=out, use_cpu=not CUDA, bf16=bool(bf16), max_steps=steps + 1, beta=constants["BETA"],
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=completions // micro_batch,
            num_generations=constants["GROUP_SIZE"], max_completion_length=constants["MAX_NEW_TOKENS"],
            temperature=constants["TEMPERATURE"], top_p=constants["TOP_P"], top_k=0, learning_rate=constants["LR"],
            warmup_steps=constants["WARMUP"], gradient_checkpointing=False, logging_steps=1, save_strategy="no",
            report_to=[], disable_tqdm=True)
        trainer = GRPOTrainer(policy, reward.game24, args=settings, train_dataset=Dataset.from_list(rows))
        with contextlib.redirect_stdout(nowhere):
            trainer.train()
    log = trainer.state.log_history[1:-1]          # without the warm-up step and the summary
    total = sum(line["step_time"] for line in log)
    tokens = completions * sum(line["completions/mean_length"] for line in log)
    kind = f"BF16={bf16}, micro-batches of {micro_batch}"
    print(f"TRL: {total / steps:.2f} s per step, {tokens / steps:,.0f} tokens, {kind}", flush=True)
    return tokens / total


def against_trl(policy, data, keys: dict[str, int], trl_bf16, sizes, rounds: int, **constants) -> None:
    """Reports our speed with each key's BF16 against TRL in its fastest combination of precision and micro-batch."""
    def theirs(steps, bf16, size):
        return trl_steps(policy, data, steps, bf16, size, **constants)

    best = max(((bf16, size) for bf16 in trl_bf16 for size in sizes), key=lambda pair: theirs(1, *pair))
    works = [lambda bf16=bf16: our_steps(policy, data, 2, BF16=bf16, **constants) for bf16 in keys.values()]
    *ours, others = alternate(*works, lambda: theirs(2, *best), rounds=rounds)
    for key, speeds in zip(keys, ours):
        report(key, "tokens/s", speeds, others)


def bench_real() -> None:
    if not Path(SFT, "summary.json").is_file() or not Path(DATA, "train.jsonl").is_file():
        print(f"real: skipped, because {SFT} or {DATA} is missing or not finished: run `make train` first")
        return
    train, val = (reward.read_rows("game24", Path(DATA, f"{split}.jsonl"), "prompt") for split in ("train", "val"))
    keys = {"step_real_vs_trl": grpo.BF16, "step_real_fp32_vs_trl": 0}
    with tempfile.TemporaryDirectory() as data:
        prompts = list({row["prompt"]: row for row in train}.values())
        same_every_step = random.Random(0).sample(prompts, REAL["PROMPTS_PER_STEP"])
        write(Path(data, "train.jsonl"), *same_every_step)
        write(Path(data, "val.jsonl"), val[0])
        against_trl(SFT, data, keys, {0, grpo.BF16}, (32, 64, 128), 4, **REAL)


def bench_step() -> None:
    for key, bf16, mean, constants in (("step_natural_fp32_vs_trl", 0, MEAN_TOKENS, NATURAL),
                                       ("step_natural_bf16_vs_trl", 1, MEAN_TOKENS, NATURAL),
                                       ("step_fixed_fp32_vs_trl", 0, math.inf, FIXED)):
        with tempfile.TemporaryDirectory() as policy:
            random_policy(policy, "tiny", mean)
            against_trl(policy, policy, {key: bf16}, [bf16], (24, 48, 96), 5, **constants)


def bench_memory() -> None:
    with tempfile.TemporaryDirectory() as policy:
        random_policy(policy, "tiny", MEAN_TOKENS)
        places = f"{policy!r}, {policy!r}"
        ours = f"peak_above(our_steps, {places}, 2, **NATURAL)"
        theirs = [f"peak_above(trl_steps, {places}, 2, grpo.BF16, {size}, **NATURAL)" for size in (24, 48, 96)]
        leanest = min(theirs, key=apart)
        report("memory_vs_trl", "GiB", *alternate(lambda: apart(ours), lambda: apart(leanest), rounds=3, warmup=0))


# ---- rollout --------------------------------------------------------------------------------------------------------


def our_rollout(model, prompts: list[list[int]], new: int) -> list[list[int]]:
    with torch.autocast(grpo.DEVICE, torch.bfloat16, enabled=bool(grpo.BF16)):
        return grpo.rollout(model, prompts, max_new_tokens=new, temperature=TEMPERATURE, top_p=1.0, eos_ids=[0])


def generate(model, prompts: list[list[int]], new: int) -> list[list[int]]:
    settings = GenerationConfig(max_new_tokens=new, do_sample=True, temperature=TEMPERATURE, top_p=1.0, top_k=0,
                                eos_token_id=0, pad_token_id=0)
    input_ids = torch.tensor(prompts, device=model.device)
    output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=settings)
    return output[:, input_ids.shape[1]:].tolist()


def useful_per_second(rollout, *args) -> float:
    """Tokens per second, counted in each completion up to its first end token."""
    completions = []
    time_taken = seconds(lambda: completions.extend(rollout(*args)))
    return sum(ids.index(0) + 1 if 0 in ids else len(ids) for ids in completions) / time_taken


def bench_rollout() -> None:
    dtype = torch.bfloat16 if grpo.BF16 else torch.float32
    for shape, count, mean, new, rounds in (("tiny", 96, MEAN_TOKENS, 300, 5), ("0.5B", 24, 24, 64, 3)):
        prompts, model = random_prompts(count), random_model(shape, mean).to(grpo.DEVICE)
        other = copy.deepcopy(model).to(dtype)          # `generate` is slower under autocast
        other.set_attn_implementation("sdpa")
        works = [lambda: useful_per_second(our_rollout, model, prompts, new),
                 lambda: useful_per_second(generate, other, prompts, new)]
        report(f"rollout_{shape.lower()}_vs_hf", "tokens/s", *alternate(*works, rounds=rounds))


# ---- update ---------------------------------------------------------------------------------------------------------


def update_case():
    """The 0.5B shape with an adapter, and sequences of 32 prompt tokens and 16 to 128 completion tokens."""
    grpo.HEAD_CHUNK = 128          # a quarter of the default, because the case is small
    lora = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(random_model("0.5B").to(grpo.DEVICE), lora)
    return model, [([7] * (32 + 16 * length), 32) for length in range(1, 9)]


def our_update(model, samples) -> None:
    for rows in grpo.micro_batches([len(ids) for ids, _ in samples], 256):
        input_ids, loss_mask = grpo.collate([samples[row] for row in rows])
        (-grpo.completion_logprobs(model, input_ids, loss_mask, TEMPERATURE)[0].sum()).backward()
    model.zero_grad()


def naive_update(model, samples) -> None:
    """All sequences at once, with the logits of every token."""
    input_ids, loss_mask = grpo.collate(samples)
    with torch.autocast(grpo.DEVICE, torch.bfloat16, enabled=bool(grpo.BF16)):
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float() / TEMPERATURE
    logprobs = torch.log_softmax(logits, -1).gather(-1, input_ids[:, 1:, None])[..., 0]
    (-(logprobs * loss_mask).sum()).backward()
    model.zero_grad()


def bench_update() -> None:
    case = update_case()
    works = [lambda update=update: seconds(update, *case) for update in (our_update, naive_update)]
    report("update_152k_time_vs_naive", "s", *alternate(*works, rounds=3))
    works = [lambda name=name: apart(f"peak_above({name}, *update_case())") for name in ("our_update", "naive_update")]
    report("update_152k_peak_vs_naive", "GiB", *alternate(*works, rounds=2, warmup=0))


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def decode_seconds(policy: str, rows: int, tokens: int) -> float:
    """Seconds per decode step at `tokens` tokens: the difference between two lengths, so the prompts cancel out."""
    model, _ = grpo.load_model(policy)
    prompts = [[5] * tokens for _ in range(rows)]
    short, long = (min(seconds(our_rollout, model, prompts, new) for _ in range(3)) for new in (4, 36))
    return (long - short) / 32


def floor_seconds(shape: str, rows: int, tokens: int) -> float:
    """Lower bound of decode_seconds: NF4 weights and cache are read once, and each row is multiplied by each weight."""
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    memory = torch.zeros(2, 2**28, dtype=torch.uint8, device="cuda")
    flops = 2 * 4096**3 / min(seconds(lambda: matrix @ matrix) for _ in range(30))
    bandwidth = memory.numel() / min(seconds(lambda: memory[0].copy_(memory[1])) for _ in range(30))
    width, mlp_width, layers, heads, vocabulary = SHAPES[shape]
    kv_width = 2 * width // heads
    weights = layers * (2 * width * (width + kv_width) + 3 * width * mlp_width)
    head, cache = width * vocabulary, layers * 2 * rows * tokens * kv_width
    return max(2 * rows * (weights + head) / flops, (0.53 * weights + 2 * (head + cache)) / bandwidth)


def bench_floor() -> None:
    with tempfile.TemporaryDirectory() as policy:
        random_policy(policy, "1.5B", dtype=torch.bfloat16)
        works = [lambda: apart(f"decode_seconds({policy!r}, 96, 512)"), lambda: floor_seconds("1.5B", 96, 512)]
        report("decode_vs_floor", "s", *alternate(*works, rounds=3, warmup=0))


def peak_below(cap: int, policy: str, group: int, new: int) -> float:
    """Peak GiB of two steps of 12 prompts; runs out of memory above `cap` GiB."""
    torch.cuda.set_per_process_memory_fraction(cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    return peak_above(our_steps, policy, policy, 1, PROMPTS_PER_STEP=12, GROUP_SIZE=group, MAX_NEW_TOKENS=new)


def bench_fits() -> None:
    """The largest step that fits a memory cap, as prompts x completions x tokens, by shape and cap in GiB."""
    fits = results["fits"] = {}
    for shape in ("0.5B", "1.5B", "3B"):
        with tempfile.TemporaryDirectory() as policy:
            random_policy(policy, shape, dtype=torch.bfloat16)
            for cap in (8, 12, 24):
                for group, new in ((4, 512), (8, 512), (8, 1024), (16, 1024), (8, 2048), (16, 2048)):
                    try:
                        apart(f"peak_below({cap}, {policy!r}, {group}, {new})")
                        fits[f"{shape} {cap}"] = f"12 x {group} x {new}"
                    except RuntimeError as error:
                        print(f"{shape} in {cap} GiB: 12 x {group} x {new} fails: {error}", flush=True)
    print(fits)


# ---- main -----------------------------------------------------------------------------------------------------------


def prepare() -> None:
    warnings.filterwarnings("ignore")
    set_verbosity_error()
    disable_progress_bar()
    torch.set_num_threads(grpo.THREADS)


def main() -> None:
    prepare()
    parts = {"real": bench_real, "rollout": bench_rollout, "update": bench_update, "step": bench_step,
             "memory": bench_memory}
    if CUDA:
        parts |= {"floor": bench_floor, "fits": bench_fits}
    wanted = []
    for word in sys.argv[1:]:
        name, _, value = word.lstrip("-").partition("=")
        if name.upper() in ("SFT", "DATA"):
            globals()[name.upper()] = value
        elif word in parts:
            wanted.append(word)
        else:
            sys.exit(f"{word} is none of {', '.join(parts)}, --sft=FOLDER, --data=FOLDER")
    for part in wanted or parts:
        parts[part]()
        torch.cuda.empty_cache()
    results["device"] = torch.cuda.get_device_name() if CUDA else f"{platform.machine()}, {grpo.THREADS} CPU cores"
    results["versions"] = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
    results["commit"] = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    (ROOT / "bench.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
