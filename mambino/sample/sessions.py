"""A text that is continued today and tomorrow: its tokens, the model's state after them, and the
generator of chance.

    session = Session(seed=1337)
    for i, logits in session.go_on(net, tok, ids):      # reads ids, then draws without end
        ...; break                                      # at any token: what was drawn is in the text
    session.save('out/sessions/tale.pt', fingerprint)
    session = load_session('out/sessions/tale.pt', fingerprint, device)

Nothing is ever read twice. The last token that was drawn is not in the state yet: it is read when the
text goes on, just as it would have been without a pause. So the tokens after a pause are those that
would have come without one, drawn by the generator where it stood.
"""
import os
import re
from array import array

import torch

from mambino import files
from mambino.configurator import fail
from mambino.sample.generation import Rows, prefill
from mambino.sample.healing import look_ahead
from mambino.weights.checkpoint import save_checkpoint

CONTENTS = {'fingerprint', 'tokens', 'unread', 'state', 'generator'}    # of the file


class Session:
    """See the top of the file."""

    def __init__(self, seed):
        self.tokens = array('i')            # all of the text
        self.unread = []                    # those of them that are not in the state
        self.state = None                   # the model's; None before the first token
        self.logits = None                  # (1, V) of what comes behind the state
        self.generator = torch.Generator().manual_seed(seed)

    def reopen(self, tok, end_ids=()):
        """Takes back what was drawn last if it ended an answer: end-of-text or one of end_ids."""
        if self.unread and self.unread[0] in (tok.eot, *end_ids):
            self.tokens.pop()
            self.unread = []

    def needs_ids(self):
        """Whether nothing can be drawn before an id is read."""
        return self.logits is None and not self.unread

    def go_on(self, net, tok, ids, repetition_penalty=1.0, end_ids=(), owed=b'', **sampling):
        """Reads ids, then yields one token after another, (id, logits (1, V) it was drawn from).
        sampling: see generation.sample_token.

        If what was drawn last, end-of-text or one of end_ids, ended an answer, and the text goes on
        with ids, it is taken back. owed: bytes of the text behind ids that the first tokens spell, see
        healing.py; only with them is the text what it should be."""
        if ids or owed:
            self.reopen(tok, end_ids)
        elif not self.unread:
            ids = tok.context()                             # nothing at all: a new document
        self.tokens.extend(ids)
        unread = [*self.unread, *ids]
        if unread:
            self.logits, self.state, _ = prefill(net, unread, self.state)
        self.unread = []
        read = self.logits, self.state, self.tokens
        rows = Rows(net, tok.vocab_size, repetition_penalty)
        rows.add([read], [look_ahead(net, tok, read, owed)])
        while True:
            self.state = rows.state
            self.logits = rows.logits
            next_ids = rows.draw(generator=[self.generator], **sampling)    # (1,)
            self.unread = next_ids.tolist()
            self.tokens.extend(self.unread)
            yield self.unread[0], rows.logits
            rows.advance(next_ids)

    def begin_anew(self):
        """Forgets the text, and goes on from nothing."""
        self.tokens = array('i')
        self.unread = []
        self.state = None

    def save(self, path, fingerprint):
        """Writes the file whole or not at all, which ends the program in a line."""
        contents = dict(
            fingerprint=fingerprint,
            tokens=torch.tensor(self.tokens, dtype=torch.int32),
            unread=self.unread,
            state={name: value.cpu() for name, value in self.state.items()},
            generator=self.generator.get_state(),
        )
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            save_checkpoint(path, contents)
        except (OSError, RuntimeError) as error:
            fail(f'{path}: cannot be written: {error}')


def path_of(out_dir, name, setting='session'):
    """The file of a session. A name that could mean another folder ends the program in a line."""
    if not re.fullmatch(r'\w[\w. -]{0,99}', name):
        fail(f'{setting}={name}: a name of letters, digits, ".", "-", "_" and spaces, at most 100, that '
             'begins with a letter or digit')
    folder = out_dir if os.path.isdir(out_dir) else os.path.dirname(out_dir)
    return os.path.join(folder, 'sessions', name + '.pt')


def open_session(out_dir, name, fork, seed, fingerprint, device):
    """→ (the session of this name, or a new one; its path; whether there was text before).

    fork: a session that it begins as a copy of, ''. A new one draws from a generator of this
    seed."""
    path = path_of(out_dir, name)
    if fork:
        if os.path.exists(path):
            fail(f'session={name}: is there already, and would be lost; delete {path}, or name another '
                 '--session')
        session = load_session(path_of(out_dir, fork, 'fork'), fingerprint, device)
        session.save(path, fingerprint)
    elif os.path.exists(path):
        session = load_session(path, fingerprint, device)
    else:
        session = Session(seed)
    make_room(path)
    return session, path, session.state is not None


def make_room(path):
    """The folder of a session that is to be written. If it cannot be, that is said here, and not
    when the text is there."""
    try:
        files.try_to_write(os.path.dirname(path))
        files.remove_leftovers(os.path.dirname(path), older=3600)   # no write takes that long
    except OSError as error:
        fail(f'{path}: cannot be written: {error}')


def load_session(path, fingerprint, device):
    """The session in a file, which must be of the model with this fingerprint."""
    try:
        contents = torch.load(path, map_location='cpu', weights_only=True)
        if damage := files.damage_of(path):
            raise ValueError(damage)
        if not isinstance(contents, dict) or not CONTENTS <= contents.keys():
            raise ValueError
        session = Session(seed=0)
        session.generator.set_state(contents['generator'])
        session.tokens = array('i', contents['tokens'].tolist())
        session.unread = list(contents['unread'])
        session.state = {name: value if name == 'pos' else value.to(device)
                         for name, value in contents['state'].items()}
    except FileNotFoundError:
        names = names_in(os.path.dirname(path))
        there = 'are ' + ', '.join(names) if names else 'is none yet'
        fail(f'{path}: no such session; there {there}')
    except (PermissionError, IsADirectoryError) as error:
        fail(f'{path}: cannot be read: {error}')
    except Exception as error:  # zip, pickle and torch errors: all mean that this is no session
        fail(f'{path}: not a readable session (cut short, damaged, or not made by sample.py): '
             f'{type(error).__name__}; delete it, or name another --session')
    if contents['fingerprint'] != fingerprint:
        fail(f'{path}: a session of another model, or of other adapters; its state means nothing to this '
             'one. Name another --session')
    return session


def names_in(folder):
    """The names of the sessions in a folder, which may not be there."""
    if not os.path.isdir(folder):
        return []
    return sorted(name.removesuffix('.pt') for name in os.listdir(folder) if name.endswith('.pt'))
