"""columns.py, looks.py, cells.py and survey.py: which columns of a table have the text, and in what form."""
import base64
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.readers import OPTIONS, read, reason, write

from mambino.prepare import isolate, survey
from mambino.prepare.files import Notes, Skip
from mambino.prepare.sources import Source
from mambino.prepare.tables import columns, looks

N = 60
WORDS = 'the baker has bread and tea for every guest who walks along the river in spring rain'.split()


pytestmark = pytest.mark.usefixtures('no_reader_left')


def prose(i, words=12):
    rng = random.Random(f'{i} {words}')
    return f'Nr {i}: ' + ' '.join(rng.choices(WORDS, k=words)) + '.'


def turn(role, text):
    return {'role': role, 'content': text}


def table(row):
    """N rows; row: a function of their number."""
    return [row(i) for i in range(N)]


def chosen(rows):
    """'question + answer', or why there is no clear column."""
    profile = looks.profile_of(rows)
    names, why = columns.choose(profile)
    return columns.form_of(names, profile) if names else why


ASK = 'no clear text column among: '
TABLES = {
    'text': ('text', lambda i: {
        'id': f'a-{i}', 'url': f'https://example.org/{i}', 'title': prose(i, 4), 'text': prose(i, 40)}),
    'capital': ('Content', lambda i: {'Content': prose(i)}),
    'another name': ('story_en', lambda i: {'id': f'{i}', 'story_en': prose(i)}),
    'chinese': ('zh', lambda i: {'id': f'zh-{i}', 'zh': f'今天天气很好我们去公园散步{i}'}),
    'the longest by far': ('review_body', lambda i: {
        'product_title': prose(i, 5), 'review_headline': prose(i, 3), 'review_body': prose(i, 60)}),
    'a title is no rival': ('blurb', lambda i: {'title': prose(i, 5), 'blurb': prose(i, 9)}),
    'two alike': (ASK + 'left, right; say which with --text_column=left', lambda i: {
        'left': prose(i), 'right': prose(i)}),
    'languages': (ASK + 'pair.en, pair.de; say which with --text_column=pair.en', lambda i: {
        'pair': {'en': prose(i), 'de': prose(-i)}}),
    'codes': ('description', lambda i: {'code': f'AB{i:06}', 'description': prose(i, 30)}),
    'category': ('transcript', lambda i: {'content': 'text/html', 'transcript': prose(i, 80)}),
    'kind of car': ('notes', lambda i: {'body': ['sedan', 'suv'][i % 2], 'notes': prose(i)}),
    'a word': ('meaning', lambda i: {'text': WORDS[i % 9], 'meaning': prose(i)}),
    'paths': (ASK + 'text, n: text holds file names, not text', lambda i: {'text': f'texts/{i}.txt', 'n': i}),
    'numbers': (ASK + 'article: article holds numbers, not text', lambda i: {'article': f'{i:08}'}),
    'urls': (ASK + 'content: content holds URLs, not text', lambda i: {'content': f'https://example.org/{i}'}),
    'dates': (ASK + 'date: date holds dates, not text', lambda i: {'date': f'2020-01-{i % 28 + 1:02}'}),
    'hashes': (ASK + 'sha, n: sha holds hashes, not text', lambda i: {
        'sha': random.Random(i).randbytes(32).hex(), 'n': i}),
    'base64': (ASK + 'body: body holds base64, not text', lambda i: {
        'body': base64.b64encode(random.Random(i).randbytes(90)).decode()}),
    'json': (ASK + 'body: body holds JSON, not text', lambda i: {'body': json.dumps({'a': prose(i)})}),
    'token ids': (ASK + 'source, input_ids: input_ids holds token ids, not text', lambda i: {
        'source': f'web-{i}', 'input_ids': [i, 5, 7]}),
    'tokens': (ASK + 'tokens: tokens holds single words, not text', lambda i: {'tokens': prose(i).split()}),
    'nothing yet': ('text', lambda i: {'title': prose(i, 4), 'text': None}),
    'first rows are others': ('text', lambda i: {'meta': {'n': i}} if i < N // 2 else {'text': prose(i)}),
    'within': ('_source.text', lambda i: {'_id': i, '_source': {'title': prose(i, 3), 'text': prose(i)}}),
    'pages': ('pages.text', lambda i: {
        'file': f'{i}.pdf', 'pages': [{'n': 1, 'text': prose(i)}, {'n': 2, 'text': prose(-i)}]}),
    'not understood': (ASK + 'id, turns.a, turns.b: turns holds objects of {a, b}, not text', lambda i: {
        'id': f'c-{i}', 'turns': [{'a': i, 'b': [i]}]}),
    'objects by keys': (ASK + 'title, mapping; say which with --text_column=title', lambda i: {
        'title': prose(i, 4), 'mapping': {f'{i}-{k}': {'message': prose(k)} for k in range(3)}}),
    'messages': ('conversation in messages', lambda i: {
        'prompt': prose(i), 'messages': [turn('user', prose(i)), turn('assistant', prose(-i))]}),
    'sharegpt': ('conversation in conversations', lambda i: {
        'id': f'c-{i}', 'conversations': [{'from': 'human', 'value': prose(i)}, {'from': 'gpt', 'value': prose(-i)}]}),
    'columns of turns': ('conversation in dialog', lambda i: {
        'dialog': {'speaker': ['a', 'b'], 'text': [prose(i), prose(-i)]}}),
    'qa': ('question + answer', lambda i: {'id': f'q{i}', 'question': prose(i), 'answer': prose(-i)}),
    'short answers': ('question + answer', lambda i: {'question': prose(i), 'answer': str(i)}),
    'squad': ('context + question + answers.text', lambda i: {
        'title': 'Bread', 'context': prose(i, 60), 'question': prose(i),
        'answers': {'text': [prose(i, 2)], 'answer_start': [3]}}),
    'thoughts': ('question + reasoning + answer', lambda i: {
        'question': prose(i), 'answer': str(i), 'reasoning': prose(i, 60)}),
    'alpaca': ('instruction + input + output', lambda i: {'instruction': prose(i), 'input': '', 'output': prose(-i)}),
    'orca': ('system_prompt + question + response', lambda i: {
        'id': f't0.{i}', 'system_prompt': 'You are good.', 'question': prose(i), 'response': prose(-i)}),
    'completion': ('prompt + completion', lambda i: {'prompt': prose(i), 'completion': prose(-i)}),
    'preferences': ('prompt + chosen', lambda i: {
        'prompt': prose(i), 'chosen': prose(i, 20), 'rejected': prose(i, 21)}),
    'preferred turns': ('conversation in chosen', lambda i: {
        'prompt': prose(i), 'chosen': [turn('user', prose(i)), turn('bot', 'Yes.')],
        'rejected': [turn('user', prose(i))]}),
    'tree of messages': ('conversation in prompt', lambda i: {
        'id': f't-{i}', 'prompt': {**turn('user', prose(i)), 'replies': [turn('bot', prose(-i))] * 2}}),
    'answers of several models': (
        ASK + 'instruction, completions.model, completions.response; '
        'say which with --text_column=instruction,completions.response', lambda i: {
            'instruction': prose(i), 'completions': [{'model': 'bot', 'response': prose(k, 60)} for k in range(2)]}),
    'a question and what may answer it': (
        ASK + 'problem, worked_out; say which with --text_column=problem,worked_out', lambda i: {
            'problem': prose(i), 'worked_out': prose(-i, 60)}),
    'choices': (ASK + 'question, choices.text; say which with --text_column=question,choices.text', lambda i: {
        'question': prose(i), 'choices': {'text': [prose(-i), prose(i, 5)]}}),
    'names that end alike': ('input_text + target_text', lambda i: {
        'prefix': 'ask', 'input_text': prose(i), 'target_text': prose(-i)}),
    'comments': ('conversation in comments', lambda i: {
        'id': i, 'comments': [{'author': 'ann', 'body': prose(i), 'replies': [{'author': 'bo', 'body': prose(-i)}]}]}),
    'program': ('instruction + code', lambda i: {'instruction': prose(i), 'code': f'def f_{i}(x):\n    return x\n'}),
    'translation': ('source + target', lambda i: {'source': prose(i), 'target': prose(-i)}),
    'where from': ('target', lambda i: {'source': f'web-{i}', 'target': prose(i)}),
    'escapes': (r'no clear text column among: a\x1b[31m\n, b; say which with --text_column=a\x1b[31m\n', lambda i: {
        'a\x1b[31m\n': prose(i), 'b': prose(-i)}),
}


@pytest.mark.parametrize('name', TABLES)
def test_the_column_with_the_text(name):
    want, row = TABLES[name]
    assert chosen(table(row)) == want


def test_all_formats_have_the_same_form(tmp_path):
    rows = table(lambda i: {'id': f'q{i}', 'question': prose(i), 'answer': prose(-i) if i else None})
    want = [f'{row["question"]}\n\n{row["answer"]}' if row['answer'] else row['question'] for row in rows]
    write(tmp_path / 'a.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
    write(tmp_path / 'a.json', json.dumps(rows))
    write(tmp_path / 'a.csv', '\n'.join(['id,question,answer'] + [
        f'{row["id"]},{row["question"]},{row["answer"] or ""}' for row in rows]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / 'a.parquet')
    for name in 'a.jsonl', 'a.json', 'a.csv', 'a.parquet':
        assert read(tmp_path / name)[0] == want, name
        assert read(tmp_path / name, text_column='answer,ID')[0][1] == f'{rows[1]["answer"]}\n\nq1', name


@pytest.mark.parametrize('turns, text', [
    ([turn('user', 'Hi'), turn('assistant', 'Hello')], 'user: Hi\n\nassistant: Hello'),
    ([turn('user', [{'type': 'text', 'text': 'Hi'}, {'type': 'image'}]), turn('bot', 'Yes')], 'user: Hi\n\nbot: Yes'),
    ([turn('user', 'Hi'), turn('assistant', None), turn('tool', '42')], 'user: Hi\n\ntool: 42'),
    ([{'human': 'Hi', 'assistant': 'Hello'}], 'human: Hi\n\nassistant: Hello'),
    ({'role': 'user', 'text': 'Hi', 'replies': [turn('bot', 'Yes'), {**turn('bot', 'No'), 'replies': []}]},
     'user: Hi\n\nbot: Yes\n\nbot: No'), ([{'model': 'a', 'response': 'Hello'}], None),
    ([['Hi', 'Hello'], ['So', 'Bye']], 'Hi\nHello\n\nSo\nBye'),
    (['Hi', 'Hello'], 'Hi\nHello'), (['See ', {'type': 'link', 'text': 'this'}, '!'], 'See this!'),
    ([{'a': 1}], None), ([1, 2], None), ({'en': 'a'}, None), ([], None)], ids=str)
def test_a_conversation_is_one_text(turns, text):
    from mambino.prepare.tables.cells import text_of
    assert text_of(turns) == text


def test_a_column_that_is_asked_for(tmp_path):
    rows = [{'id': i, 'a,b': f'x {i}', 'text': {'en': prose(i), 'de': prose(-i)}, 'Body': prose(i)} for i in range(9)]
    path = write(tmp_path / 'a.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))

    def asked(column):
        return read(path, text_column=column)[0][1]
    assert asked('text.de') == prose(-1) and asked('body') == prose(1)
    assert asked('a,b') == 'x 1' and asked(r'a\,b,Body') == f'x 1\n\n{prose(1)}'
    assert asked('id,text.en') == f'1\n\n{prose(1)}'
    for column, why in {
        'bodi': 'no column bodi among: id, a,b, text.en, text.de, Body, did you mean Body?',
        'text': 'text holds text.en, text.de; say which with --text_column=text.en',
        'id': 'id holds numbers, not text',
    }.items():
        assert reason(path, text_column=column) == f'text_column={column}: {why}'
    path = write(tmp_path / 'a.txt', 'a text')
    assert reason(path, text_column='a') == 'text_column=a: none of the inputs is a table'


def test_a_column_that_comes_late(tmp_path):
    rows = [json.dumps({'id': f'a-{i}', 'note': 'so it is'}) for i in range(3000)]
    late = [json.dumps({'id': f'b-{i}', 'body': prose(i)}) for i in range(2000)]
    path = write(tmp_path / 'a.jsonl', '\n'.join(rows + late))
    assert read(path) == ([prose(i) for i in range(2000)], ['3,000 rows without text in body'])
    path = write(tmp_path / 'b.jsonl', '\n'.join(rows[:2600] + late[:1] + rows[2600:]))
    assert read(path, text_column='body')[0] == [prose(0)]
    assert 'no column bodi' in reason(path, text_column='bodi')
    late = [json.dumps({'id': 'b', 'meta': {'body': prose(0)}})]
    path = write(tmp_path / 'c.jsonl', '\n'.join(rows[:2600] + late + rows[2600:]))
    assert read(path, text_column='meta.body')[0] == [prose(0)]


def surveyed(folder, kinds, **options):
    """{name: the form, or why it is skipped} of the files of a folder."""
    sources = [Source(str(path), kinds[path.suffix], 1, 0) for path in sorted(folder.iterdir())]
    kept, plans, skipped = survey.survey(sources, OPTIONS | options)
    result = {entry['file'].rpartition('/')[2]: entry['reason'] for entry in skipped}
    for source, plan in zip(kept, plans):
        name = source.path.rpartition('/')[2]
        try:
            list(isolate.read(source, OPTIONS | options | plan, Notes()))
            result[name] = plan.get('form')
        except Skip as why:
            result[name] = str(why)
    return result


def test_the_files_of_a_folder_choose_together(tmp_path):
    urls = [f'https://example.org/{i}' for i in range(N)]
    for name, texts in ('a', [prose(i) for i in range(N)]), ('b', pa.nulls(N)), ('c', ['x.txt'] * N):
        pq.write_table(pa.table({'url': urls, 'tale': texts}), tmp_path / f'{name}.parquet')
    pq.write_table(pa.table({'question': urls, 'essay': [prose(i) for i in range(N)]}), tmp_path / 'd.parquet')
    assert surveyed(tmp_path, {'.parquet': 'parquet'}) == {
        'a.parquet': 'tale', 'b.parquet': 'no text in column tale', 'd.parquet': 'essay',
        'c.parquet': 'no clear text column among: url, tale: url holds URLs, not text'}
    for name, row in ('e', {'id': 'x-1', 'text': 'Bread and tea.'}), ('f', {'id': 'x-2'}), ('g', {'body': 'Rain.'}):
        write(tmp_path / f'{name}.jsonl', (json.dumps(row) + '\n') * 9)
    write(tmp_path / 'h.txt', 'a text of its own')
    kinds = {'.parquet': 'parquet', '.jsonl': 'jsonl', '.txt': 'text'}
    assert surveyed(tmp_path, kinds, text_column='body') == {
        'g.jsonl': 'body', 'h.txt': None,
        **{f'{name}.parquet': f'no column body among: {"question, essay" if name == "d" else "url, tale"}'
           for name in 'abcd'},
        'e.jsonl': 'no column body among: id, text', 'f.jsonl': 'no column body among: id'}


def test_files_of_one_object_each_of_several_kinds(tmp_path):
    """Those that have the same names are decided together, and beside those that have others."""
    for i in range(8):
        write(tmp_path / f'{i}.json', json.dumps({'title': f'No {i}', 'text': prose(i, 40)}))
    for i in range(3):
        write(tmp_path / f'settings{i}.json', json.dumps({f'a{i}': 1, 'b': [True], 'size': i}))
    forms = list(surveyed(tmp_path, {'.json': 'data'}).values())
    assert forms.count(None) == 3 and forms.count('text') == 8
