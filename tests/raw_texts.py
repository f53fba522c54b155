"""Synthetic raw texts with known defects and duplicates, for the tests of the text half of data_prep.py."""

import html
import random
import re
from collections.abc import Iterator

import opencc

FOREIGN, EXACT, NEAR = 0.05, 0.08, 0.08         # shares of all texts; the others are unique
to_traditional, to_simplified = (opencc.OpenCC(name).convert for name in ("s2t", "t2s"))


WORDS = {       # of two characters each
    "n": ("月光星空海浪春风秋雨白云青山河流森林草原沙漠故乡村庄城市街道灯火窗户烟火酒杯书信日记照片镜子钥匙雨伞"
               "外套毛衣吉他钢琴歌声旋律舞步掌声眼泪笑容目光身影脚步心跳呼吸梦境记忆誓言秘密谎言承诺约定孤独寂寞温柔悲伤"
               "快乐幸福自由勇气青春岁月时光年华童年命运缘分爱情友情火车轮船飞机站台码头桥梁灯塔帆船风筝气球蝴蝶蜻蜓燕子"
               "海鸥鸽子老鹰鲸鱼骏马羊群玫瑰百合樱花茉莉荷叶枫叶种子麦田稻谷葡萄苹果橘子柠檬咖啡清茶糖果蜂蜜面包雪花"),
    "v": ("追逐寻找等待拥抱亲吻告别离开归来流浪漂泊飞翔奔跑行走停留守护珍惜忘记想念回忆期待渴望相信怀疑原谅伤害"
               "拯救点燃熄灭照亮遮住打开关闭穿过越过跨过翻过听见看见遇见梦见带走留下藏起收集洒落飘落坠落升起燃烧融化"),
    "a": ("温暖寒冷明亮黑暗遥远漫长短暂永恒美丽平凡安静喧闹柔软坚硬轻盈沉重甜蜜苦涩透明模糊清晰陌生熟悉古老年轻"),
    "p": ("江南塞北东海西湖北方南方天边海边河边山顶山谷路口巷口门前窗前楼上岸上心底心间梦里雨中雪中风中夜里"),
    "t": ("清晨黄昏午夜黎明傍晚昨天今天明天去年今年来年春天夏天秋天冬天初春盛夏深秋寒冬从前如今往后一生此刻瞬间"),
}
TEMPLATES = ("{t}{v}{a}的{n}", "{a}的{n}{v}着{n}", "{n}在{p}{v}{a}的{n}", "我在{p}{v}{n}和{n}", "你{v}了{a}的{n}",
             "{p}的{n}那么{a}", "{t}我{v}{a}{n}", "让{n}{v}{p}的{n}", "谁在{t}{v}{n}", "{n}也会{v}成{n}",
             "{a}又{a}的{n}啊", "把{n}{v}在{p}", "不再{v}那{a}{n}", "{v}过{p}{v}过{n}", "我为你{v}{n}，你为我{v}{n}")
CREDITS = ("作词：张小明", "词曲：李晓雨", "编曲:王一鸣", "演唱：赵子墨", "词/曲：陈天宇", "作词/作曲：林若溪",
           "混音师：周小明", "吉他：郑一鸣", "OP：天宇音乐", "录音室：长安录音棚", "Lyrics by: Li Bai")
NOTES = ("来源：网络", "歌词来自：千千歌词", "更多歌词请访问 http://lyrics.example.com", "www.example.com",
         "QQ群：12345678", "微信公众号：好歌词", "转载请注明出处", "不得转载", "上一首 下一首", "收藏 分享 打印")
FOREIGN_TEXTS = ("the rain is falling on the old stone bridge\nand I keep walking through the silent town",
                 "雨が降る夜に君を思い出す\n遠い空の下で歌っている\n花が咲く季節にまた会おう",
                 "비가 내리는 밤에 너를 생각해\n먼 하늘 아래에서 노래를 부른다", "идёт дождь над старым мостом",
                 "for (int i = 0; i < n; ++i) { sum += a[i]; }\nimport os, sys  # 读取文件")


def han(text: str) -> str:
    return "".join(re.findall("[\u4e00-\u9fff]+", text))


def write_lines(rng: random.Random) -> list[str]:
    """About 20 lines over a few words, so that no two texts share three lines by chance."""
    words = {kind: rng.sample(re.findall("..", WORDS[kind]), n) for kind, n in zip("nvapt", (10, 7, 5, 3, 3))}
    lines = {}
    for _ in range(rng.randint(17, 26)):
        line = re.sub("{(.)}", lambda slot: rng.choice(words[slot[1]]), rng.choice(TEMPLATES))
        lines[line + ("。" if len(lines) % 4 == 3 else rng.choice("，，，！？"))] = None
    return list(lines)


def edit_lines(lines: list[str], rng: random.Random) -> list[str]:
    """A near-duplicate: some lines changed, dropped and added, half of the texts in another order."""
    other = write_lines(rng)
    lines = [rng.choice(other) if rng.random() < 0.1 else line for line in lines if rng.random() > 0.1]
    for _ in range(rng.randint(1, 4)):
        lines.insert(rng.randint(0, len(lines)), rng.choice(other))
    if rng.random() < 0.5:
        rng.shuffle(lines)
    return lines


def as_lrc(lines: list[str], rng: random.Random) -> str:
    """With tags and time stamps; some lines are sung twice, some have the times of their words."""
    out, seconds = ["[ti:歌]", "[ar:张小明]", "[by:someone]", "[offset:0]"], 5.0
    for line in lines:
        seconds += rng.uniform(2, 6)
        stamp = f"[{int(seconds // 60):02d}:{seconds % 60:05.2f}]"
        if rng.random() < 0.1:
            line = "".join(f"<00:{i:05.2f}>{line[i:i + 2]}" for i in range(0, len(line), 2))
        if rng.random() < 0.1:
            stamp += f"[{int(seconds // 60) + 4:02d}:{seconds % 60:05.2f}]"
        out.append(stamp + rng.choice(("", " ")) + line)
    return "\n".join(out)


def as_html(text: str, rng: random.Random) -> str:
    body = html.escape(text).replace("\n", rng.choice(("<br>", "<br/>\n", "</p><p class='lyric'>"))) + "&nbsp;"
    head = "<head><title>歌词</title><style>p { color: red }</style></head>"
    return f"<html>{head}<body><script>var a = '歌词' < 1;</script><!-- 广告 --><div>{body}</div></body></html>"


def as_odd(text: str, rng: random.Random) -> str:
    """Invisible characters, odd breaks, wide forms."""
    text = "".join(c + (rng.choice("\u200b\ufeff\u00ad\u202a\ue123\x07") if rng.random() < 0.05 else "") for c in text)
    text = text.replace("\n", rng.choice(("\r\n", "\u2028", "\\n", "\n\n\n\n\n", "\r")))
    return text.replace("，", rng.choice(("，", ",", "﹐", " ，")))


def spoil(lines: list[str], rng: random.Random) -> str:
    """A raw text that holds these lines."""
    kind = rng.random()
    if kind < 0.4:
        return "\n".join(lines)
    if kind < 0.46:
        return re.sub("(..?)", r"\1\n", "".join(lines))
    if kind < 0.5:
        return "\n".join(" ".join(re.sub("[，。！？]", "", line)) for line in lines)
    if rng.random() < 0.15:         # two lines in one, with a space for punctuation
        ends = [line[:-1] for line in lines]
        lines = [rng.choice((" ", "，", "　")).join(ends[i:i + 2]) for i in range(0, len(ends), 2)]
    if rng.random() < 0.4:
        lines = rng.sample(CREDITS, rng.randint(1, 5)) + lines
    if rng.random() < 0.3:
        lines = lines + rng.sample(NOTES, rng.randint(1, 3))
    text = "\n".join(lines)
    if rng.random() < 0.3 and to_simplified(to_traditional(text)) == text:
        text = to_traditional(text)
    if rng.random() < 0.3:
        text = as_lrc(text.split("\n"), rng)
    elif rng.random() < 0.3:
        text = as_html(text, rng)
    return as_odd(text, rng) if rng.random() < 0.2 else text


def generate(count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """(raw text, kind: unique, exact, near or foreign, the Han characters that are to be recovered)."""
    rng, originals = random.Random(seed), []
    for _ in range(count):
        draw = rng.random()
        if draw < FOREIGN:
            yield rng.choice(FOREIGN_TEXTS), "foreign", ""
            continue
        kind, lines = "unique", write_lines(rng)
        if draw < FOREIGN + EXACT + NEAR and originals:
            kind, lines = "exact", rng.choice(originals)
            if draw > FOREIGN + EXACT:
                kind, lines = "near", edit_lines(lines, rng)
        else:
            originals.append(lines)
        yield spoil(lines, rng), kind, han("".join(lines))
