"""Speed and memory of grpo.py on this device, against transformers and TRL: `make bench`, or `make bench DEVICE=cuda`.

What is compared alternates in one process: ROUNDS rounds, of each the ratio, of these the median and the range. Peaks of memory are those of
processes of their own. All models have random weights. Prints tables for the README and writes bench.json, a flat object of ratios.
"""

import contextlib
import copy
import gc
import json
import math
import os
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
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, TrainerCallback
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402
import reward  # noqa: E402
import sft  # noqa: E402

CUDA = "--device=cuda" in sys.argv
ROUNDS = 5                   # that count, after one to warm up
TEMPERATURE = 0.7
RAGGED = {"mean": 83, "new": 300}            # tokens of completions that end by themselves
FIXED = {"mean": math.inf, "new": 128}       # and of such that do not
LAYERS = {"num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936}
SHAPES = {"tiny": {"tie_word_embeddings": True, "vocab_size": 256, **sft.TINY_SHAPE},
          "0.5B": {**LAYERS, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
          "1.5B": {**LAYERS, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
          "3B": {**LAYERS, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}}
results = {}


# ---- models ---------------------------------------------------------------------------------------------------------


def random_model(shape: str, mean: float = math.inf, **changes):
    """A model of a shape, in fp32, whose completions end, with id 0, after `mean` tokens on average, or never."""
    torch.manual_seed(0)
    config = Qwen2Config(**{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, **SHAPES[shape], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    head = torch.nn.Linear(config.hidden_size, config.vocab_size)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with torch.no_grad():
        head.bias.zero_()
        head.bias[0] = -1e4 if mean == math.inf else TEMPERATURE * math.log(config.vocab_size / mean)
    return model.eval()


def random_prompts(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1, 256) for _ in range(8)] for _ in range(count)]


def word_tokenizer(vocabulary: int):
    """w0, the end, w1, ...: as many words as the model has ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w0", pad_token="w0")


def precision(bf16: bool):
    return torch.autocast("cuda" if CUDA else "cpu", torch.bfloat16, enabled=bf16)


# ---- measuring ------------------------------------------------------------------------------------------------------


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def alternate(*works, rounds: int = ROUNDS) -> list[list[float]]:
    """Numbers of each work, by round; the works take turns, and the first round does not count.

    What stays alive of one would slow down Python's collector in the next: it is taken out of its sight before each.
    """
    found = [[(gc.unfreeze(), gc.collect(), gc.freeze(), work())[-1] for work in works] for _ in range(rounds + 1)][1:]
    return [list(numbers) for numbers in zip(*found)]


def ratios(ours: list[float], others: list[float], name: str = "") -> str:
    """Median and range of ours / others by round, under `name` in bench.json too."""
    found = [a / b for a, b in zip(ours, others, strict=True)]
    if name:
        results[name], results[f"{name}_range"] = round(statistics.median(found), 3), [round(min(found), 3), round(max(found), 3)]
    return f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"


def table(title: str, head: list[str], rows) -> None:
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def peak_above(work) -> float:
    """GiB that the work takes at its peak, above what there was before."""
    if CUDA:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")       # the peak of the process begins anew
    work()
    peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().split("\n") if line.startswith("VmHWM"))
    return (int(peak) * 2**10 - before) / 2**30


def apart(*words) -> dict:
    """What a measurement prints as its last line, in a process of its own; `error` where it died, of memory for one."""
    made = subprocess.run([sys.executable, __file__, *map(str, words), *(["--device=cuda"] if CUDA else [])], capture_output=True, text=True)
    try:
        return json.loads(made.stdout.strip().split("\n")[-1])
    except ValueError:
        return {"error": (made.stderr.strip() or f"exit {made.returncode}").split("\n")[-1][:300]}


# ---- rollout --------------------------------------------------------------------------------------------------------


def useful(completions: list[list[int]]) -> int:
    """Tokens up to the first end."""
    return sum(ids.index(0) + 1 if 0 in ids else len(ids) for ids in completions)


def our_speed(model, prompts, new: int, bf16: bool = True) -> float:
    """Useful tokens a second of our rollout."""
    made = []

    def work():
        with precision(bf16):
            made.extend(grpo.rollout(model, prompts, max_new_tokens=new, temperature=TEMPERATURE, top_p=1.0, eos_ids=[0]))

    return 1 / seconds(work) * useful(made)


def generate_speed(model, prompts, new: int, cache: str = "dynamic") -> float:
    """Useful tokens a second of generate, with a dynamic or a static cache, or of generate_batch, in the precision of the weights."""
    settings = GenerationConfig(max_new_tokens=new, do_sample=True, temperature=TEMPERATURE, top_p=1.0, top_k=0, eos_token_id=0, pad_token_id=0,
                                cache_implementation="static" if cache == "static" else None, disable_compile=not CUDA)
    made = []

    def work():
        with torch.no_grad():
            if cache == "batch":
                made.extend(list(one.generated_tokens) for one in model.generate_batch(prompts, generation_config=settings).values())
            else:
                input_ids = torch.tensor(prompts, device=model.device)
                found = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=settings)
                made.extend(found[:, input_ids.shape[1]:].tolist())

    return 1 / seconds(work) * useful(made)


def models(shape: str, bf16: bool, mean: float = math.inf, **changes) -> tuple:
    """One for us, which autocast runs, and the same for generate, in bf16 itself: its caches do not take what autocast makes."""
    ours = random_model(shape, mean, **changes)
    theirs = copy.deepcopy(ours).to(torch.bfloat16 if bf16 else torch.float32)
    theirs.set_attn_implementation("sdpa")
    return ours, theirs


def bench_rollout() -> None:
    rows, bf16 = [], grpo.bf16_works()

    def compare(name, shape, count, new, caches=("dynamic",), rounds=ROUNDS, bf16=bf16, key="", **changes):
        ours, theirs = models(shape, bf16, **changes)
        prompts = random_prompts(count)
        speeds = alternate(lambda: our_speed(ours, prompts, new, bf16),
                           *(lambda cache=cache: generate_speed(theirs, prompts, new, cache) for cache in caches), rounds=rounds)
        for cache, others in zip(caches, speeds[1:]):
            rows.append([name, cache, *(f"{statistics.median(x):,.0f}" for x in (speeds[0], others)),
                         ratios(speeds[0], others, key if cache == "dynamic" else "")])

    kind, ragged = "bf16" if bf16 else "fp32", {"mean": RAGGED["mean"]}
    compare(f"tiny, 96 ragged, {kind}", "tiny", 96, RAGGED["new"], ("dynamic", "static", "batch"), key="rollout_tiny_vs_hf", **ragged)
    compare("the same, fp32", "tiny", 96, RAGGED["new"], bf16=False, rounds=3, **ragged)
    compare(f"0.5B, 24 ragged (mean 24, longest 64), {kind}", "0.5B", 24, 64, rounds=3, key="rollout_0.5b_vs_hf", mean=24)
    for count in (24, 48, 192):
        compare(f"tiny, {count} ragged", "tiny", count, RAGGED["new"], rounds=1, **ragged)
    for new in (64, 256, 1024):
        compare(f"tiny, 96 of {new} tokens", "tiny", 96, new, rounds=1)
    for vocabulary in (256, 151936):
        compare(f"tiny, 96 of 32 tokens, vocabulary {vocabulary:,}", "tiny", 96, 32, rounds=1, vocab_size=vocabulary)
    table("Rollout: useful tokens a second", ["completions", "cache of `generate`", "ours", "`generate`", "ratio"], rows)


# ---- update ---------------------------------------------------------------------------------------------------------


def update_case():
    """The 0.5B shape with an adapter, and sequences of 32 prompt tokens and completions of 16 to 128."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(random_model("0.5B"), LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model, [([7] * (32 + 16 * length), 32) for length in range(1, 9)]


def our_update(model, samples) -> None:
    for indices in grpo.micro_batches([len(ids) for ids, _ in samples], 256):
        input_ids, loss_mask = grpo.collate([samples[i] for i in indices], "cpu")
        with precision(grpo.bf16_works()):
            logprobs = grpo.completion_logprobs(model, input_ids, loss_mask, TEMPERATURE)[0]
        (-logprobs.sum()).backward()
    model.zero_grad()


def naive_update(model, samples) -> None:
    """All sequences at once, and the logits of every token."""
    input_ids, loss_mask = grpo.collate(samples, "cpu")
    with precision(grpo.bf16_works()):
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float() / TEMPERATURE
    logprobs = torch.log_softmax(logits, -1).gather(-1, input_ids[:, 1:, None])[..., 0]
    (-(logprobs * loss_mask).sum()).backward()
    model.zero_grad()


def bench_update() -> None:
    grpo.HEAD_CHUNK, case = 128, update_case()
    times = alternate(lambda: seconds(lambda: our_update(*case)), lambda: seconds(lambda: naive_update(*case)), rounds=3)
    peaks = [apart("update", which).get("gib") for which in ("ours", "naive")]
    results["update_152k_peak_vs_naive"] = round(peaks[0] / peaks[1], 3)
    table("Update of 8 completions at the 0.5B shape with 152k words, an adapter trains", ["", "ours", "naive", "ratio"],
          [["seconds", *(f"{statistics.median(x):.1f}" for x in times), ratios(*times, "update_152k_time_vs_naive")],
           ["GiB above the model", *(f"{x:.2f}" for x in peaks), results["update_152k_peak_vs_naive"]]])


# ---- whole step -----------------------------------------------------------------------------------------------------


def score(task, text, row, truncated=False) -> dict[str, float]:
    return {"reward": len(text) % 7 / 7, "correct": 0.0, "answered": float(not truncated)}


def our_steps(model, tokenizer, folder: Path, new: int, bf16: bool, steps: int, **constants) -> dict[str, float]:
    """Medians of the seconds of the parts of a step of grpo.py, its whole loop, and the tokens a second of them all; the first step warms up."""
    folder.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=folder))         # this process holds the lock of each run
    rows = [{"prompt": " ".join(f"w{i}" for i in ids), "numbers": [i + 1, 1, 1, 1]} for i, ids in enumerate(random_prompts(64))]
    for name, part in (("train", rows[:-1]), ("val", rows[-1:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    grpo.load_model, grpo.catch_signals, grpo.fingerprint = lambda *_, **__: (model if CUDA else copy.deepcopy(model), tokenizer), list, lambda *_: {}
    reward.score = score
    settings = {"SFT": folder, "DATA": folder, "OUT": folder, "RESUME": 0, "BF16": int(bf16), "STEPS": steps + 1, "EVAL_EVERY": 10**6, "TOP_P": 1.0,
                "PROMPTS_PER_STEP": 12, "GROUP_SIZE": 8, "MAX_NEW_TOKENS": new, "BETA": 0.0, "SAVE_EVERY": 10**6, "OPTIMIZER_8BIT": 0,
                **({} if CUDA else {"MICRO_BATCH_TOKENS": grpo.TINY["MICRO_BATCH_TOKENS"]}), **constants}
    sys.argv = ["grpo.py", *(f"--{name.lower()}={value}" for name, value in settings.items())]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        grpo.main()
    log = [json.loads(line) for line in (folder / "grpo/log.jsonl").read_text().strip().split("\n")][2:]
    parts = {name: statistics.median(line[f"{name}_seconds"] for line in log) for name in ("rollout", "reward", "update")}
    return parts | {"tokens_per_s": statistics.median(96 * line["tokens"] / sum(line[f"{name}_seconds"] for name in parts) for line in log)}


def trl_steps(model, tokenizer, folder: Path, new: int, bf16: bool, steps: int, micro_batch: int) -> dict[str, float]:
    """The same of GRPOTrainer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        times = []

        def on_step_begin(self, *_, **__):
            self.times.append(-time.perf_counter())

        def on_step_end(self, *_, **__):
            self.times[-1] += time.perf_counter()

    Clock.times = []
    rows = [{"prompt": " ".join(f"w{i}" for i in ids)} for ids in random_prompts(63)]
    settings = GRPOConfig(output_dir=str(folder), use_cpu=not CUDA, bf16=bf16, max_steps=steps + 1, per_device_train_batch_size=micro_batch,
                          gradient_accumulation_steps=96 // micro_batch, num_generations=8, max_completion_length=new, temperature=TEMPERATURE,
                          top_p=1.0, top_k=0, beta=0.0, learning_rate=2e-4, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
                          gradient_checkpointing=False)
    trainer = GRPOTrainer(model=copy.deepcopy(model), processing_class=tokenizer, args=settings, train_dataset=Dataset.from_list(rows),
                          reward_funcs=lambda completions, **_: [len(text) % 7 / 7 for text in completions], callbacks=[Clock()])
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer.train()
    tokens = [96 * entry["completions/mean_length"] for entry in trainer.state.log_history if "completions/mean_length" in entry]
    return {"tokens_per_s": statistics.median(n / t for n, t in list(zip(tokens, Clock.times, strict=True))[1:])}


def bench_step() -> None:
    rows, shares, tokenizer = [], [], word_tokenizer(256)
    with tempfile.TemporaryDirectory() as place:
        for kind, shape in (("natural", RAGGED), ("fixed", FIXED)):
            model = random_model("tiny", shape["mean"])
            for bf16 in ((False, True) if grpo.bf16_works() else (False,)):
                one, given = Path(place), (model, tokenizer)
                trials = {n: trl_steps(*given, one / "trl", shape["new"], bf16, 2, n)["tokens_per_s"] for n in (24, 48, 96)}
                best, parts = max(trials, key=trials.get), []

                def ours():
                    parts.append(our_steps(*given, one / "ours", shape["new"], bf16, 2))
                    return parts[-1]["tokens_per_s"]

                print(f"{kind} bf16={bf16} TRL by micro-batch: {trials}", file=sys.stderr, flush=True)
                speeds = alternate(ours, lambda: trl_steps(*given, one / "trl", shape["new"], bf16, 2, best)["tokens_per_s"])
                name = f"step_{kind}_{'bf16' if bf16 else 'fp32'}_vs_trl"
                rows.append([f"{kind} lengths, {'bf16' if bf16 else 'fp32'} (TRL in micro-batches of {best})",
                             *(f"{statistics.median(x):,.0f}" for x in speeds), ratios(*speeds, name)])
                medians = [statistics.median(part[name] for part in parts[1:]) for name in ("rollout", "reward", "update")]
                shares.append([rows[-1][0].split(" (")[0], *(f"{x / sum(medians):.0%}" for x in medians)])
    table("Whole step, tiny, 12 x 8 completions: tokens a second", ["", "ours", "TRL", "ratio"], rows)
    table("Where our step spends its time", ["", "rollout", "reward", "update"], shares)


def bench_step_memory() -> None:
    peaks = {which: apart("step", which).get("gib") for which in ("ours", 24, 48, 96)}
    best = min(value for which, value in peaks.items() if which != "ours")
    results["memory_vs_trl"] = round(peaks["ours"] / best, 3)
    table("Peak of a step of natural lengths above the model, GiB", ["ours", "TRL 24", "TRL 48", "TRL 96", "ours / best of TRL"],
          [[*(f"{value:.3f}" for value in peaks.values()), results["memory_vs_trl"]]])


# ---- the floor ------------------------------------------------------------------------------------------------------


def rates() -> tuple[float, float]:
    """FLOP/s of a matrix product in the fast precision, and bytes a second of a copy."""
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.bfloat16 if grpo.bf16_works() else torch.float32)
    a, b = torch.randn(2048, 2048, device=device, dtype=dtype), torch.zeros(2, 2**28, dtype=torch.uint8, device=device)
    product = min(seconds(lambda: a @ a) for _ in range(30))
    copied = min(seconds(lambda: b[0].copy_(b[1])) for _ in range(10))
    return 2 * 2048**3 / product, b.numel() / copied


def floor(shape: str, rows: int, tokens: int, bytes_per_weight: float) -> float:
    """Least seconds of a decode step: weights and cache are read once, and each row is multiplied by each weight."""
    config, (flops, bandwidth) = SHAPES[shape], rates()
    width, kv = config["hidden_size"], config["num_key_value_heads"] * config["hidden_size"] // config["num_attention_heads"]
    weights = config["num_hidden_layers"] * (2 * width * (width + kv) + 3 * width * config["intermediate_size"])
    head, cache = width * config["vocab_size"], 2 * 2 * rows * tokens * kv * config["num_hidden_layers"]
    return max(2 * rows * (weights + head) / flops, (weights * bytes_per_weight + 2 * head + cache) / bandwidth)


def decode_seconds(model, rows: int, tokens: int) -> float:
    """Seconds of a decode step at `tokens` tokens: the difference of two lengths, so that the prefill does not count."""
    prompts, found = [[5] * tokens for _ in range(rows)], []
    for new in (4, 36):
        found.append(min(seconds(lambda: grpo.rollout(model, prompts, max_new_tokens=new, temperature=TEMPERATURE, top_p=1.0, eos_ids=[0]))
                         for _ in range(3)))
    return (found[1] - found[0]) / 32


def bench_floor() -> None:
    rows = []
    for shape, count, tokens in [("tiny", 96, 128), ("0.5B", 24, 32)] if not CUDA else [(s, 96, 512) for s in ("0.5B", "1.5B", "3B")]:
        if CUDA:
            found = apart("decode", shape, count, tokens)
            time_of_step, least = found.get("seconds", math.nan), floor(shape, count, tokens, 0.53)       # NF4 with its scales
        else:
            model = random_model(shape)
            with precision(grpo.bf16_works()):
                time_of_step, least = decode_seconds(model, count, tokens), floor(shape, count, tokens, 2 if grpo.bf16_works() else 4)
        rows.append([f"{shape}, {count} rows, {tokens} tokens", f"{1000 * time_of_step:.1f}", f"{1000 * least:.1f}", f"{time_of_step / least:.1f}"])
        if CUDA and shape == "1.5B":
            results["decode_vs_floor"] = round(time_of_step / least, 2)
    table("A decode step against its floor, ms", ["", "ours", "floor", "ratio"], rows)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def quantised(shape: str, folder: Path):
    """A policy of random weights of the true shape, as grpo.py loads it: NF4 with an adapter."""
    random_model(shape).to(torch.bfloat16).save_pretrained(folder)
    word_tokenizer(1000).save_pretrained(folder)
    return grpo.load_model(str(folder), trainable=True)


def bench_fits() -> None:
    """The largest group x length of a step of 12 prompts that trains below a cap of memory."""
    rows, fits = [], {}
    for shape in ("0.5B", "1.5B", "3B"):
        for cap in (8, 12, 24):
            good = [f"12 x {group} x {new}" for group, new in ((4, 512), (8, 512), (8, 1024), (16, 1024), (8, 2048), (16, 2048))
                    if "gib" in apart("fit", shape, cap, group, new)]
            rows.append([shape, f"{cap} GiB", good[-1] if good else "none"])
            fits[f"{shape} {cap}"] = rows[-1][-1]
    results["fits"] = fits
    table(f"What trains on {torch.cuda.get_device_name()} below a cap: prompts x completions x tokens", ["NF4 + LoRA", "cap", "largest"], rows)


# ---- processes of their own, and main -------------------------------------------------------------------------------


def worker(what: str, *words: str) -> dict:
    with tempfile.TemporaryDirectory() as place:
        if what == "update":
            model, samples = update_case()
            grpo.HEAD_CHUNK = 128
            return {"gib": peak_above(lambda: (our_update if words[0] == "ours" else naive_update)(model, samples))}
        if what == "step":
            import trl  # noqa: F401   (before the peak is measured, for both alike)
            if words[0] == "ours":
                os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")      # as grpo.load_model does, which our_steps replaces
            given = random_model("tiny", RAGGED["mean"]), word_tokenizer(256), Path(place), RAGGED["new"], grpo.bf16_works(), 2
            return {"gib": peak_above(lambda: our_steps(*given) if words[0] == "ours" else trl_steps(*given, int(words[0])))}
        if what == "decode":
            model, _ = quantised(words[0], Path(place, "model"))
            with precision(True):
                return {"seconds": decode_seconds(model, int(words[1]), int(words[2]))}
        shape, cap, group, new = words[0], *map(int, words[1:])
        torch.cuda.set_per_process_memory_fraction(cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)
        return {"gib": peak_above(lambda: our_steps(*quantised(shape, Path(place, "model")), Path(place), new, True, 1, GROUP_SIZE=group))}


def main() -> None:
    warnings.filterwarnings("ignore")
    set_verbosity_error()
    disable_progress_bar()
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    if not {word for word in sys.argv if word.startswith("--")} <= {"--device=cpu", "--device=cuda"}:
        sys.exit(f"DEVICE is cpu or cuda, not as in {' '.join(sys.argv[1:])}")
    if CUDA and not torch.cuda.is_available():
        sys.exit("DEVICE=cuda: there is no CUDA device")
    torch.set_num_threads(os.cpu_count())
    if words and words[0] in ("update", "step", "decode", "fit"):
        return print(json.dumps(worker(*words)))
    for part in (bench_floor, bench_fits) if CUDA else (bench_rollout, bench_update, bench_step, bench_step_memory, bench_floor):
        if not words or part.__name__ in words:
            part()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    results.update(device=grpo.device_name(), commit=commit, versions={name: version(name) for name in ("torch", "transformers", "peft", "trl")})
    (ROOT / "bench.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
