"""Which columns of a table have the text: by what is in them, and by their names.

    columns.choose(profile)                      # (['text'], ''), or (None, 'no clear text column among: ...')
    columns.wanted(profile, 'Question,answer')   # the same for what a person asks for
    columns.choose_together({'a.jsonl': profile, 'b.jsonl': profile})

    profile of the rows ──► a usual name (text, content, ...), and a text in it?
                            ├► a conversation (messages, conversations, ...)?
                            ├► two that belong together (question and answer, instruction and output)?
                            ├► one that is prose, and three times as much as any other?
                            └► it is not clear: Skip, naming the columns and --text_column

Never ids, URLs, dates, hashes, categories, names of files or JSON, whatever the column is called.
"""
import difflib
import re

from mambino import configurator
from mambino.configurator import split_list
from mambino.prepare.tables import looks
from mambino.prepare.tables.cells import AS_IT_STANDS
from mambino.prepare.tables.looks import is_category, trouble, words_a_row

LONGEST_ROW = 1 << 26  # characters of a line of JSON, which is parsed as a whole
ROWS = 32              # of a table, that are in memory at once: each may be a book
SAMPLE_ROWS = 1000     # so many, at most, tell which column has the text
PROSE = 3              # words a row: less is a name, a label or a title
CLEAR = 3              # so many times the words of any other column, and it is the one

# what people call the column with the text
COLUMNS = 'text content body document article story passage'.split()
# and what they call it where it may also be something else; so do names that end in one of COLUMNS
WEAK = '''code message sentence caption transcript transcription abstract comment review post tweet poem
          lyrics utterance paragraph chapter essay letter selftext fulltext wikitext markdown lines'''.split()
TALKS = 'messages conversations conversation dialog dialogue dialogs dialogues chat turns chosen'.split()
TITLES = 'title name headline heading subject label topic'.split()
# what is asked and what is answered belong together, with what stands BEFORE and with MORE
BEFORE = ['system', 'system_prompt', 'context']
ASKED = ['instruction', 'question', 'problem', 'prompt', 'query', 'input', 'inputs', 'human', 'user', 'source']
MORE = 'input'  # after an instruction
ANSWERED = ['output', 'response', 'completion', 'answer', 'answers.text', 'answers', 'solution', 'chosen',
            'target', 'targets', 'assistant', 'bot', 'reply', 'code', 'rationale', 'reasoning']
REASONED = ['reasoning', 'rationale', 'chain_of_thought', 'complex_cot', 'cot', 'thinking', 'explanation']  # between
CHOICES = {'choices', 'options', 'endings', 'candidates', 'answers'}  # texts in there are parts of a question's
# columns with the answers that there are to choose from, of which the answer is a number or a letter
CHOICE = re.compile('choices(?:[.].*)?|options(?:[.].*)?|endings|(?:(?:choice|option|op|opt)[ _]?)?[abcd1234]')
SUFFIXES = ['', '_text', 'text', '_pretokenized']  # input_text and target_text are input and target
ONLY_WITH = {'source': ['target'], 'human': ['assistant', 'bot'], 'user': ['assistant', 'bot']}


def shown(name):
    """A name as it can be printed: control characters escaped, and cut where it is very long."""
    text = configurator.shown(str(name))
    return text if len(text) <= 40 else text[:37] + '...'


def form_of(columns, profile):
    """What is taken of a row, in words: 'question + answer', 'conversation in messages'."""
    parts = []
    for name in columns:
        is_talk = name in profile and talks(profile[name])
        parts.append(f'conversation in {shown(name)}' if is_talk else shown(name))
    return 'whole rows, as JSON' if columns == [AS_IT_STANDS] else ' + '.join(parts)


def talks(column):
    """Whether a column, of a profile, holds conversations."""
    return column['talks'] > 0.5 * column['text']


# -----------------------------------------------------------------------------
# What a table tells by itself

def choose(profile):
    """(names of the columns to read, '') or (None, why it is not clear, with what to do)."""
    candidates = {}
    for name, column in profile.items():
        if column['text'] and not trouble(column):
            candidates[name] = column
    for choice in usual, talking, paired, usually, empty, clearest:
        columns = choice(profile, candidates)
        if columns:
            return columns, ''
    return None, unclear(profile, candidates)


def usual(profile, candidates):
    """[a column with one of COLUMNS for its name], of several the one with the most words."""
    named = by_rank(candidates, COLUMNS)
    return best_of(named, candidates)


def usually(profile, candidates):
    """The same with a name that often, but not always, is that of the text; only one that other
    columns do not dwarf.
    """
    named = by_rank(candidates, WEAK)
    named += [name for name in candidates if name not in named and ends_as_usual(name)]
    most = max(map(words_a_row, candidates.values()), default=0)
    named = [name for name in named if CLEAR * max(1, words_a_row(candidates[name])) >= most]
    return best_of(named, candidates)


def best_of(named, candidates):
    """[the first of some names with a third of the words that the best one has]; None where it
    holds no more than a word or two, and another column is prose.
    """
    named = [name for name in named if not is_category(candidates[name], 0.02)]
    if not named:
        return None
    most = max(words_a_row(candidates[name]) for name in named)
    first = next(name for name in named if CLEAR * words_a_row(candidates[name]) >= most)
    own = words_a_row(candidates[first])
    others = [words_a_row(column) for name, column in candidates.items() if name not in named]
    is_dwarfed = own < PROSE and max(others, default=0) >= max(PROSE, CLEAR * own)
    return None if is_dwarfed else [first]


def talking(profile, candidates):
    """[the column with the conversations]"""
    for name in by_rank(candidates, TALKS):
        if talks(candidates[name]):
            return [name]
    return None


def paired(profile, candidates):
    """[what belongs to a question, the question, the answer], of names that all end alike."""
    pairs = (paired_by(suffix, profile, candidates) for suffix in SUFFIXES)
    return next(filter(None, pairs), None)


def paired_by(suffix, profile, candidates):
    """The same of the columns whose names end with `suffix`, by what stands before it."""
    ending = [name for name in reversed(profile) if name.lower().endswith(suffix)]
    by_name = {name.lower().removesuffix(suffix): name for name in ending}

    def get(name, also=None):
        """The column that is called so, if it has text, or nothing at all so far; `also`: or if
        that is true of it.
        """
        column = by_name.get(name)
        if column is None:
            return None
        is_empty = not profile[column]['text'] and not profile[column]['other']
        return column if column in candidates or is_empty or also and also(column) else None

    def is_short_answer(name):
        """Whether an answer is a number, a year or a word, by its column of the profile."""
        return trouble(profile[name]) in ('', 'numbers', 'dates', 'codes') and name.lower() != 'code'

    def is_choice(name):
        """Whether an answer is the number or the letter of one of those in other columns."""
        of_one = max(profile[name]['width'] or [0]) == 1
        return (of_one or trouble(profile[name]) == 'numbers') and any(map(CHOICE.fullmatch, by_name))

    for asked in filter(get, ASKED):
        answers = [name for name in ANSWERED if get(name, is_short_answer) and name in ONLY_WITH.get(asked, ANSWERED)]
        answers = [name for name in answers if not is_choice(get(name, is_short_answer))]
        if not answers or get(asked) not in candidates:
            continue
        ask = get(asked)
        answer = get(answers[0], is_short_answer)
        words = [words_a_row(profile[name]) for name in (ask, answer)]
        if sum(words) < PROSE or asked == 'source' and min(words) < PROSE:
            continue  # and a source may say where a text is from
        has_both = profile[answer]['asks'] > 0.5 * profile[answer]['talks'] or not profile[answer]['answers']
        if talks(profile[answer]) and not talks(profile[ask]) and has_both:
            return [answer]  # a conversation begins with what was asked
        before = [get(name) for name in BEFORE if get(name)][:2]
        more = [get(MORE)] if asked == 'instruction' and get(MORE) else []
        reasons = [get(name) for name in REASONED if get(name) in candidates][:1]
        return list(dict.fromkeys([*before, ask, *more, *reasons, answer]))
    return None


def empty(profile, candidates):
    """[a column with one of COLUMNS for its name that has nothing in it]: this table has no text
    yet, rather than one elsewhere.
    """
    named = by_rank(profile, COLUMNS)
    return next(([name] for name in named if not profile[name]['text'] and not profile[name]['other']), None)


def clearest(profile, candidates):
    """[the one column of prose], or the only column there is."""
    amounts = sorted(((words_a_row(column), name) for name, column in candidates.items()), reverse=True)
    if not amounts:
        return None
    words, name = amounts[0]
    if len(profile) == 1:
        return [name]
    is_unread = any(trouble(column).startswith('objects') for column in profile.values())
    if name.lower() in TITLES and is_unread:
        return None  # of what is in there, probably
    if question(candidates, name):
        return None  # it may be the answer, or may not
    second = max((more for more, other in amounts[1:] if other.lower() not in TITLES), default=0)
    is_prose = words >= PROSE and not is_category(candidates[name])
    return [name] if is_prose and words >= CLEAR * second else None


def question(candidates, answer):
    """The column, if there is one, of questions in words that another one may answer."""
    names = [name for name in by_rank(candidates, ASKED) if name.lower() not in ONLY_WITH]
    names = [name for name in names if words_a_row(candidates[name]) >= PROSE and not is_category(candidates[name])]
    return next((name for name in names if name != answer), None) if answer not in names else None


def by_rank(candidates, names):
    """The candidates with one of these names, in the order of the names."""
    by_name = {}
    for name in candidates:
        by_name.setdefault(name.lower(), name)
    return [by_name[name] for name in names if name in by_name]


def ends_as_usual(name):
    """Whether the last word of a name is one of COLUMNS: review_text, pageContent, meta.body; and
    it is not the text of a choice.
    """
    words = [word.lower() for word in re.findall(r'[A-Z]?[a-z]+|[A-Z]+', name)]
    return bool(words) and words[-1] in COLUMNS and not CHOICES & {*words[:-1]}


def names_of(profile, most=8):
    """The names of the columns, as a list in words."""
    dots = ', ...' if len(profile) > most else ''
    return ', '.join(map(shown, list(profile)[:most])) + dots


def unclear(profile, candidates):
    """The reason that there is no clear column, and the remedy."""
    among = f'no clear text column among: {names_of(profile)}'
    best = max(candidates, key=lambda name: words_a_row(candidates[name]), default=None)
    held = {name: trouble(column) for name, column in profile.items()}
    held |= {name: f'objects of {{{", ".join(parts[:4])}}}' for name, parts in inner_names(profile).items()}
    odd = [name for name in by_rank(held, [*TALKS, *COLUMNS, *WEAK]) if held[name]]
    is_likely = best and (words_a_row(candidates[best]) >= 2 or not odd)
    if is_likely:
        asked = question(candidates, best)
        likely = f'{shown(asked)},{shown(best)}' if asked else shown(best)
        return f'{among}; say which with --text_column={likely}'
    odd += [name for name, what in held.items() if what.startswith(('lists', 'objects', 'JSON', 'single', 'bytes'))]
    odd += [name for name, what in held.items() if what]
    if not odd:
        return among
    what = held[odd[0]]
    if what == 'lists of numbers' and re.search('id|token', odd[0].lower()):
        what = 'token ids'
    return f'{among}: {shown(odd[0])} holds {what}, not text'


def inner_names(profile):
    """{the name of an object, as it stands before a dot: [names of what is in it]}, without texts."""
    inside = {}
    for name, column in profile.items():
        outer, dot, inner = name.partition('.')
        if dot and outer not in profile and not column['text']:
            inside.setdefault(outer, []).append(shown(inner))
    return inside


# -----------------------------------------------------------------------------
# What a person asks for

def wanted(profile, setting):
    """(names of the columns that --text_column=... names, '') or (None, why not). A column of
    exactly that name comes first, then several with commas between them; small and capital letters
    may differ.
    """
    if setting == AS_IT_STANDS:
        return [setting], ''
    whole = find_column(profile, setting)
    names = [setting] if whole else [name.strip() for name in split_list(setting, ',')]
    columns = []
    for name in names:
        column = whole or find_column(profile, name)
        if not column:
            return None, missing(profile, name)
        columns.append(column)
    for name in columns:
        column = profile[name]
        what = trouble(column)
        if not column['text'] and column['other'] and (what != 'numbers' or len(columns) == 1):
            return None, f'{shown(name)} holds {what}, not text'
    return columns, ''


def find_column(profile, name):
    """The column that is meant, or None."""
    if name in profile:
        return name
    near = [column for column in profile if column.lower() == name.lower()]
    return near[0] if len(near) == 1 else None


def missing(profile, name):
    """Why a column that was asked for cannot be had, with what is there instead."""
    inside = [column for column in profile if column.startswith(name + '.')]
    if inside:
        return f'{shown(name)} holds {names_of(dict.fromkeys(inside))}; say which with --text_column={shown(inside[0])}'
    by_lower_case = {column.lower(): column for column in profile}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    hint = f', did you mean {shown(by_lower_case[near[0]])}?' if near else ''
    return f'no column {shown(name)} among: {names_of(profile)}{hint}'


def add_all(profiles):
    """The profiles of several files as one."""
    total = {}
    for profile in profiles:
        looks.add(total, profile)
    return total


# -----------------------------------------------------------------------------
# The files of a folder

def choose_together(profiles):
    """{key: (columns, why not)} for the profiles of files that lie together, {key: profile}: the
    best columns of them all, for those that have them; then those of the files that are left.
    """
    choices = {}
    left = dict(profiles)
    while left:
        columns, _ = choose(add_all(left.values()))
        fitting = [key for key, profile in left.items() if columns and has_columns(profile, columns)]
        if not fitting:
            break
        for key in fitting:
            choices[key] = columns, ''
            del left[key]
    by_names = {}
    for key, profile in left.items():
        by_names.setdefault(tuple(sorted(profile)), []).append(key)
    for keys in by_names.values():  # those of one kind, at least
        columns, why = choose(add_all(left[key] for key in keys))
        for key in keys:
            is_like_them = columns is None or has_columns(left[key], columns)
            choices[key] = (columns, why) if is_like_them else choose(left[key])
    return choices


def has_columns(profile, columns):
    """Whether a file has these columns, with text in them or nothing at all."""
    return all(name in profile and not trouble(profile[name]) for name in columns)


def are_usual(columns):
    """Whether these have names that say they are the text."""
    usual_names = {*COLUMNS, *WEAK, *TALKS, *BEFORE, *ASKED, *ANSWERED}
    return all(name.lower() in usual_names or ends_as_usual(name) for name in columns)


def is_rich(profile, columns, words=8):
    """Whether there are so many words a row in these columns."""
    return sum(words_a_row(profile[name]) for name in columns if name in profile) >= words
