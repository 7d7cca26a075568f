"""Intents: operations that need several commits, which any process finishes when it meets them.

A run with an intent has been changed already: every operation of the run finishes the intent first, and so
does every query of many runs. Each commit expects the gate, so it has no effect once another process has
finished the intent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from uuid import UUID

from msgspec.structs import replace

from flowstore_core import RunStatus, StepStatus
from flowstore_core.backend import ShieldedTasks
from flowstore_documents import keys
from flowstore_documents.codec import decode, encode
from flowstore_documents.committer import Committer
from flowstore_documents.documents import ControlDocument, Intent, IntentKind, KeyDocument, RunDocument
from flowstore_documents.run_state import TEXT_TOKENS, RunState, read_run, unpack_writes
from flowstore_documents.space import Change, Range, Version, Versioned
from flowstore_documents.texts import piece_keys
from flowstore_documents.transactions import Transaction, Transactions, staged_marks

DELETED_PAGE = 200
"""Number of keys of a deleted run that are read at once."""


class Intents:
    """Finishes the intents of runs."""

    def __init__(self, transactions: Transactions, committer: Committer, shielded: ShieldedTasks) -> None:
        self._transactions = transactions
        self._committer = committer
        self._shielded = shielded

    async def roll_forward(self, run_id: UUID) -> None:
        """Finish the intent of a run, if it still has one."""
        await self._shielded.run(self._roll_forward(run_id))

    async def _roll_forward(self, run_id: UUID) -> None:
        gate = await self._transactions.run("roll_forward", lambda tx: _read_gate(tx, run_id))
        intent = None if gate is None else decode(RunDocument, gate.value).intent
        if gate is None or intent is None:
            return
        if intent.kind is IntentKind.APPLY:
            await self._apply(run_id, gate, intent)
        elif intent.kind is IntentKind.REGISTER:
            await self._register(run_id, gate, intent)
        elif intent.kind is IntentKind.GIVE_UP:
            await self._give_up(run_id, gate, intent)
        elif intent.kind is IntentKind.DELETE:
            await self._delete(run_id, gate)
        else:
            await self._complete(run_id, intent)

    async def _read_staged(
        self, run_id: UUID, intent: Intent
    ) -> tuple[dict[bytes, bytes], list[bytes]] | None:
        """The staged puts and deletes; None if another process has finished the intent."""
        pieces = _pieces(run_id, intent)

        async def read(tx: Transaction) -> bytes | None:
            packed = bytearray()
            for start in range(0, len(pieces), 16):
                some = pieces[start : start + 16]
                found = (await tx.read(some, expect=False)).found
                if len(found) < len(some):
                    return None
                packed += b"".join(found[key].value for key in some)
            return bytes(packed)

        packed = await self._transactions.run("roll_forward", read)
        return None if packed is None else unpack_writes(packed)

    async def _apply(self, run_id: UUID, gate: Versioned, intent: Intent) -> None:
        staged = await self._read_staged(run_id, intent)
        if staged is None:
            return
        puts, deletes = staged
        puts.pop(TEXT_TOKENS, None)
        key = keys.gate(run_id)
        expected = {key: gate.version}
        opened = puts.pop(key)
        if not await self._transactions.write_all("roll_forward", expected, puts, deletes):
            return
        has_another = decode(RunDocument, opened).intent is not None
        last = Change(expected, {key: opened}, [] if has_another else [keys.intent(run_id)])
        if await self._committer.commit("roll_forward", last):
            await self._transactions.write_all("roll_forward", {}, {}, _pieces(run_id, intent))

    async def _register(self, run_id: UUID, gate: Versioned, intent: Intent) -> None:
        """Register the keys of an import, unless one is registered to another run, and delete older ones.

        All imports register their keys in one order, so that no two of them wait for each other.
        """
        staged = await self._read_staged(run_id, intent)
        if staged is None:
            return
        puts, _ = staged
        key, run = keys.gate(run_id), decode(RunDocument, gate.value)
        expected = {key: gate.version}
        for name in sorted(name for name in puts if name.startswith(keys.KEYS)):
            found = await self._transactions.run("roll_forward", partial(_find_registered, run_id, name))
            if found is not None and decode(KeyDocument, found.value).run_id == run_id:
                continue
            if found is not None:
                run.intent = replace(intent, kind=IntentKind.GIVE_UP)
                mark = keys.piece(run_id, intent.call, 0)
                change = Change({**expected, name: found.version}, {key: encode(run), mark: b""})
                await self._committer.commit("roll_forward", change)
                return
            if not await self._committer.commit(
                "roll_forward", Change({**expected, name: None}, {name: puts[name]})
            ):
                return
        older = keys.prefix_range(keys.keys_of_run(run_id))
        for name, value in await self._transactions.run("roll_forward", lambda tx: tx.scan(older)):
            if name not in puts and not await self._delete_key(run_id, expected, name, value):
                return
        run.intent = replace(intent, kind=IntentKind.APPLY)
        await self._committer.commit("roll_forward", Change(expected, {key: encode(run)}))

    async def _delete_key(
        self, run_id: UUID, expected: Mapping[bytes, Version | None], name: bytes, value: Versioned
    ) -> bool:
        """Delete an idempotency key. False if it or the gate has changed.

        Afterwards another run may register the key, so it must not be deleted twice.
        """
        scope = name[len(keys.keys_of_run(run_id)) :]
        created_at = decode(KeyDocument, value.value).created_at
        deletes = [name, keys.idempotency_key(scope), keys.orphan(created_at, run_id, scope)]
        change = Change({**expected, name: value.version}, {}, deletes)
        return await self._committer.commit("roll_forward", change)

    async def _give_up(self, run_id: UUID, gate: Versioned, intent: Intent) -> None:
        """Undo an import: delete the keys that it has registered, and leave its pieces to cleanup."""
        staged = await self._read_staged(run_id, intent)
        if staged is None:
            return
        puts, _ = staged
        key = keys.gate(run_id)
        expected = {key: gate.version}
        for name in sorted(name for name in puts if name.startswith(keys.KEYS)):
            # A key that was registered before the import has a document of its run too.
            own = keys.key_of_run(run_id, name[len(keys.KEYS) :])

            async def find(tx: Transaction, name: bytes = name, own: bytes = own) -> Versioned | None:
                found = (await tx.read([name, own])).found
                return None if own in found else found.get(name)

            found = await self._transactions.run("roll_forward", find)
            if found is None or decode(KeyDocument, found.value).run_id != run_id:
                continue
            change = Change({**expected, name: found.version, own: None}, {}, [name])
            if not await self._committer.commit("roll_forward", change):
                return
        now = await self._committer.space_time("roll_forward")
        tokens = [intent.call, intent.token, *filter(None, puts[TEXT_TOKENS].decode().split("\0"))]
        marks = staged_marks(now, run_id, tokens)
        if await self._transactions.write_all("roll_forward", expected, marks, ()):
            last = Change(expected, {}, [key, keys.intent(run_id)])
            await self._committer.commit("roll_forward", last)

    async def _complete(self, run_id: UUID, intent: Intent) -> None:
        async def complete(tx: Transaction) -> None:
            run = tx.run = RunState(tx, run_id)
            run.finishes_intent = True
            await run.load(control=True, ahead=ranges_of_expected(run_id, intent.expected))
            if run.run is None or run.run.intent is None or run.run.intent.token != intent.token:
                return
            text = await tx.read_texts(run_id, [intent.expected])
            arguments = text(intent.expected)
            expected = None
            if arguments is not None:
                expected = {key: StepStatus(status) for key, status in json.loads(arguments).items()}
            run.run.intent = None
            for piece in piece_keys(run_id, intent.expected):
                tx.delete(piece)
            now = await tx.now()
            assert intent.status is not None
            if await is_as_expected(run, expected, now):
                complete_run(run.run, intent.status, now)
                run.run.completed_by = intent.token

        await self._transactions.run("roll_forward", complete)

    async def _delete(self, run_id: UUID, gate: Versioned) -> None:
        """Delete every key of a run whose gate says that it is deleted; the gate itself comes last."""
        key = keys.gate(run_id)
        expected = {key: gate.version}
        prefix = keys.run_prefix(run_id)

        async def read(tx: Transaction) -> list[tuple[bytes, Versioned]]:
            return await tx.scan(keys.prefix_range(prefix, DELETED_PAGE))

        while True:
            items = await self._transactions.run("roll_forward", read)
            deletes = []
            for name, value in items:
                if name.startswith(keys.keys_of_run(run_id)):
                    if not await self._delete_key(run_id, expected, name, value):
                        return
                elif name != key:
                    deletes.append(name)
                if name == keys.control(run_id):
                    deletes.append(keys.orphan(decode(ControlDocument, value.value).created_at, run_id))
            if len(items) <= 1:
                break
            if not await self._transactions.write_all("roll_forward", expected, {}, deletes):
                return
        await self._committer.commit("roll_forward", Change(expected, {}, [key, keys.intent(run_id)]))


async def _read_gate(tx: Transaction, run_id: UUID) -> Versioned | None:
    return (await tx.read([keys.gate(run_id)])).found.get(keys.gate(run_id))


def _pieces(run_id: UUID, intent: Intent) -> list[bytes]:
    return [keys.piece(run_id, intent.token, number) for number in range(intent.count)]


async def _find_registered(run_id: UUID, name: bytes, tx: Transaction) -> Versioned | None:
    """The document of an idempotency key, once an intent of the other run that has it is finished."""
    found = (await tx.read([name])).found.get(name)
    if found is None or (other := decode(KeyDocument, found.value).run_id) == run_id:
        return found
    # A run that is being imported keeps a key that it had before, until its import ends. Nobody waits for it:
    # imports that wait for each other would wait for ever.
    gate, own = keys.gate(other), keys.key_of_run(other, name[len(keys.KEYS) :])
    view = (await tx.read([gate, own])).found
    intent = decode(RunDocument, view[gate].value).intent if gate in view else None
    if own not in view or intent is None or intent.kind not in (IntentKind.REGISTER, IntentKind.GIVE_UP):
        await read_run(tx, other)
    return found


def ranges_of_expected(run_id: UUID, expected: object | None) -> Sequence[Range]:
    """What is_as_expected scans."""
    if expected is None:
        return [keys.prefix_range(keys.open_marks(run_id), keys_only=True)]
    return [keys.prefix_range(keys.steps(run_id))]


async def is_as_expected(run: RunState, expected: Mapping[str, StepStatus] | None, now: datetime) -> bool:
    """Whether the statuses equal ``expected`` and no other key is claimed or dispatched (RUN-2).

    The commit then needs that no step changes. Without ``expected`` the open steps are read nevertheless,
    because they leave the queues when the run ends.
    """
    if expected is None:
        await run.load_open_steps()
        return True
    await run.load_all_steps()
    statuses = {key: step.status for key, step in run.steps.items() if step.status is not None}
    return statuses == expected and not any(
        step.status is None and step.blocks_completion(now) for step in run.steps.values()
    )


def complete_run(run: RunDocument, status: RunStatus, now: datetime) -> None:
    """End a run."""
    run.status = status
    run.completed_at = now
