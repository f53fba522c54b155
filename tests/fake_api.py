"""A local chat endpoint that answers "re: " and the message, or what server.script says for that message.

script[message] lists what its first requests get: an int is an error status, bytes are the body of a reply with status
200, a dict is the message in such a reply, a function is called with the handler.
"""

import json
import threading
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


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
        if callable(step):
            step(self)
        elif isinstance(step, int):
            self.reply(step, json.dumps({"error": {"message": f"no: {authorization}"}}).encode())
        elif isinstance(step, bytes):
            self.reply(200, step)
        else:
            self.reply(200, json.dumps({"choices": [{"message": step, "finish_reason": step.get("finish")}]}).encode())

    def reply(self, status, body, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass        # clients that are killed or lose patience

    def close(self):
        self.stopped.set()
        self.shutdown()
        self.server_close()


def serve() -> Server:
    """Starts a server: asked (requests by message), requests (path, body, authorization), script, latency, url."""
    server = Server(("127.0.0.1", 0), Handler)
    server.asked, server.requests, server.script, server.latency = Counter(), [], defaultdict(list), 0
    server.lock, server.stopped = threading.Lock(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server
