"""Rows and texts that are conversations: messages with marks, of which the answers are learned."""
import pytest
from helpers.conversations import SYSTEM, N, chatml, documents_of, pair, prose, said, save, turn
from helpers.readers import write

from mambino.prepare import conversations, rendered
from mambino.prepare.files import Notes, Skip

pytestmark = pytest.mark.usefixtures('no_reader_left')


def by_name(*messages):
    names = {'user': 'Human', 'assistant': 'Assistant'}
    return ''.join(f'\n\n{names[message["role"]]}: {message["content"]}' for message in messages)


ROWS = {  # a row of each shape, and the messages it is
    'messages': lambda i: ({'messages': pair(i)}, pair(i)),
    'with a system': lambda i: ({'id': i, 'messages': said(('system', 'Be good.')) + pair(i)},
                                said(('system', 'Be good.')) + pair(i)),
    'sharegpt': lambda i: ({
        'conversations': [{'from': 'human', 'value': prose(i)}, {'from': 'gpt', 'value': prose(-i)}],
        'system': 'Be good.'}, said(('system', 'Be good.')) + pair(i)),
    'columns of turns': lambda i: ({
        'chat': {'role': ['user', 'assistant'], 'content': [prose(i), prose(-i)]}}, pair(i)),
    'prompt and completion': lambda i: ({'prompt': prose(i), 'completion': prose(-i)}, pair(i)),
    'of messages': lambda i: ({'prompt': pair(i)[:1], 'completion': pair(i)[1:]}, pair(i)),
    'a text and messages': lambda i: ({'prompt': prose(i), 'completion': pair(i)[1:]}, pair(i)),
    'prompt and response': lambda i: ({'system_prompt': 'Be good.', 'prompt': prose(i), 'response': prose(-i)},
                                      said(('system', 'Be good.')) + pair(i)),
    'alpaca': lambda i: ({'instruction': prose(i), 'input': prose(i, 3) if i % 2 else '', 'output': prose(-i)},
                         said(('user', prose(i) + ('\n\n' + prose(i, 3) if i % 2 else '')), ('assistant', prose(-i)))),
    'squad': lambda i: ({'context': prose(i, 40), 'question': prose(i), 'answers': {'text': [prose(-i, 2), 'x']}},
                        said(('user', f'{prose(i, 40)}\n\n{prose(i)}'), ('assistant', prose(-i, 2)))),
    'preferences': lambda i: ({'prompt': prose(i), 'chosen': prose(-i), 'rejected': prose(i, 9)}, pair(i)),
    'preferred messages': lambda i: ({'chosen': pair(i), 'rejected': said(('user', prose(i)), ('assistant', 'No.'))},
                                     pair(i)),
    'preferred to a prompt': lambda i: ({'prompt': pair(i)[:1], 'chosen': pair(i), 'rejected': pair(-i)}, pair(i)),
    'parts': lambda i: ({'messages': [turn(m['role'], [{'type': 'text', 'text': m['content']}]) for m in pair(i)]},
                        pair(i)),
    'speakers': lambda i: ({'conversation': [{'human': prose(i), 'assistant': prose(-i)}]}, pair(i)),
    'a text and an answer to messages': lambda i: ({'prompt': pair(i)[:1], 'response': prose(-i)}, pair(i)),
    'written by name': lambda i: ({'chosen': by_name(*pair(i)), 'rejected': by_name(*pair(-i))}, pair(i)),
    'a prompt by name': lambda i: ({'prompt': by_name(pair(i)[0]) + '\n\nAssistant:', 'response': prose(-i)}, pair(i)),
    'in turns': lambda i: ({'conversations': [prose(i), prose(-i)]}, pair(i)),
    'thoughts': lambda i: ({'question': prose(i), 'reasoning': prose(i, 30), 'answer': str(i)},
                           said(('user', prose(i)), ('assistant', f'{prose(i, 30)}\n\n{i}'))),
}
FLAT = ('prompt and completion', 'prompt and response', 'alpaca', 'preferences', 'thoughts')


FORMATS = {'a.jsonl': 'lines', 'a.json': 'array', 'b.json': 'inside', 'a.csv': 'csv', 'a.tsv': 'csv', 'b.csv': 'python',
           'a.parquet': 'parquet', 'a.arrow': 'arrow', 'a.zip': 'zip', 'rows.txt': 'lines'}


@pytest.mark.parametrize('shape', ROWS)
def test_rows_are_messages_in_every_format(tmp_path, shape):
    made = [ROWS[shape](i) for i in range(1, N + 1)]
    rows, want = [row for row, _ in made], [messages for _, messages in made]
    for name, form in FORMATS.items():
        if shape in ('squad', 'in turns') and form in ('csv', 'python'):
            continue  # an object with a list in it, or a list of texts, is none of csv's
        found, notes, facts = documents_of(save(tmp_path / name, rows, form))
        assert found == want, (name, found[:2])
        assert facts['as'].startswith('conversations'), (name, facts)
        assert notes == [], name


GOOD = [{'messages': pair(i)} for i in range(1, 31)]
CALL = {'role': 'assistant', 'tool_calls': [{'id': 1}]}
REMEDY = ' (--conversations=false takes them as text)'
ODD = {  # rows beside 30 good ones, their documents, the notes
    'no answer': ([{'messages': pair(1)[:1]}], [], ['1 conversations have no answer' + REMEDY]),
    'an empty answer': ([{'messages': [turn('user', 'Hi'), turn('assistant', ' ')]}], [],
                        ['1 turns that say nothing were left out', '1 conversations have no answer' + REMEDY]),
    'a question at the end': ([{'messages': [*pair(1), turn('user', 'And?')]}], [pair(1)],
                              [f'1 {conversations.QUESTION}']),
    'a system alone': ([{'messages': [turn('system', 'Be good.')]}], [], ['1 conversations have no answer' + REMEDY]),
    'other shapes': ([{'messages': [1, 2]}, {'messages': {'a': 1}}, {'messages': None}, {'messages': []}], [],
                     ['2 rows without text in conversation in messages', '2 rows are no conversations']),
    'an unknown role': ([{'messages': [turn('narrator', 'Once'), *pair(1)]}], [[turn('narrator', 'Once'), *pair(1)]],
                        ['1 turns of an unknown role, narrator, are read and not learned']),
    'calls of tools': ([{'messages': [pair(1)[0], {**CALL, 'content': None}, CALL, turn('function', '42'),
                                      pair(1)[1]]}],
                       [[pair(1)[0], turn('tool', '42'), pair(1)[1]]], [f'2 {conversations.CALLS}']),
    'pictures': ([{'messages': [turn('user', [{'type': 'image_url'}, {'type': 'text', 'text': 'What?'}]), pair(1)[1]]}],
                 [[turn('user', 'What?'), pair(1)[1]]], [f'1 {conversations.PICTURES}']),
    'weights': ([{'messages': [*pair(1)[:1], {**turn('assistant', 'Bad'), 'weight': 0}, *pair(2)]}],
                [[*pair(1)[:1], {**turn('assistant', 'Bad'), 'weight': 0}, *pair(2)]], [f'1 {conversations.WEIGHTS}']),
    'not to be trained': ([{'messages': [*pair(1)[:1], {**turn('assistant', 'Bad'), 'train': False}, *pair(2)]}],
                          [[*pair(1)[:1], {**turn('assistant', 'Bad'), 'weight': 0}, *pair(2)]],
                          [f'1 {conversations.WEIGHTS}']),
    'thoughts': ([{'messages': [pair(1)[0], {**pair(1)[1], 'reasoning_content': 'Well.'}]}], [pair(1)],
                 [f'1 {conversations.THOUGHTS}']),
    'too long': ([{'messages': [pair(1)[0], turn('assistant', 'ab ' * 400_000)]}], [],
                 [f'1 {conversations.TOO_LONG}']),
    'marks in it': ([{'messages': [turn('user', 'Say <|im_end|>\n<|im_start|>assistant\nNo'), pair(1)[1]]}],
                    [[turn('user', 'Say <|im_end|>\n<|im_start|>assistant\nNo'), pair(1)[1]]],
                    ['1 documents have marks of a chat in them, as <|im_start|> or [INST], that are ordinary text, for '
                     'they are not messages from beginning to end, with an answer']),
}


@pytest.mark.parametrize('what', ODD)
def test_what_is_odd_is_counted(tmp_path, what):
    rows, want, said_of_them = ODD[what]
    found, notes, _ = documents_of(save(tmp_path / 'a.jsonl', GOOD + rows, 'lines'))
    assert found == [row['messages'] for row in GOOD] + want
    assert sorted(notes) == sorted(said_of_them)


def test_a_file_without_most_answers_is_left_out(tmp_path):
    rows = GOOD[:4] + [{'messages': pair(i)[:1]} for i in range(8)]
    with pytest.raises(Skip, match=r'most of it is lost: 8 conversations have no answer \(--conversations=false'):
        documents_of(save(tmp_path / 'a.jsonl', rows, 'lines'))
    assert len(documents_of(tmp_path / 'a.jsonl', 'text')[0]) == 12
    found, _, facts = documents_of(save(tmp_path / 'a.jsonl', rows[4:], 'lines'))
    assert found[0] == f'user: {prose(0)}' and facts['as'] == 'conversations without answers, as text'


TEXTS = {  # rows that are no conversations
    'asked for': (lambda i: {'question': prose(i), 'answer': prose(-i)}, 'question,answer'),
    'a title': (lambda i: {'title': prose(i, 4), 'text': prose(i, 40)}, ''),
    'languages': (lambda i: {'source': prose(i), 'target': prose(-i)}, ''),
    'people': (lambda i: {'comments': [{'author': 'ann', 'body': prose(i)}, {'author': 'bo', 'body': prose(-i)}]}, ''),
    'as it stands': (lambda i: {'messages': pair(i)}, '*'),
}


@pytest.mark.parametrize('what', TEXTS)
def test_what_stays_a_text(tmp_path, what):
    row, text_column = TEXTS[what]
    path = save(tmp_path / 'a.jsonl', [row(i) for i in range(1, N + 1)], 'lines')
    found, notes, _ = documents_of(path, text_column=text_column)
    assert all(isinstance(text, str) for text in found) and len(found) == N and not notes
    assert found == documents_of(path, '', text_column=text_column)[0]


UNSAID = {  # rows that are read as texts, and what is said of them
    'a message a row': (lambda i: {'role': 'user', 'parent_id': f'a{i}', 'text': prose(i)},
                        'each message a text of its own, without role'),
    'other roles': (lambda i: {'messages': [turn('usuario', prose(i)), turn('asistente', prose(i))]},
                    'conversations of unknown roles, as text'),
    'few answers': (lambda i: {'messages': [turn('narrator', prose(i)), pair(i)[i % 3 // 2]]},
                    'conversations, many of them without answers, as text'),
    'lists': (lambda i: {'id': i, 'data': [prose(i), prose(-i)]},
              'lists as text; --conversations=true has the user and the assistant speak in turns'),
    'a text beside': (lambda i: {'instruction': prose(i), 'output': prose(-i), 'text': prose(i, 30)},
                      'text; instruction + output beside it is left out'),
}


@pytest.mark.parametrize('what', UNSAID)
def test_what_might_be_a_conversation_is_told(tmp_path, what):
    row, reason = UNSAID[what]
    path = save(tmp_path / 'a.jsonl', [row(i) for i in range(1, N + 1)], 'lines')
    found, _, facts = documents_of(path)
    assert isinstance(found[0], str) and facts['as'] == reason
    if what == 'lists':
        assert documents_of(path, 'always')[0][0] == pair(1)


def test_any_columns_are_a_conversation_where_a_person_says_so(tmp_path):
    rows = [{'system': 'Be good.', 'a': prose(i), 'b': prose(-i)} for i in range(N)]
    path = save(tmp_path / 'a.jsonl', rows, 'lines')
    found, _, facts = documents_of(path, 'always', text_column='system,a,b')
    assert found[1] == said(('system', 'Be good.')) + pair(1) and facts['columns'] == 'system + a + b'
    path = save(tmp_path / 'b.jsonl', [{'turns': pair(i)} for i in range(N)], 'lines')
    assert documents_of(path, text_column='turns')[0][1] == pair(1)


def test_a_tree_gives_the_first_reply_or_the_one_ranked_first(tmp_path):
    def row(i):
        replies = [{**turn('assistant', 'Worse'), 'rank': 1}, {**turn('assistant', prose(-i)), 'rank': 0, 'replies': [
            {**turn('prompter', 'And?'), 'replies': [turn('assistant', 'So.'), turn('assistant', 'No.')]}]}]
        return {'prompt': {'role': 'prompter', 'text': prose(i), 'replies': replies}}
    found, notes, _ = documents_of(save(tmp_path / 'a.jsonl', [row(i) for i in range(N)], 'lines'))
    assert found[1] == pair(1) + said(('user', 'And?'), ('assistant', 'So.'))
    assert notes == [f'{2 * N} {conversations.REPLIES}']


def test_a_sheet_of_questions_and_answers(tmp_path):
    pytest.importorskip('python_calamine')
    from helpers.office import make_xlsx
    rows = [['question', 'answer'], *([prose(i), prose(-i)] for i in range(N))]
    path = write(tmp_path / 'a.xlsx', make_xlsx([rows, [['a', 'b'], ['tea', 'bread']]]))
    found, notes, facts = documents_of(path)
    assert found[:-1] == [pair(i) for i in range(N)] and found[-1].split() == ['a', 'b', 'tea', 'bread']
    assert facts['as'] == 'conversations' and not notes


# -----------------------------------------------------------------------------
# Texts with marks

def llama3(*messages):
    return '<|begin_of_text|>' + ''.join(
        f'<|start_header_id|>{m["role"]}<|end_header_id|>\n\n{m["content"]}<|eot_id|>' for m in messages)


def gemma(*messages):
    names = {'assistant': 'model'}
    return '<bos>' + ''.join(
        f'<start_of_turn>{names.get(m["role"], m["role"])}\n{m["content"]}<end_of_turn>\n' for m in messages)


WRITTEN = {  # a text, and the documents it is: None for the text itself
    'chatml': (chatml(*pair(1)), [pair(1)]), 'llama 3': (llama3(*pair(1)), [pair(1)]),
    'gemma': (gemma(*pair(1)), [pair(1)]),
    'other line ends': (chatml(*pair(1)).replace('\n', '\r\n'), [pair(1)]),
    'an end of text': (chatml(*pair(1)) + '<|endoftext|>' + chatml(*pair(2)), [pair(1), pair(2)]),
    'a system each': (chatml(SYSTEM, *pair(1), SYSTEM, *pair(2)), [[SYSTEM, *pair(1)], [SYSTEM, *pair(2)]]),
    'empty lines': (chatml(*pair(1)) + '\n\n' + chatml(*pair(2)), [pair(1), pair(2)]),
    'two questions': (chatml(*pair(1), *pair(2)), [pair(1) + pair(2)]),
    'empty lines everywhere': (
        chatml(*pair(1), *pair(2)).replace('<|im_end|>\n', '<|im_end|>\n\n'), [pair(1) + pair(2)]),
    'an answer is asked for': (
        chatml(*pair(1)) + '<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n', [pair(1)]),
    'a text around': ('Once upon a time.\n' + chatml(*pair(1)), None),
    'a text behind': (chatml(*pair(1)) + 'So.', None),
    'a mark in a message': (chatml(turn('user', 'What is <|im_start|>?'), *pair(1)), None),
    'an end in a message': (chatml(turn('user', 'What is <|im_end|> good for?'), *pair(1)), None),
    'no answer': (chatml(pair(1)[0]), None), 'others': (f'<s>[INST] {prose(1)} [/INST] {prose(2)}</s>', None),
}


@pytest.mark.parametrize('what', WRITTEN)
def test_a_text_that_is_written_as_a_conversation(tmp_path, what):
    text, want = WRITTEN[what]
    found, notes, facts = documents_of(write(tmp_path / 'a.txt', text))
    assert found == (want or [text.replace('\r\n', '\n')])
    assert facts.get('as', '').startswith('conversations, written in') == bool(want)
    assert any('marks of a chat' in note for note in notes) == (not want)
    rows = save(tmp_path / 'a.jsonl', [{'id': 1, 'text': text}] * N, 'lines')
    assert documents_of(rows)[0] == (want or [text.replace('\r\n', '\n')]) * N
    assert documents_of(rows, 'text')[0] == [text.replace('\r\n', '\n')] * N


def test_a_conversation_in_many_pieces(tmp_path, monkeypatch):
    """As a text of megabytes comes: what is found does not hang on where it is cut."""
    text = chatml(SYSTEM, *pair(1)) * 9 + chatml(SYSTEM, *pair(2))
    for n in 1, 7, 100:
        marks = rendered.Rendered(True)
        pieces = [(text[i:i + n], i + n >= len(text)) for i in range(0, len(text), n)]
        found = [conversations.unpack(packed) for packed, last in marks.passed(pieces)]
        assert found == [[SYSTEM, *pair(1)]] * 9 + [[SYSTEM, *pair(2)]]
    monkeypatch.setattr(rendered, 'MOST', 500)
    notes, marks = Notes(), rendered.Rendered(True)
    assert ''.join(text for text, _ in marks.passed([(text[:300], False), (text[300:], True)])) == text
    marks.tell(notes)
    assert any('too many to be read as conversations' in note for note in notes)
