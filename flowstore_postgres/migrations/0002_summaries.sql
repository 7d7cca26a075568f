-- works_from: 1
--
-- Counters for dashboards, updated in the transaction of each change. Reading them costs the same for any number of
-- runs, and they are exact in every snapshot.
--
-- Triggers update them rather than the store's statements, so they also count the writes of an older flowstore, a
-- bulk load and a manual DELETE. To load many runs, COPY or INSERT ... SELECT into runs (and steps). A trigger adds
-- about 20 microseconds to the start of a run and 30 to its end, about the cost of the index that is dropped here.
-- Statement-level triggers took 33 and 51, and 35 on every append_event.
--
-- A change inserts rows into run_changes and updates no shared row. Writers therefore never wait for each other, and
-- a long snapshot (a dump) does not slow them down, as it would with shared counters. Occasionally a writer folds the
-- rows into run_counts and run_days. A counter is the sum over both tables, so folding does not change it.

-- Writers and readers wait until the stored runs are counted and the indexes are built.
LOCK TABLE {schema}.runs IN ACCESS EXCLUSIVE MODE;

-- A page is an ordered scan of one of the two indexes; without a status it merges the scans of all four statuses.
CREATE INDEX runs_by_flow_and_status ON {schema}.runs (flow_id, status, started_at DESC, run_id DESC);
DROP INDEX {schema}.runs_by_flow;
DROP INDEX {schema}.runs_by_start;

-- For the deletion of orphans (RET-4).
CREATE INDEX controls_by_creation ON {schema}.controls (created_at);
CREATE INDEX idempotency_keys_by_creation ON {schema}.idempotency_keys (created_at);

CREATE TABLE {schema}.run_changes (
    flow_id      uuid    NOT NULL,
    started_on   date    NOT NULL,
    completed_on date,
    status       text    NOT NULL,
    amount       integer NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);
-- Until migration 7 adds a key: without an identity of its rows, a publication FOR ALL TABLES refuses every
-- DELETE, and so the fold at the end of this migration.
ALTER TABLE {schema}.run_changes REPLICA IDENTITY FULL;

-- The stored runs of each flow, by status.
CREATE TABLE {schema}.run_counts (
    flow_id   uuid   NOT NULL PRIMARY KEY,
    running   bigint NOT NULL,
    succeeded bigint NOT NULL,
    failed    bigint NOT NULL,
    cancelled bigint NOT NULL
);

-- The stored runs that were completed on each day (UTC), and the number of changes of the runs that started on it.
-- That number only rises, so a summary of the day's runs is valid while the number is the same. For that reason rows
-- are never deleted.
CREATE TABLE {schema}.run_days (
    day       date   NOT NULL PRIMARY KEY,
    succeeded bigint NOT NULL,
    failed    bigint NOT NULL,
    changes   bigint NOT NULL
);

-- Cached timeseries buckets of whole days, valid while changes equals that of the day. scope is a flow_id, or empty
-- for all flows.
CREATE TABLE {schema}.run_summaries (
    granularity text   NOT NULL,
    scope       text   NOT NULL,
    day         date   NOT NULL,
    changes     bigint NOT NULL,
    buckets     text   NOT NULL,
    PRIMARY KEY (granularity, scope, day)
);
CREATE INDEX run_summaries_by_day ON {schema}.run_summaries (day);

CREATE FUNCTION {schema}.fold_run_changes() RETURNS void LANGUAGE plpgsql AS $fold$
BEGIN
    -- One at a time, and whoever comes second has nothing to do. Not in a transaction that keeps one
    -- snapshot: it could meet rows that another one folded after it.
    IF current_setting('transaction_isolation') <> 'read committed'
       OR NOT pg_try_advisory_xact_lock(hashtextextended($name${schema}$name$, 2)) THEN
        RETURN;
    END IF;
    WITH taken AS (
        DELETE FROM {schema}.run_changes RETURNING *
    ), counted AS (
        INSERT INTO {schema}.run_counts AS c (flow_id, running, succeeded, failed, cancelled)
        SELECT flow_id, coalesce(sum(amount) FILTER (WHERE status = 'Running'), 0),
               coalesce(sum(amount) FILTER (WHERE status = 'Succeeded'), 0),
               coalesce(sum(amount) FILTER (WHERE status = 'Failed'), 0),
               coalesce(sum(amount) FILTER (WHERE status = 'Cancelled'), 0)
        FROM taken GROUP BY flow_id
        ON CONFLICT (flow_id) DO UPDATE SET running = c.running + excluded.running,
            succeeded = c.succeeded + excluded.succeeded, failed = c.failed + excluded.failed,
            cancelled = c.cancelled + excluded.cancelled
    )
    INSERT INTO {schema}.run_days AS d (day, succeeded, failed, changes)
    SELECT day, sum(succeeded), sum(failed), sum(changes) FROM (
        SELECT started_on AS day, 0 AS succeeded, 0 AS failed, 1 AS changes FROM taken
        UNION ALL
        SELECT completed_on, CASE status WHEN 'Succeeded' THEN amount ELSE 0 END,
               CASE status WHEN 'Failed' THEN amount ELSE 0 END, 0
        FROM taken WHERE completed_on IS NOT NULL
    ) parts GROUP BY day
    ON CONFLICT (day) DO UPDATE SET succeeded = d.succeeded + excluded.succeeded,
        failed = d.failed + excluded.failed, changes = d.changes + excluded.changes;
    DELETE FROM {schema}.run_counts WHERE running = 0 AND succeeded = 0 AND failed = 0 AND cancelled = 0;
END
$fold$;

CREATE FUNCTION {schema}.count_run_changes() RETURNS trigger LANGUAGE plpgsql AS $count$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO {schema}.run_changes VALUES (
            NEW.flow_id, (NEW.started_at AT TIME ZONE 'UTC')::date,
            (NEW.completed_at AT TIME ZONE 'UTC')::date, NEW.status, 1
        );
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO {schema}.run_changes VALUES (
            OLD.flow_id, (OLD.started_at AT TIME ZONE 'UTC')::date,
            (OLD.completed_at AT TIME ZONE 'UTC')::date, OLD.status, -1
        );
    ELSE
        INSERT INTO {schema}.run_changes VALUES (
            OLD.flow_id, (OLD.started_at AT TIME ZONE 'UTC')::date,
            (OLD.completed_at AT TIME ZONE 'UTC')::date, OLD.status, -1
        ), (
            NEW.flow_id, (NEW.started_at AT TIME ZONE 'UTC')::date,
            (NEW.completed_at AT TIME ZONE 'UTC')::date, NEW.status, 1
        );
    END IF;
    IF random() < 0.004 THEN
        PERFORM {schema}.fold_run_changes();
    END IF;
    RETURN NULL;
END
$count$;

CREATE FUNCTION {schema}.forget_run_changes() RETURNS trigger LANGUAGE plpgsql AS $forget$
BEGIN
    DELETE FROM {schema}.run_changes;
    DELETE FROM {schema}.run_counts;
    UPDATE {schema}.run_days SET succeeded = 0, failed = 0, changes = changes + 1;
    RETURN NULL;
END
$forget$;

CREATE TRIGGER count_started AFTER INSERT ON {schema}.runs
    FOR EACH ROW EXECUTE FUNCTION {schema}.count_run_changes();
CREATE TRIGGER count_changed AFTER UPDATE OF status, completed_at, started_at, flow_id ON {schema}.runs
    FOR EACH ROW EXECUTE FUNCTION {schema}.count_run_changes();
CREATE TRIGGER count_deleted AFTER DELETE ON {schema}.runs
    FOR EACH ROW EXECUTE FUNCTION {schema}.count_run_changes();
CREATE TRIGGER count_truncated AFTER TRUNCATE ON {schema}.runs
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}.forget_run_changes();

INSERT INTO {schema}.run_changes
SELECT flow_id, (started_at AT TIME ZONE 'UTC')::date, (completed_at AT TIME ZONE 'UTC')::date, status,
       count(*)
FROM {schema}.runs GROUP BY 1, 2, 3, 4;
SELECT {schema}.fold_run_changes();
