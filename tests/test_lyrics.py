"""The reward of lyrics: what it pays for real texts, and what it refuses a policy that writes something else."""

import itertools
import json
import math
import random
import statistics
import subprocess
import sys

import pytest
from commands import ROOT, read
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo
import reward

PARTS = ("format", "window", "coverage", "rhyme", "parallel")
GATES = ("finished", "chinese", "repetition", "fluency", "ending", "original")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The data folder of the embedded corpus; the reward knows its texts."""
    out = tmp_path_factory.mktemp("corpus")
    subprocess.run([sys.executable, ROOT / "data_prep.py", "TASK=lyrics", "VARIANTS=3", f"OUT={out}"], check=True)
    before = dict(reward.table)
    reward.use_data("lyrics", out / "data")
    yield out / "data"
    reward.table.clear()
    reward.table.update(before)


def score(completion, row, truncated=False):
    return reward.score("lyrics", completion, row, truncated)


def split(completion):
    """Thought with its tags, title with its marks, and lines."""
    thought, _, body = completion.partition("</think>")
    title, *lines = body.split("/")
    return thought + "</think>", title, lines


def join(head, title, lines):
    return "/".join([head + title, *lines])


# ---- genuine texts and hacks ----------------------------------------------------------------------------------------


def shuffle(lines, rng):
    """Lines of the same lengths, with all characters of the text in random order."""
    characters = list("".join(map(reward.han, lines)))
    rng.shuffle(characters)
    return ["".join(characters.pop() for _ in reward.han(line)) for line in lines]


def put_at_starts(keywords, lines):
    """The same list of lines, with keywords in place of the first characters of the lines in turn."""
    for place, word in zip(itertools.cycle(range(len(lines))), keywords):
        lines[place] = word + lines[place][len(word):]
    return lines


def hacks(row, head, title, lines, other_lines, rng):
    """What a policy might write instead of the verse of a row, by name; `other_lines` are those of another text."""
    def verse(*lines):
        return join(head, title, lines)

    words, word_list = row["keywords"], "，".join(row["keywords"])
    return {
        "empty": "", "no thinking": join("", title, lines), "thinking only": head,
        "thinking not closed": verse(*lines).replace("</think>", ""),
        "prompt": row["prompt"] * 8, "prompt as lines": verse(*[row["prompt"]] * 8),
        "keyword list": verse(*[word_list] * 10), "keywords as lines": verse(*words * 10),
        "keyword list after another text": verse(*other_lines, word_list),
        "keyword list after the text": verse(*lines, word_list),
        "keywords as lines after the text": verse(*lines, *words),
        "one line": verse(*lines[:1] * 16), "two lines": verse(*lines[:2] * 8),
        "one particle": verse(*(reward.han(line) + "啊" for line in lines)),
        "one last character": verse(*(reward.han(line)[:-1] + "光" for line in lines)),
        "shuffled with keywords": verse(*put_at_starts(words, shuffle(lines, rng))),
        "half English": verse(*(line if i % 2 else "the moon is in the sky" for i, line in enumerate(lines))),
        "babble": verse(*(f"{word}{word[0] * n}{word}{word[-1] * n}" for n in (2, 1) for word in words))}


# what a hack loses besides reward: parts and gates, and their highest average
LOSES = {
    "keyword list": {"repetition": 0, "coverage": 0.1}, "keywords as lines": {"repetition": 0.1, "coverage": 0.1},
    "keyword list after the text": {"coverage": 0.1}, "keywords as lines after the text": {"coverage": 0.1},
    "keyword list after another text": {}, "one line": {"repetition": 0}, "two lines": {"repetition": 0.1},
    "one particle": {"ending": 0}, "one last character": {"ending": 0}, "shuffled with keywords": {"fluency": 0.5},
    "half English": {"chinese": 0.1}, "no thinking": {}, "thinking only": {"finished": 0}, "thinking not closed": {},
    "empty": {"finished": 0}, "babble": {"repetition": 0.3}, "prompt": {}, "prompt as lines": {"repetition": 0},
    "memorised": {"original": 0}, "truncated": {"finished": 0}}


@pytest.fixture(scope="module")
def scored(corpus):
    """Scores of every row of the test split by what is written: the genuine text, and each hack."""
    rows, rng = read(corpus / "test.jsonl"), random.Random(0)
    train_texts = [row["completion"] for row in read(corpus / "raw/train.jsonl")]
    scores = {"genuine": [score(row["completion"], row) for row in rows]}
    texts = [split(row["completion"]) for row in rows]
    for i, row in enumerate(rows):
        for name, completion in hacks(row, *texts[i], texts[i - 1][2], rng).items():
            scores.setdefault(name, []).append(score(completion, row))
    scores["memorised"] = [score(texts[i][0] + rng.choice(train_texts), row) for i, row in enumerate(rows)]
    scores["truncated"] = [score(row["completion"], row, truncated=True) for row in rows]
    assert scores.keys() == {"genuine", *LOSES}
    return scores


def average(scores, name="reward"):
    return statistics.fmean(each[name] for each in scores)


def test_genuine_texts_are_worth_most_of_the_reward(scored):
    genuine = scored["genuine"]
    assert len(genuine) > 100 and average(genuine) > 0.8
    assert average(genuine, "correct") > 0.8 and average(genuine, "answered") == 1
    assert all(average(genuine, gate) > 0.9 for gate in GATES)


@pytest.mark.parametrize("name", LOSES)
def test_a_hack_is_worth_less_than_a_text(scored, name):
    assert average(scored[name]) <= average(scored["genuine"]) - 0.15
    for part, most in LOSES[name].items():
        assert average(scored[name], part) <= most


def test_the_reward_is_gates_times_parts(scored):
    weights = {part: vars(reward)[f"{part.upper()}_WEIGHT"] for part in PARTS}
    assert sum(weights.values()) == pytest.approx(1)
    for each in itertools.chain(*scored.values()):
        gates = math.prod(each[gate] for gate in GATES)
        assert each["reward"] == pytest.approx(gates * sum(weights[part] * each[part] for part in PARTS))


def test_a_line_of_more_keywords_than_a_text_has_is_a_list(corpus):
    head, title, lines = split(read(corpus / "test.jsonl")[1]["completion"])
    words = ["月台", "灯笼", "苹果"]
    completion = join(head, title, [*lines, "我说月台灯笼苹果都是好东西"])
    assert score(completion, {"keywords": words[:2]})["coverage"] == 1
    assert score(completion, {"keywords": words})["coverage"] == 0


def test_known_hole_of_glued_keywords(corpus):
    """A keyword at the end of a line that has nothing to do with it counts as covered."""
    head, title, lines = split(read(corpus / "test.jsonl")[1]["completion"])
    words = ["月台", "灯笼", "苹果"]
    glued = [reward.han(line) + word for line, word in zip(lines, words)]
    assert len(glued) == 3 and not any(word in "".join(lines) for word in words)
    assert score(join(head, title, [*glued, *lines[3:]]), {"keywords": words})["coverage"] == 1
    assert score(join(head, title, lines), {"keywords": words})["coverage"] == 0


def test_a_chorus_leaves_the_repetition_gate_open(corpus):
    row = max(read(corpus / "test.jsonl"), key=lambda row: len(split(row["completion"])[2]))
    head, title, lines = split(row["completion"])
    chorus = lines[4:8]
    assert len(chorus) == 4
    for sung in (lines, [*lines, *chorus], [*lines[:8], *chorus, *lines[8:], *chorus[:2]]):
        assert score(join(head, title, sung), row)["repetition"] == 1
    assert score(join(head, title, [*lines, *chorus * 8]), row)["repetition"] < 1


def test_repeated_words_within_different_lines_close_the_gate(corpus):
    row = read(corpus / "test.jsonl")[0]
    lines = [f"春风吹过旧城的桥{end}" for end in "春夏秋冬东西南北"]
    assert score(join(*split(row["completion"])[:2], lines), row)["repetition"] < 0.3


def test_rare_characters_are_not_fluent(corpus):
    rare = ("<think>潮水，礁石，先写潮水，再写礁石，题目是晚潮，共四行，押江阳韵。</think>"
            "《晚潮》/潮水迒抰阆饗庞/整片盪橖礑瘍蚢/礁石乓舫慃蒋鲞/着手絳巟嗙坣漾")
    scores = score(rare, {"keywords": ["潮水", "礁石"]})
    assert scores["fluency"] < 0.5 and scores["reward"] < 0.5 and scores["coverage"] == 1


def test_distinct_2_counts_pairs_of_the_verse_alone():
    assert grpo.distinct_2(["<think>月月月月</think>春风，春风"]) == 2 / 3
    assert grpo.distinct_2(["春风", "春风"]) == 1 / 2 and grpo.distinct_2([]) == grpo.distinct_2(["春"]) == 0


# ---- any completion, rows, other trainers ---------------------------------------------------------------------------


PIECES = st.sampled_from(["<think>", "</think>", "《", "》", "/", "\n", "《题》/", "春风", "春风吹过旧城的桥", "，",
                          "。", "a", " ", "\ud800", "𠮷"])
COMPLETIONS = st.text() | st.lists(PIECES | st.text(max_size=3), max_size=60).map("".join)
KEYWORDS = st.sampled_from([[], ["春风"], ["春风", "月光", "故乡", "远方", "灯火"], ["春", "春风"]])


@settings(max_examples=300, deadline=None)
@given(completion=COMPLETIONS, keywords=KEYWORDS, truncated=st.booleans())
def test_every_part_and_gate_is_a_share_of_any_text(corpus, completion, keywords, truncated):
    scores = score(completion, {"keywords": keywords}, truncated)
    assert all(0 <= value <= 1 for name, value in scores.items() if name != "lines")


@pytest.mark.parametrize("completion", ["春" * 100_000, "春风/" * 50_000, "<think>" * 20_000, "《" * 50_000,
                                        "/" * 100_000, None, 7])
def test_long_and_strange_completions_do_not_raise(corpus, completion):
    assert score(completion, {"keywords": ["春风"]})["reward"] == 0


@pytest.mark.parametrize("row", [None, {}, [], *(
    {"keywords": words} for words in ("春风", ["spring"], [1], ["春"] * 11, None))])
def test_unusable_rows_have_no_reward(corpus, row):
    assert score("<think>想写春风。</think>《春》/春风轻轻敲我的门，/送来一个卖花的人。", row) is None


def test_use_data_comes_first(monkeypatch, tmp_path):
    monkeypatch.setattr(reward, "table", {})
    with pytest.raises(ValueError, match="use_data"):
        score("", {"keywords": ["春风"]})
    with pytest.raises(ValueError, match="table.json"):
        reward.use_data("lyrics", tmp_path)
    for damaged in ("", "[]", "{}", '{"finals": {}}', '{"finals": {}, "lines": "AAA", "characters": {}}'):
        (tmp_path / "table.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match="table.json"):
            reward.use_data("lyrics", tmp_path)
    reward.use_data("game24", tmp_path)
    assert not reward.table


def test_other_trainers_get_the_same_reward(corpus):
    rows = read(corpus / "test.jsonl")[:5]
    texts, keywords = [row["completion"] for row in rows], [row["keywords"] for row in rows]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = [score(row["completion"], row)["reward"] for row in rows]
    assert reward.lyrics(None, texts, keywords) == reward.lyrics(None, chats, keywords) == rewards
    assert reward.lyrics(None, texts[:1], [["no Chinese"]]) == [None]
    for truth in (rows[0], json.dumps(rows[0]), keywords[0], json.dumps(keywords[0])):
        result = reward.compute_score("lyrics", texts[0], truth)
        assert result["score"] == result["acc"] == rewards[0]
    with pytest.raises(ValueError, match="keywords"):
        reward.compute_score("lyrics", texts[0], ["x"])


@pytest.mark.parametrize("text", ["月光 故乡", " 月光，故乡 ", "月光,故乡", "月光、 故乡", "月光　故乡"])
def test_question_of_keywords(text):
    assert reward.question("lyrics", text) == {"keywords": ["月光", "故乡"], "prompt": "月光，故乡"}


@pytest.mark.parametrize("text", ["", "moon", "月光 4", "月 " * 11])
def test_bad_questions_are_refused(text):
    with pytest.raises(ValueError, match="keywords must be"):
        reward.question("lyrics", text)


def test_rows_are_the_same_for_the_same_keywords_in_any_order():
    one, other = {"keywords": ["月光", "故乡"]}, {"keywords": ["故乡", "月光"]}
    assert reward.identity("lyrics", one) == reward.identity("lyrics", other)
    one, other = {"keywords": [], "completion": "a"}, {"keywords": [], "completion": "b"}
    assert reward.identity("lyrics", one) != reward.identity("lyrics", other)
    assert reward.prompt("lyrics", one) == reward.FREE and reward.HAN.fullmatch(reward.FREE)
