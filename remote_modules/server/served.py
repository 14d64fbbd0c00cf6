"""One connection as a peer sees it: hello, requests under way, and their end."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol as Interface

from remote_modules.errors import LocalProtocolError, PeerRefused, ProtocolError, RefusalReason, RemoteProtocolError
from remote_modules.net.connection import Connection
from remote_modules.server.activations import Activations
from remote_modules.server.executor import Executor
from remote_modules.server.inbox import Inbox
from remote_modules.server.sessions import SessionTable
from remote_modules.wire import messages
from remote_modules.wire.framing import Body, Buffer
from remote_modules.wire.messages import AnyRequest, Refused
from remote_modules.wire.protocol import MessageReceived, Protocol

__all__ = ["HELLO_TIMEOUT_S", "MAX_REQUESTS_PER_CONNECTION", "Served"]

logger = logging.getLogger(__name__)

MAX_REQUESTS_PER_CONNECTION = 64
HELLO_TIMEOUT_S = 10.0  # a connection that says nothing holds no slot for longer


class Answering(Interface):
    """What is behind a peer's connections."""

    executor: Executor
    sessions: SessionTable
    activations: Activations
    inbox: Inbox
    is_draining: bool

    def hello(self, hello: messages.ClientHello) -> messages.ServerHello | messages.Reject: ...

    def new_protocol(self) -> Protocol: ...

    def forget(self, connection_id: int) -> None: ...

    async def answer(
        self, request: AnyRequest, body: Body, connection_id: int
    ) -> tuple[messages.Output, list[Buffer]]: ...


class Served:
    """A connection and its requests; `Handler.answer` does them."""

    def __init__(self, handler: Answering, connection_id: int) -> None:
        self.connection_id = connection_id
        self._handler = handler
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._is_open = False
        protocol = handler.new_protocol()
        most = 2 * protocol.max_body_bytes  # unsent to a client that does not read: two of the largest answers
        self.connection = Connection(protocol, on_message=self._receive, on_lost=self._lose, max_unsent_bytes=most)
        self._hello_timer = asyncio.get_running_loop().call_later(HELLO_TIMEOUT_S, self.connection.abort)

    @property
    def is_busy(self) -> bool:
        """Whether a request is under way, or an answer has not left yet."""
        return bool(self._tasks) or (self.connection.is_open and self.connection.has_unsent)

    def say_draining(self) -> None:
        if self._is_open and self.connection.is_open:
            self.connection.send(messages.Draining())

    def _receive(self, event: MessageReceived) -> None:
        match event.message:
            case request if isinstance(request, AnyRequest):
                self._begin(request, event.body)
            case messages.Push() as push:
                self._take(push, event.body)
            case messages.ClientHello() as hello:
                self._greet(hello)
            case messages.Cancel(request_id):
                if (task := self._tasks.get(request_id)) is not None:
                    task.cancel()
            case messages.CloseSession(session_id):
                self._handler.sessions.close(session_id)
            case messages.ReleaseGraph(request_id):
                self._handler.activations.drop(self.connection_id, request_id)
            case messages.Ping(nonce):
                self.connection.send(messages.Pong(nonce, self._handler.executor.load))

    def _take(self, push: messages.Push, body: Body) -> None:
        try:
            self._handler.inbox.put(push, body)
        except PeerRefused as exc:
            self.connection.send(Refused(push.request_id, exc.reason, str(exc)[:1000]))

    def _greet(self, hello: messages.ClientHello) -> None:
        self._hello_timer.cancel()
        answer = self._handler.hello(hello)
        self.connection.send(answer)
        if isinstance(answer, messages.Reject):
            logger.info("connection rejected software=%r: %s", hello.software, answer.text)
            self.connection.close()
            return
        self._is_open = True
        if self._handler.is_draining:
            self.say_draining()

    def _begin(self, request: AnyRequest, body: Body) -> None:
        if request.request_id in self._tasks:
            raise RemoteProtocolError(f"request id {request.request_id} is in use")
        if len(self._tasks) >= MAX_REQUESTS_PER_CONNECTION:
            text = f"{len(self._tasks)} requests are under way on this connection"
            self.connection.send(Refused(request.request_id, RefusalReason.BUSY, text, 1.0))
            return
        task = asyncio.get_running_loop().create_task(self._answer(request, body))
        self._tasks[request.request_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(request.request_id, None))

    async def _answer(self, request: AnyRequest, body: Body) -> None:
        try:
            output, buffers = await self._handler.answer(request, body, self.connection_id)
            self.connection.send(output, buffers)
        except PeerRefused as exc:
            self._refuse(request, exc.reason, str(exc), exc.retry_after_s or 0.0)
        except LocalProtocolError as exc:  # what was asked for makes an answer that may not be sent
            self._refuse(request, RefusalReason.BAD_REQUEST, str(exc), 0.0)
        except ProtocolError as exc:
            self.connection.abort(exc)
        except Exception:  # the task's boundary: a bug of ours must not leave a client waiting
            logger.exception("request failed")
            self._refuse(request, RefusalReason.INTERNAL, "internal error", 0.0)

    def _refuse(self, request: AnyRequest, reason: RefusalReason, text: str, retry_after_s: float) -> None:
        if self.connection.is_open:
            self.connection.send(Refused(request.request_id, reason, text[:1000], retry_after_s))

    def _lose(self, reason: Exception | None) -> None:
        self._hello_timer.cancel()
        logger.debug("x connection=%d reason=%s", self.connection_id, reason)
        for task in list(self._tasks.values()):
            task.cancel()
        self._handler.forget(self.connection_id)
