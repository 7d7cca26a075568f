"""The requests for the steps of a workflow: which steps may run when a run starts, and when a step ends."""

from __future__ import annotations

from collections.abc import Sequence

from flowstore_core import StepRequest
from flowstore_replay.wfcommons import Task, Workflow, WorkflowError

MAX_REQUESTS = 1_000
MAX_AFTER_KEYS = 10_000
"""Limits of one call of the store (INP-4)."""


class Requests:
    """The requests for the steps of a workflow, all of them for one queue.

    The input of a step is the output of its parent. A step with several parents has none, because the parent
    that ends last knows only its own output.
    """

    def __init__(self, workflow: Workflow, queue: str) -> None:
        """Raises WorkflowError if a store cannot dispatch the successors of a step in one call."""
        self._workflow = workflow
        self._queue = queue
        self._joins = {task.key: self._request(task) for task in workflow.tasks if len(task.parents) > 1}
        """The requests for steps with several parents; each of the parents carries it."""
        self.roots = [self._request(task) for task in workflow.tasks if not task.parents]
        """The steps that run first: the requests for trigger_run."""
        groups: dict[str, Sequence[StepRequest]] = {"the workflow": self.roots}
        groups |= {f"step {key!r}": self.after_success(key, "") for key in workflow.children}
        for name, requests in groups.items():
            after_keys = sum(len(request.after) for request in requests)
            if len(requests) > MAX_REQUESTS or after_keys > MAX_AFTER_KEYS:
                raise WorkflowError(
                    f"{name} makes {len(requests):,} steps possible that wait for {after_keys:,} steps; "
                    f"a store dispatches at most {MAX_REQUESTS:,} and {MAX_AFTER_KEYS:,} at once"
                )

    def after_success(self, key: str, output: str) -> tuple[StepRequest, ...]:
        """The direct successors of a step that succeeded."""
        return tuple(
            [
                self._joins.get(child.key) or self._request(child, output)
                for child in self._workflow.children[key]
            ]
        )

    def after_failure(self, key: str) -> list[StepRequest]:
        """The requests that skip the steps downstream of a failed step, in topological order.

        Each waits only for a step that failed or that an earlier request skips, so all are skipped at once,
        whatever the state of other parents. Beyond the limit of one call, steps just never start.
        """
        lost = {key}
        requests = []
        for task in self._workflow.tasks:
            parent = next((parent for parent in task.parents if parent in lost), None)
            if parent is not None:
                lost.add(task.key)
                requests.append(StepRequest(step_key=task.key, step_type=task.name, after=(parent,)))
        return requests[:MAX_REQUESTS]

    def _request(self, task: Task, input_json: str | None = None) -> StepRequest:
        return StepRequest(
            step_key=task.key,
            step_type=task.name,
            input_json=input_json,
            queue=self._queue,
            after=task.parents,
        )
