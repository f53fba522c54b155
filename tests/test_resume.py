"""Runs that are cut off go on and end as if nothing had happened: bit for bit on a CPU, in fp32 and in NF4 with LoRA and 8-bit AdamW.

The faults are real ones: SIGKILL at chosen calls, signals, files that are changed on the disk, a limit on the size of files.
"""

import hashlib
import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import TIME_LIMIT, Commands, done, load, read, refused
from safetensors.torch import load_file, save_file

import grpo
import sft

TIMES = {"seconds", "rollout_seconds", "reward_seconds", "update_seconds", "val_seconds", "peak_gib",
         "tokens_per_s", "rollout_tokens_per_s", "update_tokens_per_s"}
DATA = {"LOWEST": 3, "HIGHEST": 5, "VAL_HANDS": 3, "TEST_HANDS": 3, "TRACES_PER_HAND": 4, "MAX_TRACE_TOKENS": 80}
SFT = {"batch_tokens": 512, "eval_rows": 3, "max_new_tokens": 20, "eval_every": 3, "log_every": 100, "save_every": 2, "steps": 12}
GRPO = {"prompts_per_step": 3, "group_size": 8, "max_new_tokens": 60, "temperature": 1.2, "steps": 8, "eval_every": 2, "patience": 100,
        "samples_every": 2, "lr": 0.002, "warmup": 1}


def wrap(target, body):
    """Source that makes `body` run before each call of a function, with the count of calls in n and the arguments in args."""
    return f"""
import os, pkgutil, resource, signal
def wrap():
    module, name = pkgutil.resolve_name({target.rpartition(".")[0]!r}), {target.rpartition(".")[2]!r}
    real, calls = getattr(module, name), []
    def wrapped(*args, **kwargs):
        calls.append(1)
        n = len(calls)
        {body}
        return real(*args, **kwargs)
    setattr(module, name, wrapped)
wrap()
"""


def die(target, call):
    return wrap(target, f"if n == {call}: os.kill(os.getpid(), signal.SIGKILL)")


@pytest.fixture(scope="module")
def base(run, tmp_path_factory):
    """Data, a tiny policy that has some rewards, and its adapter in NF4."""
    root = tmp_path_factory.mktemp("base")
    done(run("data_prep", out=root, **DATA))
    done(run("sft", out=root, model="tiny", **{**SFT, "steps": 150, "eval_every": 150, "lr": 0.003, "muon_lr": 0.003}))
    done(run("sft", out=root / "lora", data=root / "data", model=root / "sft", lora_rank=4, **{**SFT, "steps": 2}))
    return root


CASES = [("sft", "fp32"), ("sft", "lora"), ("grpo", "fp32"), ("grpo", "lora")]


def options(base, script, weights):
    start = base / "sft" if weights == "fp32" else base / "lora/sft"
    if script == "grpo":
        return {"data": base / "data", "sft": start, **GRPO}
    return {"data": base / "data", "model": "tiny" if weights == "fp32" else base / "sft", **SFT} | ({} if weights == "fp32" else {"lora_rank": 4})


@pytest.fixture(scope="module")
def undisturbed(run, base, tmp_path_factory):
    """Folder of each case's run that nothing disturbed."""
    made = {}

    def get(script, weights):
        if (script, weights) not in made:
            made[script, weights] = tmp_path_factory.mktemp(f"{script}-{weights}") / script
            done(run(script, out=made[script, weights].parent, **options(base, script, weights)))
        return made[script, weights]
    return get


def same(a, b, where=""):
    """Whether two values are equal: tensors bit for bit, dicts without what tells the time."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - TIMES:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}[{i}]")
    else:
        assert type(a) is type(b) and a == b, f"{where}: {a} and {b}"


def same_runs(a, b, every=True):
    """Holds that two finished runs are equal: weights, optimizer, random numbers, order of data, logs, samples and summary.

    With every=False only the last checkpoint is compared: a run that a signal stopped has others before it.
    """
    steps = sft.checkpoint_steps(a) if every else sft.checkpoint_steps(a)[-1:]
    assert steps and steps == sft.checkpoint_steps(b)[-len(steps):]
    if every:
        assert sorted(path.name for path in a.iterdir() if "damaged" not in path.name) == sorted(path.name for path in b.iterdir())
    for folder in (Path("."), *(Path(f"step-{step}") for step in steps)):
        assert not sft.damage(a / folder) and not sft.damage(b / folder)
        for file in [path.relative_to(a) for path in (a / folder).iterdir() if path.is_file()]:
            if file.suffix == ".safetensors":
                same(load_file(a / file), load_file(b / file), str(file))
            elif file.suffix == ".pt":
                same(*(torch.load(root / file, weights_only=True) for root in (a, b)), str(file))
            elif file.suffix == ".jsonl":
                same(read(a / file), read(b / file), str(file))
    same(load(a / "summary.json"), load(b / "summary.json"))


def start_and_wait(run, folder, script, lines, before="", **constants):
    """Starts a run and waits until its log has so many lines; returns its process id."""
    process, began, log = run.start(script, out=folder, before=before, **constants), time.time(), folder / script / "log.jsonl"
    while not (log.is_file() and log.read_bytes().count(b"\n") >= lines):
        assert time.time() < began + TIME_LIMIT, run.output.read_text(encoding="utf-8")
        time.sleep(0.01)
    return process


SLOW = {"sft": wrap("torch.Tensor.backward", "__import__('time').sleep(0.2)"), "grpo": wrap("reward.score", "__import__('time').sleep(0.02)")}
# Every stage of a checkpoint: before its files, within them, before and after its state and its manifest, its name, the copy of the best, the pruning
STAGES = [("shutil.rmtree", 3), ("torch.save", 2), ("os.fsync", 3), ("os.fsync", 12), ("os.rename", 1), ("os.rename", 2), ("shutil.copytree", 1),
          ("os.replace", 4), ("os.replace", 9), ("shutil.rmtree", 8), ("shutil.copy", 4), ("torch.Tensor.backward", 7)]


@pytest.mark.parametrize("script, weights", CASES)
def test_killed_at_every_stage_ends_bit_for_bit_as_undisturbed(run, base, undisturbed, tmp_path, script, weights):
    killed = 0
    for target, call in STAGES:
        if not (tmp_path / script / "summary.json").exists():
            run.start(script, out=tmp_path, before=die(target, call), **options(base, script, weights))
            result = run.wait()
            assert result.code in (-signal.SIGKILL, 0), result.output
            killed += result.code != 0
    assert killed >= 8
    done(run(script, out=tmp_path, **options(base, script, weights)))
    same_runs(tmp_path / script, undisturbed(script, weights))


@pytest.mark.parametrize("script, weights", CASES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_saves_and_the_run_goes_on(run, base, undisturbed, tmp_path, script, weights, number):
    settings = options(base, script, weights) | {"save_every": 1000}
    process = start_and_wait(run, tmp_path, script, 2, before=SLOW[script], **settings)
    os.kill(process, number)
    os.kill(process, number)            # as a terminal and make may both send it
    result = run.wait()
    assert result.code == 128 + number and "stops after this step" in result.output and "Traceback" not in result.output
    last = read(tmp_path / script / "log.jsonl")[-1]["step"]
    assert max(sft.checkpoint_steps(tmp_path / script)) == last < settings["steps"]
    if number == signal.SIGTERM:
        assert f"goes on after step {last}" in done(run(script, out=tmp_path, **settings))
        same(load_file(next((tmp_path / script).glob("*.safetensors"))), load_file(next(undisturbed(script, weights).glob("*.safetensors"))))
        same(read(tmp_path / script / "log.jsonl"), read(undisturbed(script, weights) / "log.jsonl"))


def test_second_signal_quits_at_once(run, base, tmp_path):
    process = start_and_wait(run, tmp_path, "grpo", 1, before=wrap("reward.score", "__import__('time').sleep(0.3)"), **options(base, "grpo", "fp32"))
    time.sleep(0.5)             # step 0 ends
    os.kill(process, signal.SIGINT)
    time.sleep(1.2)
    sent = time.time()
    os.kill(process, signal.SIGINT)
    assert run.wait().code == 130 and time.time() - sent < 1.5


def test_nohup_stays_ignored(run, base, tmp_path):
    before = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SLOW["grpo"]
    process = start_and_wait(run, tmp_path, "grpo", 1, before=before, **options(base, "grpo", "fp32") | {"steps": 2})
    os.kill(process, signal.SIGHUP)
    assert run.wait().code == 0 and load(tmp_path / "grpo/summary.json")["steps"] == 2


def test_second_run_on_a_folder_is_refused(run, base, tmp_path):
    settings = options(base, "grpo", "fp32")
    other = Commands(tmp_path)
    done(other("grpo", "--help"))           # its imports take longer than the run
    process = start_and_wait(run, tmp_path, "grpo", 2, before=SLOW["grpo"], **settings)
    for resume in (0, 1):
        output = refused(other("grpo", out=tmp_path, resume=resume, **settings))
        assert f"{tmp_path}/grpo: another process works in it" in output and "OUT=" in output
    other.server.stdin.close()
    os.kill(process, signal.SIGKILL)
    run.wait()
    assert read(tmp_path / "grpo/log.jsonl")            # which RESUME=0 would have deleted
    done(run("grpo", out=tmp_path, **settings))


# Checkpoints that are damaged


@pytest.fixture(scope="module")
def stopped(run, base, tmp_path_factory):
    """A run of GRPO that was killed after step 6; its best is older than the last two checkpoints."""
    root = tmp_path_factory.mktemp("stopped")
    start_and_wait(run, root, "grpo", 1, before=die("torch.save", 8), **options(base, "grpo", "fp32"))
    assert run.wait().code == -signal.SIGKILL
    return root


@pytest.fixture
def cut(stopped, tmp_path):
    """A copy of that run, as if it had been made here."""
    return shutil.copytree(stopped, tmp_path / "cut")


def flip(path):
    """Changes one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a bit of the weights": lambda folder: flip(folder / "model.safetensors"), "a bit of the state": lambda folder: flip(folder / "state.pt"),
    "a bit of the log": lambda folder: flip(folder / "log.jsonl"), "no state": lambda folder: (folder / "state.pt").unlink(),
    "half a file": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "an empty file": lambda folder: os.truncate(folder / "config.json", 0),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(), "no json": lambda folder: flip(folder / "manifest.json"),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text("{}"),
    "a list": lambda folder: (folder / "manifest.json").write_text('{"files": [1]}')}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(run, base, undisturbed, cut, how):
    assert sft.checkpoint_steps(cut / "grpo")[-2:] == [5, 6]
    DAMAGE[how](cut / "grpo/step-6")
    output = done(run("grpo", out=cut, **options(base, "grpo", "fp32")))
    assert f"{cut}/grpo/step-6 is damaged and not used: " in output and "goes on after step 5" in output and (cut / "grpo/damaged-6").is_dir()
    same_runs(cut / "grpo", undisturbed("grpo", "fp32"))


def test_a_run_without_a_whole_checkpoint_is_refused_and_left_as_it_is(run, base, cut):
    steps = sft.checkpoint_steps(cut / "grpo")
    for step in steps:
        flip(cut / f"grpo/step-{step}/model.safetensors")
    before = {path: path.read_bytes() for path in (cut / "grpo").rglob("*") if path.is_file()}
    output = refused(run("grpo", out=cut, **options(base, "grpo", "fp32")))
    assert "no checkpoint that is whole" in output and "RESUME=0" in output and output.count("is damaged and not used") == len(steps)
    for step in steps:
        shutil.rmtree(cut / f"grpo/step-{step}")
    assert "no checkpoint that is whole" in refused(run("grpo", out=cut, **options(base, "grpo", "fp32")))
    assert all(path.read_bytes() == data for path, data in before.items() if path.parent == cut / "grpo")
    done(run("grpo", out=cut, resume=0, **options(base, "grpo", "fp32") | {"steps": 1}))


@pytest.mark.parametrize("where", ["checkpoint", "run", "both"])
def test_best_policy_outlives_damage_of_one_copy(run, base, undisturbed, cut, where):
    best = torch.load(cut / "grpo/step-6/state.pt", weights_only=True)["run"]["bests"][-1]
    assert best < 5 and (cut / f"grpo/step-{best}").is_dir()
    for folder in {"checkpoint": [f"step-{best}"], "run": [""], "both": [f"step-{best}", ""]}[where]:
        flip(cut / "grpo" / folder / "model.safetensors")
    result = run("grpo", out=cut, **options(base, "grpo", "fp32"))
    if where == "both":
        assert f"the best policy, of step {best}, is damaged" in refused(result)
    else:
        done(result)
        same(load_file(cut / "grpo/model.safetensors"), load_file(undisturbed("grpo", "fp32") / "model.safetensors"))


def test_best_of_the_checkpoint_before_outlives_a_new_best(run, base, undisturbed, tmp_path):
    """Step 9 is a new best and is damaged: step 8, which is used, had another one."""
    settings = options(base, "sft", "fp32")
    run.start("sft", out=tmp_path, before=die("torch.save", 8), **settings)
    assert run.wait().code == -signal.SIGKILL
    assert torch.load(tmp_path / "sft/step-9/state.pt", weights_only=True)["run"]["bests"] == [3, 6, 9]
    assert sft.checkpoint_steps(tmp_path / "sft") == [6, 8, 9]
    flip(tmp_path / "sft/step-9/state.pt")
    assert "goes on after step 8" in done(run("sft", out=tmp_path, **settings))
    same_runs(tmp_path / "sft", undisturbed("sft", "fp32"))


class Touch:
    """What runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickle_in_a_checkpoint_is_not_run(run, base, cut):
    path, marker, manifest = cut / "grpo/step-6/state.pt", cut / "was-run", cut / "grpo/step-6/manifest.json"
    state = torch.load(path, weights_only=True)
    state["optimizers"][0]["state"][0]["exp_avg"] = Touch(marker)
    torch.save(state, path)
    pickle.loads(pickle.dumps(Touch(cut / "works")))
    files = load(manifest)["files"] | {"state.pt": [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]}
    manifest.write_text(json.dumps({"step": 6, "files": files}), encoding="utf-8")
    assert "state.pt is refused" in refused(run("grpo", out=cut, **options(base, "grpo", "fp32")))
    assert (cut / "works").exists() and not marker.exists()


@pytest.mark.parametrize("change, named", [
    ({"lr": 0.003}, "LR was 0.002 and is 0.003"), ({"seed": 1}, "SEED was 0 and is 1"), ("train.jsonl", "train.jsonl was"),
    ("model.safetensors", "SFT/model.safetensors was")])
def test_other_constants_data_or_base_are_refused_with_the_difference(run, base, cut, change, named):
    settings = options(base, "grpo", "fp32")
    if change == "train.jsonl":
        settings["data"] = shutil.copytree(base / "data", cut / "data")
        (cut / "data/train.jsonl").write_bytes(b"\n" + (cut / "data/train.jsonl").read_bytes())
    elif change == "model.safetensors":
        settings["sft"] = shutil.copytree(base / "sft", cut / "sft")
        flip(cut / "sft/model.safetensors")
        (cut / "sft/manifest.json").unlink()
    else:
        settings |= change
    before = sorted(path for path in (cut / "grpo").rglob("*"))
    output = refused(run("grpo", out=cut, **settings))
    assert "an unfinished run of something else" in output and named in output and "OUT=" in output and "RESUME=0" in output
    assert before == sorted(path for path in (cut / "grpo").rglob("*"))


def test_what_changes_no_result_may_change(run, base, undisturbed, cut):
    done(run("grpo", out=cut, micro_batch_tokens=100000, save_every=3, keep_last=1, **options(base, "grpo", "fp32")))
    ended = torch.load(cut / "grpo/step-8/state.pt", weights_only=True)["run"]
    assert sft.checkpoint_steps(cut / "grpo") == sorted({ended["bests"][-1], 8})
    assert len(read(cut / "grpo/log.jsonl")) == 9 == len(read(undisturbed("grpo", "fp32") / "log.jsonl"))


def test_logs_that_are_gone_come_back(run, base, undisturbed, cut):
    for path in (cut / "grpo").glob("*.jsonl"):
        path.unlink()
    assert "goes on after step 6" in done(run("grpo", out=cut, **options(base, "grpo", "fp32")))
    same_runs(cut / "grpo", undisturbed("grpo", "fp32"))


def test_a_finished_policy_that_is_damaged_comes_back(run, base, undisturbed, tmp_path):
    folder, settings = shutil.copytree(undisturbed("grpo", "fp32"), tmp_path / "grpo"), options(base, "grpo", "fp32")
    flip(folder / "model.safetensors")
    output = refused(run("eval", out=tmp_path, data=base / "data", policies=f"mine={folder}"))
    assert f"the policy {folder} is damaged" in output and "summary.json" in output and not (tmp_path / "eval").exists()
    (folder / "summary.json").unlink()
    done(run("grpo", out=tmp_path, **settings))
    same_runs(folder, undisturbed("grpo", "fp32"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"constants": {}}', "null"])
def test_damaged_header_of_a_run_is_named(run, base, cut, content):
    (cut / "grpo/run.json").write_text(content, encoding="utf-8")
    output = refused(run("grpo", out=cut, **options(base, "grpo", "fp32")))
    assert f"{cut}/grpo/run.json is damaged" in output and "RESUME=0" in output


def test_killed_while_a_folder_is_begun(run, base, tmp_path):
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo/run.json.tmp").write_text("{", encoding="utf-8")
    for stage in (("os.replace", 1), ("os.rename", 1), ("shutil.copy", 1), ("shutil.rmtree", 2)):
        run.start("grpo", out=tmp_path, before=die(*stage), **options(base, "grpo", "fp32") | {"steps": 1, "resume": 0})
        assert run.wait().code == -signal.SIGKILL
    done(run("grpo", out=tmp_path, **options(base, "grpo", "fp32") | {"steps": 1}))
    assert not (tmp_path / ".grpo.replaced").exists() and not list((tmp_path / "grpo").glob("*.tmp"))


def test_a_changed_base_of_an_adapter_is_refused(run, base, tmp_path):
    other = shutil.copytree(base / "sft", tmp_path / "base")
    settings = options(base, "sft", "lora") | {"model": other}
    done(run("sft", out=tmp_path, **settings))
    flip(other / "model.safetensors")
    (other / "manifest.json").unlink()
    assert "MODEL/model.safetensors was" in refused(run("sft", out=tmp_path, **settings))
    assert "SFT/base/model.safetensors" in sft.fingerprint("SFT", str(tmp_path / "sft"))


# Faults in a step


NAN = wrap("torch.nn.utils.clip_grad_norm_", "if n in {}: args[0][0].grad.view(-1)[0] = float({!r})")


@pytest.mark.parametrize("script", ["sft", "grpo"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_update_that_is_not_finite_is_skipped_and_counted(run, base, undisturbed, tmp_path, script, value):
    settings = options(base, script, "fp32") | {"keep_last": 100, "save_every": 1}
    run.start(script, out=tmp_path, before=NAN.format([2, 3, 5], value), **settings)
    done(run.wait())
    log = {entry["step"]: entry for entry in read(tmp_path / script / "log.jsonl")}
    assert [log[step]["skipped"] for step in range(1, 7)] == [0, 1, 2, 2, 3, 3] and load(tmp_path / script / "summary.json")["skipped"] == 3
    weights = [load_file(tmp_path / script / f"step-{step}/model.safetensors") for step in range(7)]
    same(weights[1], weights[3])
    for step in (1, 4, 6):
        assert any(not torch.equal(weights[step][name], weights[step - 1][name]) for name in weights[0])
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / script / f"step-{settings['steps']}/model.safetensors").values())


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_three_in_a_row_save_and_stop(run, base, tmp_path, script):
    settings = options(base, script, "fp32")
    run.start(script, out=tmp_path, before=NAN.format([3, 4, 5], "nan"), **settings)
    output = refused(run.wait())
    assert "3 updates in a row were skipped" in output and "gradient norm nan" in output
    assert max(sft.checkpoint_steps(tmp_path / script)) == 5 and not sft.damage(tmp_path / script / "step-5")
    done(run(script, out=tmp_path, **settings))            # the fault is gone: the run goes on
    assert load(tmp_path / script / "summary.json")["skipped"] == 3


def test_spikes_are_counted_and_skipped_where_asked(monkeypatch):
    run = SimpleNamespace(norms=[], nonfinite=0, spikes=0, skipped=0)
    assert all(grpo.may_step(1 + 0.01 * (step % 3), 0.0, run) for step in range(30)) and (run.spikes, run.skipped) == (0, 0)
    assert grpo.may_step(5.0, 0.0, run) and (run.spikes, run.skipped) == (1, 0)
    monkeypatch.setattr(grpo, "SKIP_SPIKES", 1)
    assert not grpo.may_step(50.0, 0.0, run) and (run.spikes, run.skipped) == (2, 1)
    assert not grpo.may_step(float("inf"), 0.0, run) and not grpo.may_step(1.0, float("nan"), run)
    assert (run.spikes, run.skipped, run.nonfinite, len(run.norms)) == (2, 3, 2, 32)
    assert grpo.may_step(1.0, 0.0, run) and run.nonfinite == 0
    few = SimpleNamespace(norms=[1.0] * 19, nonfinite=0, spikes=0, skipped=0)
    assert grpo.may_step(100.0, 0.0, few) and few.spikes == 0      # too few to know what is usual


FAIL = """
import reward
real, calls = reward.score, []
def score(*args, **kwargs):
    calls.append(1)
    if len(calls) > 20 and len(calls) % {every} == 0:
        {what}
    return real(*args, **kwargs)
reward.score = score
"""


@pytest.mark.parametrize("what", ["raise KeyError('mine')", "return None", "return {'reward': float('nan'), 'correct': 0.0, 'answered': 0.0}",
                                  "return {'reward': 1.0}", "return 0.5",
                                  "return {'reward': 1.0, 'correct': float('nan'), 'answered': 1.0}",
                                  "return {'reward': 1.0, 'correct': 1.0, 'answered': 1.0, 'note': 'text'}"])
def test_reward_that_fails_is_left_out_and_counted_and_above_a_share_stops(run, base, tmp_path, what):
    settings = options(base, "grpo", "fp32") | {"steps": 2}
    run.start("grpo", out=tmp_path / "few", before=FAIL.format(every=13, what=what), **settings)
    output = done(run.wait())
    log = read(tmp_path / "few/grpo/log.jsonl")
    assert "no reward for" in output and "Make 24 from" in output and all(0 < entry["no_reward"] < 0.1 for entry in log[1:])
    assert all(entry["reward"] == entry["reward"] and entry["grad_norm"] > 0 for entry in log[1:])
    run.start("grpo", out=tmp_path / "many", before=FAIL.format(every=2, what=what), **settings)
    assert "MAX_NO_REWARD=0.1" in refused(run.wait())


def test_group_without_a_reward_and_group_with_one():
    nan = float("nan")
    rewards = torch.tensor([[nan, nan, nan], [nan, 0.5, nan], [0.0, 1.0, nan]], dtype=torch.float64)
    for advantages in (grpo.baseline_advantages(rewards, "group"), grpo.momentum_advantages(rewards, 0.3, 0.2, 0.1)[0]):
        assert advantages.isfinite().all() and not advantages[0].any() and advantages[2, 0] < 0 < advantages[2, 1] and not advantages[2, 2]
    assert all(value == value for value in grpo.momentum_advantages(rewards, 0.3, 0.2, 0.1)[1:])


@pytest.mark.parametrize("script, name, value", [("grpo", "group_size", 1), ("grpo", "keep_last", 0), ("grpo", "save_every", 0),
                                                 ("sft", "save_every", 0), ("sft", "eval_every", -1), ("grpo", "patience", 0), ("grpo", "top_p", 1.5),
                                                 ("grpo", "max_new_tokens", 0), ("grpo", "rollout_rows", 0), ("sft", "head_chunk", 0),
                                                 ("grpo", "top_p", "nan"), ("grpo", "beta", -1), ("grpo", "momentum_max", 5),
                                                 ("grpo", "grad_clip", 0), ("grpo", "threads", -1), ("sft", "lr", -1), ("sft", "seed", -1)])
def test_constants_that_cannot_work_are_refused_at_once(run, base, tmp_path, script, name, value):
    output = refused(run(script, out=tmp_path, **options(base, script, "fp32") | {name: value}))
    assert name.upper() in output and str(value) in output and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, fault", [("grpo", {"max_prompt_tokens": 1}), ("grpo", {"sft": "tests/no-such-folder"}), ("sft", {"max_tokens": 1}),
                                           ("sft", {"model": "tests/no-such-folder"})])
def test_a_run_that_cannot_begin_does_not_replace_the_old_one(run, base, undisturbed, tmp_path, script, fault):
    shutil.copytree(undisturbed(script, "fp32"), tmp_path / script)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / script).rglob("*")}
    refused(run(script, out=tmp_path, resume=0, **options(base, script, "fp32") | fault))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / script).rglob("*")} == before
    assert not (tmp_path / f".{script}.replaced").exists()


def test_a_mistyped_folder_is_no_name_of_a_hub(run, base, tmp_path):
    output = refused(run("grpo", out=tmp_path, **options(base, "grpo", "fp32") | {"sft": base / "sfd"}))
    assert f"SFT={base}/sfd: there is no such folder" in output


def test_all_completions_cut_off(run, base, tmp_path):
    output = done(run("grpo", out=tmp_path, **options(base, "grpo", "fp32") | {"max_new_tokens": 2, "steps": 2}))
    log = read(tmp_path / "grpo/log.jsonl")
    assert "100% of the completions are cut off at MAX_NEW_TOKENS=2" in output and log[1]["truncated"] == 1
    assert all(value == value for entry in log for value in entry.values())


@pytest.mark.parametrize("script, size", [("sft", 1_000_000), ("sft", 3_200_000), ("grpo", 1_000_000), ("grpo", 5_000_000)])
def test_full_disk_leaves_the_checkpoints_and_no_litter(run, base, undisturbed, tmp_path, script, size):
    """After a few checkpoints no file can grow beyond so many bytes, which stops the weights, or the larger state."""
    limit = f"n == 12 and resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))"
    limit = wrap("shutil.rmtree", limit)
    settings = options(base, script, "fp32")
    run.start(script, out=tmp_path, before=limit, **settings)
    output = refused(run.wait())
    steps = sft.checkpoint_steps(tmp_path / script)
    assert "could not be written" in output and "Make room" in output and steps
    assert not (tmp_path / script / "saving").exists() and not any(sft.damage(tmp_path / script / f"step-{step}") for step in steps)
    done(run(script, out=tmp_path, **settings))
    same_runs(tmp_path / script, undisturbed(script, "fp32"))


# Policies and models that are not whole


@pytest.mark.parametrize("fault, message", [
    ("bit", "the policy {} is damaged"), ("no adapter", "the policy {} is damaged"), ("no adapter, no manifest", "has no adapter_model.safetensors"),
    ("pickled adapter", "has no adapter_model.safetensors"), ("half an adapter", "the adapter {} is not whole"),
    ("no config", "cannot load the model")])
def test_broken_adapter_never_stands_for_the_policy(run, base, tmp_path, fault, message):
    folder = shutil.copytree(base / "lora/sft", tmp_path / "policy", ignore=shutil.ignore_patterns("step-*", "tensorboard"))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    if fault == "bit":
        flip(weights)
    elif fault == "half an adapter":
        save_file(dict(list(tensors.items())[::2]), weights)
    elif fault == "no config":
        (folder / "adapter_config.json").unlink()
    else:
        weights.unlink()
    if fault == "pickled adapter":
        torch.save(tensors, folder / "adapter_model.bin")
    if fault not in ("bit", "no adapter"):
        (folder / "manifest.json").unlink()
    for script, start in (("eval", {"policies": f"policy={folder}"}), ("grpo", {"sft": folder})):
        output = refused(run(script, out=tmp_path, data=base / "data", max_new_tokens=5, **start))
        assert message.format(folder) in output, output


@pytest.mark.parametrize("fault, message", [
    ("half the weights", "lack "), ("half a file", "cannot load the model"), ("pickle", "cannot load the model"), ("code", "cannot load the model")])
def test_model_that_is_not_whole_or_brings_code_is_refused(run, base, tmp_path, fault, message):
    folder = shutil.copytree(base / "sft", tmp_path / "model", ignore=shutil.ignore_patterns("step-*", "tensorboard", "manifest.json"))
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if fault == "half the weights":
        save_file(dict(list(tensors.items())[:-5]), weights, metadata={"format": "pt"})
    elif fault == "half a file":
        os.truncate(weights, 1000)
    elif fault == "pickle":
        weights.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        (folder / "own.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nclass Config: pass\nclass Model: pass\n", encoding="utf-8")
        config = load(folder / "config.json") | {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for script, start in (("eval", {"policies": f"policy={folder}"}), ("grpo", {"sft": folder}), ("sft", {"model": folder})):
        output = refused(run(script, out=tmp_path, data=base / "data", max_new_tokens=5, load_4bit=0, lora_rank=0, **start))
        assert message in output, output
    assert not (tmp_path / "was-run").exists()


# Evaluation


def test_killed_evaluation_loses_no_finished_completion(run, base, undisturbed, tmp_path):
    settings = {"policies": f"sft={base / 'sft'},grpo={undisturbed('grpo', 'fp32')}", "data": base / "data", "samples": 5, "bootstrap": 50,
                "max_new_tokens": 60, "eval_batch_tokens": 200}
    done(run("eval", out=tmp_path / "whole", **settings))
    for call in (4, 3, 5):
        run.start("eval", out=tmp_path / "cut", before=die("os.replace", call), **settings)
        assert run.wait().code == -signal.SIGKILL
        kept = {path.name: read(path) for path in (tmp_path / "cut/eval").glob("*.jsonl")}
        assert kept
    done(run("eval", out=tmp_path / "cut", **settings))
    for name in ("sft", "grpo"):
        whole = read(tmp_path / f"whole/eval/{name}.jsonl")
        assert len(whole) == 3 * (1 + 5) and read(tmp_path / f"cut/eval/{name}.jsonl") == whole
        rows = kept.get(f"{name}.jsonl", [])
        assert whole[:len(rows)] == rows
    same(load(tmp_path / "cut/eval/metrics.json"), load(tmp_path / "whole/eval/metrics.json"))
    done(run("eval", out=tmp_path / "other", **settings | {"eval_batch_tokens": 100000}))
    for name in ("sft", "grpo"):            # each completion has its own random numbers, and fp32 the same values in any batch
        assert read(tmp_path / f"other/eval/{name}.jsonl") == read(tmp_path / f"whole/eval/{name}.jsonl")


def test_damaged_completions_are_made_again(run, base, tmp_path):
    settings = {"policies": f"sft={base / 'sft'}", "data": base / "data", "samples": 3, "bootstrap": 50, "max_new_tokens": 60,
                "eval_batch_tokens": 200}
    done(run("eval", out=tmp_path, **settings))
    path, whole = tmp_path / "eval/sft.jsonl", (tmp_path / "eval/sft.jsonl").read_text(encoding="utf-8")
    metrics, lines = load(tmp_path / "eval/metrics.json"), whole.splitlines(keepends=True)
    for content in (whole[:300], whole + whole, lines[3] + whole, "".join(lines[:5]) + "{}\n", "", "[]\n",
                    json.dumps({"prompt": json.loads(lines[0])["prompt"]}) + "\n" + whole):
        path.write_text(content, encoding="utf-8")
        (tmp_path / "eval/summary.json").unlink()
        done(run("eval", out=tmp_path, **settings))
        assert path.read_text(encoding="utf-8") == whole
        same(load(tmp_path / "eval/metrics.json"), metrics)


@pytest.mark.parametrize("what", ["raise KeyError('mine')", "return None", "return {'reward': 1.0, 'correct': float('nan'), 'answered': 1.0}"])
def test_reward_that_fails_in_sft_is_left_out_and_stops_an_evaluation(run, base, tmp_path, what):
    fail = FAIL.format(every=2, what=what).replace("> 20", "> 0")
    run.start("sft", out=tmp_path, before=fail, **options(base, "sft", "fp32") | {"steps": 3})
    output = done(run.wait())
    assert "no reward for 1 of 3 completions" in output and "val_accuracy" in read(tmp_path / "sft/log.jsonl")[-1]
    run.start("eval", out=tmp_path, before=fail, data=base / "data", policies=f"sft={base / 'sft'}", max_new_tokens=5)
    output = refused(run.wait())
    assert "no reward for a completion of sft" in output and "RESUME=0" in output and not (tmp_path / "eval/metrics.json").exists()


@pytest.mark.parametrize("policies", ["a=x,a=y", "x/step-0,y/step-0", "=x", "a/b=x"])
def test_policies_need_names_of_their_own(run, base, tmp_path, policies):
    assert "each needs a name of its own" in refused(run("eval", out=tmp_path, data=base / "data", policies=policies))


def test_adapter_is_found_from_another_working_directory(run, base, tmp_path):
    settings = options(base, "sft", "lora") | {"steps": 1, "model": os.path.relpath(base / "sft")}
    done(run("sft", out=tmp_path, **settings))
    assert load(tmp_path / "sft/adapter_config.json")["base_model_name_or_path"] == str(base / "sft")
