"""Makes the data of a task: runs/TASK/data/{train,val,test}.jsonl.

    python data_prep.py                        # half a minute on one core
    python data_prep.py --holdout=hands.txt    # these hands become the test split and are kept out of train and val
    python data_prep.py --task=lyrics --raw=my/lyrics      # a file or folder of texts; without --raw assets/verses.jsonl

game24: enumerates all hands of four numbers, solves them exactly, splits the solvable ones by hand and writes search traces
for SFT: try first steps in their order, go back from what cannot make 24, and at the end compose the answer from the steps.
Unlike a depth-first search, a trace goes on with three numbers only if that solves the hand, or for one step: so each line back
at the four numbers says of three others that they are hopeless, and a model that errs is never stuck among them.

lyrics: reads raw texts, cleans them, drops duplicates, finds keywords, writes thoughts and splits; each stage is a file that is made once.
"""

import argparse
import base64
import codecs
import csv
import difflib
import fcntl
import hashlib
import json
import math
import os
import platform
import queue
import random
import re
import shutil
import ssl
import sys
import threading
import time
import unicodedata
import urllib.request
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from email.utils import mktime_tz, parsedate_tz
from fractions import Fraction
from functools import cache
from html import unescape
from importlib.metadata import version
from itertools import combinations_with_replacement
from pathlib import Path

import opencc
import rjieba
from tqdm import tqdm

import reward

# Run
TASK = "game24"
OUT = ""                     # root folder of the run; empty: runs/TASK
RESUME = 1                   # 0: make the data anew where finished data of other constants is
SEED = 0                     # of the split and of the traces
HOLDOUT = ""                 # file of hands, one a line (`4 5 6 10`, or the last four columns of a csv): the test split
# Game
TARGET = 24
LOWEST, HIGHEST = 1, 13      # numbers of a hand: a deck of cards
VAL_HANDS = 136              # a tenth of the 1,362 solvable hands
TEST_HANDS = 272             # a fifth
# Traces
TRACES_PER_HAND = 128        # for SFT; equal traces are written once
MAX_TRACE_TOKENS = 250       # words of a completion, a longer one is drawn again; a twentieth is above the tiny model's limit in grpo.py
LARGEST = 200                # results above it are tried only where a solution needs them
TRY_RIGHT = 0.4              # chance that the search, in its order, tries a step after which the target can be made ...
TRY_WRONG = 0.45             # ... and one after which it cannot
SLIP = 0.05                  # chance that a right first step is followed by a wrong second one
ENTER = 0.2                  # chance that a second step is tried where none can lead to the target, before going back

# Raw texts of TASK=lyrics
RAW = ""                     # file or folder of raw texts (txt, jsonl, csv); empty: assets/verses.jsonl beside the script
TEXT_FIELD = "text"          # of jsonl and csv
TITLE_FIELD = "title"
SIMPLIFY = 1                 # 1: traditional characters become simplified
MIN_HAN = 0.7                # share of Han among the letters of a text below which it is not Chinese
MIN_COMMON = 0.4             # share of the 3,755 commonest characters below which Han is wrongly decoded text
MIN_CHARS, MAX_CHARS = 12, 2000        # Han characters of a text
NOTE_CHARS = 60              # a longer line with a credit or an address in it is text: only that piece goes
# Duplicates
SHARED_LINES = 3             # distinct lines that a near-duplicate shares with an earlier text ...
CONTAINMENT = 0.5            # ... and their share of the lines of the smaller one
STOCK_LINES = 50             # a line of more texts than this is a stock phrase and proves nothing
READ = (".txt", ".jsonl", ".csv")      # files of RAW; the others are counted
# Keywords
KEYWORDS_MIN, KEYWORDS_MAX = 3, 5      # of a text
WORDS = 12                   # words of a text from which its further training rows draw keywords; by an API there are just the keywords
MIN_DF = 3                   # texts with a keyword, at least (2 below 300 texts)
MAX_DF = 0.1                 # share of the texts with a keyword, at most
STOP_WORDS = frozenset("没有 不会 不能 可以 知道 觉得 不要 不知 时候 有人 有些 无人 不见 不得 不到 不可".split())
# Samples of TASK=lyrics
STAGE = "cot"                # of train.jsonl: raw (texts alone), keywords (to a text), cot (to a thought and a text); those before have folders
USE_API = 0                  # 1: keywords and thoughts by API_MODEL, which costs money; 0: by tf-idf and by a template
COT_TEXTS = 1000             # texts with a thought: the best and most varied ones
VAL_TEXTS, TEST_TEXTS = 100, 200       # at most a tenth and a fifth of them
VARIANTS = 64                # training rows of a text with a thought: its keywords, then random ones of its words
SWAP = 0.9                   # chance that a further row has other words in their place, in verse and plan too: so that a model which could learn ...
SWAP_BELOW = 5000            # ... fewer texts than these by heart looks at its keywords; never with thoughts by an API
LEAST_THOUGHT, MOST_THOUGHT = 40, 400  # characters of a thought by API_MODEL
MAX_MISSING = 0.05           # share of the texts that may be left out because API_MODEL gave no usable answer
MAX_BIGRAMS = 500_000        # pairs of characters whose counts the reward knows: the most frequent ones
# API: an OpenAI-compatible chat endpoint. Its address and key are the environment variables API_BASE and API_KEY
API_MODEL = "deepseek-chat"
API_THREADS = 16             # calls at a time; one that waits to be repeated counts
API_TIMEOUT = 120            # seconds of one attempt as a whole
API_RETRIES = 6              # attempts after the first one
API_TEMPERATURE = 0.7
API_MAX_TOKENS = 1024        # of an answer
API_PRICE_IN = 0.3           # money for a million tokens of messages ...
API_PRICE_OUT = 1.2          # ... and of answers
API_MAX_COST = 5.0           # the same money, for each round of calls (keywords, thoughts, scores), repeated answers included

Step = tuple[Fraction, str, Fraction, Fraction]      # a, operator, b, result


# ---- the 24-point game ----------------------------------------------------------------------------------------------


@cache
def steps_from(state: tuple[Fraction, ...]) -> tuple[tuple[Step, tuple[Fraction, ...]], ...]:
    """All steps from a state, the larger operand first, each with the state it makes: the result, then the rest in order.

    Results below zero are not needed: whatever they solve, a swapped subtraction solves too.
    """
    found = {}
    for i in range(len(state)):
        for j in range(i + 1, len(state)):
            a, b = max(state[i], state[j]), min(state[i], state[j])
            rest = tuple(v for k, v in enumerate(state) if k not in (i, j))
            steps = [(a, "+", b, a + b), (a, "-", b, a - b), (a, "*", b, a * b)]
            steps += [(a, "/", b, exact(a, b))] if b else []
            steps += [(b, "/", a, exact(b, a))] if a != b else []
            found.update({step: (step[3], *rest) for step in steps})
    return tuple(found.items())


def exact(a: Fraction | int, b: Fraction | int) -> Fraction | int:
    """a / b, as an int where it is whole: ints are several times faster to compare and to hash."""
    quotient = Fraction(a) / b
    return int(quotient) if quotient.denominator == 1 else quotient


@cache
def solvable(state: tuple[Fraction, ...], target: int) -> bool:
    """Whether the numbers of a sorted state, each used once, make the target."""
    if len(state) == 1:
        return state[0] == target
    return any(solvable(tuple(sorted(after)), target) for _, after in steps_from(state))


def write_trace(hand: list[int], target: int, rng: random.Random) -> str:
    """One completion for a solvable hand: a search with backtracking that ends in the composed answer."""
    lines = []

    def line(state, step):
        lines.append(f"{' '.join(map(str, state))} | {step[0]} {step[1]} {step[2]} = {step[3]}")

    def choices(state):
        """Steps from a state with what they make and whether that is solvable; odd ones only where nothing else leads on."""
        every = [(step, after, solvable(tuple(sorted(after)), target)) for step, after in steps_from(state)]
        found = [choice for choice in every if plausible(choice[0])]
        return found if any(right for *_, right in found) else [choice for choice in every if plausible(choice[0]) or choice[2]]

    untried, seen, steps = choices(tuple(hand)), set(), []
    while not steps:                # in order, some of the first steps; what was passed over comes when all else has failed
        for choice in list(untried):
            first, state, right = choice
            if steps or rng.random() > (TRY_RIGHT if right else TRY_WRONG):
                continue
            untried.remove(choice)
            line(hand, first)
            if right and (rng.random() > SLIP or not any(solves for *_, solves in untried)):
                second, pair, _ = next(c for c in choices(state) if c[2])
                steps = [first, second, next(c[0] for c in choices(pair) if c[2])]
                line(state, second)
                line(pair, steps[-1])
                continue
            misses = [second for second, _, solves in choices(state) if not solves and (tuple(sorted(state)), second) not in seen]
            if misses and rng.random() < ENTER:
                second = rng.choice(misses)
                seen.add((tuple(sorted(state)), second))
                line(state, second)

    expression = f"{steps[-1][0]} {steps[-1][1]} {steps[-1][2]}".split()
    composed = []
    for a, operator, b, result in reversed(steps[:-1]):
        place = expression.index(str(result))
        expression[place:place + 1] = f"( {a} {operator} {b} )".split()
        composed.append(" ".join(expression))
    lines += composed[:-1]
    return "<think>\n" + "\n".join(lines) + f"\n</think>\n<answer> {composed[-1]} </answer>"


def count_words(completion: str) -> int:
    """Words and newlines: the tokens of MODEL=tiny."""
    return len(completion.replace("\n", " \n ").split(" "))


def plausible(step: Step) -> bool:
    """Whether a search would try it without a reason: no fractions, no large numbers."""
    return step[3].denominator == 1 and step[3] <= LARGEST


def read_hands(path: Path) -> list[tuple[int, ...]]:
    """Hands of a file, sorted: one a line, `4 5 6 10` or the last four columns of a csv. Exits with file, line and reason."""
    hands = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        sys.exit(f"{path}: {error}")
    for number, cells in enumerate(csv.reader(lines), 1):
        words = " ".join(cells).split()
        if not words or (number == 1 and not words[-1].isdigit()):      # blank, or the heading of a csv
            continue
        if len(words) < 4 or not all(re.fullmatch("[1-9][0-9]*", word) for word in words[-4:]) or (len(cells) == 1 and len(words) > 4):
            sys.exit(f"{path}:{number}: four positive integers are expected, not {' '.join(words)!r}")
        hands.append(tuple(sorted(map(int, words[-4:]))))
    if not hands:
        sys.exit(f"{path}: no hand in it")
    return hands


def write_rows(path: Path, rows) -> None:
    """Writes a jsonl file: aside first, then renamed into place, so that it is never half written."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    flush(aside)
    os.replace(aside, path)


def prepare_game24(folder: Path) -> dict:
    """Writes train, val and test of the 24-point game; returns what summary.json says of them."""
    hands = list(combinations_with_replacement(range(LOWEST, HIGHEST + 1), 4))
    can = [hand for hand in hands if solvable(hand, TARGET)]
    print(f"{len(hands)} hands of {LOWEST}..{HIGHEST}, {len(can)} can make {TARGET}")
    rng = random.Random(SEED)
    rng.shuffle(can)
    if HOLDOUT:
        test = [hand for hand in dict.fromkeys(read_hands(Path(HOLDOUT))) if solvable(hand, TARGET)]
        can = [hand for hand in can if hand not in set(test)]
        print(f"{HOLDOUT}: {len(test)} hands that can make {TARGET} are the test split")
    else:
        test, can = can[:TEST_HANDS], can[TEST_HANDS:]
    splits = {"train": can[VAL_HANDS:], "val": can[:VAL_HANDS], "test": test}
    if not all(splits.values()):
        sys.exit(f"not enough hands: {', '.join(f'{name} has {len(part)}' for name, part in splits.items())}; lower VAL_HANDS or TEST_HANDS")
    summary = {"hands": len(hands), "solvable": len(can) + len(test)}
    for name, part in splits.items():
        rows, lengths = [], []
        for hand in tqdm(part, desc=name, unit="hand", dynamic_ncols=True):
            made = {}
            for _ in range(TRACES_PER_HAND if name == "train" else 1):
                numbers = list(hand)
                rng.shuffle(numbers)
                row = {"numbers": numbers} | ({"target": TARGET} if TARGET != 24 else {})
                for _ in range(1000):
                    completion = write_trace(numbers, TARGET, rng)
                    if count_words(completion) <= MAX_TRACE_TOKENS:
                        break
                else:
                    sys.exit(f"no trace of {numbers} is within MAX_TRACE_TOKENS={MAX_TRACE_TOKENS}, the last has {count_words(completion)} words")
                made[completion] = {"id": "", "prompt": reward.prompt(TASK, row), "completion": completion, **row}
            rows += made.values()
        rng.shuffle(rows)
        for index, row in enumerate(rows):
            row["id"] = f"{name}-{index}"
            lengths.append(count_words(row["completion"]))
        write_rows(folder / f"{name}.jsonl", rows)
        lengths.sort()
        percentiles = {f"p{p}": lengths[(len(lengths) - 1) * p // 100] for p in (5, 50, 95, 100)}
        print(f"{name}: {len(part)} hands, {len(rows)} rows, words of a completion {percentiles}")
        summary[name] = {"hands": len(part), "rows": len(rows), **percentiles}
    print(f"\n{rows[0]['prompt']}\n{rows[0]['completion']}\n")
    return summary


# ---- lyrics: reading --------------------------------------------------------------------------------------------------------


def read_raw(path: Path, stage: dict) -> Iterator[dict]:
    """Rows {"source": "file:line", "title", "text"} of a file or of a folder in sorted order; broken ones are counted in `stage`.

    Exits where there is nothing to read, and with the fields that are there where no row has TEXT_FIELD.
    """
    files = (Path(top) / name for top, folders, names in os.walk(path) if not folders.sort() for name in sorted(names))
    others, fields, found = Counter(), {}, False
    for file in (files if path.is_dir() else [path]):
        if file.suffix.lower() not in READ:
            others[file.suffix or file.name] += 1
            continue
        name = JUNK.sub("?", str(file.relative_to(path) if path.is_dir() else file.name))
        try:
            for line, record in read_records(file):
                record = record if isinstance(record, dict) else {}
                fields.update(dict.fromkeys(record))
                found = found or TEXT_FIELD in record
                title, text = record.get(TITLE_FIELD), record.get(TEXT_FIELD)
                row = {"source": f"{name}:{line}", "title": title if isinstance(title, str) else "", "text": text}
                if isinstance(text, str) and "\ufffd" not in text:      # what cannot be decoded was read as U+FFFD
                    yield row
                else:
                    passes(stage, row | {"text": str(text if TEXT_FIELD in record else record)}, "unreadable")
        except OSError as error:
            passes(stage, {"source": name, "text": error.strerror}, "unreadable")
    if others:
        print(f"{path}: {others.total()} files are not txt, jsonl or csv: {', '.join(f'{kind} {n}' for kind, n in others.most_common(10))}")
    if not found:
        sys.exit(f"RAW={path}: no row has the field TEXT_FIELD={TEXT_FIELD}; there is {', '.join(map(str, fields))}" if fields
                 else f"RAW={path}: no text in it ({others.total()} files of other kinds, {stage['in']} unreadable rows)")


def read_records(file: Path) -> Iterator[tuple[int, dict | None]]:
    """Line number and fields of each record of a file; None where a record is broken. What cannot be decoded is U+FFFD."""
    with open(file, encoding=find_encoding(file), errors="replace", newline="" if file.suffix.lower() == ".csv" else None) as lines:
        if file.suffix.lower() == ".jsonl":
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except (ValueError, RecursionError):
                        yield number, None
        elif file.suffix.lower() == ".csv":
            csv.field_size_limit(2**24)
            cells, header, end = csv.reader(lines), None, 0
            while True:
                try:
                    record = next(cells)
                except csv.Error:
                    record = None
                except StopIteration:
                    return
                begin, end = end + 1, cells.line_num
                if header is None and record:
                    header = record
                elif record != []:
                    yield begin, dict(zip(header, record)) if record and header and len(record) <= len(header) else None
        else:
            begin, text = 1, []
            for number, line in enumerate(lines, 1):
                if line.strip() == "---":
                    if any(map(str.strip, text)):
                        yield begin, titled(text, "")
                    begin, text = number + 1, []
                else:
                    text.append(line)
            if begin == 1 or any(map(str.strip, text)):
                yield begin, titled(text, file.stem if begin == 1 else "")


def titled(lines: list[str], stem: str) -> dict:
    """The fields of one text of a txt file: its first line, if that is 《…》, or else the file name, is the title."""
    title = re.fullmatch(r"\s*《([^《》]+)》\s*", next(filter(str.strip, lines), ""))
    return {TITLE_FIELD: title[1] if title else stem, TEXT_FIELD: "".join(lines)}


def find_encoding(file: Path) -> str:
    """UTF-16 by its mark; UTF-8 if most lines are, so that one broken row does not spoil a file; else GB18030 or Big5, by what it reads as."""
    valid, broken = 0, b""
    with open(file, "rb") as lines:
        if lines.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
        lines.seek(0)
        for line in lines:
            if not line.isascii():
                try:
                    line.decode("utf-8")
                    valid += len(line)
                except UnicodeDecodeError:
                    valid -= len(line)
                    broken += line if len(broken) < 2**16 else b""
    if valid >= 0:
        return "utf-8-sig"
    return max(("gb18030", "big5hkscs"), key=lambda name: common_share(reward.han(broken.decode(name, "ignore"))))


# ---- lyrics: cleaning -------------------------------------------------------------------------------------------------------


KANA = re.compile("[\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff]")
TO_SIMPLIFIED = opencc.OpenCC("t2s").convert
LEVEL_ONE = bytes(range(0xb0, 0xd8))        # first bytes of the commonest characters in GB2312
# control, format and zero-width characters, variation selectors, surrogates, private use
JUNK = re.compile("[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
                  "\u3164\ud800-\uf8ff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffc\uffff\U0001f3fb-\U0001f3ff\U000e0000-\U0010ffff]")
BREAK = re.compile("\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
HIDDEN = re.compile(r"<!--.*?(?:-->|\Z)|<(script|style)\b.*?(?:</\1\s*>|\Z)|<(title|nav|footer|button|option)\b[^<>]*>[^<>]*</\2\s*>", re.S | re.I)
LINE_TAG = re.compile(r"</?(?:br|p|div|li|ul|ol|tr|td|table|h[1-6]|hr|section|article|blockquote|pre)\b[^<>]*>[ \t]*\n?", re.I)
TAG = re.compile(r"</?[a-z][^<>]*>|<[!?][^<>]*>|<\d{1,3}:\d{1,2}(?:[.:]\d{1,3})?>", re.I)
STAMP = re.compile(r"\[(\d{1,3}):(\d{1,2})(?:[.:](\d{1,3}))?\]")
STAMPS_FIRST = re.compile(r"\s*(?:\[\d{1,3}:\d{1,2}(?:[.:]\d{1,3})?\]\s*)+")
LRC_TAG = re.compile(r"\[[a-z#]{1,10}:[^\[\]\n]*\]", re.I)
edge = " \t•*#>|_=~\\"
# a label of a credit is made of the first words alone, with the second ones beside them
CREDIT = re.compile("作词|作曲|编曲|填词|谱曲|词曲|演唱|原唱|翻唱|主唱|配唱|和唱|歌手|歌名|歌曲|曲名|专辑|作者|音乐|制作|监制|出品|"
                    "发行|混音|混缩|缩混|录音|母带|人声|总监|制谱|鸣谢|和声|和音|合声|合音|吉他|贝斯|贝司|鼓手|键盘|钢琴|弦乐|小提琴|大提琴|"
                    "二胡|竹笛|古筝|琵琶|打击乐|合成器|策划|统筹|企划|宣传|推广|营销|经纪|封面|后期|编辑|版权|来源|出处|转载|转自|标签|分类|语种|"
                    "流派|发布|上传|更新|点击|阅读|浏览|评论|歌词|lyrics|lyricist|lyric|composer|composed|music|arranger|arranged|arrangement|producer|"
                    "produced|written|vocals|vocal|guitars|guitar|bass|drums|drum|piano|keyboard|strings|mixing|mixed|mix|mastering|mastered|master|"
                    r"recording|recorded|singer|artist|album|lrc|词|曲|编|唱|鼓|\b(?:OP|SP|ISRC|MV)\b", re.I)
BESIDE = re.compile(r"人|者|师|员|手|室|棚|工程|工作|公司|方|时间|日期|次数|量|数|总|助理|执行|联合|所属|木|电|原|责任|特别|写|音频|第一|第二|\bby\b|"
                    r"[\s/、,&·.+|()\[\]【】*和及与-]", re.I)
PIECE = re.compile(rf"(?:^|(?<=\s))(?:{CREDIT.pattern})(?:{BESIDE.pattern}|{CREDIT.pattern}){{0,4}}:\s*[^\s,。;]{{1,20}}(?=\s|$)"
                   r"|(?:https?://|www\.)[\w.:/?&=%#~+-]+", re.I)
NOTE = re.compile(r"https?://|www\.|\.(?:com|net|cn|org)\b|(?:QQ|扣扣)(?:交流)?(?:群|号)?[\s:]*\d{5}|微信号?\s*[a-z]\w{4}|"
                  r"(?:微信|公众号|微博|vx|wechat)(?:公众号|号)?\s*[:@]|关注.{0,6}公众号|更多.{0,20}(?:访问|关注|尽在|点击|请看)|请访问|"
                  r"(?:歌词|本文|文章|内容|资料)(?:来自|来源|转自|摘自|由.{1,12}(?:提供|整理|编辑|上传))|转载(?:自|请|于|须|注明)|"
                  r"^\W*(?:转载|转自(?!己))|^(?:首页|当前位置)\s?[>»|/:]|版权所有|版权归|未经.{0,14}(?:许可|授权)|不得(?:翻唱|翻录|转载)|"
                  r"all rights reserved|copyright|©|歌词(?:下载|大全|网|吾爱|千寻|编辑|制作|贡献|纠错)|纯音乐,?请|阅读全文|"
                  r"^[【\[](?:作词|作曲|编曲|演唱)|^(?:words|lyrics|music|composed|written|produced|arranged|performed) by\b|"
                  r"^\W*(?:verse|chorus|bridge|intro|outro|hook|rap|music|repeat|end)\s?\d?\W*$", re.I)
LONELY = ("返回 点击 免费 立即 在线 下载 收听 播放 收藏 分享 打印 复制 评论 点赞 关注 举报 阅读 浏览 查看 展开 收起 更多 歌词 歌曲 相关 "
          "热门 推荐 文章").split()       # furniture only beside other furniture: alone in a line they may be sung
FURNITURE = re.compile(r"首页|返回(?:首页|顶部|目录|列表|上页)|上一[首篇页]|下一[首篇页]|登录|注册|试听|全文|字号|主歌|副歌|前奏|间奏|尾奏|过门|"
                       rf"{'|'.join(LONELY)}|[\d\s/|>»«‹›:()\[\]【】·,+=*#_~-]")
MARKS = {"(": "（", ")": "）", "「": "“", "」": "”", "『": "‘", "』": "’", "〝": "“", "〞": "”", "•": "·", "・": "·", "‧": "·", "∶": ":"}
WIDE = {",": "，", ".": "。", "!": "！", "?": "？", ":": "：", ";": "；"}
MARK = re.compile(rf"(?<![a-zA-Z0-9 .])[,!?:;]|[,!?:;](?=\s*[{reward.han_range}“‘《（])|(?<=[{reward.han_range}”’》）])\.(?!\d)")
closed = "，。！？：；、“”‘’（）《》—…"
PHRASES = re.compile(rf"(?<=[{reward.han_range}][{reward.han_range}]) (?=[{reward.han_range}][{reward.han_range}])")
SPACE = re.compile(rf"(?<=[{reward.han_range}]) (?=[{reward.han_range}])|(?<=[{closed}]) | (?=[{closed}])")


def clean(text: str) -> str:
    """The text alone, a phrase or a sentence a line: no markup, time stamps, credits, notes or page furniture; one form of each character."""
    text = JUNK.sub("", BREAK.sub("\n", text))
    text = re.sub(r"(?:\\r)?\\n|\\r", "\n", text)
    text = JUNK.sub("", BREAK.sub("\n", unescape(unescape(text))))
    text = TAG.sub("", LINE_TAG.sub("\n", HIDDEN.sub("\n", unicodedata.normalize("NFKC", text))))
    text = without_stamps(simplified(text) if SIMPLIFY else text)
    lines = [line.strip(edge) for line in text.split("\n")]
    full = [line for line in lines if line]
    broken = len(full) >= 8 and sum(len(line) <= 4 and len(reward.han(line)) <= 2 for line in full) > len(full) / 2
    lines = without_notes(lines, broken)
    if broken:              # blank lines are breaks only where they are few
        blank = "\n" if len(lines) < 1.3 * len(full) else ""
        lines = "".join(line or blank for line in lines).split("\n")
    text = punctuated(re.sub("[ \t]+", " ", "\n".join(lines)))
    if broken:
        text = re.sub("([，。！？；…]+[”’）》]*)", r"\1\n", text)
    text = re.sub(" *\n *", "\n", text).strip()
    usual = min(map(len, re.findall("\n+", text)), default=1)       # 2 where each line has a blank one after it
    return re.sub("\n+", lambda gap: "\n" if len(gap[0]) == usual else "\n\n", text)


def simplified(text: str) -> str:
    """The text in simplified characters. One whose characters are all in GB2312 is so already: converting it would harm 覆, 藉 or 沈."""
    converted = TO_SIMPLIFIED(text)
    if converted == text:
        return text
    changed = "".join(old for old, new in zip(text, converted) if old != new)
    if len(changed.encode("gb2312", "ignore")) == 2 * len(changed):
        return text
    return "".join(old if new > "\uffff" else new for old, new in zip(text, converted))        # rare characters that no font has


def without_stamps(text: str) -> str:
    """LRC as lines in the order in which they are first sung: sorted only where lines have several stamps, other files are in order."""
    timed, several, now = [], False, -1.0
    for line in LRC_TAG.sub("", text).split("\n"):
        first = STAMPS_FIRST.match(line)
        if first:
            stamps = [int(minutes) * 60 + float(f"{seconds}.{part}") for minutes, seconds, part in STAMP.findall(first[0])]
            now, several = min(stamps), several or len(stamps) > 1
        timed.append((now, STAMP.sub("", line)))
    if several:
        timed.sort(key=lambda pair: pair[0])
    return "\n".join(line for _, line in timed)


def without_notes(lines: list[str], broken: bool) -> list[str]:
    """Lines (ASCII punctuation) less titles, credits, source notes and page furniture; of long or only lines just the pieces that are so."""
    kept, few, first = [], sum(map(bool, lines)) <= 2, True
    for line in lines:
        if not line or (broken and len(line) <= 4):
            kept.append(line)
            continue
        if first and not few and re.fullmatch(r"《[^《》]*》|[^,。!?]{1,40} - [^,。!?]{1,40}", line):
            continue
        line = re.sub("^(?:男|女|合|男女|独白|歌词|原文|正文) ?: ?", "", line)
        if ":" in line or NOTE.search(line):
            label = line.partition(":")[0]
            names = CREDIT.sub("", label[:40])
            credit = names != label and not BESIDE.sub("", names)
            if (few or len(line) > NOTE_CHARS) and len(reward.han(line)) >= MIN_CHARS:
                line = PIECE.sub("", line).strip()
            elif credit or NOTE.search(line):
                continue
        if len(line) < 40 and line not in LONELY and not FURNITURE.sub("", line):
            continue
        kept.append(line)
        first = False
    return kept


def punctuated(text: str) -> str:
    """Chinese punctuation in one form: ， 。 ！ ？ ： ； 、 “ ” ‘ ’ （ ） 《 》 —— ……; a space between two phrases is a comma, others go."""
    text = re.sub(r"\.{2,}|[…⋯]+|。{2,}", "……", text)
    text = re.sub(rf"-{{2,}}|[–—―─]+|(?<=[{reward.han_range}])-(?=[{reward.han_range}])", "——", text.translate(str.maketrans(MARKS)))
    text = re.sub('"([^"\n]*)"', r"“\1”", text)
    text = re.sub("(?<![a-zA-Z])'([^'\n]*)'(?![a-zA-Z])", r"‘\1’", text)
    text = re.sub(rf"(?<=[{reward.han_range}]) (?=[,.!?:;])", "", text)
    text = MARK.sub(lambda mark: WIDE[mark[0]], text.replace("<<", "《").replace(">>", "》"))
    text = SPACE.sub("", PHRASES.sub("，", text))
    return re.sub("([，、；：])[，、；：]+", r"\1", text)


def han_share(text: str) -> float:
    """Share of Han among the letters of any script; 0 for Japanese: more than a twentieth of kana."""
    characters = len(reward.han(text))
    letters = max(characters, sum(map(str.isalpha, text)), 1)
    return characters / letters if len(KANA.findall(text)) <= 0.05 * letters else 0.0


def common_share(characters: str) -> float:
    """Share of the commonest characters of simplified Chinese (level one of GB2312); Han of the wrong encoding has few."""
    first = simplified(characters).encode("gb2312", "ignore")[::2]
    return (len(first) - len(first.translate(None, LEVEL_ONE))) / max(len(characters), 1)


# ---- lyrics: duplicates -----------------------------------------------------------------------------------------------------


def deduplicate(rows: Iterable[dict]) -> Iterator[tuple[dict, str | None]]:
    """Each row with None, "exact" (its Han text came before) or "near" (it shares lines enough with one kept earlier)."""
    exact, sizes = set(), []        # sizes: distinct lines of each kept text
    postings: dict[int, tuple[int, ...]] = {}       # line -> numbers of the kept texts that have it, the first STOCK_LINES + 1
    for row in rows:
        whole, lines = hash(reward.han(row["text"])), phrases(row["text"])
        shared = Counter(text for line in lines if len(texts := postings.get(line, ())) <= STOCK_LINES for text in texts)
        reason = "exact" if whole in exact else "near" if any(
            count >= min(SHARED_LINES, len(lines)) and count >= CONTAINMENT * min(len(lines), sizes[text]) for text, count in shared.items()
        ) else None
        if reason is None:
            exact.add(whole)
            for line in lines:
                postings[line] = (*postings.get(line, ()), len(sizes))[:STOCK_LINES + 1]
            sizes.append(len(lines))
        yield row, reason


def phrases(text: str) -> set[int]:
    """Hashes of the phrases of a text (Han only, 4 characters and more); where most are shorter, of short ones joined to what follows."""
    parts = [reward.han(part) for part in re.split("[，。！？；\n]", text)]
    if sum(len(part) for part in parts if len(part) >= 4) < sum(map(len, parts)) / 2:
        joined = [""]
        for part in parts:
            joined.append("") if len(joined[-1]) >= 4 else None
            joined[-1] += part
        parts = joined
    return {hash(part) for part in parts if len(part) >= 4}


# ---- lyrics: keywords -------------------------------------------------------------------------------------------------------


def keywords_offline(rows: Iterable[dict]) -> Iterator[list[str] | None]:
    """For each row in order its best words by tf-idf, KEYWORDS_MIN..WORDS of them; None where it has too few. Reads all before the first.

    A word is a noun, verb, adjective, idiom or word of time or place of 2 to 4 Han characters in the text; none is part of another.
    """
    fits, found = {}, []            # a word to itself, or to nothing: by the tag that it gets first
    for row in rows:
        tagged = rjieba.tag(row["text"])
        for word, tag in tagged:
            fits.setdefault(word, word if tag[0] in "nvailts" and not tag.startswith("nr") and 2 <= len(word) <= 4 and reward.HAN.fullmatch(word)
                            and word not in STOP_WORDS else "")
        found.append([fits[word] for word, _ in tagged if fits[word]])      # the one copy of each word: a large corpus fits into memory
    documents = Counter(word for words in found for word in set(words))
    least = MIN_DF if len(found) >= 300 else 2
    most = max(least, MAX_DF * len(found))
    rarity = {word: math.log(len(found) / n) for word, n in documents.items() if least <= n <= most}
    for words in found:
        counts, chosen = Counter(words), []
        for word in sorted(counts, key=lambda word: -(1 + math.log(counts[word])) * rarity.get(word, 0)):
            if rarity.get(word) and len(chosen) < WORDS and not any(word in other or other in word for other in chosen):
                chosen.append(word)
        yield chosen if len(chosen) >= KEYWORDS_MIN else None


# ---- lyrics: stages ---------------------------------------------------------------------------------------------------------


def stage_clean(raw: Path, folder: Path) -> dict:
    """Writes clean.jsonl: Chinese texts of a fit length, each with id, source, title and text."""
    def examine(stage):
        for row in read_raw(raw, stage):
            text = clean(row["text"])
            characters = reward.han(text)
            reason = ("language" if han_share(text) < MIN_HAN else "short" if len(characters) < MIN_CHARS else "long" if len(characters) > MAX_CHARS
                      else "garbled" if common_share(characters) < MIN_COMMON else None)
            title = " ".join(simplified(JUNK.sub("", unicodedata.normalize("NFKC", row["title"]))).split())
            made = {"id": hashlib.sha256(characters.encode()).hexdigest()[:16], "source": row["source"], "title": title.strip("《》"), "text": text}
            yield row if reason else made, reason
    return write_stage(folder, "clean", examine)


def stage_unique(folder: Path) -> dict:
    """Writes unique.jsonl: the rows of clean.jsonl less duplicates."""
    return write_stage(folder, "unique", lambda stage: deduplicate(stored(folder / "clean.jsonl")))


def stage_keywords(folder: Path, find: Callable = keywords_offline, name: str = "tf-idf") -> dict:
    """Writes keywords.jsonl: the rows of unique.jsonl with keywords. `find` takes rows and gives a list of words, or None, for each."""
    def examine(stage):
        for row, words in zip(stored(folder / "unique.jsonl"), find(stored(folder / "unique.jsonl"))):
            best = sorted(words[:KEYWORDS_MAX], key=row["text"].index) if words else []
            yield row | {"keywords": best, "words": words, "keywords_from": name}, None if words else "keywords"
    return write_stage(folder, "keywords", examine)


def stored(path: Path) -> Iterator[dict]:
    """Rows of a stage. Exits where one is damaged."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                sys.exit(f"{path}:{number} is damaged: {error}. Remove the file, and it is made again")
            yield row


def write_stage(folder: Path, name: str, examine: Callable) -> dict:
    """Writes the rows that `examine(stage)` gives without a reason to NAME.jsonl; what it counted goes to funnel.json. Made once."""
    path, counts = folder / f"{name}.jsonl", folder / "funnel.json"
    try:
        funnel = json.loads(counts.read_text(encoding="utf-8")) if counts.is_file() else {}
    except ValueError as error:
        sys.exit(f"{counts} is damaged: {error}. Remove it, and the stages are made again")
    if path.is_file() and name in funnel:
        if (found := sum(1 for _ in stored(path))) != funnel[name]["out"]:
            sys.exit(f"{path} is damaged: it has {found} rows of {funnel[name]['out']}. Remove the file, and it is made again")
        return funnel[name]
    begin, stage = time.monotonic(), {"in": 0, "out": 0, "dropped": {}, "samples": {}}
    write_rows(path, (row for row, reason in tqdm(examine(stage), desc=name, unit="text", dynamic_ncols=True) if passes(stage, row, reason)))
    funnel[name] = stage | {"seconds": round(time.monotonic() - begin, 1)}
    write_json(counts, funnel)          # after the rows: a stage without its counts is made again
    return funnel[name]


def passes(stage: dict, row: dict, reason: str | None) -> bool:
    """Counts a row of a stage; one that is dropped by its reason, with the first three as samples."""
    stage["in"] += 1
    if reason is None:
        stage["out"] += 1
        return True
    stage["dropped"][reason] = stage["dropped"].get(reason, 0) + 1
    samples = stage["samples"].setdefault(reason, [])
    if len(samples) < 3:
        samples.append(f"{row['source']}: {JUNK.sub('', ' '.join(row['text'][:60].split()))}")
    return False


def print_funnel(folder: Path) -> None:
    """Prints rows in and out of each stage that was made, and why rows were dropped, with samples."""
    for name, stage in json.loads((folder / "funnel.json").read_text(encoding="utf-8")).items():
        print(f"{name}: {stage['in']} in, {stage['out']} out, {stage.get('seconds')} s")
        for reason, count in stage["dropped"].items():
            print(f"  {reason}: {count}", *stage["samples"][reason], sep="\n    ")


# ---- lyrics: samples ------------------------------------------------------------------------------------------------


KEYWORD_QUESTION = ("从下面的作品里选出三到五个最能代表它的关键词。每个关键词是作品里原样出现的一个词，两到四个汉字，不要虚词，不要互相包含。"
                    "只输出一行关键词，用“，”隔开。\n\n{text}")
THOUGHT_QUESTION = ("有人拿到关键词“{listed}”，写成了下面的作品。请替作者写出动笔之前的构思：想说什么、什么心情，画面怎样一步步展开，"
                    "每个关键词放在哪里，押什么韵，怎样收尾。一段话，八十到两百字，每个关键词都要提到，不要照抄整行原句，不要分点，只输出构思本身。\n\n《{title}》\n{text}")


def verse_lines(text: str) -> list[str]:
    """Lines of a text as they stand in a completion, where / separates them and 《》 marks the title."""
    for ends in ("([。！？；])", "([，])"):        # one line of several sentences, as a csv may have it
        text = text if "\n" in text.strip() else re.sub(ends, r"\1\n", text)
    lines = [re.sub("[<>/]", "", line).replace("《", "“").replace("》", "”").strip() for line in text.split("\n")]
    return [line for line in lines if reward.han(line)]


def written(row: dict) -> str:
    """The text of a row as a completion. Without a title its first phrase is one."""
    lines = verse_lines(row["text"])
    title = re.sub("[<>/《》]", "", row["title"]).strip()[:20] or reward.han(re.split("[，。！？]", lines[0])[0])[:8]
    return f"《{title}》/{'/'.join(lines)}"


def keywords_api(rows: list[dict], cache: Path) -> list[list[str] | None]:
    """Keywords of each row by API_MODEL: KEYWORDS_MIN to KEYWORDS_MAX words of its text, none part of another; None where none came."""
    def words(i, answer):
        found = re.split("[，,、\\s]+", answer.strip().rstrip("。"))
        good = [w for w in dict.fromkeys(found) if re.fullmatch(f"[{reward.han_range}]{{2,4}}", w) and w in rows[i]["text"]]
        good = [w for w in good if not any(w != other and w in other for other in good)]
        return good[:KEYWORDS_MAX] if len(good) >= KEYWORDS_MIN else None

    answers = call_api([[{"role": "user", "content": KEYWORD_QUESTION.format(text=row["text"])}] for row in rows], cache, words)
    return [answer and words(i, answer) for i, answer in enumerate(nearly_all(answers))]


def thoughts_api(rows: list[dict], cache: Path) -> list[str | None]:
    """A thought for each row by API_MODEL that names every keyword and, with the verse, is in full form; None where none came."""
    def fits(i, answer):
        return (LEAST_THOUGHT <= len(answer.strip()) <= MOST_THOUGHT and all(k in answer for k in rows[i]["keywords"]) and "\n" not in answer.strip()
                and reward.split_verse(f"<think>{answer.strip()}</think>{written(rows[i])}")[3] == 1)

    questions = [THOUGHT_QUESTION.format(**row, listed="，".join(row["keywords"])) for row in rows]
    answers = call_api([[{"role": "user", "content": question}] for question in questions], cache, fits)
    return [answer and answer.strip() for answer in nearly_all(answers)]


def nearly_all(answers: list[str | None]) -> list[str | None]:
    """The answers; exits where more than MAX_MISSING of them are missing, so that a stage is not finished without them."""
    missing = answers.count(None)
    if missing > MAX_MISSING * len(answers):
        sys.exit(f"{missing} of {len(answers)} answers of {API_MODEL} are missing or unusable: the same command asks for these again")
    return answers


PHRASE_END = re.compile("[，。！？；/]")


def template_thought(row: dict, keywords: list[str]) -> str:
    """A plain plan, read off the text: the keywords, the phrase that each gets, title, number of lines, and the rhyme class that most end in."""
    body = written(row)
    title, lines = body[1:body.index("》")], body.split("/")[1:]
    drafts = [f"{k}：{next(reward.han(phrase) for phrase in PHRASE_END.split('/'.join(lines)) if k in phrase)}" for k in keywords]
    rhyme, often = Counter(reward.table["finals"].get(reward.han(line)[-1]) for line in lines).most_common(1)[0]
    digits, (tens, ones) = ["", *"一二三四五六七八九"], divmod(min(len(lines), 99), 10)
    count = digits[tens] * (tens > 1) + "十" * (tens > 0) + digits[ones]
    return f"{'，'.join(keywords)}。{'；'.join(drafts)}。题目是{title}，共{count}行，{f'押{rhyme}韵' if rhyme and often > 1 else '不押韵'}。"


def rhyme_classes() -> dict[str, str]:
    """Characters of each of the thirteen rhyme classes of Chinese opera (十三辙), by the first reading that pypinyin has."""
    from pypinyin.constants import PINYIN_DICT
    from pypinyin.contrib.tone_convert import to_finals

    classes = {"发花": "a ia ua", "梭坡": "o e uo", "乜斜": "ie ve", "一七": "i v er", "姑苏": "u", "怀来": "ai uai",
               "灰堆": "ei uei", "遥条": "ao iao", "由求": "ou iou", "言前": "an ian uan van", "人辰": "en in uen vn",
               "江阳": "ang iang uang", "中东": "eng ing ong iong ueng"}
    of, made = {final: name for name, finals in classes.items() for final in finals.split()}, dict.fromkeys(classes, "")
    for code, readings in PINYIN_DICT.items():
        name = of.get(to_finals(readings.split(",")[0], strict=True).replace("ü", "v"))
        if name and reward.HAN.match(chr(code)):
            made[name] += chr(code)
    return made


def select_texts(rows: list[dict], count: int) -> set[int]:
    """Indices of the `count` best and most varied rows.

    Best: the share of lines that rhyme plus the share of lines as long as a neighbour. Varied: in round r a text is taken only if none of its
    keywords has been taken r times, so that no theme fills the choice.
    """
    quality = []
    for row in rows:
        lines = [reward.han(line) for line in verse_lines(row["text"])]
        quality.append(reward.rhyme_share(lines) + reward.parallel_share(lines))
    left, taken, used, most = sorted(range(len(rows)), key=lambda i: -quality[i]), set(), Counter(), 1
    while left and len(taken) < count:
        passed = []
        for i in left:
            if len(taken) < count and all(used[k] < most for k in rows[i]["keywords"]):
                taken.add(i)
                used.update(rows[i]["keywords"])
            else:
                passed.append(i)
        left, most = passed, most + 1
    return taken


def stage_cot(folder: Path, cache: Path) -> dict:
    """Writes cot.jsonl: the COT_TEXTS best and most varied rows of keywords.jsonl, each with a thought."""
    def examine(stage):
        rows = list(stored(folder / "keywords.jsonl"))
        taken = select_texts(rows, COT_TEXTS)
        yield from ((row, "not among the best and most varied") for i, row in enumerate(rows) if i not in taken)
        rows = [row for i, row in enumerate(rows) if i in taken]
        asked = USE_API and STAGE == "cot"
        thoughts = thoughts_api(rows, cache) if asked else [template_thought(row, row["keywords"]) for row in rows]
        for row, thought in zip(rows, thoughts):
            yield row | {"thought": thought, "thought_from": API_MODEL if asked else "template"}, None if thought else "thought"
    return write_stage(folder, "cot", examine)


def text_table(train: list[dict], thoughts: list[str], val: list[dict], classes: dict[str, str], rng: random.Random) -> dict:
    """What reward.py knows of the training texts, as table.json holds it; `fluency` is scaled on val texts, which are not counted.

    `fluency`: what earns 0, the median of val texts with shuffled characters, and what earns 1, which three quarters of the val texts reach.
    Lengths: 2nd and 98th percentile; `pair_share` the 5th. `rhyme_chance`: share of rhyming lines where lines of any texts are put together.
    """
    texts = [[reward.han(line) for line in verse_lines(row["text"])] for row in train]
    every = [line for lines in texts for line in lines]
    characters = Counter("".join(every))
    bigrams = dict(Counter(line[i:i + 2] for line in every for i in range(len(line) - 1)).most_common(MAX_BIGRAMS))
    codes = sorted({reward.line_code(line) for line in every if len(line) >= reward.LINE_HAN})
    reward.table.update(characters=characters, bigrams=bigrams, total=sum(characters.values()))
    rng.shuffle(every)
    pool, genuine, shuffled = iter(every), [], []
    chance = [reward.rhyme_share([next(pool) for _ in lines]) for lines in texts]
    for row in val:
        lines = [reward.han(line) for line in verse_lines(row["text"])]
        letters = iter(rng.sample("".join(lines), sum(map(len, lines))))
        genuine.append(reward.fluency(lines))
        shuffled.append(reward.fluency(["".join(next(letters) for _ in line) for line in lines]))
    low, high = sorted(shuffled)[len(shuffled) // 2], sorted(genuine)[len(genuine) // 4]
    if high <= low:
        sys.exit(f"the {len(train)} training texts are too few, or no texts: by their pairs of characters val texts are no likelier "
                 f"({high:.2f}) than shuffled ones ({low:.2f})")

    def window(values, least=2, most=98):
        values = sorted(values)
        return [values[(len(values) - 1) * least // 100], values[(len(values) - 1) * most // 100]]

    return {"finals": classes, "characters": characters, "bigrams": bigrams,
            "lines": base64.b64encode(array("I", codes).tobytes()).decode(), "fluency": [low, high], "rhyme_chance": sum(chance) / len(chance),
            "pair_share": window(map(reward.pair_share, texts), 5)[0],
            "line_count": window(map(len, texts)), "line_chars": window(sum(map(len, lines)) / len(lines) for lines in texts),
            "thought_chars": window((len(reward.han(thought)) for thought in thoughts), 0, 100)}


def split_texts(rows: list[dict], rng: random.Random) -> dict[str, list[dict]]:
    """Rows as train, val and test; of texts that share a line, or have the same keywords, only one split has some, the others are left out."""
    rows = list({tuple(sorted(row["keywords"])): row for row in rng.sample(rows, len(rows))}.values())
    counts = {"test": min(TEST_TEXTS, len(rows) // 5), "val": min(VAL_TEXTS, len(rows) // 10), "train": len(rows)}
    if counts["val"] < 5:
        sys.exit(f"{len(rows)} texts are left, 50 are needed at least: the funnel above says where the others went. Add texts, then RESUME=0")
    splits, held = {name: [] for name in counts}, set()
    for name, count in counts.items():
        mine = set()
        while rows and len(splits[name]) < count:
            row = rows.pop()
            codes = line_codes(row)
            if not codes & held:
                splits[name].append(row)
                mine |= codes
        held |= mine
    if not all(splits.values()):
        sys.exit(f"train, val and test have {', '.join(str(len(splits[name])) for name in ('train', 'val', 'test'))} texts: nearly all texts share a "
                 "line, which is in many of them and belongs to none; take it out of RAW")
    return splits


def line_codes(row: dict) -> set[int]:
    return {reward.line_code(line) for line in verse_lines(row["text"]) if len(reward.han(line)) >= reward.LINE_HAN}


def as_row(row: dict, keywords: list[str], thought: str = "") -> dict:
    """A row of data: a text as the completion for some keywords."""
    return {"prompt": reward.prompt(TASK, {"keywords": keywords}), "completion": (thought and f"<think>{thought}</think>") + written(row),
            "keywords": keywords, "source": row["source"]}


def variants(row: dict, count: int, held: set[tuple], pool: dict[tuple, list[str]], rng: random.Random) -> Iterator[dict]:
    """Up to `count` samples with a thought: for the keywords, then for random words of different phrases; none for a set of keywords in `held`.

    Where `pool` has words, by length and rhyme class, most of the further ones have these in the places of their keywords.
    """
    finals, phrases, seen = reward.table["finals"], PHRASE_END.split("/".join(verse_lines(row["text"]))), set(held)
    for attempt in range(count):
        words, made = row["keywords"], row
        if attempt:
            mixed = rng.sample(row["words"], len(row["words"]))
            apart = {next((i for i, phrase in enumerate(phrases) if word in phrase), -1): word for word in mixed}
            words = sorted(list(apart.values())[:rng.randint(KEYWORDS_MIN, KEYWORDS_MAX)], key=row["text"].index)
        if attempt and pool and rng.random() < SWAP:
            others = [rng.choice(pool[len(word), finals.get(word[-1])]) for word in words]
            swaps = dict(zip(words, others))
            swapped = row | {name: re.sub("|".join(words), lambda word: swaps[word[0]], row[name]) for name in ("text", "title")}
            if all(sum(word in text for text in (row["text"], *others)) == 1 and word in swapped["text"] for word in others):
                words, made = others, swapped
        if tuple(sorted(words)) not in seen:
            seen.add(tuple(sorted(words)))
            yield as_row(made, words, template_thought(made, words) if row["thought_from"] == "template" else row["thought"])


def raw_path() -> Path:
    return Path(RAW) if RAW else Path(__file__).resolve().with_name("assets") / "verses.jsonl"


def sha256_of_all(path: Path) -> str:
    """One hash of a file, or of the names and contents of all files of a folder that are read."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in READ) if path.is_dir() else []
    names = "".join(f"{file.relative_to(path)} {sha256(file)}\n" for file in files).encode(errors="surrogateescape")
    return hashlib.sha256(names).hexdigest() if path.is_dir() else sha256(path)


def prepare_lyrics(folder: Path) -> dict:
    """Writes the stages, table.json, and train, val and test of STAGE and of the recipes before it; returns what summary.json says of them."""
    cache, rng = folder.parent / "api.jsonl", random.Random(SEED)
    classes = rhyme_classes()
    reward.table.update(finals={character: name for name, characters in classes.items() for character in characters})
    stage_clean(raw_path(), folder)
    stage_unique(folder)
    find = (lambda rows: keywords_api(list(rows), cache), API_MODEL) if USE_API and STAGE != "raw" else (keywords_offline, "tf-idf")
    stage_keywords(folder, *find)
    stage_cot(folder, cache)
    print_funnel(folder)
    splits = split_texts(list(stored(folder / "cot.jsonl")), rng)
    codes = set().union(*map(line_codes, splits["val"] + splits["test"]))
    held, chosen = {tuple(sorted(row["keywords"])) for row in splits["val"] + splits["test"]}, {row["id"] for rows in splits.values() for row in rows}

    def training(name):         # with the texts that have no thought, or no keywords; for each what is held out stays out
        return splits["train"] + [row for row in stored(folder / f"{name}.jsonl") if row["id"] not in chosen and not line_codes(row) & codes
                                  and tuple(sorted(row.get("keywords", ()))) not in held]

    texts = training("unique")
    write_json(folder / "table.json", text_table(texts, [row["thought"] for row in splits["train"]], splits["val"], classes, rng))
    pool, swap = defaultdict(list), not USE_API and len(texts) < SWAP_BELOW
    for word in dict.fromkeys(word for row in splits["train"] if swap for word in row["words"]):
        pool[len(word), reward.table["finals"].get(word[-1])].append(word)
    recipes = {"raw": {"train": [as_row(row, []) for row in texts]},
               "keywords": {"train": [as_row(row, row["keywords"]) for row in training("keywords")]},
               "cot": {"train": [made for row in splits["train"] for made in variants(row, VARIANTS, held, pool, rng)]}}
    for name in ("val", "test"):
        recipes["raw"][name] = [as_row(row, []) for row in splits[name]]
        recipes["keywords"][name] = [as_row(row, row["keywords"]) for row in splits[name]]
        recipes["cot"][name] = [as_row(row, row["keywords"], row["thought"]) for row in splits[name]]
    summary = {}
    for stage in list(recipes)[:list(recipes).index(STAGE) + 1]:
        place = folder if stage == STAGE else folder / stage
        place.mkdir(exist_ok=True)
        for name, rows in recipes[stage].items():
            write_rows(place / f"{name}.jsonl", [{"id": f"{name}-{i}", **row} for i, row in enumerate(rows)])
            summary[f"{stage}_{name}"] = len(rows)
    first = recipes[STAGE]["train"][0]
    print(f"\n{first['prompt']}\n{first['completion']}\n")
    return summary


# ---- answers of an API ----------------------------------------------------------------------------------------------


def call_api(jobs: list[list[dict]], cache: Path, accept=lambda index, text: True) -> list[str | None]:
    """Answers to chat messages (a job is its list of messages) in order; None where none came that accept(index of the job, answer) takes.

    Each is a line of `cache`, which one process at a time may use, as soon as it is there. What is acceptable in it is not asked again.
    """
    keys = [hashlib.sha256(json.dumps([API_MODEL, API_TEMPERATURE, API_MAX_TOKENS, job], sort_keys=True).encode()).hexdigest() for job in jobs]
    places, answers = {key: index for index, key in enumerate(keys)}, {}
    cache.parent.mkdir(parents=True, exist_ok=True)
    with open(cache, "a+b") as file:
        file.seek(0)
        for line in file.readlines():
            whole = line.endswith(b"\n")
            try:
                row = json.loads(line)
                answers[row["key"]] = row["answer"] + ""        # raises where it is no text
                file.write(b"" if whole else b"\n")
            except (ValueError, TypeError, KeyError, RecursionError):       # damaged: asked again; the last one may be half a line
                file.truncate(file.tell() - (0 if whole else len(line)))
        answers = {key: answers[key] for key in answers.keys() & set(keys) if accept(places[key], answers[key])}
        todo = {key: job for key, job in zip(keys, jobs, strict=True) if key not in answers}
        answers |= ask_api(todo, file, lambda key, answer: accept(places[key], answer)) if todo else {}
    return [answers.get(key) for key in keys]


def ask_api(todo: dict[str, list[dict]], file, accept) -> dict[str, str]:
    """Answers to messages by key, each also appended to the open cache. Prints what it costs at most, and why calls failed, which are left out.

    Exits, before anything is sent, above API_MAX_COST or without a usable key, and at once on a status that repeating does not change.
    """
    base, secret = (os.environ.get(name, "").strip() for name in ("API_BASE", "API_KEY"))
    url = (base or "https://api.deepseek.com/v1").rstrip("/") + "/chat/completions"
    host = re.fullmatch(r"https?://((?:[\w.-]+|\[[\da-fA-F:.]+\])(?::\d+)?)/[\w./~%:+-]*", url, re.ASCII)
    if not host:            # not shown: it may hold a password
        sys.exit("the environment variable API_BASE is no address: set it to one like https://api.deepseek.com/v1, or unset it")
    if API_THREADS < 1:
        sys.exit(f"API_THREADS={API_THREADS}: at least 1 is needed")
    costs = {key: (len(json.dumps(job, ensure_ascii=False)) / 1.5 * API_PRICE_IN + API_MAX_TOKENS * API_PRICE_OUT) / 1e6 for key, job in todo.items()}
    host, cost = host[1], sum(costs.values())
    print(f"{len(todo)} calls to {API_MODEL} at {host}, at most {cost:.4f}", flush=True)
    if not cost <= API_MAX_COST:
        sys.exit(f"{cost:.4f} is above API_MAX_COST={API_MAX_COST}: raise it, or ask less (fewer texts, a lower API_MAX_TOKENS)")
    if not re.fullmatch("[!-~]+", secret):
        sys.exit(f"the environment variable API_KEY {'has characters that no key has' if secret else 'is not set'}: set it to your key for {host}")
    opener = urllib.request.OpenerDirector()        # one that does not follow redirects and does not raise on a status
    for handler in (urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(context=ssl.create_default_context())):
        opener.add_handler(handler)
    waiting, active, done, rng = list(todo)[::-1], {}, queue.SimpleQueue(), random.Random()
    answers, failed, fatal = {}, Counter(), ""

    def start(key, count, pause):       # a thread for each attempt: one that hangs is left behind
        active[key] = attempt = (time.monotonic() + pause + API_TIMEOUT, count)
        threading.Thread(target=lambda: done.put((key, attempt, *attempt_api(opener, url, secret, todo[key], pause))), daemon=True).start()

    with tqdm(total=len(todo), unit="call", dynamic_ncols=True) as bar:
        while waiting or active:
            while waiting and len(active) < API_THREADS and not fatal:
                start(waiting.pop(), 1, 0)
            try:
                key, attempt, status, wait, answer, said = done.get(timeout=max(0, min(active.values())[0] - time.monotonic()))
            except queue.Empty:
                key, attempt = min(active.items(), key=lambda item: item[1])
                status, wait, answer, said = 0, 0, "", f"no whole answer in {API_TIMEOUT} s"
            if active.get(key) is attempt:          # else it came after its time
                del active[key]
                again = cost + (costs[key] if status == 200 or attempt[0] <= time.monotonic() else 0)       # it may have been charged
                if answer.strip() and accept(key, answer):
                    answers[key] = answer
                    file.write(json.dumps({"key": key, "answer": answer}, ensure_ascii=False).encode() + b"\n")
                    file.flush()
                elif 300 <= status < 500 and status not in (408, 425, 429):
                    fatal = f"{host} refuses: {said}"
                elif attempt[1] <= API_RETRIES and again <= API_MAX_COST:
                    cost = again
                    start(key, attempt[1] + 1, min(60, max(0, wait) + rng.uniform(0, min(20, 0.1 * 2 ** min(attempt[1] - 1, 9)))))
                else:
                    failed[said if attempt[1] > API_RETRIES else f"API_MAX_COST={API_MAX_COST} allows no further attempt after {said}"] += 1
                bar.update(key not in active)
            if fatal and (done.empty() or not active):
                sys.exit(fatal)
    if failed:
        reasons = "; ".join(f"{count} times {reason}" for reason, count in failed.most_common(3))
        print(f"{failed.total()} of {len(todo)} calls to {host} failed, the same command asks them again; most often: {reasons}")
    return answers


def attempt_api(opener, url: str, secret: str, messages: list[dict], pause: float) -> tuple[int, float, str, str]:
    """(status or 0, seconds that Retry-After asks for, answer, what was said) after a pause. Never raises; the key is *** in all of it."""
    status, wait, answer, said, body = 0, 0.0, "", "", bytearray()
    time.sleep(pause)
    end = time.monotonic() + API_TIMEOUT
    try:
        data = json.dumps({"model": API_MODEL, "messages": messages, "temperature": API_TEMPERATURE, "max_tokens": API_MAX_TOKENS}).encode()
        headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json", "User-Agent": "chat-client"}
        with opener.open(urllib.request.Request(url, data, headers), timeout=API_TIMEOUT) as response:
            status, after = response.status, response.headers["Retry-After"] or ""
            date = parsedate_tz(after)
            wait = mktime_tz(date) - time.time() if date else float(after) if re.fullmatch(r"\d+(\.\d+)?", after) else 0.0
            while len(body) < 2**24 and time.monotonic() < end and (chunk := response.read1(65536)):
                body += chunk
        data = json.loads(body)
        said = json.dumps(data, ensure_ascii=False)
        if status == 200:
            answer = said = re.sub("[\ud800-\udfff]", "\ufffd", data["choices"][0]["message"]["content"])     # half a surrogate pair is no text
    except Exception as error:          # whatever it is, the call is repeated or fails with this reason: a thread that raises would hide it
        said = said or body.decode(errors="replace") or (status and "an empty body") or str(getattr(error, "reason", error)) or type(error).__name__
    answer = answer.replace(secret, "***") if len(secret) > 7 else answer       # a shorter one is a dummy, which may be a word of the answer
    said = " ".join("".join(c if c.isprintable() else " " for c in said.replace(secret, "***")[:1000]).split())[:300]
    return status, wait, answer, f"status {status}: {said}" if status else said


def main() -> None:
    constants = override_constants(sys.argv[1:])
    recipes = {"game24": prepare_game24, "lyrics": prepare_lyrics}
    if TASK not in recipes:
        sys.exit(f"no recipe makes the data of TASK={TASK}; there is {', '.join(recipes)}. Set DATA= to a folder that has it")
    if HOLDOUT and TASK != "game24":
        sys.exit(f"HOLDOUT= is for TASK=game24, not {TASK}")
    if HOLDOUT and not Path(HOLDOUT).is_file():
        sys.exit(f"HOLDOUT={HOLDOUT}: there is no such file")
    if TASK == "lyrics" and not any(path.is_file() for path in (raw_path(), *raw_path().rglob("*"))):
        sys.exit(f"RAW={raw_path()}: there is no such file, or no file in it")
    if RAW and TASK != "lyrics":
        sys.exit(f"RAW= is for TASK=lyrics, not {TASK}")
    if not 1 <= KEYWORDS_MIN <= KEYWORDS_MAX <= min(10, WORDS):
        sys.exit(f"1 <= KEYWORDS_MIN <= KEYWORDS_MAX <= 10 and WORDS is needed, not {KEYWORDS_MIN}, {KEYWORDS_MAX} and {WORDS}")
    for name, least in {"VAL_TEXTS": 5, "TEST_TEXTS": 1, "COT_TEXTS": 50, "VARIANTS": 1, "MAX_BIGRAMS": 1}.items():
        if constants[name] < least:
            sys.exit(f"{name} must be {least} at least, not {constants[name]}")
    if STAGE not in ("raw", "keywords", "cot"):
        sys.exit(f"unknown STAGE {STAGE!r}; there is raw, keywords, cot")
    if not 1 <= LOWEST <= HIGHEST:
        sys.exit(f"numbers must be from 1 up: LOWEST={LOWEST}, HIGHEST={HIGHEST}")
    folder = Path(OUT or f"runs/{TASK}") / "data"
    inputs = {"HOLDOUT": sha256(Path(HOLDOUT))} if HOLDOUT else {"files of RAW": sha256_of_all(raw_path())} if TASK == "lyrics" else {}
    if header := start_run(folder, constants, inputs, "cpu"):       # what was cut off is made again, but for stages that are whole
        new_run(folder, header)
    finish_run(folder, recipes[TASK](folder))


# ---- plumbing: constants, folder and data of a run ------------------------------------------------------------------


def override_constants(argv: list[str], is_tiny=lambda given: False) -> dict:
    """Sets the CAPS constants of this file and of reward.py from `--name=value`; returns all of them.

    Exits with the nearest names where there is no such constant, with the type where a value does not fit, and where it is negative.
    """
    scopes = {name: scope for scope in (vars(reward), globals()) for name, value in list(scope.items())
              if re.fullmatch("[A-Z][A-Z0-9_]*", name) and isinstance(value, (int, float, str))}
    source = "\n".join(Path(module.__file__).read_text(encoding="utf-8") for module in (reward, sys.modules[__name__]))
    comments = dict(re.findall(r"^([A-Z][A-Z0-9_]*) = [^#\n]*(?:# (.*))?$", source, re.MULTILINE))
    sets = {name: globals().get(name.upper().replace(" ", "_"), {}) for name in ("lyrics", "tiny", "tiny lyrics")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, scope in scopes.items():
        default = f"{scope[name]!r}" + "".join(f", {kind}: {values[name]!r}" for kind, values in sets.items() if name in values)
        parser.add_argument(f"--{name.lower()}", type=type(scope[name]), metavar=type(scope[name]).__name__,
                            help=f"({default}) {comments.get(name, '')}".replace("%", "%%"), default=argparse.SUPPRESS)
    known, unknown = parser.parse_known_args(argv)
    for word in unknown:
        name = word.split("=")[0].lstrip("-").upper()
        near = [f"--{n.lower()}" for n in difflib.get_close_matches(name, scopes, 3, 0.5)]
        parser.exit(2, f"{Path(__file__).name}: no constant {name}" + (f"; did you mean {' or '.join(near)}?\n" if near else "; see --help\n"))
    given = {name.upper(): value for name, value in vars(known).items()}
    for name, value in given.items():
        if not isinstance(value, str) and not (math.isfinite(value) and (value >= 0 or scopes[name][name] < 0)):
            parser.exit(2, f"{Path(__file__).name}: {name} must be finite{', and at least 0' * (scopes[name][name] >= 0)}, not {value}\n")
    kinds = [given.get("TASK", TASK)] + (["tiny", f"tiny {given.get('TASK', TASK)}"] if is_tiny(given) else [])
    for values in [sets.get(kind, {}) for kind in kinds] + [given]:
        for name, value in values.items():
            scopes[name][name] = value
    if TASK not in reward.TASKS:
        parser.exit(2, f"{Path(__file__).name}: unknown TASK {TASK!r}; there is {', '.join(reward.TASKS)}\n")
    return {name: scope[name] for name, scope in scopes.items()}


def start_run(folder: Path, constants: dict, inputs: dict[str, str], device: str) -> dict | None:
    """Takes the run folder for this process alone; returns the header of a new run, for new_run, or None where a cut-off one can go on.

    Exits with 0 where the folder holds the finished run of the same constants and inputs; with the difference and the two ways out
    where it holds another one; and where another process works in it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.parent / f".{folder.name}.lock", os.O_RDWR | os.O_CREAT)      # never closed: it is held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"{folder}: another process works in it. Wait for its end, or set OUT= to another folder")
    # they say where and how fast, not what
    free = ("OUT", "DATA", "SFT", "RAW", "RESUME", "STRICT", "THREADS", "ROLLOUT_ROWS", "ROLLOUT_COPY", "MICRO_BATCH_TOKENS", "EVAL_BATCH_TOKENS",
            "HEAD_CHUNK", "GRADIENT_CHECKPOINTING", "CUDA_GRAPHS", "SAVE_EVERY", "KEEP_LAST", "API_THREADS", "API_TIMEOUT", "API_RETRIES",
            "API_PRICE_IN", "API_PRICE_OUT", "API_MAX_COST", "MAX_MISSING")
    sources = [Path(__file__).resolve(), Path(reward.__file__).resolve()]
    header = {"constants": constants, "inputs": inputs | {path.name: sha256(path) for path in sources}, "device": device,
              "python": platform.python_version(), "versions": {p: version(p) for p in ("torch", "transformers", "peft", "bitsandbytes", "numpy")}}
    run, finished = folder / "run.json", (folder / "summary.json").is_file()
    if folder.is_dir() and any(path.suffix not in (".png", ".tmp") for path in folder.iterdir()) and not run.is_file():
        sys.exit(f"{folder} holds files that are not of a run: choose another OUT=")
    if RESUME and (finished or any(folder.glob("*.jsonl")) or any(folder.glob("step-*"))):
        try:
            old = json.loads(run.read_text(encoding="utf-8"))
            then, now = ({**h["constants"], **h["inputs"]} for h in (old, header))
        except (ValueError, TypeError, KeyError) as error:
            sys.exit(f"{run} is damaged: {error!r}.\nOUT= another folder keeps the run, RESUME=0 replaces it")
        changed = [f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in {**then, **now}
                   if then.get(name) != now.get(name) and name not in free]
        if changed:
            sys.exit(f"{folder} is {'a finished' if finished else 'an unfinished'} run of something else: {'; '.join(changed)}.\n"
                     "OUT= another folder keeps it, RESUME=0 replaces it")
        if finished:
            (folder / "summary.json").touch()
            print(f"{folder} is complete: nothing to do")
            sys.exit(0)
        return None
    return header


def new_run(folder: Path, header: dict) -> None:
    """Puts an empty run in the place of the folder, with source, constants, versions, device and hashes of the inputs; prints the constants.

    Called once all that may fail at the start, such as a model that is not there, has not: an old run is not lost to a typo.
    """
    replaced = folder.parent / f".{folder.name}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.is_dir():
        os.rename(folder, replaced)         # at once: half a folder would be nobody's
    folder.mkdir()
    write_json(folder / "run.json", header)
    for source in (__file__, reward.__file__):
        shutil.copy(source, folder)
    shutil.rmtree(replaced, ignore_errors=True)
    print("\n".join(f"{name} = {value!r}" for name, value in header["constants"].items()))


def finish_run(folder: Path, summary: dict) -> None:
    """Writes summary.json, whose presence says that the run is complete, and prints it as `name: value` lines."""
    write_json(folder / "summary.json", summary)
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))


def write_json(path: Path, value) -> None:
    """Writes a file aside, flushes it to the disk, and renames it into place: it is never half written."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    flush(aside)
    os.replace(aside, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)           # the stages that are whole stay
