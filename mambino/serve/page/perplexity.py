"""The panel that shows how likely a text is to a model, token by token.

    text ──► ids ──► the model's thread, a piece at a time ──► logprobs ──► figures, a heat map, a list

The figures are those of sample.py --score where every token is predicted from all the text before it.
"""
import heapq
import math
from collections import deque

from nicegui import ui

from mambino.prepare.files import Notes, Skip
from mambino.prepare.texts.encodings import clean, decoded
from mambino.sample.heatmap import DEEPEST, TOP
from mambino.sample.score import SURPRISES, around, perplexity, token_scores, total_nats
from mambino.serve.page import look
from mambino.serve.page.away import away
from mambino.serve.page.generate import NONE, TICK
from mambino.serve.page.tokens import Tokens, bounded, token_of
from mambino.serve.told import Refused

MOST = 20_000           # tokens that a browser shows with ease
LARGEST = 400_000       # bytes of a file
APART = 4               # nats between two models, from which on a token is as warm or cold as it gets
EXAMPLE = 'The quick brown fox jumps over the lazy dog.\n'


class Scoring:
    """A text on its way through a model."""

    def __init__(self, served, text):
        self.served = served
        self.text = text
        self.ids = served.tok.encode(text).tolist()
        self.pieces = deque()           # that came from the model's thread
        self.scores = []                # (logprob, [(id, logprob), …]) of each id
        self.future = None
        self.decoder = served.tok.stream()

    def begin(self):
        self.future = self.served.scheduler.call(self.work)

    def work(self):
        """In the model's thread: a piece, and then others have their turn."""
        for piece in token_scores(self.served.net, self.served.tok, self.ids, TOP):
            self.pieces.append(piece)
            yield

    def take(self):
        """[(a token as tokens.js has it), …] of what came since."""
        tokens = []
        while self.pieces:
            for logprob, likeliest in self.pieces.popleft():
                i = self.ids[len(self.scores)]
                self.scores.append((logprob, likeliest))
                text = self.decoder.feed(i)
                if len(self.scores) == len(self.ids):
                    text += self.decoder.flush()
                token = token_of(self.served.tok, i, logprob, likeliest, text)
                tokens.append(dict(token, h=token['n'] / DEEPEST))
        return tokens

    def is_over(self):
        return self.future.done() and not self.pieces

    def figures(self):
        """{name: text} of all tokens so far."""
        nats = total_nats(logprob for logprob, _ in self.scores)
        size = len(self.text.encode('utf-8'))
        return {'tokens': f'{len(self.scores):,}', 'nats': f'{nats:,.4f}',
                'nats/token': f'{nats / len(self.scores):.4f}', 'perplexity': perplexity(nats / len(self.scores)),
                'bits/byte': f'{nats / math.log(2) / size:.4f}'}


def scoring_of(library, name, text):
    """The Scoring of a text by a model; Refused with a sentence where it cannot be."""
    served = library.get(name)
    if served.fills_holes:
        raise Refused(f'{name} fills holes, and expects no token after those before it: python sample.py '
                      f'--out_dir={served.out_dir} --score=FILE says a bound of its perplexity.')
    try:
        scoring = Scoring(served, text)
    except ValueError as error:
        raise Refused(f'{name}: {error}') from None
    if not scoring.ids:
        raise Refused('There is no text to score.')
    if len(scoring.ids) > MOST:
        raise Refused(f'{len(scoring.ids):,} tokens are more than {MOST:,}, which a browser shows with ease: take a '
                      'part of the text, or python sample.py --score=file')
    return scoring


def show(library):
    """Fills the panel."""
    look.title('Perplexity', 'How likely is a text to a model? The warmer a token, the less it was expected. Point at '
               'one, or go to it by the arrow keys, to see what was expected instead.')
    names = [run['id'] for run in library.names()]
    if not names:
        look.empty('There is no model yet.', 'Train one first', '/train')
        return
    Panel(library, names)


class Panel:
    """The controls, and what is shown."""

    def __init__(self, library, names):
        self.library = library
        self.scorings = []
        with look.sheet():
            with look.row():
                self.model = look.field(ui.select(names, value=names[0], label='Model'), 'model').classes('choice')
                self.second = look.field(ui.select([NONE, *names], value=NONE, label='Compare with'), 'second-model')
                self.second.classes('choice')
            self.text = look.field(ui.textarea('Text', value=EXAMPLE), 'text').classes('w-full typed')
            self.text.props('rows=6')
            with look.row():
                self.go = look.mark(ui.button('Score', icon='gradient', on_click=self.start), 'score')
                pick = ui.button('Choose a file', on_click=lambda: self.upload.run_method('pickFiles'))
                look.mark(pick.props('outline'), 'choose-file')
                self.state = look.mark(ui.label().classes('muted small figure').props('role=status'), 'state')
            self.upload = ui.upload(on_upload=self.read, auto_upload=True, max_file_size=LARGEST,
                                    on_rejected=self.refuse).classes('hidden')
            self.upload.props['aria-label'] = 'A file of text'
        self.trouble = look.trouble()
        self.shown = ui.element('div').classes('stack')
        self.timer = ui.timer(TICK, self.tick, active=False)
        self.is_here = True
        ui.context.client.on_connect(self.come)
        ui.context.client.on_disconnect(self.leave)
        look.remember('perplexity', dict(text=self.text, model=self.model))

    async def read(self, event):
        """Takes a file's text."""
        try:
            self.text.set_value(clean(decoded(await event.file.read(), Notes())))
            self.trouble.set_text('')
        except Skip as error:
            self.trouble.set_text(f'{event.file.name} cannot be read as text: {error}')
        self.upload.reset()

    def refuse(self):
        self.trouble.set_text(f'The file has more than {LARGEST // 1000} kB: take a part of it.')

    async def start(self):
        """Scores the text by one model or two."""
        if self.timer.active or not self.go.enabled:        # it has begun, or a model is loaded for it
            return
        names = list(dict.fromkeys([self.model.value, self.second.value]))
        self.trouble.set_text('')
        self.go.disable()
        self.scorings = []
        try:
            for name in names:
                if name != NONE:
                    self.state.set_text(f'Loading {name} …')
                    self.scorings.append(await away(scoring_of, self.library, name, self.text.value or ''))
        except Refused as error:
            self.trouble.set_text(str(error))
            return
        finally:
            self.state.set_text('')
            self.go.enable()
        if not self.is_here:
            return
        self.show_places()
        for scoring in self.scorings:
            scoring.begin()
        self.timer.activate()

    def show_places(self):
        """What is filled as the scores come."""
        self.shown.clear()
        self.stats = []
        with self.shown:
            for scoring in self.scorings:
                with look.sheet(scoring.served.id, 'figures'):
                    blank = dict.fromkeys(('tokens', 'nats', 'nats/token', 'perplexity', 'bits/byte'), '…')
                    self.stats.append(look.stats(blank))
            with look.sheet('Token by token', 'heat'):
                with look.row():
                    self.view = ui.element('div')
                    self.scale = ui.element('div').classes('scale')
                self.map = Tokens('Token by token', 'heat-map', marks=True)
                ui.label('A perplexity of 10: at each token as unsure as between ten that are equally likely. Nats: '
                         '0 is certain, each one more is 2.7 times less likely.').classes('muted small')
            self.list = ui.element('div').classes('stack')
        self.show_scale('expected', f'{DEEPEST:g} nats or more')

    def show_scale(self, low, high, kind=''):
        self.scale.clear()
        with self.scale:
            ui.label(low)
            ui.element('span').classes(f'bar {kind}')
            ui.label(high)

    def tick(self):
        """Shows what came."""
        for number, (scoring, labels) in enumerate(zip(self.scorings, self.stats)):
            if tokens := scoring.take():
                if number == 0:
                    self.map.add(tokens)
                for name, text in scoring.figures().items():
                    labels[name].set_text(text)
        seen = sum(len(scoring.scores) for scoring in self.scorings)
        self.state.set_text(f'{seen:,} of {sum(len(scoring.ids) for scoring in self.scorings):,} tokens')
        if all(scoring.is_over() for scoring in self.scorings):
            self.finish()

    def finish(self):
        """All scores are there, or will not come."""
        self.timer.deactivate()
        self.state.set_text('')
        for scoring in self.scorings:
            if len(scoring.scores) < len(scoring.ids):
                why = '' if scoring.future.cancelled() else scoring.future.exception()
                self.trouble.set_text(f'{scoring.served.id}: {why or "the server has ended this"}')
                return
        self.show_surprises(self.scorings[0])
        if len(self.scorings) == 2:
            self.show_views(*self.scorings)

    def show_views(self, one, other):
        """The map of each model, and where they differ."""
        if one.ids != other.ids:
            with self.list:
                look.note(f'{one.served.id} and {other.served.id} have different tokens: of the figures above, '
                          'bits/byte is the one that compares them.')
            return
        views = {'one': one.served.id, 'other': other.served.id, 'apart': 'Difference'}
        with self.view:
            toggle = ui.toggle(views, value='one', on_change=lambda event: self.show_view(event.value, one, other))
            look.mark(toggle.props('dense unelevated no-caps toggle-color=primary'), 'view')

    def show_view(self, view, one, other):
        self.map.clear()
        self.map.add(difference(one, other) if view == 'apart' else tokens_of(one if view == 'one' else other))
        if view == 'apart':
            self.show_scale(f'{one.served.id} expected it more', f'{other.served.id} did', 'both')
        else:
            self.show_scale('expected', f'{DEEPEST:g} nats or more')

    def show_surprises(self, scoring):
        """The tokens that were expected least."""
        worst = heapq.nsmallest(SURPRISES, ((logprob, at) for at, (logprob, _) in enumerate(scoring.scores)))
        with self.list, look.sheet('Least expected', 'surprises'):
            rows = []
            for logprob, at in worst:
                left, token, right = around(scoring.served.tok, scoring.ids, at)
                rows.append((f'{-logprob:.2f}', left, token, right))
            look.table(('#nats', '#before', 'token', 'after'), rows, 'surprise-rows', 'words mono')

    def come(self):
        self.is_here = True

    def leave(self):
        """Nobody waits any more."""
        self.is_here = False
        for scoring in self.scorings:
            if scoring.future:
                scoring.future.cancel()


def tokens_of(scoring):
    """All tokens of a Scoring that is over, as tokens.js has them."""
    decoder = scoring.served.tok.stream()
    tokens = [token_of(scoring.served.tok, i, *score, decoder.feed(i)) for i, score in zip(scoring.ids, scoring.scores)]
    tokens[-1]['t'] += decoder.flush()
    return [dict(token, h=token['n'] / DEEPEST) for token in tokens]


def difference(one, other):
    """The same, warm where the other model expected a token more, cold where less."""
    tokens = tokens_of(one)
    for token, (logprob, _) in zip(tokens, other.scores):
        apart = token['n'] - bounded(logprob)
        token['h'] = apart / APART
        token['d'] = f'{other.served.id}: {bounded(logprob):.2f} nats, {apart:+.2f} apart'
    return tokens
