"""The instruction sets, the thread pool and what happens without the extension, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from moei_core.errors import UsageError
from moei_core.quant import native
from tests.native.weights import INTEGER_FORMATS, orders, run_linear, stored_weights

pytestmark = pytest.mark.skipif(not native.available(), reason=native.unavailable_reason())


def run_python(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


ISAS = ("portable", "avx2", "avx512", "amx_int8", "neon", "neon-dotprod")

DIGESTS = """
import hashlib
import numpy as np
from moei_core.quant import native
from tests.native.weights import FORMATS, block_size, orders, run_linear, stored_weights
rng = np.random.default_rng(0)
print(native.isa())
for fmt in FORMATS:
    stored, x = stored_weights(rng, fmt, 45, 768), rng.standard_normal((11, 768)).astype(np.float32)
    for order in orders(fmt):
        print(fmt, order, hashlib.sha256(run_linear(fmt, stored, 45, x, order).tobytes()).hexdigest())
for heads, groups, width in ((4, 2, 16), (3, 3, 48), (6, 2, 64), (8, 1, 128)):
    def some(*shape):
        return rng.standard_normal(shape).astype(np.float32) / 8
    shapes = ((heads, 64), (groups, 64), (groups, 64), (64, heads))
    parts = [some(*(side * width if side != 64 else 64 for side in shape)) for shape in shapes]
    linear = tuple(native.Linear(native.Matrix("F32", *one.shape), one.ctypes.data) for one in parts)
    x, cosine, sine = some(64), some(width), some(width)
    keys, values = some(groups, 310, width), some(groups, 310, width)
    out, place = np.empty(64, np.float32), (keys.ctypes.data, values.ctypes.data, 310, 300)
    call = native.Attention(linear, (heads, groups, width, width), 1.0)
    call("F32", x.ctypes.data, (cosine.ctypes.data, sine.ctypes.data), place, 0, out.ctypes.data)
    print("attention", width, hashlib.sha256(out.tobytes()).hexdigest())
from tests.native.test_latent_attention import TURNS, Case, torch
for turn in TURNS:
    for dtype, blocks in ((torch.bfloat16, False), (torch.float32, True)):
        found = Case(dtype, turn, blocks=blocks, position=300, low=blocks).run(threads=2)
        print("latents", turn, hashlib.sha256(found["out"].float().numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_instruction_sets_agree_bit_for_bit() -> None:
    """All of them on block formats with integer products; the vector ones, which fuse, on the others too."""
    results = {}
    for isa in ISAS:
        done = run_python(DIGESTS, MOEI_NATIVE_ISA=isa)
        if done.returncode == 0:
            name, *lines = done.stdout.splitlines()
            assert name == isa
            results[isa] = lines
        else:
            assert "cannot run here" in done.stderr
    assert "portable" in results
    if len(results) == 1:
        pytest.skip("this processor runs only the portable kernels")
    first, *others = [results[isa] for isa in results if isa != "portable"]
    assert all(lines == first for lines in others)
    assert [line for line in first if line.startswith(INTEGER_FORMATS)] == [
        line for line in results["portable"] if line.startswith(INTEGER_FORMATS)
    ]


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    program = """
from moei_core.errors import UsageError
from moei_core.quant import native
try:
    native.ExpertFfn(native.FfnLayout(32, 32, "F32", "F32"))
except UsageError as error:
    print(len(error.lines()), error)
"""
    done = run_python(program, MOEI_NATIVE_ISA="avx9000")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 ") and "avx9000" in done.stdout and "portable" in done.stdout


def test_a_pool_of_fewer_threads_than_asked_for_does_the_work() -> None:
    """Containers bound how many a process may have; here it is their stacks' addresses."""
    program = """
import resource
import numpy as np
import psutil
from moei_core.quant import native
from tests.native.weights import run_linear, stored_weights
stored = stored_weights(np.random.default_rng(0), "Q8_0", 4096, 256)
x = np.ones((1, 256), np.float32)
native.set_num_threads(1)
alone = run_linear("Q8_0", stored, 4096, x, "plain")
native.set_num_threads(64)
used = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
print(np.array_equal(alone, run_linear("Q8_0", stored, 4096, x, "plain")))
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


def test_an_idle_pool_uses_no_processor_time() -> None:
    program = """
import time
import numpy as np
from moei_core.quant import native
from tests.native.weights import run_linear, stored_weights
native.set_num_threads(4)
stored = stored_weights(np.random.default_rng(0), "Q8_0", 4096, 256)
x = np.ones((1, 256), np.float32)
for _ in range(3):
    run_linear("Q8_0", stored, 4096, x, "plain")
time.sleep(.05)
before = time.process_time()
time.sleep(1)
print(time.process_time() - before)
"""
    done = run_python(program, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.02


def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    program = """
import os, sys
import numpy as np
from moei_core.quant import native
from tests.native.weights import run_linear, stored_weights
native.set_num_threads(3)
stored = stored_weights(np.random.default_rng(0), "Q4_0", 500, 64)
x = np.ones((2, 64), np.float32)
expected = run_linear("Q4_0", stored, 500, x, "plain").tobytes()
child = os.fork()
if child == 0:
    same = run_linear("Q4_0", stored, 500, x, "plain").tobytes() == expected
    native.set_num_threads(2)
    same = same and run_linear("Q4_0", stored, 500, x, "plain").tobytes() == expected
    os._exit(0 if same and len(os.listdir("/proc/self/task")) == 2 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    if sys.platform != "linux":
        pytest.skip("counts threads in /proc")
    assert run_python(program, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1").returncode == 0


def test_calls_from_several_threads_take_turns() -> None:
    rng = np.random.default_rng(1)
    work = [
        (fmt, stored_weights(rng, fmt, 200, 256), rng.standard_normal((3, 256)).astype(np.float32), order)
        for fmt in ("Q8_0", "Q4_0", "BF16")
        for order in orders(fmt)
    ]
    expected = [run_linear(fmt, stored, 200, x, order).tobytes() for fmt, stored, x, order in work]
    wrong = []

    def repeat(i: int) -> None:
        fmt, stored, x, order = work[i]
        for _ in range(50):
            if run_linear(fmt, stored, 200, x, order).tobytes() != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_are_settable_and_the_workspace_is_counted() -> None:
    before = native.num_threads()
    try:
        native.set_num_threads(3)
        assert native.num_threads() == 3
        for refused in (0, -1, 10**6):
            with pytest.raises(UsageError):
                native.set_num_threads(refused)
        assert native.num_threads() == 3
    finally:
        native.set_num_threads(before)
    ffn = native.ExpertFfn(native.FfnLayout(2048, 768, "Q8_0", "Q8_0"))
    # Two int8 parts of each value, scales and corrections, of every token before and every pair between the products;
    # the outputs of every pair, before they go to their places.
    tokens, pairs = 512 * 2048 * 2.25, 4096 * (768 * 2.25 + 2048 * 4)
    assert tokens < ffn.workspace_nbytes(512, 4096, 2) - pairs < 1.1 * tokens
    native.release_workspace()


def test_the_calling_threads_floating_point_mode_does_not_matter() -> None:
    torch = pytest.importorskip("torch")
    stored = stored_weights(np.random.default_rng(0), "F32", 16, 64)
    x = np.full((1, 64), 1e-40, np.float32)
    expected = run_linear("F32", stored, 16, x, "plain")
    assert expected.any()
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor keeps denormals")
        assert run_linear("F32", stored, 16, x, "plain").tobytes() == expected.tobytes()
    finally:
        torch.set_flush_denormal(False)


def test_read_bandwidth_is_a_rate() -> None:
    assert 1e8 < native.read_bandwidth(np.ones(64 << 20, np.uint8)) < 1e13


WITHOUT = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "moei_core.quant._native":
            raise ImportError("no such extension")
sys.meta_path.insert(0, Hide())
from moei_core.quant import native
assert not native.available()
print(native.unavailable_reason())
for call in (native.isa, native.num_threads, native.release_workspace,
             lambda: native.set_num_threads(2), lambda: native.read_bandwidth(None),
             lambda: native.FfnLayout(32, 32, "F32", "F32"), lambda: native.Matrix("F32", 1, 1),
             lambda: native.decode("Q8_0", None, 32)):
    try:
        call()
    except native.NativeUnavailableError as error:
        assert len(error.lines()) == 3
    else:
        sys.exit("no error")
"""


def test_without_the_extension_everything_imports_and_says_why() -> None:
    done = run_python(WITHOUT)
    assert done.returncode == 0, done.stderr
    assert "no such extension" in done.stdout
