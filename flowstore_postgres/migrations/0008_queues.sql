-- works_from: 1
--
-- Queues (QUE). A dispatch that names a queue stores the queue, its priority, and the step_type and input of the
-- attempts to come. Table pending has one row for each queued step that is not terminal, with the time from which it is
-- ready (QUE-1), so that claim_next_steps finds the next steps by index.
--
-- pending_writes is set while a step is queued, to 0 at first. A statement that writes the step's row of pending too
-- increments it. After any other change of a queued step a trigger updates pending, so that it is right whichever
-- statement made the change, one of an older flowstore included. The conditions of the triggers are short, because the
-- server reads them anew in each statement: one with ten columns took 9 microseconds, these take 1.5 together.
--
-- A row of pending does not depend on the status of its run. A claim deletes rows of ended and deleted runs when it
-- finds them, and reopening a run adds its rows again.
ALTER TABLE {schema}.steps
    ADD COLUMN dispatch_queue      text COLLATE "C",
    ADD COLUMN dispatch_priority   smallint,
    ADD COLUMN dispatch_step_type  text,
    ADD COLUMN dispatch_input_json text,
    ADD COLUMN pending_writes      integer;

-- ready_at is infinity for a claim without lease and for a waiter without end. Rows are short-lived, as in any table of
-- a queue, so the table is vacuumed early and without pauses.
CREATE TABLE {schema}.pending (
    run_id   uuid        NOT NULL,
    step_key text        COLLATE "C" NOT NULL,
    queue    text        COLLATE "C" NOT NULL,
    priority smallint    NOT NULL,
    ready_at timestamptz NOT NULL,
    PRIMARY KEY (run_id, step_key)
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0,
    autovacuum_vacuum_insert_scale_factor = 0.1
);
-- The order of QUE-2 within one queue and priority.
CREATE INDEX pending_by_time ON {schema}.pending (queue, priority, ready_at, run_id, step_key);

CREATE FUNCTION {schema}.index_step() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $index$
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
        INSERT INTO pending AS p (run_id, step_key, queue, priority, ready_at)
        VALUES (NEW.run_id, NEW.step_key, NEW.dispatch_queue, NEW.dispatch_priority, greatest(
            coalesce(NEW.due_at, NEW.dispatched_at),
            CASE WHEN NEW.claimed_at IS NOT NULL THEN coalesce(NEW.claim_expires_at, 'infinity') END,
            (SELECT coalesce(w.expires_at, 'infinity') FROM waiters w
             WHERE w.run_id = NEW.run_id AND w.step_key = NEW.step_key AND w.delivered_at IS NULL)))
        ON CONFLICT (run_id, step_key) DO UPDATE
            SET queue = excluded.queue, priority = excluded.priority, ready_at = excluded.ready_at
            WHERE (p.queue, p.priority, p.ready_at)
                  IS DISTINCT FROM (excluded.queue, excluded.priority, excluded.ready_at);
    END IF;
    RETURN NULL;
END
$index$;

-- Adds or updates the rows of one step after a change of its waiter, or of every step of a run that is reopened. The
-- steps are locked because a statement may change them without a lock on the run. The second statement sees the
-- changes that the first one waited for.
CREATE FUNCTION {schema}.index_steps() RETURNS trigger LANGUAGE plpgsql
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
        INSERT INTO pending (run_id, step_key, queue, priority, ready_at)
        SELECT s.run_id, s.step_key, s.dispatch_queue, s.dispatch_priority, greatest(
            coalesce(s.due_at, s.dispatched_at),
            CASE WHEN s.claimed_at IS NOT NULL THEN coalesce(s.claim_expires_at, 'infinity') END,
            CASE WHEN w.run_id IS NOT NULL THEN coalesce(w.expires_at, 'infinity') END)
        FROM steps s
        LEFT JOIN waiters w ON w.run_id = s.run_id AND w.step_key = s.step_key AND w.delivered_at IS NULL
        WHERE s.run_id = changed.run_id AND (waiting IS NULL OR s.step_key = waiting)
          AND s.dispatch_queue IS NOT NULL AND s.dispatched_at IS NOT NULL
          AND (s.status IS NULL OR s.status IN ('Pending', 'Running'))
        ORDER BY s.step_key
        ON CONFLICT (run_id, step_key) DO UPDATE
            SET queue = excluded.queue, priority = excluded.priority, ready_at = excluded.ready_at;
    END IF;
    RETURN NULL;
END
$index$;

CREATE TRIGGER index_inserted AFTER INSERT ON {schema}.steps FOR EACH ROW
    WHEN (NEW.pending_writes = 0) EXECUTE FUNCTION {schema}.index_step();
CREATE TRIGGER index_changed AFTER UPDATE ON {schema}.steps FOR EACH ROW
    WHEN (NEW.pending_writes = coalesce(OLD.pending_writes, 0)) EXECUTE FUNCTION {schema}.index_step();
CREATE TRIGGER index_deleted AFTER DELETE ON {schema}.steps FOR EACH ROW
    WHEN (OLD.pending_writes IS NOT NULL) EXECUTE FUNCTION {schema}.index_step();
CREATE TRIGGER index_waiting AFTER INSERT OR DELETE OR UPDATE OF expires_at, delivered_at ON {schema}.waiters
    FOR EACH ROW EXECUTE FUNCTION {schema}.index_steps();
-- A run that has no end: the condition is shorter than one on its status.
CREATE TRIGGER index_reopened AFTER UPDATE OF status ON {schema}.runs FOR EACH ROW
    WHEN (NEW.completed_at IS NULL) EXECUTE FUNCTION {schema}.index_steps();

-- The steps of a call of claim_next_steps, so that it finds them after a lost reply (QUE-3).
ALTER TABLE {schema}.commits ADD COLUMN run_ids uuid[], ADD COLUMN step_keys text[];

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
        EXECUTE 'GRANT ' || one.privilege_type || ' ON ' || $name${schema}.pending$name$ || ' TO '
            || CASE one.grantee WHEN 0 THEN 'PUBLIC' ELSE one.grantee::regrole::text END;
    END LOOP;
END
$grant$;
