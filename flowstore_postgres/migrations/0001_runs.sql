-- works_from: 1
--
-- One row per run. last_event is the counter of append_event: incrementing it serializes the events of a run, so
-- that sequence numbers become visible in order (EVT-1).
CREATE TABLE {schema}.runs (
    run_id        uuid        NOT NULL PRIMARY KEY,
    flow_id       uuid        NOT NULL,
    flow_name     text        NOT NULL,
    status        text        NOT NULL,
    trigger_key   text        NOT NULL,
    trigger_data  text,
    job_id        text,
    started_at    timestamptz NOT NULL,
    completed_at  timestamptz,
    source_run_id uuid,
    start_token   uuid        NOT NULL,
    last_event    bigint      NOT NULL DEFAULT 0
);
CREATE INDEX runs_by_start ON {schema}.runs (started_at DESC, run_id DESC);
CREATE INDEX runs_by_flow ON {schema}.runs (flow_id, started_at DESC, run_id DESC);
CREATE INDEX runs_by_status ON {schema}.runs (status, started_at DESC, run_id DESC);
CREATE INDEX runs_by_completion ON {schema}.runs (completed_at, status) WHERE completed_at IS NOT NULL;
CREATE INDEX runs_by_source ON {schema}.runs (source_run_id, started_at DESC, run_id DESC)
    WHERE source_run_id IS NOT NULL;

-- One row per step holds the step, its newest attempt, its claim and its dispatch, so that each call of a step's
-- lifecycle updates one row. PostgreSQL re-reads that row after waiting for it, which makes single statements safe
-- at READ COMMITTED. status is NULL before the first start, for a key that is only claimed or dispatched, and after
-- a reset. Collation "C" orders by code point (QRY-1).
CREATE TABLE {schema}.steps (
    run_id           uuid    NOT NULL,
    step_key         text    COLLATE "C" NOT NULL,
    step_type        text,
    status           text,
    last_attempt     bigint  NOT NULL DEFAULT 0,
    reopened         boolean NOT NULL DEFAULT false,
    rescheduled      boolean NOT NULL DEFAULT false,
    first_started_at timestamptz,
    started_at       timestamptz,
    completed_at     timestamptz,
    input_json       text,
    output_json      text,
    error_message    text,
    job_id           text,
    started_owner    text,
    started_token    bigint,
    closed_token     bigint,
    claim_token      text,
    claim_owned      boolean,
    claimed_at       timestamptz,
    claim_expires_at timestamptz,
    dispatch_token   bigint,
    dispatched_at    timestamptz,
    due_at           timestamptz,
    dispatch_job_id  text,
    release_token    bigint,
    PRIMARY KEY (run_id, step_key)
) WITH (fillfactor = 80);

-- The attempts before the newest one. A step that succeeds at its first attempt has no row here.
CREATE TABLE {schema}.attempts (
    run_id        uuid        NOT NULL,
    step_key      text        COLLATE "C" NOT NULL,
    attempt       bigint      NOT NULL,
    step_type     text        NOT NULL,
    status        text        NOT NULL,
    input_json    text,
    output_json   text,
    error_message text,
    job_id        text,
    started_at    timestamptz NOT NULL,
    completed_at  timestamptz NOT NULL,
    started_token bigint,
    closed_token  bigint,
    PRIMARY KEY (run_id, step_key, attempt)
);

CREATE TABLE {schema}.controls (
    run_id              uuid        NOT NULL PRIMARY KEY,
    flow_id             uuid        NOT NULL,
    trigger_key         text        NOT NULL,
    idempotency_key     text,
    timeout_at          timestamptz,
    cancel_reason       text,
    cancel_requested_at timestamptz,
    timed_out_reason    text,
    timed_out_at        timestamptz,
    created_at          timestamptz NOT NULL
);

CREATE TABLE {schema}.idempotency_keys (
    flow_id         uuid        NOT NULL,
    trigger_key     text        COLLATE "C" NOT NULL,
    idempotency_key text        COLLATE "C" NOT NULL,
    run_id          uuid        NOT NULL,
    created_at      timestamptz NOT NULL,
    PRIMARY KEY (flow_id, trigger_key, idempotency_key)
);
CREATE INDEX idempotency_keys_by_run ON {schema}.idempotency_keys (run_id);

CREATE TABLE {schema}.waiters (
    run_id       uuid        NOT NULL,
    step_key     text        COLLATE "C" NOT NULL,
    signal_name  text        NOT NULL,
    created_at   timestamptz NOT NULL,
    expires_at   timestamptz,
    delivered_at timestamptz,
    payload_json text,
    expired_at   timestamptz,
    PRIMARY KEY (run_id, step_key)
);

-- Deliveries outlive their waiters: a repeated delivery_id gets the first result until the run is deleted.
CREATE TABLE {schema}.deliveries (
    run_id       uuid        NOT NULL,
    delivery_id  text        COLLATE "C" NOT NULL,
    step_key     text        NOT NULL,
    delivered_at timestamptz NOT NULL,
    PRIMARY KEY (run_id, delivery_id)
);

CREATE TABLE {schema}.outputs (
    run_id     uuid NOT NULL,
    key        text COLLATE "C" NOT NULL,
    value_json text NOT NULL,
    PRIMARY KEY (run_id, key)
);

CREATE TABLE {schema}.events (
    run_id     uuid        NOT NULL,
    sequence   bigint      NOT NULL,
    timestamp  timestamptz NOT NULL,
    event_type text        NOT NULL,
    step_key   text,
    message    text,
    token      uuid        NOT NULL,
    PRIMARY KEY (run_id, sequence)
);
