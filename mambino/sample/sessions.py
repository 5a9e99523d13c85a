"""A text that is continued today and tomorrow: its tokens, the model's state after them, and the generator of chance.

    session = Session(seed=1337)
    for i, logits in session.go_on(net, tok, ids):      # reads the list ids, then draws without end; nothing is ever read twice
        ...; break                                      # at any token: what was drawn is part of the text
    session.save('out/sessions/tale.pt', fingerprint)
    session = load_session('out/sessions/tale.pt', fingerprint, device)

The last token that was drawn is not in the state yet: it is read when the text goes on, just as it would have been without a pause. So the
tokens after a pause are those that would have come without one, drawn by the generator where it stood.
"""
import os
import re
from array import array

import torch

from mambino.weights import checkpoint
from mambino.configurator import fail
from mambino.sample.generation import Rows, prefill

PARTS = {'fingerprint', 'tokens', 'unread', 'state', 'generator'}


class Session:
    """See the top of the file. state: the model's, None before the first token; tokens: all; unread: those of them not in the state."""

    def __init__(self, seed):
        self.tokens, self.unread, self.state = array('i'), [], None
        self.generator = torch.Generator().manual_seed(seed)

    def go_on(self, net, tok, ids, repetition_penalty=1.0, ends=(), **how):
        """Reads ids, then yields one token after another, (id, logits (1, V) it was drawn from). how: see generation.pick.

        If what was drawn last, end-of-text or one of `ends`, ended an answer, and the text goes on with ids, it is taken back."""
        if ids and self.unread and self.unread[0] in (tok.eot, *ends):
            self.tokens.pop()
            self.unread = []
        ids = ids or ([] if self.unread else [tok.eot])                         # nothing at all: a new document
        self.tokens.extend(ids)
        logits, self.state, _ = prefill(net, [*self.unread, *ids], self.state)
        self.unread, rows = [], Rows(net, tok.vocab_size, repetition_penalty)
        rows.add([(logits, self.state, self.tokens)])
        while True:
            self.state = rows.state
            drawn = rows.draw(generator=[self.generator], **how)
            self.unread = drawn.tolist()
            self.tokens.extend(self.unread)
            yield self.unread[0], rows.logits
            rows.advance(drawn)

    def save(self, path, fingerprint):
        """Writes the file whole or not at all, which ends the program in a line."""
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            checkpoint.save_checkpoint(path, dict(fingerprint=fingerprint, tokens=torch.tensor(self.tokens, dtype=torch.int32), unread=self.unread,
                                       state={name: value.cpu() for name, value in self.state.items()}, generator=self.generator.get_state()))
        except (OSError, RuntimeError) as error:
            fail(f'{path}: cannot be written: {error}')


def path_of(out_dir, name, setting='session'):
    """The file of a session. A name that could mean another folder ends the program in a line."""
    if not re.fullmatch(r'\w[\w. -]{0,99}', name):
        fail(f'{setting}={name}: a name of letters, digits, ".", "-", "_" and spaces, at most 100, that begins with a letter or digit')
    return os.path.join(out_dir if os.path.isdir(out_dir) else os.path.dirname(out_dir), 'sessions', name + '.pt')


def make_room(path):
    """The folder of a session that is to be written. If it cannot be, that is said here, and not when the text is there."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path + '.try', 'wb').close()
        os.remove(path + '.try')
    except OSError as error:
        fail(f'{path}: cannot be written: {error}')


def load_session(path, fingerprint, device):
    """The session in a file, which must be of the model with this fingerprint."""
    try:
        found = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(found, dict) or not PARTS <= found.keys():
            raise ValueError
        session = Session(0)
        session.generator.set_state(found['generator'])
        session.tokens, session.unread = array('i', found['tokens'].tolist()), list(found['unread'])
        session.state = {name: value if name == 'pos' else value.to(device) for name, value in found['state'].items()}
    except FileNotFoundError:
        others = sorted(name[:-3] for name in os.listdir(os.path.dirname(path)) if name.endswith('.pt')) \
            if os.path.isdir(os.path.dirname(path)) else []
        fail(f'{path}: no such session; there {"are " + ", ".join(others) if others else "is none yet"}')
    except (PermissionError, IsADirectoryError) as error:
        fail(f'{path}: cannot be read: {error}')
    except Exception as error:  # zip, pickle and torch errors: all mean that this is no session
        fail(f'{path}: not a readable session (cut short, damaged, or not made by sample.py): {type(error).__name__}; delete it, or name '
             'another --session')
    if found['fingerprint'] != fingerprint:
        fail(f'{path}: a session of another model, or of other adapters; its state means nothing to this one. Name another --session')
    return session
