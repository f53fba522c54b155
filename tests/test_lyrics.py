"""TASK=lyrics: what the reward pays and what it refuses, the data of the embedded corpus and of few texts, and the scripts end to end, small."""

import csv
import json
import random
import re
import shlex
import shutil
import statistics
from pathlib import Path

import pytest
from commands import ROOT, done, load, read, refused, write
from fake_api import Handler, serve
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scripts import make
from transformers import PreTrainedTokenizerFast

import data_prep
import eval as evaluation
import grpo
import reward
import sft

CORPUS = ROOT / "assets/verses.jsonl"
FEW = 72             # texts of the small runs
SMALL_DATA = {"VARIANTS": 3}
PARTS = ("format", "window", "coverage", "rhyme", "parallel")
GATES = ("finished", "chinese", "repetition", "fluency", "ending", "original")
KEY = "sk-very-secret-0123456789"
TAGGED = '<think>想写春风。</think>《春》/春风轻轻敲我的门，/送来一个卖花的人。'


def few(path, count=FEW):
    """A jsonl of the first texts of the embedded corpus."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(CORPUS.read_text(encoding="utf-8").splitlines(keepends=True)[:count]), encoding="utf-8")
    return path


def prepare(run, root, **constants):
    return done(run("data_prep", task="lyrics", out=root, **{**SMALL_DATA, **constants}))


@pytest.fixture(scope="module")
def corpus(run, tmp_path_factory):
    """The data folder of the embedded corpus; the reward knows its texts."""
    root = tmp_path_factory.mktemp("corpus") / "run"
    prepare(run, root)
    before = dict(reward.table)
    reward.use_data("lyrics", root / "data")
    yield root / "data"
    reward.table.clear()
    reward.table.update(before)


@pytest.fixture(scope="module")
def small(run, tmp_path_factory):
    """The root folder of the data of a few texts."""
    root = tmp_path_factory.mktemp("small") / "run"
    prepare(run, root, raw=few(root.parent / "raw.jsonl"))
    return root


def score(completion, row, truncated=False):
    return reward.score("lyrics", completion, row, truncated)


def cut(completion):
    """Thought with its tags, title with its marks, and lines."""
    thought, _, body = completion.partition("</think>")
    title, *lines = body.split("/")
    return thought + "</think>", title, lines


# The table of the reward: what a policy might write instead of verse, from the row, another one, and a training text


def joined(*parts):
    head, title, lines = parts
    return "/".join([head + title, *lines])


def shuffled(lines, rng):
    letters = iter(rng.sample("".join(map(reward.han, lines)), sum(len(reward.han(line)) for line in lines)))
    return ["".join(next(letters) for _ in reward.han(line)) for line in lines]


def with_keywords(lines, keywords):
    lines = list(lines)
    for index, word in enumerate(keywords):
        place = index % len(lines)
        lines[place] = word + lines[place][len(word):]
    return lines


def hacks(row, head, title, lines, other, rng):
    """What a policy might write instead of the verse of a row, by name; `other` are the lines of another text."""
    words, listed = row["keywords"], "，".join(row["keywords"])

    def verse(*lines):
        return joined(head, title, lines)

    return {
        "keyword list": verse(*[listed] * 10), "keywords as lines": verse(*words * 10),
        "keywords after another text": verse(*other, listed), "keywords after the own text": verse(*lines, listed),
        "keywords as lines after the own text": verse(*lines, *words), "one line": verse(*lines[:1] * 16), "two lines": verse(*lines[:2] * 8),
        "one end": verse(*(reward.han(line) + "啊" for line in lines)),
        "one last character": verse(*(reward.han(line)[:-1] + "光" for line in lines)),
        "shuffled with keywords": verse(*with_keywords(shuffled(lines, rng), words)),
        "half English": verse(*(line if i % 2 else "the moon is in the sky" for i, line in enumerate(lines))),
        "no thinking": joined("", title, lines), "thinking only": head, "thinking not closed": verse(*lines).replace("</think>", ""), "empty": "",
        "babble": verse(*(f"{k}{k[0] * n}{k}{k[-1] * n}" for n in (2, 1) for k in words)),
        "prompt": row["prompt"] * 8, "prompt as lines": verse(*[row["prompt"]] * 8)}


HACKS = list(hacks({"keywords": ["春风"], "prompt": ""}, "", "", ["春风来"], [], random.Random(0)))
# the gates that close for a hack: on average at most so far open
CLOSED = {"keyword list": ("repetition", 0), "keywords as lines": ("repetition", 0.1), "one line": ("repetition", 0),
          "two lines": ("repetition", 0.1), "one end": ("ending", 0), "one last character": ("ending", 0), "shuffled with keywords": ("fluency", 0.5),
          "babble": ("repetition", 0.3),
          "half English": ("chinese", 0.1), "thinking only": ("finished", 0), "empty": ("finished", 0), "prompt as lines": ("repetition", 0),
          "memorised": ("original", 0), "truncated": ("finished", 0)}


@pytest.fixture(scope="module")
def scored(corpus):
    """Scores of every row of the test split, by what is written: the genuine text, and each hack."""
    rows, rng = read(corpus / "test.jsonl"), random.Random(0)
    texts = [row["completion"] for row in read(corpus / "raw/train.jsonl")]
    found = {"genuine": [score(row["completion"], row) for row in rows]}
    parts = [cut(row["completion"]) for row in rows]
    for i, row in enumerate(rows):
        for name, text in hacks(row, *parts[i], parts[i - 1][2], rng).items():
            found.setdefault(name, []).append(score(text, row))
    found["memorised"] = [score(parts[i][0] + rng.choice(texts), row) for i, row in enumerate(rows)]
    found["truncated"] = [score(row["completion"], row, truncated=True) for row in rows]
    return found


def average(scores, name="reward"):
    return statistics.fmean(s[name] for s in scores)


def test_genuine_texts_are_worth_most_of_the_reward(scored):
    genuine = scored["genuine"]
    assert len(genuine) > 100 and average(genuine) > 0.8 and average(genuine, "correct") > 0.8 and average(genuine, "answered") == 1
    assert all(average(genuine, gate) > 0.9 for gate in GATES)


@pytest.mark.parametrize("name", [*HACKS, "memorised", "truncated"])
def test_a_hack_is_worth_less_than_a_text(scored, name):
    assert average(scored[name]) <= average(scored["genuine"]) - 0.15


@pytest.mark.parametrize("name", CLOSED)
def test_the_gate_of_a_hack_closes(scored, name):
    gate, most = CLOSED[name]
    assert average(scored[name], gate) <= most < 0.9 < average(scored["genuine"], gate)


@pytest.mark.parametrize("name", ["keyword list", "keywords as lines", "keywords after the own text", "keywords as lines after the own text"])
def test_a_list_of_keywords_covers_nothing(scored, name):
    assert average(scored[name], "coverage") <= 0.1


def test_a_line_of_more_keywords_than_a_text_has_is_a_list(corpus):
    head, title, lines = cut(read(corpus / "test.jsonl")[1]["completion"])
    words = ["月台", "灯笼", "苹果"]
    listed = joined(head, title, [*lines, "我说月台灯笼苹果都是好东西"])
    assert score(listed, {"keywords": words[:2]})["coverage"] == 1 and score(listed, {"keywords": words})["coverage"] == 0


def test_known_hole_of_glued_keywords(scored, corpus):
    """As the docstring of reward.py says: a keyword in a line that has nothing to do with it counts."""
    rows = read(corpus / "test.jsonl")
    head, title, lines = cut(rows[1]["completion"])
    words = ["月台", "灯笼", "苹果"]
    assert not any(word in "".join(lines) for word in words)
    glued = [line + words[i] if i < len(words) else line for i, line in enumerate(map(reward.han, lines))]
    assert len(lines) >= 3 and score(joined(head, title, glued), {"keywords": words})["coverage"] == 1
    assert score(joined(head, title, lines), {"keywords": words})["coverage"] == 0


def test_a_chorus_costs_nothing_of_the_repetition_gate(corpus):
    row = max(read(corpus / "test.jsonl"), key=lambda row: len(cut(row["completion"])[2]))
    head, title, lines = cut(row["completion"])
    assert len(lines) >= 8
    chorus, plain = lines[4:8], score(row["completion"], row)
    once = score(joined(head, title, [*lines, *chorus]), row)
    twice = score(joined(head, title, [*lines[:8], *chorus, *lines[8:], *chorus[:2]]), row)
    assert plain["repetition"] == once["repetition"] == twice["repetition"] == 1
    assert score(joined(head, title, [*lines, *chorus * 8]), row)["repetition"] < 1


def test_repeated_words_within_different_lines_close_the_gate(corpus):
    row = read(corpus / "test.jsonl")[0]
    head, title, lines = cut(row["completion"])
    assert score(joined(head, title, [f"春风吹过旧城的桥{end}" for end in "春夏秋冬东西南北"]), row)["repetition"] < 0.3


def test_weights_are_those_of_a_mean():
    assert sum(vars(reward)[f"{part.upper()}_WEIGHT"] for part in PARTS) == pytest.approx(1)


def test_the_reward_is_gates_times_parts(scored):
    for scores in scored.values():
        for s in scores:
            product = 1.0
            for gate in GATES:
                product *= s[gate]
            assert s["reward"] == pytest.approx(product * sum(vars(reward)[f"{part.upper()}_WEIGHT"] * s[part] for part in PARTS))


PIECES = st.sampled_from(["<think>", "</think>", "《", "》", "/", "\n", "《题》/", "春风", "春风吹过旧城的桥", "，", "。", "a", " ", "\ud800", "𠮷"])
ROWS = st.sampled_from([{"keywords": words} for words in ([], ["春风"], ["春风", "月光", "故乡", "远方", "灯火"], ["春", "春风"])])


@settings(max_examples=300, deadline=None)
@given(completion=st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=60).map("".join)), row=ROWS, truncated=st.booleans())
def test_every_part_and_gate_is_a_share_of_any_text(corpus, completion, row, truncated):
    found = score(completion, row, truncated)
    assert all(0 <= found[name] <= 1 for name in ("reward", *PARTS, *GATES, "correct", "answered", "rhyming", "copied"))


@pytest.mark.parametrize("completion", ["春" * 100_000, "春风/" * 50_000, "<think>" * 20_000, "《" * 50_000, "/" * 100_000, None, 7])
def test_long_and_strange_completions_do_not_raise(corpus, completion):
    assert score(completion, {"keywords": ["春风"]})["reward"] == 0


@pytest.mark.parametrize("row", [None, {}, [], *({"keywords": words} for words in ("春风", ["spring"], [1], ["春"] * 11, None))])
def test_unusable_rows_have_no_reward(corpus, row):
    assert score(TAGGED, row) is None


def test_use_data_comes_first(monkeypatch, tmp_path):
    monkeypatch.setattr(reward, "table", {})
    with pytest.raises(ValueError, match="use_data"):
        score(TAGGED, {"keywords": ["春风"]})
    with pytest.raises(ValueError, match="table.json"):
        reward.use_data("lyrics", tmp_path)
    for damaged in ("", "[]", "{}", '{"finals": {}}', '{"finals": {}, "lines": "AAA", "characters": {}}'):
        (tmp_path / "table.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match="table.json"):
            reward.use_data("lyrics", tmp_path)
    assert reward.use_data("game24", tmp_path) is None and not reward.table


def test_other_trainers_get_the_same_reward(corpus):
    rows = read(corpus / "test.jsonl")[:5]
    texts, keywords = [row["completion"] for row in rows], [row["keywords"] for row in rows]
    expected = [score(row["completion"], row)["reward"] for row in rows]
    assert reward.lyrics(None, texts, keywords) == reward.lyrics(None, [[{"content": text}] for text in texts], keywords) == expected
    assert reward.lyrics(None, texts[:1], [["no Chinese"]]) == [None]
    for truth in (rows[0], json.dumps(rows[0]), rows[0]["keywords"], json.dumps(rows[0]["keywords"])):
        assert reward.compute_score("lyrics", texts[0], truth) == expected[0]
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
    assert reward.identity("lyrics", {"keywords": ["月光", "故乡"]}) == reward.identity("lyrics", {"keywords": ["故乡", "月光"]})
    assert reward.identity("lyrics", {"keywords": [], "completion": "a"}) != reward.identity("lyrics", {"keywords": [], "completion": "b"})
    assert reward.prompt("lyrics", {"keywords": []}) == reward.FREE and reward.HAN.fullmatch(reward.FREE)
RHYMES = {"乜斜": "月雪夜叶街", "一七": "雨语女衣诗二", "姑苏": "湖书路", "梭坡": "歌河落", "发花": "花家马", "言前": "山远年",
          "人辰": "云春军", "中东": "风穷灯", "江阳": "光乡窗", "怀来": "来海", "灰堆": "水归", "遥条": "桥宵", "由求": "秋流"}


@pytest.mark.parametrize("name", RHYMES)
def test_rhyme_classes(name):
    """The classes of Chinese opera: 月 and 夜 rhyme, 雨 and 书 do not."""
    classes = data_prep.rhyme_classes()
    found = {character: [other for other in classes if character in classes[other]] for character in RHYMES[name]}
    assert found == dict.fromkeys(RHYMES[name], [name])


# Data


def splits(folder):
    return {name: read(folder / f"{name}.jsonl") for name in ("train", "val", "test")}


def test_rows_of_the_data(corpus):
    for name, rows in splits(corpus).items():
        assert len({row["id"] for row in rows}) == len(rows) > 50
        for row in rows:
            assert set(row) == {"id", "prompt", "completion", "keywords", "source"} and row["prompt"] == reward.prompt("lyrics", row)
            thought, title, lines, form = reward.split_verse(row["completion"])
            assert form == 1 and title and len(lines) > 1 and 1 <= len(row["keywords"]) <= 5, row
            body = row["completion"].partition("</think>")[2].partition("/")[2]
            places = [body.find(word) for word in row["keywords"]]
            assert places == sorted(places) and places[0] >= 0, row
            assert all(word in thought for word in row["keywords"])


def test_no_split_knows_another(corpus):
    rows = splits(corpus)
    sets = {name: {tuple(sorted(row["keywords"])) for row in part} for name, part in rows.items()}
    texts = {name: read(corpus / f"raw/{name}.jsonl") for name in rows}
    lines = {name: {line for row in part for line in map(reward.han, reward.split_verse(row["completion"])[2]) if len(line) >= 5}
             for name, part in texts.items()}
    sources = {name: {row["source"] for row in part} for name, part in texts.items()}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not sets[one] & sets[other] and not lines[one] & lines[other] and not sources[one] & sources[other]
    assert all({row["source"] for row in rows[name]} <= sources[name] for name in rows)


def test_source_is_the_raw_line(corpus):
    raw = [reward.han(data_prep.clean(json.loads(line)["text"])) for line in CORPUS.read_text(encoding="utf-8").split("\n") if line]
    for part in splits(corpus / "raw").values():
        for row in part:
            name, line = row["source"].split(":")
            body = reward.han(row["completion"].partition("/")[2])
            assert name == CORPUS.name and body == raw[int(line) - 1]


def test_stages_before_the_last_have_folders(corpus):
    raw, keywords = splits(corpus / "raw"), splits(corpus / "keywords")
    for name in ("train", "val", "test"):
        assert all(row["prompt"] == reward.FREE and row["keywords"] == [] for row in raw[name])
        assert all(row["keywords"] and row["prompt"] == "，".join(row["keywords"]) for row in keywords[name])
        assert not any("think>" in row["completion"] for row in raw[name] + keywords[name])
    expected = [(row["prompt"], row["completion"].partition("</think>")[2]) for row in read(corpus / "test.jsonl")]
    assert [(row["prompt"], row["completion"]) for row in keywords["test"]] == expected
    assert len({row["completion"] for row in raw["train"]}) == len(raw["train"])


def test_swapped_rows_have_other_words_in_text_and_plan(corpus):
    originals = {row["source"]: reward.han(row["completion"].partition("/")[2]) for row in read(corpus / "raw/train.jsonl")}
    bodies = [(row, reward.han(row["completion"].partition("</think>")[2].partition("/")[2])) for row in read(corpus / "train.jsonl")]
    changed = [(row, body) for row, body in bodies if body != originals[row["source"]]]
    assert len(changed) > 100 and all(len(body) == len(originals[row["source"]]) for row, body in changed)
    assert all(not any(word in originals[row["source"]] for word in row["keywords"]) for row, _ in changed)
    assert all(word in row["completion"].partition("</think>")[0] and word in body for row, body in changed for word in row["keywords"])


def test_table_has_what_the_reward_takes(corpus):
    table = load(corpus / "table.json")
    for name in ("fluency", "line_count", "line_chars", "thought_chars"):
        assert table[name][0] < table[name][1]
    assert 0 < table["rhyme_chance"] < 0.5 and len(table["finals"]) == 13
    held = [line for name in ("val", "test") for row in read(corpus / f"raw/{name}.jsonl") for line in reward.split_verse(row["completion"])[2]]
    known = [line for row in read(corpus / "raw/train.jsonl") for line in reward.split_verse(row["completion"])[2] if len(reward.han(line)) >= 5]
    assert all(map(reward.known, known)) and not any(map(reward.known, [line for line in held if len(reward.han(line)) >= 5]))


@pytest.mark.parametrize("stage, folders", [("raw", []), ("keywords", ["raw"]), ("cot", ["keywords", "raw"])])
def test_stage_says_what_the_data_holds(run, small, tmp_path, stage, folders):
    prepare(run, tmp_path, raw=small.parent / "raw.jsonl", stage=stage)
    assert sorted(path.name for path in (tmp_path / "data").iterdir() if path.is_dir()) == folders
    expected = small / "data" if stage == "cot" else small / "data" / stage
    for name in ("train", "val", "test"):
        assert (tmp_path / f"data/{name}.jsonl").read_bytes() == (expected / f"{name}.jsonl").read_bytes()
    assert (tmp_path / "data/table.json").read_bytes() == (small / "data/table.json").read_bytes()


def test_same_seed_same_bytes(run, small, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        prepare(run, tmp_path / name, raw=small.parent / "raw.jsonl", seed=seed)
    for split in ("train", "val", "test", "raw/train", "keywords/train"):
        first, a, b = (root / f"data/{split}.jsonl" for root in (small, tmp_path / "a", tmp_path / "b"))
        assert first.read_bytes() == a.read_bytes() != b.read_bytes()


def test_a_stage_that_is_missing_is_made_again_and_no_other(run, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "run") / "data"
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.jsonl")}
    times = {name: (folder / f"{name}.jsonl").stat().st_mtime_ns for name in ("clean", "unique", "cot")}
    (folder / "summary.json").unlink()
    (folder / "keywords.jsonl").unlink()
    output = prepare(run, tmp_path / "run", raw=small.parent / "raw.jsonl")
    assert re.findall(r"^(\w+): 0text", output, re.MULTILINE) == ["keywords"]
    assert {name: (folder / f"{name}.jsonl").stat().st_mtime_ns for name in times} == times
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.jsonl")} == before


def test_finished_data_of_other_texts_or_constants_is_kept(run, small, tmp_path):
    raw, root = small.parent / "raw.jsonl", shutil.copytree(small, tmp_path / "run")
    options = {"task": "lyrics", "out": root, **SMALL_DATA, "raw": raw}
    assert "nothing to do" in done(run("data_prep", **options))
    other = few(tmp_path / "other.jsonl", 60)
    output = refused(run("data_prep", **{**options, "raw": other}))
    digests = [data_prep.sha256(path) for path in (raw, other)]
    assert "RAW was {!r} and is {!r}".format(*digests) in output and "OUT=" in output and "RESUME=0" in output
    assert "VARIANTS was 3 and is 4" in refused(run("data_prep", **{**options, "VARIANTS": 4}))
    assert "STAGE was 'cot' and is 'raw'" in refused(run("data_prep", **{**options, "stage": "raw"}))
    assert "nothing to do" in done(run("data_prep", **{**options, "raw": few(tmp_path / "same.jsonl")}))        # the texts count, not where they lie


@pytest.mark.parametrize("options, message", [
    ({"raw": "none.txt"}, "RAW=none.txt: there is no such file"), ({"stage": "verse"}, "unknown STAGE 'verse'; there is raw, keywords, cot"),
    ({"holdout": CORPUS}, "HOLDOUT= is for TASK=game24")])
def test_bad_constants_are_refused_before_anything_is_made(run, tmp_path, options, message):
    assert message in refused(run("data_prep", task="lyrics", out=tmp_path, **options))
    assert not (tmp_path / "data").exists()


def test_too_few_texts_are_named(run, tmp_path):
    output = refused(run("data_prep", task="lyrics", out=tmp_path, raw=few(tmp_path / "raw.jsonl", 40), **SMALL_DATA))
    assert re.search(r"\d+ texts are left, 50 are needed at least", output.splitlines()[-1]) and not (tmp_path / "data/summary.json").exists()


def test_texts_that_all_share_a_line_are_refused_with_a_message(run, tmp_path):
    rows = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").split("\n")[:FEW]]
    raw = write(tmp_path / "raw.jsonl", *({**row, "text": f"我们一起来唱歌\n{row['text']}"} for row in rows))
    refused(run("data_prep", task="lyrics", out=tmp_path, raw=raw, **SMALL_DATA))


def test_texts_of_a_folder(run, tmp_path):
    for number, line in enumerate(CORPUS.read_text(encoding="utf-8").split("\n")[:FEW]):
        write(tmp_path / f"raw/{number % 3}/{number:03}.txt", json.loads(line)["text"])
    prepare(run, tmp_path, raw=tmp_path / "raw")
    rows = [row for part in splits(tmp_path / "data/raw").values() for row in part]
    assert len(rows) > 60 and all(re.fullmatch(r"[012]/\d{3}\.txt:1", row["source"]) for row in rows)
    titles = {row["source"]: reward.split_verse(row["completion"])[1] for row in rows}
    assert all(title == Path(source.split(":")[0]).stem for source, title in titles.items())
    write(tmp_path / "raw/new.txt", "春风轻轻敲我的门，送来一个卖花的人。")
    assert "RAW was" in refused(run("data_prep", task="lyrics", out=tmp_path, raw=tmp_path / "raw", **SMALL_DATA))


def test_the_best_texts_are_taken_first_and_no_keyword_twice_before_the_others(monkeypatch):
    monkeypatch.setattr(reward, "table", {"finals": {"光": "a", "乡": "a", "山": "b", "河": "c"}})
    good, fair, poor = "月月月光\n月月月乡", "月月月山\n月月月河", "月月山\n月月月月河"      # rhyme and parallel, parallel alone, neither
    rows = [{"text": text, "keywords": keywords} for text, keywords in (
        (poor, ["甲"]), (fair, ["甲", "乙"]), (good, ["甲", "丙"]), (good, ["丙", "丁"]), (poor, ["戊"]), (fair, ["己"]))]
    picked = [data_prep.select_texts(rows, count) for count in range(8)]
    assert picked == [set(), {2}, {2, 5}, {2, 5, 4}, {2, 5, 4, 3}, {2, 5, 4, 3, 1}, {0, 1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5}]


def test_overlapping_words_are_swapped_or_left_and_stop_nothing(corpus, monkeypatch):
    monkeypatch.setattr(data_prep, "TASK", "lyrics")
    row = {"text": "明月高高挂起\n床前明月光照\n故乡远在天边\n窗外花开一朵", "title": "夜", "keywords": ["明月", "月光", "故乡"],
           "words": ["明月", "月光", "故乡"], "thought_from": "template", "thought": "x", "source": "a:1"}
    finals, pool = reward.table["finals"], data_prep.defaultdict(list)
    for word in ("明月", "白雪", "离别", "月光", "故乡", "芬芳", "他乡", "苍茫"):
        pool[2, finals.get(word[-1])].append(word)
    for seed in range(30):
        for made in data_prep.variants(row, 10, set(), pool, random.Random(seed)):
            assert all(word in made["completion"].partition("</think>")[2] for word in made["keywords"])


# Data by an API


def chat(answer):
    """A server that answers the messages of a job by answer(messages); its list `seen` has the jobs."""
    server = serve()
    server.seen = []

    class Chat(Handler):
        def do_POST(self):
            messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
            with server.lock:
                server.seen.append(messages)
            self.reply(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": answer(messages)}}]}).encode())

    server.RequestHandlerClass = Chat
    return server


def environment(server):
    """Code that makes a command call the server."""
    return (f"os.environ.update(API_BASE={server.url!r}, API_KEY={KEY!r})\n"
            "[os.environ.pop(name) for name in list(os.environ) if name.lower().endswith('_proxy')]")


@pytest.fixture
def answers(monkeypatch):
    """Sets what call_api gives for a question; as the real one, what is not accepted comes as None."""
    def use(answer):
        def call_api(jobs, cache, accept):
            texts = [answer(job[-1]["content"]) for job in jobs]
            return [text if accept(i, text) else None for i, text in enumerate(texts)]
        monkeypatch.setattr(data_prep, "call_api", call_api)
        monkeypatch.setattr(data_prep, "MAX_MISSING", 1)
    return use


VERSE = {"title": "春", "keywords": ["春风", "篮子", "桃花"],
         "text": "春风轻轻敲我的门，\n送来一个卖花的人。\n篮子里装满带露的早晨，\n一枝桃花是一份温存。"}


@pytest.mark.parametrize("answer, expected", [
    ("春风，篮子，桃花", ["春风", "篮子", "桃花"]), (" 春风、篮子 桃花。\n", ["春风", "篮子", "桃花"]),
    ("春风，篮子，桃花，明月，远方", ["春风", "篮子", "桃花"]), ("春风，篮子，明月", None), ("春风，春风，篮子", None), ("春风，篮子，桃", None),
    ("春风，篮子，桃花，卖花", ["春风", "篮子", "桃花", "卖花"]), ("春风，春风轻轻，篮子，早晨", ["春风轻轻", "篮子", "早晨"]), ("", None),
    ("春风，篮子，桃花，早晨，温存，卖花", ["春风", "篮子", "桃花", "早晨", "温存"]), ("关键词是这些", None)])
def test_keywords_of_an_api_are_words_of_the_text(answers, answer, expected):
    answers(lambda question: answer)
    assert data_prep.keywords_api([VERSE], None) == [expected]


def test_a_stage_is_not_finished_without_many_answers(monkeypatch, answers):
    answers(lambda question: "春风，篮子，桃花" if "一朵" not in question else "不知道")
    rows = [VERSE] * 95 + [VERSE | {"text": f"{VERSE['text']}\n一朵花"}] * 5
    monkeypatch.setattr(data_prep, "MAX_MISSING", 0.05)
    assert data_prep.keywords_api(rows, None).count(None) == 5
    with pytest.raises(SystemExit, match="6 of 101 answers of deepseek-chat are missing"):
        data_prep.keywords_api([*rows, rows[-1]], None)


GOOD = "想写春风来时的心情，先有春风敲门，再见篮子里的早晨，最后落到桃花，温柔地收尾，押人辰韵，每一行都轻一些，让人想起旧日子。"


@pytest.mark.parametrize("answer, kept", [
    (GOOD, True), (f" {GOOD}\n", True), (GOOD.replace("篮子", "竹篮"), False), (GOOD[:30], False), (GOOD * 9, False),
    (GOOD[:20] + "\n" + GOOD[20:], False), (GOOD + "</think>《春》/春风", False), ("<think>" + GOOD, False)])
def test_a_thought_of_an_api_is_taken_where_the_reward_reads_it(answers, answer, kept):
    answers(lambda question: answer)
    assert data_prep.thoughts_api([VERSE], None) == [GOOD if kept else None]


def by_api(messages):
    """Keywords, one of them strange, or a thought; of a tenth of the texts no usable ones."""
    question = messages[-1]["content"]
    if "动笔之前" in question:
        words = re.search("关键词“(.*?)”", question)[1]
        return f"想写{words}。" + "先从眼前的景写起，再写到心里的人，一句一句展开，最后轻轻收住，押同一个韵，不说破，留一点余味给读的人。"
    lines = re.findall(f"[{reward.han_range}]{{4,}}", question.partition("\n\n")[2])
    strange = sum(question.encode()) % 10 == 0
    return "明月" if strange else "，".join(dict.fromkeys([line[:2] for line in lines[:4]])) + "，没有的词"


def test_data_by_an_api(run, tmp_path):
    server, raw = chat(by_api), few(tmp_path / "raw.jsonl", 90)
    output = prepare(run, tmp_path, raw=raw, use_api=1, api_retries=0, max_missing=1, before=environment(server))
    server.close()
    questions = [messages[-1]["content"] for messages in server.seen]
    funnel = load(tmp_path / "data/funnel.json")
    assert funnel["keywords"]["dropped"]["keywords"] > 0 and funnel["cot"]["out"] == sum("动笔之前" in question for question in questions)
    rows = [row for part in splits(tmp_path / "data").values() for row in part]
    assert all("先从眼前的景写起" in row["completion"] and "没有的词" not in row["keywords"] for row in rows)
    originals = {row["source"]: reward.han(row["completion"].partition("/")[2]) for part in splits(tmp_path / "data/raw").values() for row in part}
    bodies = [(row["source"], row["completion"].partition("</think>")[2].partition("/")[2]) for row in rows]
    assert all(reward.han(body) == originals[source] for source, body in bodies)     # none is swapped
    assert KEY not in output and len(questions) == len(set(questions))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert (tmp_path / "api.jsonl").is_file()       # beside the data: RESUME=0 does not pay twice
    server = chat(lambda messages: "x")
    prepare(run, tmp_path, raw=raw, use_api=1, api_retries=0, max_missing=1, resume=0, before=environment(server))
    server.close()
    assert len(server.seen) == funnel["keywords"]["dropped"]["keywords"]


# The scripts, end to end and very small


TRAIN = {"TASK": "lyrics", "MODEL": "tiny", **SMALL_DATA, "SFT_STEPS": 12, "BATCH_TOKENS": 1024, "EVAL_ROWS": 2, "SFT_EVAL_EVERY": 100,
         "STEPS": 2, "EVAL_EVERY": 2, "EVAL_SAMPLES": 2, "PROMPTS_PER_STEP": 2, "GROUP_SIZE": 2, "MAX_NEW_TOKENS": 40, "SAMPLES": 2, "BOOTSTRAP": 50,
         "SAVE_EVERY": 100, "MIN_DISTINCT": 0.01, "THREADS": 1}


def planned(*words, **constants):
    """Script and words of each command that make would run, in order; those of make in make too."""
    output = done(make("-n", *words, **constants))
    return [(script, shlex.split(words)) for script, words in re.findall(r"^\S*python (\w+)\.py(.*)$", output, re.MULTILINE)]


def value(words, name):
    return [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")][-1:]


@pytest.fixture(scope="module")
def trained(run, small):
    """The folder of `make train TASK=lyrics`: its commands, each in a fork of what has imported torch already."""
    raw = small.parent / "raw.jsonl"
    root = small.parent / "trained"
    options = {**TRAIN, "OUT": root, "RAW": raw}
    done(make(*(root / f".{script}.flags" for script in ("data_prep", "sft", "grpo", "eval")), **options))
    for script, words in planned("train", **options):
        done(run(script, *words))
    return root


@pytest.fixture
def root(trained, tmp_path):
    """A copy of the trained run that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


def test_make_trains_each_stage_from_the_one_before(trained):
    raw = few(trained.parent / "again.jsonl")
    commands = planned("train", **{**TRAIN, "OUT": "x", "RAW": raw})
    assert [script for script, _ in commands] == ["data_prep", "sft", "sft", "sft", "grpo", "eval"]
    assert [(value(words, "out"), value(words, "data"), value(words, "model")) for script, words in commands if script == "sft"] == [
        (["x/raw"], ["x/data/raw"], ["tiny"]), (["x/keywords"], ["x/data/keywords"], ["x/raw/sft"]), (["x"], [], ["x/keywords/sft"])]


def test_each_stage_stores_where_it_began(trained):
    for before, stage in (("raw", "keywords"), ("keywords", ".")):
        header = load(trained / stage / "sft/run.json")
        assert Path(header["constants"]["MODEL"]) == trained / before / "sft"
        digest = header["inputs"]["MODEL/model.safetensors"]
        assert digest == sft.sha256(trained / before / "sft/model.safetensors")
        assert header["constants"]["LORA_RANK"] == 0 and header["constants"]["MUON_LR"] > 0       # it is known as tiny
    assert load(trained / "raw/sft/run.json")["constants"]["MODEL"] == "tiny"
    sizes = {load(trained / stage / "sft/config.json")["vocab_size"] for stage in ("raw", "keywords", ".")}
    assert len(sizes) == 1
    assert [load(trained / stage / "sft/summary.json")["steps"] for stage in ("raw", "keywords", ".")] == [12, 12, 12]


def test_the_vocabulary_is_that_of_all_stages(trained):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(trained / "raw/sft")
    for row in read(trained / "data/train.jsonl"):
        for text in (row["prompt"], row["completion"]):
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids, skip_special_tokens=True) == text


def test_small_corpora_are_passed_at_most_max_epochs_times(run, trained, tmp_path):
    options = {"task": "lyrics", "data": trained / "data/raw", "model": "tiny", "batch_tokens": 4096, "eval_rows": 1, "max_new_tokens": 4}
    done(run("sft", out=tmp_path, **options, steps=1000, max_epochs=2))
    assert load(tmp_path / "sft/summary.json")["steps"] == len(read(tmp_path / "sft/log.jsonl")) < 20


def test_grpo_log_has_the_diversity(trained):
    first, *log = read(trained / "grpo/log.jsonl")
    assert load(trained / "grpo/run.json")["constants"]["BEST_BY"] == "reward"
    for entry in log:
        assert {"distinct_2", "distinct_2_group", "reward", *PARTS, *GATES} <= set(entry)
    for entry in (first, log[-1]):
        assert {"val_distinct_2", "val_distinct_2_group", "val_reward", *(f"val_{part}" for part in PARTS)} <= set(entry)
    summary = load(trained / "grpo/summary.json")
    assert summary["best_val_reward"] == max(entry["val_reward"] for entry in (first, log[-1]) if "val_reward" in entry)


def test_distinct_2_counts_pairs_of_the_verse_alone():
    assert grpo.distinct_2(["<think>月月月月</think>春风，春风"]) == 2 / 3
    assert grpo.distinct_2(["春风", "春风"]) == 1 / 2 and grpo.distinct_2([]) == grpo.distinct_2(["春"]) == 0


@pytest.mark.parametrize("bound", ["min_distinct", "min_distinct_group"])
def test_a_run_that_loses_diversity_stops_and_keeps_what_was_best(run, trained, tmp_path, bound):
    """Five times the first diversity is what no later policy has."""
    options = {"task": "lyrics", "out": tmp_path, "sft": trained / "sft", "data": trained / "data", "prompts_per_step": 2, "group_size": 4,
               "eval_samples": 2, "eval_every": 1, "max_new_tokens": 40}
    output = done(run("grpo", **options, steps=6, patience=3, **{"min_distinct": 0, "min_distinct_group": 0, bound: 5}))
    log = read(tmp_path / "grpo/log.jsonl")
    assert "stopped: none of the last 3 evaluations could be the best, which is step 0" in output
    name = f"val_distinct_2{bound.removeprefix('min_distinct')}"
    assert f"; {name} {log[-1][name]:.3f} is below 5.0 of {log[0][name]:.3f}" in output
    assert len(log) == 4 and load(tmp_path / "grpo/summary.json")["best_step"] == 0
    assert load(tmp_path / "grpo/manifest.json")["step"] == load(tmp_path / "grpo/summary.json")["best_step"]


def test_without_a_bound_on_diversity_the_figures_are_drawn_too(run, trained, tmp_path):
    options = {"task": "lyrics", "out": tmp_path, "sft": trained / "sft", "data": trained / "data", "max_new_tokens": 20}
    done(run("grpo", **options, steps=1, prompts_per_step=2, group_size=2, eval_samples=1, min_distinct=0))
    done(run("eval", **options, samples=1, bootstrap=10))
    assert (tmp_path / "eval/reward.png").stat().st_size > 5000


def strict(path):
    """A JSON file as other programs read it: NaN is none."""
    def refuse(word):
        raise ValueError(word)
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


TEXT_METRICS = {"rhyming_by_chance", "distinct_1", "distinct_2", "self_bleu", "frechet", "frechet_humans"}


def test_metrics_of_all_policies_and_of_humans(trained):
    metrics = load(trained / "eval/metrics.json")
    assert list(metrics) == ["raw", "sft", "grpo", "human"]
    for policy, m in metrics.items():
        assert {"reward", "accuracy", *PARTS, *GATES, "rhyming", "copied"} | TEXT_METRICS <= set(m), policy
        assert ("mean_tokens" in m) == (policy != "human")
        assert m["prompts"] == len(read(trained / "data/test.jsonl")) and m["reward_ci"][0] <= m["reward"] <= m["reward_ci"][1]
    assert metrics["human"]["reward"] > 0.5 > metrics["grpo"]["reward"]
    assert metrics["human"]["frechet"] == pytest.approx(0, abs=1e-6) and metrics["human"]["frechet_humans"] > 0
    made = read(trained / "eval/grpo.jsonl")
    prompts = metrics["grpo"]["prompts"]
    assert metrics["grpo"]["coverage"] == pytest.approx(statistics.fmean(c["coverage"] for c in made[prompts:]))
    assert metrics["grpo"]["distinct_2"] == evaluation.distinct([evaluation.verse(c["completion"]) for c in made[prompts::2]], 2)


def test_what_humans_have_not_is_no_nan(trained):
    assert "nan" not in (trained / "eval/report.md").read_text(encoding="utf-8")
    assert strict(trained / "eval/metrics.json")["human"]["reward"] > 0


def test_report_and_sheet(trained):
    text = (trained / "eval/report.md").read_text(encoding="utf-8")
    assert all(re.search(rf"^\| {name} \|", text, re.MULTILINE) for name in ("raw", "sft", "grpo", "human"))
    assert "(reward.png)" in text and (trained / "eval/reward.png").is_file()
    with open(trained / "eval/people.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(read(trained / "data/test.jsonl")) and all(row["score"] == "" for row in rows)
    assert (trained / "eval/people-key.csv").is_file()


def test_second_make_does_nothing(trained, small):
    def state():        # with RAW= each stage is asked, and says by the time of its summary that it is up to date
        return {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file() and path.name != "summary.json"}

    before = state()
    output = done(make("train", **TRAIN, OUT=trained, RAW=small.parent / "raw.jsonl"))
    assert output.count("nothing to do") == output.count(".venv/bin/python ") > 0 and before == state()


def test_make_notices_a_text_that_changed_inside_a_folder(run, tmp_path):
    (tmp_path / "raw/sub").mkdir(parents=True)
    few(tmp_path / "raw/sub/a.jsonl")
    options = {**SMALL_DATA, "TASK": "lyrics", "OUT": tmp_path / "run", "RAW": tmp_path / "raw"}
    done(make("data", **options))
    assert "nothing to do" in done(make("data", **options))
    with open(tmp_path / "raw/sub/a.jsonl", "a", encoding="utf-8") as file:
        file.write('{"text": "又添了一行"}\n')
    assert "files of RAW was" in refused(make("data", **options))


def test_raw_is_for_lyrics_and_impossible_constants_are_refused(run, tmp_path):
    assert "RAW= is for TASK=lyrics, not game24" in refused(run("data_prep", raw=CORPUS, out=tmp_path))
    for options, message in (({"keywords_max": 12}, "KEYWORDS_MAX <= 10"), ({"keywords_min": 0}, "not 0, 5 and 12"),
                             ({"variants": 0}, "VARIANTS must be")):
        assert message in refused(run("data_prep", task="lyrics", out=tmp_path, **options))


def test_rare_characters_are_not_fluent(corpus):
    row = {"keywords": ["潮水", "礁石"]}
    rare = ("<think>潮水，礁石，先写潮水，再写礁石，题目是晚潮，共四行，押江阳韵。</think>"
            "《晚潮》/潮水迒抰阆饗庞/整片盪橖礑瘍蚢/礁石乓舫慃蒋鲞/着手絳巟嗙坣漾")
    found = score(rare, row)
    assert found["fluency"] < 0.5 and found["reward"] < 0.5 and found["coverage"] == 1      # the keywords themselves are known pairs


def test_a_text_on_one_line_has_lines():
    assert data_prep.verse_lines("春风来了。花开了！我在等你，你在哪里？") == ["春风来了。", "花开了！", "我在等你，你在哪里？"]
    assert data_prep.verse_lines("春风来了，花开了") == ["春风来了，", "花开了"]
    assert data_prep.verse_lines("春风，来了\n花开") == ["春风，来了", "花开"]


def test_ask(run, trained):
    output = done(run("eval", task="lyrics", out=trained, ask="月光 故乡", max_new_tokens=20))
    for name in ("raw", "sft", "grpo"):
        assert re.search(rf"=== {name}: 月光，故乡\n.+--- {name}: (right|wrong|unfinished), \d+ tokens, \d+% of the keywords", output, re.DOTALL)
    assert "keywords must be" in refused(run("eval", task="lyrics", out=trained, ask="moon"))


def test_eval_on_keywords_of_a_file(run, root):
    hands = write(root / "words.txt", "月台 灯笼 苹果", "", "茶馆，竹椅")
    options = {"task": "lyrics", "out": root, "hands": hands, "samples": 2, "bootstrap": 10, "max_new_tokens": 20}
    done(run("eval", **options))
    first, second = "月台，灯笼，苹果", "茶馆，竹椅"
    assert [c["prompt"] for c in read(root / "eval-words/grpo.jsonl")] == [first, second, first, first, second, second]
    assert list(load(root / "eval-words/metrics.json")) == ["raw", "sft", "grpo"]
    write(hands, "月台 灯笼", "moon")
    assert f"{hands}:2: keywords must be" in refused(run("eval", **options, resume=0))
    write(hands, " ".join(read(root / "data/train.jsonl")[0]["keywords"][::-1]))
    assert "are in train.jsonl too" in refused(run("eval", **options, resume=0))


def judge_of(texts):
    """A judge who knows the lines of the texts, and gives 2 to 9 by their share."""
    known = {line for text in texts for line in map(reward.han, evaluation.verse(text).split("\n")) if line}

    def answer(messages):
        found = re.findall(r"【((\w+)-[0-9a-f]{16}) 开始】\n(.*?)\n?【\1 结束】", messages[-1]["content"], re.DOTALL)
        shares = [statistics.fmean([reward.han(line) in known for line in text.split("\n")] or [0]) for *_, text in found]
        if len(shares) == 2:
            return json.dumps({"better": "tie" if shares[0] == shares[1] else "AB"[shares[1] > shares[0]]})
        return json.dumps(dict.fromkeys(evaluation.RUBRIC, 2 + round(7 * shares[0])))
    return answer


def test_judge_of_a_run_and_human_scores(run, root):
    server = chat(judge_of([row["completion"] for row in read(root / "data/test.jsonl")]))
    options = {"task": "lyrics", "out": root, "samples": 2, "before": environment(server)}
    output = done(run("eval", **options, judge=1))
    found = load(root / "eval/judge/judge.json")
    assert found["believed"] and set(found["policies"]) == {"raw", "sft", "grpo"} and set(found["pairs"]) == {"sft vs raw", "grpo vs raw"}
    assert '"believed": true' in output and KEY not in output
    rows = read(root / "eval/judge/judge.jsonl")
    count = len(read(root / "data/test.jsonl"))
    assert sum(row["policy"] == "grpo" for row in rows) == count and sum(row["policy"] == "control/human" for row in rows) == min(20, count)
    asked = len(server.seen)
    done(run("eval", **options, judge=1))
    assert len(server.seen) == asked            # the answers are kept
    server.close()
    with open(root / "eval/people.csv", encoding="utf-8-sig", newline="") as file:
        sheet = list(csv.DictReader(file))
    with open(root / "filled.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, sheet[0])
        writer.writeheader()
        writer.writerows(row | {"score": 1 + i % 9} for i, row in enumerate(sheet))
    agreement = json.loads(done(run("eval", **options, human=root / "filled.csv")).splitlines()[-1])
    assert (agreement["rule_n"], agreement["judge_n"], agreement["unmatched"]) == (3 * count, 3 * count, 0) and -1 <= agreement["rule"] <= 1
    assert "there is no score in it" in refused(run("eval", **options, human=root / "eval/people.csv"))
    assert not [path for path in root.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_judge_that_gives_all_the_same_is_not_believed(run, root):
    server = chat(lambda messages: json.dumps(dict.fromkeys(evaluation.RUBRIC, 8)))
    output = done(run("eval", task="lyrics", out=root, samples=2, judge=1, before=environment(server)))
    server.close()
    found = load(root / "eval/judge/judge.json")
    assert not found["believed"] and found["policies"] is None and "no result: the judge does not set human texts" in output
    assert len(server.seen) <= 3 * 20           # the policies are not sent


def test_judge_does_not_take_other_samples_for_those_of_the_evaluation(run, root):
    """Of an evaluation with SAMPLES=2 a command without it judges the same verses, or says what is wrong."""
    server = chat(lambda messages: json.dumps(dict.fromkeys(evaluation.RUBRIC, 8)))
    result = run("eval", task="lyrics", out=root, judge=1, before=environment(server))
    server.close()
    assert "Traceback" not in result.output


def test_judge_needs_an_evaluation(run, small):
    assert "make eval TASK=lyrics" in refused(run("eval", task="lyrics", out=small, judge=1))
    assert "TASK=lyrics" in refused(run("eval", out=small, judge=1))


def test_data_without_its_table_is_named(run, root):
    (root / "data/table.json").unlink()
    for script, options in (("sft", {"model": "tiny"}), ("grpo", {}), ("eval", {})):
        assert "table.json" in refused(run(script, task="lyrics", out=root, resume=0, **options))


QWEN, DISTILL = "Qwen/Qwen2.5-0.5B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


@pytest.mark.parametrize("target, stages, model", [("qwen-lora", ["raw", ""], QWEN), ("qwen-cot-lora", ["raw", "keywords", ""], QWEN),
                                                   ("ds-lora", ["raw", "keywords", ""], DISTILL), ("ds-rl", ["raw", "keywords", ""], DISTILL)])
def test_make_of_the_models_of_the_report(tmp_path, target, stages, model):
    commands = planned(target, SEED=3)
    runs = [words for script, words in commands if script == "sft"]
    firsts = list(dict.fromkeys(value(words, "out")[0] for words in runs))
    out = f"runs/{target}"
    assert firsts == [f"{out}/{stage}".rstrip("/") for stage in stages]
    models = [value(next(words for words in runs if value(words, "out") == [first]), "model")[0] for first in firsts]
    assert models == [model, *(f"{first}/sft" for first in firsts[:-1])]
    assert ("grpo" in dict(commands)) == (target == "ds-rl") and "eval" in dict(commands)
    assert all(value(words, "task") == ["lyrics"] and value(words, "seed") == ["3"] for _, words in commands)
    assert value(dict(commands)["data_prep"], "stage") == (["keywords"] if target == "qwen-lora" else [])
    assert value(dict(commands)["eval"], "policies") == ([] if target == "ds-rl" else [f"{target}={out}/sft"])
    assert value(planned(target, OUT=tmp_path, MODEL="mine")[1][1], "model") == ["mine"] and not list(tmp_path.iterdir())


def test_make_judge_and_ask(tmp_path):
    assert planned("judge", TASK="lyrics", OUT=tmp_path)[0][1] == [f"--out={tmp_path}", "--task=lyrics", "--judge=1"]
    assert planned("judge", TASK="lyrics", OUT=tmp_path, HUMAN="a.csv")[0][1] == ["--human=a.csv", f"--out={tmp_path}", "--task=lyrics"]
    assert planned("ask", TASK="lyrics", OUT=tmp_path)[0][1][-1] == "--ask=月光 故乡 远方"


def test_lora_is_continued_from_stage_to_stage(run, small, tmp_path):
    data = small / "data"
    model, tokenizer = sft.new_tiny_model(read(data / "raw/train.jsonl") + read(data / "train.jsonl"))
    for policy in (model, tokenizer):
        policy.save_pretrained(tmp_path / "base")
    config = load(tmp_path / "base/config.json")
    assert config.pop("tiny")
    write(tmp_path / "base/config.json", config)
    options = {"task": "lyrics", "steps": 2, "batch_tokens": 1024, "eval_rows": 1, "max_new_tokens": 8, "load_4bit": 0, "save_every": 1,
               "keep_last": 9}
    done(run("sft", **options, out=tmp_path / "raw", data=data / "raw", model=tmp_path / "base", lora_rank=4))
    done(run("sft", **options, out=tmp_path / "keywords", data=data / "keywords", model=tmp_path / "raw/sft", lora_rank=8, lr=0.01, warmup=0.01))
    adapter = load(tmp_path / "keywords/sft/adapter_config.json")
    assert (adapter["r"], adapter["base_model_name_or_path"]) == (4, str(tmp_path / "base"))
    weights = {name: (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in (
        "raw/sft", "keywords/sft/step-0", "keywords/sft/step-2", "raw/sft/step-0")}
    assert weights["raw/sft"] == weights["keywords/sft/step-0"] != weights["keywords/sft/step-2"] and weights["raw/sft"] != weights["raw/sft/step-0"]
    assert not (tmp_path / "keywords/sft/model.safetensors").exists()
    assert "MODEL/base/model.safetensors" in load(tmp_path / "keywords/sft/run.json")["inputs"]
