"""What is asked on the page, as jobs, and their answers as they grow.

    asked = Asked(prompt='Once upon', messages=None, settings={…}, session='')
    for job in jobs_asked(served, asked): …             # one for each answer that is wanted
    body = body_of('out', asked, False)                 # of a request for the same
    answer = Answer(served, job, tokens, label)
    answer.begin()
    while answer.goes_on(): …                           # takes what came since, and shows it

The model's thread puts events into a queue of the answer; the page takes them some times a second, all
at once, so that a quick model sends few messages. Of a model that fills holes they are the whole text each time.
"""
import os
import time
from collections import deque
from types import SimpleNamespace
from typing import NamedTuple

from mambino.sample.sessions import path_of
from mambino.sample.text import stops_of
from mambino.serve.chat_api import question_of
from mambino.serve.fills import check_no_holes, fills_of
from mambino.serve.jobs import jobs_of, text_prompt
from mambino.serve.page.tokens import token_of
from mambino.serve.parameters import COMPLETION
from mambino.serve.told import NoModel, Refused, told
from mambino.serve.work import Done, Failed, Fill, Frame, Full, Read, Token

ALTERNATIVES = 5        # of each token that are shown
MOST_FOUND = 4096       # tokens of all holes of a prompt
ENDS = {'stop': 'finished', 'length': 'full length', 'cancelled': 'stopped'}
# of what the API takes, what has no knob here
UNUSED = dict(presence_penalty=0.0, frequency_penalty=0.0, logit_bias={}, ignore_eos=False)


class Asked(NamedTuple):
    """What a person wants of a model."""
    prompt: str
    messages: list          # of a chat, the last one waits for an answer; None: the prompt is a text
    settings: dict          # what generate.py's knobs say, by their names
    session: str = ''       # a text that is kept, and goes on


def jobs_asked(served, asked):
    """The jobs of what is asked, one for each answer; Refused with a sentence where it cannot
    be. It may take a while."""
    settings = asked.settings
    if served.fills_holes:
        return fills_asked(served, asked)
    if not asked.messages:
        check_no_holes(served, [asked.prompt])
    more = dict(max_tokens=settings['length'], logprobs=ALTERNATIVES, session=asked.session)
    with told(400):
        stops = tuple(stops_of(settings['stop']))
        if asked.messages:
            question = question_of(served.tok, asked.messages, True, 'messages')
            prompt = question.prompt
            more.update(stops=question.stops, end_ids=question.end_ids)
        else:
            begins = not asked.session or not os.path.lexists(path_of(served.out_dir, asked.session))
            prompt = text_prompt(served.tok, asked.prompt, settings['heal'], begins)
    values = SimpleNamespace(**UNUSED, stop=stops, temperature=settings['temperature'], top_k=settings['top_k'],
                             top_p=settings['top_p'], min_p=settings['min_p'], seed=settings['seed'],
                             repetition_penalty=settings['repetition'])
    return jobs_of(served, values, [prompt], settings['answers'], **more)


def fills_asked(served, asked):
    """The same of a model that fills holes."""
    settings = asked.settings
    if asked.messages:
        raise Refused(f'{served.id} fills holes in a text, and answers no messages: choose Text, or another model.')
    if asked.session:
        raise Refused(f'{served.id} fills holes, and keeps no sessions: leave the session\'s name out.')
    if settings['repetition'] != 1:
        raise Refused(f'{served.id} fills holes, for which there is no Repetition: set it to 1.')
    with told(400):
        stops = tuple(stops_of(settings['stop']))
    values = SimpleNamespace(stop=stops, temperature=settings['temperature'], top_k=settings['top_k'],
                             top_p=settings['top_p'], min_p=settings['min_p'], seed=settings['seed'],
                             max_tokens=settings['length'], suffix='', sampler=settings['sampler'],
                             steps=settings['steps'], stream=True)
    return fills_of(served, values, [asked.prompt], settings['answers'], MOST_FOUND)[1]


def body_of(model, asked, fills_holes):
    """What asks the API for the same, as its JSON; of what the API takes besides only what is not so anyway."""
    settings = asked.settings
    body = dict(model=model, max_tokens=settings['length'], temperature=settings['temperature'],
                top_p=settings['top_p'], top_k=settings['top_k'], seed=settings['seed'], stream=True)
    more = dict(min_p=settings['min_p'], repetition_penalty=settings['repetition'], stop=stops_or_none(settings))
    if asked.messages:
        body['messages'] = asked.messages
    else:
        body.update(prompt=asked.prompt, n=settings['answers'])
        more['session'] = asked.session
        if fills_holes:
            body.update(sampler=settings['sampler'], steps=settings['steps'])
        elif not settings['heal']:      # which is as a rule so
            more['heal'] = False
    defaults = {parameter.name: parameter.default for parameter in COMPLETION}
    return body | {name: value for name, value in more.items() if value != defaults[name]}


def stops_or_none(settings):
    """The texts to stop at; none where they cannot be, which is said when an answer is wanted."""
    try:
        with told(400):
            return tuple(stops_of(settings['stop']))
    except Refused:
        return ()


class Answer:
    """One answer, see the top of the file."""

    def __init__(self, served, job, tokens, label):
        self.served = served
        self.job = job
        self.tokens = tokens            # where it is shown
        self.label = label              # where is said how far it is
        self.events = deque()
        self.ticket = None
        self.parts = []
        self.count = 0
        self.began = self.first = self.last = None
        self.end = ''                   # why it is over
        self.trouble = ''               # what went wrong

    @property
    def text(self):
        return ''.join(self.parts)

    @property
    def goes_on_behind(self):
        """Whether its text stands at the end, and could go on."""
        return not isinstance(self.job, Fill) or self.job.goes_on

    def begin(self):
        """Waits for its row from now on."""
        self.began = time.perf_counter()
        try:
            self.ticket = self.served.scheduler.submit(self.job, self.put)
        except Full:
            self.trouble = 'Too many answers wait already: try again in a moment.'
        except NoModel as error:
            self.trouble = str(error)
        self.tell()

    def put(self, event):
        """In the model's thread."""
        self.events.append((time.perf_counter(), event))

    def cancel(self):
        """Its row is free before the next step."""
        if self.ticket and not self.end:
            self.ticket.cancel()

    def goes_on(self):
        """Shows what came since; whether more will come."""
        shown = []
        while self.events:
            moment, event = self.events.popleft()
            if isinstance(event, Read):
                self.first = self.last = moment
            elif isinstance(event, Token):
                self.take(event, moment, shown)
            elif isinstance(event, Frame):
                self.last = moment
                self.show_frame(event)
            elif isinstance(event, Done):
                self.end = event.reason
                self.parts.append(event.text)
                if isinstance(self.job, Fill):
                    self.last = moment
                    self.show_frame(event)
                else:
                    self.count = event.tokens
                    shown += [dict(t=event.text)] if event.text else []
            elif isinstance(event, Failed):
                self.trouble = event.message
        if shown:
            self.tokens.add(shown)
        self.tell()
        return not (self.end or self.trouble)

    def take(self, event, moment, shown):
        self.last = moment
        self.count += not event.spells
        self.parts.append(event.text)
        if event.logprob is None:
            shown.append(dict(t=event.text))
        elif event.text or not event.spells:
            shown.append(token_of(self.served.tok, *event.logprob, event.text))

    def show_frame(self, event):
        """A text that is filled, as it is now; of one that was stopped what there was stays."""
        if self.end == 'cancelled':
            return
        self.count = event.tokens
        tail = '' if self.end == 'stop' else self.job.tail
        parts = [dict(t=self.job.head), dict(t=event.text, f=True), dict(t=tail)]
        self.tokens.replace([part for part in parts if part['t']])

    def tell(self):
        """Says how far it is."""
        if self.trouble:
            said = 'no answer'
        elif self.first is None and not self.end:
            said = 'waiting …'
        else:
            seconds = (self.last or 0) - (self.first or 0)
            rate = f' · {self.count / seconds:,.0f} tokens/s' if self.count > 1 and seconds > 0 else ''
            end = f' · {ENDS.get(self.end, self.end)}' if self.end else ''
            said = f'{self.count:,} tokens{rate}{end}'
        if self.label.text != said:
            self.label.set_text(said)
