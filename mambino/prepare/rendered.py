"""Conversations that are written with a template's marks in a text: found, where a whole document is one.

    marks = rendered.Rendered(is_read=True)
    for text, last in marks.passed(pieces): ...    # a conversation is packed, and `last` is TALK
    marks.tell(notes)

    <|im_start|>user
    Is the sky blue?<|im_end|>          ──►  [{'role': 'user', 'content': 'Is the sky blue?'},
    <|im_start|>assistant                     {'role': 'assistant', 'content': 'Yes.'}]
    Yes.<|im_end|>

So its marks become the ids that stand for them, and an answer is learned to end. A document that is
not such messages from its beginning to its end is a text, and the marks in it are ordinary text:
data cannot forge the end of a message. A document may hold several conversations: one begins with
what the system says, behind a mark of the end of a text, and behind an empty line where there are
none within the others.
"""
import re
from collections import Counter
from typing import NamedTuple

from mambino.prepare import conversations
from mambino.prepare.conversations import TALK, normalised, pack

HEAD = 200      # characters that tell whether a document begins as one
MOST = 1 << 24  # characters of a document in which conversations are looked for
MARKS = ('<|im_start|>', '<|im_end|>', '<|start_header_id|>', '<|eot_id|>', '<start_of_turn>', '<end_of_turn>',
         '<|user|>', '<|assistant|>', '[INST]')
MANY = 20       # questions in a conversation, that may be several ones
LONG = ('documents are one conversation each, of more than 20 questions: what the system says, an empty line or '
        '<|endoftext|> tells several in one document apart')
FIRST = ('<|', '<s', '<e', '<b')  # with which they and what stands before them begin: seen sooner
LONGEST_MARK = max(map(len, MARKS))
ROLE = r'[ \t]*([A-Za-z_][\w.-]{0,39})[ \t]*'
ENDS = r'(?:<\|endoftext\|>|<\|end_of_text\|>|</s>|<eos>|<\|begin_of_text\|>|<s>|<bos>)'
END = re.compile(ENDS)
GAP = re.compile(rf'\s*(?:{ENDS}\s*)*')


class Template(NamedTuple):
    """How messages are written."""
    name: str
    begin: re.Pattern  # of a message, with its role
    end: str           # of a message
    marks: tuple       # which no message has in it


TEMPLATES = [
    Template('ChatML', re.compile(rf'<\|im_start\|>{ROLE}\n'), '<|im_end|>', ('<|im_start|>',)),
    Template('Llama 3', re.compile(rf'<\|start_header_id\|>{ROLE}<\|end_header_id\|>\n\n'), '<|eot_id|>',
             ('<|start_header_id|>',)),
    Template('Gemma', re.compile(rf'<start_of_turn>{ROLE}\n'), '<end_of_turn>', ('<start_of_turn>',)),
]


class Rendered:
    """What is found in the documents of a source. is_read: whether to read conversations at all."""

    def __init__(self, is_read):
        self.is_read = is_read
        self.odd = Counter()
        self.found = Counter()  # documents that are conversations, by their template
        self.documents = 0      # of these
        self.talks = 0          # conversations in them
        self.texts = 0          # documents that are none,
        self.marked = 0         # and have marks in them
        self.long = 0           # or are too long to be looked at
        self.tail = ''          # of a document's last piece; None: its marks are counted

    def passed(self, pieces):
        """Yields (text, last) of the pieces of documents, those that are conversations packed."""
        held = []   # of a document that may be a conversation
        size = 0
        is_text = not self.is_read
        is_sure = False  # that it begins as one
        for text, last in pieces:
            if last == TALK:
                self.marked += any(mark in text for mark in MARKS)
                yield text, last
                continue
            if not is_text:
                held.append(text)
                size += len(text)
                if not is_sure and (last or size > HEAD):
                    text = ''.join(held)
                    held = [text]
                    is_sure = may_begin(text)
                    is_text = not is_sure
            if is_text:
                held = []
                self.watch(text, last)
                yield text, last
            elif last or size > MOST:
                yield from self.decide(''.join(held), last)
                held = []
                is_text = True
            if last:
                is_text = not self.is_read
                is_sure = False
                size = 0

    def decide(self, text, last):
        """The same of a document that was held, or of its beginning where it is too long."""
        odd = Counter()
        is_long = len(text) > MOST
        template, talks = (None, []) if is_long else talks_in(text, odd)
        self.long += is_long
        found = [normalised([(who, what, 1) for who, what in turns], odd) for turns in talks]
        found = [messages for messages in found if messages]
        if not found:  # there is no answer in it to be learned
            self.watch(text, last)
            yield text, last
            return
        self.odd += odd
        self.found[template.name] += 1
        self.documents += 1
        self.odd[LONG] += len(talks) == 1 and sum(conversations.role_of(who) == 'user' for who, _ in talks[0]) > MANY
        for messages in found:
            self.marked += any(mark in content for content in conversations.said(messages) for mark in MARKS)
            self.talks += 1
            yield pack(messages), TALK

    def watch(self, text, last):
        """Counts the documents that are texts, and those with marks in them; a document is counted once."""
        if self.tail is not None:
            both = self.tail + text if self.tail else text
            if may_be_marked(both) and any(mark in both for mark in MARKS):
                self.marked += 1
                self.tail = None
        if last:
            self.texts += 1
            self.tail = ''
        elif self.tail is not None:
            self.tail = text[-LONGEST_MARK:]

    def tell(self, notes):
        """What was found, in the notes and facts of the source."""
        if self.found:
            notes.facts['as'] = f'conversations, written in {", ".join(sorted(self.found))}'
            if self.texts:
                notes.append(f'{self.texts:,} documents are texts, beside conversations that are written with marks')
            notes.taken += self.talks - self.documents
        if self.marked:
            why = ', for they are not messages from beginning to end, with an answer' * self.is_read
            notes.append(f'{self.marked:,} documents have marks of a chat in them, as {MARKS[0]} or {MARKS[-1]}, that '
                         f'are ordinary text{why}')
        if self.long:
            notes.append(f'{self.long:,} documents have more than {MOST:,} characters, too many to be read as '
                         'conversations: cut them into several files, or set --document_separator')
        conversations.tell(self.odd, notes)


def may_be_marked(text):
    """Whether one of MARKS may be in a text: one character is looked for fifty times as fast as several."""
    return '<' in text and ('<|' in text or '_of_turn>' in text) or '[' in text and '[INST]' in text


def may_begin(text):
    """Whether a document whose first piece this is may be a conversation."""
    head = text.lstrip()[:HEAD]
    return head.startswith(FIRST) and any(template.begin.match(head, GAP.match(head).end()) for template in TEMPLATES)


def talks_in(text, odd):
    """(template, [[(who, what)] of each conversation]) of a document that is nothing else; else
    (None, [])."""
    start = GAP.match(text).end()
    for template in TEMPLATES:
        if template.begin.match(text, start):
            blocks = blocks_in(text, start, template, odd)
            return template, apart(blocks, odd) if blocks else []
    return None, []


def blocks_in(text, start, template, odd):
    """[(what stands before it, who, what)] of the messages of a text; None where there is anything else."""
    blocks = []
    gap = ''
    while start < len(text):
        begin = template.begin.match(text, start)
        if not begin:
            return None
        end = text.find(template.end, begin.end())
        is_open = end < 0
        content = text[begin.end():] if is_open else text[begin.end():end]
        if any(mark in content for mark in template.marks):
            return None
        if is_open:
            odd['messages without an end were left out'] += bool(content.strip())  # or an answer was waited for
            break
        blocks.append((gap, begin[1], content))
        space = GAP.match(text, end + len(template.end))
        gap = space[0]
        start = space.end()
    return blocks


def apart(blocks, odd):
    """The blocks of a document as conversations, [(who, what)] each."""
    inner = [gap for gap, _, _ in blocks[1:]]
    lines = '\n\n' if any('\n\n' not in gap for gap in inner) else None  # else they mean nothing
    talks = []
    before = None
    for gap, who, what in blocks:
        role = conversations.role_of(who)
        is_new = before is None or role == 'system' and before != 'system' or bool(END.search(gap))
        if is_new or lines and lines in gap and role == 'user' and before == 'assistant':
            talks.append([])
        talks[-1].append((who, what))
        before = role
    return shorter(talks, odd)


def shorter(talks, odd):
    """The same, those that are too long for one piece cut where a question begins."""
    result = []
    for turns in talks:
        part = []
        size = 0
        for who, what in turns:
            more = 2 * len(what) + 100
            if part and size + more > conversations.LONGEST and conversations.role_of(who) == 'user':
                odd['cuts were made in conversations that were too long, where a question begins'] += 1
                result.append(part)
                part = []
                size = 0
            part.append((who, what))
            size += more
        result.append(part)
    return result
