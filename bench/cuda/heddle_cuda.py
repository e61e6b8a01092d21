"""The C ABI of heddle_cuda (native/cuda/api.h) through ctypes, on torch tensors in place."""
import ctypes as C

import torch

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.int8: 4, torch.uint8: 5,
          torch.int32: 6, torch.int64: 7}


def ptr(tensor):
    """Address of a contiguous tensor, or None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


class Library:
    """The loaded library; `call(op, args)` launches heddle_cuda_<op> on torch's current stream and returns its status."""

    def __init__(self, path):
        self.lib = C.CDLL(path)
        self.lib.heddle_cuda_job_begin.restype = C.c_void_p
        self.lib.heddle_cuda_job_begin.argtypes = [C.c_void_p]
        self.lib.heddle_cuda_job_run.restype = C.c_int64
        self.lib.heddle_cuda_job_run.argtypes = [C.c_void_p, C.c_void_p, C.c_void_p]
        self.lib.heddle_cuda_job_discard.argtypes = [C.c_void_p]
        self.lib.heddle_cuda_error.argtypes = [C.c_char_p, C.c_int64]
        self.on_gpu = torch.cuda.is_available()
        self.device = 'cuda' if self.on_gpu else 'cpu'
        device = C.create_string_buffer(512)
        if self.lib.heddle_cuda_open(device) != 0:
            raise SystemExit(f'heddle_cuda_open: {self.error()}')
        stream = torch.cuda.current_stream().cuda_stream if self.on_gpu else None
        self.job = self.lib.heddle_cuda_job_begin(stream)

    def error(self):
        text = C.create_string_buffer(512)
        self.lib.heddle_cuda_error(text, 512)
        return text.value.decode()

    def entry(self, op):
        """Address of an op's launch function, or None when this library has none."""
        try:
            return C.cast(getattr(self.lib, f'heddle_cuda_{op}'), C.c_void_p)
        except AttributeError:
            return None

    def launcher(self, op, args):
        """A function without arguments that launches; `args` and its tensors must stay alive."""
        entry, run, job, address = self.entry(op), self.lib.heddle_cuda_job_run, self.job, C.addressof(args)

        def launch():
            status = run(job, entry, address)
            if status != 0:
                raise RuntimeError(f'{op}: status {status}, {self.error()}')

        launch.args = args
        return launch

    def synchronize(self):
        if self.on_gpu:
            torch.cuda.synchronize()
        else:  # the host shim: a job without a launch ends after everything before it
            wait = self.lib.heddle_cuda_job_wait
            wait.restype = C.c_int64
            wait.argtypes = [C.c_void_p, C.c_void_p, C.c_void_p, C.c_int64]
            wait(self.lib.heddle_cuda_job_begin(None), None, None, 0)


class Case:
    """One row of the benchmark.

    heddle, peer: functions without arguments that launch the same work; peer may be None.
    check: called after both ran; the relative error of heddle's result against a higher-precision one.
    bytes, flops: work of one call. peak: 'bf16', 'f32' or None (memory only), what flops are held against.
    """

    def __init__(self, op, name, heddle, check, tolerance, bytes, flops=0, peak=None, peer=None, peer_name=''):
        self.op, self.name, self.heddle, self.check, self.tolerance = op, name, heddle, check, tolerance
        self.bytes, self.flops, self.peak, self.peer, self.peer_name = bytes, flops, peak, peer, peer_name


def relative(actual, expected):
    """Norm-wise error in float64."""
    a, e = actual.double(), expected.double()
    norm = e.norm()
    return float((a - e).norm() / norm) if norm > 0 else float((a - e).norm())
