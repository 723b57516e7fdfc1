"""Attaches drgn to a Linux guest over its QMP socket alone, or opens a dump of one, and prints what it reads: the release, once
as VMCOREINFO says it and once as the kernel keeps it, the kernel's banner, the tasks, and of an ELF dump what each processor
was at. Argument: the socket or the dump.

There is no debugging information. Where things are, the kernel's own symbol table (kallsyms) says, and what they look like,
its own type information (BTF); both are read from the guest's memory. With those, drgn's own helpers walk the task list.
"""
import functools
import json
import os
import socket
import stat
import struct
import sys
import time

import drgn
from drgn import Object, TypeEnumerator, TypeKind, TypeMember, TypeParameter
from drgn.helpers.linux.kallsyms import load_vmlinux_kallsyms
from drgn.helpers.linux.pid import for_each_task

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FUNC_PROTO, VAR, DATASEC = range(1, 16)
FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(16, 20)
# Where x86-64 Linux has its image, and what of it is looked at: code and what is only read.
KERNEL_MAP = 0xFFFFFFFF80000000
IMAGE_BYTES = 40 << 20
# Bytes after a type's first twelve: fixed ones, and for each of its entries.
TAILS = {
    INT: (4, 0), ARRAY: (12, 0), STRUCT: (0, 12), UNION: (0, 12), ENUM: (0, 8), FUNC_PROTO: (0, 8), VAR: (4, 0),
    DATASEC: (0, 12), DECL_TAG: (4, 0), ENUM64: (0, 12),
}
FOUND_BY = {
    TypeKind.INT: INT, TypeKind.BOOL: INT, TypeKind.STRUCT: STRUCT, TypeKind.UNION: UNION, TypeKind.ENUM: ENUM,
    TypeKind.TYPEDEF: TYPEDEF, TypeKind.FLOAT: FLOAT,
}


class Btf:
    """The kernel's type information as drgn's types, made when they are asked for."""

    def __init__(self, prog, data):
        magic, _, _, header, types, types_bytes, strings, _ = struct.unpack_from("<HBBIIIII", data)
        assert magic == 0xEB9F, hex(magic)
        self.prog, self.data, self.strings = prog, data, header + strings
        # Type 0 is void.
        self.places, self.by_name = [None], {}
        at, end = header + types, header + types + types_bytes
        while at < end:
            name, info, _ = struct.unpack_from("<III", data, at)
            kind = info >> 24 & 0x1F
            if name:
                self.by_name.setdefault((kind, name), len(self.places))
            self.places.append(at)
            fixed, each = TAILS.get(kind, (0, 0))
            at += 12 + fixed + each * (info & 0xFFFF)
        self.by_name = {(kind, self.string(name)): place for (kind, name), place in self.by_name.items()}

    def string(self, offset):
        start = self.strings + offset
        return self.data[start : self.data.index(b"\0", start)].decode()

    def find(self, prog, kinds, name, filename):
        for kind in kinds:
            number = self.by_name.get((FOUND_BY.get(kind), name))
            if number is None and kind == TypeKind.ENUM:
                number = self.by_name.get((ENUM64, name))
            if number is not None:
                return self.type(number)
        return None

    def entries(self, at, layout, count):
        size = struct.calcsize(layout)
        return [struct.unpack_from(layout, self.data, at + index * size) for index in range(count)]

    @functools.lru_cache(maxsize=None)
    def type(self, number):
        prog = self.prog
        if number == 0:
            return prog.void_type()
        at = self.places[number]
        name, info, size = struct.unpack_from("<III", self.data, at)
        kind, count, flag = info >> 24 & 0x1F, info & 0xFFFF, info >> 31
        name = self.string(name) if name else None
        tail = at + 12
        if kind == INT:
            (details,) = struct.unpack_from("<I", self.data, tail)
            if details >> 24 & 4:
                return prog.bool_type(name, size)
            return prog.int_type(name, size, bool(details >> 24 & 1))
        if kind == FLOAT:
            return prog.float_type(name, size)
        if kind == PTR:
            return prog.pointer_type(self.type(size))
        if kind == ARRAY:
            element, _, length = struct.unpack_from("<III", self.data, tail)
            return prog.array_type(self.type(element), length or None)
        if kind in (STRUCT, UNION):
            members = [self.member(*entry, flag) for entry in self.entries(tail, "<III", count)]
            make = prog.struct_type if kind == STRUCT else prog.union_type
            return make(name, size, members)
        if kind == FWD:
            return prog.union_type(name) if flag else prog.struct_type(name)
        if kind == ENUM:
            values = self.entries(tail, "<Ii" if flag else "<II", count)
            integer = prog.int_type("int" if flag else "unsigned int", size, bool(flag))
            return prog.enum_type(name, integer, [TypeEnumerator(self.string(at), value) for at, value in values])
        if kind == ENUM64:
            values = [(at, low | high << 32) for at, low, high in self.entries(tail, "<III", count)]
            integer = prog.int_type("unsigned long", size, False)
            return prog.enum_type(name, integer, [TypeEnumerator(self.string(at), value) for at, value in values])
        if kind == TYPEDEF:
            return prog.typedef_type(name, self.type(size))
        if kind in (VOLATILE, CONST):
            inner = self.type(size)
            bit = drgn.Qualifiers.VOLATILE if kind == VOLATILE else drgn.Qualifiers.CONST
            return inner.qualified(inner.qualifiers | bit)
        if kind in (RESTRICT, TYPE_TAG):
            return self.type(size)
        if kind == FUNC_PROTO:
            parameters = [TypeParameter(functools.partial(self.type, ty)) for _, ty in self.entries(tail, "<II", count)]
            return prog.function_type(self.type(size), parameters)
        raise ValueError(f"BTF kind {kind}")

    def member(self, name, ty, offset, flag):
        name = self.string(name) if name else None
        # With the flag, the upper byte is the width of a bit field.
        bits = offset >> 24 if flag else 0
        if bits:
            make = lambda: Object(self.prog, self.type(ty), bit_field_size=bits)
            return TypeMember(make, name, offset & 0xFFFFFF)
        return TypeMember(functools.partial(self.type, ty), name, offset)


began = time.monotonic()


def stage(what):
    """How long it took, for whom the test shows it."""
    print(f"# {time.monotonic() - began:6.1f} s {what}", file=sys.stderr, flush=True)


def snapshot(socket_path, begin, length):
    """That much of guest memory at once, by a dump that the monitor writes into a passed file. drgn reads a kilobyte with each
    command, of which the kernel's symbols and types would take thousands."""
    memory = os.memfd_create("snapshot")
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(socket_path)
        replies = monitor.makefile("r")

        def execute(command, *fds, **arguments):
            text = json.dumps({"execute": command, "arguments": arguments}).encode()
            socket.send_fds(monitor, [text], fds)
            while "return" not in (reply := json.loads(replies.readline())):
                assert "error" not in reply, reply

        execute("qmp_capabilities")
        execute("getfd", memory, fdname="snapshot")
        execute("dump-guest-memory", paging=False, protocol="fd:snapshot", begin=begin, length=length)
    # The first program header is that of the notes, the next that of the memory.
    (headers,) = struct.unpack("<Q", os.pread(memory, 8, 32))
    header = os.pread(memory, 56, headers + 56)
    _, _, offset, _, address, found = struct.unpack_from("<IIQQQQ", header)
    assert (address, found) == (begin, length), (hex(address), found)
    return os.pread(memory, length, offset)


class Cache:
    """Reads of a program's physical memory, kept. The guest runs on meanwhile, but it is asked for little, and soon."""

    LINE = 1024

    def __init__(self, prog):
        self.prog, self.lines = prog, {}

    def line(self, number):
        if number not in self.lines:
            self.lines[number] = self.prog.read(number * self.LINE, self.LINE, physical=True)
        return self.lines[number]

    def read(self, address, count, offset, physical):
        first, last = address // self.LINE, (address + count - 1) // self.LINE
        data = b"".join(self.line(number) for number in range(first, last + 1))
        return data[address - first * self.LINE :][:count]


def attach(path):
    """The running guest, and its symbols, by way of a program that knows what its image looked like a moment ago."""
    guest = drgn.Program()
    guest.set_qemu_qmp(path)
    assert guest.flags & drgn.ProgramFlags.IS_LINUX_KERNEL, "no VMCOREINFO"
    stage("attached")
    print("vmcoreinfo", guest["UTS_RELEASE"].string_().decode(), flush=True)
    vmcoreinfo = guest["VMCOREINFO"].string_()
    values = dict(line.split("=", 1) for line in vmcoreinfo.decode().splitlines())
    start = int(values["SYMBOL(_stext)"], 16)
    image = snapshot(path, start - KERNEL_MAP + int(values["NUMBER(phys_base)"]), IMAGE_BYTES)
    frozen = drgn.Program(guest.platform)
    frozen.set_linux_kernel_custom(vmcoreinfo, is_live=False)
    read_image = lambda at, count, offset, physical: image[offset : offset + count]
    frozen.add_memory_segment(start, IMAGE_BYTES, read_image, physical=False)
    stage("the kernel's image")
    prog = drgn.Program(guest.platform)
    prog.add_memory_segment(0, 1 << 46, Cache(guest).read, physical=True)
    prog.set_linux_kernel_custom(vmcoreinfo, is_live=True)
    return prog, frozen


def open_dump(path):
    """The same of a dump."""
    prog = drgn.Program()
    prog.set_core_dump(path)
    print("vmcoreinfo", prog["UTS_RELEASE"].string_().decode(), flush=True)
    return prog, prog


def address(name):
    """Of a symbol of this name, of which there is one."""
    (symbol,) = symbols(frozen, name, None, False)
    return symbol.address


prog, frozen = (attach if stat.S_ISSOCK(os.stat(sys.argv[1]).st_mode) else open_dump)(sys.argv[1])
symbols = load_vmlinux_kallsyms(frozen)
stage("symbols")
prog.register_symbol_finder("kallsyms", symbols, enable_index=0)
start, end = address("__start_BTF"), address("__stop_BTF")
btf = Btf(prog, frozen.read(start, end - start))
stage(f"types, of {end - start} bytes")
prog.register_type_finder("btf", btf.find, enable_index=0)

VARIABLES = {"init_pid_ns": "struct pid_namespace", "init_uts_ns": "struct uts_namespace", "init_task": "struct task_struct"}


def variable(prog, name, flags, filename):
    """BTF does not say of what type most variables are."""
    if name in VARIABLES and flags & drgn.FindObjectFlags.VARIABLE:
        return Object(prog, VARIABLES[name], address=address(name))
    if name == "PIDTYPE_PID" and flags & drgn.FindObjectFlags.CONSTANT:
        return Object(prog, "enum pid_type", 0)
    return None


prog.register_object_finder("btf", variable, enable_index=0)
print("memory", prog["init_uts_ns"].name.release.string_().decode())
print("banner", prog.read_c_string(address("linux_banner")).decode().strip())
print("idle", prog["init_task"].comm.string_().decode())
for task in for_each_task(prog):
    print("task", int(task.pid), task.comm.string_().decode(), int(bool(task.mm)))
stage("tasks")


# Registers of NT_PRSTATUS, by their place among its 27.
RIP, CS, RSP = 16, 17, 19
STACK_BYTES = 16 << 10


def registers(path):
    """Of every processor, from an ELF core's notes."""
    with open(path, "rb") as file:
        data = file.read(1 << 20)
    if not data.startswith(b"\x7fELF"):
        return
    (headers,) = struct.unpack_from("<Q", data, 32)
    kind, _, at, _, _, size = struct.unpack_from("<IIQQQQ", data, headers)
    assert kind == 4, "notes come first"
    end = at + size
    while at < end:
        name_bytes, content_bytes, kind = struct.unpack_from("<III", data, at)
        name = data[at + 12 : at + 12 + name_bytes]
        content = at + 12 + (name_bytes + 3 & ~3)
        if name == b"CORE\0" and kind == 1:
            yield struct.unpack_from("<27Q", data, content + 112)
        at = content + (content_bytes + 3 & ~3)


def function(place):
    """Its name, if this is in a function of the kernel's."""
    try:
        return prog.symbol(place).name if address("_stext") <= place < address("_etext") else None
    except LookupError:
        return None


def stack(pointer):
    """The functions to which what is on a kernel stack may return. Without the kernel's tables for unwinding nobody knows which of
    them are left over from earlier calls."""
    words, end = b"", pointer - pointer % STACK_BYTES + STACK_BYTES
    while pointer < end:
        part = min(end, (pointer | 0xFFF) + 1) - pointer
        try:
            words += prog.read(pointer, part)
        except drgn.FaultError:
            # Stacks for exceptions are smaller, with unmapped pages between them.
            break
        pointer += part
    names = (function(word) for (word,) in struct.iter_unpack("<Q", words[: len(words) & ~7]))
    return [name for name in names if name]


if not stat.S_ISSOCK(os.stat(sys.argv[1]).st_mode):
    for cpu, values in enumerate(registers(sys.argv[1])):
        own = prog.read_u64(address("__per_cpu_offset") + 8 * cpu)
        task = Object(prog, "struct rq", address=own + address("runqueues")).curr
        where = ["user"] if values[CS] & 3 else ["kernel", function(values[RIP]) or hex(values[RIP]), *stack(values[RSP])]
        print("vcpu", cpu, int(task.pid), task.comm.string_().decode().replace(" ", "_"), *where)
    stage("processors")
