"""The benchmark measures what it says. The sizes are small, and no time is looked at."""

import itertools

import bench
import pytest
import torch

import grpo


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One thread and small models; what a run sets in grpo.py is put back."""
    for name in [name for name in vars(grpo) if name.isupper()]:
        monkeypatch.setattr(grpo, name, getattr(grpo, name))
    monkeypatch.setattr(grpo, "BF16", 0)
    monkeypatch.setattr("sys.argv", ["bench.py"])
    monkeypatch.setattr(bench, "results", {})
    monkeypatch.setitem(bench.SHAPES, "0.5B", bench.SHAPES["tiny"])
    torch.set_num_threads(1)


def test_ratios_of_rounds_in_turn_useful_tokens_and_memory(monkeypatch):
    turns = itertools.count()
    assert bench.alternate(lambda: next(turns), lambda: next(turns), rounds=2) == [(2, 4), (3, 5)]
    bench.report("name", "s", [4, 9, 8], [2, 3, 2])
    assert bench.results == {"name": 3, "name_range": [2, 4]}
    assert 0.18 < bench.apart("peak_above(torch.ones, 50 * 2**20)") < 0.35       # 200 MiB
    monkeypatch.setattr(bench, "seconds", lambda work: work() or 1.0)
    assert bench.useful_per_second(lambda: [[5, 0, 0, 0], [5, 6, 7]]) == 5          # not those after the end


def test_both_sides_do_the_same_work(tmp_path, capsys):
    bench.random_policy(str(tmp_path), "tiny")
    constants = {**bench.REAL, "PROMPTS_PER_STEP": 2, "MAX_NEW_TOKENS": 6, "THREADS": 1}
    bench.against_trl(str(tmp_path), str(tmp_path), {"step": 0}, [0], [8, 16], 1, **constants)
    assert capsys.readouterr().out.count("96 tokens") == 6 and bench.results["step"] > 0


def test_the_update_is_that_of_the_naive_one(monkeypatch):
    gradients, (model, samples) = [], bench.update_case()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    monkeypatch.setattr(model, "zero_grad", lambda: None)
    for update in (bench.our_update, bench.naive_update):
        update(model, samples)
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        for parameter in model.parameters():
            parameter.grad = None
    assert all(torch.allclose(ours, naive, rtol=1e-3, atol=1e-4) for ours, naive in zip(*gradients, strict=True))
