"""Messages between the HTTP process and the engine process: JSON with a length before it, over a socket pair.

No pickle, no TCP: nobody but the two processes can reach the pair, and a frame can only ever become plain data.
A frame is four bytes of length (big-endian) and a JSON list whose first item names it.

To the engine:    ["start", {model, config, trace}]                 the first frame
                  ["add", {id, prompt, params, slo, arrival_s, cache_salt, priority}]
                  ["abort", id, reason, stop_reason]
From the engine:  ["phase", name, share done]                       of the start-up
                  ["ready", {what was loaded}]
                  ["step", [[id, [tokens], finish_reason, stop_reason, num_cached_tokens, queued_s], ...],
                   stats or null]                                   queued_s: with a first token, else null. Two more
                                                                    items where asked: logprobs, the prompt's
                  ["refused", id, text]                             this request can never be served
                  ["error", text]                                   the engine is gone after this
"""

from __future__ import annotations

import json
import select
import socket
import struct

LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 256 * 1024 * 1024
READ_BYTES = 256 * 1024


def encode(message: list) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return LENGTH.pack(len(body)) + body


class FrameDecoder:
    """Cuts a byte stream into messages."""

    def __init__(self):
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[list]:
        """The messages that ``data`` completes. Raises ValueError for what cannot be a frame."""
        self._bytes += data
        messages, start = [], 0
        while len(self._bytes) - start >= LENGTH.size:
            (num_bytes,) = LENGTH.unpack_from(self._bytes, start)
            if num_bytes > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {num_bytes} bytes is over the limit of {MAX_FRAME_BYTES}")
            end = start + LENGTH.size + num_bytes
            if len(self._bytes) < end:
                break
            messages.append(json.loads(self._bytes[start + LENGTH.size : end]))
            start = end
        del self._bytes[:start]
        return messages


class FrameLink:
    """The engine's end: never blocks while there is work, sleeps in the kernel while there is none."""

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        self._sock = sock
        self._decoder = FrameDecoder()
        self._unsent = bytearray()

    def send(self, message: list) -> None:
        """Queues a message, sends what the socket takes; a slow reader does not hold up the engine. Raises EOFError."""
        self._unsent += encode(message)
        self._send_some()

    def receive(self, timeout_s: float | None) -> list[list]:
        """Messages that are there, waiting up to ``timeout_s`` (None: for ever) for the first. Raises EOFError at the
        other side's end."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        if not poll.poll(None if timeout_s is None else timeout_s * 1000):
            return []
        self._send_some()
        try:
            data = self._sock.recv(READ_BYTES)
        except BlockingIOError:
            return []
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError("the HTTP process has closed its end")
        return self._decoder.feed(data)

    def flush(self, timeout_s: float = 5.0) -> None:
        """Sends what is left, waiting for the other side if it must."""
        self._sock.settimeout(timeout_s)
        self._sock.sendall(self._unsent)
        self._unsent.clear()

    def _send_some(self) -> None:
        if not self._unsent:
            return
        try:
            num_sent = self._sock.send(self._unsent)
        except BlockingIOError:
            return
        except ConnectionError as error:
            raise EOFError("the HTTP process has closed its end") from error
        del self._unsent[:num_sent]
