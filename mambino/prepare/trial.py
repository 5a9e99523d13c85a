"""What a tokenizer that was made for other texts loses of these: found on a sample, before all of
them are encoded.

    notes = trial.try_tokenizer(tok, 'path/to/it', corpus, work)    # [] where the text comes back

A tokenizer may lack characters, turn capitals into small letters, drop accents, newlines or spaces.
A model never learns what is lost there. So it is said, on the screen and in meta.json; and where
most of the text is unknown to the tokenizer, nothing is made at all.
"""
import itertools
import json
import os
import unicodedata
from collections import Counter

import numpy as np

from mambino import chat
from mambino.configurator import shown
from mambino.prepare import conversations, spool, tokens
from mambino.prepare.corpus import TooLittle
from mambino.prepare.files import MOST_LOST
from mambino.prepare.tables.talks import IN_TEXT
from mambino.seams import SEAM
from mambino.tokenizer_config import config_beside
from mambino.tokenizer_json import asked_in_vain

SAMPLE_MB = 1.0     # so much is tried, as evenly taken from the documents as for training a tokenizer
MOST = 20_000       # characters of a piece that are tried,
STRETCHES = 10      # in so many stretches
HOPELESS = 0.5      # of the characters unknown: no dataset
SMALL = 1e-4        # a loss of so little of a text is not worth a word
LOSES = 'the tokenizer does not give the text back: '
OTHERS = 'choose another, or train one on these texts with --tokenizer=bpe'


def try_tokenizer(tok, name, corpus, work, account, why_no_talks):
    """The notes on what it does not do, which are printed too: [{'file', 'note'}], [] for nothing.
    TooLittle where it does not know most of the text. name: the tokenizer as the person wrote it; account: of
    account.settle; why_no_talks: of vocabulary.why_no_talks."""
    check_template(tok, name, corpus, work)
    notes = [unheard(tok, name), not_given_back(tok, name, corpus, work), without_marks(account, why_no_talks)]
    notes = [note for note in notes if note] + (chat.trouble(tok) if corpus.talks() else [])
    for note in notes:
        more = f'; {OTHERS}' if note.startswith(LOSES) else ''
        print(shown(f'tokenizer {name}: {note.removeprefix("the tokenizer ")}{more}'))
    return [{'file': 'tokenizer.json', 'note': note} for note in notes]


def without_marks(account, why_no_talks):
    """The note on conversations that are texts for want of a tokenizer with marks; ''."""
    are_there = any(f'"as": "{IN_TEXT}"' in decision for decision in account['decided'])
    are_there = are_there or any('marks of a chat' in entry['note'] for entry in account['notes'])
    return why_no_talks and are_there and (
        f'conversations are taken as text, and all of it is learned, for {why_no_talks}')


def unheard(tok, path):
    """The note on a beginning of text that only the file beside the tokenizer asks for; ''."""
    folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
    is_given = os.path.exists(path) and tok.kind == 'bpe'
    token = asked_in_vain(json.loads(tok.text), config_beside(folder)) if is_given else ''
    return token and (f'tokenizer_config.json asks for {token} before every text, tokenizer.json puts none there: '
                      'texts begin without it')


def not_given_back(tok, name, corpus, work):
    """The note on what of the texts it does not give back; ''."""
    if tok.gives_back:
        return ''
    losses = Losses(tok.unknown == tok.eot)
    for text, begins in sample_texts(corpus, work):
        losses.add(text, *tok.there_and_back(text, begins))
    if losses.hopeless() > HOPELESS:
        raise TooLittle(f'tokenizer={name}: {percent(losses.hopeless())} of the characters of these texts are unknown '
                        f'to it; {OTHERS}')
    reasons = losses.reasons()
    return LOSES + ', '.join(reasons) if reasons else ''


def check_template(tok, name, corpus, work):
    """TooLittle where the template of a tokenizer refuses too many conversations, on a sample."""
    reasons = Counter()
    n = 0
    for key, block, rows, _ in corpus.sample(SAMPLE_MB) if corpus.talks() else ():
        pieces = spool.pieces_of(spool.read_block(work, key, block), rows)
        for piece in itertools.compress(pieces, rows['talk']):
            n += 1
            try:
                tokens.talk_ids(tok, conversations.unpack(piece), np.zeros(0, np.int32))
            except ValueError as error:
                reasons[str(error)] += 1
    if reasons and reasons.total() > MOST_LOST * n:
        raise TooLittle(f'tokenizer={name}: its chat template refuses {reasons.total():,} of {n:,} conversations of a '
                        f'sample ({reasons.most_common(1)[0][0]}); --conversations=false takes them as text')


def sample_texts(corpus, work):
    """Yields (text, whether a document begins with it): parts of some pieces of train documents,
    always the same ones."""
    sample = list(corpus.sample(SAMPLE_MB))
    if not sample:                          # few and large pieces, and none was drawn
        sample = [(key, block, rows[:1], last_chars) for key, block, rows, last_chars in corpus.sample(1e9)][:1]
    for key, block, rows, last_chars in sample:
        for text, begins in spool.texts_of(spool.read_block(work, key, block), rows, last_chars):
            if len(text) <= MOST:
                yield text, begins
            else:                           # evenly from all of it
                for start in range(0, len(text), len(text) // STRETCHES):
                    start = at_seam(text, start)
                    end = at_seam(text, start + MOST // STRETCHES)
                    yield text[start:end], begins and start == 0


def at_seam(text, at):
    """The next place from `at` on where white space begins; `at` itself at the beginning, and where
    there is none near."""
    seam = SEAM.search(text, at, at + MOST) if at else None
    return seam.end() if seam else at


class Losses:
    """What was lost of texts, in characters."""

    def __init__(self, unknown_ends=False):
        """unknown_ends: whether the id for unknown text is the one that ends a text."""
        self.unknown_ends = unknown_ends
        self.counts = Counter()     # of what there was
        self.lost = Counter()       # of that, what did not come back; keys: see add()

    def add(self, text, back, unknown):
        """A text, what came back of it, and how many of its characters were unknown."""
        white = sum(map(text.count, ' \t\n'))
        self.counts.update({'newlines': text.count('\n'), 'tabs': text.count('\t'), 'spaces': text.count(' '),
                            'characters': len(text) - white})
        self.lost['unknown'] += unknown
        if back == text:
            return
        missing = Counter(text) - Counter(back)
        spaces = back.count(' ') - text.count(' ')
        for name, c in ('newlines', '\n'), ('tabs', '\t'), ('spaces', ' '):
            lost = missing.pop(c, 0)
            self.lost[name] += lost
            spaces -= lost                      # a newline may have become one
        self.lost['added'] += max(0, spaces)
        exact = missing.total()
        small = lacking(text.lower(), back.lower())
        plain = lacking(without_accents(text.lower()), without_accents(back.lower()))
        self.lost['capitals'] += max(0, exact - small)
        self.lost['accents'] += max(0, small - plain)
        self.lost['others'] += max(0, min(exact, plain) - unknown)

    def hopeless(self):
        """The share of characters, without white space, of which nothing is left."""
        gone = max(self.lost['unknown'], self.lost['unknown'] + self.lost['others'])
        return min(1.0, gone / max(1, self.counts['characters']))

    def reasons(self):
        """What is lost, in words, the worst first."""
        characters = max(1, self.counts['characters'])
        reasons = []
        if self.lost['unknown']:
            share = self.lost['unknown'] / characters
            ends = ', and end a text where they stand' if self.unknown_ends else ''
            reasons.append(f'{percent(share)} of the characters are unknown to it{ends}')
        for name, words in (
                ('others', '{} of the characters come back as others or not at all'),
                ('capitals', 'capitals become small letters ({} of the characters)'),
                ('accents', 'accents are dropped ({} of the characters)'),
                ('added', 'spaces are put where none were ({} of the characters)')):
            share = self.lost[name] / characters
            if share > SMALL:
                reasons.append(words.format(percent(share)))
        for name in ('newlines', 'tabs', 'spaces'):
            share = self.lost[name] / max(1, self.counts[name])
            if share > SMALL and self.lost[name] / (characters + self.counts[name]) > SMALL:
                reasons.append(f'{percent(share)} of the {name} are lost')
        return reasons


def lacking(text, back):
    """How many characters of a text, but for white space, are not in what came back."""
    missing = Counter(text) - Counter(back)
    return sum(n for c, n in missing.items() if c not in ' \t\n')


def without_accents(text):
    """A text without the marks above and below its letters."""
    return ''.join(c for c in unicodedata.normalize('NFD', text) if not unicodedata.combining(c))


def percent(share):
    """0.342 → '34%', 0.0034 → '0.34%', 1.0 → '100%'."""
    number = 100 * share
    return f'{number:.0f}%' if number >= 1 else f'{number:.2g}%'
