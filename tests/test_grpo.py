"""The GRPO script against independent answers: greedy `generate` of transformers, exact nucleus probabilities, a loss
written as loops, the loss of TRL, advantages by hand, and log-probs from full logits.

All models are small and random, in fp32 on one thread. Their weights are drawn from a wide distribution, so that greedy
completions do not all end in a loop of one token and logits are further apart than rounding errors.
"""

import copy
import json
import math
import random
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config, Qwen3Config

import grpo
import reward
import sft

FAMILIES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
VOCABULARY = 60
CLIP = {"clip_low": 0.2, "clip_high": 0.3}         # unequal, so that a swap of the two is noticed
AGGREGATES = ["sequence", "token", "constant"]
NAN = math.nan


@pytest.fixture(autouse=True)
def cpu_with_one_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for script in (sft, grpo):
        set_constants(monkeypatch, script, DEVICE="cpu", BF16=0)
    yield
    torch.set_num_threads(threads)


def set_constants(monkeypatch, script, **constants):
    for name, value in constants.items():
        monkeypatch.setattr(script, name, value)


def small_model(family="qwen2", vocabulary=VOCABULARY, **options):
    torch.manual_seed(0)
    config = FAMILIES[family](
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, **options)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def random_ids(lengths, seed=0, vocabulary=VOCABULARY):
    generator = random.Random(seed)
    return [[generator.randrange(vocabulary) for _ in range(length)] for length in lengths]


def cut_at_eos(ids, eos_ids):
    ends = [place for place, token in enumerate(ids) if token in eos_ids]
    return ids[:ends[0] + 1] if ends else ids


def roll(model, prompts, new=30, temperature=0.0, top_p=1.0, eos_ids=(0,), uniform=None, logprobs=None):
    generator = torch.Generator().manual_seed(0) if uniform is None else uniform
    return grpo.rollout(model, prompts, max_new_tokens=new, temperature=temperature, top_p=top_p, eos_ids=list(eos_ids),
                        generator=generator, logprobs=logprobs)


def full_logprobs(model, samples, temperature):
    """Log-probs and entropies of the completion tokens from full logits, sequence by sequence, so without padding."""
    logprobs, entropies = [], []
    for ids, prompt_length in samples:
        distribution = torch.log_softmax(model(torch.tensor([ids])).logits[0] / temperature, -1)[prompt_length - 1:-1]
        logprobs.append(distribution.gather(1, torch.tensor(ids[prompt_length:])[:, None])[:, 0])
        entropies.append(torch.distributions.Categorical(logits=distribution).entropy())
    return logprobs, entropies


def assert_close(actual, expected, tolerance=1e-6):
    actual, expected = (torch.as_tensor(values, dtype=torch.float64) for values in (actual, expected))
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# ---- rollout --------------------------------------------------------------------------------------------------------


def generate_greedy(model, prompts, new, eos_ids):
    """Greedy completions of transformers, which pads finished rows: each is cut at its first EOS."""
    width = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=eos_ids, pad_token_id=0)
    completions = model.generate(input_ids, attention_mask=attention_mask, generation_config=settings)
    return [cut_at_eos(ids, eos_ids or []) for ids in completions[:, width:].tolist()]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rollout_is_that_of_transformers(family):
    model, prompts, new = small_model(family), random_ids([5, 1, 11, 3, 7, 2, 9, 4, 6, 8]), 24
    longest = generate_greedy(model, prompts, new, None)
    eos_ids = [longest[0][0], longest[1][18]]
    expected = generate_greedy(model, prompts, new, eos_ids)
    assert len({len(ids) for ids in expected}) >= 5 and {ids[-1] for ids in expected} > set(eos_ids)
    assert roll(model, prompts, new, eos_ids=eos_ids) == expected
    assert roll(model, prompts[::-1], new, eos_ids=eos_ids) == expected[::-1]
    assert [roll(model, [ids], new, eos_ids=eos_ids)[0] for ids in prompts] == expected
    with torch.autocast("cpu", torch.bfloat16):          # greedy up to rounding
        completions = roll(model, prompts, new, eos_ids=eos_ids)
    for prompt, ids in zip(prompts, completions):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].detach()
        assert (logits.amax(-1) - logits[range(len(ids)), ids]).max() < 0.3 < logits.std()


def test_the_longest_completion_has_no_eos_appended():
    model, prompts, never = small_model(), random_ids([4, 2]), VOCABULARY - 1
    longest = roll(model, prompts, 12, eos_ids=[never])
    for new in (1, 5, 12):
        assert roll(model, prompts, new, eos_ids=[never]) == [ids[:new] for ids in longest]
    last = longest[0].index(longest[0][5])       # an EOS that is the last token allowed is kept
    assert roll(model, prompts[:1], last + 1, eos_ids=[longest[0][5]]) == [longest[0][:last + 1]]


@pytest.mark.parametrize("training", [True, False])
def test_rollout_leaves_the_model_as_it_was(training):
    # dropout and gradient checkpointing act in training mode only, and would spoil the rollout
    model, prompts = small_model(attention_dropout=0.5), random_ids([4, 2, 7])
    expected = roll(model, prompts)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def assert_unchanged():
        assert {module.training for module in model.modules()} == {training}
        assert model.config._attn_implementation == "eager"
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    assert roll(model, prompts) == expected
    assert_unchanged()
    with pytest.raises(IndexError):
        roll(model, [[VOCABULARY]])
    assert_unchanged()


def test_a_sliding_window_is_refused():
    model = small_model("qwen2", use_sliding_window=True, sliding_window=14, max_window_layers=0)
    with pytest.raises(ValueError, match="14 tokens at a time, not 15"):
        roll(model, random_ids([3, 6]), 9)


@pytest.mark.parametrize("family, vocabulary, temperature, top_p", [
    ("qwen2", 60, 0.0, 1.0), ("qwen3", 60, 0.9, 0.9), ("llama", 1500, 3.0, 0.9), ("qwen2", 1500, 1.0, 1.0)])
def test_dropping_rows_changes_no_completion(monkeypatch, family, vocabulary, temperature, top_p):
    # in fp64, because tokens that are nearly equally likely change places with the rounding of fp32
    model, new, never = small_model(family, vocabulary).double(), 70, 0
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(vocabulary, dtype=torch.float64))
    model.lm_head.bias.data[never] = -1e4
    prompts, uniform = random_ids([3, 8, 1, 5, 2, 2, 6, 4, 9, 1], vocabulary=vocabulary), torch.rand(10, new)
    whole_logprobs, eos_ids = [], range(7, vocabulary, 20)
    whole = roll(model, prompts, new, temperature, top_p, [never], uniform, whole_logprobs)
    expected = [cut_at_eos(ids, eos_ids) for ids in whole]
    assert {len(ids) for ids in whole} == {new} and len({len(ids) for ids in expected}) > 3
    for check, shrink, window in ((1000, 0.9, 1000), (1, 0.99, 1), (8, 0.9, 16), (16, 0.75, 32)):
        set_constants(monkeypatch, grpo, DECODE_CHECK=check, DECODE_SHRINK=shrink, DECODE_WINDOW=window)
        for rows in (slice(0, 10), slice(6, 10)):        # the uniform numbers belong to the prompts
            logprobs = []
            actual = roll(model, prompts[rows], new, temperature, top_p, eos_ids, uniform[rows], logprobs)
            assert actual == expected[rows]
            kept = [row[:len(ids)] for row, ids in zip(whole_logprobs, expected)]
            assert_close(sum(logprobs, []), sum(kept[rows], []))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("load_4bit", [0, 1])
def test_replay_of_cuda_graphs_is_the_eager_step(monkeypatch, policy_folders, load_4bit):
    model, tokenizer = load(monkeypatch, policy_folders["llama"], DEVICE="cuda", LOAD_4BIT=load_4bit)
    prompts, uniform = random_ids([3, 8, 1, 5] * 6, vocabulary=len(tokenizer)), torch.rand(24, 300)
    capture, shapes, results = grpo.capture_graph, [], []

    def capture_and_note(model, cache):
        capture(model, cache)
        shapes.append(cache.graph_shape)

    for replacement in (capture_and_note, lambda model, cache: None):
        monkeypatch.setattr(grpo, "capture_graph", replacement)
        results.append((roll(model, prompts, 300, 1.0, 0.9, [0, 1], uniform, logprobs := []), logprobs))
    assert len(shapes) > 2 and "none" not in shapes, "a capture failed"
    assert results[0][0] == results[1][0]
    assert_close(sum(results[0][1], []), sum(results[1][1], []), 1e-4)


def nucleus(logits, temperature, top_p):
    """Exact probabilities of nucleus sampling, by loops in double precision."""
    weights, probabilities = torch.softmax(logits.double() / temperature, -1), torch.zeros(len(logits)).double()
    for token in sorted(range(len(weights)), key=weights.tolist().__getitem__, reverse=True):
        if probabilities.sum() >= top_p:
            break
        probabilities[token] = weights[token]
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("vocabulary, spread, temperature, top_p", [
    (40, 2.0, 1.0, 0.9), (40, 2.0, 0.7, 0.5), (40, 2.0, 1.3, 1.0), (40, 4.0, 1.0, 0.05), (40, 0.5, 1.0, 0.99),
    (1500, 3.0, 0.7, 0.9),       # more tokens than are sorted at first, but these hold the mass
    (5000, 0.3, 1.0, 0.9),       # flat: the 1,024 likeliest hold a third of it
    (5000, 0.3, 1.0, 1.0)])
def test_sample_has_the_exact_nucleus_probabilities(vocabulary, spread, temperature, top_p):
    # evenly spaced uniform numbers hit an interval of length p in draws * p of its points, give or take one
    logits, draws = torch.randn(vocabulary) * spread, 4000
    probabilities = nucleus(logits, temperature, top_p)
    counts = torch.zeros(vocabulary, dtype=torch.float64)
    for uniform in ((torch.arange(draws) + 0.5) / draws).split(1000):
        tokens, logprobs = grpo.sample(logits.expand(len(uniform), -1), uniform, temperature, top_p)
        counts += tokens.bincount(minlength=vocabulary)
        assert_close(logprobs, torch.log_softmax(logits / temperature, -1)[tokens], 1e-5)
    assert (counts - draws * probabilities).abs().max() < 1.01
    assert not counts[probabilities == 0].any()


def test_sample_stays_in_the_nucleus_at_the_ends_of_the_interval():
    uniform = torch.tensor([0.0, 1 - 2**-24])
    for probabilities, top_p, expected in (([0.5, 0.1, 0.3, 0.1], 0.75, [0, 2]), ([0.0, 0.5, 0.5, 0.0], 1.0, [1, 2]),
                                           ([0.0, 1.0, 0.0], 1.0, [1, 1]), ([0.0, 1.0, 0.0], 1e-6, [1, 1])):
        logits = torch.tensor(probabilities).log().expand(2, -1)
        assert grpo.sample(logits, uniform, 1.0, top_p)[0].tolist() == expected


def test_sample_treats_every_row_by_itself():
    # some of the 16 rows are flat and need more than the 1,024 likeliest tokens, others are peaked
    logits, uniform = torch.randn(16, 2000) * torch.linspace(0.1, 5, 16)[:, None], torch.rand(16)
    together = grpo.sample(logits, uniform, 0.9, 0.9)
    alone = [grpo.sample(logits[i:i + 1], uniform[i:i + 1], 0.9, 0.9) for i in range(16)]
    for values, of_rows in zip(together, zip(*alone)):
        assert_close(values, torch.cat(of_rows), 1e-5)
    assert torch.equal(grpo.sample(logits, uniform, 0.0, 0.9)[0], logits.argmax(-1)), "temperature 0 is greedy"


def test_rollout_samples_from_the_model():
    model, prompt, draws = small_model(), random_ids([5])[0], 4000
    completions = roll(model, [prompt] * draws, new=1, temperature=2.0, top_p=0.9)
    probabilities = nucleus(model(torch.tensor([prompt])).logits[0, -1].detach(), 2.0, 0.9)
    counts = Counter(ids[0] for ids in completions)
    expected = {token: draws * probabilities[token].item() for token in range(VOCABULARY) if probabilities[token] > 0}
    assert set(counts) <= set(expected)
    chi_square = sum((counts[token] - value) ** 2 / value for token, value in expected.items())
    assert chi_square < len(expected) + 5 * math.sqrt(2 * len(expected))      # mean and std of chi-square: n, sqrt(2 n)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_of_rollout_and_scorer_are_those_of_the_full_logits(family, temperature):
    # the rollout has a cache, left padding and dropped rows, the scorer right padding, the full logits none of them
    model, prompts, eos_ids = small_model(family), random_ids([5, 1, 8, 3]), range(0, VOCABULARY, 6)
    completions = roll(model, prompts, 20, temperature, 0.9, eos_ids, logprobs=(sampled := []))
    samples = [(prompt + ids, len(prompt)) for prompt, ids in zip(prompts, completions)]
    expected, expected_entropies = full_logprobs(model, samples, temperature)
    assert len({len(row) for row in expected}) > 2
    for row, expected_row in zip(sampled, expected, strict=True):
        assert_close(row, expected_row.detach(), 1e-4)
    input_ids, loss_mask = grpo.collate(samples)
    logprobs, entropies = grpo.completion_logprobs(model, input_ids, loss_mask, temperature)
    assert not logprobs[~loss_mask].any() and not entropies[~loss_mask].any() and not entropies.requires_grad
    assert_close(logprobs[loss_mask].detach(), torch.cat(expected).detach(), 1e-4)
    assert_close(entropies[loss_mask], torch.cat(expected_entropies).detach(), 1e-4)


def test_cache_keeps_the_right_rows():
    padding, layers = torch.tensor([0, 4, 2, 1, 3, 0]), 3
    cache, expected = grpo.KVCache(padding.clone(), 5, 12), torch.zeros(layers, 2, 6, 2, 0, 4)
    for kept in ([0, 1, 2, 3, 4, 5], [5, 0, 3, 4], [1, 2, 3], [2, 0], [1]):
        start = expected.shape[4]
        new = torch.randn(layers, 2, expected.shape[2], 2, 1 if start else 5, 4)
        expected = torch.cat([expected, new], 4)
        cache.slots, cache.window = torch.arange(start, expected.shape[4]), expected.shape[4] + 2
        for layer in range(layers):
            stored = cache.update(new[layer, 0], new[layer, 1], layer)
            assert torch.equal(torch.stack(stored)[:, :, :, :-2], expected[layer])
        cache.keep(torch.tensor(kept))
        expected, padding = expected[:, :, kept], padding[kept]
        assert torch.equal(cache.padding[:cache.rows], padding)


# ---- loss -----------------------------------------------------------------------------------------------------------


def loss_case(seed=0, rows=5, tokens=9):
    """Ratios on both sides of both clips, ragged masks, one of them empty, and values outside of the masks too."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, shift, ref_logprobs = -2 * torch.rand(3, rows, tokens, generator=generator, dtype=torch.float64)
    loss_mask = torch.zeros(rows, tokens, dtype=torch.bool)
    for row, (start, end) in enumerate([(0, 9), (3, 5), (2, 8), (4, 4), (8, 9)]):
        loss_mask[row, start:end] = True
    advantages = torch.tensor([[1.5], [-0.7], [0.3], [2.0], [-1.1]], dtype=torch.float64)
    return logprobs.requires_grad_(), logprobs.detach() + 0.4 * (shift + 1), ref_logprobs, advantages, loss_mask


def loss_by_loops(logprobs, old_logprobs, ref_logprobs, advantages, loss_mask, beta, aggregate):
    """Report on the 24-point game, eq. 1, token by token; also clip fraction and KL."""
    losses, sums, tokens, clips, kl = [], [], 0, 0, 0.0
    for row in range(len(loss_mask)):
        total, count, advantage = 0.0, 0, advantages[row, 0].item()
        for place in loss_mask[row].nonzero().flatten():
            ratio = math.exp(logprobs[row, place] - old_logprobs[row, place])
            clipped = min(max(ratio, 1 - CLIP["clip_low"]), 1 + CLIP["clip_high"])
            difference = (ref_logprobs[row, place] - logprobs[row, place]).item()
            k3 = math.exp(difference) - difference - 1
            total -= min(ratio * advantage, clipped * advantage) - beta * k3
            clips += clipped * advantage < ratio * advantage
            kl += k3
            count += 1
        losses.append(total / max(count, 1))
        sums.append(total)
        tokens += count
    loss = {"sequence": sum(losses) / len(losses), "token": sum(sums) / tokens, 7: sum(sums) / (len(sums) * 7)}
    return loss[aggregate], clips / tokens, kl / tokens


@pytest.mark.parametrize("aggregate", ["sequence", "token", 7])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_is_the_formula_in_loops(beta, aggregate):
    case = loss_case()
    loss, metrics = grpo.grpo_loss(*case, **CLIP, beta=beta, aggregate=aggregate)
    expected, clip_fraction, kl = loss_by_loops(*(tensor.detach() for tensor in case), beta, aggregate)
    assert 0 < clip_fraction < 1
    assert_close([loss.item(), metrics["clip_fraction"]], [expected, clip_fraction], 1e-12)
    if beta:
        assert_close(metrics["kl"], kl, 1e-12)
    else:
        assert grpo.grpo_loss(*case[:2], None, *case[3:], **CLIP, beta=0.0, aggregate=aggregate)[0] == loss


# the loss pushes a log-prob by -ratio * A, but no further once the ratio has left the clip range in the direction of A
@pytest.mark.parametrize("ratio, advantage, gradient", [
    (0.5, 1.0, -0.5), (1.0, 1.0, -1.0), (1.25, 1.0, -1.25), (2.0, 1.0, 0.0),
    (0.5, -1.0, 0.0), (0.75, -1.0, 0.0), (1.0, -1.0, 1.0), (2.0, -1.0, 2.0)])
def test_direction_of_the_gradient(ratio, advantage, gradient):
    logprobs = torch.tensor([[math.log(ratio) - 1.0]], dtype=torch.float64, requires_grad=True)
    loss, metrics = grpo.grpo_loss(logprobs, torch.full((1, 1), -1.0), None, torch.tensor([[advantage]]),
                                   torch.ones(1, 1), **CLIP, beta=0.0, aggregate="sequence")
    loss.backward()
    assert_close(logprobs.grad, [[gradient]], 1e-9)
    assert_close([metrics["clip_fraction"], metrics["ratio_error"]], [gradient == 0, abs(ratio - 1)], 1e-9)


def trl_loss(case, beta, loss_type, old_given, constant):
    """TRL's loss of given log-probs, by a trainer that has only what this loss reads, in one pass on one process."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    logprobs, old_logprobs, ref_logprobs, advantages, loss_mask = case
    trainer = object.__new__(GRPOTrainer)
    vars(trainer).update(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, torch.zeros_like(logprobs), None),
        beta=beta, loss_type=loss_type, epsilon_low=CLIP["clip_low"], epsilon_high=CLIP["clip_high"],
        max_completion_length=constant, importance_sampling_level="token", top_entropy_quantile=1.0, use_vllm=False,
        aux_loss_enabled=False, off_policy_mask_threshold=None, model=SimpleNamespace(training=True),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)))
    ids, mask = torch.zeros(loss_mask.shape, dtype=torch.long), loss_mask.to(logprobs.dtype)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask,
              "advantages": advantages[:, 0], "old_per_token_logps": old_logprobs if old_given else None,
              "ref_per_token_logps": ref_logprobs, "num_items_in_batch": mask.sum()}
    return trainer._compute_loss(None, inputs), trainer._metrics["train"]


@pytest.mark.parametrize("old_given", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("aggregate, loss_type", [
    ("sequence", "grpo"), ("token", "dapo"), ("token", "bnpo"), (7, "dr_grpo")])
def test_loss_is_that_of_trl(aggregate, loss_type, beta, old_given):
    case = loss_case(seed=1)
    trl, trl_metrics = trl_loss(case, beta, loss_type, old_given, aggregate)
    old_logprobs = case[1] if old_given else case[0].detach()
    loss, metrics = grpo.grpo_loss(case[0], old_logprobs, *case[2:], **CLIP, beta=beta, aggregate=aggregate)
    assert_close(loss.item(), trl.item(), 1e-12)
    assert_close(torch.autograd.grad(loss, case[0])[0], torch.autograd.grad(trl, case[0])[0], 1e-12)
    assert_close(metrics["clip_fraction"], trl_metrics["clip_ratio/region_mean"][0])
    if beta:
        assert_close(metrics["kl"], trl_metrics["kl"][0])


# ---- advantages -----------------------------------------------------------------------------------------------------


# G = 3, momentum 0.25, running mean 4 and std 2.
# (1, 3, 5): mean 3, std 2.  mean = 0.25 * 4 + 0.75 * 3 = 3.25, std = 0.25 * 2 + 0.75 * 2 = 2
# (0, 1, 2): mean 1, std 1.  mean = 0.25 * 4 + 0.75 * 1 = 1.75, std = 0.25 * 2 + 0.75 * 1 = 1.25
# running mean = 0.25 * 4 + 0.75 * (3 + 1) / 2 = 2.5, running std = 0.25 * 2 + 0.75 * (2 + 1) / 2 = 1.625
REWARDS = torch.tensor([[1, 3, 5], [0, 1, 2]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[-2.25 / 2.0001, -0.25 / 2.0001, 1.75 / 2.0001],
                           [-1.75 / 1.2501, -0.75 / 1.2501, 0.25 / 1.2501]], dtype=torch.float64)


def momentum(rewards, momentum=0.25):
    return grpo.momentum_advantages(torch.as_tensor(rewards, dtype=torch.float64), 4.0, 2.0, momentum)


def test_momentum_advantages_by_hand():
    advantages, mean, std = momentum(REWARDS)
    assert_close(advantages, ADVANTAGES, 1e-12)
    assert_close([mean, std], [2.5, 1.625], 1e-12)
    advantages, mean, std = grpo.momentum_advantages(REWARDS[1:], mean, std, 0.5)
    # mean = 0.5 * 2.5 + 0.5 * 1, std = 0.5 * 1.625 + 0.5 * 1, with one prompt the running values too
    assert_close(advantages, [[-1.75 / 1.3126, -0.75 / 1.3126, 0.25 / 1.3126]], 1e-12)
    assert_close([mean, std], [1.75, 1.3125], 1e-12)


def test_order_of_the_prompts_does_not_matter():
    rewards, order = torch.rand(7, 4, dtype=torch.float64), torch.randperm(7)
    advantages, *running = momentum(rewards)
    assert torch.equal(momentum(rewards[order])[0], advantages[order])
    assert_close(momentum(rewards[order])[1:], running, 1e-14)


def test_baselines_are_those_of_trl():
    from trl.trainer.utils import nanstd

    rewards = torch.rand(6, 8, dtype=torch.float64)
    rewards[0, 2], rewards[3, :7], rewards[1] = NAN, NAN, 0.7
    centred = rewards - rewards.nanmean(1, keepdim=True)
    for baseline, std in (("group", nanstd(rewards, dim=1)[:, None]), ("batch", nanstd(rewards)), ("none", 1 - 1e-4)):
        expected = (centred / (std + 1e-4)).nan_to_num(0.0)
        assert_close(grpo.baseline_advantages(rewards, baseline), expected)
    advantages, mean, std = momentum(rewards, 0.0)       # is plain GRPO
    assert torch.equal(advantages, grpo.baseline_advantages(rewards, "group"))
    assert_close([mean, std], [rewards.nanmean(1).mean(), nanstd(rewards, dim=1).nan_to_num(0.0).mean()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.7, 0.1, 1 / 3, 0.0])
def test_equal_rewards_have_no_advantage(value, dtype):
    # the mean of seven times 0.7 is not 0.7: a rounding error divided by a std of rounding errors is a full advantage
    rewards = torch.full((2, 7), value, dtype=dtype)
    assert not grpo.momentum_advantages(rewards, 4.0, 2.0, 0.0)[0].any()
    for baseline in ("group", "none", "batch"):
        assert not grpo.baseline_advantages(rewards, baseline).any()


def test_equal_rewards_and_groups_of_one_are_compared_with_the_running_mean():
    # mean = 0.25 * 4 + 0.75 * 2 = 2.5, and 5.5 for a reward of 6, std = 0.25 * 2 + 0.75 * 0 = 0.5
    assert_close(momentum([[2, 2, 2]])[0], [[-0.5 / 0.5001] * 3], 1e-12)
    advantages, mean, std = momentum([[2], [6]])
    assert_close(advantages, [[-0.5 / 0.5001], [0.5 / 0.5001]], 1e-12)
    assert_close([mean, std], [0.25 * 4 + 0.75 * 4, 0.25 * 2], 1e-12)
    assert not momentum([[2], [6]], 0.0)[0].any()


def test_nan_rewards_are_left_out():
    advantages, mean, std = momentum([[1, NAN, 3, 5], [NAN] * 4, [0, 1, 2, NAN]])
    assert_close(advantages[0, [0, 2, 3]], ADVANTAGES[0], 1e-12)
    assert_close(advantages[2, :3], ADVANTAGES[1], 1e-12)
    assert advantages[0, 1] == advantages[2, 3] == 0 and not advantages[1].any()
    assert_close([mean, std], [2.5, 1.625], 1e-12)
    assert_close(momentum([[NAN, 2, NAN]])[0], [[0, -0.5 / 0.5001, 0]], 1e-12)        # a group of one
    first, *running = grpo.momentum_advantages(REWARDS, None, None, 0.2)        # takes its own mean 2 and std 1.5
    assert_close(running, [2, 1.5], 1e-12)
    assert torch.equal(first, grpo.momentum_advantages(REWARDS, 2.0, 1.5, 0.2)[0])
    assert not grpo.baseline_advantages(torch.tensor([[NAN, NAN], [1.0, 3.0]]), "group")[0].any()


# ---- log-probs, masks, micro-batches --------------------------------------------------------------------------------


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same_gradients(actual, expected, tolerance=1e-6):
    assert actual.keys() == expected.keys()
    difference, norm = (math.sqrt(sum(values.norm().item() ** 2 for values in tensors)) for tensors in (
        [actual[name] - expected[name] for name in expected], expected.values()))
    assert difference <= tolerance * norm and norm > 0.01, f"{difference} of {norm}"


def test_collate_masks_the_completion_and_nothing_else():
    # prompts of 2, 1 and 3 tokens; id 0 is both EOS and padding, and an EOS is trained
    input_ids, loss_mask = grpo.collate([([5, 6, 7, 0], 2), ([5, 0], 1), ([1, 0, 3, 4, 8, 0], 3)])
    assert input_ids.tolist() == [[5, 6, 7, 0, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0, 0], [1, 0, 3, 4, 8, 0, 0, 0]]
    assert [row.nonzero().flatten().tolist() for row in loss_mask] == [[1, 2], [0], [2, 3, 4]]
    assert input_ids[:, 1:][loss_mask].tolist() == [7, 0, 0, 4, 8, 0]
    assert [grpo.collate([([1] * length, 1)])[0].shape[1] for length in (1, 8, 9)] == [8, 8, 16]


@pytest.mark.parametrize("seed", range(5))
def test_micro_batches_hold_every_sequence_once_within_the_budget(seed):
    generator = random.Random(seed)
    lengths = [generator.randrange(1, 120) for _ in range(generator.randrange(1, 60))]
    for budget in (1, 64, 400, 10**6):
        batches = grpo.micro_batches(lengths, budget)
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        assert all(len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget for batch in batches)
    assert len(batches) == 1


SAMPLES = list(zip(random_ids([20, 4, 11, 7, 15, 5]), [3, 2, 9, 1, 4, 4]))
BUDGETS_AND_CHUNKS = [(10**6, 512), (1, 512), (25, 512), (40, 5), (10**6, 3)]


def step_batch(samples):
    """The tensors of a step, without old and reference log-probs."""
    input_ids, loss_mask = grpo.collate(samples)
    return {"input_ids": input_ids, "loss_mask": loss_mask, "lengths": [len(ids) for ids, _ in samples],
            "advantages": torch.linspace(-1, 1.5, len(samples))[:, None].expand(loss_mask.shape),
            "sampler_logprobs": 0.0 * loss_mask}


def update_case(monkeypatch, aggregate="sequence"):
    """A model and the tensors of a step, with old and reference log-probs of models nearby."""
    set_constants(monkeypatch, grpo, TEMPERATURE=0.7, BETA=0.04, CLIP_LOW=0.2, CLIP_HIGH=0.3, MAX_NEW_TOKENS=7,
                  AGGREGATE=aggregate, ENTROPY_BONUS=0.0)
    model, batch = small_model().train(), step_batch(SAMPLES)
    for parameter in model.parameters():        # as in a real model: wide weights increase the rounding errors of fp32
        parameter.data *= 0.1 if parameter.ndim == 2 else 1
    for name, distance in (("old_logprobs", 0.01), ("ref_logprobs", 0.02), ("sampler_logprobs", 0.01)):
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.data += distance * torch.randn(parameter.shape)
        expected = torch.cat(full_logprobs(other, SAMPLES, 0.7)[0]).detach()
        for budget in (10**6, 1, 25):
            batch[name] = grpo.all_logprobs(other, batch, budget)
            assert_close(batch[name][batch["loss_mask"]], expected, 1e-5)
    return model, batch


@pytest.mark.parametrize("bonus", [0.0, 0.3])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_the_sizes_of_micro_batch_and_chunk_do_not_change_the_update(monkeypatch, aggregate, bonus):
    model, batch = update_case(monkeypatch, aggregate)
    set_constants(monkeypatch, grpo, ENTROPY_BONUS=bonus)
    logprobs, entropies = full_logprobs(model, SAMPLES, 0.7)
    loss_mask, zeros = batch["loss_mask"], torch.zeros(batch["loss_mask"].shape)
    logprobs, entropies = (zeros.masked_scatter(loss_mask, torch.cat(values)) for values in (logprobs, entropies))
    number = 7 if aggregate == "constant" else aggregate
    loss, metrics = grpo.grpo_loss(logprobs, batch["old_logprobs"], batch["ref_logprobs"], batch["advantages"],
                                   loss_mask, **CLIP, beta=0.04, aggregate=number)
    counts = loss_mask.sum(1)
    mean_entropy = {"sequence": (entropies.sum(1) / counts).mean(), "token": entropies.sum() / counts.sum(),
                    "constant": entropies.sum() / (7 * len(SAMPLES))}[aggregate]
    loss = loss - bonus * mean_entropy
    loss.backward()
    expected_gradients, error = gradients(model), (batch["old_logprobs"] - batch["sampler_logprobs"])[loss_mask].abs()
    expected = {"loss": loss.item(), **metrics, "entropy": entropies[loss_mask].mean().item(),
                "sampler_error": error.mean().item()}
    for budget, chunk in BUDGETS_AND_CHUNKS:
        set_constants(monkeypatch, grpo, HEAD_CHUNK=chunk)
        actual = grpo.accumulate_gradient(model, batch, budget)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(actual[name], value, 1e-5 if name == "sampler_error" else 1e-6)
        assert_same_gradients(gradients(model), expected_gradients)


def test_loss_of_sft_is_the_mean_over_completion_tokens(monkeypatch):
    model = small_model().train()
    expected = -torch.cat(full_logprobs(model, SAMPLES, 1.0)[0]).mean()
    expected.backward()
    expected_gradients = gradients(model)
    for budget, chunk in BUDGETS_AND_CHUNKS:
        set_constants(monkeypatch, sft, HEAD_CHUNK=chunk)
        assert_close(sft.mean_loss(model, SAMPLES, budget), expected.item())
        assert_same_gradients(gradients(model), expected_gradients, 1e-5)
    with torch.no_grad():
        assert_close(sft.mean_loss(model, SAMPLES, 40), expected.item())
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- out of memory --------------------------------------------------------------------------------------------------


def limit_memory(model, limit):
    """Makes forward passes of more than `limit` tokens run out of memory; returns the sizes of all passes."""
    sizes = []

    def check(module, args, kwargs):
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.register_forward_pre_hook(check, with_kwargs=True)
    return sizes


@pytest.mark.parametrize("script, work", [
    (sft, lambda model, batch, size: sft.mean_loss(model, SAMPLES, size)),
    (grpo, lambda model, batch, size: grpo.accumulate_gradient(model, batch, size))])
def test_an_update_that_runs_out_of_memory_is_repeated_in_halves(monkeypatch, capsys, script, work):
    model, batch = update_case(monkeypatch)
    expected = work(model, batch, 32)
    expected_gradients = gradients(model)
    sizes = limit_memory(model, 24)
    actual, size = script.halve_on_oom(lambda size: work(model, batch, size), 32, "MICRO_BATCH_TOKENS")
    assert size == 16 and sizes[0] <= 24 < sizes[1], "there must be a gradient of a first micro-batch to drop"
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert_same_gradients(gradients(model), expected_gradients)
    assert capsys.readouterr().out.count("out of memory: MICRO_BATCH_TOKENS=16") == 1


def test_a_rollout_that_runs_out_of_memory_is_repeated_with_half_the_rows(monkeypatch, capsys):
    set_constants(monkeypatch, grpo, MAX_NEW_TOKENS=6, TEMPERATURE=1.0)
    tokenizer = SimpleNamespace(batch_decode=lambda rows, **options: [str(ids) for ids in rows])
    model, batch, eos_ids = small_model(), [{"prompt_ids": ids} for ids in random_ids([3] * 10)], list(range(0, 60, 9))
    expected = grpo.complete(model, tokenizer, batch, eos_ids, 0.9, 5, 10)
    assert {each["truncated"] for each in expected} == {True, False}
    assert all(each["truncated"] == (each["ids"][-1] not in eos_ids) for each in expected)
    sizes = limit_memory(model, 9)
    actual, rows = grpo.halve_on_oom(
        lambda rows: grpo.complete(model, tokenizer, batch, eos_ids, 0.9, 5, rows), 10, "ROLLOUT_ROWS")
    assert rows == 2 and sizes[:3] == [30, 15, 6] and max(sizes[2:]) == 6
    assert [each["ids"] for each in actual] == [each["ids"] for each in expected]
    assert capsys.readouterr().out.count("out of memory: ROLLOUT_ROWS=") == 2


def test_one_row_that_does_not_fit_is_an_error():
    def work(size):
        raise torch.OutOfMemoryError(f"size {size}")

    with pytest.raises(torch.OutOfMemoryError, match="size 1$"):
        grpo.halve_on_oom(work, 10, "ROLLOUT_ROWS")


# ---- 4-bit, LoRA, reference -----------------------------------------------------------------------------------------


WORDS = "1 2 3 4 5 6 7 8 9 10 + - * / ( ) = \n <think> </think> <answer> </answer>"


@pytest.fixture(scope="module")
def policy_folders(tmp_path_factory):
    """Folders of a model of each family with the word tokenizer, like those of the hub or of sft.py."""
    folders, tokenizer = {}, sft.tiny_tokenizer([WORDS])
    for family in ("llama", "qwen3"):
        folders[family] = tmp_path_factory.mktemp(family)
        small_model(family, len(tokenizer)).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


def load(monkeypatch, folder, **constants):
    set_constants(monkeypatch, grpo, TINY=False, TEMPERATURE=0.7, **{
        "LORA_RANK": 4, "LORA_ALPHA": 8, "LOAD_4BIT": 1, "GRADIENT_CHECKPOINTING": 0, **constants})
    model, tokenizer = grpo.load_model(str(folder))
    return model.train(), tokenizer


def move_adapter(model):
    """A new LoRA adapter does nothing, and half of its weights have no gradient; this one does something."""
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family, checkpointing", [("llama", 0), ("qwen3", 0), ("qwen3", 1)])
def test_a_rollout_through_4_bits(monkeypatch, policy_folders, family, checkpointing):
    # with AVX512-BF16, a forward pass in eval mode repacks 4-bit weights into a form with no gradient, or a wrong one
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model, tokenizer = load(monkeypatch, policy_folders[family], GRADIENT_CHECKPOINTING=checkpointing, BETA=0.0)
    switches = [module.support_avx512bf16_for_cpu for module in model.modules()
                if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(switches) == 2 * 7 and not any(switches)
    move_adapter(model)
    prompts = random_ids([5, 3, 8, 3], vocabulary=len(tokenizer))
    batch = step_batch([(ids + ids[:2], len(ids)) for ids in prompts])
    grpo.accumulate_gradient(model, batch, 10**6)
    before = gradients(model)
    assert before and all("lora_" in name and gradient.any() for name, gradient in before.items())
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    completions = roll(model, prompts, new=12, temperature=0.7, logprobs=(logprobs := []))
    grpo.accumulate_gradient(model, batch, 10**6)
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(model).items())

    batch = step_batch([(prompt + ids, len(prompt)) for prompt, ids in zip(prompts, completions)])
    batch["sampler_logprobs"].masked_scatter_(batch["loss_mask"], torch.tensor(sum(logprobs, [])))
    batch["old_logprobs"] = grpo.all_logprobs(model.eval(), batch, 40)
    for mode in (True, False):
        metrics = grpo.accumulate_gradient(model.train(mode), batch, 10**6)
        assert metrics["ratio_error"] < 1e-4 and metrics["sampler_error"] < 1e-4 and metrics["clip_fraction"] == 0


@pytest.fixture
def adapter_folder(monkeypatch, policy_folders, tmp_path):
    """An SFT policy that is an adapter."""
    model, tokenizer = load(monkeypatch, policy_folders["llama"])
    move_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_reference_policy_leaves_the_adapter_trainable_and_active(monkeypatch, adapter_folder):
    model, tokenizer = load(monkeypatch, adapter_folder)
    model.load_adapter(str(adapter_folder), adapter_name="reference", is_trainable=False)
    model.train()
    batch, logprobs = step_batch([(ids, 3) for ids in random_ids([14, 6, 9], vocabulary=len(tokenizer))]), []
    for step in range(3):
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert len(trainable) == 2 * 7 * 2 and all("default" in name for name in trainable)
        assert model.training and model.active_adapter == "default"
        with grpo.reference_policy(model, None) as reference:
            logprobs.append(grpo.all_logprobs(reference, batch, 40))
        assert torch.equal(logprobs[step], logprobs[0])
        assert torch.equal(grpo.all_logprobs(model, batch, 40), logprobs[0]) == (step == 0)
        move_adapter(model)
    with model.disable_adapter():
        assert (grpo.all_logprobs(model, batch, 40) - logprobs[0]).abs().max() > 0.01, "not the base of the SFT policy"


# ---- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference, credit", [
    ("copy", "steps"), ("second adapter", "answer"), ("base of a new adapter", "answer")])
def test_the_loop_starts_on_policy_and_at_kl_0(
        monkeypatch, policy_folders, adapter_folder, tmp_path, reference, credit):
    for name, last in (("train", 4), ("val", 5)):
        rows = [{"prompt": f"{n} 2 3 {last}", "numbers": [n, 2, 3, last]} for n in range(1, 4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def accumulate_and_note(model, batch, budget):
        batches.append(batch)
        return accumulate_gradient(model, batch, budget)

    def score(task, text, row, truncated=False):         # varies among the completions of a random policy
        words = len(text.split())
        return {"reward": words % 7 / 7 - 5, "correct": float(words % 7 > 3), "answered": float(not truncated)}

    def line_rewards(text, row):
        return [NAN if place == 1 else float(len(line) % 3) for place, line in enumerate(text.split("\n"))]

    batches, accumulate_gradient = [], grpo.accumulate_gradient
    monkeypatch.setattr(grpo, "accumulate_gradient", accumulate_and_note)
    monkeypatch.setattr(reward, "line_rewards", line_rewards)
    monkeypatch.setattr(reward, "score", score)
    policy = adapter_folder if reference == "second adapter" else policy_folders["llama"]
    settings = {"SFT": policy, "DATA": tmp_path, "OUT": tmp_path, "MODEL": "small", "DEVICE": "cpu", "THREADS": 1,
                "BF16": 0, "LORA_ALPHA": 8, "STEPS": 2, "CREDIT": credit, "EVAL_EVERY": 1, "PROMPTS_PER_STEP": 3,
                "GROUP_SIZE": 4, "MAX_NEW_TOKENS": 12, "TEMPERATURE": 1.5, "LR": 1e-3, "WARMUP": 0,
                "LOAD_4BIT": int(reference != "copy"), "LORA_RANK": 0 if reference == "copy" else 4}
    for scope in (grpo, reward):                 # the command line sets constants: restore them afterwards
        set_constants(monkeypatch, scope, **{name: value for name, value in vars(scope).items() if name.isupper()})
    monkeypatch.setattr("sys.argv", ["grpo.py", *(f"{name}={value}" for name, value in settings.items())])
    grpo.main()
    log = [json.loads(line) for line in (tmp_path / "grpo/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["step"] for entry in log] == [0, 1, 2] and "reward" not in log[0]
    assert log[1]["kl"] == 0 and log[2]["kl"] > 0 and log[1]["grad_norm"] > 0
    for entry in log[1:]:
        assert entry["ratio_error"] == 0 and entry["sampler_error"] < 1e-4
    tokenizer, first = AutoTokenizer.from_pretrained(policy), batches[0]
    completions = [ids[1:][mask] for ids, mask in zip(first["input_ids"], first["loss_mask"])]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = torch.tensor([score("", text, {})["reward"] for text in texts]).double().view(3, 4)
    expected = grpo.baseline_advantages(rewards, "group").view(12, 1).expand(first["loss_mask"].shape).clone()
    if credit == "steps":       # momentum is 0: the lines of a group are normalised together
        assert any(text.count("\n") > 1 for text in texts)
        for start in (0, 4, 8):
            of_lines = [line_rewards(text, {}) for text in texts[start:start + 4]]
            flat = [value for values in of_lines for value in values if value == value]
            mean, std = torch.tensor(flat).mean(), torch.tensor(flat).std()
            for row, values in enumerate(of_lines, start):
                ids, places = completions[row].tolist(), first["loss_mask"][row].nonzero().flatten().tolist()
                for i, place in enumerate(places):
                    value = values[sum(tokenizer.decode([token]) == "\n" for token in ids[:i])]
                    expected[row, place] += (value - mean) / (std + 1e-4) if value == value else 0.0
    mask = first["loss_mask"]
    assert_close(first["advantages"][mask], expected[mask], 1e-5)
    summary = json.loads((tmp_path / "grpo/summary.json").read_text(encoding="utf-8"))
    best = max(log, key=lambda entry: entry["val_accuracy"])
    assert (summary["best_step"], summary["best_val_accuracy"]) == (best["step"], best["val_accuracy"])
