"""What a server writes after prompts: the text that drafts will be asked to guess, so the text to train them on."""
import itertools
import json
import random
import threading
import time
import urllib.request

from . import data

PROMPT_CHARACTERS = 300
NEW_TOKENS = 256


def complete(server, prompt, temperature, seed):
    body = {"model": "", "prompt": prompt, "temperature": temperature, "max_tokens": NEW_TOKENS, "seed": seed}
    request = urllib.request.Request(server.rstrip("/") + "/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["choices"][0]["text"]


def prompts_of(path, rng):
    """Beginnings of paragraphs, drawn from all over the file."""
    documents = data.read_documents(path)
    while True:
        document = rng.choice(documents)
        start = document.find("\n", rng.randrange(len(document))) + 1
        prompt = document[start:start + PROMPT_CHARACTERS]
        if len(prompt) == PROMPT_CHARACTERS:
            yield prompt.rsplit(" ", 1)[0]


def collect(server, prompts, out, seconds, temperatures, parallel):
    """Writes prompt + completion, documents separated by <|endoftext|>; returns their number. Any failed request ends it."""
    end = time.time() + seconds
    jobs = zip(prompts_of(prompts, random.Random(0)), itertools.cycle(temperatures), itertools.count())
    lock, errors, count = threading.Lock(), [], 0
    with open(out, "w", encoding="utf-8") as f:
        def work():
            nonlocal count
            try:
                while time.time() < end and not errors:
                    with lock:
                        prompt, temperature, seed = next(jobs)
                    text = prompt + complete(server, prompt, temperature, seed)
                    with lock:
                        f.write(text + "\n<|endoftext|>\n")
                        count += 1
            except Exception as error:  # handed to the caller below
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(parallel)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return count
