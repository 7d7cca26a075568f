-- works_from: 1
--
-- Signals that come before their waiters (MBX). Triggers give a buffered payload to the next waiter of its name, and
-- delete the payloads of a deleted run, so both happen whichever statement changes a waiter or a run, one of an older
-- flowstore included. Every such statement follows the lock of the run, so a trigger sees each payload that was
-- buffered before.
--
-- Table deliveries also remembers the delivery_id of a buffered payload, with an empty step_key, which is no key of a
-- step, and the time of buffering in delivered_at. An older flowstore therefore finds the id and delivers nothing twice.
CREATE TABLE {schema}.buffered_signals (
    run_id       uuid        NOT NULL,
    signal_name  text        COLLATE "C" NOT NULL,
    number       bigint      NOT NULL, -- rises in the order in which the payloads of a run were buffered
    payload_json text        NOT NULL,
    buffered_at  timestamptz NOT NULL,
    PRIMARY KEY (run_id, signal_name, number)
);

-- A trigger does not know a virtual clock, so register_waiter sets the time of a renamed waiter again.
CREATE FUNCTION {schema}.take_buffered() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $take$
DECLARE
    taken text;
BEGIN
    PERFORM set_config('search_path', 'pg_catalog, ' || quote_ident(TG_TABLE_SCHEMA) || ', pg_temp', true);
    DELETE FROM buffered_signals
    WHERE run_id = NEW.run_id AND signal_name = NEW.signal_name AND number = (
        SELECT min(number) FROM buffered_signals WHERE run_id = NEW.run_id AND signal_name = NEW.signal_name)
    RETURNING payload_json INTO taken;
    IF FOUND THEN
        UPDATE waiters SET payload_json = taken,
            delivered_at = CASE TG_OP WHEN 'INSERT' THEN NEW.created_at ELSE clock_timestamp() END
        WHERE run_id = NEW.run_id AND step_key = NEW.step_key;
    END IF;
    RETURN NULL;
END
$take$;
CREATE TRIGGER take_buffered AFTER INSERT OR UPDATE OF signal_name ON {schema}.waiters FOR EACH ROW
    WHEN (NEW.delivered_at IS NULL AND NEW.expired_at IS NULL) EXECUTE FUNCTION {schema}.take_buffered();

-- One call for each statement: cleanup deletes many runs in one. The array makes the planner use the primary key.
CREATE FUNCTION {schema}.drop_buffered() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $drop$
BEGIN
    PERFORM set_config('search_path', 'pg_catalog, ' || quote_ident(TG_TABLE_SCHEMA) || ', pg_temp', true);
    DELETE FROM buffered_signals WHERE run_id = ANY(ARRAY(SELECT run_id FROM deleted));
    RETURN NULL;
END
$drop$;
CREATE TRIGGER drop_buffered AFTER DELETE ON {schema}.runs REFERENCING OLD TABLE AS deleted
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}.drop_buffered();

-- Roles with privileges on table waiters get the same on this one.
DO $grant$
DECLARE
    one record;
BEGIN
    FOR one IN
        SELECT DISTINCT acl.grantee, acl.privilege_type
        FROM pg_catalog.pg_class c, aclexplode(c.relacl) acl
        WHERE c.oid = $name${schema}.waiters$name$::regclass AND acl.grantee <> c.relowner
          AND acl.privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
    LOOP
        EXECUTE 'GRANT ' || one.privilege_type || ' ON ' || $name${schema}.buffered_signals$name$ || ' TO '
            || CASE one.grantee WHEN 0 THEN 'PUBLIC' ELSE one.grantee::regrole::text END;
    END LOOP;
END
$grant$;
