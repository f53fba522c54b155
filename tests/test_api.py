"""The API client against a local server."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import data_prep as api

KEY = "sk-very-secret-0123456789"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, authorization = self.server, self.headers["Authorization"]
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = request["messages"][-1]["content"]
        with server.lock:
            server.asked[message] += 1
            server.requests.append((self.path, request, authorization))
            step = server.script[message].pop(0) if server.script[message] else {"content": f"re: {message}"}
        server.stopped.wait(server.latency)
        if isinstance(step, dict):
            step = json.dumps({"choices": [{"message": step, "finish_reason": step.get("finish")}]}).encode()
        if callable(step):
            step(self)
        elif isinstance(step, int):
            self.reply(step, json.dumps({"error": {"message": f"no: {authorization}"}}).encode())
        else:
            self.reply(200, step)

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


class Server(ThreadingHTTPServer):
    """Answers "re: " and the message, or what `script` lists for the first requests with that message: an int is an
    error status, bytes are the body of a reply, a dict is its message, a function is called with the handler.
    """

    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.requests, self.script, self.latency = Counter(), [], defaultdict(list), 0
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass        # clients that are killed or lose patience

    def __exit__(self, *error):
        self.stopped.set()
        self.shutdown()
        super().__exit__(*error)


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("API_KEY", KEY)
    monkeypatch.setattr(api, "API_RETRIES", 2)
    with Server() as server:
        monkeypatch.setenv("API_BASE", server.url)
        server.cache = tmp_path / "cache.jsonl"
        yield server


def ask(server, *texts, **options):
    return api.call_api([[{"role": "user", "content": text}] for text in texts], server.cache, **options)


def cached(server):
    return [json.loads(line)["answer"] for line in server.cache.read_text(encoding="utf-8").split("\n") if line]


def refusal(server, *texts):
    """The one line with which a call exits."""
    with pytest.raises(SystemExit) as stop:
        ask(server, *texts)
    assert KEY not in stop.value.code and "\n" not in stop.value.code
    return stop.value.code


def test_answers_come_in_order_and_are_asked_for_once_with_the_same_settings(server, monkeypatch, capfd):
    texts = [f"第{i % 40}行\u2028\"引\"" for i in range(60)]
    assert ask(server, *texts) == [f"re: {text}" for text in texts] and len(cached(server)) == 40
    capfd.readouterr()
    monkeypatch.delenv("API_KEY")                   # not needed for what the cache has
    assert ask(server, *texts[::-1]) == [f"re: {text}" for text in texts[::-1]] and ask(server) == []
    assert "".join(capfd.readouterr()) == "" and set(server.asked.values()) == {1}
    for name, value in {"API_MODEL": "other", "API_TEMPERATURE": 0.1, "API_MAX_TOKENS": 7}.items():
        with monkeypatch.context() as changed:
            changed.setattr(api, name, value)
            assert "API_KEY" in refusal(server, texts[0])


@pytest.mark.parametrize("cut, asked", [(1, 3), (20, 4), (80, 4)])        # without its newline alone a line is whole
def test_damaged_lines_and_half_a_last_line_are_skipped(server, cut, asked):
    ask(server, "a", "b", "c")
    damaged = b'\xff\x00\n[]\n7\n\n{"key": 1}\n{"key": [], "answer": ""}\n'
    server.cache.write_bytes(damaged + server.cache.read_bytes()[:-cut])
    for _ in range(2):
        assert ask(server, "a", "b", "c") == ["re: a", "re: b", "re: c"]
    assert server.asked.total() == asked


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_loses_and_doubles_no_answer(server, number):
    server.latency = 0.05
    server.script["7"] = [lambda handler: server.stopped.wait(100)]         # Ctrl-C does not wait for a call that hangs
    code = (f"import pathlib, signal, {api.__name__} as api; signal.signal(signal.SIGINT, signal.default_int_handler);"
            "jobs = [[{'role': 'user', 'content': str(i)}] for i in range(300)];"
            f"api.API_THREADS = 4; api.call_api(jobs, pathlib.Path({str(server.cache)!r}))")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(api.__file__).parent, stderr=subprocess.PIPE)
    while server.asked.total() < 80:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert KEY not in process.communicate(timeout=50)[1].decode() and process.returncode == -number
    kept = cached(server)
    server.latency = 0
    assert ask(server, *map(str, range(300))) == [f"re: {i}" for i in range(300)]
    assert kept and all(server.asked[answer[4:]] == 1 for answer in kept)


@pytest.mark.parametrize("content, answer", [
    ("<think>a</think> b\n", "b"), ("a</think>\n\nb", "b"), ("<think>a</think>a</think>b", "b"), ("", None),
    (None, None), ("<think>b", None), ("<think>a</think>", None), ("a</think><think>b", None)])
def test_the_answer_is_what_follows_the_thoughts(server, content, answer):
    server.script["x"] = [{"content": content}] * 2
    assert ask(server, "x") == [answer] and server.asked["x"] == (1 if answer else 2)


def test_an_answer_that_is_cut_off_or_not_accepted_is_asked_for_once_more(server):
    server.script |= {"a": [{"content": "bad"}], "c": [{"content": "half", "finish": "length"}]}
    found = ask(server, "a", "b", "c", accept=lambda index, answer: answer in ("re: a", "re: c", "half"))
    assert found == ["re: a", None, "re: c"] and server.asked == {"a": 2, "b": 2, "c": 2}
    assert sorted(cached(server)) == ["re: a", "re: c"]
    assert ask(server, "a", accept=lambda index, answer: False) == [None]        # nor from the cache


def test_newer_models_get_the_fields_that_they_take(server, monkeypatch):
    ask(server, "a")
    monkeypatch.setattr(api, "API_TEMPERATURE", -1)
    monkeypatch.setattr(api, "API_LENGTH_FIELD", "max_completion_tokens")
    ask(server, "a")
    request = {"model": api.API_MODEL, "messages": [{"role": "user", "content": "a"}]}
    sent = [request | {"temperature": 0.7, "max_tokens": 1024}, request | {"max_completion_tokens": 1024}]
    assert server.requests == [("/v1/chat/completions", body, f"Bearer {KEY}") for body in sent]


def test_what_may_pass_is_repeated(server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(api, "API_TIMEOUT", 1)
    steps = [408, 429, 503, lambda handler: None, lambda handler: server.stopped.wait(100)]
    server.script |= {str(i): [step] * 2 for i, step in enumerate(steps)}
    assert ask(server, *map(str, range(5))) == [f"re: {i}" for i in range(5)] and set(server.asked.values()) == {3}


@pytest.mark.parametrize("step", [401, 402, 404, 503, b"<html>", b"{}", b'{"choices": []}'])
def test_what_does_not_pass_stops_the_run_and_keeps_the_answers(server, monkeypatch, capfd, step):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(api, "API_THREADS", 1)
    server.latency = 0.05
    server.script["x"] = [step] * 9
    message = refusal(server, "a", "b", "x", *map(str, range(50)))
    assert api.API_MODEL in message and ("no: Bearer ***" in message if isinstance(step, int) else "Error" in message)
    assert cached(server)[:2] == ["re: a", "re: b"] and server.asked["x"] == (3 if step == 503 else 1)
    assert server.asked.total() < 53
    assert KEY not in "".join(capfd.readouterr()) and KEY.encode() not in server.cache.read_bytes()


def test_the_cost_is_told_and_bounded(server, monkeypatch, capfd):
    monkeypatch.setattr(api, "API_PRICE_OUT", 1000.0)           # 1.024 an answer
    assert "API_MAX_COST=5.0" in refusal(server, "1", "2", "3", "4", "5") and not server.requests
    assert capfd.readouterr().out.startswith(f"5 calls to {api.API_MODEL}, at most 5.12")
    server.script |= {text: [{"content": ""}] * 9 for text in "xyz"}
    assert "API_MAX_COST=5.0" in refusal(server, "x", "y", "z") and server.asked.total() == 3     # the second time
    monkeypatch.setattr(api, "API_PRICE_IN", 1000.0)
    monkeypatch.setattr(api, "API_PRICE_OUT", 0.0)
    ask(server, "字" * 1500)
    assert 1.0 <= float(capfd.readouterr().out.split("at most ")[-1].split()[0]) < 1.2
