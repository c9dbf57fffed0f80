"""What a server writes after prompts: the text that drafts will be asked to guess, so the text to train them on."""
import itertools
import json
import threading
import time
import urllib.request

NEW_TOKENS = 256


def complete(server, prompt, temperature, seed):
    """The reply with its markers, past the end of a turn or text: what comes next is drafted like the rest."""
    body = {"model": "", "prompt": prompt, "temperature": temperature, "max_tokens": NEW_TOKENS, "seed": seed,
            "ignore_eos": True, "skip_special_tokens": False}
    request = urllib.request.Request(server.rstrip("/") + "/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["choices"][0]["text"]


def collect(server, prompts, out, seconds, temperatures, parallel, seed=0):
    """Writes prompt + completion, documents separated by <|endoftext|>; returns their number.

    `prompts` yields them without end; requests are seeded from `seed` on. Any failed request ends it.
    """
    end = time.time() + seconds
    jobs = zip(prompts, itertools.cycle(temperatures), itertools.count(seed))
    lock, errors, count = threading.Lock(), [], 0
    with open(out, "w", encoding="utf-8") as f:
        def work():
            nonlocal count
            try:
                while time.time() < end and not errors:
                    with lock:
                        prompt, temperature, number = next(jobs)
                    text = prompt + complete(server, prompt, temperature, number)
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
