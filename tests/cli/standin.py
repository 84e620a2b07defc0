"""A stand-in for a server with thaw's routes: it answers what it is told to, and remembers what it was asked."""

from http.server import BaseHTTPRequestHandler, HTTPServer

TOKEN = "a token of 24 characters"


class Standin(HTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.answer, self.headers, self.asked = 200, b"{}", {}, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        length = int(self.headers.get("Content-Length", 0))
        self.server.asked.append((self.command, self.path, dict(self.headers), self.rfile.read(length)))
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(self.server.answer)))
        self.end_headers()
        self.wfile.write(self.server.answer)

    do_POST = do_GET

    def log_message(self, *arguments):
        pass
