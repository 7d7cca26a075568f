-- works_from: 1
--
-- Claims that begin to read where the last one found the first step (claim_bounds.py). After a claim has read a queue up
-- to now, a row can appear before that place only if it is written with a ready_at that lies in the past already. late
-- marks these rows, and index pending_late has them alone, so that a claim reads both.
--
-- A statement that writes ready_at sets late too, compared with the server's clock. The transaction has an id by then,
-- because it has written the step before: no id assigned after a moment belongs to a row that is not late and has a
-- ready_at more than two seconds before that moment. The default is true for the statements of older versions.
ALTER TABLE {schema}.pending ADD COLUMN late boolean NOT NULL DEFAULT false;
ALTER TABLE {schema}.pending ALTER COLUMN late SET DEFAULT true;
-- With an expression, so that no plan reads pending_by_time in its place.
CREATE INDEX pending_late ON {schema}.pending (queue, priority, (CASE WHEN late THEN ready_at END), run_id, step_key)
    WHERE late;

-- As in migration 8, with late.
CREATE OR REPLACE FUNCTION {schema}.index_step() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $index$
DECLARE
    ready timestamptz;
BEGIN
    PERFORM set_config('search_path', 'pg_catalog, ' || quote_ident(TG_TABLE_SCHEMA) || ', pg_temp', true);
    IF TG_OP = 'DELETE' THEN
        DELETE FROM pending WHERE run_id = OLD.run_id AND step_key = OLD.step_key;
    ELSIF NEW.dispatched_at IS NULL OR NEW.dispatch_queue IS NULL THEN
        DELETE FROM pending WHERE run_id = NEW.run_id AND step_key = NEW.step_key;
        -- An older flowstore that releases a dispatch does not know these columns.
        UPDATE steps SET dispatch_queue = NULL, dispatch_priority = NULL, dispatch_step_type = NULL,
                         dispatch_input_json = NULL, pending_writes = NULL
        WHERE run_id = NEW.run_id AND step_key = NEW.step_key;
    ELSIF NEW.status IN ('Succeeded', 'Failed', 'Skipped') THEN
        DELETE FROM pending WHERE run_id = NEW.run_id AND step_key = NEW.step_key;
    ELSE
        ready := greatest(
            coalesce(NEW.due_at, NEW.dispatched_at),
            CASE WHEN NEW.claimed_at IS NOT NULL THEN coalesce(NEW.claim_expires_at, 'infinity') END,
            (SELECT coalesce(w.expires_at, 'infinity') FROM waiters w
             WHERE w.run_id = NEW.run_id AND w.step_key = NEW.step_key AND w.delivered_at IS NULL));
        INSERT INTO pending AS p (run_id, step_key, queue, priority, ready_at, late)
        VALUES (NEW.run_id, NEW.step_key, NEW.dispatch_queue, NEW.dispatch_priority, ready,
                ready < clock_timestamp() - interval '2 seconds')
        ON CONFLICT (run_id, step_key) DO UPDATE
            SET queue = excluded.queue, priority = excluded.priority, ready_at = excluded.ready_at,
                late = excluded.late
            WHERE (p.queue, p.priority, p.ready_at)
                  IS DISTINCT FROM (excluded.queue, excluded.priority, excluded.ready_at);
    END IF;
    RETURN NULL;
END
$index$;

CREATE OR REPLACE FUNCTION {schema}.index_steps() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $index$
DECLARE
    changed record;
    waiting text;
BEGIN
    PERFORM set_config('search_path', 'pg_catalog, ' || quote_ident(TG_TABLE_SCHEMA) || ', pg_temp', true);
    IF TG_OP = 'DELETE' THEN
        changed := OLD;
    ELSE
        changed := NEW;
    END IF;
    IF TG_TABLE_NAME = 'waiters' THEN
        waiting := changed.step_key;
        PERFORM FROM steps WHERE run_id = changed.run_id AND step_key = waiting AND dispatch_queue IS NOT NULL
        FOR NO KEY UPDATE;
    ELSE
        PERFORM FROM steps WHERE run_id = changed.run_id AND dispatch_queue IS NOT NULL
        ORDER BY step_key FOR NO KEY UPDATE;
    END IF;
    IF FOUND THEN
        INSERT INTO pending (run_id, step_key, queue, priority, ready_at, late)
        SELECT f.*, f.ready_at < clock_timestamp() - interval '2 seconds' FROM (
            SELECT s.run_id, s.step_key, s.dispatch_queue, s.dispatch_priority, greatest(
                coalesce(s.due_at, s.dispatched_at),
                CASE WHEN s.claimed_at IS NOT NULL THEN coalesce(s.claim_expires_at, 'infinity') END,
                CASE WHEN w.run_id IS NOT NULL THEN coalesce(w.expires_at, 'infinity') END) AS ready_at
            FROM steps s
            LEFT JOIN waiters w ON w.run_id = s.run_id AND w.step_key = s.step_key AND w.delivered_at IS NULL
            WHERE s.run_id = changed.run_id AND (waiting IS NULL OR s.step_key = waiting)
              AND s.dispatch_queue IS NOT NULL AND s.dispatched_at IS NOT NULL
              AND (s.status IS NULL OR s.status IN ('Pending', 'Running'))
        ) f
        ORDER BY f.step_key
        ON CONFLICT (run_id, step_key) DO UPDATE
            SET queue = excluded.queue, priority = excluded.priority, ready_at = excluded.ready_at,
                late = excluded.late;
    END IF;
    RETURN NULL;
END
$index$;
