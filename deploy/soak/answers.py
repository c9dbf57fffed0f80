"""What is asked, what must come back, and what did not."""
import json
import sys
import threading

PROMPT_WORDS = "the sea was grey and the old man said that he would not go down to the harbour again that night ".split()
LONG = " ".join(PROMPT_WORDS * 100)     # about 2,000 tokens: long enough to be dropped while it is read
REQUESTS = [{"prompt": prompt, "max_tokens": tokens, "seed": i, "temperature": temperature, **more}
            for i, (prompt, tokens, temperature, more) in enumerate([
                ("Once upon a time", 8, 0, {}), ("The sea was", 24, 0.8, {"top_p": 0.9}), ("one two three " * 40, 48, 0, {}),
                ("She said that", 40, 1.0, {"top_k": 40, "frequency_penalty": 0.5}), (LONG, 12, 0.6, {}),
                ("In the beginning there was the word and the word was", 64, 0.5, {"min_p": 0.05}), ("A", 30, 0.7, {}),
                ("x " * 200, 20, 0.9, {"stop": ["the", "."]}), ("It was late", 100, 0, {"repetition_penalty": 1.1})])]
SPECULATION = ["off", "auto", "ngram", None]    # changes speed only: the expected answer is the same for all
BAD_BODIES = [b"", b"{", b"[]", b'{"prompt":"x","temperature":-1}', b'{"prompt":"x","max_tokens":0}', b'{"prompt":[-1]}',
              b'{"prompt":"x","n":1000000}', b'{"prompt":"' + b"\xff\xfe" + b'"}', b"[" * 100000,
              b'{"prompt":"x","top_p":1e400}', b'{"prompt":"","max_tokens":1}', b'{"prompt":"x","logit_bias":{"-1":1}}']


class Answers:
    """The solo run of every request, and each answer that differed from it or went wrong otherwise. Any thread."""

    def __init__(self, server):
        self.expected = [self._solo(server, request) for request in REQUESTS]
        self.wrong, self.lock = [], threading.Lock()

    @staticmethod
    def _solo(server, request):
        status, body = server.ask("POST", "/v1/completions", json.dumps(request | {"speculation": "off"}))
        if status != 200:
            sys.exit(f"soak: the solo run failed with {status}: {body[:300]!r}")
        return json.loads(body)["choices"][0]["text"]

    def report(self, what, *details):
        with self.lock:
            self.wrong.append((what, *details))

    def compare(self, index, text, whole=True):
        want = self.expected[index]
        if text != want if whole else not want.startswith(text):
            self.report("wrong answer", index, text, want)


def request_fields(rng, index):
    """One of REQUESTS, with a speculation mode drawn."""
    mode = rng.choice(SPECULATION)
    return REQUESTS[index] | ({"speculation": mode} if mode else {})
