"""A TCP proxy before a server's socket that cuts, delays, holds back and swallows on demand."""

import asyncio
import socket
import struct
import threading
from contextlib import suppress

_COMMIT = b"COMMIT\0"
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing sends RST


class Link:
    """One connection through the proxy."""

    def __init__(self, client, server):
        self.client = client  # StreamWriter to each end
        self.server = server
        self.reply_is_lost = False

    def cut(self):
        for end in (self.client, self.server):
            end.transport.abort()

    def reset(self):
        sock = self.client.get_extra_info("socket")
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.cut()


class Proxy:
    """Forwards a port of its own to the Unix socket at `target`, in a thread of its own."""

    def __init__(self, target):
        self._target = str(target)
        self._links = set()
        self.refusing = False
        self.latency_s = 0.0
        self.cut_at_commit = ""  # "before" it reaches the server, or "after": then only its reply is lost
        self.commits_cut = 0
        self._loop = asyncio.new_event_loop()
        self._flowing = {}
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait()

    def cut(self, *, reset=False):
        """End all connections; new ones are let through."""
        self._call(self._cut, reset)

    def refuse(self, refusing):
        """While refusing, end all connections, new ones at once."""
        self.refusing = refusing
        if refusing:
            self.cut()

    def hold(self, direction, held):
        """Keep back what goes "to_server" or "to_client" until it is let go."""
        flowing = self._flowing[direction]
        self._call(flowing.clear if held else flowing.set)

    def close(self):
        self._call(self._cut, False)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._listener.close()

    def _call(self, work, *args):
        done = threading.Event()

        def run():
            work(*args)
            done.set()

        self._loop.call_soon_threadsafe(run)
        done.wait(10)

    def _cut(self, reset):
        for link in list(self._links):
            link.reset() if reset else link.cut()

    def _run(self, started):
        asyncio.set_event_loop(self._loop)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._flowing = {"to_server": asyncio.Event(), "to_client": asyncio.Event()}
        for flowing in self._flowing.values():
            flowing.set()
        self._loop.run_until_complete(asyncio.start_server(self._serve, sock=self._listener))
        started.set()
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, from_client, client):
        if self.refusing:
            client.transport.abort()
            return
        try:
            from_server, server = await asyncio.open_unix_connection(self._target)
        except OSError:
            client.transport.abort()
            return
        link = Link(client, server)
        self._links.add(link)
        pumps = [
            asyncio.ensure_future(self._pump(link, "to_server", from_client, server)),
            asyncio.ensure_future(self._pump(link, "to_client", from_server, client)),
        ]
        with suppress(asyncio.CancelledError):  # the proxy closes
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        link.cut()
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        self._links.discard(link)

    async def _pump(self, link, direction, source, sink):
        with suppress(OSError):
            while data := await source.read(65536):
                await self._flowing[direction].wait()
                if self.latency_s:
                    await asyncio.sleep(self.latency_s)
                if direction == "to_client" and link.reply_is_lost:
                    return
                if direction == "to_server" and self.cut_at_commit and _COMMIT in data:
                    when, self.cut_at_commit = self.cut_at_commit, ""
                    self.commits_cut += 1
                    if when == "before":
                        return
                    link.reply_is_lost = True
                sink.write(data)
                await sink.drain()
