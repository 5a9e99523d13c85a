"""From documents to token ids: the task that many processes share, a block of documents each.

    result = tokens.encode(task)                                # {TRAIN: ..., VAL: ..., 'kinds', ...}
    ids, _ = tokens.talk_ids(tok, messages, closing)   # a conversation as a document

A function of its arguments and of what is on disk. Of a conversation the answers are learned; all
else in it is stored as -1 - id.
"""
import json

import numpy as np

from mambino import tokenizer_json
from mambino.chat import encode_chat, visible
from mambino.prepare import conversations
from mambino.prepare.spool import KINDS, TRAIN, VAL, pieces_of, read_block
from mambino.tokenizer import CHAT, from_state


class Side:
    """What one of train and val gets from a block."""

    def __init__(self):
        self.arrays = [np.zeros(0, np.int32)]  # of ids
        self.tokens = 0
        self.learned = 0   # of them
        self.bytes = 0
        self.talks = 0     # conversations,
        self.mended = 0    # and those without a system of their own
        self.offsets = []  # where documents end among the ids
        self.rows = []     # the rows with which they end

    def add(self, ids, learned, size, i, last):
        """ids int32 of the row i, with which a document ends if last; learned: how many of them
        are; size: bytes of what it says."""
        self.arrays.append(ids)
        self.tokens += len(ids)
        self.learned += learned
        self.bytes += size
        if last:
            self.offsets.append(self.tokens)
            self.rows.append(i)

    def result(self, rows):
        """(ids int32, offsets uint64: where documents end among them, their hashes (n, 2))"""
        hashes = np.stack([rows['hi'][self.rows], rows['lo'][self.rows]], 1)
        return np.concatenate(self.arrays).astype('<i4'), np.array(self.offsets, '<u8'), hashes


_tokenizers = {}  # what a task says of it → Tokenizer


def encode(task):
    """The ids of a block. task: folder, key, block; rows: those that are used, and `use`, TRAIN or
    VAL for each; tokenizer: (path, sha256, what else from_state takes, as JSON); opening, closing:
    lists of ids before and after each document; cut: None or (number of a row, characters, or
    messages, in it): where val begins. Returns {TRAIN: Side.result(), VAL: Side.result(), 'kinds':
    tokens by kind, and by side 'bytes', 'learned' tokens, 'talks' and of these 'mended'; 'refused':
    [(kind, characters, why)] of conversations that have no ids}.
    """
    tok = tokenizer_of(task['tokenizer'])
    opening = np.array(task['opening'], np.int32)
    closing = np.array(task['closing'], np.int32)
    rows = task['rows']
    row_kinds = rows['kind'].tolist()
    cut_row, cut = task['cut'] or (-1, 0)
    sides = {TRAIN: Side(), VAL: Side()}
    kinds = np.zeros(len(KINDS), np.int64)
    refused = []

    def add(side, i, text, first, last):
        ids = tok.encode(text, begins=first)
        if first and len(opening):
            ids = np.concatenate([opening, ids])
        if last:
            ids = np.concatenate([ids, closing])
        side.add(ids, len(ids), len(text.encode('utf-8')), i, last)
        kinds[row_kinds[i]] += len(ids)

    def add_talk(side, i, messages):
        try:
            ids, is_mended = talk_ids(tok, messages, closing)
        except ValueError as error:
            refused.append((row_kinds[i], sum(map(len, conversations.said(messages))), str(error)))
            return
        side.mended += is_mended
        size = sum(len(text.encode('utf-8')) for text in conversations.said(messages))
        side.add(ids, int((ids >= 0).sum()), size, i, True)
        side.talks += 1
        kinds[row_kinds[i]] += len(ids)

    data = read_block(task['folder'], task['key'], task['block'])
    columns = [rows[name].astype(bool).tolist() for name in ('last', 'talk')]
    pieces = zip(pieces_of(data, rows), task['use'].tolist(), (rows['part'] == 0).tolist(), *columns)
    for i, (text, use, first, last, talk) in enumerate(pieces):
        if talk:
            messages = conversations.unpack(text)
            parts = {TRAIN: messages[:cut], VAL: messages[cut:]} if i == cut_row else {use: messages}
            for name, part in parts.items():
                add_talk(sides[name], i, part)
        elif i == cut_row:
            add(sides[TRAIN], i, text[:cut], first, True)
            add(sides[VAL], i, text[cut:], True, last)    # a half begins as a text of its own does
        else:
            add(sides[use], i, text, first, last)
    results = {name: side.result(rows) for name, side in sides.items()}
    counts = {count: {name: getattr(side, count) for name, side in sides.items()}
              for count in ('bytes', 'learned', 'talks', 'mended')}
    return results | counts | {'kinds': kinds, 'refused': refused}


def tokenizer_of(known_by):
    """The tokenizer of a task, which is opened once."""
    if known_by not in _tokenizers:
        path, _, settings = known_by
        text, _ = tokenizer_json.read(path)
        _tokenizers[known_by] = from_state({'json': text, **json.loads(settings)})
    return _tokenizers[known_by]


def talk_ids(tok, messages, closing):
    """((N,) int32 ids of a conversation as a document of its own, whether what the system says had
    to be put before the first question): what its template writes, closed as every document is.
    ValueError says why there are none."""
    mended = None
    try:
        ids = encode_chat(tok, messages)
    except ValueError:
        mended = conversations.without_system(messages)
        if not mended:
            raise
        ids = encode_chat(tok, mended)
    if any('weight' in message for message in messages):
        ids = without_answers(ids, mended or messages)
    seen = visible(ids)
    if len(closing) and not np.array_equal(seen[-len(closing):], closing):
        ids = np.concatenate([ids, -1 - closing])  # an answer ends with its own mark
    return ids.astype(np.int32), mended is not None


def without_answers(ids, messages):
    """The ids of a conversation, (N,), without learning those of its answers that have a weight of 0."""
    weights = [message.get('weight', 1) for message in messages if message['role'] == 'assistant']
    learned = ids >= 0
    begins = learned & ~np.append(False, learned[:-1])
    if begins.sum() != len(weights):
        raise ValueError('answers that are not to be learned cannot be told apart in its template')
    answer = np.cumsum(begins) - 1  # the number of the last one that has begun
    is_read = learned & (np.array(weights)[np.maximum(answer, 0)] == 0)
    return np.where(is_read, -1 - ids, ids)


# -----------------------------------------------------------------------------
# The way back

def readable(tok, ids, begins):
    """The text of ids, (N,) int32, as a person can read it: with the names of the marks in it.
    begins: whether they begin a text."""
    pieces = []
    held = []
    table = tok.table or ()

    def decoded():
        text = tok.decode(held, begins and not pieces)
        held.clear()
        return text

    for i in visible(np.asarray(ids)).tolist():
        if i < len(table) and table[i] == b'' and i not in (tok.eot, *tok.bos):
            pieces += [decoded(), tok.name_of(i)]
        else:
            held.append(i)
    return ''.join([*pieces, decoded()])


def messages_of(tok, ids):
    """The conversation that ChatML has made these ids of, (N,) int32."""
    begin, end = (tok.hf.token_to_id(mark) for mark in CHAT)
    ids = visible(np.asarray(ids))
    messages = []
    for start in np.flatnonzero(ids == begin).tolist():
        length = int(np.argmax(ids[start:] == end))
        role, _, content = tok.decode(ids[start + 1:start + length], begins=False).partition('\n')
        messages.append({'role': role, 'content': content})
    return messages
