"""Makes the data of a task: runs/TASK/data/{train,val,test}.jsonl.

    python data_prep.py                               # the 24-point game: 100,993 search traces, 25 s on one core
    python data_prep.py HOLDOUT=hands.txt             # these hands are the test split, and in no other
    python data_prep.py TASK=lyrics RAW=my/lyrics     # a file or folder of texts, by default assets/verses.jsonl

game24: solves all hands and writes search traces for SFT: try some first steps in order, go back from those that cannot
make 24, compose the answer. Unlike a depth-first search, a trace continues with three numbers only if they solve the
hand, or for a single step: each line back at four numbers says that the three before it are hopeless, so a model that
errs is never stuck among them.

lyrics: reads texts, cleans them, drops duplicates, finds keywords, adds thoughts, splits. There are three recipes for
three stages of SFT: raw/ (texts alone), keywords/ (keywords to text), and at the top the one with thoughts.
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
import time
import unicodedata
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from pathlib import Path

import opencc
import rjieba
from pypinyin.constants import PINYIN_DICT
from pypinyin.contrib.tone_convert import to_finals
from tqdm import tqdm

import reward

# Run
TASK = "game24"
OUT = f"runs/{TASK}"         # the data goes to its folder `data`
SEED = 0                     # of the split and of the traces
# game24
HOLDOUT = ""                 # file of hands that are the test split: one a line (4 5 6 10), or a csv
TARGET = 24
LOWEST = 1                   # numbers of a hand: a deck of cards
HIGHEST = 13
VAL_HANDS = 136              # a tenth of the 1,362 solvable hands
TEST_HANDS = 272             # a fifth
TRACES_PER_HAND = 128        # for SFT; equal ones are written once
MAX_TRACE_TOKENS = 250       # words of a trace; a longer one is drawn again
LARGEST = 200                # larger results are tried only if nothing else leads to the target
TRY_RIGHT = 0.4              # chance to try a first step that can lead to the target ...
TRY_WRONG = 0.45             # ... and one that cannot
SLIP = 0.05                  # chance that a right first step is followed by a wrong second one
ENTER = 0.2                  # chance to try a second step after a wrong first one
# lyrics: texts
RAW = str(Path(__file__).resolve().with_name("assets") / "verses.jsonl")      # txt, lrc, csv, json, jsonl, or a folder
TEXT_FIELD = "text paragraphs content lyrics"      # of csv, json and jsonl: the first of these that a row has
TITLE_FIELD = "title rhythmic"
MIN_HAN = 0.7                # share of Han characters among the letters; a text below it is not Chinese
MIN_COMMON = 0.4             # share of the 3,755 commonest characters; a text below it was decoded wrongly
MIN_CHARS = 12               # Han characters of a text
MAX_CHARS = 2000
SHARED_LINES = 3             # a near-duplicate has so many distinct lines of an earlier text ...
CONTAINMENT = 0.5            # ... and at least this share of the lines of the shorter one
STOCK_LINES = 50             # a line of more texts than this is a stock phrase and proves nothing
# lyrics: samples
KEYWORDS_MIN = 3             # of a text
KEYWORDS_MAX = 5
WORDS = 12                   # words of a text from which its further training rows draw keywords
MIN_DF = 3                   # fewest texts that have a keyword (2 of less than 300 texts)
MAX_DF = 0.1                 # largest share of the texts that have a keyword
STOP_WORDS = "没有 不会 不能 可以 知道 觉得 不要 不知 时候 有人 有些 无人 不见 不得 不到 不可"
COT_TEXTS = 1000             # texts that get a thought: the best and most varied ones
VAL_TEXTS = 100              # at most a tenth of the texts
TEST_TEXTS = 200             # at most a fifth
VARIANTS = 64                # training rows of a text: one for its keywords, the others for random ones of its words
SWAP = 0.9                   # chance that these are replaced in the text, so that a model must look at its keywords ...
SWAP_BELOW = 5000            # ... even if it could memorise so few texts; not with thoughts by an API
# lyrics: keywords and thoughts by a language model, instead of tf-idf and a template
USE_API = 0                  # 1: ask API_MODEL, which costs money
MAX_MISSING = 0.05           # share of the answers that may be missing or unusable
KEYWORD_QUESTION = """从下面的作品里选出三到五个最能代表它的关键词。每个关键词是作品里原样出现的一个词，两到四个汉字，\
不要虚词，不要互相包含。只输出一行关键词，用“，”隔开。

{text}"""
THOUGHT_QUESTION = """有人拿到关键词“{listed}”，写成了下面的作品。请替作者写出动笔之前的构思：想说什么、什么心情，\
画面怎样一步步展开，每个关键词放在哪里，押什么韵，怎样收尾。一段话，八十到两百字，每个关键词都要提到，不要照抄整行原句，\
不要分点，只输出构思本身。

《{title}》
{text}"""
# API: an OpenAI-compatible chat endpoint. Its address and key are the environment variables API_BASE and API_KEY
API_MODEL = "deepseek-chat"
API_THREADS = 16             # calls at a time; one that waits for its next attempt counts
API_TIMEOUT = 120            # seconds of one attempt
API_RETRIES = 6              # attempts after the first one
API_TEMPERATURE = 0.7        # below 0: not sent, for models that refuse it
API_LENGTH_FIELD = "max_tokens"        # what requests call the next constant; newer models want max_completion_tokens
API_MAX_TOKENS = 1024        # of an answer, including the thoughts of models that think
API_PRICE_IN = 0.3           # money for a million tokens of messages ...
API_PRICE_OUT = 1.2          # ... and of answers
API_MAX_COST = 5.0           # the same money, for each round of calls (keywords, thoughts, scores), retries included


# ---- the 24-point game ----------------------------------------------------------------------------------------------


@lru_cache(100_000)         # a quarter of a gigabyte
def steps_from(state: tuple) -> tuple:
    """All steps (a, operator, b, result) with the states after them: the result, then the other numbers.

    Results below zero are not needed: whatever they solve, a swapped subtraction solves too.
    """
    states = {}
    for i, j in itertools.combinations(range(len(state)), 2):
        a, b = max(state[i], state[j]), min(state[i], state[j])
        others = tuple(value for k, value in enumerate(state) if k not in (i, j))
        steps = [(a, "+", b, a + b), (a, "-", b, a - b), (a, "*", b, a * b)]
        if b:
            steps.append((a, "/", b, Fraction(a, b)))
        if a != b:
            steps.append((b, "/", a, Fraction(b, a)))
        states.update({step: (step[3], *others) for step in steps})
    return tuple(states.items())


def choices(state: tuple, target: int) -> list[tuple]:
    """(step, state after it, whether that is solvable); odd steps only if no other leads to the target."""
    steps = [(step, after, reward.solvable(tuple(sorted(after)), target)) for step, after in steps_from(state)]
    plain = [choice for choice in steps if choice[0][3].denominator == 1 and choice[0][3] <= LARGEST]
    if any(leads for *_, leads in plain):
        return plain
    return [choice for choice in steps if choice in plain or choice[2]]


def write_trace(hand: list[int], target: int, rng: random.Random) -> str:
    """A completion for a solvable hand: a search with backtracking that ends in the composed answer."""
    lines = []

    def write(state, step):
        lines.append(f"{' '.join(map(str, state))} | {step[0]} {step[1]} {step[2]} = {step[3]}")

    untried, seen, solution = choices(tuple(hand), target), set(), []
    while not solution:         # some of the first steps, in order; those left out come once all others have failed
        for choice in list(untried):
            first, three, leads = choice
            if solution or rng.random() > (TRY_RIGHT if leads else TRY_WRONG):
                continue
            untried.remove(choice)
            write(hand, first)
            if leads and (rng.random() > SLIP or not any(other_leads for *_, other_leads in untried)):
                second, two, _ = next(choice for choice in choices(three, target) if choice[2])
                third = next(step for step, _, solves in choices(two, target) if solves)
                write(three, second)
                write(two, third)
                solution = [first, second, third]
                continue
            key = tuple(sorted(three))
            misses = [step for step, _, solves in choices(three, target) if not solves and (key, step) not in seen]
            if misses and rng.random() < ENTER:
                second = rng.choice(misses)
                seen.add((key, second))
                write(three, second)

    expression, composed = [str(part) for part in solution[-1][:3]], []
    for a, operator, b, result in reversed(solution[:-1]):
        place = expression.index(str(result))
        expression[place:place + 1] = f"( {a} {operator} {b} )".split()
        composed.append(" ".join(expression))
    return "\n".join(["<think>", *lines, *composed[:-1], "</think>", f"<answer> {composed[-1]} </answer>"])


def prepare_game24(folder: Path, held_out: list[tuple]) -> dict:
    """Writes train, val and test of the 24-point game, test with the hands held out if any; returns the summary."""
    rng = random.Random(SEED)
    hands = list(itertools.combinations_with_replacement(range(LOWEST, HIGHEST + 1), 4))
    solvable_hands = [hand for hand in hands if reward.solvable(hand, TARGET)]
    summary = {"hands": len(hands), "solvable": len(solvable_hands)}
    rng.shuffle(solvable_hands)
    test = [hand for hand in held_out if reward.solvable(hand, TARGET)] if held_out else solvable_hands[:TEST_HANDS]
    hopeless = [hand for hand in held_out if hand not in test]
    if hopeless:
        print(f"{HOLDOUT}: these cannot make {TARGET} and are left out: {hopeless}")
    others = [hand for hand in solvable_hands if hand not in set(test)]
    for name, split in {"train": others[VAL_HANDS:], "val": others[:VAL_HANDS], "test": test}.items():
        if not split:
            sys.exit(f"no hand is left for {name}, of {len(solvable_hands)} that can make {TARGET}")
        rows, lengths = [], []
        for hand in tqdm(split, desc=name, unit="hand", dynamic_ncols=True):
            traces = {}
            for _ in range(TRACES_PER_HAND if name == "train" else 1):
                numbers = list(hand)
                rng.shuffle(numbers)
                for _ in range(1000):
                    trace = write_trace(numbers, TARGET, rng)
                    words = len(re.findall(r"\S+|\n", trace))       # tokens of MODEL=tiny
                    if words <= MAX_TRACE_TOKENS:
                        break
                else:
                    sys.exit(f"{numbers}: no trace has at most MAX_TRACE_TOKENS={MAX_TRACE_TOKENS} words")
                lengths += [] if trace in traces else [words]
                row = {"numbers": numbers} if TARGET == 24 else {"numbers": numbers, "target": TARGET}
                traces[trace] = {"prompt": reward.prompt(TASK, row), "completion": trace, **row}
            rows += traces.values()
        rng.shuffle(rows)
        write_rows(folder / f"{name}.jsonl", rows)
        lengths.sort()
        percentiles = {f"p{p}": lengths[(len(lengths) - 1) * p // 100] for p in (5, 50, 95, 100)}
        summary[name] = {"hands": len(split), "rows": len(rows), **percentiles}
    print(f"\n{rows[0]['prompt']}\n{rows[0]['completion']}\n")
    return summary


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    with written_aside(path) as file:
        for number, row in enumerate(rows):
            print(json.dumps({"id": f"{path.stem}-{number}", **row}, ensure_ascii=False), file=file)


# ---- lyrics: reading ------------------------------------------------------------------------------------------------


def raw_files() -> list[Path]:
    """The files of RAW that can be read, in order."""
    files = [path for path in [Path(RAW), *sorted(Path(RAW).rglob("*"))] if path.is_file()]
    readable = [path for path in files if path.suffix.lower() in (".txt", ".lrc", ".csv", ".json", ".jsonl")]
    if not readable:
        sys.exit(f"RAW={RAW}: no txt, lrc, csv, json or jsonl file, {len(files)} others")
    print(f"RAW={RAW}: {len(readable)} files to read, {len(files) - len(readable)} of other kinds")
    return readable


def read_texts(files: list[Path]) -> Iterator[tuple[dict, str | None]]:
    """Rows {"source": "file:line", "title", "text"} and reasons to drop them, if any. Exits if none has a text."""
    fields, texts = {}, 0

    def value(record, names):
        """The first of these fields that a record has; a list is a text of lines, `nan` is an empty cell."""
        content = next((record[name] for name in names.split() if record.get(name)), "")
        content = "\n".join(map(str, content)) if isinstance(content, list) else content
        return content if isinstance(content, str) and content.lower() not in ("nan", "none", "null") else ""

    for file in files:
        name = junk.sub("?", str(file.relative_to(RAW)) if Path(RAW).is_dir() else file.name)
        for line, record in read_records(file):
            record = record if isinstance(record, dict) else {}
            fields |= record
            row = {"source": f"{name}:{line}", "title": value(record, TITLE_FIELD), "text": value(record, TEXT_FIELD)}
            texts += bool(row["text"])
            yield row, None if row["text"] and "\ufffd" not in row["text"] else "unreadable"
    if not texts:
        sys.exit(f"RAW={RAW}: no text in the fields TEXT_FIELD={TEXT_FIELD!r}; fields: {', '.join(map(str, fields))}")


def read_records(file: Path) -> Iterator[tuple[int, dict | None]]:
    """Line and fields of each record of a file; None for a broken one. What cannot be decoded is U+FFFD."""
    data, kind = file.read_bytes(), file.suffix.lower()
    encodings = ["utf-16"] if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "gb18030", "big5hkscs"]
    encoding = max(encodings, key=lambda name: count_common(data[:2**18].decode(name, "replace")))
    text = data.decode(encoding, "replace").replace("\r\n", "\n").replace("\r", "\n")
    if kind in (".json", ".jsonl"):
        for number, part in enumerate([text] if kind == ".json" else text.split("\n"), 1):
            records = None
            with contextlib.suppress(ValueError):
                records = json.loads(part)
            if part.strip():
                yield from enumerate(records if isinstance(records, list) else [records], number)
    elif kind == ".csv":
        yield from read_csv(file, text)
    else:       # texts between lines of ---; a single one is named like the file: `singer - title`
        parts, line = re.split(r"(?m)^[ \t]*---[ \t]*$\n?", text), 1
        title = file.stem.rpartition(" - ")[2] if len(parts) == 1 else ""
        for part in parts:
            if part.strip() or len(parts) == 1:
                yield line, {TITLE_FIELD.split()[0]: title, TEXT_FIELD.split()[0]: part}
            line += part.count("\n") + 1


def read_csv(file: Path, text: str) -> Iterator[tuple[int, dict | None]]:
    """Line and fields of each record of a csv. Exits with the line of a stray quote that swallows the rows after it."""
    lines, records, begin = text.split("\n"), [], 1
    csv.field_size_limit(2**30)
    reader = csv.reader((line + "\n" for line in lines), strict=True)
    try:
        for cells in reader:
            records.append((begin, reader.line_num, cells))
            begin = reader.line_num + 1
    except csv.Error as error:
        sys.exit(f'{file}:{begin}: {error}. Write a " within a cell twice, and such a cell between "')
    header, commas = records[0][2], len(records[0][2]) - 1
    mostly_lines = sum(end > begin for begin, end, _ in records) < len(records) / 2
    for begin, end, cells in records[1:]:
        if end > begin and mostly_lines and commas and all(line.count(",") >= commas for line in lines[begin:end]):
            sys.exit(f'{file}:{begin}: a " opens a cell that ends in line {end}, over what look like rows')
        if cells:
            yield begin, dict(zip(header, cells)) if len(cells) <= len(header) else None


# ---- lyrics: cleaning -----------------------------------------------------------------------------------------------


to_simplified = opencc.OpenCC("t2s").convert
kana = re.compile("[\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff]")
# control, format, private and zero-width characters, surrogates, variation selectors; circled numbers, ※
junk = re.compile("[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e"
                  "\u203b\u2060-\u206f\u2460-\u2473\u3164\ud800-\uf8ff\ufe00-\ufe0f\ufeff\ufff0-\ufffc\uffff"
                  "\U000e0000-\U0010ffff]")
line_break = re.compile(r"(?:\\r)?\\n|\\r|\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
hidden = re.compile(r"<!--.*?(?:-->|\Z)|<(script|style|think)\b.*?(?:</\1\s*>|\Z)"
                    r"|<(title|nav|footer|button|option)\b[^<>]*>[^<>]*</\2\s*>", re.S | re.I)
line_tag = re.compile(r"</?(?:br|p|div|li|[uo]l|tr|td|table|h[1-6r]|section|article|pre)\b[^<>]*>[ \t]*\n?", re.I)
tag = re.compile(r"</?[a-z][^<>]*>|<[!?][^<>]*>|<\d{1,3}:\d{1,2}(?:[.:]\d{1,3})?>", re.I)
timed_words = re.compile(r'^\{"t":.*$', re.M)       # {"t":0,"c":[{"tx":"春"},{"tx":"风"}]}
stamp = r"\[\d{1,3}:\d{1,2}(?:[.:]\d{1,3}){0,2}\]"
lrc_tag = re.compile(r"\[[a-z#]{1,10}:[^\[\]\n]*\]", re.I)
# times of words, frames of lyrics sites, names of parts, who sings, how often, notes
marks = re.compile(
    r"\[\d+,\d+\]|\(\d+,\d+(?:,\d+)?\)|<\d+,\d+,\d+>|\A\s*\d+ contributors?.*? lyrics|you might also like|\d*embed\s*\Z"
    r"|\[(?:verse|[a-z-]*chorus|bridge|intro|outro)[^\]\n]*\]"
    r"|[(【\[](?:[男女合齐独众]|男女|女男|合唱|独白|念白|重复|反复|repeat)[^)】\]\n]{0,6}[)】\]]"
    r"|(?<![a-z0-9])[(【\[]?(?:[x×*] ?\d{1,2}|\d{1,2} ?[x×])[)】\]]?[ \t]*$"
    r"|\[\d{1,3}\]|\((?:一作|又作|亦作|或作|一说|注)[^()]*\)", re.I | re.M)
bar = re.compile(r"(?<=[^\0-\x7f]) ?(?://?|\|) ?| ?(?://?|\|) ?(?=[^\0-\x7f])")
han = f"[{reward.han_range}]"
phrase_gap = re.compile(f"(?<={han}{han}) (?={han}{han})")
edge = " •*#>|_=~\\★☆♪♫"
# the label of a credit has some of these words ...
credit = re.compile(
    "词|曲|编|唱|歌|乐|音|声|录|谱|制作|监制|出品|发行|母带|混|专辑|作者|总监|鸣谢|吉他|贝[斯司]|鼓|键盘|琴|胡|笛|筝|琵琶|打击|合成器|"
    "策划|统筹|企划|宣传|推广|营销|经纪|封面|后期|版权|来源|出处|转载|转自|标签|分类|语种|流派|发布|上传|更新|点击|阅读|浏览|评论|"
    "朝代|(?:先秦|两汉|汉|魏晋|南北朝|隋|唐|五|宋|金|元|明|清|近|现|当)代|(?:lyric|compos|music|arrang|produc|writ|vocal|guitar|"
    "bass|drum|piano|keyboard|string|mix|master|record|singer|artist|album|lrc|OP|SP|ISRC|MV)[a-z]*", re.I)
# ... and otherwise only these
credit_rest = re.compile(
    r"人|者|师|员|手|室|棚|作|填|演|原|翻|主|配|和|合|名|缩|弦|大|小|提|二|竹|古|电|木|器|工程|公司|方|时间|日期|次数|量|数|总|助理|执行|"
    r"联合|所属|责任|特别|写|频|第一|第二|\bby\b|[\s/、,&·.+|()\[\]【】*及与-]", re.I)
note = re.compile(
    r"https?://|www\.|\.(?:com|net|cn|org)\b|(?:QQ|扣扣)(?:交流)?(?:群|号)?[\s:]*\d{5}|微信号?\s*[a-z]\w{4}|"
    r"(?:微信|公众号|微博|vx|wechat)(?:公众号|号)?\s*[:@]|关注.{0,6}公众号|更多.{0,20}(?:访问|关注|尽在|点击|请看)|请访问|"
    r"(?:歌词|本文|文章|内容|资料)(?:来自|来源|转自|摘自|由.{1,12}(?:提供|整理|编辑|上传))|转载(?:自|请|于|须|注明)|"
    r"^\W*(?:转载|转自(?!己))|^(?:首页|当前位置)\s?[>»|/:]|版权所有|版权归|未经.{0,14}(?:许可|授权)|不得(?:翻唱|翻录|转载)|"
    r"all rights reserved|copyright|©|歌词(?:下载|大全|网|吾爱|千寻|编辑|制作|贡献|纠错)|纯音乐,?请|阅读全文|"
    r"^[【\[](?:作词|作曲|编曲|演唱)|^(?:words|lyrics|music|composed|written|produced|arranged|performed) by\b|"
    r"^\W*(?:verse|chorus|bridge|intro|outro|hook|rap|music|repeat|end)\s?\d?\W*$|"
    r"^\W*(?:首页|返回(?:首页|顶部|目录|列表|上页)|[上下]一[首篇页]|试听|主歌|副歌|前奏|间奏|尾奏|过门)\W*$|"
    r"^(?:[\W\d]*(?:首页|[上下]一[首篇页]|登录|注册|试听|全文|字号|返回|点击|免费|在线|下载|收听|播放|收藏|分享|打印|复制|评论|点赞|"
    r"关注|举报|阅读|查看|展开|更多|歌词|相关|热门|推荐)){2,}[\W\d]*$", re.I)
speaker = re.compile(f"^(?:男女|独白|歌词|原文|正文|(?![词曲编唱鼓问答曰说道云念]){han}) ?: ?")
one_form = str.maketrans("()「」『』〝〞•・‧∶", "（）“”‘’“”···:")
wide = str.maketrans(",.!?:;", "，。！？：；")


def clean(text: str) -> str:
    """The text as lines, without markup, times, credits and notes, with one form of each character."""
    text = html.unescape(html.unescape(junk.sub("", line_break.sub("\n", text))))
    text = junk.sub("", line_break.sub("\n", text))
    text = timed_words.sub(lambda line: "".join(re.findall(r'"tx": ?"([^"]*)"', line[0])), text)
    text = tag.sub("", line_tag.sub("\n", hidden.sub("\n", unicodedata.normalize("NFKC", text))))
    text = re.sub("[ \t]+", " ", without_stamps(simplified(marks.sub("", text)))).strip()
    if len(bar.findall(text)) > len(re.findall(r"\S.*", text)):         # line ends written as / or |
        text = bar.sub("\n", text)
    if "\n" not in text:         # all in one line
        text = phrase_gap.sub("\n", re.sub(r"([。!?;]+[\"”’)》]*)", r"\1\n", text))
    lines = [line.strip(edge) for line in text.split("\n")]
    full = [line for line in lines if line]
    short = sum(len(line) <= 4 and len(reward.han(line)) <= 2 for line in full)
    broken = len(full) >= 8 and short > len(full) / 2       # one or two characters a line
    text = punctuated(("" if broken else "\n").join(without_notes(lines, broken)))
    if broken:
        text = re.sub("([，。！？；…]+[”’）》]*)", r"\1\n", text)
    text = re.sub(" *\n *", "\n", text).strip()
    if "\n" not in text:
        text = text.replace("，", "，\n").strip()
    usual = min(map(len, re.findall("\n+", text)), default=1)       # 2 if there is a blank line after every line
    return re.sub("\n+", lambda gap: "\n" if len(gap[0]) == usual else "\n\n", text)


def simplified(text: str) -> str:
    """The text in simplified characters; unchanged if all that would change is in GB2312, such as 覆, 藉 and 沈."""
    converted = to_simplified(text)
    changed = "".join(old for old, new in zip(text, converted) if old != new)
    if len(changed.encode("gb2312", "ignore")) == 2 * len(changed):
        return text
    return "".join(old if new > "\uffff" else new for old, new in zip(text, converted))     # rare ones are in no font


def without_stamps(text: str) -> str:
    """LRC as lines in the order in which they are first sung; of lines with the same time, the Chinese ones."""
    timed, several, now = [], False, []
    for line in lrc_tag.sub("", text).split("\n"):
        first = re.match(rf"\s*(?:{stamp}\s*)*", line)[0]
        times = [[int(part) for part in re.findall(r"\d+", time)] for time in re.findall(stamp, first)]
        now, several = min(times, default=now), several or len(times) > 1
        line = re.sub(stamp, "", line)
        timed.append((now, line, bool(times) and han_share(line) < MIN_HAN))
    chinese = [time for time, line, foreign in timed if not foreign and line.strip()]
    if several:             # otherwise the lines are in order
        timed.sort(key=lambda entry: entry[0])
    return "\n".join(line for time, line, foreign in timed if not foreign or time not in chinese)


def without_notes(lines: list[str], broken: bool) -> list[str]:
    """Lines without a title at the top, credits, notes and page furniture."""
    kept, few = [], sum(map(bool, lines)) <= 2
    for line in lines:
        heading = not any(kept) and not few and re.fullmatch(r"《[^《》]*》|[^,。!?]{1,40} - [^,。!?]{1,40}", line)
        line = speaker.sub("", line)
        label, colon, _ = line.partition(":")
        rest = credit.sub("", label[:40])
        is_credit = colon and rest != label and not credit_rest.sub("", rest)
        if len(line) > 60 or (broken and len(line) <= 4) or not (heading or is_credit or note.search(line)):
            kept.append(line)
    return kept


def punctuated(text: str) -> str:
    """Chinese punctuation in one form: ，。！？：；、“”‘’（）《》——……; a space between phrases is a comma."""
    closed = "，。！？：；、“”‘’（）《》—…"
    text = re.sub(r"\.{2,}|[…⋯]+|。{2,}", "……", text)
    text = re.sub(rf"-{{2,}}|[–—―─]+|(?<={han})-(?={han})", "——", text.translate(one_form))
    text = re.sub('"([^"\n]*)"', r"“\1”", text)
    text = re.sub("(?<![a-zA-Z])'([^'\n]*)'(?![a-zA-Z])", r"‘\1’", text)
    text = re.sub(rf"(?<={han}) (?=[,.!?:;])", "", text.replace("<<", "《").replace(">>", "》"))
    half = rf"(?<![a-zA-Z0-9 .])[,!?:;]|[,!?:;](?=\s*(?:{han}|[“‘《（]))|(?<=[{reward.han_range}”’》）])\.(?!\d)"
    text = re.sub(half, lambda mark: mark[0].translate(wide), text)
    text = phrase_gap.sub("，", text)
    text = re.sub(rf"(?<={han}) (?={han})|(?<=[{closed}]) | (?=[{closed}])", "", text)
    return re.sub("([，、；：])[，、；：]+", r"\1", text)


def han_share(text: str) -> float:
    """Share of Han characters among the letters; 0 for Japanese: more than a twentieth of kana."""
    letters = max(1, sum(character.isalpha() or character == "〇" for character in text))
    return len(reward.han(text)) / letters if len(kana.findall(text)) <= 0.05 * letters else 0.0


def count_common(text: str) -> int:
    """How many characters are among the 3,755 commonest of simplified Chinese, level one of GB2312."""
    return sum(0xb0 <= byte <= 0xd7 for byte in simplified(reward.han(text)).encode("gb2312", "ignore")[::2])


def clean_texts(rows: list[dict]) -> Iterator[tuple[dict, str | None]]:
    """Rows with clean text and title (《…》 or [ti:…] of the text, or that of the row), or the reason to drop one."""
    for row in rows:
        heading = re.search(r"\A\s*《([^《》\n]{1,40})》|^\[ti:([^\]\n]+)\]", row["text"], re.M)
        title = (heading[1] or heading[2]) if heading else row["title"]
        text = clean(row["text"])
        characters = reward.han(text)
        reasons = {"lost characters": re.search("[□〓]|？？", text),
                   "language": han_share(text) < MIN_HAN,
                   "short": len(characters) < MIN_CHARS,
                   "long": len(characters) > MAX_CHARS,
                   "garbled": count_common(characters) < MIN_COMMON * len(characters)}
        reason = next((reason for reason, found in reasons.items() if found), None)
        yield row if reason else {**row, "title": clean(title).replace("\n", "").strip("《》"), "text": text}, reason


# ---- lyrics: duplicates and keywords --------------------------------------------------------------------------------


def deduplicate(rows: list[dict]) -> Iterator[tuple[dict, str | None]]:
    """Rows with "exact" (an earlier one has the same Han text), "near" (many of the same lines), or None."""
    exact, sizes, texts_with = set(), [], defaultdict(list)     # Han texts; lines of each; line -> texts that have it
    for row in rows:
        characters, lines = reward.han(row["text"]), distinct_lines(row["text"])
        known = [texts_with[line] for line in lines if line in texts_with and len(texts_with[line]) <= STOCK_LINES]
        shared = Counter(itertools.chain(*known))
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
    """Phrases of a text (Han only, at least 4 characters); if most are shorter, each joined with the next ones."""
    phrases = [reward.han(phrase) for phrase in re.split("[，。！？；\n]", text)]
    if sum(len(phrase) for phrase in phrases if len(phrase) >= 4) < sum(map(len, phrases)) / 2:
        joined = [""]
        for phrase in phrases:
            joined += [""] if len(joined[-1]) >= 4 else []
            joined[-1] += phrase
        phrases = joined
    return {phrase for phrase in phrases if len(phrase) >= 4}


def keywords_offline(rows: list[dict]) -> list[list[str]]:
    """The WORDS best content words of each row by tf-idf, or fewer, of 2 to 4 Han characters, none part of another."""
    tag_of, counts_of, stop_words = {}, [], STOP_WORDS.split()
    for row in rows:
        words = [word for word, tag in rjieba.tag(row["text"]) if tag_of.setdefault(word, tag)[0] in "nvailts"]
        words = [word for word in words if word not in stop_words and not tag_of[word].startswith("nr")]
        counts_of.append(Counter(word for word in words if re.fullmatch(f"{han}{{2,4}}", word)))
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
    """What read(row, answer) finds in the answers of API_MODEL to a question about each row; None if not good."""
    questions = [question.format(**row, listed="，".join(row.get("keywords", []))) for row in rows]
    jobs = [[{"role": "user", "content": text}] for text in questions]
    answers = call_api(jobs, cache, lambda index, answer: read(rows[index], answer) is not None)
    if answers.count(None) > MAX_MISSING * len(answers):
        sys.exit(f"{answers.count(None)} of {len(rows)} answers are missing or bad; run again to ask only for these")
    return [answer and read(row, answer) for row, answer in zip(rows, answers)]


def keywords_in(row: dict, answer: str) -> list[str] | None:
    """Words of the text in an answer, none part of another; None if they are too few."""
    words = [word for word in dict.fromkeys(reward.HAN.findall(answer)) if 2 <= len(word) <= 4 and word in row["text"]]
    words = [word for word in words if not any(word != other and word in other for other in words)]
    return words[:KEYWORDS_MAX] if len(words) >= KEYWORDS_MIN else None


def thought_in(row: dict, answer: str) -> str | None:
    """The answer if it is a thought of fit length that names every keyword and keeps a completion in form."""
    in_form = reward.split_verse(f"<think>{answer}</think>{as_completion(row)}")[3] == 1 and "\n" not in answer
    return answer if in_form and 40 <= len(answer) <= 400 and all(word in answer for word in row["keywords"]) else None


# ---- lyrics: samples ------------------------------------------------------------------------------------------------


def verse_lines(text: str) -> list[str]:
    """Lines of a text as in a completion, in which / separates them and 《》 marks the title."""
    lines = [re.sub("[<>/]", "", line).translate(str.maketrans("《》", "“”")).strip() for line in text.split("\n")]
    return [line for line in lines if reward.han(line)]


def han_lines(row: dict) -> list[str]:
    return [reward.han(line) for line in verse_lines(row["text"])]


def line_codes(row: dict) -> set[int]:
    return {reward.line_code(line) for line in han_lines(row) if len(line) >= reward.LINE_HAN}


def as_completion(row: dict) -> str:
    """《title》/line/line; without a title, the first phrase is the title."""
    lines = verse_lines(row["text"])
    title = re.sub("[<>/《》]", "", row["title"]).strip()[:20] or reward.han(re.split("[，。！？]", lines[0])[0])[:8]
    return f"《{title}》/{'/'.join(lines)}"


def as_sample(row: dict, keywords: list[str], thought: str = "") -> dict:
    return {"prompt": reward.prompt(TASK, {"keywords": keywords}),
            "completion": (f"<think>{thought}</think>" if thought else "") + as_completion(row),
            "keywords": keywords, "source": row["source"]}


def template_thought(row: dict, keywords: list[str]) -> str:
    """A plan read off the text: keywords, the phrase of each, title, number of lines, and their commonest rhyme."""
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

    Best: share of rhyming lines plus share of lines as long as a neighbour. Varied: round n takes only texts none of
    whose keywords has been taken n times, so that no theme fills the choice.
    """
    quality = [reward.rhyme_share(lines) + reward.parallel_share(lines) for lines in map(han_lines, rows)]
    left = sorted(range(len(rows)), key=lambda i: -quality[i])
    taken, used, most = set(), Counter(), 1
    while left and len(taken) < count:
        for i in left:
            if len(taken) < count and all(used[word] < most for word in rows[i]["keywords"]):
                taken.add(i)
                used.update(rows[i]["keywords"])
        left = [i for i in left if i not in taken]
        most += 1
    return [row for i, row in enumerate(rows) if i in taken]


def split_texts(rows: list[dict], rng: random.Random) -> dict[str, list[dict]]:
    """Rows by split. No line and no set of keywords is in two splits; texts that would break this are left out."""
    rows = list({tuple(sorted(row["keywords"])): row for row in rng.sample(rows, len(rows))}.values())
    counts = {"test": min(TEST_TEXTS, len(rows) // 5), "val": min(VAL_TEXTS, len(rows) // 10), "train": len(rows)}
    splits, held_out = {}, set()
    for name, count in counts.items():
        split = splits[name] = []
        while rows and len(split) < count:
            row = rows.pop()
            if not line_codes(row) & held_out:
                split.append(row)
        held_out = held_out.union(*map(line_codes, split))
    if len(splits["val"]) < 5 or not splits["train"]:
        sizes = ", ".join(f"{name} {len(split)}" for name, split in splits.items())
        sys.exit(f"too few texts ({sizes}): about 50 are needed that do not all share a line")
    return splits


def text_table(train: list[dict], thoughts: list[str], val: list[dict], classes: dict, rng: random.Random) -> dict:
    """What reward.py knows about the training texts, as in table.json.

    `fluency`: what earns 0, the median of val texts with shuffled characters, and 1, which three quarters of them reach
    unshuffled. `rhyme_chance`: share of rhyming lines among lines of any texts. Others: 2nd and 98th (5th) percentile.
    """
    texts = [han_lines(row) for row in train]
    all_lines = list(itertools.chain(*texts))
    characters = Counter("".join(all_lines))
    bigrams = Counter(a + b for line in all_lines for a, b in itertools.pairwise(line)).most_common(500_000)
    reward.table.update(characters=characters, bigrams=dict(bigrams), total=sum(characters.values()))
    rng.shuffle(all_lines)
    pool, genuine, shuffled = iter(all_lines), [], []
    chance = [reward.rhyme_share(list(itertools.islice(pool, len(lines)))) for lines in texts]
    for lines in map(han_lines, val):
        letters = iter(rng.sample("".join(lines), sum(map(len, lines))))
        genuine.append(reward.fluency(lines))
        shuffled.append(reward.fluency(["".join(itertools.islice(letters, len(line))) for line in lines]))
    low, high = sorted(shuffled)[len(shuffled) // 2], sorted(genuine)[len(genuine) // 4]
    if high <= low:
        sys.exit(f"{len(train)} training texts are too few: by their pairs of characters, val texts are no likelier "
                 f"({high:.2f}) than shuffled ones ({low:.2f})")

    def percentiles(values, *percents):
        values = sorted(values)
        return [values[(len(values) - 1) * percent // 100] for percent in percents]

    codes = sorted(set().union(*map(line_codes, train)))
    return {"finals": classes, "characters": characters, "bigrams": dict(bigrams),
            "lines": base64.b64encode(b"".join(code.to_bytes(4, "little") for code in codes)).decode(),
            "fluency": [low, high], "rhyme_chance": sum(chance) / len(chance),
            "pair_share": percentiles(map(reward.pair_share, texts), 5)[0],
            "line_count": percentiles(map(len, texts), 2, 98),
            "line_chars": percentiles([sum(map(len, lines)) / len(lines) for lines in texts], 2, 98),
            "thought_chars": percentiles([len(reward.han(thought)) for thought in thoughts], 0, 100)}


def variants(row: dict, held_out: set[tuple], pool: dict[tuple, list[str]], rng: random.Random) -> Iterator[dict]:
    """Up to VARIANTS samples with a thought, none for a set of keywords in `held_out`.

    The first is for the keywords, others for random words of different phrases, most of which are replaced in text and
    thought by words of `pool`, which has them by length and rhyme class.
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
        if tuple(sorted(words)) not in seen:
            seen.add(tuple(sorted(words)))
            yield as_sample(text, words, row["thought"] if USE_API else template_thought(text, words))


def prepare_lyrics(folder: Path, files: list[Path]) -> dict:
    """Writes the three recipes, table.json and funnel.json; returns the summary."""
    funnel, cache, rng = {}, folder.parent / "api.jsonl", random.Random(SEED)

    def keep(stage, results):
        """The rows without a reason to drop them; counts the others by reason, with samples."""
        kept, dropped = [], defaultdict(list)
        for row, reason in tqdm(results, desc=stage, unit="text", dynamic_ncols=True):
            if reason:
                dropped[reason].append(f"{row['source']}: {junk.sub('', ' '.join(row['text'][:60].split()))}")
            else:
                kept.append(row)
        counts = {reason: len(excerpts) for reason, excerpts in dropped.items()}
        samples = {reason: excerpts[:3] for reason, excerpts in dropped.items()}
        total = len(kept) + sum(counts.values())
        funnel[stage] = {"in": total, "out": len(kept), "dropped": counts, "samples": samples}
        print(f"{stage}: {total} in, {len(kept)} out")
        for reason, count in counts.items():
            print(f"  {reason}: {count}", *samples[reason], sep="\n    ")
        return kept

    texts = keep("read", read_texts(files))
    texts = keep("clean", clean_texts(texts))
    texts = keep("unique", deduplicate(texts))
    words = ask_about(texts, KEYWORD_QUESTION, keywords_in, cache) if USE_API else keywords_offline(texts)
    rows = [{**row, "words": found or []} for row, found in zip(texts, words)]
    rows = keep("keywords", [(row, "too few" if len(row["words"]) < KEYWORDS_MIN else None) for row in rows])
    for row in rows:
        row["keywords"] = sorted(row["words"][:KEYWORDS_MAX], key=row["text"].index)
    classes = rhyme_classes()
    reward.table["finals"] = {character: name for name, characters in classes.items() for character in characters}
    chosen = {row["source"] for row in select_texts(rows, COT_TEXTS)}
    others = "not among the best and most varied"
    best = keep("best", [(row, None if row["source"] in chosen else others) for row in rows])
    thoughts = [template_thought(row, row["keywords"]) for row in best]
    if USE_API:
        thoughts = ask_about(best, THOUGHT_QUESTION, thought_in, cache)
    best = [{**row, "thought": thought} for row, thought in zip(best, thoughts)]
    best = keep("thoughts", [(row, None if row["thought"] else "none") for row in best])
    write_json(folder / "funnel.json", funnel)

    splits = split_texts(best, rng)
    taken = {row["source"] for split in splits.values() for row in split}
    held_out = {tuple(sorted(row["keywords"])) for row in splits["val"] + splits["test"]}
    held_out_lines = set().union(*map(line_codes, splits["val"] + splits["test"]))

    def training(rows):         # also texts that have no thought, or no keywords
        others = [row for row in rows if row["source"] not in taken and not line_codes(row) & held_out_lines]
        return splits["train"] + [row for row in others if tuple(sorted(row.get("keywords", []))) not in held_out]

    train = training(texts)
    table = text_table(train, [row["thought"] for row in splits["train"]], splits["val"], classes, rng)
    write_json(folder / "table.json", table)
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


# ---- answers of an API: the same in data_prep.py and eval.py --------------------------------------------------------


def call_api(jobs: list[list[dict]], cache: Path, accept=lambda index, answer: True) -> list[str | None]:
    """Answers to lists of chat messages, in order; None for those without an answer that accept(index, answer) takes.

    Appends each answer to `cache` as soon as it arrives and never asks for it again. Exits before sending what may cost
    more than API_MAX_COST, and at an error that a retry cannot fix.
    """
    settings = [API_MODEL, API_TEMPERATURE, API_MAX_TOKENS]
    keys = [hashlib.sha256(json.dumps([*settings, job], sort_keys=True).encode()).hexdigest() for job in jobs]
    lines = cache.read_text(encoding="utf-8", errors="replace").split("\n") if cache.is_file() else [""]
    cached = {}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):      # damaged or half a line
            row = json.loads(line)
            cached[row["key"]] = row["answer"]
    answers = {key: cached[key] for index, key in enumerate(keys) if key in cached and accept(index, cached[key])}
    todo = {key: index for index, key in enumerate(keys) if key not in answers}
    if not todo:
        return [answers[key] for key in keys]
    base, secret = os.environ.get("API_BASE", "").strip(), os.environ.get("API_KEY", "").strip()
    url = (base or "https://api.deepseek.com/v1").rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    host = re.fullmatch(r"https?://([\w.:\[\]-]+)/[!-~]*", url, re.ASCII)
    if not host or not re.fullmatch("[!-~]+", secret):
        unusable = "API_KEY to your key" if host else "API_BASE to an address like https://api.deepseek.com/v1"
        sys.exit(f"set the environment variable {unusable}")
    tokens = {key: len(str(jobs[index])) / 1.5 for key, index in todo.items()}        # more than any tokenizer makes
    costs = {key: (tokens[key] * API_PRICE_IN + API_MAX_TOKENS * API_PRICE_OUT) / 1e6 for key in todo}
    spent = 0.0
    cache.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPool(API_THREADS) as pool, open(cache, "a", encoding="utf-8", errors="replace") as file:
        file.write("\n" if lines[-1] else "")
        for attempt in range(API_RETRIES + 1):
            cost = spent + sum(costs[key] for key in todo)
            print(f"{len(todo)} calls to {API_MODEL} at {host[1]}, at most {cost:.4f}", flush=True)
            if cost > API_MAX_COST:
                sys.exit(f"{cost:.4f} is above API_MAX_COST={API_MAX_COST}: raise it, or ask for less")
            replies = pool.imap_unordered(lambda key: (key, *ask_once(url, secret, jobs[todo[key]], attempt)), todo)
            failed = Counter()
            for key, answer, reason, final in tqdm(replies, total=len(todo), unit="call", dynamic_ncols=True):
                if final:
                    hint = " (see API_LENGTH_FIELD, API_TEMPERATURE)" if re.search("max_|temperature", reason) else ""
                    sys.exit(f"{host[1]} refuses: {reason[:400]}{hint}")
                if answer and accept(todo[key], answer):
                    answers[key] = answer
                    print(json.dumps({"key": key, "answer": answer}, ensure_ascii=False), file=file, flush=True)
                else:
                    failed[reason[:150]] += 1
                    if not reason.startswith(("status", "URLError")):        # else nothing was charged
                        spent += costs[key]
            todo = {key: index for key, index in todo.items() if key not in answers}
            if not todo:
                break
            reasons = "; ".join(f"{count} x {reason}" for reason, count in failed.most_common(3))
            print(f"{len(todo)} of {len(costs)} calls failed; a retry or the same command asks only these: {reasons}")
    return [answers.get(key) for key in keys]


def ask_once(url: str, secret: str, messages: list[dict], attempt: int) -> tuple[str, str, bool]:
    """Answer ("": none), why it is none or useless, and whether a retry is pointless. Pauses after a failure."""
    body = {"model": API_MODEL, "messages": messages, API_LENGTH_FIELD: API_MAX_TOKENS, "temperature": API_TEMPERATURE}
    if API_TEMPERATURE < 0:
        del body["temperature"]
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json", "User-Agent": "chat-client"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    opener = urllib.request.OpenerDirector()        # unlike the usual one it follows no redirect: the key stays here
    for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
        opener.add_handler(handler())
    status, retry_after = 0, ""
    deadline = time.monotonic() + API_TIMEOUT
    try:
        with opener.open(request, timeout=API_TIMEOUT) as reply:
            status, retry_after, data = reply.status, reply.headers.get("Retry-After", ""), b""
            while chunk := reply.read1():
                data += chunk
                if time.monotonic() > deadline:     # an API may keep a call open with blank lines
                    raise TimeoutError(f"no whole reply in {API_TIMEOUT} s")
        if status == 200:
            return answer_of(json.loads(data)), "the answer is not acceptable", False
        reason = f"status {status}: {data.decode(errors='replace')}".replace(secret, "***")
    except Exception as error:          # of any kind: a reply that is cut off, of another form, without an answer
        reason = f"{type(error).__name__}: {error}"
    final = 300 <= status < 500 and status not in (408, 425, 429) or re.search("(insufficient|current)_quota", reason)
    if not final and attempt < API_RETRIES:
        wait = min(60, int(retry_after)) if retry_after.isdecimal() else 0
        time.sleep(max(wait, random.uniform(0.5, 1) * min(20, 2**attempt)))
    return "", " ".join(reason.split()), bool(final)


def answer_of(reply: dict) -> str:
    """The answer in a reply: what follows its last thought. Raises ValueError with the reason if there is none."""
    choice = reply["choices"][0]
    answer = (choice["message"].get("content") or "").rpartition("</think>")[2].strip()
    only_thoughts = "<think>" in answer or (not answer and choice["message"].get("reasoning_content"))
    if only_thoughts or choice.get("finish_reason") == "length":
        raise ValueError(f"no whole answer within API_MAX_TOKENS={API_MAX_TOKENS}, raise it")
    if not answer:
        raise ValueError("an empty answer")
    return answer


# ---- main -----------------------------------------------------------------------------------------------------------


# these constants change nothing in the data; the content of HOLDOUT and RAW does
free = {"OUT", "HOLDOUT", "RAW", "MAX_MISSING", "API_THREADS", "API_TIMEOUT", "API_RETRIES", "API_PRICE_IN",
        "API_PRICE_OUT", "API_MAX_COST", "WELL_FORMED", "LENGTH_NEEDS_CORRECT", "MIN_STEPS", "RHYME_GOAL",
        *(name for name in vars(reward) if name.endswith("_WEIGHT"))}       # the same data if these differ


def main() -> None:
    constants = configure(sys.argv[1:])
    if TASK == "game24":
        if HIGHEST - LOWEST > 19:
            sys.exit(f"HIGHEST={HIGHEST} makes too many hands for 2 GB of memory; HIGHEST={LOWEST + 19} is the largest")
        hands = reward.read_hands(Path(HOLDOUT)) if HOLDOUT else []
        folder = open_run(Path(OUT, "data"), constants, {"hands of HOLDOUT": hands})
        summary = prepare_game24(folder, hands)
    elif TASK == "lyrics":
        files = raw_files()
        digest = hashlib.sha256(ascii([(path.name, sha256(path)) for path in files]).encode()).hexdigest()
        folder = open_run(Path(OUT, "data"), constants, {"files of RAW": digest})
        summary = prepare_lyrics(folder, files)
    else:
        sys.exit(f"TASK={TASK}: data is made for game24 and lyrics; set DATA= to your own folder for another task")
    write_json(folder / "summary.json", summary)
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))


# ---- constants and files: the same in every script ------------------------------------------------------------------


def configure(argv: list[str]) -> dict:
    """Sets constants of this script and reward.py from NAME=value or --name=value, and returns all of them.

    The lines at the top of a script run again in order, so what depends on a changed constant follows it. Exits if no
    script has the name. Constants of other scripts are ignored, because make passes every one to every script.
    """
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")        # a terminal without UTF-8 stops no run
    given = {name.lstrip("-").upper(): value for name, _, value in (word.partition("=") for word in argv)}
    own, constants, known = Path(__file__), {}, set()
    if {"H", "HELP"} & given.keys():
        print(own.read_text(encoding="utf-8").partition("\n\n\n#")[0])
        sys.exit()
    for path in [own.with_name(f"{name}.py") for name in ("reward", "data_prep", "sft", "grpo", "eval")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else ():
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                break
            if isinstance(node, (ast.If, ast.AugAssign, ast.AnnAssign)):
                sys.exit(f"{path}:{node.lineno}: write a constant as NAME = expression, else it is not what runs")
            name = getattr(node.targets[0], "id", "") if isinstance(node, ast.Assign) else ""
            if not name.isupper():
                continue
            known.add(name)
            if path.stem in ("reward", own.stem):
                scope = globals() if path == own else vars(reward)
                exec(compile(ast.Module([node], []), str(path), "exec"), scope)
                kind = int if isinstance(scope[name], bool) else type(scope[name])
                try:
                    constants[name] = scope[name] = kind(given.get(name, scope[name]))
                except ValueError:
                    sys.exit(f"{name} must be of type {kind.__name__}, not {given[name]!r}")
    for name in given.keys() - known:
        sys.exit(f"no script has a constant {name}; nearest: {', '.join(difflib.get_close_matches(name, known))}")
    return constants


def open_run(folder: Path, constants: dict, inputs: dict) -> Path:
    """Makes the folder of a new run, or opens the same run to go on; a different run is kept as NAME.1, NAME.2, ...

    The same run has the same inputs and constants, except for those in `free`; if it is complete, the script ends here.
    Returns the folder without links, so that a link to another disk stays one.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    open_run.lock = open(folder.with_name(f".{folder.name}.lock"), "a")        # held until the process ends
    try:
        fcntl.flock(open_run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"{folder} is in use by another process: wait for it, or set OUT= to another folder")
    except OSError as error:
        print(f"{folder} is not locked, do not start a second run in it: {error}")      # not every disk has locks
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "numpy")}
    run = json.loads(json.dumps({"constants": constants, "inputs": inputs, "versions": versions}))
    if (folder / "run.json").is_file():
        old = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        before, now = ({name: value for name, value in each["constants"].items() if name not in free} | each["inputs"]
                       for each in (old, run))
        changed = [name for name in before | now if before.get(name) != now.get(name)]
        if not changed and (folder / "summary.json").is_file():
            print(f"{folder} is complete")
            sys.exit()
        if changed:
            kept = next(path for path in map(f"{folder}.{{}}".format, itertools.count(1)) if not Path(path).exists())
            changes = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed)
            print(f"{folder} holds a different run, moved to {kept} (rename it back to go on with it): {changes}")
            folder.rename(kept)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", run)
    shutil.copy(__file__, folder)
    shutil.copy(reward.__file__, folder)
    print("\n".join(f"{name} = {value!r}" for name, value in constants.items()))
    return folder


@contextlib.contextmanager
def written_aside(path: Path, mode: str = "w"):
    """A file that gets its name once it is complete and on the disk, so that it is never half written."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_json(path: Path, value) -> None:
    with written_aside(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
