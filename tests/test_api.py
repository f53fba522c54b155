"""The API client against a local server that does what the message says (fake_api.py)."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_api import serve

import data_prep as api

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def server(monkeypatch):
    server = serve()
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("API_BASE", server.url)
    monkeypatch.setenv("API_KEY", KEY)
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "new" / "cache.jsonl"


def job(text):
    return [{"role": "system", "content": "简短"}, {"role": "user", "content": text}]


def ask(cache, *texts, **options):
    return api.call_api([job(text) for text in texts], cache, **options)


def rows(cache):
    return [json.loads(line) for line in cache.read_bytes().split(b"\n")[:-1]]


def refused(cache, *texts):
    """The message with which a call ends."""
    with pytest.raises(SystemExit) as stop:
        ask(cache, *texts)
    return stop.value.code


def run_process(cache, count, **constants):
    """Starts a process that asks `count` questions and prints the answers as JSON."""
    code = f"""
import json, pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import {api.__name__} as api
vars(api).update({constants!r})
jobs = [[{{"role": "user", "content": f"问{{i}}"}}] for i in range({count})]
print(json.dumps(api.call_api(jobs, pathlib.Path({str(cache)!r}))))
"""
    return subprocess.Popen([sys.executable, "-c", code], cwd=Path(api.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 20 s")


# ---- answers and cache ----------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_jobs_and_equal_jobs_are_asked_once(server, cache):
    server.latency = 0.02
    texts = [f"第{i % 40}行" for i in range(60)]
    assert ask(cache, *texts) == [f"re: {text}" for text in texts]
    assert len(rows(cache)) == 40 and set(server.asked.values()) == {1}


def test_cached_answers_need_no_key_and_print_nothing(server, cache, monkeypatch, capfd):
    ask(cache, "a", "b")
    capfd.readouterr()
    monkeypatch.delenv("API_KEY")
    assert ask(cache, "b", "a", "b") == ["re: b", "re: a", "re: b"]
    assert ask(cache) == []
    assert "".join(capfd.readouterr()) == "" and server.asked.total() == 2


@pytest.mark.parametrize("name, value", [("API_MODEL", "other"), ("API_TEMPERATURE", 0.1), ("API_MAX_TOKENS", 7)])
def test_an_answer_of_other_settings_is_not_taken(server, cache, monkeypatch, name, value):
    ask(cache, "a")
    monkeypatch.setattr(api, name, value)
    ask(cache, "a")
    assert server.asked["a"] == 2 and len(rows(cache)) == 2


@pytest.mark.parametrize("cut", [1, 20, 80])
def test_half_a_last_line_is_asked_again_and_nothing_else(server, cache, cut):
    ask(cache, "a", "b", "c")
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-cut])
    assert ask(cache, "a", "b", "c") == ["re: a", "re: b", "re: c"]
    assert sorted(cache.read_bytes().split(b"\n")) == sorted(whole.split(b"\n"))
    assert server.asked.total() == (3 if cut == 1 else 4)       # without its newline alone the line is whole


def test_damaged_lines_are_asked_again_and_lose_no_other(server, cache):
    ask(cache, "a", "b")
    good = cache.read_bytes()
    cache.write_bytes(b'\xff\x00\n[]\n{"key": 1}\n{"key": "x", "answer": null}\n' + b"[" * 100_000 + b"\n" + good)
    assert ask(cache, "a", "b", "c") == ["re: a", "re: b", "re: c"]
    assert cache.read_bytes().count(good) == 1 and server.asked.total() == 3


def test_kill_9_loses_and_doubles_no_answer(server, cache):
    server.latency = 0.02
    process = run_process(cache, 200, API_THREADS=4)
    wait_for(lambda: server.answered.total() >= 60)
    process.kill()
    process.communicate()
    kept = cache.read_bytes()
    kept = [json.loads(line)["answer"] for line in kept[:kept.rfind(b"\n") + 1].split(b"\n")[:-1]]
    assert 50 <= len(kept) < 200
    output, errors = run_process(cache, 200, API_THREADS=4).communicate(timeout=60)
    assert json.loads(output.split("\n")[-2]) == [f"re: 问{i}" for i in range(200)], errors
    assert f"{200 - len(kept)} calls to " in output
    assert all(server.asked[answer[4:]] == 1 for answer in kept)
    assert server.asked.total() <= 200 + 4                      # those that were under way
    assert len(rows(cache)) == len({row["key"] for row in rows(cache)}) == 200


def test_ctrl_c_ends_it_although_a_call_hangs(server, cache):
    ask(cache, "a")
    process = run_process(cache, 100, API_THREADS=2)
    server.latency = 30
    wait_for(lambda: server.asked.total() > 2)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=10)[1]
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors and KEY not in errors
    assert {"re: a"} <= {row["answer"] for row in rows(cache)}


def test_text_of_all_kinds_survives_the_cache(server, cache):
    texts = ["surrogate x", "𠮷\u2028\x85\r\n\"引\"", "\ud800 asked"]
    first = ask(cache, *texts)
    assert first[0] == "\ufffd\u2028\x85𠮷surrogate x" and first[1] == "re: " + texts[1] and first[2] == "re: \ufffd asked"
    assert ask(cache, *texts) == first and server.asked.total() == 3
    assert sorted(row["answer"] for row in rows(cache)) == sorted(first)


# ---- failures -------------------------------------------------------------------------------------------------------


def test_what_may_pass_is_repeated(server, cache, capfd):
    words = ["429", "500", "502", "503", "408", "null", "absent", "empty", "list", "nochoices", "number", "broken", "nothing", "page", "short", "cut"]
    texts = [f"{word}:2 x" for word in words]
    assert ask(cache, *texts, "blank x") == [f"re: {text}" for text in (*texts, "blank x")]
    assert all(server.asked[text] == 3 for text in texts) and server.asked["blank x"] == 1
    assert "failed" not in capfd.readouterr().out


def test_retry_after_is_waited_for(server, cache):
    assert ask(cache, "seconds:1 x", "date:1 x", "never:1 x") == ["re: seconds:1 x", "re: date:1 x", "re: never:1 x"]
    assert server.early == 0


def test_retry_after_is_waited_for_a_minute_at_most(server, cache, monkeypatch):
    pauses, attempt_api = [], api.attempt_api
    monkeypatch.setattr(api, "attempt_api", lambda *words: pauses.append(words[-1]) or attempt_api(*words[:-1], 0))
    ask(cache, "later:1 x")
    assert pauses == [0, 60]


def test_a_failure_is_told_once_not_cached_and_asked_again(server, cache, monkeypatch, capfd):
    monkeypatch.setattr(api, "API_RETRIES", 1)
    assert ask(cache, "a", "503:3 x", "503:3 y", "null:3 z") == ["re: a", None, None, None]
    output = capfd.readouterr().out
    assert output.count("3 of 4 calls") == 1 and "2 times status 503: " in output and "1 times status 200: " in output
    assert [row["answer"] for row in rows(cache)] == ["re: a"] and server.asked["503:3 x"] == 2
    assert ask(cache, "a", "503:3 x") == ["re: a", "re: 503:3 x"] and server.asked["a"] == 1


def test_an_answer_that_is_not_accepted_is_asked_again(server, cache, monkeypatch):
    monkeypatch.setattr(api, "API_RETRIES", 2)
    seen = []
    assert ask(cache, "a", "b", accept=lambda _, text: seen.append(text) or (text == "re: a" and seen.count("re: a") == 2)) == ["re: a", None]
    assert server.asked == {"a": 2, "b": 3} and len(rows(cache)) == 1
    assert ask(cache, "a", accept=lambda _, text: "x" in text) == [None]       # nor from the cache
    assert ask(cache, "a") == ["re: a"] and server.asked["a"] == 5


@pytest.mark.parametrize("word", ["hang", "drip", "dripheaders"])
def test_an_attempt_has_its_time_as_a_whole(server, cache, monkeypatch, capfd, word):
    monkeypatch.setattr(api, "API_TIMEOUT", 0.5)
    monkeypatch.setattr(api, "API_RETRIES", 1)
    assert ask(cache, f"{word} x", f"{word}:1 y", "z") == [None, f"re: {word}:1 y", "re: z"]
    output = capfd.readouterr().out
    assert server.asked[f"{word} x"] == 2 and "1 of 3 calls" in output and ("no whole answer in 0.5 s" in output or word != "dripheaders")


def test_no_connection(server, cache, monkeypatch, capfd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("API_BASE", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setattr(api, "API_RETRIES", 1)
        assert ask(cache, "a", "b") == [None, None]
    assert "2 of 2 calls" in (output := capfd.readouterr().out) and "refused" in output and cache.read_bytes() == b""


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 422])
def test_what_does_not_pass_ends_the_call_and_keeps_the_answers(server, cache, monkeypatch, capfd, status):
    monkeypatch.setattr(api, "API_THREADS", 1)
    message = refused(cache, "a", "b", f"{status} x", "c")
    assert str(status) in message and "127.0.0.1" in message and "no: Bearer ***" in message and len(message) < 400
    assert [row["answer"] for row in rows(cache)] == ["re: a", "re: b"]
    assert server.asked[f"{status} x"] == 1 and server.asked["c"] == 0
    assert KEY not in message + "".join(capfd.readouterr()) + cache.read_text()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_follows_no_redirect(server, cache, status):
    other = serve()
    seen = []
    other.RequestHandlerClass = type("Seen", (other.RequestHandlerClass,), {"setup": lambda self: seen.append(1), "handle": lambda self: None})
    server.elsewhere = other.url
    assert str(status) in refused(cache, f"redirect {status}")
    other.close()
    assert not seen and server.asked.total() == 1


def test_the_key_is_in_nothing_that_comes_out(server, cache, monkeypatch, capfd):
    monkeypatch.setattr(api, "API_RETRIES", 0)
    assert ask(cache, "echo x", "500 x") == ["Bearer ***", None]
    assert "Bearer ***" in capfd.readouterr().out
    message = refused(cache, "401 x")
    monkeypatch.setenv("API_KEY", KEY + "\n" + KEY)
    message += refused(cache, "b")
    monkeypatch.setenv("API_BASE", f"http://user:{KEY}@127.0.0.1/v1")
    message += refused(cache, "b")
    assert "API_BASE" in message and KEY not in message + "".join(capfd.readouterr()) + cache.read_text()


# ---- before anything is sent ----------------------------------------------------------------------------------------


def test_the_cost_is_told_and_bounded(server, cache, monkeypatch, capfd):
    ask(cache, "a")
    capfd.readouterr()
    monkeypatch.setattr(api, "API_PRICE_OUT", 1000.0)           # 1.024 an answer
    ask(cache, "a", "b", "c", "b")
    host = server.url.split("/")[2]
    assert capfd.readouterr().out.startswith(f"2 calls to deepseek-chat at {host}, at most 2.0")
    message = refused(cache, "1", "2", "3", "4", "5")
    assert "5.12" in message and "API_MAX_COST=5.0" in message and server.asked.total() == 3
    assert "5 calls to deepseek-chat" in capfd.readouterr().out
    monkeypatch.setattr(api, "API_MAX_COST", float("nan"))
    assert "nan" in refused(cache, "1")


def test_the_estimate_is_above_the_tokens_of_chinese(server, cache, monkeypatch, capfd):
    monkeypatch.setattr(api, "API_PRICE_IN", 1000.0)
    monkeypatch.setattr(api, "API_PRICE_OUT", 0.0)
    ask(cache, "字" * 1500)
    assert 1.0 <= float(capfd.readouterr().out.split("at most ")[1].split()[0]) < 1.2


def test_answers_that_are_asked_again_stay_within_the_cost(server, cache, monkeypatch, capfd):
    monkeypatch.setattr(api, "API_PRICE_OUT", 1000.0)
    assert ask(cache, "null x", "null y") == [None, None]
    assert server.asked.total() == 4 and "API_MAX_COST=5.0 allows no further attempt" in capfd.readouterr().out
    assert ask(cache, "503:3 z", "503:3 w") == ["re: 503:3 z", "re: 503:3 w"]     # what the server did not answer costs nothing


@pytest.mark.parametrize("name, value", [("API_KEY", None), ("API_KEY", " "), ("API_KEY", "schlüssel"), ("API_BASE", "file:///etc/hostname"),
                                         ("API_BASE", "127.0.0.1:80"), ("API_BASE", "http://a b/"), ("API_BASE", "https:///v1")])
def test_unusable_environment_is_named(server, cache, monkeypatch, name, value):
    monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    assert name in refused(cache, "a") and server.asked.total() == 0


def test_proxies_of_the_environment_are_used(server, cache, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("API_BASE", "http://api.invalid/v1/")
    assert ask(cache, "a") == ["re: a"]
