"""Synthetic raw texts with known defects and duplicates, for the tests of the text half of data_prep.py."""

import html
import random
import re
from collections.abc import Iterator

import opencc
from commands import ROOT

import reward

to_traditional, to_simplified = (opencc.OpenCC(name).convert for name in ("s2t", "t2s"))
CORPUS = (ROOT / "assets/verses.jsonl").read_text(encoding="utf-8")
PHRASES = sorted(set(re.findall("[\u4e00-\u9fff]{5,}", CORPUS)))
CREDITS = ("作词：张小明", "编曲:王一鸣", "词/曲：陈天宇", "混音师：周小明", "OP：天宇音乐", "Lyrics by: Li Bai")
NOTES = ("来源：网络", "更多歌词请访问 http://lyrics.example.com", "QQ群：12345678", "转载请注明出处", "收藏 分享 打印")
FOREIGN_TEXTS = ("the rain is falling on the old stone bridge\nand I keep walking through the silent town",
                 "雨が降る夜に君を思い出す\n遠い空の下で歌っている\n花が咲く季節にまた会おう",
                 "비가 내리는 밤에 너를 생각해\n먼 하늘 아래에서 노래를 부른다")


def write_lines(rng: random.Random) -> list[str]:
    """About 20 lines, of so many that no two texts share half of them by chance."""
    lines = rng.sample(PHRASES, rng.randint(17, 26))
    return [line + ("。" if i % 4 == 3 else rng.choice("，，，！？")) for i, line in enumerate(lines)]


def edit_lines(lines: list[str], rng: random.Random) -> list[str]:
    """A near-duplicate: a tenth of the lines changed and a tenth dropped, half of the texts in another order."""
    other = write_lines(rng)
    lines = [rng.choice(other) if rng.random() < 0.1 else line for line in lines if rng.random() > 0.1]
    return rng.sample(lines, len(lines)) if rng.random() < 0.5 else lines


def spoil(lines: list[str], rng: random.Random) -> str:
    """A raw text of these lines: with credits and notes, in traditional characters, with times or as html."""
    if rng.random() < 0.4:
        return "\n".join(lines)
    text = "\n".join([*rng.sample(CREDITS, 2), *lines, *rng.sample(NOTES, 2)])
    if rng.random() < 0.3 and to_simplified(to_traditional(text)) == text:
        text = to_traditional(text)
    if rng.random() < 0.3:
        return "\n".join(f"[00:{i:02d}.50]{line}" for i, line in enumerate(text.split("\n")))
    if rng.random() < 0.3:
        body = html.escape(text).replace("\n", rng.choice(("<br>", "<br/>\n", "</p><p class='lyric'>")))
        return f"<html><style>p {{ color: red }}</style><body><!-- 广告 --><p>{body}&nbsp;</p></body></html>"
    return text


def generate(count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """(raw text, kind: unique, exact, near or foreign, the Han characters that are to be recovered)."""
    rng, originals = random.Random(seed), []
    for _ in range(count):
        kind = rng.choices(("unique", "exact", "near", "foreign"), (79, 8, 8, 5))[0] if originals else "unique"
        if kind == "foreign":
            yield rng.choice(FOREIGN_TEXTS), kind, ""
            continue
        lines = write_lines(rng) if kind == "unique" else rng.choice(originals)
        if kind == "unique":
            originals.append(lines)
        if kind == "near":
            lines = edit_lines(lines, rng)
        yield spoil(lines, rng), kind, reward.han("".join(lines))
