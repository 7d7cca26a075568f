-- works_from: 1
--
-- Bounds that let claim_next_steps and get_stalled_steps read by index what is due, and nothing else.
--
-- 1. claim_next_steps begins to read where the last claim found the first step (claim_bounds.py). After a claim has read
-- a queue up to now, a row can appear before that place only if its ready_at lies in the past when it is written. late
-- marks these rows, and index pending_late has them alone, so that a claim reads both.
--
-- Each statement that writes ready_at compares it with the server's clock and sets late. Its transaction has an id by
-- then, because it has written the step before. The default is true for the statements of older versions.
ALTER TABLE {schema}.pending ADD COLUMN late boolean NOT NULL DEFAULT false;
ALTER TABLE {schema}.pending ALTER COLUMN late SET DEFAULT true;
-- With an expression, so that no plan reads pending_by_time in its place, and the other columns for index-only scans.
CREATE INDEX pending_late ON {schema}.pending (queue, priority, (CASE WHEN late THEN ready_at END), run_id, step_key)
    INCLUDE (ready_at, late) WHERE late;

-- 2. stall_bound of a Running run is the time before which none of its steps without a queue stalls (STP-8); those with
-- a queue are found in table pending. get_stalled_steps sets it where steps sleep or have stalled for long
-- (stalled.py), and marks the steps as noted. Other runs have no bound, and it reads their steps. The statements of a
-- step's usual way change neither the bound nor the mark. After any other change of a noted step a trigger removes its
-- mark and adds the run to stall_changes, so that get_stalled_steps reads its steps again.
--
-- A step that is added to a run with a bound is noted at first, so that the trigger sees it; the statement knows from
-- the locked run. The default is true for the statements of older versions.
ALTER TABLE {schema}.runs ADD COLUMN stall_bound timestamptz NOT NULL DEFAULT '-infinity';
ALTER TABLE {schema}.steps ADD COLUMN stall_noted boolean NOT NULL DEFAULT false;
ALTER TABLE {schema}.steps ALTER COLUMN stall_noted SET DEFAULT true;
-- With an expression, so that no plan reads another index in its place.
CREATE INDEX runs_by_stall_bound ON {schema}.runs ((CASE WHEN status = 'Running' THEN stall_bound END), run_id)
    WHERE status = 'Running';
-- The key is random, so that adding a row never waits for another transaction.
CREATE TABLE {schema}.stall_changes (
    change_id uuid NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY,
    run_id    uuid NOT NULL
);

-- A run that provably has no bound is not added. The lock keeps get_stalled_steps from setting one; it is not waited
-- for, because the transaction may have locked steps of the run.
CREATE FUNCTION {schema}.note_stall_change() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $note$
BEGIN
    PERFORM set_config('search_path', 'pg_catalog, ' || quote_ident(TG_TABLE_SCHEMA) || ', pg_temp', true);
    UPDATE steps SET stall_noted = false
    WHERE run_id = NEW.run_id AND step_key = NEW.step_key AND stall_noted;
    PERFORM FROM runs WHERE run_id = NEW.run_id AND stall_bound = '-infinity' FOR SHARE SKIP LOCKED;
    IF NOT FOUND THEN
        INSERT INTO stall_changes (run_id) VALUES (NEW.run_id);
    END IF;
    RETURN NULL;
END
$note$;
CREATE TRIGGER note_added AFTER INSERT ON {schema}.steps FOR EACH ROW
    WHEN (NEW.stall_noted) EXECUTE FUNCTION {schema}.note_stall_change();
CREATE TRIGGER note_changed AFTER UPDATE ON {schema}.steps FOR EACH ROW
    WHEN (OLD.stall_noted AND NEW.stall_noted) EXECUTE FUNCTION {schema}.note_stall_change();
-- A step that has ended is not noted, and starts again or is reopened.
CREATE TRIGGER note_restarted AFTER UPDATE OF status ON {schema}.steps FOR EACH ROW
    WHEN (OLD.status IN ('Succeeded', 'Failed', 'Skipped')
          AND (NEW.status IS NULL OR NEW.status IN ('Pending', 'Running')))
    EXECUTE FUNCTION {schema}.note_stall_change();

-- As in migration 8, with late, and with stall_changes where a step leaves its queue.
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
        PERFORM FROM runs WHERE run_id = NEW.run_id AND stall_bound = '-infinity' FOR SHARE SKIP LOCKED;
        IF NOT FOUND THEN
            INSERT INTO stall_changes (run_id) VALUES (NEW.run_id);
        END IF;
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
                ready < clock_timestamp() - interval '1 second')
        ON CONFLICT (run_id, step_key) DO UPDATE
            SET queue = excluded.queue, priority = excluded.priority, ready_at = excluded.ready_at,
                late = excluded.late
            WHERE (p.queue, p.priority, p.ready_at)
                  IS DISTINCT FROM (excluded.queue, excluded.priority, excluded.ready_at);
    END IF;
    RETURN NULL;
END
$index$;

-- Every statement that changes a waiter has locked the run.
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
        UPDATE steps SET stall_noted = false
        WHERE run_id = changed.run_id AND step_key = waiting AND stall_noted;
        IF FOUND THEN
            INSERT INTO stall_changes (run_id) VALUES (changed.run_id);
        END IF;
        PERFORM FROM steps WHERE run_id = changed.run_id AND step_key = waiting AND dispatch_queue IS NOT NULL
        FOR NO KEY UPDATE;
    ELSE
        PERFORM FROM steps WHERE run_id = changed.run_id AND dispatch_queue IS NOT NULL
        ORDER BY step_key FOR NO KEY UPDATE;
    END IF;
    IF FOUND THEN
        INSERT INTO pending (run_id, step_key, queue, priority, ready_at, late)
        SELECT f.*, f.ready_at < clock_timestamp() - interval '1 second' FROM (
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

-- Roles with privileges on table steps get the same on this one.
DO $grant$
DECLARE
    one record;
BEGIN
    FOR one IN
        SELECT DISTINCT acl.grantee, acl.privilege_type
        FROM pg_catalog.pg_class c, aclexplode(c.relacl) acl
        WHERE c.oid = $name${schema}.steps$name$::regclass AND acl.grantee <> c.relowner
          AND acl.privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
    LOOP
        EXECUTE 'GRANT ' || one.privilege_type || ' ON ' || $name${schema}.stall_changes$name$ || ' TO '
            || CASE one.grantee WHEN 0 THEN 'PUBLIC' ELSE one.grantee::regrole::text END;
    END LOOP;
END
$grant$;
