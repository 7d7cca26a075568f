-- works_from: 1
--
-- Times are whole microseconds since 1970-01-01 UTC (negative before it) and ids are 16 bytes, so both sort
-- in the order of the contract. Text is compared bytewise, which in UTF-8 is code point order. WITHOUT ROWID
-- stores rows in the B-tree of the primary key: every further index costs on every write. Large columns come
-- last, so that reading the others does not touch overflow pages.

CREATE TABLE runs (
    run_id        BLOB NOT NULL PRIMARY KEY,
    flow_id       BLOB NOT NULL,
    status        TEXT NOT NULL,
    started_at    INTEGER NOT NULL,
    completed_at  INTEGER,            -- NULL if and only if status is Running
    source_run_id BLOB,
    flow_name     TEXT NOT NULL,
    trigger_key   TEXT NOT NULL,
    job_id        TEXT,
    trigger_data  TEXT
) STRICT, WITHOUT ROWID;

-- Index entries end with the primary key run_id, which completes the order of QRY-1.
CREATE INDEX runs_started ON runs (started_at);
CREATE INDEX runs_of_flow ON runs (flow_id, started_at);
CREATE INDEX runs_active ON runs (started_at) WHERE status = 'Running';
CREATE INDEX runs_completed ON runs (completed_at, status) WHERE completed_at IS NOT NULL;
CREATE INDEX runs_derived ON runs (source_run_id, started_at) WHERE source_run_id IS NOT NULL;

-- A row is a step with its newest attempt, its claim and its dispatch.
CREATE TABLE steps (
    run_id               BLOB NOT NULL,
    step_key             TEXT NOT NULL,
    status               TEXT,        -- NULL: not started (only claimed or dispatched), or reset
    last_attempt         INTEGER NOT NULL DEFAULT 0, -- highest attempt number
    reopened             INTEGER NOT NULL DEFAULT 0, -- 1 from retry_step until the next start
    rescheduled          INTEGER NOT NULL DEFAULT 0, -- 1 after reschedule_step for the newest attempt
    started_at           INTEGER,     -- of the first attempt
    attempt_started_at   INTEGER,     -- of the newest attempt
    attempt_completed_at INTEGER,     -- of the newest attempt, also if closed as Pending
    claimed_at           INTEGER,     -- NULL: no claim
    expires_at           INTEGER,     -- NULL: no lease
    claim_token          INTEGER,     -- of a claim without owner, for its compensation
    dispatched_at        INTEGER,     -- NULL: no dispatch
    due_at               INTEGER,
    dispatch_token       INTEGER,     -- of the call that recorded the dispatch, for its compensation
    claim_owner          TEXT,
    started_owner        TEXT,        -- owner that started the newest attempt under the current claim
    dispatch_job_id      TEXT,
    step_type            TEXT,
    job_id               TEXT,
    error_message        TEXT,
    output_json          TEXT,
    input_json           TEXT,
    PRIMARY KEY (run_id, step_key)
) STRICT, WITHOUT ROWID;

-- Earlier attempts, and the newest attempt of a reopened or reset step.
CREATE TABLE attempts (
    run_id        BLOB NOT NULL,
    step_key      TEXT NOT NULL,
    attempt       INTEGER NOT NULL,
    status        TEXT NOT NULL,
    started_at    INTEGER NOT NULL,
    completed_at  INTEGER NOT NULL,
    step_type     TEXT NOT NULL,
    job_id        TEXT,
    error_message TEXT,
    output_json   TEXT,
    input_json    TEXT,
    PRIMARY KEY (run_id, step_key, attempt)
) STRICT, WITHOUT ROWID;

CREATE TABLE controls (
    run_id           BLOB NOT NULL PRIMARY KEY,
    flow_id          BLOB NOT NULL,
    created_at       INTEGER NOT NULL,
    timeout_at       INTEGER,
    cancelled_at     INTEGER,         -- latch of the user
    timed_out_at     INTEGER,         -- latch of the timeout
    trigger_key      TEXT NOT NULL,
    idempotency_key  TEXT,
    cancel_reason    TEXT,
    timed_out_reason TEXT
) STRICT, WITHOUT ROWID;

CREATE INDEX controls_created ON controls (created_at);

CREATE TABLE idempotency_keys (
    flow_id         BLOB NOT NULL,
    trigger_key     TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,
    run_id          BLOB NOT NULL,
    created_at      INTEGER NOT NULL,
    PRIMARY KEY (flow_id, trigger_key, idempotency_key)
) STRICT, WITHOUT ROWID;

CREATE INDEX idempotency_keys_of_run ON idempotency_keys (run_id);
CREATE INDEX idempotency_keys_created ON idempotency_keys (created_at);

CREATE TABLE waiters (
    run_id       BLOB NOT NULL,
    step_key     TEXT NOT NULL,
    signal_name  TEXT NOT NULL,
    created_at   INTEGER NOT NULL,
    expires_at   INTEGER,
    delivered_at INTEGER,
    expired_at   INTEGER,
    payload_json TEXT,
    PRIMARY KEY (run_id, step_key)
) STRICT, WITHOUT ROWID;

-- Kept when the waiter is removed, so that a repeated delivery returns the first result.
CREATE TABLE deliveries (
    run_id       BLOB NOT NULL,
    delivery_id  TEXT NOT NULL,
    step_key     TEXT NOT NULL,
    delivered_at INTEGER NOT NULL,
    PRIMARY KEY (run_id, delivery_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE outputs (
    run_id     BLOB NOT NULL,
    output_key TEXT NOT NULL,
    value_json TEXT NOT NULL,
    PRIMARY KEY (run_id, output_key)
) STRICT, WITHOUT ROWID;

CREATE TABLE events (
    run_id     BLOB NOT NULL,
    sequence   INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    event_type TEXT NOT NULL,
    step_key   TEXT,
    message    TEXT,
    PRIMARY KEY (run_id, sequence)
) STRICT, WITHOUT ROWID;
