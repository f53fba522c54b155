"""The text half of data_prep.py: reading, cleaning, duplicates, keywords."""

import csv
import io
import json
import re

import opencc
import pytest
from commands import ROOT

import data_prep

CORPUS = [json.loads(line)["text"] for line in (ROOT / "assets/verses.jsonl").read_text(encoding="utf-8").splitlines()]
POEM = "床前明月光，\n疑是地上霜。\n举头望明月，\n低头思故乡。"
BARE = "床前明月光\n疑是地上霜\n举头望明月\n低头思故乡"
OTHER = "白日依山尽，\n黄河入海流。\n欲穷千里目，\n更上一层楼。"
THIRD = "千山鸟飞绝，\n万径人踪灭。\n孤舟蓑笠翁，\n独钓寒江雪。"
ENGLISH = ("Before my bed the moon", "I think of frost", "I raise my head", "I think of home")


def spoiled(*pieces):
    """The poem with each line in a frame such as `<p>{}</p>`; a single frame is for all lines."""
    frames = pieces * (1 if len(pieces) == 4 else 4)
    return "\n".join(frame.format(line) for frame, line in zip(frames, POEM.split("\n")))


# ---- clean ----------------------------------------------------------------------------------------------------------


LINES = POEM.split("\n")
FORMS_OF_THE_POEM = [
    # html
    POEM.replace("\n", "<br>\n"), POEM.replace("\n", "<BR />"), spoiled("<p class='a'>{}</p>"),
    "<head><title>静夜思</title><style>p{}</style></head><script>var a = '歌' < 1;</script><!-- 广告 --><div>" + POEM,
    spoiled("&#24202;前明月光&#65292;", "{}", "{}&nbsp;", "&amp;nbsp;{}"),
    spoiled("&lt;b&gt;{}&lt;/b&gt;", "<b>{}</b>", "{}", "{}<script>没有结束"),
    # times of lines and words, two languages
    "[ti:静夜思]\n[ar:李白]\n[offset:0]\n" + spoiled("[00:01.00]{}", "[00:02]{}", "[00:03.123]{}", "[00:04:50] {}"),
    spoiled("[00:01.00]<00:01.00>床前<00:01.50>明月光，", "疑是[00:02.50]地上霜。", "[00:03.00]{}", "[00:04.00]{}"),
    "[00:02.00]疑是地上霜。\n[00:30.00][00:01.00]床前明月光，\n[00:04.00][00:40.00]低头思故乡。\n[00:03.00]举头望明月，",
    spoiled("[00:01:02.33]{}", "[00:01:05.10]{}", "[01:00:00.00]{}", "[01:00:09.99]{}"),
    spoiled("[16000,3000]{}(16000,100)"), spoiled("[16000,3000]<0,100,0>{}"),
    spoiled("[16000,3000]床(16000,100)前(16100,100)明月光，(16200,100)", "{}", "{}", "{}"),
    '{"t":0,"c":[{"tx":"作词: "},{"tx":"李白"}]}\n' + spoiled('{{"t":5,"c":[{{"tx":"{}"}},{{"tx":""}}]}}'),
    "\n".join(f"[00:0{i}.00]{english}\n[00:0{i}.00]{line}" for i, (english, line) in enumerate(zip(ENGLISH, LINES))),
    "\n".join(f"[00:0{i % 4}.00]{line}" for i, line in enumerate([*ENGLISH, *LINES])),
    # line ends
    "《静夜思》/" + "/".join(LINES), "<think>想家。</think>《静夜思》/" + "/".join(LINES), "\n\n".join(LINES),
    "\\n".join(LINES), "\n".join("".join(LINES)), re.sub("(..)", r"\1\n", "".join(LINES)) + "\n来源：网络",
    # credits, headings, frames of lyrics sites
    "作词：李白\n作曲:杜甫\n编曲 : 王维\n词/曲：李白\n词、曲：李白\n词：李白 曲：杜甫\n唐代：李白\n朝代：唐代\n" + POEM,
    POEM + "\n演唱：李白\n混音师：杜甫\n制作人：王维/李白\nOP：某某音乐\nSP: Some Music\n吉他/贝斯：李白\n录音棚：大唐",
    "作詞：李白\n監製：李白\nLyrics by: Li Bai\nComposed by：Li Bai\nProducer: Du Fu\n" + POEM,
    "静夜思 - 李白\n" + POEM, "《静夜思》\n" + POEM, "2 Contributors静夜思 Lyrics[Verse 1]" + POEM + "0Embed",
    "1 Contributor静夜思 Lyrics\n[Verse 1: 李白]\n" + POEM.replace("霜。\n", "霜。\nYou might also like") + "Embed",
    # who sings, how often, notes
    spoiled("周：{}", "（女）{}", "【合】{}", "※{}"), spoiled("男：{}", "女: {}", "合：{}", "★ {}"),
    spoiled("{}x2", "{} ×2", "{}（x3）", "{}【重复两遍】"), spoiled("{}[1]", "{}①", "{}（一作：看月光）", "{}(2x)"),
    "首页 > 歌词 > 静夜思\n收藏 分享 打印(3)\n" + POEM + "\n来源：网络\n转载请注明出处\n歌词来自千千歌词\n"
    "QQ群：12345678\n更多好听的歌词请访问 http://example.com/\n微信号：abcd1\n返回顶部\n上一首 下一首\n[Chorus]\n=====",
    # characters
    "\ufeff床\u200b前\u00ad明\u202e月\ue000光，\r\n疑是\u0007地上霜。\u2028举头\ud800望明月，\u2029低头思\U000f0000故乡。",
    "牀前明月光﹐\n疑是地上霜｡\n舉頭望明月,\n低頭思故鄉.", POEM]
SAME = ["我爱你 <3 一万年啊", "下一首歌为你唱\n请播放\n收藏\n分享着每一天", "问：客从何处来\n答：远在江南住", "",
        "我为你作曲，你为我作词\n吉他在唱歌，录音在转动\n他说：来源是一条河", "彩袖殷勤捧玉钟，\n当年拚却醉颜红"]


@pytest.mark.parametrize(("raw", "right"), [
    *((raw, POEM) for raw in FORMS_OF_THE_POEM), *((text, text) for text in SAME),
    *((BARE.replace("\n", end), BARE) for end in ("/", " // ", "|", " ／ ", "\\n", "\\r\\n", "\r", "\u2028", " ")),
    ("作词：李白 作曲：杜甫 " + BARE.replace("\n", " "), BARE), (BARE.replace("\n", "，"), BARE.replace("\n", "，\n")),
    (POEM.replace("\n", ""), POEM.replace("，\n", "，")),
    (POEM.replace("霜。\n", "霜。\n\n\n"), POEM.replace("霜。\n", "霜。\n\n")),
    ("彩袖殷勤捧玉鍾，\n當年拚卻醉顏紅", "彩袖殷勤捧玉钟，\n当年拼却醉颜红"),
    # spaces and punctuation
    ("床 前 明 月 光\n疑　是　地　上　霜", "床前明月光\n疑是地上霜"),
    ("床前明月光 疑是地上霜\n我 爱你 ，你呢 ？", "床前明月光，疑是地上霜\n我爱你，你呢？"),
    ('他说∶"你好!"「来吧」,走...\n去哪里--(很远);好。。。', "他说：“你好！”“来吧”，走……\n去哪里——（很远）；好……"),
    ("好\nI love you, baby. 我爱你,你知道吗? OK, go!", "好\nI love you, baby. 我爱你，你知道吗？OK, go!"),
    ("一共1,000元,3.5个,10:30见\n好", "一共1,000元，3.5个，10:30见\n好")])
def test_clean(raw, right):
    assert data_prep.clean(raw) == right
    assert data_prep.clean(right) == right


@pytest.mark.parametrize(("text", "reason"), [
    (POEM, None), ("我爱你，我爱你，我爱你，我爱你 12345 67890", None), ("𠮷野家的饭，〇年，我爱你，我爱你，", None),
    ("我们", "short"), ("春" * 2001, "long"), ("锛屼笘鐣屼汉姘戝叡鍜屽浗锛屼笘鐣", "garbled"),
    (POEM.replace("明月", "明□"), "lost characters"), (POEM.replace("明月", "？？"), "lost characters"),
    *((text, "language") for text in ("", "nan", "123 456", "我 love 你 forever", "사랑해요 우리 모두 大韓民國",
                                      "日本国憲法前文の平和主義と国民主権、基本的人権", "идёт дождь над мостом"))])
def test_reasons_to_drop_a_text(text, reason):
    assert [found for _, found in data_prep.clean_texts([{"source": "a:1", "title": "", "text": text}])] == [reason]


@pytest.mark.parametrize(("title", "text", "right"), [
    ("<b>静夜思</b>&nbsp;", POEM, "静夜思"), ("春风,你好!", POEM, "春风，你好！"), ("靜夜思", POEM, "静夜思"),
    ("", POEM, ""), ("《静夜思》", POEM, "静夜思"), ("", "《静夜思》/" + "/".join(LINES), "静夜思"),
    ("文件", "[ar:李白]\n[ti:夜]\n" + POEM, "夜")])
def test_titles_are_cleaned_like_texts(title, text, right):
    [(row, reason)] = data_prep.clean_texts([{"source": "a:1", "title": title, "text": text}])
    assert (row["title"], row["text"], reason) == (right, POEM, None)


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads files given as name=content: rows as (source, title, text), those dropped as their sources."""
    def read_all(**files):
        for name, content in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        monkeypatch.setattr(data_prep, "RAW", str(tmp_path))
        results = list(data_prep.read_texts(data_prep.raw_files()))
        dropped = [row["source"] for row, reason in results if reason]
        return [tuple(row.values()) for row, reason in results if not reason], dropped
    return read_all


def as_csv(*rows):
    table = io.StringIO()
    csv.writer(table).writerows(rows)
    return table.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "big5hkscs"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "json"])
def test_formats_and_encodings(read, encoding, kind):
    convert = opencc.OpenCC("s2t").convert if encoding == "big5hkscs" else str
    first, second = convert(POEM), convert(OTHER)
    rows = [{"title": "一", "text": first}, {"title": "一", "text": second}]
    contents = {"txt": f"{first}\n---\n{second}\n", "csv": as_csv(["title", "text"], ["一", first], ["一", second]),
                "json": json.dumps(rows, ensure_ascii=False)}
    contents["jsonl"] = contents["json"].strip("[]").replace("}, {", "}\n{")
    lines = {"txt": (1, 6), "jsonl": (1, 2), "csv": (2, 6), "json": (1, 2)}[kind]
    found, dropped = read(**{f"a.{kind}": contents[kind].encode(encoding)})
    assert [source for source, _, _ in found] == [f"a.{kind}:{line}" for line in lines] and not dropped
    assert [data_prep.clean(text) for _, _, text in found] == [POEM, OTHER]


def test_fields_of_collections(read):
    """The form of chinese-poetry, other names of fields, lists of lines, empty cells that pandas wrote."""
    poems = [{"title": "甲", "paragraphs": LINES}, {"rhythmic": "乙", "content": [POEM]}]
    found, dropped = read(**{"a.json": json.dumps(poems), "b.jsonl": json.dumps({"title": "nan", "text": LINES}),
                             "c.csv": f'title,text\nx,nan\nnan,"{POEM}"\n'})
    assert {text for _, _, text in found} == {POEM} and dropped == ["c.csv:2"]
    assert [row[:2] for row in found] == [("a.json:1", "甲"), ("a.json:2", "乙"), ("b.jsonl:1", ""), ("c.csv:3", "")]


def test_folder_in_order_with_other_files(read, capsys):
    found, _ = read(**{"b__z.TXT": POEM, "歌手甲 - 旧吉他.txt": OTHER, "a.txt": f"---\n---\n{THIRD}\n---\n \n",
                       "d.doc": b"\0", "c.lrc": f"[00:01.00]{POEM}"})
    assert [source for source, _, _ in found] == ["a.txt:3", "b/z.TXT:1", "c.lrc:1", "歌手甲 - 旧吉他.txt:1"]
    assert [title for _, title, _ in found] == ["", "z", "c", "旧吉他"]
    assert "4 files to read, 1 of other kinds" in capsys.readouterr().out


def test_broken_rows_are_dropped_alone(read):
    good = json.dumps({"text": POEM, "title": 3}, ensure_ascii=False)
    found, dropped = read(**{"a.jsonl": "\n".join([good, "{", "[1]", '{"title": "x"}', '{"text": 3}', "", good]),
                             "b.csv": "title,text\nx\ny,长\nz,一,二\n"})
    assert [source for source, _, _ in found] == ["a.jsonl:1", "a.jsonl:7", "b.csv:3"]
    assert dropped == [f"a.jsonl:{line}" for line in range(2, 6)] + ["b.csv:2", "b.csv:4"]


ROWS = [f"歌{i},春风吹过第{i}座桥" for i in range(600)]


@pytest.mark.parametrize("stray", [
    {400: '歌,"春风没有关上引号'}, {3: '歌,"你好"春风说'}, {3: '歌,"春风吹过', 400: '歌,"春风又吹过'}])
def test_a_stray_quote_in_a_csv_is_named(read, stray):
    rows = [stray.get(i, row) for i, row in enumerate(ROWS)]
    with pytest.raises(SystemExit, match=rf"a\.csv:{min(stray) + 2}: "):
        read(**{"a.csv": "title,text\n" + "\n".join(rows) + "\n"})


def test_quotes_that_are_fine_in_a_csv(read):
    """Quotes within a cell, doubled ones, and a cell of several lines with as many commas as a row has."""
    poem = "床前明月光,疑是地上霜\n举头望明月,低头思故乡"
    rows = [*ROWS, '歌,他说"你好"就走', '歌,"他说""你好""就走"']
    found, dropped = read(**{"a.csv": "title,text\n" + "\n".join(rows),
                             "b.csv": as_csv(["title", "text"], *[["静夜思", poem]] * 5)})
    assert len(found) == 607 and not dropped and [text for _, _, text in found[-5:]] == [poem] * 5
    assert found[600][2] == found[601][2] == '他说"你好"就走'


def test_nothing_to_read(read):
    with pytest.raises(SystemExit, match="RAW must be a txt, lrc, csv, json or jsonl file"):
        read(**{"a.doc": "x"})


# ---- duplicates and keywords ----------------------------------------------------------------------------------------


def reasons(*texts):
    return [reason for _, reason in data_prep.deduplicate([{"text": text} for text in texts])]


def test_duplicates():
    lines, others, third = LINES, OTHER.split("\n"), THIRD.split("\n")
    assert reasons(POEM, OTHER, POEM.replace("\n", ""), POEM.replace("，", "！")) == [None, None, "exact", "exact"]
    assert reasons(POEM, "\n".join(lines[::-1])) == [None, "near"]
    assert reasons(POEM, "\n".join([*lines[:3], "低头看大海"])) == [None, "near"]
    assert reasons(POEM + OTHER + THIRD, POEM) == [None, "near"]        # a part of an earlier text
    assert reasons(POEM, "\n".join([*lines[:2], *others[:2]])) == [None, None]      # two lines are too few
    assert reasons(POEM + OTHER, "\n".join([*lines[:3], *third, "一二三四五"])) == [None, None]     # less than half
    assert reasons("\n".join(lines[:2]), POEM) == [None, None]          # two lines do not swallow a longer text
    assert reasons("人之初，性本善，性相近，习相远，苟不教，性乃迁，教之道，贵以专",
                   "人之初。性本善。性相近。习相远。苟不教。性乃迁。教之道。贵以严") == [None, "near"]


def test_stock_phrases_prove_nothing():
    stock = ["春天又来到", "夏天又来到", "秋天又来到"]
    others = iter(["".join(chr(0x4e00 + 7 * i + k) for k in range(7)) for i in range(500)])
    first, last = ("，".join([*stock, next(others), next(others)]) for _ in range(2))
    pairs = ["，".join([stock[i % 3], stock[(i + 1) % 3], *(next(others) for _ in range(3))]) for i in range(90)]
    assert reasons(first, last) == [None, "near"] and reasons(first, *pairs, last) == [None] * 92


def test_a_corpus_stays_as_it_is_and_its_copies_are_found():
    framed = [f"作词：张小明\n编曲:王一鸣\n{text}\n来源：网络\nQQ群：12345678" for text in CORPUS]
    assert [data_prep.clean(text) for text in CORPUS + framed] == CORPUS + CORPUS
    edited = ["\n".join(text.split("\n")[:0:-1]) for text in CORPUS]      # backwards, without the first line
    assert reasons(*CORPUS, *CORPUS) == [None] * len(CORPUS) + ["exact"] * len(CORPUS)
    assert reasons(*CORPUS, *edited).count("near") > 0.95 * len(CORPUS)


def test_keywords_offline():
    rows = [{"text": text} for text in CORPUS]
    found = data_prep.keywords_offline(rows)
    assert found == data_prep.keywords_offline(rows)
    assert sum(len(words) >= data_prep.KEYWORDS_MIN for words in found) > 0.9 * len(rows)
    for row, words in zip(rows, found, strict=True):
        assert len(words) <= data_prep.WORDS and all(word in row["text"] and 2 <= len(word) <= 4 for word in words)
        assert not any(a in b for a in words for b in words if a is not b)
        assert all(sum(word in row["text"] for row in rows) <= 0.2 * len(rows) for word in words)


VERSE = {"source": "a:1", "title": "春", "keywords": ["春风", "篮子", "桃花"],
         "text": "春风轻轻敲我的门，\n送来一个卖花的人。\n篮子里装满带露的早晨，\n一枝桃花是一份温存。"}


@pytest.mark.parametrize("answer, expected", [
    *((answer, ["春风", "送来", "篮子"]) for answer in (
        "春风，送来，篮子", "关键词：春风，送来，篮子", "1.春风 2.送来 3.篮子", "**春风**，**送来**，**篮子**",
        "“春风”、“送来”、“篮子”。", "春风；送来；篮子", "- 春风\n- 送来\n- 篮子", "春风, 春风, 送来, 篮子, 明月")),
    *((answer, None) for answer in ("春风，篮子，明月", "春风，春风，篮子", "春风，篮子，桃", "", "关键词是这些")),
    ("春风，春风轻轻，篮子，早晨", ["春风轻轻", "篮子", "早晨"]),
    ("春风，篮子，桃花，早晨，温存，卖花", ["春风", "篮子", "桃花", "早晨", "温存"])])
def test_keywords_in_an_answer_of_an_api(answer, expected):
    assert data_prep.keywords_in(VERSE, answer) == expected


GOOD = "想写春风来时的心情，先有春风敲门，再见篮子里的早晨，最后落到桃花，押人辰韵，每一行都轻一些，让人想起旧日子。"


@pytest.mark.parametrize("answer, kept", [
    (GOOD, True), (GOOD.replace("篮子", "竹篮"), False), (GOOD[:30], False), (GOOD * 9, False),
    ("<think>" + GOOD, False), (GOOD[:20] + "\n" + GOOD[20:], False), (GOOD + "</think>《春》/春风", False)])
def test_a_thought_of_an_api_must_be_one_the_reward_reads(answer, kept):
    assert data_prep.thought_in(VERSE, answer) == (answer if kept else None)
