"""Which columns of a table are a conversation, and who speaks in each of them.

    talks.speakers(['question', 'answer'], profile, options)     # [['question', 'user'], ['answer', 'assistant']]
    talks.speakers(['title', 'text'], profile, options)          # []: two texts

    a column of messages, with answers in it                ─┐
    what is asked and what is answered, by their names       ├► conversations, and an answer is learned
    --conversations=true and any --text_column=a,b: the last ┘
    several columns that --text_column names                 ─► a text, as it was asked for
"""
from mambino.configurator import fail
from mambino.prepare.tables import columns
from mambino.prepare.tables.cells import AS_IT_STANDS
from mambino.prepare.tables.looks import trouble
from mambino.prepare.tables.turns import SAYINGS

AUTO, ALWAYS, AS_TEXT = 'auto', 'always', 'text'  # options['conversations']; '' is as text without a word
MODES = {'auto': AUTO, 'true': ALWAYS, '1': ALWAYS, 'false': AS_TEXT, '0': AS_TEXT}  # what a person writes
SYSTEM = ('system', 'system_prompt', 'system_message', 'system_instruction')
# pairs of columns that are no question and answer, though the names would do: a text and what became of it
NO_QUESTIONS = ('source',)
MESSAGES = 'messages'
IN_TURNS = 'in turns'  # lists of texts, which the user and the assistant say in turns
TURNS = ('messages', 'conversations', 'conversation')  # what columns of such lists are called
OF_ONE = ('role', 'speaker', 'sender', 'parent_id')  # columns beside messages that are a row each
IN_TEXT = 'conversations as text'  # what is said of them where they are not to be one


def mode_of(setting, why_no_talks):
    """options['conversations'] for what a person has set, and why the tokenizer cannot have them, or ''."""
    mode = MODES[setting.lower()]
    if mode == ALWAYS and why_no_talks:
        fail(f'conversations={setting}: {why_no_talks}')
    return AS_TEXT if why_no_talks else mode


def speakers(chosen, profile, options):
    """[[column, who speaks there: system, user, assistant, or MESSAGES and IN_TURNS for both]] of
    the columns that are read; [] where they are no conversation, or are not to be one."""
    mode = options.get('conversations')
    if mode not in (AUTO, ALWAYS) or not chosen or chosen == [AS_IT_STANDS]:
        return []
    return in_columns(chosen, profile, bool(options['text_column']), mode)


def in_columns(chosen, profile, is_asked, mode):
    """The same. is_asked: a person has named these columns."""
    names = [name for name in chosen if name in profile]
    with_turns = [name for name in names if is_answered(profile[name])]
    if len(names) == 1 and are_lists(profile[names[0]]) and (mode == ALWAYS or names[0].lower() in TURNS):
        return [[names[0], IN_TURNS]]
    if len(names) < 2 and not with_turns:
        return []
    if with_turns:
        found = [[name, speaker_in(name, profile)] for name in names]
    elif is_asked and mode == AUTO or base_of(names[-2]) in NO_QUESTIONS and mode == AUTO:
        return []
    elif mode == AUTO and not is_pair(names):
        return []
    else:
        found = [[name, speaker_in(name, profile)] for name in names[:-1]] + [[names[-1], 'assistant']]
        if len(names) > 2 and base_of(names[-2]) in columns.REASONED:
            found[-2][1] = 'assistant'
    if with_turns and not is_asked and not any(who == 'system' for _, who in found):
        system = [name for name in profile if name.lower() in SYSTEM and profile[name]['text']]
        found = [[name, 'system'] for name in system[:1]] + found
    return found


def is_answered(column):
    """Whether a column has conversations with answers. Where all speakers are known here, some
    answers will do: rows that have none are lost then, and are told."""
    if not columns.talks(column) or not column['answers']:
        return False
    return column['answers'] > 0.5 * column['talks'] or column['known'] > 0.5 * column['talks']


def is_pair(names):
    """Whether columns that were chosen together are a question and its answer, by their names: only
    these are read together without being asked for."""
    known = {*columns.ASKED, *columns.BEFORE, *columns.REASONED, columns.MORE}
    return base_of(names[-1]) in columns.ANSWERED and all(base_of(name) in known for name in names[:-1])


def base_of(name):
    """A column's name without what columns of texts are called: 'input_text' is an input."""
    name = name.lower()
    if name in (*columns.ASKED, *columns.ANSWERED, *columns.BEFORE, *columns.REASONED, *SYSTEM):
        return name
    ends = [suffix for suffix in columns.SUFFIXES if suffix and name.endswith(suffix)]
    return name.removesuffix(ends[0]) if ends else name


def are_lists(column):
    """Whether a column, of a profile, holds lists of texts."""
    return column['lists'] > 0.9 * column['text']


def speaker_in(name, profile):
    """Who speaks in a column before the answer: both, the system, or the user."""
    if columns.talks(profile[name]):
        return MESSAGES
    return 'system' if base_of(name) in SYSTEM else 'user'


def said_of(chosen, found, profile, options):
    """What is shown of it: {'as': 'conversations'}; or why they are read as a text; {} for other
    texts. found: of speakers."""
    mode = options.get('conversations')
    if found:
        names = [name.lower() for name, _ in found]
        rejected = 'chosen' in names and any(name.lower() == 'rejected' for name in profile)
        in_turns = any(who == IN_TURNS for _, who in found)
        return {'as': 'conversations' + ', of answers those that were chosen' * rejected
                + ', in which the user and the assistant take turns' * in_turns,
                'columns': ' + '.join(columns.shown(name) for name, _ in found)}
    if mode == AS_TEXT and chosen != [AS_IT_STANDS] and in_columns(chosen, profile, bool(options['text_column']), AUTO):
        return {'as': IN_TEXT}
    if mode == AUTO and options['text_column'] and in_columns(chosen, profile, False, AUTO):
        return {'as': 'text; --conversations=true makes questions and answers of it'}
    if mode in (AUTO, ALWAYS) and chosen != [AS_IT_STANDS]:
        reason = why_text([name for name in chosen if name in profile], profile, bool(options['text_column']))
        return {'as': reason} if reason else {}
    return {}


def why_text(names, profile, is_asked):
    """What is said of columns that are read as a text though there may be a conversation; '' for others."""
    talking = [profile[name] for name in names if columns.talks(profile[name])]
    if talking:
        if any(column['answers'] for column in talking):
            return 'conversations, many of them without answers, as text'
        is_known = any(column['known'] for column in talking)
        return 'conversations without answers, as text' if is_known else 'conversations of unknown roles, as text'
    if len(names) != 1 or is_asked:
        return ''
    name = names[0]
    if are_lists(profile[name]) and name.lower() in (*columns.TALKS, 'data'):
        return 'lists as text; --conversations=true has the user and the assistant speak in turns'
    beside = [other for other in profile if other.lower() in OF_ONE]
    if beside and name.lower() in SAYINGS:
        return f'each message a text of its own, without {columns.shown(beside[0])}'
    candidates = {other: column for other, column in profile.items() if column['text'] and not trouble(column)}
    pair = columns.paired(profile, candidates) or []
    return f'text; {columns.form_of(pair, profile)} beside it is left out' if pair and name not in pair else ''
