"""Opens a dump of a Linux guest with the kernel's debugging information: prints the log, and a backtrace of every task and of
what every processor runs. Arguments: vmlinux, the dump."""
import sys

import drgn
from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.printk import get_dmesg
from drgn.helpers.linux.sched import cpu_curr

prog = drgn.Program()
prog.set_core_dump(sys.argv[2])
prog.load_debug_info([sys.argv[1]])
print(get_dmesg(prog).decode(errors="replace"))


def frames(task):
    try:
        return " ".join(frame.name or hex(frame.pc) for frame in prog.stack_trace(task))
    except (LookupError, ValueError, drgn.FaultError) as error:
        return f"({error})"


for task in for_each_task(prog):
    print("trace", int(task.pid), task.comm.string_().decode(errors="replace"), frames(task))
for cpu in for_each_online_cpu(prog):
    task = cpu_curr(prog, cpu)
    print("cpu", int(cpu), int(task.pid), task.comm.string_().decode(errors="replace").replace(" ", "_"), frames(task))
