"""The turns of a conversation in a cell of a table, whatever form it has there.

    turns.turns_of([{'role': 'user', 'content': 'Hi'}, {'from': 'gpt', 'value': 'Hello'}])
                                                    # [('user', 'Hi', 1), ('gpt', 'Hello', 1)]
    turns.written(text)                             # the same as JSON, or as Python writes it: a list

    messages               a list of objects, each with who says it and what
    columns of turns       {'role': [one, ...], 'content': [one, ...]}
    speakers               [{'human': 'Hi', 'assistant': 'Hello'}]
    a tree of messages     a turn with its replies, and theirs
    written                'Human: Hi\\n\\nAssistant: Hello'
    taken in turns         ['Hi', 'Hello']: where the column says that these are turns
"""
import ast
import json
import re
import warnings
from collections import Counter

from mambino.prepare import conversations

ROLES = ('role', 'from', 'speaker', 'author', 'sender', 'user')      # who says it,
SAYINGS = ('content', 'value', 'text', 'message', 'utterance', 'parts', 'body')  # and what
# names of turns that are their own role: [{'human': 'Hi', 'assistant': 'Hello'}]
ASKING = ('instruction', 'human', 'user', 'prompt', 'question', 'input', 'query')
ANSWERING = ('assistant', 'bot', 'gpt', 'model', 'response', 'answer', 'output', 'completion')
SPEAKERS = ('system', *ASKING, *ANSWERING)
REPLIES = ('replies', 'children')  # turns below a turn: a tree of messages
CALLS = ('tool_calls', 'function_call')  # what an answer may be instead of a text
THOUGHTS = ('reasoning_content', 'thinking')  # beside an answer
LEARNED = ('train', 'training')  # false: it is read only, as with a weight of 0
LONGEST_WRITTEN = 1 << 22  # characters of a conversation that is written in a text
SPOKEN = re.compile(r'(?:^|\n\n)(Human|Assistant):')  # before each turn of a conversation that is written as a text
DECODER = json.JSONDecoder(strict=False)  # a tab within a string is a tab


def turns_of(value, odd=None):
    """[(who, what, weight)] of a conversation; None for anything else. Of a tree all turns; odd:
    only those on the way down that takes the first reply each time, and what is left out is counted
    there. An answer of weight 0 is not to be learned."""
    if isinstance(value, dict):
        value = [value] if replies_to(value) else turns_in(value)
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(turn, dict) for turn in value):
        return None
    turns = []
    for turn in value:
        more = turns_at(turn, odd)
        if more is None:
            return None
        turns += more
    return turns


def turns_in(value):
    """The turns of a conversation that is written {'role': [one, ...], 'content': [one, ...]}."""
    role = next((value[name] for name in ROLES if isinstance(value.get(name), list)), None)
    said = next((value[name] for name in SAYINGS if isinstance(value.get(name), list)), None)
    if not role or not said or len(role) != len(said) or role is said:
        return []
    return [{'role': who, 'content': what} for who, what in zip(role, said)]


def replies_to(turn):
    """The turns that stand below a turn, in a tree of messages."""
    replies = next((turn[name] for name in REPLIES if turn.get(name)), None)
    are_turns = isinstance(replies, list) and all(isinstance(reply, dict) for reply in replies)
    return replies if are_turns else []


def turns_at(turn, odd):
    """A turn, or one for each of the speakers in it, and its replies; None for no turn."""
    turns = own_turns(turn, odd)
    replies = replies_to(turn)
    if turns is None or not replies:
        return turns
    turns = list(turns)
    if odd is not None:
        odd[conversations.REPLIES] += len(replies) - 1
        replies = [min(replies, key=rank)]
    for reply in replies:
        turns += turns_at(reply, odd) or []
    return turns


def rank(reply):
    """By which the best of several replies comes first, where they have been judged."""
    value = reply.get('rank')
    return value if isinstance(value, (int, float)) and value == value else float('inf')


def own_turns(turn, odd=None):
    """[(who, what, weight)] of one turn, or one for each of the speakers in it; None for no turn.
    What is '' for a turn that says nothing; a call of a tool is none."""
    role = next((turn[name] for name in ROLES if isinstance(turn.get(name), str)), None)
    names = [name for name in SAYINGS if name in turn]
    has_calls = any(turn.get(name) for name in CALLS)
    if odd is not None:
        odd[conversations.CALLS] += has_calls
        odd[conversations.THOUGHTS] += any(bool(turn.get(name)) for name in THOUGHTS)
    is_read_only = turn.get('weight') in (0, '0') or any(turn.get(name) is False for name in LEARNED)
    weight = 0 if is_read_only else 1
    if role is not None and names and turn.get(names[0]) is not role:
        said = content_of(turn[names[0]], odd)
        if said is None:
            is_empty = turn[names[0]] in (None, [], '')
            return [(role, '', weight)] * (not has_calls) if is_empty else None
        return [(role, said, weight)]
    if role is not None and has_calls and not names:
        return []
    spoken = [name for name in turn if name.lower() in SPEAKERS and isinstance(turn[name], str)]
    sides = {name.lower() in ANSWERING for name in spoken if name.lower() != 'system'}
    if len(sides) == 2:  # one asks and one answers, which a model and its response do not
        return [(name, turn[name], weight) for name in spoken]
    return None


def content_of(value, odd=None):
    """What is said in a turn: a text, or the texts among parts of several kinds; None for neither."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = value.get('parts', [value])
    if not isinstance(value, list) or not value:
        return None
    texts = []
    for part in value:
        if isinstance(part, dict):
            if odd is not None:
                odd[conversations.PICTURES] += not part.get('text')
            part = part.get('text') or ''  # an image has none
        if not isinstance(part, str):
            return None
        texts.append(part)
    return '\n'.join(filter(None, texts))


def in_turns(texts):
    """The same of a list of texts that two say in turns, the user first; None for anything else."""
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        return None
    return [('assistant' if i % 2 else 'user', text, 1) for i, text in enumerate(texts)]


def are_texts(value):
    """Whether this is a list of texts, and may be that of who speaks in turns."""
    return isinstance(value, (list, tuple)) and len(value) > 1 and all(isinstance(text, str) for text in value)


def written(text):
    """What a text says that is JSON, or a list as Python writes it, with objects in it: tables in
    csv have conversations so; or that is 'Human: ...' and 'Assistant: ...'. None for any other
    text."""
    if not isinstance(text, str) or len(text) > LONGEST_WRITTEN:
        return None
    text = text.strip()
    if text.startswith('Human:') and '\n\nAssistant:' in text:
        return spoken_in(text)
    if not text.startswith(('[', '{')):
        return None
    for read in DECODER.decode, ast.literal_eval:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of a backslash that Python would write otherwise
                value = read(text)
            return value if isinstance(value, (list, dict)) else None
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return None


def spoken_in(text):
    """The turns of 'Human: Hi\\n\\nAssistant: Hello'; an answer that is still to come is none."""
    _, *parts = SPOKEN.split(text)
    turns = [{'role': who, 'content': what.strip()} for who, what in zip(parts[::2], parts[1::2])]
    return turns if turns[-1]['content'] else turns[:-1]


def look(value):
    """(whether a cell is a conversation, whether it is written as a text, has an answer, a
    question, and known roles alone)."""
    inner = written(value)
    turns = turns_of(value if inner is None else inner, Counter())
    if turns is None:
        return (False,) * 5
    roles = {conversations.role_of(name) for name, content, _ in turns if content.strip()}
    known = all(conversations.is_known(name) for name, *_ in turns)
    return True, inner is not None, 'assistant' in roles, 'user' in roles, known
