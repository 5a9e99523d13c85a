"""csv_rows.py: a document a row."""
from helpers.readers import read, write


def test_csv(tmp_path):
    def check(content, name='a.csv', **options):
        return read(write(tmp_path / name, content), **options)
    documents, notes = check('id,text,n\r\n1,"two\r\nlines, ""quoted""",3\r\n\r\n2\r\n3,,4\r\n')
    assert documents == ['two\nlines, "quoted"', ''] and notes == ['1 rows without text in text']
    assert check('id\tText\n1\ta, b; c\n', 'a.tsv')[0] == ['a, b; c']
    assert check('\ufeffid;content\n1;ü\n')[0] == ['ü']
    assert check('id;content\n1;ü\n'.encode('cp1252'))[0] == ['ü']
    assert check('text\nhello, world\n')[0] == ['hello, world']
    assert check('a,b\n1,2\n', text_column='b')[0] == ['2']
    for plain in ('a,b\n1,2\n', 'body of the letter\n', '\n\n', '"'):
        assert check(plain)[0] == [plain]
    long = 'x' * 3_000_000  # csv's own limit is 131072
    assert check(f'id,text\n1,{long}\n')[0] == [long]
    assert check('id,text\n1,a\0b\n')[0] == ['ab']


def test_one_column_may_hold_any_delimiter(tmp_path):
    path = write(tmp_path / 'one.csv', 'text\nhello\tworld, foo\n')
    assert read(path)[0] == ['hello\tworld, foo']
