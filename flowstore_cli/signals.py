"""``flowstore signal``: deliver a signal to a waiting step."""

from __future__ import annotations

import json
from typing import Annotated
from uuid import UUID

import typer

from flowstore_cli.failures import NO, USAGE, Failure
from flowstore_cli.printing import print_json, say
from flowstore_cli.references import Run, RunId, find_run
from flowstore_cli.stores import AsJson, Url, existing_store, new_group, read_stdin, run
from flowstore_cli.words import suggestion
from flowstore_core import RunNotFoundError, RunStatus, SignalDeliveryResult, SignalDeliveryStatus

app = new_group("Deliver signals to waiting steps.")


@app.command()
def deliver(
    reference: Run,
    name: Annotated[str, typer.Argument(metavar="SIGNAL", help="The signal's name.", show_default=False)],
    payload: Annotated[
        str, typer.Argument(metavar="PAYLOAD", help="JSON text; - reads it from standard input.")
    ] = "null",
    delivery_id: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Makes the command safe to repeat: one id delivers once."),
    ] = None,
    buffer: Annotated[
        bool, typer.Option("--buffer", help="Keep the signal for the next step that waits for it.")
    ] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Deliver a signal to a waiting step.

    If several steps wait for it, the one that has waited longest gets it. Exit code 1 if no step waits
    for it, or every waiting step already has it. With --buffer a running run keeps it instead; exit code 0.

    \b
      flowstore signal deliver RUN approval '{"approved": true}'
      flowstore signal deliver RUN approval '{"approved": true}' --buffer
      echo '{"approved": true}' | flowstore signal deliver RUN approval -

    JSON: status (Delivered, Buffered, AlreadyDelivered, NotFound), step_key, delivered_at.
    """
    text = read_stdin() if payload == "-" else payload
    try:
        json.loads(text)
    except ValueError as error:
        quoting = """quote it for the shell, as in '{"approved": true}'"""
        raise Failure(f"the payload is not JSON ({error}); {quoting}", USAGE) from None
    run_id, result, status, close = run(_deliver(url, reference, name, text, delivery_id, buffer=buffer))
    if as_json:
        print_json(result)
    elif result.status is SignalDeliveryStatus.DELIVERED:
        say(f"delivered to step {result.step_key!r}")
    elif result.status is SignalDeliveryStatus.BUFFERED:
        say(f"no step waits for signal {name!r} yet; the run keeps it for the next step that does")
    elif result.status is SignalDeliveryStatus.ALREADY_DELIVERED:
        say(f"step {result.step_key!r} already has this signal, and no other step waits for it")
    elif status is not None and status.is_terminal:
        say(
            f"the run has ended ({status}), so no step waits for a signal; "
            f"to reopen it: flowstore runs retry {run_id} STEP"
        )
    else:
        say(f"no step of the run waits for signal {name!r}; see: flowstore runs show {run_id}{close}")
    if result.status not in (SignalDeliveryStatus.DELIVERED, SignalDeliveryStatus.BUFFERED):
        raise typer.Exit(NO)


async def _deliver(
    url: str | None,
    reference: RunId,
    name: str,
    payload: str,
    delivery_id: str | None,
    *,
    buffer: bool,
) -> tuple[UUID, SignalDeliveryResult, RunStatus | None, str]:
    """Deliver; return run, result and, without a matching waiter, the run's status and a suggestion."""
    async with existing_store(url) as store:
        run_id = await find_run(store, reference)
        result = await store.deliver_signal(run_id, name, payload, delivery_id=delivery_id, buffer=buffer)
        if result.status is not SignalDeliveryStatus.NOT_FOUND:
            return run_id, result, None, ""
        status = await store.get_run_status(run_id)
        if status is None:
            raise RunNotFoundError(run_id)
        close = suggestion(name, {waiter.signal_name for waiter in await store.get_waiters(run_id)})
        return run_id, result, status, close
