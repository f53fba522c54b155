"""Checks grpo.py on a GPU and prints a table to report: `make gpu-check`, half an hour. Checks nothing without a GPU.

The model is models/smollm2 (`make smollm2`); for speed and memory, a random one of the 1.5B shape.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench
import torch
from commands import read

ROOT = bench.ROOT
SMALL = {"MODEL": ROOT / "models/smollm2", "HIGHEST": 6, "VAL_HANDS": 10, "TEST_HANDS": 10, "TRACES_PER_HAND": 16,
         "EXTRA_HANDS": 0, "SFT_STEPS": 40, "STEPS": 3, "MAX_NEW_TOKENS": 256, "EVAL_EVERY": 3}
PEAKS = {512: 4.6, 2048: 5.4}          # HEAD_CHUNK: GiB of a step of the 1.5B, counted from the shapes


def run(script: str, **constants) -> list[str]:
    words = [f"{name}={value}" for name, value in constants.items()]
    return [sys.executable, str(ROOT / script), *words]


def checked(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.strip().split("\n")[-1]
    return done.stdout


def platform_of_the_gpu() -> str:
    driver = checked(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]).strip()
    checked([sys.executable, "-m", "bitsandbytes"])
    return f"{driver}, sm_{''.join(map(str, torch.cuda.get_device_capability()))}, CUDA {torch.version.cuda}"


def tests_on_cuda() -> str:
    return checked([sys.executable, "-m", "pytest", "-n", "0", "-k", "cuda", "tests/test_grpo.py"]).split("\n")[-2]


def precision(policy: str) -> str:
    model, _ = bench.grpo.load_model(policy)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, "adapters are not in fp32"
    layer = next(module for module in model.modules() if hasattr(module, "compute_dtype"))
    assert not any(hasattr(module, "_hf_hook") for module in model.modules()), "accelerate has added hooks"
    return f"adapters in fp32, products in {layer.compute_dtype}, no hooks"


def replay_is_eager(policy: str) -> str:
    model, _ = bench.grpo.load_model(policy)
    worst = 0.0
    for rows in (96, 48, 16, 1):
        for tokens in (64, 1000):
            capture, logprobs = bench.grpo.capture_graph, []
            for replacement in (capture, lambda model, cache: None):
                bench.grpo.capture_graph = replacement
                logprobs.append([])
                with torch.autocast("cuda", torch.bfloat16):
                    bench.grpo.rollout(model, [[5] * tokens] * rows, max_new_tokens=8, temperature=0, top_p=1.0,
                                       eos_ids=[0], logprobs=logprobs[-1])
            bench.grpo.capture_graph = capture
            a, b = (torch.tensor(values) for values in logprobs)
            worst = max(worst, (a - b).abs().max().item())
    assert worst < 1e-3, f"log-probs differ by {worst}"
    return f"log-probs differ by at most {worst:.1e}, for 96 to 1 rows and 64 and 1,000 tokens"


def profile_of_a_replay(policy: str) -> str:
    model, _ = bench.grpo.load_model(policy)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        bench.our_rollout(model, [[5] * 500] * 96, 34)
    events = profile.key_averages()
    kernels = sum(event.count for event in events) / 34
    flash = any("flash" in event.key.lower() or "fmha" in event.key.lower() for event in events)
    slowest = max(events, key=lambda event: event.self_device_time_total)
    return f"{kernels:.0f} kernels a step, flash attention {'yes' if flash else 'NO'}, most time in {slowest.key[:40]}"


def decode(policy: str) -> str:
    capture, milliseconds = bench.grpo.capture_graph, []
    for name, replacement in (("graph", capture), ("eager", lambda model, cache: None)):
        bench.grpo.capture_graph = replacement
        for four_bit in (1, 0):
            bench.grpo.LOAD_4BIT = four_bit
            times = [1000 * bench.decode_seconds(policy, rows, 512) for rows in (96, 48, 16)]
            milliseconds.append(f"{name} {'NF4' if four_bit else 'bf16'} " + " ".join(f"{x:.1f}" for x in times))
    bench.grpo.capture_graph, bench.grpo.LOAD_4BIT = capture, 1
    return "ms for 96, 48, 16 rows at 512 tokens: " + "; ".join(milliseconds)


def memory_of_a_step(policy: str) -> str:
    step = f"peak_above(our_steps, {policy!r}, {policy!r}, 1, PROMPTS_PER_STEP=12, GROUP_SIZE=8, MAX_NEW_TOKENS=1024"
    peaks = {chunk: bench.apart(f"{step}, HEAD_CHUNK={chunk})") for chunk in PEAKS}
    text = ", ".join(f"HEAD_CHUNK={chunk}: {peak:.1f} GiB (counted {PEAKS[chunk]})" for chunk, peak in peaks.items())
    assert all(abs(peak / PEAKS[chunk] - 1) < 0.15 for chunk, peak in peaks.items()), text
    return text


def below_a_cap(policy: str) -> str:
    peak = bench.apart(f"peak_below(5, {policy!r}, 8, 1024)")
    return f"a step of 12 x 8 x 1,024 tokens of the 1.5B model finishes below 5 GiB, peak {peak:.1f}"


def train(out: str) -> str:
    for script in ("data_prep.py", "sft.py", "grpo.py"):
        checked(run(script, OUT=out, **SMALL))
    step = read(Path(out, "grpo/log.jsonl"))[1]
    text = f"sampler_error {step['sampler_error']:.4f}, ratio_error {step['ratio_error']:.1e}, KL {step['kl']:.1e}"
    assert step["sampler_error"] < 0.03 and step["ratio_error"] < 1e-4 and step["kl"] == 0, text
    return text


def killed(out: str) -> str:
    command = run("grpo.py", OUT=f"{out}/killed", SFT=f"{out}/sft", DATA=f"{out}/data", **SMALL)
    process, log = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL), Path(out, "killed/grpo/log.jsonl")
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > 1):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "resuming" in checked(command)
    return f"{len(log.read_text().splitlines())} lines in the log after a kill in step 2"


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("gpu-check: torch finds no GPU, so nothing is checked")
    bench.prepare()
    for name, value in {"TINY": False, "LOAD_4BIT": 1, "LORA_RANK": 32, "GRADIENT_CHECKPOINTING": 1}.items():
        setattr(bench.grpo, name, value)
    with tempfile.TemporaryDirectory() as folder:
        policy, out = os.path.join(folder, "policy"), os.path.join(folder, "run")
        os.mkdir(policy)
        bench.random_policy(policy, "1.5B", dtype=torch.bfloat16)
        checks = [(platform_of_the_gpu,), (tests_on_cuda,), (precision, policy), (replay_is_eager, policy),
                  (profile_of_a_replay, policy), (decode, policy), (memory_of_a_step, policy), (below_a_cap, policy),
                  (train, out), (killed, out)]
        print(f"| check | {torch.cuda.get_device_name()} |\n|---|---|")
        for check, *words in checks:
            try:
                result = check(*words)
            except Exception as error:      # the table must have every row
                result = f"FAILED: {type(error).__name__}: {str(error)[:300]}"
            print(f"| {check.__name__.replace('_', ' ')} | {result} |", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
