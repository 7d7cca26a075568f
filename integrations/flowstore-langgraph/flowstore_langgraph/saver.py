"""A LangGraph checkpointer on a flowstore store.

A thread is a run, and its checkpoints and writes are outputs of the run (see keys.py). A checkpoint is stored
with one call, all or nothing. Storing the same checkpoint or writes again changes nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Any, NamedTuple, Self
from uuid import UUID

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    PendingWrite,
    get_checkpoint_id,
    get_serializable_checkpoint_metadata,
    writes_sort_key,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from flowstore_core import (
    Capability,
    FlowStore,
    NotSupportedError,
    RunAlreadyExistsError,
    RunNotFoundError,
    RunStatus,
    open_store,
)
from flowstore_langgraph.codec import Packed, pack, unpack
from flowstore_langgraph.keys import (
    FLOW_ID,
    FLOW_NAME,
    checkpoint_key,
    namespace_prefix,
    run_id_of,
    value_key,
    writes_key,
    writes_prefix,
)
from flowstore_langgraph.loops import StoreLoop

PAGE = 100
"""Checkpoints that are read at once."""
MAX_JOB_ID = 1024
Writes = list[PendingWrite]
_PLAIN = (str, int, float, bool, type(None))


class _Stored(NamedTuple):
    """A checkpoint as it is stored."""

    checkpoint_id: str
    namespace: str
    parent_id: str | None
    checkpoint: Packed
    """The packed checkpoint, with the plain values of its channels."""
    metadata: Packed
    channels: list[str]
    """The channels whose values have outputs of their own."""


class FlowstoreSaver(BaseCheckpointSaver[int]):
    """Checkpoints of LangGraph in any flowstore store.

    ``with FlowstoreSaver.from_url(url) as saver`` for graphs that are invoked, and ``async with`` for graphs
    that are awaited. Any thread may call the sync methods; concurrent calls are sent to the database
    together. The store needs the capabilities OUTPUTS and DELETION.
    """

    def __init__(self, store: FlowStore | None = None, *, serde: SerializerProtocol | None = None) -> None:
        """Use an open store, in whose event loop this must be called; see from_url for a URL."""
        super().__init__(serde=serde)
        self._url: str | None = None
        self._options: dict[str, Any] = {}
        self._stack = AsyncExitStack()
        self._open_store: FlowStore | None = None
        self._open_loop: StoreLoop | None = None
        if store is not None:
            self._use(store, StoreLoop())

    @classmethod
    def from_url(
        cls, url: str | None = None, *, serde: SerializerProtocol | None = None, **options: Any
    ) -> Self:
        """A saver that opens the store of a URL, such as ``sqlite:///threads.db``, when it is entered.

        Without a URL the store is the one that ``flowstore.open_store()`` finds. ``options`` are passed on to
        it.
        """
        saver = cls(serde=serde)
        saver._url, saver._options = url, options
        return saver

    def __enter__(self) -> Self:
        loop = StoreLoop()
        try:
            self._use(loop.wait(self._enter_store()), loop)
        except BaseException:
            loop.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop = self._loop
        try:
            loop.wait(self._stack.aclose())
        finally:
            self._open_store = self._open_loop = None
            loop.stop()

    async def __aenter__(self) -> Self:
        self._use(await self._enter_store(), StoreLoop())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()
        self._open_store = self._open_loop = None

    async def _enter_store(self) -> FlowStore:
        return await self._stack.enter_async_context(open_store(self._url, **self._options))

    def _use(self, store: FlowStore, loop: StoreLoop) -> None:
        for capability in (Capability.OUTPUTS, Capability.DELETION):
            if capability not in store.capabilities:
                raise NotSupportedError(store.backend, capability, "FlowstoreSaver")
        self._open_store, self._open_loop = store, loop

    @property
    def _store(self) -> FlowStore:
        if self._open_store is None:
            raise RuntimeError("the saver is not open; use: with FlowstoreSaver.from_url(url) as saver")
        return self._open_store

    @property
    def _loop(self) -> StoreLoop:
        if self._open_loop is None:
            raise RuntimeError("the saver is not open; use: with FlowstoreSaver.from_url(url) as saver")
        return self._open_loop

    # The methods of a checkpointer: each sync one waits for the coroutine that its async twin awaits.

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return self._loop.wait(self._get_tuple(config))

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return await self._loop.run(self._get_tuple(config))

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 - a name of LangGraph
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        found = self._list(config, filter, before, limit)
        while (one := self._loop.wait(anext(found, None))) is not None:
            yield one

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 - a name of LangGraph
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        found = self._list(config, filter, before, limit)
        while (one := await self._loop.run(anext(found, None))) is not None:
            yield one

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        return self._loop.wait(self._put(config, checkpoint, metadata, new_versions))

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        return await self._loop.run(self._put(config, checkpoint, metadata, new_versions))

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        self._loop.wait(self._put_writes(config, writes, task_id, task_path))

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        await self._loop.run(self._put_writes(config, writes, task_id, task_path))

    def delete_thread(self, thread_id: str) -> None:
        self._loop.wait(self._delete_thread(thread_id))

    async def adelete_thread(self, thread_id: str) -> None:
        await self._loop.run(self._delete_thread(thread_id))

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        self._loop.wait(self._delete_for_runs(run_ids))

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints whose metadata has one of these run ids. Reads every thread of the store."""
        await self._loop.run(self._delete_for_runs(run_ids))

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        self._loop.wait(self._copy_thread(source_thread_id, target_thread_id))

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        await self._loop.run(self._copy_thread(source_thread_id, target_thread_id))

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        self._loop.wait(self._prune(thread_ids, strategy))

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Keep the newest checkpoint of each namespace and what its DeltaChannels need, or delete all."""
        await self._loop.run(self._prune(thread_ids, strategy))

    # Reading

    async def _get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        thread_id, namespace = _thread_of(config)
        checkpoint_id = get_checkpoint_id(config)
        run_id = run_id_of(thread_id)
        if checkpoint_id is not None:
            text = await self._store.get_output(run_id, checkpoint_key(namespace, checkpoint_id))
        else:
            newest = await self._store.get_outputs(run_id, prefix=namespace_prefix("c", namespace), take=1)
            text = next(iter(newest.values()), None)
            if text is None:
                await self._finish_deletion(thread_id)
        return None if text is None else await self._load(thread_id, _stored(text))

    async def _list(
        self,
        config: RunnableConfig | None,
        wanted: dict[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
    ) -> AsyncIterator[CheckpointTuple]:
        before_id = None if before is None else get_checkpoint_id(before)
        count = 0
        async for thread_id in (
            self._threads() if config is None else _only(str(_configurable(config)["thread_id"]))
        ):
            async for stored in self._checkpoints(thread_id, config or {}, before_id):
                metadata = unpack(self.serde, stored.metadata)
                if wanted and any(metadata.get(key) != value for key, value in wanted.items()):
                    continue
                if limit is not None and count >= limit:
                    return
                count += 1
                yield await self._load(thread_id, stored)

    async def _threads(self) -> AsyncIterator[str]:
        """The ids of all threads, the newest first."""
        after = None
        while runs := await self._store.get_runs(FLOW_ID, after=after, take=PAGE):
            for run in runs:
                yield json.loads(run.trigger_data or "{}")["thread_id"]
            after = runs[-1].position

    async def _checkpoints(
        self, thread_id: str, config: Mapping[str, Any], before_id: str | None
    ) -> AsyncIterator[_Stored]:
        """The checkpoints of a thread that match a config, the newest first."""
        configurable = config.get("configurable", {})
        run_id, checkpoint_id = run_id_of(thread_id), configurable.get("checkpoint_id")
        namespace = configurable.get("checkpoint_ns")
        if namespace is not None and checkpoint_id is not None:
            text = await self._store.get_output(run_id, checkpoint_key(namespace, checkpoint_id))
            if text is not None and (before_id is None or checkpoint_id < before_id):
                yield _stored(text)
        elif namespace is not None:
            prefix = namespace_prefix("c", namespace)
            after = None if before_id is None else checkpoint_key(namespace, before_id)
            async for _, text in self._outputs(thread_id, prefix, after):
                yield _stored(text)
        else:
            # The namespaces are unknown, and their checkpoints must be merged by id.
            found = [_stored(text) async for _, text in self._outputs(thread_id, "c/")]
            for one in sorted(found, key=lambda one: one.checkpoint_id, reverse=True):
                if checkpoint_id in (None, one.checkpoint_id) and (
                    before_id is None or one.checkpoint_id < before_id
                ):
                    yield one

    async def _outputs(
        self, thread_id: str, prefix: str, after: str | None = None
    ) -> AsyncIterator[tuple[str, str]]:
        """The outputs of a thread's run with a prefix, in the order of their keys, read in pages."""
        while True:
            page = await self._store.get_outputs(run_id_of(thread_id), prefix=prefix, after=after, take=PAGE)
            for after, text in page.items():
                yield after, text
            if len(page) < PAGE:
                return

    async def _load(self, thread_id: str, stored: _Stored) -> CheckpointTuple:
        """A checkpoint with the values of its channels and its pending writes."""
        run_id, namespace = run_id_of(thread_id), stored.namespace
        checkpoint: Checkpoint = unpack(self.serde, stored.checkpoint)
        versions = checkpoint["channel_versions"]
        keys = [value_key(namespace, channel, versions[channel]) for channel in stored.channels]
        writes, values = await asyncio.gather(
            self._read_writes(run_id, namespace, stored.checkpoint_id),
            asyncio.gather(*(self._store.get_output(run_id, key) for key in keys)),
        )
        for channel, text in zip(stored.channels, values, strict=True):
            if text is not None:
                checkpoint["channel_values"][channel] = unpack(self.serde, json.loads(text))
        return CheckpointTuple(
            config=_config(thread_id, namespace, stored.checkpoint_id),
            checkpoint=checkpoint,
            metadata=unpack(self.serde, stored.metadata),
            parent_config=_config(thread_id, namespace, stored.parent_id) if stored.parent_id else None,
            pending_writes=writes,
        )

    async def _read_writes(self, run_id: UUID, namespace: str, checkpoint_id: str) -> Writes:
        found = await self._store.get_outputs(run_id, prefix=writes_prefix(namespace, checkpoint_id))
        writes = [tuple(write) for text in found.values() for write in json.loads(text)]
        writes.sort(key=lambda write: writes_sort_key(write[1], write[0], write[2]))
        return [(task_id, channel, unpack(self.serde, packed)) for task_id, _, _, channel, packed in writes]

    # Writing

    async def _put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        thread_id, namespace = _thread_of(config)
        parent_id = get_checkpoint_id(config)
        versions = checkpoint["channel_versions"]
        plain: dict[str, Any] = {}
        outputs: dict[str, str] = {}
        channels = []
        for channel, value in checkpoint["channel_values"].items():
            if channel not in versions or isinstance(value, _PLAIN):
                plain[channel] = value
                continue
            channels.append(channel)
            # The value of an older version is stored already, except by the first checkpoint of a lineage.
            if channel in new_versions or parent_id is None:
                key = value_key(namespace, channel, versions[channel])
                outputs[key] = json.dumps(pack(self.serde, value))
        stored = _Stored(
            checkpoint["id"],
            namespace,
            parent_id,
            pack(self.serde, {**checkpoint, "channel_values": plain}),
            pack(self.serde, get_serializable_checkpoint_metadata(config, metadata)),
            channels,
        )
        outputs[checkpoint_key(namespace, checkpoint["id"])] = json.dumps(stored)
        await self._save(thread_id, outputs)
        return _config(thread_id, namespace, checkpoint["id"])

    async def _put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
    ) -> None:
        thread_id, namespace = _thread_of(config)
        checkpoint_id = get_checkpoint_id(config)
        if checkpoint_id is None:
            raise ValueError("config['configurable'] must have the checkpoint_id that the writes belong to")
        groups: dict[int | None, list[Any]] = {}
        for index, (channel, value) in enumerate(writes):
            special = WRITES_IDX_MAP.get(channel)
            place = index if special is None else special
            write = [task_id, task_path, place, channel, pack(self.serde, value)]
            if special is None:
                groups.setdefault(None, []).append(write)
            else:
                groups[special] = [write]
        await self._save(
            thread_id,
            {
                writes_key(namespace, checkpoint_id, task_id, special): json.dumps(group)
                for special, group in groups.items()
            },
        )

    async def _save(self, thread_id: str, outputs: Mapping[str, str]) -> None:
        """Store outputs of a thread's run, which the first call of a thread starts."""
        run_id = run_id_of(thread_id)
        while True:
            try:
                return await self._store.save_outputs(run_id, outputs)
            except RunNotFoundError:
                # Another caller may have started it.
                with suppress(RunAlreadyExistsError):
                    await self._store.start_run(
                        FLOW_ID,
                        FLOW_NAME,
                        run_id,
                        "thread",
                        trigger_data=json.dumps({"thread_id": thread_id}),
                        # The job id of a run is searched by `flowstore runs list --search`.
                        job_id=thread_id if 0 < len(thread_id) <= MAX_JOB_ID else None,
                    )

    # Deleting and copying

    async def _delete_thread(self, thread_id: str) -> None:
        # At once for readers. The empty run goes next; after a crash in between, get_tuple finishes it.
        run_id = run_id_of(thread_id)
        await self._store.delete_outputs(run_id, prefix="")
        if await self._store.get_run_status(run_id) is not None:
            await self._store.complete_run(run_id, RunStatus.CANCELLED)
            await self._store.delete_run(run_id)

    async def _finish_deletion(self, thread_id: str) -> None:
        """Delete the run of a thread whose deletion was interrupted."""
        status = await self._store.get_run_status(run_id_of(thread_id))
        if status is not None and status.is_terminal:
            await self._store.delete_run(run_id_of(thread_id))

    async def _delete_for_runs(self, run_ids: Sequence[str]) -> None:
        wanted = {str(run_id) for run_id in run_ids}
        if not wanted:
            return
        async for thread_id in self._threads():
            stored = [_stored(text) async for _, text in self._outputs(thread_id, "c/")]
            gone = [one for one in stored if unpack(self.serde, one.metadata).get("run_id") in wanted]
            if gone:
                kept = [one for one in stored if one not in gone]
                await self._keep(thread_id, kept, gone)

    async def _prune(self, thread_ids: Sequence[str], strategy: str) -> None:
        if isinstance(thread_ids, str):
            raise TypeError("thread_ids must be a sequence of thread ids, not a str")
        if strategy not in ("keep_latest", "delete", "delete_all"):
            raise ValueError(f"strategy must be 'keep_latest' or 'delete', not {strategy!r}")
        for thread_id in thread_ids:
            if strategy != "keep_latest":
                await self._delete_thread(thread_id)
                continue
            stored = [_stored(text) async for _, text in self._outputs(thread_id, "c/")]
            newest: dict[str, _Stored] = {}
            for one in stored:
                newest.setdefault(one.namespace, one)
            by_id = {(one.namespace, one.checkpoint_id): one for one in stored}
            kept = {key for one in newest.values() for key in self._needed(one, by_id)}
            await self._keep(
                thread_id,
                [one for key, one in by_id.items() if key in kept],
                [one for key, one in by_id.items() if key not in kept],
            )

    def _needed(self, stored: _Stored, by_id: Mapping[tuple[str, str], _Stored]) -> Iterator[tuple[str, str]]:
        """A checkpoint, and the ancestors from which its DeltaChannels are rebuilt."""
        deltas: set[str] | None = None
        one: _Stored | None = stored
        while one is not None:
            yield one.namespace, one.checkpoint_id
            if deltas is None:
                deltas = set(unpack(self.serde, one.metadata).get("counters_since_delta_snapshot") or ())
            plain = unpack(self.serde, one.checkpoint)["channel_values"]
            deltas -= {*one.channels, *plain}
            if not deltas or one.parent_id is None:
                return
            one = by_id.get((one.namespace, one.parent_id))

    async def _keep(self, thread_id: str, kept: Collection[_Stored], gone: Collection[_Stored]) -> None:
        """Delete checkpoints with their writes, and the values that no kept checkpoint has."""
        run_id = run_id_of(thread_id)
        for one in gone:
            # The checkpoint first: what a crash leaves behind is not seen, and the next pruning deletes it.
            await self._store.delete_outputs(run_id, prefix=checkpoint_key(one.namespace, one.checkpoint_id))
            await self._store.delete_outputs(run_id, prefix=writes_prefix(one.namespace, one.checkpoint_id))
        needed = {key for one in kept for key in self._value_keys(one)}
        for key in {key for one in gone for key in self._value_keys(one)} - needed:
            await self._store.delete_outputs(run_id, prefix=key)

    def _value_keys(self, stored: _Stored) -> Collection[str]:
        versions = unpack(self.serde, stored.checkpoint)["channel_versions"]
        return [value_key(stored.namespace, channel, versions[channel]) for channel in stored.channels]

    async def _copy_thread(self, source: str, target: str) -> None:
        # A checkpoint comes after the values that it needs: c/ last.
        for prefix in ("b/", "w/", "c/"):
            async for key, text in self._outputs(source, prefix):
                await self._save(target, {key: text})


async def _only(thread_id: str) -> AsyncIterator[str]:
    yield thread_id


def _stored(text: str) -> _Stored:
    return _Stored(*json.loads(text))


def _configurable(config: RunnableConfig) -> dict[str, Any]:
    return config.get("configurable") or {}


def _thread_of(config: RunnableConfig) -> tuple[str, str]:
    configurable = _configurable(config)
    if "thread_id" not in configurable:
        raise ValueError("config['configurable'] must have a thread_id")
    return str(configurable["thread_id"]), configurable.get("checkpoint_ns") or ""


def _config(thread_id: str, namespace: str, checkpoint_id: str) -> RunnableConfig:
    return {
        "configurable": {
            "thread_id": thread_id,
            "checkpoint_ns": namespace,
            "checkpoint_id": checkpoint_id,
        }
    }
