"""The benchmark measures what it says: small, and without a look at any time."""

import bench
import pytest
import torch

import grpo
import reward


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What the benchmark sets in the scripts is put back."""
    for scope in (grpo, reward):
        for name in [name for name in vars(scope) if name.isupper()] + ["score", "load_model", "catch_signals", "fingerprint"]:
            if hasattr(scope, name):
                monkeypatch.setattr(scope, name, getattr(scope, name))
    monkeypatch.setattr("sys.argv", ["bench.py"])
    monkeypatch.setattr(bench, "results", {})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rounds_alternate_and_the_first_does_not_count():
    calls = []
    found = bench.alternate(lambda: calls.append("a") or len(calls), lambda: calls.append("b") or len(calls), rounds=2)
    assert calls == ["a", "b"] * 3 and found == [[3, 5], [4, 6]]
    assert bench.ratios([4, 9, 8], [2, 3, 2], "name") == "3.00 (2.00–4.00)"
    assert bench.results == {"name": 3, "name_range": [2, 4]}


def test_completions_end_as_often_as_they_should():
    prompts = bench.random_prompts(200)
    for mean, least, most in ((10, 7, 13), (float("inf"), 40, 40)):
        made = grpo.rollout(bench.random_model("tiny", mean), prompts, max_new_tokens=40, temperature=bench.TEMPERATURE, top_p=1.0, eos_ids=[0])
        assert least <= sum(map(len, made)) / len(made) <= most
    assert bench.useful([[5, 0, 0, 0], [5, 6, 7]]) == 5


def test_both_sides_do_the_same_work(tmp_path):
    model, tokenizer = bench.random_model("tiny"), bench.word_tokenizer(256)
    ours = bench.our_steps(model, tokenizer, tmp_path / "ours", 6, False, 1)
    theirs = bench.trl_steps(model, tokenizer, tmp_path / "trl", 6, False, 1, 48)
    assert set(ours) == {"rollout", "reward", "update", "tokens_per_s"} and all(value > 0 for value in [*ours.values(), *theirs.values()])
    speeds = [speed(model, bench.random_prompts(4), 5, *rest) for speed, *rest in (
        (bench.our_speed, False), (bench.generate_speed, "dynamic"), (bench.generate_speed, "static"))]
    assert min(speeds) > 0


def test_the_update_is_that_of_the_naive_one(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "0.5B", {**bench.SHAPES["tiny"]})
    monkeypatch.setattr(grpo, "BF16", 0)
    gradients, (model, samples) = [], bench.update_case()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    monkeypatch.setattr(model, "zero_grad", lambda: None)
    for update in (bench.our_update, bench.naive_update):
        update(model, samples)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        for p in model.parameters():
            p.grad = None
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-3, atol=1e-4) for name in gradients[0])


def test_memory_is_what_was_taken():
    assert 0.18 < bench.peak_above(lambda: torch.ones(50 * 2**20).sum()) < 0.35       # 200 MiB
