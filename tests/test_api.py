"""The API client against a local server (fake_api.py)."""

import json
import signal
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
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("API_BASE", server.url)
    monkeypatch.setenv("API_KEY", KEY)
    yield server
    server.close()


@pytest.fixture
def pauses(monkeypatch):
    """The pauses in seconds that the client asks for, and does not make."""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "new" / "cache.jsonl"


def ask(cache, *texts, **options):
    return api.call_api([[{"role": "user", "content": text}] for text in texts], cache, **options)


def cached(cache):
    return [json.loads(line)["answer"] for line in cache.read_text(encoding="utf-8").split("\n")[:-1]]


def refusal(cache, *texts):
    """The one line with which a call exits."""
    with pytest.raises(SystemExit) as stop:
        ask(cache, *texts)
    assert KEY not in stop.value.code and "\n" not in stop.value.code
    return stop.value.code


# ---- answers and cache ----------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_jobs_and_are_asked_for_once(server, cache, monkeypatch, capfd):
    texts = [f"第{i % 40}行\u2028\"引\"" for i in range(60)]
    assert ask(cache, *texts) == [f"re: {text}" for text in texts] and len(cached(cache)) == 40
    capfd.readouterr()
    monkeypatch.delenv("API_KEY")                   # not needed for what the cache has
    assert ask(cache, *texts[::-1]) == [f"re: {text}" for text in texts[::-1]] and ask(cache) == []
    assert "".join(capfd.readouterr()) == "" and set(server.asked.values()) == {1}


def test_answers_of_other_settings_are_not_taken(server, cache, monkeypatch):
    ask(cache, "a")
    for name, value in {"API_MODEL": "other", "API_TEMPERATURE": 0.1, "API_MAX_TOKENS": 7}.items():
        monkeypatch.setattr(api, name, value)
        ask(cache, "a")
    assert server.asked["a"] == len(cached(cache)) == 4


@pytest.mark.parametrize("cut, asked", [(1, 3), (20, 4), (80, 4)])        # without its newline alone a line is whole
def test_damaged_lines_and_half_a_last_line_are_skipped(server, cache, cut, asked):
    ask(cache, "a", "b", "c")
    cache.write_bytes(b'\xff\x00\n[]\n7\n\n{"key": 1}\n{"key": [], "answer": ""}\n' + cache.read_bytes()[:-cut])
    for _ in range(2):
        assert ask(cache, "a", "b", "c") == ["re: a", "re: b", "re: c"]
    assert server.asked.total() == asked


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_loses_and_doubles_no_answer(server, cache, number):
    server.latency = 0.05
    server.script["7"] = [lambda handler: server.stopped.wait(100)]         # Ctrl-C does not wait for a call that hangs
    code = (f"import pathlib, signal, {api.__name__} as api; signal.signal(signal.SIGINT, signal.default_int_handler);"
            "jobs = [[{'role': 'user', 'content': str(i)}] for i in range(300)];"
            f"api.API_THREADS = 4; api.call_api(jobs, pathlib.Path({str(cache)!r}))")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(api.__file__).parent, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while server.asked.total() < 80:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    assert KEY not in process.communicate(timeout=50)[1].decode() and process.returncode == -number
    kept = [json.loads(line)["answer"] for line in cache.read_bytes().split(b"\n")[:-1]]
    server.latency = 0
    assert ask(cache, *map(str, range(300))) == [f"re: {i}" for i in range(300)]
    assert kept and all(server.asked[answer[4:]] == 1 for answer in kept)


# ---- what counts as an answer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["b", "<think>a</think> b", "a</think>\n\nb\n", "<think>a</think>a</think>b"])
def test_the_answer_is_what_follows_the_thoughts(content):
    assert api.answer_of({"choices": [{"message": {"content": content, "reasoning_content": "r"}}]}) == "b"


@pytest.mark.parametrize("reply, reason", [
    ({"content": "<think>a"}, "API_MAX_TOKENS"), ({"content": "b", "finish": "length"}, "API_MAX_TOKENS"),
    ({"content": "", "reasoning_content": "r"}, "API_MAX_TOKENS"), ({"content": "<think>a</think>"}, "empty answer"),
    ({"content": None}, "empty answer"), (b'{"error": {}}', "choices"), (b"<html>", "JSON")])
def test_a_reply_without_an_answer_is_asked_for_again(server, cache, monkeypatch, pauses, capfd, reply, reason):
    monkeypatch.setattr(api, "API_RETRIES", 1)
    server.script |= {"x": [reply], "y": [reply] * 2}
    assert ask(cache, "x", "y") == ["re: x", None] and cached(cache) == ["re: x"]
    assert "1 of 2 calls failed" in (output := capfd.readouterr().out) and reason in output


def test_an_answer_that_is_not_accepted_is_asked_for_again(server, cache, monkeypatch, pauses):
    monkeypatch.setattr(api, "API_RETRIES", 2)
    server.script["a"] = [{"content": "bad"}]
    assert ask(cache, "a", "b", accept=lambda index, answer: (index, answer) == (0, "re: a")) == ["re: a", None]
    assert server.asked == {"a": 2, "b": 3} and cached(cache) == ["re: a"]
    assert ask(cache, "a", accept=lambda index, answer: False) == [None]        # nor from the cache


@pytest.mark.parametrize("temperature, field, sent", [
    (0.7, "max_tokens", {"temperature": 0.7, "max_tokens": 1024}),
    (-1, "max_completion_tokens", {"max_completion_tokens": 1024})])
def test_newer_models_get_the_fields_that_they_take(server, cache, monkeypatch, temperature, field, sent):
    monkeypatch.setattr(api, "API_TEMPERATURE", temperature)
    monkeypatch.setattr(api, "API_LENGTH_FIELD", field)
    monkeypatch.setenv("API_BASE", server.url + "/chat/completions/")
    ask(cache, "a")
    messages = [{"role": "user", "content": "a"}]
    assert server.requests == [("/v1/chat/completions", {"model": api.API_MODEL, "messages": messages, **sent})]


# ---- failures -------------------------------------------------------------------------------------------------------


def test_what_may_pass_is_repeated_with_longer_pauses(server, cache, pauses):
    cut_off = [lambda handler: None, lambda handler: handler.reply(200, b"{", Content_Length=9)]
    steps = [408, 425, 429, 500, 502, 503, *cut_off]
    server.script |= {str(i): [step] * 3 for i, step in enumerate(steps)}
    assert ask(cache, *map(str, range(8))) == [f"re: {i}" for i in range(8)] and set(server.asked.values()) == {4}
    assert len(set(pauses)) == 24 and 0.5 <= min(pauses) <= 1 and 2 <= max(pauses) <= 4


@pytest.mark.parametrize("after, seconds", [("30", 30), ("86400", 60), ("soon", 1)])
def test_retry_after_is_waited_for_a_minute_at_most(server, cache, pauses, after, seconds):
    server.script["x"] = [lambda handler: handler.reply(429, b"", Retry_After=after)]
    assert ask(cache, "x") == ["re: x"] and seconds / 2 <= pauses[0] <= seconds


def test_failures_are_summed_up_and_asked_again_by_the_same_command(server, cache, monkeypatch, pauses, capfd):
    monkeypatch.setattr(api, "API_RETRIES", 1)
    server.script |= {"x": [503] * 3, "y": [503] * 3, "z": [b"{}"] * 3}
    assert ask(cache, "a", "x", "y", "z") == ["re: a", None, None, None]
    summary = capfd.readouterr().out.split("\n")[-2]
    assert "3 of 4 calls failed" in summary and "2 x status 503: " in summary and "1 x KeyError: 'choices'" in summary
    assert ask(cache, "a", "x") == ["re: a", "re: x"] and server.asked["a"] == 1 and KEY not in summary


def test_an_attempt_has_its_time_as_a_whole(server, cache, monkeypatch, pauses, capfd):
    def blank_lines(handler):
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        while not server.stopped.wait(0.05):
            handler.wfile.write(b"\n")

    monkeypatch.setattr(api, "API_TIMEOUT", 1)
    server.script |= {"blank": [blank_lines], "hang": [lambda handler: server.stopped.wait(100)]}
    assert ask(cache, "blank", "hang") == ["re: blank", "re: hang"]
    assert "no whole reply in 1 s" in (output := capfd.readouterr().out) and "timed out" in output


@pytest.mark.parametrize("status, text, named", [
    *((status, "no", "127.0.0.1") for status in (400, 401, 402, 403, 404, 422, 302, 307)),
    (429, "insufficient_quota", "quota"), (429, "exceeded_current_quota_error", "quota"),
    (400, "'max_tokens' is not supported with this model", "API_LENGTH_FIELD"),
    (400, "'temperature' does not support 0.7 with this model", "API_TEMPERATURE")])
def test_what_does_not_pass_stops_the_run_and_keeps_the_answers(server, cache, monkeypatch, capfd, status, text, named):
    monkeypatch.setattr(api, "API_THREADS", 1)
    server.latency = 0.05
    other = serve()                                 # a redirect is not followed
    server.script["x"] = [lambda handler: handler.reply(status, f"{text} {KEY}".encode(), Location=other.url)] * 9
    message = refusal(cache, "a", "b", "x", *map(str, range(50)))
    other.close()
    assert f"status {status}: {text} ***" in message and named in message and not other.requests
    assert cached(cache)[:2] == ["re: a", "re: b"] and server.asked["x"] == 1 and server.asked.total() < 53
    assert KEY not in "".join(capfd.readouterr()) + cache.read_text(encoding="utf-8")


# ---- before anything is sent ----------------------------------------------------------------------------------------


def test_the_cost_is_told_and_bounded_with_retries(server, cache, monkeypatch, pauses, capfd):
    monkeypatch.setattr(api, "API_PRICE_OUT", 1000.0)           # 1.024 an answer
    assert "API_MAX_COST=5.0" in refusal(cache, "1", "2", "3", "4", "5") and not server.requests
    assert capfd.readouterr().out.startswith(f"5 calls to {api.API_MODEL} at {server.url.split('/')[2]}, at most 5.12")
    server.script |= {"x": [b"{}"] * 9, "y": [b"{}"] * 9, "z": [503] * 3}
    assert "API_MAX_COST=5.0" in refusal(cache, "x", "y") and server.asked.total() == 4
    assert ask(cache, "z", "z") == ["re: z", "re: z"]           # an error status costs nothing
    monkeypatch.setattr(api, "API_PRICE_IN", 1000.0)
    monkeypatch.setattr(api, "API_PRICE_OUT", 0.0)
    ask(cache, "字" * 1500)
    assert 1.0 <= float(capfd.readouterr().out.split("at most ")[-1].split()[0]) < 1.2


@pytest.mark.parametrize("name, value", [
    ("API_KEY", ""), ("API_KEY", "schlüssel"), ("API_KEY", f"{KEY}\n{KEY}"), ("API_BASE", "file:///etc/hostname"),
    ("API_BASE", "127.0.0.1:80"), ("API_BASE", "http://a b/"), ("API_BASE", f"http://user:{KEY}@127.0.0.1/v1")])
def test_an_unusable_environment_is_named(server, cache, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert name in refusal(cache, "a") and not server.requests
