"""The panel on which a model writes: texts that go on, or messages that are answered.

    /generate?model=out-mine        # as the panel Train links here

    prompt ──► jobs ──► the model's scheduler ──► tokens, some times a second ──► the browser

A model that fills holes shows its whole text each time, in which hidden tokens are ░.
"""
import json

from nicegui import ui

from mambino.sample.uncover import SAMPLERS
from mambino.serve.page import look
from mambino.serve.page.answers import Answer, Asked, body_of, jobs_asked
from mambino.serve.page.away import away
from mambino.serve.page.sessions import show_sessions
from mambino.serve.page.tokens import Tokens
from mambino.serve.runs import facts_of
from mambino.serve.told import Refused

NONE = '—'              # in the place of a second model
TICK = 0.07             # seconds between two looks at what came
# name, label, default, smallest, largest, step, what it does
KNOBS = (
    ('length', 'Tokens', 200, 1, 4096, 50, 'How many are written at most'),
    ('temperature', 'Temperature', 0.8, 0, 5, 0.1, 'Below 1 more careful, above 1 wilder; 0: always the likeliest'),
    ('top_k', 'Top-k', 200, 0, 100000, 10, 'Only among so many likeliest tokens; 0: all'),
    ('top_p', 'Top-p', 1.0, 0.01, 1, 0.05, 'Only among the likeliest that together have this probability'),
    ('min_p', 'Min-p', 0.0, 0, 1, 0.01, 'Only tokens at least this times as likely as the likeliest'),
    ('repetition', 'Repetition', 1.0, 0.1, 10, 0.05, 'Above 1, what is in the text already becomes less likely'),
    ('answers', 'Answers', 1, 1, 8, 1, 'So many, side by side'),
    ('seed', 'Seed', 1337, 0, 2**53, 1, 'The same seed gives the same text'),
    ('steps', 'Steps', 0, 0, 10000, 1, 'In which the holes of a window, or a block, are filled; 0: one a token'),
)
OF_HOLES = 'sampler', 'steps'                   # controls that only a model that fills holes has
SENDS = """(event) => {
    const sends = event.ctrlKey || event.target.dataset.chat && !event.shiftKey;
    if (event.key === "Enter" && sends) { event.preventDefault(); emit(); }
}"""                    # Ctrl-Enter, of a message Enter alone
WHOLE = ('length', 'top_k', 'answers', 'seed', 'steps')


def show(library):
    """Fills the panel."""
    look.title('Generate', 'Give the beginning of a text, or a message. Point at a word of the answer, or go to it by '
               'the arrow keys, to see what else could have stood there.')
    runs = {run['id']: run for run in library.names()}
    if not runs:
        look.empty('There is no model yet.', 'Train one first', '/train')
        return
    Panel(library, runs, ui.context.client.request.query_params.get('model'))


class Panel:
    """The controls, and what goes on."""

    def __init__(self, library, runs, wanted):
        self.library = library
        self.runs = runs
        is_given = wanted in runs
        first = wanted if is_given else next(iter(runs))
        talks = facts_of(runs[first]['out_dir']).get('talks') and not library.fills_holes(runs[first])
        self.answers = []               # that are shown
        self.asked = None               # what they answer, an Asked
        self.messages = []              # of the chat so far
        self.knobs = {}
        with ui.element('div').classes('work'):
            with ui.element('div'):
                self.show_asking(list(runs), first, talks)
                self.trouble = look.trouble()
                self.shown = look.mark(ui.element('div').classes('answers'), 'shown')
            with ui.element('div').classes('knobs'):
                self.show_knobs()
                self.show_more()
        self.timer = ui.timer(TICK, self.tick, active=False)
        self.is_here = True             # the person, as far as one knows
        ui.context.client.on_connect(self.come)
        ui.context.client.on_disconnect(self.leave)
        look.remember('generate', dict(self.knobs, prompt=self.prompt, model=self.model, mode=self.mode),
                      ['model', 'mode'] * is_given)
        self.change()

    # --- what is seen

    def show_asking(self, names, first, talks):
        with look.sheet():
            with look.row():
                mode = 'chat' if talks else 'text'
                self.mode = ui.toggle({'text': 'Text', 'chat': 'Chat'}, value=mode, on_change=self.change)
                look.mark(self.mode, 'mode')
                self.mode.props('dense unelevated no-caps toggle-color=primary aria-label="Text or chat"')
                self.model = ui.select(names, value=first, label='Model', on_change=self.change)
                self.second = ui.select([NONE, *names], value=NONE, label='Beside it', on_change=self.change)
                look.field(self.model, 'model').classes('choice')
                look.field(self.second, 'second-model', 'A second model gets the same prompt').classes('choice')
            self.base = look.note('This model was not tuned on conversations: it goes on with one that is written '
                                  'down, and may not know where an answer ends.')
            look.mark(self.base, 'base-note').set_visibility(False)
            self.holes = look.note('Fills holes: [...20...] in the prompt is one of 20 tokens; without one it goes on '
                                   'behind the prompt.')
            look.mark(self.holes, 'holes-note')
            self.talk = look.mark(ui.element('div').classes('stack'), 'talk')
            self.prompt = look.field(ui.textarea('Prompt', value='Once upon a time', on_change=self.change), 'prompt')
            self.prompt.props('rows=4').classes('w-full typed')
            self.prompt.on('keydown', self.start, js_handler=SENDS)
            with look.row():
                self.go = look.mark(ui.button('Generate', icon='play_arrow', on_click=self.start), 'start')
                self.halt = look.mark(ui.button('Stop', icon='stop', on_click=self.stop).props('outline'), 'stop')
                self.go_on = look.mark(ui.button('Go on', on_click=self.take_up).props('flat'), 'go-on')
                self.forget = look.mark(ui.button('New conversation', on_click=self.begin_anew).props('flat'), 'forget')
                self.state = look.mark(ui.label().classes('muted small').props('role=status'), 'state')
            self.halt.set_visibility(False)
            self.go_on.set_visibility(False)

    def show_knobs(self):
        with look.sheet('How it writes'):
            with ui.element('div').classes('fields'):
                for name, label, value, low, high, step, hint in KNOBS:
                    knob = ui.number(label, value=value, min=low, max=high, step=step, on_change=self.change)
                    self.knobs[name] = look.field(knob, name, hint)
            sampler = ui.select(list(SAMPLERS), value='first', label='Sampler', on_change=self.change)
            self.knobs['sampler'] = look.field(sampler.classes('w-full'), 'sampler', 'In which order holes are filled: '
                                               'first, in random order, is the model\'s distribution')
            stop = ui.input('Stop at', placeholder=r'\n|THE END', on_change=self.change).classes('w-full')
            self.knobs['stop'] = look.field(stop, 'stop-texts', 'Ends before this text; several are separated by |')
            heal = ui.checkbox('Finish the last word', value=True, on_change=self.change)
            self.knobs['heal'] = look.field(heal, 'heal', 'A prompt may end inside a word: it is gone on with')
            self.system = look.field(ui.textarea('System message').props('rows=3').classes('w-full'), 'system')

    def show_more(self):
        with look.sheet().classes('tight') as self.sessions:
            with ui.expansion('Sessions').props('data-testid=sessions'):
                session = ui.input('Session', on_change=self.change)
                self.session = look.field(session.props('clearable').classes('w-full'), 'session',
                                          'A name: the text is kept, and goes on the next time')
                self.refresh_sessions = show_sessions(self.library, self.model, self.session)
        with look.sheet().classes('tight'), ui.expansion('The same by the API').props('data-testid=as-request'):
            self.request = look.code('', 'request')

    def change(self):
        """After a control was changed."""
        if not hasattr(self, 'timer'):
            return
        is_chat = self.mode.value == 'chat'
        fills = self.fills_holes()
        self.holes.set_visibility(fills and not is_chat)
        for name in OF_HOLES:
            self.knobs[name].set_visibility(fills)
        self.knobs['repetition'].set_visibility(not fills)
        self.second.set_visibility(not is_chat)
        self.talk.set_visibility(is_chat)
        self.base.set_visibility(is_chat and self.base.visible)
        self.system.set_visibility(is_chat)
        self.sessions.set_visibility(not (is_chat or fills))
        self.knobs['heal'].set_visibility(not (is_chat or fills))
        self.knobs['answers'].set_visibility(not is_chat)
        self.forget.set_visibility(is_chat and bool(self.messages) and not self.timer.active)
        label = 'Message' if is_chat else 'Prompt'
        if self.prompt.props['label'] != label:     # else what is being typed would be sent back as it was
            self.prompt.props['label'] = label
            self.prompt.props['placeholder'] = 'Enter sends it, Shift-Enter begins a line' if is_chat else ''
            self.prompt.props['data-chat'] = is_chat or None
        self.go.set_text('Send' if is_chat else 'Generate')
        self.request.set_text(self.as_request())

    def settings(self):
        """What the knobs say, within their bounds."""
        values = {}
        for name, _, default, low, high, _, _ in KNOBS:
            value = self.knobs[name].value
            value = default if value is None else min(max(value, low), high)
            values[name] = int(value) if name in WHOLE else float(value)
        if self.fills_holes():
            values['repetition'] = 1.0          # there is none
        texts = {name: self.knobs[name].value for name in ('heal', 'sampler')}
        return dict(values, **texts, stop=self.knobs['stop'].value or '')

    def fills_holes(self):
        """Whether the model that is chosen does."""
        return self.library.fills_holes(self.runs[self.model.value])

    def wanted(self):
        """What the controls say, an Asked."""
        is_chat = self.mode.value == 'chat'
        settings = self.settings()
        session = '' if is_chat or self.fills_holes() else (self.session.value or '').strip()
        if is_chat or session:
            settings['answers'] = 1         # either has one text
        return Asked(self.prompt.value or '', self.said(self.prompt.value) if is_chat else None, settings, session)

    def as_request(self):
        """A command that asks the API for the same."""
        wanted = self.wanted()
        body = body_of(self.model.value, wanted, self.fills_holes())
        path = 'v1/chat/completions' if wanted.messages else 'v1/completions'
        address = str(ui.context.client.request.base_url) + path
        quoted = json.dumps(body, ensure_ascii=False, indent=1).replace("'", "'\\''")
        return f"curl {address} \\\n  -H 'Content-Type: application/json' -d '{quoted}'"

    # --- what is done

    def said(self, line):
        """The messages of the chat, with this one."""
        system = [dict(role='system', content=self.system.value)] if self.system.value else []
        return [*system, *self.messages, dict(role='user', content=line or '')]

    async def start(self):
        """Begins the answers."""
        if self.timer.active or not self.go.enabled:        # it has begun, or a model is loaded for it
            return
        is_chat = self.mode.value == 'chat'
        if is_chat and not (self.prompt.value or '').strip():
            return
        asked = self.wanted()
        names = [self.model.value]
        if not is_chat and self.second.value != NONE:
            names.append(self.second.value)
        self.trouble.set_text('')
        self.go.disable()
        self.go_on.set_visibility(False)
        pairs = []
        try:
            for name in names:
                self.state.set_text(f'Loading {name} …')
                served = await away(self.library.get, name)
                jobs = await away(jobs_asked, served, asked)
                pairs += [(served, job) for job in jobs]
        except Refused as error:
            self.trouble.set_text(str(error))
            return
        finally:
            self.state.set_text('')
            self.go.enable()
        if self.is_here:
            self.begin(pairs, asked)

    def begin(self, pairs, asked):
        self.asked = asked
        if asked.messages:
            self.base.set_visibility(not pairs[0][0].tok.config.get('chat_template'))
            self.messages.append(asked.messages[-1])
            with self.talk:
                look.message('You', asked.messages[-1]['content'], 'user')
            self.prompt.set_value('')
            self.answers = [self.answer_in_talk(*pairs[0])]
        else:
            self.shown.clear()
            with self.shown:
                self.answers = [self.answer_on_sheet(asked, number, *pair) for number, pair in enumerate(pairs)]
        self.go.set_visibility(False)
        self.forget.set_visibility(False)
        self.halt.set_visibility(True)
        for answer in self.answers:
            answer.begin()
        self.timer.activate()

    def answer_on_sheet(self, asked, number, served, job):
        with look.sheet(test_id='answer'):
            with ui.element('div').classes('head'):
                look.mark(ui.label(served.id).classes('strong'), 'answer-model')
                label = look.mark(ui.label().classes('muted small figure'), 'answer-state')
            tokens = Tokens(f'Answer {number + 1}, of {served.id}', 'answer-text')
            if asked.prompt and not asked.session and not served.fills_holes:
                tokens.add([dict(t=asked.prompt.removeprefix('<|endoftext|>'))])
        return Answer(served, job, tokens, label)

    def answer_in_talk(self, served, job):
        with self.talk, ui.element('div').classes('message'):
            with ui.element('div').classes('row-of'):
                ui.label(served.id).classes('who')
                label = look.mark(ui.label().classes('muted small figure'), 'answer-state')
            tokens = Tokens(f'Answer of {served.id}', 'answer-text')
        return Answer(served, job, tokens, label)

    def tick(self):
        """Shows what came."""
        going_on = [answer.goes_on() for answer in self.answers]
        if any(going_on):
            return
        self.timer.deactivate()
        self.go.set_visibility(True)
        self.halt.set_visibility(False)
        self.trouble.set_text(next((answer.trouble for answer in self.answers if answer.trouble), ''))
        if self.asked.messages:
            self.messages.append(dict(role='assistant', content=self.answers[0].text.strip()))
            self.forget.set_visibility(self.mode.value == 'chat')
        else:
            is_open = len(self.answers) == 1 and self.answers[0].goes_on_behind
            self.go_on.set_visibility(is_open and not self.trouble.text)
            self.refresh_sessions()

    def come(self):
        self.is_here = True

    def leave(self):
        """The tab was closed, or the browser has gone: nobody waits."""
        self.is_here = False
        self.stop()

    def stop(self):
        """Ends the answers."""
        for answer in self.answers:
            answer.cancel()

    async def take_up(self):
        """Goes on with what was written."""
        is_kept = bool(self.session.value)
        self.prompt.set_value('' if is_kept else self.prompt.value + self.answers[0].text)
        await self.start()

    def begin_anew(self):
        """Forgets the conversation."""
        self.messages = []
        self.talk.clear()
        self.change()
