"""Text on its way to the model and back: prompts, ChatML, whole characters, where a text stops.

    ids = encode_prompt(tok, 'Once upon a time')
    writer = Writer(tok, stops=['THE END'])
    for i in drawn_ids:
        print(writer.feed(i), end='')       # whole characters only, and nothing of a stop string
    print(writer.close())
"""
import os
import re
import stat
import sys
from contextlib import nullcontext

from mambino import chat
from mambino.configurator import fail, shown, split_list
from mambino.prepare.files import Notes, Skip, open_bytes
from mambino.prepare.texts.encodings import clean, decoded
from mambino.sample.healing import take_back
from mambino.tokenizer import CHAT

MOST_BYTES = 2**28      # of a text that is read whole
CONTEXT = 16            # tokens before a text that its first characters may hang on
MARK = r'<\|[^\s<>|]+\|>'               # a special token, as <|im_end|>: its bars separate nothing
# in the place of messages that a session of another day does not tell
EARLIER = [{'role': 'user', 'content': 'Hello'}, {'role': chat.ANSWERS, 'content': 'Hello'}]
ESCAPES = {r'\n': '\n', r'\t': '\t', r'\\': '\\'}     # in the setting `stop`


# --- prompts --------------------------------------------------------------------------------------

def read_text(path, setting):
    """The text of a file, or of standard input for '-', opened as prepare.py opens it; what was
    guessed or is damaged is said on stderr. What is no text, or has no end, ends the program in a
    line that begins with `setting`."""
    notes = Notes()
    try:
        if path != '-' and not is_readable(os.stat(path).st_mode):
            fail(f'{setting}: is a device, and no file of text; what another program writes is read by -, as in '
                 'cat book.txt | python sample.py --score=-')
        with nullcontext(sys.stdin.buffer) if path == '-' else open_bytes(path) as f:
            data = f.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            fail(f'{setting}: has more than {MOST_BYTES >> 20} MiB: give a part of it')
        text = clean(decoded(data, notes))
    except (OSError, Skip) as error:
        fail(f'{setting}: cannot be read as text: {error}')
    for note in notes:
        print(shown(f'{setting}: {note}'), file=sys.stderr)
    return text


def is_readable(mode):
    """Whether what has this st_mode is a file, a pipe or a folder, which open() refuses itself."""
    return stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISDIR(mode)


def prompts_of(start):
    """The prompts that the setting `start` asks for: itself, a file as one (FILE:), or each of its
    lines (LINES:)."""
    if start.startswith('FILE:'):
        return [read_text(start.removeprefix('FILE:'), f'start={start}')]
    if start.startswith('LINES:'):
        lines = read_text(start.removeprefix('LINES:'), f'start={start}').split('\n')
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            fail(f'start={start}: holds no prompt; LINES: takes each line that is not empty, FILE: the '
                 'whole file as one')
        return prompts
    return [start]


def encode_prompt(tok, text, setting='start', begins=True):
    """Ids of a prompt, see prompt_ids. An empty or unusable text ends the program in a line that
    names the setting it came from."""
    if not text:
        fail(f'{setting} is empty: give a prompt, as in --{setting}="Once upon a time"; a newline alone '
             'will do')
    try:
        return prompt_ids(tok, text, begins)
    except ValueError as error:
        fail(f'{setting}: {error}, in {without_mark(text)[:60]!r}; choose another --{setting}')


def prompt_ids(tok, text, begins=True):
    """Ids of a prompt; ValueError if the tokenizer has none for it. begins: whether it begins a
    text, else it goes on with one; <|endoftext|> at its beginning always begins a new one. A text
    that begins has at least one id."""
    ids = tok.bos if begins else []
    if text.startswith('<|endoftext|>'):
        ids = tok.context() if begins else [tok.eot, *tok.opening()]
        text = without_mark(text)
        begins = True
    ids = ids + tok.encode(text, begins).tolist()
    if begins and not ids:      # nothing, or nothing but white space, which this tokenizer leaves out
        return tok.context()
    return ids


def healed(tok, ids, text, begins=True, keep_one=False):
    """→ (the ids of a text's ids that a model reads, the bytes that it is to spell itself), see
    healing.py. begins: as of encode_prompt; keep_one: as of take_back."""
    read, owed = take_back(tok, ids, without_mark(text), keep_one)
    if begins and not read:
        read = tok.context()
    return read, owed


def without_mark(prompt):
    """A prompt as it is shown: without an <|endoftext|> at its beginning."""
    return prompt.removeprefix('<|endoftext|>')


def stops_of(setting):
    r"""The texts of the setting `stop`: 'a|b' → ['a', 'b'], r'\n' → a newline, r'\|' → a bar, r'\\'
    → a backslash, '<|end|>' → itself. Bars alone end the program in a line."""
    stops = [re.sub(r'\\.', lambda match: ESCAPES.get(match[0], match[0]), part, flags=re.DOTALL)
             for part in split_list(setting, '|', MARK)]
    stops = [stop for stop in stops if stop]
    if setting and not stops:
        fail(rf'stop={setting}: holds no text to stop at; a bar itself is written \|')
    return stops


# --- conversations --------------------------------------------------------------------------------

def chat_marks(tok):
    """The ids of ChatML's marks, [begin, end]. A tokenizer without them ends the program in a
    line."""
    marks = [tok.hf.token_to_id(mark) if tok.kind == 'bpe' else None for mark in CHAT]
    if None in marks:
        fail(f'chat=True: this model\'s tokenizer has no {" and ".join(CHAT)}; leave it out, and mark the '
             'turns with text and --stop')
    return marks


def chat_turn(tok, messages, first):
    """The ids of messages, of which the last waits for an answer, and of the beginning of that; by
    the chat template of the tokenizer. first: else only of what comes behind the last answer in
    them, or behind one that is not among them; None where the template writes anew what stands
    before. ValueError: it refuses them. messages: as chat.py has them, or [(role, text), …]."""
    messages = [message if isinstance(message, dict) else dict(role=message[0], content=message[1])
                for message in messages]
    if first:
        return chat.encode_prompt_of(tok, messages)
    if not any(message['role'] == chat.ANSWERS for message in messages):
        messages = [*EARLIER, *messages]
    return chat.encode_turn(tok, messages)


# --- from ids to text -----------------------------------------------------------------------------

def token_text(tok, i):
    """A token as a table shows it: in quotes; bytes that are no characters as bytes; of one that
    stands for nothing its name."""
    if i == tok.eot:
        return '<|endoftext|>'
    raw = tok.token_bytes(i)
    if raw is None:                     # only the library can tell
        return repr(tok.decode([i], begins=False))
    if not raw:
        return tok.name_of(i)
    try:
        return repr(raw.decode('utf-8'))
    except UnicodeDecodeError:
        return repr(raw)


class Writer:
    """Turns one sample's ids into text, whole characters only, and ends it at end-of-text or before
    a stop string.

    before: ids of what the text continues. owed: bytes behind them that stand in the prompt, but
    are still to be spelled by ids (healing.py): the text begins behind them. end_ids: ids that end
    it, besides end-of-text. keep: whether `text` is wanted at the end."""

    def __init__(self, tok, stops=(), before=(), end_ids=(), keep=True, owed=b''):
        self.stops = stops
        self.end_ids = {tok.eot, *end_ids}
        self.keep = keep
        self.decoder = tok.stream()
        self.pieces = []            # what was shown
        self.pending = ''           # the beginning of what may become a stop string
        self.done = False
        self.length = 0             # ids of the text
        self.owed = owed
        for i in before[-CONTEXT:]:
            self.decoder.feed(i)
        if owed:
            self.decoder.feed_bytes(owed)
            self.decoder.space = ''

    @property
    def text(self):
        return ''.join(self.pieces)

    def feed(self, i):
        """Takes the next id; returns the text that can be shown now."""
        if self.done:
            return ''
        if self.owed:
            return self.feed_owed(i)
        self.length += 1
        if i in self.end_ids:
            return self.close()
        return self.show(self.decoder.feed(i), final=False)

    def feed_owed(self, i):
        """Takes an id that spells what is owed; returns what it goes on with."""
        raw = self.decoder.table[i]
        new = raw[len(self.owed):]
        self.owed = self.owed[len(raw):]
        if not new:
            return ''
        self.length += 1
        return self.show(self.decoder.feed_bytes(new), final=False)

    def close(self):
        """Returns what was held back: an incomplete character, the beginning of a stop string."""
        if self.done:
            return ''
        self.done = True
        return self.show(self.decoder.flush(), final=True)

    def show(self, new, final):
        """What is pending and new, up to a stop string or what may become one, which is held back
        unless `final`."""
        text = self.pending + new
        stop_positions = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        end = len(text)
        if stop_positions:
            end = min(stop_positions)
            self.done = True
        elif not final:
            last = text[-1:]            # looked at first: a stop has many beginnings
            begun = [n for stop in self.stops for n in range(1, len(stop))
                     if stop[n - 1] == last and text.endswith(stop[:n])]
            end -= max(begun, default=0)
        shown = text[:end]
        self.pending = text[end:]
        if self.keep:
            self.pieces.append(shown)
        return shown
