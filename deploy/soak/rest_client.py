"""What one REST client does: full answers, drops at every phase, slow reading, bad input. Each action is one request; its result
is what it counts as. Any thread."""
import http.client
import json
import socket
import struct
import time

from answers import BAD_BODIES, request_fields


class RestClient:
    def __init__(self, server, answers):
        self.server, self.answers = server, answers
        self.actions = [(25, self.stream), (10, self.plain), (15, self.drop), (6, self.slow), (8, self.bad_input),
                        (3, self.half_request), (2, self.stuck_scraper)]

    def plain(self, rng, index):
        status, body = self.server.ask("POST", "/v1/completions", json.dumps(request_fields(rng, index)))
        if status == 503:
            return "refused"
        if status != 200:
            return self.answers.report("status", status, body[:200]) or "plain"
        self.answers.compare(index, json.loads(body)["choices"][0]["text"])
        return "plain"

    def events(self, rng, index, pause=0.0):
        """Yields (text so far, finished) for each event of a stream; None first when it was refused."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=300)
        if pause:
            connection.connect()
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            connection.request("POST", "/v1/completions", json.dumps(request_fields(rng, index) | {"stream": True}))
            reply = connection.getresponse()
            if reply.status == 503:
                yield None, True
                return
            text, done = "", False
            yield text, done
            for line in reply:
                time.sleep(pause)
                if line.startswith(b"data: [DONE]"):
                    done = True
                elif line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ConnectionError(f"error event: {event}")
                    text += "".join(choice["text"] for choice in event["choices"])
                yield text, done
            if not done:  # http.client takes a broken chunked body for its end
                raise ConnectionError(f"the stream of request {index} ended without [DONE]")
        finally:
            if rng.random() < 0.5 and connection.sock:   # a reset instead of a clean close
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()

    def stream(self, rng, index, pause=0.0):
        text = ""
        for text, _ in self.events(rng, index, pause):
            pass
        if text is None:
            return "refused"
        self.answers.compare(index, text)
        return "streamed"

    def slow(self, rng, index):
        return "slow reader" if self.stream(rng, index, pause=0.05) == "streamed" else "refused"

    def drop(self, rng, index):
        phase = rng.choice(["before the answer", "at its head", "in its middle", "after its last token"])
        if phase == "before the answer":    # queued, or its prompt being read
            with socket.create_connection(("127.0.0.1", self.server.port)) as raw:
                body = json.dumps(request_fields(rng, index) | {"stream": rng.random() < 0.5}).encode()
                raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                time.sleep(rng.choice([0, 0.002, 0.02, 0.1]))
            return f"dropped {phase}"
        for count, (text, done) in enumerate(self.events(rng, index)):
            if text is None:
                return "refused"
            self.answers.compare(index, text, whole=False)
            if phase == "at its head" or (phase == "in its middle" and count > rng.randrange(1, 12)) or done:
                break
        return f"dropped {phase}"

    def half_request(self, rng, _):
        with socket.create_connection(("127.0.0.1", self.server.port)) as raw:
            request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{\"prompt\": \"x"
            raw.sendall(request[:rng.randrange(1, len(request))])
            time.sleep(rng.choice([0, 0.2]))
        return "half a request"

    def stuck_scraper(self, *_):
        with socket.create_connection(("127.0.0.1", self.server.port)) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            raw.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(2)
        return "scraper that does not read"

    def bad_input(self, rng, _):
        status, body = self.server.ask("POST", "/v1/completions", rng.choice(BAD_BODIES))
        if not 400 <= status < 500 and status != 503:
            self.answers.report("bad input", status, body[:200])
        return "bad input"
