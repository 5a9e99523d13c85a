"""Conversations on their way to the tokens: messages of a role and a content, and no text.

    messages = normalised([('human', 'Hi', 1), ('gpt', 'Hello', 1)], odd)   # None: there is no answer in it
    text = pack(messages)            # on the spool, beside last=TALK; messages = unpack(text)
    as_text(messages)                # 'user: Hi\\n\\nassistant: Hello', for tokenizers without marks

What is odd about them is counted in `odd`, a Counter, and told in the notes of their file.
"""
import json

from mambino.prepare.texts.encodings import clean

TALK = 2           # instead of True beside a text: it is a whole conversation, packed
LONGEST = 1 << 20  # characters of a packed conversation: it is one piece
LONGEST_ROLE = 40  # characters
# what others call a role; a name that is not here stays
NAMES = {
    'user': 'user human prompter instruction prompt question input query',
    'assistant': '''assistant bot chatbot gpt chatgpt model ai response answer output completion function_call
                    tool_call''',
    'system': 'system developer',
    'tool': 'tool function observation ipython tool_response function_response tool_result',
}
ROLE_OF = {name: role for role, names in NAMES.items() for name in names.split()}
# what is odd about a conversation: the first are lost with it, the others are noted
NO_ANSWER = 'conversations have no answer (--conversations=false takes them as text)'
NO_TURNS = 'rows are no conversations'
TOO_LONG = f'conversations are longer than {LONGEST:,} characters'
LOST = (NO_ANSWER, NO_TURNS, TOO_LONG)
SILENT = 'turns that say nothing were left out'
CALLS = 'calls of tools were left out of conversations'
THOUGHTS = 'thoughts beside answers were left out'
REPLIES = 'other replies in trees of messages were left out: of each turn the first one is taken'
QUESTION = 'conversations ended with no answer: what stands behind the last one was left out'
PICTURES = 'parts of messages that are no text, as pictures, were left out'
WEIGHTS = 'answers have a weight of 0, and are read only'


def role_of(name):
    """What a role is called here: 'human' is a user, 'gpt' an assistant. One that is not known
    keeps its name, in which there is nothing but letters, digits and signs between them."""
    words = ''.join(c if c.isalnum() or c in '_.-' else ' ' for c in name).split()
    return ROLE_OF.get(name.strip().lower()) or ' '.join(words)[:LONGEST_ROLE] or 'unknown'


def is_known(name):
    return name.strip().lower() in ROLE_OF


def normalised(turns, odd):
    """[{'role', 'content'}] of (role, content, weight), up to the last answer; None where there is
    no answer, or it is too long. An answer of weight 0 is read only, and has that weight beside its
    content.
    """
    messages = []
    for name, content, weight in turns:
        if not content or content.isspace():
            odd[SILENT] += 1
            continue
        role = role_of(name)
        if not is_known(name):
            odd[f'turns of an unknown role, {role}, are read and not learned'] += 1
        messages.append({'role': role, 'content': clean(content)})
        if role == 'assistant' and weight == 0:
            messages[-1]['weight'] = 0
            odd[WEIGHTS] += 1
    end = len(messages)
    while end and not is_learned(messages[end - 1]):
        end -= 1
    if not end:
        odd[NO_ANSWER] += 1
        return None
    if len(pack(messages[:end])) > LONGEST:
        odd[TOO_LONG] += 1
        return None
    odd[QUESTION] += end < len(messages)
    return messages[:end]


def is_learned(message):
    return message['role'] == 'assistant' and message.get('weight') != 0


def pack(messages):
    """As one text, which has all of it."""
    return json.dumps([list(message.values()) for message in messages], ensure_ascii=False)


def unpack(text):
    return [dict(zip(('role', 'content', 'weight'), values)) for values in json.loads(text)]


def said(messages):
    """What is said in it, a text a message."""
    return [message['content'] for message in messages]


def as_text(messages):
    """As people write it down."""
    return '\n\n'.join(f'{message["role"]}: {message["content"]}' for message in messages)


def without_system(messages):
    """What the system says, put before the first question: for templates that know no system. None
    where it says nothing."""
    if messages[0]['role'] != 'system' or len(messages) < 2 or messages[1]['role'] != 'user':
        return None
    content = f'{messages[0]["content"]}\n\n{messages[1]["content"]}'
    return [{'role': 'user', 'content': content}, *messages[2:]]


def questions_within(messages):
    """[index of a question with an answer before it, and one behind it]: where it can be cut in two."""
    found = []
    is_answered = False
    for i, message in enumerate(messages):
        if is_answered and message['role'] == 'user' and messages[i - 1]['role'] != 'user':
            found.append(i)
        is_answered = is_answered or is_learned(message)
    return found


def tell(odd, notes):
    """Says in the notes of a file what was odd about its conversations."""
    for what, n in odd.items():
        if what in LOST:
            notes.lose(n, what)
        elif n:
            notes.append(f'{n:,} {what}')
