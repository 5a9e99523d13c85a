"""Serves the models trained here: a page on which one prepares, trains, watches, generates and exports,
and an API that OpenAI's clients speak.

    python serve.py                                 # http://127.0.0.1:8000: page and API
    python serve.py --page=false --out_dir=out-mine # the API alone
    python serve.py --host=0.0.0.0 --api_key=…      # for others: never without a key

    a client ──► api ──► scheduler: one row of the model's state for each answer ──► tokens, streamed
    the page ──► files of a run ◄── train.py, a process of its own, which outlives this one

In mambino/serve/ api.py has what clients may ask for, guard.py who may ask, library.py the models,
scheduler.py how answers share one model, page/ what is seen.
"""
import os
import sys
import threading

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # see train.py

from mambino.configurator import configure, fail, require
from mambino.console import end_quietly

# --- what and where
out_dir = ''            # the model that answers where a request names none, or hf:folder, one as
                        # transformers saved it; '': the one trained last. All runs in the current
                        # folder are served beside it
host = '127.0.0.1'      # whom it listens to: this machine alone; 0.0.0.0: everybody who knows the api_key
port = 8000             # 0: any that is free
page = True             # the page at /; False: the API alone
api_key = ''            # what clients must know; better in the environment: MAMBINO_API_KEY
cors_origin = ''        # another page that may use the API from a browser, as http://localhost:3000;
                        # several: with commas
allowed_hosts = ''      # other names of this machine that browsers and proxies call it by, as
                        # box.example.org; several: with commas, *: any
# --- the model
device = 'auto'         # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best there is
dtype = 'auto'          # 'float32', 'bfloat16', 'float16'; auto: as sample.py
quantize = ''           # 'int8', 'int4', 'bfloat16': smaller weights; on a CPU also faster ones
state_dtype = 'float32'  # 'bfloat16': what is kept of a text between its tokens takes half the memory,
                        # and tokens, of several rows above all, come sooner on a CPU
adapters = ''           # out_dirs of adapters of out_dir's model, or folders of peft, each with its
                        # weight: out-a,out-b:0.5
memory = 0.0            # GB for models that are loaded, the one used last stays longest; 0: half of
                        # what is free
# --- answers
rows = 16               # that are generated side by side
queue = 64              # requests that may wait for a row; more are told to come back
kept_memory = 0.25      # GB for states after prompts and answers, so that no conversation is read twice
# --- limits of one request
max_tokens = 4096       # that are generated, at most
max_prompt = 65536      # tokens of a prompt, at most
max_body = 8.0          # MB
timeout = 600.0         # seconds from the request to its last token

# read before torch is there: a typo is told at once
end_quietly()
explicit = configure(globals(), positional=None)

LOOPBACK = ('127.0.0.1', 'localhost', '::1')
require(globals(), {
    'from 0 to 65535; 0: any that is free': dict(port=0 <= port <= 65535),
    'from 1 to 256': dict(rows=1 <= rows <= 256),
    '0 or more': dict(queue=queue >= 0, memory=memory >= 0, kept_memory=kept_memory >= 0),
    'above 0': dict(max_tokens=max_tokens > 0, max_prompt=max_prompt > 0),
    'above 0 and at most 10000': dict(max_body=0 < max_body <= 10_000),
    'above 0 and at most 1000000': dict(timeout=0 < timeout <= 1e6),
    'int8, int4, bfloat16, or empty': dict(quantize=quantize in ('', 'int8', 'int4', 'bfloat16')),
    'float32 or bfloat16': dict(state_dtype=state_dtype in ('float32', 'bfloat16')),
})
key = (api_key or os.environ.get('MAMBINO_API_KEY', '')).strip()
if not key.isprintable():
    fail('api_key must be of characters that can be printed: it is sent in a header')
if not key and host not in LOOPBACK:
    fail(f'host={host}: whoever reaches this machine could use it, so it needs --api_key too (or MAMBINO_API_KEY in '
         'the environment)')
if not key and '*' in cors_origin:
    fail(f'cors_origin={cors_origin}: any page in a browser could use the API, so it needs --api_key too')
if adapters and not out_dir:
    fail(f'adapters={adapters}: are of one model, so --out_dir must name it')

try:
    import fastapi  # noqa: F401
    import uvicorn  # noqa: F401
    if page:
        import nicegui  # noqa: F401
except ImportError as error:
    fail(f'{error.name} is not installed: pip install fastapi uvicorn nicegui (or: pip install --group serve); '
         '--page=false needs no nicegui')

# --- the place: who comes while the rest is read waits at the door
from mambino.serve.listening import Server, open_door
from mambino.serve.start import check_folder, cookie_of, hosts_of, say_where, urls_of

check_folder('.', out_dir)
door = open_door(host, port)
port = door.getsockname()[1]

from mambino.serve.api import Limits, make_app
from mambino.serve.library import Library, NoModel
from mambino.serve.page_token import page_token
from mambino.serve.work import Room

# --- the models
library = Library('.', out_dir, device, dtype, quantize, adapters, memory, Room(rows, queue, kept_memory, state_dtype))
limits = Limits(max_tokens, max_prompt, int(max_body * 1e6), timeout)

# --- the API, and the page on it
token = page_token('.') if page else ''
app = make_app(library, limits, key, cors_origin, hosts_of(host, allowed_hosts, key), token, cookie_of(port))
if page:
    from mambino.serve.page.shell import add_page
    add_page(app, library, needs_key=bool(key))
server = Server(app, library.close)


def load_first():
    """The model that answers where none is named, while the page can be seen already."""
    try:
        library.get()
    except NoModel as error:
        if server.should_exit:
            return
        if out_dir:
            server.fail(error)
        elif library.default():
            print(f'note: {error}', file=sys.stderr)


say_where(library, urls_of(host, port, token), key, rows, queue)
threading.Thread(target=load_first, name='first model', daemon=True).start()
server.run(door)
server.leave()
