"""A text that is continued today and tomorrow: its tokens, the model's state after them, and the
generator of chance.

    session = Session(seed=1337)
    for i, logits in session.go_on(net, tok, ids):      # reads ids, then draws without end
        ...; break                                      # at any token: what was drawn is in the text
    session.save('out/sessions/tale.pt', fingerprint)
    session = load_session('out/sessions/tale.pt', fingerprint, device, tok.vocab_size)
    check_state(net, session, 'out/sessions/tale.pt')   # before anything is computed with it

Nothing is ever read twice. The last token that was drawn is not in the state yet: it is read when the
text goes on, just as it would have been without a pause. So the tokens after a pause are those that
would have come without one, drawn by the generator where it stood.

A file is written whole or not at all, and over no other than the one that was opened: what another
process saved meanwhile stays, and this text is kept beside it.
"""
import hashlib
import json
import os
import re
import shlex
import sys
from array import array

import torch

from mambino import files
from mambino.cache import kept_as
from mambino.configurator import fail
from mambino.kernels.cpu import exact_dtype
from mambino.sample.generation import Rows, is_cache, prefill, step
from mambino.sample.healing import look_ahead
from mambino.weights.checkpoint import save_checkpoint

LONGEST = 200           # bytes of a name: a file's has at most 255, and a temporary one is longer
PRECISIONS = {torch.float32, torch.bfloat16, torch.float16}     # of a state
CONTENTS = {'fingerprint', 'tokens', 'unread', 'state', 'generator'}    # of the file, at least


class Session:
    """See the top of the file."""

    def __init__(self, seed):
        self.tokens = array('i')            # all of the text
        self.unread = []                    # those of them that are not in the state
        self.state = None                   # the model's; None before the first token
        self.logits = None                  # (1, V) of what comes behind the state
        self.generator = torch.Generator().manual_seed(seed)
        self.talk = {}                      # of a conversation: its messages after so many tokens
        self.is_whole = False               # whether all parts are of one moment: it can be saved
        self.path = None                    # where it is saved
        self.stamp = None                   # of the file that is there, if it was opened or saved

    def reopen(self, tok, end_ids=()):
        """Takes back what was drawn last if it ended an answer: end-of-text or one of end_ids."""
        if self.unread and self.unread[0] in (tok.eot, *end_ids):
            self.tokens.pop()
            self.unread = []

    def needs_ids(self):
        """Whether nothing can be drawn before an id is read."""
        return self.logits is None and not self.unread

    def take_up(self, tok, ids, owed=b'', end_ids=()):
        """ids are the text's from now on → all that is to be read behind the state; see go_on."""
        if ids or owed:
            self.reopen(tok, end_ids)
        elif not self.unread:
            ids = tok.context()                             # nothing at all: a new document
        self.tokens.extend(ids)
        unread = [*self.unread, *ids]
        self.unread = []
        self.is_whole = False
        return unread

    def go_on(self, net, tok, ids, repetition_penalty=1.0, end_ids=(), owed=b'', **sampling):
        """Reads ids, then yields one token after another, (id, logits (1, V) it was drawn from).
        sampling: see next_token.sample_token.

        If what was drawn last, end-of-text or one of end_ids, ended an answer, and the text goes on
        with ids, it is taken back. owed: bytes of the text behind ids that the first tokens spell, see
        healing.py; only with them is the text what it should be."""
        unread = self.take_up(tok, ids, owed, end_ids)
        if unread:
            self.logits, self.state, _ = prefill(net, unread, self.state)
        read = self.logits, self.state, self.tokens
        rows = Rows(net, tok.vocab_size, repetition_penalty)
        rows.add([read], [look_ahead(net, tok, read, owed)])
        while True:
            self.state = rows.state
            self.logits = rows.logits
            next_ids = rows.draw(generator=[self.generator], **sampling)    # (1,)
            self.unread = next_ids.tolist()
            self.tokens.extend(self.unread)
            rest = rows.rests[0]
            self.is_whole = not (rest and rest.following.get(self.unread[0]))
            yield self.unread[0], rows.logits
            self.is_whole = False
            rows.advance(next_ids)

    def begin_anew(self):
        """Forgets the text, and goes on from nothing."""
        self.tokens = array('i')
        self.unread = []
        self.state = None
        self.logits = None
        self.talk = {}

    def save(self, path, fingerprint):
        """Writes the file whole or not at all, which ends the program in a line. If there is another
        file than the one that was opened or saved here last, it stays, and this one gets another
        name, which is said. A session in the middle of a step is not saved."""
        if not self.is_whole:
            return
        contents = dict(
            fingerprint=fingerprint,
            tokens=torch.tensor(self.tokens, dtype=torch.int32),
            unread=self.unread,
            state={name: value.cpu() for name, value in self.state.items()},
            generator=self.generator.get_state(),
        )
        if self.logits is not None:         # one of an older version, that was not gone on with, has none
            contents['logits'] = self.logits.cpu()
        if self.talk:
            contents['talk'] = json.dumps(self.talk)
        contents['sha256'] = checksum(contents)
        self.path = self.path or path
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with files.alone_in(os.path.dirname(path)):
                if stamp_of(self.path) != self.stamp:
                    self.path = free_path(self.path)
                    print(f'note: {path} was saved by another process meanwhile, and stays; this text is kept as '
                          f'--session={shlex.quote(name_of(self.path))}', file=sys.stderr)
                save_checkpoint(self.path, contents)
                self.stamp = stamp_of(self.path)
        except (OSError, RuntimeError) as error:
            fail(f'{self.path}: cannot be written: {error}')


# --- files ----------------------------------------------------------------------------------------

def is_name(name):
    """Whether a session may be called so: it means no other folder, and a file can have it."""
    return bool(re.fullmatch(r'\w[\w. -]{0,99}', name)) and len(name.encode()) <= LONGEST


def path_of(out_dir, name, setting='session'):
    """The file of a session. A name that could mean another folder ends the program in a line."""
    if not is_name(name):
        fail(f'{setting}={name}: a name of letters, digits, ".", "-", "_" and spaces, at most 100 or '
             f'{LONGEST} bytes, that begins with a letter or digit')
    out_dir = out_dir.removeprefix('hf:')
    # a checkpoint's file; a folder that has vanished is none
    is_file = os.path.isfile(out_dir) or (out_dir.endswith('.pt') and not os.path.isdir(out_dir))
    folder = os.path.dirname(out_dir) if is_file else out_dir
    return os.path.join(folder, 'sessions', name + '.pt')


def name_of(path):
    return os.path.basename(path).removesuffix('.pt')


def free_path(path):
    """tale-2.pt beside tale.pt, or with the next number that is free."""
    begin = path.removesuffix('.pt')
    n = 2
    while os.path.lexists(f'{begin}-{n}.pt'):
        n += 1
    return f'{begin}-{n}.pt'


def stamp_of(path):
    """What tells a file from one that takes its place; None if there is none."""
    try:
        return files.stamp_of(path)
    except FileNotFoundError:
        return None


def open_session(out_dir, name, fork, seed, fingerprint, device, vocab_size):
    """→ (the session of this name, or a new one; its path; whether there was text before).

    fork: a session that it begins as a copy of, ''. A new one draws from a generator of this
    seed."""
    path = path_of(out_dir, name)
    if fork:
        if os.path.lexists(path):
            fail(f'session={name}: is there already, and would be lost; delete {path}, or name another '
                 '--session')
        session = load_session(path_of(out_dir, fork, 'fork'), fingerprint, device, vocab_size)
        session.stamp = None
    elif os.path.lexists(path):
        session = load_session(path, fingerprint, device, vocab_size)
    else:
        session = Session(seed)
    make_room(path)
    return session, path, session.state is not None


def make_room(path):
    """The folder of a session that is to be written. If it cannot be, that is said here, and not
    when the text is there."""
    try:
        files.try_to_write(path)
        files.remove_leftovers(os.path.dirname(path), older=3600)   # no write takes that long
    except OSError as error:
        fail(f'{path}: cannot be written: {error}')


def moved(value, device):
    """A part of a state, on a device; a Mamba-3's angles in fp32 where that has no fp64."""
    if value.dtype == torch.float64:
        value = value.to(exact_dtype(torch.device(device).type))
    return value.to(device)


def load_session(path, fingerprint, device, vocab_size):
    """The session in a file, which must be of the model with this fingerprint. Its state is still to
    be checked, by check_state."""
    session = Session(seed=0)
    session.stamp = stamp_of(path)
    try:
        contents = read_contents(path)
        session.generator.set_state(contents['generator'])
        session.tokens = array('i', contents['tokens'].tolist())
        session.unread = contents['unread']
        session.state = {name: value if name == 'pos' else moved(value, device)
                         for name, value in contents['state'].items()}
        if contents.get('logits') is not None:          # an older version kept none
            session.logits = contents['logits'].to(device)
        session.talk = json.loads(contents.get('talk', '{}'))
    except FileNotFoundError:
        names = names_in(os.path.dirname(path))
        there = 'are ' + ', '.join(names) if names else 'is none yet'
        fail(f'{path}: no such session; there {there}')
    except (PermissionError, IsADirectoryError) as error:
        fail(f'{path}: cannot be read: {error}')
    except Exception as error:  # zip, pickle and torch errors: all mean that this is no session
        problem = error if isinstance(error, Damaged) else type(error).__name__
        fail(f'{path}: not a readable session (cut short, damaged, or not made by sample.py): '
             f'{problem}; delete it, or name another --session')
    if contents['fingerprint'] != fingerprint:
        fail(f'{path}: a session of another model, or of other adapters; its state means nothing to this '
             'one. Name another --session')
    if not all(0 <= i < vocab_size for i in session.tokens):
        refuse(path, f'it has tokens that are not in the vocabulary of {vocab_size}')
    session.is_whole = True
    return session


def names_in(folder):
    """The names of the sessions in a folder, which may not be there."""
    if not os.path.isdir(folder):
        return []
    return sorted(name.removesuffix('.pt') for name in os.listdir(folder) if name.endswith('.pt'))


# --- what is in a file ----------------------------------------------------------------------------

class Damaged(ValueError):
    """What is wrong with a file's contents."""


def require(condition, problem):
    if not condition:
        raise Damaged(problem)


def read_contents(path):
    """What is in a session's file, each part of its type, and as it was written: whatever the file
    holds, nothing larger is unpacked from it. Damaged, or an error of zip, pickle or torch."""
    files.open_plain(path).close()
    damage = files.damage_of(path)
    require(not damage, damage)
    contents = torch.load(path, map_location='cpu', weights_only=True)
    require(isinstance(contents, dict) and contents.keys() >= CONTENTS, 'parts are missing')
    require(is_tensor(contents['tokens'], torch.int32, 1), 'tokens')
    require(is_tensor(contents['generator'], torch.uint8, 1), 'generator')
    require(type(contents['fingerprint']) is str, 'fingerprint')
    state = contents['state']
    require(type(state) is dict and state and all(type(name) is str for name in state), 'state')
    logits = contents.get('logits')
    for tensor in [*state.values(), *([] if logits is None else [logits])]:
        require(is_tensor(tensor), 'state')
    require(is_talk(contents.get('talk', '{}')), 'talk')
    unread = contents['unread']
    require(type(unread) is list and len(unread) <= 1 and all(type(i) is int for i in unread), 'unread')
    require(unread == contents['tokens'][-1:].tolist() or not unread, 'unread')
    if 'sha256' in contents:                            # an older version wrote none
        require(contents['sha256'] == checksum(contents), 'its contents are not what was saved')
    return contents


def is_talk(text):
    """Whether a text is the JSON of a conversation's messages and the number of tokens after them; or of
    {}."""
    talk = json.loads(text) if type(text) is str else None
    if talk == {}:
        return True
    return (isinstance(talk, dict) and talk.keys() == {'tokens', 'messages'} and type(talk['tokens']) is int
            and isinstance(talk['messages'], list)
            and all(isinstance(message, dict) and message.keys() == {'role', 'content'}
                    and all(type(value) is str for value in message.values()) for message in talk['messages']))


def is_tensor(value, dtype=None, ndim=None):
    """Whether a value is a plain tensor, each of whose numbers is in the file and has a place of its
    own; of this type and so many dimensions."""
    if type(value) is not torch.Tensor or value.layout != torch.strided:
        return False
    reach = 1                                           # places that the dimensions so far take
    for stride, size in sorted(zip(value.stride(), value.shape)):
        if size > 1:
            if stride < reach:
                return False
            reach += stride * (size - 1)
    return (dtype is None or value.dtype == dtype) and (ndim is None or value.ndim == ndim)


def checksum(contents):
    """A hash of all that a session is."""
    names = ('fingerprint', 'tokens', 'unread', 'logits', 'generator')
    parts = {name: contents[name] for name in names if name in contents}
    parts |= {f'state.{name}': value for name, value in contents['state'].items()}
    if 'talk' in contents:
        parts['talk'] = contents['talk']
    digest = hashlib.sha256()
    for name, value in sorted(parts.items()):
        if isinstance(value, torch.Tensor):
            digest.update(f'{name} {value.dtype} {tuple(value.shape)}\n'.encode())
            digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
        else:
            digest.update(f'{name} {value!r}\n'.encode())
    return digest.hexdigest()


def refuse(path, problem):
    fail(f'{path}: not a session that this model can go on with: {problem}; delete it, or name another '
         '--session')


def check_state(net, session, path):
    """Ends the program in a line unless a session's state is one that this model makes after so many
    tokens: nothing that is computed asks again how large a tensor is. One that was made or kept in another
    precision gets the one of today."""
    idx = torch.zeros(1, 1, dtype=torch.long, device=next(net.parameters()).device)
    expected = kept_as(step(net, idx)[1], net.state_dtype)
    state = session.state
    if state.keys() != expected.keys():
        refuse(path, 'its state has other parts than that of this model')
    pos = int(expected['pos']) - 1 + len(session.tokens) - len(session.unread)
    if state['pos'].dtype != torch.int64 or state['pos'].tolist() != [pos]:
        refuse(path, f'its state is not that after its {len(session.tokens)} tokens')
    sizes = set()                           # slots of the caches
    for name, wanted in expected.items():
        shape = list(wanted.shape)
        if is_cache(name) and state[name].ndim == 4:
            shape[2] = state[name].shape[2]
            sizes.add(shape[2])
        if list(state[name].shape) != shape:
            refuse(path, f'its {name} has the shape {tuple(state[name].shape)}')
    if not slots_fit(net.config, pos, sizes):
        refuse(path, f'its caches have {sorted(sizes)} slots, after {pos} tokens')
    if session.logits is not None and session.logits.shape != (1, net.config.vocab_size):
        refuse(path, f'its logits have the shape {tuple(session.logits.shape)}')
    parts = {name: value for name, value in state.items() if name != 'pos'}
    if session.logits is not None:
        parts['logits'] = session.logits
    for name, value in parts.items():
        exact = {expected[name].dtype} if name in expected else set()           # a Mamba-3's angles have more
        if value.dtype not in exact | PRECISIONS or not value.isfinite().all():
            refuse(path, f'its {name} is not of finite numbers')
        if name in state:
            state[name] = value.to(expected[name].dtype)


def slots_fit(config, pos, sizes):
    """Whether caches, of so many slots, are as generation.step leaves them at a position."""
    if not sizes:
        return True
    if len(sizes) > 1:
        return False
    slots, = sizes
    window = getattr(config, 'window', 0)
    if window or pos > config.block_size:
        return slots == (window or config.block_size)
    return pos <= slots <= max(64, 2 * pos, config.block_size)
