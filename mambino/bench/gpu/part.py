"""The process of one part: python -m mambino.bench.gpu.part NAME MODULE DEVICE SECONDS OUT_DIR, as
running.py starts it."""
import faulthandler
import importlib
import os
import sys
import threading
import time
import traceback

os.environ.setdefault('GOMP_SPINCOUNT', '10000')    # see train.py

LATE = 75           # exit status of a part whose time is over, and which has said so
MARGIN = 1          # seconds before its time is over


def main(name, module, device, seconds, out_dir):
    begun = time.monotonic()
    from mambino.bench.gpu.outcome import Recorder
    recorder = Recorder(name, os.path.join(out_dir, f'{name}.jsonl'), begun + float(seconds))
    faulthandler.dump_traceback_later(float(seconds))       # into the log, should the thread not come to it
    threading.Thread(target=end_in_time, args=(recorder, threading.get_ident()),
                     daemon=True).start()
    if device.startswith('cuda:'):
        import torch
        torch.cuda.set_device(device)
    importlib.import_module(f'mambino.bench.gpu.{module}').run(recorder, device, out_dir)
    faulthandler.cancel_dump_traceback_later()


def end_in_time(recorder, thread):
    """Ends this process when its time is over: a result says what it was at, and where."""
    time.sleep(max(0, recorder.seconds_left() - MARGIN))
    stack = traceback.extract_stack(sys._current_frames()[thread])
    ours = [frame for frame in stack if f'{os.sep}mambino{os.sep}' in frame.filename or 'model_' in frame.filename]
    places = [f'{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}' for frame in [*ours[-3:], stack[-1]]]
    where = ' > '.join(places)
    recorder.add(recorder.at or 'its beginning',
                 f'not done when the time of the part was over; in {where}', passed=False)
    os._exit(LATE)


if __name__ == '__main__':
    main(*sys.argv[1:])
