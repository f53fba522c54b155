"""The GRPO script against independent answers: greedy `generate` of transformers, exact nucleus probabilities, a loss written as
loops, the loss of TRL, advantages by hand, and log-probs from the full logits.

All models are small and random, in fp32 on one thread. Their weights are drawn wide, so that greedy completions do not all end in a
loop of one token, and logits are further apart than rounding.
"""

import contextlib
import copy
import json
import math
import random
import weakref
from collections import Counter, defaultdict
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

import eval as evaluation
import grpo
import reward
import sft

FAMILIES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
VOCABULARY = 60
CLIP = {"clip_low": 0.2, "clip_high": 0.3}         # unequal, so that the two cannot be mixed up
AGGREGATES = ["sequence", "token", 7]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def small_model(family="qwen2", attention="eager", vocabulary=VOCABULARY, **options):
    torch.manual_seed(0)
    config = FAMILIES[family](vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                              num_key_value_heads=2, head_dim=16, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
                              pad_token_id=None, **options)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def random_ids(lengths, seed=0, vocabulary=VOCABULARY):
    generator = random.Random(seed)
    return [[generator.randrange(vocabulary) for _ in range(length)] for length in lengths]


def until_eos(ids, eos_ids):
    ends = [place for place, token in enumerate(ids) if token in eos_ids]
    return ids[:ends[0] + 1] if ends else ids


def roll(model, prompts, new=30, temperature=0.0, top_p=1.0, eos_ids=(0,), seed=0, stats=None):
    return grpo.rollout(model, prompts, max_new_tokens=new, temperature=temperature, top_p=top_p, eos_ids=list(eos_ids),
                        generator=torch.Generator().manual_seed(seed), stats=stats)


def assert_close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64),
                               atol=tolerance, rtol=tolerance)


# ---- rollout ----------------------------------------------------------------------------------------------------------


def generate_greedy(model, prompts, new, eos_ids):
    """Greedy completions of transformers; a row that is done is filled up with padding, so it is cut at its first EOS."""
    width = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=eos_ids, pad_token_id=0)
    made = model.generate(input_ids, attention_mask=attention_mask, generation_config=settings)
    return [until_eos(ids, eos_ids or []) for ids in made[:, width:].tolist()]


def telling_eos(free, new):
    """Two tokens that, as EOS, end most rows at different lengths, each of them some row, and leave a row without an end."""
    def lengths(pair):
        return {len(until_eos(ids, pair)) for ids in free}

    pairs = [pair for pair in combinations(sorted({token for ids in free for token in ids}), 2)
             if {until_eos(ids, pair)[-1] for ids in free} > set(pair) and new in lengths(pair)]
    return max(pairs, key=lambda pair: len(lengths(pair)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rollout_is_that_of_transformers(family, attention):
    model, prompts, new = small_model(family, attention), random_ids([5, 1, 11, 3, 7, 2, 9, 4, 6, 8]), 24
    free = generate_greedy(model, prompts, new, None)
    eos_ids = telling_eos(free, new)
    expected = generate_greedy(model, prompts, new, list(eos_ids))
    assert len({len(ids) for ids in expected}) >= 4, "rows must leave the batch at different steps"
    assert roll(model, prompts, new, eos_ids=eos_ids) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_completions_do_not_depend_on_the_batch(family):
    model, prompts, new = small_model(family), random_ids([4, 1, 12, 6, 6, 3], seed=1), 20
    eos_ids = telling_eos(roll(model, prompts, new, eos_ids=[VOCABULARY - 1]), new)
    together = roll(model, prompts, new, eos_ids=eos_ids)
    assert len({len(ids) for ids in together}) > 2
    assert [roll(model, [ids], new, eos_ids=eos_ids)[0] for ids in prompts] == together
    assert roll(model, prompts[::-1], new, eos_ids=eos_ids) == together[::-1]


@pytest.mark.parametrize("merged", [0, 1])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rollout_in_bf16_is_greedy_but_for_rounding(monkeypatch, family, attention, merged):
    monkeypatch.setattr(grpo, "ROLLOUT_COPY", merged)
    model, prompts = small_model(family, attention), random_ids([5, 1, 11, 3, 7, 2])
    with torch.autocast("cpu", torch.bfloat16):
        made = roll(model, prompts, 24, eos_ids=[VOCABULARY - 1])
    for prompt, ids in zip(prompts, made):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].detach()
        behind = logits.amax(-1) - logits[range(len(ids)), ids]
        assert float(behind.max()) < 0.3 < float(logits.std())


def model_with_ends(ends, never):
    """A model that samples each of the ids `ends` about once in ten tokens, and `never` never."""
    model = small_model()
    model.lm_head = torch.nn.Linear(64, VOCABULARY)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    with torch.no_grad():
        model.lm_head.bias.zero_()
        model.lm_head.bias[ends] = 2.0
        model.lm_head.bias[never] = -1e4
    return model


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_dropping_finished_rows_changes_no_sampled_completion(top_p):
    model, prompts, ends, never = model_with_ends([7, 11], 3), random_ids([3, 8, 1, 5] * 8), [7, 11], 3
    undropped = roll(model, prompts, temperature=0.9, top_p=top_p, eos_ids=[never])
    assert {len(ids) for ids in undropped} == {30}
    made = roll(model, prompts, temperature=0.9, top_p=top_p, eos_ids=ends)
    assert made == [until_eos(ids, ends) for ids in undropped]
    assert len({len(ids) for ids in made}) > 5 and {7, 11} <= {ids[-1] for ids in made}


def test_a_seed_decides_the_samples():
    model, prompts = small_model(), random_ids([4] * 8)
    assert roll(model, prompts, temperature=1.0, seed=1) == roll(model, prompts, temperature=1.0, seed=1)
    assert roll(model, prompts, temperature=1.0, seed=1) != roll(model, prompts, temperature=1.0, seed=2)


def test_equal_prompts_get_different_samples():
    made = roll(small_model(), random_ids([4]) * 8, new=12, temperature=3.0)
    assert len({tuple(ids) for ids in made}) == 8


def test_the_longest_completion_has_no_eos_appended():
    model, prompts = small_model(), random_ids([4, 2])
    free = roll(model, prompts, 12, eos_ids=[VOCABULARY - 1])
    for new in (1, 5, 12):
        assert roll(model, prompts, new, eos_ids=[VOCABULARY - 1]) == [ids[:new] for ids in free]
    assert all(VOCABULARY - 1 not in ids for ids in free)
    last = free[0].index(free[0][5])             # an EOS that comes with the last token allowed is kept
    assert roll(model, prompts[:1], last + 1, eos_ids=[free[0][5]]) == [free[0][:last + 1]]


@pytest.mark.parametrize("training, attention", [(True, "eager"), (False, "sdpa")])
def test_rollout_leaves_the_model_as_it_was(training, attention):
    # dropout and gradient checkpointing act in training mode only, where they would spoil the rollout
    model, prompts = small_model(attention=attention, attention_dropout=0.5), random_ids([4, 2, 7])
    expected = roll(model, prompts)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert roll(model, prompts) == expected
    assert {module.training for module in model.modules()} == {training} and model.config._attn_implementation == attention
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad == grads[name] for name, parameter in model.named_parameters())
    with pytest.raises(IndexError):
        roll(model, [[VOCABULARY]])
    assert {module.training for module in model.modules()} == {training} and model.config._attn_implementation == attention, "after an error too"


@pytest.mark.parametrize("prompts", [[], [[]], [[1, 2], []]])
def test_rollout_refuses_empty_prompts(prompts):
    with pytest.raises(ValueError, match="at least one"):
        roll(small_model(), prompts)


def nucleus(logits, temperature, top_p):
    """Exact probabilities of nucleus sampling, and the mass before it is made 1, by loops in double precision."""
    weights = torch.softmax(logits.double() / temperature, -1).tolist()
    mass, allowed = 0.0, []
    for token in sorted(range(len(weights)), key=weights.__getitem__, reverse=True):
        if mass >= top_p:
            break
        allowed.append(token)
        mass += weights[token]
    probabilities = torch.zeros(len(weights), dtype=torch.float64)
    probabilities[allowed] = torch.tensor([weights[token] for token in allowed], dtype=torch.float64) / mass
    return probabilities, mass


def draw(logits, uniform, temperature, top_p):
    """Tokens and mass of grpo.sample, again with the whole vocabulary where it asks for it."""
    tokens, logprobs, mass, right = grpo.sample(logits, uniform, temperature, top_p)
    if not right:
        tokens, logprobs, mass, _ = grpo.sample(logits, uniform, temperature, top_p, logits.shape[-1])
    scored = torch.log_softmax(logits.float() / (temperature or 1.0), -1).gather(1, tokens[:, None])[:, 0]
    assert_close(logprobs, scored if temperature else torch.zeros(len(tokens)), 1e-4)
    return tokens, mass


@pytest.mark.parametrize("vocabulary, spread, temperature, top_p", [
    (40, 2.0, 1.0, 0.9), (40, 2.0, 0.7, 0.5), (40, 2.0, 1.3, 1.0), (40, 4.0, 1.0, 0.05), (40, 0.5, 1.0, 0.99),
    (1500, 3.0, 0.7, 0.9),       # more tokens than are sorted first, and these hold the mass
    (5000, 0.3, 1.0, 0.9),       # flat: the 1,024 likeliest hold a third of it
])
def test_sample_has_the_exact_nucleus_probabilities(vocabulary, spread, temperature, top_p):
    # evenly spaced uniform numbers hit an interval of length p in draws * p of its points, give or take one
    logits, draws = torch.randn(vocabulary) * spread, 4000
    probabilities, mass = nucleus(logits, temperature, top_p)
    counts = torch.zeros(vocabulary, dtype=torch.float64)
    for uniform in ((torch.arange(draws) + 0.5) / draws).split(1000):
        tokens, allowed = draw(logits.expand(len(uniform), -1), uniform, temperature, top_p)
        counts += tokens.bincount(minlength=vocabulary)
        assert_close(allowed, [mass] * len(uniform), 1e-5)
    assert float((counts - draws * probabilities).abs().max()) < 1.01
    assert not counts[probabilities == 0].any()


def test_sample_stays_in_the_nucleus_at_the_ends_of_the_interval():
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log().expand(2, -1)
    tokens, mass = draw(logits, torch.tensor([0.0, 1 - 2**-24]), 1.0, 0.75)
    assert tokens.tolist() == [0, 2]
    assert_close(mass, [0.8, 0.8])


def test_sample_treats_every_row_by_itself():
    logits, uniform = torch.randn(16, 2000) * torch.linspace(0.1, 5, 16)[:, None], torch.rand(16)
    tokens, mass = draw(logits, uniform, 0.9, 0.9)
    alone = [draw(logits[i:i + 1], uniform[i:i + 1], 0.9, 0.9) for i in range(16)]
    assert tokens.tolist() == [int(token) for token, _ in alone]
    assert_close(mass, [float(mass) for _, mass in alone])


def test_sample_says_where_the_likeliest_tokens_are_too_few():
    flat, peaked = torch.zeros(2, 3000), torch.cat([torch.full((2, 10), 9.0), torch.zeros(2, 2990)], 1)
    assert [bool(grpo.sample(logits, torch.rand(2), 1.0, 0.9)[3]) for logits in (flat, peaked)] == [False, True]
    assert [bool(grpo.sample(flat, torch.rand(2), *rest)[3]) for rest in ((1.0, 0.9, 3000), (1.0, 1.0), (0.0, 0.9))] == [True] * 3


def test_temperature_0_is_greedy():
    logits = torch.randn(9, 50)
    tokens, mass = draw(logits, torch.rand(9), 0.0, 0.3)
    assert torch.equal(tokens, logits.argmax(-1)) and mass.tolist() == [1.0] * 9


def test_rollout_samples_from_the_model():
    model, prompt, draws, stats = small_model(), random_ids([5])[0], 4000, {}
    made = roll(model, [prompt] * draws, new=1, temperature=2.0, top_p=0.9, stats=stats)
    probabilities, mass = nucleus(model(torch.tensor([prompt])).logits[0, -1].detach(), 2.0, 0.9)
    counts = Counter(ids[0] for ids in made)
    allowed = [token for token in range(VOCABULARY) if probabilities[token] > 0]
    assert set(counts) <= set(allowed)
    chi_square = sum((counts[token] - draws * probabilities[token])**2 / (draws * probabilities[token]) for token in allowed)
    assert chi_square < len(allowed) + 5 * math.sqrt(2 * len(allowed))       # mean and std of chi-square: n and sqrt(2 n)
    assert stats["nucleus_mass"] == pytest.approx(mass, abs=1e-5)


def rollout_logits(monkeypatch, model, prompts, merged, new=6):
    """Logits of each step of a greedy rollout, those of the prompts first."""
    seen, sample = [], grpo.sample
    monkeypatch.setattr(grpo, "sample", lambda logits, *rest: (seen.append(logits.clone()), sample(logits, *rest))[1])
    monkeypatch.setattr(grpo, "ROLLOUT_COPY", merged)
    roll(model, prompts, new)
    monkeypatch.setattr(grpo, "sample", sample)
    return seen


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("adapter", ["none", "trained", "switched off", "beside a reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_pass_is_that_of_transformers(monkeypatch, policy_folders, family, adapter, bits):
    model, tokenizer = load(monkeypatch, policy_folders[family], LOAD_4BIT=int(bits == 4), LORA_RANK=0 if adapter == "none" else 4,
                            trainable=adapter != "none")
    if adapter != "none":
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    if adapter == "beside a reference":
        model.add_adapter("reference", model.peft_config["default"])
    prompts = random_ids([7, 7, 4, 7, 3], vocabulary=len(tokenizer))
    assert grpo.fast_forward(model, torch.float32, 20) is not None
    with model.disable_adapter() if adapter == "switched off" else contextlib.nullcontext():
        slow, fast = (rollout_logits(monkeypatch, model, prompts, merged) for merged in (0, 1))
    assert len(fast) > 3 and max(float(step.abs().max()) for step in slow) > 0.5
    for expected, found in zip(slow, fast, strict=True):
        assert_close(found, expected, 0.1 if torch.cuda.is_available() else 1e-3 if bits == 4 else 2e-5)        # on a GPU weights are in bf16


@pytest.mark.parametrize("odd", ["LoHa", "sliding window", "another activation", "DoRA", "bias in the adapter", "another family", "dynamic angles"])
def test_the_fast_pass_leaves_alone_what_it_does_not_know(monkeypatch, odd):
    options = {"sliding window": {"use_sliding_window": True, "sliding_window": 14, "max_window_layers": 0},
               "another activation": {"hidden_act": "gelu"},
               "dynamic angles": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}}.get(odd, {})
    monkeypatch.setitem(FAMILIES, "mistral", MistralConfig)
    model = small_model("mistral" if odd == "another family" else "qwen2", **options)
    if odd in ("DoRA", "bias in the adapter"):
        model = get_peft_model(model, LoraConfig(r=2, use_dora=odd == "DoRA", lora_bias=odd != "DoRA", target_modules=["q_proj"]))
    elif odd == "LoHa":
        model = get_peft_model(model, LoHaConfig(r=2, target_modules=["q_proj"]))
    assert grpo.fast_forward(model, torch.float32, 20) is None
    prompts = random_ids([3, 6])
    assert roll(model, prompts, 8) == generate_greedy(model, prompts, 8, [0])


def test_a_model_built_in_another_way_is_left_to_transformers():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)).eval()
    assert grpo.fast_forward(model, torch.float32, 20) is None


def test_a_window_that_slides_is_refused():
    model = small_model("qwen2", use_sliding_window=True, sliding_window=14, max_window_layers=0)
    with pytest.raises(ValueError, match="last 14 tokens.*may have 15.*MAX_NEW_TOKENS"):
        roll(model, random_ids([3, 6]), 9)


def test_a_prompt_is_read_once(monkeypatch):
    model, prompts = small_model(), random_ids([5, 3])
    numbers, read = torch.rand(8, 12), []
    monkeypatch.setattr(grpo, "ROLLOUT_COPY", 0)
    model.model.embed_tokens.register_forward_hook(lambda module, given, made: read.append(tuple(given[0].shape)))
    grouped = grpo.rollout(model, [prompts[i // 4] for i in range(8)], max_new_tokens=12, temperature=1.0, top_p=1.0, eos_ids=[0], generator=numbers)
    assert read[0] == (2, 5) and read[1] == (8, 1)
    alone = [grpo.rollout(model, [prompts[i // 4]], max_new_tokens=12, temperature=1.0, top_p=1.0, eos_ids=[0], generator=numbers[i:i + 1])[0]
             for i in range(8)]
    assert grouped == alone and len({tuple(ids) for ids in grouped}) > 4


@pytest.mark.parametrize("vocabulary, top_p, temperature", [(VOCABULARY, 1.0, 0.0), (VOCABULARY, 0.9, 0.9), (1500, 0.9, 3.0), (1500, 1.0, 1.0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_buckets_change_no_completion(family, vocabulary, top_p, temperature):
    # beyond 256 tokens, so that the window of the attention grows, and with rows that end all the way; in fp64, as tokens that are nearly
    # equally likely change places with the rounding
    model, new = small_model(family, vocabulary=vocabulary).double(), 270
    prompts = random_ids([3, 8, 1, 5, 2, 2, 6, 4, 9, 1] * 2, vocabulary=vocabulary)
    numbers, made = torch.rand(20, new), []
    ends = [token for token in range(vocabulary) if token % (30 if vocabulary == VOCABULARY else 100) == 7]
    for buckets in (False, True):
        stats = {}
        completions = grpo.rollout(model, prompts, max_new_tokens=new, temperature=temperature, top_p=top_p, eos_ids=ends, generator=numbers,
                                   stats=stats, buckets=buckets)
        made.append((completions, round(stats["nucleus_mass"], 5)))
    assert made[0] == made[1] and len({len(ids) for ids in made[0][0]}) > 5 and (temperature == 0 or max(map(len, made[0][0])) > 40)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("bits", [16, 4])
def test_cuda_graphs_change_no_completion(monkeypatch, policy_folders, bits):
    model, tokenizer = load(monkeypatch, policy_folders["qwen2"], LOAD_4BIT=int(bits == 4))
    prompts, made = random_ids([3, 8, 1, 5] * 6, vocabulary=len(tokenizer)), []
    numbers = torch.rand(24, 300)
    for graphs in (1, 0):
        monkeypatch.setattr(grpo, "CUDA_GRAPHS", graphs)
        with grpo.autocast():
            made.append(grpo.rollout(model, prompts, max_new_tokens=300, temperature=1.0, top_p=0.9, eos_ids=[0, 1], generator=numbers))
        assert grpo.CUDA_GRAPHS == graphs, "the capture failed"
    assert made[0] == made[1]


def test_the_cache_is_gone_after_a_rollout(monkeypatch):
    caches, make = [], grpo.KVCache.__init__
    monkeypatch.setattr(grpo.KVCache, "__init__", lambda self, *given: (caches.append(weakref.ref(self)), make(self, *given))[1])
    roll(small_model(), random_ids([4, 2]), new=5)
    assert len(caches) == 1 and caches[0]() is None


@pytest.mark.parametrize("seed", range(4))
def test_cache_keeps_the_right_rows(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, slots, layers = 9, 40, 3
    cache, kept, filled = grpo.KVCache(rows, slots, torch.arange(5)), torch.zeros(layers, 2, rows, 2, 0, 4), 0
    while rows and filled < slots:
        count = 5 if filled == 0 else 1
        new = torch.randn(layers, 2, rows, 2, count, 4, generator=generator)
        kept = torch.cat([kept, new], 4)
        for layer in range(layers):
            keys, values = cache.update(new[layer, 0], new[layer, 1], layer)
            assert torch.equal(keys, kept[layer, 0]) and torch.equal(values, kept[layer, 1])
        filled += count
        assert cache.get_seq_length() == filled
        alive = torch.rand(rows, generator=generator) < [0.8, 0.95, 0.6, 0.9][seed]
        order = cache.keep(alive)
        assert sorted(order.tolist()) == alive.nonzero().flatten().tolist()
        kept, rows, cache.slots = kept[:, :, order], len(order), torch.tensor([filled])
        cache.widen(filled + 1)
    assert filled > 8 and rows < 9


# ---- loss -------------------------------------------------------------------------------------------------------------


def loss_case(seed=0, rows=5, tokens=9):
    """Log-probs with ratios on both sides of both clips, ragged masks, one of them empty, and values in masked places too."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, old_logprobs, ref_logprobs = (-torch.rand(3, rows, tokens, generator=generator, dtype=torch.float64) * 2).unbind()
    old_logprobs = logprobs + 0.4 * (old_logprobs + 1)
    loss_mask = torch.zeros(rows, tokens, dtype=torch.bool)
    for row, (start, end) in enumerate([(0, 9), (3, 5), (2, 8), (4, 4), (8, 9)]):
        loss_mask[row, start:end] = True
    return logprobs.requires_grad_(), old_logprobs, ref_logprobs, torch.tensor([[1.5], [-0.7], [0.3], [2.0], [-1.1]], dtype=torch.float64), loss_mask


def loss_by_loops(logprobs, old_logprobs, ref_logprobs, advantages, loss_mask, beta, aggregate):
    """Report on the 24-point game, eq. 1, token by token."""
    sums, counts, clips, kl = [], [], 0, 0.0
    for row in range(len(loss_mask)):
        total, count, advantage = 0.0, 0, float(advantages[row, 0])
        for place in range(loss_mask.shape[1]):
            if loss_mask[row, place]:
                ratio = math.exp(logprobs[row, place] - old_logprobs[row, place])
                clipped = min(max(ratio, 1 - CLIP["clip_low"]), 1 + CLIP["clip_high"])
                difference = float(ref_logprobs[row, place] - logprobs[row, place])
                k3 = math.exp(difference) - difference - 1
                total -= min(ratio * advantage, clipped * advantage) - beta * k3
                clips += clipped * advantage < ratio * advantage
                kl += k3
                count += 1
        sums.append(total)
        counts.append(count)
    tokens = sum(counts)
    if aggregate == "sequence":
        loss = sum(total / max(count, 1) for total, count in zip(sums, counts)) / len(sums)
    else:
        loss = sum(sums) / (tokens if aggregate == "token" else len(sums) * aggregate)
    return loss, clips / tokens, kl / tokens


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_is_the_formula_in_loops(beta, aggregate):
    case = loss_case()
    loss, metrics = grpo.grpo_loss(*case, **CLIP, beta=beta, aggregate=aggregate)
    expected, clip_fraction, kl = loss_by_loops(*(tensor.detach() for tensor in case), beta, aggregate)
    assert 0 < clip_fraction < 1
    assert_close([loss.item(), metrics["clip_fraction"].item()], [expected, clip_fraction], 1e-12)
    if beta:
        assert_close(float(metrics["kl"]), kl, 1e-12)
    loss.backward()
    logprobs, small, places = case[0].detach(), 1e-6, case[-1].nonzero().tolist()
    for row, place in places:                            # the gradient by central differences of the loops
        ends = []
        for sign in (1, -1):
            moved = logprobs.clone()
            moved[row, place] += sign * small
            ends.append(loss_by_loops(moved, *case[1:], beta, aggregate)[0])
        assert_close(case[0].grad[row, place], (ends[0] - ends[1]) / (2 * small), 1e-7)
    assert not case[0].grad[~case[-1]].any()


def test_loss_without_a_reference():
    logprobs, old_logprobs, _, advantages, loss_mask = loss_case()
    loss, metrics = grpo.grpo_loss(logprobs, old_logprobs, None, advantages, loss_mask, **CLIP, beta=0.0, aggregate="token")
    assert math.isfinite(loss.item()) and "kl" not in metrics


# the loss pushes a log-prob by -ratio * A, but not further where the ratio has left the clip range on the side of A
@pytest.mark.parametrize("ratio, advantage, gradient", [
    (0.5, 1.0, -0.5), (1.0, 1.0, -1.0), (1.25, 1.0, -1.25), (2.0, 1.0, 0.0),
    (0.5, -1.0, 0.0), (0.75, -1.0, 0.0), (1.0, -1.0, 1.0), (2.0, -1.0, 2.0)])
def test_direction_of_the_gradient(ratio, advantage, gradient):
    logprobs = torch.tensor([[math.log(ratio) - 1.0]], dtype=torch.float64, requires_grad=True)
    loss, metrics = grpo.grpo_loss(logprobs, torch.full((1, 1), -1.0), None, torch.tensor([[advantage]]), torch.ones(1, 1), **CLIP,
                                   beta=0.0, aggregate="sequence")
    loss.backward()
    assert_close(logprobs.grad, [[gradient]], 1e-9)
    assert float(metrics["clip_fraction"]) == (gradient == 0)
    assert float(metrics["ratio_error"]) == pytest.approx(abs(ratio - 1))


def test_kl_pulls_towards_the_reference():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    loss, metrics = grpo.grpo_loss(logprobs, logprobs.detach(), torch.full((1, 3), -2.0), torch.zeros(1, 1), torch.ones(1, 3), **CLIP,
                                   beta=0.5, aggregate="token")
    loss.backward()
    # d k3 / d logprob = 1 - exp(ref - logprob)
    assert_close(logprobs.grad, [[0.5 / 3 * (1 - math.exp(-1)), 0.0, 0.5 / 3 * (1 - math.e)]], 1e-9)
    assert float(metrics["kl"]) == pytest.approx((math.exp(-1) + 0 + (math.e - 2)) / 3)     # k3 = exp(d) - d - 1 at d = -1, 0, 1


def trl_loss(case, beta, loss_type, old_given, constant):
    """TRL's loss of given log-probs; the trainer has only what its loss reads, for a step of one pass on one process."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    logprobs, old_logprobs, ref_logprobs, advantages, loss_mask = case
    trainer = object.__new__(GRPOTrainer)
    vars(trainer).update(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, torch.zeros_like(logprobs), None), beta=beta, loss_type=loss_type,
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token",
        epsilon_low=CLIP["clip_low"], epsilon_high=CLIP["clip_high"], use_vllm=False, model=SimpleNamespace(training=True),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1), current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x), _entropy_bonus_enabled=False,
        max_completion_length=constant, _metrics=defaultdict(lambda: defaultdict(list)))
    ids, mask = torch.zeros(loss_mask.shape, dtype=torch.long), loss_mask.to(logprobs.dtype)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask, "advantages": advantages[:, 0],
              "old_per_token_logps": old_logprobs if old_given else None, "ref_per_token_logps": ref_logprobs, "num_items_in_batch": mask.sum()}
    return trainer._compute_loss(None, inputs), trainer._metrics["train"]


@pytest.mark.parametrize("old_given", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("aggregate, loss_type", [("sequence", "grpo"), ("token", "dapo"), ("token", "bnpo"), (7, "dr_grpo")])
def test_loss_is_that_of_trl(aggregate, loss_type, beta, old_given):
    case = loss_case(seed=1)
    theirs, their_metrics = trl_loss(case, beta, loss_type, old_given, aggregate)
    their_gradient, = torch.autograd.grad(theirs, case[0])
    old_logprobs = case[1] if old_given else case[0].detach()
    ours, metrics = grpo.grpo_loss(case[0], old_logprobs, *case[2:], **CLIP, beta=beta, aggregate=aggregate)
    gradient, = torch.autograd.grad(ours, case[0])
    assert_close(ours.item(), theirs.item(), 1e-12)
    assert_close(gradient, their_gradient, 1e-12)
    assert_close(float(metrics["clip_fraction"]), their_metrics["clip_ratio/region_mean"][0])
    if beta:
        assert_close(float(metrics["kl"]), their_metrics["kl"][0])


# ---- advantages -------------------------------------------------------------------------------------------------------


NAN = float("nan")
# G = 3, momentum 0.25, running mean 4 and std 2.
# (1, 3, 5): mean 3, std 2.  mean = 0.25 * 4 + 0.75 * 3 = 3.25, std = 0.25 * 2 + 0.75 * 2 = 2,    A = (-2.25, -0.25, 1.75) / 2.0001
# (0, 1, 2): mean 1, std 1.  mean = 0.25 * 4 + 0.75 * 1 = 1.75, std = 0.25 * 2 + 0.75 * 1 = 1.25, A = (-1.75, -0.75, 0.25) / 1.2501
# running mean = 0.25 * 4 + 0.75 * (3 + 1) / 2 = 2.5, running std = 0.25 * 2 + 0.75 * (2 + 1) / 2 = 1.625
REWARDS = torch.tensor([[1, 3, 5], [0, 1, 2]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[-2.25 / 2.0001, -0.25 / 2.0001, 1.75 / 2.0001], [-1.75 / 1.2501, -0.75 / 1.2501, 0.25 / 1.2501]], dtype=torch.float64)


def momentum(rewards, share=0.25):
    return grpo.momentum_advantages(torch.as_tensor(rewards, dtype=torch.float64), 4.0, 2.0, share)


def test_momentum_advantages_by_hand():
    advantages, mean, std = momentum(REWARDS)
    assert_close(advantages, ADVANTAGES, 1e-12)
    assert_close([mean, std], [2.5, 1.625], 1e-12)


def test_running_values_go_into_the_next_step():
    _, mean, std = momentum(REWARDS)
    advantages, mean, std = grpo.momentum_advantages(REWARDS[1:], mean, std, 0.5)
    # mean = 0.5 * 2.5 + 0.5 * 1 = 1.75, std = 0.5 * 1.625 + 0.5 * 1 = 1.3125, which with one prompt are also the new running values
    assert_close(advantages, [[-1.75 / 1.3126, -0.75 / 1.3126, 0.25 / 1.3126]], 1e-12)
    assert_close([mean, std], [1.75, 1.3125], 1e-12)


def test_order_of_the_prompts_does_not_matter():
    rewards, order = torch.rand(7, 4, dtype=torch.float64), torch.randperm(7)
    advantages, *running = momentum(rewards)
    permuted, *running_permuted = momentum(rewards[order])
    assert torch.equal(permuted, advantages[order])
    assert_close(running, running_permuted, 1e-14)


def test_momentum_0_is_plain_grpo():
    rewards = torch.rand(6, 8, dtype=torch.float64)
    rewards[0, 2], rewards[1] = NAN, 0.7
    advantages, mean, std = momentum(rewards, 0.0)
    assert torch.equal(advantages, grpo.baseline_advantages(rewards, "group"))
    assert_close([mean, std], [rewards.nanmean(1).mean(), grpo.group_statistics(rewards)[1].mean()], 1e-12)


def test_group_and_batch_baselines_are_those_of_trl():
    from trl.trainer.utils import nanstd

    rewards = torch.rand(6, 8, dtype=torch.float64)
    rewards[0, 2], rewards[3, :7] = NAN, NAN
    centred = rewards - rewards.nanmean(1, keepdim=True)
    assert_close(grpo.baseline_advantages(rewards, "group"), (centred / (nanstd(rewards, dim=1)[:, None] + 1e-4)).nan_to_num(0.0))
    assert_close(grpo.baseline_advantages(rewards, "batch"), (centred / (nanstd(rewards) + 1e-4)).nan_to_num(0.0))
    assert_close(grpo.baseline_advantages(rewards, "none"), centred.nan_to_num(0.0))


def test_baselines_by_hand():
    assert_close(grpo.baseline_advantages(REWARDS, "group"), [[-2 / 2.0001, 0, 2 / 2.0001], [-1 / 1.0001, 0, 1 / 1.0001]], 1e-12)
    assert_close(grpo.baseline_advantages(REWARDS, "none"), [[-2, 0, 2], [-1, 0, 1]], 1e-12)
    std = math.sqrt((1 + 1 + 9 + 4 + 1 + 0) / 5)                   # of 1, 3, 5, 0, 1, 2 about their mean 2
    assert_close(grpo.baseline_advantages(REWARDS, "batch") * (std + 1e-4), [[-2, 0, 2], [-1, 0, 1]], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.7, 0.1, 1 / 3, 0.0])
def test_equal_rewards_have_no_advantage(value, dtype):
    # the mean of seven times 0.7 is not 0.7, and a rounding error over a std of rounding errors is an advantage of full size
    rewards = torch.full((2, 7), value, dtype=dtype)
    assert not grpo.momentum_advantages(rewards, 4.0, 2.0, 0.0)[0].any()
    for baseline in ("group", "none", "batch"):
        assert not grpo.baseline_advantages(rewards, baseline).any()


def test_equal_rewards_are_measured_by_the_momentum():
    # mean = 0.25 * 4 + 0.75 * 2 = 2.5, std = 0.25 * 2 + 0.75 * 0 = 0.5
    assert_close(momentum([[2, 2, 2]])[0], [[-0.5 / 0.5001] * 3], 1e-12)


def test_groups_of_one():
    advantages, mean, std = momentum([[2], [6]])
    assert_close(advantages, [[-0.5 / 0.5001], [0.5 / 0.5001]], 1e-12)      # 6: mean = 0.25 * 4 + 0.75 * 6 = 5.5
    assert_close([mean, std], [0.25 * 4 + 0.75 * 4, 0.25 * 2], 1e-12)
    assert not momentum([[2], [6]], 0.0)[0].any()
    assert not grpo.baseline_advantages(torch.tensor([[2.0], [6.0]]), "group").any()


def test_a_nan_reward_is_left_out():
    advantages, mean, std = momentum([[1, NAN, 3, 5], [0, 1, 2, NAN]])
    assert_close(advantages[0, [0, 2, 3]], ADVANTAGES[0], 1e-12)
    assert_close(advantages[1, :3], ADVANTAGES[1], 1e-12)
    assert advantages[0, 1] == advantages[1, 3] == 0
    assert_close([mean, std], [2.5, 1.625], 1e-12)


def test_one_reward_among_nans_is_a_group_of_one():
    assert_close(momentum([[NAN, 2, NAN]])[0], [[0, -0.5 / 0.5001, 0]], 1e-12)


def test_a_group_of_nans_is_left_out():
    advantages, mean, std = momentum([[1, 3, 5], [NAN, NAN, NAN], [0, 1, 2]])
    assert_close(advantages[[0, 2]], ADVANTAGES, 1e-12)
    assert not advantages[1].any()
    assert_close([mean, std], [2.5, 1.625], 1e-12)
    assert not grpo.baseline_advantages(torch.tensor([[NAN, NAN], [1.0, 3.0]]), "group")[0].any()


# ---- log-probs, masks, micro-batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_completion_logprobs_are_those_of_the_full_logits(monkeypatch, family, temperature, chunk):
    monkeypatch.setattr(grpo, "HEAD_CHUNK", chunk)
    model = small_model(family).train()
    samples = list(zip(random_ids([12, 5, 9, 3]), [4, 1, 8, 2]))
    input_ids, loss_mask = grpo.collate(samples, "cpu")
    logprobs, entropy = grpo.completion_logprobs(model, input_ids, loss_mask, temperature)
    weights = torch.linspace(-1, 1, len(logprobs))
    (logprobs * weights).sum().backward()
    gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected, entropies = [], []
    for ids, prompt in samples:                              # each sequence alone: no padding that could matter
        distribution = torch.log_softmax(model(torch.tensor([ids])).logits[0] / temperature, -1)
        expected += [distribution[place - 1, ids[place]] for place in range(prompt, len(ids))]
        entropies += torch.distributions.Categorical(logits=distribution[prompt - 1:-1].detach()).entropy().tolist()
    (torch.stack(expected) * weights).sum().backward()
    assert len(logprobs) == 8 + 4 + 1 + 1
    assert_close(logprobs.detach(), torch.stack(expected).detach(), 1e-5)
    assert_close(entropy, entropies, 1e-5)
    for name, parameter in model.named_parameters():
        assert_close(gradient[name], parameter.grad, 1e-4)


def test_collate_masks_the_completion_and_nothing_else():
    # prompts of 2, 1 and 3 tokens; id 0 is both EOS and the filling, and an EOS is trained
    input_ids, loss_mask = grpo.collate([([5, 6, 7, 0], 2), ([5, 0], 1), ([1, 0, 3, 4, 8, 0], 3)], "cpu")
    assert input_ids.tolist() == [ids + [0, 0] for ids in ([5, 6, 7, 0, 0, 0], [5, 0, 0, 0, 0, 0], [1, 0, 3, 4, 8, 0])]        # 8: see there
    assert [[i for i, on in enumerate(row) if on] for row in loss_mask.tolist()] == [[1, 2], [0], [2, 3, 4]] and loss_mask.shape == (3, 7)
    assert input_ids[:, 1:][loss_mask].tolist() == [7, 0, 0, 4, 8, 0]
    assert [grpo.collate([([1] * length, 1)], "cpu")[0].shape[1] for length in (1, 8, 9)] == [8, 8, 16]


def test_spread_puts_values_back_in_their_places():
    loss_mask = torch.tensor([[False, True, True], [True, False, False]])
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    placed = grpo.spread(values, loss_mask)
    assert placed.tolist() == [[0, 1, 2], [3, 0, 0]]
    (placed * torch.tensor([[9.0, 1, 2], [3, 9, 9]])).sum().backward()
    assert values.grad.tolist() == [1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_micro_batches_hold_every_sequence_once_within_the_budget(seed):
    generator = random.Random(seed)
    lengths = [generator.randrange(1, 120) for _ in range(generator.randrange(1, 60))]
    for budget in (1, 64, 400, 10**6):
        batches = grpo.micro_batches(lengths, budget)
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        assert all(batch and (len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget) for batch in batches)
    assert len(grpo.micro_batches(lengths, 10**6)) == 1
    assert len(grpo.micro_batches(lengths, 1)) == len(lengths)


def update_gradient(model, old, ref, samples, advantages, aggregate, budget):
    """Loss and gradient of one step, by micro-batches with the shares of the loop."""
    model.zero_grad()
    made, tokens = 0.0, sum(len(ids) - prompt for ids, prompt in samples)
    for indices in grpo.micro_batches([len(ids) for ids, _ in samples], budget):
        input_ids, loss_mask = grpo.collate([samples[i] for i in indices], "cpu")
        with torch.no_grad():
            fixed = [grpo.spread(grpo.completion_logprobs(other, input_ids, loss_mask, 0.7)[0], loss_mask) for other in (old, ref)]
        logprobs = grpo.spread(grpo.completion_logprobs(model, input_ids, loss_mask, 0.7)[0], loss_mask)
        loss, _ = grpo.grpo_loss(logprobs, *fixed, advantages[indices][:, None], loss_mask, **CLIP, beta=0.04, aggregate=aggregate)
        loss = loss * (int(loss_mask.sum()) / tokens if aggregate == "token" else len(indices) / len(samples))
        loss.backward()
        made += float(loss.detach())
    return made, torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()])


def nearby(model, scale):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn_like(parameter)
    return other


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_the_sizes_of_micro_batch_and_chunk_do_not_change_the_update(monkeypatch, aggregate, onednn):
    model = small_model()
    if onednn:
        grpo.use_onednn(model)
    for parameter in model.parameters():        # as wide as in a real model: wider weights blow up the rounding of fp32
        parameter.data *= 0.1 if parameter.ndim == 2 else 1
    old, ref = nearby(model, 0.005), nearby(model, 0.01)
    samples, advantages = list(zip(random_ids([20, 4, 11, 7, 15, 5]), [3, 2, 9, 1, 4, 4])), torch.linspace(-1, 1.5, 6)
    loss, gradient = update_gradient(model, old, ref, samples, advantages, aggregate, 10**6)
    assert float(gradient.norm()) > 0.01
    for budget, chunk in ((1, 2048), (25, 2048), (40, 5), (10**6, 3)):
        monkeypatch.setattr(grpo, "HEAD_CHUNK", chunk)
        other_loss, other = update_gradient(model, old, ref, samples, advantages, aggregate, budget)
        assert_close(other_loss, loss, 1e-6)
        assert float((other - gradient).norm()) < 1e-6 * float(gradient.norm())


# ---- 4-bit, LoRA, reference -------------------------------------------------------------------------------------------


CASES = ["all weights", "SFT adapter", "new adapter"]
WORDS = "1 2 3 4 5 6 7 8 9 10 + - * / ( ) = \n <think> </think> <answer> </answer>"


@pytest.fixture(scope="module")
def policy_folders(tmp_path_factory):
    """Folders of a model of each family with the word tokenizer, as hub models or sft.py would leave them."""
    folders, tokenizer = {}, sft.tiny_tokenizer([WORDS])
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family)
        small_model(family, vocabulary=len(tokenizer)).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


def load(monkeypatch, folder, trainable=True, **constants):
    for name, value in {"BF16": 0, "LORA_RANK": 4, "LORA_ALPHA": 8, "GRADIENT_CHECKPOINTING": 0, **constants}.items():
        monkeypatch.setattr(grpo, name, value)
    model, tokenizer = grpo.load_model(str(folder), trainable)
    return model.train(), tokenizer


def move_adapter(model, scale=0.05):
    """A new LoRA adapter does nothing, and half of its weights have no gradient; this one does something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter += scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))


def policy_samples(vocabulary):
    samples = list(zip(random_ids([14, 6, 9, 11], vocabulary=vocabulary), [4, 2, 8, 3]))
    return grpo.collate(samples, "cpu")


def policy_gradient(model, input_ids, loss_mask):
    model.zero_grad()
    logprobs, _ = grpo.completion_logprobs(model, input_ids, loss_mask, 0.7)
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_rollout_does_not_change_the_gradient_through_4_bits(monkeypatch, policy_folders, family):
    # with AVX512-BF16, a forward pass in eval mode repacks 4-bit weights into a form that has no gradient, or a wrong one
    model, tokenizer = load(monkeypatch, policy_folders[family], LOAD_4BIT=1)
    move_adapter(model)
    batch = policy_samples(len(tokenizer))
    before = policy_gradient(model, *batch)
    assert before and all("lora_" in name and gradient.any() for name, gradient in before.items())
    roll(model, random_ids([5, 3], vocabulary=len(tokenizer)), new=4, temperature=1.0)
    after = policy_gradient(model, *batch)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("checkpointing", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", ["all", "adapter", "adapter beside 4 bits"])
def test_products_by_onednn_have_the_same_gradient(monkeypatch, policy_folders, weights, family, checkpointing):
    model, tokenizer = load(monkeypatch, policy_folders[family], LOAD_4BIT=int("4" in weights), LORA_RANK=0 if weights == "all" else 4,
                            GRADIENT_CHECKPOINTING=checkpointing)
    move_adapter(model)
    batch, calls, product = policy_samples(len(tokenizer)), [], grpo.product
    before = policy_gradient(model, *batch)
    monkeypatch.setattr(grpo, "product", lambda *given: (calls.append(1), product(*given))[1])
    grpo.use_onednn(model)
    after = policy_gradient(model, *batch)
    assert len(calls) > 2 * 7 or not torch.backends.mkldnn.is_available() or torch.cuda.is_available()
    assert before and all(float((after[name] - before[name]).norm()) <= 1e-5 * float(before[name].norm()) for name in before)
    assert all(gradient.stride() == dict(model.named_parameters())[name].stride() for name, gradient in after.items())


def test_products_by_onednn_leave_bf16_and_copies_alone():
    model = small_model()
    batch = grpo.collate(list(zip(random_ids([14, 6, 9, 11]), [4, 2, 8, 3])), "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        before = grpo.completion_logprobs(model, *batch)[0]
    grpo.use_onednn(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grpo.completion_logprobs(model, *batch)[0], before)
    other, before = copy.deepcopy(model), grpo.completion_logprobs(model, *batch)[0]
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.zero_()
    assert torch.equal(grpo.completion_logprobs(model, *batch)[0], before)
    assert not torch.allclose(grpo.completion_logprobs(other, *batch)[0], before)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_weights_in_4_bits_have_no_repacked_form(monkeypatch, policy_folders, family):
    # the same where the processor lacks these instructions: what asks for the other form is off in every module that has it
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model, _ = load(monkeypatch, policy_folders[family], LOAD_4BIT=1)
    switches = [module.support_avx512bf16_for_cpu for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(switches) == 2 * 7 and not any(switches)


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_the_first_update_after_a_rollout_is_on_policy(monkeypatch, policy_folders, checkpointing):
    model, tokenizer = load(monkeypatch, policy_folders["qwen2"], LOAD_4BIT=1, GRADIENT_CHECKPOINTING=checkpointing)
    move_adapter(model)
    prompts = random_ids([5, 3, 8, 3], vocabulary=len(tokenizer))
    completions = roll(model, prompts, new=12, temperature=0.7)
    input_ids, loss_mask = grpo.collate([(prompt + ids, len(prompt)) for prompt, ids in zip(prompts, completions)], "cpu")
    with torch.no_grad():
        old_logprobs = grpo.spread(grpo.completion_logprobs(model, input_ids, loss_mask, 0.7)[0], loss_mask)
    logprobs = grpo.spread(grpo.completion_logprobs(model, input_ids, loss_mask, 0.7)[0], loss_mask)
    loss, metrics = grpo.grpo_loss(logprobs, old_logprobs, None, torch.tensor([[1.0], [-1.0], [0.5], [0.0]]), loss_mask, **CLIP, beta=0.0,
                                   aggregate="sequence")
    loss.backward()
    assert float(metrics["ratio_error"]) < 1e-4 and float(metrics["clip_fraction"]) == 0
    assert any(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


def test_what_was_sampled_is_what_is_scored(monkeypatch, policy_folders):
    # greedy tokens of the rollout, which has a cache and left padding, are the likeliest in the update, which has neither
    model, tokenizer = load(monkeypatch, policy_folders["qwen3"], LOAD_4BIT=1)
    move_adapter(model)
    prompts = random_ids([5, 3, 8], vocabulary=len(tokenizer))
    for prompt, ids in zip(prompts, roll(model, prompts, new=12)):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
        assert logits.argmax(-1).tolist() == ids


def with_reference(monkeypatch, case, folder, tmp_path):
    """A policy and its frozen copy, as the loop makes them: all weights, an SFT adapter that goes on, or a new adapter."""
    if case == "all weights":
        model, tokenizer = load(monkeypatch, folder, LOAD_4BIT=0, LORA_RANK=0)
        return model, copy.deepcopy(model).requires_grad_(False).eval(), tokenizer
    model, tokenizer = load(monkeypatch, folder, LOAD_4BIT=1)
    if case == "SFT adapter":
        move_adapter(model)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        model, tokenizer = load(monkeypatch, tmp_path, LOAD_4BIT=1)
        model.load_adapter(str(tmp_path), adapter_name="reference", is_trainable=False)
    return model.train(), None, tokenizer


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_first_policy_and_stays_it(monkeypatch, policy_folders, tmp_path, case):
    model, frozen, tokenizer = with_reference(monkeypatch, case, policy_folders["qwen2"], tmp_path)
    input_ids, loss_mask = policy_samples(len(tokenizer))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    advantages = torch.tensor([[1.0], [-1.0], [0.5], [-0.5]])

    def reference_logprobs():
        with torch.no_grad(), grpo.reference_policy(model, frozen) as reference:
            return grpo.spread(grpo.completion_logprobs(reference, input_ids, loss_mask, 0.7)[0], loss_mask)

    first = reference_logprobs()
    if case == "SFT adapter":
        with torch.no_grad(), model.disable_adapter():
            base = grpo.spread(grpo.completion_logprobs(model, input_ids, loss_mask, 0.7)[0], loss_mask)
        assert float((first - base).abs().max()) > 0.01, "the reference is the SFT policy, not its base"
    for step in range(3):
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
        assert model.training
        ref_logprobs = reference_logprobs()
        logprobs = grpo.spread(grpo.completion_logprobs(model, input_ids, loss_mask, 0.7)[0], loss_mask)
        loss, metrics = grpo.grpo_loss(logprobs, logprobs.detach(), ref_logprobs, advantages, loss_mask, **CLIP, beta=0.1, aggregate="token")
        assert torch.equal(ref_logprobs, first)
        assert float(metrics["kl"]) == 0 if step == 0 else float(metrics["kl"]) > 1e-4
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_reference_policy_is_left_after_an_error(monkeypatch, policy_folders, tmp_path):
    model, frozen, tokenizer = with_reference(monkeypatch, "SFT adapter", policy_folders["qwen2"], tmp_path)
    with pytest.raises(KeyError), grpo.reference_policy(model, frozen):
        raise KeyError
    assert model.active_adapter == "default"
    assert all(gradient.shape for gradient in policy_gradient(model, *policy_samples(len(tokenizer))).values())


# ---- the loop ---------------------------------------------------------------------------------------------------------


def run_loop(monkeypatch, folder, start, score=None, **constants):
    """Log of a short run of the whole script, with a reward that differs among the completions of a random policy."""
    folder.mkdir()
    for name, last in (("train", 4), ("val", 5)):
        rows = [{"prompt": f"{n} 2 3 {last}", "numbers": [n, 2, 3, last]} for n in range(1, 4)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def by_words(task, text, row, truncated=False):
        words = len(text.split())
        return {"reward": words % 7 / 7, "correct": float(words % 7 > 3), "answered": float(not truncated)}

    monkeypatch.setattr(reward, "score", score or by_words)
    monkeypatch.setattr(grpo, "catch_signals", list)         # those of pytest stay
    settings = {"SFT": start, "DATA": folder, "OUT": folder, "THREADS": 1, "BF16": 0, "STEPS": 1, "EVAL_EVERY": 1, "PROMPTS_PER_STEP": 3,
                "GROUP_SIZE": 4, "MAX_NEW_TOKENS": 12, "TEMPERATURE": 1.5, "UPDATES_PER_ROLLOUT": 2, "WARMUP": 0, "LR": 1e-3, **constants}
    for scope in (grpo, reward):                             # the command line sets constants: put them back afterwards
        for name in [name for name in vars(scope) if name.isupper()]:
            monkeypatch.setattr(scope, name, getattr(scope, name))
    monkeypatch.setattr("sys.argv", ["grpo.py", *(f"--{name.lower()}={value}" for name, value in settings.items())])
    grpo.main()
    return [json.loads(line) for line in (folder / "grpo/log.jsonl").read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_the_loop_does_the_same_with_any_micro_batch_size(monkeypatch, policy_folders, tmp_path, aggregate):
    options = {"AGGREGATE": aggregate, "LOAD_4BIT": 0, "LORA_RANK": 0, "GRADIENT_CHECKPOINTING": 0}
    logs = [run_loop(monkeypatch, tmp_path / str(tokens), policy_folders["qwen2"], MICRO_BATCH_TOKENS=tokens, **options)[1]
            for tokens in (1, 60, 4096)]
    assert logs[0]["grad_norm"] > 0.01 and logs[0]["reward_std"] > 0 and logs[0]["ratio_error"] > 0
    for name in ("loss", "grad_norm", "kl", "entropy", "clip_fraction", "ratio_error", "reward", "val_reward", "val_tokens"):
        assert_close([log[name] for log in logs], [logs[0][name]] * 3, 1e-4)


class Scarce(torch.autograd.Function):
    """Runs out of memory where a tensor has more rows than `most`, forwards or backwards."""

    @staticmethod
    def forward(ctx, values, most, place):
        ctx.most, ctx.place = most, place
        if place == "forward" and len(values) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.place == "backward" and len(gradient) > ctx.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return gradient, None, None


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_short_memory_halves_the_micro_batches_and_changes_nothing_else(monkeypatch, policy_folders, tmp_path, capsys, place):
    # the wall stands in the first layer: backwards, the gradients of all that lies behind it have been added up when it is met
    options = {"LOAD_4BIT": 0, "LORA_RANK": 0, "GRADIENT_CHECKPOINTING": 0, "STEPS": 2, "UPDATES_PER_ROLLOUT": 2}
    expected = run_loop(monkeypatch, tmp_path / "plenty", policy_folders["qwen2"], **options)
    forward, calls = Qwen2MLP.forward, []

    def scarce(self, values):
        calls.append(values.shape)
        return forward(self, Scarce.apply(values, 4 if self.training or torch.is_grad_enabled() else 12, place))

    monkeypatch.setattr(Qwen2MLP, "forward", scarce)
    found = run_loop(monkeypatch, tmp_path / "scarce", policy_folders["qwen2"], **options)
    for name in ("loss", "grad_norm", "kl", "entropy", "clip_fraction", "ratio_error", "reward", "val_reward", "val_tokens"):
        assert_close([log[name] for log in found[1:] if name in log], [log[name] for log in expected[1:] if name in log], 1e-4)
    told = [line for line in capsys.readouterr().out.split("\n") if "memory ran out" in line]
    assert 1 <= len(told) <= 2 and "MICRO_BATCH_TOKENS=" in told[0]
    assert any(len(shape) == 3 and shape[0] == 12 for shape in calls)


def test_a_sequence_that_does_not_fit_is_an_error_that_says_what_to_do(monkeypatch):
    def work(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(grpo, "MICRO_BATCH_TOKENS", 4096)
    batch = {"input_ids": torch.zeros(5, 7), "ref_logprobs": None}
    with pytest.raises(SystemExit, match="MAX_NEW_TOKENS.*HEAD_CHUNK=.*GRADIENT_CHECKPOINTING=1"):
        grpo.each_micro_batch([batch], work)
    with pytest.raises(RuntimeError, match="another"):
        grpo.each_micro_batch([batch], lambda batch: (_ for _ in ()).throw(RuntimeError("another fault")))


def test_a_rollout_that_runs_out_of_memory_goes_on_with_fewer_rows(monkeypatch, capsys):
    sizes, whole = [], grpo.rollout

    def scarce(model, prompts, **options):
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, prompts, **options)

    tokenizer = SimpleNamespace(decode=lambda ids, **options: "text")
    rows = [{"prompt": "1 2 3 4", "numbers": [1, 2, 3, 4]}] * 10
    for name, value in {"rollout": scarce, "ROLLOUT_ROWS": 10, "ROLLOUT_COPY": 1, "BF16": 0, "TASK": "game24", "MAX_NEW_TOKENS": 6}.items():
        monkeypatch.setattr(grpo, name, value)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    made = [grpo.generate(small_model(), rows, random_ids([3] * 10), [0], tokenizer, generator, 1.0, 1.0) for generator in generators]
    assert sizes == [10, 10, 5, 3, 3, 3, 1, 3, 3, 3, 1] and made[0] == made[1] and len(made[0]) == 10
    told = capsys.readouterr().out
    assert told.count("memory ran out") == 3 and grpo.ROLLOUT_COPY == 0 and "ROLLOUT_COPY=0" in told.split("\n")[0]


def test_an_evaluation_that_runs_out_of_memory_gives_up_the_copy_first(monkeypatch, tmp_path, capsys):
    whole, tokenizer = evaluation.rollout, sft.tiny_tokenizer([WORDS])
    model, rows = small_model(vocabulary=len(tokenizer)), [{"prompt": "1 2 3 4", "numbers": [1, 2, 3, 4]}] * 3

    def scarce(model, prompts, **options):
        if evaluation.ROLLOUT_COPY:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, prompts, **options)

    for name, value in {"rollout": scarce, "ROLLOUT_COPY": 1, "SAMPLES": 2, "MAX_NEW_TOKENS": 5, "BF16": 0, "TASK": "game24"}.items():
        monkeypatch.setattr(evaluation, name, value)
    made = evaluation.complete(model, tokenizer, rows, tmp_path / "made.jsonl", "policy")
    assert len(made) == 9 and evaluation.ROLLOUT_COPY == 0 and capsys.readouterr().out.count("ROLLOUT_COPY=0") == 1
    monkeypatch.setattr(evaluation, "rollout", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(SystemExit, match="3 completions at a time: lower EVAL_BATCH_TOKENS"):
        evaluation.complete(model, tokenizer, rows, tmp_path / "again.jsonl", "policy")


@pytest.mark.parametrize("case", CASES)
def test_the_loop_begins_on_policy_and_at_kl_0(monkeypatch, policy_folders, tmp_path, case):
    start = policy_folders["qwen2"]
    if case == "SFT adapter":
        with_reference(monkeypatch, case, start, tmp_path)
        start = tmp_path
    weights = {"LOAD_4BIT": 0, "LORA_RANK": 0} if case == "all weights" else {"LOAD_4BIT": 1, "LORA_RANK": 4}
    _, first, second = run_loop(monkeypatch, tmp_path / "run", start, STEPS=2, EVAL_EVERY=2, UPDATES_PER_ROLLOUT=1, **weights)
    assert first["kl"] == 0 and second["kl"] > 0
    assert first["ratio_error"] == second["ratio_error"] == 0 and first["grad_norm"] > 0
    assert max(first["sampler_error"], second["sampler_error"]) < (0.02 if torch.cuda.is_available() else 1e-4)


def test_rewards_may_be_below_0(monkeypatch, policy_folders, tmp_path):
    score = {"reward": -5.0, "correct": 0.0, "answered": 1.0}
    scores = iter([score, {**score, "places": 1.0}] * 1000)
    log = run_loop(monkeypatch, tmp_path / "run", policy_folders["qwen2"], LOAD_4BIT=0, LORA_RANK=0, BEST_BY="reward", PATIENCE=1, STEPS=3,
                   score=lambda *_, **__: next(scores))
    assert [entry["val_reward"] for entry in log] == [-5.0] * 4
    assert log[1]["places"] == 1.0          # of those that have it, and not lost where the first has not
    assert json.loads((tmp_path / "run/grpo/summary.json").read_text(encoding="utf-8"))["best_step"] == 0


def test_sft_evaluates_without_gradients(monkeypatch, policy_folders):
    # which would hold the activations of the whole val split
    model, tokenizer = load(monkeypatch, policy_folders["qwen2"], LOAD_4BIT=0, LORA_RANK=0)
    logprobs, grads = sft.completion_logprobs, []
    monkeypatch.setattr(sft, "completion_logprobs", lambda *given: (grads.append(torch.is_grad_enabled()), logprobs(*given))[1])
    for name, value in {"BF16": 0, "MAX_NEW_TOKENS": 4, "TASK": "game24"}.items():
        monkeypatch.setattr(sft, name, value)
    rows = [{"prompt": "1 2 3 4", "numbers": [1, 2, 3, 4]}]
    assert set(sft.evaluate(model, tokenizer, [([1, 2, 3, 4], 2)], rows)) == {"val_loss", "val_accuracy", "val_unfinished"}
    assert grads == [False] and model.training


@pytest.mark.parametrize("error, expected", [
    (torch.OutOfMemoryError("x"), True), (RuntimeError("CUDA error: out of memory"), True), (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True), (RuntimeError("shapes do not match"), False), (None, False)])
def test_words_of_short_memory(error, expected):
    assert grpo.no_memory(error) == expected
