"""Connects qemu.qmp's QMPClient to a socket and runs a short session; prints what the test compares."""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient


async def main() -> None:
    client = QMPClient("test")
    await client.connect(sys.argv[1])
    print("version", client.greeting.QMP.version["qemu"]["major"], client.greeting.QMP.capabilities)
    print("status", (await client.execute("query-status"))["status"])
    try:
        await client.execute("nosuch")
    except ExecuteError as error:
        print("error", error.error_class, error)
    print("commands", len(await client.execute("query-commands")) > 10)
    schema = await client.execute("query-qmp-schema")
    print("schema", any(entry["name"] == "STOP" for entry in schema))
    with client.listener("STOP") as listener:
        print("stop", await client.execute("stop"))
        print("event", (await listener.get())["event"])
    await client.disconnect()


asyncio.run(main())
