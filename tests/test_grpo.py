"""The GRPO script against independent answers: greedy `generate` of transformers, exact nucleus probabilities, a loss
written as loops, the loss of TRL, advantages by hand, and log-probs from full logits.

The models are small and random, in fp32 on one thread; wide weights keep logits further apart than rounding errors.
"""

import copy
import json
import math
import random
from collections import defaultdict
from statistics import fmean
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
NAN = math.nan


@pytest.fixture(autouse=True)
def cpu_with_one_thread(monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for script in (sft, grpo):
        set_constants(monkeypatch, script, DEVICE="cpu", BF16=0)


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


def random_ids(lengths, vocabulary=VOCABULARY):
    generator = random.Random(0)
    return [[generator.randrange(vocabulary) for _ in range(length)] for length in lengths]


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
    return torch.cat(logprobs), torch.cat(entropies)


def assert_close(actual, expected, tolerance=1e-6):
    actual, expected = (torch.as_tensor(values, dtype=torch.float64) for values in (actual, expected))
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rollout_is_that_of_transformers(family):
    model, prompts, new = small_model(family), random_ids([5, 1, 11, 3, 7, 2, 9, 4, 6, 8]), 24

    def generate(eos_ids):
        settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=eos_ids, pad_token_id=0)
        outputs = [model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)),
                                  generation_config=settings) for ids in prompts]
        return [ids[0, len(prompt):].tolist() for prompt, ids in zip(prompts, outputs)]

    longest = generate(None)
    eos_ids = [longest[0][0], longest[1][18]]
    expected = generate(eos_ids)
    assert len({len(ids) for ids in expected}) >= 5 and {ids[-1] for ids in expected} > set(eos_ids)
    assert roll(model, prompts, new, eos_ids=eos_ids) == expected
    with torch.autocast("cpu", torch.bfloat16):          # greedy up to rounding
        completions = roll(model, prompts, new, eos_ids=eos_ids)
    for prompt, ids in zip(prompts, completions):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].detach()
        assert (logits.amax(-1) - logits[range(len(ids)), ids]).max() < 0.3 < logits.std()


@pytest.mark.parametrize("training", [True, False])
def test_rollout_leaves_the_model_as_it_was(training):
    # dropout and gradient checkpointing act in training mode only, and would spoil the rollout
    model, prompts = small_model(attention_dropout=0.5), random_ids([4, 2, 7])
    expected, before = roll(model, prompts), copy.deepcopy(model.state_dict())
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train(training)
    assert roll(model, prompts) == expected
    with pytest.raises(IndexError):
        roll(model, [[VOCABULARY]])
    assert {module.training for module in model.modules()} == {training}
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_sliding_window_is_refused():
    model = small_model("qwen2", use_sliding_window=True, sliding_window=14, max_window_layers=0)
    with pytest.raises(ValueError, match="14 tokens at a time, not 15"):
        roll(model, random_ids([3, 6]), 9)


@pytest.mark.parametrize("family, vocabulary, temperature, top_p", [
    ("qwen3", 60, 0.9, 0.9), ("llama", 1500, 3.0, 0.9), ("qwen2", 60, 1.0, 1.0)])
def test_dropping_rows_changes_no_completion(monkeypatch, family, vocabulary, temperature, top_p):
    # in fp64, because tokens that are nearly equally likely change places with the rounding of fp32
    model, new, never = small_model(family, vocabulary).double(), 70, 0
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(vocabulary, dtype=torch.float64))
    model.lm_head.bias.data[never] = -1e4
    prompts, uniform = random_ids([3, 8, 1, 5, 2, 2, 6, 4, 9, 1], vocabulary), torch.rand(10, new)
    whole_logprobs, eos_ids = [], range(7, vocabulary, 20)
    whole = roll(model, prompts, new, temperature, top_p, [never], uniform, whole_logprobs)
    ends = [min((i + 1 for i, token in enumerate(ids) if token in eos_ids), default=new) for ids in whole]
    expected, expected_logprobs = ([row[:end] for row, end in zip(rows, ends)] for rows in (whole, whole_logprobs))
    assert {len(ids) for ids in whole} == {new} and len(set(ends)) > 3
    for check, shrink, window in ((1, 0.99, 1), (8, 0.9, 16), (16, 0.75, 32)):
        set_constants(monkeypatch, grpo, DECODE_CHECK=check, DECODE_SHRINK=shrink, DECODE_WINDOW=window)
        for rows in (slice(0, 10), slice(6, 10)):        # the uniform numbers belong to the prompts
            logprobs = []
            actual = roll(model, prompts[rows], new, temperature, top_p, eos_ids, uniform[rows], logprobs)
            assert actual == expected[rows]
            assert_close(sum(logprobs, []), sum(expected_logprobs[rows], []))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("load_4bit", [0, 1])
def test_replay_of_cuda_graphs_is_the_eager_step(monkeypatch, policy_folders, load_4bit):
    model, tokenizer = load(monkeypatch, policy_folders["llama"], DEVICE="cuda", LOAD_4BIT=load_4bit)
    prompts, uniform = random_ids([3, 8, 1, 5] * 6, len(tokenizer)), torch.rand(24, 300)
    capture, shapes, results = grpo.capture_graph, [], []
    for replacement in (lambda model, cache: shapes.append(capture(model, cache) or cache.graph_shape),
                        lambda model, cache: None):
        monkeypatch.setattr(grpo, "capture_graph", replacement)
        results.append((roll(model, prompts, 300, 1.0, 0.9, [0, 1], uniform, logprobs := []), logprobs))
    assert len(shapes) > 2 and "none" not in shapes, "a capture failed"
    assert results[0][0] == results[1][0]
    assert_close(sum(results[0][1], []), sum(results[1][1], []), 1e-4)


def assert_nucleus(tokens, logits, temperature, top_p):
    """An interval of length p has a share p of evenly spaced uniform numbers, give or take one."""
    weights, probabilities = torch.softmax(logits.double() / temperature, -1), torch.zeros(len(logits)).double()
    for token in weights.argsort(descending=True):
        if probabilities.sum() >= top_p:
            break
        probabilities[token] = weights[token]
    counts, probabilities = tokens.bincount(minlength=len(logits)), probabilities / probabilities.sum()
    assert (counts - len(tokens) * probabilities).abs().max() < 1.1
    assert not counts[probabilities == 0].any()


UNIFORM = (torch.arange(2000) + 0.5) / 2000
UNIFORM[[0, -1]] = torch.tensor([0, 1 - 2**-24])


@pytest.mark.parametrize("vocabulary, temperature, top_p", [
    (40, 0.7, 0.5), (40, 1.3, 1.0), (40, 1.0, 0.05), (3000, 1.0, 0.9), (3000, 1.0, 1.0)])
def test_sample_has_the_exact_nucleus_probabilities(vocabulary, temperature, top_p):
    # a flat and a peaked row in turn: of 3,000 tokens the 1,024 likeliest hold enough of the peaked one alone
    logits = torch.randn(2, vocabulary) * torch.tensor([[0.3], [3.0]])
    logits[:, [0, -1]] = -math.inf
    tokens, logprobs = grpo.sample(logits.repeat(len(UNIFORM), 1), UNIFORM.repeat_interleave(2), temperature, top_p)
    for row in range(2):
        assert_nucleus(tokens[row::2], logits[row], temperature, top_p)
        assert_close(logprobs[row::2], torch.log_softmax(logits[row] / temperature, -1)[tokens[row::2]], 1e-5)


def test_rollout_samples_from_the_nucleus_of_the_model():
    model, prompt = small_model(), random_ids([5])
    completions = roll(model, prompt * len(UNIFORM), 1, 2.0, 0.9, uniform=UNIFORM[:, None])
    assert_nucleus(torch.tensor(completions)[:, 0], model(torch.tensor(prompt)).logits[0, -1].detach(), 2.0, 0.9)


def loss_case(rows=5, tokens=9):
    """Ratios on both sides of both clips, ragged masks, one of them empty, and values outside of the masks too."""
    logprobs, shift, ref_logprobs = -2 * torch.rand(3, rows, tokens, dtype=torch.float64)
    loss_mask = torch.zeros(rows, tokens, dtype=torch.bool)
    for row, (start, end) in enumerate([(0, 9), (3, 5), (2, 8), (4, 4), (8, 9)]):
        loss_mask[row, start:end] = True
    advantages = torch.tensor([[1.5], [-0.7], [0.3], [2.0], [-1.1]], dtype=torch.float64)
    return logprobs.requires_grad_(), logprobs.detach() + 0.4 * (shift + 1), ref_logprobs, advantages, loss_mask


def loss_by_loops(logprobs, old_logprobs, ref_logprobs, advantages, loss_mask, beta, aggregate):
    """Report on the 24-point game, eq. 1, token by token, and the metrics."""
    rows, metrics = [], []
    for row, mask in enumerate(loss_mask):
        rows.append([])
        for place in mask.nonzero().flatten():
            advantage = advantages[row, 0].item()
            ratio = math.exp(logprobs[row, place] - old_logprobs[row, place])
            clipped = min(max(ratio, 1 - CLIP["clip_low"]), 1 + CLIP["clip_high"])
            difference = (ref_logprobs[row, place] - logprobs[row, place]).item()
            k3 = math.exp(difference) - difference - 1
            rows[-1].append(beta * k3 - min(ratio * advantage, clipped * advantage))
            metrics.append([clipped * advantage < ratio * advantage, abs(ratio - 1), k3])
    tokens = sum(rows, [])
    losses = {"sequence": fmean(sum(row) / max(len(row), 1) for row in rows), "token": fmean(tokens),
              7: sum(tokens) / (7 * len(rows))}
    return losses[aggregate], dict(zip(["clip_fraction", "ratio_error", "kl"], map(fmean, zip(*metrics))))


def trl_loss(case, beta, loss_type, constant):
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
    return trainer._compute_loss(None, {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": advantages[:, 0], "old_per_token_logps": old_logprobs, "ref_per_token_logps": ref_logprobs,
        "num_items_in_batch": mask.sum()})


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("aggregate, loss_type", [("sequence", "grpo"), ("token", "dapo"), (7, "dr_grpo")])
def test_loss_is_the_formula_in_loops_and_that_of_trl(aggregate, loss_type, beta):
    case = loss_case()
    logprobs, old_logprobs, ref_logprobs, *others = case
    loss, metrics = grpo.grpo_loss(logprobs, old_logprobs, ref_logprobs if beta else None, *others, **CLIP, beta=beta,
                                   aggregate=aggregate)
    expected, expected_metrics = loss_by_loops(*(tensor.detach() for tensor in case), beta, aggregate)
    trl = trl_loss(case, beta, loss_type, aggregate)
    assert_close([loss.item(), trl.item()], [expected, expected], 1e-12)
    assert_close(torch.autograd.grad(loss, logprobs)[0], torch.autograd.grad(trl, logprobs)[0], 1e-12)
    assert 0 < expected_metrics["clip_fraction"] < 1 and ("kl" in metrics) == (beta > 0)
    for name, value in metrics.items():
        assert_close(value, expected_metrics[name], 1e-12)


# momentum 0.25, running mean 4 and std 2
# (1, 3, 5): mean 3, std 2.  mean = 0.25 * 4 + 0.75 * 3 = 3.25, std = 0.25 * 2 + 0.75 * 2 = 2
# (0, 1, 2): mean 1, std 1.  mean = 0.25 * 4 + 0.75 * 1 = 1.75, std = 0.25 * 2 + 0.75 * 1 = 1.25
# running mean = 0.25 * 4 + 0.75 * (3 + 1) / 2 = 2.5, running std = 0.25 * 2 + 0.75 * (2 + 1) / 2 = 1.625
# (2): mean 2, std 0.  mean = 0.25 * 4 + 0.75 * 2 = 2.5, for (6) 5.5, std = 0.25 * 2 = 0.5
ONE, TWO = [-2.25 / 2.0001, -0.25 / 2.0001, 1.75 / 2.0001], [-1.75 / 1.2501, -0.75 / 1.2501, 0.25 / 1.2501]


@pytest.mark.parametrize("rewards, advantages, mean, std", [
    ([[1, 3, 5], [0, 1, 2]], [ONE, TWO], 2.5, 1.625),
    ([[1, NAN, 3, 5], [NAN] * 4, [0, 1, 2, NAN]], [[ONE[0], 0, *ONE[1:]], [0] * 4, [*TWO, 0]], 2.5, 1.625),
    ([[NAN, 2, NAN], [2, 2, 2]], [[0, -0.5 / 0.5001, 0], [-0.5 / 0.5001] * 3], 2.5, 0.5),
    ([[2], [6]], [[-0.5 / 0.5001], [0.5 / 0.5001]], 4, 0.5)])
def test_momentum_advantages_by_hand(rewards, advantages, mean, std):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    actual, *running = grpo.momentum_advantages(rewards, 4.0, 2.0, 0.25)
    assert_close(actual, advantages, 1e-12)
    assert_close(running, [mean, std], 1e-12)


def test_baselines_are_those_of_trl():
    from trl.trainer.utils import nanstd

    rewards = torch.rand(6, 7, dtype=torch.float64)
    rewards[0, 2], rewards[3, :6], rewards[1], rewards[2] = NAN, NAN, 0.7, NAN
    centred, means, stds = rewards - rewards.nanmean(1, keepdim=True), rewards.nanmean(1), nanstd(rewards, dim=1)
    for baseline, std in (("group", stds[:, None]), ("batch", nanstd(rewards)), ("none", 1 - 1e-4)):
        expected = (centred / (std + 1e-4)).nan_to_num(0.0)
        actual = grpo.baseline_advantages(rewards, baseline)
        assert_close(actual, expected)
        assert not actual[1].any(), "the mean of seven times 0.7 has a rounding error, which must not be normalised"
    expected, stds[3] = grpo.baseline_advantages(rewards, "group"), 0.0        # of a group of one
    for momentum in (0.0, 0.2):        # the first step takes its own mean and std, and momentum 0 is plain GRPO
        nothing, *none = grpo.momentum_advantages(torch.full((2, 3), NAN), None, None, momentum)
        assert not nothing.any()
        for start in ((None, None), none):
            advantages, *running = grpo.momentum_advantages(rewards, *start, momentum)
            assert torch.equal(advantages, expected) == (momentum == 0)
            assert_close(running, [means.nanmean(), stds.nanmean()])


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same_gradients(actual, expected, tolerance=1e-6):
    assert actual.keys() == expected.keys()
    actual, expected = (torch.cat([values.flatten() for values in each.values()]) for each in (actual, expected))
    assert (actual - expected).norm() <= tolerance * expected.norm() and expected.norm() > 0.01


SAMPLES = list(zip(random_ids([20, 4, 11, 7, 15, 5]), [3, 2, 9, 1, 4, 4]))
BUDGETS_AND_CHUNKS = [(10**6, 512), (1, 512), (22, 512), (40, 5), (10**6, 3)]


def step_batch(samples):
    """The tensors of a step, without old and reference log-probs."""
    input_ids, loss_mask = grpo.collate(samples)
    return {"input_ids": input_ids, "loss_mask": loss_mask, "lengths": [len(ids) for ids, _ in samples],
            "advantages": torch.linspace(-1, 1.5, len(samples))[:, None].expand(loss_mask.shape),
            "sampler_logprobs": 0.0 * loss_mask}


def update_case(monkeypatch, aggregate="sequence"):
    """A model and the tensors of a step, with old and reference log-probs of models nearby."""
    set_constants(monkeypatch, grpo, TEMPERATURE=0.7, BETA=0.04, CLIP_LOW=0.2, CLIP_HIGH=0.3, MAX_NEW_TOKENS=7,
                  AGGREGATE=aggregate, ENTROPY_BONUS=0.3, MICRO_BATCH_TOKENS=25)
    model, batch = small_model().train(), step_batch(SAMPLES)
    for parameter in model.parameters():        # as in a real model: wide weights increase the rounding errors of fp32
        parameter.data *= 0.1 if parameter.ndim == 2 else 1
    for name, distance in (("old_logprobs", 0.01), ("ref_logprobs", 0.02), ("sampler_logprobs", 0.01)):
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.data += distance * torch.randn(parameter.shape)
        batch[name] = grpo.all_logprobs(other, batch)
        assert_close(batch[name][batch["loss_mask"]], full_logprobs(other, SAMPLES, 0.7)[0].detach(), 1e-5)
    return model, batch


def limit_memory(model, limit):
    """From now on forward passes of more than `limit` tokens run out of memory; returns the sizes of all passes."""
    sizes = []

    def check(module, args, kwargs):
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model._forward_pre_hooks.clear()
    model.model.register_forward_pre_hook(check, with_kwargs=True)
    return sizes


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_the_sizes_of_micro_batch_and_chunk_do_not_change_the_update(monkeypatch, aggregate):
    model, batch = update_case(monkeypatch, aggregate)
    loss_mask, zeros = batch["loss_mask"], torch.zeros(batch["loss_mask"].shape)
    logprobs, entropies = (zeros.masked_scatter(loss_mask, values) for values in full_logprobs(model, SAMPLES, 0.7))
    loss, metrics = grpo.grpo_loss(logprobs, batch["old_logprobs"], batch["ref_logprobs"], batch["advantages"],
                                   loss_mask, **CLIP, beta=0.04, aggregate=7 if aggregate == "constant" else aggregate)
    counts = loss_mask.sum(1)
    mean_entropy = {"sequence": (entropies.sum(1) / counts).mean(), "token": entropies.sum() / counts.sum(),
                    "constant": entropies.sum() / (7 * len(SAMPLES))}[aggregate]
    loss = loss - 0.3 * mean_entropy
    loss.backward()
    expected_gradients, error = gradients(model), (batch["old_logprobs"] - batch["sampler_logprobs"])[loss_mask].abs()
    expected = {"loss": loss.item(), **{name: value.item() for name, value in metrics.items()},
                "entropy": entropies[loss_mask].mean().item(), "sampler_error": error.mean().item()}
    for budget, chunk in BUDGETS_AND_CHUNKS:
        set_constants(monkeypatch, grpo, HEAD_CHUNK=chunk, MICRO_BATCH_TOKENS=budget)
        sizes = limit_memory(model, max(budget, len(SAMPLES[0][0])))
        assert grpo.accumulate_gradient(model, batch) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert len(sizes) == {10**6: 1, 40: 3, 22: 5, 1: 6}[budget]
        assert_same_gradients(gradients(model), expected_gradients)


def test_loss_of_sft_is_the_mean_over_completion_tokens(monkeypatch):
    model = small_model().train()
    expected = -full_logprobs(model, SAMPLES, 1.0)[0].mean()
    expected.backward()
    expected_gradients = gradients(model)
    for budget, chunk in BUDGETS_AND_CHUNKS:
        set_constants(monkeypatch, sft, HEAD_CHUNK=chunk, MICRO_BATCH_TOKENS=budget)
        assert_close(sft.mean_loss(model, SAMPLES), expected.item())
        assert_same_gradients(gradients(model), expected_gradients, 1e-5)
    with torch.no_grad():
        assert_close(sft.mean_loss(model, SAMPLES), expected.item())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("script, work", [
    (sft, lambda model, batch: sft.mean_loss(model, SAMPLES)), (grpo, grpo.accumulate_gradient)])
def test_an_update_that_runs_out_of_memory_is_repeated_in_halves(monkeypatch, capsys, script, work):
    model, batch = update_case(monkeypatch)
    set_constants(monkeypatch, script, MICRO_BATCH_TOKENS=32)
    expected, expected_gradients = work(model, batch), gradients(model)
    sizes = limit_memory(model, 24)
    actual = script.halve_on_oom("MICRO_BATCH_TOKENS", work, model, batch)
    assert script.MICRO_BATCH_TOKENS == 16
    assert sizes[0] <= 24 < sizes[1], "there must be a gradient of a first micro-batch to drop"
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert_same_gradients(gradients(model), expected_gradients)
    assert capsys.readouterr().out.count("out of memory: MICRO_BATCH_TOKENS=16") == 1


def test_a_rollout_that_runs_out_of_memory_is_repeated_with_half_the_rows(monkeypatch):
    set_constants(monkeypatch, grpo, MAX_NEW_TOKENS=6, TEMPERATURE=1.0, ROLLOUT_ROWS=10)
    tokenizer = SimpleNamespace(batch_decode=lambda rows, **options: [str(ids) for ids in rows])
    model, batch, eos_ids = small_model(), [{"prompt_ids": ids} for ids in random_ids([3] * 10)], list(range(0, 60, 9))
    arguments = model, tokenizer, batch, eos_ids, 0.9, 5
    expected = grpo.complete(*arguments)
    assert {each["truncated"] for each in expected} == {True, False}
    assert all(each["truncated"] == (each["ids"][-1] not in eos_ids) for each in expected)
    sizes = limit_memory(model, 9)
    actual = grpo.halve_on_oom("ROLLOUT_ROWS", grpo.complete, *arguments)
    assert grpo.ROLLOUT_ROWS == 2 and sizes[:3] == [30, 15, 6] and max(sizes[2:]) == 6
    assert [each["ids"] for each in actual] == [each["ids"] for each in expected]
    limit_memory(model, 2)
    with pytest.raises(torch.OutOfMemoryError):        # not even one row fits
        grpo.halve_on_oom("ROLLOUT_ROWS", grpo.complete, *arguments)


@pytest.fixture(scope="module")
def policy_folders(tmp_path_factory):
    """Folders of a model of each family with the word tokenizer, like those of the hub or of sft.py."""
    folders = {}
    tokenizer = sft.tiny_tokenizer(["1 2 3 4 5 6 7 8 9 10 + - * / ( ) = \n <think> </think> <answer> </answer>"])
    for family in ("llama", "qwen3"):
        folders[family] = tmp_path_factory.mktemp(family)
        small_model(family, len(tokenizer)).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


def load(monkeypatch, folder, **constants):
    set_constants(monkeypatch, grpo, TINY=False, TEMPERATURE=0.7, **{
        "LORA_RANK": 4, "LORA_ALPHA": 8, "LOAD_4BIT": 1, "GRADIENT_CHECKPOINTING": 0, **constants})
    model, tokenizer = grpo.load_model(str(folder))
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:       # zero, so that half of the other weights have no gradient
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.train(), tokenizer


@pytest.mark.parametrize("family, checkpointing", [("llama", 0), ("qwen3", 1)])
def test_a_rollout_through_4_bits(monkeypatch, policy_folders, family, checkpointing):
    # with AVX512-BF16, a forward pass in eval mode repacks 4-bit weights into a form with no gradient, or a wrong one
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model, tokenizer = load(monkeypatch, policy_folders[family], GRADIENT_CHECKPOINTING=checkpointing, BETA=0.0)
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())
    prompts = random_ids([5, 3, 8, 3], len(tokenizer))
    batch = step_batch([(ids + ids[:2], len(ids)) for ids in prompts])
    grpo.accumulate_gradient(model, batch)
    before = gradients(model)
    assert before and all("lora_" in name and gradient.any() for name, gradient in before.items())
    assert {gradient.dtype for gradient in before.values()} == {torch.float32}
    completions = roll(model, prompts, 12, 0.7, 0.9, range(0, len(tokenizer), 5), logprobs=(logprobs := []))
    assert len(set(map(len, completions))) > 1, "rows must have been dropped"
    grpo.accumulate_gradient(model, batch)
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(model).items())

    batch = step_batch([(prompt + ids, len(prompt)) for prompt, ids in zip(prompts, completions)])
    batch["sampler_logprobs"].masked_scatter_(batch["loss_mask"], torch.tensor(sum(logprobs, [])))
    set_constants(monkeypatch, grpo, MICRO_BATCH_TOKENS=40)
    batch["old_logprobs"] = grpo.all_logprobs(model.eval(), batch)
    set_constants(monkeypatch, grpo, MICRO_BATCH_TOKENS=10**6)
    for mode in (True, False):
        metrics = grpo.accumulate_gradient(model.train(mode), batch)
        assert metrics["ratio_error"] < 1e-4 and metrics["sampler_error"] < 1e-4 and metrics["clip_fraction"] == 0


@pytest.mark.parametrize("weights, credit, baseline, every", [
    ("all", "steps", "momentum", 0), ("all", "answer", "none", 1), ("adapter", "answer", "group", 1),
    ("new adapter", "answer", "rft", 0)])
def test_the_loop_starts_on_policy_and_at_kl_0(monkeypatch, policy_folders, tmp_path, weights, credit, baseline, every):
    policy = policy_folders["llama"]
    if weights == "adapter":          # the policy of SFT is an adapter
        model, tokenizer = load(monkeypatch, policy)
        policy = tmp_path / "adapter"
        model.peft_config["default"].lora_dropout = 0.3        # as adapters from elsewhere may have
        model.save_pretrained(policy)
        tokenizer.save_pretrained(policy)
    for name, last in (("train", 4), ("val", 5)):
        rows = [{"prompt": f"{n} 2 3 {last}", "numbers": [n, 2, 3, last]} for n in range(1, 4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def score(task, text, row, truncated=False):         # varies among the completions of a random policy
        words = len(text.split())
        return {"reward": words % 7 / 7 - 5, "correct": float(words % 7 > 3), "answered": float(not truncated)}

    def line_rewards(text, row):
        return [NAN if place == 1 else float(len(line) % 3) for place, line in enumerate(text.split("\n"))]

    batches, accumulate = [], grpo.accumulate_gradient
    monkeypatch.setattr(grpo, "accumulate_gradient", lambda *args: batches.append(args[1]) or accumulate(*args))
    monkeypatch.setitem(reward.LINE_REWARDS, "game24", line_rewards)
    monkeypatch.setattr(reward, "score", score)
    settings = {"SFT": policy, "DATA": tmp_path, "OUT": tmp_path, "MODEL": "small", "DEVICE": "cpu", "THREADS": 1,
                "BF16": 0, "LORA_ALPHA": 8, "STEPS": 2, "CREDIT": credit, "BASELINE": baseline,
                "EVAL_EVERY": 1, "PROMPTS_PER_STEP": 3, "REFERENCE_EVERY": every,
                "GROUP_SIZE": 4, "MAX_NEW_TOKENS": 12, "TEMPERATURE": 1.5, "LR": 1e-3, "WARMUP": 0,
                "LOAD_4BIT": int(weights != "all"), "LORA_RANK": 0 if weights == "all" else 4}
    for scope in (grpo, reward):                 # the command line sets constants: restore them afterwards
        set_constants(monkeypatch, scope, **{name: value for name, value in vars(scope).items() if name.isupper()})
    monkeypatch.setattr("sys.argv", ["grpo.py", *(f"{name}={value}" for name, value in settings.items())])
    grpo.main()
    log = [json.loads(line) for line in (tmp_path / "grpo/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["step"] for entry in log] == [0, 1, 2] and "reward" not in log[0]
    assert log[1]["kl"] == 0 and log[1]["grad_norm"] > 0
    assert log[2]["kl"] == 0 if every else log[2]["kl"] > 0         # step 1 made the policy the reference
    assert all(entry["ratio_error"] == 0 and entry["sampler_error"] < 1e-4 for entry in log[1:])

    tokenizer, mask = AutoTokenizer.from_pretrained(policy), batches[0]["loss_mask"]
    completions = [ids[1:][row].tolist() for ids, row in zip(batches[0]["input_ids"], mask)]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = torch.tensor([score("", text, {})["reward"] for text in texts]).double().view(3, 4)
    plain = grpo.baseline_advantages(rewards, "none" if baseline == "none" else "group")
    expected = plain.view(12, 1).expand(mask.shape).clone()
    if baseline == "rft":       # right answers, those with a reward above 3 / 7 - 5
        expected = (rewards > 3.5 / 7 - 5).double().view(12, 1).expand(mask.shape)
    if credit == "steps":       # momentum is 0: the lines of a group are normalised together
        assert any(text.count("\n") > 1 for text in texts)
        for row, ids in enumerate(completions):
            lines, group = line_rewards(texts[row], {}), texts[row // 4 * 4:row // 4 * 4 + 4]
            values = torch.tensor(sum([line_rewards(text, {}) for text in group], []))
            values = values[~values.isnan()]
            for i, place in enumerate(mask[row].nonzero().flatten()):
                value = lines[sum(tokenizer.decode([token]) == "\n" for token in ids[:i])]
                expected[row, place] += 0 if math.isnan(value) else (value - values.mean()) / (values.std() + 1e-4)
    assert_close(batches[0]["advantages"][mask], expected[mask], 1e-5)
    summary = json.loads((tmp_path / "grpo/summary.json").read_text(encoding="utf-8"))
    best = max(log, key=lambda entry: entry["val_accuracy"])
    assert (summary["best_step"], summary["best_val_accuracy"]) == (best["step"], best["val_accuracy"])
