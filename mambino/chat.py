"""A conversation as token ids: what a model reads, and what it learns to say.

    messages = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    ids = encode_chat(tok, messages)                # (N,) int32; −1 − id: read, and not to be learned
    ids = encode_prompt_of(tok, messages)           # … and the beginning of the next answer

    messages ──► template (ChatML, or the tokenizer's own) ──► text, marks ──► ids

A template is Jinja, as transformers has it, and the ids are those that its apply_chat_template
gives. Only the marks that the template writes become mark ids: a mark written in a message is
ordinary text.

Learned are the answers, messages of the role assistant, each with the mark that ends it and nothing
behind that. Where an answer begins and ends is what the template says by {% generation %}, else
what comes to the text when the conversation grows by that answer. A template may write earlier
messages anew when there are later ones; an answer of which that is not the same text is read, not
learned.
"""
import functools
import json
import os
import re
from typing import NamedTuple

import numpy as np

from mambino.tokenizer import CHAT, open_hf
from mambino.tokenizer_config import BEGIN, END, NAMES, NONCE
from mambino.tokenizer_json import completed, without_training

CHATML = ("{% for message in messages %}"
          "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
          "{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
ANSWERS = 'assistant'       # the role that is learned
# around a mark in a message while the template is at work, and before its name in the text then
FORGED, FORGED_END, MARK = f'\ufdd0{NONCE}', f'\ufdd1{NONCE}', f'\ufdd4{NONCE}'
PROBE = [{'role': 'user', 'content': 'What is it?'}, {'role': ANSWERS, 'content': 'A conversation.'},
         {'role': 'user', 'content': 'And now?'}, {'role': ANSWERS, 'content': 'Now it ends.'}]


# --- what others call -----------------------------------------------------------------------------

def encode_chat(tok, messages, tools=None):
    """(N,) int32 ids of a whole conversation. The answers, each with the mark that ends it, are
    learned; all else is stored as −1 − id. ValueError says what this tokenizer or its template
    cannot do with it.

    messages: dicts with a role and a content: a text, None for none, or a list of parts, {'type':
    'text', 'text': …}; what else they have, as tool_calls, the template gets. tools: for it too.
    With no answer at the end, what comes behind the last is read alone; with none at all everything
    is."""
    messages = plain(tok, messages)
    if getattr(tok, 'fast', None) and template_of(tok) == CHATML:
        return in_chatml(tok, messages)
    chat = written(tok, messages, False, tools)
    learned = chat.answers or spans_of_answers(tok, messages, tools, chat)
    ids, offsets = encoded(tok, chat.text)
    starts, ends = offsets[:, 0], offsets[:, 1]
    is_learned = np.zeros(len(ids), bool)
    for start, end in learned:
        is_learned |= (starts < end) & (ends > start)
    return np.where(is_learned, ids, -1 - ids).astype(np.int32)


def in_chatml(tok, messages):
    """The same of plain messages in ChatML, twenty times as fast: what stands between two marks is
    encoded by itself, so a tokenizer that gives the library's ids gives them here."""
    begin, end = (marks_in(tok.text, CHATML)[name] for name in CHAT)
    parts = []
    for message in messages:
        header = f'{message["role"]}\n'
        ids = tok.encode(header + message['content'])
        is_learned = np.zeros(len(ids) + 3, bool)   # with both marks and the line end
        if message['role'] == ANSWERS:
            ends = np.cumsum([len(tok.table[i]) for i in ids.tolist()])
            is_learned[1:-2] = ends > len(header.encode('utf-8'))
            is_learned[-2] = True
        ids = np.concatenate([[begin], ids, [end], tok.encode('\n')])
        parts.append(np.where(is_learned, ids, -1 - ids))
    return np.concatenate(parts).astype(np.int32)


def encode_prompt_of(tok, messages, tools=None):
    """list of ids of a conversation that waits for an answer, the beginning of that included."""
    chat = written(tok, plain(tok, messages), True, tools)
    return encoded(tok, chat.text)[0].tolist()


def encode_turn(tok, messages):
    """list of ids that come behind the last answer in messages, of which the last waits for one:
    the mark that ends that answer, what comes then, and the beginning of the next answer. None
    where the template writes anew what stands before."""
    messages = plain(tok, messages)
    last = max(i for i, message in enumerate(messages) if message['role'] == ANSWERS)
    asked = written(tok, messages[:last], True).text
    whole = written(tok, messages, True)
    answer = messages[last]['content'].strip()
    at = whole.text.find(answer, len(asked))
    if not whole.text.startswith(asked) or at < 0 or whole.text[len(asked):at].strip():
        return None
    start = at + len(answer)
    mark = next((begin for begin, _ in whole.marks if begin >= start), start)
    if not whole.text[start:mark].strip():
        start = mark
    ids, offsets = encoded(tok, whole.text)
    return ids[offsets[:, 1] > start].tolist()


def visible(ids):
    """The ids as a model reads them: of those that are not to be learned, too."""
    return np.where(ids < 0, ~ids, ids)             # ~i is −1 − i, of unsigned ones too


def template_of(tok):
    """The Jinja template of a tokenizer's conversations: its own; else ChatML, where it has the
    marks. ValueError says what to do where there is none."""
    own = tok.config.get('chat_template')
    if own:
        return own
    if not {*CHAT} <= marks_in(tok.text, '').keys():
        begins = f"this {tok.kind} tokenizer has no chat template, nor {' and '.join(CHAT)}, the marks of ChatML"
        raise ValueError(f'{begins}; train one that has them: python prepare.py your/files --tokenizer=bpe')
    return ('{{ bos_token }}' if tok.bos else '') + CHATML


def end_ids(tok):
    """list of the ids that end an answer: the mark of the template, if it has one, end-of-text, and
    what else the tokenizer's maker says."""
    try:
        ids = encode_chat(tok, PROBE)
    except ValueError:
        ids = np.zeros(0, np.int32)
    learned = ids[ids >= 0]
    last = [int(learned[-1])] if len(learned) and int(learned[-1]) in marks_of(tok).values() else []
    others = [i for i in tok.config.get('eos_token_id', ()) if i < tok.vocab_size]
    return list(dict.fromkeys([*last, tok.eot, *others]))


def trouble(tok):
    """list of lines on what conversations lose by the template of this tokenizer, or may surprise
    by; [] for most. ValueError as template_of."""
    template = template_of(tok)
    lines = []
    if 'strftime_now' in template:
        lines.append('its chat template writes the date of today into conversations')
    try:
        messages = plain(tok, PROBE)
        chat = written(tok, messages, False)
        answers = chat.answers or spans_of_answers(tok, messages, None, chat)
    except ValueError as error:
        return [*lines, str(error)]
    if len(answers) < 2:
        lines.append('its chat template writes earlier messages anew when there are later ones: of a conversation only '
                     'what stays, the last answer, is learned' if answers else
                     'its chat template shows no place where an answer stands: nothing is learned')
    asks = written(tok, messages[:1], True).text != written(tok, messages[:1], False).text
    if not asks and any(start == begin for start, _ in answers for begin, _ in chat.marks):
        lines.append('its chat template does not ask for an answer: what it writes before one is learned with it, and '
                     'a model will write it')
    ids, _ = encoded(tok, chat.text)
    if answers and not {*end_ids(tok)} & {*ids[-4:].tolist()}:
        lines.append('its chat template has no mark that ends an answer: a model will not know where to stop')
    prompt = encode_prompt_of(tok, PROBE[:-1])
    wholes = [encode_chat(tok, [*PROBE[:-1], {'role': ANSWERS, 'content': word}]) for word in ('the', 'I', 'Now', '1')]
    if answers and any(visible(ids)[:len(prompt)].tolist() != prompt for ids in wholes):
        lines.append('its chat template begins an answer otherwise than it asks for one, or in the middle of a token')
    return lines


# --- messages -------------------------------------------------------------------------------------

def plain(tok, messages):
    """Messages as a template takes them: each with a role, and a text for content."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError('a conversation without messages')
    result = []
    for message in messages:
        role = message.get('role') if isinstance(message, dict) else None
        if not isinstance(role, str) or not role:
            raise ValueError(f'a message without a role: {str(message)[:60]!r}')
        rest = {key: value for key, value in message.items() if value is not None and key != 'content'}
        if rest.get('tool_calls') and tok.config.get('chat_template', CHATML) == CHATML:
            raise ValueError('a message calls tools, and ChatML has no place for that')
        content = message.get('content')
        if content is not None or not rest.get('tool_calls'):
            rest['content'] = text_of(content)
        result.append(rest)
    try:
        return json.loads(json.dumps(result))       # a template gets plain values, and its own
    except RecursionError:
        raise ValueError('a message that nests too deep') from None


def text_of(content):
    """The text of a message's content."""
    if content is None:
        return ''
    if isinstance(content, str):
        return content.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')    # no half characters
    if not isinstance(content, list):
        raise ValueError(f'the content of a message is a {type(content).__name__}, no text')
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get('text') if isinstance(part, dict) else None
        if not isinstance(text, str) or isinstance(part, dict) and part.get('type', 'text') != 'text':
            kind = part.get('type') if isinstance(part, dict) else type(part).__name__
            raise ValueError(f'a message with a part that is no text, but {str(kind)[:40]!r}')
        texts.append(text_of(text))
    return ''.join(texts)


# --- text with marks ------------------------------------------------------------------------------

class Written(NamedTuple):
    """A conversation as its template writes it. Positions are of the text."""
    text: str               # every mark of the template under its secret name
    marks: list             # (start, end) of each mark
    answers: list           # (start, end) of what the template says are answers, with the marks that end them


def marks_of(tok):
    """{name: id} of what no message may forge: special tokens, and others that the template writes."""
    return marks_in(tok.text, template_of(tok))


@functools.lru_cache(maxsize=8)
def marks_in(text, template):
    """As marks_of, of a tokenizer.json and a template."""
    added = json.loads(text).get('added_tokens') or []
    return {token['content']: token['id'] for token in added
            if token.get('special') or token['content'] in template and not token['content'].isspace()}


def written(tok, messages, asks, tools=None):
    """The Written of plain messages. asks: whether an answer is to follow."""
    template = template_of(tok)
    from mambino.templates import render  # Jinja takes a while to import, and ChatML does without
    marks = marks_in(tok.text, template)
    pattern = one_of(marks)

    def guarded(value):
        if isinstance(value, str):
            return pattern.sub(lambda match: FORGED + match[0] + FORGED_END, value)
        if isinstance(value, dict):
            return {key: guarded(part) for key, part in value.items()}
        return [guarded(part) for part in value] if isinstance(value, list) else value

    variables = {**names_of(tok), 'messages': guarded(messages), 'tools': guarded(tools), 'documents': None,
                 'add_generation_prompt': asks}
    return taken_apart(render(template, variables), marks)


def names_of(tok):
    """{'bos_token': its name, …} as a template has them."""
    names = {key: name for key, name in tok.config.items() if key in NAMES}
    if tok.bos:
        names.setdefault('bos_token', tok.name_of(tok.bos[0]))
    names.setdefault('eos_token', tok.name_of(tok.eot))
    return names


@functools.lru_cache(maxsize=8)
def pattern_of(names):
    """A pattern that matches one of these names, of several the longest; nothing where there are none."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile('|'.join(map(re.escape, longest_first)) or '(?!)')


def one_of(marks):
    return pattern_of(tuple(marks))


def taken_apart(text, marks):
    """The Written of a rendered text: what is around a forged mark goes, and so do the signs of
    where answers are."""
    signs = '|'.join((BEGIN, END, FORGED, FORGED_END))
    names = one_of(marks).pattern
    parts = []
    spans, at_marks = [], []
    at = length = 0
    begun = None
    for match in re.finditer(f'{FORGED}({names}){FORGED_END}|({signs})|({names})', text):
        forged, sign, mark = match.groups()
        before = text[at:match.start()]
        at = match.end()
        new = forged or (MARK + mark if mark else '')
        parts += [before, new]
        length += len(before)
        if sign == BEGIN:
            begun = length
        elif sign == END and begun is not None:
            spans.append((begun, length))
        elif mark:
            at_marks.append((length, length + len(new)))
        length += len(new)
    parts.append(text[at:])
    text = ''.join(parts)
    return Written(text, at_marks, [(start, end_of(text, at_marks, start, end)) for start, end in spans])


def end_of(text, marks, start, end):
    """Where an answer in a part of a text ends: behind its last mark, if there is but white space
    behind that; or with the mark that follows at once."""
    inside = [mark for mark in marks if start < mark[1] <= end]
    if inside and not text[inside[-1][1]:end].strip():
        return inside[-1][1]
    return next((mark[1] for mark in marks if mark[0] == end), end)


def spans_of_answers(tok, messages, tools, chat):
    """[(start, end)] of the answers in a Written conversation, of those that are certain: what an
    answer adds to the text stands there, too, when more has come."""
    spans = []
    for i, message in enumerate(messages):
        if message['role'] != ANSWERS:
            continue
        try:
            whole = written(tok, messages[:i + 1], False, tools) if i + 1 < len(messages) else chat
            asked = text_before(tok, messages[:i], tools)
        except ValueError:          # a conversation that ends there is none to it
            continue
        start = len(asked) if whole.text.startswith(asked) else len(os.path.commonprefix((asked, whole.text)))
        end = end_behind(whole, start, message.get('content', ''))
        if end > start and chat.text[:end] == whole.text[:end]:
            spans.append((start, end))
    return spans


def text_before(tok, messages, tools):
    """The text of messages that wait for an answer; '' if there are none and the template wants some."""
    try:
        return written(tok, messages, True, tools).text
    except ValueError:
        if messages:
            raise
        return ''


def end_behind(whole, start, content):
    """Where the answer ends that a Written conversation ends with, and that begins at `start`: with
    the first mark behind its content; without one, with its content."""
    content = content.strip()
    at = whole.text.rfind(content, start)
    behind = at + len(content) if at >= 0 and content else start
    marks = [end for begin, end in whole.marks if begin >= behind]
    if marks:
        return marks[0] if at >= 0 else marks[-1]
    return len(whole.text.rstrip()) if at < 0 else behind


# --- text to ids ----------------------------------------------------------------------------------

def encoded(tok, text):
    """(N,) ids of a Written text, (N, 2) where each begins and ends in it."""
    names = tuple(marks_of(tok))
    encoding = encoder_of(tok.text, names).encode(text, add_special_tokens=False)
    return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)


@functools.lru_cache(maxsize=4)
def encoder_of(text, names):
    """Hugging Face's tokenizer of a tokenizer.json, for which the tokens of these names have secret
    ones: under their own they are text."""
    spec = without_training(completed(json.loads(text)))
    model = spec['model']
    vocab = model.get('vocab')

    def secret(name):
        return MARK + name if name in names else name

    if isinstance(vocab, list):         # of a Unigram, with scores
        vocab = [[secret(name), score] for name, score in vocab]
    else:
        vocab = {secret(name): i for name, i in vocab.items()}
    model = {**model, 'vocab': vocab}
    if model.get('unk_token'):
        model['unk_token'] = secret(model['unk_token'])
    added = [{**token, 'content': secret(token['content'])} for token in spec['added_tokens']]
    hf = open_hf(json.dumps({**spec, 'model': model, 'added_tokens': added, 'post_processor': None}))
    hf.encode_special_tokens = False    # they are found, which nobody else can name
    ids = {token['content']: token['id'] for token in added}
    if any(hf.token_to_id(MARK + name) != ids[MARK + name] for name in names):
        raise ValueError('its marks are words of its vocabulary, too, so that they cannot be told from text')
    return hf
