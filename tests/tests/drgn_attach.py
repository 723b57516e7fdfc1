"""Attaches drgn to a guest over its QMP socket alone, and prints what it reads of it. Arguments: socket, physical address
and length of the part to read, a page table's address (CR3)."""
import sys

import drgn

socket, address, length, top_table = sys.argv[1], *(int(text, 0) for text in sys.argv[2:])

guest = drgn.Program()
guest.set_qemu_qmp(socket)
print("attached", bool(guest.flags & drgn.ProgramFlags.IS_LIVE), guest.platform.arch.name)
print("physical", guest.read(address, length, physical=True).hex())
print("word", guest.read_u64(address, physical=True))
try:
    guest.read(0x7000_0000, 8, physical=True)
except drgn.FaultError:
    print("fault")

# drgn finds out by itself that a guest is Linux when the dump has a VMCOREINFO note. Here it is told, though no Linux runs: what
# it is told suits any x86-64 kernel, but for the top page table, with which drgn translates virtual addresses.
vmcoreinfo = (
    "OSRELEASE=0.0.0\nPAGESIZE=4096\nKERNELOFFSET=0\nNUMBER(phys_base)=0\n"
    f"SYMBOL(swapper_pg_dir)={0xffffffff80000000 + top_table:x}\nSYMBOL(_stext)=ffffffff81000000\n"
)
kernel = drgn.Program(guest.platform)
kernel.add_memory_segment(
    0, 64 << 20, lambda at, count, offset, physical: guest.read(at, count, physical=True), physical=True
)
kernel.set_linux_kernel_custom(vmcoreinfo, is_live=True)
print("virtual", kernel.read(address, length).hex())
