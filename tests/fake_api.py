"""A local chat endpoint whose behaviour the message says, for tests and for a measurement.

    python fake_api.py 0.05 5      # prints its address; 50 ms an answer, every fifth request fails with 500 or 429

The first word of the message is what happens: `503 some text`; `503:2 some text` happens to the first two requests of this message only.
Everything else is answered with "re: " and the message.
"""

import email.utils
import json
import random
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BODIES = {"null": {"choices": [{"message": {"content": None}}]}, "absent": {"choices": [{"message": {"role": "assistant"}}]},
          "empty": {"choices": [{"message": {"content": " \n"}}]}, "list": {"choices": [{"message": {"content": [{"text": "part"}]}}]},
          "nochoices": {"choices": []}, "number": 7}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        with server.lock:
            server.asked[message] += 1
            asked, total = server.asked[message], server.asked.total()
            server.early += time.time() < server.not_before.get(message, 0)
        word, _, times = message.partition(" ")[0].partition(":")
        word = word if asked <= int(times or asked) else ""
        answer = {"choices": [{"message": {"role": "assistant", "content": f"re: {message}"}}]}
        body = json.dumps(BODIES.get(word, answer)).encode()
        bodies = {"blank": b"\n\r\n \n" + body, "broken": body[:-3], "nothing": b"", "page": b"<html>Under construction</html>",
                  "surrogate": json.dumps({"choices": [{"message": {"content": "\ud83d\u2028\x85𠮷" + message}}]}).encode(),
                  "echo": json.dumps({"choices": [{"message": {"content": self.headers["Authorization"]}}]}).encode()}
        refusal = json.dumps({"error": {"message": "no: " + self.headers["Authorization"]}}).encode()
        time.sleep(random.uniform(0.5, 1.5) * server.latency)
        if server.fail_every and total % server.fail_every == 0:
            self.reply(random.choice([429, 500]), refusal)
        elif word.isdigit():
            self.reply(int(word), refusal)
        elif word in ("seconds", "date"):
            server.not_before[message] = time.time() + 1 if word == "seconds" else int(time.time()) + 2
            after = "1" if word == "seconds" else email.utils.formatdate(server.not_before[message], usegmt=True)
            self.reply(429, refusal, {"Retry-After": after})
        elif word in ("later", "never"):
            self.reply(503, refusal, {"Retry-After": "86400" if word == "later" else "soon"})
        elif word == "redirect":
            self.reply(int(message.split()[1]), refusal, {"Location": server.elsewhere})
        elif word in bodies:
            self.reply(200, bodies[word])
        elif word == "short":
            self.reply(200, body[:-9], {"Content-Length": str(len(body))})
        elif word == "drip":
            self.drip(b"HTTP/1.0 200 OK\r\n\r\n", body)
        elif word == "dripheaders":
            self.drip(b"HTTP/1.0 200 OK\r\n", b"X-Padding: " + b"x" * 100 + b"\r\n\r\n" + body)
        elif word == "hang":
            server.stopped.wait(60)
        elif word != "cut":
            self.reply(200, body)
            with server.lock:
                server.answered[message] += 1

    def reply(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self, head, rest):
        """Writes a byte each twentieth of a second: some seconds until the answer is whole."""
        self.wfile.write(head)
        for byte in rest:
            if self.server.stopped.wait(0.05):
                break
            self.wfile.write(bytes([byte]))

    def log_message(self, *words):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass        # clients that are killed or lose patience


def serve(latency=0.0, fail_every=0) -> Server:
    """Starts a server in a thread: asked, answered (requests by message), early (those before their Retry-After), url, close()."""
    server = Server(("127.0.0.1", 0), Handler)
    server.latency, server.fail_every, server.elsewhere = latency, fail_every, ""
    server.asked, server.answered, server.early, server.not_before = Counter(), Counter(), 0, {}
    server.lock, server.stopped = threading.Lock(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def close():
        server.stopped.set()
        server.shutdown()
        server.server_close()
    server.close = close
    return server


if __name__ == "__main__":
    print(serve(float(sys.argv[1]), int(sys.argv[2])).url, flush=True)
    threading.Event().wait()
