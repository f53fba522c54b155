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
    monkeypatch.setattr(api, "API_RETRIES", 2)
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "new" / "cache.jsonl"


def ask(cache, *texts, **options):
    return api.call_api([[{"role": "user", "content": text}] for text in texts], cache, **options)


def cached(cache):
    return [json.loads(line)["answer"] for line in cache.read_text(encoding="utf-8").split("\n") if line]


def refusal(cache, *texts):
    """The one line with which a call exits."""
    with pytest.raises(SystemExit) as stop:
        ask(cache, *texts)
    assert KEY not in stop.value.code and "\n" not in stop.value.code
    return stop.value.code


def test_answers_come_in_the_order_of_the_jobs_and_are_asked_for_once(server, cache, monkeypatch, capfd):
    texts = [f"第{i % 40}行\u2028\"引\"" for i in range(60)]
    assert ask(cache, *texts) == [f"re: {text}" for text in texts] and len(cached(cache)) == 40
    capfd.readouterr()
    monkeypatch.delenv("API_KEY")                   # not needed for what the cache has
    assert ask(cache, *texts[::-1]) == [f"re: {text}" for text in texts[::-1]] and ask(cache) == []
    assert "".join(capfd.readouterr()) == "" and set(server.asked.values()) == {1}
    assert "API_KEY" in refusal(cache, "another")


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
    kept = cached(cache)
    server.latency = 0
    assert ask(cache, *map(str, range(300))) == [f"re: {i}" for i in range(300)]
    assert kept and all(server.asked[answer[4:]] == 1 for answer in kept)


@pytest.mark.parametrize("content, answer", [
    *((text, "b") for text in ("b", "<think>a</think> b", "a</think>\n\nb\n", "<think>a</think>a</think>b")),
    *((text, None) for text in ("", None, "<think>b", "<think>a</think>", "a</think><think>b"))])
def test_the_answer_is_what_follows_the_thoughts(server, cache, content, answer):
    server.script["x"] = [{"content": content}] * 2
    assert ask(cache, "x") == [answer] and server.asked["x"] == (1 if answer else 2)


def test_an_answer_that_is_cut_off_or_not_accepted_is_asked_for_once_more(server, cache, capfd):
    server.script |= {"a": [{"content": "bad"}], "c": [{"content": "half", "finish": "length"}]}
    found = ask(cache, "a", "b", "c", accept=lambda index, answer: answer in ("re: a", "re: c", "half"))
    assert found == ["re: a", None, "re: c"] and server.asked == {"a": 2, "b": 2, "c": 2}
    assert sorted(cached(cache)) == ["re: a", "re: c"] and "1 of 3 answers" in capfd.readouterr().out
    assert ask(cache, "a", accept=lambda index, answer: False) == [None]        # nor from the cache


@pytest.mark.parametrize("temperature, field, sent", [
    (0.7, "max_tokens", {"temperature": 0.7, "max_tokens": 1024}),
    (-1, "max_completion_tokens", {"max_completion_tokens": 1024})])
def test_newer_models_get_the_fields_that_they_take(server, cache, monkeypatch, temperature, field, sent):
    monkeypatch.setattr(api, "API_TEMPERATURE", temperature)
    monkeypatch.setattr(api, "API_LENGTH_FIELD", field)
    ask(cache, "a")
    request = {"model": api.API_MODEL, "messages": [{"role": "user", "content": "a"}], **sent}
    assert server.requests == [("/v1/chat/completions", request, f"Bearer {KEY}")]


def test_what_may_pass_is_repeated(server, cache, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(api, "API_TIMEOUT", 1)
    steps = [408, 429, 500, 503, lambda handler: None, lambda handler: server.stopped.wait(100)]
    server.script |= {str(i): [step] * 2 for i, step in enumerate(steps)}
    assert ask(cache, *map(str, range(6))) == [f"re: {i}" for i in range(6)] and set(server.asked.values()) == {3}


@pytest.mark.parametrize("step", [400, 401, 402, 403, 404, 422, 503, b"<html>", b"{}", b'{"choices": []}'])
def test_what_does_not_pass_stops_the_run_and_keeps_the_answers(server, cache, monkeypatch, capfd, step):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(api, "API_THREADS", 1)
    server.latency = 0.05
    server.script["x"] = [step] * 9
    message = refusal(cache, "a", "b", "x", *map(str, range(50)))
    assert api.API_MODEL in message and ("no: Bearer ***" in message if isinstance(step, int) else "Error" in message)
    assert cached(cache)[:2] == ["re: a", "re: b"] and server.asked["x"] == (3 if step == 503 else 1)
    assert server.asked.total() < 53 and KEY not in "".join(capfd.readouterr()) + cache.read_text(encoding="utf-8")


def test_a_redirect_does_not_get_the_key(server, cache):
    other = serve()
    server.script["x"] = [lambda handler: handler.reply(307, b"", Location=other.url + "/chat/completions")]
    ask(cache, "x")
    other.close()
    assert all(KEY not in str(authorization) for _, _, authorization in other.requests)


def test_the_cost_is_told_and_bounded(server, cache, monkeypatch, capfd):
    monkeypatch.setattr(api, "API_PRICE_OUT", 1000.0)           # 1.024 an answer
    assert "API_MAX_COST=5.0" in refusal(cache, "1", "2", "3", "4", "5") and not server.requests
    assert capfd.readouterr().out.startswith(f"5 calls to {api.API_MODEL}, at most 5.12")
    server.script |= {text: [{"content": ""}] * 9 for text in "xyz"}
    assert "API_MAX_COST=5.0" in refusal(cache, "x", "y", "z") and server.asked.total() == 3     # the second time
    monkeypatch.setattr(api, "API_PRICE_IN", 1000.0)
    monkeypatch.setattr(api, "API_PRICE_OUT", 0.0)
    ask(cache, "字" * 1500)
    assert 1.0 <= float(capfd.readouterr().out.split("at most ")[-1].split()[0]) < 1.2
