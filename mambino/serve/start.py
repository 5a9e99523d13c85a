"""What serve.py checks and says before the first request.

    check_folder('.', 'out-mine')               # a folder that is not there ends the program in a line
    say_where(library, urls_of('127.0.0.1', 8000, token), key='', rows=16, queue=64)
"""
import difflib
import os
import shlex
import socket

from mambino.configurator import fail

ANYWHERE = ('0.0.0.0', '::')


def check_folder(folder, out_dir):
    """Ends the program in a line where out_dir is not there; it names the folder that may have been
    meant."""
    if not out_dir or os.path.exists(out_dir.removeprefix('hf:')):
        return
    runs = sorted(name for name in os.listdir(folder)
                  if any(os.path.isfile(os.path.join(folder, name, file)) for file in ('best.pt', 'ckpt.pt')))
    near = difflib.get_close_matches(os.path.basename(os.path.normpath(out_dir)), runs, n=3, cutoff=0)
    said = f'here are: {", ".join(near)}' if near else 'and here is no run yet; without --out_dir the page opens'
    fail(f'out_dir={out_dir}: no such folder; {said}')


def hosts_of(host, allowed_hosts, key):
    """The names besides localhost by which a request may call this machine; None: any. Where others
    can reach it, it needs a key, and a page behind whatever name has none."""
    names = [name.strip().lower() for name in allowed_hosts.split(',') if name.strip()]
    if host in ('127.0.0.1', 'localhost', '::1'):
        return tuple(names)
    if key and not names:
        return None
    return (*names, host.lower(), f'[{host.lower()}]')


def cookie_of(port):
    """The name of the page's cookie. A browser has one jar for all ports of a machine: two servers
    must not take each other's."""
    return f'mambino-{port}'


def urls_of(host, port, token):
    """{what is there: its address} as a browser on this machine has it; of one that listens
    everywhere, also as others have it."""
    shown = '127.0.0.1' if host in ANYWHERE else host
    shown = f'[{shown}]' if ':' in shown else shown
    urls = dict(API=f'http://{shown}:{port}/v1')
    if token:
        urls['page'] = f'http://{shown}:{port}/?token={token}'
    if host in ANYWHERE:
        urls['others'] = f'http://{socket.gethostname()}:{port}'
    return urls


def say_where(library, urls, key, rows, queue):
    """Prints all that one needs to begin."""
    ids = [run['id'] for run in library.names()]
    own = library.default()
    lines = []
    if 'page' in urls:
        lines.append(('page', f'{urls["page"]}   (to be opened in a browser)'))
    lines.append(('API', f'{urls["API"]}   (base_url of OpenAI\'s clients)'))
    if 'others' in urls:
        lines.append(('others', f'reach it at {urls["others"]}'))
    lines.append(('key', 'needed by the API' if key else 'none is needed: only this machine can ask'))
    rest = [name for name in ids if name != own]
    more = f'; where a request names them, {listed(rest)} too' if rest else ''
    lines.append(('model', f'{own}{more}' if own else 'none yet: train one, and it is served'))
    lines.append(('rows', f'{rows} answers side by side, {queue} may wait'))
    if own:
        authorization = ' -H "Authorization: Bearer $MAMBINO_API_KEY"' if key else ''
        body = '{"prompt": "Once upon a time", "max_tokens": 50}'
        lines.append(('try', f'curl {urls["API"]}/completions{authorization} -H "Content-Type: application/json" '
                             f'-d {shlex.quote(body)}'))
    lines.append(('end', 'Ctrl-C; what trains goes on'))
    for name, text in lines:
        print(f'{name:<10}{text}')
    print(flush=True)


def listed(names, most=6):
    """Names in a line, of many the first ones."""
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
