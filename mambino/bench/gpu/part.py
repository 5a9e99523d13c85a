"""The process of one part: python -m mambino.bench.gpu.part NAME MODULE DEVICE SECONDS OUT_DIR, as
running.py starts it."""
import importlib
import os
import sys
import time

os.environ.setdefault('GOMP_SPINCOUNT', '10000')    # see train.py


def main(name, module, device, seconds, out_dir):
    end = time.monotonic() + float(seconds)
    from mambino.bench.gpu.outcome import Recorder
    if device.startswith('cuda:'):
        import torch
        torch.cuda.set_device(device)
    recorder = Recorder(name, os.path.join(out_dir, f'{name}.jsonl'), end)
    importlib.import_module(f'mambino.bench.gpu.{module}').run(recorder, device, out_dir)


if __name__ == '__main__':
    main(*sys.argv[1:])
