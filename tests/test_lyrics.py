"""The reward of lyrics: what it pays for real texts, and what it refuses a policy that writes something else."""

import itertools
import json
import math
import random
from collections import defaultdict
from statistics import fmean

import pytest
from commands import read
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo
import reward

WEIGHTS = {"format": 0.25, "window": 0.15, "coverage": 0.30, "rhyme": 0.20, "parallel": 0.10}
GATES = ("finished", "chinese", "repetition", "fluency", "ending", "original")


def score(completion, row, truncated=False):
    return reward.score("lyrics", completion, row, truncated)


def split(completion):
    """Thought with its tags and title with its marks, and lines."""
    thought, _, body = completion.partition("</think>")
    title, *lines = body.split("/")
    return f"{thought}</think>{title}", lines


def shuffled(words, lines, rng):
    """Lines of the same lengths with all characters in random order, and a keyword at the start of each."""
    characters = list("".join(map(reward.han, lines)))
    rng.shuffle(characters)
    for word, line in zip(itertools.cycle(words), lines):
        yield word + "".join(characters.pop() for _ in reward.han(line)[len(word):])


def hacks(row, head, lines, known, rng):
    """What a policy might write instead of a text, and what that loses: parts and gates, and their highest average."""
    def verse(*lines):
        return "/".join([head, *lines])

    whole, words, word_list = verse(*lines), row["keywords"], "，".join(row["keywords"])
    return {
        "genuine": (whole, {}),
        "no thinking": (whole.partition("</think>")[2], {}),
        "thinking only": (head.partition("《")[0], {"finished": 0}),
        "prompt as lines": (verse(*[row["prompt"]] * 8), {"repetition": 0}),
        "keyword list": (verse(*[word_list] * 10), {"repetition": 0, "coverage": 0.1}),
        "keywords as lines": (verse(*words * 10), {"repetition": 0.1, "coverage": 0.1}),
        "keywords as lines after the text": (verse(*lines, *words), {"coverage": 0.1}),
        "two lines": (verse(*lines[:2] * 8), {"repetition": 0.1}),
        "one particle": (verse(*(reward.han(line) + "啊" for line in lines)), {"ending": 0}),
        "shuffled with keywords": (verse(*shuffled(words, lines, rng)), {"fluency": 0.5}),
        "half English": (verse(*itertools.chain(*zip(lines, ["the moon is in the sky"] * 99))), {"chinese": 0.1}),
        "babble": (verse(*(f"{word}{word[0] * n}{word}{word[-1] * n}" for n in (2, 1) for word in words)),
                   {"repetition": 0.3}),
        "memorised": (head.partition("《")[0] + known, {"original": 0})}


def average(scores, name="reward"):
    return fmean(each[name] for each in scores)


def test_genuine_texts_are_worth_most_of_the_reward_and_hacks_are_not(corpus):
    known, rng, scores = read(corpus / "raw/train.jsonl"), random.Random(0), defaultdict(list)
    for row in read(corpus / "test.jsonl"):
        written = hacks(row, *split(row["completion"]), rng.choice(known)["completion"], rng)
        for name, (completion, _) in written.items():
            scores[name].append(score(completion, row))
    genuine = scores["genuine"]
    assert len(genuine) > 100 and average(genuine) > 0.8
    assert average(genuine, "correct") > 0.8 and average(genuine, "answered") == 1
    assert all(average(genuine, gate) > 0.9 for gate in GATES)
    for name, (_, loses) in written.items():
        assert name == "genuine" or average(scores[name]) <= average(genuine) - 0.15, name
        for part, most in loses.items():
            assert average(scores[name], part) <= most, (name, part)
    for each in itertools.chain(*scores.values()):
        parts = sum(weight * each[part] for part, weight in WEIGHTS.items())
        assert each["reward"] == pytest.approx(parts * math.prod(each[gate] for gate in GATES))


def test_keywords_are_covered_by_lines_that_are_no_list_of_them(corpus):
    head, lines = split(read(corpus / "test.jsonl")[1]["completion"])
    words = ["月台", "灯笼", "苹果"]
    for line, keywords, coverage in (("我说月台灯笼都是好东西", words[:2], 1), ("我说月台灯笼苹果都是好东西", words, 0),
                                     ("我说月台真是好东西", words[:2], 1 / 2), ("我说月台", words[:1], 0)):
        assert score("/".join([head, *lines, line]), {"keywords": keywords})["coverage"] == coverage


def test_a_chorus_leaves_the_repetition_gate_open(corpus):
    row = max(read(corpus / "test.jsonl"), key=lambda row: len(split(row["completion"])[1]))
    head, lines = split(row["completion"])
    chorus = lines[4:8]
    for sung in (lines, [*lines[:8], *chorus, *lines[8:], *chorus[:2]]):
        assert score("/".join([head, *sung]), row)["repetition"] == 1
    for sung in ([*lines, *chorus * 8], [f"春风吹过旧城的桥{end}" for end in "春夏秋冬东西南北"]):
        assert score("/".join([head, *sung]), row)["repetition"] < 1


def test_rare_characters_are_not_fluent(corpus):
    rare = ("<think>潮水，礁石，先写潮水，再写礁石，题目是晚潮，共四行，押江阳韵。</think>"
            "《晚潮》/潮水迒抰阆饗庞/整片盪橖礑瘍蚢/礁石乓舫慃蒋鲞/着手絳巟嗙坣漾")
    scores = score(rare, {"keywords": ["潮水", "礁石"]})
    assert scores["fluency"] < 0.5 and scores["reward"] < 0.5 and scores["coverage"] == 1


def test_a_line_for_several_prompts_is_a_template(corpus):
    rows = [{"prompt": word, "keywords": [word]} for word in ("月光", "故乡", "远方", "远方")]
    texts = [f"<think>想</think>《题》/我在{row['keywords'][0]}等你归来/{row['keywords'][0]}自己的一行" for row in rows]
    texts[1] = texts[1].replace("自己的一行", "另外写的句子")
    assert reward.shared_in_step(rows, texts)["repeated_lines"] == {"我在等你归来", "自己的一行"}
    alone = reward.shared_in_step(rows[2:], texts[2:])["repeated_lines"]
    assert alone == set(), "two completions for one prompt are no template"


def test_a_rhyme_that_all_completions_use_earns_nothing(corpus):
    rows = [{"prompt": word, "keywords": [word]} for word in ("月光", "故乡")]
    same = ["《题》/他们走过长江/我们来到故乡", "《题》/你的城市里有月光/看见远处的山冈"]
    other = ["《题》/他们走过长江/我们来到故乡", "《题》/雨水打湿了青石/风里飘来旧的曲子"]
    shares, mixed = (reward.shared_in_step(rows, texts)["rhyme_shares"] for texts in (same, other))
    assert shares == {"江阳": 1} and mixed["江阳"] == 1 / 2
    lines = ["他们走过长江", "我们来到故乡"]
    assert [reward.rhyme_share(lines, known) for known in (None, mixed, shares)] == [1, 1 / 2, 0]
    found = score(same[0], {"keywords": ["故乡"], "rhyme_shares": shares})
    assert found["rhyme"] == 0 and found["rhyming"] == 1


def test_distinct_2_counts_pairs_of_the_verse_alone():
    assert grpo.distinct_2(["<think>月月月月</think>春风，春风"]) == 2 / 3
    assert grpo.distinct_2(["春风", "春风"]) == 1 / 2 and grpo.distinct_2([]) == grpo.distinct_2(["春"]) == 0


PIECES = st.sampled_from(["<think>", "</think>", "《", "》", "/", "\n", "《题》/", "春风", "春风吹过旧城的桥", "，",
                          "。", "a", " ", "\ud800", "𠮷"])
COMPLETIONS = st.none() | st.text() | st.lists(PIECES | st.text(max_size=3), max_size=60).map("".join)
KEYWORDS = st.sampled_from([[], ["春风"], ["春风", "月光", "故乡", "远方", "灯火"], ["春", "春风"]])


@settings(max_examples=300, deadline=None)
@given(completion=COMPLETIONS, keywords=KEYWORDS, truncated=st.booleans())
def test_every_part_and_gate_is_a_share_of_any_text(corpus, completion, keywords, truncated):
    scores = score(completion, {"keywords": keywords}, truncated)
    assert all(0 <= value <= 1 for name, value in scores.items() if name != "lines")
    assert not truncated or scores["reward"] == scores["answered"] == 0


def test_use_data_comes_first(monkeypatch):
    monkeypatch.setattr(reward, "table", {})
    with pytest.raises(ValueError, match="use_data"):
        score("", {"keywords": ["春风"]})


def test_other_trainers_get_the_same_reward(corpus):
    rows = read(corpus / "test.jsonl")[:5]
    texts, keywords = [row["completion"] for row in rows], [row["keywords"] for row in rows]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = [score(row["completion"], row)["reward"] for row in rows]
    assert reward.lyrics(None, texts, keywords) == reward.lyrics(None, chats, keywords) == rewards
    for words in ("春风", ["spring"], [1], ["春"] * 11, None):
        assert reward.lyrics(None, texts[:1], [words]) == [None]
    for truth in (rows[0], json.dumps(rows[0]), keywords[0], json.dumps(keywords[0])):
        result = reward.compute_score("lyrics", texts[0], truth)
        assert result["score"] == result["acc"] == rewards[0]
    with pytest.raises(ValueError, match="keywords"):
        reward.compute_score("lyrics", texts[0], ["x"])


def test_question_of_keywords():
    for text in ("月光 故乡", " 月光，故乡 ", "月光,故乡", "月光、 故乡", "月光　故乡"):
        assert reward.question("lyrics", text) == {"keywords": ["月光", "故乡"], "prompt": "月光，故乡"}
    for text in ("moon", "月光 4", "月 " * 11):
        with pytest.raises(ValueError, match="keywords must be"):
            reward.question("lyrics", text)


def test_rows_are_the_same_for_the_same_keywords_in_any_order():
    texts = [[words, completion] for words in (["月光", "故乡"], ["故乡", "月光"], []) for completion in "ab"]
    rows = [{"keywords": words, "completion": completion} for words, completion in texts]
    assert len({reward.identity("lyrics", row) for row in rows}) == 3
    assert reward.prompt("lyrics", rows[-1]) == reward.FREE and reward.HAN.fullmatch(reward.FREE)
