"""Where the server listens, and how it ends: uvicorn, with patience for nobody and a quick end.

    door = open_door('127.0.0.1', 8000)     # a port in use ends the program in a line
    server = Server(app, library.close)
    server.run(door)                        # until a signal
    server.leave()                          # ends the process, with the status that the signal has

At SIGTERM and Ctrl-C nobody new comes in, at_end() ends what is being answered, the answers say so,
and the process is free to go a second later.
"""
import asyncio
import errno
import json
import os
import signal
import socket
import sys
import threading

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mambino import console
from mambino.configurator import fail, shown

HEAD_SECONDS = 15           # in which a request's head must be there
WRITE_SECONDS = 60          # in which a client must take at least so much of what waits for it:
LEAST_TAKEN = 4096          # bytes
KEEP_ALIVE = 60             # seconds that a connection may be idle between requests
GRACE = 1                   # seconds, twice: until all answers have ended, until all have been sent
SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]
WAITING = 1024              # connections that the system keeps until they are taken


class Protocol(H11Protocol):
    """uvicorn's, which waits for ever neither for the rest of a head nor for a client that does not
    take what is sent to it, and says what is no HTTP in the shape of all errors."""

    timer = None
    write_timer = None

    def connection_made(self, transport):
        super().connection_made(transport)
        self.timer = self.loop.call_later(HEAD_SECONDS, self.give_up)

    def data_received(self, data):
        if self.timer is None and not self.is_answering():
            self.timer = self.loop.call_later(HEAD_SECONDS, self.give_up)
        super().data_received(data)
        if self.is_answering():
            self.end_timer()

    def connection_lost(self, error):
        self.end_timer()
        self.end_write_timer()
        super().connection_lost(error)

    def pause_writing(self):
        super().pause_writing()
        self.end_write_timer()
        self.watch_writing()

    def resume_writing(self):
        self.end_write_timer()
        super().resume_writing()

    def watch_writing(self, before=None):
        """Ends a connection that stands still. before: bytes that waited to be taken the last time."""
        left = self.transport.get_write_buffer_size()
        if before is not None and before - left < LEAST_TAKEN:
            self.write_timer = None
            self.transport.abort()
        else:
            self.write_timer = self.loop.call_later(WRITE_SECONDS, self.watch_writing, left)

    def end_write_timer(self):
        if self.write_timer:
            self.write_timer.cancel()
        self.write_timer = None

    def is_answering(self):
        return self.cycle is not None and not self.cycle.response_complete

    def end_timer(self):
        if self.timer:
            self.timer.cancel()
        self.timer = None

    def give_up(self):
        self.timer = None
        is_websocket = self.transport.get_protocol() is not self
        if not is_websocket and not self.is_answering():
            self.transport.close()

    def send_400_response(self, message):
        error = dict(message=message, type='invalid_request_error', param=None, code=None)
        body = json.dumps({'error': error}).encode()
        headers = [('content-type', 'application/json'), ('content-length', str(len(body))), ('connection', 'close')]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


class Server(uvicorn.Server):
    """See the top of the file. at_end: called in a thread of its own, it may take its time."""

    def __init__(self, app, at_end):
        super().__init__(uvicorn.Config(
            app,
            http=Protocol,
            log_level='warning',
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=GRACE,
        ))
        self.at_end = at_end
        self.signal = None              # that ended it
        self.status = 0                 # with which the process will end
        # from here on, though uvicorn's handlers come later: who reads the address may end it at once
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) != signal.SIG_IGN:      # as SIGHUP is under nohup
                signal.signal(number, self.handle_exit)

    def run(self, door):
        """Serves on this socket until a signal comes."""
        super().run([door])

    def handle_exit(self, number, frame):
        # uvicorn's own would raise the signal once more at the end: SIGTERM is no error of a server
        self.force_exit = self.should_exit and number == signal.SIGINT
        self.should_exit = True
        self.signal = self.signal or number

    def fail(self, message):
        """As configurator.fail, of any thread: a line, and the process ends with status 2."""
        print(f'error: {shown(str(message))}', file=sys.stderr)
        self.status = 2
        self.should_exit = True

    def leave(self):
        """Ends the process, whatever threads are in the middle of: a step of a model is not waited
        for, and Python would tear down what they work with."""
        if self.signal == signal.SIGINT:
            print('\ninterrupted', file=sys.stderr, flush=True)
            self.status = 130
        console.flush()
        os._exit(self.status)

    async def shutdown(self, sockets=None):
        for listener in self.servers:
            listener.close()
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def end():
            self.at_end()
            loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=end, name='end', daemon=True).start()
        try:
            await asyncio.wait_for(ended.wait(), GRACE)
        except asyncio.TimeoutError:
            pass
        await super().shutdown(sockets)


# --- the port -------------------------------------------------------------------------------------

def open_door(host, port):
    """A socket that listens. What cannot be ends the program in a line, which names a way out."""
    try:
        return listening(host, port)
    except socket.gaierror:
        fail(f'host={host}: is no address; 127.0.0.1 is this machine alone, 0.0.0.0 every address that it has')
    except OverflowError:
        fail(f'port={port} must be from 0 to 65535; 0: any that is free')
    except OSError as error:
        if error.errno == errno.EADDRINUSE or getattr(error, 'winerror', None) == 10013:
            fail(f'port={port}: is in use, perhaps by a server that still runs; --port={free_port(host, port)} is free')
        if error.errno == errno.EACCES:
            fail(f'port={port}: needs the rights of an administrator; --port={free_port(host, 8000)} does not')
        fail(f'host={host}: {error.strerror}; 127.0.0.1 is this machine alone, 0.0.0.0 every address that it has')


def listening(host, port):
    """A socket that listens; OSError if it cannot."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    door = socket.socket(family, kind, protocol)
    try:
        if os.name == 'nt':         # there, another process could else listen on the same port
            door.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:                       # a port is free at once when its server has ended
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(address)
        door.listen(WAITING)
    except OSError:
        door.close()
        raise
    return door


def free_port(host, port):
    """The next port that is free; 0, which stands for any, if none is near."""
    for other in range(port + 1, min(port + 100, 65536)):
        try:
            listening(host, other).close()
            return other
        except OSError:
            pass
    return 0
