"""The text half of the data preparation: reading, cleaning, duplicates, keywords, stages."""

import csv
import io
import json

import pytest
import raw_texts

import data_prep as texts

POEM = "床前明月光，\n疑是地上霜。\n举头望明月，\n低头思故乡。"
OTHER = "白日依山尽，\n黄河入海流。\n欲穷千里目，\n更上一层楼。"
THIRD = "千山鸟飞绝，\n万径人踪灭。\n孤舟蓑笠翁，\n独钓寒江雪。"


def new_stage():
    return {"in": 0, "out": 0, "dropped": {}, "samples": {}}


def read(path):
    stage = new_stage()
    return list(texts.read_raw(path, stage)), stage


# ---- clean ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("raw", "right"), [
    # html
    ("床前明月光，<br>疑是地上霜。<BR/>\n举头望明月，<br />低头思故乡。", POEM),
    ("<p>床前明月光，</p>\n<p class='a'>疑是地上霜。</p>\n<p>举头望明月，</p><p>低头思故乡。</p>", POEM),
    ("<head><title>静夜思</title><style>p{}</style></head><script>var a = '歌词' < 1;</script><!-- 广告 --><div>"
     + POEM.replace("\n", "<br>"), POEM),
    ("&#24202;前明月光&#65292;\n疑是地上霜。\n举头望明月，&nbsp;\n低&amp;nbsp;头思故乡。", POEM),
    ("&lt;b&gt;床前&lt;/b&gt;<b>明月</b>光，\n疑是地上霜。\n举头望明月，\n低头思故乡。<script>没有结束", POEM),
    ("我爱你 <3 一万年啊", "我爱你 <3 一万年啊"),
    # lrc
    ("[ti:静夜思]\n[ar:李白]\n[by:a]\n[offset:0]\n"
     "[00:01.00]床前明月光，\n[00:02]疑是地上霜。\n[00:03.123]举头望明月，\n[00:04:50] 低头思故乡。", POEM),
    ("[00:01.00]<00:01.00>床前<00:01.50>明月光，\n"
     "[00:02.00]疑是[00:02.50]地上霜。\n[00:03.00]举头望明月，\n[00:04.00]低头思故乡。", POEM),
    ("[00:02.00]疑是地上霜。\n[00:30.00][00:01.00]床前明月光，\n[00:04.00][00:40.00]低头思故乡。\n[00:03.00]举头望明月，", POEM),
    ("[00:01.00][00:30.00]床前明月光，\n"
     "[00:02.00] [00:31.00]疑是地上霜。\n[00:03.00]举头望明月，\n[00:04.00]低头思故乡。", POEM),
    # credits
    ("作词：李白\n作曲:杜甫\n编曲 : 王维\n词曲：李白\n词/曲：李白\n词、曲：李白\n词：李白 曲：杜甫\n" + POEM, POEM),
    (POEM + "\n演唱：李白\n混音师：杜甫\n"
     "制作人：王维/李白\nOP：某某音乐\nSP: Some Music\n吉他/贝斯：李白\n和声：李白\n录音棚：大唐\n监制：李白\n出品：长安", POEM),
    ("作詞：李白\n編曲：李白\n監製：李白\nLyrics by: Li Bai\nComposed by：Li Bai\nProducer: Du Fu\n" + POEM, POEM),
    ("静夜思 - 李白\n" + POEM, POEM),
    ("《静夜思》\n" + POEM, POEM),
    ("作词：李白 作曲：杜甫 床前明月光 疑是地上霜 举头望明月 低头思故乡", "床前明月光，疑是地上霜，举头望明月，低头思故乡"),
    ("我为你作曲，你为我作词\n吉他在唱歌，录音在转动\n他说：来源是一条河\n歌手：",
     "我为你作曲，你为我作词\n吉他在唱歌，录音在转动\n他说：来源是一条河"),
    ("男：床前明月光，\n女: 疑是地上霜。\n合：举头望明月，\n低头思故乡。", POEM),
    ("原文：床前明月光，\n疑是地上霜。\n举头望明月，\n低头思故乡。", POEM),
    # notes and furniture
    ("首页 > 歌词 > 静夜思\n收藏 分享 打印(3)\n" + POEM + "\n来源：网络\n转载请注明出处\n歌词来自千千歌词\n"
     "更多好听的歌词请访问 http://a.example.com/x\nwww.example.com\n"
     "QQ群：12345678\n微信号：abcde1\n未经许可，不得翻唱\n上一首 下一首\n返回顶部\n[Chorus]\n=======", POEM),
    ("下一首歌为你唱\n请播放\n收藏\n分享着每一天", "下一首歌为你唱\n请播放\n收藏\n分享着每一天"),
    # characters
    ("\ufeff床\u200b前\u00ad明\u202e月\ue000光，\r\n疑是\u0007地上霜。\u2028举头\ud800望明月，\u2029低头思\U000f0000故乡。", POEM),
    ("床前明月光，\\n疑是地上霜。\\r\\n举头望明月，\\n低头思故乡。", POEM),
    ("牀前明月光﹐\n疑是地上霜｡\n舉頭望明月,\n低頭思故鄉.", POEM),
    ("彩袖殷勤捧玉鍾，當年拚卻醉顏紅", "彩袖殷勤捧玉钟，当年拼却醉颜红"),
    ("彩袖殷勤捧玉钟，当年拚却醉颜红", "彩袖殷勤捧玉钟，当年拚却醉颜红"),
    # spaces and punctuation
    ("床 前 明 月 光\n疑　是　地　上　霜", "床前明月光\n疑是地上霜"),
    ("床前明月光 疑是地上霜\n举头望明月　低头思故乡\n我 爱你 ，你呢 ？", "床前明月光，疑是地上霜\n举头望明月，低头思故乡\n我爱你，你呢？"),
    ('他说∶"你好!"「来吧」,走...\n去哪里--远方(很远);好。。。', "他说：“你好！”“来吧”，走……\n去哪里——远方（很远）；好……"),
    ("I love you, baby. 我爱你,你知道吗? OK, go!", "I love you, baby. 我爱你，你知道吗？OK, go!"),
    ("一共1,000元,3.5个,10:30见", "一共1,000元，3.5个，10:30见"),
    # breaks
    ("床前明月光，\n疑是地上霜。\n\n\n\n\n举头望明月，\n低头思故乡。\n\n", POEM.replace("霜。\n", "霜。\n\n")),
    ("床前明月光，\n\n疑是地上霜。\n\n举头望明月，\n\n低头思故乡。", POEM),
    ("\n".join(POEM.replace("\n", "")), POEM),
    ("床前\n明\n月光\n，\n疑是\n地\n上霜\n。\n举\n头\n望明\n月\n，\n低头\n思\n故乡\n。\n来源：网络", POEM),
    ("", ""),
])
def test_clean(raw, right):
    assert texts.clean(raw) == right


@pytest.mark.parametrize("raw", ["<", "[00:01]", "作词：", "&lt;", "'", "更多", "<!--", "\n ", "我 ", "《"])
def test_long_odd_texts_end(raw):
    assert len(texts.clean(raw * 50_000)) <= 50_000 * 4


def test_clean_again_changes_nothing():
    for raw, _ in raw_texts.generate(200, seed=3):
        once = texts.clean(raw)
        assert texts.clean(once) == once


@pytest.mark.parametrize(("text", "chinese"), [
    (POEM, True), ("我爱你 12345 67890 ，。！", True), ("我 love 你 forever and ever", False),
    ("日本国憲法前文の平和主義と国民主権、基本的人権", False),
    ("東京都庁舎 カラオケ大会開催中止決定通知書類", False), ("사랑해요 우리 모두 大韓民國", False), ("идёт дождь над мостом", False),
    ("123 456", False), ("𠮷野家的饭，〇年", True),
])
def test_han_share(text, chinese):
    assert (texts.han_share(text) >= texts.MIN_HAN) == chinese


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "gbk", "utf-16", "big5hkscs"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_formats_and_encodings(tmp_path, encoding, suffix):
    first, second = (texts.TO_SIMPLIFIED(t) if encoding != "big5hkscs" else texts.opencc.OpenCC("s2t").convert(t) for t in (POEM, OTHER))
    if suffix == "txt":
        content, lines = f"《一》\n{first}\n---\n{second}\n", (1, 7)
    elif suffix == "jsonl":
        content, lines = "".join(json.dumps({"title": "一", "text": t}, ensure_ascii=False) + "\n" for t in (first, second)), (1, 2)
    else:
        table = io.StringIO()
        csv.writer(table).writerows([["title", "text"], ["一", first], ["一", second]])
        content, lines = table.getvalue(), (2, 6)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content.encode(encoding))
    rows, stage = read(path)
    assert [row["source"] for row in rows] == [f"a.{suffix}:{line}" for line in lines]
    assert [texts.clean(row["text"]) for row in rows] == [POEM, OTHER]
    assert rows[0]["title"] == "一" and rows[1]["title"] == ("" if suffix == "txt" else "一")
    assert stage["in"] == 0


def test_folder_in_order_with_other_files(tmp_path, capsys):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.TXT").write_text(POEM, encoding="utf-8")
    (tmp_path / "c.txt").write_text(OTHER, encoding="utf-8")
    (tmp_path / "a.txt").write_text(f"---\n---\n{THIRD}\n---\n \n", encoding="utf-8")
    (tmp_path / "d.doc").write_bytes(b"\0")
    rows, _ = read(tmp_path)
    assert [(row["source"], row["title"]) for row in rows] == [("a.txt:3", ""), ("c.txt:1", "c"), ("b/z.TXT:1", "z")]
    assert "1 files are not txt, jsonl or csv: .doc 1" in capsys.readouterr().out


def test_broken_rows_are_counted(tmp_path):
    good = json.dumps({"text": POEM, "title": 3}, ensure_ascii=False).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(
        [good, b"{", b"[1]", b'{"title": "x"}', b'{"text": 3}', b"[" * 9999, b'{"text": "' + "床前明月光".encode()[:-1] + b'"}', b"", good]))
    (tmp_path / "b.csv").write_text("title,text\nx\n" + f"y,{'长' * 200_000}\nz,一,二\n", encoding="utf-8")
    rows, stage = read(tmp_path)
    assert [row["source"] for row in rows] == ["a.jsonl:1", "a.jsonl:9", "b.csv:3"]
    assert rows[0]["text"] == POEM and rows[0]["title"] == "" and len(rows[2]["text"]) == 200_000
    assert stage["dropped"] == {"unreadable": 8} == {"unreadable": stage["in"]}
    assert len(stage["samples"]["unreadable"]) == 3 and stage["samples"]["unreadable"][0].startswith("a.jsonl:2: ")


@pytest.mark.parametrize(("files", "message"), [
    ({}, "no text in it"), ({"a.doc": "x"}, "1 files of other kinds"), ({"a.jsonl": '{"lyric": "x", "name": "y"}'}, "there is lyric, name"),
    ({"a.csv": "lyric,name\nx,y\n"}, "there is lyric, name"), ({"a.jsonl": ""}, "no text in it"), ({"a.jsonl": "{"}, "1 unreadable rows"),
])
def test_nothing_to_read(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=message):
        read(tmp_path)


# ---- duplicates and keywords ----------------------------------------------------------------------------------------


def reasons(*all_texts):
    return [reason for _, reason in texts.deduplicate({"text": text} for text in all_texts)]


def test_exact_duplicates():
    assert reasons(POEM, OTHER, POEM.replace("\n", ""), POEM.replace("，", "！")) == [None, None, "exact", "exact"]


def test_near_duplicates():
    lines = POEM.split("\n")
    assert reasons(POEM, "\n".join(lines[::-1])) == [None, "near"]
    assert reasons(POEM, "\n".join([*lines[:3], "低头看大海"])) == [None, "near"]
    assert reasons(POEM, "\n".join([*lines[:2], *OTHER.split("\n")[:2]])) == [None, None]          # two lines are too few
    assert reasons(POEM + OTHER + THIRD, POEM) == [None, "near"]                                   # a part of an earlier text
    assert reasons(POEM + OTHER, "\n".join([*lines[:3], *THIRD.split("\n")[:3], "一二三四五，六七八九十"])) == [None, None]     # less than half
    assert reasons("\n".join(lines[:2]), POEM) == [None, None]                                     # two lines do not swallow a longer text
    assert reasons(POEM, "\n".join(lines[1::-1])) == [None, "near"]
    assert reasons("人之初，性本善，性相近，习相远，苟不教，性乃迁，教之道，贵以专",
                   "人之初。性本善。性相近。习相远。苟不教。性乃迁。教之道。贵以严") == [None, "near"]


def test_stock_phrases_prove_nothing():
    stock = ["春天又来到", "夏天又来到", "秋天又来到"]
    others = iter(["".join(chr(0x4e00 + 7 * i + k) for k in range(7)) for i in range(500)])
    first, last = ("，".join([*stock, *(next(others) for _ in range(2))]) for _ in range(2))
    pairs = ["，".join([stock[i % 3], stock[(i + 1) % 3], *(next(others) for _ in range(3))]) for i in range(90)]      # two shared are too few
    assert reasons(first, last) == [None, "near"]
    assert reasons(first, *pairs, last) == [None] * 92


def test_keywords():
    rows = [{"text": texts.clean(raw)} for raw, truth in raw_texts.generate(400, seed=5) if truth["kind"] == "unique"]
    words = list(texts.keywords_offline(iter(rows)))
    assert len(words) == len(rows) and words == list(texts.keywords_offline(iter(rows)))
    found = [(row["text"], of) for row, of in zip(rows, words) if of]
    assert len(found) > 0.9 * len(rows)
    for text, of in found:
        assert texts.KEYWORDS_MIN <= len(of) <= texts.WORDS
        assert all(word in text and 2 <= len(word) <= 4 for word in of)
        assert not any(a in b for a in of for b in of if a is not b)
        assert all(sum(word in row["text"] for row in rows) <= 0.2 * len(rows) for word in of)


# ---- stages ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    with open(folder / "raw.jsonl", "w", encoding="utf-8") as file:
        for text, truth in raw_texts.generate(2000, seed=1):
            file.write(json.dumps({"title": "", "text": text, "truth": truth}, ensure_ascii=False) + "\n")
    texts.stage_clean(folder / "raw.jsonl", folder)
    texts.stage_unique(folder)
    texts.stage_keywords(folder)
    return folder


def test_generated_texts(made):
    measured = raw_texts.check(made / "raw.jsonl", made)
    assert measured["recovered"] >= 0.995 and measured["foreign kept"] == 0
    assert measured["recall exact"] == 1 and measured["recall near"] >= 0.95 and measured["unique lost"] == 0
    assert measured["with keywords"] >= 0.99


def test_funnel_adds_up(made, capsys):
    funnel = json.loads((made / "funnel.json").read_text(encoding="utf-8"))
    before = 2000
    for name in ("clean", "unique", "keywords"):
        stage = funnel[name]
        rows = [json.loads(line) for line in (made / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert stage["in"] == before and stage["out"] == len(rows) == before - sum(stage["dropped"].values())
        assert all(1 <= len(samples) <= 3 for samples in stage["samples"].values()) and stage["samples"].keys() == stage["dropped"].keys()
        before = stage["out"]
    assert rows[0].keys() == {"id", "source", "title", "text", "keywords", "words", "keywords_from"} and len({row["id"] for row in rows}) == len(rows)
    texts.print_funnel(made)
    assert f"unique: {funnel['unique']['in']} in, {funnel['unique']['out']} out" in capsys.readouterr().out


def test_made_once_and_again_after_a_kill(tmp_path):
    raw = tmp_path / "raw.jsonl"
    raw.write_text("\n".join(json.dumps({"text": text}) for text in (POEM, OTHER, POEM, "hello world, this is English")), encoding="utf-8")
    first = texts.stage_clean(raw, tmp_path)
    assert first["in"] == 4 and first["out"] == 3 and first["dropped"] == {"language": 1}
    raw.unlink()
    assert texts.stage_clean(raw, tmp_path) == first                    # not made again: the raw texts are gone
    clean = (tmp_path / "clean.jsonl").read_text(encoding="utf-8")
    (tmp_path / "unique.jsonl.tmp").write_text('{"half', encoding="utf-8")
    assert texts.stage_unique(tmp_path)["out"] == 2
    assert not list(tmp_path.glob("*.tmp"))
    (tmp_path / "unique.jsonl").unlink()                                # counts without their rows
    assert texts.stage_unique(tmp_path) == json.loads((tmp_path / "funnel.json").read_text(encoding="utf-8"))["unique"]
    (tmp_path / "clean.jsonl").write_text('{"half', encoding="utf-8")
    with pytest.raises(SystemExit, match="clean.jsonl:1 is damaged"):
        list(texts.stored(tmp_path / "clean.jsonl"))
    (tmp_path / "clean.jsonl").write_text(clean, encoding="utf-8")
    (tmp_path / "funnel.json").unlink()                                 # rows without their counts, as after a kill between them
    assert texts.stage_unique(tmp_path)["out"] == 2
    assert len((tmp_path / "unique.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_other_keywords(tmp_path):
    (tmp_path / "unique.jsonl").write_text("".join(json.dumps({"id": str(i), "source": "", "text": t}) + "\n" for i, t in enumerate((POEM, OTHER))))
    stage = texts.stage_keywords(tmp_path, lambda rows: (["明月", "故乡", "举头"] if "明月" in row["text"] else None for row in rows), "a model")
    row = json.loads((tmp_path / "keywords.jsonl").read_text(encoding="utf-8"))
    assert row["keywords"] == ["明月", "举头", "故乡"] and row["keywords_from"] == "a model" and stage["dropped"] == {"keywords": 1}


@pytest.mark.parametrize(("text", "reason"), [
    ("我们", "short"), ("春" * 2001, "long"),
    ("锛屼笘鐣屼汉姘戝叡鍜屽浗锛屼笘鐣", "garbled"), ("", "language"),
])
def test_reasons(tmp_path, text, reason):
    (tmp_path / "raw.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    assert texts.stage_clean(tmp_path / "raw.jsonl", tmp_path)["dropped"] == {reason: 1}
