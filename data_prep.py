"""Makes the data for a task: runs/TASK/data/{train,val,test}.jsonl.

    python data_prep.py                               # the 24-point game: 120,402 search traces, a minute on one core
    python data_prep.py HOLDOUT=hands.txt             # these hands are the test split, and in no other split
    python data_prep.py TASK=lyrics RAW=my/lyrics     # a file or folder of texts; default: assets/verses.jsonl

game24: a search trace tries some first steps in order, backs out of those that cannot make 24, and composes the answer.
Unlike depth-first search, it goes on from three numbers only if they solve the hand, or for a single step: a line that
returns to the hand marks the three before it as hopeless, so a model that errs is never stuck among them. Such a line
does not repeat the hand, which the prompt has, so that a search takes fewer tokens.

lyrics: texts are read, cleaned, deduplicated, given keywords and thoughts, and split. There are three recipes for three
stages of SFT: raw/ (texts alone), keywords/ (keywords to text), and the top folder (keywords to thought and text).
"""

import ast
import base64
import contextlib
import csv
import difflib
import fcntl
import hashlib
import html
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from pathlib import Path

import openai
import opencc
import rjieba
from pypinyin.constants import PINYIN_DICT
from pypinyin.contrib.tone_convert import to_finals
from tqdm import tqdm

import reward

# Run
TASK = "game24"
OUT = f"runs/{TASK}"         # the data goes to OUT/data
SEED = 0                     # for the split and the traces
# game24
HOLDOUT = ""                 # file of hands to use as the test split: one per line (4 5 6 10), or a csv
LOWEST = 1                   # numbers in a hand go from LOWEST to HIGHEST, as in a deck of cards
HIGHEST = 13
VAL_HANDS = 136              # a tenth of the 1,362 solvable hands
TEST_HANDS = 272             # a fifth
TRACES_PER_HAND = 96         # per training hand; duplicates are written once
EXTRA_HANDS = 6              # so many training hands lead to any three numbers that may solve a hand; 0: no extra hands
EXTRA_HIGHEST = 99           # extra hands have a number above HIGHEST, up to this
EXTRA_TRACES = 24            # per extra hand
MAX_TRACE_TOKENS = 250       # words in a trace; a longer one is drawn again
LARGEST = 200                # larger results are tried only if nothing else leads to the target
TRY_RIGHT = 0.4              # chance of trying a first step that can lead to the target ...
TRY_WRONG = 0.45             # ... and one that cannot
SLIP = 0.05                  # chance that a right first step is followed by a wrong second one
ENTER = 0.2                  # chance of trying a second step after a wrong first one
# lyrics: texts
RAW = str(Path(__file__).resolve().with_name("assets") / "verses.jsonl")      # txt, lrc, csv, json, jsonl, or a folder
TEXT_FIELD = "text paragraphs content lyrics"      # in csv, json and jsonl: the first of these fields that a row has
TITLE_FIELD = "title rhythmic"
MIN_HAN = 0.7                # share of Han characters among the letters; a text below it is not Chinese
MIN_COMMON = 0.4             # share of Han characters among the 3,755 commonest; a text below it was decoded wrongly
MIN_CHARS = 12               # Han characters in a text
MAX_CHARS = 2000
SHARED_LINES = 3             # a near-duplicate shares at least this many distinct lines with an earlier text ...
CONTAINMENT = 0.5            # ... and at least this share of the shorter one's lines
STOCK_LINES = 50             # a line found in more texts than this is a stock phrase and proves nothing
# lyrics: samples
KEYWORDS_MIN = 3             # keywords per text
KEYWORDS_MAX = 5
WORDS = 12                   # words per text from which its other training rows draw their keywords
MIN_DF = 3                   # a keyword is in at least this many texts (2 if there are fewer than 300 texts) ...
MAX_DF = 0.1                 # ... and in at most this share of them
STOP_WORDS = "没有 不会 不能 可以 知道 觉得 不要 不知 时候 有人 有些 无人 不见 不得 不到 不可"
COT_TEXTS = 1000             # texts that get a thought: the best and most varied ones
VAL_TEXTS = 100              # at most a tenth of the texts
TEST_TEXTS = 200             # at most a fifth
VARIANTS = 64                # training rows per text: one for its keywords, the others for random picks from its words
SWAP = 0.9                   # chance that those are replaced in the text, so that a model must look at its keywords ...
SWAP_BELOW = 5000            # ... if there are fewer texts, which it could memorise; not with thoughts from an API
# lyrics: keywords and thoughts by a language model, instead of tf-idf and a template
USE_API = 0                  # 1: ask API_MODEL, which costs money
KEYWORD_QUESTION = """从下面的作品里选出三到五个最能代表它的关键词，两到四个字，在作品里原样出现，不是虚词，互不包含。\
只输出一行关键词，用“，”隔开。\n\n{text}"""
THOUGHT_QUESTION = """有人拿到关键词“{listed}”，写成了下面的作品。请替作者写出动笔之前的构思：想说什么、什么心情，\
画面怎样一步步展开，每个关键词放在哪里，押什么韵，怎样收尾。一段话，八十到两百字，每个关键词都要提到，不要照抄整行原句，\
不要分点，只输出构思本身。\n\n《{title}》\n{text}"""
# API: an OpenAI-compatible chat endpoint. Its address and key come from the environment variables API_BASE and API_KEY
API_MODEL = "deepseek-chat"
API_THREADS = 16             # concurrent calls
API_TIMEOUT = 120            # seconds per attempt
API_RETRIES = 6              # attempts after the first
API_TEMPERATURE = 0.7        # below 0: not sent, for models that reject it
API_LENGTH_FIELD = "max_tokens"        # request field for the next constant; newer models want max_completion_tokens
API_MAX_TOKENS = 1024        # per answer, including the thoughts of reasoning models
API_PRICE_IN = 0.3           # cost of a million input tokens ...
API_PRICE_OUT = 1.2          # ... and of a million output tokens
API_MAX_COST = 5.0           # limit, in the same currency, for each round of calls (keywords, thoughts, scores)
# Changing these does not change the data; for HOLDOUT and RAW the content counts
free = {"OUT", "HOLDOUT", "RAW", "API_THREADS", "API_TIMEOUT", "API_RETRIES", "API_PRICE_IN", "API_PRICE_OUT",
        "API_MAX_COST", "WELL_FORMED", "LENGTH_NEEDS_CORRECT", "MIN_STEPS", "RHYME_GOAL",
        *(name for name in vars(reward) if name.endswith("_WEIGHT"))}


# ---- the 24-point game ----------------------------------------------------------------------------------------------


@lru_cache(100_000)         # a quarter of a gigabyte when full
def choices(state: tuple, target: int) -> tuple:
    """(step, state after it, whether that is solvable) for the steps (a, operator, b, result) from a state.

    Fractions and large results only if no other step leads to the target; no negatives: swapping them solves as much.
    """
    states = {}
    for i, j in itertools.combinations(range(len(state)), 2):
        a, b = max(state[i], state[j]), min(state[i], state[j])
        others = tuple(value for k, value in enumerate(state) if k not in (i, j))
        steps = [(a, "+", b, a + b), (a, "-", b, a - b), (a, "*", b, a * b)]
        steps += [(x, "/", y, Fraction(x, y)) for x, y in ((a, b), (b, a)) if y]
        states.update({step: (step[3], *others) for step in steps})
    found = [(step, after, reward.solvable(tuple(sorted(after)), target)) for step, after in states.items()]
    plain = [choice for choice in found if choice[0][3].denominator == 1 and choice[0][3] <= LARGEST]
    if any(leads for *_, leads in plain):
        return tuple(plain)
    return tuple(choice for choice in found if choice in plain or choice[2])


def write_trace(hand: list[int], target: int, rng: random.Random) -> str:
    """A completion for a solvable hand: a search with backtracking that ends in the composed answer."""
    untried, seen, steps, solution = list(choices(tuple(hand), target)), set(), [], []
    while not solution:         # some of the first steps, in order; the skipped ones come once the others have failed
        for choice in list(untried):
            first, three, leads = choice
            if rng.random() > (TRY_RIGHT if leads else TRY_WRONG):
                continue
            untried.remove(choice)
            steps.append(((), first))         # a line without a state is about the hand
            if leads and (rng.random() > SLIP or not any(other_leads for *_, other_leads in untried)):
                second, two, _ = next(choice for choice in choices(three, target) if choice[2])
                third = next(step for step, _, solves in choices(two, target) if solves)
                steps += [(three, second), (two, third)]
                solution = [first, second, third]
                break
            key = tuple(sorted(three))
            misses = [step for step, _, solves in choices(three, target) if not solves and (key, step) not in seen]
            if misses and rng.random() < ENTER:
                second = rng.choice(misses)
                seen.add((key, second))
                steps.append((three, second))

    lines = [f"{' '.join(map(str, state))} | {a} {operator} {b} = {c}".lstrip() for state, (a, operator, b, c) in steps]
    expression, composed = [str(part) for part in solution[-1][:3]], []
    for a, operator, b, result in reversed(solution[:-1]):
        place = expression.index(str(result))
        expression[place:place + 1] = f"( {a} {operator} {b} )".split()
        composed.append(" ".join(expression))
    return "\n".join(["<think>", *lines, *composed[:-1], "</think>", f"<answer> {composed[-1]} </answer>"])


def extra_hands(deck: list, train: list, test: list, target: int, rng: random.Random) -> list[tuple]:
    """Extra training hands: of numbers from LOWEST to EXTRA_HIGHEST, one of them above HIGHEST, and none of `test`.

    A trace goes on from three numbers only if they make the target, and a model hardly finds what it was not shown. So
    every such three to which a hand of the deck leads, val and test included, are topped up to EXTRA_HANDS hands that
    lead to them, if there are so many; those with the smallest maximum come first.
    """
    def threes(hand):
        return {tuple(sorted(after)) for _, after, leads in choices(hand, target) if leads}

    needed, found = sorted(set().union(*map(threes, deck))), []
    for three in needed:
        for (number, *others), a in itertools.product(itertools.permutations(three), range(LOWEST, EXTRA_HIGHEST + 1)):
            for b in (number - a, number + a, number * a, Fraction(number, a)):
                hand = tuple(sorted((a, b, *others)))
                whole = all(value == int(value) for value in hand)
                if whole and hand[0] >= LOWEST and HIGHEST < hand[-1] <= EXTRA_HIGHEST:
                    found.append((tuple(map(int, hand)), three))
    rng.shuffle(found)
    count, chosen = Counter(itertools.chain.from_iterable(map(threes, train))), []
    for hand, three in sorted(found, key=lambda pair: pair[0][-1]):
        if count[three] < EXTRA_HANDS and hand not in chosen and hand not in test and three in threes(hand):
            chosen.append(hand)
            count.update(threes(hand))
    return chosen


def prepare_game24(folder: Path, held_out: list[tuple]) -> dict:
    """Writes train, val and test for the 24-point game, with `held_out`, if any, as test; returns the summary."""
    rng, word = random.Random(SEED), re.compile(r"\S+|\n")     # a word is a token of MODEL=tiny
    target = reward.TARGET
    hands = list(itertools.combinations_with_replacement(range(LOWEST, HIGHEST + 1), 4))
    solvable_hands = [hand for hand in hands if reward.solvable(hand, target)]
    summary = {"hands": len(hands), "solvable": len(solvable_hands)}
    rng.shuffle(solvable_hands)
    test = [hand for hand in held_out if reward.solvable(hand, target)] if held_out else solvable_hands[:TEST_HANDS]
    if len(test) < len(held_out):
        print(f"{HOLDOUT}: these cannot make {target} and are left out: {sorted(set(held_out) - set(test))}")
    others = [hand for hand in solvable_hands if hand not in set(test)]
    for name, split in {"train": others[VAL_HANDS:], "val": others[:VAL_HANDS], "test": test}.items():
        if not split:
            sys.exit(f"no hand is left for {name}: only {len(solvable_hands)} can make {target}")
        rows, traces_of = [], dict.fromkeys(split, TRACES_PER_HAND if name == "train" else 1)
        if name == "train" and EXTRA_HANDS:
            traces_of |= dict.fromkeys(extra_hands(solvable_hands, split, test, target, rng), EXTRA_TRACES)
        for hand, count in tqdm(traces_of.items(), desc=name, unit="hand", dynamic_ncols=True):
            traces = {}
            for _ in range(count):
                numbers = list(hand)
                rng.shuffle(numbers)
                drawn = (write_trace(numbers, target, rng) for _ in range(1000))
                trace = next(trace for trace in drawn if len(word.findall(trace)) <= MAX_TRACE_TOKENS)
                traces[trace] = reward.question(TASK, " ".join(map(str, numbers)))
            rows += [{"prompt": row["prompt"], "completion": trace, **row} for trace, row in traces.items()]
        rng.shuffle(rows)
        write_rows(folder / f"{name}.jsonl", rows)
        words = percentiles([len(word.findall(row["completion"])) for row in rows], 5, 50, 95, 100)
        summary[name] = {"hands": len(traces_of), "rows": len(rows), **dict(zip(("p5", "p50", "p95", "p100"), words))}
    print(f"\n{rows[0]['prompt']}\n{rows[0]['completion']}\n")
    return summary


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as file:
        for number, row in enumerate(rows):
            print(json.dumps({"id": f"{path.stem}-{number}", **row}, ensure_ascii=False), file=file)


def percentiles(values, *percents: int) -> list:
    values = sorted(values)
    return [values[(len(values) - 1) * percent // 100] for percent in percents]


# ---- lyrics: reading and cleaning -----------------------------------------------------------------------------------


def raw_files() -> list[Path]:
    """The files of RAW that can be read, in order."""
    files = [path for path in [Path(RAW), *sorted(Path(RAW).rglob("*"))] if path.is_file()]
    readable = [path for path in files if path.suffix.lower() in (".txt", ".lrc", ".csv", ".json", ".jsonl")]
    print(f"RAW={RAW}: {len(readable)} files to read, {len(files) - len(readable)} of other kinds")
    return readable or sys.exit("RAW must be a txt, lrc, csv, json or jsonl file, or a folder with such files")


def read_texts(files: list[Path]) -> Iterator[tuple[dict, str | None]]:
    """Rows {"source": "file:line", "title", "text"}, each with None or, if it has no text, a reason to drop it."""
    def value(record, names):
        """The first of these fields that a record has; a list is taken as lines of text."""
        content = next((record[name] for name in names.split() if record.get(name)), "")
        content = "\n".join(map(str, content)) if isinstance(content, list) else content
        return content if isinstance(content, str) and content != "nan" else ""        # pandas' empty cell

    for file in files:
        name = file.relative_to(RAW) if Path(RAW).is_dir() else file.name
        for line, record in read_records(file):
            record = record if isinstance(record, dict) else {}
            row = {"source": f"{name}:{line}", "title": value(record, TITLE_FIELD), "text": value(record, TEXT_FIELD)}
            yield row, None if row["text"] else f"no text in the fields TEXT_FIELD={TEXT_FIELD!r}"


def read_records(file: Path) -> Iterator[tuple[int, object]]:
    """Line (of a json array: place) and fields of each record; None for a broken one. Undecodable bytes are U+FFFD."""
    data, kind = file.read_bytes(), file.suffix.lower()
    encodings = ["utf-16"] if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "gb18030", "big5hkscs"]
    encoding = max(encodings, key=lambda name: count_common(data[:2**18].decode(name, "replace")))
    text = re.sub("\r\n?", "\n", data.decode(encoding, "replace"))
    if kind in (".json", ".jsonl"):
        for number, part in enumerate([text] if kind == ".json" else text.split("\n"), 1):
            records = None
            with contextlib.suppress(ValueError):
                records = json.loads(part)
            if part.strip():
                yield from enumerate(records if isinstance(records, list) else [records], number)
    elif kind == ".csv":
        csv.field_size_limit(2**30)
        rows, line = csv.DictReader((part + "\n" for part in text.split("\n")), strict=True), 2
        try:
            for row in rows:
                yield line, None if None in row else row        # more cells than the header
                line = rows.line_num + 1
        except csv.Error as error:      # a stray quote, which would swallow rows
            sys.exit(f'{file}:{line}: {error}. Double each " inside a cell, and enclose that cell in "')
    else:       # texts separated by lines of ---; the file name of a single one is `title` or `singer - title`
        parts, line = re.split(r"(?m)^---[ \t]*$\n?", text), 1
        title = file.stem.rpartition(" - ")[2] if len(parts) == 1 else ""
        for part in parts:
            if part.strip() or len(parts) == 1:
                yield line, {TITLE_FIELD.split()[0]: title, TEXT_FIELD.split()[0]: part}
            line += part.count("\n") + 1


to_simplified = opencc.OpenCC("t2s").convert
han = f"[{reward.han_range}]"
kana = re.compile("[\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff]")
# control, format, private-use and zero-width characters, surrogates, variation selectors; circled numbers, ※
junk = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\xad\u200b-\u200f\u202a-\u202e\u203b\u2060-\u206f\u2460-\u2473"
                  "\ud800-\uf8ff\ufe00-\ufe0f\ufeff\ufff0-\ufffc\U000e0000-\U0010ffff]")
line_break = re.compile(r"(?:\\r)?\\n|\\r|\r\n?|[\v\f\x85\u2028\u2029]")
hidden = re.compile(r"<!--.*?-->|<(script|style|title|nav|footer|button|think)\b[^<>]*>.*?(?:</\1\s*>|\Z)", re.S | re.I)
line_tag = re.compile(r"</?(?:br|p|div|li|tr|td|h[1-6r])\b[^<>]*>[ \t]*\n?", re.I)
tag = re.compile(r"</?[a-z][^<>]*>", re.I)
# LRC tags and names of sections, time stamps, Genius boilerplate, singers, repeat counts, notes
marks = re.compile(
    r"\[(?:[a-z#]{1,10}:|verse|[a-z-]*chorus|bridge|intro|outro)[^\[\]\n]*\]|[\[(<]\d+[:,][\d:,.]+[\])>]|\[\d{1,3}\]"
    r"|\A\s*\d+ contributors?.*? lyrics|you might also like|\d*embed\s*\Z"
    r"|[(【\[](?:[男女合齐独众]|合唱|念白|重复|repeat)[^)】\]\n]{0,6}[)】\]]|\((?:一作|又作|注)[^()]*\)"
    r"|(?<![a-z0-9])\(?(?:[x×*] ?\d{1,2}|\d{1,2} ?[x×])\)?[ \t]*$", re.I | re.M)
bar = re.compile(r"(?<![a-z0-9:]) ?[/|]+ ?", re.I)
phrase_gap = re.compile(f"(?<={han}{han}) (?={han}{han})")
edge = " •*#>|_=~\\★☆♪♫"         # stripped from both ends of a line
heading = re.compile(r"\A(?:《[^《》\n]*》|[^,。!?\n]{1,40} - [^,。!?\n]{1,40})\n")
speaker = re.compile(f"^(?:男女|合唱|独白|(?![词曲编唱鼓问答曰说道云念]){han}) ?: ?", re.M)
timed_words = re.compile(r'^\{"t":.*$', re.M)       # {"t":0,"c":[{"tx":"春"},{"tx":"风"}]}
# a credit is a label made of these words, at least one of them from `credit`, before a colon
credit = (
    "词|曲|编|唱|歌|乐|音|声|录|谱|制作|监制|出品|发行|母带|混|专辑|作者|总监|鸣谢|吉他|贝[斯司]|鼓|键盘|琴|胡|笛|筝|琵琶|策划|统筹|"
    "企划|推广|封面|后期|版权|来源|出处|转载|标签|分类|语种|流派|上传|更新|点击|阅读|浏览|评论|朝代|[唐宋元明清]代|"
    "(?:lyric|compos|music|arrang|produc|writ|vocal|guitar|bass|drum|"
    "piano|mix|master|record|singer|artist|album|OP|SP)[a-z]*")
credit_rest = r"[人者师员手室棚作填演原翻主配和合弦大小提电木方]|工程|公司|时间|日期|助理|\bby\b|[\s/、,&·.+|及与-]"
note = re.compile(
    rf"^(?=[^:]*(?:{credit}))(?:{credit}|{credit_rest})++:|^(?:words|lyrics|music|composed|written|arranged) by\b"
    r"|https?://|www\.|\.(?:com|net|cn|org)\b|(?:QQ|微信|公众号|微博).{0,6}(?:\d{5}|[:@])|关注.{0,6}公众号"
    r"|更多.{0,20}(?:访问|关注|尽在|点击)|(?:歌词|本文|内容)(?:来自|来源|由.{1,12}(?:提供|整理|编辑|上传))"
    r"|转载(?:自|请|于|须|注明)|版权(?:所有|归)|未经.{0,14}(?:许可|授权)|不得(?:翻唱|转载)|copyright|©|纯音乐,?请"
    r"|^首页 ?>|^(?:[\W\d]*(?:首页|返回|顶部|[上下]一[首篇页]|[主副]歌|[前间尾]奏|verse|chorus|bridge|intro|outro))+"
    r"[\W\d]*$|^(?:[\W\d]*(?:首页|返回|下载|收藏|分享|打印|评论|歌词)){2,}[\W\d]*$", re.I)
one_form = str.maketrans("()「」『』〝〞•・‧∶", "（）“”‘’“”···:")
wide = str.maketrans(",.!?:;", "，。！？：；")


def clean(text: str) -> str:
    """The text as lines, without markup, time stamps, credits and notes, and with one form of each character."""
    for _ in range(3):      # web pages contain doubly escaped entities
        text = html.unescape(junk.sub("", line_break.sub("\n", text)))
    text = timed_words.sub(lambda line: "".join(re.findall(r'"tx": ?"([^"]*)"', line[0])), text)
    text = tag.sub("", line_tag.sub("\n", hidden.sub("\n", unicodedata.normalize("NFKC", text))))
    text = re.sub("[ \t]+", " ", marks.sub("", in_order_of_time(simplified(text)))).strip()
    if len(bar.findall(text)) > len(re.findall(r"\S.*", text)):         # line ends written as / or |
        text = bar.sub("\n", text)
    lines = [line.strip(edge) for line in text.split("\n")]
    full = [line for line in lines if line]
    if len(full) >= 8 and sum(len(line) <= 2 for line in full) > len(full) / 2:         # one or two characters per line
        lines = ["".join(full).replace(",", ",\n")]
    if len(lines) == 1:
        lines = re.sub(r"([。!?;]+[\"”’)》]*)", r"\1\n", phrase_gap.sub("\n", lines[0])).split("\n")
    lines = [line for line in lines if len(line) > 60 or not note.search(line)]
    text = punctuated(speaker.sub("", heading.sub("", "\n".join(lines).strip())))
    text = re.sub(" *\n *", "\n", text).strip()
    if "\n" not in text:
        text = text.replace("，", "，\n").strip()
    usual = min(map(len, re.findall("\n+", text)), default=1)       # 2 if there is a blank line after every line
    return re.sub("\n+", lambda gap: "\n" if len(gap[0]) == usual else "\n\n", text)


def simplified(text: str) -> str:
    """The text in simplified characters; unchanged if all that would change is in GB2312, like 覆, 藉 and 沈."""
    converted = to_simplified(text)
    changed = "".join(old for old, new in zip(text, converted) if old != new)
    if len(changed.encode("gb2312", "ignore")) == 2 * len(changed):
        return text
    return "".join(old if new > "\uffff" else new for old, new in zip(text, converted))     # no font has the rare ones


def in_order_of_time(text: str) -> str:
    """LRC lines in the order in which they are first sung; of several with the same time, only the Chinese ones."""
    timed, time = [], ()
    for line in text.split("\n"):
        stamps = re.findall(r"\d[\d:.]+", re.match(r"(?:\s*\[\d+:[\d:.]+\])*", line)[0])
        time = min((tuple(map(int, re.findall(r"\d+", stamp))) for stamp in stamps), default=time)
        timed.append((time, line, han_share(line) >= MIN_HAN))
    timed.sort(key=lambda entry: entry[0])
    chinese = {time for time, _, is_chinese in timed if is_chinese}
    return "\n".join(line for time, line, is_chinese in timed if is_chinese or not time or time not in chinese)


def punctuated(text: str) -> str:
    """Chinese punctuation in one form: ，。！？：；、“”‘’（）《》——……; a space between phrases becomes a comma."""
    closed = "，。！？：；、“”‘’（）《》—…"
    text = re.sub(r"\.{2,}|[…⋯]+|。{2,}", "……", text)
    text = re.sub(rf"-{{2,}}|[–—―─]+|(?<={han})-(?={han})", "——", text.translate(one_form))
    text = re.sub('"([^"\n]*)"', r"“\1”", text)
    text = re.sub(rf"(?<={han}) (?=[,.!?:;])", "", text)
    half = rf"(?<![a-zA-Z0-9 .])[,!?:;]|[,!?:;](?=\s*(?:{han}|[“‘《（]))|(?<=[{reward.han_range}”’》）])\.(?!\d)"
    text = re.sub(half, lambda mark: mark[0].translate(wide), text)
    text = phrase_gap.sub("，", text)
    text = re.sub(rf"(?<={han}) (?={han})|(?<=[{closed}]) | (?=[{closed}])", "", text)
    return re.sub("([，、；：])[，、；：]+", r"\1", text)


def han_share(text: str) -> float:
    """Share of Han characters among the letters; 0 for Japanese, that is, more than a twentieth of kana."""
    letters = max(1, sum(character.isalpha() or character == "〇" for character in text))
    return len(reward.han(text)) / letters if len(kana.findall(text)) <= 0.05 * letters else 0.0


def count_common(text: str) -> int:
    """Number of characters among the 3,755 commonest in simplified Chinese (level one of GB2312)."""
    return sum(0xb0 <= byte <= 0xd7 for byte in simplified(reward.han(text)).encode("gb2312", "ignore")[::2])


def clean_texts(rows: list[dict]) -> Iterator[tuple[dict, str | None]]:
    """Rows with clean text and title (《…》 or [ti:…] of the text, else the row's), and a reason to drop it or None."""
    for row in rows:
        title = re.search(r"\A\s*《([^《》\n]{1,40})》|^\[ti:([^\]\n]+)\]", row["text"], re.M)
        title = (title[1] or title[2]) if title else row["title"]
        text = clean(row["text"])
        characters = reward.han(text)
        reasons = {"lost characters": re.search("[□〓\ufffd]|？？", text),
                   "language": han_share(text) < MIN_HAN,
                   "short": len(characters) < MIN_CHARS,
                   "long": len(characters) > MAX_CHARS,
                   "garbled": count_common(characters) < MIN_COMMON * len(characters)}
        reason = next((reason for reason, found in reasons.items() if found), None)
        yield row if reason else {**row, "title": clean(title).replace("\n", "").strip("《》"), "text": text}, reason


# ---- lyrics: duplicates and keywords --------------------------------------------------------------------------------


def deduplicate(rows: list[dict]) -> Iterator[tuple[dict, str | None]]:
    """Rows, each with "exact" (an earlier one has the same Han text), "near" (it shares many lines), or None."""
    exact, sizes, texts_with = set(), [], defaultdict(list)     # Han texts; number of lines; line -> texts with it
    for row in rows:
        characters, lines = reward.han(row["text"]), distinct_lines(row["text"])
        shared = Counter(text for line in lines if len(texts_with[line]) <= STOCK_LINES for text in texts_with[line])
        near = any(count >= min(SHARED_LINES, len(lines)) and count >= CONTAINMENT * min(len(lines), sizes[text])
                   for text, count in shared.items())
        reason = "exact" if characters in exact else "near" if near else None
        if not reason:
            exact.add(characters)
            for line in lines:
                texts_with[line].append(len(sizes))
            sizes.append(len(lines))
        yield row, reason


def distinct_lines(text: str) -> set[str]:
    """Phrases of a text (Han only, at least 4 characters); if most are shorter, each joined to the next."""
    phrases = [reward.han(phrase) for phrase in re.split("[，。！？；\n]", text)]
    if sum(len(phrase) for phrase in phrases if len(phrase) >= 4) < sum(map(len, phrases)) / 2:
        phrases = [first + second for first, second in itertools.pairwise(filter(None, phrases))]
    return {phrase for phrase in phrases if len(phrase) >= 4}


def keywords_offline(rows: list[dict]) -> list[list[str]]:
    """Up to WORDS content words of each row, best first by tf-idf: 2 to 4 Han characters, none part of another."""
    counts_of, stop_words = [], STOP_WORDS.split()
    for row in rows:
        words = [word for word, tag in rjieba.tag(row["text"]) if tag[0] in "nvailts" and not tag.startswith("nr")]
        words = [word for word in words if word not in stop_words and re.fullmatch(f"{han}{{2,4}}", word)]
        counts_of.append(Counter(words))
    documents = Counter(itertools.chain(*counts_of))
    least = MIN_DF if len(rows) >= 300 else 2
    most = max(least, MAX_DF * len(rows))
    rarity = {word: math.log(len(rows) / count) for word, count in documents.items() if least <= count <= most}
    found = []
    for counts in counts_of:
        best = []
        for word in sorted(counts, key=lambda word: -(1 + math.log(counts[word])) * rarity.get(word, 0)):
            if rarity.get(word) and len(best) < WORDS and not any(word in other or other in word for other in best):
                best.append(word)
        found.append(best)
    return found


def ask_about(rows: list[dict], question: str, read, cache: Path) -> list:
    """read(row, answer) for API_MODEL's answer to a question about each row; None where no answer is usable."""
    questions = [question.format(**row, listed="，".join(row.get("keywords", []))) for row in rows]
    jobs = [[{"role": "user", "content": text}] for text in questions]
    answers = call_api(jobs, cache, lambda index, answer: read(rows[index], answer) is not None)
    return [answer and read(row, answer) for row, answer in zip(rows, answers)]


def keywords_in(row: dict, answer: str) -> list[str] | None:
    """Words in an answer that occur in the text, none part of another; None if there are too few."""
    words = [word for word in dict.fromkeys(reward.HAN.findall(answer)) if 2 <= len(word) <= 4 and word in row["text"]]
    words = [word for word in words if not any(word != other and word in other for other in words)]
    return words[:KEYWORDS_MAX] if len(words) >= KEYWORDS_MIN else None


def thought_in(row: dict, answer: str) -> str | None:
    """The answer if it is a thought of suitable length that names every keyword and leaves a completion well-formed."""
    in_form = reward.split_verse(f"<think>{answer}</think>{as_completion(row)}")[3] == 1 and "\n" not in answer
    return answer if in_form and 40 <= len(answer) <= 400 and all(word in answer for word in row["keywords"]) else None


# ---- lyrics: samples ------------------------------------------------------------------------------------------------


def verse_lines(text: str) -> list[str]:
    """Lines of a text, made safe for a completion, in which / separates lines and 《》 marks the title."""
    lines = [re.sub("[<>/]", "", line).translate(str.maketrans("《》", "“”")).strip() for line in text.split("\n")]
    return [line for line in lines if reward.han(line)]


def han_lines(row: dict) -> list[str]:
    return [reward.han(line) for line in verse_lines(row["text"])]


def line_codes(row: dict) -> set[int]:
    return {zlib.crc32(line.encode()) for line in han_lines(row) if len(line) >= reward.LINE_HAN}


def as_completion(row: dict) -> str:
    """《title》/line/line; without a title, the first phrase is the title."""
    lines = verse_lines(row["text"])
    title = re.sub("[<>/《》]", "", row["title"]).strip()[:20] or reward.han(re.split("[，。！？]", lines[0])[0])[:8]
    return f"《{title}》/{'/'.join(lines)}"


def as_sample(row: dict, keywords: list[str], thought: str = "") -> dict:
    completion = (f"<think>{thought}</think>" if thought else "") + as_completion(row)
    prompt = reward.prompt(TASK, {"keywords": keywords})
    return {"prompt": prompt, "completion": completion, "keywords": keywords, "source": row["source"]}


def template_thought(row: dict, keywords: list[str]) -> str:
    """A plan read off the text: keywords, the phrase with each, title, number of lines, and the commonest rhyme."""
    title, *lines = as_completion(row).split("/")
    phrases = re.split("[，。！？；/]", "/".join(lines))
    drafts = [f"{word}：{next(reward.han(phrase) for phrase in phrases if word in phrase)}" for word in keywords]
    rhyme, often = Counter(reward.table["finals"].get(reward.han(line)[-1]) for line in lines).most_common(1)[0]
    digits, (tens, ones) = ["", *"一二三四五六七八九"], divmod(min(len(lines), 99), 10)
    count = digits[tens] * (tens > 1) + "十" * (tens > 0) + digits[ones]
    rhymes = f"押{rhyme}韵" if rhyme and often > 1 else "不押韵"
    return f"{'，'.join(keywords)}。{'；'.join(drafts)}。题目是{title[1:-1]}，共{count}行，{rhymes}。"


def rhyme_classes() -> dict[str, str]:
    """Characters of each of the thirteen rhyme classes of Chinese opera (十三辙), by their first reading."""
    classes = {"发花": "a ia ua", "梭坡": "o e uo", "乜斜": "ie ve", "一七": "i v er", "姑苏": "u", "怀来": "ai uai",
               "灰堆": "ei uei", "遥条": "ao iao", "由求": "ou iou", "言前": "an ian uan van", "人辰": "en in uen vn",
               "江阳": "ang iang uang", "中东": "eng ing ong iong ueng"}
    class_of = {final: name for name, finals in classes.items() for final in finals.split()}
    characters = dict.fromkeys(classes, "")
    for code, readings in PINYIN_DICT.items():
        name = class_of.get(to_finals(readings.split(",")[0], strict=True).replace("ü", "v"))
        if name and reward.HAN.match(chr(code)):
            characters[name] += chr(code)
    return characters


def select_texts(rows: list[dict], count: int) -> list[dict]:
    """The `count` best and most varied rows.

    Best: share of rhyming lines plus share of lines as long as a neighbour. Varied: rows are ordered by how
    many better rows have their commonest keyword; those with only new keywords come first, so no theme dominates.
    """
    quality = [reward.rhyme_share(lines) + reward.parallel_share(lines) for lines in map(han_lines, rows)]
    used, repeats = Counter(), {}
    for i in sorted(range(len(rows)), key=lambda i: -quality[i]):
        repeats[i] = max(used[word] for word in rows[i]["keywords"])
        used.update(rows[i]["keywords"])
    return [rows[i] for i in sorted(repeats, key=repeats.get)[:count]]


def split_texts(rows: list[dict], rng: random.Random) -> dict[str, list[dict]]:
    """Rows by split. No two splits share a line or a set of keywords; texts that would break this are left out."""
    rows = list({frozenset(row["keywords"]): row for row in rng.sample(rows, len(rows))}.values())[::-1]
    counts = {"test": min(TEST_TEXTS, len(rows) // 5), "val": min(VAL_TEXTS, len(rows) // 10), "train": len(rows)}
    splits, held_out = {}, set()
    for name, count in counts.items():
        rows = [row for row in rows if not line_codes(row) & held_out]
        splits[name], rows = rows[:count], rows[count:]
        held_out = held_out.union(*map(line_codes, splits[name]))
    if len(splits["val"]) < 5 or not splits["train"]:
        sizes = {name: len(split) for name, split in splits.items()}
        sys.exit(f"too few texts {sizes}: about 50 that do not all share a line are needed")
    return splits


def text_table(train: list[dict], thoughts: list[str], val: list[dict], classes: dict, rng: random.Random) -> dict:
    """What reward.py knows about the training texts (table.json); line counts and lengths as 2nd and 98th percentiles.

    `fluency`: the values that earn 0 (the median of val texts with shuffled characters) and 1 (three quarters of
    val texts reach it). `rhyme_chance`: share of rhyming lines once all lines are shuffled across texts.
    """
    texts = [han_lines(row) for row in train]
    all_lines = list(itertools.chain(*texts))
    characters = Counter("".join(all_lines))
    bigrams = Counter(a + b for line in all_lines for a, b in itertools.pairwise(line)).most_common(500_000)
    reward.table.update(characters=characters, bigrams=dict(bigrams), total=sum(characters.values()))
    rng.shuffle(all_lines)
    drawn, genuine, shuffled = iter(all_lines), [], []
    chance = [reward.rhyme_share(list(itertools.islice(drawn, len(lines)))) for lines in texts]
    for lines in map(han_lines, val):
        letters = iter(rng.sample("".join(lines), sum(map(len, lines))))
        genuine.append(reward.fluency(lines))
        shuffled.append(reward.fluency(["".join(itertools.islice(letters, len(line))) for line in lines]))
    [low], [high] = percentiles(shuffled, 50), percentiles(genuine, 25)
    if high <= low:
        sys.exit(f"{len(train)} training texts are too few: by their pairs of characters, val texts are no more fluent "
                 f"({high:.2f}) than shuffled ones ({low:.2f})")
    codes = sorted(set().union(*map(line_codes, train)))
    return {"finals": classes, "characters": characters, "bigrams": dict(bigrams),
            "lines": base64.b64encode(b"".join(code.to_bytes(4, "little") for code in codes)).decode(),
            "fluency": [low, high], "rhyme_chance": sum(chance) / len(chance),
            "pair_share": percentiles([reward.distinct_share(dict.fromkeys(lines), 2) for lines in texts], 5)[0],
            "line_count": percentiles(map(len, texts), 2, 98),
            "line_chars": percentiles([sum(map(len, lines)) / len(lines) for lines in texts], 2, 98),
            "thought_chars": percentiles([len(reward.han(thought)) for thought in thoughts], 0, 100)}


def variants(row: dict, held_out: set[frozenset], pool: dict[tuple, list], rng: random.Random) -> Iterator[dict]:
    """Up to VARIANTS samples with a thought, none for a set of keywords in `held_out`.

    The first is for the row's keywords, the others for random words from different phrases. These words are usually
    replaced, in text and thought, by words of the same length and rhyme class from `pool`.
    """
    phrases, seen = re.split("[，。！？；/]", "/".join(verse_lines(row["text"]))), set(held_out)
    for attempt in range(VARIANTS):
        words, text = row["keywords"], row
        if attempt:
            mixed = rng.sample(row["words"], len(row["words"]))
            by_phrase = {next((i for i, phrase in enumerate(phrases) if word in phrase), -1): word for word in mixed}
            words = list(by_phrase.values())[:rng.randint(KEYWORDS_MIN, KEYWORDS_MAX)]
            words.sort(key=row["text"].index)
        if attempt and pool and rng.random() < SWAP:
            others = [rng.choice(pool[len(word), reward.table["finals"].get(word[-1])]) for word in words]
            swaps = dict(zip(words, others))
            swapped = {key: re.sub("|".join(words), lambda word: swaps[word[0]], row[key]) for key in ("text", "title")}
            once = all(sum(other in place for place in (row["text"], *others)) == 1 for other in others)
            if once and all(other in swapped["text"] for other in others):
                words, text = others, row | swapped
        if frozenset(words) not in seen:
            seen.add(frozenset(words))
            yield as_sample(text, words, row["thought"] if USE_API else template_thought(text, words))


def prepare_lyrics(folder: Path, files: list[Path]) -> dict:
    """Writes the three recipes, table.json and funnel.json; returns the summary."""
    funnel, cache, rng = {}, folder.parent / "api.jsonl", random.Random(SEED)

    def keep(stage, results):
        """The rows without a reason to drop them; prints how many are dropped for each reason, and the first few."""
        kept, dropped = [], defaultdict(list)
        for row, reason in tqdm(results, desc=stage, unit="text", dynamic_ncols=True):
            (dropped[reason] if reason else kept).append(row)
        counts = {reason: len(rows) for reason, rows in dropped.items()}
        funnel[stage] = {"in": len(kept) + sum(counts.values()), "out": len(kept), "dropped": counts}
        print(f"{stage}: {funnel[stage]['in']} in, {len(kept)} out")
        for reason, rows in dropped.items():
            excerpts = [f"{row['source']}: {junk.sub('', ' '.join(row['text'][:60].split()))}" for row in rows[:3]]
            print(f"  {reason}: {len(rows)}", *excerpts, sep="\n    ")
        return kept

    texts = keep("read", read_texts(files))
    texts = keep("clean", clean_texts(texts))
    texts = keep("unique", deduplicate(texts))
    words = ask_about(texts, KEYWORD_QUESTION, keywords_in, cache) if USE_API else keywords_offline(texts)
    for row, found in zip(texts, words):
        row["words"] = found or []
        row["keywords"] = sorted(row["words"][:KEYWORDS_MAX], key=row["text"].index)
    rows = keep("keywords", [(row, "too few" if len(row["words"]) < KEYWORDS_MIN else None) for row in texts])
    classes = rhyme_classes()
    reward.table["finals"] = {character: name for name, characters in classes.items() for character in characters}
    best = select_texts(rows, COT_TEXTS)
    template = (template_thought(row, row["keywords"]) for row in best)
    for row, thought in zip(best, ask_about(best, THOUGHT_QUESTION, thought_in, cache) if USE_API else template):
        row["thought"] = thought
    reasons = {True: "no usable thought", False: "not among the best and most varied"}
    best = keep("thoughts", [(row, None if row.get("thought") else reasons["thought" in row]) for row in rows])
    write_json(folder / "funnel.json", funnel)

    splits = split_texts(best, rng)
    taken = {row["source"] for split in splits.values() for row in split}
    held_out = {frozenset(row["keywords"]) for row in splits["val"] + splits["test"]}
    held_out_lines = set().union(*map(line_codes, splits["val"] + splits["test"]))

    def training(rows):         # including texts without thoughts or keywords
        others = [row for row in rows if row["source"] not in taken and not line_codes(row) & held_out_lines]
        return splits["train"] + [row for row in others if frozenset(row["keywords"]) not in held_out]

    train = training(texts)
    thoughts = [row["thought"] for row in splits["train"]]
    write_json(folder / "table.json", text_table(train, thoughts, splits["val"], classes, rng))
    pool = defaultdict(list)
    if not USE_API and len(train) < SWAP_BELOW:
        for word in dict.fromkeys(word for row in splits["train"] for word in row["words"]):
            pool[len(word), reward.table["finals"].get(word[-1])].append(word)

    parts = {"raw/train": [as_sample(row, []) for row in train],
             "keywords/train": [as_sample(row, row["keywords"]) for row in training(rows)],
             "train": [sample for row in splits["train"] for sample in variants(row, held_out, pool, rng)]}
    for name in ("val", "test"):
        parts[f"raw/{name}"] = [as_sample(row, []) for row in splits[name]]
        parts[f"keywords/{name}"] = [as_sample(row, row["keywords"]) for row in splits[name]]
        parts[name] = [as_sample(row, row["keywords"], row["thought"]) for row in splits[name]]
    for name, samples in parts.items():
        write_rows(folder / f"{name}.jsonl", samples)
    print(f"\n{samples[0]['prompt']}\n{samples[0]['completion']}\n")
    return {name: len(samples) for name, samples in parts.items()}


# ---- answers from an API: the same in data_prep.py and eval.py ------------------------------------------------------


def call_api(jobs: list[list[dict]], cache: Path, accept=lambda index, answer: True) -> list[str | None]:
    """Answers to lists of chat messages, in order; None where neither of two answers passes accept(index, answer).

    Appends each answer to `cache` as it arrives and never asks for it again. Exits before sending calls that may
    cost more than API_MAX_COST, and on an error that the client's retries did not fix.
    """
    settings = [API_MODEL, API_TEMPERATURE, API_MAX_TOKENS]
    keys = [hashlib.sha256(json.dumps([*settings, job], sort_keys=True).encode()).hexdigest() for job in jobs]
    cached = {}
    for line in cache.read_text(encoding="utf-8", errors="replace").split("\n") if cache.is_file() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):      # a damaged or half-written line
            row = json.loads(line)
            cached[row["key"]] = row["answer"]
    answers = {key: cached[key] for index, key in enumerate(keys) if key in cached and accept(index, cached[key])}
    costs = [(len(str(job)) / 1.5 * API_PRICE_IN + API_MAX_TOKENS * API_PRICE_OUT) / 1e6 for job in jobs]
    options = {"model": API_MODEL, API_LENGTH_FIELD: API_MAX_TOKENS}
    if API_TEMPERATURE >= 0:
        options["temperature"] = API_TEMPERATURE
    spent = 0.0

    def ask(key):
        choice = client.chat.completions.create(messages=jobs[todo[key]], **options).choices[0]
        answer = (choice.message.content or "").rpartition("</think>")[2].strip()
        is_whole = choice.finish_reason != "length" and "<think>" not in answer
        return key, answer if is_whole and answer and accept(todo[key], answer) else None

    for _ in range(2):
        todo = {key: index for index, key in enumerate(keys) if key not in answers}
        if not todo:
            break
        secret, spent = os.environ.get("API_KEY", "").strip(), spent + sum(costs[index] for index in todo.values())
        print(f"{len(todo)} calls to {API_MODEL}, at most {spent:.4f}", flush=True)
        if spent > API_MAX_COST:
            sys.exit(f"{spent:.4f} is above API_MAX_COST={API_MAX_COST}: raise it, or ask for less")
        if not secret:
            sys.exit("set the environment variable API_KEY, and API_BASE for a service other than DeepSeek's")
        client = openai.OpenAI(base_url=os.environ.get("API_BASE", "https://api.deepseek.com/v1"), api_key=secret,
                               timeout=API_TIMEOUT, max_retries=API_RETRIES)
        with ThreadPool(API_THREADS) as pool, open(cache, "a", encoding="utf-8", errors="replace") as file:
            file.write("\n")        # ends the half line that a kill may have left
            try:
                for key, answer in tqdm(pool.imap_unordered(ask, todo), total=len(todo), unit="call"):
                    if answer:
                        answers[key] = answer
                        print(json.dumps({"key": key, "answer": answer}, ensure_ascii=False), file=file, flush=True)
            except (openai.OpenAIError, ValueError, TypeError, IndexError, AttributeError) as error:
                reason = " ".join(f"{type(error).__name__}: {error}".replace(secret, "***").split())[:400]
                sys.exit(f"{API_MODEL} failed, rerun to ask only for what is missing: {reason}")
    return [answers.get(key) for key in keys]


# ---- main -----------------------------------------------------------------------------------------------------------


def main() -> None:
    constants = configure(sys.argv[1:])
    if TASK == "game24":
        if HIGHEST - LOWEST > 19:
            sys.exit(f"HIGHEST={HIGHEST} makes too many hands for 2 GB of memory: use HIGHEST={LOWEST + 19} or less")
        hands = reward.read_hands(Path(HOLDOUT)) if HOLDOUT else []
        folder = open_run(Path(OUT, "data"), constants, {"hands of HOLDOUT": hands})
        summary = prepare_game24(folder, hands)
    elif TASK == "lyrics":
        files = raw_files()
        digest = hashlib.sha256(ascii([(path.name, sha256(path)) for path in files]).encode()).hexdigest()
        folder = open_run(Path(OUT, "data"), constants, {"files of RAW": digest})
        summary = prepare_lyrics(folder, files)
    else:
        sys.exit(f"TASK={TASK}: data is made for game24 and lyrics only; for another task set DATA= to your own folder")
    write_json(folder / "summary.json", summary)
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))


# ---- constants and run folders: the same in every script ------------------------------------------------------------


def configure(argv: list[str]) -> dict:
    """Sets constants of this script and reward.py from NAME=value or --name=value, and returns all of them.

    The top of each file is run again, statement by statement, with these values reapplied after each one, so constants
    that depend on a changed one follow it. Exits if no script has the name. Constants of other scripts are ignored,
    because make passes every constant to every script.
    """
    own = Path(__file__)
    given = {name.lstrip("-").upper(): value for name, _, value in (word.partition("=") for word in argv)}
    if {"H", "HELP"} & given.keys():
        print(own.read_text(encoding="utf-8").partition("\n\n\n#")[0])
        sys.exit()
    tops = {path.name: re.split("\ndef |\n@", path.read_text(encoding="utf-8"))[0] for path in own.parent.glob("*.py")}
    known = set(re.findall(r"^([A-Z]\w*) *=", "\n".join(tops.values()), re.M))
    for name in given.keys() - known:
        sys.exit(f"no script has a constant {name}; nearest: {', '.join(difflib.get_close_matches(name, known))}")
    for path, scope in ((Path(reward.__file__), vars(reward)), (own, globals())):
        for statement in ast.parse(tops[path.name]).body:
            exec(compile(ast.Module([statement], []), str(path), "exec"), scope)
            for name in given.keys() & scope.keys():
                kind = int if isinstance(scope[name], bool) else type(scope[name])
                try:
                    scope[name] = kind(given[name])
                except ValueError:
                    sys.exit(f"{name} must be of type {kind.__name__}, not {given[name]!r}")
    return {name: value for name, value in (vars(reward) | globals()).items() if name in known}


def open_run(folder: Path, constants: dict, inputs: dict) -> Path:
    """Opens the folder of a run, new or resumed; a different run in its place is first renamed to NAME.1, NAME.2, ...

    A run is the same if its inputs and constants are, except for those in `free`. Exits if it is complete or in use.
    Returns the folder with links resolved, so that a link to another disk survives the renaming.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    open_run.lock = open(folder.with_name(f".{folder.name}.lock"), "a")        # held until the process ends
    try:
        fcntl.flock(open_run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        sys.exit(f"{folder} is in use by another process: set OUT= to another folder ({error})")
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "numpy")}
    run = json.loads(json.dumps({"constants": constants, "inputs": inputs, "versions": versions}))
    if (folder / "run.json").is_file():
        old = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        before, now = ({name: value for name, value in each["constants"].items() if name not in free} | each["inputs"]
                       for each in (old, run))
        changed = [name for name in before | now if before.get(name) != now.get(name)]
        if changed:
            kept = next(path for path in map(f"{folder}.{{}}".format, itertools.count(1)) if not Path(path).exists())
            changes = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed)
            print(f"{folder} holds a different run, moved to {kept} (rename it back to continue it): {changes}")
            folder.rename(kept)
        elif (folder / "summary.json").is_file():
            print(f"{folder} is complete")
            sys.exit()
    folder.mkdir(exist_ok=True)
    write_json(folder / "run.json", run)
    shutil.copy(__file__, folder)
    shutil.copy(reward.__file__, folder)
    print("\n".join(f"{name} = {value!r}" for name, value in constants.items()))
    return folder


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w"):
    """A file that gets its name only once it is complete and on disk, so that it is never half-written."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_json(path: Path, value) -> None:
    with atomic_write(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
