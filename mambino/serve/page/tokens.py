"""A text token by token, with what else could have stood in each place.

    text = Tokens('The answer')
    text.add([dict(t='Once'), token_of(tok, 17, -2.3, [(17, -2.3), …], ' upon')])
    text.clear()

The browser builds the text by itself, tokens.js, so that a thousand tokens are one message, and what
they say is text whatever it is.
"""
from nicegui import ui

from mambino.sample.text import token_text

MOST = 100      # nats that are shown; JSON has no infinity


def bounded(logprob):
    """Nats of a logprob, as JSON can say them."""
    return min(MOST, -logprob)


def token_of(tok, i, logprob, likeliest, text):
    """A token as tokens.js takes it."""
    others = [(token_text(tok, other), round(bounded(value), 4)) for other, value in likeliest]
    return dict(t=text, s=token_text(tok, i), n=bounded(logprob), a=others)


class Tokens(ui.element, component='tokens.js'):
    """See the top of the file. marks: whether line ends and tabs are seen."""

    def __init__(self, label, test_id='', marks=False):
        super().__init__()
        self._props['label'] = label
        self._props['marks'] = marks
        if test_id:
            self._props['data-testid'] = test_id

    def add(self, tokens):
        """Puts tokens at the end."""
        self.run_method('add', tokens)

    def clear(self):
        """Takes all out."""
        self.run_method('clear')

    def replace(self, tokens):
        """These in the place of all."""
        self.clear()
        self.add(tokens)
