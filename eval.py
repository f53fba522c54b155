"""Evaluates policies on hands that no training has seen, and draws the figures of a run.

    python eval.py                                                   # SFT against GRPO on the test split
    python eval.py --policies=base=Qwen/Qwen2.5-1.5B-Instruct        # any folder or hub model
    python eval.py --hands=hands.txt                                 # hands of one's own, one a line: 4 5 6 10
    python eval.py --ask="3 3 8 8"                                   # the reasoning before and after GRPO

Writes metrics.json, a jsonl of completions for each policy, three figures and report.md. Intervals are 95 % bootstrap intervals over
hands, because the samples of one hand are not independent.
"""

import argparse
import difflib
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy
import torch
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
HANDS = ""                   # file of hands, one a line, instead of the split
RESUME = 1                   # 0: start anew where a finished run of other constants is
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


def is_tiny(given: dict) -> bool:
    """Whether the TINY constants hold: the first policy, or the run, began as MODEL=tiny."""
    root = given.get("OUT", OUT) or f"runs/{given.get('TASK', TASK)}"
    first = (given.get("POLICIES", POLICIES) or "sft=").split(",")[0].split("=", 1)[-1] or given.get("SFT", SFT) or f"{root}/sft"
    run = Path(first, "run.json")
    constants = json.loads(run.read_text(encoding="utf-8"))["constants"] if run.is_file() else {}
    return constants.get("MODEL") == "tiny" or ("MODEL" not in constants and Path(root, "sft/run.json").is_file()
                                                and '"MODEL": "tiny"' in Path(root, "sft/run.json").read_text(encoding="utf-8"))


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
    allowed = (mass - top < top_p).sum(-1, keepdim=True)
    total = mass.gather(1, allowed - 1)
    choice = torch.searchsorted(mass, uniform[:, None] * total, right=True).minimum(allowed - 1)
    return tokens.gather(1, choice).flatten(), total.flatten()


@torch.no_grad()
def rollout(model, prompt_ids: list[list[int]], *, max_new_tokens: int, temperature: float, top_p: float, eos_ids: list[int],
            generator: torch.Generator | None = None, stats: dict | None = None) -> list[list[int]]:
    """One completion a prompt, as token ids without padding; an EOS that was reached is the last id. Temperature 0 is greedy.

    Prompts are padded on the left, so that every row writes the same slot of the cache; finished rows leave the batch. The random
    numbers belong to the prompts, not to the rows, so the dropping of rows changes no completion. The model's mode and parameters
    are left as they were. `stats`, where given, receives nucleus_mass: the mean probability of what top_p allows.
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
            uniform = torch.rand(count, generator=generator, device=generator.device if generator else device).to(device)
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


def policies() -> dict[str, str]:
    """Names and places of the policies. Exits where a folder of the run is missing."""
    root = OUT or f"runs/{TASK}"
    if POLICIES:
        pairs = [pair.partition("=")[::2] if "=" in pair else (Path(pair).name, pair) for pair in POLICIES.split(",")]
        return dict(pairs)
    found = {"sft": SFT or f"{root}/sft", "grpo": f"{root}/grpo"}
    for name, place in found.items():
        if (name == "grpo" or not SFT) and not Path(place, "tokenizer_config.json").is_file():
            sys.exit(f"{place} holds no policy: run `make {name}`, or set POLICIES=name=folder")
    return found


def hand_of(row: dict) -> tuple:
    """What must not be in both training and test: the hand in any order, else the prompt."""
    return tuple(sorted(row["numbers"])) if TASK == "game24" else (row["prompt"],)


def test_rows(data: Path) -> list[dict]:
    """Rows to evaluate. Exits where one of them is in the training data."""
    if HANDS:
        if not Path(HANDS).is_file():
            sys.exit(f"HANDS={HANDS}: there is no such file")
        rows = []
        for number, line in enumerate(Path(HANDS).read_text(encoding="utf-8-sig").split("\n"), 1):
            if line.strip():
                words = line.replace(",", " ").split()
                row = {"id": f"hand-{number}", "numbers": [int(word) if word.isdigit() else word for word in words]}
                try:
                    rows.append({**row, "prompt": reward.prompt(TASK, row)})
                except ValueError as error:
                    sys.exit(f"{HANDS}:{number}: {error}")
    else:
        rows = read_rows(data / f"{SPLIT}.jsonl", ("prompt",))
    if not rows:
        sys.exit(f"{HANDS or data} holds no row to evaluate")
    if (data / "train.jsonl").is_file():
        seen = {hand_of(row) for row in read_rows(data / "train.jsonl", ("prompt",))}
        shared = [hand_of(row) for row in rows if hand_of(row) in seen]
        if shared:
            sys.exit(f"{len(shared)} of {len(rows)} test rows are in {data / 'train.jsonl'}, the first is {shared[0]}: such a result says "
                     "nothing. Make data that holds them out (make data HOLDOUT=file)")
    return rows


def complete(model, tokenizer, rows: list[dict], temperature: float, samples: int, name: str) -> list[dict]:
    """Completions of every row with their scores, in the order of the rows, in batches of EVAL_BATCH_TOKENS."""
    eos_ids = end_ids(model, tokenizer)
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows for _ in range(samples)]
    batch = max(1, EVAL_BATCH_TOKENS // (max(map(len, prompts)) + MAX_NEW_TOKENS))
    generator, made = torch.Generator().manual_seed(SEED), []
    for start in tqdm(range(0, len(prompts), batch), desc=name, unit="batch", dynamic_ncols=True):
        with autocast():
            part = rollout(model, prompts[start:start + batch], max_new_tokens=MAX_NEW_TOKENS, temperature=temperature, top_p=TOP_P,
                           eos_ids=eos_ids, generator=generator)
        for index, ids in enumerate(part, start):
            row, text = rows[index // samples], tokenizer.decode(ids, skip_special_tokens=True)
            scores = reward.score(TASK, text, row, truncated=ids[-1] not in eos_ids)
            made.append({"id": row.get("id"), "prompt": row["prompt"], "completion": text, "tokens": len(ids), **scores})
    return made


def summarise(sampled: list[dict], greedy: list[dict], samples: int) -> dict:
    """Rates, lengths and 95 % intervals of one policy; n completions over n / samples hands."""
    right = numpy.array([c.get("correct", 0.0) for c in sampled]).reshape(-1, samples)
    answered = numpy.array([c.get("answered", 1.0) for c in sampled])
    tokens = numpy.array([c["tokens"] for c in sampled])
    draws = numpy.random.default_rng(SEED).integers(0, len(right), (BOOTSTRAP, len(right)))

    def interval(values):
        return [float(x) for x in numpy.percentile(values[draws].mean(1), [2.5, 97.5])]

    greedy_right = numpy.array([c.get("correct", 0.0) for c in greedy])
    return {"accuracy": float(right.mean()), "accuracy_ci": interval(right.mean(1)), "unfinished": float(1 - answered.mean()),
            "unfinished_ci": interval(1 - answered.reshape(-1, samples).mean(1)), "wrong": float(answered.mean() - right.mean()),
            "mean_tokens": float(tokens.mean()), "mean_tokens_ci": interval(tokens.reshape(-1, samples).mean(1)),
            "median_tokens": float(numpy.median(tokens)), "process": float(numpy.mean([c.get("process", 0.0) for c in sampled])),
            "reward": float(numpy.mean([c["reward"] for c in sampled])), "lines": float(numpy.mean([c.get("lines", 0.0) for c in sampled])),
            f"pass@{samples}": float(right.max(1).mean()), "greedy_accuracy": float(greedy_right.mean()),
            "greedy_accuracy_ci": interval(greedy_right), "greedy_unfinished": float(1 - numpy.mean([c.get("answered", 1.0) for c in greedy])),
            "n": int(right.size), "hands": len(right)}


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.is_file() else []


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
    """Markdown table of the policies."""
    heads = ["", "accuracy (95 %)", "unfinished", "wrong", "mean tokens", "median", "steps right", "greedy accuracy (95 %)", "pass@k"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, m in metrics.items():
        (low, high), (greedy_low, greedy_high) = m["accuracy_ci"], m["greedy_accuracy_ci"]
        pass_at = next(f"{value:.3f} (k={key[5:]})" for key, value in m.items() if key.startswith("pass@"))
        lines.append(f"| {name} | {m['accuracy']:.3f} ({low:.3f}–{high:.3f}) | {m['unfinished']:.3f} | {m['wrong']:.3f} | {m['mean_tokens']:.1f} | "
                     f"{m['median_tokens']:.0f} | {m['process']:.3f} | {m['greedy_accuracy']:.3f} ({greedy_low:.3f}–{greedy_high:.3f}) | {pass_at} |")
    first = next(iter(metrics.values()))
    return "\n".join(lines) + f"\n\n{first['n']} completions over {first['hands']} rows for each policy, T {TEMPERATURE}, top-p {TOP_P}"


def ask(question: str) -> None:
    """Streams the reasoning of every policy on one hand, and says whether the answer is right."""
    from transformers import GenerationConfig, TextStreamer

    row = {"numbers": [int(word) if word.isdigit() else word for word in question.replace(",", " ").split()]}
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
    save_policy(model, tokenizer, folder)
    print(f"{folder}: reload it with AutoModelForCausalLM.from_pretrained({str(folder)!r})")


def main() -> None:
    constants = override_constants(sys.argv[1:], is_tiny)
    root = Path(OUT or f"runs/{TASK}")
    folder, data, log = root / "eval", Path(DATA or root / "data"), read_log(root / "grpo/log.jsonl")
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
        sampled = {name: rows[len(rows) // (SAMPLES + 1):] for name, rows in made.items()}         # the greedy completions come first
        return print(*(folder / name for name in draw(folder, log, sampled)), sep="\n")
    places, rows = policies(), test_rows(data)
    weights = [file for place in places.values() for file in sorted(Path(place).glob("*.safetensors"))]
    start_run(folder, constants, [*weights, *([Path(HANDS)] if HANDS else [data / f"{SPLIT}.jsonl"])], device_name())
    metrics, sampled = {}, {}
    for name, place in places.items():
        began = time.time()
        model, tokenizer = load_model(place, trainable=False)
        greedy = complete(model, tokenizer, rows, 0.0, 1, f"{name} greedy")
        sampled[name] = complete(model, tokenizer, rows, TEMPERATURE, SAMPLES, f"{name} sampled")
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(completion, ensure_ascii=False) + "\n" for completion in greedy + sampled[name])
        metrics[name] = {**summarise(sampled[name], greedy, SAMPLES), "seconds": time.time() - began}
        del model
    figures = draw(folder, log, sampled)
    example = rows[0]["prompt"]
    samples = "\n\n".join(f"**{name}**, {example}\n\n```\n{made[0]['completion']}\n```" for name, made in sampled.items())
    images = "\n".join(f"![{name[:-4]}]({name})" for name in figures)
    (folder / "report.md").write_text(f"# {TASK}\n\n{table(metrics)}\n\n{images}\n\n{samples}\n", encoding="utf-8")
    aside = folder / "metrics.json.tmp"
    aside.write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    os.replace(aside, folder / "metrics.json")
    print(table(metrics))
    finish_run(folder, {f"{name}_accuracy": m["accuracy"] for name, m in metrics.items()} | {"report": str(folder / "report.md")})


if __name__ == "__main__":
    main()
