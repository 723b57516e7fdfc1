"""Runs every command of a Bulkhead machine with qemu.qmp's library; prints a line for each. Arguments: socket, dump file."""
import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient


async def main(socket: str, dump: str) -> None:
    client = QMPClient("test")
    await client.connect(socket)
    events: list[str] = []

    async def listen() -> None:
        async for event in client.events:
            events.append(event["event"])

    listener = asyncio.create_task(listen())

    async def run(command: str, **arguments: object) -> object:
        try:
            result = await client.execute(command, arguments or None)
        except ExecuteError as error:
            result = error.error_class
        print(command, result if len(str(result)) < 200 else type(result).__name__)
        return result

    async def event(name: str) -> None:
        for _ in range(3000):
            if name in events:
                events.remove(name)
                print("event", name)
                return
            await asyncio.sleep(0.01)
        sys.exit(f"no event {name}")

    commands = {entry["name"] for entry in await run("query-commands")}
    done = {"qmp_capabilities", "query-commands"}
    for command in sorted(commands - done):
        if command.startswith("query-"):
            done.add(command)
            await run(command)
    with open("/dev/null", "rb") as null:
        client.send_fd_scm(null.fileno())
        await run("getfd", fdname="null")
        await run("closefd", fdname="null")
        client.send_fd_scm(null.fileno())
        await run("add-fd", **{"fdset-id": 7})
        await run("remove-fd", **{"fdset-id": 7})
    await run("chardev-add", id="ring", backend={"type": "ringbuf", "data": {"size": 16}})
    await run("ringbuf-write", device="ring", data="text")
    await run("ringbuf-read", device="ring", size=4)
    await run("chardev-change", id="ring", backend={"type": "null", "data": {}})
    await run("chardev-remove", id="ring")
    done |= {"chardev-add", "chardev-change", "ringbuf-write", "ringbuf-read", "chardev-remove"}
    # QMP 2.0's form of blockdev-add and today's.
    with open(dump + ".image", "wb") as image:
        image.truncate(1 << 20)
    node = {"driver": "file", "filename": dump + ".image", "node-name": "image"}
    await run("blockdev-add", **node)
    await run("blockdev-reopen", options=[{**node, "cache": {"no-flush": True}}])
    await run("blockdev-del", **{"node-name": "image"})
    await run("blockdev-add", options={"driver": "raw", "id": "drive", "file": node})
    done |= {"blockdev-add", "blockdev-reopen", "blockdev-del"}
    created = dump + ".qcow2"
    for options in (
        {"driver": "file", "filename": created, "size": 0},
        {"driver": "qcow2", "file": "created", "size": 1 << 20},
    ):
        await run("blockdev-create", **{"job-id": "job", "options": options})
        # Created, running, waiting, pending, concluded.
        for _ in range(5):
            await event("JOB_STATUS_CHANGE")
        await run("job-cancel", id="job")
        await run("job-finalize", id="job")
        await run("job-dismiss", id="job")
        await event("JOB_STATUS_CHANGE")
        if options["driver"] == "file":
            await run("blockdev-add", **{"driver": "file", "filename": created, "node-name": "created"})
    await run("blockdev-add", **{"driver": "qcow2", "file": "created", "node-name": "q", "backing": None})
    await run("block_resize", **{"node-name": "q", "size": 2 << 20})
    await run("blockdev-snapshot-internal-sync", device="q", name="s")
    await run("blockdev-snapshot-delete-internal-sync", device="q", name="s")
    await run("blockdev-snapshot", node="drive", overlay="q")
    snapshot = {"device": "drive", "snapshot-file": dump + ".over", "snapshot-node-name": "over"}
    await run("blockdev-snapshot-sync", **snapshot)
    await run("change-backing-file", **{"device": "drive", "image-node-name": "over", "backing-file": created})
    await run("transaction", actions=[{"type": "blockdev-snapshot-internal-sync", "data": {"device": "drive", "name": "t"}}])
    await run("block-set-write-threshold", **{"node-name": "over", "write-threshold": 4096})
    limits = {"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 100, "iops_rd": 0, "iops_wr": 0}
    await run("block_set_io_throttle", device="drive", **limits)
    done |= {"block_set_io_throttle"}
    done |= {"blockdev-create", "job-cancel", "job-finalize", "job-dismiss", "block_resize", "blockdev-snapshot"}
    done |= {"blockdev-snapshot-internal-sync", "blockdev-snapshot-delete-internal-sync", "blockdev-snapshot-sync"}
    done |= {"change-backing-file", "transaction", "block-set-write-threshold"}
    await run("set-action", reboot="reset")
    done |= {"getfd", "closefd", "add-fd", "remove-fd", "set-action", "inject-nmi"}
    # QMP 2.0's form of object-add and today's.
    await run("object-add", **{"qom-type": "rng-random", "id": "rng1", "props": {"filename": "/dev/urandom"}})
    await run("object-add", **{"qom-type": "iothread", "id": "io1", "poll-max-ns": 1000})
    await run("qom-list", path="/objects")
    await run("qom-set", path="/objects/io1", property="poll-max-ns", value=2000)
    await run("qom-get", path="/objects/io1", property="poll-max-ns")
    await run("qom-list-types", implements="user-creatable")
    await run("qom-list-properties", typename="iothread")
    await run("device-list-properties", typename="virtio-rng-pci")
    await run("object-del", id="rng1")
    await run("object-del", id="io1")
    done |= {"object-add", "object-del", "qom-list", "qom-set", "qom-get", "qom-list-types"}
    done |= {"qom-list-properties", "device-list-properties"}
    await run("stop")
    await event("STOP")
    await run("query-status")
    await run("cont")
    await event("RESUME")
    await run("dump-guest-memory", paging=False, protocol="file:" + dump)
    await event("DUMP_COMPLETED")
    await run("system_reset")
    await event("RESET")
    await run("system_powerdown")
    await event("POWERDOWN")
    await run("no-such-command")
    saved = {"val": 0x100000, "size": 4096, "filename": dump + ".saved"}
    await run("memsave", **saved)
    await run("pmemsave", **saved)
    await run("query-cpu-model-expansion", type="full", model={"name": "host"})
    await run("human-monitor-command", **{"command-line": "info status"})
    done |= {"memsave", "pmemsave", "human-monitor-command"}
    done |= {"stop", "cont", "dump-guest-memory", "system_reset", "system_powerdown", "quit"}
    # Bitmaps, jobs and exports, on nodes that nobody else uses; what needs another state is refused.
    for name in ("n1", "n2", "n3"):
        await run("blockdev-add", **{"driver": "null-co", "node-name": name})
    bitmap = {"node": "n1", "name": "b"}
    mirror = {"job-id": "m", "device": "n1", "target": "n2", "sync": "none"}
    address = {"type": "unix", "data": {"path": dump + ".nbd"}}
    for command, arguments in (
        ("block-dirty-bitmap-add", bitmap),
        ("block-dirty-bitmap-add", {"node": "n1", "name": "c"}),
        ("block-dirty-bitmap-disable", bitmap),
        ("block-dirty-bitmap-enable", bitmap),
        ("block-dirty-bitmap-merge", {"node": "n1", "target": "c", "bitmaps": ["b"]}),
        ("block-dirty-bitmap-clear", bitmap),
        ("x-debug-block-dirty-bitmap-sha256", bitmap),
        ("block-dirty-bitmap-remove", bitmap),
        ("nbd-server-start", {"addr": address}),
        ("nbd-server-add", {"device": "n3"}),
        ("nbd-server-remove", {"name": "n3"}),
        ("block-export-add", {"type": "nbd", "id": "e", "node-name": "n3"}),
        ("block-export-del", {"id": "e"}),
        ("nbd-server-stop", {}),
        ("blockdev-mirror", mirror),
        ("block-job-set-speed", {"device": "m", "speed": 0}),
        ("block-job-pause", {"device": "m"}),
        ("block-job-resume", {"device": "m"}),
        ("job-pause", {"id": "m"}),
        ("job-resume", {"id": "m"}),
        ("block-job-change", {"id": "m", "type": "mirror", "copy-mode": "write-blocking"}),
        ("block-job-finalize", {"id": "m"}),
        ("block-job-dismiss", {"id": "m"}),
        ("job-complete", {"id": "none"}),
        ("block-job-complete", {"device": "none"}),
        ("block-job-cancel", {"device": "m", "force": True}),
        ("blockdev-backup", {"job-id": "k", "device": "n3", "target": "n3", "sync": "full"}),
        ("block-commit", {"device": "n3", "job-id": "k"}),
        ("block-stream", {"device": "none"}),
        ("drive-backup", {"device": "none", "target": dump + ".copy", "sync": "full"}),
        ("drive-mirror", {"device": "none", "target": dump + ".copy", "sync": "full"}),
        ("block_passwd", {"device": "none", "password": "secret"}),
        ("blockdev-open-tray", {"id": "none"}),
        ("blockdev-close-tray", {"id": "none"}),
        ("blockdev-remove-medium", {"id": "none"}),
        ("blockdev-insert-medium", {"id": "none", "node-name": "n3"}),
        ("eject", {"device": "none"}),
        ("device_add", {"driver": "virtio-blk-pci", "drive": "n3"}),
        ("device_del", {"id": "none"}),
        ("bulkhead-restart-helper", {"role": "block-proc"}),
    ):
        await run(command, **arguments)
        done.add(command)
    # The guest would take an NMI for a failure: it is stopped.
    await run("stop")
    await run("inject-nmi")
    print("not run:", sorted(commands - done))
    await run("quit")
    listener.cancel()
    try:
        await client.disconnect()
    except EOFError:
        pass  # The server was faster: the machine has ended.


asyncio.run(main(sys.argv[1], sys.argv[2]))
