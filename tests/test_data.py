"""The data folders that data_prep.py makes: hands and traces of game24, the recipes and the table of lyrics."""

import itertools
import json
import os
import re
import zlib
from collections import Counter

import pytest
from commands import ROOT, done, load, read, refused, write

import data_prep
import reward

CORPUS = ROOT / "assets/verses.jsonl"
SMALL = {"traces_per_hand": 2, "val_hands": 5, "test_hands": 5, "highest": 6, "extra_hands": 0}
FEW = CORPUS.read_text(encoding="utf-8").split("\n")[:72]


def splits(folder):
    return {name: read(folder / f"{name}.jsonl") for name in ("train", "val", "test")}


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.jsonl")}


def hands_of(folder):
    return {name: {tuple(sorted(row["numbers"])) for row in rows} for name, rows in splits(folder).items()}


def test_all_hands(run, tmp_path):
    done(run("data_prep", out=tmp_path, traces_per_hand=2, extra_traces=1))
    hands = hands_of(tmp_path / "data")
    larger = {hand for hand in hands["train"] if hand[-1] > 13}
    assert 2000 < len(larger) and max(map(max, larger)) <= 99
    hands["train"] -= larger
    assert {name: len(split) for name, split in hands.items()} == {"train": 954, "val": 136, "test": 272}
    assert len(set().union(*hands.values())) == 1362
    rows = list(itertools.chain(*splits(tmp_path / "data").values()))
    for row in rows:
        assert row["prompt"] == reward.prompt("game24", row) and set(row) == {"id", "prompt", "completion", "numbers"}
        scores = reward.score("game24", row["completion"], row)
        assert (scores["outcome"], scores["process"]) == (1, 1), row
        assert len(row["completion"].replace("\n", " \n ").split(" ")) <= data_prep.MAX_TRACE_TOKENS
    assert len({row["id"] for row in rows}) == len(rows) == len({row["completion"] for row in rows})
    assert any(row["numbers"] != sorted(row["numbers"]) for row in rows)
    summary = load(tmp_path / "data/summary.json")
    assert (summary["hands"], summary["solvable"], summary["test"]["rows"]) == (1820, 1362, 272)


def test_hands_held_out_are_the_test_split_also_of_another_target(run, tmp_path):
    hands = write(tmp_path / "hands.txt", "4 3 2 1", "6 5 3 4", "", "5 6 4 3", "1 1 1 1")
    settings = {**SMALL, "out": tmp_path, "holdout": hands, "target": 10}
    assert "these cannot make 10 and are left out: [(1, 1, 1, 1)]" in done(run("data_prep", **settings))
    found = hands_of(tmp_path / "data")
    assert found["test"] == {(1, 2, 3, 4), (3, 4, 5, 6)} and not found["test"] & (found["train"] | found["val"])
    every = itertools.combinations_with_replacement(range(1, 7), 4)
    assert set().union(*found.values()) == {hand for hand in every if reward.solvable(hand, 10)}
    for row in read(tmp_path / "data/train.jsonl"):
        assert row["prompt"].startswith("Make 10 from") and row["target"] == 10
        assert reward.score("game24", row["completion"], row)["outcome"] == 1
    write(hands, "4 3 2 1")
    assert "hands of HOLDOUT was" in done(run("data_prep", **settings))


def test_extra_hands_show_what_the_hands_of_the_deck_lead_to(run, tmp_path):
    """The three numbers that solve a held-out hand are shown by enough others, but no hand that is held out is."""
    def threes(hands):
        steps = itertools.chain.from_iterable(data_prep.choices(hand, 24) for hand in hands)
        return Counter(tuple(sorted(after)) for _, after, leads in steps if leads)

    # 1 1 3 8 would be chosen if it were not held out; no other hand leads to the three numbers that solve 3 3 8 8
    hands = write(tmp_path / "hands.txt", "1 2 3 4", "1 1 3 8", "1 1 4 6", "6 6 6 6", "3 3 8 8")
    settings = {**SMALL, "out": tmp_path, "holdout": hands, "extra_highest": 40}
    done(run("data_prep", **settings))
    held_out = hands_of(tmp_path / "data")["test"]
    before = threes(hands_of(tmp_path / "data")["train"])
    done(run("data_prep", **settings | {"extra_hands": 3, "extra_traces": 1}))
    train = hands_of(tmp_path / "data")["train"]
    assert len(held_out) == 5 and not train & held_out and 6 < max(map(max, train)) <= 40
    after, needed = threes(train), threes(held_out - {(3, 3, 8, 8)})
    assert min(before[three] for three in needed) == 0 and min(after[three] for three in needed) >= 3


@pytest.mark.parametrize("lines", [
    ["4,4,4,4", "6, 5, 3, 4"], ["\ufeff4\t4\t4\t4", " 6 5 3 4 "], ["A,B,C,D", "4,4,4,4", '"6","5","3","4"'],
    ["n_1,n_2,n_3,n_4", "4,4,4,4", "6,5,3,4"], ["hand", "4 4 4 4", "6 5 3 4"],
    ["Rank,Puzzles,AMT (s),Solved rate,1-sigma Mean (s)", "1,4 4 4 4,4.4,99.2%,4.67", "2,6 5 3 4,4.7,99.0%,4.9"]])
def test_forms_of_hands(tmp_path, lines):
    assert reward.read_hands(write(tmp_path / "hands.csv", *lines)) == [(4, 4, 4, 4), (3, 4, 5, 6)]


@pytest.mark.parametrize("line", ["4 5 6", "4 5 6 x", "4 5 6 0", "4 5 6 7 8", "4 5 6 -7", "4,5,6,7.5", "4 5 6 ７",
                                  "K Q J A", "10,Q,K,A", "1,4,4,4,4", "a,2,3,4"])
def test_lines_that_are_no_hand_are_named(tmp_path, line):
    for before in ([], ["4 4 4 4"]):
        with pytest.raises(SystemExit) as error:
            reward.read_hands(write(tmp_path / "hands.csv", *before, line))
        assert f"hands.csv:{len(before) + 1}: four positive integers are expected, not {line!r}" in str(error.value)


def test_typed_hands_have_the_target(monkeypatch):
    assert reward.question("game24", "1, 2 3 4") == {"numbers": [1, 2, 3, 4], "prompt": "Make 24 from 1 2 3 4"}
    monkeypatch.setattr(reward, "TARGET", 10)
    assert reward.question("game24", "1 2 3 4") == {
        "numbers": [1, 2, 3, 4], "target": 10, "prompt": "Make 10 from 1 2 3 4"}
    for text in ("3 3 8 x", "3_0 3 8 8", "3.0 3 8 8", "+3 3 8 8", "3 3 8"):
        with pytest.raises(ValueError, match="four positive integers"):
            reward.question("game24", text)


WITH_A_COMMON_LINE = [json.dumps({"text": "我们一起来唱歌\n" + json.loads(line)["text"]}) for line in FEW]


@pytest.mark.parametrize("option, texts, reason", [
    ({"test_hands": 2000}, [], "no hand is left"), ({"task": "chess"}, [], "TASK=chess"),
    ({"holdout": os.devnull}, [], "no hand in it"),
    *(({"task": "lyrics"}, texts, "too few texts") for texts in (FEW[:40], WITH_A_COMMON_LINE, FEW[:1] * 90))])
def test_impossible_data_is_refused(run, tmp_path, option, texts, reason):
    raw = write(tmp_path / "raw.jsonl", *texts)
    output = refused(run("data_prep", **{**SMALL, "out": tmp_path, "raw": raw, **option}))
    assert reason in output.splitlines()[-1] and not (tmp_path / "data/summary.json").exists()


@pytest.mark.parametrize("task", ["game24", "lyrics"])
def test_same_seed_same_bytes_and_other_data_another_run(run, tmp_path, task):
    raw = write(tmp_path / "raw/sub/a.jsonl", *FEW)

    def prepare(name, seed=0):
        options = {"task": "lyrics", "variants": 3, "raw": raw.parent}
        if task == "game24":
            options = {**SMALL, "extra_hands": 1, "extra_traces": 1}
        return done(run("data_prep", out=tmp_path / name, seed=seed, **options))

    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(name, seed)
    a, b, c = (files(tmp_path / name / "data") for name in "abc")
    assert a == b and len(a) == (3 if task == "game24" else 9) and all(a[name] != c[name] for name in a)
    assert "is complete" in prepare("a")
    write(raw.parent / "b.json", '{"text": "\\ud800"}')         # dropped and shown, which no terminal can print
    output = prepare("a", 1)
    assert "SEED was 0, is 1" in output and ("files of RAW was" in output) == (task == "lyrics")
    assert files(tmp_path / "a/data") == c and files(tmp_path / "a/data.1") == a
    (tmp_path / "a/data/summary.json").unlink()         # as if it had been cut off
    (tmp_path / "a/data/val.jsonl").unlink()
    prepare("a", 1)
    assert files(tmp_path / "a/data") == c and not (tmp_path / "a/data.2").exists()


def test_rows(corpus):
    for rows in splits(corpus).values():
        assert len({row["id"] for row in rows}) == len(rows) > 50
        for row in rows:
            assert set(row) == {"id", "prompt", "completion", "keywords", "source"}
            assert row["prompt"] == reward.prompt("lyrics", row)
            thought, title, lines, form = reward.split_verse(row["completion"])
            assert form == 1 and title and len(lines) > 1 and 1 <= len(row["keywords"]) <= 5, row
            body = "/".join(lines)
            places = [body.find(word) for word in row["keywords"]]
            assert places == sorted(places) and places[0] >= 0 and all(word in thought for word in row["keywords"]), row


def lines_of(rows):
    """Lines of the texts of some rows that are long enough to be known."""
    lines = [reward.han(line) for row in rows for line in reward.split_verse(row["completion"])[2]]
    return {line for line in lines if len(line) >= reward.LINE_HAN}


def test_no_split_knows_another(corpus):
    known = {}
    for name in splits(corpus):
        rows = [row for folder in (corpus, corpus / "keywords") for row in read(folder / f"{name}.jsonl")]
        texts = read(corpus / f"raw/{name}.jsonl")
        keywords = {tuple(sorted(row["keywords"])) for row in rows}
        known[name] = keywords | {row["source"] for row in rows + texts} | lines_of(texts)
    for one, other in itertools.combinations(known.values(), 2):
        assert not one & other


def test_recipes(corpus):
    raw, keywords = splits(corpus / "raw"), splits(corpus / "keywords")
    for name in ("train", "val", "test"):
        assert all(row["prompt"] == reward.FREE and row["keywords"] == [] for row in raw[name])
        assert all(row["keywords"] and row["prompt"] == "，".join(row["keywords"]) for row in keywords[name])
        assert not any("think>" in row["completion"] for row in raw[name] + keywords[name])
    verses = [(row["prompt"], row["completion"].partition("</think>")[2]) for row in read(corpus / "test.jsonl")]
    assert [(row["prompt"], row["completion"]) for row in keywords["test"]] == verses
    assert len({row["completion"] for row in raw["train"]}) == len(raw["train"])
    texts = [reward.han(row["text"]) for row in read(CORPUS)]
    for row in itertools.chain(*raw.values()):
        name, line = row["source"].split(":")
        assert name == CORPUS.name and reward.han(row["completion"].partition("/")[2]) == texts[int(line) - 1]


def test_swapped_rows_have_other_words_in_text_and_plan(corpus):
    texts = read(corpus / "raw/train.jsonl")
    originals = {row["source"]: reward.han(row["completion"].partition("/")[2]) for row in texts}
    changed = 0
    for row in read(corpus / "train.jsonl"):
        plan, _, verse = row["completion"].partition("</think>")
        body, original = reward.han(verse.partition("/")[2]), originals[row["source"]]
        if body != original:
            changed += 1
            assert len(body) == len(original) and not any(word in original for word in row["keywords"])
            assert all(word in plan and word in body for word in row["keywords"])
    assert changed > 100


RHYMES = ("月雪夜叶街", "雨语女衣诗二", "湖书路", "歌河落", "花家马", "山远年", "云春军", "风穷灯", "光乡窗",
          "来海", "水归", "桥宵", "秋流")


def test_table(corpus):
    """Rhymes are the classes of Chinese opera, such as 月 and 夜 but not 雨 and 书; known lines are those of train."""
    table = load(corpus / "table.json")
    assert all(table[name][0] < table[name][1] for name in ("fluency", "line_count", "line_chars", "thought_chars"))
    names = [{reward.table["finals"][character] for character in rhymes} for rhymes in RHYMES]
    assert all(len(name) == 1 for name in names) and len(set().union(*names)) == len(table["finals"]) == 13
    for name, rows in splits(corpus / "raw").items():
        codes = {zlib.crc32(line.encode()) for line in lines_of(rows)}
        assert codes & reward.table["lines"] == (codes if name == "train" else set())
    assert 0 < table["rhyme_chance"] < 0.5


def test_the_best_texts_are_taken_first_and_no_keyword_twice_before_the_others(monkeypatch):
    monkeypatch.setattr(reward, "table", {"finals": {"光": "a", "乡": "a", "山": "b", "河": "c"}})
    good, fair, poor = "月月月光\n月月月乡", "月月月山\n月月月河", "月月山\n月月月月河"      # fair: parallel lines
    rows = [{"text": text, "keywords": list(keywords)} for text, keywords in (
        (poor, "甲"), (fair, "甲乙"), (good, "甲丙"), (good, "丙丁"), (poor, "戊"), (fair, "己"))]
    assert [rows.index(row) for row in data_prep.select_texts(rows, 9)] == [2, 5, 4, 3, 1, 0]
    assert [rows.index(row) for row in data_prep.select_texts(rows, 2)] == [2, 5]


def test_data_by_an_api(monkeypatch, tmp_path):
    """Texts without good answers are dropped, and none has its words swapped."""
    thought = "想写{}。先从眼前的景写起，再写到心里的人，一句一句展开，收住时不说破，留一点余味。"

    def answer(text):
        if sum(text.encode()) % 10 == 0:
            return "明月"
        if "动笔之前" in text:
            return thought.format(re.search("关键词“(.*?)”", text)[1])
        lines = re.findall(f"[{reward.han_range}]{{4,}}", text.partition("\n\n")[2])
        return f"关键词：{'；'.join(line[:2] for line in lines[:4])}；没有的词"

    def call_api(jobs, cache, accept):
        answers = [answer(message["content"]) for [message] in jobs]
        return [text if accept(i, text) else None for i, text in enumerate(answers)]

    raw = write(tmp_path / "raw.jsonl", *FEW)
    constants = {"TASK": "lyrics", "USE_API": 1, "VARIANTS": 3, "RAW": str(raw), "call_api": call_api}
    for name, value in constants.items():
        monkeypatch.setattr(data_prep, name, value)
    monkeypatch.setattr(reward, "table", {})
    data_prep.prepare_lyrics(tmp_path, [raw])
    funnel = load(tmp_path / "funnel.json")
    for before, after in itertools.pairwise(funnel.values()):
        assert before["out"] == after["in"] == after["out"] + sum(after["dropped"].values())
    assert funnel["keywords"]["dropped"]["too few"] > 0 and funnel["thoughts"]["dropped"]["no usable thought"] > 0
    originals = {row["source"]: row["completion"] for rows in splits(tmp_path / "raw").values() for row in rows}
    for row in itertools.chain(*splits(tmp_path).values()):
        assert "先从眼前的景写起" in row["completion"] and "没有的词" not in row["keywords"]
        assert row["completion"].partition("</think>")[2] == originals[row["source"]]
