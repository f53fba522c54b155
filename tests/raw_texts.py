"""Synthetic raw texts with planted defects and duplicates, for the tests and for measuring the text half of the data preparation.

    python tests/raw_texts.py make raw.jsonl 100000         # texts with the truth beside each
    python tests/raw_texts.py check raw.jsonl FOLDER        # of clean.jsonl, unique.jsonl, keywords.jsonl, funnel.json made of it
"""

import html
import json
import random
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

import opencc

EXACT, NEAR, FOREIGN = 0.08, 0.08, 0.05         # shares of all texts; the others are unique
TO_TRADITIONAL, TO_SIMPLIFIED = (opencc.OpenCC(name).convert for name in ("s2t", "t2s"))


def pairs(text: str) -> list[str]:
    """The two-character words of a string without separators."""
    return [text[i:i + 2] for i in range(0, len(text), 2)]


NOUNS = pairs("月光星空海浪春风秋雨白云青山河流森林草原沙漠故乡村庄城市街道灯火窗户烟火酒杯书信日记照片镜子钥匙雨伞围巾外套毛衣"
              "吉他钢琴歌声旋律舞步掌声眼泪笑容目光身影脚步心跳呼吸梦境记忆誓言秘密谎言承诺约定孤独寂寞温柔悲伤快乐幸福自由勇气"
              "青春岁月时光年华童年命运缘分爱情友情火车轮船飞机站台码头桥梁灯塔帆船风筝气球蝴蝶蜻蜓燕子海鸥鸽子老鹰鲸鱼骏马羊群"
              "玫瑰百合樱花茉莉荷叶枫叶种子麦田稻谷葡萄苹果橘子柠檬咖啡清茶糖果蜂蜜面包雪花冰川火焰闪电彩虹雾气露珠尘埃石头珍珠"
              "黄金宝石铁轨围墙屋顶阳台花园篱笆池塘溪水瀑布")
VERBS = pairs("追逐寻找等待拥抱亲吻告别离开归来流浪漂泊飞翔奔跑行走停留守护珍惜忘记想念回忆期待渴望相信怀疑原谅伤害拯救点燃熄灭"
              "照亮遮住打开关闭穿过越过跨过翻过听见看见遇见梦见带走留下藏起收集洒落飘落坠落升起燃烧融化冻结破碎缝补编织描绘书写"
              "歌唱呼唤诉说沉默倾听颤抖摇晃旋转跳跃沉睡醒来哭泣微笑挥手回头转身靠近远离触摸握紧放开敲打推开抛弃拾起")
ADJECTIVES = pairs("温暖寒冷明亮黑暗遥远漫长短暂永恒美丽平凡安静喧闹柔软坚硬轻盈沉重甜蜜苦涩透明模糊清晰陌生熟悉古老年轻疲惫倔强脆弱"
                   "坚强善良骄傲卑微灿烂荒凉辽阔狭窄潮湿干净破旧崭新金色银色蓝色红色绿色灰色紫色粉红洁白漆黑朦胧宁静匆忙缓慢勇敢胆怯"
                   "真实虚假圆满残缺")
PLACES = pairs("江南塞北东海西湖北方南方天边海边河边山顶山谷路口巷口门前窗前楼上岸上心底心间梦里雨中雪中风中夜里人间世界远方对岸"
               "角落草地沙滩田野桥头村口城外车站")
TIMES = pairs("清晨黄昏午夜黎明傍晚昨天今天明天去年今年来年春天夏天秋天冬天初春盛夏深秋寒冬从前如今往后一生此刻瞬间")
TEMPLATES = ("{t}{v}{a}的{n}", "{a}的{n}{v}着{n}", "{n}在{p}{v}{a}的{n}", "我在{p}{v}{n}和{n}", "你{v}了{a}的{n}", "{p}的{n}那么{a}",
             "{t}我{v}{a}{n}", "让{n}{v}{p}的{n}", "谁在{t}{v}{n}", "{n}也会{v}成{n}", "{a}又{a}的{n}啊", "把{n}{v}在{p}",
             "不再{v}那{a}{n}", "{v}过{p}{v}过{n}", "我为你{v}{n}，你为我{v}{n}")
NAMES = [a + b for a in "张王李赵陈林周吴郑黄" for b in ("小明", "晓雨", "一鸣", "子墨", "天宇", "若溪")]
CREDITS = ("作词：{}", "作曲：{}", "词曲：{}", "编曲:{}", "演唱：{}", "词/曲：{}", "作词/作曲：{}", "词、曲：{}", "混音师：{}",
           "制作人：{}", "吉他：{}", "和声：{}", "OP：{}音乐", "SP：{}文化", "监制：{}", "录音室：{}录音棚", "出品：{}工作室",
           "作词：{} 作曲：{}", "Lyrics by: {}")
NOTES = ("来源：网络", "歌词来自：千千歌词", "更多歌词请访问 http://lyrics.example.com", "www.example.com", "QQ群：12345678",
         "微信公众号：好歌词", "转载请注明出处", "未经许可，不得转载", "返回顶部", "上一首 下一首", "收藏 分享 打印", "本文由歌词网整理")
FOREIGN_TEXTS = {
    "english": ("the rain is falling on the old stone bridge", "and I keep walking through the silent town",
                "tell me why the morning never comes", "you left a letter on the wooden floor",
                "oh baby let me hold your hand again"),
    "japanese": ("雨が降る夜に君を思い出す", "遠い空の下で歌っている", "花が咲く季節にまた会おう", "涙の海を越えて行こう", "僕らの夢は終わらない"),
    "korean": ("비가 내리는 밤에 너를 생각해", "먼 하늘 아래에서 노래를 부른다",
               "꽃이 피는 계절에 다시 만나자", "우리의 꿈은 끝나지 않아", "바람이 분다"),
    "russian": ("идёт дождь над старым мостом", "и я иду по тихому городу",
                "скажи почему не приходит утро", "ты оставила письмо на полу", "возьми меня за руку"),
    "code": ("for (int i = 0; i < n; ++i) { sum += a[i]; }", "def main(args): return args",
             "if (x == null) throw new Error('missing');", "import os, sys  # 读取文件", "print(f'{value:.2f}')"),
}


def han(text: str) -> str:
    return "".join(re.findall("[\u4e00-\u9fff]+", text))


def write_lines(rng: random.Random) -> list[str]:
    """A text of about 200 characters: lines over a few words of its own, so that no two texts share three by chance."""
    words = {"n": rng.sample(NOUNS, 10), "v": rng.sample(VERBS, 7), "a": rng.sample(ADJECTIVES, 5),
             "p": rng.sample(PLACES, 3), "t": rng.sample(TIMES, 3)}
    lines = {}
    for _ in range(rng.randint(17, 26)):
        line = re.sub("{(.)}", lambda slot: rng.choice(words[slot[1]]), rng.choice(TEMPLATES))
        lines[line + ("。" if len(lines) % 4 == 3 else rng.choice("，，，！？"))] = None
    return list(lines)


def edit_lines(lines: list[str], rng: random.Random) -> list[str]:
    """A near-duplicate: up to a fifth of the lines each changed, dropped and added, half of them in another order."""
    lines = [line for line in lines if rng.random() > 0.2 * rng.random()]
    other = write_lines(rng)
    lines = [rng.choice(other) if rng.random() < 0.2 * rng.random() else line for line in lines]
    for _ in range(rng.randint(1, 4)):
        lines.insert(rng.randint(0, len(lines)), rng.choice(other))
    if rng.random() < 0.5:
        rng.shuffle(lines)
    return lines


def as_lrc(lines: list[str], rng: random.Random) -> str:
    """Stamps, tags, here and there a chorus line with several stamps or word stamps."""
    out, seconds = [f"[ti:{rng.choice(NOUNS)}]", f"[ar:{rng.choice(NAMES)}]", "[by:someone]", "[offset:0]"], 5.0
    for line in lines:
        seconds += rng.uniform(2, 6)
        form = rng.choice(("[{:02d}:{:05.2f}]", "[{:02d}:{:06.3f}]"))
        stamp = form.format(int(seconds // 60), seconds % 60)
        if rng.random() < 0.1:
            stamp += form.format(int(seconds // 60) + 4, seconds % 60)
        if rng.random() < 0.1:
            line = "".join(f"<{int(seconds // 60):02d}:{seconds % 60:05.2f}>{line[i:i + 2]}" for i in range(0, len(line), 2))
        out.append(stamp + rng.choice(("", " ")) + line)
    return "\n".join(out)


def as_html(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    if rng.random() < 0.5:
        body = rng.choice(("<br>", "<br/>\n", "<BR />")).join(html.escape(line) for line in lines)
    else:
        body = "\n".join(f'<p class="lyric">{html.escape(line)}</p>' for line in lines)
    body = body.replace("，", rng.choice(("，", "&#65292;"))) + "&nbsp;"
    head = "<head><title>歌词</title><style>p { color: red }</style></head>"
    return f"<html>{head}<body><script>var a = '歌词' < 1;</script><!-- 广告 --><div id=\"c\">{body}</div></body></html>"


def as_broken(lines: list[str], rng: random.Random) -> str:
    """One or two characters a line."""
    text, out = "".join(lines), []
    while text:
        size = rng.choice((1, 1, 2))
        out.append(text[:size])
        text = text[size:]
    return "\n".join(out)


def as_odd(text: str, rng: random.Random) -> str:
    """Invisible characters, odd breaks, wide forms."""
    out = "".join(c + (rng.choice("\u200b\ufeff\u00ad\u202a\ue123\x07") if rng.random() < 0.05 else "") for c in text)
    return out.replace("\n", rng.choice(("\r\n", "\u2028", "\\n", "\n\n\n\n\n", "\r"))).replace("，", rng.choice(("，", ",", "﹐", " ，")))


def spoil(lines: list[str], rng: random.Random) -> tuple[str, list[str], str]:
    """A raw text that holds these lines, the names of its defects, and the lines as they are to be recovered."""
    if rng.random() < 0.4:
        return "\n".join(lines), [], "".join(lines)
    if rng.random() < 0.1:
        return as_broken(lines, rng), ["broken"], "".join(lines)
    if rng.random() < 0.05:
        return "\n".join(" ".join(re.sub("[，。！？]", "", line)) for line in lines), ["spaced"], "".join(lines)
    defects, body = [], list(lines)
    if rng.random() < 0.15:         # another layout: a space for punctuation, or two lines in one
        defects.append("layout")
        ends = [line[:-1] for line in body]
        body = [rng.choice((" ", "，", "　")).join(ends[i:i + 2]) for i in range(0, len(ends), 2)]
    if rng.random() < 0.4:
        defects.append("credits")
        body = [rng.choice(CREDITS).format(rng.choice(NAMES), rng.choice(NAMES)) for _ in range(rng.randint(1, 5))] + body
    if rng.random() < 0.3:
        defects.append("notes")
        body = body + rng.sample(NOTES, rng.randint(1, 3))
    text = "\n".join(body)
    if rng.random() < 0.3:
        defects.append("traditional")
        text = TO_TRADITIONAL(text)
        if TO_SIMPLIFIED(text) != "\n".join(body):
            defects.pop()
            text = "\n".join(body)
    if rng.random() < 0.3:
        defects.append("lrc")
        text = as_lrc(text.split("\n"), rng)
    elif rng.random() < 0.3:
        defects.append("html")
        text = as_html(text, rng)
    if rng.random() < 0.2:
        defects.append("odd")
        text = as_odd(text, rng)
    return text, defects, "".join(lines)


def generate(count: int, seed: int) -> Iterator[tuple[str, dict]]:
    """Raw texts with what is true of them: {"kind": unique, exact, near or a language, "of": index of the original, "defects", "han"}."""
    rng, recent = random.Random(seed), deque(maxlen=2000)
    for index in range(count):
        kind, of = rng.random(), None
        if kind < FOREIGN:
            kind = rng.choice(list(FOREIGN_TEXTS))
            yield "\n".join(rng.choice(FOREIGN_TEXTS[kind]) for _ in range(rng.randint(5, 20))), {"kind": kind, "of": None, "defects": [], "han": ""}
            continue
        if kind < FOREIGN + EXACT + NEAR and recent:
            kind = "exact" if kind < FOREIGN + EXACT else "near"
            of, lines = rng.choice(recent)
            lines = lines if kind == "exact" else edit_lines(lines, rng)
        else:
            kind, lines = "unique", write_lines(rng)
            recent.append((index, lines))
        text, defects, right = spoil(lines, rng)
        yield text, {"kind": kind, "of": of, "defects": defects, "han": han(right)}


def check(raw: Path, folder: Path) -> dict:
    """What the pipeline made of generated texts: recall, lost texts, share recovered, and its times."""
    rows = {stage: {int(row["source"].rpartition(":")[2]): row for row in map(json.loads, open(folder / f"{stage}.jsonl", encoding="utf-8"))}
            for stage in ("clean", "unique", "keywords")}
    truths = {number: json.loads(line)["truth"] for number, line in enumerate(open(raw, encoding="utf-8"), 1)}
    kinds = {kind: [n for n, truth in truths.items() if truth["kind"] == kind] for kind in {truth["kind"] for truth in truths.values()}}
    recovered = {n: n in rows["clean"] and han(rows["clean"][n]["text"]) == truth["han"] for n, truth in truths.items() if truth["han"]}
    spoiled = [n for n in recovered if truths[n]["defects"]]
    wrong = Counter(" ".join(truths[n]["defects"]) for n, right in recovered.items() if not right)
    return {"texts": len(truths), "recovered": sum(recovered[n] for n in spoiled) / max(len(spoiled), 1),
            "recovered of all": sum(recovered.values()) / len(recovered), "not recovered": dict(wrong.most_common(8)),
            "foreign kept": sum(n in rows["clean"] for kind in FOREIGN_TEXTS for n in kinds.get(kind, [])),
            **{f"recall {kind}": sum(n not in rows["unique"] for n in kinds[kind]) / len(kinds[kind]) for kind in ("exact", "near")},
            "unique lost": sum(n not in rows["unique"] for n in kinds["unique"]),
            "with keywords": len(rows["keywords"]) / len(rows["unique"]),
            "seconds": {name: stage["seconds"] for name, stage in json.loads((folder / "funnel.json").read_text()).items()}}


if __name__ == "__main__":
    if sys.argv[1] == "make":
        with open(sys.argv[2], "w", encoding="utf-8") as file:
            for text, truth in generate(int(sys.argv[3]), seed=0):
                file.write(json.dumps({"title": "", "text": text, "truth": truth}, ensure_ascii=False) + "\n")
    else:
        print("\n".join(f"{name}: {value}" for name, value in check(Path(sys.argv[2]), Path(sys.argv[3])).items()))
