"""Text to packed token files, and random windows of them."""
import json
import os
import random

import numpy as np
import torch

from . import tokenizer as tok


def read_documents(path, limit_bytes=None, seed=0):
    """Chapters of a text file in random order, up to a byte limit, so that a sample crosses all the books."""
    with open(path, encoding="utf-8", errors="ignore") as f:
        documents = [d.strip("\n") for d in f.read().split("<|endoftext|>")]
    documents = [d for d in documents if d]
    if limit_bytes is None:
        return documents
    random.Random(seed).shuffle(documents)
    kept, size = [], 0
    for document in documents:
        kept.append(document)
        size += len(document)
        if size >= limit_bytes:
            break
    return kept


def read_messages(path):
    """Conversations of a JSONL file of {messages} or {question, answer}."""
    with open(path, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return [row.get("messages") or [{"role": "user", "content": row["question"]},
                                    {"role": "assistant", "content": row["answer"]}] for row in rows]


def read_chats(path, limit_bytes, seed=0):
    rows = read_messages(path)
    random.Random(seed).shuffle(rows)
    kept, size = [], 0
    for messages in rows:
        kept.append(tok.render_chat(messages))
        size += len(kept[-1])
        if size >= limit_bytes:
            break
    return kept


def pack(tokenizer, documents, path, chunk=256):
    """Writes documents, each opened by <|endoftext|>, as one uint16 stream; returns tokens and bytes of text."""
    tokens = size = 0
    opener = tok.SPECIALS[0]
    with open(path + ".part", "wb") as f:
        for start in range(0, len(documents), chunk):
            part = documents[start:start + chunk]
            texts = [d if d.startswith(opener) else opener + d for d in part]
            for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
                np.asarray(encoding.ids, dtype=np.uint16).tofile(f)
                tokens += len(encoding.ids)
            size += sum(len(d.encode()) for d in part)
    os.replace(path + ".part", path)
    with open(path + ".json", "w") as f:
        json.dump({"tokens": tokens, "bytes": size}, f)
    return tokens, size


def load(path, device="cpu"):
    """The token stream: mapped from disk, or held on the device, where cutting batches costs no transfer."""
    stream = np.memmap(path, dtype=np.uint16, mode="r")
    return stream if device == "cpu" else torch.from_numpy(stream.astype(np.int32)).to(device)


def random_batch(stream, batch, length, generator, device="cpu"):
    """Inputs and next tokens of `batch` random windows."""
    starts = torch.randint(0, len(stream) - length - 1, (batch,), generator=generator)
    if isinstance(stream, torch.Tensor):
        rows = stream[starts.to(device)[:, None] + torch.arange(length + 1, device=device)].long()
    else:
        rows = np.stack([stream[s:s + length + 1].astype(np.int64) for s in starts.tolist()])
        rows = torch.from_numpy(rows).to(device)
    return rows[:, :-1], rows[:, 1:]
