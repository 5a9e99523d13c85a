"""A conversation at the terminal: what a line means to the model, by its chat template, is read
behind what was read before.

    talk = Conversation(tok, session, system='Be brief.')
    ids = talk.ids_of('Hello!')         # to be read next
    ...                                 # the answer is drawn into the session
    talk.answered()                     # and is one of the messages

Where the template leaves earlier messages as they are, nothing is read twice. Where it writes them
anew, as those do that forget what was thought, all is read anew, which is said once. Where it takes
no system message, that is put before the question, as prepare.py does with a dataset's.
"""
import sys

from mambino import chat
from mambino.prepare.conversations import without_system
from mambino.sample.text import chat_marks, chat_turn


def check_chat(tok):
    """The ids that end an answer. Of a model that was not tuned on conversations that is said; one
    that cannot have any ends the program in a line."""
    if not tok.config.get('chat_template'):
        chat_marks(tok)
        print('note: this model was not tuned on conversations: to it the marks of ChatML mean nothing yet',
              file=sys.stderr)
    return chat.end_ids(tok)


class Conversation:
    """See the top of the file."""

    def __init__(self, tok, session, system=''):
        self.tok = tok
        self.session = session
        self.ends = chat.end_ids(tok)
        # of another day; a session that went on otherwise meanwhile does not tell them
        is_known = session.talk.get('tokens') == len(session.tokens)
        self.messages = session.talk['messages'] if is_known else []
        self.goes_on = len(session.tokens) > 0 and not is_known
        if system and not is_in_force(system, self.messages):
            self.messages = [*self.messages, {'role': 'system', 'content': system}]
        self.is_told = False
        self.said = []                              # messages, and the last line
        self.read = 0                               # tokens of the session before its answer

    def ids_of(self, line):
        """The ids to read before the answer to a line. ValueError says why there are none."""
        said = [*self.messages, {'role': 'user', 'content': line}]
        try:
            ids, is_anew = self.turn(said)
        except ValueError:
            mended = without_system(said[-2:])
            if not mended:
                raise
            said = [*said[:-2], *mended]
            ids, is_anew = self.turn(said)
            print('note: the chat template of this model takes no system message here: it was put before your line',
                  file=sys.stderr)
        if is_anew:
            self.tell()
            self.session.begin_anew()
        ended = self.session.unread and self.session.unread[0] in self.ends     # is taken back, and read with ids
        self.said = said
        self.read = len(self.session.tokens) - bool(ended) + len(ids)
        return ids

    def turn(self, said):
        """(the ids of messages to be read, whether nothing that was read before can stay)"""
        ids = chat_turn(self.tok, said, first=not self.session.tokens)
        if ids is not None:
            return ids, False
        return chat_turn(self.tok, said, first=True), True

    def tell(self):
        """Says once that nothing of the text before can stay."""
        if not self.is_told:
            print('note: the chat template of this model writes earlier messages anew: they are read again each time'
                  + (', without those of another day' if self.goes_on else ''), file=sys.stderr)
            self.is_told = True

    def answered(self):
        """Takes up the last line, and what was drawn for an answer."""
        drawn = self.session.tokens[self.read:].tolist()
        if drawn and drawn[-1] in self.ends:
            drawn.pop()
        text = self.tok.decode(drawn, begins=False).strip()
        self.messages = [*self.said, {'role': chat.ANSWERS, 'content': text}]
        self.session.talk = dict(tokens=len(self.session.tokens), messages=self.messages)


def is_in_force(system, messages):
    """Whether this is the latest that the system says in messages, as one of them or before a question."""
    before_question = f'{system}\n\n'
    told = [message['content'] for message in messages
            if message['role'] == 'system' or message['content'].startswith(before_question)]
    return bool(told) and (told[-1] == system or told[-1].startswith(before_question))
