"""A made-up NVIDIA driver whose GPU is this process's memory, and which does everything as late as it may.

A copy from page-locked memory happens when somebody waits for it, and not before. So a slot that is filled again too
early, memory that is unlocked or freed under a copy, and a sum of bytes that have not arrived all show as wrong bytes
or in ``wrong``.
"""

import collections
import ctypes
import functools
import itertools
import threading

import numpy as np

from thaw_vllm.codecs import planes
from thaw_vllm.transport import cuda
from thaw_vllm.transport.checksum import wordsum
from thaw_vllm.transport.planes_cuda import WARPS
from thaw_vllm.transport.planes_encode_cuda import WARPS as ENCODE_WARPS

OTHERS = 0x107
"""The context of another GPU, in which the fixture ``driver`` leaves the calling thread."""
BUS = b"0000:3b:00.0"
REFUSED = 999


def u64(address):
    return ctypes.c_uint64.from_address(address)


def u32(address):
    return ctypes.c_uint32.from_address(address)


def decode(width, plane, values):
    """What a kernel of ``planes_cuda`` does."""
    table, ends, states, words, count, *addresses, turn, rows, out = values
    elements = rows * planes.ROW
    blocks = -(-elements // planes.BLOCK)
    found = np.empty((width, elements), np.uint8)
    own = array(table, 256, "<u2"), array(ends, blocks, "<u4"), array(states, 32 * blocks, "<u4").reshape(-1, 32)
    for number in range(width):
        if number == plane and own[0].sum() != planes.TOTAL:
            found[number] = 0  # as good as anything
        elif number == plane:
            planes.decoded(*own, array(words, count, "<u2"), found[number])
        else:
            found[number] = array(addresses[number], elements, np.uint8)
    whole = np.empty(elements * width, np.uint8)
    planes.merge(found, turn, whole)
    ctypes.memmove(out, whole.tobytes(), len(whole))


def array(address, size, kind):
    return np.frombuffer(ctypes.string_at(address, size * np.dtype(kind).itemsize), kind)


def put(address, numbers):
    ctypes.memmove(address, numbers.tobytes(), numbers.nbytes)


def cut(data, rows, width, turn):
    return planes.split(array(data, rows * planes.ROW * width, np.uint8), width, turn)


def count(width, grid, data, span, parts, each, rows, turn, counts):
    """What the kernels of ``planes_encode_cuda`` do, this one and those that follow."""
    found = array(counts, 256 * width, "<u4").reshape(width, 256).astype(np.int64)
    for block in range(grid):
        start = span * block // parts // 512 * 512
        left = min(each, rows - start // (planes.ROW * width))
        for plane, part in zip(found, cut(data + start, left, width, turn), strict=True):
            plane += planes.counted(part)
    put(counts, found.astype("<u4"))


def encode(width, grid, data, turn, shift, table, rows, places, counts, states):
    entries = array(table, 256, "<u4")
    plane = np.ascontiguousarray(cut(data, rows, width, turn)[shift // 8])
    ends, found, words = planes.coded(plane, (entries & 0xFFFF).astype(np.uint16))
    assert grid == -(-len(ends) // ENCODE_WARPS)
    sizes = np.diff(ends.astype(np.int64), prepend=0)
    for block, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        put(places + 2 * (planes.BLOCK * (block + 1) - int(size)), words[end - size : end])
    put(counts, sizes.astype("<u4"))
    put(states, found)


def plane(width, grid, data, turn, shift, rows, out):
    assert grid == -(-rows // ENCODE_WARPS)
    put(out, np.ascontiguousarray(cut(data, rows, width, turn)[shift // 8]))


def pack(_, grid, places, ends, out):
    for block, (first, end) in enumerate(itertools.pairwise([0, *array(ends, grid, "<u4").tolist()])):
        words = array(places + 2 * (planes.BLOCK * (block + 1) - (end - first)), end - first, "<u2")
        put(out + 2 * first, words)


def move(_, grid, from_, to, count):
    assert grid == -(-count // 256)
    ctypes.memmove(to, from_, 4 * count)


ENCODE = {
    b"move": (move, (u64, u64, u32)),
    b"count": (count, (u64, u64, u32, u32, u32, u32, u64)),
    b"encode": (encode, (u64, u32, u32, u64, u32, u64, u64, u64)),
    b"plane": (plane, (u64, u32, u32, u32, u64)),
    b"pack": (pack, (u64, u64, u64)),
}


class Mark:
    """An event as it was recorded once."""

    def __init__(self, done):
        self.done = done


class Driver(cuda.Driver):
    """Attributes: ``wrong`` (what was done against the rules), ``calls`` (names), ``refuse`` (name: which call)."""

    def __init__(self):
        self.lock = threading.RLock()
        self.current = threading.local()
        self.handles = iter(range(0x1000, 1 << 40))
        self.streams, self.events, self.locked, self.memory, self.mapped = {}, {}, {}, {}, set()
        self.asked = collections.Counter()
        self.free, self.opened = 80 << 30, collections.Counter()
        self.others, self.reaches = (), "NVLink"
        self.entries, self.names, self.launched = {}, {}, set()
        self.modules, self.contexts, self.wrong, self.calls, self.refuse = set(), 0, [], [], {}
        self.functions = {name: self.function(name) for name in cuda._SIGNATURES}

    def function(self, name):
        work = getattr(self, name.partition("_")[0])

        def call(*arguments):
            with self.lock:
                if name == "cuGetErrorName":
                    return work(*arguments)
                self.calls.append(name)
                left = self.refuse.get(name)
                if left is not None:
                    self.refuse[name] = left - 1
                    if not left:
                        return REFUSED
                return work(*arguments) or 0

        return call

    def idle(self):
        """Whether everything was given back, and nothing was done against the rules."""
        assert self.wrong == []
        assert not any((self.streams, self.events, self.locked, self.memory, self.modules, self.contexts))
        return True

    def make(self, handle):
        handle._obj.value = next(self.handles)
        return handle._obj.value

    def inside(self):
        context = getattr(self.current, "context", 0)
        if not context:
            self.wrong.append("called outside a context")
        elif context == OTHERS:
            self.wrong.append("called in the context of another GPU")

    # contexts

    def cuInit(self, flags):
        pass

    def cuGetErrorName(self, result, text):
        text._obj.value = b"CUDA_ERROR_MADE_UP"

    def cuDeviceGet(self, number, device):
        number._obj.value = device

    def cuDeviceGetPCIBusId(self, text, size, device):
        ctypes.memmove(text, BUS + b"\0", len(BUS) + 1)

    def cuDeviceGetByPCIBusId(self, number, bus):
        if bus not in self.others:
            return REFUSED
        number._obj.value = 7

    def cuDeviceCanAccessPeer(self, found, device, other):
        found._obj.value = self.reaches is not None

    def cuDeviceGetP2PAttribute(self, found, attribute, device, other):
        assert attribute == 3
        found._obj.value = self.reaches == "NVLink"

    def cuDevicePrimaryCtxRetain(self, handle, device):
        self.contexts += 1
        handle._obj.value = 0x100 + device

    def cuDevicePrimaryCtxRelease(self, device):
        self.contexts -= 1

    def cuCtxSetCurrent(self, handle):
        self.current.context = handle

    def cuCtxGetCurrent(self, handle):
        handle._obj.value = getattr(self.current, "context", None)

    # streams and events

    def cuStreamCreate(self, handle, flags):
        self.inside()
        self.streams[self.make(handle)] = collections.deque()

    def cuStreamDestroy(self, stream):
        self.inside()
        if self.streams.pop(stream):
            self.wrong.append("a stream was destroyed with work in it")

    def cuStreamSynchronize(self, stream):
        queue = self.streams[stream]
        while queue:
            queue.popleft()[1]()

    def cuStreamWaitEvent(self, stream, event, flags):
        mark = self.events[event]  # as it is now: it may be recorded again before this stream comes to it
        self.streams[stream].append((None, lambda: self.until(mark)))

    def cuEventCreate(self, handle, flags):
        self.inside()
        self.events[self.make(handle)] = Mark(True)

    def cuEventDestroy(self, event):
        del self.events[event]

    def cuEventRecord(self, event, stream):
        mark = self.events[event] = Mark(False)
        self.streams[stream].append((mark, lambda: setattr(mark, "done", True)))

    def cuEventQuery(self, event):
        if self.events[event].done:
            return 0
        self.asked[event] += 1
        if self.asked[event] % 3 == 0:
            self.until(self.events[event])
        return 600

    def until(self, mark):
        while not mark.done:
            queue = next(queue for queue in self.streams.values() if any(found is mark for found, _ in queue))
            queue.popleft()[1]()

    # memory

    def cuMemHostRegister(self, address, size, flags):
        self.inside()
        if any(address < other + length and other < address + size for other, length in self.locked.items()):
            self.wrong.append("locked twice")
        if address % 4096:
            self.wrong.append("locked across the middle of a page")
        self.locked[address] = size
        if flags & 2:
            self.mapped.add(address)

    def cuMemHostUnregister(self, address):
        self.inside()
        del self.locked[address]
        self.mapped.discard(address)

    def cuMemHostGetDevicePointer(self, handle, address, flags):
        if address not in self.locked or address not in self.mapped:
            self.wrong.append("memory that the GPU does not see")
        handle._obj.value = address

    def is_locked(self, address, size):
        return any(at <= address and address + size <= at + length for at, length in self.locked.items())

    def cuMemAlloc(self, handle, size):
        self.inside()
        if not size:
            return 1
        memory = ctypes.create_string_buffer(b"\xee" * size, size)
        handle._obj.value = ctypes.addressof(memory)
        self.memory[handle._obj.value] = memory

    def cuIpcGetMemHandle(self, handle, address):
        self.inside()
        if address not in self.memory:
            self.wrong.append("shared memory that is not the start of any")
        ctypes.memmove(ctypes.addressof(handle._obj), address.to_bytes(64, "little"), 64)

    def cuIpcOpenMemHandle(self, address, handle, flags):
        self.inside()
        if flags != 1:
            self.wrong.append("opened without CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS")
        address._obj.value = int.from_bytes(bytes(handle.reserved), "little")
        self.opened[address._obj.value] += 1

    def cuIpcCloseMemHandle(self, address):
        self.inside()
        self.opened[address] -= 1
        end = address + len(self.memory[address])
        for _, work in (found for queue in self.streams.values() for found in queue):
            if isinstance(work, functools.partial) and address <= work.args[1] < end:
                self.wrong.append("memory was unmapped under a copy")

    def cuMemGetAddressRange(self, base, size, address):
        self.inside()
        for begin, memory in self.memory.items():
            if begin <= address < begin + len(memory):
                base._obj.value, size._obj.value = begin, len(memory)
                return 0
        return REFUSED

    def cuMemGetInfo(self, free, total):
        self.inside()
        free._obj.value = self.free - sum(len(memory) for memory in self.memory.values())
        total._obj.value = 80 << 30

    def cuMemFree(self, address):
        self.inside()
        del self.memory[address]

    def cuMemcpyHtoDAsync(self, to, source, size, stream):
        if self.is_locked(source, size):

            def move():
                if not self.is_locked(source, size):
                    self.wrong.append("memory was unlocked under a copy")
                    return
                ctypes.memmove(to, source, size)

            self.streams[stream].append((None, move))
        elif any(source < at + length and at < source + size for at, length in self.locked.items()):
            self.wrong.append("a copy crosses the end of locked memory")
        else:
            taken = ctypes.string_at(source, size)
            self.streams[stream].append((None, lambda: ctypes.memmove(to, taken, size)))

    def cuMemcpyDtoHAsync(self, to, source, size, stream):
        self.streams[stream].append((None, functools.partial(ctypes.memmove, to, source, size)))
        if not self.is_locked(to, size):
            self.cuStreamSynchronize(stream)

    def cuMemsetD8Async(self, to, value, size, stream):
        self.streams[stream].append((None, lambda: ctypes.memset(to, value, size)))

    def cuMemcpyDtoDAsync(self, to, source, size, stream):
        self.streams[stream].append((None, functools.partial(ctypes.memmove, to, source, size)))

    # the kernels

    def cuModuleLoadData(self, handle, text):
        self.inside()
        self.entries[self.make(handle)] = {entry.partition(b"(")[0] for entry in text.split(b".entry ")[1:]}
        self.modules.add(handle._obj.value)

    def cuModuleGetFunction(self, handle, module, name):
        assert name in self.entries[module]
        self.names[self.make(handle)] = name

    def cuModuleUnload(self, module):
        self.inside()
        self.modules.remove(module)

    def cuLaunchKernel(self, function, x, y, z, a, b, c, shared, stream, parameters, extra):
        self.launched.add(self.names[function])
        kind, _, shape = self.names[function].partition(b"_")
        if kind == b"planes":
            assert (y, z, a, b, c) == (1, 1, 256, 1, 1)
            values = [(u32 if n in (4, 9, 10) else u64)(address).value for n, address in enumerate(parameters)]
            width, plane = map(int, shape.split(b"_"))
            assert x == -(-values[10] // (WARPS * planes.BLOCK // planes.ROW))
            self.streams[stream].append((None, lambda: decode(width, plane, values)))
            return
        if kind in ENCODE:
            assert (y, z, a, b, c) == (1, 1, 256, 1, 1)
            kernel, types = ENCODE[kind]
            values = [read(address).value for read, address in zip(types, parameters, strict=True)]
            self.streams[stream].append((None, lambda: kernel(int(shape or 0), x, *values)))
            return
        assert kind == b"wordsum" and (y, z, a, b, c) == (32, 1, 256, 1, 1)
        table, sums = (u64(parameters[number]).value for number in range(2))

        def launch():
            for number in range(x):
                data = ctypes.string_at(u64(table + 16 * number).value, u64(table + 16 * number + 8).value)
                u64(sums + 8 * number).value += wordsum(memoryview(data))

        self.streams[stream].append((None, launch))
