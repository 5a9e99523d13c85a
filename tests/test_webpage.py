"""webpage.py: the text of web pages, as browsers show it."""
import pytest
from helpers.readers import read, reason, write

from mambino.prepare.documents import webpage

pytestmark = pytest.mark.usefixtures('no_reader_left')


def html(tmp_path, page):
    return read(write(tmp_path / 'page.html', page))[0][0]


def test_html_is_what_a_browser_shows(tmp_path):
    page = '''<!DOCTYPE html><html><head><title>The  title</title><style>p { color: red }</style>
        <script>if (a < b) x("<p>no</p>")</script></head>
        <body><!-- nor this --><h1>Head &amp; shoulders</h1><p>One &lt;b&gt; <b>bo</b>ld
        word,&nbsp;&#8364; &#x20AC;.<p>Two<br>lines</p><ul><li>first<li> second </ul><svg><text>no</text></svg>
        <table><tr><td>a</td><td>b</td></tr><tr><td>c<td>d</table><pre>
def f():
    return  1


# end</pre>after <noscript>no</noscript><![foo[ x ]]> all'''
    assert html(tmp_path, page) == '''The title

Head & shoulders

One <b> bold word,\xa0€ €.

Two
lines

first
second

a\tb
c\td

def f():
    return  1


# end

after all
'''
    assert html(tmp_path, 'no tag at all') == 'no tag at all\n' and html(tmp_path, '<p> </p>') == ''
    # the parser gets it in pieces
    long = '<p>' + 'word ' * 50_000 + '</p>' + '<pre>  kept</pre>' * 3
    assert html(tmp_path, long) == 'word ' * 49_999 + 'word' + '\n\n  kept' * 3 + '\n'
    assert html(tmp_path, '<p>a<object>no<br><p>no</object>b') == 'ab\n'


@pytest.mark.parametrize('page, text', [
    # scripts end where browsers end them
    ('a<script>x("b")</script >c', 'ac'), ('a<script>x("b")</script\n>c', 'ac'), ('a<script>b</script/>c', 'ac'),
    ('a<script>b</script foo="1">c', 'ac'), ('a<SCRIPT>b</ScRiPt\t>c', 'ac'), ('a<script>b</scripts>c</script>d', 'ad'),
    ('a<script src="x"/>b</script>c', 'ac'), ('a<script>x = "<!-- <script>b<\\/script> -->"</script>c', 'ac'),
    ('a<script><!-- <script>b</script> c --></script>d', 'ad'), ('a<script><!--> <script></script>b', 'ab'),
    ('a<script><!-- b</script>c', 'ac'), ('a<style>p::before { content: "</p>" }</style\n>b', 'ab'),
    # comments
    ('a<!-- b -- > c -->d', 'ad'), ('a<!-- b --!>c', 'ac'), ('a<!-->b', 'ab'), ('a<!--->b', 'ab'),
    ('a<!-- <script> -->b', 'ab'), ('a<!-- x > y -->b', 'ab'), ('a<! b>c', 'ac'), ('a<?php b ?>c', 'ac'),
    ('a</ b>c', 'ac'), ('a</>b', 'ab'), ('a<!----->b', 'ab'), ('a<!doctype html>b', 'ab'),
    # what looks like a tag, and what does not
    ('1 < 2 and 3 > 2', '1 < 2 and 3 > 2'), ('a <3 b', 'a <3 b'), ('x<y', 'x'), ('a<b title="x > y">b</b>', 'ab'),
    ("a<b title='</b>'>b", 'ab'), ('a<b title=it\'s>b', 'ab'), ('a<b title=x/>b', 'ab'), ('a<b = "c>d">e', 'ae'),
    # drawings, closed or not
    ('a<svg><text>b</text></svg>c', 'ac'), ('a<svg/>b', 'ab'), ('a<svg width=1 />b', 'ab'),
    ('a<svg><path d=""><p>b', 'a\n\nb'), ('a<div><svg><g></div>b', 'a\nb'), ('a<svg><a>b</a></svg>c', 'ac'),
    ('a<svg><style>b</style><title>c</title></svg>d', 'ad'), ('a<svg><![CDATA[</svg>]]></svg>b', 'ab'),
    ('a<svg><foreignObject><p>b</p></foreignObject></svg>c', 'ac'), ('a<math><mi>x</mi></math>', 'ax'),
    # text in which tags do not count
    ('<title>a <b> c</title>d', 'a <b> c\nd'), ('<textarea>a <b>c</textarea>d', 'a <b>cd'),
    ('<title>a<p>b', 'a\n\nb'), ('a<iframe><p>b</iframe>c', 'ac'), ('a<template><p>b</template>c', 'ac'),
    ('<xmp><p>a</xmp>b', '<p>ab'), ('a<plaintext><p>b</plaintext>', 'a<p>b</plaintext>'),
    ('a<![CDATA[b]]>c', 'ac'), ('<?xml version="1.0"?><p><![CDATA[a < b]]></p>', 'a < b'),
    ('<?xml version="1.0"?><html><script src="x"/><p>a', 'a'),
    # entities
    ('&eacute &lt;b&gt &copy; &#233 &#x41; AT&T &nosuch; &notit;', 'é <b> © é A AT&T &nosuch; ¬it;'),
    # lines
    ('a<br/>b</br>c<br>d', 'a\nb\nc\nd'), ('a<div/>b', 'a\nb'), ('<td>a<td>b<tr><td>c', 'a\tb\nc'),
    ('<a>a</a><a>b</a>, <a>c</a>d', 'a b, cd'), ('<p>a<noscript>b</noscript>', 'a')])
def test_as_browsers_do(page, text):
    assert webpage.text_of(page).rstrip('\n') == text


def test_what_an_open_tag_hides_is_said(tmp_path):
    """A browser does not show it either."""
    path = tmp_path / 'page.html'
    for tag in 'script', 'style', 'iframe', 'noscript', 'template', 'object', 'svg', '!-- ':
        documents, notes = read(write(path, f'<p>shown<{tag}>' + 'gone ' * 100))
        assert documents == ['shown\n'] and len(notes) == 1
        assert notes[0].endswith(f'after <{tag.strip()} are hidden, which is not closed')
        assert read(write(path, f'<p>shown<{tag}> end')) == (['shown\n'], [])


def test_pages_for_scripts(tmp_path):
    path = tmp_path / 'page.html'
    story = 'Once there was a page that had its text twice. ' * 9
    script = '<title>Story</title><script>show()</script>'
    assert reason(write(path, f'{script}<div id=app></div>')) == 'a page of scripts, which fetch its text'
    assert reason(write(path, '<title>Story</title><div id=app></div><script src="app.js"></script>')) == (
        'a page of scripts, which fetch its text')
    assert reason(write(path, f'{script}<noscript>Turn on scripts</noscript>')) == (
        'a page of scripts, which fetch its text')
    assert read(write(path, f'{script}<noscript><p>{story}</noscript>')) == (
        ['Story\n' + story.strip() + '\n'], ['its text is for browsers without scripts'])
    assert read(write(path, f'<p>{story}</p><noscript>Turn on scripts</noscript>'))[1] == []
    documents, notes = read(write(path, f'<p>Little.</p><script>{"x=1;" * 1000}</script>'))
    assert documents == ['Little.\n']
    assert notes == ['7 characters of text in 4,031 of a page, mostly scripts']


def test_broken_pages_take_no_time():
    for broken in '<a ', '<title>', '<!-', '<svg>', '</', '<a b="', '<textarea>', '<script><!--', '&', '<object>':
        webpage.text_of(broken * 100_000)


def test_pages_of_frames(tmp_path):
    frames = '<title>Home</title><frameset cols="20%,*"><frame src=a.html><noframes><body><p>The story.</noframes>'
    assert read(write(tmp_path / 'a.html', frames)) == (
        ['Home\nThe story.\n'], ['its text is for browsers without frames'])


def test_what_stands_in_for_a_film_or_a_formula_is_not_shown():
    assert webpage.text_of('<video src=a><p>Your browser cannot.</video><canvas>Nor this.</canvas><p>Text') == 'Text\n'
    assert webpage.text_of('<div>One<audio src=a controls/></div><p>Two') == 'One\n\nTwo\n'
    formula = '<math><mi>x</mi><mo>=</mo><mn>2</mn><annotation encoding="application/x-tex">x=2</annotation></math>'
    assert webpage.text_of(f'<p>Let {formula} be') == 'Let x=2 be\n'
