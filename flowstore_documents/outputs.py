"""Outputs of a run (EVT-2)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from uuid import UUID

from flowstore_core.outputs import end_of_prefix
from flowstore_documents import keys
from flowstore_documents.access import Access
from flowstore_documents.codec import decode, encode
from flowstore_documents.documents import OutputDocument
from flowstore_documents.run_state import change_run, read_run
from flowstore_documents.space import Range
from flowstore_documents.texts import piece_keys
from flowstore_documents.transactions import Transaction


class Outputs(Access):
    async def save_output(self, run_id: UUID, key: str, value_json: str) -> None:
        name = keys.output(run_id, key)

        async def save(tx: Transaction) -> None:
            run = await change_run(tx, run_id, more=[name])
            run.check_stored()
            old = run.value(name)
            if old is not None:
                _delete_pieces(tx, run_id, old)
            tx.put(name, encode(OutputDocument(tx.text(value_json, owner=name))))
            tx.put(keys.outputs_tick(run_id))

        await self._write("save_output", save)

    async def save_outputs(self, run_id: UUID, outputs: Mapping[str, str]) -> None:
        async def save(tx: Transaction) -> None:
            # The tick stands for all outputs.
            run = await change_run(tx, run_id, more=[keys.outputs_tick(run_id)])
            run.check_stored()
            old = await tx.read([keys.output(run_id, key) for key in outputs], expect=False)
            for key, value_json in outputs.items():
                name = keys.output(run_id, key)
                if name in old.found:
                    _delete_pieces(tx, run_id, old.found[name].value)
                tx.put(name, encode(OutputDocument(tx.text(value_json, owner=name))))
            if outputs:
                tx.put(keys.outputs_tick(run_id))

        await self._write("save_outputs", save)

    async def get_output(self, run_id: UUID, key: str) -> str | None:
        name = keys.output(run_id, key)

        async def read(tx: Transaction) -> str | None:
            found = (await read_run(tx, run_id, more=[name])).value(name)
            if found is None:
                return None
            value = decode(OutputDocument, found).value
            return (await tx.read_texts(run_id, [value]))(value)

        return await self._read("get_output", read)

    async def get_outputs(
        self, run_id: UUID, *, prefix: str = "", after: str | None = None, take: int | None = None
    ) -> Mapping[str, str]:
        async def read(tx: Transaction) -> Mapping[str, str]:
            wanted = _range_of_prefix(run_id, prefix)
            if after is not None and (start := keys.output(run_id, after) + b"\0") > wanted.start:
                wanted = Range(start, max(start, wanted.end))
            wanted = Range(wanted.start, wanted.end, take)
            await read_run(tx, run_id, ahead=[wanted])
            return MappingProxyType(await read_outputs(tx, run_id, wanted) if take != 0 else {})

        return await self._read("get_outputs", read)

    async def delete_outputs(self, run_id: UUID, *, prefix: str) -> int:
        async def delete(tx: Transaction) -> int:
            wanted = _range_of_prefix(run_id, prefix)
            # The tick changes with every output, so no other one has the prefix.
            run = await change_run(tx, run_id, more=[keys.outputs_tick(run_id)], ahead=[wanted])
            if run.run is None:
                return 0
            found = await tx.scan(wanted)
            for key, value in found:
                tx.delete(key)
                _delete_pieces(tx, run_id, value.value)
            if found:
                tx.put(keys.outputs_tick(run_id))
            return len(found)

        return await self._write("delete_outputs", delete)


async def read_outputs(tx: Transaction, run_id: UUID, wanted: Range) -> dict[str, str]:
    """The outputs in a range of their keys."""
    values = [
        (keys.parse_last_name(key, keys.outputs(run_id)), decode(OutputDocument, value.value).value)
        for key, value in await tx.scan(wanted)
    ]
    text = await tx.read_texts(run_id, [value for _, value in values])
    return {key: text(value) or "" for key, value in values}


def _range_of_prefix(run_id: UUID, prefix: str) -> Range:
    """The outputs whose key begins with a prefix."""
    start = keys.outputs(run_id) + prefix.encode()
    return Range(start, keys.outputs(run_id) + end_of_prefix(prefix).encode())


def _delete_pieces(tx: Transaction, run_id: UUID, output: bytes) -> None:
    for key in piece_keys(run_id, decode(OutputDocument, output).value):
        tx.delete(key)
