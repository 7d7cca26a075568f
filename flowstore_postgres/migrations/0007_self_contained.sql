-- works_from: 1
--
-- Three faults of migrations 2 and 3 are fixed here.
--
-- 1. run_changes had no key, which a publication FOR ALL TABLES needs for every DELETE. The key is a random uuid
--    and not a sequence: logical replication does not copy sequences, so a subscriber that takes over would
--    assign keys that exist already.
-- 2. Functions named their schema, so a renamed schema used the tables of another one. Now each function finds
--    its schema through the OID of a table or schema and sets search_path for its own duration. EXECUTE with
--    the name would plan every statement again.
-- 3. A dump restored with --data-only counted every run twice: the triggers on runs count the loaded runs, and
--    the loaded sums count them too. Rows that are loaded into the tables of sums now add nothing to a sum.
--
-- Folding can no longer fail the transaction of its writer. It runs in a subtransaction, waits at most 50 ms for
-- a lock and folds at most 10,000 rows. The server's log has the reason when it fails, and "flowstore doctor"
-- reports rows that stay unfolded. Each further fold of the same transaction is half as likely and may take twice
-- as many rows. A bulk load thus folds some ten times; once in 250 runs would be quadratic, because each fold reads
-- past all rows that the transaction has folded before.
--
-- Server CPU time per run with the index for searches, medians of interleaved rounds on PostgreSQL 18.6 (15.18):
-- a start takes 36 (33) instead of 24 (23) microseconds, an end 66 (70) instead of 37 (38). At an end, keys are
-- about 12 of the difference, search_path 12, recognising loaded rows 4. EXECUTE instead of search_path would take
-- 35 more. The subtransaction of a fold takes 0.9 microseconds, once in 250 changes.

-- Rewrites the table, which is small. The two rows of an updated run share an id and have the amounts 1 and -1,
-- because a random uuid takes the server three microseconds.
ALTER TABLE {schema}.run_changes
    ADD COLUMN id uuid NOT NULL DEFAULT gen_random_uuid(), ADD PRIMARY KEY (id, amount), REPLICA IDENTITY DEFAULT;

-- search_path of a function ends with it, so set_config() in the body changes nothing for its caller. pg_temp
-- is named because it would come first otherwise.

CREATE FUNCTION {schema}.fold_run_changes(home regnamespace DEFAULT $name${schema}$name$::regnamespace)
RETURNS bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET lock_timeout = '50ms' AS $fold$
DECLARE
    folded bigint;
    most bigint := 10000 * 2 ^ coalesce(nullif(current_setting('flowstore.folds', true), '')::integer, 0);
BEGIN
    PERFORM set_config('search_path', 'pg_catalog, ' || home::text || ', pg_temp', true);
    -- One session at a time; a second one has nothing to do. Not in a transaction that keeps one snapshot: it
    -- could read rows that were folded after the snapshot. flowstore_postgres/counters.py takes the same lock.
    IF current_setting('transaction_isolation') <> 'read committed'
       OR NOT pg_try_advisory_xact_lock(hashtextextended('run_changes', home::oid::bigint)) THEN
        RETURN 0;
    END IF;
    PERFORM set_config('flowstore.folding', 'on', true);
    WITH taken AS (
        DELETE FROM run_changes WHERE ctid = ANY(ARRAY(SELECT ctid FROM run_changes LIMIT most)) RETURNING *
    ), counted AS (
        INSERT INTO run_counts AS c (flow_id, running, succeeded, failed, cancelled)
        SELECT flow_id, coalesce(sum(amount) FILTER (WHERE status = 'Running'), 0),
               coalesce(sum(amount) FILTER (WHERE status = 'Succeeded'), 0),
               coalesce(sum(amount) FILTER (WHERE status = 'Failed'), 0),
               coalesce(sum(amount) FILTER (WHERE status = 'Cancelled'), 0)
        FROM taken GROUP BY flow_id
        ON CONFLICT (flow_id) DO UPDATE SET running = c.running + excluded.running,
            succeeded = c.succeeded + excluded.succeeded, failed = c.failed + excluded.failed,
            cancelled = c.cancelled + excluded.cancelled
    ), dated AS (
        INSERT INTO run_days AS d (day, succeeded, failed, changes)
        SELECT day, sum(succeeded), sum(failed), sum(changes) FROM (
            SELECT started_on AS day, 0 AS succeeded, 0 AS failed, 1 AS changes FROM taken
            UNION ALL
            SELECT completed_on, CASE status WHEN 'Succeeded' THEN amount ELSE 0 END,
                   CASE status WHEN 'Failed' THEN amount ELSE 0 END, 0
            FROM taken WHERE completed_on IS NOT NULL
        ) parts GROUP BY day
        ON CONFLICT (day) DO UPDATE SET succeeded = d.succeeded + excluded.succeeded,
            failed = d.failed + excluded.failed, changes = d.changes + excluded.changes
    )
    SELECT count(*) INTO folded FROM taken;
    DELETE FROM run_counts WHERE running = 0 AND succeeded = 0 AND failed = 0 AND cancelled = 0;
    PERFORM set_config('flowstore.folding', 'off', true);
    RETURN folded;
END
$fold$;

CREATE OR REPLACE FUNCTION {schema}.count_run_changes() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $count$
DECLARE
    change uuid := gen_random_uuid();
    folds integer;
BEGIN
    PERFORM set_config('search_path', 'pg_catalog, ' || quote_ident(TG_TABLE_SCHEMA) || ', pg_temp', true);
    IF TG_OP = 'INSERT' THEN
        INSERT INTO run_changes VALUES (
            NEW.flow_id, (NEW.started_at AT TIME ZONE 'UTC')::date,
            (NEW.completed_at AT TIME ZONE 'UTC')::date, NEW.status, 1, change
        );
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO run_changes VALUES (
            OLD.flow_id, (OLD.started_at AT TIME ZONE 'UTC')::date,
            (OLD.completed_at AT TIME ZONE 'UTC')::date, OLD.status, -1, change
        );
    ELSE
        INSERT INTO run_changes VALUES (
            OLD.flow_id, (OLD.started_at AT TIME ZONE 'UTC')::date,
            (OLD.completed_at AT TIME ZONE 'UTC')::date, OLD.status, -1, change
        ), (
            NEW.flow_id, (NEW.started_at AT TIME ZONE 'UTC')::date,
            (NEW.completed_at AT TIME ZONE 'UTC')::date, NEW.status, 1, change
        );
    END IF;
    IF random() < 0.004 THEN
        folds := coalesce(nullif(current_setting('flowstore.folds', true), '')::integer, 0);
        IF random() * 2 ^ folds < 1 THEN
            BEGIN
                PERFORM fold_run_changes();
            EXCEPTION WHEN OTHERS THEN
                -- The rows are folded later; every sum is right without that.
                RAISE LOG 'flowstore: folding %.run_changes failed: % (SQLSTATE %)',
                    quote_ident(TG_TABLE_SCHEMA), SQLERRM, SQLSTATE;
            END;
            PERFORM set_config('flowstore.folds', (folds + 1)::text, true);
        END IF;
    END IF;
    RETURN NULL;
END
$count$;

CREATE OR REPLACE FUNCTION {schema}.forget_run_changes() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $forget$
BEGIN
    PERFORM set_config('search_path', 'pg_catalog, ' || quote_ident(TG_TABLE_SCHEMA) || ', pg_temp', true);
    DELETE FROM run_changes;
    DELETE FROM run_counts;
    UPDATE run_days SET succeeded = 0, failed = 0, changes = changes + 1;
    RETURN NULL;
END
$forget$;

-- A row that is loaded into a table of counters is counted anyway when its run is loaded. Only a day's number of
-- changes is added: it must exceed the numbers of the summaries in the same dump.
CREATE FUNCTION {schema}.ignore_loaded_sums() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $ignore$
BEGIN
    IF TG_TABLE_NAME = 'run_changes' THEN
        NEW.id := gen_random_uuid();
        NEW.amount := 0;
        RETURN NEW;
    ELSIF TG_TABLE_NAME = 'run_days' THEN
        PERFORM set_config('search_path', 'pg_catalog, ' || quote_ident(TG_TABLE_SCHEMA) || ', pg_temp', true);
        INSERT INTO run_days AS d (day, succeeded, failed, changes) VALUES (NEW.day, 0, 0, NEW.changes)
        ON CONFLICT (day) DO UPDATE SET changes = d.changes + excluded.changes;
    END IF;
    RETURN NULL;
END
$ignore$;

-- The triggers on runs insert at a trigger depth of 1. A direct call of fold_run_changes() inserts at depth 0 and
-- sets flowstore.folding.
CREATE TRIGGER ignore_loaded BEFORE INSERT ON {schema}.run_changes FOR EACH ROW
    WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION {schema}.ignore_loaded_sums();
CREATE TRIGGER ignore_loaded BEFORE INSERT ON {schema}.run_counts FOR EACH ROW
    WHEN (pg_trigger_depth() = 0 AND coalesce(current_setting('flowstore.folding', true), '') <> 'on')
    EXECUTE FUNCTION {schema}.ignore_loaded_sums();
CREATE TRIGGER ignore_loaded BEFORE INSERT ON {schema}.run_days FOR EACH ROW
    WHEN (pg_trigger_depth() = 0 AND coalesce(current_setting('flowstore.folding', true), '') <> 'on')
    EXECUTE FUNCTION {schema}.ignore_loaded_sums();

CREATE OR REPLACE FUNCTION {schema}.note_ended_run() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $note$
BEGIN
    PERFORM set_config('search_path', 'pg_catalog, ' || quote_ident(TG_TABLE_SCHEMA) || ', pg_temp', true);
    INSERT INTO unsearched VALUES (NEW.run_id) ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$note$;

CREATE OR REPLACE FUNCTION {schema}.note_late_step() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $note$
BEGIN
    PERFORM set_config('search_path', 'pg_catalog, ' || quote_ident(TG_TABLE_SCHEMA) || ', pg_temp', true);
    INSERT INTO unsearched
    SELECT run_id FROM runs WHERE run_id = NEW.run_id AND status <> 'Running'
    -- Locks the row if it exists, so that no session gathers the run without the new text.
    ON CONFLICT (run_id) DO UPDATE SET run_id = excluded.run_id;
    RETURN NULL;
END
$note$;

CREATE OR REPLACE FUNCTION {schema}.forget_text() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $forget$
BEGIN
    PERFORM set_config('search_path', 'pg_catalog, ' || quote_ident(TG_TABLE_SCHEMA) || ', pg_temp', true);
    DELETE FROM run_texts WHERE run_id = OLD.run_id;
    DELETE FROM unsearched WHERE run_id = OLD.run_id;
    RETURN NULL;
END
$forget$;

-- A dump has these rows too, and search_loaded has added them when the runs were loaded.
CREATE FUNCTION {schema}.skip_known_run() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $skip$
BEGIN
    PERFORM set_config('search_path', 'pg_catalog, ' || quote_ident(TG_TABLE_SCHEMA) || ', pg_temp', true);
    IF EXISTS (SELECT FROM unsearched WHERE run_id = NEW.run_id) THEN
        RETURN NULL;
    END IF;
    RETURN NEW;
END
$skip$;
CREATE TRIGGER skip_known BEFORE INSERT ON {schema}.unsearched FOR EACH ROW
    WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION {schema}.skip_known_run();

-- As in migration 3. At another isolation level than READ COMMITTED the statements would not see a text that
-- was committed before the locks were taken, so nothing is gathered.
CREATE FUNCTION {schema}.gather_texts(
    most integer, home regnamespace DEFAULT $name${schema}$name$::regnamespace
) RETURNS integer LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $gather$
DECLARE
    chosen uuid[];
BEGIN
    PERFORM set_config('search_path', 'pg_catalog, ' || home::text || ', pg_temp', true);
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RETURN 0;
    END IF;
    SELECT array_agg(run_id) INTO chosen FROM (
        SELECT run_id FROM unsearched JOIN runs USING (run_id)
        ORDER BY run_id LIMIT most FOR UPDATE SKIP LOCKED
    ) locked;
    IF chosen IS NULL THEN
        RETURN 0;
    END IF;
    DELETE FROM unsearched WHERE run_id = ANY(chosen);
    UPDATE steps SET searched_open = true
    WHERE run_id = ANY(chosen) AND status IN ('Pending', 'Running') AND NOT searched_open;
    INSERT INTO run_texts AS t (run_id, text)
    SELECT r.run_id, lower(concat_ws(
        E'\n', r.run_id::text, r.flow_name, r.trigger_key, r.status, r.job_id,
        (SELECT string_agg(concat_ws(E'\n', s.step_key, left(s.error_message, 65536),
                                     left(s.output_json, 65536)), E'\n')
         FROM steps s WHERE s.run_id = r.run_id AND s.status IS NOT NULL),
        (SELECT string_agg(concat_ws(E'\n', left(a.error_message, 65536), left(a.output_json, 65536)), E'\n')
         FROM attempts a WHERE a.run_id = r.run_id)
    ) COLLATE "C")
    FROM runs r WHERE r.run_id = ANY(chosen)
    ON CONFLICT (run_id) DO UPDATE SET text = excluded.text;
    RETURN cardinality(chosen);
END
$gather$;

CREATE FUNCTION {schema}.index_texts(home regnamespace DEFAULT $name${schema}$name$::regnamespace)
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $index$
DECLARE
    place text;
BEGIN
    SELECT quote_ident(n.nspname) INTO place
    FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'pg_trgm';
    EXECUTE 'CREATE INDEX IF NOT EXISTS run_texts_by_trigram ON ' || home::text || '.run_texts'
            || ' USING gin (text ' || place || '.gin_trgm_ops)';
END
$index$;

CREATE FUNCTION {schema}.enable_search(home regnamespace DEFAULT $name${schema}$name$::regnamespace)
RETURNS boolean LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $enable$
BEGIN
    PERFORM set_config('search_path', 'pg_catalog, ' || home::text || ', pg_temp', true);
    IF EXISTS (SELECT FROM pg_trigger WHERE tgname = 'search_ended' AND tgrelid = 'runs'::regclass) THEN
        RETURN true;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_trgm') THEN
        RETURN false;
    END IF;
    LOCK TABLE runs IN ACCESS EXCLUSIVE MODE;
    LOCK TABLE steps IN SHARE ROW EXCLUSIVE MODE;
    PERFORM index_texts();
    CREATE TRIGGER search_ended AFTER UPDATE OF status ON runs FOR EACH ROW
        WHEN (NEW.status <> 'Running') EXECUTE FUNCTION note_ended_run();
    CREATE TRIGGER search_loaded AFTER INSERT ON runs FOR EACH ROW
        WHEN (NEW.status <> 'Running') EXECUTE FUNCTION note_ended_run();
    CREATE TRIGGER search_deleted AFTER DELETE ON runs FOR EACH ROW EXECUTE FUNCTION forget_text();
    CREATE TRIGGER search_late AFTER UPDATE OF status ON steps FOR EACH ROW
        WHEN (OLD.searched_open OR (OLD.status IS NULL AND NEW.status = 'Skipped'))
        EXECUTE FUNCTION note_late_step();
    CREATE TRIGGER search_skipped AFTER INSERT ON steps FOR EACH ROW
        WHEN (NEW.status = 'Skipped') EXECUTE FUNCTION note_late_step();
    INSERT INTO unsearched SELECT run_id FROM runs WHERE status <> 'Running' ON CONFLICT DO NOTHING;
    RETURN true;
END
$enable$;

-- The functions with a new argument replace those without it; the roles that may execute them stay the same.
DO $replace$
DECLARE
    replaced record;
    role oid;
BEGIN
    FOR replaced IN
        SELECT old.oid::regprocedure AS old, new.oid::regprocedure AS new, old.proowner AS owner,
               coalesce(old.proacl, acldefault('f', old.proowner)) AS rights
        FROM pg_catalog.pg_proc old JOIN pg_catalog.pg_proc new USING (pronamespace, proname)
        WHERE pronamespace = $name${schema}$name$::regnamespace AND new.pronargs = old.pronargs + 1
          AND proname IN ('fold_run_changes', 'gather_texts', 'index_texts', 'enable_search')
    LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', replaced.new);
        FOR role IN SELECT DISTINCT grantee FROM aclexplode(replaced.rights) WHERE grantee <> replaced.owner LOOP
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', replaced.new,
                           CASE role WHEN 0 THEN 'PUBLIC' ELSE role::regrole::text END);
        END LOOP;
        EXECUTE format('DROP FUNCTION %s', replaced.old);
    END LOOP;
END
$replace$;
