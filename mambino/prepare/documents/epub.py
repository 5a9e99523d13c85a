"""Reads an e-book: its chapters in the order in which they are read.

    for text, last in epub.read_epub('book.epub', options, notes): ...    # one document

An epub is a zip archive of web pages. META-INF/container.xml names the package file, its <spine>
lists the chapters, its <manifest> says where they are.
"""
import posixpath
import urllib.parse
import xml.etree.ElementTree as ElementTree

from mambino.prepare.documents.office import open_zip
from mambino.prepare.documents.webpage import text_of
from mambino.prepare.files import MOST_LOST, Notes, Skip
from mambino.prepare.texts.encodings import decoded


def read_epub(path, options, notes):
    """The chapters, an empty line between two."""
    with open_zip(path) as archive:
        names = set(archive.namelist())
        chapters = chapters_of(archive, names)
        locked = locked_names(archive, names)
        if locked.intersection(chapters):
            raise Skip('encrypted')
        written = False
        missing = sum(name not in names for name in chapters)
        if missing > MOST_LOST * len(chapters):
            raise Skip(f'damaged epub ({missing:,} of {len(chapters):,} chapters are missing)')
        if missing:
            notes.append(f'{missing:,} of {len(chapters):,} chapters are missing')
        for name in chapters:
            if name in names and archive.getinfo(name).file_size > options['max_file_mb'] * 1e6:
                raise Skip(f'a chapter larger than {options["max_file_mb"]:g} MB')
            if name in names:
                data = archive.read(name)
                own_notes = Notes()
                markup = decoded(data, own_notes, kind='html')
                notes += [f'{posixpath.basename(name)}: {note}' for note in own_notes]
                text = text_of(markup, is_xml=True, title=False)
                if text:
                    yield ('\n' if written else '') + text, False
                    written = True
    yield '', True


def chapters_of(archive, names):
    """The names of the chapters in the archive, in order."""
    try:
        container = ElementTree.fromstring(archive.read('META-INF/container.xml'))
        package = next(element.get('full-path') for element in container.iter() if element.tag.endswith('}rootfile'))
        root = ElementTree.fromstring(archive.read(package))
    except (KeyError, StopIteration, ElementTree.ParseError, TypeError):
        raise Skip('damaged epub (no list of its chapters)') from None
    folder = posixpath.dirname(package)
    places = {}
    for item in root.iter():
        if item.tag.endswith('}item') and item.get('href'):
            href = urllib.parse.unquote(item.get('href').partition('#')[0])
            places[item.get('id')] = posixpath.normpath(posixpath.join(folder, href))
    spine = [item.get('idref') for item in root.iter() if item.tag.endswith('}itemref')]
    return list(dict.fromkeys(places[item] for item in spine if item in places))


def locked_names(archive, names):
    """The names of what is encrypted: in bought books the chapters, in others only the fonts."""
    if 'META-INF/encryption.xml' not in names:
        return set()
    try:
        root = ElementTree.fromstring(archive.read('META-INF/encryption.xml'))
    except ElementTree.ParseError:
        return set()
    uris = [element.get('URI', '') for element in root.iter() if element.tag.endswith('}CipherReference')]
    return {urllib.parse.unquote(uri) for uri in uris}
